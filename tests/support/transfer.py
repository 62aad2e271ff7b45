"""Bytes that can be checked: a generator, sinks that hash, and transfers over sockets."""

import hashlib
import random
import socket
import threading
from collections.abc import Iterator

CHUNK = 256 * 1024


def pattern(seed: int) -> bytes:
    """A chunk of bytes that a seed stands for, of odd length so that nothing lines up."""
    return random.Random(seed).randbytes(CHUNK + 7)


def blocks(seed: int, size: int) -> Iterator[bytes]:
    """`size` bytes that a seed stands for, a block at a time."""
    block = pattern(seed)
    for at in range(0, size, len(block)):
        yield block[: size - at]


def digest(seed: int, size: int) -> str:
    """The hash of what send() sends."""
    sha = hashlib.sha256()
    for block in blocks(seed, size):
        sha.update(block)
    return sha.hexdigest()


def send(sock: socket.socket, seed: int, size: int) -> None:
    for block in blocks(seed, size):
        sock.sendall(block)


def receive(sock: socket.socket, size: int | None = None) -> tuple[str, int]:
    """Read to the end, or `size` bytes; their hash and number."""
    sha = hashlib.sha256()
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    total = 0
    while size is None or total < size:
        limit = CHUNK if size is None else min(CHUNK, size - total)
        n = sock.recv_into(view, limit)
        if not n:
            break
        sha.update(view[:n])
        total += n
    return sha.hexdigest(), total


class Background(threading.Thread):
    """A function in a thread; join() gives its result or raises what it raised."""

    def __init__(self, function, *args, **kwargs) -> None:
        super().__init__(daemon=True)
        self._call = (function, args, kwargs)
        self._result = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        function, args, kwargs = self._call
        try:
            self._result = function(*args, **kwargs)
        except BaseException as e:
            self._error = e

    def result(self, timeout: float = 60):
        self.join(timeout)
        assert not self.is_alive(), "still running"
        if self._error is not None:
            raise self._error
        return self._result


def transfer(sender: socket.socket, receiver: socket.socket, seed: int, size: int, timeout=120) -> None:
    """Send a stream and close that direction; the other end must get all of it and nothing else."""

    def sending() -> None:
        send(sender, seed, size)
        sender.shutdown(socket.SHUT_WR)

    sending_thread = Background(sending)
    got = Background(receive, receiver)
    sending_thread.result(timeout)
    assert got.result(timeout) == (digest(seed, size), size)
