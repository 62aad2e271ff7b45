"""UDP and echo through a real tap and spliced: what applications see."""

import contextlib
import errno
import hashlib
import itertools
import os
import re
import socket
import struct
import subprocess
import sys

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import raw

from pysplice.datagram import udp

from ..support.namespaces import PYSPLICE, stop
from .test_forward import NONE, host_of, loopback, until

BOTH = pytest.mark.parametrize("version", (4, 6))
IP_RECVERR, IPV6_RECVERR = 11, 25
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_PROBE = 10, 23, 3
UDP_SEGMENT = 103


def bound(namespace, address, port=0):
    sock = namespace.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    sock.bind((address, port))
    sock.settimeout(10)
    return sock


def asking(world, version, server, address=None):
    """A socket of the guest's that is connected to a server of the remote host's."""
    sock = world.guest.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    sock.connect((address or world.remote_address(version), server.getsockname()[1]))
    sock.settimeout(10)
    return sock


@pytest.fixture(scope="module", params=((), ("--no-offload", "--mtu", "1500")), ids=("offload", "plain"))
def served(request, shared_world):
    shared_world.guest.delete()
    shared_world.guest = type(shared_world.guest)(shared_world.guest.name)
    for namespace in (shared_world.host, shared_world.remote):
        namespace.sysctl("net.ipv4.ping_group_range", "0 0")
    shared_world.process = shared_world.pysplice("--config-net", *NONE, *request.param)
    yield shared_world
    shared_world.process.terminate()
    shared_world.process.wait(10)


@BOTH
@pytest.mark.parametrize("size", (0, 1, 2, 1000, 1472, 1473, 9000, 40000, 65507))
def test_there_and_back(served, version, size):
    """Each size arrives whole, whatever the tap and the path make of it; source ports are kept."""
    size = min(size, 65507 if version == 4 else 65487)
    with bound(served.remote, served.remote_address(version)) as server:
        with asking(served, version, server) as client:
            data = os.urandom(size)
            learn_mtu(client, size)
            client.send(data)
            got = b"?"
            while got[:1] == b"?" and got != data:
                got, peer = server.recvfrom(70000)
            assert (got, peer[:2]) == (data, (host_of(served, version), client.getsockname()[1]))
            server.sendto(data[::-1], peer)
            assert client.recv(70000) == data[::-1]


def learn_mtu(client, size):
    """What is larger than the path goes in the guest's own fragments, once its kernel knows (RFC 1191, RFC 8201)."""
    for _ in range(2):
        # The socket has the error of what was sent before, then knows; and the MTU of the tap may be enough
        with contextlib.suppress(OSError):
            client.send(b"?" * size)
            client.settimeout(0.3)
            client.recv(1)
    client.settimeout(10)


@pytest.mark.parametrize("version, overhead", ((4, 28), (6, 48)))
def test_a_datagram_that_must_not_be_fragmented(served, version, overhead):
    """One that fits the path goes, a larger one does not: the guest hears from its router what would fit."""
    with bound(served.remote, served.remote_address(version)) as server:
        server.settimeout(0.5)
        with asking(served, version, server) as client:
            if version == 4:
                client.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_PROBE)
            else:
                client.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_PROBE)
            client.settimeout(0.5)
            fits = b"x" * (1500 - overhead)
            client.send(fits)
            assert server.recv(70000) == fits
            with pytest.raises(OSError) as raised:
                client.send(fits + b"x")
                client.recv(1)
            assert raised.value.errno == errno.EMSGSIZE
            with pytest.raises(TimeoutError):
                server.recv(70000)


@BOTH
def test_many_at_once_keep_their_bounds_and_their_order(served, version):
    with bound(served.remote, served.remote_address(version)) as server:
        with asking(served, version, server) as client:
            sizes = [(i * 37) % 1400 for i in range(200)]
            client.send(b"first")
            _, peer = server.recvfrom(100)
            for sender, receiver in ((client, server), (server, client)):
                got = []
                for i, size in enumerate(sizes):
                    message = struct.pack("!I", i) + b"m" * size
                    if sender is client:
                        sender.send(message)
                    else:
                        sender.sendto(message, peer)
                    if i % 50 == 49:
                        got += [receiver.recv(2000) for _ in range(50)]
                assert [struct.unpack("!I", m[:4])[0] for m in got] == list(range(len(sizes)))
                assert [len(m) - 4 for m in got] == sizes


@BOTH
@pytest.mark.parametrize("size", (500, 1400))
def test_segments_of_one_send_are_datagrams(served, version, size):
    """UDP_SEGMENT in the guest, and towards it."""
    with bound(served.remote, served.remote_address(version)) as server:
        with asking(served, version, server) as client:
            data = os.urandom(size * 20 + 100)
            parts = [data[at : at + size] for at in range(0, len(data), size)]
            client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)
            client.send(data)
            got = []
            for _ in parts:
                part, peer = server.recvfrom(70000)
                got.append(part)
            assert got == parts
            server.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)
            server.sendto(data, peer)
            assert [client.recv(70000) for _ in parts] == parts


@BOTH
def test_one_port_to_many_servers(served, version):
    servers = [bound(served.remote, served.remote_address(version)) for _ in range(20)]
    with bound(served.guest, host_of(served, version)) as client:
        for i, server in enumerate(servers):
            client.sendto(b"%d" % i, (served.remote_address(version), server.getsockname()[1]))
        for i, server in enumerate(servers):
            got, peer = server.recvfrom(100)
            assert (got, peer[1]) == (b"%d" % i, client.getsockname()[1])
            server.sendto(b"to %d" % i, peer)
        answers = {client.recvfrom(100) for _ in servers}
        assert {text for text, _ in answers} == {b"to %d" % i for i in range(20)}
        assert {address[1] for _, address in answers} == {server.getsockname()[1] for server in servers}
    for server in servers:
        server.close()


@BOTH
def test_nobody_listens(served, version):
    """Port unreachable comes back as an error of the socket, as it would without us."""
    with bound(served.remote, served.remote_address(version)) as server:
        client = asking(served, version, server)
    with client:
        client.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            client.recv(10)
        client.send(b"again")
        with pytest.raises(ConnectionRefusedError):
            client.recv(10)


@BOTH
def test_the_gateway_is_the_hosts_loopback(served, version):
    gateway = served.GATEWAY4 if version == 4 else served.GATEWAY6
    with bound(served.host, loopback(version)) as server:
        with asking(served, version, server, gateway) as client:
            client.send(b"hello")
            got, peer = server.recvfrom(100)
            assert (got, peer[0]) == (b"hello", loopback(version))
            server.sendto(b"hi", peer)
            assert client.recvfrom(100)[1][0] == gateway


def test_a_path_with_a_smaller_mtu_is_told_to_the_guest(world):
    """What a router says, fragmentation needed, reaches the guest's socket with the MTU."""
    world.pysplice("--config-net", *NONE, "--mtu", "1500")
    beyond(world, "mtu", "lock", "1300")
    with world.guest.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        client.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
        client.connect(("198.51.100.7", 9))
        client.send(b"x" * 1400)

        def error():
            try:
                _, ancillary, _, _ = client.recvmsg(2000, 512, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            return struct.unpack_from("=IBBBBI", ancillary[0][2])

        number, _, kind, code, _, info = until(error)
        assert (number, kind, code, info) == (errno.EMSGSIZE, 3, 4, 1300)


def beyond(world, *more):
    """The remote host becomes a router to networks that are not there."""
    world.remote.sysctl("net.ipv4.ip_forward", "1")
    world.remote.sysctl("net.ipv6.conf.all.forwarding", "1")
    for target, via in (("198.51.100.0/24", world.HOST4), ("2001:db8:9::/64", world.HOST6)):
        world.remote.run("ip", "route", "replace", target, "via", via, *more)


@BOTH
def test_traceroute(served, version):
    """The guest's hop limit is used, and who drops the packet is heard, by its own address."""
    target = "198.51.100.9" if version == 4 else "2001:db8:9::9"
    beyond(served)
    with served.guest.socket(
        socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM
    ) as sock:
        if version == 4:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
            sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
        sock.connect((target, 33434))
        sock.send(b"probe")

        def error():
            try:
                _, ancillary, _, _ = sock.recvmsg(2000, 512, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            value = ancillary[0][2]
            return value[5:7], value[16:]

        kinds, offender = until(error)
        packed = offender[4:8] if version == 4 else offender[8:24]
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        assert kinds == (b"\x0b\x00" if version == 4 else b"\x03\x00")  # time exceeded
        routers = (served.remote_address(version), served.GATEWAY4, served.GATEWAY6)
        assert socket.inet_ntop(family, packed) in routers


def joined(namespace, group, port, device="veth1"):
    """A socket that gets what is sent to a group, or to all."""
    index = namespace.call(socket.if_nametoindex, device)
    family = socket.AF_INET6 if ":" in group else socket.AF_INET
    sock = namespace.socket(family, socket.SOCK_DGRAM)
    sock.bind(("", port))
    if family == socket.AF_INET6:
        member = socket.inet_pton(family, group) + struct.pack("@I", index)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, member)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
    else:
        if socket.inet_aton(group)[0] < 240 and group[:4] not in ("255.", "10.9"):
            member = struct.pack("=4s4si", socket.inet_aton(group), bytes(4), index)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
        sock.setsockopt(socket.IPPROTO_IP, 12, 1)  # IP_RECVTTL
    sock.settimeout(5)
    return sock


@pytest.mark.parametrize(
    "group, hops",
    (
        ("239.255.255.250", 1),
        ("224.0.0.251", 37),
        ("255.255.255.255", 64),
        ("10.99.0.255", 64),
        ("ff02::c", 1),
        ("ff15::c", 37),
    ),
)
def test_to_a_group_or_to_all(served, group, hops):
    """It leaves the host with the guest's hop limit, and any host that hears it may answer."""
    family = socket.AF_INET6 if ":" in group else socket.AF_INET
    # Until its link-local address is known to be its own, a host sends nothing to a group
    for namespace in (served.host, served.guest):
        until(lambda namespace=namespace: "tentative" not in namespace.run("ip", "-6", "addr").stdout)
    with joined(served.remote, group, 1900) as listener:
        with served.guest.socket(family, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            index = served.guest.call(socket.if_nametoindex, "tap0")
            if family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, hops)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, hops)
                sock.sendto(b"who?", (group, 1900))
            else:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, hops)
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
                sock.sendto(b"who?", (group, 1900, 0, index))
            data, ancillary, _, peer = listener.recvmsg(100, 100)
            assert data == b"who?"
            assert [struct.unpack("i", value)[0] for _, _, value in ancillary] == [hops]
            # From an address and port that were not asked
            with served.remote.socket(family, socket.SOCK_DGRAM) as answering:
                answering.sendto(b"me", peer)
                got, source = sock.recvfrom(100)
            assert got == b"me"
            if family == socket.AF_INET:
                assert source[0] in (served.REMOTE4, served.GATEWAY4)


def test_what_is_for_the_link_does_not_leave_it(served):
    """DHCP and DHCPv6 are the link's own, and TCP knows no groups."""
    with joined(served.remote, "255.255.255.255", 67) as listener:
        with served.guest.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.bind(("", 68))
            sock.sendto(b"x" * 300, ("255.255.255.255", 67))
        listener.settimeout(0.5)
        with pytest.raises(TimeoutError):
            listener.recv(1000)
    assert served.process.poll() is None


# Time-outs and bounds


def test_flows_are_forgotten(world, tmp_path):
    """After 30 seconds without an answer, unless the kernel's conntrack says otherwise; here it is 2."""
    if not os.path.exists("/proc/sys/net/netfilter/nf_conntrack_udp_timeout"):
        assert udp.timeouts() == (30.0, 120.0)
    code = (
        "import pysplice.datagram.udp as udp; udp.CONNTRACK = '/no/such/file'; udp.TIMEOUT = 2.0\n"
        "from pysplice.__main__ import main; main()"
    )
    pid = tmp_path / "pid"
    process = world.host.spawn(
        *(
            sys.executable,
            "-c",
            code,
            "-f",
            "--config-net",
            *NONE,
            "--netns",
            world.guest.path,
            "-P",
            str(pid),
        ),
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: pid.exists() and pid.read_text())
        with bound(world.remote, world.REMOTE4) as server, asking(world, 4, server) as client:
            before = len(os.listdir(f"/proc/{process.pid}/fd"))
            client.send(b"x")
            server.recv(10)
            assert len(os.listdir(f"/proc/{process.pid}/fd")) == before + 1
            until(lambda: len(os.listdir(f"/proc/{process.pid}/fd")) == before, 8)
    finally:
        stop(process)


# Forwarded ports


@pytest.fixture
def forwarded(world):
    world.process = world.pysplice("--config-net", *NONE, "-u", "5353:53", "-U", "6000:60")
    return world


@BOTH
def test_a_remote_client_reaches_the_guest_as_itself(forwarded, version):
    with bound(forwarded.guest, "0.0.0.0" if version == 4 else "::", 53) as server:
        clients = [bound(forwarded.remote, forwarded.remote_address(version)) for _ in range(5)]
        for round_ in range(3):
            for i, client in enumerate(clients):
                client.sendto(b"%d" % i, (host_of(forwarded, version), 5353))
                got, peer = server.recvfrom(100)
                assert (got, peer[:2]) == (b"%d" % i, client.getsockname()[:2])
                server.sendto(b"answer", peer)
                answer, source = client.recvfrom(100)
                assert (answer, source[:2]) == (b"answer", (host_of(forwarded, version), 5353)), round_
        for client in clients:
            client.close()


@BOTH
def test_a_burst_from_a_new_client_arrives(forwarded, version):
    """What waits at the listener when the flow is made is not lost."""
    with bound(forwarded.guest, "0.0.0.0" if version == 4 else "::", 53) as server:
        with bound(forwarded.remote, forwarded.remote_address(version)) as client:
            for i in range(60):
                client.sendto(b"%d" % i, (host_of(forwarded, version), 5353))
            assert {server.recv(10) for _ in range(60)} == {b"%d" % i for i in range(60)}


@BOTH
@pytest.mark.parametrize("size", (5000, 60000))
def test_large_ones(forwarded, version, size):
    forwarded.guest.run("ip", "link", "set", "tap0", "mtu", "1500")
    with bound(forwarded.guest, "0.0.0.0" if version == 4 else "::", 53) as server:
        with bound(forwarded.remote, forwarded.remote_address(version)) as client:
            data = os.urandom(size)
            for _ in range(3):
                client.sendto(data, (host_of(forwarded, version), 5353))
                got, peer = server.recvfrom(70000)
                assert got == data
                server.sendto(data[::-1], peer)
                assert client.recv(70000) == data[::-1]


@BOTH
def test_the_short_cut(forwarded, version):
    """The client's port is kept, the answer has the address that the client has used."""
    with bound(forwarded.guest, "0.0.0.0" if version == 4 else "::", 53) as server:
        with bound(forwarded.host, loopback(version)) as client:
            address = "127.0.0.9" if version == 4 else "::1"
            for i in range(5):
                data = os.urandom(i * 10000)
                client.sendto(data, (address, 5353))
                got, peer = server.recvfrom(70000)
                assert got == data
                assert peer[:2] == (host_of(forwarded, version), client.getsockname()[1])
                server.sendto(data[::-1], peer)
                got, source = client.recvfrom(70000)
                assert (got, source[:2]) == (data[::-1], (address, 5353))


@BOTH
def test_out_of_the_namespace(forwarded, version):
    with bound(forwarded.host, loopback(version), 60) as server:
        with bound(forwarded.guest, loopback(version)) as client:
            for i in range(5):
                data = os.urandom(i * 10000)
                client.sendto(data, (loopback(version), 6000))
                got, peer = server.recvfrom(70000)
                assert (got, peer[:2]) == (data, (loopback(version), client.getsockname()[1]))
                server.sendto(data[::-1], peer)
                assert client.recv(70000) == data[::-1]


@BOTH
def test_a_stream_over_the_short_cut(forwarded, version):
    """Many datagrams, none lost as long as the sender waits now and then."""
    with bound(forwarded.guest, "0.0.0.0" if version == 4 else "::", 53) as server:
        with bound(forwarded.host, loopback(version)) as client:
            client.connect((loopback(version), 5353))
            sent, got = hashlib.sha256(), hashlib.sha256()
            for _ in range(100):
                for _ in range(10):
                    data = os.urandom(1200)
                    sent.update(data)
                    client.send(data)
                for _ in range(10):
                    got.update(server.recv(2000))
            assert sent.digest() == got.digest()


def test_udp_follows(world):
    world.pysplice("--config-net", *NONE, "-u", "auto", "-U", "auto")
    with bound(world.guest, "0.0.0.0", 7000) as inner, bound(world.host, "127.0.0.1", 7001) as outer:

        def listens(namespace, port):
            return f":{port} " in namespace.run("ss", "-Hlun").stdout

        until(lambda: listens(world.host, 7000) and listens(world.guest, 7001), 3)
        for server, client, address, port in (
            (inner, world.remote, world.HOST4, 7000),
            (outer, world.guest, "127.0.0.1", 7001),
        ):
            with client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"x", (address, port))
                assert server.recv(10) == b"x"
    until(lambda: not listens(world.host, 7000) and not listens(world.guest, 7001), 3)


# Echo


def ping(world, *words, check=True):
    return world.guest.run("ping", "-n", *words, check=check, timeout=30).stdout


@BOTH
@pytest.mark.parametrize("size", (8, 56, 1473, 9000, 60000))
def test_ping(served, version, size):
    out = ping(served, "-c", "2", "-i", "0.2", "-W", "3", "-s", str(size), served.remote_address(version))
    assert "2 received" in out


@BOTH
def test_ping_the_gateway(served, version):
    gateway = served.GATEWAY4 if version == 4 else served.GATEWAY6
    assert "1 received" in ping(served, "-c", "1", "-W", "3", gateway)


def test_many_who_ping_at_once(served):
    """Each has an identifier of its own, and gets its own replies."""
    processes = [
        served.guest.spawn(
            "ping", "-n", "-c", "3", "-i", "0.2", "-W", "3", served.REMOTE4, stdout=-1, text=True
        )
        for _ in range(20)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=20)
        assert "3 received" in out and "DUP" not in out


@BOTH
def test_ping_where_nobody_is(served, version):
    """The host's own verdict, host unreachable, comes back."""
    nobody = "10.99.0.77" if version == 4 else "fd99::77"
    out = ping(served, "-c", "1", "-W", "6", nobody, check=False)
    assert re.search(r"[Uu]nreachable", out)


def test_ping_with_few_hops(served):
    beyond(served)
    out = ping(served, "-c", "1", "-W", "3", "-t", "1", "198.51.100.9", check=False)
    assert "Time to live exceeded" in out


def test_without_ping_sockets_nothing_else_suffers(world):
    # "1 0", nobody, is what a new namespace has
    process = world.pysplice("--config-net", *NONE)
    assert "0 received" in ping(world, "-c", "1", "-W", "1", world.REMOTE4, check=False)
    with bound(world.remote, world.REMOTE4) as server, asking(world, 4, server) as client:
        client.send(b"x")
        assert server.recv(10) == b"x"
    assert process.poll() is None


@pytest.mark.parametrize("option", ("--no-udp", "--no-icmp"))
def test_left_out(world, option):
    for namespace in (world.host, world.remote):
        namespace.sysctl("net.ipv4.ping_group_range", "0 0")
    world.pysplice("--config-net", *NONE, option)
    with bound(world.remote, world.REMOTE4) as server, asking(world, 4, server) as client:
        client.send(b"x")
        server.settimeout(1)
        if option == "--no-udp":
            with pytest.raises(TimeoutError):
                server.recv(10)
        else:
            assert server.recv(10) == b"x"
    out = ping(world, "-c", "1", "-W", "1", world.REMOTE4, check=False)
    assert ("1 received" in out) == (option == "--no-udp")


# Broken ones


@BOTH
def test_fragments_of_all_kinds(served, version):
    """In any order, twice, and with some missing: whole ones arrive, and nothing else does."""
    tap = served.guest.call(raw_socket)
    source, target = host_of(served, version), served.remote_address(version)
    with bound(served.remote, target) as server:
        payload = os.urandom(4000)
        datagram = UDP(sport=5000, dport=server.getsockname()[1]) / payload
        for order in (
            lambda parts: parts,
            lambda parts: parts[::-1],
            lambda parts: [part for part in parts for _ in range(2)],
        ):
            for part in order(pieces(version, source, target, datagram)):
                tap.send(part)
            assert server.recv(70000) == payload
        for order in (slice(0, -1), slice(1, None)):
            for part in pieces(version, source, target, datagram)[order]:
                tap.send(part)
        server.settimeout(0.5)
        with pytest.raises(TimeoutError):
            server.recv(70000)
    tap.close()


def raw_socket():
    """Frames as the guest's kernel sends them: out of the tap's interface."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    sock.bind(("tap0", 3))  # ETH_P_ALL
    return sock


identifiers = itertools.count(1000)


def pieces(version, source, target, datagram):
    """Frames with fragments of 1000 bytes."""
    ident = next(identifiers)
    if version == 4:
        packet = bytes(IP(src=source, dst=target) / datagram)
        body = packet[20:]
    else:
        packet = bytes(IPv6(src=source, dst=target) / datagram)
        body = packet[40:]
    out = []
    for at in range(0, len(body), 1000):
        more = at + 1000 < len(body)
        if version == 4:
            ip = IP(src=source, dst=target, id=ident, proto=17, frag=at // 8, flags="MF" if more else 0)
            part = raw(ip / body[at : at + 1000])
            kind = b"\x08\x00"
        else:
            head = struct.pack("!BBHI", 17, 0, at | more, ident)
            part = raw(IPv6(src=source, dst=target, nh=44) / (head + body[at : at + 1000]))
            kind = b"\x86\xdd"
        out.append(bytes.fromhex("9a559a559a55") + bytes.fromhex("020000000001") + kind + part)
    return out


def test_an_error_quotes_what_the_guest_has_sent(served):
    """The ICMP error as a packet: addresses, ports and the length of the original, all checksums right."""
    sniffer = served.guest.call(raw_socket)
    sniffer.settimeout(5)
    with bound(served.remote, served.REMOTE4) as server:
        client = asking(served, 4, server)
        port = server.getsockname()[1]
    with client:
        client.send(b"x" * 33)
        while True:
            frame = sniffer.recv(70000)
            if frame[12:14] == b"\x08\x00" and frame[23] == 1:
                break
        packet = IP(frame[14:])
        checked = IP(bytes(frame[14:]))
        del checked.chksum, checked[ICMP].chksum
        assert IP(bytes(checked)).chksum == packet.chksum
        assert IP(bytes(checked))[ICMP].chksum == packet[ICMP].chksum
        assert (packet[ICMP].type, packet[ICMP].code) == (3, 3)
        inner = packet[ICMP].payload
        assert (inner.src, inner.dst, inner.dport) == (served.HOST4, served.REMOTE4, port)
        assert inner.sport == client.getsockname()[1]
    sniffer.close()


# What once was wrong


def test_a_guest_that_changes_its_mac(forwarded):
    with bound(forwarded.remote, forwarded.REMOTE4) as server, asking(forwarded, 4, server) as client:
        for address in ("02:00:00:00:00:77", "02:00:00:00:00:78"):
            client.send(b"x")
            _, peer = server.recvfrom(10)
            forwarded.guest.run("ip", "link", "set", "tap0", "address", address)
            client.send(b"y")
            server.recvfrom(10)
            server.sendto(b"z", peer)
            assert client.recv(10) == b"z"


def test_two_flows_stay_two_on_the_host(world):
    """Two addresses of the guest's from one port to one server, and two names for one server."""
    world.pysplice("--config-net", *NONE, "--dns-forward", "169.254.1.1", "--dns-host", "127.0.0.1")
    world.guest.run("ip", "addr", "add", "10.99.0.3/24", "dev", "tap0")
    with bound(world.remote, world.REMOTE4) as server:
        one, other = bound(world.guest, world.HOST4, 5000), bound(world.guest, "10.99.0.3", 5000)
        for round_ in range(3):
            for name, client in ((b"a", one), (b"b", other)):
                client.sendto(name, server.getsockname())
                got, peer = server.recvfrom(10)
                server.sendto(b"for " + got, peer)
                assert client.recv(10) == b"for " + name, round_
        one.close()
        other.close()
    with bound(world.host, "127.0.0.1", 53) as server, bound(world.guest, world.HOST4) as client:
        for address in (world.GATEWAY4, "169.254.1.1") * 3:
            client.sendto(b"x", (address, 53))
            _, peer = server.recvfrom(10)
            server.sendto(b"y", peer)
            assert client.recvfrom(10)[1][0] == address


def test_one_client_to_several_ports_of_one_server(world):
    """The answer comes from the address that was asked, through the tap and spliced."""
    world.pysplice("--config-net", *NONE, "-u", "5353:53,5354:53")
    world.host.run("ip", "addr", "add", "10.99.0.9/24", "dev", "veth0")
    with bound(world.guest, "0.0.0.0", 53) as server:
        for namespace, local, addresses in (
            (world.remote, world.REMOTE4, (world.HOST4, "10.99.0.9")),
            (world.host, "127.0.0.1", ("127.0.0.1", "127.0.0.9")),
        ):
            with bound(namespace, local) as client:
                for target in [(address, port) for address in addresses for port in (5353, 5354)] * 3:
                    client.sendto(b"x", target)
                    _, peer = server.recvfrom(10)
                    server.sendto(b"y", peer)
                    assert client.recvfrom(10)[1] == target


def test_a_client_at_another_address_of_the_host(world):
    """The guest has a copy of that address too: it could not answer it."""
    world.host.run("ip", "addr", "add", "10.99.0.3/24", "dev", "veth0")
    world.pysplice("--config-net", *NONE, "-u", "5353:53")
    with bound(world.guest, "0.0.0.0", 53) as server:
        with bound(world.host, "10.99.0.3") as client:
            client.sendto(b"x", (world.HOST4, 5353))
            got, peer = server.recvfrom(10)
            assert (got, peer[0]) == (b"x", world.GATEWAY4)
            server.sendto(b"y", peer)
            assert client.recvfrom(10)[1] == (world.HOST4, 5353)


@BOTH
@pytest.mark.parametrize("options", ((), ("--no-splice", "--no-map-gw")), ids=("own", "loopback"))
@pytest.mark.parametrize("connected", (False, True))
def test_a_client_on_the_host_itself(world, version, options, connected):
    """A server answers from the address that its kernel picks for whom it sees, and hears more from the same."""
    world.pysplice("--config-net", *NONE, "-u", "5353:53", *options)
    address = loopback(version) if options else host_of(world, version)
    with (
        bound(world.guest, "0.0.0.0" if version == 4 else "::", 53) as server,
        bound(world.host, address) as client,
    ):
        client.connect((address, 5353))
        client.send(b"first")
        got, peer = server.recvfrom(10)
        assert got == b"first"
        if connected:
            server.connect(peer)
        for text in (b"a", b"b"):
            server.send(text) if connected else server.sendto(text, peer)
            assert client.recv(10) == text
            client.send(text)
            assert server.recvfrom(10) == (text, peer)


def test_a_guest_with_a_link_local_address_of_its_own_choice(world):
    """It is known once the guest has asked for a neighbour."""
    world.pysplice("--config-net", *NONE, "-u", "5353:53")
    world.guest.run("ip", "-6", "addr", "flush", "dev", "tap0", "scope", "link")
    world.guest.run("ip", "addr", "add", "fe80::77/64", "dev", "tap0", "nodad")
    world.guest.run("ping", "-c", "1", "-W", "1", "fe80::99%tap0", check=False)
    with bound(world.guest, "::", 53) as server, bound(world.host, world.HOST6) as client:
        client.sendto(b"x", (world.HOST6, 5353))
        _, peer = server.recvfrom(10)
        server.connect(peer)
        assert server.getsockname()[0].partition("%")[0] == "fe80::77"
        server.send(b"y")
        assert client.recv(10) == b"y"


def test_host_unreachable_reaches_the_socket(served):
    """Also where the host itself says so, whose address is the guest's."""
    with served.guest.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        client.connect(("10.99.0.78", 9))
        client.send(b"x")

        def error():
            try:
                return client.recvmsg(2000, 512, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)[1]
            except BlockingIOError:
                return None

        ancillary = until(error, 8)
        number, origin, kind, code = struct.unpack_from("=IBBB", ancillary[0][2])
        assert (number, origin, kind, code) == (errno.EHOSTUNREACH, 2, 3, 1)


def test_a_link_local_client(forwarded):
    with bound(forwarded.guest, "::", 53) as server:
        link_local = re.search(
            r"fe80::\S+(?=/)", forwarded.remote.run("ip", "-6", "addr", "show", "veth1").stdout
        )[0]
        host = re.search(r"fe80::\S+(?=/)", forwarded.host.run("ip", "-6", "addr", "show", "veth0").stdout)[
            0
        ]
        index = int(forwarded.remote.run("ip", "-o", "link", "show", "veth1").stdout.split(":")[0])
        for namespace in (forwarded.host, forwarded.remote):
            until(lambda namespace=namespace: "tentative" not in namespace.run("ip", "-6", "addr").stdout)
        with forwarded.remote.socket(socket.AF_INET6, socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.sendto(b"x", (host, 5353, 0, index))
            got, peer = server.recvfrom(10)
            assert peer[0].partition("%")[0] == link_local
            server.sendto(b"y", peer)
            assert client.recvfrom(10)[1][1] == 5353


def test_a_burst_over_a_short_cut_that_is_not_there_yet(forwarded):
    with bound(forwarded.guest, "0.0.0.0", 53) as server, bound(forwarded.host, "127.0.0.1") as client:
        for i in range(150):
            client.sendto(b"%d" % i, ("127.0.0.1", 5353))
        assert [server.recv(10) for _ in range(150)] == [b"%d" % i for i in range(150)]


def test_one_version_only_whatever_the_frame_says(world):
    """IPv4 in a frame of another type is nobody's."""
    world.pysplice("--config-net", *NONE, "-6")
    tap = world.guest.call(raw_socket)
    with bound(world.remote, world.REMOTE4) as server:
        datagram = UDP(sport=5000, dport=server.getsockname()[1]) / bytes(2000)
        for part in pieces(4, world.HOST4, world.REMOTE4, datagram):
            for kind in (b"\x08\x00", b"\x12\x34", b"\x86\xdd"):
                tap.send(part[:12] + kind + part[14:])
        server.settimeout(0.7)
        with pytest.raises(TimeoutError):
            server.recv(10)
    tap.close()


def test_one_socket_for_the_loopback_and_an_interface(world):
    """Where datagrams leave from is chosen for each, so a guest's port is one socket even so."""
    process = world.pysplice("--config-net", *NONE, "--outbound-if4", "veth0", "-o", world.HOST4)
    descriptors = lambda: len(os.listdir(f"/proc/{process.pid}/fd"))  # noqa: E731
    before = descriptors()
    with (
        bound(world.guest, "0.0.0.0", 4500) as guest,
        bound(world.remote, world.REMOTE4) as remote,
        bound(world.host, "127.0.0.1") as local,
    ):
        for address, server in ((world.REMOTE4, remote), (world.GATEWAY4, local)):
            guest.sendto(b"x", (address, server.getsockname()[1]))
            _, peer = server.recvfrom(10)
            assert peer == (world.HOST4 if server is remote else "127.0.0.1", 4500)
            server.sendto(b"y", peer)
            assert guest.recvfrom(10)[1] == (address, server.getsockname()[1])
        assert descriptors() == before + 1


def test_a_port_that_the_guest_uses_is_published(world, tmp_path):
    """The socket that the guest's datagrams left by makes way; they leave by the listener then, from the same port."""
    control = str(tmp_path / "ctl")
    world.pysplice("--config-net", *NONE, "--control", control)
    with bound(world.guest, "0.0.0.0", 4500) as guest, bound(world.remote, world.REMOTE4) as remote:
        for published in (False, True, False):
            guest.sendto(b"x", remote.getsockname())
            _, peer = remote.recvfrom(10)
            assert peer == (world.HOST4, 4500)
            remote.sendto(b"y", peer)
            assert guest.recvfrom(10)[1] == remote.getsockname()
            if published:
                with bound(world.remote, world.GATEWAY4) as stranger:
                    stranger.sendto(b"z", (world.HOST4, 4500))
                    assert guest.recvfrom(10)[1] == stranger.getsockname()
            world.host.run(*PYSPLICE, "ctl", control, "del" if published else "add", "-u", "4500")


LAST_WORDS = """
import os, socket, sys
socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(int(sys.argv[1]))]
for sock in socks:
    sock.sendto(b"last words", (sys.argv[2], int(sys.argv[3])))
os._exit(0)
"""


def test_what_a_command_sends_before_it_ends_arrives(world):
    """From more ports than are opened at once."""
    server = bound(world.remote, world.REMOTE4)
    count = 400
    port = str(server.getsockname()[1])
    command = world.host.spawn(
        *PYSPLICE, "--config-net", "--", sys.executable, "-c", LAST_WORDS, str(count), world.REMOTE4, port
    )
    assert command.wait(30) == 0
    server.settimeout(5)
    assert len({server.recvfrom(100)[1] for _ in range(count)}) == count
    server.close()


def test_datagrams_in_fragments_keep_up(world):
    """The guest has to wait where it is too fast: fragments that wait are no reason to lose others."""
    world.pysplice("--config-net", "--mtu", "1500")
    server = bound(world.remote, world.REMOTE4)
    sock = asking(world, 4, server)
    sock.send(b"first")
    server.recv(10)
    for n in range(40):
        for _ in range(10):
            sock.send(bytes(8192))
        got = 0
        server.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while got < 10:
                got += len(server.recv(10_000)) == 8192
        assert got == 10, n
    server.close()
    sock.close()
