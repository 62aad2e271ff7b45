"""The control sockets: requests, updates by pesto(1), and the server of both, with clients that are socket pairs."""

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysplice.config import ConfigError
from pysplice.config.ports import GUEST, HOST, PORT_MAX, TCP, UDP, Rule, parse
from pysplice.control import client, pesto, tables, updates
from pysplice.control.requests import LINE_MAX, Requests
from pysplice.control.server import CLIENTS_MAX, Control
from pysplice.observe.log import Log

from .support.loops import FakeLoop

# What pasta 2026_10_02 says with -t 8080:80 -u none -T 7000 -U none, and what pesto -A -t 8081 answers
RULE_8080 = bytes(48) + bytes.fromhex("1f901f9000500601")
RULE_8081 = bytes(48) + bytes.fromhex("1f911f911f910601")
RULE_7000 = bytes(32) + b"lo".ljust(16, b"\0") + bytes.fromhex("1b581b581b580601")
GREETING = b"".join((
    b"basil:s\0", bytes.fromhex("000000020000008000000010"),
    b"\1", b"HOST".ljust(128, b"\0"), bytes.fromhex("0000003f00000001"), RULE_8080,
    b"\3", b"SPLICE".ljust(128, b"\0"), bytes.fromhex("0000003f00000001"), RULE_7000,
    b"\0",
))  # fmt: skip
UPDATE = b"".join((b"\1", b"\0\0\0\2", RULE_8080, RULE_8081, b"\3", b"\0\0\0\1", RULE_7000, b"\0"))


def rules_of(*words: str) -> list[Rule]:
    """The rules of options, as in -t 8080:80 -T 7000."""
    sides = {"-t": (HOST, TCP), "-u": (HOST, UDP), "-T": (GUEST, TCP), "-U": (GUEST, UDP)}
    pairs = zip(words[::2], words[1::2], strict=True)
    return [rule for option, text in pairs for rule in parse(option, *sides[option], text)]


class Forwarding:
    """Rules, all of which can be had but those of `refused`; `on_change` is called in between."""

    def __init__(self, *words: str) -> None:
        self.rules = rules_of(*words)
        self.refused: list[Rule] = []
        self.on_change = lambda: None

    def change(self, changes) -> list[str]:
        self.on_change()
        rules = self.rules.copy()
        for adds, rule in changes:
            if adds and rule in self.refused:
                raise ConfigError(f"cannot listen on {rule}")
            if not adds and rule not in rules:
                raise ConfigError(f"'{rule}' is not forwarded")
            (rules.append if adds else rules.remove)(rule)
        self.rules = rules
        return ["a note"] if any(rule.first == 9 for _, rule in changes) else []

    def pieces(self) -> list[Rule]:
        return self.rules.copy()

    def arrange(self, pieces) -> None:
        order = list(pieces)
        self.rules.sort(key=lambda rule: order.index(rule) if rule in order else len(order))


class Scene:
    """A server and its clients; the names of the sockets are `requests` and `updates`."""

    def __init__(self, *words: str) -> None:
        self.loop = FakeLoop()
        self.forwarding = Forwarding(*words)
        self.refusals: deque[str] = deque(maxlen=3)
        self.lines: list[str] = []
        log = Log()
        log.warning = self.lines.append
        sessions = {
            "requests": lambda: Requests(self.forwarding, dict),
            "updates": lambda: updates.Update(self.forwarding, 0x3F, self.refusals, log),
        }
        self.control = Control(sessions, self.loop)
        self.peers: list[socket.socket] = []

    def client(self, name: str = "requests") -> socket.socket:
        ours, peer = socket.socketpair()
        peer.settimeout(5)
        self.peers.append(peer)
        self.control.take(name, ours)
        return peer

    def ask(self, request) -> dict:
        peer = self.client()
        peer.sendall(json.dumps(request).encode() + b"\n")
        self.loop.settle()
        return json.loads(peer.recv(65536))

    def update(self, text: bytes) -> bytes:
        """What a client of the other socket hears after it has sent this."""
        peer = self.client("updates")
        self.loop.advance(updates.ALONE)
        peer.recv(65536)
        peer.sendall(text)
        self.loop.settle()
        return peer.recv(65536)

    def close(self) -> None:
        self.control.close()
        for peer in self.peers:
            peer.close()


@pytest.fixture
def scene():
    scene = Scene("-t", "8080:80", "-T", "7000")
    yield scene
    scene.close()


def change(do: str, ports: str) -> dict:
    return {"do": do, "option": "-t", "ports": ports}


# Requests


def test_a_list_of_changes_is_made_as_a_whole_or_not_at_all(scene):
    scene.forwarding.rules.clear()
    assert scene.ask([change("add", "1"), change("add", "2")]) == {"ok": True}
    scene.forwarding.refused = rules_of("-t", "4")
    answer = scene.ask([change("add", "3"), change("del", "1"), change("add", "4")])
    assert answer == {"ok": False, "error": "cannot listen on 4"}
    assert scene.forwarding.rules == rules_of("-t", "1", "-t", "2")
    answer = scene.ask([change("add", "3"), change("add", "nonsense")])
    assert not answer["ok"] and len(scene.forwarding.rules) == 2


def test_notes_for_the_user(scene):
    assert scene.ask(change("add", "9")) == {"ok": True, "notes": ["a note"]}


def test_requests_in_pieces_and_several_at_once(scene):
    peer = scene.client()
    for byte in b'{"do": "show"}\nnonsense\n{"do"':
        peer.sendall(bytes([byte]))
    scene.loop.settle()
    answers = peer.recv(65536).splitlines()
    assert [json.loads(line)["ok"] for line in answers] == [True, False]
    peer.sendall(b': "show"}\n')
    scene.loop.settle()
    assert json.loads(peer.recv(65536))["ok"]


def test_requests_that_are_no_text(scene):
    for line in (b"1\0\0\0\n", b"\xff\xfe\n", b"[" * 60000 + b"\n"):
        peer = scene.client()
        peer.sendall(line)
        scene.loop.settle()
        assert json.loads(peer.recv(65536)) == {"ok": False, "error": "not a request"}


def test_a_client_that_reads_no_answers(scene):
    """So many requests at once that their answers would take long: it is dropped."""
    peer = scene.client()
    peer.sendall(b'{"do": "show"}\n' * 1000)
    scene.loop.settle()
    assert not scene.loop.watched


def test_a_request_without_an_end(scene):
    peer = scene.client()
    peer.settimeout(0.01)
    with pytest.raises((ConnectionError, TimeoutError)):
        for _ in range(100):
            peer.sendall(b"x" * LINE_MAX)
            scene.loop.settle()
    assert not scene.loop.watched


def test_clients_that_come_during_a_request(scene):
    """So many that the one that is being answered gives way: it sees the end, and nothing else is harmed."""

    def many() -> None:
        for _ in range(CLIENTS_MAX):
            scene.client()

    scene.forwarding.on_change = many
    peer = scene.client()
    peer.sendall(json.dumps(change("add", "1")).encode() + b"\n")
    scene.loop.settle()
    assert peer.recv(100) == b""
    scene.forwarding.on_change = lambda: None
    assert scene.ask(change("add", "2")) == {"ok": True}


# Updates by pesto(1)


def test_what_pasta_says_and_pesto_answers(scene):
    assert scene.client("updates").recv(65536) == GREETING
    assert scene.update(UPDATE) == b""
    assert scene.forwarding.rules == rules_of("-t", "8080:80", "-t", "8081", "-T", "7000")
    assert not scene.lines


def test_a_table_that_is_left_out_is_empty(scene):
    assert scene.update(b"\3\0\0\0\1" + RULE_7000 + b"\0") == b""
    assert scene.forwarding.rules == rules_of("-T", "7000")
    assert scene.update(b"\0") == b""
    assert scene.forwarding.rules == []


def test_an_update_byte_by_byte(scene):
    peer = scene.client("updates")
    peer.recv(65536)
    for byte in UPDATE[:-1]:
        peer.sendall(bytes([byte]))
        scene.loop.turn()
    assert scene.forwarding.rules == rules_of("-t", "8080:80", "-T", "7000")
    peer.sendall(UPDATE[-1:])
    scene.loop.settle()
    assert rules_of("-t", "8081")[0] in scene.forwarding.rules


def test_two_clients_at_once_lose_nothing_of_each_others(scene):
    first, second = scene.client("updates"), scene.client("updates")
    scene.loop.advance(updates.ALONE)  # the first one is slow
    first.sendall(UPDATE)
    second.sendall(UPDATE.replace(RULE_8081, bytes(48) + bytes.fromhex("1f921f921f920601")))
    scene.loop.settle()
    assert {rule.first for rule in scene.forwarding.rules} == {8080, 8081, 8082, 7000}


def test_one_after_the_other(scene):
    """The next one is shown what the one before has made, if that does not take too long."""
    first, second, third = (scene.client("updates") for _ in range(3))
    first.recv(65536)
    second.settimeout(0.01)
    with pytest.raises(TimeoutError):
        second.recv(1)
    first.sendall(UPDATE)
    scene.loop.settle()
    assert RULE_8081 in second.recv(65536)
    # One that has ended without a word holds up nobody, nor does one that says nothing
    second.close()
    scene.loop.settle()
    assert third.recv(65536)
    fourth = scene.client("updates")
    scene.loop.advance(updates.ALONE)
    assert fourth.recv(65536)


def test_two_replacements_at_once(scene):
    """What both take away is taken away once."""
    first, second = scene.client("updates"), scene.client("updates")
    scene.loop.advance(updates.ALONE)
    first.sendall(b"\1\0\0\0\1" + RULE_8081 + b"\0")
    second.sendall(b"\1\0\0\0\1" + rule((9001, 9001, 9001)) + b"\0")
    scene.loop.settle()
    assert not scene.lines
    assert {each.first for each in scene.forwarding.rules} == {8081, 9001}


def test_a_slow_client_has_some_seconds(scene):
    peer = scene.client("updates")
    peer.recv(65536)
    peer.sendall(UPDATE[:50])
    scene.loop.settle()
    scene.loop.advance(updates.PATIENCE - 0.1)
    assert scene.loop.watched
    scene.loop.advance(0.2)
    assert not scene.loop.watched
    # Clients of the other socket may take their time
    scene.client()
    scene.loop.advance(1000)
    assert scene.loop.watched


def test_the_order_is_the_clients(scene):
    scene.update(b"\1\0\0\0\2" + RULE_8081 + RULE_8080 + b"\0")
    assert scene.forwarding.rules == rules_of("-t", "8081", "-t", "8080:80")


def test_an_update_that_is_refused(scene):
    before = scene.forwarding.rules.copy()
    scene.forwarding.refused = rules_of("-t", "8081")
    assert scene.update(UPDATE) == b"cannot listen on 8081\n"
    assert scene.forwarding.rules == before
    assert list(scene.refusals) == ["cannot listen on 8081"]
    assert scene.lines == ["pesto: cannot listen on 8081; no port was changed"]


def rule(
    ports: tuple[int, int, int] = (1, 2, 3), protocol: int = 6, flags: int = 1, address: bytes = bytes(16),
    target: bytes = bytes(16), interface: bytes = b"",
) -> bytes:  # fmt: skip
    tail = struct.pack("!HHHBB", *ports, protocol, flags)
    return address + target + interface.ljust(16, b"\0") + tail


V4 = bytes(10) + b"\xff\xff\x0a\0\0\1"
V6 = b"\xfd" + bytes(14) + b"\1"
HOSTILE = {
    "protocol": rule(protocol=1),
    "flags": rule(flags=9),
    "backwards": rule((3, 2, 1)),
    "port 0": rule((0, 0, 1)),
    "target 0": rule((1, 1, 0)),
    "target beyond": rule((1, 65535, 2)),
    "dual stack at an address": rule(address=V4),
    "dual stack to an address": rule(target=V6),
    "from IPv6 to IPv4": rule(flags=0, address=V6, target=V4),
    "a name without an end": rule(interface=b"a" * 16),
    "a name with more behind its end": rule(interface=b"a\0b"),
    "a name of other characters": rule(interface=b"a\x1b"),
    "a path": rule(interface=b"../a"),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_rules_that_are_none(scene, text):
    before = scene.forwarding.rules.copy()
    assert scene.update(b"\1\0\0\0\1" + text + b"\0").count(b"\n") == 1
    assert scene.forwarding.rules == before and len(scene.lines) == 1


SPLICED = {
    "at an address": rule(flags=0, address=V4),
    "to an address": rule(flags=0, address=V4, target=V4),
    "at another interface": rule(interface=b"eth0"),
}


@pytest.mark.parametrize("text", SPLICED.values(), ids=SPLICED)
def test_ports_of_the_guest_are_on_its_loopback_interface(scene, text):
    assert b"loopback interface" in scene.update(b"\3\0\0\0\1" + text + b"\0")


@pytest.mark.parametrize(
    "text",
    (b"\2\0\0\0\0\0", b"\x09", b"\1\xff\xff\xff\xff", b"\1\0\0\4\1", b"\1\0\0\0\0" * 9, b"{}\n"),
    ids=("the tap", "no table", "4 Gi rules", "too many rules", "too many tables", "JSON"),
)
def test_updates_that_are_none(scene, text):
    before = scene.forwarding.rules.copy()
    assert scene.update(text)
    assert scene.forwarding.rules == before


def test_ctl_at_this_socket_is_no_update_that_was_refused(scene):
    assert scene.update(b'{"do": "show"}\n')
    assert not scene.refusals and not scene.lines


def test_a_rule_twice(scene):
    assert scene.update(b"\1\0\0\0\2" + RULE_8081 * 2 + b"\0") == b"'8081' is there twice\n"


ports = st.tuples(*(st.integers(1, PORT_MAX),) * 3).filter(
    lambda p: p[0] <= p[1] and p[2] + p[1] - p[0] <= PORT_MAX
)
addresses = st.one_of(
    st.tuples(st.none(), st.none()),
    st.tuples(st.ip_addresses(v=4), st.one_of(st.none(), st.ip_addresses(v=4))),
    st.tuples(st.ip_addresses(v=6), st.one_of(st.none(), st.ip_addresses(v=6))),
).filter(
    lambda pair: (
        # Those that mean something else on the wire
        all(a is None or a.version == 4 or (a.ipv4_mapped is None and int(a)) for a in pair)
    )
)


@given(
    ports,
    addresses,
    st.sampled_from((TCP, UDP)),
    st.sampled_from(("", "eth0", "a" * 15)),
    st.booleans(),
    st.booleans(),
)
def test_any_rule_there_and_back(numbers, where, protocol, interface, auto, weak):
    first, last, to_first = numbers
    made = Rule(
        HOST, protocol, first, last, to_first, where[0], interface, where[1], auto, weak, every=weak
    )
    assert tables.read_rule(1, tables.write_rule(made)) == made
    inside = Rule(GUEST, protocol, first, last, to_first, auto=auto, weak=weak, every=weak)
    assert tables.read_rule(3, tables.write_rule(inside)) == inside


@given(st.binary(max_size=400), st.integers(1, 60))
def test_any_bytes_as_an_update(text, step):
    feeder = tables.Feeder(tables.read_update())
    try:
        for at in range(0, len(text), step):
            if feeder.feed(text[at : at + step]):
                break
    except ConfigError as e:
        assert str(e)


# The clients


class Server:
    """A server that says something, keeps what it hears, and closes."""

    def __init__(self, path, *parts: bytes, answer: bytes = b"") -> None:
        self.path = str(path)
        self.heard = b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, args=(parts, answer))
        self._thread.start()

    def _serve(self, parts, answer: bytes) -> None:
        sock, _ = self._listener.accept()
        sock.settimeout(5)
        with sock, contextlib.suppress(OSError):
            for part in parts:
                sock.sendall(part)
            while parts and not self.heard.endswith((b"\0", b"\n")):
                data = sock.recv(65536)
                if not data:
                    return
                self.heard += data
            sock.sendall(answer)

    def join(self) -> bytes:
        self._thread.join()
        self._listener.close()
        return self.heard


def test_pesto_shows_tables(tmp_path, capsys):
    server = Server(tmp_path / "s", GREETING[:30], GREETING[30:])
    assert pesto.main([server.path]) == 0
    server.join()
    assert capsys.readouterr().out == (
        f"passt/pasta configuration ({server.path})\n"
        "  HOST\n    TCP [*]:8080  =>  80 \n  SPLICE\n    TCP [*]%lo:7000  =>  7000 \n"
    )


def test_pesto_adds(tmp_path, capsys):
    server = Server(tmp_path / "s", GREETING)
    assert pesto.main(["-A", "-t", "8081", server.path]) == 0
    assert server.join() == UPDATE
    assert capsys.readouterr() == ("", "")


def asked(tmp_path, capsys, *words: str) -> tuple[list[str], str]:
    """The lines of the tables that pesto asks for with these words (or the status), and what it complains of."""
    path = tmp_path / f"{len(os.listdir(tmp_path))}"
    server = Server(path, GREETING)
    status = pesto.main([*words, "-s", server.path])
    heard = server.join()
    out, err = capsys.readouterr()
    if status:
        return [], err
    feeder = tables.Feeder(tables.read_update())
    assert feeder.feed(heard)
    lines = [str(pesto.Line.of(text)) for _, texts in feeder.result for text in texts]
    assert [
        line[4:] for line in out.partition("Updated")[2].splitlines() if line.startswith("    ")
    ] == lines
    return lines, err


# Under each the tables that pesto(1) makes of GREETING
PESTO = {
    "-A -t 9000-9010:90-100": ("TCP [*]:8080  =>  80 ", "TCP [*]:9000-9010  =>  90-100 ", "TCP [*]%lo:7000  =>  7000 "),
    "-A -t 10.0.0.1/22:10.0.0.2/23": (
        "TCP [*]:8080  =>  80 ", "TCP [10.0.0.1]:22  =>  10.0.0.2:23 ", "TCP [*]%lo:7000  =>  7000 "),
    "-A -u [fd00::1]%l0/22:[fd00::2]/23": (
        "TCP [*]:8080  =>  80 ", "UDP [fd00::1]%l0:22  =>  fd00::2:23 ", "TCP [*]%lo:7000  =>  7000 "),
    "-t 1024 -U 1025": ("TCP [*]:1024  =>  1024 ", "UDP [*]%lo:1025  =>  1025 "),
    "-t none": ("TCP [*]%lo:7000  =>  7000 ",),
    "-t none -t 22": ("TCP [*]:22  =>  22 ", "TCP [*]%lo:7000  =>  7000 "),
    "-u 53 -t none": ("UDP [*]:53  =>  53 ", "TCP [*]%lo:7000  =>  7000 "),
    "-t 25 -A -u 54": ("TCP [*]:25  =>  25 ", "UDP [*]:54  =>  54 ", "TCP [*]%lo:7000  =>  7000 "),
    "-C HOST": ("TCP [*]%lo:7000  =>  7000 ",),
    "-C SPLICE -C HOST": (),
    "-C HOST -A -t 3000 -D -t 3000 -A -t 3001": ("TCP [*]:3001  =>  3001 ", "TCP [*]%lo:7000  =>  7000 "),
    "-D -t 8080:80 -T 7000": (),
    "-D -t 8080:80 -A -t 8080:81": ("TCP [*]:8080  =>  81 ", "TCP [*]%lo:7000  =>  7000 "),
    "-A -t 22,25,30-40,~33": (
        "TCP [*]:8080  =>  80 ", "TCP [*]:22  =>  22 ", "TCP [*]:25  =>  25 ", "TCP [*]:30-32  =>  30-32 ",
        "TCP [*]:34-40  =>  34-40 ", "TCP [*]%lo:7000  =>  7000 "),
    "-A -t 9000-9005,auto": (
        "TCP [*]:8080  =>  80 ", "TCP [*]:9000-9005  =>  9000-9005  (auto-scan)", "TCP [*]%lo:7000  =>  7000 "),
    "-A": ("TCP [*]:8080  =>  80 ", "TCP [*]%lo:7000  =>  7000 "),
    "--add --tcp-ports=30": ("TCP [*]:8080  =>  80 ", "TCP [*]:30  =>  30 ", "TCP [*]%lo:7000  =>  7000 "),
    "-At31": ("TCP [*]:8080  =>  80 ", "TCP [*]:31  =>  31 ", "TCP [*]%lo:7000  =>  7000 "),
}  # fmt: skip


@pytest.mark.parametrize("words", PESTO)
def test_what_pesto_asks_for(tmp_path, capsys, words):
    assert asked(tmp_path, capsys, *words.split()) == (list(PESTO[words]), "")


def test_pesto_leaves_ephemeral_ports_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pesto, "ephemeral_ports", lambda: ((1 << 28232) - 1) << 32768)
    lines, _ = asked(tmp_path, capsys, "-t", "all", "-u", "~22,auto")
    assert lines[:4] == [
        "TCP [*]:1-32767  =>  1-32767  (best effort)",
        "TCP [*]:61000-65535  =>  61000-65535  (best effort)",
        "UDP [*]:1-21  =>  1-21  (best effort) (auto-scan)",
        "UDP [*]:23-32767  =>  23-32767  (best effort) (auto-scan)",
    ]


# What pesto(1) says, with status 1
REFUSED = {
    "-A -t 8080": "Forwarding configuration conflict: TCP [*]:8080  =>  8080  versus TCP [*]:8080  =>  80 \n"
    "Unable to add rule TCP [*]:8080  =>  8080 ",
    "-A -t %l0/8080": "Forwarding configuration conflict: TCP [*]%l0:8080  =>  8080  versus TCP [*]:8080  =>  80 \n"
    "Unable to add rule TCP [*]%l0:8080  =>  8080 ",
    "-D -t 8080": "Specifier TCP [*]:8080  =>  8080  conflicts with rule TCP [*]:8080  =>  80 , but doesn't match it,"
    " can't delete\nUnable to delete rule TCP [*]:8080  =>  8080 ",
    "-D -u 8080": "Couldn't find forwarding rule to delete: UDP [*]:8080  =>  8080 \n"
    "Unable to delete rule UDP [*]:8080  =>  8080 ",
    "-C FOO": "Unsupported pif name FOO",
    "-C TAP": "Unsupported pif name TAP",
    "-t 22 -t none": "-t none conflicts with previous options",
    "-A -t none": "-t none conflicts with previous options",
    "-D -u none": "-u none conflicts with previous options",
    "-T 10.0.0.1/22": "Listening address not allowed for -T 10.0.0.1/22",
    "-T %lo/24": "Listening address not allowed for -T %lo/24",
    "-t xx": "Invalid port specifier 'xx' ('xx' is not a port)",
    "-t 22-21": "Invalid port specifier '22-21' ('22-21' runs backwards)",
    "-t unix:/run/x:80": "Invalid port specifier 'unix:/run/x:80' (pysplice ctl takes UNIX sockets)",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_pesto_refuses(tmp_path, capsys, words):
    assert asked(tmp_path, capsys, *words.split()) == ([], REFUSED[words] + "\n")


def greeting(head: bytes = GREETING[:20], tail: bytes = GREETING[20:]) -> bytes:
    return head + tail


HEAD = "!8sIII"
SERVERS = {
    "magic": (greeting(struct.pack(HEAD, b"basil:x\0", 2, 128, 16)), "Bad magic number from server"),
    "version 3": (greeting(struct.pack(HEAD, b"basil:s\0", 3, 128, 16)), "Unknown server protocol version 3 > 2"),
    "version 1": (greeting(struct.pack(HEAD, b"basil:s\0", 1, 128, 16)), "Unknown server protocol version 1 < 2"),
    "names": (
        greeting(struct.pack(HEAD, b"basil:s\0", 2, 64, 16)), "Server has unexpected pif name size (64 not 128)"),
    "interfaces": (greeting(struct.pack(HEAD, b"basil:s\0", 2, 128, 32)), "Server has unexpected IFNAMSIZ (32 not 16)"),
    "many rules": (
        greeting(tail=b"\1" + b"HOST".ljust(128, b"\0") + b"\0\0\0\x3f\xff\xff\xff\xff"), "Too many forwarding rules"),
    "no end of a name": (
        greeting(tail=b"\1" + b"H" * 128 + b"\0\0\0\x3f\0\0\0\0"), "Interface name was not NULL terminated"),
    "many tables": (greeting(tail=(b"\1" + bytes(128) + b"\0\0\0\x3f\0\0\0\0") * 9), "Too many forwarding tables"),
    "no HOST": (greeting(tail=b"\0"), "Can't use -t, no inbound interface"),
    "no UDP": (
        greeting(tail=b"\1" + b"HOST".ljust(128, b"\0") + b"\0\0\0\x37\0\0\0\0\0"),
        "Can't add UDP forwarding rule, UDP not enabled\nUnable to add rule UDP [*]:5  =>  5 "),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVERS)
def test_servers_that_pesto_does_not_know(tmp_path, capsys, name):
    said, complaint = SERVERS[name]
    server = Server(tmp_path / "s", said)
    assert pesto.main(["-A", "-t", "4", "-u", "5", server.path]) == 1
    server.join()
    assert capsys.readouterr().err == complaint + "\n"


def test_a_server_with_one_version_of_ip(tmp_path, capsys):
    for can, where in ((b"\x3d", "0.0.0.0"), (b"\x3e", "::")):
        said = greeting(tail=b"\1" + b"HOST".ljust(128, b"\0") + b"\0\0\0" + can + b"\0\0\0\0\0")
        server = Server(tmp_path / where.replace(":", "6"), said)
        assert pesto.main(["-s", "-A", "-t", "4", server.path]) == 0
        server.join()
        assert f"TCP [{where}]:4  =>  4 " in capsys.readouterr().out


def test_a_server_that_ends_or_obeys_a_terminal(tmp_path, capsys):
    for n, (said, complaint) in enumerate((
        (b"", "Couldn't read server greeting: No data available"),
        (GREETING[:9], "Couldn't read server greeting: No data available"),
        (GREETING[:99], "Error reading from control socket"),
    )):  # fmt: skip
        path = tmp_path / str(n)
        server = Server(path, answer=said)
        assert pesto.main([server.path]) == 1
        server.join()
        assert capsys.readouterr().err == complaint + "\n"
    server = Server(
        tmp_path / "s", greeting(tail=b"\1" + b"\x1b[2J".ljust(128, b"\0") + b"\0\0\0\x3f\0\0\0\0\0")
    )
    assert pesto.main([server.path]) == 0
    server.join()
    assert "\x1b" not in capsys.readouterr().out


def test_a_server_that_says_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pesto, "GREETING_TIMEOUT", 0.1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        assert pesto.main([str(tmp_path / "s")]) == 1
    assert "pesto takes that of -c" in capsys.readouterr().err


def test_a_reason_of_the_servers(tmp_path, capsys):
    server = Server(tmp_path / "s", GREETING, answer=b"cannot listen on \x1b8081\n")
    assert pesto.main(["-A", "-t", "8081", server.path]) == 1
    server.join()
    assert capsys.readouterr().err == "cannot listen on ?8081\n"


def test_pestos_command_line(tmp_path, capsys):
    assert pesto.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pesto (pysplice) ")
    assert pesto.main(["-h"]) == 0
    assert capsys.readouterr().out.startswith("Usage: pesto [OPTION]... PATH\n")
    for words in ((), ("a", "b"), ("-Z", "a"), ("-t",), ("--tcp=3", "a")):
        assert pesto.main(words) == 1
        out, err = capsys.readouterr()
        assert not out and err.startswith("pesto: ") and err.count("\n") == 1
    assert pesto.main([f"{tmp_path}/none"]) == 1
    assert capsys.readouterr().err == f"Failed to connect to {tmp_path}/none: No such file or directory\n"


def test_called_by_that_name(tmp_path):
    link = tmp_path / "pesto"
    link.write_text(f"#!{sys.executable}\nfrom pysplice.__main__ import main\nmain()\n")
    link.chmod(0o755)
    result = subprocess.run([link, "--version"], stdout=-1, text=True, timeout=20, check=True)
    assert result.stdout.startswith("pesto (pysplice) ")


def test_ctl_at_the_other_socket(tmp_path, capsys):
    server = Server(tmp_path / "s", GREETING)
    assert client.main([server.path, "show"]) == 1
    server.join()
    why = "it is the socket of -c, for pesto; pysplice ctl takes that of --control"
    assert capsys.readouterr().err == f"pysplice: cannot ask {server.path}: {why}\n"


ANSWERS = {
    "deep": b"[" * 200_000,
    "no lists": b'{"ok": true, "notes": 5}',
    "no lists either": b'{"ok": true, "rules": 5}',
    "no text": b"\xff\xfe",
    "no number": b'{"ok": true, "figures": NaN}',
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_are_none(tmp_path, capsys, name):
    server = Server(tmp_path / "s", b"", answer=ANSWERS[name] + b"\n")
    assert client.main([server.path, "show"]) == 1
    server.join()
    assert capsys.readouterr().err == f"pysplice: cannot ask {server.path}: not an answer\n"


def test_answers_for_a_terminal(tmp_path, capsys):
    server = Server(tmp_path / "s", b"", answer=b'{"ok": true, "rules": ["\\u001b[2J", "\\ud800"]}\n')
    assert client.main([server.path, "show"]) == 0
    server.join()
    assert capsys.readouterr().out == "rule ?[2J\nrule ?\n"


class Dripping(threading.Thread):
    """A server that sends one byte after the other, without an end."""

    def __init__(self, path, first: bytes) -> None:
        super().__init__(daemon=True)
        self.path = str(path)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._first = first
        self.start()

    def run(self) -> None:
        with self._listener, self._listener.accept()[0] as client, contextlib.suppress(OSError):
            client.sendall(self._first)
            while True:
                client.sendall(b" ")
                time.sleep(0.02)


@pytest.mark.pure
def test_a_server_that_sends_for_ever(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(client, "TIMEOUT", 0.5)
    monkeypatch.setattr(pesto, "GREETING_TIMEOUT", 0.5)
    assert client.main([Dripping(tmp_path / "ctl", b"").path, "show"]) == 1
    assert "timed out" in capsys.readouterr().err
    # The greeting, and a table of many rules that never comes
    table = b"\1" + b"HOST".ljust(128, b"\0") + b"\0\0\0\x3f\0\0\3\xe8"
    assert pesto.main(["-s", Dripping(tmp_path / "pesto", greeting(tail=table)).path]) == 1
    assert "No greeting from the server" in capsys.readouterr().err


def test_only_true_is_success(tmp_path, capsys):
    server = Server(tmp_path / "s", b"", answer=b'{"ok": "no", "error": 5}\n')
    assert client.main([server.path, "show"]) == 1
    server.join()


@pytest.mark.parametrize("end", ("| true", "> /dev/full", ">&-"))
def test_pestos_output_goes_nowhere(tmp_path, end):
    """No traceback, and the update is made all the same."""
    server = Server(tmp_path / "s", GREETING)
    words = ["-s", "-A", "-t", "8081", server.path]
    code = f"from pysplice.control import pesto; import sys; sys.exit(pesto.main({words}))"
    result = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" {end}'], stderr=-1, text=True, timeout=20, check=False
    )
    assert server.join() == UPDATE
    assert "Traceback" not in result.stderr and result.stderr.count("\n") <= 1
