"""What addresses mean on the other side."""

import ipaddress

import pytest

from pysplice.config import Config
from pysplice.setup import names
from pysplice.translate import Translation
from pysplice.wire import pack, unpack


def key(destination, port=80):
    packed = ipaddress.ip_address(destination).packed
    return bytes(len(packed)) + packed + b"\x30\x39" + port.to_bytes(2, "big")


def packed(text):
    return ipaddress.ip_address(text).packed


def test_names_come_first_and_only_for_their_ports():
    made = Translation(
        {packed("10.0.2.2"): "127.0.0.1"},
        dns={packed("10.0.2.2"): "192.0.2.53", packed("169.254.1.1"): "127.0.0.53"},
        source4="192.0.2.1",
        interface4="eth1",
    )
    target = made.target(key("10.0.2.2", 53))
    assert (target.address, target.source, target.interface) == (
        ("192.0.2.53", 53),
        ("192.0.2.1", 0),
        "eth1",
    )
    assert made.target(key("10.0.2.2", 853)).address == ("192.0.2.53", 853)
    assert made.target(key("10.0.2.2", 54)).address == ("127.0.0.1", 54)
    # A server on loopback is reached from loopback
    target = made.target(key("169.254.1.1", 53))
    assert (target.address, target.source, target.interface) == (("127.0.0.53", 53), None, "")
    assert made.target(key("169.254.1.1", 80)).address == ("169.254.1.1", 80)


@pytest.mark.parametrize(
    ("client", "seen"),
    (
        ("198.51.100.7", "198.51.100.7"),
        ("127.0.0.1", "10.0.2.2"),
        ("127.0.0.5", "10.0.2.254"),  # the guest could not answer it
        ("10.0.2.15", "10.0.2.254"),  # its own address
        ("192.0.2.1", "10.0.2.3"),  # the host's, which has a name
        ("2001:db8::7", "2001:db8::7"),
        ("::1", "fe80::1"),
        ("fd00::15", "fe80::1"),
    ),
)
def test_who_calls(client, seen):
    made = Translation(
        callers={packed("127.0.0.1"): packed("10.0.2.2"), packed("192.0.2.1"): packed("10.0.2.3")},
        fallback4=packed("10.0.2.254"),
        fallback6=packed("fe80::1"),
    )
    guest = packed("fd00::15" if ":" in client else "10.0.2.15")
    assert unpack(made.caller(packed(client), guest)) == seen
    assert Translation().caller(packed("127.0.0.1"), guest) == b""


def test_packed():
    assert pack("::ffff:192.0.2.1") == pack("192.0.2.1") == bytes((192, 0, 2, 1))
    assert pack("fe80::1%eth0") == packed("fe80::1")
    assert unpack(bytes(4)) == "0.0.0.0" and unpack(bytes(16)) == "::"


# Name servers of the host

RESOLV = """# a comment
nameserver 127.0.0.53
nameserver 192.0.2.53   # another
nameserver nonsense
nameserver fe80::53%eth0
nameserver 192.0.2.53
search one.example two.example
options edns0
"""


def read(monkeypatch, tmp_path, text, loopback=None, **config):
    path = tmp_path / "resolv.conf"
    path.write_text(text)
    monkeypatch.setattr(names, "PATH", str(path))
    mapped = {ipaddress.ip_address(a).version: ipaddress.ip_address(a) for a in loopback or ()}
    made = Config(**config)
    return names.choose(made, names.read_host(made), mapped)


def test_servers_of_the_host(monkeypatch, tmp_path):
    known = read(monkeypatch, tmp_path, RESOLV, ["10.0.2.2"])
    assert [str(server) for server in known.servers] == ["10.0.2.2", "192.0.2.53", "fe80::53"]
    assert known.search == ("one.example", "two.example")
    assert known.forward == {packed("10.0.2.2"): "127.0.0.53"}
    assert known.found


def test_a_server_on_loopback_that_nothing_leads_to(monkeypatch, tmp_path):
    known = read(monkeypatch, tmp_path, "nameserver 127.0.0.53\n")
    assert (known.servers, known.forward, known.found) == ((), {}, False)


def test_a_server_that_is_shadowed(monkeypatch, tmp_path):
    known = read(monkeypatch, tmp_path, "nameserver 10.0.2.2\n", ["10.0.2.2"])
    assert known.forward == {packed("10.0.2.2"): "10.0.2.2"}


def test_forwarded(monkeypatch, tmp_path):
    address = ipaddress.ip_address
    known = read(monkeypatch, tmp_path, RESOLV, dns_forward=(address("169.254.1.1"), address("fd53::1")))
    assert known.forward[packed("169.254.1.1")] == "127.0.0.53"
    assert known.forward[packed("fd53::1")] == "fe80::53"
    known = read(
        monkeypatch,
        tmp_path,
        RESOLV,
        dns_forward=(address("169.254.1.1"),),
        dns_host=(address("192.0.2.99"),),
    )
    assert known.forward == {packed("169.254.1.1"): "192.0.2.99"}
    # Without a server of that version there is nowhere to lead to
    known = read(monkeypatch, tmp_path, "nameserver 192.0.2.1\n", dns_forward=(address("fd53::1"),))
    assert known.forward == {}


def test_chosen(monkeypatch, tmp_path):
    address = ipaddress.ip_address
    known = read(
        monkeypatch, tmp_path, RESOLV, ["10.0.2.2"], dns=(address("127.0.0.1"),), search=("x.example",)
    )
    assert [str(server) for server in known.servers] == ["127.0.0.1"]  # as it is
    assert known.search == ("x.example",)
    known = read(monkeypatch, tmp_path, RESOLV, dns=(), search=())
    assert (known.servers, known.search, known.found) == ((), (), True)
    assert read(monkeypatch, tmp_path, RESOLV, ipv4=False).servers == (address("fe80::53"),)


def test_without_resolv_conf(monkeypatch, tmp_path):
    monkeypatch.setattr(names, "PATH", str(tmp_path / "none"))
    assert not names.choose(Config(), names.read_host(Config()), {}).found
