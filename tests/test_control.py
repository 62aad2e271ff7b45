"""The server of the control socket, with clients that are socket pairs."""

import json
import socket

import pytest

from pysplice.config import ConfigError
from pysplice.control.server import CLIENTS_MAX, Control

from .support.loops import FakeLoop


class Forwarding:
    """Rules as text; `refused` is one that cannot be added."""

    def __init__(self) -> None:
        self.rules: list[str] = []
        self.refused = ""
        self.on_add = lambda: None

    def add(self, rule) -> str:
        self.on_add()
        if str(rule) == self.refused:
            raise ConfigError(f"cannot listen on {rule}")
        self.rules.append(str(rule))
        return "a note" if str(rule) == "9" else ""

    def remove(self, rule) -> None:
        if str(rule) not in self.rules:
            raise ConfigError(f"'{rule}' is not forwarded")
        self.rules.remove(str(rule))


class Scene:
    def __init__(self) -> None:
        self.loop = FakeLoop()
        self.forwarding = Forwarding()
        self.control = Control(self.forwarding, dict, self.loop)
        self.peers: list[socket.socket] = []

    def client(self) -> socket.socket:
        ours, peer = socket.socketpair()
        peer.settimeout(5)
        self.peers.append(peer)
        self.control.take(ours)
        return peer

    def ask(self, request) -> dict:
        peer = self.client()
        peer.sendall(json.dumps(request).encode() + b"\n")
        self.loop.settle()
        return json.loads(peer.recv(65536))


@pytest.fixture
def scene():
    scene = Scene()
    yield scene
    scene.control.close()
    for peer in scene.peers:
        peer.close()


def change(do: str, ports: str) -> dict:
    return {"do": do, "option": "-t", "ports": ports}


def test_a_list_of_changes_is_made_as_a_whole_or_not_at_all(scene):
    assert scene.ask([change("add", "1"), change("add", "2")]) == {"ok": True}
    scene.forwarding.refused = "4"
    answer = scene.ask([change("add", "3"), change("del", "1"), change("add", "4")])
    assert answer == {"ok": False, "error": "cannot listen on 4"}
    assert sorted(scene.forwarding.rules) == ["1", "2"]
    answer = scene.ask([change("add", "3"), change("add", "nonsense")])
    assert not answer["ok"] and sorted(scene.forwarding.rules) == ["1", "2"]


def test_what_cannot_be_undone_is_left(scene):
    scene.ask(change("add", "1"))
    scene.forwarding.refused = "1"  # another program has taken it
    assert not scene.ask([change("del", "1"), change("del", "2")])["ok"]
    assert scene.forwarding.rules == []


def test_notes_for_the_user(scene):
    assert scene.ask(change("add", "9")) == {"ok": True, "notes": ["a note"]}


def test_clients_that_come_during_a_request(scene):
    """So many that the one that is being answered gives way: it sees the end, and nothing else is harmed."""

    def many() -> None:
        for _ in range(CLIENTS_MAX):
            scene.client()

    scene.forwarding.on_add = many
    peer = scene.client()
    peer.sendall(json.dumps(change("add", "1")).encode() + b"\n")
    scene.loop.settle()
    assert peer.recv(100) == b""
    scene.forwarding.on_add = lambda: None
    assert scene.ask(change("add", "2")) == {"ok": True}
