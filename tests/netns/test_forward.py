"""Ports that lead into the namespace and out of it, through the tap and spliced."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest

from ..support.namespaces import PYSPLICE, ImpairedWorld, run, stop, written
from ..support.transfer import Background, transfer

BOTH = pytest.mark.parametrize("version", (4, 6))
LINGER_RESET = struct.pack("ii", 1, 0)
NONE = ("-t", "none", "-u", "none", "-T", "none", "-U", "none")


def until(check, seconds=10):
    """Wait for something to be true."""
    end = time.monotonic() + seconds
    while not (result := check()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return result


def accept(listener):
    listener.settimeout(10)
    sock, peer = listener.accept()
    sock.settimeout(20)
    return sock, peer


def both_ways(client, server, size):
    """Bulk in both directions at once."""
    up = Background(transfer, client, server, 1, size)
    down = Background(transfer, server, client, 2, size)
    up.result()
    down.result()


def host_of(world, version):
    return world.HOST4 if version == 4 else world.HOST6


def any_of(version):
    return "0.0.0.0" if version == 4 else "::"


def loopback(version):
    return "127.0.0.1" if version == 4 else "::1"


def refused(namespace, address, port):
    try:
        namespace.connect(address, port).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        pass  # the listener closed in the middle of the handshake
    return False


def open_to(namespace, address, port):
    return not refused(namespace, address, port)


@pytest.fixture
def forwarded(world):
    """Port 8080 of the host leads to 80 of the guest, TCP and UDP."""
    world.process = world.pysplice("--config-net", *NONE, "-t", "8080:80", "-u", "8080:80")
    return world


@BOTH
def test_a_remote_client_reaches_the_guest_as_itself(forwarded, version):
    with forwarded.guest.listen(any_of(version), 80) as listener:
        client = forwarded.remote.connect(host_of(forwarded, version), 8080)
        server, peer = accept(listener)
        with client, server:
            assert peer[:2] == client.getsockname()[:2]
            both_ways(client, server, 24 << 20)


def test_a_link_local_address_without_an_interface(world):
    """It is that of the interface which the guest's addresses are from, as in pasta."""
    world.host.run("ip", "addr", "add", "fe80::aa/64", "dev", "veth0", "nodad")
    world.remote.run("ip", "addr", "add", "fe80::bb/64", "dev", "veth1", "nodad")
    world.pysplice("--config-net", *NONE, "-t", "fe80::aa/8080-8081:80-81", "-u", "fe80::aa/8080:80")
    index = int(world.remote.run("ip", "-o", "link", "show", "veth1").stdout.split(":")[0])
    with world.guest.listen("::", 80) as listener, world.remote.socket(socket.AF_INET6) as client:
        client.connect(("fe80::aa", 8080, 0, index))
        server, peer = accept(listener)
        with server:
            assert peer[0].partition("%")[0] == "fe80::bb"
            transfer(client, server, 1, 1 << 20)
    assert refused(world.remote, world.HOST6, 8080)


@BOTH
@pytest.mark.parametrize("first", ("client", "server"))
def test_half_close(forwarded, version, first):
    with forwarded.guest.listen(any_of(version), 80) as listener:
        client = forwarded.remote.connect(host_of(forwarded, version), 8080)
        server, _ = accept(listener)
        with client, server:
            one, other = (client, server) if first == "client" else (server, client)
            one.sendall(b"last words")
            one.shutdown(socket.SHUT_WR)
            assert other.recv(100, socket.MSG_WAITALL) and other.recv(100) == b""
            other.sendall(b"answer")
            other.close()
            assert one.recv(100) == b"answer"
            assert one.recv(100) == b""


@BOTH
@pytest.mark.parametrize("first", ("client", "server"))
def test_reset(forwarded, version, first):
    with forwarded.guest.listen(any_of(version), 80) as listener:
        client = forwarded.remote.connect(host_of(forwarded, version), 8080)
        server, _ = accept(listener)
        one, other = (client, server) if first == "client" else (server, client)
        with other:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            one.close()
            with pytest.raises(ConnectionResetError):
                other.recv(1)


@BOTH
def test_nobody_listens(forwarded, version):
    """The connection is established before the guest is asked; then it is reset, maybe before connect() returns."""
    with (
        pytest.raises(ConnectionResetError),
        forwarded.remote.connect(host_of(forwarded, version), 8080) as client,
    ):
        client.recv(1)


def test_many_clients_at_once(forwarded):
    with forwarded.guest.listen("0.0.0.0", 80, backlog=512) as listener:
        clients = [forwarded.remote.connect(forwarded.HOST4, 8080) for _ in range(300)]
        servers = [accept(listener) for _ in clients]
        by_peer = {peer: sock for sock, peer in servers}
        for i, client in enumerate(clients):
            client.sendall(b"%d" % i)
            assert by_peer[client.getsockname()].recv(10) == b"%d" % i
        for sock in (*clients, *by_peer.values()):
            sock.close()


@BOTH
def test_loopback_takes_the_short_cut(forwarded, version):
    """To the guest's own address, which it comes from too; not a frame passes the tap."""
    with forwarded.guest.listen(any_of(version), 80) as listener:
        client = forwarded.host.connect(loopback(version), 8080)
        server, peer = accept(listener)
        with client, server:
            assert peer[0] == host_of(forwarded, version)  # copied from the host
            before = frames(forwarded.guest)
            transfer(client, server, 3, 64 << 20)
            transfer(server, client, 4, 64 << 20)
            assert frames(forwarded.guest) - before < 10


def frames(namespace):
    words = namespace.run("cat", "/proc/net/dev").stdout
    line = next(line for line in words.splitlines() if "tap0" in line)
    fields = line.split(":")[1].split()
    return int(fields[1]) + int(fields[9])


@BOTH
@pytest.mark.parametrize("first", ("client", "server"))
@pytest.mark.parametrize("how", ("half-close", "reset"))
def test_ends_of_a_short_cut(forwarded, version, first, how):
    with forwarded.guest.listen(any_of(version), 80) as listener:
        client = forwarded.host.connect(loopback(version), 8080)
        server, _ = accept(listener)
        with client, server:
            one, other = (client, server) if first == "client" else (server, client)
            if how == "reset":
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
                one.close()
                with pytest.raises(ConnectionResetError):
                    other.recv(1)
                return
            one.sendall(b"x" * 100_000)
            one.shutdown(socket.SHUT_WR)
            got = b""
            while part := other.recv(65536):
                got += part
            assert got == b"x" * 100_000
            other.sendall(b"answer")
            other.close()
            assert one.recv(100) == b"answer" and one.recv(1) == b""


def test_a_short_cut_to_nobody_is_reset(forwarded):
    with pytest.raises(ConnectionResetError), forwarded.host.connect("127.0.0.1", 8080) as client:
        client.recv(1)


def test_a_short_cut_waits_for_a_slow_reader(forwarded):
    """What nobody reads stays in the sender: nothing is held without a bound, and nothing is lost."""
    with forwarded.guest.listen("0.0.0.0", 80) as listener:
        client = forwarded.host.connect("127.0.0.1", 8080)
        server, _ = accept(listener)
        with client, server:
            client.setblocking(False)
            sent = 0
            with contextlib.suppress(BlockingIOError):
                while sent < 1 << 30:
                    sent += client.send(b"z" * 65536)
                    time.sleep(0.0001)
            assert sent < 64 << 20
            client.shutdown(socket.SHUT_WR)
            got = 0
            while part := server.recv(1 << 20):
                got += len(part)
            assert got == sent


def test_thousand_short_cuts_leave_nothing_behind(forwarded):
    def descriptors():
        return len(os.listdir(f"/proc/{forwarded.process.pid}/fd"))

    with forwarded.guest.listen("0.0.0.0", 80, backlog=512) as listener:

        def once():
            client = forwarded.host.connect("127.0.0.1", 8080)
            server, _ = accept(listener)
            with client, server:
                client.sendall(b"ping")
                assert server.recv(4) == b"ping"

        once()
        time.sleep(0.2)
        before = descriptors()
        for _ in range(1000):
            once()
        until(lambda: descriptors() <= before + 20)


@BOTH
def test_without_the_short_cut_loopback_is_the_gateway(world, version):
    world.pysplice("--config-net", *NONE, "-t", "8080:80", "--no-splice")
    with world.guest.listen(any_of(version), 80) as listener:
        client = world.host.connect(loopback(version), 8080)
        server, peer = accept(listener)
        with client, server:
            assert peer[0] == (world.GATEWAY4 if version == 4 else world.GATEWAY6)
            transfer(client, server, 3, 1 << 20)
            transfer(server, client, 4, 1 << 20)


def test_a_burst_of_short_cuts_beyond_the_descriptors(world, tmp_path):
    """As many as there is room for are served; the others are turned away, not all."""
    process = world.host.spawn(
        *("prlimit", "--nofile=300:300", *PYSPLICE, "-f", "--netns", world.guest.path, "--config-net"),
        *(*NONE[2:], "-t", "8080:80", "-P", str(tmp_path / "pid")),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: written(tmp_path / "pid"), 15)
        with world.guest.listen("0.0.0.0", 80) as listener, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(world.host.socket(socket.AF_INET)) for _ in range(300)]
            for client in clients:
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", 8080))
            listener.settimeout(3)
            served = 0
            with contextlib.suppress(TimeoutError):
                while True:
                    stack.enter_context(listener.accept()[0])
                    served += 1
            # 236 descriptors for flows, five sixteenths of them for these, four for each
            assert 14 <= served <= 18
    finally:
        stop(process)


@BOTH
def test_when_the_helper_in_the_namespace_dies(world, version, tmp_path):
    """Clients from loopback come by the tap then, TCP and UDP; what leads out of the namespace is as before."""
    out = ("-T", "9090:90", "-U", "9090:90", "-t", f"unix:{tmp_path}/web:80")
    process = world.pysplice("--config-net", *NONE, "-t", "8080:80", "-u", "8080:80", *out)
    *_, helper, _ = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    os.kill(helper, signal.SIGKILL)
    assert any("nothing can be spliced" in line for line in iter(process.stderr.readline, ""))
    gateway = world.GATEWAY4 if version == 4 else world.GATEWAY6
    with world.guest.listen(any_of(version), 80) as listener:
        client = world.host.connect(loopback(version), 8080)
        server, peer = accept(listener)
        with client, server:
            assert peer[0] == gateway
            transfer(client, server, 3, 1 << 20)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with (
        world.guest.socket(family, socket.SOCK_DGRAM) as server,
        world.host.socket(family, socket.SOCK_DGRAM) as client,
    ):
        server.bind((any_of(version), 80))
        server.settimeout(10)
        client.sendto(b"x", (loopback(version), 8080))
        got, peer = server.recvfrom(10)
        assert (got, peer[0]) == (b"x", gateway)
    with world.host.listen(loopback(version), 90) as listener:
        with world.guest.connect(loopback(version), 9090) as client, accept(listener)[0] as server:
            transfer(client, server, 5, 1 << 20)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(f"{tmp_path}/web")
        assert client.recv(1) == b""
    with (
        world.guest.socket(family, socket.SOCK_DGRAM) as client,
        world.guest.socket(family, socket.SOCK_DGRAM) as server,
    ):
        server.bind((any_of(version), 90))
        server.settimeout(0.5)
        client.sendto(b"to the host", (loopback(version), 9090))
        with pytest.raises(TimeoutError):
            server.recv(100)
    assert process.poll() is None


@BOTH
def test_loopback_to_loopback(world, version):
    world.pysplice("--config-net", *NONE, "-t", "8080:80", "--host-lo-to-ns-lo")
    with world.guest.listen(loopback(version), 80) as listener:
        client = world.host.connect(loopback(version), 8080)
        server, peer = accept(listener)
        with client, server:
            assert peer[0] == loopback(version)
            transfer(client, server, 3, 1 << 20)


def test_another_loopback_address_is_kept(world):
    world.pysplice("--config-net", *NONE, "-t", "8080:80", "--host-lo-to-ns-lo")
    with world.guest.listen("127.0.0.9", 80) as listener:
        with world.host.connect("127.0.0.9", 8080), accept(listener)[0] as server:
            assert server.getsockname()[0] == "127.0.0.9"


@BOTH
def test_out_of_the_namespace(world, version):
    """-T: a port of the guest's loopback is one of the host's."""
    world.pysplice("--config-net", *NONE, "-T", "9090:90")
    with world.host.listen(loopback(version), 90) as listener:
        client = world.guest.connect(loopback(version), 9090)
        server, peer = accept(listener)
        with client, server:
            assert peer[0] == loopback(version)
            transfer(client, server, 3, 8 << 20)
            transfer(server, client, 4, 8 << 20)
        # On loopback, and nowhere else
        assert refused(world.guest, host_of(world, version), 9090)


def test_splice_only(world):
    world.pysplice("--splice-only", *NONE, "-t", "8080:80", "-T", "9090:90")
    assert "tap0" not in world.guest.run("ip", "link").stdout
    with world.guest.listen("127.0.0.1", 80) as inner, world.host.listen("127.0.0.1", 90) as outer:
        for namespace, port, listener in ((world.host, 8080, inner), (world.guest, 9090, outer)):
            client = namespace.connect("127.0.0.1", port)
            server, _ = accept(listener)
            with client, server:
                transfer(client, server, 3, 1 << 20)


@BOTH
def test_an_address_and_a_range(world, version):
    prefix = f"{host_of(world, version)}/"
    world.pysplice("--config-net", *NONE, "-t", f"{prefix}8000-8010:9000-9010,~8005")
    address = host_of(world, version)
    assert refused(world.host, loopback(version), 8000)
    assert refused(world.remote, address, 8005) and refused(world.remote, address, 8011)
    for port in (8000, 8010):
        with world.guest.listen(any_of(version), port + 1000) as listener:
            with world.remote.connect(address, port), accept(listener)[0] as server:
                assert server.getsockname()[1] == port + 1000


def test_an_interface(world):
    world.pysplice("--config-net", *NONE, "-t", "%veth0/8080:80")
    with world.guest.listen("0.0.0.0", 80) as listener:
        with world.remote.connect(world.HOST4, 8080), accept(listener)[0]:
            pass
        assert refused(world.host, "127.0.0.1", 8080)


def test_a_target_address(world):
    """Another address behind the guest's interface."""
    world.pysplice("--config-net", *NONE, "-t", "0.0.0.0/8080:10.77.0.1/80")
    world.guest.run("ip", "addr", "add", "10.77.0.1/32", "dev", "lo")
    with world.guest.listen("10.77.0.1", 80) as listener:
        for namespace, address in ((world.remote, world.HOST4), (world.host, "127.0.0.1")):
            with namespace.connect(address, 8080), accept(listener)[0] as server:
                assert server.getsockname()[0] == "10.77.0.1"


def test_a_port_in_use_is_an_error(world):
    with world.host.listen("0.0.0.0", 8080):
        result = world.host.run(*PYSPLICE, *NONE, "-t", "8080", "--netns", world.guest.path, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "pysplice: cannot listen on port 8080 (tcp): Address already in use\n"


def test_two_that_forward_the_same_datagrams(forwarded):
    """UDP sockets may share a port; listeners of two proxies must not."""
    result = forwarded.host.run(*PYSPLICE, *NONE, "-u", "8080", "--", "true", check=False)
    assert result.returncode == 1
    assert "port 8080 (udp): Address already in use" in result.stderr


def test_all_that_can_be_had(world):
    with world.host.listen("0.0.0.0", 1000):
        world.pysplice("--config-net", *NONE, "-t", "127.0.0.7/all,~100-60000")
        with world.guest.listen("0.0.0.0", 99) as listener:
            with world.host.connect("127.0.0.7", 99), accept(listener)[0]:
                pass
        assert refused(world.host, "127.0.0.7", 100)


@BOTH
def test_ports_follow_the_guest(world, version):
    world.pysplice("--config-net", *NONE, "-t", "auto", "-u", "auto")
    assert refused(world.remote, host_of(world, version), 8123)
    with world.guest.listen(any_of(version), 8123) as listener:
        until(lambda: open_to(world.remote, host_of(world, version), 8123), 3)
        accept(listener)[0].close()
        client = world.remote.connect(host_of(world, version), 8123)
        server, peer = accept(listener)
        assert peer[:2] == client.getsockname()[:2]
    # Connections outlive the port
    until(lambda: refused(world.remote, host_of(world, version), 8123), 3)
    with client, server:
        transfer(client, server, 1, 1 << 20)


def test_ports_follow_the_host(world):
    world.pysplice("--config-net", *NONE, "-T", "auto", "-t", "auto")
    with world.host.listen("127.0.0.1", 8124) as listener:
        until(lambda: open_to(world.guest, "127.0.0.1", 8124), 3)
        accept(listener)[0].close()
        # Ours are not followed back
        time.sleep(2.5)
        assert refused(world.host, world.HOST4, 8124)
    until(lambda: refused(world.guest, "127.0.0.1", 8124), 3)


def test_a_limited_range_is_followed(world):
    world.pysplice("--config-net", *NONE, "-t", "8200-8210,auto")
    with world.guest.listen("0.0.0.0", 8205), world.guest.listen("0.0.0.0", 8211):
        until(lambda: open_to(world.remote, world.HOST4, 8205), 3)
        assert refused(world.remote, world.HOST4, 8211)
        assert refused(world.remote, world.HOST4, 8206)


def test_a_port_that_is_taken_is_tried_again(world):
    taken = world.host.listen("0.0.0.0", 8300)
    process = world.pysplice("--config-net", *NONE, "-t", "auto")
    with world.guest.listen("0.0.0.0", 8300) as listener:
        time.sleep(1.5)
        taken.close()

        def reaches():
            with contextlib.suppress(OSError), world.remote.connect(world.HOST4, 8300):
                return accept(listener)
            return None

        until(reaches, 5)[0].close()
    process.terminate()
    process.wait(10)
    assert process.stderr.read().count("port 8300: Address already in use") == 1


def test_a_unix_socket(world, tmp_path):
    path = str(tmp_path / "web.sock")
    process = world.pysplice("--config-net", *NONE, "-t", f"unix:{path}:80")
    with world.guest.listen("0.0.0.0", 80) as listener:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.settimeout(20)
            server, _ = accept(listener)
            with server:
                transfer(client, server, 1, 4 << 20)
                assert server.recv(1) == b""
                transfer(server, client, 2, 4 << 20)
                assert client.recv(1) == b""
    assert stop(process) == 0
    assert not os.path.exists(path)


def test_a_unix_socket_that_was_left_behind(world, tmp_path):
    path = str(tmp_path / "web.sock")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
    world.pysplice("--config-net", *NONE, "-t", f"unix:{path}:80")
    (tmp_path / "file").touch()
    for place, why in (
        (path, "Address already in use"),
        (str(tmp_path / "file"), "a file that is not a socket is there"),
    ):
        result = world.host.run(*PYSPLICE, *NONE, "-t", f"unix:{place}:80", "--", "true", check=False)
        assert result.returncode == 1
        assert f"cannot listen on {place}: {why}" in result.stderr
        assert os.path.exists(place)


def test_ports_of_a_command(world):
    """A server that is started as the command, reached from the host and from afar."""
    program = "import socket; s = socket.create_server(('', 80)); c, _ = s.accept(); c.sendall(b'hello')"
    process = world.host.spawn(
        *PYSPLICE, "--config-net", *NONE, "-t", "8080:80", "--", "python3", "-c", program,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:

        def asked():
            with contextlib.suppress(OSError), world.remote.connect(world.HOST4, 8080) as client:
                return client.recv(10)
            return b""

        assert until(asked) == b"hello"
        assert process.wait(10) == 0
    finally:
        stop(process)


# Control at run time


def ctl(path, *words):
    return run(*PYSPLICE, "ctl", str(path), *words, check=False)


def test_rules_come_and_go(world, tmp_path):
    path = tmp_path / "control"
    process = world.pysplice("--config-net", *NONE, "-t", "8080:80", "--control", str(path))
    assert ctl(path, "add", "-t", "20000-20600").returncode == 0
    assert "listening ... and 102 more" in ctl(path, "show").stdout
    assert ctl(path, "del", "-t", "20000-20600").returncode == 0
    shown = ctl(path, "show")
    assert shown.returncode == 0
    assert "rule -t 8080:80" in shown.stdout and "listening -t * port 8080" in shown.stdout
    with world.guest.listen("0.0.0.0", 80) as listener:
        assert refused(world.remote, world.HOST4, 8081)
        assert ctl(path, "add", "-t", "8081:80").returncode == 0
        client = world.remote.connect(world.HOST4, 8081)
        server, _ = accept(listener)
        with client, server:
            lines = ctl(path, "show").stdout.splitlines()
            assert any(line.startswith("connection tcp 10.") for line in lines)
            assert ctl(path, "del", "-t", "8081:80").returncode == 0
            assert refused(world.remote, world.HOST4, 8081)
            transfer(client, server, 1, 1 << 20)
            figures = json.loads(ctl(path, "show", "--json").stdout)["figures"]
            assert figures["connections"] == {"opened": 1, "open": 1, "refused": 0}
            assert max(figures["bytes"].values()) >= 1 << 20
    assert ctl(path, "add", "--tcp-ports=8082:80", "--udp-ports", "8083").returncode == 0
    assert ctl(path, "del", "-t", "8082:80", "--udp-ports=8083").returncode == 0
    assert "needs one of" in ctl(path, "add", "-t=8082").stderr
    assert ctl(path, "add", "-T", "9191:91").returncode == 0
    with world.host.listen("127.0.0.1", 91) as listener:
        with world.guest.connect("127.0.0.1", 9191), accept(listener)[0]:
            pass
    assert stop(process) == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    (
        (("add", "-t", "8080"), "overlaps '8080:80'"),
        (("add", "-t", "80,"), "invalid ports for -t"),
        (("add", "-x", "80"), "one of -t, -u, -T and -U"),
        (("del", "-t", "99"), "'99' is not forwarded"),
        (("add", "-t", "8081,8099"), "cannot listen on port 8099 (tcp): Address already in use"),
    ),
)
def test_what_cannot_be_changed(world, tmp_path, words, message):
    path = tmp_path / "control"
    world.pysplice("--config-net", *NONE, "-t", "8080:80", "--control", str(path))
    with world.host.listen("0.0.0.0", 8099):
        result = ctl(path, *words)
    assert (result.returncode, result.stdout) == (1, "")
    assert message in result.stderr
    assert refused(world.remote, world.HOST4, 8081)


def test_nonsense_on_the_control_socket(world, tmp_path):
    path = tmp_path / "control"
    world.pysplice("--config-net", *NONE, "--control", str(path))
    for line in (
        b"\n",
        b"{}\n",
        b"[1]\n",
        b"nonsense\n",
        b'{"do": "add"}\n',
        b'{"do": "add", "option": 1, "ports": []}\n',
    ):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(path))
            client.sendall(line)
            assert b'"ok": false' in client.recv(1000)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(path))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(b"x" * 200_000)
            assert client.recv(100) == b""
    assert ctl(path, "show").returncode == 0


def test_those_who_say_nothing_on_the_control_socket_give_way(world, tmp_path):
    path = tmp_path / "control"
    world.pysplice("--config-net", *NONE, "--control", str(path))
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(5)
            client.connect(str(path))
        assert ctl(path, "show").returncode == 0
        client.sendall(b"nonsense\n")
        assert b'"ok": false' in client.recv(1000)


def test_what_is_added_goes_before_what_follows(world, tmp_path):
    path = tmp_path / "control"
    process = world.pysplice(
        "--config-net", "-u", "none", "-T", "none", "-U", "none", "--control", str(path)
    )
    with world.guest.listen("0.0.0.0", 8400), world.guest.listen("0.0.0.0", 84) as other:
        until(lambda: open_to(world.remote, world.HOST4, 8400), 4)
        assert ctl(path, "add", "-t", "8400:84").returncode == 0
        for _ in range(3):
            with world.remote.connect(world.HOST4, 8400), accept(other)[0]:
                time.sleep(0.6)
        shown = ctl(path, "show").stdout
        assert shown.count("port 8400") == 1
        assert ctl(path, "del", "-t", "8400:84").returncode == 0
        until(lambda: open_to(world.remote, world.HOST4, 8400), 4)
    process.terminate()
    process.wait(10)
    assert "cannot follow" not in process.stderr.read()


def test_more_ports_than_descriptors(world):
    """As many as there is place for, and a word about the others; not all, because clients need some too."""
    words = " ".join((*PYSPLICE, "-f", "--config-net", *NONE[2:], "-t", "all", "--netns", world.guest.path))
    process = world.host.spawn(
        "sh", "-c", f"ulimit -n 4096; exec {words}", stderr=subprocess.PIPE, text=True
    )
    try:
        until(lambda: "tap0" in world.guest.run("ip", "route").stdout)
        with world.guest.listen("0.0.0.0", 99) as listener:
            until(lambda: open_to(world.remote, world.HOST4, 99))
            accept(listener)[0].close()
            with world.remote.connect(world.HOST4, 99), accept(listener)[0]:
                pass
    finally:
        process.terminate()
        process.wait(10)
        assert "ports are left out for lack of descriptors" in process.stderr.read()
        stop(process)


# What once was wrong


# No more than a first window, or the server's kernel has some of it left when it resets
@pytest.mark.parametrize("size", (10, 60_000))
@pytest.mark.parametrize("way", ("in", "out"))
def test_what_was_said_before_a_reset_arrives(world, size, way):
    """A server that answers and closes without having read all (413, say) resets: its answer comes first."""
    world.pysplice("--config-net", *NONE, "-t", "8080:80", "-T", "8080:80")
    here, there = (world.host, world.guest) if way == "in" else (world.guest, world.host)
    with there.listen("0.0.0.0" if way == "in" else "127.0.0.1", 80) as listener:
        for _ in range(10):
            with here.connect("127.0.0.1", 8080) as client:
                client.sendall(b"more than anybody reads" * 1000)
                server, _ = accept(listener)
                server.recv(10)
                server.sendall(b"x" * size)
                server.close()
                got = b""
                with pytest.raises(ConnectionResetError):
                    while part := client.recv(65536):
                        got += part
                assert got == b"x" * size


@pytest.mark.parametrize("first", ("client", "server"))
def test_urgent_data_takes_the_short_cut_too(forwarded, first):
    with forwarded.guest.listen("0.0.0.0", 80) as listener:
        client = forwarded.host.connect("127.0.0.1", 8080)
        server, _ = accept(listener)
        with client, server:
            one, other = (client, server) if first == "client" else (server, client)
            other.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            for _ in range(3):
                one.sendall(b"before")
                one.send(b"!", socket.MSG_OOB)
                one.sendall(b"after")
                got = b""
                while len(got) < 12:
                    got += other.recv(100)
                assert got == b"before!after"
            one.send(b"?", socket.MSG_OOB)
            one.close()
            assert other.recv(10) == b"?" and other.recv(10) == b""


def test_urgent_data_that_comes_at_once(forwarded):
    """Before the other side of the splice is connected."""
    with forwarded.guest.listen("0.0.0.0", 80) as listener:
        for _ in range(30):
            with forwarded.host.connect("127.0.0.1", 8080) as client:
                client.send(b"!", socket.MSG_OOB)
                client.sendall(b"after")
                server, _ = accept(listener)
                with server:
                    server.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
                    got = b""
                    while len(got) < 6:
                        got += server.recv(100)
                    assert got.endswith(b"after")


def test_clients_that_wait_leave_room_to_others(forwarded):
    """The guest drops what comes to a port: a thousand clients wait for it, and hold nobody else up."""
    forwarded.guest.run("ip", "route", "add", "blackhole", f"{forwarded.GATEWAY4}/32")
    clients = []
    for _ in range(1100):
        sock = forwarded.remote.socket()
        sock.bind((forwarded.GATEWAY4, 0))
        sock.connect((forwarded.HOST4, 8080))
        clients.append(sock)
    with forwarded.remote.listen(forwarded.REMOTE4) as listener:
        with forwarded.guest.connect(forwarded.REMOTE4, listener.getsockname()[1]):
            accept(listener)[0].close()
    with forwarded.guest.listen("0.0.0.0", 80) as listener:
        with forwarded.remote.connect(forwarded.HOST4, 8080), accept(listener)[0]:
            pass
    for sock in clients:
        sock.close()


def test_with_children_ignored_by_whoever_starts_us(world):
    process = subprocess.run(
        world.host.enter(*PYSPLICE, "--", "sh", "-c", "exit 5"),
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
        timeout=20,
    )
    assert process.returncode == 5


def test_relative_paths_in_the_background(world, tmp_path):
    """Sockets are where they were asked for, and go away from there."""
    pid = tmp_path / "pid"
    words = (
        "-c",
        "ctl.sock",
        "-t",
        "unix:web.sock:80",
        *NONE[2:],
        "-P",
        str(pid),
        "--netns",
        world.guest.path,
    )
    world.host.run(*PYSPLICE, *words, cwd=tmp_path)
    assert (tmp_path / "ctl.sock").is_socket() and (tmp_path / "web.sock").is_socket()
    (tmp_path / "web.sock").unlink()
    (tmp_path / "web.sock").write_text("somebody else's")
    os.kill(int(pid.read_text()), signal.SIGTERM)
    until(lambda: not (tmp_path / "ctl.sock").exists())
    assert (tmp_path / "web.sock").read_text() == "somebody else's"


@pytest.mark.parametrize(
    "words", (("add", "-u", "9000"), ("add", "-t", "[::1]/9000"), ("add", "-t", "unix:/a\\u0000b:1"))
)
def test_what_is_switched_off_stays_off(world, tmp_path, words):
    path = tmp_path / "control"
    world.pysplice("--config-net", "-4", "--no-udp", *NONE[:2], "-T", "none", "--control", str(path))
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(path))
        client.sendall(f'{{"do": "{words[0]}", "option": "{words[1]}", "ports": "{words[2]}"}}\n'.encode())
        assert b'"ok": false' in client.recv(1000)
        client.sendall(b"[" * 60000 + b"\n")
        assert b'"ok": false' in client.recv(1000)


def test_all_ports_later_on(world, tmp_path):
    """They are opened a few at a time, and other traffic goes on meanwhile."""
    path = tmp_path / "control"
    world.pysplice("--config-net", *NONE, "--control", str(path))
    with world.host.listen("127.0.0.1", 3000) as listener:
        assert ctl(path, "add", "-T", "2000-4000").returncode == 0
        with world.guest.connect("127.0.0.1", 3000), accept(listener)[0]:
            pass
        assert ctl(path, "del", "-T", "2000-4000").returncode == 0
        assert ctl(path, "add", "-t", "all,~5000-65535").returncode == 0
        until(lambda: open_to(world.remote, world.HOST4, 4999), 20)


@pytest.mark.parametrize("option", ("-l", "-p", "-P"))
def test_a_full_disk(world, option):
    result = world.host.run(*PYSPLICE, option, "/dev/full", *NONE, "--", "true", check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "No space left on device" in result.stderr


@pytest.mark.parametrize(
    ("version", "mtu"), ((4, "576"), (4, "1280"), (6, "1280"), (4, "9000"), (6, "9000"))
)
def test_other_mtus(world, mtu, version):
    """Both directions of a published port at MTUs that are not ours to choose."""
    world.pysplice("--config-net", "-m", mtu, *NONE, "-t", "8080:80")
    with world.guest.listen(any_of(version), 80) as listener:
        client = world.remote.connect(host_of(world, version), 8080)
        server, _ = accept(listener)
        with client, server:
            both_ways(client, server, 4 << 20)


@BOTH
def test_clients_over_a_bad_path(isolated, version):
    """Loss, reordering and delay between the client and us."""
    with ImpairedWorld("--delay", "10", "--loss", "1", "--reorder", "1") as world:
        world.pysplice("--config-net", *NONE, "-t", "8080:80")
        with world.guest.listen(any_of(version), 80) as listener:
            client = world.remote.connect(host_of(world, version), 8080)
            server, _ = accept(listener)
            with client, server:
                both_ways(client, server, 4 << 20)
