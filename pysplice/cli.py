"""The command line, in pasta's spelling: argv in, a Config out.

Owns the list of options.  Imports config.py; does no I/O but raise what is to be printed.  The scan is
getopt(3)'s: it stops at the first word that is no option, takes `--name=value`, unambiguous
abbreviations and `--`; the last occurrence of an option wins, except where a list is built.
"""

import getopt
import ipaddress
from collections.abc import Callable, Sequence
from typing import Any

from . import __version__
from .config import (
    ESTIMATORS,
    LIMIT_OUTPUT_MAX,
    LOG_SIZE_MIN,
    MTU_MAX,
    MTU_MIN,
    MTU_MIN_IPV6,
    UDP_FILTERS,
    Config,
    ConfigError,
    class_prefix,
    parse_address,
    parse_ifname,
    parse_int,
    parse_mac,
    parse_name,
    parse_netmask,
)

USAGE = """\
Usage: pysplice [OPTION]... [COMMAND [ARG]...]
       pysplice [OPTION]... PID
       pysplice [OPTION]... --netns PATH|NAME
       pysplice ctl PATH show|add|del [ARG]...

Connect a network namespace to the host's network over a tap device, without privileges.
Without PID or --netns, run COMMAND (default: $SHELL) in a new user and network namespace.

  -f, --foreground         With PID or --netns: do not go to the background
  -P, --pid FILE           Write our process ID to FILE
  -c, --conf-path PATH     Socket to be controlled by: see pysplice ctl
      --runas UID|UID:GID|LOGIN|LOGIN:GROUP
                           Whom to become if started as root; default: nobody
  -h, --help               Show this help and exit
      --version            Show the version and exit

What is said:
  -d, --debug              Say more, on stderr
      --trace              Say more about single packets too
  -q, --quiet              Say warnings and errors only
  -l, --log-file FILE      Say it there, and nowhere else
      --log-size BYTES     What that file may have at most; default: 1048576
      --stats SECONDS      Say every so often what was counted (after -f)
  -p, --pcap FILE          Write the frames of the tap to FILE

Namespace and device:
      --tap NAME           Name of the tap device (also -I, --ns-ifname); default: tap0
  -F, --fd FD              Use an open tap descriptor instead
      --netns PATH|NAME    Network namespace to join
      --userns PATH        User namespace to join with it
      --netns-only         Make or join no user namespace
      --no-netns-quit      Stay when the namespace's file goes away
      --no-pidns           Run COMMAND without a PID namespace of its own
      --new-session        Run COMMAND in a session of its own, without the terminal
      --no-offload         Plain frames: no segmentation or checksum offload on the tap

Addresses:
      --config-net         Configure the tap: addresses, routes, MTU
  -a, --address ADDR[/LEN] Address for the namespace; default: those of the host's interface
  -n, --netmask MASK       IPv4 mask, dotted or bits
  -g, --gateway ADDR       Gateway for the namespace; default: the host's
  -i, --interface NAME     Host interface to copy from; default: that of the default route
  -m, --mtu MTU            MTU of the tap, 0 leaves it alone; default: 65520
  -M, --mac-addr ADDR      Our MAC address on the tap
      --ns-mac-addr ADDR   The namespace's MAC address on the tap
      --no-copy-addrs, --no-copy-routes
                           With --config-net: one address, only the default route
  -4, --ipv4-only          IPv4 only
  -6, --ipv6-only          IPv6 only

Forwarded ports (SPEC: see the README; none, auto, 8080, 8080:80, 127.0.0.1/8080-8090:80-90, ~22, ...):
  -t, --tcp-ports SPEC     TCP ports of the host that lead to the namespace; default: auto
                           (unix:PATH:PORT: a UNIX socket on the host that does)
  -u, --udp-ports SPEC     UDP ports; default: auto
  -T, --tcp-ns SPEC        TCP ports of the namespace's loopback that lead to the host's; default: auto
  -U, --udp-ns SPEC        UDP ports; default: auto
      --freebind           -t and -u may name addresses that the host does not have yet
      --no-splice          Loopback connections pass the tap too
      --host-lo-to-ns-lo   Connections to the host's loopback arrive at the namespace's
      --splice-only        Loopback connections only: no tap

Outbound connections:
      --no-map-gw          The gateway's address does not lead to the host
      --map-host-loopback ADDR
                           Address that leads to the host's loopback, or none; default: the gateway
      --map-guest-addr ADDR
                           Address that leads to the host's own address, or none
  -o, --outbound ADDR      Source address on the host
      --outbound-if4 NAME, --outbound-if6 NAME
                           Interface on the host

      --udp-filter endpoint|address|port
                           Who may answer a UDP port of the namespace: anybody, any port of an
                           address that it has sent to (the default), that port only

Names:
  -D, --dns ADDR           Name server for --dhcp-dns, or none; default: the host's
  -S, --search LIST        Domains for --dhcp-search, or none; default: the host's
      --dhcp-dns, --dhcp-search
                           Tell the guest of them by DHCP, DHCPv6 and router advertisements
      --dns-forward ADDR   Address whose ports 53 and 853 lead to a name server
      --dns-host ADDR      That name server; default: the host's first
  -H, --hostname NAME      Name of the namespace, and for DHCP
      --fqdn NAME          Full name for DHCP and DHCPv6

Left out:
      --no-tcp, --no-udp, --no-icmp, --no-dhcp, --no-dhcpv6, --no-ndp, --no-ra

The window:
      --window NAME        Rule for what a socket can take: sndbuf, linear, segments,
                           segments-wmem, peer or truesize (the default); see the README
      --limit-output BYTES|auto|off
                           What a connection may have unread in the tap's queue; default: auto
      --trace-window FILE  Write a line of JSON for each window that is advertised
"""

SHORT = "deqfhl:P:I:F:p:m:a:n:M:g:i:o:D:S:H:46t:u:T:U:c:s:1"

LONG = {
    # Those that work, and what they are called below
    "debug": "-d",
    "quiet": "-q",
    "foreground": "-f",
    "stderr": "-e",
    "help": "-h",
    "version": "--version",
    "ns-ifname=": "-I",
    "tap=": "-I",
    "fd=": "-F",
    "pid=": "-P",
    "mtu=": "-m",
    "address=": "-a",
    "netmask=": "-n",
    "mac-addr=": "-M",
    "gateway=": "-g",
    "interface=": "-i",
    "outbound=": "-o",
    "outbound-if4=": "--outbound-if4",
    "outbound-if6=": "--outbound-if6",
    "ipv4-only": "-4",
    "ipv6-only": "-6",
    "no-tcp": "--no-tcp",
    "no-udp": "--no-udp",
    "no-icmp": "--no-icmp",
    "no-dhcp": "--no-dhcp",
    "no-ndp": "--no-ndp",
    "no-dhcpv6": "--no-dhcpv6",
    "no-ra": "--no-ra",
    "no-map-gw": "--no-map-gw",
    "map-host-loopback=": "--map-host-loopback",
    "map-guest-addr=": "--map-guest-addr",
    "netns=": "--netns",
    "userns=": "--userns",
    "netns-only": "--netns-only",
    "no-netns-quit": "--no-netns-quit",
    "no-pidns": "--no-pidns",
    "new-session": "--new-session",
    "no-splice": "--no-splice",
    "config-net": "--config-net",
    "ns-mac-addr=": "--ns-mac-addr",
    "no-offload": "--no-offload",
    "window=": "--window",
    "limit-output=": "--limit-output",
    "trace-window=": "--trace-window",
    "tcp-ports=": "-t",
    "udp-ports=": "-u",
    "tcp-ns=": "-T",
    "udp-ns=": "-U",
    "dns=": "-D",
    "search=": "-S",
    "trace": "--trace",
    "stats=": "--stats",
    "log-file=": "-l",
    "log-size=": "--log-size",
    "runas=": "--runas",
    "conf-path=": "-c",
    "pcap=": "-p",
    "hostname=": "-H",
    "fqdn=": "--fqdn",
    "dhcp-dns": "--dhcp-dns",
    "dhcp-search": "--dhcp-search",
    "dns-forward=": "--dns-forward",
    "dns-host=": "--dns-host",
    "freebind": "--freebind",
    "udp-filter=": "--udp-filter",
    "chroot-fallback": "--chroot-fallback",
    "host-lo-to-ns-lo": "--host-lo-to-ns-lo",
    "no-copy-routes": "--no-copy-routes",
    "no-copy-addrs": "--no-copy-addrs",
    "splice-only": "--splice-only",
    # passt's, refused by name
    "socket=": "-s",
    "socket-path=": "-s",
    "one-off": "-1",
    "no-dhcp-dns": "--no-dhcp-dns",
    "no-dhcp-search": "--no-dhcp-search",
    "vhost-user": "--vhost-user",
    "print-capabilities": "--print-capabilities",
    "repair-path=": "--repair-path",
    "migrate-exit": "--migrate-exit",
    "migrate-no-linger": "--migrate-no-linger",
}

PASST_ONLY = frozenset(
    {"-s", "-1", "--no-dhcp-dns", "--no-dhcp-search", "--vhost-user", "--print-capabilities"}
    | {"--repair-path", "--migrate-exit", "--migrate-no-linger"}
)

PORTS = frozenset({"-t", "-u", "-T", "-U"})

SWITCHES: dict[str, dict[str, Any]] = {
    "-d": {"debug": True, "quiet": False},
    "--trace": {"trace": True, "debug": True, "quiet": False},
    "-q": {"quiet": True},
    "-f": {"foreground": True},
    "-4": {"ipv6": False},
    "-6": {"ipv4": False},
    "--no-tcp": {"tcp": False},
    "--no-udp": {"udp": False},
    "--no-icmp": {"icmp": False, "ndp": False, "ra": False},
    "--no-dhcp": {"dhcp": False},
    "--no-dhcpv6": {"dhcpv6": False},
    "--no-ndp": {"ndp": False, "ra": False},
    "--no-ra": {"ra": False},
    "--no-map-gw": {"map_gateway": False},
    "--netns-only": {"netns_only": True},
    "--no-netns-quit": {"netns_quit": False},
    "--no-pidns": {"pidns": False},
    "--new-session": {"new_session": True},
    "--config-net": {"config_net": True},
    "--no-copy-routes": {"copy_routes": False},
    "--no-copy-addrs": {"copy_addresses": False},
    "--no-offload": {"offload": False},
    "--freebind": {"freebind": True},
    "--chroot-fallback": {"chroot_fallback": True},
    "--no-splice": {"splice": False},
    "--host-lo-to-ns-lo": {"loopback_kept": True},
    "--splice-only": {"splice_only": True, "loopback_kept": True, "icmp": False},
    "--dhcp-dns": {"dhcp_dns": True},
    "--dhcp-search": {"dhcp_search": True},
}


class Usage(Exception):
    """Text to print instead of running: `--help` and `--version` (stdout, exit 0)."""


def parse(argv: Sequence[str], as_pasta: bool = False) -> Config:
    """The Config for the words after the program's name; raises ConfigError or Usage."""
    long_options = [*LONG]
    try:
        options, words = getopt.getopt(list(argv), SHORT, long_options)
    except getopt.GetoptError as e:
        raise ConfigError(_getopt_message(e, argv)) from None

    values: dict[str, Any] = {"as_pasta": as_pasta}
    warnings: list[str] = []
    for spelled, value in options:
        name = spelled
        if spelled.startswith("--"):
            name = LONG.get(spelled[2:] + "=") or LONG[spelled[2:]]
        if name == "-h":
            raise Usage(USAGE.replace("pysplice", "pasta", 1) if as_pasta else USAGE)
        if name == "--version":
            name = "pasta (pysplice)" if as_pasta else "pysplice"
            raise Usage(f"{name} {__version__}\nLicence: GPL-2.0-or-later\n")
        if name == "-e":
            warnings.append("option -e/--stderr has no effect")
        elif name in SWITCHES:
            values.update(SWITCHES[name])
        elif name in PORTS:
            values["ports"] = (*values.get("ports", ()), (name, value))
        elif name in PASST_ONLY:
            raise ConfigError(f"option {spelled} is for passt only")
        else:
            _option(values, name, spelled, value)
    values["warnings"] = tuple(warnings)
    return _target(values, words)


def _getopt_message(error: getopt.GetoptError, argv: Sequence[str]) -> str:
    """getopt(3)'s words, which callers look for."""
    if "not recognized" not in error.msg:
        return error.msg
    if len(error.opt) == 1:
        return f"invalid option -- '{error.opt}'"
    return f"unrecognized option '--{error.opt}'"


def _option(values: dict[str, Any], name: str, spelled: str, value: str) -> None:
    """One option with a value."""
    match name:
        case "-P" | "-l" | "-p" | "-c" | "--trace-window" | "--runas":
            if not value:
                raise ConfigError(f"option {spelled} needs a {'user' if name == '--runas' else 'path'}")
            values[TEXTS[name]] = value
        case "--log-size":
            values["log_size"] = parse_int(value, spelled, LOG_SIZE_MIN, 2**31 - 1)
        case "--stats":
            if not values.get("foreground"):
                raise ConfigError(f"option {spelled} needs -f before it")
            values["stats"] = parse_int(value, spelled, 1, 86400)
        case "-H":
            values["hostname"] = parse_name(value, spelled)
        case "--fqdn":
            values["fqdn"] = parse_name(value, spelled)
        case "-D":
            _listed(values, "dns", value, lambda text: (parse_address(text, spelled),))
        case "-S":
            _listed(
                values,
                "search",
                value,
                lambda text: tuple(parse_name(name, spelled) for name in text.split()),
            )
        case "--dns-forward" | "--dns-host":
            _per_version(values, name[2:].replace("-", "_"), spelled, value)
        case "-I":
            values["ifname"] = parse_ifname(value, spelled)
        case "-i":
            values["interface"] = parse_ifname(value, spelled)
        case "--outbound-if4" | "--outbound-if6":
            values[name[2:].replace("-", "_")] = parse_ifname(value, spelled)
        case "-F":
            values["tap_fd"] = parse_int(value, spelled, 3, 2**31 - 1)
        case "-m":
            mtu = parse_int(value, spelled, 0, MTU_MAX)
            if 0 < mtu < MTU_MIN:
                raise ConfigError(f"MTU {mtu} is too small, the least is {MTU_MIN}")
            values["mtu"] = mtu
        case "--window":
            if value not in ESTIMATORS:
                raise ConfigError(
                    f"unknown estimator '{value}' for {spelled}: one of {', '.join(ESTIMATORS)}"
                )
            values["window"] = value
        case "--udp-filter":
            if value not in UDP_FILTERS:
                raise ConfigError(
                    f"unknown filter '{value}' for {spelled}: one of {', '.join(UDP_FILTERS)}"
                )
            values["udp_filter"] = value
        case "--limit-output":
            words = {"auto": None, "off": 0}
            if value not in words and not (value.isascii() and value.isdigit()):
                raise ConfigError(f"invalid value for {spelled}: '{value}' (bytes, auto or off)")
            limit = words[value] if value in words else parse_int(value, spelled, 1, LIMIT_OUTPUT_MAX)
            values["limit_output"] = limit
        case "-M":
            values["mac"] = parse_mac(value, spelled)
        case "--ns-mac-addr":
            values["ns_mac"] = parse_mac(value, spelled)
        case "-n":
            values["netmask"] = parse_netmask(value)
        case "-a":
            _address(values, spelled, value)
        case "-g":
            gateway = parse_address(value, spelled)
            if gateway.is_loopback:
                raise ConfigError(f"not a gateway's address for {spelled}: '{value}'")
            values[f"gateway{gateway.version}"] = gateway
        case "-o":
            _per_version(values, "outbound", spelled, value)
        case "--map-host-loopback" if value == "none":
            values["map_gateway"] = False
            values["map_host_loopback"] = ()
        case "--map-guest-addr" if value == "none":
            values["map_guest_addr"] = ()
        case "--map-host-loopback" | "--map-guest-addr":
            _per_version(values, name[2:].replace("-", "_"), spelled, value)
        case "--netns" | "--userns":
            if not value:
                raise ConfigError(f"option {spelled} needs a path")
            values[name[2:]] = value
        case _:
            raise ConfigError(f"option {spelled} is not supported")


# Options whose value is taken as it is
TEXTS = {
    "-P": "pid_file",
    "-l": "log_file",
    "-p": "pcap",
    "-c": "control",
    "--trace-window": "trace_window",
    "--runas": "runas",
}


def _listed(values: dict[str, Any], key: str, value: str, parsed: Callable[[str], tuple[Any, ...]]) -> None:
    """One more of a list; `none` alone is the empty one."""
    if value == "none":
        if values.get(key):
            raise ConfigError(f"'none' after another {key} option")
        values[key] = ()
    else:
        values[key] = (*(values.get(key) or ()), *parsed(value))


def _address(values: dict[str, Any], spelled: str, value: str) -> None:
    text, slash, length = value.partition("/")
    address = parse_address(text, spelled)
    if address.is_loopback:
        raise ConfigError(f"not a guest's address for {spelled}: '{value}'")
    if isinstance(address, ipaddress.IPv4Address):
        values["address4"] = address
        values.pop("prefix4", None)
        if slash:
            values["prefix4"] = parse_int(length, spelled, 1, 32)
    else:
        if slash:
            parse_int(length, spelled, 1, 128)
        values["address6"] = address


def _per_version(values: dict[str, Any], key: str, spelled: str, value: str) -> None:
    """Lists with one address for each version of IP; the last one wins."""
    address = parse_address(value, spelled)
    if address.is_loopback and key in ("dns_forward", "map_host_loopback"):
        # The guest's own loopback: nothing for it reaches the tap
        raise ConfigError(f"not an address that the guest can reach for {spelled}: '{value}'")
    kept = (other for other in values.get(key, ()) if other.version != address.version)
    values[key] = (*kept, address)


def _target(values: dict[str, Any], words: list[str]) -> Config:
    """What the words after the options mean, and what does not go together."""
    if not values.get("splice", True) and values.get("loopback_kept"):
        kept = "--splice-only" if values.get("splice_only") else "--host-lo-to-ns-lo"
        raise ConfigError(f"options {kept} and --no-splice exclude each other")
    if not values.get("config_net") and not (
        values.get("copy_routes", True) and values.get("copy_addresses", True)
    ):
        raise ConfigError("--no-copy-routes and --no-copy-addrs go with --config-net only")
    if not values.get("ipv4", True) and not values.get("ipv6", True):
        raise ConfigError("options -4 and -6 exclude each other")
    if "netns" in values and words:
        raise ConfigError("--netns goes with neither PID nor COMMAND")
    if "userns" in values and values.get("netns_only"):
        raise ConfigError("--userns and --netns-only exclude each other")
    if len(words) == 1 and words[0].isascii() and words[0].isdigit():
        values["pid"] = parse_int(words[0], "PID", 1, 2**22)
    else:
        values["command"] = tuple(words)
    if "tap_fd" in values and ("netns" in values or "pid" in values or words):
        raise ConfigError("--fd goes with neither PID, --netns nor COMMAND")
    if "netns" in values and "userns" not in values:
        values["netns_only"] = True
    if "userns" in values and "netns" not in values and "pid" not in values:
        raise ConfigError("--userns goes with PID or --netns only")

    if 0 < (values.get("mtu") or 0) < MTU_MIN_IPV6 and values.get("ipv6", True):
        if not values.get("ipv4", True):
            raise ConfigError(f"IPv6 needs an MTU of at least {MTU_MIN_IPV6}")
        values["ipv6"] = False
        warning = f"no IPv6: it needs an MTU of at least {MTU_MIN_IPV6}"
        values["warnings"] = (*values["warnings"], warning)

    netmask = values.pop("netmask", None)
    if netmask is not None:
        if "prefix4" in values:
            raise ConfigError("-a ADDR/LEN and -n exclude each other")
        values["prefix4"] = netmask
    if values.get("address4") and "prefix4" not in values:
        values["prefix4"] = class_prefix(values["address4"])
    return Config(**values)
