"""A host that changes while a guest is served: name servers, addresses, routes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ..support.namespaces import PYSPLICE, Namespace, stop
from ..support.transfer import transfer
from .test_forward import NONE, accept, open_to, until


def lines_of(process: subprocess.Popen, into: list[str]) -> None:
    """Keep the lines that a process prints on stderr."""

    def read() -> None:
        with contextlib.suppress(ValueError):
            for line in process.stderr:
                into.append(line.rstrip())

    threading.Thread(target=read, daemon=True).start()


def said(log: list[str], text: str) -> bool:
    return any(text in line for line in log)


# Name servers


@pytest.fixture
def servers(world):
    """Two name servers, which answer with their own names."""
    sockets = []
    for address in (world.REMOTE4, world.GATEWAY4):
        sock = world.remote.socket(kind=socket.SOCK_DGRAM)
        sock.settimeout(None)
        sock.bind((address, 53))
        sockets.append(sock)

        def serve(sock=sock, address=address) -> None:
            with contextlib.suppress(OSError, TypeError):  # a socket that is shut down has no peer
                while True:
                    _, peer = sock.recvfrom(100)
                    sock.sendto(address.encode(), peer)

        threading.Thread(target=serve, daemon=True).start()
    yield (world.REMOTE4, world.GATEWAY4)
    for sock in sockets:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()


def asked(guest: Namespace, address: str) -> str:
    """Who answers a query to this address."""
    with guest.socket(kind=socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        sock.sendto(b"who?", (address, 53))
        with contextlib.suppress(OSError):
            return sock.recv(100).decode()
    return ""


def written(etc: Path, text: str) -> None:
    (etc / "resolv.conf").write_text(text)


def renamed(etc: Path, text: str) -> None:
    (etc / "resolv.conf.new").write_text(text)
    (etc / "resolv.conf.new").rename(etc / "resolv.conf")


def removed_and_made(etc: Path, text: str) -> None:
    (etc / "resolv.conf").unlink()
    time.sleep(0.3)
    (etc / "resolv.conf").write_text(text)


def linked(etc: Path, text: str) -> None:
    """As systemd-resolved has it: the file is elsewhere, and is replaced there."""
    (etc / "run").mkdir(exist_ok=True)
    (etc / "run" / "stub.conf").write_text("nameserver 192.0.2.1\n")
    (etc / "link").symlink_to("run/stub.conf")
    (etc / "link").rename(etc / "resolv.conf")
    time.sleep(0.6)
    (etc / "run" / "stub.new").write_text(text)
    (etc / "run" / "stub.new").rename(etc / "run" / "stub.conf")


@pytest.mark.parametrize("way", (written, renamed, removed_and_made, linked))
def test_other_name_servers(world, servers, tmp_path, way):
    etc = tmp_path / "etc"
    etc.mkdir()
    for name in ("passwd", "group", "nsswitch.conf"):
        if os.path.exists(f"/etc/{name}"):
            (etc / name).write_bytes(Path(f"/etc/{name}").read_bytes())
    first, second = servers
    written(etc, f"nameserver {first}\n")
    words = (
        *PYSPLICE,
        "-f",
        "--netns",
        world.guest.path,
        "--config-net",
        *NONE,
        "--dns-forward",
        "10.1.1.1",
    )
    script = f"mount --bind {etc} /etc && exec {' '.join(words)}"
    process = world.host.spawn("unshare", "-m", "sh", "-c", script, stderr=subprocess.PIPE, text=True)
    log: list[str] = []
    lines_of(process, log)
    try:
        until(lambda: "default" in world.guest.run("ip", "route").stdout)
        until(lambda: asked(world.guest, "10.1.1.1") == first)
        way(etc, f"nameserver {second}\n")
        until(lambda: asked(world.guest, "10.1.1.1") == second)
        until(lambda: said(log, f"the host's name servers: {second}"))
        written(etc, "")
        until(lambda: said(log, "the host's name servers: none"))
    finally:
        process.terminate()
        process.wait(10)


# Addresses and routes


NEW4, NEW_REMOTE4, NEW_GATEWAY4 = "10.79.0.1", "10.79.0.2", "10.79.0.254"
NEW6, NEW_REMOTE6, NEW_GATEWAY6 = "fd79::1", "fd79::2", "fd79::fe"


def move(world) -> None:
    """The host's interface goes, and another one comes, in another network."""
    world.host.run("ip", "link", "del", "veth0")
    words = ("link", "add", "wlan0", "type", "veth", "peer", "name", "wlan1", "netns", world.remote.path)
    world.host.run("ip", *words)
    for namespace, device, addresses in (
        (world.host, "wlan0", (f"{NEW4}/24", f"{NEW6}/64")),
        (
            world.remote,
            "wlan1",
            (f"{NEW_REMOTE4}/24", f"{NEW_GATEWAY4}/24", f"{NEW_REMOTE6}/64", f"{NEW_GATEWAY6}/64"),
        ),
    ):
        for address in addresses:
            more = ["nodad"] if ":" in address else []
            namespace.run("ip", "addr", "add", address, "dev", device, *more)
        namespace.run("ip", "link", "set", device, "up")
    world.host.run("ip", "route", "add", "default", "via", NEW_GATEWAY4)
    world.host.run("ip", "-6", "route", "add", "default", "via", NEW_GATEWAY6)


def reaches(world, address: str) -> str:
    """The address by which a server of the remote host's knows the guest, empty if it cannot be reached."""
    with world.remote.listen(address, 7000) as listener:
        try:
            client = world.guest.connect(address, 7000)
        except OSError:
            return ""
        with client:
            sock, peer = accept(listener)
            sock.close()
            return peer[0]


def addresses(world, *options: str) -> str:
    return world.guest.run("ip", *options, "addr", "show", "dev", "tap0").stdout


@pytest.mark.parametrize("follow", (True, False))
def test_another_network(world, follow):
    options = ("--follow-host",) if follow else ()
    process = world.pysplice(
        "--config-net", *options, "--map-guest-addr", "169.254.1.2", "-t", "8080:80", *NONE[2:]
    )
    log: list[str] = []
    lines_of(process, log)
    assert reaches(world, world.REMOTE4) == world.HOST4
    with (
        world.host.listen("127.0.0.1", 9000) as listener,
        world.guest.connect(world.GATEWAY4, 9000) as client,
        accept(listener)[0] as server,
    ):
        move(world)
        until(lambda: said(log, f"the host's IPv4: {NEW4}/24, gateway {NEW_GATEWAY4}, wlan0"))
        until(lambda: said(log, f"the host's IPv6: {NEW6}/64, gateway {NEW_GATEWAY6}, wlan0"))
        if follow:
            until(lambda: f"inet {NEW4}/24" in addresses(world))
            until(lambda: f"via {NEW_GATEWAY4}" in world.guest.run("ip", "route").stdout)
            assert f"via {world.GATEWAY4}" not in world.guest.run("ip", "route").stdout
            assert f"inet6 {NEW6}/64" in addresses(world)
            assert f"src {NEW4}" in world.guest.run("ip", "route", "get", "192.0.2.1").stdout
            assert f"src {NEW6}" in world.guest.run("ip", "route", "get", "2001:db8::1").stdout
        else:
            assert NEW4 not in addresses(world) and NEW6 not in addresses(world)
        # What did not need the network that is gone lives on
        transfer(client, server, 1, 1 << 20)
        transfer(server, client, 1, 1 << 20)
    for address, own in ((NEW_REMOTE4, NEW4), (NEW_REMOTE6, NEW6)):
        assert reaches(world, address) == own
    with world.guest.listen("0.0.0.0", 80) as listener, world.remote.connect(NEW4, 8080) as client:
        sock, peer = accept(listener)
        sock.close()
        assert peer[0] == client.getsockname()[0]
    # The host's own address, by another name
    with world.host.listen("0.0.0.0", 7100) as listener, world.guest.connect("169.254.1.2", 7100):
        accept(listener)[0].close()
    gateway = NEW_GATEWAY4 if follow else world.GATEWAY4
    with world.host.listen("127.0.0.1", 9001) as listener, world.guest.connect(gateway, 9001):
        accept(listener)[0].close()
    assert process.poll() is None


def source(world) -> str:
    """What the guest's kernel says of the way to somewhere outside."""
    return world.guest.run("ip", "route", "get", "192.0.2.1", check=False).stdout


def test_back_again(world):
    """A network that goes and comes again: the guest's address is used for new connections again."""
    process = world.pysplice("--config-net", "--follow-host", *NONE)
    log: list[str] = []
    lines_of(process, log)
    world.host.sysctl("net.ipv4.conf.all.promote_secondaries", "1")
    host4, prefix = world.HOST4, "dev veth0"
    for n in range(2):
        world.host.run("ip", "addr", "add", f"10.99.0.{7 + n}/24", "dev", "veth0")
        world.host.run("ip", "addr", "del", f"{host4}/24", *prefix.split())
        world.host.run("ip", "route", "replace", "default", "via", world.GATEWAY4)
        until(
            lambda n=n: f"src 10.99.0.{7 + n}" in world.guest.run("ip", "route", "get", "192.0.2.1").stdout
        )
        host4 = f"10.99.0.{7 + n}"
    world.host.run("ip", "addr", "add", f"{world.HOST4}/24", "dev", "veth0")
    world.host.run("ip", "addr", "del", f"{host4}/24", "dev", "veth0")
    world.host.run("ip", "route", "replace", "default", "via", world.GATEWAY4)
    until(lambda: f"src {world.HOST4}" in source(world))
    assert "deprecated" not in world.guest.run("ip", "addr", "show", "to", world.HOST4).stdout
    assert reaches(world, world.REMOTE4) == world.HOST4
    # Without a network the guest keeps what it has
    world.host.run("ip", "link", "set", "veth0", "down")
    until(lambda: said(log, "the host's IPv4: none"))
    assert world.HOST4 in addresses(world, "-4")
    assert process.poll() is None


def test_started_without_a_network(world):
    world.host.run("ip", "link", "set", "veth0", "down")
    world.host.run("ip", "addr", "flush", "dev", "veth0")
    process = world.pysplice("--config-net", *NONE, "--map-guest-addr", "169.254.1.2")
    log: list[str] = []
    lines_of(process, log)
    assert "inet 169.254.2.1/16" in addresses(world)
    world.host.run("ip", "addr", "add", f"{world.HOST4}/24", "dev", "veth0")
    world.host.run("ip", "link", "set", "veth0", "up")
    world.host.run("ip", "addr", "add", f"{world.HOST6}/64", "dev", "veth0", "nodad")
    world.host.run("ip", "route", "add", "default", "via", world.GATEWAY4)
    world.host.run("ip", "-6", "route", "add", "default", "via", world.GATEWAY6)
    until(lambda: f"inet6 {world.HOST6}/64" in addresses(world))
    until(lambda: f"inet {world.HOST4}/24" in addresses(world))
    for address, own in ((world.REMOTE4, world.HOST4), (world.REMOTE6, world.HOST6)):
        until(lambda address=address, own=own: reaches(world, address) == own)
    with world.host.listen("0.0.0.0", 7100) as listener, world.guest.connect("169.254.1.2", 7100):
        accept(listener)[0].close()
    assert process.poll() is None


# The follower


def followers(process: subprocess.Popen) -> list[int]:
    """Children of the serving process that watch the host: the one with an inotify instance."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = []
    for child in map(int, children):
        with contextlib.suppress(OSError):
            fds = [os.readlink(f"/proc/{child}/fd/{fd}") for fd in os.listdir(f"/proc/{child}/fd")]
            if "anon_inode:inotify" in fds:
                found.append(child)
    return found


def test_the_follower_goes_with_its_process(world):
    process = world.pysplice("--config-net", *NONE)
    (follower,) = followers(process)
    process.send_signal(signal.SIGKILL)
    until(lambda: not os.path.exists(f"/proc/{follower}"))


def test_without_the_follower(world):
    process = world.pysplice("--config-net", *NONE)
    log: list[str] = []
    lines_of(process, log)
    (follower,) = followers(process)
    os.kill(follower, signal.SIGKILL)
    until(lambda: said(log, "the process that follows the host is gone"))
    assert reaches(world, world.REMOTE4) == world.HOST4
    assert stop(process) == 0


def test_many_changes(world):
    """Routes that come and go all the time cost neither the traffic nor much of the processor."""
    process = world.pysplice("--config-net", "--follow-host", *NONE)
    (follower,) = followers(process)
    stat = Path(f"/proc/{follower}/stat")
    done = threading.Event()

    def churn() -> None:
        script = "while :; do ip route add 192.0.2.0/24 via $0; ip route del 192.0.2.0/24; done"
        noisy = world.host.spawn("timeout", "8", "sh", "-c", script, world.GATEWAY4)
        done.wait()
        stop(noisy)

    thread = threading.Thread(target=churn)
    thread.start()
    begun = time.monotonic()
    with world.remote.listen(world.REMOTE4, 7000) as listener:
        while time.monotonic() - begun < 4:
            with world.guest.connect(world.REMOTE4, 7000) as client, accept(listener)[0] as server:
                transfer(client, server, 1, 1 << 20)
    used = sum(map(int, stat.read_text().rsplit(")", 1)[1].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    done.set()
    thread.join()
    # A bound with a lot to spare: without one it looks again at once, all of the time
    assert used < 2
    assert process.poll() is None


def test_in_the_background(world, tmp_path):
    """As it is called by engines, in the background; the process ends with the namespace."""
    pasta = tmp_path / "pasta"
    pasta.write_text(f"#!{sys.executable}\nfrom pysplice.__main__ import main\nmain()\n")
    pasta.chmod(0o755)
    pid = tmp_path / "pid"
    words = (str(pasta), "--config-net", *NONE, "--quiet", "--netns", world.guest.path, "--pid", str(pid))
    world.host.run(*words)
    number = int(pid.read_text())
    move(world)
    until(lambda: reaches(world, NEW_REMOTE4) == NEW4)
    os.kill(number, signal.SIGTERM)
    until(lambda: not os.path.exists(f"/proc/{number}"))


def test_a_router_at_fe80_1(world):
    """The placeholder of a guest that began offline is, to the kernel, the same route as the host's is then."""
    world.host.run("ip", "addr", "flush", "dev", "veth0", "scope", "global")
    process = world.pysplice("--config-net", *NONE)
    world.host.run("ip", "-6", "addr", "add", f"{world.HOST6}/64", "dev", "veth0", "nodad")
    world.host.run("ip", "-6", "route", "replace", "default", "via", "fe80::1", "dev", "veth0")
    until(lambda: f"inet6 {world.HOST6}/64" in addresses(world))
    time.sleep(0.3)
    routes = world.guest.run("ip", "-6", "route").stdout
    assert "default via fe80::1 dev tap0" in routes and f"src {world.HOST6}" in routes
    assert process.poll() is None


def test_a_guest_in_which_it_cannot_be_done(world, monkeypatch):
    """Its tap is down: that is said, the other version is not affected, and it is tried again."""
    process = world.pysplice("--config-net", "--follow-host", "-t", "8080:80", *NONE[2:])
    log: list[str] = []
    lines_of(process, log)
    time.sleep(0.5)
    world.guest.run("ip", "link", "set", "tap0", "down")
    world.host.run("ip", "addr", "add", "10.99.0.9/24", "dev", "veth0")
    world.host.run("ip", "addr", "del", f"{world.HOST4}/24", "dev", "veth0")
    world.host.run("ip", "addr", "replace", "10.99.0.9/24", "dev", "veth0")
    world.host.run("ip", "route", "replace", "default", "via", world.GATEWAY4)
    until(lambda: said(log, "the guest's addresses cannot be changed: cannot add route"))
    world.guest.run("ip", "link", "set", "tap0", "up")
    until(
        lambda: "src 10.99.0.9" in world.guest.run("ip", "route", "get", "192.0.2.1", check=False).stdout,
        20,
    )
    # And then it is known to be the guest's
    with world.guest.listen("10.99.0.9", 80) as listener:
        until(lambda: open_to(world.remote, "10.99.0.9", 8080))
        accept(listener)[0].close()
    assert process.poll() is None


def test_a_namespace_without_ipv6(world):
    process = world.pysplice("--config-net", "--follow-host", *NONE)
    log: list[str] = []
    lines_of(process, log)
    world.guest.sysctl("net.ipv6.conf.tap0.disable_ipv6", "1")
    move(world)
    until(lambda: f"inet {NEW4}/24" in addresses(world))
    assert reaches(world, NEW_REMOTE4) == NEW4
    assert not said(log, "cannot be changed")


def test_old_addresses_have_a_bound(world):
    process = world.pysplice("--config-net", "--follow-host", *NONE)
    world.host.sysctl("net.ipv4.conf.all.promote_secondaries", "1")
    before = world.HOST4
    for n in range(20, 28):
        now = f"10.99.0.{n}"
        world.host.run("ip", "addr", "add", f"{now}/24", "dev", "veth0")
        world.host.run("ip", "addr", "del", f"{before}/24", "dev", "veth0")
        world.host.run("ip", "route", "replace", "default", "via", world.GATEWAY4)
        until(lambda now=now: f"src {now}" in source(world))
        # To hosts of its own network, too
        near = world.guest.run("ip", "route", "get", world.REMOTE4).stdout
        assert f"src {now}" in near
        before = now
    assert addresses(world, "-4").count("inet ") <= 6
    assert process.poll() is None
