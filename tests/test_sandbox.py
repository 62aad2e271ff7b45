"""What the serving process can no longer do, tried in a child that has locked itself in."""

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
import sys
from pathlib import Path

import pytest

from pysplice.config import ConfigError
from pysplice.setup import landlock, libc, privileges, sandbox, seccomp

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


def result_of(function, *arguments):
    """What the function returns, or the errno it fails with, in a child that has entered the sandbox."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writable, f"{'; '.join(sandbox.enter(*arguments))}|".encode())
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
        lambda: call("unshare", libc.CLONE_NEWUSER),
        lambda: call("mount", b"none", b"/", b"tmpfs", 0, None),
        lambda: call("setns", 0, 0),
        lambda: call("process_vm_readv", os.getppid(), None, 0, None, 0, 0),
        lambda: os.kill(os.getppid(), 0),
        lambda: os.chroot("/"),
        lambda: fcntl.fcntl(0, F_SETOWN, os.getppid()),
        lambda: fcntl.fcntl(0, F_SETSIG, signal.SIGKILL),
        lambda: fcntl.ioctl(0, FIOSETOWN, struct.pack("i", os.getppid())),
        lambda: resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE),
        lambda: call("memfd_create", b"x", 0),
        lambda: os.inotify_init() if hasattr(os, "inotify_init") else call("inotify_init1", 0),
        lambda: call("personality", 0xFFFFFFFF),
        lambda: os.open("/", os.O_RDONLY),
        lambda: os.unlink("/x"),
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
        interrupted,
        lambda: os.write(os.pipe()[1], b"x") and "done",
        lambda: (
            [socket.socket(family).close() for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)]
            and "done"
        ),
        lambda: (
            [
                socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol).close()
                for protocol in (seccomp.NETLINK_ROUTE, seccomp.NETLINK_SOCK_DIAG)
            ]
            and "done"
        ),
        lambda: fcntl.fcntl(os.pipe()[1], F_SETPIPE_SZ, 1 << 16) and "done",
    ),
)
def test_allowed(isolated_child, attempt):
    assert result_of(attempt) == "done"


def test_there_is_nothing(isolated_child):
    """Even without the filter the root is empty, and behind landlock nothing can be looked at."""
    unfiltered = {"role": "unfiltered"}
    sandbox.seccomp.ROLES["unfiltered"] = frozenset(NUMBERS_OF_THIS_MACHINE)
    try:
        assert result_of(lambda: os.stat("/etc") and "there", *unfiltered.values()) == "ENOENT"
        assert result_of(os.getcwd, *unfiltered.values()) == "/"
    finally:
        del sandbox.seccomp.ROLES["unfiltered"]


def test_landlock(isolated_child):
    """By itself: what is open stays so, and nothing else can be opened."""

    def attempt():
        privileges.renounce_new_privileges()
        before = os.open("/etc", os.O_PATH)
        landlock.restrict()
        os.stat("/etc", dir_fd=before)
        return os.listdir("/etc")

    if LIBC.syscall(444, None, 0, 1) < 0:
        pytest.skip("this kernel has no landlock")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            attempt()
        except PermissionError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_what_cannot_be_given_up_is_an_error(monkeypatch):
    """The results of prctl() and capset() are looked at."""

    class Refusing:
        def __getattr__(self, name):
            def refuse(*args):
                ctypes.set_errno(errno.EPERM)
                return -1

            return refuse

    monkeypatch.setattr(libc, "_libc", Refusing())
    for attempt in (privileges.hide, privileges.drop_privileges, privileges.renounce_new_privileges):
        with pytest.raises(ConfigError, match="Operation not permitted"):
            attempt()


@pytest.fixture
def isolated_child(monkeypatch):
    monkeypatch.delenv("PYSPLICE_SECCOMP", raising=False)
    if subprocess.run(["unshare", "-Um", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")


def test_the_lists_are_made_of_the_code():
    """contrib/list-syscalls finds what is there already."""
    script = Path(__file__).parent.parent / "contrib" / "list-syscalls"
    if not all(path.exists() for path in HEADERS.values()):
        pytest.skip("the kernel's headers of an amd64 machine are not installed")
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0


@pytest.mark.parametrize("machine", [name for name, path in HEADERS.items() if path.exists()])
def test_numbers_are_the_kernels(machine):
    theirs = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", HEADERS[machine].read_text()))
    theirs["newfstatat"] = theirs.get("newfstatat", theirs.get("fstatat"))
    for name, number in seccomp.NUMBERS[machine].items():
        assert theirs[name] == str(number), name


PID = 4711
DANGEROUS = {
    "x86_64": {
        "execve": 59,
        "ptrace": 101,
        "kill": 62,
        "clone": 56,
        "mount": 165,
        "openat": 257,
        "unshare": 272,
    },
    "aarch64": {
        "execve": 221,
        "ptrace": 117,
        "kill": 129,
        "clone": 220,
        "mount": 40,
        "openat": 56,
        "unshare": 97,
    },
}
EPERM, ENOSYS = (seccomp.SECCOMP_RET_ERRNO | number for number in (errno.EPERM, errno.ENOSYS))
ALLOW, KILL = seccomp.SECCOMP_RET_ALLOW, seccomp.SECCOMP_RET_KILL_PROCESS
NUMBERS_OF_THIS_MACHINE = seccomp.NUMBERS.get(os.uname().machine, {})


def run(program, number, *arguments, arch):
    """What a filter says of a system call: classic BPF, as far as it is used, step by step."""
    code = [*seccomp.INSTRUCTION.iter_unpack(program)]
    data = {seccomp.NUMBER: number, seccomp.ARCHITECTURE: arch}
    data |= dict(zip(seccomp.ARGUMENTS, (*arguments, 0, 0, 0), strict=False))
    at = accumulator = 0
    while True:
        what, yes, no, value = code[at]
        at += 1
        if what == seccomp.RETURN:
            return value
        if what == seccomp.LOAD:
            accumulator = data[value]
        else:
            true = {
                seccomp.JUMP_EQUAL: accumulator == value,
                seccomp.JUMP_AT_LEAST: accumulator >= value,
            }[what]
            at += yes if true else no


def verdict(machine, number, *arguments, role="serve", arch=None, kill=False):
    program = seccomp.program(machine, PID, role, kill)
    return run(program, number, *arguments, arch=arch or seccomp.AUDIT_ARCH[machine])


# These read resolv.conf and what they import, and the second joins the guest's namespace in a child
NEEDED = {"follower": {"openat"}, "configurator": {"openat", "clone", "setns"}}


@pytest.mark.parametrize("machine", sorted(seccomp.NUMBERS))
@pytest.mark.parametrize("role", sorted(seccomp.ROLES))
def test_what_the_filter_says(machine, role):
    """The calls of the role and no others, whatever numbers a newer kernel has."""
    numbers = seccomp.NUMBERS[machine]
    allowed = {numbers[name] for name in seccomp.ROLES[role] if name in numbers}
    looked_at = {numbers[name] for name in (*seccomp.CHECKED, "tgkill") if name in numbers}
    assert len(seccomp.ROLES[role]) <= 64
    for number in range(600):
        said = verdict(machine, number, role=role)
        if number == seccomp.CLONE3:
            assert said == ENOSYS
        elif number in looked_at and number in allowed:
            assert said == EPERM  # with arguments of 0
        else:
            assert said == (ALLOW if number in allowed else EPERM), number
            assert verdict(machine, number, role=role, kill=True) == (ALLOW if number in allowed else KILL)
    for name, number in DANGEROUS.get(machine, {}).items():
        assert verdict(machine, number, role=role) == (ALLOW if name in NEEDED.get(role, ()) else EPERM), (
            name
        )
    assert verdict(machine, numbers["read"], arch=0x40000003) == EPERM  # another machine's numbers
    if machine == "x86_64":
        assert verdict(machine, seccomp.X32_BIT) == EPERM


@pytest.mark.parametrize("machine", sorted(seccomp.NUMBERS))
@pytest.mark.parametrize(
    ("name", "allowed", "denied"),
    (
        ("tgkill", ((PID,),), ((1,), (0,))),
        ("fcntl", ((3, 1), (3, F_SETPIPE_SZ)), ((3, F_SETOWN), (3, F_SETSIG), (3, 15))),
        ("ioctl", ((3, 0x5411), (3, 0x5421)), ((3, FIOSETOWN), (3, 0x8902), (3, 0x5412), (3, 0x400454CA))),
        ("socket", ((1,), (2,), (10,), (16, 3, 0), (16, 3, 4)), ((40,), (16, 3, 12), (17, 3, 0))),
    ),
)
def test_what_the_filter_says_of_arguments(machine, name, allowed, denied):
    number = seccomp.NUMBERS[machine][name]
    assert {verdict(machine, number, *arguments) for arguments in allowed} == {ALLOW}
    assert {verdict(machine, number, *arguments) for arguments in denied} == {EPERM}


@pytest.mark.parametrize("machine", sorted(seccomp.NUMBERS))
def test_a_terminal_is_protected(machine):
    program = seccomp.terminal_program(machine)
    ioctl = seccomp.NUMBERS[machine]["ioctl"]
    ways = [(ioctl, seccomp.AUDIT_ARCH[machine])]
    if machine == "x86_64":
        ways += [(54, 0x40000003), (seccomp.X32_BIT | 514, seccomp.AUDIT_ARCH[machine])]
    for number, arch in ways:
        for request, said in ((0x5412, EPERM), (0x541C, EPERM), (0x5401, ALLOW)):
            assert run(program, number, 0, request, arch=arch) == said
    assert run(program, ioctl + 1, 0, 0x5412, arch=seccomp.AUDIT_ARCH[machine]) == ALLOW


def test_an_unknown_machine_is_said(monkeypatch):
    assert seccomp.program("pdp11", 1) == b""
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("", "", "", "", "pdp11")))
    with pytest.raises(ConfigError, match="not known"):
        seccomp.confine("serve")
