"""argv -> Config -> run.

Imports `cli`, `setup` and `proxy`; everything that can go wrong before the command starts ends here in
one line on stderr and exit status 1.
"""

import dataclasses
import ipaddress
import os
import signal
import sys

from . import cli
from .config import MTU_DEFAULT, Config, ConfigError, IPAddress
from .observe.log import Log
from .setup import isolation

# Descriptors that are not for flows: the tap, the loop, the standard streams
DESCRIPTORS_RESERVED = 64


def main() -> int:
    """The command `pysplice`; returns its exit status."""
    # As pasta: SIGINT ends us at once, unless whoever started us ignores it
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        config = cli.parse(sys.argv[1:])
    except cli.Usage as e:
        sys.stdout.write(str(e))
        return 0
    except ConfigError as e:
        sys.stderr.write(f"pysplice: {e}\n")
        return 1
    log = Log(config.quiet, config.debug)
    for warning in config.warnings:
        log.warning(warning)
    isolation.close_leaked(config.tap_fd)
    try:
        return run(config, log)
    except ConfigError as e:
        log.warning(str(e))
        return 1


def run(config: Config, log: Log) -> int:
    """Set everything up, and serve until the end; raises ConfigError before the command starts."""
    # Imported here: `--help` and an error in the options need none of it
    from .flows import Outbound
    from .proxy import Link, Proxy
    from .services import ndp
    from .setup import addresses, interrupts, netns
    from .tap import TapDevice

    if config.tap_fd is not None and (config.config_net or config.ns_mac):
        raise ConfigError("--config-net and --ns-mac-addr do not go with --fd")
    if config.netns and "/" in config.netns:
        # In the background the working directory is another one
        config = dataclasses.replace(config, netns=os.path.abspath(config.netns))
    pid_fd = isolation.open_pid_file(config.pid_file) if config.pid_file else -1
    trace = isolation.open_trace(config.trace_window) if config.trace_window else None
    template = addresses.read(config)
    guest = netns.start(config, template)
    descriptors = isolation.raise_file_limit()

    background = config.attach and not config.foreground
    ready_fd = isolation.to_background() if background else -1
    if pid_fd >= 0:
        isolation.write_pid_file(pid_fd, os.getpid())
    isolation.drop_privileges()

    mtu = config.mtu or MTU_DEFAULT
    link_local = ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + _eui64(config.mac))
    ipv4, ipv6 = template.ipv4, template.ipv6
    gateway4 = ipv4.gateway if ipv4 else None
    gateway6 = ipv6.gateway if ipv6 else None
    router = None
    if config.ra and not config.config_net and ipv6 is not None:
        prefix = ipv6.addresses[0].ip.packed if ipv6.addresses else None
        source = gateway6 if gateway6 is not None and gateway6.is_link_local else link_local
        router = ndp.Router(config.mac, source.packed, prefix, config.mtu or 0)
    guest_addresses = frozenset(
        address.ip.packed for family in (ipv4, ipv6) if family is not None for address in family.addresses
    )
    link = Link(
        mtu=mtu,
        tx_queue=guest.tx_queue,
        ipv4=config.ipv4,
        ipv6=config.ipv6,
        tcp=config.tcp,
        neighbours=config.ndp,
        guest_addresses=guest_addresses,
        router=router,
        source4=gateway4.packed if gateway4 is not None else b"",
        source6=gateway6.packed if gateway6 is not None else link_local.packed,
        limit_output=config.limit_output,
        window=config.window,
    )
    outbound = Outbound(
        _redirects(config, template, gateway4, gateway6),
        source4=_of_version(config.outbound, 4),
        source6=_of_version(config.outbound, 6),
        interface4=config.outbound_if4,
        interface6=config.outbound_if6,
        scope=ipv6.index if ipv6 else 0,
    )
    tap = TapDevice(guest.tap_fd, guest.vnet, config.mac)
    proxy = Proxy(tap, link, outbound, log, max(descriptors - DESCRIPTORS_RESERVED, 1), trace)
    _summary(config, log, guest.ifname, template)

    command = guest.command
    if command is not None:
        if not config.debug:
            log.silence()
        interrupted = interrupts.interrupt_fd()
        proxy.watch(interrupted, lambda: interrupts.on_interrupt(interrupted))
        command.let_go()
        status = proxy.run(guest.watch_fd, command.wait, command=True)
        if proxy.complaint and not config.debug:
            log.speak()
            log.warning(proxy.complaint)
        return status
    if background:
        isolation.leave_terminal(ready_fd)
    return proxy.run(guest.watch_fd, lambda: 0 if netns.gone(config, guest.watch_fd) else None)


def _eui64(mac: bytes) -> bytes:
    """The interface identifier of a MAC address (RFC 4291, appendix A)."""
    return bytes((mac[0] ^ 2,)) + mac[1:3] + b"\xff\xfe" + mac[3:]


def _of_version(chosen: tuple[IPAddress, ...], version: int) -> str:
    return next((str(address) for address in chosen if address.version == version), "")


def _redirects(
    config: Config,
    template: object,
    gateway4: IPAddress | None,
    gateway6: IPAddress | None,
) -> dict[bytes, str]:
    """What the guest's words for the host mean on the host; the first match wins."""
    loopback = {4: "127.0.0.1", 6: "::1"}
    redirects: dict[bytes, str] = {}
    for address in config.map_guest_addr:
        family = getattr(template, f"ipv{address.version}")
        if family is not None and family.host_address is not None:
            redirects[address.packed] = str(family.host_address)
    chosen: dict[int, IPAddress] = {a.version: a for a in config.map_host_loopback}
    for version, gateway in ((4, gateway4), (6, gateway6)):
        mapped = chosen.get(version) or (gateway if config.map_gateway else None)
        if mapped is not None:
            redirects[mapped.packed] = loopback[version]
    return redirects


def _summary(config: Config, log: Log, ifname: str, template: object) -> None:
    """What the guest got, where somebody may want to know."""
    if config.command or not (config.foreground or config.debug):
        return
    log.info(f"tap {ifname}, MAC {':'.join(f'{byte:02x}' for byte in config.mac)}")
    for version in (4, 6):
        family = getattr(template, f"ipv{version}")
        if family is not None:
            listed = " ".join(str(address) for address in family.addresses) or "no address"
            log.info(f"IPv{version}: {listed}, gateway {family.gateway}")


if __name__ == "__main__":
    sys.exit(main())
