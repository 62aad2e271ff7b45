"""Random histories of the guest's UDP ports: a seed decides who sends to whom, when time passes, and who intrudes.

The proxy is whole, its loop and clock are fakes, and the servers are sockets of the loopback interface.  These hold:

- a datagram arrives at most once, where it was sent to, with its content;
- a port of the guest's has one port on the host, whatever host it talks to (RFC 4787, endpoint-independent mapping);
- the guest gets an answer at the port that the server has answered, from the server's own port;
- with the filter `port` a host that was not asked reaches nobody;
- once nobody has spoken for long, no flow and no descriptor is left.
"""

import contextlib
import os
import random
import socket

import pytest
from scapy.layers.inet import IP, UDP

from pysplice.datagram import udp as datagram_udp

from ..support.house import GATEWAY, GUEST, House

pytestmark = pytest.mark.usefixtures("isolated")

COUNT, STEPS = 25, 40
PORTS = (4001, 4002, 4003)


class Server:
    """A UDP socket; `seen` maps ports of the host to the guest's ports behind them."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.sock.bind(("127.0.0.1", 0))
        self.sock.setblocking(False)
        self.port = self.sock.getsockname()[1]
        self.seen: dict[int, int] = {}

    def arrived(self) -> list[tuple[bytes, int]]:
        found = []
        with contextlib.suppress(OSError):
            while True:
                data, (_, port) = self.sock.recvfrom(2000)
                found.append((data, port))
        return found


class History:
    def __init__(self, seed: int, stack: contextlib.ExitStack) -> None:
        self.rng = random.Random(seed)
        self.filter = self.rng.choice(("endpoint", "address", "port"))
        self.house = House(udp_filter=self.filter)
        self.servers = [Server(stack) for _ in range(3)]
        self.stranger = Server(stack)
        self.sent: dict[
            bytes, tuple[int, int]
        ] = {}  # of the guest: to which server's port, from which of its own
        self.answers: dict[
            bytes, tuple[int, int]
        ] = {}  # of servers: from which port, to which of the guest's
        self.delivered: set[bytes] = set()
        self.mapping: dict[int, int] = {}  # the guest's port -> the host's, as long as it lives
        self.number = 0

    def payload(self, who: str) -> bytes:
        self.number += 1
        return f"{who} {self.number} ".encode() + self.rng.randbytes(self.rng.choice((0, 10, 1000)))

    def guest_sends(self) -> None:
        port, server = self.rng.choice(PORTS), self.rng.choice(self.servers)
        data = self.payload("guest")
        self.sent[data] = server.port, port
        self.house.send(IP(src=GUEST, dst=GATEWAY) / UDP(sport=port, dport=server.port) / data)

    def server_answers(self) -> None:
        server = self.rng.choice(self.servers)
        if server.seen:
            host_port, port = self.rng.choice(sorted(server.seen.items()))
            data = self.payload("server")
            self.answers[data] = server.port, port
            server.sock.sendto(data, ("127.0.0.1", host_port))
            self.house.loop.settle()

    def stranger_sends(self) -> None:
        if self.mapping:
            port, host_port = self.rng.choice(sorted(self.mapping.items()))
            data = self.payload("stranger")
            if self.filter != "port":
                self.answers[data] = self.stranger.port, port
            self.stranger.sock.sendto(data, ("127.0.0.1", host_port))
            self.house.loop.settle()

    def time_passes(self) -> None:
        seconds = self.rng.choice((0.1, 5.0, 40.0, 400.0))
        self.house.loop.advance(seconds)
        if seconds >= 40:
            # A port may have another one on the host after it was idle
            self.mapping.clear()
            for server in self.servers:
                server.seen.clear()

    def check(self) -> None:
        for server in self.servers:
            for data, host_port in server.arrived():
                to, port = self.sent[data]
                assert to == server.port, "at another server than it was sent to"
                assert data not in self.delivered, "twice"
                self.delivered.add(data)
                assert self.mapping.setdefault(port, host_port) == host_port, "a second port on the host"
                server.seen[host_port] = port
        assert not self.stranger.arrived()
        for frame in self.house.received():
            if UDP not in frame:
                continue
            data = bytes(frame[UDP].payload)
            source, port = self.answers[data]
            assert data not in self.delivered, "twice"
            self.delivered.add(data)
            assert frame[IP].src == GATEWAY and frame[IP].dst == GUEST
            assert (frame[UDP].sport, frame[UDP].dport) == (source, port), "another port than was answered"

    def play(self) -> None:
        actions = (self.guest_sends, self.server_answers, self.stranger_sends, self.time_passes)
        for _ in range(STEPS):
            self.rng.choices(actions, (8, 6, 2, 1))[0]()
            self.check()
        assert any(data in self.delivered for data in self.sent)
        self.house.loop.advance(4 * max(datagram_udp.timeouts()))
        assert len(self.house.proxy.status.show()["connections"]) == 0, "flows are left"


def play(seed: int) -> None:
    with contextlib.ExitStack() as stack:
        history = History(seed, stack)
        before = len(os.listdir("/proc/self/fd"))

        def script() -> None:
            history.play()
            assert len(os.listdir("/proc/self/fd")) <= before + 2, "descriptors are left"

        assert history.house.serve(script) == 0


def test_histories_of_udp():
    for seed in range(COUNT):
        try:
            play(seed)
        except (AssertionError, KeyError) as e:
            raise AssertionError(f"seed {seed}: {type(e).__name__} {e}") from e


@pytest.mark.pure
@pytest.mark.parametrize("broken", ("mapping", "filter"))
def test_the_histories_notice(monkeypatch, broken):
    if broken == "filter":
        monkeypatch.setattr(
            datagram_udp.Rules,
            "filtering",
            property(lambda self: "endpoint", lambda *_: None),
            raising=False,
        )
    else:
        real = datagram_udp.Endpoints.get

        def get(self, key, host, mac):
            self._endpoints.clear()
            return real(self, key, host, mac)

        monkeypatch.setattr(datagram_udp.Endpoints, "get", get)
    with pytest.raises(AssertionError):
        test_histories_of_udp()
