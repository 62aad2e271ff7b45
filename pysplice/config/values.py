"""The grammar of option values: text in, a value out, or a ConfigError that names the option.

Pure.  Imports the types of this room.
"""

import ipaddress
import re

from . import ConfigError, IPAddress

MTU_DEFAULT = 65520  # as pasta: the largest MTU of an Ethernet-like device, in whole IPv4 words
MTU_MAX = 65521  # of the kernel's tap: with an Ethernet header, as much as an IP packet can be
MTU_MIN = 68  # RFC 791
MTU_MIN_IPV6 = 1280  # RFC 8200
IFNAME_MAX = 15
NAME_MAX = 254  # a domain name as text (RFC 1035)
LIMIT_OUTPUT_MAX = 1 << 30
RATE_MAX = 1_000_000  # new flows a second
LOG_SIZE_MIN = 40 * 1024
BUSY_POLL_MAX = 1000
SHOWN = 40  # characters of a value that a message quotes

# As tcp/window.py and datagram/udp.py have them, which are not imported here; a test compares them
ESTIMATORS = ("sndbuf", "linear", "segments", "segments-wmem", "peer", "truesize")
UDP_FILTERS = ("endpoint", "address", "port")

LIMITED_BROADCAST = ipaddress.IPv4Address("255.255.255.255")

# What podman and docker take for -p: [ADDRESS:]HOST:CONTAINER, with a protocol or without
PUBLISH = re.compile(
    r"(?:(?P<address>[0-9.]+|\[[0-9a-f:]+\]):(?=[0-9-]+:))?"
    r"(?P<ports>[0-9]+(?:-[0-9]+)?(?::[0-9]+(?:-[0-9]+)?)?)(?:/(?P<protocol>tcp|udp))?"
)


def parse_int(text: str, option: str, low: int, high: int) -> int:
    """A decimal number from `low` to `high`."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and low <= int(text) <= high):
        raise ConfigError(f"invalid value for {option}: '{text[:SHOWN]}' (from {low} to {high})")
    return int(text)


def parse_busy_poll(text: str, option: str) -> int:
    """Microseconds; 0: off, -1: auto."""
    if text in ("auto", "off"):
        return -1 if text == "auto" else 0
    if not text.isdigit():
        raise ConfigError(f"invalid value for {option}: '{text[:SHOWN]}' (microseconds, auto or off)")
    return parse_int(text, option, 0, BUSY_POLL_MAX)


def parse_path(text: str, option: str) -> str:
    """A path, which is not empty."""
    if not text:
        raise ConfigError(f"option {option} needs a path")
    return text


def parse_capture(text: str, option: str) -> str:
    """The path of a capture; a port mapping of podman's or docker's is refused."""
    match = PUBLISH.fullmatch(text)
    if match:
        where, ports = match["address"], match["ports"]
        spec = f"{where.strip('[]')}/{ports}" if where else ports
        flag = "-u" if match["protocol"] == "udp" else "-t"
        raise ConfigError(
            f"option {option} writes a capture to a file; to forward ports write {flag} {spec} "
            f"(a file of this name: {option} ./{text})"
        )
    return parse_path(text, option)


def parse_user(text: str, option: str) -> str:
    """The name or the number of a user, and of a group if one is given; they are looked up later."""
    if not text:
        raise ConfigError(f"option {option} needs a user")
    return text


def parse_mac(text: str, option: str) -> bytes:
    """The six bytes of a unicast MAC address, written in hexadecimal with colons."""
    if not re.fullmatch(r"[0-9a-fA-F]{1,2}(:[0-9a-fA-F]{1,2}){5}", text):
        raise ConfigError(f"invalid MAC address for {option}: '{text[:SHOWN]}'")
    mac = bytes(int(part, 16) for part in text.split(":"))
    if mac[0] & 1 or not any(mac):
        raise ConfigError(f"not a unicast MAC address for {option}: '{text}'")
    return mac


def parse_address(text: str, option: str) -> IPAddress:
    """An IPv4 or IPv6 address that a host can have."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ConfigError(f"invalid address for {option}: '{text[:SHOWN]}'") from None
    if address.is_unspecified or address.is_multicast or address == LIMITED_BROADCAST:
        raise ConfigError(f"not a host's address for {option}: '{text}'")
    return address


def parse_gateway(text: str, option: str) -> IPAddress:
    """The address of a gateway."""
    gateway = parse_address(text, option)
    if gateway.is_loopback:
        raise ConfigError(f"not a gateway's address for {option}: '{text}'")
    return gateway


def parse_reachable(text: str, option: str) -> IPAddress:
    """An address whose packets leave the guest: not one of its loopback interface."""
    address = parse_address(text, option)
    if address.is_loopback:
        raise ConfigError(f"not an address that the guest can reach for {option}: '{text}'")
    return address


def parse_interface_address(text: str, option: str) -> tuple[IPAddress, int | None]:
    """An address for the guest, and the length of its prefix if one is given (for IPv6 it is checked only)."""
    text, slash, length = text.partition("/")
    address = parse_address(text, option)
    if address.is_loopback:
        written = f"{text}/{length}" if slash else text
        raise ConfigError(f"not a guest's address for {option}: '{written}'")
    prefix = parse_int(length, option, 1, address.max_prefixlen) if slash else None
    return address, prefix if address.version == 4 else None


def parse_netmask(text: str, option: str) -> int:
    """The length of a prefix, from bits or a dotted mask."""
    try:
        if text.isascii() and text.isdigit():
            bits = int(text[:SHOWN])
        else:
            mask = int(ipaddress.IPv4Address(text))
            bits = bin(mask).count("1")
            if mask != (0xFFFFFFFF << (32 - bits)) & 0xFFFFFFFF:
                bits = 33
    except ValueError:
        bits = 33
    if not 0 < bits <= 32:
        raise ConfigError(f"invalid netmask for {option}: '{text[:SHOWN]}'")
    return bits


def class_prefix(address: ipaddress.IPv4Address) -> int:
    """The length of the prefix of an address's class (RFC 791), for an address without one."""
    first = address.packed[0]
    return 8 if first < 128 else 16 if first < 192 else 24


def parse_ifname(text: str, option: str) -> str:
    """A name that an interface can have (dev_valid_name())."""
    # What is not UTF-8 stands as surrogates here, and is not printable
    bad = text in ("", ".", "..") or not text.isprintable() or len(text.encode()) > IFNAME_MAX
    if bad or re.search(r"[/:\s%]", text):
        raise ConfigError(f"invalid interface name for {option}: '{text[:SHOWN]}'")
    return text


def parse_name(text: str, option: str) -> str:
    """The name of a host or a domain (RFC 1123, section 2.1)."""
    labels = text.rstrip(".").split(".")
    if len(text) > NAME_MAX or not all(
        re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})", label) for label in labels
    ):
        hint = " (spaces separate names)" if "," in text else ""
        raise ConfigError(f"invalid name for {option}: '{text[:SHOWN]}'{hint}")
    return text


def parse_mtu(text: str, option: str) -> int:
    """An MTU, bytes; 0: leave it as it is."""
    mtu = parse_int(text, option, 0, MTU_MAX)
    if 0 < mtu < MTU_MIN:
        raise ConfigError(f"MTU {mtu} is too small, the minimum is {MTU_MIN}")
    return mtu


def parse_choice(text: str, option: str, what: str, choices: tuple[str, ...]) -> str:
    """One of several words."""
    if text not in choices:
        raise ConfigError(f"unknown {what} '{text[:SHOWN]}' for {option}: one of {', '.join(choices)}")
    return text


def parse_limit(text: str, option: str) -> int | None:
    """A number of bytes; `off` is 0, `auto` is None."""
    words = {"auto": None, "off": 0}
    if text in words:
        return words[text]
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"invalid value for {option}: '{text[:SHOWN]}' (bytes, auto or off)")
    return parse_int(text, option, 1, LIMIT_OUTPUT_MAX)


def parse_rate(text: str, option: str) -> int:
    """New flows in a second; `off` is 0."""
    if text == "off":
        return 0
    return parse_int(text, option, 1, RATE_MAX)
