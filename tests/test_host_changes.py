"""What is made again when the host changes, with a follower that is a socket pair."""

import ipaddress
import os
import socket
from types import SimpleNamespace

import pytest

from pysplice import assemble
from pysplice.budget import new_flows
from pysplice.config import Config
from pysplice.datagram.udp import Rules
from pysplice.forward.policy import Policy
from pysplice.host_changes import HostChanges, Made
from pysplice.observe.log import Log
from pysplice.setup import follow, names
from pysplice.setup.follow import ADDRESSES_MAX, NOTE_MAX, REPORT_MAX, State, followed, read_report, report
from pysplice.setup.names import HostNames
from pysplice.setup.template import Family, Route, Template

IP = ipaddress.ip_address


def family(address: str, gateway: str, index: int = 2, name: str = "eth0") -> Family:
    interface = ipaddress.ip_interface(address)
    return Family(
        name, index, (interface,), IP(gateway), (Route("0.0.0.0/0", gateway, None, 0),), interface.ip
    )


# Addresses that no machine has: none of them is local
HOME = Template(family("192.0.2.5/24", "192.0.2.1"), family("2001:db8::5/64", "2001:db8::1"))
OFFICE = Template(
    family("198.51.100.7/24", "198.51.100.1", 5, "wlan0"), family("2001:db8:1::7/64", "fe80::9", 5, "wlan0")
)
NOWHERE = Template(
    Family("", 0, (ipaddress.ip_interface("169.254.2.1/16"),), IP("169.254.2.2"), (), None),
    Family("", 0, (), IP("fe80::1"), (), None),
)
SERVERS = HostNames((IP("192.0.2.53"),), ("home.example",))
OTHERS = HostNames((IP("198.51.100.53"), IP("127.0.0.53")), ())


class Advertiser:
    def __init__(self) -> None:
        self.routers: list = []

    def change(self, router) -> None:
        self.routers.append(router)


class Scene:
    def __init__(self, first: Template = HOME, **options) -> None:
        config = Config(**options)
        self.ours, self.follower = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self.lines: list[str] = []
        log = Log()
        log.info = log.warning = self.lines.append
        known = assemble.choose_names(config, SERVERS, first)
        self.translation = assemble.make_translation(config, first, known)
        self.responder = assemble.make_responder(config, first, known)
        self.policy = Policy(b"\xc0\0\2\5")
        self.rules = Rules(1500, new_flows(0))
        self.tap = SimpleNamespace(source4=b"", source6=b"")
        self.advertiser = Advertiser()
        made = Made(self.translation, self.policy, self.responder, self.rules, self.tap, self.advertiser)  # type: ignore[arg-type]
        self.changes = HostChanges(self.ours, config, first, SERVERS, assemble._makers(config), made, log)

    def report(
        self, template: Template, host_names: HostNames = SERVERS, note: str = "", guest: Template = HOME
    ) -> None:
        self.follower.send(report(State(host_names, template), note, guest))
        self.changes.on_ready()

    def close(self) -> None:
        self.ours.close()
        self.follower.close()


@pytest.fixture
def scene(request):
    made = Scene(**getattr(request, "param", {}))
    yield made
    made.close()


FORWARD = {"dns_forward": (IP("10.1.1.1"),), "dhcp_dns": True, "dhcp_search": True}


@pytest.mark.parametrize("scene", (FORWARD,), indirect=True)
def test_other_name_servers(scene):
    assert scene.translation.dns == {IP("10.1.1.1").packed: "192.0.2.53"}
    scene.report(HOME, OTHERS)
    assert scene.translation.dns[IP("10.1.1.1").packed] == "198.51.100.53"
    # The one on the host's loopback interface is reached by the gateway's address
    assert scene.translation.dns[IP("192.0.2.1").packed] == "127.0.0.53"
    assert scene.responder.dhcp.dns == (IP("198.51.100.53").packed, IP("192.0.2.1").packed)
    assert scene.responder.dhcp.search == ()
    assert scene.advertiser.routers
    assert scene.lines == ["the host's name servers: 198.51.100.53 127.0.0.53"]
    scene.report(HOME, OTHERS)
    assert len(scene.lines) == 1
    scene.report(HOME, HostNames())
    assert scene.translation.dns == {} and scene.lines[-1] == "the host's name servers: none"


MAPPED = {"map_guest_addr": (IP("169.254.1.2"),)}


@pytest.mark.parametrize("scene", (MAPPED,), indirect=True)
def test_another_network_that_the_guest_is_not_given(scene):
    lease, own = scene.responder.dhcp, set(scene.translation.own)
    scene.report(OFFICE)
    # Its own addresses are as before
    assert scene.responder.dhcp == lease and set(scene.translation.own) == own
    assert scene.policy.guest4 == b"\xc0\0\2\5"
    assert IP("192.0.2.1").packed in scene.translation.redirect
    # Link-local addresses, and the host by its other name, are the host's matter
    assert scene.translation.scope == 5
    assert scene.translation.redirect[IP("169.254.1.2").packed] == "198.51.100.7"
    assert scene.translation.callers[IP("198.51.100.7").packed] == IP("169.254.1.2").packed
    assert scene.lines == [
        "the host's IPv4: 198.51.100.7/24, gateway 198.51.100.1, wlan0",
        "the host's IPv6: 2001:db8:1::7/64, gateway fe80::9, wlan0",
    ]
    scene.report(NOWHERE)
    assert scene.lines[2:] == ["the host's IPv4: none", "the host's IPv6: none"]
    # What it was known by last is still the best guess
    assert scene.translation.redirect[IP("169.254.1.2").packed] == "198.51.100.7"


def test_an_address_that_the_host_still_has(monkeypatch):
    scene = Scene(**MAPPED)
    monkeypatch.setattr("pysplice.host_changes.is_local", lambda address: True)
    scene.report(OFFICE)
    assert scene.translation.redirect[IP("169.254.1.2").packed] == "192.0.2.5"
    scene.close()


FOLLOWING = {"config_net": True, "follow_host": True}


@pytest.mark.parametrize("scene", (FOLLOWING,), indirect=True)
def test_another_network_that_the_guest_is_given(scene):
    scene.report(OFFICE, note="cannot add")
    assert scene.lines[0] == "the guest's addresses cannot be changed: cannot add"
    # What it does not have is not used
    assert IP("198.51.100.7").packed not in scene.translation.own
    assert scene.responder.dhcp.address == IP("192.0.2.5").packed
    scene.report(OFFICE, guest=OFFICE)
    assert scene.policy.guest4 == IP("198.51.100.7").packed
    assert scene.policy.guest6 == IP("2001:db8:1::7").packed
    assert scene.translation.redirect[IP("198.51.100.1").packed] == "127.0.0.1"
    # It keeps what it had for the connections that it has
    for address in ("192.0.2.5", "198.51.100.7", "2001:db8::5"):
        assert IP(address).packed in scene.translation.own
        assert IP(address).packed in scene.responder.guest_addresses
    assert scene.responder.dhcp.address == IP("198.51.100.7").packed
    assert scene.rules.broadcasts == {IP("198.51.100.255").packed}
    assert scene.tap.source4 == IP("198.51.100.1").packed
    scene.report(NOWHERE, guest=OFFICE)
    assert scene.policy.guest4 == IP("198.51.100.7").packed


def test_a_guest_without_a_network_gets_one():
    scene = Scene(NOWHERE, config_net=True)
    scene.report(OFFICE, guest=OFFICE)
    assert scene.policy.guest6 == IP("2001:db8:1::7").packed
    assert IP("2001:db8:1::7").packed in scene.translation.own
    scene.close()


def test_without_a_tap():
    scene = Scene(**FORWARD)
    config = Config(**FORWARD)
    changes = HostChanges(
        scene.ours, config, HOME, SERVERS, assemble._makers(config),
        Made(scene.translation, scene.policy), Log(quiet=True),
    )  # fmt: skip
    scene.follower.send(report(State(OTHERS, OFFICE), "", HOME))
    changes.on_ready()
    assert scene.translation.dns[IP("10.1.1.1").packed] == "198.51.100.53"
    scene.close()


def test_the_end_of_the_follower(scene):
    scene.changes.on_ready()  # nothing has come
    scene.follower.close()
    with pytest.raises(ConnectionError):
        scene.changes.on_ready()


def test_who_is_given_the_hosts_addresses():
    assert followed(Config(config_net=True, follow_host=True), HOME) == [4, 6]
    assert followed(Config(config_net=True), HOME) == []
    assert followed(Config(config_net=True), NOWHERE) == [4, 6]
    assert followed(Config(follow_host=True), NOWHERE) == []
    assert followed(Config(config_net=True), Template(HOME.ipv4, NOWHERE.ipv6)) == [6]
    assert followed(Config(config_net=True), Template(None, NOWHERE.ipv6)) == [6]


def test_a_report_has_a_bound():
    """However much a host has: one message, and what matters in it."""
    many = tuple(ipaddress.ip_interface(f"10.{n // 250}.{n % 250}.1/24") for n in range(5000))
    routes = tuple(Route(f"10.{n // 250}.{n % 250}.0/24", None, None, 0) for n in range(5000))
    assert HOME.ipv4 is not None
    crowd = Template(HOME.ipv4._replace(addresses=many, routes=routes), HOME.ipv6)
    text = "search " + " ".join(f"{n}.{chr(0x1F600) * 240}" for n in range(5000)) + f" {'y' * 70000}\n"
    text += "nameserver 192.0.2.1\n" * 5000
    message = report(State(names.parse(text), crowd), "x" * 10000, crowd)
    assert len(message) < REPORT_MAX
    state, note, _ = read_report(message)
    assert state.template.ipv4 is not None
    assert len(state.template.ipv4.addresses) == ADDRESSES_MAX and len(note) == NOTE_MAX
    assert state.names.servers[0] == IP("192.0.2.1")


def test_the_way_to_a_file(tmp_path):
    """Links of folders are looked at, too: they may be the ones that change."""
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "file").touch()
    (tmp_path / "now").symlink_to("v1")
    (tmp_path / "link").symlink_to("now/../now/file")
    (tmp_path / "first").symlink_to(tmp_path / "link")
    ways = [str(tmp_path / name) for name in ("first", "link", "now", "now", "v1/file")]
    assert list(follow._way(str(tmp_path / "first"))) == ways
    (tmp_path / "dangling").symlink_to("none/file")
    assert list(follow._way(str(tmp_path / "dangling")))[-1] == str(tmp_path / "none" / "file")
    (tmp_path / "loop").symlink_to("loop")
    assert len(list(follow._way(str(tmp_path / "loop")))) <= follow.LINKS_MAX + 2


@pytest.mark.parametrize("kind", ("fifo", "folder", "device", "nothing"))
def test_a_resolv_conf_that_is_no_file(tmp_path, monkeypatch, kind):
    path = tmp_path / "resolv.conf"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    monkeypatch.setattr(names, "PATH", str(path))
    assert names.read_host(Config()) == HostNames()


def test_events_of_inotify():
    data = follow.EVENT.pack(1, 2, 0, 16) + b"resolv.conf".ljust(16, b"\0") + follow.EVENT.pack(2, 8, 0, 0)
    assert list(follow._events(data)) == [b"resolv.conf", b""]
