"""A hostile guest, hostile remote hosts, another local user: what each can reach, read, hold or starve."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

from ..support.namespaces import PYSPLICE, stop
from .test_datagrams import bound
from .test_forward import NONE, accept, until

ABORT = struct.pack("ii", 1, 0)


def python(world, code, *options, check=True, timeout=60):
    """Run Python as the command in a namespace of its own; what it prints."""
    words = (*PYSPLICE, "--config-net", *options, "--", sys.executable, "-c", code)
    result = world.host.run(*words, check=check, timeout=timeout)
    return result.stdout


# What a guest may reach


@pytest.mark.parametrize("kind", ("STREAM", "DGRAM"))
@pytest.mark.parametrize("option", ("--splice-only", "--tap=tap0"))
def test_a_guest_reaches_the_hosts_loopback_addresses_alone(world, kind, option):
    """Whatever address it gives to its own loopback interface."""
    world.remote.run("ip", "addr", "add", "203.0.113.5/32", "dev", "lo")
    family = getattr(socket, f"SOCK_{kind}")
    secret = world.remote.socket(socket.AF_INET, family)
    secret.bind(("203.0.113.5", 8080))
    local = world.host.socket(socket.AF_INET, family)
    local.bind(("127.0.0.1", 8080))

    def serve(sock, answer):
        if kind == "STREAM":
            sock.listen()
            while True:
                try:
                    client, _ = sock.accept()
                except TimeoutError:
                    return
                client.sendall(answer)
                client.close()
        while True:
            try:
                _, peer = sock.recvfrom(100)
            except TimeoutError:
                return
            sock.sendto(answer, peer)

    for sock, answer in ((secret, b"secret"), (local, b"hello")):
        sock.settimeout(8)
        threading.Thread(target=serve, args=(sock, answer), daemon=True).start()
    code = f"""
import socket, subprocess
def ask(address):
    s = socket.socket(type=socket.SOCK_{kind}); s.settimeout(2)
    try:
        s.connect((address, 8080)); s.send(b"x"); return s.recv(99)
    except OSError as e:
        return type(e).__name__
subprocess.run(["ip", "addr", "add", "203.0.113.5/32", "dev", "lo"], check=True)
print(ask("203.0.113.5"), ask("127.0.0.1"))
"""
    rest = ("-t", "none", "-u", "none", "-T", "8080", "-U", "8080")
    words = (*PYSPLICE, option, *rest, "--", sys.executable, "-c", code)
    out = world.host.run(*words).stdout
    assert "secret" not in out and "b'hello'" in out


# Bytes


def test_a_slow_client_gets_the_whole_answer(world):
    """The guest's server has closed, its namespace is silent, and the client speaks before it reads."""
    world.pysplice("--config-net", *NONE, "-t", "8080:80")
    data = os.urandom(1 << 20)
    with world.guest.listen("0.0.0.0", 80) as listener:
        client = world.remote.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((world.HOST4, 8080))
        server, _ = accept(listener)
        threading.Thread(target=lambda: (server.sendall(data), server.close()), daemon=True).start()
        time.sleep(1)
        # The guest's end is closed as soon as all was acknowledged; from then on it answers nothing
        got = bytearray()
        while len(got) < len(data) - 100_000:
            got += client.recv(65536)
        until(lambda: "ESTAB" not in world.guest.run("ss", "-Htn", "sport = :80").stdout)
        world.guest.run("ip", "link", "set", "tap0", "down")
        client.sendall(b"still here")
        time.sleep(0.5)
        while part := client.recv(65536):
            got += part
        assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
        client.close()


def test_a_reset_comes_behind_what_was_acknowledged(world):
    world.pysplice("--config-net", *NONE)
    with world.remote.listen(world.REMOTE4) as listener:
        guest = world.guest.connect(world.REMOTE4, listener.getsockname()[1])
        remote, _ = listener.accept()
        sent = 0
        guest.setblocking(False)
        until_full = time.monotonic() + 1
        while time.monotonic() < until_full:
            try:
                sent += guest.send(b"x" * 65536)
            except BlockingIOError:
                time.sleep(0.05)
        outq = struct.unpack("i", fcntl.ioctl(guest, 0x5411, b"1234"))[0]
        guest.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        guest.close()
        got = 0
        with pytest.raises(ConnectionResetError):
            while part := remote.recv(1 << 20):
                got += len(part)
        # All that the guest's kernel knew to have arrived
        assert got >= sent - outq
        remote.close()


@pytest.mark.parametrize("who", ("slow", "silent"))
def test_ports_are_free_when_the_command_has_ended(world, who):
    code = (
        "import socket, time, os; s = socket.create_server(('', 80)); c, _ = s.accept(); c.recv(9)\n"
        "c.setblocking(False); sent = 0; until = time.monotonic() + 1\n"
        f"while {who == 'slow'} and time.monotonic() < until:\n"
        "    try: sent += c.send(b'z' * 65536)\n"
        "    except BlockingIOError: time.sleep(0.05)\n"
        "print(sent, flush=True); os._exit(0)"
    )
    words = (*PYSPLICE, "--config-net", *NONE, "-t", "8080:80", "--", sys.executable, "-c", code)
    process = world.host.spawn(*words, stdout=subprocess.PIPE, text=True)
    listening = lambda: "8080" in world.host.run("ss", "-Hltn").stdout  # noqa: E731
    until(listening)
    namespace, address = (world.remote, world.HOST4) if who == "slow" else (world.host, "127.0.0.1")
    time.sleep(0.7)
    with namespace.connect(address, 8080) as client:
        client.sendall(b"x")
        until(lambda: not listening())
        if who == "silent":
            assert process.wait(8) == 0
        else:
            # It stays for what the guest has said, and the client gets that
            got = 0
            client.settimeout(5)
            while part := client.recv(1 << 20):
                got += len(part)
            assert got == int(process.stdout.readline()) > 1 << 20
            assert process.wait(15) == 0


# Datagrams


def test_many_peers_take_one_descriptor(world):
    process = world.pysplice("--config-net", *NONE)
    descriptors = lambda: len(os.listdir(f"/proc/{process.pid}/fd"))  # noqa: E731
    before = descriptors()
    world.remote.run("ip", "route", "add", "local", "10.98.0.0/16", "dev", "lo")
    world.host.run("ip", "route", "add", "10.98.0.0/16", "via", world.REMOTE4)
    with bound(world.guest, "0.0.0.0") as guest, bound(world.remote, "0.0.0.0") as remote:
        for n in range(3000):
            guest.sendto(b"x", (f"10.98.{n // 250}.{n % 250 + 1}", remote.getsockname()[1]))
            if n % 50 == 49:
                for _ in range(50):
                    remote.recv(10)
        assert descriptors() == before + 1


@pytest.mark.parametrize("filtering", ("address", "port", "endpoint"))
def test_who_may_answer(world, filtering):
    """RFC 4787, REQ-8: any port of an address that was asked, unless told; each with its own address."""
    world.pysplice("--config-net", *NONE, "--udp-filter", filtering)
    world.remote.run("ip", "addr", "add", "10.99.0.3/24", "dev", "veth1")
    with (
        bound(world.guest, "0.0.0.0") as guest,
        bound(world.remote, world.REMOTE4) as asked,
        bound(world.remote, world.REMOTE4) as other_port,
        bound(world.remote, "10.99.0.3") as stranger,
    ):
        guest.sendto(b"x", asked.getsockname())
        _, peer = asked.recvfrom(10)
        for sock in (stranger, other_port, asked):
            sock.sendto(b"y", peer)
        heard = []
        guest.settimeout(1)
        while not heard or heard[-1] != asked.getsockname():
            heard.append(guest.recvfrom(10)[1])
        wanted = {
            "port": [asked],
            "address": [other_port, asked],
            "endpoint": [stranger, other_port, asked],
        }[filtering]
        assert heard == [sock.getsockname() for sock in wanted]


def test_a_stranger_is_never_taken_for_another(world):
    """Datagrams of a flood, and those of a client that is new each time, each with its own address."""
    world.pysplice("--config-net", *NONE, "-u", "5000")
    world.remote.run("ip", "addr", "add", "10.99.0.66/24", "dev", "veth1")
    stop_flood = threading.Event()

    def flood():
        raw = world.remote.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
        raw.bind(("10.99.0.66", 0))
        for n in range(60_000):
            if stop_flood.is_set():
                break
            raw.sendto(struct.pack("!HHHH", 1024 + n, 5000, 16, 0) + b"stranger", (world.HOST4, 0))
        raw.close()

    with bound(world.guest, "0.0.0.0", 5000) as guest:
        guest.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        thread = threading.Thread(target=flood)
        thread.start()
        for _ in range(200):
            with bound(world.remote, world.REMOTE4) as trusted:
                trusted.sendto(b"trusted!", (world.HOST4, 5000))
        stop_flood.set()
        thread.join()
        seen = set()
        guest.settimeout(1)
        try:
            while True:
                data, peer = guest.recvfrom(100)
                seen.add((data, peer[0]))
        except TimeoutError:
            pass
        assert seen == {(b"stranger", "10.99.0.66"), (b"trusted!", world.REMOTE4)}


def test_a_flood_of_strangers_ends_no_conversation(world):
    world.pysplice("--config-net", *NONE, "-u", "5000")
    world.remote.run("ip", "route", "add", "local", "10.98.0.0/16", "dev", "lo")
    world.host.run("ip", "route", "add", "10.98.0.0/16", "via", world.REMOTE4)
    with bound(world.guest, "0.0.0.0", 5000) as guest, bound(world.remote, world.REMOTE4) as client:

        def ask():
            client.sendto(b"client", (world.HOST4, 5000))
            while True:
                data, peer = guest.recvfrom(100)
                if data == b"client":
                    break
            guest.sendto(b"answer", peer)
            assert client.recv(100) == b"answer"
            return peer

        first = ask()
        raw = world.remote.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        for n in range(10_000):
            source = socket.inet_aton(f"10.98.{n // 250}.{n % 250 + 1}")
            udp = struct.pack("!HHHH", 4000, 5000, 9, 0) + b"x"
            ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0)
            raw.sendto(ip + source + socket.inet_aton(world.HOST4) + udp, (world.HOST4, 0))
            if n % 500 == 499:
                time.sleep(0.02)
        guest.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while True:
                guest.recv(100)
        assert ask() == first
        raw.close()


def test_a_published_port_is_shared_with_nobody(world):
    """Another user could steal its datagrams by SO_REUSEADDR."""
    world.pysplice("--config-net", *NONE, "-u", "5000", "-t", "5000")
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        for address in ("127.0.0.1", world.HOST4, "0.0.0.0"):
            with world.host.socket(socket.AF_INET, kind) as thief, pytest.raises(OSError) as raised:
                thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                thief.bind((address, 5000))
                thief.listen() if kind == socket.SOCK_STREAM else None
            assert raised.value.errno == errno.EADDRINUSE


# Processes


def test_what_the_guest_runs_has_no_descriptor_of_ours(world, tmp_path):
    code = (
        "import os; print(sorted(int(f) for f in os.listdir('/proc/1/fd')), "
        "sorted(int(f) for f in os.listdir('/proc/self/fd'))[:-1])"
    )
    files = [str(tmp_path / name) for name in ("log", "pid", "pcap", "trace", "ctl")]
    options = zip(("-l", "-P", "-p", "--trace-window", "--control"), files, strict=True)
    out = python(world, code, *NONE, *(word for pair in options for word in pair))
    assert out.splitlines()[-1] == "[0, 1, 2] [0, 1, 2]"


LOW_PORTS, NET_ADMIN, SYS_ADMIN = 1 << 10, 1 << 12, 1 << 21


@pytest.mark.parametrize(
    ("options", "of_the_follower"), (((), 0), (("--follow-host",), NET_ADMIN | SYS_ADMIN))
)
def test_our_processes_cannot_be_looked_into(world, tmp_path, options, of_the_follower):
    """The one that serves, the one that keeps socket files, the one in the namespace, and the one that follows."""
    process = world.pysplice(
        "--config-net", *NONE, *options, "-t", "8080:80", "--control", str(tmp_path / "ctl")
    )
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    pids = [process.pid]
    with open(children) as file:
        pids += map(int, file.read().split())
    assert len(pids) == 4
    for pid, allowed in zip(
        pids, (LOW_PORTS, LOW_PORTS, LOW_PORTS, of_the_follower or LOW_PORTS), strict=True
    ):
        with open(f"/proc/{pid}/status") as file:
            status = dict(line.split(":\t", 1) for line in file.read().splitlines() if ":\t" in line)
        assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
        assert int(status["CapEff"], 16) & ~allowed == 0


def test_a_guest_that_sees_our_processes_cannot_look_into_them(world, tmp_path):
    """Not even into the one that has joined its user namespace, where it is root."""
    code = """
import os
seen = 0
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        text = open(f"/proc/{pid}/status").read()
        if "Seccomp:\\t2" not in text or "NoNewPrivs:\\t1" not in text:
            continue
        seen += 1
        for what in ("root", "exe", "fd"):
            print("open", what, os.listdir(f"/proc/{pid}/fd") if what == "fd" else os.readlink(f"/proc/{pid}/{what}"))
    except PermissionError:
        print("denied")
    except OSError:
        pass
print(seen)
"""
    out = python(world, code, "--no-pidns", "--control", str(tmp_path / "ctl"), *NONE[:6], "-U", "9000")
    assert "open" not in out and int(out.split()[-1]) == out.count("denied") >= 3


def test_in_the_background_we_are_process_1_of_a_namespace(world, tmp_path):
    pid = tmp_path / "pid"
    world.host.run(*PYSPLICE, *NONE, "--netns", world.guest.path, "-P", str(pid))
    until(lambda: pid.exists() and pid.read_text())
    number = int(pid.read_text())
    try:
        with open(f"/proc/{number}/status") as file:
            (line,) = [line for line in file if line.startswith("NSpid")]
        assert line.split()[1:] == [str(number), "1"]
    finally:
        os.kill(number, 15)


@pytest.mark.parametrize("options", ((), ("--new-session",)))
def test_a_command_pushes_no_input_into_the_terminal(world, options):
    code = (
        "import fcntl, os\n"
        "for request in (0x5412, 0x541c):\n"
        "    try: fcntl.ioctl(0, request, b'x'); print('pushed')\n"
        "    except OSError as e: print(e.errno)\n"
        "print(os.getsid(0) == os.getppid() or os.getsid(0))"
    )
    words = (*PYSPLICE, "--config-net", *NONE, *options, "--", sys.executable, "-c", code)
    controller, terminal = os.openpty()
    process = world.host.spawn(
        *words, stdin=terminal, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    out, _ = process.communicate(timeout=20)
    os.close(controller)
    os.close(terminal)
    assert out.split()[:2] == [str(errno.EPERM)] * 2


# What one may hold


def test_idle_clients_leave_the_guest_its_share(world, tmp_path):
    folder = tmp_path / "pid"
    words = ("prlimit", "--nofile=300:300", *PYSPLICE, "-f", "--config-net", *NONE, "-t", "8080:80")
    process = world.host.spawn(
        *words, "--netns", world.guest.path, "-P", str(folder), stderr=subprocess.DEVNULL
    )
    clients = []
    try:
        until(lambda: folder.exists() and folder.read_text())
        with world.guest.listen("0.0.0.0", 80, backlog=600), world.remote.listen(world.REMOTE4) as listener:
            for _ in range(400):
                # Those that are too many are reset, maybe before connect() has returned
                with contextlib.suppress(ConnectionResetError):
                    clients.append(world.remote.connect(world.HOST4, 8080))
            held = len(os.listdir(f"/proc/{process.pid}/fd"))
            with world.guest.connect(world.REMOTE4, listener.getsockname()[1]) as guest:
                remote, _ = listener.accept()
                guest.sendall(b"x")
                assert remote.recv(1) == b"x"
                remote.close()
            assert held < 200
    finally:
        for client in clients:
            client.close()
        stop(process)


def test_unanswered_connects_do_not_keep_others_out(world):
    world.pysplice("--config-net", *NONE)
    world.host.run("ip", "route", "add", "198.51.100.0/24", "via", world.REMOTE4)
    socks = []
    with world.remote.listen(world.REMOTE4) as listener:
        for n in range(1100):
            sock = world.guest.socket()
            sock.setblocking(False)
            sock.connect_ex((f"198.51.100.{n % 250 + 1}", 1000 + n // 250))
            socks.append(sock)
            if n % 50 == 49:
                time.sleep(0.02)
        with world.guest.connect(world.REMOTE4, listener.getsockname()[1]):
            listener.accept()[0].close()
    for sock in socks:
        sock.close()


# Hosts as they are


@pytest.mark.parametrize("deprecated", (False, True))
def test_a_default_route_without_an_address_of_its_own(world, deprecated):
    """pasta's local mode, not a guest without an address."""
    world.host.run("ip", "addr", "flush", "dev", "veth0")
    if deprecated:
        world.host.run("ip", "addr", "add", f"{world.HOST4}/32", "dev", "veth0", "preferred_lft", "0")
    else:
        world.host.run("ip", "addr", "add", f"{world.HOST4}/32", "dev", "lo")
    world.host.run("ip", "route", "add", world.GATEWAY4, "dev", "veth0", "scope", "link")
    world.host.run("ip", "route", "replace", "default", "via", world.GATEWAY4, "src", world.HOST4)
    with world.remote.listen(world.REMOTE4, 8080) as listener:
        thread = threading.Thread(target=lambda: listener.accept()[0].sendall(b"hello"), daemon=True)
        thread.start()
        code = (
            "import json, socket, subprocess\n"
            f"print(socket.create_connection(('{world.REMOTE4}', 8080), 5).recv(9))\n"
            "print(subprocess.run(['ip', '-br', '-4', 'addr'], capture_output=True, text=True).stdout)"
        )
        out = python(world, code, *NONE)
    assert "b'hello'" in out and "169.254.2.1/16" in out


def test_many_routes(world):
    lines = [
        f"route add 10.{100 + k // 256}.{k % 256}.0/24 via {world.GATEWAY4} dev veth0" for k in range(2000)
    ]
    world.host.run("ip", "-batch", "-", input="\n".join(lines), stdin=None)
    code = "import subprocess; print(len(subprocess.run(['ip', 'route'], capture_output=True).stdout.splitlines()))"
    assert int(python(world, code, *NONE)) == 2002


def test_no_inotify_instance_left(world, tmp_path):
    """The end of a namespace that was named by its path is noticed all the same."""
    pid = tmp_path / "pid"
    code = (
        "import ctypes, sys\n"
        "libc = ctypes.CDLL(None)\n"
        "while libc.inotify_init1(0) >= 0: pass\n"
        "from pysplice.setup import files; files.close_leaked = lambda keep: None\n"
        "from pysplice.__main__ import main; main()"
    )
    path = tmp_path / "netns"
    path.touch()
    world.host.run("mount", "--bind", world.guest.path, str(path))
    process = world.host.spawn(
        sys.executable,
        "-c",
        code,
        "-f",
        *NONE,
        "--netns",
        str(path),
        "-P",
        str(pid),
        stderr=subprocess.PIPE,
    )
    try:
        until(lambda: pid.exists() and pid.read_text())
        world.host.run("umount", str(path))
        path.unlink()
        assert process.wait(10) == 0
    finally:
        stop(process)


def test_it_stays_when_its_target_has_ended(world):
    target = world.guest.spawn("sleep", "60")
    words = (*PYSPLICE, "-f", "--no-netns-quit", *NONE, str(target.pid))
    process = world.host.spawn(*words, stderr=subprocess.PIPE)
    time.sleep(1)
    stop(target)
    time.sleep(1)
    assert process.poll() is None
    assert stop(process) == 0


def test_the_hosts_own_address_moves(world):
    world.pysplice("--config-net", *NONE, "--map-guest-addr", "169.254.1.2")
    with world.host.listen("0.0.0.0", 7100) as listener:
        for address in (world.HOST4, "10.99.0.77"):
            if address != world.HOST4:
                world.host.run("ip", "addr", "del", f"{world.HOST4}/24", "dev", "veth0")
                world.host.run("ip", "addr", "add", f"{address}/24", "dev", "veth0")
                world.host.run("ip", "route", "replace", "default", "via", world.GATEWAY4)
                time.sleep(0.5)
            with world.guest.connect("169.254.1.2", 7100):
                client, peer = listener.accept()
                assert client.getsockname()[0] == address
                client.close()


def test_a_request_is_answered_while_others_flood(world, tmp_path):
    """No work without a bound: a loop that is busy comes round all the same."""
    control = str(tmp_path / "ctl")
    world.pysplice("--config-net", *NONE, "-u", "5000", "--control", control)
    done = threading.Event()

    def flood(source):
        raw = world.remote.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
        for n in range(200_000):
            if done.is_set():
                break
            raw.sendto(struct.pack("!HHHH", 1024 + n % 60_000, 5000, 9, 0) + b"x", (world.HOST4, 0))
        raw.close()

    threads = [threading.Thread(target=flood, args=(n,), daemon=True) for n in range(2)]
    with bound(world.guest, "0.0.0.0", 5000):
        for thread in threads:
            thread.start()
        for _ in range(10):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(10)
                client.connect(control)
                client.sendall(b'{"do": "show"}\n')
                assert json.loads(client.makefile().readline())["ok"]
        done.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("limit", (10, 20, 39, 40, 64))
def test_few_descriptors(world, limit):
    """One line that says how many are needed, or it works."""
    words = ("prlimit", f"--nofile={limit}:{limit}", *PYSPLICE, "--config-net", *NONE, "--", "true")
    result = world.host.run(*words, check=False)
    if limit < 40:
        assert result.returncode == 1
        assert result.stderr == f"pysplice: {limit} descriptors are too few, 40 are needed (ulimit -n)\n"
    else:
        assert (result.returncode, result.stderr) == (0, "")


def test_a_client_that_is_gone_takes_nothing_from_the_others(world):
    """Its ICMP errors meet the listener, which answers the others too."""
    world.pysplice("--config-net", *NONE, "-u", "5000")
    with bound(world.guest, "0.0.0.0", 5000) as guest, bound(world.host, "127.0.0.1") as living:
        peers = []
        for client in (bound(world.host, "127.0.0.1"), living):
            client.sendto(b"x", ("127.0.0.1", 5000))
            peers.append(guest.recvfrom(10)[1])
            if client is not living:
                client.close()
        for n in range(200):
            for peer in peers:
                guest.sendto(b"%d" % n, peer)
            assert living.recv(10) == b"%d" % n


@pytest.mark.parametrize("published", (False, True))
def test_errors_reach_the_guest_from_any_port(world, published):
    world.pysplice("--config-net", *NONE[:2], "-u", "5000" if published else "none", *NONE[4:])
    with bound(world.guest, "0.0.0.0", 5000) as guest, bound(world.remote, world.REMOTE4) as gone:
        address = gone.getsockname()
        gone.close()
        guest.connect(address)
        guest.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            guest.recv(10)


def test_a_dialogue_outlives_others_of_the_same_guest(world, tmp_path):
    """Sockets that nobody answers give way before one that is talked to, whatever else that has asked."""
    pid = tmp_path / "pid"
    words = ("prlimit", "--nofile=1024:1024", *PYSPLICE, "-f", "--config-net", *NONE)
    process = world.host.spawn(
        *words, "--netns", world.guest.path, "-P", str(pid), stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: pid.exists() and pid.read_text())
        with (
            bound(world.guest, "0.0.0.0") as guest,
            bound(world.remote, world.REMOTE4) as server,
            bound(world.remote, world.GATEWAY4) as silent,
        ):
            silent_address = silent.getsockname()
            guest.sendto(b"x", silent_address)
            guest.sendto(b"x", server.getsockname())
            _, peer = server.recvfrom(10)
            server.sendto(b"y", peer)
            assert guest.recv(10) == b"y"
            others = [bound(world.guest, "0.0.0.0") for _ in range(200)]
            for other in others:
                other.sendto(b"x", server.getsockname())
                server.recv(10)
            server.sendto(b"still", peer)
            assert guest.recv(10) == b"still"
            for other in others:
                other.close()
    finally:
        stop(process)
