"""Makers of sockets: on the host, and by way of the agent, which here is a thread in this namespace."""

import errno
import json
import os
import select
import socket
import threading

import pytest

from pysplice.sockets import guest
from pysplice.sockets.request import HostMaker, NoMaker, SocketRequest

STREAM, DGRAM = int(socket.SOCK_STREAM), int(socket.SOCK_DGRAM)
INET = int(socket.AF_INET)
ANY_STREAM, ANY_DATAGRAM = SocketRequest(INET, STREAM), SocketRequest(INET, DGRAM)
HERE = ("127.0.0.1", 0)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made = guest.GuestMaker(ours)
    yield made, theirs
    made.close()
    theirs.close()


@pytest.fixture
def served(pair):
    made, theirs = pair
    thread = threading.Thread(target=guest.serve, args=(theirs,), daemon=True)
    thread.start()
    yield made
    made.close()
    thread.join(5)
    assert not thread.is_alive()


def wait(made):
    poll = select.poll()
    poll.register(made.fileno(), select.POLLIN)
    assert poll.poll(5000)
    made.on_ready()


@pytest.fixture(params=("host", "guest"))
def maker(request):
    """One contract for both makers."""
    return HostMaker() if request.param == "host" else request.getfixturevalue("served")


def test_make(maker):
    with maker.make(SocketRequest(INET, STREAM, bind=HERE, backlog=5)) as sock:
        assert not os.get_blocking(sock.fileno())
        with socket.create_connection(sock.getsockname()):
            pass
        with pytest.raises(OSError) as caught:
            maker.make(SocketRequest(INET, STREAM, bind=sock.getsockname(), backlog=5))
        assert caught.value.errno == errno.EADDRINUSE
    # Another port will do
    with maker.make(SocketRequest(INET, DGRAM, bind=HERE)) as sock:
        port = sock.getsockname()[1]
        with maker.make(SocketRequest(INET, DGRAM, bind=sock.getsockname(), any_port=True)) as beside:
            assert beside.getsockname()[1] not in (0, port)


def test_options(maker):
    request = SocketRequest(int(socket.AF_INET6), DGRAM, v6only=False, packet_info=True, device="lo")
    with maker.make(request) as sock:
        assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0
        assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO) == 1
        assert sock.getsockopt(socket.IPPROTO_IP, 8) == 1
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"lo"
    # An address that the host does not have
    elsewhere = ("192.0.2.77", 0)
    with pytest.raises(OSError):
        maker.make(SocketRequest(INET, DGRAM, bind=elsewhere))
    maker.make(SocketRequest(INET, DGRAM, bind=elsewhere, freebind=True)).close()


def test_several_at_once(maker):
    got = []
    maker.ask(ANY_STREAM._replace(number=5), lambda socks, error: got.append((socks, error)))
    while not got:
        wait(maker)
    ((socks, error),) = got
    assert len(socks) == 5 and error == 0
    for sock in socks:
        sock.close()


def test_a_maker_that_is_not_there():
    maker, got = NoMaker(), []
    maker.ask(ANY_STREAM, lambda socks, error: got.append((socks, error)))
    maker.stream(INET, lambda sock, error: got.append((sock, error)))
    assert got == [([], errno.ENETDOWN), (None, errno.ENETDOWN)] and not maker.available
    with pytest.raises(OSError):
        maker.make(ANY_STREAM)


def test_listeners_of_datagrams_share_no_port(maker):
    with maker.make(SocketRequest(INET, DGRAM, bind=HERE)) as sock, pytest.raises(OSError):
        maker.make(SocketRequest(INET, DGRAM, bind=sock.getsockname()))


def test_streams_are_made_in_advance(served):
    got = []
    for _ in range(3 * guest.POOL):
        served.stream(INET, lambda sock, error: got.append((sock, error)))
    while len(got) < 3 * guest.POOL:
        wait(served)
    assert all(error == 0 and sock.type == socket.SOCK_STREAM for sock, error in got)
    assert len({sock.fileno() for sock, _ in got}) == len(got)
    for sock, _ in got:
        sock.close()


def test_many_requests_wait_their_turn(served):
    answers = []
    for _ in range(1000):
        served.ask(ANY_DATAGRAM, lambda socks, error: answers.append((socks[0].close(), error)))
    while len(answers) < 1000:
        wait(served)
    assert {error for _, error in answers} == {0}


def test_descriptors_that_are_lost_on_the_way(pair):
    """Where there is no place for them the kernel drops them: an answer without is a failure."""
    made, theirs = pair
    got = []
    made.ask(ANY_STREAM, lambda socks, error: got.append((socks, error)))
    tag = json.loads(theirs.recv(4096))["tag"]
    theirs.send(json.dumps({"tag": tag, "errno": 0}).encode())
    made.on_ready()
    assert got == [([], errno.EMFILE)]


def test_the_other_end_goes_away(pair):
    made, theirs = pair
    got = []
    made.ask(ANY_STREAM, lambda socks, error: got.append(error))
    made.stream(INET, lambda sock, error: got.append(error))
    theirs.close()
    with pytest.raises(ConnectionError):
        made.on_ready()
    assert got == [errno.ENETDOWN] * 2
    made.ask(ANY_STREAM, lambda socks, error: got.append(error))
    made.stream(INET, lambda sock, error: got.append(error))
    assert got == [errno.ENETDOWN] * 4
    with pytest.raises(OSError):
        made.make(ANY_STREAM)
