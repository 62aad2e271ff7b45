"""Namespaces for tests: the test process moves into namespaces of its own, and makes hosts in them.

Nothing here touches the machine: `isolate()` puts the whole process into new user, network and mount
namespaces (as `unshare -Urnm` does), as root and as an ordinary user alike.  They end with the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from socket import socket as Socket

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
MS_REC_PRIVATE = 0x4000 | 0x40000
NETNS = "/run/netns"

_libc = ctypes.CDLL(None, use_errno=True)


def isolate(is_worker: bool) -> str:
    """Move this process into namespaces of its own; the reason if that is not possible, else ''.

    A worker is a child of a process that has done so, and keeps that one's user namespace: it has threads, and such a
    process cannot make one (unshare(2)).
    """
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare((0 if is_worker else CLONE_NEWUSER) | CLONE_NEWNET | CLONE_NEWNS):
        return f"cannot make namespaces: {os.strerror(ctypes.get_errno())}"
    if not is_worker:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {uid} 1"),
            ("gid_map", f"0 {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    _libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None)
    if _libc.mount(b"tmpfs", b"/run", b"tmpfs", 0, None):
        return f"cannot mount: {os.strerror(ctypes.get_errno())}"
    os.mkdir(NETNS)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    return ""


def run(*words: str, check: bool = True, timeout: float = 60, **kwargs) -> subprocess.CompletedProcess:
    """Run a command to its end, output as text."""
    kwargs.setdefault("stdin", subprocess.DEVNULL)
    result = subprocess.run(words, text=True, capture_output=True, timeout=timeout, check=False, **kwargs)
    if check and result.returncode:
        raise AssertionError(f"{' '.join(words)}: {result.returncode}\n{result.stdout}{result.stderr}")
    return result


class Namespace:
    """A network namespace with a name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = f"{NETNS}/{name}"
        run("ip", "netns", "add", name)
        self.run("ip", "link", "set", "lo", "up")

    def enter(self, *words: str) -> list[str]:
        return ["nsenter", f"--net={self.path}", "--", *words]

    def run(self, *words: str, **kwargs) -> subprocess.CompletedProcess:
        return run(*self.enter(*words), **kwargs)

    def spawn(self, *words: str, **kwargs) -> subprocess.Popen:
        kwargs.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(self.enter(*words), **kwargs)

    def call(self, function, *args, **kwargs):
        """The result of a function that runs in the namespace, in a thread of its own."""
        result, error = [], []

        def inside() -> None:
            fd = os.open(self.path, os.O_RDONLY)
            try:
                if _libc.setns(fd, CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
                result.append(function(*args, **kwargs))
            except BaseException as e:
                error.append(e)
            finally:
                os.close(fd)

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        if error:
            raise error[0]
        return result[0]

    def socket(self, family=socket.AF_INET, kind=socket.SOCK_STREAM, protocol=0) -> Socket:
        """A socket of the namespace; it can be used from anywhere."""
        sock = self.call(socket.socket, family, kind, protocol)
        sock.settimeout(20)
        return sock

    def listen(self, address: str, port: int = 0, backlog: int = 128) -> Socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = self.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen(backlog)
        return sock

    def connect(self, address: str, port: int) -> Socket:
        sock = self.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        try:
            sock.connect((address, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def sysctl(self, name: str, value: str) -> None:
        path = "/proc/sys/" + name.replace(".", "/")

        def write() -> None:
            with open(path, "w") as file:
                file.write(value)

        self.call(write)

    def delete(self) -> None:
        run("ip", "netns", "del", self.name, check=False)


PYSPLICE = [sys.executable, "-m", "pysplice"]


class World:
    """A host, a remote host on a link to it, and an empty namespace for the guest.

    The remote host has a second address that is the host's default gateway, so that its first one is
    reached as any remote address is.
    """

    HOST4, REMOTE4, GATEWAY4 = "10.99.0.1", "10.99.0.2", "10.99.0.254"
    HOST6, REMOTE6, GATEWAY6 = "fd99::1", "fd99::2", "fd99::fe"

    _numbers = itertools.count()

    def __init__(self) -> None:
        tag = next(self._numbers)
        self._exit = contextlib.ExitStack()
        self.host = Namespace(f"host{tag}")
        self._exit.callback(self.host.delete)
        self.remote = Namespace(f"remote{tag}")
        self._exit.callback(self.remote.delete)
        self.guest = Namespace(f"guest{tag}")
        self._exit.callback(self.guest.delete)
        self.link()

    def link(self) -> None:
        self.host.run(
            "ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1",
            "netns", self.remote.path,
        )  # fmt: skip
        self.addresses("veth0", "veth1")

    def addresses(self, host_if: str, remote_if: str) -> None:
        """Addresses and routes for both ends of the link."""
        for namespace, device, addresses in (
            (self.host, host_if, (f"{self.HOST4}/24", f"{self.HOST6}/64")),
            (
                self.remote,
                remote_if,
                (
                    f"{self.REMOTE4}/24",
                    f"{self.GATEWAY4}/24",
                    f"{self.REMOTE6}/64",
                    f"{self.GATEWAY6}/64",
                ),
            ),
        ):
            for address in addresses:
                more = ["nodad"] if ":" in address else []
                namespace.run("ip", "addr", "add", address, "dev", device, *more)
            namespace.run("ip", "link", "set", device, "up")
        self.host.run("ip", "route", "add", "default", "via", self.GATEWAY4)
        self.host.run("ip", "-6", "route", "add", "default", "via", self.GATEWAY6)

    def remote_address(self, version: int) -> str:
        return self.REMOTE4 if version == 4 else self.REMOTE6

    def pysplice(self, *options: str, timeout: float = 15) -> subprocess.Popen:
        """Serve the guest's namespace; returns when it is configured."""
        folder = Path(self._exit.enter_context(tempfile.TemporaryDirectory()))
        process = self.host.spawn(
            *PYSPLICE, "-f", "--netns", self.guest.path, "--tap", "tap0", "-P", str(folder / "pid"),
            *options, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._exit.callback(stop, process)
        until = time.monotonic() + timeout
        # It is written when addresses and routes are there
        while not written(folder / "pid"):
            if process.poll() is not None:
                raise AssertionError(f"pysplice ended: {process.stderr.read()}")
            assert time.monotonic() < until, "no process ID after a while"
            time.sleep(0.02)
        return process

    def close(self) -> None:
        self._exit.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def written(path: Path) -> bool:
    """True once there is something in a file."""
    return path.exists() and path.stat().st_size > 0


def stop(process: subprocess.Popen) -> int:
    """End a process that is ours, and wait for it; its exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stderr:
        process.stderr.close()
    if process.stdout:
        process.stdout.close()
    return process.returncode


def have(program: str) -> bool:
    """True if a program is installed."""
    return shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is not None


LINK = os.path.join(os.path.dirname(__file__), "..", "..", "examples", "link.py")


class ImpairedWorld(World):
    """A world whose link delays, loses and reorders: options of examples/link.py."""

    def __init__(self, *options: str) -> None:
        self._options = options
        super().__init__()

    def link(self) -> None:
        process = subprocess.Popen(
            [
                sys.executable, LINK, *self._options,
                "--a", f"{self.host.path}:link0", "--b", f"{self.remote.path}:link1",
            ],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._exit.callback(stop, process)
        assert process.stdout.readline() == "ready\n"
        self.addresses("link0", "link1")
