"""The composition root: the one place where a Config, and what set-up has found, become a Proxy.

Owns nothing.  Imports every room.
"""

import ipaddress
import select
import socket
from functools import partial
from typing import Any, NamedTuple, TextIO

from . import _cext, budget, wire
from .clients import ListenerClients
from .config import Config, ConfigError, IPAddress
from .config.ports import TCP, UDP
from .config.values import MTU_DEFAULT
from .datagram import udp
from .datagram.clients import Clients, NoWay, TapWay
from .datagram.echo import Echo, NoEcho
from .datagram.endpoints import Endpoints
from .datagram.plane import DatagramPlane, FromGuest
from .datagram.routes import NextHops
from .datagram.table import Table
from .forward.forward import Forward
from .forward.listeners import Addressing, Listeners
from .forward.policy import Policy
from .forward.scan import Scan
from .host_changes import HostChanges, Made, Makers
from .link import dhcp, dhcpv6, ndp
from .link.advertise import Advertiser
from .link.neighbours import Neighbours
from .link.plane import LinkPlane
from .link.reader import NoReader, Reader, TapReader
from .link.responder import Responder
from .link.tap import TapDevice
from .loop import MainLoop
from .observe.log import Log
from .observe.trace import NoTrace, Trace, WindowTrace
from .proxy import Planes, Proxy
from .setup.join import Guest
from .setup.names import HostNames, Names, choose
from .setup.template import Family, Template
from .sockets.guest import GuestMaker
from .sockets.request import HostMaker, Maker, NoMaker
from .sockets.unix import SocketFiles
from .splice.datagrams import SplicedDatagrams
from .splice.plane import SplicePlane
from .splice.streams import SplicedStreams
from .stream.flows import Flow, Flows
from .stream.host import HostSockets
from .stream.open import Common, Opener
from .stream.plane import NoStreams, StreamPlane, Streams
from .tcp import small_queue, window
from .translate import Translation

LOOPBACK = {4: ipaddress.ip_address("127.0.0.1"), 6: ipaddress.ip_address("::1")}


class Found(NamedTuple):
    """What set-up has found.

    `names`: the name servers; `files`: the keeper of UNIX sockets; `descriptors`: how many there may be;
    `trace_file`: for the windows, or None; `pcap_fd`: for a capture, or -1.  `host_names`: what the host's resolv.conf
    has; `reports`: the socket that reports changes of the host, or None.
    """

    guest: Guest
    names: Names
    files: SocketFiles
    descriptors: int
    trace_file: TextIO | None = None
    pcap_fd: int = -1
    host_names: HostNames = HostNames()
    reports: socket.socket | None = None


class _Common(NamedTuple):
    """What many of the parts are made of."""

    config: Config
    found: Found
    translation: Translation
    policy: Policy
    most: budget.Budget
    new_flows: budget.RateLimit
    loop: MainLoop
    log: Log
    host: Maker
    guest: Maker


def assemble(config: Config, found: Found, loop: MainLoop, log: Log) -> Proxy:
    """The proxy of a run; raises ConfigError."""
    template = found.guest.template
    translation = make_translation(config, template, found.names)
    agent = found.guest.agent
    common = _Common(
        config=config,
        found=found,
        translation=translation,
        policy=_policy(config, found.guest),
        most=budget.share_out(found.descriptors),
        new_flows=budget.new_flows(config.limit_flows),
        loop=loop,
        log=log,
        host=HostMaker(),
        guest=GuestMaker(agent) if agent is not None else NoMaker(),
    )
    trace: Trace = NoTrace()
    complaints = _Complaints(log)
    if found.trace_file is not None:
        trace = WindowTrace(found.trace_file, loop, complaints.add)

    packets = _cext.Packets()
    flows: Table[Any] = Table((common.most.udp_outbound, common.most.udp_inbound, 1), *udp.timeouts())
    epoll = select.epoll()
    splice_epoll = select.epoll()
    spliced = SplicedDatagrams(splice_epoll, flows, packets, common.host, common.guest, common.policy, log)
    splices = SplicePlane(splice_epoll, SplicedStreams(splice_epoll, loop), spliced)
    if found.guest.tap_fd >= 0:
        tap = _tap(config, found)
        neighbours = Neighbours(found.guest.mac, common.policy.learn)
        from_guest = _from_guest(common, tap, epoll, flows, packets)
        way = TapWay(from_guest.udp, flows, neighbours, translation, common.policy, config.mac)
        clients = Clients(flows, packets, spliced, way, common.policy, log)
        from_guest.udp.forwarded = clients
        datagrams = DatagramPlane(epoll, flows, from_guest, clients, loop, log)
        stream = _stream_plane(common, tap, neighbours, trace)
        responder = make_responder(config, template, found.names)
        versions = (config.ipv4, config.ipv6)
        link = LinkPlane(
            tap,
            neighbours,
            responder,
            datagrams,
            versions,
            loop,
            log,
            lambda error: stream.failed(None, error),
        )
        streams: Streams = stream
        reader: Reader = TapReader(tap, stream, link, loop, log, complaints.add)
        router = responder.router
        advertiser = Advertiser(tap, router, loop) if router is not None else None
        made = Made(translation, common.policy, responder, from_guest.rules, tap, advertiser)
    else:
        clients = Clients(flows, packets, spliced, NoWay(), common.policy, log)
        datagrams = DatagramPlane(epoll, flows, None, clients, loop, log)
        streams, reader, advertiser = NoStreams(), NoReader(), None
        made = Made(translation, common.policy)
    takers = ListenerClients(streams, datagrams, splices, common.host, common.guest, common.policy, log)
    forward = _forward(common, takers)
    planes = Planes(
        reader, streams, datagrams, splices, forward, takers, found.files, common.guest, trace, advertiser
    )
    proxy = Proxy(loop, planes, found.descriptors, log)
    complaints.proxy = proxy
    if found.reports is not None:
        changes = HostChanges(found.reports, config, template, found.host_names, _makers(config), made, log)
        proxy.follow_host(changes)
    return proxy


class _Complaints:
    """Warns of what has ended early, and has the proxy repeat it at the end."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.proxy: Proxy | None = None

    def add(self, text: str) -> None:
        if self.proxy is not None:
            self.proxy.complaint = text
        self._log.warning(text)


# The parts


def _tap(config: Config, found: Found) -> TapDevice:
    guest = found.guest
    ipv4, ipv6 = guest.template.ipv4, guest.template.ipv6
    tap = TapDevice(guest.tap_fd, guest.vnet, config.mac, guest.uso)
    tap.source4 = ipv4.gateway.packed if ipv4 and ipv4.gateway else b""
    tap.source6 = ipv6.gateway.packed if ipv6 and ipv6.gateway else wire.link_local(config.mac)
    if found.pcap_fd >= 0:
        try:
            tap.capture(found.pcap_fd)
        except OSError as e:
            raise ConfigError(f"cannot write {config.pcap}: {e.strerror}") from None
    return tap


def _stream_plane(common: _Common, tap: TapDevice, neighbours: Neighbours, trace: Trace) -> StreamPlane:
    config, most = common.config, common.most
    mtu = config.mtu or MTU_DEFAULT
    segment = small_queue.LARGE if tap.vnet else mtu - wire.IPV4 - wire.TCP
    queue = small_queue.SmallQueue(common.found.guest.tx_queue, segment, config.limit_output)
    shared = Common(
        config.ipv4 and config.tcp,
        config.ipv6 and config.tcp,
        mtu,
        queue,
        window.ESTIMATORS[config.window],
        trace,
        common.new_flows,
    )

    def failed(flow: Flow, error: Exception) -> None:
        plane.failed(flow, error)

    flows = Flows(common.loop, most.outbound, most.inbound, most.half_open, failed)
    # The default estimator needs little of a socket that has nothing queued
    whole = config.window != window.DEFAULT_NAME or common.found.trace_file is not None
    hosts = HostSockets(tap, common.host, common.loop, most.lingering, whole)
    opener = Opener(tap, neighbours, hosts, flows, common.translation, shared, common.log)
    plane = StreamPlane(flows, hosts, opener, queue, common.loop, common.log, tap)
    return plane


def _from_guest(
    common: _Common, tap: TapDevice, epoll: select.epoll, flows: Table[Any], packets: _cext.Packets
) -> FromGuest:
    config, log, translation = common.config, common.log, common.translation
    mtu = config.mtu or MTU_DEFAULT
    broadcasts = _broadcasts(common.found.guest.template)
    rules = udp.Rules(mtu, common.new_flows, config.udp_filter, broadcasts, udp.timeouts()[0])
    endpoints = Endpoints(epoll, common.host, flows, common.most.endpoints)
    hops = NextHops(common.host)
    guest_udp = udp.Udp(tap, translation, flows, packets, endpoints, rules, hops, log)
    echo: Echo | NoEcho = NoEcho()
    if config.icmp:
        echo = Echo(tap, translation, common.host, epoll, mtu, common.most.echo, common.new_flows, log)
    return FromGuest(guest_udp, endpoints, echo, rules, config.udp, common.loop, log)


def _broadcasts(template: Template) -> frozenset[bytes]:
    """The directed broadcast addresses of the guest's networks, packed."""
    return frozenset(
        address.network.broadcast_address.packed
        for address in (template.ipv4.addresses if template.ipv4 else ())
        if address.network.prefixlen < 31
    )


def _forward(common: _Common, takers: ListenerClients) -> Forward:
    config, loop, log = common.config, common.loop, common.log
    addressing = Addressing(
        ipv4=config.ipv4,
        ipv6=config.ipv6,
        protocols=(*((TCP,) if config.tcp else ()), *((UDP,) if config.udp else ())),
        freebind=config.freebind,
        scope=common.translation.scope,
    )
    listeners = Listeners(common.host, common.guest, common.found.files, addressing, takers, loop, log)
    scan = Scan({"host": common.host, "guest": common.guest})
    return Forward(listeners, scan, common.guest, addressing, takers, common.most.listeners, loop, log)


def _policy(config: Config, guest: Guest) -> Policy:
    ipv4, ipv6 = guest.template.ipv4, guest.template.ipv6
    return Policy(
        ipv4.addresses[0].ip.packed if ipv4 and ipv4.addresses else b"",
        ipv6.addresses[0].ip.packed if ipv6 and ipv6.addresses else b"",
        wire.link_local(guest.mac) if guest.mac else b"",
        follow4=config.address4 is None,
        follow6=config.address6 is None,
        splice=config.splice,
        loopback_kept=config.loopback_kept,
    )


# Addresses


def loopback_addresses(config: Config, template: Template) -> dict[int, IPAddress]:
    """The addresses that lead to the host's loopback address, by version."""
    mapped: dict[int, IPAddress] = {address.version: address for address in config.map_host_loopback}
    if config.map_gateway:
        for family in (template.ipv4, template.ipv6):
            if family is not None and family.gateway is not None:
                mapped.setdefault(family.gateway.version, family.gateway)
    return mapped


def _mapped_guest_addresses(config: Config, template: Template) -> dict[bytes, bytes]:
    """The addresses of --map-guest-addr, and the host's own address that each leads to (packed both)."""
    mapped = {}
    for address in config.map_guest_addr:
        family = template.ipv4 if address.version == 4 else template.ipv6
        if family is not None and family.host_address is not None:
            mapped[address.packed] = family.host_address.packed
    return mapped


def make_translation(config: Config, template: Template, names: Names) -> Translation:
    """What addresses mean on the other side."""
    redirect: dict[bytes, str] = {}
    callers: dict[bytes, bytes] = {}
    for guest, host in _mapped_guest_addresses(config, template).items():
        redirect[guest] = wire.unpack(host)
        callers[host] = guest
    # The first of these to match wins, as with pasta
    for version, address in loopback_addresses(config, template).items():
        redirect[address.packed] = str(LOOPBACK[version])
        callers[LOOPBACK[version].packed] = address.packed
    gateway4 = template.ipv4.gateway if template.ipv4 else None
    return Translation(
        redirect,
        dns=names.forward,
        source4=_of_version(config.outbound, 4),
        source6=_of_version(config.outbound, 6),
        interface4=config.outbound_if4,
        interface6=config.outbound_if6,
        scope=template.ipv6.ifindex if template.ipv6 else 0,
        callers=callers,
        own=_own_addresses(template),
        fallback4=gateway4.packed if gateway4 is not None else b"",
        fallback6=_link_local_gateway(config, template.ipv6),
    )


def choose_names(config: Config, host: HostNames, template: Template) -> Names:
    """What the guest is told of name servers, and where its queries go."""
    return choose(config, host, loopback_addresses(config, template))


def _makers(config: Config) -> Makers:
    """How everything that depends on the host is made."""
    return Makers(
        partial(choose_names, config),
        partial(make_translation, config),
        partial(make_responder, config),
        _broadcasts,
    )


def _link_local_gateway(config: Config, ipv6: Family | None) -> bytes:
    """The link-local address (packed) that this side of the tap answers by."""
    gateway = ipv6.gateway if ipv6 is not None else None
    if gateway is not None and gateway.is_link_local:
        return gateway.packed
    return wire.link_local(config.mac)


def _own_addresses(template: Template) -> frozenset[bytes]:
    """The guest's addresses, packed."""
    families = (template.ipv4, template.ipv6)
    return frozenset(a.ip.packed for family in families if family is not None for a in family.addresses)


def _of_version(chosen: tuple[IPAddress, ...], version: int) -> str:
    return next((str(address) for address in chosen if address.version == version), "")


# The link's services


def make_responder(config: Config, template: Template, names: Names) -> Responder:
    """What the link offers the guest."""
    ipv4, ipv6 = template.ipv4, template.ipv6
    source = _link_local_gateway(config, ipv6)
    mtu = MTU_DEFAULT if config.mtu is None else config.mtu
    servers = names.servers if config.dhcp_dns else ()
    dns4 = tuple(server.packed for server in servers if server.version == 4)
    dns6 = tuple(server.packed for server in servers if server.version == 6)
    search = names.search if config.dhcp_search else ()

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
    # With --config-net the tap has its addresses and routes: an advertisement would add others
    if config.ra and not config.config_net and ipv6 is not None:
        prefix = ipv6.addresses[0].ip.packed if ipv6.addresses else None
        router = ndp.Router(config.mac, source, prefix, mtu, lease6 is not None, dns6, search)
    return Responder(
        config.mac,
        _own_addresses(template),
        arp=config.ipv4,
        ndp=config.ipv6 and config.ndp,
        router=router,
        dhcp=lease,
        dhcpv6=lease6,
    )
