"""What the user asked for: one frozen record.

    options.py  the table of options, and the parser of a command line
    usage.py    help, manual pages, completion and tables, made from the table
    pages.py    what the manual says of the other commands
    values.py   the grammar of single values
    ports.py    the grammar of -t, -u, -T and -U
    check.py    which options conflict

No file of this room does I/O or imports another room.
"""

import ipaddress
from typing import NamedTuple

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

NETNS_DIRECTORY = "/run/netns"  # of ip-netns(8)
OUR_MAC = bytes.fromhex("9a559a559a55")
LOG_SIZE_DEFAULT = 1 << 20


class ConfigError(Exception):
    """What the user asked for is not possible: one line for stderr."""


class Command(NamedTuple):
    """Run a command in new namespaces; without `argv` the user's shell.

    Without `user_namespace` no user namespace is made.
    """

    argv: tuple[str, ...] = ()
    user_namespace: bool = True


class Process(NamedTuple):
    """Join the namespaces of a process: its network namespace, and the user namespace at the path `userns`.

    An empty `userns`: join none.
    """

    pid: int
    userns: str = ""

    @property
    def netns(self) -> str:
        """The path of the network namespace."""
        return f"/proc/{self.pid}/ns/net"


class NamespaceFile(NamedTuple):
    """Join the network namespace at a path, or of this name below /run/netns, and the user namespace at `userns`."""

    name: str
    userns: str = ""

    @property
    def netns(self) -> str:
        """The path of the network namespace."""
        return self.name if "/" in self.name else f"{NETNS_DIRECTORY}/{self.name}"


class Descriptor(NamedTuple):
    """Serve a tap that the caller has opened."""

    fd: int


Target = Command | Process | NamespaceFile | Descriptor


class Config(NamedTuple):
    """All options, in pasta's meaning.  Addresses are None or empty where the host's are to be copied."""

    target: Target = Command()
    netns_quit: bool = True
    pidns: bool = True
    new_session: bool = False
    resolv_conf: bool = False
    ifname: str = ""  # empty: the default
    as_pasta: bool = False  # called by that name
    offload: bool = True
    config_net: bool = False
    mtu: int | None = None  # None: the default; 0: left as it is
    mac: bytes = OUR_MAC
    ns_mac: bytes | None = None
    address4: ipaddress.IPv4Address | None = None
    prefix4: int | None = None
    address6: ipaddress.IPv6Address | None = None
    gateway4: ipaddress.IPv4Address | None = None
    gateway6: ipaddress.IPv6Address | None = None
    interface: str = ""
    ipv4: bool = True
    ipv6: bool = True
    ipv6_asked: bool = False  # by -6: without IPv6 nothing is left
    copy_addresses: bool = True
    copy_routes: bool = True
    follow_host: bool = False
    tcp: bool = True
    udp: bool = True
    icmp: bool = True
    dhcp: bool = True
    dhcpv6: bool = True
    ndp: bool = True
    ra: bool = True
    map_gateway: bool = True
    map_host_loopback: tuple[IPAddress, ...] = ()
    map_guest_addr: tuple[IPAddress, ...] = ()
    outbound: tuple[IPAddress, ...] = ()
    outbound_if4: str = ""
    outbound_if6: str = ""
    ports: tuple[tuple[str, str], ...] = ()  # -t, -u, -T and -U with their values
    freebind: bool = False
    udp_filter: str = "address"
    chroot_fallback: bool = False
    splice: bool = True
    loopback_kept: bool = False
    splice_only: bool = False
    dns: tuple[IPAddress, ...] | None = None  # None: those of the host
    search: tuple[str, ...] | None = None
    dns_forward: tuple[IPAddress, ...] = ()
    dns_host: tuple[IPAddress, ...] = ()
    dhcp_dns: bool = False
    dhcp_search: bool = False
    hostname: str = ""
    fqdn: str = ""
    window: str = "truesize"
    limit_output: int | None = None  # bytes; 0: no bound; None: as is found out
    limit_flows: int = 0  # new flows a second; 0: no limit
    trace_window: str = ""
    foreground: bool = False
    pid_file: str = ""
    quiet: bool = False
    debug: bool = False
    trace: bool = False
    stats: int = 0  # seconds; 0: none
    busy_poll: int = -1  # microseconds; 0: off, -1: adaptive
    log_file: str = ""
    log_size: int = LOG_SIZE_DEFAULT
    log_time: bool = False
    pcap: str = ""
    runas: str = ""
    control: str = ""
    conf_path: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def attach(self) -> bool:
        """True if an existing namespace is served, False if a command is run in a new one."""
        return not isinstance(self.target, Command)

    @property
    def tap_fd(self) -> int:
        """The descriptor of a tap that the caller has opened; -1: there is none."""
        return self.target.fd if isinstance(self.target, Descriptor) else -1
