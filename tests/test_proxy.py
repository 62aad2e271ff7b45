"""The proxy as a whole with a fake loop and a fake clock: no namespace, no tap of the kernel's, no waiting."""

import os
import socket
from types import SimpleNamespace

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import ARP

from pysplice.config.ports import HOST, Rule
from pysplice.config.ports import TCP as TCP_RULE
from pysplice.loop import NEVER

from .support.house import GATEWAY, GUEST, House
from .support.taps import GUEST_MAC, OUR_MAC

pytestmark = pytest.mark.usefixtures("isolated")


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        yield listener


def test_a_connection_from_its_syn_to_its_end(server):
    house = House()
    port = server.getsockname()[1]

    def script():
        seq, ack = house.established(port)
        peer, _ = server.accept()
        peer.settimeout(5)
        (acked,) = house.segment(port, b"hello", flags="PA", seq=seq, ack=ack, window=64240)
        assert acked.ack == seq + 5 and peer.recv(10) == b"hello"
        peer.sendall(b"and back")
        house.loop.settle()
        (data,) = [frame[TCP] for frame in house.received()]
        assert bytes(data.payload) == b"and back" and data.ack == seq + 5
        peer.close()
        house.loop.settle()
        (fin,) = [frame[TCP] for frame in house.received()]
        assert fin.flags == "FA"
        house.segment(port, flags="FA", seq=seq + 5, ack=fin.seq + 1, window=64240)
        assert len(house.proxy.status.show()["connections"]) == 0

    assert house.serve(script) == 0
    assert "1 connections (0 open)" in house.said.getvalue()
    assert "5 B from the guest, 8 B to it" in house.said.getvalue()


def test_time_passes_only_when_it_is_told_to(server):
    """A guest that never acknowledges: the SYN-ACK is repeated, then the connection is given up."""
    house = House()
    port = server.getsockname()[1]

    def script():
        assert len(house.segment(port, flags="S", seq=1, window=1000)) == 1
        house.loop.advance(1.1)
        assert [frame[TCP].flags for frame in house.received()] == ["SA"]
        house.loop.advance(600)
        flags = [str(frame[TCP].flags) for frame in house.received()]
        assert flags[-1] == "RA" and set(flags[:-1]) == {"SA"}
        # Then nothing is due any more
        assert house.loop.timers.next() == NEVER

    assert house.serve(script) == 0


def test_a_closed_port_is_refused():
    house = House()

    def script():
        (reset,) = house.segment(1, flags="S", seq=7, window=1000)
        assert reset.flags == "RA" and reset.ack == 8
        (reset,) = house.segment(1, flags="A", seq=7, ack=99, window=1000)
        assert reset.flags == "R" and reset.seq == 99

    house.serve(script)


def test_the_link_answers_and_datagrams_pass():
    house = House()

    def script():
        house.send(ARP(hwsrc=GUEST_MAC, psrc=GUEST, pdst=GATEWAY))
        (reply,) = house.received()
        assert reply[ARP].hwsrc == OUR_MAC
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.bind(("127.0.0.1", 0))
            peer.settimeout(5)
            house.send(IP(src=GUEST, dst=GATEWAY) / UDP(sport=5000, dport=peer.getsockname()[1]) / b"ping")
            got, address = peer.recvfrom(100)
            assert got == b"ping"
            peer.sendto(b"pong", address)
            house.loop.turn(1)
            (answer,) = house.received()
            assert bytes(answer[UDP].payload) == b"pong" and answer[IP].src == GATEWAY
        # A flow that is not used is forgotten
        assert len(house.proxy.status.show()["connections"]) == 1
        house.loop.advance(200)
        assert len(house.proxy.status.show()["connections"]) == 0
        # No hop left: a router says so
        house.send(IP(src=GUEST, dst="192.0.2.9", ttl=0) / UDP(sport=1, dport=2))
        (error,) = house.received()
        assert error[ICMP].type == 11

    house.serve(script)


def test_a_client_reaches_the_guest_by_the_tap():
    """Without an agent nothing is spliced: a client on the loopback interface comes from the gateway."""
    house = House()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    house.proxy.follow((Rule(HOST, TCP_RULE, port, port, 80),))

    def script():
        with socket.create_connection(("127.0.0.1", port)) as client:
            house.loop.settle()
            (syn,) = [frame[TCP] for frame in house.received()]
            assert (syn.flags, syn.dport) == ("S", 80)
            answered = house.segment_from(80, syn)
            assert answered[-1].flags == "A"
            client.sendall(b"x")
            house.loop.settle()
            assert bytes(house.received()[-1][TCP].payload) == b"x"

    def segment_from(sport, syn):
        house.send(
            IP(src=GUEST, dst=GATEWAY)
            / TCP(sport=sport, dport=syn.sport, flags="SA", seq=9, ack=syn.seq + 1, window=64240)
        )
        return [frame[TCP] for frame in house.received()]

    house.segment_from = segment_from
    house.serve(script)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_a_signal_ends_it():
    house = House()
    assert house.serve(lambda: house.loop.on_signal(), status=7) == 0
    assert house.loop.stopped


def test_the_end_of_the_namespace_ends_it():
    house = House()

    def script():
        os.write(house.watch.end, b"x")
        house.loop.turn()
        assert house.loop.stopped

    assert house.serve(script, status=5) == 5


def test_at_the_end_a_slow_reader_is_waited_for(server):
    """What the guest has sent still goes out; when nothing moves any more, it is given up."""
    house = House()
    port = server.getsockname()[1]

    def script():
        seq, ack = house.established(port)
        peer, _ = server.accept()
        house.segment(port, b"x" * 1000, flags="PA", seq=seq, ack=ack, window=64240)
        house.loop.script = None
        os.write(house.watch.end, b"x")
        house.loop.turn()
        # The guest's direction is open: it may have said less than it had
        assert not house.loop.stopped
        house.loop.advance(0.6)
        assert not house.loop.stopped
        house.loop.advance(1.0)
        assert house.loop.stopped
        peer.close()

    house.serve(script)


def test_a_tap_that_is_gone_ends_it():
    house = House()

    def script():
        os.close(house.tap_fd)
        os.dup2(os.open("/dev/null", os.O_WRONLY), house.tap_fd)
        house.loop.watched[house.tap_fd]()
        assert house.loop.stopped

    house.serve(script)
    assert "the tap is gone: Bad file descriptor" in house.said.getvalue()


def test_an_error_elsewhere_is_not_the_end_of_the_tap(monkeypatch):
    """Only the tap's own errors end the process; an OSError of a plane goes to the loop, which reports it."""
    house = House()

    def script():
        def broken(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pysplice.stream.plane.StreamPlane.on_batch", broken)
        with pytest.raises(OSError, match="No space"):
            house.segment(1, flags="S", seq=7, window=1000)
        monkeypatch.undo()
        assert not house.loop.stopped
        (reset,) = house.segment(1, flags="S", seq=7, window=1000)
        assert reset.flags == "RA"

    house.serve(script)
    assert "the tap is gone" not in house.said.getvalue()


def test_a_defect_harms_one_flow_alone(server, monkeypatch):
    house = House()
    port = server.getsockname()[1]

    def script():
        seq, ack = house.established(port)
        monkeypatch.setattr(house.proxy._planes.streams.hosts, "send_run", SimpleNamespace())
        sent = house.segment(port, b"hello", flags="PA", seq=seq, ack=ack, window=64240)
        assert sent[-1].flags == "RA"
        monkeypatch.undo()
        assert "internal error: 10.0.2.15:40000 -> 10.0.2.2" in house.said.getvalue()
        (syn_ack,) = house.segment(port, flags="S", seq=77, window=64240)
        assert syn_ack.flags == "SA"

    house.serve(script)
