"""The table of options, and the parser of a command line: argv in, a Config out.

Owns the table.  Imports the other files of this room; does no I/O.  Help, manual page, completion and the
tables of the documentation are made from the same table (usage.py).  A new option takes one row here, one field
of Config, and the code that uses it.

The scan is getopt(3)'s: it stops at the first word that is not an option, and takes `--name=value`, unambiguous
abbreviations and `--`.  The last occurrence of an option wins, except where a list is built.
"""

import getopt
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import Config, ConfigError, check
from .values import (
    ESTIMATORS,
    LOG_SIZE_MIN,
    UDP_FILTERS,
    parse_address,
    parse_busy_poll,
    parse_capture,
    parse_choice,
    parse_gateway,
    parse_ifname,
    parse_int,
    parse_interface_address,
    parse_limit,
    parse_mac,
    parse_mtu,
    parse_name,
    parse_netmask,
    parse_path,
    parse_rate,
    parse_reachable,
    parse_user,
)

SHOWN_MAX = 6  # options in a message

Values = dict[str, Any]  # by field of Config; see check.finish() for others

# What an option does: to the values, under the spelling that was used, with the text of its value
Action = Callable[[Values, str, str], None]
# Makes a value from a text, for an option in this spelling
Parser = Callable[[str, str], Any]


class Usage(Exception):
    """`--help` or `--version`: there is a text to print instead of anything to run."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class Option(NamedTuple):
    """One row: the spellings, what stands for the value (empty: a switch takes none), what it does, and the help.

    `group` is a heading of GROUPS.  Without `help` the option is not listed.  `first`: the README lists it.
    """

    names: tuple[str, ...]
    metavar: str
    action: Action
    group: str
    help: str
    first: bool = False


def _switch(**fields: Any) -> Action:
    """Set these fields."""
    return lambda values, spelled, text: values.update(fields)


def _value(field: str, parser: Parser) -> Action:
    """Set a field to what the parser makes of the text."""

    def action(values: Values, spelled: str, text: str) -> None:
        values[field] = parser(text, spelled)

    return action


def _listed(field: str, parser: Callable[[str, str], tuple[Any, ...]]) -> Action:
    """Add to a list; `none` alone is the empty list."""

    def action(values: Values, spelled: str, text: str) -> None:
        if text != "none":
            values[field] = (*(values.get(field) or ()), *parser(text, spelled))
        elif values.get(field):
            raise ConfigError(f"'none' after another {field} option")
        else:
            values[field] = ()

    return action


def _each_version(field: str, parser: Parser, none: Values | None = None) -> Action:
    """Set the address of one version of IP in a list; with `none`, that word sets these fields."""

    def action(values: Values, spelled: str, text: str) -> None:
        if none is not None and text == "none":
            values.update(none)
            return
        address = parser(text, spelled)
        kept = (other for other in values.get(field, ()) if other.version != address.version)
        values[field] = (*kept, address)

    return action


def _guest_address(values: Values, spelled: str, text: str) -> None:
    """-a: the prefix of the last IPv4 address counts."""
    address, prefix = parse_interface_address(text, spelled)
    values[f"address{address.version}"] = address
    if address.version == 4:
        values.pop("prefix4", None)
        if prefix is not None:
            values["prefix4"] = prefix


def _gateway(values: Values, spelled: str, text: str) -> None:
    gateway = parse_gateway(text, spelled)
    values[f"gateway{gateway.version}"] = gateway


def _ports(name: str) -> Action:
    """Keep the text: the grammar of ports comes after all other options."""

    def action(values: Values, spelled: str, text: str) -> None:
        values["ports"] = (*values.get("ports", ()), (name, text))

    return action


def _names(text: str, option: str) -> tuple[str, ...]:
    return tuple(parse_name(name, option) for name in text.split())


def _print(what: str) -> Action:
    def action(values: Values, spelled: str, text: str) -> None:
        raise Usage(what)

    return action


def _no_effect(values: Values, spelled: str, text: str) -> None:
    values["warnings"] = (*values.get("warnings", ()), "option -e/--stderr has no effect")


def _passt_only(values: Values, spelled: str, text: str) -> None:
    raise ConfigError(f"option {spelled} is for passt only")


RUNNING, MESSAGES, DEVICE, ADDRESSES, PORTS, OUTBOUND, NAMES, SWITCHED_OFF, WINDOW, PASST = GROUPS = (
    "Running",
    "Messages",
    "Namespace and device",
    "Addresses",
    "Forwarded ports",
    "Outbound traffic",
    "Name servers and names",
    "Switched off",
    "The window",
    "Options of passt",
)

OPTIONS: tuple[Option, ...] = (
    Option(("-f", "--foreground"), "", _switch(foreground=True), RUNNING,
        "With PID, --netns or --fd: stay in the foreground", first=True),
    Option(("-P", "--pid"), "FILE", _value("pid_file", parse_path), RUNNING,
        "Write the process ID to FILE", first=True),
    Option(("-c", "--conf-path"), "PATH", _value("conf_path", parse_path), RUNNING,
        "Let 'pesto PATH' show and change the forwarded ports, over a UNIX socket at PATH", first=True),
    Option(("--control",), "PATH", _value("control", parse_path), RUNNING,
        "Let 'pysplice ctl PATH' do so, which knows more: listeners, connections, UNIX sockets", first=True),
    Option(("--runas",), "USER[:GROUP]", _value("runas", parse_user), RUNNING,
        "The user (name or number) to change to when started as root; default: nobody"),
    Option(("-h", "--help"), "", _print("help"), RUNNING, "Show this help and exit"),
    Option(("--version",), "", _print("version"), RUNNING, "Show the version and exit"),

    Option(("-d", "--debug"), "", _switch(debug=True, quiet=False), MESSAGES,
        "Print a line about each flow, and other details, on stderr", first=True),
    Option(("--trace",), "", _switch(trace=True, debug=True, quiet=False), MESSAGES,
        "Print a line about single packets too"),
    Option(("-q", "--quiet"), "", _switch(quiet=True), MESSAGES, "Print warnings and errors only"),
    Option(("-l", "--log-file"), "FILE", _value("log_file", parse_path), MESSAGES,
        "Write messages to FILE instead of stderr; an error that ends pysplice at the start goes to both", first=True),
    Option(("--log-size",), "BYTES", _value("log_size", lambda t, o: parse_int(t, o, LOG_SIZE_MIN, 2**31 - 1)),
        MESSAGES, "The largest size of that file, at least 40960; default: 1048576"),
    Option(("--log-time",), "", _switch(log_time=True), MESSAGES,
        "Begin each line of the log with the date and time, not the seconds since the start"),
    Option(("--stats",), "SECONDS", _value("stats", lambda t, o: parse_int(t, o, 1, 86400)), MESSAGES,
        "Print flow and byte counts at this interval; not in the background", first=True),
    Option(("-p", "--pcap"), "FILE", _value("pcap", parse_capture), MESSAGES,
        "Write all frames of the tap to FILE, for tcpdump and tshark; /dev/stdout goes into a pipe", first=True),
    Option(("-e", "--stderr"), "", _no_effect, MESSAGES, ""),

    Option(("--tap", "-I", "--ns-ifname"), "NAME", _value("ifname", parse_ifname), DEVICE,
        "The name of the tap, which is made if it is not there; default: tap0", first=True),
    Option(("-F", "--fd"), "FD", _value("tap_fd", lambda t, o: parse_int(t, o, 3, 2**31 - 1)), DEVICE,
        "Serve a tap that the caller has opened, at this descriptor"),
    Option(("--netns",), "PATH|NAME", _value("netns", parse_path), DEVICE,
        "Serve the network namespace at PATH, or the one called NAME in /run/netns"),
    Option(("--userns",), "PATH", _value("userns", parse_path), DEVICE,
        "The user namespace that owns it"),
    Option(("--netns-only",), "", _switch(netns_only=True), DEVICE, "Make or join no user namespace"),
    Option(("--no-netns-quit",), "", _switch(netns_quit=False), DEVICE,
        "Keep running when the namespace's file is removed"),
    Option(("--no-pidns",), "", _switch(pidns=False), DEVICE,
        "Run COMMAND without a PID namespace of its own"),
    Option(("--new-session",), "", _switch(new_session=True), DEVICE,
        "Run COMMAND in a session of its own, without the terminal", first=True),
    Option(("--no-offload",), "", _switch(offload=False), DEVICE,
        "Plain frames: no segmentation or checksum offload on the tap"),
    Option(("--busy-poll",), "USEC|auto|off", _value("busy_poll", parse_busy_poll), DEVICE,
        "How long to look for more messages before sleeping, microseconds; auto, the default, does so while that finds"
        " some"),
    Option(("--chroot-fallback",), "", _switch(chroot_fallback=True), DEVICE, ""),

    Option(("--config-net",), "", _switch(config_net=True), ADDRESSES,
        "Configure the tap: addresses, routes, MTU", first=True),
    Option(("-a", "--address"), "ADDR[/LEN]", _guest_address, ADDRESSES,
        "The guest's address (one of each version); default: those of the host's interface", first=True),
    Option(("-n", "--netmask"), "MASK", _value("netmask", parse_netmask), ADDRESSES,
        "The IPv4 netmask, dotted or as a number of bits"),
    Option(("-g", "--gateway"), "ADDR", _gateway, ADDRESSES,
        "The guest's gateway (one of each version); default: the host's", first=True),
    Option(("-i", "--interface"), "NAME", _value("interface", parse_ifname), ADDRESSES,
        "The host interface to copy addresses and routes from; default: that of the default route", first=True),
    Option(("-m", "--mtu"), "BYTES", _value("mtu", parse_mtu), ADDRESSES,
        "The MTU of the tap; 0 leaves it unchanged; default: 65520", first=True),
    Option(("-M", "--mac-addr"), "ADDR", _value("mac", parse_mac), ADDRESSES,
        "The MAC address of this side of the tap"),
    Option(("--ns-mac-addr",), "ADDR", _value("ns_mac", parse_mac), ADDRESSES,
        "The MAC address of the tap in the namespace"),
    Option(("--no-copy-addrs",), "", _switch(copy_addresses=False), ADDRESSES,
        "With --config-net: configure one address of each version only"),
    Option(("--no-copy-routes",), "", _switch(copy_routes=False), ADDRESSES,
        "With --config-net: configure the default route only"),
    Option(("--follow-host",), "", _switch(follow_host=True), ADDRESSES,
        "With --config-net: give the tap other addresses and routes when the host's change", first=True),
    Option(("-4", "--ipv4-only"), "", _switch(ipv6=False), ADDRESSES, "IPv4 only", first=True),
    Option(("-6", "--ipv6-only"), "", _switch(ipv4=False, ipv6_asked=True), ADDRESSES, "IPv6 only", first=True),

    Option(("-t", "--tcp-ports"), "PORTS", _ports("-t"), PORTS,
        "TCP ports of the host that lead to the guest; default: auto", first=True),
    Option(("-u", "--udp-ports"), "PORTS", _ports("-u"), PORTS,
        "UDP ports of the host that lead to the guest; default: auto", first=True),
    Option(("-T", "--tcp-ns"), "PORTS", _ports("-T"), PORTS,
        "TCP ports of the guest's loopback interface that lead to the host's; default: auto", first=True),
    Option(("-U", "--udp-ns"), "PORTS", _ports("-U"), PORTS,
        "UDP ports of the guest's loopback interface that lead to the host's; default: auto", first=True),
    Option(("--freebind",), "", _switch(freebind=True), PORTS,
        "-t and -u may name addresses that the host does not have yet"),
    Option(("--no-splice",), "", _switch(splice=False), PORTS,
        "Connections to the host's loopback addresses go through the tap too"),
    Option(("--host-lo-to-ns-lo",), "", _switch(loopback_kept=True), PORTS,
        "Connections to the host's loopback addresses arrive at the guest's"),
    Option(("--splice-only",), "", _switch(splice_only=True, loopback_kept=True, icmp=False), PORTS,
        "Loopback connections only: no tap"),

    Option(("--no-map-gw",), "", _switch(map_gateway=False), OUTBOUND,
        "The gateway's address does not lead to the host"),
    Option(("--map-host-loopback",), "ADDR|none",
        _each_version("map_host_loopback", parse_reachable, {"map_gateway": False, "map_host_loopback": ()}),
        OUTBOUND, "The address that leads to the host's loopback address; default: the gateway's", first=True),
    Option(("--map-guest-addr",), "ADDR|none",
        _each_version("map_guest_addr", parse_address, {"map_guest_addr": ()}), OUTBOUND,
        "An address that leads to the host's own address; default: none"),
    Option(("-o", "--outbound"), "ADDR", _each_version("outbound", parse_address), OUTBOUND,
        "The host address that connections come from (one of each version)", first=True),
    Option(("--outbound-if4",), "NAME", _value("outbound_if4", parse_ifname), OUTBOUND,
        "The host interface that IPv4 connections leave through"),
    Option(("--outbound-if6",), "NAME", _value("outbound_if6", parse_ifname), OUTBOUND,
        "The host interface that IPv6 connections leave through"),
    Option(("--udp-filter",), "|".join(UDP_FILTERS),
        _value("udp_filter", lambda t, o: parse_choice(t, o, "filter", UDP_FILTERS)), OUTBOUND,
        "Which hosts may answer a UDP port of the guest's: any host (endpoint), any port of an address that the guest"
        " has sent to (address, the default), or only that port (port)"),

    Option(("--limit-flows",), "RATE|off", _value("limit_flows", parse_rate), OUTBOUND,
        "How many new flows (TCP, UDP, echo) the guest may begin in a second, after a burst of as many; default: off"),
    Option(("-D", "--dns"), "ADDR|none", _listed("dns", lambda t, o: (parse_address(t, o),)), NAMES,
        "A name server for --dhcp-dns and --resolv-conf; default: the host's", first=True),
    Option(("-S", "--search"), "NAMES|none", _listed("search", _names), NAMES,
        "Search domains for --dhcp-search and --resolv-conf; default: the host's"),
    Option(("--dhcp-dns",), "", _switch(dhcp_dns=True), NAMES,
        "Send the name servers by DHCP, DHCPv6 and router advertisements", first=True),
    Option(("--dhcp-search",), "", _switch(dhcp_search=True), NAMES,
        "Send the search domains by DHCP, DHCPv6 and router advertisements"),
    Option(("--dns-forward",), "ADDR", _each_version("dns_forward", parse_reachable), NAMES,
        "An address whose ports 53 and 853 lead to a name server of the host's; the guest's resolver has to be told"
        " of it (--resolv-conf, or -D with --dhcp-dns)", first=True),
    Option(("--dns-host",), "ADDR", _each_version("dns_host", parse_address), NAMES,
        "That name server; default: the host's first"),
    Option(("--resolv-conf",), "", _switch(resolv_conf=True), NAMES,
        "Give COMMAND an /etc/resolv.conf of its own, with the addresses of --dns-forward or the name servers of -D"),
    Option(("-H", "--hostname"), "NAME", _value("hostname", parse_name), NAMES,
        "The name of the host, in the namespace and by DHCP"),
    Option(("--fqdn",), "NAME", _value("fqdn", parse_name), NAMES,
        "The full name of the guest, by DHCP and DHCPv6"),

    Option(("--no-tcp",), "", _switch(tcp=False), SWITCHED_OFF, "No TCP"),
    Option(("--no-udp",), "", _switch(udp=False), SWITCHED_OFF, "No UDP"),
    Option(("--no-icmp",), "", _switch(icmp=False, ndp=False, ra=False), SWITCHED_OFF,
        "No echo requests, no neighbour discovery, no router advertisements"),
    Option(("--no-dhcp",), "", _switch(dhcp=False), SWITCHED_OFF, "No DHCP server"),
    Option(("--no-dhcpv6",), "", _switch(dhcpv6=False), SWITCHED_OFF, "No DHCPv6 server"),
    Option(("--no-ndp",), "", _switch(ndp=False, ra=False), SWITCHED_OFF,
        "No neighbour discovery, no router advertisements"),
    Option(("--no-ra",), "", _switch(ra=False), SWITCHED_OFF, "No router advertisements"),

    Option(("--window",), "NAME", _value("window", lambda t, o: parse_choice(t, o, "estimator", ESTIMATORS)), WINDOW,
        "The rule for what a socket can still take: sndbuf, linear, segments, segments-wmem, peer, or truesize (the"
        " default)"),
    Option(("--limit-output",), "BYTES|auto|off", _value("limit_output", parse_limit), WINDOW,
        "How much a connection may have unread in the tap's queue; default: auto"),
    Option(("--trace-window",), "FILE", _value("trace_window", parse_path), WINDOW,
        "Write a line of JSON for each window that is advertised"),

    *(
        Option(names, metavar, _passt_only, PASST, "")
        for names, metavar in (
            (("-s", "--socket"), "PATH"),
            (("--socket-path",), "PATH"),
            (("-1", "--one-off"), ""),
            (("--no-dhcp-dns",), ""),
            (("--no-dhcp-search",), ""),
            (("--vhost-user",), ""),
            (("--print-capabilities",), ""),
            (("--repair-path",), "PATH"),
            (("--migrate-exit",), ""),
            (("--migrate-no-linger",), ""),
        )
    ),
)  # fmt: skip

BY_NAME = {name: option for option in OPTIONS for name in option.names}


def short_options() -> str:
    """The string of short options for getopt."""
    return "".join(name[1] + (":" if BY_NAME[name].metavar else "") for name in BY_NAME if len(name) == 2)


def long_options() -> list[str]:
    """The list of long options for getopt."""
    return [name[2:] + ("=" if BY_NAME[name].metavar else "") for name in BY_NAME if len(name) > 2]


def parse(argv: Sequence[str], as_pasta: bool = False) -> Config:
    """The Config for the words after the program's name; raises ConfigError, or Usage if there is a text to print."""
    try:
        options, words = getopt.getopt(list(argv), short_options(), long_options())
    except getopt.GetoptError as e:
        raise ConfigError(_getopt_message(e)) from None
    values: Values = {"as_pasta": as_pasta}
    for spelled, text in options:
        whole = f"-{spelled}{text}"
        if text == "--":
            raise ConfigError(f"option {spelled} needs a value before --")
        if whole in BY_NAME and whole.removeprefix("-") in argv:
            raise ConfigError(f"'{whole[1:]}' is {spelled} with the value '{text}'; did you mean {whole}?")
        BY_NAME[spelled].action(values, spelled, text)
    return check.finish(values, words)


def _getopt_message(error: getopt.GetoptError) -> str:
    """getopt(3)'s message, which callers look for, and the nearest option."""
    import difflib

    if "not a unique prefix" in error.msg:
        names = sorted(name for name in BY_NAME if name.startswith(f"--{error.opt}"))
        names[SHOWN_MAX:] = ["..."] if len(names) > SHOWN_MAX else []
        return f"option --{error.opt} is ambiguous: {', '.join(names)}"
    if "not recognized" not in error.msg:
        return error.msg
    if len(error.opt) == 1:
        return f"invalid option -- '{error.opt}'; try --help"
    listed = {name: option for name, option in BY_NAME.items() if option.help and len(name) > 2}
    plain = {name.replace("-", ""): name for name in listed}
    wanted = error.opt.partition("=")[0].replace("-", "")
    near = plain.get(wanted)
    if near is None:
        found = difflib.get_close_matches("--" + error.opt.partition("=")[0], listed, 1, 0.75)
        near = found[0] if found else None
    hint = f"did you mean {near}?" if near else "try --help"
    return f"unrecognized option '--{error.opt}'; {hint}"
