"""What answers the frames: each stack in namespaces of its own, and the frames on its tap.

The frames are the same for all: the guest's addresses are those of the host, the server's those of the remote host, and
the stack's MAC address is the one that pysplice and pasta have.  Only slirp4netns has a network of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from scapy.layers.l2 import ARP, Ether

from ..support.namespaces import Namespace, World, stop
from . import frames
from .frames import Frame, Reassembly

OUR_MAC = "9a:55:9a:55:9a:55"
GUEST_MAC = "02:00:00:00:00:01"
TUNSETIFF, IFF_TAP_NO_PI = 0x400454CA, 0x1002
ETH_P_ALL = 3
SOL_PACKET, PACKET_VNET_HDR, VNET_LEN = 263, 15, 10
GSO_TCP = (1, 4)  # VIRTIO_NET_HDR_GSO_TCPV4, _TCPV6
# Guest ports that pysplice and pasta publish: scripts in which the server connects have theirs here
PUBLISHED = range(21000, 21800)
Listener = Callable[[Frame], None]

# The kernel's usual settings, whatever this machine has, and no limit of errors that scripts would share
SETTINGS = (
    ("net.ipv4.icmp_ratelimit", "0"),
    ("net.ipv6.icmp.ratelimit", "0"),
    ("net.ipv4.tcp_congestion_control", "cubic"),
    ("net.ipv4.tcp_rmem", "4096 131072 6291456"),
)


def settle(namespace: Namespace) -> None:
    for name, value in SETTINGS:
        with contextlib.suppress(OSError):
            namespace.sysctl(name, value)


class Stack:
    """One stack; `send` takes frames, and listeners get what it sends."""

    name = "none"
    publishes = True
    process: subprocess.Popen | None = None
    mac = OUR_MAC

    def __init__(self) -> None:
        self.exit = contextlib.ExitStack()
        self._listeners: dict[tuple[int, int], Listener] = {}
        self._everywhere: dict[int, Listener] = {}
        self._reassembly = Reassembly()
        self._stopping = False
        try:
            self.server, self._tap = self.start()
        except BaseException:
            self.exit.close()
            raise
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(self) -> tuple[Namespace, Any]:
        """The namespace of the servers, and what reads and writes frames (an object with fileno, recv and send)."""
        raise NotImplementedError

    @property
    def has_ended(self) -> bool:
        """True if the stack is a process, and that has ended."""
        return self.process is not None and self.process.poll() is not None

    def address(self, which: str, version: int) -> str:
        """The address of the guest, the server or the gateway."""
        if which == "guest":
            return World.HOST4 if version == 4 else World.HOST6
        if which == "server":
            return World.REMOTE4 if version == 4 else World.REMOTE6
        return World.GATEWAY4 if version == 4 else World.GATEWAY6

    def connect(self, version: int, port: int) -> socket.socket:
        """A socket of the server's that is connecting to a port of the guest."""
        sock = self.server.socket(socket.AF_INET if version == 4 else socket.AF_INET6)
        sock.bind((self.address("server", version), 0))
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.connect((self.address("guest", version), port))
        return sock

    def send(self, frame: bytes) -> None:
        self._tap.send(frame)

    def listen(self, key: tuple[int, int] | None, listener: Listener) -> None:
        """Give a listener the frames for a version and port, or those that are for no port."""
        if key is None:
            self._everywhere[id(listener)] = listener
        else:
            self._listeners[key] = listener

    def forget(self, key: tuple[int, int], listener: Listener) -> None:
        self._listeners.pop(key, None)
        self._everywhere.pop(id(listener), None)

    def _read(self) -> None:
        while not self._stopping:
            if not select.select([self._tap], [], [], 0.1)[0]:
                continue
            with contextlib.suppress(OSError):
                for data in self._tap.recv():
                    self._deliver(data, time.monotonic())

    def _deliver(self, data: bytes, now: float) -> None:
        complete = self._reassembly.whole(data)
        if complete is None:
            return
        frame = frames.parse(complete[0], now, complete[1])
        if frame is None:
            return
        if frame.key is not None:
            listener = self._listeners.get(frame.key)
            if listener is not None:
                listener(frame)
            return
        for listener in list(self._everywhere.values()):
            listener(frame)
        if frame.kind == "WHO-HAS":
            self._answer(complete[0])

    def _answer(self, data: bytes) -> None:
        """The guest answers who looks for it, as its kernel does."""
        frame = Ether(data)
        if ARP in frame:
            if frame[ARP].pdst == self.address("guest", 4):
                reply = ARP(
                    op=2, hwsrc=GUEST_MAC, psrc=frame[ARP].pdst, hwdst=frame.src, pdst=frame[ARP].psrc
                )
                self.send(bytes(Ether(src=GUEST_MAC, dst=frame.src) / reply))
        else:
            answer = frames.advertisement(frame, self.address("guest", 6), GUEST_MAC)
            if answer:
                self.send(answer)

    def close(self) -> None:
        self._stopping = True
        self._reader.join()
        self.exit.close()


class _Descriptor:
    """A tap's descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def recv(self) -> list[bytes]:
        return [os.read(self._fd, 70_000)]

    def send(self, frame: bytes) -> None:
        os.write(self._fd, frame)


class _Packet:
    """The guest's end of a tap: what comes from the stack, and not what the guest sends itself.

    A frame that asks the kernel to cut it (struct virtio_net_hdr) is cut here, so that its segments can be seen.
    """

    def __init__(self, namespace: Namespace, device: str) -> None:
        self._sock = namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._sock.bind((device, 0))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self._sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)

    def fileno(self) -> int:
        return self._sock.fileno()

    def recv(self) -> list[bytes]:
        data, address = self._sock.recvfrom(70_000)
        if address[2] == socket.PACKET_OUTGOING:
            return []
        _, gso_type, _, gso_size, _, _ = struct.unpack_from("=BBHHHH", data)
        return frames.cut(data[VNET_LEN:], gso_size) if gso_type & 0x7F in GSO_TCP else [data[VNET_LEN:]]

    def send(self, frame: bytes) -> None:
        self._sock.send(bytes(VNET_LEN) + frame)

    def close(self) -> None:
        self._sock.close()


class Linux(Stack):
    """The kernel's own stack behind a tap, with the addresses of the remote host."""

    name = "linux"

    def start(self) -> tuple[Namespace, Any]:
        namespace = Namespace(f"wire{os.getpid()}x{id(self) & 0xFFFF:x}")
        self.exit.callback(namespace.delete)

        def open_tap() -> int:
            fd = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH14x", b"tap0", IFF_TAP_NO_PI))
            return fd

        fd = namespace.call(open_tap)
        self.exit.callback(os.close, fd)
        namespace.sysctl("net.ipv6.conf.tap0.accept_dad", "0")
        settle(namespace)
        namespace.run("ip", "link", "set", "tap0", "address", OUR_MAC, "up")
        for which in ("server", "gateway"):
            namespace.run("ip", "addr", "add", f"{self.address(which, 4)}/24", "dev", "tap0")
            namespace.run("ip", "addr", "add", f"{self.address(which, 6)}/64", "dev", "tap0", "nodad")
        return namespace, _Descriptor(fd)


class Served(Stack):
    """A stack that is a program: it serves the namespace of a guest whose own kernel stays silent."""

    device = "tap0"

    def command(self, world: World) -> subprocess.Popen:
        raise NotImplementedError

    def start(self) -> tuple[Namespace, Any]:
        world = self.exit.enter_context(World())
        self.world = world
        for namespace in (world.host, world.remote):
            namespace.sysctl("net.ipv4.ping_group_range", "0 0")
            settle(namespace)
        self.serve(world)
        guest = world.guest
        until = time.monotonic() + 10
        while guest.run("ip", "link", "show", self.device, check=False).returncode:
            assert time.monotonic() < until, f"{self.name}: no device"
            time.sleep(0.05)
        # The guest's kernel has no address, so no frame is for it; it would else reset what it does not know
        guest.sysctl(f"net.ipv6.conf.{self.device}.disable_ipv6", "1")
        guest.run("ip", "addr", "flush", "dev", self.device)
        guest.run("ip", "link", "set", self.device, "up", "arp", "off", "mtu", "1500")
        packet = _Packet(guest, self.device)
        self.exit.callback(packet.close)
        return world.remote, packet

    def serve(self, world: World) -> None:
        self.process = self.command(world)
        self.exit.callback(stop, self.process)


class Pysplice(Served):
    name = "pysplice"
    options: tuple[str, ...] = ()

    def serve(self, world: World) -> None:
        ports = f"{PUBLISHED.start}-{PUBLISHED.stop - 1}"
        self.process = world.pysplice("--mtu", "1500", "-t", ports, *self.options)


class PyspliceNoOffload(Pysplice):
    """The same without offloads: it segments and sums itself."""

    name = "pysplice-no-offload"
    options = ("--no-offload",)


class Pasta(Served):
    name = "pasta"
    program = "pasta"

    def command(self, world: World) -> subprocess.Popen:
        ports = f"{PUBLISHED.start}-{PUBLISHED.stop - 1}"
        return world.host.spawn(
            self.program, "-f", "-q", "-m", "1500", "-I", "tap0", "-t", ports, "--netns", world.guest.path,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip


class Slirp(Served):
    """slirp4netns: a network of its own, and no way in."""

    name = "slirp4netns"
    publishes = False
    mac = "52:55:0a:00:02:02"

    def address(self, which: str, version: int) -> str:
        if which == "guest":
            return "10.0.2.100" if version == 4 else "fd00::100"
        if which == "gateway":
            return "10.0.2.2" if version == 4 else "fd00::2"
        return super().address(which, version)

    def command(self, world: World) -> subprocess.Popen:
        return world.host.spawn(
            "slirp4netns", "--configure", "--mtu=1500", "--enable-ipv6", "--netns-type=path", world.guest.path,
            "tap0", stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip


STACKS: dict[str, type[Stack]] = {
    kind.name: kind for kind in (Linux, Pysplice, PyspliceNoOffload, Pasta, Slirp)
}
