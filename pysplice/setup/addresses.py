"""Addresses and routes: read from the host's interface, and configured on the tap in the guest's namespace.

Owns nothing.  Imports `config`, netlink.py and template.py.  `read` runs in the host's namespace, `configure` in the
guest's.
"""

import contextlib
import errno
import ipaddress
import socket
from typing import Any

from ..config import Config, ConfigError, IPAddress
from ..config.values import MTU_DEFAULT
from .netlink import TABLE_MAIN, Netlink, NetlinkError
from .template import Family, IPInterface, Route, Template

UNICAST = 1  # RTN_UNICAST
IFA_F_NODAD = 0x02
IFA_F_DEPRECATED = 0x20
RTNH_F_ONLINK = 4
RTPROT_BOOT = 3  # as ip(8) has it
RT_SCOPE_LINK = 253
IPV6_METRIC = 1024  # of a route that has been given none (IP6_RT_PRIO_USER)
OLD_ADDRESSES = 4  # of each version, that stay on the tap when the host has others

# What the guest gets where the host has no usable interface: pasta's local mode
LOCAL4 = ipaddress.IPv4Interface("169.254.2.1/16")
LOCAL4_GATEWAY = ipaddress.IPv4Address("169.254.2.2")
LOCAL6_GATEWAY = ipaddress.IPv6Address("fe80::1")

# How many frames the tap holds until they are read.  A millisecond of small segments uses up the kernel's default of
# 1000; a frame costs 8 bytes, in the ring and in each band of its pfifo_fast.  The small queue (tcp/small_queue.py)
# decides how many of them a connection may use.
RING_FRAMES = 16384
RING_FRAMES_DEFAULT = 1000


def read(config: Config) -> Template:
    """What the guest is to have, from the host's interfaces and the options; raises ConfigError."""
    _check_outbound(config)
    if config.interface and not _index(config.interface):
        raise ConfigError(f"no interface '{config.interface}' on the host")
    return look(config)


def look(config: Config) -> Template:
    """The same, without checks: an interface that is not there counts as none."""
    with Netlink() as netlink:
        return Template(
            _read_family(netlink, config, 4) if config.ipv4 else None,
            _read_family(netlink, config, 6) if config.ipv6 else None,
        )


def _index(ifname: str) -> int:
    """The index of an interface in the namespace of this process; 0 if there is none of this name."""
    try:
        return socket.if_nametoindex(ifname)
    except OSError:
        return 0


def _check_outbound(config: Config) -> None:
    """Raises ConfigError unless connections can come from the addresses of -o."""
    for address in config.outbound:
        reason = _not_ours(address)
        if reason:
            raise ConfigError(f"connections cannot come from {address}: {reason}")


def _not_ours(address: IPAddress) -> str:
    """Why connections cannot come from an address; empty if it is the host's."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        try:
            sock.bind((str(address), 0))
        except OSError as e:
            return e.strerror or str(e)
    return ""


def _read_family(netlink: Netlink, config: Config, version: int) -> Family:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    routes = [
        route
        for route in netlink.routes(family)
        if route["type"] == UNICAST and (route.get("table") or route["table"]) == TABLE_MAIN
    ]
    index = _template_index(config, version, routes)
    name = socket.if_indextoname(index) if index else ""
    found = _addresses(netlink, family, index) if index else []
    gateway = _gateway(routes, index)
    host_address = max(found, key=lambda a: a.network.prefixlen).ip if found else None

    wanted: list[IPInterface] = list(found)
    option: Any = config.address4 if version == 4 else config.address6
    if option is not None:
        if not _not_ours(option):
            host_address = option
        length = config.prefix4 if version == 4 else 64
        wanted = [ipaddress.ip_interface(f"{option}/{length}")]
    elif version == 4 and config.prefix4 and wanted:
        wanted = [ipaddress.ip_interface(f"{host_address}/{config.prefix4}")]

    if not config.copy_addresses and wanted:
        wanted = [address for address in wanted if address.ip == host_address][:1] or wanted[:1]

    copied = tuple(_route(route) for route in routes if _oif(route) == index) if index else ()
    if not config.copy_routes:
        copied = tuple(route for route in copied if route.destination.endswith("/0"))[:1]
    option = config.gateway4 if version == 4 else config.gateway6
    default = "0.0.0.0/0" if version == 4 else "::/0"
    if option is not None:
        gateway = option
        copied = (Route(default, str(option), None, 0),)
    elif not index or not wanted:
        # There is nothing to copy: no interface, or one without an address (a route's source may be another
        # interface's)
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


def _template_index(config: Config, version: int, routes: list[Any]) -> int:
    """The interface to copy from; 0 if there is none."""
    named = config.interface
    if not named:
        outbound = config.outbound_if4 if version == 4 else config.outbound_if6
        if outbound and _index(outbound):
            named = outbound
    if named:
        return _index(named)
    loopback = _index("lo")
    others = [route for route in routes if _oif(route) not in (0, loopback)]
    for route in others:
        if route["dst_len"] == 0:
            return _oif(route)
    for route in others:
        if not ipaddress.ip_address(route.get("dst")).is_link_local:
            return _oif(route)
    return 0


def _addresses(netlink: Netlink, family: int, index: int, deprecated: bool = False) -> list[IPInterface]:
    """The addresses of an interface but link-local ones; those that are deprecated, or those that are not."""
    found = []
    for message in netlink.addresses(family):
        flags = message.get("flags") or 0
        text = message.get("local") or message.get("address")
        address = ipaddress.ip_interface(f"{text}/{message['prefixlen']}")
        local = address.is_loopback or (address.version == 6 and address.is_link_local)
        if message["index"] == index and bool(flags & IFA_F_DEPRECATED) == deprecated and not local:
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
    """Bring up the interface lo."""
    with Netlink() as netlink:
        netlink.set_link(socket.if_nametoindex("lo"), up=True)


def configure(config: Config, template: Template, ifname: str) -> tuple[int, bytes]:
    """Set the tap's MAC address, and with --config-net everything else; raises ConfigError.

    The result: how many frames the tap's ring holds, and its MAC address.
    """
    with Netlink() as netlink:
        index = socket.if_nametoindex(ifname)
        if config.ns_mac is not None:
            mac = ":".join(f"{byte:02x}" for byte in config.ns_mac)
            _do("set the MAC address of", ifname, netlink.set_link, index, address=mac)
        # A length that is not the default was chosen by the owner of the tap, and stays
        if netlink.link(index).get("txqlen") == RING_FRAMES_DEFAULT:
            _do("set the queue of", ifname, netlink.set_link, index, txqlen=RING_FRAMES)
        if config.config_net:
            _configure(netlink, config, template, ifname, index)
        link = netlink.link(index)
        return int(link.get("txqlen")), bytes.fromhex(link.get("address").replace(":", ""))


def _configure(netlink: Netlink, config: Config, template: Template, ifname: str, index: int) -> None:
    if config.mtu != 0:
        _do("set the MTU of", ifname, netlink.set_link, index, mtu=config.mtu or MTU_DEFAULT)
    # Otherwise the link-local address would be tentative for a second
    _sysctl(f"/proc/sys/net/ipv6/conf/{ifname}/accept_dad", "0")
    if template.ipv6 is None:
        _sysctl(f"/proc/sys/net/ipv6/conf/{ifname}/disable_ipv6", "1")
    _do("bring up", ifname, netlink.set_link, index, up=True)
    for family in (template.ipv4, template.ipv6):
        if family is not None:
            _add_addresses(netlink, index, ifname, family)
            _add_routes(netlink, index, ifname, family)


def found(ifname: str) -> dict[str, Any]:
    """What an interface has: its MAC address, addresses and routes; without link-local ones.  Raises OSError."""
    with Netlink() as netlink:
        index = socket.if_nametoindex(ifname)
        listed, routes = [], []
        for family in (socket.AF_INET, socket.AF_INET6):
            listed += [str(address) for address in _addresses(netlink, family, index)]
            listed += [str(address) for address in _addresses(netlink, family, index, deprecated=True)]
            for message in netlink.routes(family):
                if message["type"] == UNICAST and _oif(message) == index:
                    route = _route(message)
                    routes.append({"dst": route.destination, "gw": route.gateway})
        return {"mac": netlink.link(index).get("address"), "addresses": listed, "routes": routes}


def change(old: Family, new: Family, ifname: str) -> None:
    """Give the tap what `new` has instead of `old`; raises ConfigError.

    An address that the host has lost stays for the connections that use it, but new ones do not; of such addresses the
    last OLD_ADDRESSES stay.  Where IPv6 is switched off in the namespace nothing is done.
    """
    version = new.addresses[0].version if new.addresses else 0
    with Netlink() as netlink:
        index = socket.if_nametoindex(ifname)
        try:
            for address in new.addresses:
                netlink.add_address(index, address, _flags(address), True)
            for address in old.addresses:
                if address not in new.addresses:
                    netlink.add_address(index, address, _flags(address), False)
        except NetlinkError as e:
            if version == 6 and e.errno in (errno.EACCES, errno.EPERM, errno.EOPNOTSUPP):
                return
            raise ConfigError(f"cannot change the addresses of {ifname}: {e.strerror}") from None
        # Before the new ones come: one of them may be the same to the kernel as an old one
        wanted = {_effective(route) for route in new.routes}
        for route in old.routes:
            if _effective(route) not in wanted:
                with contextlib.suppress(NetlinkError):  # it may be gone
                    netlink.delete_route(
                        *_route_message(index, route._replace(metric=_effective(route)[2]))
                    )
        _add_routes(netlink, index, ifname, new, str(new.addresses[0].ip) if new.addresses else "")
        for address in new.addresses:
            _prefer_network(netlink, index, address)
        if version:
            family = socket.AF_INET if version == 4 else socket.AF_INET6
            # Or the first address of a network would take the others with it
            _sysctl(f"/proc/sys/net/ipv4/conf/{ifname}/promote_secondaries", "1")
            for address in _addresses(netlink, family, index, deprecated=True)[:-OLD_ADDRESSES]:
                with contextlib.suppress(NetlinkError):
                    netlink.delete_address(index, address)


def _flags(address: IPInterface) -> int:
    """The flags of an address that the tap gets."""
    return IFA_F_NODAD if address.version == 6 else 0


def _effective(route: Route) -> tuple[str, str | None, int]:
    """What makes two routes the same to the kernel."""
    default = IPV6_METRIC if ":" in route.destination else 0
    return route.destination, route.gateway, default if route.metric is None else route.metric


def _prefer_network(netlink: Netlink, index: int, address: IPInterface) -> None:
    """Have connections to an address's own network come from that address, not from an older one."""
    if address.version == 4 and address.network.prefixlen < 32:
        fields, attributes = _route_message(index, Route(str(address.network), None, None, RT_SCOPE_LINK))
        with contextlib.suppress(NetlinkError):
            netlink.add_route(fields, [*attributes, ("RTA_PREFSRC", str(address.ip))], replace=True)


def _do(what: str, ifname: str, call: Any, *args: Any, **kwargs: Any) -> None:
    try:
        call(*args, **kwargs)
    except NetlinkError as e:
        raise ConfigError(f"cannot {what} {ifname}: {e.strerror}") from None


def _sysctl(path: str, value: str) -> None:
    # A kernel without IPv6 does not have this file
    with contextlib.suppress(OSError), open(path, "w") as file:
        file.write(value)


def _add_addresses(netlink: Netlink, index: int, ifname: str, family: Family) -> None:
    for address in family.addresses:
        try:
            netlink.add_address(index, address, IFA_F_NODAD if address.version == 6 else 0)
        except NetlinkError as e:
            if e.errno == errno.EEXIST:
                continue
            if address.version == 6 and e.errno in (errno.EACCES, errno.EPERM, errno.EOPNOTSUPP):
                return  # IPv6 is switched off in the namespace
            raise ConfigError(f"cannot add {address} to {ifname}: {e.strerror}") from None


def _add_routes(netlink: Netlink, index: int, ifname: str, family: Family, source: str = "") -> None:
    """Add all routes, in as many rounds as their dependencies take; last come those whose gateway is off the link.

    With a `source` they replace others, and have it as the address that connections come from.
    """
    waiting = list(family.routes)
    error: NetlinkError | None = None
    onlink = False
    while waiting:
        failed = []
        for route in waiting:
            try:
                fields, attributes = _route_message(index, route, onlink)
                if source and route.gateway is not None:
                    attributes.append(("RTA_PREFSRC", source))
                netlink.add_route(fields, attributes, bool(source))
            except NetlinkError as e:
                if e.errno == errno.EEXIST:
                    continue
                if e.errno in (errno.EACCES, errno.EPERM) and ":" in route.destination:
                    return
                error = e
                failed.append(route)
        if len(failed) == len(waiting):
            if onlink or not any(route.gateway for route in failed):
                first = failed[0]
                reason = error.strerror if error else ""
                raise ConfigError(f"cannot add route {first.destination} to {ifname}: {reason}")
            onlink = True
        waiting = failed


def _route_message(
    index: int, route: Route, onlink: bool = False
) -> tuple[dict[str, int], list[tuple[str, Any]]]:
    """The fields of struct rtmsg and the attributes for a route by the tap."""
    destination, _, length = route.destination.partition("/")
    ipv6 = ":" in destination
    fields = {
        "family": socket.AF_INET6 if ipv6 else socket.AF_INET,
        "dst_len": int(length),
        "table": TABLE_MAIN,
        "proto": RTPROT_BOOT,
        "type": UNICAST,
        "scope": 0 if route.gateway is not None else route.scope,
    }
    attributes: list[tuple[str, Any]] = [("RTA_OIF", index)]
    if int(length):
        attributes.append(("RTA_DST", destination))
    if route.gateway is not None:
        attributes.append(("RTA_GATEWAY", route.gateway))
        if onlink:
            fields["flags"] = RTNH_F_ONLINK
    if route.metric is not None:
        attributes.append(("RTA_PRIORITY", route.metric))
    return fields, attributes
