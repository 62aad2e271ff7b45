#!/usr/bin/env python3
"""Traffic between two hosts, measured: the worker of compare_pasta.py.  Standard library only.

    traffic.py server ADDRESS PORT
    traffic.py client WORKLOAD ADDRESS PORT SECONDS

The client prints one line of JSON.  Workloads: upload, download, streams8, bidirectional (bit/s), and rr1,
rr64, crr1, crr64 (transactions per second: one byte each way on a connection that stays, or on a new
connection each time, one or 64 at a time); loaded (rr1 while another process uploads), idle1000 (rr1 beside
1000 connections that do nothing) and tiny64 (64 connections that send segments of 100 bytes, bit/s).  With
UDP: udp_up and udp_down (datagrams of 1400 bytes as fast as the sender can, bit/s that arrive) and udp_rr1
(64 bytes there and back).
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

BLOCK = bytes(1 << 18)
TCP_CONGESTION = getattr(socket, "TCP_CONGESTION", 13)
TOTAL_RETRANS_OFFSET = 100  # tcpi_total_retrans in struct tcp_info
STEP = 0.1
TINY = bytes(100)
WARM_UP = 0.5  # of the upload beside which latency is measured, seconds

# What a datagram asks of the server by its first byte: to be counted, to be sent back, to get a flood of datagrams
COUNT, ECHO, FLOOD = b"C", b"E", b"F"
DATAGRAM = 1400
PING = 64
FLOOD_TIME = struct.Struct("!cd")  # FLOOD, and for how many seconds


def family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def prepare(sock: socket.socket) -> socket.socket:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, b"cubic")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


# The server


def sink(sock: socket.socket) -> None:
    """Read to the end; then say how much it was, and how much of it in each tenth of a second."""
    buffer = bytearray(1 << 20)
    total = 0
    tenths: list[int] = []
    begun = time.monotonic()
    with sock, contextlib.suppress(OSError):
        while n := sock.recv_into(buffer):
            total += n
            tenth = int((time.monotonic() - begun) / STEP)
            tenths += [0] * (tenth + 1 - len(tenths))
            tenths[tenth] += n
        sock.sendall(struct.pack(f"!QI{len(tenths)}Q", total, len(tenths), *tenths))


def source(sock: socket.socket) -> None:
    with sock, contextlib.suppress(OSError):
        while True:
            sock.sendall(BLOCK)


class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]


class Header(ctypes.Structure):
    """struct msghdr."""

    _fields_ = [
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint),
        ("iov", ctypes.POINTER(Iovec)),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


class Message(ctypes.Structure):
    """struct mmsghdr."""

    _fields_ = [("header", Header), ("len", ctypes.c_uint)]


class Batch:
    """Datagrams that are received with one system call, so that the receiver is not what is measured."""

    COUNT = 64

    def __init__(self, sock: socket.socket) -> None:
        self._call = ctypes.CDLL(None).recvmmsg
        self._fd = sock.fileno()
        self._buffers = [ctypes.create_string_buffer(DATAGRAM) for _ in range(self.COUNT)]
        self._iovs = [Iovec(ctypes.addressof(buffer), DATAGRAM) for buffer in self._buffers]
        headers = [Header(iov=ctypes.pointer(iov), iovlen=1) for iov in self._iovs]
        self._messages = (Message * self.COUNT)(*(Message(header) for header in headers))

    def receive(self) -> int:
        """The bytes of those that are there; 0 if there is none."""
        n = self._call(self._fd, self._messages, self.COUNT, socket.MSG_DONTWAIT, None)
        return sum([self._messages[i].len for i in range(n)])


class Datagrams(threading.Thread):
    """The UDP server; `counted` is the bytes of payload that have come in to be counted."""

    def __init__(self, address: str, port: int) -> None:
        super().__init__(daemon=True)
        self.sock = socket.socket(family(address), socket.SOCK_DGRAM)
        self.sock.bind((address, port))
        self.counted = 0

    def run(self) -> None:
        buffer = bytearray(2048)
        batch = Batch(self.sock)
        while True:
            n, peer = self.sock.recvfrom_into(buffer)
            kind = bytes(buffer[:1])
            if kind == COUNT:
                self.counted += n
                while n := batch.receive():
                    self.counted += n
            elif kind == ECHO:
                self.sock.sendto(buffer[:n], peer)
            elif kind == FLOOD:
                flood(partial(self.sock.sendto, COUNT * DATAGRAM, peer), FLOOD_TIME.unpack(buffer[:n])[1])


def flood(send: Callable[[], int], seconds: float) -> None:
    """Send one datagram after the other for a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(32):
            with contextlib.suppress(OSError):
                send()


def serve(address: str, port: int) -> None:
    """The first byte of a connection says what it is for; echoes are served by one loop."""
    listener = socket.socket(family(address))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    prepare(listener)
    listener.bind((address, port))
    listener.listen(1024)
    listener.setblocking(False)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    socks: dict[int, socket.socket] = {}
    datagrams = Datagrams(address, port)
    datagrams.start()
    print("ready", flush=True)
    while True:
        for fd, _ in poll.poll():
            if fd == listener.fileno():
                with contextlib.suppress(OSError):
                    sock, _ = listener.accept()
                    prepare(sock)
                    sock.setblocking(False)
                    socks[sock.fileno()] = sock
                    poll.register(sock, select.EPOLLIN)
                continue
            sock = socks[fd]
            try:
                data = sock.recv(1)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if data in (b"U", b"D"):
                poll.unregister(fd)
                del socks[fd]
                sock.setblocking(True)
                threading.Thread(target=sink if data == b"U" else source, args=(sock,), daemon=True).start()
            elif data == COUNT:
                sock.send(struct.pack("!Q", datagrams.counted))
            elif data:
                with contextlib.suppress(OSError):
                    sock.send(data)
            else:
                poll.unregister(fd)
                socks.pop(fd).close()


# The client


def connect(address: str, port: int) -> socket.socket:
    sock = prepare(socket.socket(family(address)))
    sock.settimeout(20)
    sock.connect((address, port))
    return sock


def receive_exactly(sock: socket.socket, n: int) -> bytes:
    """n bytes: with a time-out MSG_WAITALL does not wait for all."""
    data = b""
    while len(data) < n:
        more = sock.recv(n - len(data))
        if not more:
            raise OSError("closed early")
        data += more
    return data


def retransmissions(sock: socket.socket) -> int:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return struct.unpack_from("I", info, TOTAL_RETRANS_OFFSET)[0]


class Meter:
    """Bytes by tenths of a second, counted from when the connections stand."""

    def __init__(self, seconds: float) -> None:
        self.begin = time.monotonic()
        self.end = self.begin + seconds
        self.slots = [0] * (int(seconds / STEP) + 100)

    def count(self, n: int) -> bool:
        """Add n bytes; False when time is up."""
        now = time.monotonic()
        if now >= self.end:
            return False
        self.slots[int((now - self.begin) / STEP)] += n
        return True

    def seconds(self) -> list[int]:
        """Bits in each whole second."""
        per = round(1 / STEP)
        used = self.slots[: int((self.end - self.begin) / STEP)]
        return [8 * sum(used[i : i + per]) for i in range(0, len(used) - per + 1, per)]


def verdict(sock: socket.socket) -> tuple[int, list[int]]:
    """What the sink has to say: bytes in all, and by tenths of a second."""
    total, count = struct.unpack("!QI", receive_exactly(sock, 12))
    return total, list(struct.unpack(f"!{count}Q", receive_exactly(sock, 8 * count)))


def upload(address: str, port: int, meter: Meter, results: list) -> None:
    sock = connect(address, port)
    sock.sendall(b"U")
    begun = time.monotonic()
    while meter.count(sock.send(BLOCK)):
        pass
    sock.shutdown(socket.SHUT_WR)
    total, tenths = verdict(sock)
    # What is still on its way when time is up counts, and so does the time it takes
    results.append((8 * total / (time.monotonic() - begun), retransmissions(sock), tenths))


def download(address: str, port: int, meter: Meter, results: list) -> None:
    sock = connect(address, port)
    sock.sendall(b"D")
    buffer = bytearray(1 << 20)
    begun, total = time.monotonic(), 0
    while n := sock.recv_into(buffer):
        total += n
        if not meter.count(n):
            break
    results.append((8 * total / (time.monotonic() - begun), retransmissions(sock), []))
    sock.close()


def bulk(workload: str, address: str, port: int, seconds: float) -> dict:
    functions = {
        "upload": [upload],
        "download": [download],
        "streams8": [upload] * 8,
        "bidirectional": [upload, download],
    }[workload]
    results: list[tuple[float, int, list[int]]] = []
    meter = Meter(seconds)
    threads = [threading.Thread(target=f, args=(address, port, meter, results)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(results) != len(functions):
        raise OSError("a connection failed")
    return {
        "value": sum(rate for rate, _, _ in results),
        "retransmissions": sum(n for _, n, _ in results),
        "seconds": meter.seconds(),
        "tenths": results[0][2],
    }


def request_response(address: str, port: int, seconds: float, count: int, stay: bool) -> dict:
    """`count` clients in one loop; a transaction is one byte there and back, with or without a connect."""
    poll = select.epoll()
    socks: dict[int, socket.socket] = {}
    sent: dict[int, float] = {}
    latencies: list[float] = []

    def start() -> None:
        sock = prepare(socket.socket(family(address)))
        sock.setblocking(False)
        sent[sock.fileno()] = time.monotonic()
        sock.connect_ex((address, port))
        socks[sock.fileno()] = sock
        poll.register(sock, select.EPOLLOUT)

    for _ in range(count):
        start()
    begun = time.monotonic()
    end, last = begun + seconds, begun
    while (now := time.monotonic()) < end:
        events = poll.poll(1)
        if not events and now - last > 5:
            raise OSError("no answer for five seconds")
        for fd, event in events:
            sock = socks[fd]
            if event & select.EPOLLOUT:
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise OSError(error, "connect")
                poll.modify(fd, select.EPOLLIN)
                if stay:
                    sent[fd] = time.monotonic()
                sock.send(b"R")
                continue
            if not sock.recv(1):
                raise OSError("closed")
            last = time.monotonic()
            latencies.append(last - sent[fd])
            if stay:
                sent[fd] = last
                sock.send(b"R")
            else:
                poll.unregister(fd)
                del socks[fd]
                sock.close()
                start()
    latencies.sort()
    return {
        "value": len(latencies) / (time.monotonic() - begun),
        "p50": latencies[len(latencies) // 2],
        "p99": latencies[len(latencies) * 99 // 100],
        "percentiles": [latencies[len(latencies) * i // 1000] for i in range(0, 1000, 5)],
        "retransmissions": 0,
    }


def loaded(address: str, port: int, seconds: float) -> dict:
    """One byte there and back while an upload, in a process of its own, fills what there is to fill."""
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        uploads: list[tuple[float, int, list[int]]] = []
        with contextlib.suppress(OSError):
            upload(address, port, Meter(seconds + 2 * WARM_UP), uploads)
        os.write(writable, f"{uploads[0][0] if uploads else 0}".encode())
        os._exit(0)
    os.close(writable)
    time.sleep(WARM_UP)
    result = request_response(address, port, seconds, 1, True)
    with os.fdopen(readable) as file:
        result["upload"] = float(file.read() or 0)
    os.waitpid(child, 0)
    return result


def idle(address: str, port: int, seconds: float, count: int) -> dict:
    """One byte there and back on one connection, beside `count` others that do nothing."""
    others = [connect(address, port) for _ in range(count)]
    result = request_response(address, port, seconds, 1, True)
    for sock in others:
        sock.close()
    return result


def udp_socket(address: str, port: int) -> socket.socket:
    sock = socket.socket(family(address), socket.SOCK_DGRAM)
    sock.settimeout(1)
    sock.connect((address, port))
    return sock


def udp_bulk(workload: str, address: str, port: int, seconds: float) -> dict:
    """Datagrams as fast as the sender can; bits of payload that arrive in a second."""
    sock = udp_socket(address, port)
    if workload == "udp_down":
        sock.send(FLOOD_TIME.pack(FLOOD, seconds))
        batch, total = Batch(sock), 0
        begun = last = time.monotonic()
        while select.select([sock], [], [], 1)[0]:
            total += batch.receive()
            last = time.monotonic()
        if not total:
            raise OSError("no datagram arrived")
        return {"value": 8 * total / (last - begun), "retransmissions": 0}
    with connect(address, port) as control:

        def counted() -> int:
            control.send(COUNT)
            return struct.unpack("!Q", receive_exactly(control, 8))[0]

        before, begun = counted(), time.monotonic()
        flood(partial(sock.send, COUNT * DATAGRAM), seconds)
        return {"value": 8 * (counted() - before) / (time.monotonic() - begun), "retransmissions": 0}


def udp_request_response(address: str, port: int, seconds: float) -> dict:
    """One datagram there and back at a time; one that is lost costs a second."""
    sock = udp_socket(address, port)
    latencies: list[float] = []
    begun = now = time.monotonic()
    while now < begun + seconds:
        with contextlib.suppress(TimeoutError):
            sock.send(ECHO * PING)
            sock.recv(PING)
        before, now = now, time.monotonic()
        latencies.append(now - before)
    latencies.sort()
    return {
        "value": len(latencies) / (now - begun),
        "p50": latencies[len(latencies) // 2],
        "p99": latencies[len(latencies) * 99 // 100],
        "retransmissions": 0,
    }


def tiny(address: str, port: int, seconds: float, count: int) -> dict:
    """`count` connections that send small segments, each as many as its window takes.

    MSG_EOR keeps the kernel from joining what waits into larger ones.
    """
    poll = select.epoll()
    socks = {}
    for _ in range(count):
        sock = connect(address, port)
        sock.sendall(b"U")
        sock.setblocking(False)
        socks[sock.fileno()] = sock
        poll.register(sock, select.EPOLLOUT)
    meter = Meter(seconds)
    more = True
    while more:
        for fd, _ in poll.poll(1):
            n = 0
            with contextlib.suppress(BlockingIOError):
                for _ in range(50):
                    n += socks[fd].send(TINY, socket.MSG_EOR)
            more = meter.count(n)
        more = more and time.monotonic() < meter.end
    total = 0
    for sock in socks.values():
        sock.settimeout(10)
        sock.shutdown(socket.SHUT_WR)
        total += verdict(sock)[0]
    resent = sum(retransmissions(sock) for sock in socks.values())
    return {
        "value": 8 * total / (time.monotonic() - meter.begin),
        "retransmissions": resent,
        "seconds": meter.seconds(),
    }


def ring_drops() -> int:
    """Frames that the devices of this namespace dropped on the way out."""
    drops = 0
    with open("/proc/net/dev") as file:
        for line in file:
            name, colon, fields = line.partition(":")
            if colon and name.strip() != "lo":
                drops += int(fields.split()[11])
    return drops


def client(workload: str, address: str, port: int, seconds: float) -> dict:
    for name, value in (("tcp_rmem", "4096 131072 6291456"), ("tcp_max_tw_buckets", "500")):
        with contextlib.suppress(OSError), open(f"/proc/sys/net/ipv4/{name}", "w") as file:
            file.write(value)
    # A namespace may need a moment for its addresses
    for attempt in range(50):
        try:
            connect(address, port).close()
            break
        except OSError:
            if attempt == 49:
                raise
            time.sleep(0.1)
    before = ring_drops()
    if workload.startswith("idle"):
        result = idle(address, port, seconds, int(workload[len("idle") :]))
    elif workload in ("udp_up", "udp_down"):
        result = udp_bulk(workload, address, port, seconds)
    elif workload == "udp_rr1":
        result = udp_request_response(address, port, seconds)
    elif workload == "loaded":
        result = loaded(address, port, seconds)
    elif workload.startswith("tiny"):
        result = tiny(address, port, seconds, int(workload[len("tiny") :]))
    elif workload.startswith(("rr", "crr")):
        kind = workload.rstrip("0123456789")
        result = request_response(address, port, seconds, int(workload[len(kind) :]), kind == "rr")
    else:
        result = bulk(workload, address, port, seconds)
    result["drops"] = ring_drops() - before
    return result


if __name__ == "__main__":
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if sys.argv[1] == "server":
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        print(json.dumps(client(sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))))
