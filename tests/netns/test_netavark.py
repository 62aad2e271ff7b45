"""The plugin for podman's networks, called as netavark 1.14 calls it (its requests are copied here)."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from .test_forward import accept, refused

PLUGIN = str(Path(sys.executable).with_name("pysplice-netavark"))
CONTAINER = "fd0eaf59c1a7e094d94bd85f65127a4d9c76e988f46196b416474d8b2dea179e"
NETWORK: dict[str, object] = {
    "dns_enabled": True, "driver": "pysplice", "internal": False, "ipv6_enabled": False, "name": "box",
    "id": "b29444f4c46dff4b31d72d0146ea29d3af0eb9b3ad71c584a7060aa4bc594b74", "network_interface": None,
    "options": None, "ipam_options": None, "subnets": None, "routes": None, "network_dns_servers": None,
}  # fmt: skip
WANTED = {"aliases": [CONTAINER[:12]], "interface_name": "eth0", "static_ips": None, "static_mac": None}
REQUEST: dict[str, object] = {
    "container_id": CONTAINER, "container_name": "w", "port_mappings": None, "network": NETWORK,
    "network_options": WANTED,
}  # fmt: skip


class Podman:
    """Calls the plugin on a host."""

    def __init__(self, world, state: str) -> None:
        self.world = world
        self.state = state

    def call(self, *words: str, **changes) -> dict:
        """The answer; an error is one too, and nothing else may be printed."""
        return self.send(json.dumps(REQUEST | changes), *words)

    def send(self, text: str, *words: str) -> dict:
        env = {**os.environ, "PYSPLICE_CNI_STATE": self.state}
        result = subprocess.run(
            self.world.host.enter(PLUGIN, *words), input=text, env=env, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert not result.stderr
        answer = json.loads(result.stdout) if result.stdout else {}
        assert (result.returncode, bool(result.returncode)) == (int("error" in answer), "error" in answer)
        return answer


@pytest.fixture
def podman(world):
    # The path of a socket is bounded (unix(7))
    with tempfile.TemporaryDirectory(dir="/run") as folder:
        made = Podman(world, f"{folder}/state")
        yield made
        assert made.call("teardown", world.guest.path) == {}
        assert os.listdir(made.state) == []


def test_a_container(world, podman):
    ports = [
        {"container_port": 80, "host_ip": "", "host_port": 8080, "protocol": "tcp,udp", "range": 1},
        {"container_port": 90, "host_ip": "", "host_port": 8090, "protocol": "tcp", "range": 3},
    ]
    answer = podman.call("setup", world.guest.path, port_mappings=ports)
    interface = answer["interfaces"]["eth0"]
    assert interface["subnets"][0] == {"ipnet": f"{world.HOST4}/24", "gateway": world.GATEWAY4}
    assert interface["mac_address"] in world.guest.run("ip", "link").stdout
    assert answer["dns_server_ips"] == ["169.254.1.1"]
    with world.remote.listen("0.0.0.0", 81) as listener:
        with world.guest.connect(world.REMOTE4, 81), accept(listener)[0]:
            pass
    for outside, inside in ((8080, 80), (8092, 92)):
        with world.guest.listen("0.0.0.0", inside) as listener:
            with world.remote.connect(world.HOST4, outside), accept(listener)[0]:
                pass
    # Once more: the same answer by the same process
    assert podman.call("setup", world.guest.path, port_mappings=ports) == answer
    assert podman.call("teardown", world.guest.path) == {}
    assert refused(world.remote, world.HOST4, 8080)


def test_what_podman_can_ask_for(world, podman):
    network = NETWORK | {
        "options": {"mtu": "1400", "options": "--no-icmp"},
        "network_dns_servers": ["192.0.2.53"],
    }
    wanted = WANTED | {
        "static_ips": ["198.51.100.7"],
        "static_mac": "02:00:00:00:00:07",
    }
    answer = podman.call("setup", world.guest.path, network=network, network_options=wanted)
    assert answer["dns_server_ips"] == ["192.0.2.53"]
    assert answer["interfaces"]["eth0"]["mac_address"] == "02:00:00:00:00:07"
    assert answer["interfaces"]["eth0"]["subnets"][0]["ipnet"].startswith("198.51.100.7/")
    assert "mtu 1400" in world.guest.run("ip", "link", "show", "eth0").stdout


def test_a_new_network(world, podman):
    assert podman.send("{}", "info")["api_version"] == "1.0.0"
    assert podman.send(json.dumps(NETWORK), "create") == NETWORK


@pytest.mark.parametrize(
    ("changes", "why"),
    (
        ({"internal": True}, "an internal network has no use"),
        ({"subnets": [{"subnet": "10.5.0.0/24"}]}, "no subnet to choose"),
        ({"options": {"vlan": "5"}}, "there is no option 'vlan'"),
        ({"options": {"mtu": "many"}}, "mtu: 'many' is no number"),
        ({"options": []}, None),
        ({"options": [1]}, "options is no object"),
    ),
    ids=str,
)
def test_a_network_that_cannot_be_had(world, podman, changes, why):
    answer = podman.send(json.dumps(NETWORK | changes), "create")
    assert why is None or why in answer["error"]


@pytest.mark.parametrize(
    ("changes", "why"),
    (
        ({"port_mappings": [{"container_port": 80, "host_port": "x"}]}, "is no number"),
        ({"port_mappings": [{"container_port": 80, "host_port": True}]}, "is no number"),
        ({"port_mappings": [{"container_port": 80, "host_port": 80, "range": -3}]}, "is no number"),
        ({"port_mappings": [{"container_port": 80, "host_port": 1, "range": 65000}]}, "more than 1024"),
        ({"port_mappings": [{"container_port": 80, "host_port": 70000}]}, "70000 is no port"),
        ({"port_mappings": [{"container_port": 80, "host_port": 80, "protocol": "sctp"}]}, "sctp"),
        ({"port_mappings": 5}, "no list"),
        ({"network": None}, "no name"),
        ({"container_id": ""}, "no name"),
        ({"network_options": {"interface_name": "a/b"}}, "a/b"),
        ({"network_options": {"interface_name": "eth0", "static_ips": ["x"]}}, "'x' is no address"),
        ({"network_options": {"interface_name": "eth0", "static_ips": 7}}, "ips is no list"),
        ({"network_options": {"interface_name": "eth0", "static_mac": [1]}}, "--ns-mac-addr"),
        ({"network": NETWORK | {"network_dns_servers": [5]}}, "nameservers is no list"),
        ({"network": NETWORK | {"options": {"runas": "--help"}}}, "no such user"),
        ({"network": NETWORK | {"options": {"options": "--no-such"}}}, "--no-such"),
        ({"network": NETWORK | {"options": {"options": "-l /tmp/x"}}}, "log file is not for a network"),
        (
            {"network": NETWORK | {"options": {"options": "--netns /run/netns/x"}}},
            "target is not for a network",
        ),
        ({"network": NETWORK | {"options": {"options": "touch /tmp/x"}}}, "target is not for a network"),
        ({"network": NETWORK | {"options": {"options": "--help"}}}, "nothing to print for help"),
        ({"network": NETWORK | {"options": {"runas": "\u00b2"}}}, "no such user"),
        ({"network": NETWORK | {"options": {"runas": "9" * 5000}}}, "no such user"),
        ({"network": NETWORK | {"options": {"mtu": "9" * 5000}}}, "is no number"),
        ({"network": NETWORK | {"name": "\ud800"}}, "invalid"),
        ({"network_options": {"interface_name": "a\0b"}}, "invalid"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_that_cannot_be_met(world, podman, changes, why):
    assert why in podman.call("setup", world.guest.path, **changes)["error"]
    assert "eth0" not in world.guest.run("ip", "link").stdout


def test_a_user_that_is_gone(world, podman):
    podman.call("setup", world.guest.path)
    network = NETWORK | {"options": {"runas": "nobody-of-this-name"}}
    assert podman.call("teardown", world.guest.path, network=network) == {}
    assert "eth0" not in world.guest.run("ip", "link").stdout


def test_a_folder_that_others_may_write_to(world, podman):
    os.makedirs(podman.state)
    os.chmod(podman.state, 0o777)
    assert "others may write" in podman.call("setup", world.guest.path)["error"]
    os.chmod(podman.state, 0o711)


@pytest.mark.parametrize("text", ("", "[]", "{", "null", "[" * 100_000), ids=lambda text: text[:5])
def test_no_request(world, podman, text):
    assert podman.send(text, "setup", world.guest.path)["error"]
    assert podman.send(text, "teardown", world.guest.path)["error"]
    assert "netavark calls this with" in podman.send(text)["error"]
