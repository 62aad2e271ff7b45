"""What a guest gets from its link, by the programs that guests use: DHCP clients, SLAAC, dig."""

import os
import re
import signal
import subprocess
import time

import pytest

from ..support.namespaces import PYSPLICE, run, stop
from .test_clients import need
from .test_forward import NONE, until

TOLD = (
    *("--dhcp-dns", "--dhcp-search", "-D", "10.0.0.53", "-D", "fd00::53", "-S", "a.example b.example"),
    *("-H", "box", "--fqdn", "box.example.org"),
)


@pytest.fixture
def link(world):
    """A tap that is up and has nothing yet."""

    def make(*options):
        world.process = world.pysplice(*NONE, *options)
        world.guest.sysctl("net.ipv6.conf.tap0.accept_dad", "0")
        world.guest.run("ip", "link", "set", "tap0", "up")
        return world

    return make


def dhclient(world, tmp_path, *options):
    """The lease as dhclient writes it down; nothing is configured."""
    lease = tmp_path / "lease"
    lease.touch()
    world.guest.run(
        "dhclient", "-1", "-v", *options, "-sf", "/bin/true", "-lf", str(lease), "-pf", str(tmp_path / "pid"),
        "tap0", timeout=40,
    )  # fmt: skip
    # What stays in the background writes its own number, after the program that was started has ended
    os.kill(
        int(until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())), signal.SIGTERM
    )
    return lease.read_text()


@need("dhclient")
def test_dhclient(link, tmp_path):
    world = link(*TOLD)
    lease = dhclient(world, tmp_path)
    for line in (
        f"fixed-address {world.HOST4};",
        "option subnet-mask 255.255.255.0;",
        f"option routers {world.GATEWAY4};",
        "option dhcp-lease-time 4294967295;",
        f"option dhcp-server-identifier {world.GATEWAY4};",
        "option interface-mtu 65520;",
        "option domain-name-servers 10.0.0.53;",
        'option domain-search "a.example.", "b.example.";',
        'option host-name "box";',
        'option fqdn.fqdn "box.example.org";',
    ):
        assert line in lease, line


@need("dhclient")
def test_what_is_not_asked_for_is_not_told(link, tmp_path):
    lease = dhclient(link("-m", "0", "-D", "10.0.0.53"), tmp_path)
    assert "fixed-address" in lease
    for name in ("domain-name-servers", "domain-search", "interface-mtu", "host-name", "fqdn", "routes"):
        assert name not in lease


@need("dhclient")
def test_dhclient_6(link, tmp_path):
    world = link(*TOLD)
    lease = dhclient(world, tmp_path, "-6")
    assert f"iaaddr {world.HOST6} {{" in lease
    assert "option dhcp6.name-servers fd00::53;" in lease
    assert 'option dhcp6.domain-search "a.example.", "b.example.";' in lease
    assert re.search(r'option dhcp6.fqdn.*|option fqdn.fqdn "box.example.org', lease)


UDHCPC_SCRIPT = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
ip link set $interface mtu ${mtu:-1500}
if [ -n "$staticroutes" ]; then
    set -- $staticroutes
    while [ $# -gt 1 ]; do
        [ "$2" = 0.0.0.0 ] && ip route add $1 dev $interface || ip route add $1 via $2 dev $interface onlink
        shift 2
    done
else
    ip route add default via $router dev $interface
fi
"""


@need("udhcpc")
@pytest.mark.parametrize("gateway", ("10.99.0.254", "192.0.2.9"))
def test_udhcpc_configures_a_guest(link, tmp_path, gateway):
    """Also where the gateway is not on the link: by classless static routes."""
    world = link("-g", gateway)
    script = tmp_path / "script"
    script.write_text(UDHCPC_SCRIPT)
    script.chmod(0o755)
    words = ("udhcpc", "-i", "tap0", "-n", "-q", "-f", "-s", str(script), "-O", "mtu", "-O", "staticroutes")
    world.guest.run(*words, timeout=20)
    assert "mtu 65520" in world.guest.run("ip", "link", "show", "tap0").stdout
    with world.remote.listen(world.REMOTE4) as listener:
        with world.guest.connect(world.REMOTE4, listener.getsockname()[1]):
            listener.accept()[0].close()


@need("dhclient")
@pytest.mark.parametrize("option", ("--no-dhcp", "--no-dhcpv6"))
def test_left_out(link, tmp_path, option):
    world = link(option)
    lease = tmp_path / "lease"
    lease.touch()
    six = ["-6"] if option == "--no-dhcpv6" else []
    process = world.guest.spawn(
        *(
            "dhclient",
            "-1",
            *six,
            "-sf",
            "/bin/true",
            "-lf",
            str(lease),
            "-pf",
            str(tmp_path / "pid"),
            "tap0",
        ),
        stderr=subprocess.DEVNULL,
    )
    time.sleep(4)
    stop(process)
    assert lease.read_text() == "" or (
        "fixed-address" not in lease.read_text() and "iaaddr" not in lease.read_text()
    )


def test_slaac(link):
    """The kernel's own: an address of the prefix, the MTU, and a default route to our link-local address."""
    world = link("-m", "1400")

    def configured():
        out = world.guest.run("ip", "-6", "addr", "show", "dev", "tap0").stdout
        return re.search(r"inet6 fd99::\S+/64 scope global", out)

    until(configured)
    route = world.guest.run("ip", "-6", "route", "show", "default").stdout
    assert "via fe80::" in route and "dev tap0" in route
    assert world.guest.run("cat", "/proc/sys/net/ipv6/conf/tap0/mtu").stdout == "1400\n"
    with world.remote.listen(world.REMOTE6) as listener:
        with world.guest.connect(world.REMOTE6, listener.getsockname()[1]):
            listener.accept()[0].close()


# Names


@pytest.fixture
def server(world):
    """dnsmasq on the host's loopback, and what it knows."""
    words = (
        "dnsmasq --no-daemon --port=53 --listen-address=127.0.0.1,::1 --bind-interfaces --no-resolv --no-hosts "
        "--address=/box.example/192.0.2.80 --pid-file= --conf-file=/dev/null"
    )
    process = world.host.spawn(*words.split(), stderr=subprocess.DEVNULL)
    until(lambda: ":53 " in world.host.run("ss", "-Hltn").stdout)
    yield world
    stop(process)


def dig(world, *words, check=True):
    return world.guest.run(
        "dig", "+short", "+tries=1", "+time=3", *words, check=check, timeout=20
    ).stdout.split()


@need("dnsmasq", "dig")
@pytest.mark.parametrize("transport", ("+notcp", "+tcp"))
@pytest.mark.parametrize(
    ("options", "address"),
    (
        (("--dns-forward", "169.254.1.1", "--dns-host", "127.0.0.1"), "169.254.1.1"),
        (("--dns-forward", "fd53::1", "--dns-host", "::1"), "fd53::1"),
        ((), "10.99.0.254"),  # the gateway is the host's loopback
    ),
)
def test_questions_reach_the_hosts_server(server, transport, options, address):
    server.pysplice("--config-net", *NONE, *options)
    assert dig(server, transport, f"@{address}", "box.example") == ["192.0.2.80"]


@need("dnsmasq", "dig")
def test_only_questions_are_forwarded(server):
    """Other ports of that address are whatever they were."""
    server.pysplice(
        "--config-net", *NONE, "--no-map-gw", "--dns-forward", server.GATEWAY4, "--dns-host", "127.0.0.1"
    )
    assert dig(server, f"@{server.GATEWAY4}", "box.example") == ["192.0.2.80"]
    with server.remote.listen(server.GATEWAY4, 5300) as listener:
        with server.guest.connect(server.GATEWAY4, 5300):
            listener.accept()[0].close()


def test_a_name_server_of_the_host_that_is_on_its_loopback(server, tmp_path):
    """resolv.conf says 127.0.0.1: the guest is told the gateway, and its questions go there."""
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("nameserver 127.0.0.1\nsearch one.example two.example\n")
    words = " ".join(
        (*PYSPLICE, "-f", "--config-net", *NONE, "--netns", server.guest.path, "-l", f"{tmp_path}/log")
    )
    script = f"mount --bind {resolv} $(realpath /etc/resolv.conf) && exec {words}"
    process = server.host.spawn("unshare", "-m", "sh", "-c", script)
    try:
        until(lambda: "tap0" in server.guest.run("ip", "route").stdout)
        until(lambda: "name servers" in (tmp_path / "log").read_text())
        assert f"name servers: {server.GATEWAY4}" in (tmp_path / "log").read_text()
        assert dig(server, f"@{server.GATEWAY4}", "box.example") == ["192.0.2.80"]
    finally:
        stop(process)


def test_no_name_server_is_no_failure(world, tmp_path):
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("# nothing\n")
    script = f"mount --bind {resolv} $(realpath /etc/resolv.conf) && exec {' '.join(PYSPLICE)} -- true"
    result = world.host.run("unshare", "-m", "sh", "-c", script)
    assert result.stderr == "pysplice: no name server found on the host\n"
    script = script.replace("-- true", "-D none -- true")
    assert world.host.run("unshare", "-m", "sh", "-c", script).stderr == ""


# What is captured


@need("tshark")
def test_a_capture_opens(world, tmp_path):
    capture = tmp_path / "tap.pcap"
    process = world.pysplice("--config-net", *NONE, "-p", str(capture), "-m", "1500")
    with world.remote.listen(world.REMOTE4) as listener:
        with world.guest.connect(world.REMOTE4, listener.getsockname()[1]) as client:
            remote, _ = listener.accept()
            with remote:
                client.sendall(b"up" * 10000)
                remote.sendall(b"down" * 10000)
                for reader, total in ((remote, 20000), (client, 40000)):
                    got = 0
                    while got < total:
                        got += len(reader.recv(65536))
    stop(process)
    assert capture.stat().st_mode & 0o777 == 0o600
    out = run(
        "tshark", "-r", str(capture), "-T", "fields", "-e", "tcp.len", "-e", "ip.src", timeout=60
    ).stdout
    up = down = 0
    for line in out.splitlines():
        length, _, source = line.partition("\t")
        if length:
            up += int(length) * (source == world.HOST4)
            down += int(length) * (source == world.REMOTE4)
    assert (up, down) == (20000, 40000)
