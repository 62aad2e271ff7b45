"""What the user asked for: one frozen record, and the grammar of its values.

Owns nothing, does no I/O, imports no other room.
"""

import ipaddress
import re
from typing import NamedTuple

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

MTU_DEFAULT = 65520  # as pasta: the largest MTU of an Ethernet-like device, in whole IPv4 words
MTU_MAX = 65521  # of the kernel's tap: with an Ethernet header as much as an IP packet can be
MTU_MIN = 68  # RFC 791
MTU_MIN_IPV6 = 1280  # RFC 8200
IFNAME_MAX = 15

# As tcp/window.py has them, which is not imported here; a test holds the two together
ESTIMATORS = ("sndbuf", "linear", "segments", "segments-wmem", "peer", "truesize")
# As datagram/udp.py has them
UDP_FILTERS = ("endpoint", "address", "port")
LIMIT_OUTPUT_MAX = 1 << 30

LOG_SIZE_DEFAULT = 1 << 20
LOG_SIZE_MIN = 40 * 1024
NAME_MAX = 254  # a domain name in text (RFC 1035)

OUR_MAC = bytes.fromhex("9a559a559a55")


class ConfigError(Exception):
    """Something that the user asked for cannot be: one line for stderr."""


class Config(NamedTuple):
    """Options, in pasta's meaning.  Addresses are None or empty where the host's are to be copied."""

    command: tuple[str, ...] = ()
    pid: int | None = None
    netns: str | None = None
    userns: str | None = None
    netns_only: bool = False
    netns_quit: bool = True
    pidns: bool = True
    new_session: bool = False
    ifname: str = ""  # empty: the default
    as_pasta: bool = False  # called by that name
    tap_fd: int | None = None
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
    copy_addresses: bool = True
    copy_routes: bool = True
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
    limit_output: int | None = None  # bytes, 0: no bound, None: as is found out
    trace_window: str = ""
    foreground: bool = False
    pid_file: str = ""
    quiet: bool = False
    debug: bool = False
    trace: bool = False
    stats: int = 0  # seconds, 0: none
    log_file: str = ""
    log_size: int = LOG_SIZE_DEFAULT
    pcap: str = ""
    runas: str = ""
    control: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def attach(self) -> bool:
        """True if an existing namespace is joined, False if a command is run in a new one."""
        return self.pid is not None or self.netns is not None or self.tap_fd is not None


def parse_mac(text: str, option: str) -> bytes:
    """Six bytes from colon-separated hex; raises ConfigError."""
    if not re.fullmatch(r"[0-9a-fA-F]{1,2}(:[0-9a-fA-F]{1,2}){5}", text):
        raise ConfigError(f"invalid MAC address for {option}: '{text}'")
    mac = bytes(int(part, 16) for part in text.split(":"))
    if mac[0] & 1 or not any(mac):
        raise ConfigError(f"not a unicast MAC address for {option}: '{text}'")
    return mac


def parse_address(text: str, option: str) -> IPAddress:
    """An IPv4 or IPv6 address that a host can have; raises ConfigError."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ConfigError(f"invalid address for {option}: '{text}'") from None
    if address.is_unspecified or address.is_multicast or address == ipaddress.ip_address("255.255.255.255"):
        raise ConfigError(f"not a host's address for {option}: '{text}'")
    return address


def parse_netmask(text: str) -> int:
    """A prefix length from bits or a dotted mask; raises ConfigError."""
    try:
        if text.isascii() and text.isdigit():
            bits = int(text)
        else:
            mask = int(ipaddress.IPv4Address(text))
            bits = bin(mask).count("1")
            if mask != (0xFFFFFFFF << (32 - bits)) & 0xFFFFFFFF:
                bits = 33
    except ValueError:
        bits = 33
    if not 0 < bits <= 32:
        raise ConfigError(f"invalid netmask: '{text}'")
    return bits


def class_prefix(address: ipaddress.IPv4Address) -> int:
    """The prefix length of the address's class (RFC 791), where none is given."""
    first = address.packed[0]
    return 8 if first < 128 else 16 if first < 192 else 24


def parse_ifname(text: str, option: str) -> str:
    """A name that an interface can have (dev_valid_name()); raises ConfigError."""
    bad = text in ("", ".", "..") or len(text.encode()) > IFNAME_MAX
    if bad or re.search(r"[/:\s%]", text):
        raise ConfigError(f"invalid interface name for {option}: '{text}'")
    return text


def parse_int(text: str, option: str, low: int, high: int) -> int:
    """A decimal number from low to high; raises ConfigError."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and low <= int(text) <= high):
        raise ConfigError(f"invalid value for {option}: '{text[:40]}' (from {low} to {high})")
    return int(text)


def parse_name(text: str, option: str) -> str:
    """A host's or a domain's name (RFC 1123, section 2.1); raises ConfigError."""
    labels = text.rstrip(".").split(".")
    if len(text) > NAME_MAX or not all(
        re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})", x) for x in labels
    ):
        raise ConfigError(f"invalid name for {option}: '{text}'")
    return text
