"""argv -> Config -> run.

Imports `cli`, `setup` and `proxy`; everything that can go wrong before the command starts ends here in
one line on stderr and exit status 1.
"""

import contextlib
import gc
import ipaddress
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, NoReturn

from . import __version__, cli, ports, unix
from .config import MTU_DEFAULT, Config, ConfigError, IPAddress
from .observe.log import Log, LogFile
from .setup import isolation

if TYPE_CHECKING:
    from .own import Own
    from .services.desk import Desk
    from .setup.names import Names
    from .setup.template import Template
    from .translate import Translation

LOOPBACK = {4: ipaddress.ip_address("127.0.0.1"), 6: ipaddress.ip_address("::1")}


def main() -> NoReturn:
    """The command `pysplice`: exits with its status."""
    status = _main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    # All is closed and said; to take the interpreter apart would only keep whoever waits for the command
    os._exit(status)


def _main() -> int:
    # We wait for children, whatever whoever started us thinks of its own
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # As pasta: SIGINT ends us at once, unless whoever started us ignores it
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # What is imported and made until we serve stays; to look for garbage in it takes a tenth of that time
    gc.disable()
    as_pasta = os.path.basename(sys.argv[0]).startswith("pasta")
    name = "pasta" if as_pasta else "pysplice"
    if sys.argv[1:2] == ["ctl"] and not as_pasta:
        from .control import client

        return client(sys.argv[2:])
    try:
        config = cli.parse(sys.argv[1:], as_pasta)
        rules = ports.parse_all(config.ports, "none" if config.tap_fd is not None else "auto")
    except cli.Usage as e:
        sys.stdout.write(str(e))
        return 0
    except ConfigError as e:
        sys.stderr.write(f"{name}: {e}\n")
        return 1
    log = Log(config.quiet, config.debug, trace=config.trace, name=name, system=not config.log_file)
    isolation.close_leaked(config.tap_fd)
    try:
        isolation.check_file_limit()
        if config.log_file:
            fd = isolation.open_output(config.log_file)
            try:
                log.file = LogFile(fd, config.log_size, f"{name} {__version__}")
            except OSError as e:
                raise ConfigError(f"cannot write {config.log_file}: {e.strerror}") from None
        for warning in config.warnings:
            log.warning(warning)
        return run(config, rules, log)
    except Exception as e:
        text = str(e) if isinstance(e, ConfigError) else _described(e)
        log.warning(text)
        if log.file is not None:
            # The caller has to know
            sys.stderr.write(f"{name}: {text}\n")
        return 1


def _described(error: Exception) -> str:
    """A failure that nothing foresaw, in one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"cannot start: {where}{error.strerror}"
    return f"cannot start: {type(error).__name__}: {error}".splitlines()[0]


def run(config: Config, rules: tuple[ports.Rule, ...], log: Log) -> int:
    """Set everything up, and serve until the end; raises ConfigError before the command starts."""
    from .setup import netns

    if config.tap_fd is not None and (config.config_net or config.ns_mac):
        raise ConfigError(
            f"{'--config-net' if config.config_net else '--ns-mac-addr'} does not go with --fd"
        )
    if config.netns and "/" in config.netns:
        # In the background the working directory is another one
        config = config._replace(netns=os.path.abspath(config.netns))
    if config.control:
        config = config._replace(control=os.path.abspath(config.control))
    rules = tuple(_of_families(config, rule) for rule in rules if _wanted(config, rule))
    user = isolation.user_to_become(config.runas)
    if isolation.is_root():
        log.warning(_who_we_become(config, user))
    # What has a path is opened as the user that has started us, the rest is for the one that we become
    owner = os.geteuid()
    pid_fd = isolation.open_pid_file(config.pid_file) if config.pid_file else -1
    trace = isolation.open_trace(config.trace_window) if config.trace_window else None
    pcap_fd = isolation.open_output(config.pcap) if config.pcap else -1
    keeper = _keeper(config, rules, owner, user)
    isolation.become(user)
    starting = netns.start(config, _needs_agent(config, rules))

    # Imported here: `--help` and an error in the options need none of it, and a helper is at work meanwhile
    from .births import Link
    from .forward import Policy
    from .inside import Inside
    from .proxy import Proxy
    from .setup import interrupts, names, sandbox, seccomp
    from .tap import TapDevice

    guest = starting.finish()
    template = guest.template
    descriptors = isolation.raise_file_limit()

    background = config.attach and not config.foreground
    complaints: list[str] = []
    ready_fd, number = -1, os.getpid()
    if background:
        complaints.append(sandbox.leave_pid_namespace())
        ready_fd, number = isolation.to_background()
    loopback = _loopback_addresses(config, template)
    known = names.read(config, loopback)
    if not known.found and not config.splice_only:
        log.warning("no name server found on the host")
    desk = _desk(config, template, known)
    translation = _translation(config, template, known, loopback)
    link = Link(
        mtu=config.mtu or MTU_DEFAULT,
        tx_queue=guest.tx_queue,
        ipv4=config.ipv4,
        ipv6=config.ipv6,
        tcp=config.tcp,
        udp=config.udp,
        icmp=config.icmp,
        freebind=config.freebind,
        limit_output=config.limit_output,
        window=config.window,
        udp_filter=config.udp_filter,
        broadcasts=frozenset(
            address.network.broadcast_address.packed
            for address in (template.ipv4.addresses if template.ipv4 else ())
            if address.network.prefixlen < 31
        ),
    )
    ipv4, ipv6 = template.ipv4, template.ipv6
    policy = Policy(
        ipv4.addresses[0].ip.packed if ipv4 and ipv4.addresses else b"",
        ipv6.addresses[0].ip.packed if ipv6 and ipv6.addresses else b"",
        _link_local(guest.mac) if guest.mac else b"",
        follow4=config.address4 is None,
        follow6=config.address6 is None,
        splice=config.splice,
        loopback_kept=config.loopback_kept,
    )
    tap = (
        TapDevice(guest.tap_fd, guest.vnet, config.mac, guest.mac, guest.uso) if guest.tap_fd >= 0 else None
    )
    if tap is not None:
        tap.source4 = ipv4.gateway.packed if ipv4 and ipv4.gateway else b""
        tap.source6 = ipv6.gateway.packed if ipv6 and ipv6.gateway else _link_local(config.mac)
        if pcap_fd >= 0:
            try:
                tap.capture(pcap_fd)
            except OSError as e:
                raise ConfigError(f"cannot write {config.pcap}: {e.strerror}") from None
    inside = Inside(guest.agent) if guest.agent is not None else None
    own = _own_addresses(config, template, translation)
    isolation.renounce_new_privileges()
    with contextlib.suppress(ConfigError):
        seccomp.without_rings()
    proxy = Proxy(tap, link, desk, translation, policy, inside, keeper, log, descriptors, trace)
    if own is not None:
        proxy.watch(own.fileno(), own.on_ready)
    proxy.follow(rules)
    # All that takes privileges, or has a path, is open by now
    null = isolation.open_null() if background else -1
    log.hold(number)
    complaints += sandbox.enter(sandbox.SERVE, chroot_fallback=config.chroot_fallback)
    for complaint in filter(None, complaints):
        # Without a filter of system calls a hostile guest has more to try: that is said aloud
        (log.warning if "system calls" in complaint else log.debug)(complaint)
    if config.stats:
        proxy.say_counts(config.stats)
    if pid_fd >= 0:
        isolation.write_pid_file(pid_fd, number)
    _summary(config, log, guest.ifname, template, known, rules)

    log.serve()
    gc.freeze()
    gc.enable()
    command = guest.command
    if command is not None:
        if not config.debug and not config.stats:
            log.silence()
        interrupted = interrupts.interrupt_fd()
        proxy.watch(interrupted, lambda: interrupts.on_interrupt(interrupted))
        status = proxy.run(guest.watch.fd, command.wait, command.let_go, command=True)
        if proxy.complaint and not config.debug:
            log.speak()
            log.warning(proxy.complaint)
        return status

    def started() -> None:
        if background:
            isolation.leave_terminal(null)
            os.write(ready_fd, b"1")
            os.close(ready_fd)

    polled = guest.watch.polled is not None
    return proxy.run(guest.watch.fd, lambda: 0 if guest.watch.gone() else None, started, polled=polled)


def _who_we_become(config: Config, user: tuple[int, int] | None) -> str:
    """What started as root has to be told."""
    if user is not None and user[0] != 0:
        return f"started as root: changing to {config.runas or 'nobody'}"
    return "--runas root: what is run here is root on the host, and so is this process"


def _keeper(
    config: Config, rules: tuple[ports.Rule, ...], owner: int, user: tuple[int, int] | None
) -> unix.Keeper | None:
    """A process for the sockets that have a file, if there are or may be any; raises ConfigError."""
    from .setup import netns, sandbox

    if not config.control and not any(rule.path for rule in rules):
        return None
    # Only the user that has started pysplice may have a socket at any path
    paths = frozenset(rule.path for rule in rules if rule.path)
    allowed = paths if user is not None and user[0] != owner else None
    control = None
    if config.control:
        try:
            control = unix.listen(config.control)
        except OSError as e:
            raise ConfigError(f"cannot listen on {config.control}: {e.strerror or e}") from None

    def serve(alive: socket.socket) -> int:
        os.setsid()
        isolation.leave_terminal(isolation.open_null())
        isolation.close_but(alive.fileno(), control.sock.fileno() if control is not None else -1)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        confine = lambda: sandbox.enter(sandbox.KEEPER, empty=False)  # noqa: E731
        return unix.keep(alive, control, owner, allowed, confine)

    ours, _ = netns.fork(serve)
    if control is not None:
        control.sock.close()
    return unix.Keeper(ours)


def _wanted(config: Config, rule: ports.Rule) -> bool:
    """False for the rules of a protocol that is switched off."""
    return config.tcp if rule.protocol == ports.TCP else config.udp


def _of_families(config: Config, rule: ports.Rule) -> ports.Rule:
    """Refuse what cannot be: an address of a version of IP that is switched off, a port without a namespace."""
    if rule.address is not None and not (config.ipv4 if rule.address.version == 4 else config.ipv6):
        raise ConfigError(f"'{rule}': IPv{rule.address.version} is switched off")
    if config.tap_fd is not None and (rule.side == ports.GUEST or rule.auto or rule.path):
        raise ConfigError(f"'{rule}' does not go with --fd: there is nobody in the namespace")
    return rule._replace(path=os.path.abspath(rule.path)) if rule.path else rule


def _needs_agent(config: Config, rules: tuple[ports.Rule, ...]) -> bool:
    """True if sockets are to be made in the namespace."""
    if config.splice_only or config.control:
        return True
    return any(r.side == ports.GUEST or r.auto or r.path or config.splice for r in rules)


def _link_local(mac: bytes) -> bytes:
    """Our link-local address (RFC 4291, appendix A)."""
    return b"\xfe\x80" + bytes(6) + bytes((mac[0] ^ 2,)) + mac[1:3] + b"\xff\xfe" + mac[3:]


def _loopback_addresses(config: Config, template: "Template") -> dict[int, IPAddress]:
    """The addresses that lead to the host's loopback, by version."""
    mapped: dict[int, IPAddress] = {address.version: address for address in config.map_host_loopback}
    if config.map_gateway:
        for family in (template.ipv4, template.ipv6):
            if family is not None and family.gateway is not None:
                mapped.setdefault(family.gateway.version, family.gateway)
    return mapped


def _translation(
    config: Config, template: "Template", known: "Names", loopback: dict[int, IPAddress]
) -> "Translation":
    from .translate import Translation

    redirect: dict[bytes, str] = {}
    callers: dict[bytes, bytes] = {}
    for address in config.map_guest_addr:
        family = template.ipv4 if address.version == 4 else template.ipv6
        if family is not None and family.host_address is not None:
            redirect[address.packed] = str(family.host_address)
            callers[family.host_address.packed] = address.packed
    # The first of these to match wins, as pasta has it
    for version, address in loopback.items():
        redirect[address.packed] = str(LOOPBACK[version])
        callers[LOOPBACK[version].packed] = address.packed
    gateway4 = template.ipv4.gateway if template.ipv4 else None
    gateway6 = template.ipv6.gateway if template.ipv6 else None
    return Translation(
        redirect,
        dns=known.forward,
        source4=_of_version(config.outbound, 4),
        source6=_of_version(config.outbound, 6),
        interface4=config.outbound_if4,
        interface6=config.outbound_if6,
        scope=template.ipv6.ifindex if template.ipv6 else 0,
        callers=callers,
        own=_own(template),
        fallback4=gateway4.packed if gateway4 is not None else b"",
        fallback6=gateway6.packed
        if gateway6 is not None and gateway6.is_link_local
        else _link_local(config.mac),
    )


def _own_addresses(config: Config, template: "Template", translation: "Translation") -> "Own | None":
    """What follows the host's own address, if the guest can reach it by another."""
    from .own import Own

    mapped = {}
    for address in config.map_guest_addr:
        family = template.ipv4 if address.version == 4 else template.ipv6
        if family is not None and family.host_address is not None:
            mapped[address.packed] = family.host_address.packed
    return Own(translation, mapped) if mapped else None


def _desk(config: Config, template: "Template", known: "Names") -> "Desk":
    """What is offered on the link."""
    from .services import desk, dhcp, dhcpv6, ndp

    ipv4, ipv6 = template.ipv4, template.ipv6
    gateway6 = ipv6.gateway if ipv6 else None
    link_local = _link_local(config.mac)
    source = gateway6.packed if gateway6 is not None and gateway6.is_link_local else link_local
    mtu = MTU_DEFAULT if config.mtu is None else config.mtu
    servers = known.servers if config.dhcp_dns else ()
    dns4 = tuple(server.packed for server in servers if server.version == 4)
    dns6 = tuple(server.packed for server in servers if server.version == 6)
    search = known.search if config.dhcp_search else ()

    lease = lease6 = router = None
    if config.dhcp and ipv4 and ipv4.addresses and ipv4.gateway:
        address = ipv4.addresses[0]
        lease = dhcp.Lease(
            address.ip.packed,
            address.network.prefixlen,
            ipv4.gateway.packed,
            mtu,
            dns4,
            search,
            config.hostname,
            config.fqdn,
        )
    if config.dhcpv6 and ipv6 and ipv6.addresses:
        lease6 = dhcpv6.Lease(source, ipv6.addresses[0].ip.packed, dns6, search, config.fqdn)
    if config.ra and not config.config_net and ipv6 is not None:
        prefix = ipv6.addresses[0].ip.packed if ipv6.addresses else None
        router = ndp.Router(config.mac, source, prefix, mtu, lease6 is not None, dns6, search)
    return desk.Desk(
        config.mac,
        _own(template),
        arp=config.ipv4,
        ndp=config.ipv6 and config.ndp,
        router=router,
        dhcp=lease,
        dhcpv6=lease6,
    )


def _own(template: "Template") -> frozenset[bytes]:
    """The guest's addresses, packed."""
    families = (template.ipv4, template.ipv6)
    return frozenset(a.ip.packed for family in families if family is not None for a in family.addresses)


def _of_version(chosen: tuple[IPAddress, ...], version: int) -> str:
    return next((str(address) for address in chosen if address.version == version), "")


def _summary(
    config: Config,
    log: Log,
    ifname: str,
    template: "Template",
    known: "Names",
    rules: tuple[ports.Rule, ...],
) -> None:
    """What the guest got, where somebody may want to know."""
    if not (config.debug or config.log_file or (config.attach and config.foreground)):
        return
    log.info(f"tap {ifname}, MAC {':'.join(f'{byte:02x}' for byte in config.mac)}")
    for version, family in ((4, template.ipv4), (6, template.ipv6)):
        if family is not None:
            listed = " ".join(str(address) for address in family.addresses) or "no address"
            log.info(f"IPv{version}: {listed}, gateway {family.gateway or 'none'}")
    if known.servers:
        log.info(f"name servers: {' '.join(str(server) for server in known.servers)}")
    for rule in rules:
        log.info(f"{rule.protocol} of the {rule.side}: {rule}")


if __name__ == "__main__":
    main()
