"""Addresses and routes: read off the host, given to the tap in the guest's namespace.

Owns nothing; netlink is pyroute2's.  Imports config.py.  `read` runs in the host's namespace,
`configure` in the guest's.
"""

import contextlib
import errno
import ipaddress
import socket
from dataclasses import dataclass
from typing import Any

from pyroute2 import IPRoute, NetlinkError

from ..config import MTU_DEFAULT, Config, ConfigError, IPAddress

TABLE_MAIN = 254
UNICAST = 1  # RTN_UNICAST
IFA_F_NODAD = 0x02
IFA_F_DEPRECATED = 0x20
RTNH_F_ONLINK = 4

# What is there without a usable interface: as pasta's local mode
LOCAL4 = ipaddress.IPv4Interface("169.254.2.1/16")
LOCAL4_GATEWAY = ipaddress.IPv4Address("169.254.2.2")
LOCAL6_GATEWAY = ipaddress.IPv6Address("fe80::1")

# Frames that the tap holds until we read them.  The kernel's 1000 are gone in a millisecond of small segments;
# these cost 8 bytes each, in the ring and in each band of its pfifo_fast.  How much of them a connection may
# use is for the small queue to say (tcp/small_queue.py).
RING_FRAMES = 16384
RING_FRAMES_DEFAULT = 1000

IPInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


@dataclass(frozen=True)
class Route:
    """A route of the template interface: destination, gateway or None, metric or None."""

    destination: str
    gateway: str | None
    metric: int | None
    scope: int


@dataclass(frozen=True)
class Family:
    """What one version of IP gets in the guest's namespace."""

    interface: str
    index: int
    addresses: tuple[IPInterface, ...]
    gateway: IPAddress | None
    routes: tuple[Route, ...]
    host_address: IPAddress | None


@dataclass(frozen=True)
class Template:
    """Both versions; None where it is switched off or the host has none."""

    ipv4: Family | None
    ipv6: Family | None


def read(config: Config) -> Template:
    """What the guest is to have, from the host's interfaces and the options; raises ConfigError."""
    _check_outbound(config)
    with IPRoute() as netlink:
        if config.interface and not netlink.link_lookup(ifname=config.interface):
            raise ConfigError(f"no interface '{config.interface}' on the host")
        return Template(
            _read_family(netlink, config, 4) if config.ipv4 else None,
            _read_family(netlink, config, 6) if config.ipv6 else None,
        )


def _check_outbound(config: Config) -> None:
    """Addresses that connections are to come from must be ours."""
    for address in config.outbound:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            try:
                sock.bind((str(address), 0))
            except OSError as e:
                raise ConfigError(f"connections cannot come from {address}: {e.strerror}") from None


def _read_family(netlink: Any, config: Config, version: int) -> Family:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    routes = [
        route for route in netlink.get_routes(family=family, table=TABLE_MAIN) if route["type"] == UNICAST
    ]
    index = _template_index(netlink, config, version, routes)
    name = netlink.get_links(index)[0].get("ifname") if index else ""
    found = _addresses(netlink, family, index) if index else []
    gateway = _gateway(routes, index)
    host_address = max(found, key=lambda a: a.network.prefixlen).ip if found else None

    wanted: list[IPInterface] = list(found)
    option: Any = config.address4 if version == 4 else config.address6
    if option is not None:
        length = config.prefix4 if version == 4 else 64
        wanted = [ipaddress.ip_interface(f"{option}/{length}")]
    elif version == 4 and config.prefix4 and wanted:
        wanted = [ipaddress.ip_interface(f"{host_address}/{config.prefix4}")]

    copied = tuple(_route(route) for route in routes if _oif(route) == index) if index else ()
    option = config.gateway4 if version == 4 else config.gateway6
    default = "0.0.0.0/0" if version == 4 else "::/0"
    if option is not None:
        gateway = option
        copied = (Route(default, str(option), None, 0),)
    elif not index:
        if version == 4:
            gateway = LOCAL4_GATEWAY
            wanted = wanted or [LOCAL4]
        else:
            gateway = LOCAL6_GATEWAY
        copied = (Route(default, str(gateway), None, 0),)
    return Family(name, index, tuple(wanted), gateway, copied, host_address)


def _oif(route: Any) -> int:
    index = route.get("oif")
    if index is None and route.get("multipath"):
        index = route.get("multipath")[0]["oif"]
    return int(index or 0)


def _template_index(netlink: Any, config: Config, version: int, routes: list[Any]) -> int:
    """The interface to copy from; 0 if there is none."""
    named = config.interface
    if not named:
        outbound = config.outbound_if4 if version == 4 else config.outbound_if6
        if outbound and netlink.link_lookup(ifname=outbound):
            named = outbound
    if named:
        return int(netlink.link_lookup(ifname=named)[0])
    loopback = set(netlink.link_lookup(kind=None, ifname="lo"))
    others = [route for route in routes if _oif(route) and _oif(route) not in loopback]
    for route in others:
        if route["dst_len"] == 0:
            return _oif(route)
    for route in others:
        if not ipaddress.ip_address(route.get("dst")).is_link_local:
            return _oif(route)
    return 0


def _addresses(netlink: Any, family: int, index: int) -> list[IPInterface]:
    found = []
    for message in netlink.get_addr(family=family, index=index):
        flags = message.get("flags") or 0
        text = message.get("local") or message.get("address")
        address = ipaddress.ip_interface(f"{text}/{message['prefixlen']}")
        local = address.is_loopback or (address.version == 6 and address.is_link_local)
        if message["index"] == index and not flags & IFA_F_DEPRECATED and not local:
            found.append(address)
    return found


def _gateway(routes: list[Any], index: int) -> IPAddress | None:
    for route in routes:
        if index and _oif(route) == index and route["dst_len"] == 0 and route.get("gateway"):
            return ipaddress.ip_address(route.get("gateway"))
    return None


def _route(route: Any) -> Route:
    default = "0.0.0.0" if route["family"] == socket.AF_INET else "::"
    gateway = route.get("gateway")
    if gateway is None and route.get("multipath"):
        gateway = route.get("multipath")[0].get("gateway")
    return Route(
        f"{route.get('dst') or default}/{route['dst_len']}",
        gateway,
        route.get("priority"),
        route["scope"],
    )


def bring_up_loopback() -> None:
    """lo is always brought up."""
    with IPRoute() as netlink:
        netlink.link("set", index=netlink.link_lookup(ifname="lo")[0], state="up")


def configure(config: Config, template: Template, ifname: str) -> None:
    """Give the tap its MAC address, and with --config-net everything else; raises ConfigError."""
    with IPRoute() as netlink:
        index = netlink.link_lookup(ifname=ifname)[0]
        if config.ns_mac is not None:
            mac = ":".join(f"{byte:02x}" for byte in config.ns_mac)
            _do("set the MAC address of", ifname, netlink.link, "set", index=index, address=mac)
        # A length that somebody has chosen for a tap of his own stays
        if netlink.get_links(index)[0].get("txqlen") == RING_FRAMES_DEFAULT:
            _do("set the queue of", ifname, netlink.link, "set", index=index, txqlen=RING_FRAMES)
        if not config.config_net:
            return
        if config.mtu != 0:
            mtu = config.mtu or MTU_DEFAULT
            _do("set the MTU of", ifname, netlink.link, "set", index=index, mtu=mtu)
        # The link-local address would be tentative for a second
        _sysctl(f"/proc/sys/net/ipv6/conf/{ifname}/accept_dad", "0")
        if template.ipv6 is None:
            _sysctl(f"/proc/sys/net/ipv6/conf/{ifname}/disable_ipv6", "1")
        _do("bring up", ifname, netlink.link, "set", index=index, state="up")
        for family in (template.ipv4, template.ipv6):
            if family is not None:
                _add_addresses(netlink, index, ifname, family)
                _add_routes(netlink, index, ifname, family)


def _do(what: str, ifname: str, call: Any, *args: Any, **kwargs: Any) -> None:
    try:
        call(*args, **kwargs)
    except NetlinkError as e:
        raise ConfigError(f"cannot {what} {ifname}: {e.args[1]}") from None


def _sysctl(path: str, value: str) -> None:
    # A kernel without IPv6 has no such file
    with contextlib.suppress(OSError), open(path, "w") as file:
        file.write(value)


def _add_addresses(netlink: Any, index: int, ifname: str, family: Family) -> None:
    for address in family.addresses:
        more = {"flags": IFA_F_NODAD} if address.version == 6 else {}
        try:
            netlink.addr(
                "add",
                index=index,
                address=str(address.ip),
                prefixlen=address.network.prefixlen,
                **more,
            )
        except NetlinkError as e:
            if e.code == errno.EEXIST:
                continue
            if address.version == 6 and e.code in (errno.EACCES, errno.EPERM, errno.EOPNOTSUPP):
                return  # IPv6 is switched off in there
            raise ConfigError(f"cannot add {address} to {ifname}: {e.args[1]}") from None


def _add_routes(netlink: Any, index: int, ifname: str, family: Family) -> None:
    """All routes, in as many rounds as their dependencies take; then gateways off the link."""
    waiting = list(family.routes)
    error: NetlinkError | None = None
    onlink = False
    while waiting:
        failed = []
        for route in waiting:
            try:
                _add_route(netlink, index, route, onlink)
            except NetlinkError as e:
                if e.code == errno.EEXIST:
                    continue
                if e.code in (errno.EACCES, errno.EPERM) and ":" in route.destination:
                    return
                error = e
                failed.append(route)
        if len(failed) == len(waiting):
            if onlink or not any(route.gateway for route in failed):
                first = failed[0]
                reason = error.args[1] if error else ""
                raise ConfigError(f"cannot add route {first.destination} to {ifname}: {reason}")
            onlink = True
        waiting = failed


def _add_route(netlink: Any, index: int, route: Route, onlink: bool) -> None:
    request: dict[str, Any] = {"dst": route.destination, "oif": index, "table": TABLE_MAIN}
    request["family"] = socket.AF_INET6 if ":" in route.destination else socket.AF_INET
    if route.gateway is not None:
        request["gateway"] = route.gateway
        if onlink:
            request["flags"] = RTNH_F_ONLINK
    else:
        request["scope"] = route.scope
    if route.metric is not None:
        request["priority"] = route.metric
    netlink.route("add", **request)


def queue_frames(ifname: str) -> int:
    """How many frames the ring of the tap holds."""
    with IPRoute() as netlink:
        return int(netlink.get_links(netlink.link_lookup(ifname=ifname)[0])[0].get("txqlen"))
