"""The plugin for containers' network interfaces, called as the specification says."""

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pysplice.cni import __main__ as command
from pysplice.cni import attachment as attachments
from pysplice.cni import request as cni
from pysplice.cni import serve

from ..support.namespaces import Namespace
from .test_forward import accept, until

PLUGIN = str(Path(sys.executable).with_name("pysplice-cni"))
EXAMPLE = Path(__file__).parents[2] / "examples" / "cni" / "10-pysplice.conflist"


class Engine:
    """Calls the plugin for containers on a host."""

    def __init__(self, host: Namespace, folder: Path) -> None:
        self.host = host
        self.state = folder / "state"
        conf = json.loads(EXAMPLE.read_text())
        self.conf = {"cniVersion": "1.1.0", "name": conf["name"], **conf["plugins"][0]}

    def start(self, command: str, netns: str = "", container: str = "box", **changes) -> subprocess.Popen:
        env = {name: value for name, value in os.environ.items() if not name.startswith("CNI_")}
        env |= {"CNI_COMMAND": command, "CNI_PATH": "/opt/cni/bin", "PYSPLICE_CNI_STATE": str(self.state)}
        if command in ("ADD", "DEL", "CHECK"):
            env |= {"CNI_CONTAINERID": container, "CNI_IFNAME": "eth0", "CNI_NETNS": netns}
        env |= {name: changes.pop(name) for name in list(changes) if name.startswith("CNI_")}
        words = self.host.enter(PLUGIN)
        process = subprocess.Popen(words, stdin=-1, stdout=-1, stderr=-1, text=True, env=env)
        conf = changes.pop("text", None) or json.dumps(self.conf | changes)
        process.stdin.write(conf)
        process.stdin.close()
        process.stdin = None
        return process

    def call(self, *args, **changes) -> dict:
        """The result, or the error, of a request; both have to be one JSON object, or nothing."""
        process = self.start(*args, **changes)
        out, err = process.communicate(timeout=60)
        assert not err
        answer = json.loads(out) if out else {}
        assert bool(process.returncode) == ("code" in answer)
        return answer


@pytest.fixture
def engine(world):
    # The path of a socket is bounded (unix(7))
    with tempfile.TemporaryDirectory(dir="/run") as folder:
        made = Engine(world.host, Path(folder))
        yield made
        made.call("GC", **{"cni.dev/valid-attachments": []})
        assert not [name for name in os.listdir(made.state) if not name.endswith(".lock")]


def serving(engine: Engine) -> list[int]:
    """The processes that serve containers of this engine."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if str(engine.state).encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                found.append(int(name))
    return found


PORTS = {
    "portMappings": [
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
        {"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "0.0.0.0"},
    ]
}


def test_a_container(world, engine):
    result = engine.call("ADD", world.guest.path, runtimeConfig=PORTS)
    (interface,) = result["interfaces"]
    assert (interface["name"], interface["sandbox"]) == ("eth0", world.guest.path)
    assert interface["mac"] in world.guest.run("ip", "link", "show", "eth0").stdout
    assert result["ips"] == [
        {"address": f"{world.HOST4}/24", "interface": 0, "gateway": world.GATEWAY4},
        {"address": f"{world.HOST6}/64", "interface": 0, "gateway": world.GATEWAY6},
    ]
    assert {"dst": "0.0.0.0/0", "gw": world.GATEWAY4} in result["routes"]
    assert result["dns"]["nameservers"] == ["169.254.1.1"]
    # Out, and in by published ports
    for address in (world.REMOTE4, world.REMOTE6):
        with world.remote.listen(address, 7000) as listener, world.guest.connect(address, 7000):
            accept(listener)[0].close()
    with world.guest.listen("::", 80) as listener:
        for host in (world.HOST4, world.HOST6):
            with world.remote.connect(host, 8080) as client:
                sock, peer = accept(listener)
                sock.close()
                assert peer[0].removeprefix("::ffff:") == client.getsockname()[0]
    assert engine.call("CHECK", world.guest.path, prevResult=result) == {}
    wrong = result | {"ips": [{"address": "192.0.2.9/24"}]}
    assert engine.call("CHECK", world.guest.path, prevResult=wrong)["code"] == cni.NOT_SERVED
    # Again is the same
    before = serving(engine)
    assert engine.call("ADD", world.guest.path, runtimeConfig=PORTS) == result
    assert serving(engine) == before
    assert engine.call("DEL", world.guest.path) == {}
    assert not serving(engine)
    assert "eth0" not in world.guest.run("ip", "link").stdout
    assert engine.call("DEL", world.guest.path) == {}
    assert engine.call("DEL", "") == {}
    assert engine.call("CHECK", world.guest.path, prevResult=result)["code"] == cni.NOT_SERVED


@pytest.mark.parametrize("version", cni.VERSIONS)
def test_versions(world, engine, version):
    result = engine.call("ADD", world.guest.path, cniVersion=version)
    assert result["cniVersion"] == version
    if version in ("0.1.0", "0.2.0"):
        assert result["ip4"] == {
            "ip": f"{world.HOST4}/24",
            "gateway": world.GATEWAY4,
            "routes": [{"dst": "0.0.0.0/0", "gw": world.GATEWAY4}],
        }
        assert result["ip6"]["ip"] == f"{world.HOST6}/64"
    else:
        assert ("version" in result["ips"][0]) == (version < "1")
    checked = engine.call("CHECK", world.guest.path, cniVersion=version, prevResult=result)
    assert checked.get("code", 0) == (cni.INCOMPATIBLE if version < "0.4" else 0)
    assert engine.call("VERSION", cniVersion=version) == {
        "cniVersion": version,
        "supportedVersions": list(cni.VERSIONS),
    }
    assert engine.call("DEL", world.guest.path, cniVersion=version) == {}


def test_what_the_engine_asks_for(world, engine):
    runtime = {
        "ips": ["10.9.8.7/24", "fd09::7/64"],
        "dns": {"servers": ["192.0.2.53"], "searches": ["a.example"]},
    }
    result = engine.call("ADD", world.guest.path, runtimeConfig=runtime, mtu=1400, options=["--no-map-gw"])
    assert [entry["address"] for entry in result["ips"]] == ["10.9.8.7/24", "fd09::7/64"]
    assert result["dns"] == {"nameservers": ["192.0.2.53"], "search": ["a.example"]}
    assert "mtu 1400" in world.guest.run("ip", "link", "show", "eth0").stdout
    with world.host.listen("127.0.0.1", 9000), pytest.raises(OSError):
        world.guest.connect(world.GATEWAY4, 9000)


@pytest.mark.parametrize("whole", (True, False))
def test_after_a_crash(world, engine, whole):
    """All processes are killed, or the one that serves: nothing is left that is in the way of a new one."""
    result = engine.call("ADD", world.guest.path, runtimeConfig=PORTS)
    pids = serving(engine)
    for pid in pids if whole else pids[:1]:
        os.kill(pid, signal.SIGKILL)
    assert engine.call("CHECK", world.guest.path, prevResult=result)["code"] == cni.NOT_SERVED
    again = engine.call("ADD", world.guest.path, runtimeConfig=PORTS)
    assert again["ips"] == result["ips"]
    with world.guest.listen("0.0.0.0", 80) as listener, world.remote.connect(world.HOST4, 8080):
        accept(listener)[0].close()
    # And without anything that was written down, as after a reboot
    for name in os.listdir(engine.state):
        os.unlink(engine.state / name)
    assert serving(engine)
    assert engine.call("DEL", world.guest.path) == {}
    assert not serving(engine)


def test_another_namespace_for_the_same_container(world, engine):
    engine.call("ADD", world.guest.path, runtimeConfig=PORTS)
    other = Namespace(f"{world.guest.name}-new")
    try:
        result = engine.call("ADD", other.path, runtimeConfig=PORTS)
        assert result["interfaces"][0]["sandbox"] == other.path
        with other.listen("0.0.0.0", 80) as listener, world.remote.connect(world.HOST4, 8080):
            accept(listener)[0].close()
    finally:
        other.delete()
    until(lambda: not serving(engine))


def test_what_no_engine_knows_any_more(world, engine):
    other = Namespace(f"{world.guest.name}-b")
    try:
        engine.call("ADD", world.guest.path, container="a")
        engine.call("ADD", other.path, container="b", name="another")
        engine.call("GC", **{"cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}]})
        assert "eth0" in world.guest.run("ip", "link").stdout
        engine.call("GC", **{"cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth1"}]})
        assert "eth0" not in world.guest.run("ip", "link").stdout
        assert "eth0" in other.run("ip", "link").stdout  # of another network
        engine.call("DEL", other.path, container="b", name="another")
        assert not serving(engine)
    finally:
        other.delete()


def test_many_at_once(world, engine):
    """The same container several times, and others beside it: one process each."""
    others = [Namespace(f"{world.guest.name}-{n}") for n in range(3)]
    try:
        with concurrent.futures.ThreadPoolExecutor(9) as pool:
            calls = [pool.submit(engine.call, "ADD", world.guest.path, container="same") for _ in range(3)]
            calls += [
                pool.submit(engine.call, "ADD", other.path, container=f"box{n}")
                for n, other in enumerate(others)
            ]
            results = [call.result() for call in calls]
        assert all("ips" in result for result in results)
        assert results[0] == results[1] == results[2]
        namespaces = set()
        for pid in serving(engine):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            namespaces.add((words[words.index("--netns") + 1], words[words.index("--control") + 1]))
        assert len(namespaces) == 4
    finally:
        for other in others:
            other.delete()


ERRORS: dict[str, tuple[dict, int]] = {
    "no command": ({"command": ""}, cni.ENVIRONMENT),
    "another command": ({"command": "MEND"}, cni.ENVIRONMENT),
    "no container": ({"CNI_CONTAINERID": ""}, cni.ENVIRONMENT),
    "a path as a container": ({"CNI_CONTAINERID": "../x"}, cni.ENVIRONMENT),
    "no interface": ({"CNI_IFNAME": ""}, cni.ENVIRONMENT),
    "a long name": ({"CNI_IFNAME": "a" * 16}, cni.ENVIRONMENT),
    "dots": ({"CNI_IFNAME": ".."}, cni.ENVIRONMENT),
    "no namespace": ({"CNI_NETNS": ""}, cni.ENVIRONMENT),
    "a namespace that is not there": ({"CNI_NETNS": "/run/netns/none"}, cni.ENVIRONMENT),
    "no JSON": ({"text": "{"}, cni.NOT_DECODED),
    "deep JSON": ({"text": "[" * 200_000}, cni.NOT_DECODED),
    "no object": ({"text": "[]"}, cni.NOT_DECODED),
    "a version to come": ({"cniVersion": "9.0.0"}, cni.INCOMPATIBLE),
    "no name": ({"name": ""}, cni.INVALID),
    "a path as a name": ({"name": "../x"}, cni.INVALID),
    "a whole list": ({"plugins": [{"type": "pysplice-cni"}]}, cni.INVALID),
    "a chain": ({"prevResult": {"ips": []}}, cni.INVALID),
    "no port": (
        {"runtimeConfig": {"portMappings": [{"hostPort": "x", "containerPort": 1}]}},
        cni.INVALID,
    ),
    "a socket as a port": (
        {"runtimeConfig": {"portMappings": [{"hostPort": "unix:/run/x", "containerPort": 1}]}},
        cni.INVALID,
    ),
    "a socket as an address": (
        {"runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 1, "hostIP": "unix:/run"}]}},
        cni.INVALID,
    ),
    "true as a port": (
        {"runtimeConfig": {"portMappings": [{"hostPort": True, "containerPort": 1}]}},
        cni.INVALID,
    ),
    "two addresses": ({"runtimeConfig": {"ips": ["10.1.1.1/24", "10.1.1.2/24"]}}, cni.UNSUPPORTED),
    "an MTU": ({"mtu": {}}, cni.INVALID),
    "a NUL": ({"options": ["a\0b"]}, cni.INVALID),
    "a surrogate": ({"options": ["\ud800"]}, cni.INVALID),
    "a user with a NUL": ({"runas": "x\0"}, cni.INVALID),
    "no ips": ({"command": "CHECK", "prevResult": {"ips": 5}}, cni.NOT_SERVED),
    "another protocol": (
        {"runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 1, "protocol": "sctp"}]}},
        cni.UNSUPPORTED,
    ),
    "no list of ports": ({"runtimeConfig": {"portMappings": {}, "ips": 5}}, cni.INVALID),
    "no address": ({"runtimeConfig": {"ips": ["x"]}}, cni.INVALID),
    "an option": ({"options": ["--nonsense"]}, cni.INVALID),
    "a file": ({"options": ["-l", "/tmp/x"]}, cni.INVALID),
    "a command": ({"options": ["--", "true"]}, cni.INVALID),
    "no options": ({"options": "x"}, cni.INVALID),
    "no list for GC": ({"command": "GC"}, cni.INVALID),
    "no objects for GC": ({"command": "GC", "cni.dev/valid-attachments": [5]}, cni.INVALID),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(world, engine, name):
    changes, code = ERRORS[name]
    changes = {"CNI_NETNS": world.guest.path} | changes
    answer = engine.call(changes.pop("command", "ADD"), **changes)
    assert answer["code"] == code
    assert answer["msg"] and "\n" not in answer["msg"] and answer["cniVersion"] in cni.VERSIONS
    assert not engine.state.exists() or not serving(engine)
    engine.state.mkdir(exist_ok=True)


def test_a_program_that_another_user_could_have_put_there(tmp_path, monkeypatch):
    plugin, program = tmp_path / "pysplice-cni", tmp_path / "pysplice"
    for path in (plugin, program):
        path.write_text("#!/bin/true\n")
        path.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(plugin)])
    tmp_path.chmod(0o755)
    assert serve._program() == [str(program)]
    for path, mode in ((tmp_path, 0o1777), (program, 0o775)):
        before = path.stat().st_mode
        path.chmod(mode)
        assert serve._program() == [sys.executable, "-m", "pysplice"]
        path.chmod(before)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert serve._program() == [sys.executable, "-m", "pysplice"]


def test_a_port_that_is_taken(world, engine):
    with world.host.listen("0.0.0.0", 8080):
        answer = engine.call("ADD", world.guest.path, runtimeConfig=PORTS)
    assert answer["code"] == cni.NOT_STARTED
    assert answer["msg"] == "cannot listen on port 8080 (tcp): Address already in use"
    assert not serving(engine)
    assert "ips" in engine.call("ADD", world.guest.path, runtimeConfig=PORTS)


def test_lists_of_lists_for_gc(world, engine):
    assert engine.call("GC", **{"cni.dev/valid-attachments": [{"containerID": ["a"], "ifname": {}}]}) == {}


def test_both_wildcards_and_the_same_twice(world, engine):
    both = [
        {"hostPort": 8090, "containerPort": 80, "hostIP": address} for address in ("::", "0.0.0.0", "::")
    ]
    assert "ips" in engine.call("ADD", world.guest.path, runtimeConfig={"portMappings": both})
    with world.guest.listen("::", 80) as listener:
        for host in (world.HOST4, world.HOST6):
            with world.remote.connect(host, 8090):
                accept(listener)[0].close()


def test_an_add_that_was_killed(world, engine):
    """GC ends what it has begun."""
    process = engine.start("ADD", world.guest.path)
    until(
        lambda: engine.state.exists() and any(name.endswith(".json") for name in os.listdir(engine.state))
    )
    process.kill()
    process.communicate()
    until(lambda: "eth0" in world.guest.run("ip", "link").stdout)
    assert engine.call("GC", **{"cni.dev/valid-attachments": []}) == {}
    assert not serving(engine)


def test_another_namespace_at_the_same_path(world, engine):
    other = Namespace(f"{world.guest.name}-d")
    path = f"/run/netns/{world.guest.name}-path"
    Path(path).touch()
    try:
        for source in (world.guest.path, other.path):
            subprocess.run(["umount", path], check=False, stderr=subprocess.DEVNULL)
            subprocess.run(["mount", "--bind", source, path], check=True)
            assert "ips" in engine.call("ADD", path)
        assert "eth0" in other.run("ip", "link").stdout
        assert "eth0" not in world.guest.run("ip", "link").stdout
        assert engine.call("DEL", path) == {}
    finally:
        subprocess.run(["umount", path], check=False)
        os.unlink(path)
        other.delete()


def test_addresses_that_the_host_has_lost(world, engine):
    """The container still has them: it is healthy."""
    result = engine.call("ADD", world.guest.path, options=["--follow-host"])
    world.host.run("ip", "addr", "add", "10.99.0.9/24", "dev", "veth0")
    world.host.run("ip", "addr", "del", f"{world.HOST4}/24", "dev", "veth0")
    world.host.run("ip", "addr", "replace", "10.99.0.9/24", "dev", "veth0")
    world.host.run("ip", "route", "replace", "default", "via", world.GATEWAY4)
    until(lambda: "inet 10.99.0.9/24" in world.guest.run("ip", "addr").stdout)
    assert engine.call("CHECK", world.guest.path, prevResult=result) == {}


def test_what_others_call_themselves(monkeypatch, tmp_path):
    """A process of another user's is not looked at, whatever its command line says."""
    monkeypatch.setenv("PYSPLICE_CNI_STATE", str(tmp_path))
    attachment = cni.Attachment("net", "box", "eth0")
    words = [
        sys.executable,
        "-c",
        "import time; time.sleep(30)",
        "--control",
        attachments.control_path(attachment),
    ]
    pretender = subprocess.Popen(words)
    try:
        until(lambda: attachments.processes(attachment, {os.geteuid()}) == [pretender.pid])
        assert attachments.processes(attachment, {os.geteuid() + 1}) == []
        attachments.end(attachment, {os.geteuid() + 1})
        assert pretender.poll() is None
    finally:
        pretender.kill()
        pretender.wait()


def test_status(world, engine):
    assert engine.call("STATUS") == {}
    engine.state.chmod(0o700)


def test_the_end_of_the_namespace(world, engine):
    """Without DEL the process ends by itself; the engine's GC removes the rest."""
    other = Namespace(f"{world.guest.name}-c")
    engine.call("ADD", other.path)
    other.delete()
    until(lambda: not serving(engine))


def test_a_namespace_of_a_process(world, engine):
    box = world.host.spawn("unshare", "-n", "sleep", "60")
    try:
        until(lambda: os.readlink(f"/proc/{box.pid}/ns/net") != os.readlink("/proc/self/ns/net"))
        time.sleep(0.1)
        result = engine.call("ADD", f"/proc/{box.pid}/ns/net")
        assert result["ips"][0]["address"] == f"{world.HOST4}/24"
    finally:
        box.kill()
        box.wait()
    until(lambda: not serving(engine))


def test_the_example_is_one(engine):
    conf = json.loads(EXAMPLE.read_text())
    assert conf["cniVersion"] in cni.VERSIONS and command.NETWORK.fullmatch(conf["name"])
    assert conf["plugins"][0]["type"] == "pysplice-cni"
    engine.state.mkdir()
