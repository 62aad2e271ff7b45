"""What whoever serves can do no more, tried in a child that has locked itself in."""

import ctypes
import errno
import fcntl
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from pysplice.setup import sandbox

# They come with the C compiler: those of this machine, and the common ones, which are aarch64's
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
PTRACE_ATTACH = 16
F_SETOWN, F_SETSIG, F_SETPIPE_SZ = 8, 10, 1031
FIOSETOWN = 0x8901
NETLINK_NETFILTER = 12

LIBC = ctypes.CDLL(None, use_errno=True)


def result_of(function):
    """What the function returns, or the errno it fails with, in a child that has entered the sandbox."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writable, f"{sandbox.enter()}|".encode())
            os.write(writable, f"{function()}".encode())
        except OSError as e:
            os.write(writable, errno.errorcode[e.errno or 0].encode())
        finally:
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as file:
        text = file.read()
    os.waitpid(child, 0)
    complaint, _, result = text.partition("|")
    assert complaint == ""
    return result


def call(name, *args):
    """A system call by its C function."""
    if getattr(LIBC, name)(*args) < 0:
        raise OSError(ctypes.get_errno(), name)
    return "done"


def in_a_thread():
    said = []
    thread = threading.Thread(target=said.append, args=("done",))
    thread.start()
    thread.join(5)
    return said[0]


def interrupted():
    heard = []
    signal.signal(signal.SIGUSR1, lambda number, frame: heard.append("done"))
    signal.raise_signal(signal.SIGUSR1)
    return heard[0]


@pytest.mark.parametrize(
    "attempt",
    (
        lambda: os.execv("/bin/true", ["true"]),
        lambda: os.posix_spawn("/bin/true", ["true"], {}),
        os.fork,
        lambda: call("ptrace", PTRACE_ATTACH, os.getppid(), 0, 0),
        lambda: call("unshare", sandbox.CLONE_NEWUSER),
        lambda: call("mount", b"none", b"/", b"tmpfs", 0, None),
        lambda: call("setns", 0, 0),
        lambda: call("process_vm_readv", os.getppid(), None, 0, None, 0, 0),
        lambda: os.kill(os.getppid(), 0),
        lambda: os.chroot("/"),
        lambda: fcntl.fcntl(0, F_SETOWN, os.getppid()),
        lambda: fcntl.fcntl(0, F_SETSIG, signal.SIGKILL),
        lambda: fcntl.ioctl(0, FIOSETOWN, struct.pack("i", os.getppid())),
        lambda: resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE),
        lambda: os.setpriority(os.PRIO_PROCESS, os.getppid(), 19),
        lambda: os.sched_setaffinity(os.getppid(), {0}),
        lambda: os.pidfd_open(os.getppid()),
        lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM),
        lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER),
    ),
)
def test_denied(isolated_child, attempt):
    assert result_of(attempt) == "EPERM"


@pytest.mark.parametrize(
    "attempt",
    (
        in_a_thread,
        interrupted,
        lambda: os.write(os.pipe()[1], b"x") and "done",
        lambda: (
            [socket.socket(family).close() for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)]
            and "done"
        ),
        lambda: (
            [
                socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol).close()
                for protocol in (sandbox.NETLINK_ROUTE, sandbox.NETLINK_SOCK_DIAG)
            ]
            and "done"
        ),
        lambda: resource.getrlimit(resource.RLIMIT_NOFILE) and "done",
        lambda: fcntl.fcntl(os.pipe()[1], F_SETPIPE_SZ, 1 << 16) and "done",
    ),
)
def test_allowed(isolated_child, attempt):
    assert result_of(attempt) == "done"


def test_there_is_nothing(isolated_child):
    assert result_of(lambda: os.listdir("/")) == "[]"
    assert result_of(lambda: os.getcwd()) == "/"
    assert result_of(lambda: os.mkdir("/tmp")) in ("EROFS", "ENOSPC")
    assert result_of(lambda: os.listdir("/..")) == "[]"


def test_the_file_system_can_stay(isolated_child, monkeypatch):
    monkeypatch.setattr(sandbox.enter, "__defaults__", (False, False))
    assert "etc" in result_of(lambda: os.listdir("/"))
    assert result_of(os.fork) == "EPERM"


@pytest.fixture
def isolated_child():
    if subprocess.run(["unshare", "-Um", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")


@pytest.mark.parametrize("machine", [name for name, path in HEADERS.items() if path.exists()])
def test_numbers_are_the_kernels(machine):
    theirs = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", HEADERS[machine].read_text()))
    for name, number in sandbox.NUMBERS[machine].items():
        assert theirs[name] == str(number), name


PID = 4711
DANGEROUS = {
    *(
        "execve",
        "execveat",
        "ptrace",
        "process_vm_readv",
        "process_vm_writev",
        "kill",
        "tkill",
        "pidfd_open",
    ),
    *("mount", "umount2", "pivot_root", "chroot", "unshare", "setns", "bpf", "userfaultfd", "keyctl"),
}
EPERM, ENOSYS = (sandbox.SECCOMP_RET_ERRNO | number for number in (errno.EPERM, errno.ENOSYS))
ALLOW = sandbox.SECCOMP_RET_ALLOW


def verdict(machine, number, *arguments, arch=None):
    """What the filter says of a system call: classic BPF, as far as the filter has it, step by step."""
    code = [*sandbox.INSTRUCTION.iter_unpack(sandbox.program(machine, PID))]
    data = {sandbox.NUMBER: number, sandbox.ARCHITECTURE: arch or sandbox.AUDIT_ARCH[machine]}
    data |= dict(zip(sandbox.ARGUMENTS, (*arguments, 0, 0, 0), strict=False))
    at = accumulator = 0
    while True:
        what, yes, no, value = code[at]
        at += 1
        if what == sandbox.RETURN:
            return value
        if what == sandbox.LOAD:
            accumulator = data[value]
        else:
            true = {
                sandbox.JUMP_EQUAL: accumulator == value,
                sandbox.JUMP_AT_LEAST: accumulator >= value,
                sandbox.JUMP_ANY: bool(accumulator & value),
            }[what]
            at += yes if true else no


@pytest.mark.parametrize("machine", sorted(sandbox.NUMBERS))
def test_what_the_filter_says(machine):
    numbers = sandbox.NUMBERS[machine]
    assert verdict(machine, {"x86_64": 0, "aarch64": 63}[machine]) == ALLOW  # read()
    assert verdict(machine, 0, arch=0x40000003) == EPERM  # another machine's numbers
    if machine == "x86_64":
        assert verdict(machine, sandbox.X32_BIT) == EPERM
    assert numbers.keys() >= DANGEROUS
    for name in numbers.keys() - {*sandbox.CHECKED, "clone3"}:
        assert verdict(machine, numbers[name]) == EPERM, name
    assert verdict(machine, numbers["clone3"]) == ENOSYS


@pytest.mark.parametrize("machine", sorted(sandbox.NUMBERS))
@pytest.mark.parametrize(
    ("name", "allowed", "denied"),
    (
        ("clone", ((sandbox.CLONE_THREAD | 0x100,),), ((0x11,), (0,))),
        ("tgkill", ((PID,),), ((1,), (0,))),
        ("prlimit64", ((0,), (PID,)), ((1,),)),
        ("fcntl", ((3, 1), (3, F_SETPIPE_SZ)), ((3, F_SETOWN), (3, F_SETSIG), (3, 15))),
        ("ioctl", ((3, 0x5411),), ((3, FIOSETOWN), (3, 0x8902), (3, 0x5412))),
        ("socket", ((1,), (2,), (10,), (16, 3, 0), (16, 3, 4)), ((40,), (16, 3, 12), (17, 3, 0))),
    ),
)
def test_what_the_filter_says_of_arguments(machine, name, allowed, denied):
    number = sandbox.NUMBERS[machine][name]
    assert {verdict(machine, number, *arguments) for arguments in allowed} == {ALLOW}
    assert {verdict(machine, number, *arguments) for arguments in denied} == {EPERM}


def test_an_unknown_machine_has_no_filter():
    assert sandbox.program("pdp11", 1) == b""
