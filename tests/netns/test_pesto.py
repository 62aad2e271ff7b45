"""Ports that pesto(1) changes while there is traffic, and engines that call it."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
import time

import pytest

from pysplice.control import pesto

from ..support.namespaces import PYSPLICE, Namespace, run, stop
from ..support.transfer import transfer
from .test_forward import NONE, accept, open_to, refused, until


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "pesto.sock")


def asked(path, *words: str) -> None:
    """Have pesto do this."""
    assert pesto.main([*words, path]) == 0


def lines(path, capsys) -> list[str]:
    """The rules that pesto shows, without the blanks around them."""
    capsys.readouterr()
    asked(path)
    return [line.strip() for line in capsys.readouterr().out.splitlines() if "=>" in line]


def serve_address(world: Namespace, address: str, port: int):
    """A server that says to each client by which address it knows it."""
    listener = world.listen(address, port)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, peer = listener.accept()
                with sock:
                    sock.sendall(peer[0].encode())

    threading.Thread(target=serve, daemon=True).start()
    return listener


def sees_who_calls(client: Namespace, address: str, port: int) -> bool:
    """True if that server knows the client by its own address."""
    with client.connect(address, port) as sock:
        return sock.recv(100).decode() == sock.getsockname()[0]


@pytest.mark.parametrize("version", (4, 6))
def test_ports_come_and_go(world, path, version, capsys):
    address = world.HOST4 if version == 4 else world.HOST6
    process = world.pysplice("--config-net", *NONE, "-t", "8080:80", "-c", path)
    assert os.stat(path).st_mode & 0o077 == 0
    assert lines(path, capsys) == ["TCP [*]:8080  =>  80"]
    with world.guest.listen("::", 80) as listener:
        assert refused(world.remote, address, 8081)
        asked(path, "-A", "-t", "8081:80", "-T", "9191:91", "-u", "5353:53")
        client = world.remote.connect(address, 8081)
        server, _ = accept(listener)
        with client, server:
            asked(path, "-D", "-t", "8081:80")
            assert refused(world.remote, address, 8081)
            transfer(client, server, 1, 1 << 20)
        assert open_to(world.remote, address, 8080)
    assert lines(path, capsys) == [
        "TCP [*]:8080  =>  80",
        "UDP [*]:5353  =>  53",
        "TCP [*]%lo:9191  =>  91",
    ]
    with world.host.listen("127.0.0.1", 91) as listener:
        with world.guest.connect("127.0.0.1", 9191), accept(listener)[0]:
            pass
    with (
        world.guest.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server,
        world.remote.socket(
            socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM
        ) as client,
    ):
        server.bind(("::", 53))
        client.sendto(b"a question", (address, 5353))
        data, peer = server.recvfrom(100)
        assert data == b"a question"
        server.sendto(b"an answer", peer)
        assert client.recv(100) == b"an answer"
    asked(path, "-C", "HOST", "-C", "SPLICE")
    assert lines(path, capsys) == [] and refused(world.remote, address, 8080)
    assert stop(process) == 0
    assert not os.path.exists(path)


def test_a_port_that_cannot_be_had(world, path, tmp_path, capsys):
    control = str(tmp_path / "control")
    world.pysplice("--config-net", *NONE, "-t", "8080:80", "-c", path, "--control", control)
    with world.host.listen("0.0.0.0", 8099), world.guest.listen("0.0.0.0", 80):
        assert pesto.main(["-A", "-t", "8081:80,8099", "-D", "-t", "8080:80", path]) == 1
        assert capsys.readouterr().err == "cannot listen on port 8099 (tcp): Address already in use\n"
        assert open_to(world.remote, world.HOST4, 8080) and refused(world.remote, world.HOST4, 8081)
    shown = run(*PYSPLICE, "ctl", control, "show").stdout
    assert "refused cannot listen on port 8099 (tcp): Address already in use\n" in shown
    assert '"refused": [\n' in run(*PYSPLICE, "ctl", control, "show", "--json").stdout
    asked(path, "-A", "-t", "8081:80,8099", "-D", "-t", "8080:80")
    assert len(lines(path, capsys)) == 2


def test_a_port_that_leads_elsewhere_is_never_closed(world, path):
    """Clients that connect without a break, while twenty ports are led from one server to the other and back."""
    world.pysplice("--config-net", *NONE, "-t", "8000-8019:80-99", "-c", path)
    ends = [world.guest.listen("0.0.0.0", port, 1024) for port in (*range(80, 100), *range(180, 200))]
    failed: list[str] = []
    done = threading.Event()
    count = 0

    def knock() -> None:
        nonlocal count
        while not done.is_set():
            port = 8000 + random.randrange(20)
            try:
                world.remote.connect(world.HOST4, port).close()
                count += 1
            except OSError as e:
                failed.append(f"{port}: {e}")

    clients = [threading.Thread(target=knock) for _ in range(3)]
    for client in clients:
        client.start()
    before, after = "8000-8019:80-99", "8000-8019:180-199"
    for _ in range(20):
        asked(path, "-D", "-t", before, "-A", "-t", after)
        before, after = after, before
    done.set()
    for client in clients:
        client.join()
    for end in ends:
        end.close()
    assert not failed and count > 20


def test_a_restart_of_containers(world, path, capsys):
    """Twenty ports are deleted and added, again and again, while clients are connected and connecting."""
    world.pysplice("--config-net", *NONE, "-c", path)
    listeners = [world.guest.listen("0.0.0.0", port, 1024) for port in range(80, 100)]
    done = threading.Event()

    def knock() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError):
                world.remote.connect(world.HOST4, 8000 + random.randrange(20)).close()

    clients = [threading.Thread(target=knock) for _ in range(2)]
    for client in clients:
        client.start()
    words = ("-t", "8000-8019:80-99", "-u", "8000-8019:80-99")
    for _ in range(50):
        asked(path, "-A", *words)
        asked(path, "-D", *words)
    asked(path, "-A", *words)
    done.set()
    for client in clients:
        client.join()
    assert len(lines(path, capsys)) == 2
    assert all(open_to(world.remote, world.HOST4, port) for port in range(8000, 8020))
    for listener in listeners:
        listener.close()


def test_many_pestos_at_once(world, path, capsys):
    """Each adds a port of its own: none is lost."""
    world.pysplice("--config-net", *NONE, "-c", path)
    threads = [
        threading.Thread(target=pesto.main, args=(["-A", "-t", str(8000 + n), path],)) for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(path, capsys)) == 20


HOSTILE = (
    b"",
    b"\1",
    b"\1\xff\xff\xff\xff",
    b"\2\0\0\0\0",
    b"x" * 100_000,
    b"\1\0\0\4\0" + bytes(40_000),
    b"{}\n",
)


def test_hostile_clients(world, path, capsys):
    """They stop nothing: not traffic, not another client's update."""
    process = world.pysplice("--config-net", *NONE, "-t", "8080:80", "-c", path)
    with contextlib.ExitStack() as stack, world.guest.listen("0.0.0.0", 80) as listener:
        for n in range(40):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(5)
            client.connect(path)
            with contextlib.suppress(OSError):
                client.sendall(HOSTILE[n % len(HOSTILE)])
        begun = time.monotonic()
        asked(path, "-A", "-t", "8081:80")
        with world.remote.connect(world.HOST4, 8081) as client, accept(listener)[0] as server:
            transfer(client, server, 1, 1 << 20)
        assert time.monotonic() - begun < 4
    assert lines(path, capsys) == ["TCP [*]:8080  =>  80", "TCP [*]:8081  =>  80"]
    assert process.poll() is None


def test_the_tables_of_one_version_of_ip(world, path, capsys):
    world.pysplice("--config-net", "-4", "--no-udp", *NONE, "-c", path)
    asked(path, "-A", "-t", "8081")
    assert lines(path, capsys) == ["TCP [0.0.0.0]:8081  =>  8081"]
    assert pesto.main(["-A", "-u", "53", path]) == 1
    assert "UDP not enabled" in capsys.readouterr().err
    asked(path, "-D", "-t", "8081")
    assert lines(path, capsys) == []


# Engines: containers on a bridge in a namespace that all of them share


@pytest.fixture
def bridge(world, tmp_path):
    """A container at 10.88.0.5 and fd88::5, on a bridge in the guest's namespace."""
    guest = world.guest
    container = Namespace(f"{guest.name}-box")
    for words in (
        "link add br0 type bridge",
        "addr add 10.88.0.1/16 dev br0",
        "addr add fd88::1/64 dev br0 nodad",
        f"link add box0 type veth peer name eth0 netns {container.path}",
        "link set box0 master br0 up",
        "link set br0 up",
    ):
        guest.run("ip", *words.split())
    guest.sysctl("net.ipv4.ip_forward", "1")
    guest.sysctl("net.ipv6.conf.all.forwarding", "1")
    for words in (
        "addr add 10.88.0.5/16 dev eth0",
        "addr add fd88::5/64 dev eth0 nodad",
        "link set eth0 up",
        "route add default via 10.88.0.1",
        "-6 route add default via fd88::1",
    ):
        container.run("ip", *words.split())
    yield container
    container.delete()


def command(tmp_path, name: str) -> str:
    """Ourselves under another name."""
    made = tmp_path / name
    made.write_text(f"#!{sys.executable}\nfrom pysplice.__main__ import main\nmain()\n")
    made.chmod(0o755)
    return str(made)


def test_a_container_on_a_bridge_sees_who_calls(world, bridge, path, tmp_path):
    """As podman 6 and rootlesskit 3.1 do it: pasta without ports, and a call of pesto for each container."""
    words = [command(tmp_path, "pasta"), "--config-net", "-f", "-c", path, "--no-map-gw", "--quiet"]
    for option in ("-t", "-u", "-T", "-U"):
        words += [option, "none"]
    process = world.host.spawn(*words, "--netns", world.guest.path, stderr=subprocess.PIPE, text=True)
    servers = [serve_address(bridge, address, 80) for address in ("10.88.0.5", "fd88::5")]
    call = command(tmp_path, "pesto")
    published = (
        f"{world.HOST4}/8080-8080:10.88.0.5/80-80", f"{world.HOST6}/8080-8080:fd88::5/80-80",
    )  # fmt: skip
    try:
        until(lambda: os.path.exists(path))
        until(lambda: "default" in world.guest.run("ip", "-6", "route").stdout)
        for spec in published:
            assert run(call, "-A", "-t", spec, path).stderr == ""
        run(call, "-A", "-u", f"{world.HOST4}/5353-5353:10.88.0.5/53-53", path)
        run(call, "-A", "-u", f"{world.HOST6}/5353-5353:fd88::5/53-53", path)
        assert sees_who_calls(world.remote, world.HOST4, 8080)
        assert sees_who_calls(world.remote, world.HOST6, 8080)
        for family, address, host, remote in (
            (socket.AF_INET, "10.88.0.5", world.HOST4, world.REMOTE4),
            (socket.AF_INET6, "fd88::5", world.HOST6, world.REMOTE6),
        ):
            with (
                bridge.socket(family, socket.SOCK_DGRAM) as server,
                world.remote.socket(family, socket.SOCK_DGRAM) as client,
            ):
                server.bind((address, 53))
                client.bind((remote, 0))
                client.sendto(b"a question", (host, 5353))
                data, peer = server.recvfrom(100)
                assert (data, peer[0]) == (b"a question", remote)
                server.sendto(b"an answer", peer)
                assert client.recv(100) == b"an answer"
        # What the container calls leaves with the host's address, as ever
        with world.remote.listen(world.REMOTE4, 7000) as listener, bridge.connect(world.REMOTE4, 7000):
            sock, peer = accept(listener)
            sock.close()
            assert peer[0] == world.HOST4
        for spec in published:
            run(call, "-D", "-t", spec, path)
        assert refused(world.remote, world.HOST4, 8080) and refused(world.remote, world.HOST6, 8080)
    finally:
        for server in servers:
            server.close()
        stop(process)


def test_probes_of_engines(tmp_path):
    for words, begins in (
        (("pasta", "--version"), "pasta "),
        (("pasta", "--host-lo-to-ns-lo", "--version"), "pasta "),
        (("pesto", "--version"), "pesto "),
    ):
        result = run(command(tmp_path, words[0]), *words[1:])
        assert result.stdout.startswith(begins) and not result.stderr
    assert "--conf-path" in run(command(tmp_path, "pasta"), "--help").stdout
