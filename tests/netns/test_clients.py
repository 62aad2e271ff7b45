"""Real programs: what people run in a container."""

import hashlib
import json
import os
import random
import signal
import subprocess
import time

import pytest

from ..support.namespaces import PYSPLICE, have, run, stop
from ..support.transfer import Background


def need(*programs):
    """Skips with a reason where a program is missing; tests/run installs them all."""
    missing = [program for program in programs if not have(program)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {' '.join(missing)}")


@pytest.fixture(scope="module")
def guest(served):
    """Run a program in the guest's namespace."""

    def call(*words, **kwargs):
        return served.guest.run(*words, **kwargs)

    return call


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Files to serve."""
    directory = tmp_path_factory.mktemp("site")
    directory.chmod(0o755)
    (directory / "big").write_bytes(random.Random(1).randbytes(32 << 20))
    (directory / "small").write_bytes(b"small\n")
    return directory


@pytest.fixture(scope="module")
def nginx(served, site, tmp_path_factory):
    """nginx on the remote host, port 8080, both versions of IP."""
    directory = tmp_path_factory.mktemp("nginx")
    config = directory / "nginx.conf"
    config.write_text(f"""
        daemon off; master_process off; user root root; pid {directory}/pid; error_log {directory}/error.log;
        events {{ worker_connections 1024; }}
        http {{
            access_log off; keepalive_requests 1000000;
            client_body_temp_path {directory}/b; proxy_temp_path {directory}/p;
            fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;
            server {{
                listen {served.REMOTE4}:8080; listen [{served.REMOTE6}]:8080;
                root {site};
            }}
        }}""")
    process = served.remote.spawn("nginx", "-c", str(config))
    wait_for_port(served, 8080)
    yield
    stop(process)


def wait_for_port(world, port, seconds=10):
    until = time.monotonic() + seconds
    while True:
        try:
            world.remote.connect(world.REMOTE4, port).close()
            return
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.05)


def sha(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@need("curl", "nginx")
@pytest.mark.parametrize("version", (4, 6))
def test_curl(served, guest, nginx, site, tmp_path, version):
    address = served.REMOTE4 if version == 4 else f"[{served.REMOTE6}]"
    target = tmp_path / "out"
    guest("curl", "-sSf", "-o", str(target), f"http://{address}:8080/big")
    assert sha(target) == sha(site / "big")
    assert guest("curl", "-sSf", f"http://{address}:8080/small").stdout == "small\n"


def chunked_server(listener, seen):
    """One chunked reply, then the server closes; the second client is to give up half-way."""
    for forever in (False, True):
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(20)
            sock.recv(4096)
            sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
            chunk = b"4000\r\n" + bytes(0x4000) + b"\r\n"
            try:
                for _ in range(1 << 20 if forever else 50):
                    sock.sendall(chunk)
                sock.sendall(b"0\r\n\r\n")
            except (ConnectionResetError, BrokenPipeError) as e:
                seen.append(type(e))


@need("curl")
def test_chunked_reply_and_an_aborted_one(served, guest):
    seen = []
    with served.remote.listen(served.REMOTE4) as listener:
        url = f"http://{served.REMOTE4}:{listener.getsockname()[1]}/"
        serving = Background(chunked_server, listener, seen)
        result = guest("curl", "-sSf", url, "-w", "%{size_download}", "-o", "/dev/null")
        assert result.stdout == str(50 * 0x4000)
        client = served.guest.spawn("curl", "-s", url, "-o", "/dev/null")
        time.sleep(0.5)
        client.send_signal(signal.SIGKILL)
        client.wait()
        serving.result(10)
    assert seen  # the remote host saw the reset


@need("iperf3")
@pytest.mark.parametrize("options", ((), ("-R",), ("--bidir",), ("-P", "8"), ("-6",)))
def test_iperf3(served, options):
    address = served.REMOTE6 if "-6" in options else served.REMOTE4
    server = served.remote.spawn("iperf3", "-s", "-B", address, stdout=subprocess.DEVNULL)
    try:
        wait_for(
            lambda: served.remote.run("iperf3", "-c", address, "-n", "1K", check=False).returncode == 0
        )
        result = served.guest.run("iperf3", "-c", address, "-t", "1", "-J", *options)
        end = json.loads(result.stdout)["end"]
        assert end["sum_received"]["bytes"] > 10 << 20
        if options in ((), ("-6",), ("-P", "8")):
            # The guest is the sender here: nothing is lost on the way to us
            assert end["sum_sent"]["retransmits"] <= 5
    finally:
        stop(server)


def wait_for(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "not in time"
        time.sleep(0.05)


@need("git")
def test_git_clone_over_http(served, guest, tmp_path):
    source = tmp_path / "source"
    run("git", "init", "-q", str(source))
    git = ("git", "-C", str(source), "-c", "user.name=t", "-c", "user.email=t@example.org")
    for i in range(20):
        (source / f"file{i}").write_bytes(random.Random(i).randbytes(100_000))
        run(*git, "add", ".")
        run(*git, "commit", "-qm", f"commit {i}")
    run("git", "clone", "-q", "--bare", str(source), str(tmp_path / "bare.git"))
    run("git", "--git-dir", str(tmp_path / "bare.git"), "update-server-info")
    server = served.remote.spawn(
        "python3", "-m", "http.server", "8090", "--bind", served.REMOTE4, "-d", str(tmp_path),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for_port(served, 8090)
        guest("git", "clone", "-q", f"http://{served.REMOTE4}:8090/bare.git", str(tmp_path / "clone"))
    finally:
        stop(server)
    heads = [
        run("git", "-C", str(tmp_path / name), "rev-parse", "HEAD").stdout for name in ("source", "clone")
    ]
    assert heads[0] == heads[1]
    assert run("git", "-C", str(tmp_path / "clone"), "fsck", "--full").returncode == 0


@need("sshd", "ssh", "scp", "ssh-keygen")
def test_ssh_and_scp_both_ways(served, tmp_path):
    """sshd as an ordinary user of its own namespace, because ours has one user only."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("host", "user"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name))
    (home / "authorized").write_text((home / "user.pub").read_text())
    (home / "passwd").write_text(f"splicer:x:1000:1000::{home}:/bin/sh\nroot:x:0:0::{home}:/bin/sh\n")
    server_script = (
        f"mount --bind {home}/passwd /etc/passwd && mkdir -p /run/sshd && "
        f"exec unshare -U --map-user=1000 --map-group=1000 {sshd_path()} -D -e -p 2222 -h {home}/host "
        f"-o ListenAddress={served.REMOTE4} -o AuthorizedKeysFile={home}/authorized -o StrictModes=no "
        f"-o PidFile=none -o UsePAM=no -o Subsystem='sftp internal-sftp' -f /dev/null"
    )
    log = open(home / "log", "w")
    server = served.remote.spawn("unshare", "-m", "sh", "-c", server_script, stderr=log)
    options = (
        "-F", "/dev/null", "-i", str(home / "user"), "-o", "StrictHostKeyChecking=no",
        "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "IdentitiesOnly=yes",
    )  # fmt: skip
    there = f"splicer@{served.REMOTE4}"
    try:
        wait_for_port(served, 2222)
        result = served.guest.run(
            "ssh", "-p", "2222", *options, there, "echo hello; cat", input="in", stdin=None
        )
        assert result.stdout == "hello\nin"
        (home / "data").write_bytes(random.Random(3).randbytes(20 << 20))
        served.guest.run("scp", "-q", "-P", "2222", *options, str(home / "data"), f"{there}:{home}/up")
        served.guest.run("scp", "-q", "-P", "2222", *options, f"{there}:{home}/up", str(home / "down"))
        assert sha(home / "data") == sha(home / "up") == sha(home / "down")
    finally:
        stop(server)
        log.close()


def sshd_path() -> str:
    return next(p for p in ("/usr/sbin/sshd", "/sbin/sshd", "/usr/bin/sshd") if os.path.exists(p))


@need("wrk", "nginx")
def test_wrk(served, guest, nginx):
    """64 connections for two seconds: no errors, and the program is as it was."""
    out = guest("wrk", "-t1", "-c64", "-d2s", f"http://{served.REMOTE4}:8080/small").stdout
    assert "Socket errors" not in out and "Non-2xx" not in out
    assert float(next(line for line in out.splitlines() if "Requests/sec" in line).split()[1]) > 100


@need("dig")
def test_dns_over_tcp(served, guest):
    """A name server of a few lines: dig +tcp gets its answer."""
    import struct

    def serve(listener):
        sock, _ = listener.accept()
        with sock:
            (length,) = struct.unpack("!H", sock.recv(2))
            query = sock.recv(length)
            end = query.index(b"\0", 12) + 5
            answer = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 60, 4) + bytes((192, 0, 2, 99))
            reply = query[:2] + struct.pack("!HHHHH", 0x8580, 1, 1, 0, 0) + query[12:end] + answer
            sock.sendall(struct.pack("!H", len(reply)) + reply)

    with served.remote.listen(served.REMOTE4) as listener:
        serving = Background(serve, listener)
        port = str(listener.getsockname()[1])
        out = guest(
            "dig", "+tcp", "+short", "+noedns", "-p", port, f"@{served.REMOTE4}", "www.example.org"
        ).stdout
        serving.result()
    assert out == "192.0.2.99\n"


@need("curl")
def test_a_command_fetches_a_page(served, nginx):
    """The main job, as the README has it."""
    url = f"http://{served.REMOTE4}:8080/small"
    result = served.host.run(*PYSPLICE, "--config-net", "--", "curl", "-sSf", url)
    assert (result.stdout, result.stderr) == ("small\n", "")
