"""Container engines and sandboxes: what they start, and who calls us how."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from ..support.namespaces import PYSPLICE, run, stop
from ..support.transfer import Background, transfer
from .test_clients import need
from .test_forward import NONE, accept, until

CAPABILITY_SETS = ("bounding", "effective", "permitted")
BUSYBOX = "/bin/busybox"


@pytest.fixture
def pasta(tmp_path):
    """Ourselves under the name that engines look for."""
    path = tmp_path / "bin" / "pasta"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\nfrom pysplice.__main__ import main\nmain()\n")
    path.chmod(0o755)
    return str(path)


# podman: a stand-in that calls as podman 5.8 does


class Podman:
    """A namespace file, and the call for it: argument order, pipes, exit status as podman has them."""

    def __init__(self, world, pasta, folder):
        self.world = world
        self.pasta = pasta
        self.netns = str(folder / "netns-1234")
        self.mounts = None
        self.pid_file = str(folder / "rootless-netns-conn.pid")

    def namespace(self):
        """A network namespace that is kept by a bind mount, as podman makes it."""
        open(self.netns, "w").close()
        run("unshare", "-n", "mount", "--bind", "/proc/self/ns/net", self.netns)

    def call(self, *options, published=(), timeout=15):
        """Start it; its output and how long the pipes were open."""
        words = [self.pasta, "--config-net", *options]
        for option, spec in published:
            words += [option, spec]
        if "--dns-forward" not in options:
            words += ["--dns-forward", "169.254.1.1"]
        for option in ("-t", "-u", "-T", "-U"):
            if option not in [name for name, _ in published]:
                words += [option, "none"]
        words += ["--no-map-gw", "--quiet", "--netns", self.netns, "--map-guest-addr", "169.254.1.2"]
        process = subprocess.Popen(
            self.world.host.enter(*words),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        out, err = process.communicate(timeout=timeout)
        return process.returncode, out, err

    def inside(self, *words, **kwargs):
        return run("nsenter", f"--net={self.netns}", "--", *words, **kwargs)

    def remove(self):
        run("umount", self.netns, check=False)
        os.unlink(self.netns)


@pytest.fixture
def podman(world, pasta, tmp_path):
    made = Podman(world, pasta, tmp_path)
    made.namespace()
    yield made
    if os.path.exists(made.netns):
        made.remove()


def pids_of(netns):
    """Processes of ours that serve this namespace."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    if netns.encode() in file.read().split(b"\0"):
                        found.append(int(name))
            except OSError:
                continue
    return found


SERVER = "import socket; s = socket.create_server(('', 80)); c, a = s.accept(); c.sendall(a[0].encode()); c.close()"


def serve_once(podman, code=SERVER):
    process = subprocess.Popen(["nsenter", f"--net={podman.netns}", "--", sys.executable, "-c", code])
    until(lambda: ":80 " in podman.inside("ss", "-Hltn").stdout)
    return process


def test_podman_runs_a_container(podman):
    world = podman.world
    status, out, err = podman.call(
        published=[("-t", f"{world.HOST4}/8080-8080:80-80"), ("-u", "5555-5555:80-80")]
    )
    assert (status, out, err) == (0, "", "")
    # It reads the addresses at once
    assert f"inet {world.HOST4}/24" in podman.inside("ip", "addr").stdout
    assert f"default via {world.GATEWAY4}" in podman.inside("ip", "route").stdout

    server = serve_once(podman)
    with world.remote.connect(world.HOST4, 8080) as client:
        assert client.recv(100).decode() == client.getsockname()[0]
    assert server.wait(10) == 0

    # The host's own address by another name, and not by the gateway's
    with world.host.listen(world.HOST4, 9000) as listener:
        code = "import socket; socket.create_connection(('169.254.1.2', 9000), 5)"
        podman.inside(sys.executable, "-c", code)
        _, peer = accept(listener)
        assert peer[0] == world.HOST4
    with world.host.listen("127.0.0.1", 9001):
        code = f"import socket; socket.create_connection(('{world.GATEWAY4}', 9001), 5)"
        assert podman.inside(sys.executable, "-c", code, check=False).returncode == 1

    pids = pids_of(podman.netns)
    assert pids
    podman.remove()
    until(lambda: not pids_of(podman.netns), 5)


def test_podman_with_more_than_one_container(podman):
    """A shared one is ended by a signal, to the process that the file names."""
    status, out, err = podman.call("--pid", podman.pid_file)
    assert (status, out, err) == (0, "", "")
    text = open(podman.pid_file).read()
    pid = int(text)
    assert text == f"{pid}\n"
    assert os.getsid(pid) == pid
    assert all(os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null" for fd in range(3))
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    os.kill(pid, signal.SIGTERM)
    until(lambda: not pids_of(podman.netns), 5)
    podman.remove()


def test_podman_hears_why_it_cannot_be(podman):
    with podman.world.host.listen("0.0.0.0", 8080):
        status, out, err = podman.call(published=[("-t", "8080-8080:80-80")])
    assert (status, out) == (1, "")
    assert err == "pasta: cannot listen on port 8080 (tcp): Address already in use\n"
    assert not pids_of(podman.netns)


def test_podman_repeats_options_and_the_later_one_wins(podman):
    status, _, err = podman.call(
        "-a", "10.7.0.2", "-a", "10.8.0.2", "-n", "24", "-I", "eth7", "--mtu", "1400"
    )
    assert (status, err) == (0, "")
    out = podman.inside("ip", "addr", "show", "eth7").stdout
    assert "inet 10.8.0.2/24" in out and "mtu 1400" in out and "10.7.0.2" not in out


def test_podman_publishes_ranges_of_ipv6(podman):
    status, _, err = podman.call(
        published=[("-t", "::1/5200-5202:5201-5203"), ("-t", "127.0.0.1/5300-5300:80-80")]
    )
    assert (status, err) == (0, "")
    listening = podman.world.host.run("ss", "-Hltn").stdout
    for address in ("[::1]:5200", "[::1]:5202", "127.0.0.1:5300"):
        assert address in listening


def test_podman_is_not_kept_waiting(podman):
    begun = time.monotonic()
    assert podman.call()[0] == 0
    assert time.monotonic() - begun < 5  # a held pipe would take 15 s


def test_the_tap_has_the_name_of_the_hosts_interface(podman):
    assert podman.call()[0] == 0
    assert "veth0" in podman.inside("ip", "link").stdout


# An OCI runtime on a namespace that is served


def bundle(folder, netns, *words):
    """An OCI bundle whose root file system is busybox."""
    root = folder / "rootfs"
    for name in ("bin", "www", "proc", "dev", "tmp"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for name in ("sh", "httpd", "wget", "ip", "sha256sum", "dd", "nc", "nslookup"):
        (root / "bin" / name).symlink_to("busybox")
    config = {
        "ociVersion": "1.0.0",
        "process": {
            "user": {"uid": 0, "gid": 0}, "args": list(words), "env": ["PATH=/bin"], "cwd": "/",
            "noNewPrivileges": True, "capabilities": {kind: ["CAP_NET_BIND_SERVICE"] for kind in CAPABILITY_SETS},
        },
        "root": {"path": "rootfs"},
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "linux": {
            "namespaces": [
                *({"type": kind} for kind in ("pid", "ipc", "uts", "mount")),
                {"type": "network", "path": netns},
            ]
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return root


@need("crun")
@pytest.mark.skipif(not os.path.exists(BUSYBOX), reason="not installed: busybox-static")
def test_a_container(world, tmp_path):
    """httpd in a real container, published; and downloads from within it, bytes compared."""
    world.pysplice("--config-net", *NONE, "-t", "8080:80", "-u", "8080:80")
    root = bundle(tmp_path, world.guest.path, "/bin/httpd", "-f", "-p", "80", "-h", "/www")
    data = os.urandom(8 << 20)
    (root / "www/data").write_bytes(data)
    # A control group of its own is not ours to give here; crun wants to see which kind there is
    crun = (
        f"mount -t tmpfs none /sys/fs/cgroup && exec crun --root {tmp_path}/state --cgroup-manager=disabled"
    )
    container = subprocess.Popen(["unshare", "-m", "sh", "-c", f"{crun} run -b {tmp_path} web"])
    try:

        def fetched():
            out = world.remote.run(
                "curl", "-sf", "-o", f"{tmp_path}/got", f"http://{world.HOST4}:8080/data", check=False
            )
            return out.returncode == 0

        until(fetched)
        assert (tmp_path / "got").read_bytes() == data
        with world.remote.listen(world.REMOTE4) as listener:
            port = listener.getsockname()[1]
            with subprocess.Popen(
                ["sh", "-c", f"{crun} exec web /bin/nc {world.REMOTE4} {port}"], stdout=subprocess.PIPE
            ) as inside:
                reading = Background(inside.stdout.read)
                server, peer = accept(listener)
                assert peer[0] == world.HOST4
                with server:
                    server.sendall(data)
                assert reading.result() == data
    finally:
        run("sh", "-c", f"{crun} kill web KILL", check=False)
        container.wait(10)


# Sandboxes


@need("bwrap")
def test_bubblewrap(world, tmp_path):
    """bwrap tells the process ID and waits; we serve it, and end with it."""
    info_read, info_write = os.pipe()
    block_read, block_write = os.pipe()
    sandbox = world.host.spawn(
        *(
            "bwrap",
            "--unshare-net",
            "--unshare-user",
            "--bind",
            "/",
            "/",
            "--dev",
            "/dev",
            "--proc",
            "/proc",
        ),
        *("--info-fd", str(info_write), "--block-fd", str(block_read)),
        *(sys.executable, "-c", SERVER),
        pass_fds=(info_write, block_read),
    )
    os.close(info_write)
    os.close(block_read)
    text = b""
    while b"}" not in text:
        text += os.read(info_read, 1000)
    pid = json.loads(text)["child-pid"]
    process = world.host.spawn(*PYSPLICE, "-f", "--config-net", *NONE, "-t", "8080:80", str(pid))
    try:
        until(lambda: ":8080 " in world.host.run("ss", "-Hltn").stdout)
        os.write(block_write, b"1")

        def answered():
            try:
                with world.remote.connect(world.HOST4, 8080) as client:
                    return client.recv(100)
            except OSError:
                return b""

        assert until(answered).decode() == world.REMOTE4
        assert sandbox.wait(10) == 0
        assert process.wait(10) == 0
    finally:
        stop(process)
        stop(sandbox)


# Services that people publish


@need("redis-server", "redis-cli")
def test_redis(world, tmp_path):
    world.pysplice("--config-net", *NONE, "-t", "6379", "-T", "7000:7000")
    words = (
        "redis-server",
        "--save",
        "",
        "--dir",
        str(tmp_path),
        "--protected-mode",
        "no",
        "--bind",
        "0.0.0.0",
        "::",
    )
    server = world.guest.spawn(*words, stdout=subprocess.DEVNULL)
    try:
        until(lambda: ":6379 " in world.guest.run("ss", "-Hltn").stdout)
        for namespace, address in (
            (world.remote, world.HOST4),
            (world.remote, world.HOST6),
            (world.host, "127.0.0.1"),
            (world.host, "::1"),
        ):
            value = os.urandom(2000).hex()
            cli = ("redis-cli", "-h", address)
            assert namespace.run(*cli, "set", "key", value).stdout == "OK\n"
            assert namespace.run(*cli, "get", "key").stdout == value + "\n"
    finally:
        stop(server)


@need("socat")
def test_socat_and_a_unix_socket(world, tmp_path):
    """The published UNIX socket of a container's service, with socat at both ends."""
    path = tmp_path / "service.sock"
    world.pysplice("--config-net", *NONE, "-t", f"unix:{path}:7")
    echo = world.guest.spawn("socat", "TCP-LISTEN:7,fork,reuseaddr", "EXEC:cat")
    try:
        until(lambda: ":7 " in world.guest.run("ss", "-Hltn").stdout)
        data = os.urandom(300_000)
        result = subprocess.run(
            ["socat", "-t5", "-", f"UNIX-CONNECT:{path}"],
            input=data,
            capture_output=True,
            timeout=30,
            check=True,
        )
        assert result.stdout == data
    finally:
        stop(echo)


@need("iperf3")
@pytest.mark.parametrize("reverse", ((), ("-R",)))
def test_iperf3_udp_through_a_published_port(world, reverse):
    """20 Mbit/s of datagrams with nothing lost."""
    world.pysplice("--config-net", *NONE, "-t", "5201", "-u", "5201")
    server = world.guest.spawn("iperf3", "-s", "-1", stdout=subprocess.DEVNULL)
    try:
        until(lambda: ":5201 " in world.guest.run("ss", "-Hltn").stdout)
        out = world.remote.run(
            "iperf3",
            "-c",
            world.HOST4,
            "-u",
            "-b",
            "20M",
            "-t",
            "2",
            "-l",
            "1200",
            "-J",
            *reverse,
            timeout=30,
        ).stdout
        end = json.loads(out)["end"]["sum"]
        assert end["packets"] > 3000
        assert end["lost_packets"] <= end["packets"] // 100
    finally:
        stop(server)


# Life


def test_a_log_file(world, tmp_path):
    log = tmp_path / "log"
    log.write_text("old" * 1000)
    process = world.pysplice("--config-net", *NONE, "-d", "-l", str(log), "--log-size", "40960")
    lines = log.read_text().splitlines()
    assert lines[0].startswith("pysplice ") and f"({process.pid})" in lines[0]
    assert log.stat().st_mode & 0o777 == 0o600 or log.stat().st_mode & 0o777 == 0o644
    sizes = []
    with world.remote.listen(world.REMOTE4) as listener:
        for _ in range(800):
            client = world.guest.connect(world.REMOTE4, listener.getsockname()[1])
            server, _ = accept(listener)
            client.close()
            server.close()
            sizes.append(log.stat().st_size)
    assert max(sizes) <= 40960 and sizes[-1] > 20000 and sorted(sizes) != sizes
    process.terminate()
    process.wait(10)
    lines = log.read_text().splitlines()
    assert f"({process.pid})" in lines[0]
    times = [float(line.split(":")[0]) for line in lines[1:]]
    assert times == sorted(times)
    assert process.stderr.read() == ""


def test_what_is_said(world):
    process = world.pysplice("--config-net", *NONE)
    process.terminate()
    process.wait(10)
    assert "gateway 10.99.0.254" in process.stderr.read()
    process = world.pysplice("--config-net", *NONE, "-q", "--tap", "tap1")
    process.terminate()
    process.wait(10)
    assert process.stderr.read() == ""


def test_what_is_said_of_packets(world):
    process = world.pysplice("--config-net", *NONE, "--trace")
    with world.remote.listen(world.REMOTE4) as listener:
        client = world.guest.connect(world.REMOTE4, listener.getsockname()[1])
        server, _ = accept(listener)
        with client, server:
            transfer(client, server, 1, 1000)
    process.terminate()
    process.wait(10)
    lines = process.stderr.read().splitlines()
    assert all(line.split(":")[0].replace(".", "").isdigit() for line in lines)
    assert any("1000 bytes" in line for line in lines)


def test_counts(world):
    process = world.pysplice("--config-net", *NONE, "--stats", "1")
    with world.remote.listen(world.REMOTE4) as listener:
        world.guest.connect(world.REMOTE4, listener.getsockname()[1]).close()
        time.sleep(2.5)
    process.terminate()
    process.wait(10)
    assert "1 connections" in process.stderr.read()


def test_counts_beside_a_command(world):
    out = world.host.run(*PYSPLICE, *NONE, "-f", "--stats", "1", "--", "sleep", "1.5").stderr
    assert "0 connections" in out


def test_what_a_command_gets(world):
    out = world.host.run(*PYSPLICE, "--config-net", *NONE, "-d", "--", "true").stderr
    assert "tap tap0, MAC" in out and f"IPv4: {world.HOST4}/24, gateway {world.GATEWAY4}" in out


def test_a_forwarded_port_below_1024_later_on(world):
    """The one capability that is kept."""
    world.pysplice("--config-net", *NONE, "-t", "auto")
    with world.guest.listen("0.0.0.0", 81) as listener:

        def reached():
            try:
                with world.remote.connect(world.HOST4, 81):
                    return accept(listener)
            except OSError:
                return None

        until(reached, 4)[0].close()


def children_of(process) -> list[int]:
    """The agent, and then the follower."""
    return sorted(map(int, run("pgrep", "-P", str(process.pid)).stdout.split()))


def test_the_process_in_the_namespace_ends_with_us(world):
    process = world.pysplice("--config-net")
    children = children_of(process)
    assert len(children) == 2  # the follower too
    process.kill()
    process.wait(10)
    until(lambda: not any(os.path.exists(f"/proc/{child}") for child in children), 5)


def test_without_the_process_in_the_namespace(world):
    """It is killed: what needs it ends, all else goes on."""
    process = world.pysplice("--config-net", *NONE, "-t", "8080:80")
    os.kill(children_of(process)[0], signal.SIGKILL)
    with world.guest.listen("0.0.0.0", 80) as listener:
        client = world.remote.connect(world.HOST4, 8080)
        server, _ = accept(listener)
        with client, server:
            transfer(client, server, 1, 1 << 20)
        for _ in range(24):
            # As many as were made in advance, then resets
            with contextlib.suppress(OSError), world.host.connect("127.0.0.1", 8080) as client:
                client.sendall(b"x")
                listener.settimeout(0.2)
                listener.accept()[0].close()
        with world.remote.connect(world.HOST4, 8080), accept(listener)[0]:
            pass
    assert process.poll() is None


def test_somebody_else_takes_privileges(world):
    code = (
        "import os, sys; from pysplice.setup import privileges; privileges.drop_privileges(); "
        "sys.argv[1:] = ['--runas', '5', '--', 'true']; from pysplice.__main__ import main; main()"
    )
    result = world.host.run(sys.executable, "-c", code, check=False)
    assert result.returncode == 1
    assert result.stderr == "pysplice: cannot become user 5, group 5: it takes CAP_SETUID\n"


def test_a_process_that_has_gone_on_to_another_user_namespace(world):
    """As those of bubblewrap do: the network namespace is owned by the user namespace before."""
    bare = (
        "setpriv",
        "--bounding-set=-all,+setfcap",
        "--inh-caps=-all",
    )  # nearly those of an ordinary user
    box = world.host.spawn(*bare, "unshare", "-Urn", "unshare", "-U", "sleep", "60")
    try:
        until(lambda: open(f"/proc/{box.pid}/comm").read() == "sleep\n")
        process = world.host.run(*bare, *PYSPLICE, "--config-net", *NONE, str(box.pid))
        assert not process.stderr or "serving process" in process.stderr
        assert "tap0" in run("nsenter", "-t", str(box.pid), "-n", "ip", "link").stdout
    finally:
        stop(box)
