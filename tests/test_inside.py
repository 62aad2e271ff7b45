"""Sockets by way of another process; here it is a thread, and its namespace is ours."""

import errno
import json
import select
import socket
import threading

import pytest

from pysplice import inside

STREAM, DGRAM = int(socket.SOCK_STREAM), int(socket.SOCK_DGRAM)
INET = int(socket.AF_INET)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made = inside.Inside(ours)
    yield made, theirs
    made.close()
    theirs.close()


@pytest.fixture
def served(pair):
    made, theirs = pair
    thread = threading.Thread(target=inside.serve, args=(theirs,), daemon=True)
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


def test_fetch(served):
    with served.fetch({"family": INET, "kind": STREAM, "bind": ["127.0.0.1", 0], "backlog": 5}) as sock:
        with socket.create_connection(sock.getsockname()):
            pass
        port = sock.getsockname()[1]
        with pytest.raises(OSError) as caught:
            served.fetch({"family": INET, "kind": STREAM, "bind": ["127.0.0.1", port]})
        assert caught.value.errno == errno.EADDRINUSE
    # For a client of a short cut: another port, if it must be
    with served.fetch({"family": INET, "kind": DGRAM, "bind": ["127.0.0.1", 0]}) as sock:
        port = sock.getsockname()[1]
        request = {"family": INET, "kind": DGRAM, "bind": ["127.0.0.1", port], "any": 1}
        with served.fetch(request) as beside:
            assert beside.getsockname()[1] not in (0, port)


def test_listeners_of_datagrams_share_no_port(served):
    request = {"family": INET, "kind": DGRAM, "bind": ["127.0.0.1", 0]}
    with served.fetch(request) as sock, pytest.raises(OSError):
        served.fetch({**request, "bind": list(sock.getsockname())})


def test_streams_are_made_in_advance(served):
    got = []
    for _ in range(3 * inside.POOL):
        served.stream(INET, lambda sock, error: got.append((sock, error)))
    while len(got) < 3 * inside.POOL:
        wait(served)
    assert all(error == 0 and sock.type == socket.SOCK_STREAM for sock, error in got)
    assert len({sock.fileno() for sock, _ in got}) == len(got)
    for sock, _ in got:
        sock.close()


def test_many_requests_wait_their_turn(served):
    answers = []
    for _ in range(1000):
        served.ask(
            {"family": INET, "kind": DGRAM}, lambda socks, error: answers.append((socks[0].close(), error))
        )
    while len(answers) < 1000:
        wait(served)
    assert {error for _, error in answers} == {0}


def test_descriptors_that_are_lost_on_the_way(pair):
    """Where there is no place for them the kernel drops them: an answer without is a failure."""
    made, theirs = pair
    got = []
    made.ask({"family": INET, "kind": STREAM}, lambda socks, error: got.append((socks, error)))
    tag = json.loads(theirs.recv(4096))["tag"]
    theirs.send(json.dumps({"tag": tag, "errno": 0}).encode())
    made.on_ready()
    assert got == [([], errno.EMFILE)]


def test_the_other_end_goes_away(pair):
    made, theirs = pair
    got = []
    made.ask({"family": INET, "kind": STREAM}, lambda socks, error: got.append(error))
    made.stream(INET, lambda sock, error: got.append(error))
    theirs.close()
    with pytest.raises(ConnectionError):
        made.on_ready()
    assert got == [errno.ENETDOWN] * 2
    made.ask({"family": INET, "kind": STREAM}, lambda socks, error: got.append(error))
    made.stream(INET, lambda sock, error: got.append(error))
    assert got == [errno.ENETDOWN] * 4
    with pytest.raises(OSError):
        made.fetch({"family": INET, "kind": STREAM})
