"""The plugin for containers' network interfaces (CNI, https://www.cni.dev/docs/spec/): a request in, a result out.

Owns the files of its folder of state, one for each attachment.  Imports `config`, `control` and
`setup`.

An engine calls this program for each container: the environment has the request, stdin the configuration of the
network, and stdout takes the result.  ADD starts a pysplice in the background, which serves the container's namespace
until that is gone; DEL ends it.  A process is found by what it was started with, so nothing depends on a file that says
which one it is: after a crash or a reboot the same request finds none, and begins again.
"""

import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, NoReturn

from .config import Config, ConfigError, IPAddress
from .config.ports import PORT_MAX
from .setup import children, join, names, privileges

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION")

# Codes of errors, of the specification; 100 and above are ours
INCOMPATIBLE, UNSUPPORTED, ENVIRONMENT, IO_FAILURE, NOT_DECODED, INVALID, NOT_AVAILABLE = (
    1,
    2,
    4,
    5,
    6,
    7,
    50,
)
NOT_STARTED, NOT_SERVED, DEFECT = 100, 101, 999

# As the specification has them
CONTAINER_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
NETWORK = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
IFNAME = re.compile(r"[^\s/:\0]{1,15}")

DNS_FORWARD = "169.254.1.1"  # where queries go, unless the network has name servers of its own
START_TIMEOUT, STOP_TIMEOUT = 30.0, 10.0  # seconds
INPUT_MAX = 16 << 20
CMDLINE_MAX = 65536


class Failure(Exception):
    """A request that fails: a code, a message in a line, and details."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details


class Attachment(NamedTuple):
    """One interface of one container on one network."""

    network: str
    container: str
    ifname: str

    @property
    def name(self) -> str:
        """A file name for it."""
        text = "\0".join(self)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class Request(NamedTuple):
    """A request: what to do, the configuration of the network, and the version of the answer."""

    command: str
    conf: dict[str, Any]
    version: str
    attachment: Attachment
    netns: str


def main() -> NoReturn:
    """The command `pysplice-cni`: exits with its status."""
    version = VERSIONS[-1]
    try:
        command = os.environ.get("CNI_COMMAND", "")
        conf = _conf()
        version = str(conf.get("cniVersion", VERSIONS[0]))
        answer = _run(command, conf, version)
    except Failure as e:
        known = version if version in VERSIONS else VERSIONS[-1]
        answer = {"cniVersion": known, "code": e.code, "msg": e.message}
        if e.details:
            answer["details"] = e.details
        status = 1
    except Exception as e:
        answer = {
            "cniVersion": VERSIONS[-1],
            "code": DEFECT,
            "msg": f"internal error: {type(e).__name__}: {e}",
        }
        status = 1
    else:
        status = 0
    if answer is not None:
        print(json.dumps(answer))
    sys.stdout.flush()
    os._exit(status)


def _conf() -> dict[str, Any]:
    """The configuration on stdin; raises Failure."""
    try:
        conf = json.loads(sys.stdin.read(INPUT_MAX) or "{}")
    except (ValueError, RecursionError) as e:
        raise Failure(NOT_DECODED, "the configuration is no JSON", str(e)) from None
    if not isinstance(conf, dict):
        raise Failure(NOT_DECODED, "the configuration is no JSON object")
    return conf


def _run(command: str, conf: dict[str, Any], version: str) -> dict[str, Any] | None:
    """What is printed for a request that succeeds; raises Failure."""
    if command not in COMMANDS:
        raise Failure(ENVIRONMENT, f"CNI_COMMAND is '{command}', not one of {', '.join(COMMANDS)}")
    if command == "VERSION":
        known = version if version in VERSIONS else VERSIONS[-1]
        return {"cniVersion": known, "supportedVersions": list(VERSIONS)}
    if version not in VERSIONS:
        raise Failure(
            INCOMPATIBLE, f"version {version} is not supported", f"supported: {', '.join(VERSIONS)}"
        )
    network = conf.get("name", "")
    if not isinstance(network, str) or not NETWORK.fullmatch(network):
        raise Failure(INVALID, "the network has no valid name")
    if command == "STATUS":
        _status()
        return None
    if command == "GC":
        _collect(network, conf)
        return None
    attachment = Attachment(
        network, _variable("CNI_CONTAINERID", CONTAINER_ID), _variable("CNI_IFNAME", IFNAME)
    )
    netns = os.environ.get("CNI_NETNS", "")
    if not netns and command != "DEL":
        raise Failure(ENVIRONMENT, "CNI_NETNS is missing")
    request = Request(command, conf, version, attachment, netns)
    with _locked(attachment):
        if command == "ADD":
            return _add(request)
        if command == "CHECK":
            _check(request)
        else:
            _delete(attachment, _users(conf))
        return None


def _variable(name: str, pattern: re.Pattern[str]) -> str:
    value = os.environ.get(name, "")
    if not pattern.fullmatch(value) or value in (".", ".."):
        raise Failure(ENVIRONMENT, f"{name} is {'missing' if not value else 'invalid'}", value)
    return value


# The folder of state


def _folder() -> str:
    """The folder for sockets, locks and results, which is made if it is not there; raises Failure."""
    base = os.environ.get("PYSPLICE_CNI_STATE", "")
    if not base:
        runtime = os.environ.get("XDG_RUNTIME_DIR", "") if os.geteuid() else ""
        base = f"{runtime or '/run'}/pysplice-cni"
    try:
        os.makedirs(base, 0o711, exist_ok=True)
        if os.stat(base).st_uid != os.geteuid():
            raise Failure(IO_FAILURE, f"{base} is another user's")
    except OSError as e:
        raise Failure(IO_FAILURE, f"cannot make {base}: {e.strerror}") from None
    return base


@contextlib.contextmanager
def _locked(attachment: Attachment) -> Iterator[None]:
    """One request for an attachment at a time; raises Failure."""
    path = _lock(attachment)
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as e:
            raise Failure(IO_FAILURE, f"cannot open {path}: {e.strerror}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _is_there(path, fd):
                yield
                return
        finally:
            os.close(fd)


def _is_there(path: str, fd: int) -> bool:
    """False if the one who had the lock has removed its file: then the lock is worth nothing."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(attachment: Attachment) -> str:
    """The path of the lock."""
    return f"{_folder()}/{attachment.name}.lock"


def _control(attachment: Attachment) -> str:
    """The path of the control socket: what a process is found by."""
    return f"{_folder()}/{attachment.name}.sock"


def _note(attachment: Attachment) -> str:
    """The path of the file that says whose attachment this is, and of which namespace."""
    return f"{_folder()}/{attachment.name}.json"


def _attached(attachment: Attachment) -> object:
    """Which namespace was attached last, as _identity() has it; None if that is not known."""
    try:
        with open(_note(attachment), encoding="utf-8") as file:
            return json.load(file)["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _identity(netns: str) -> list[int]:
    """Which namespace this is, whatever its path; raises Failure."""
    try:
        found = os.stat(netns)
    except OSError as e:
        raise Failure(ENVIRONMENT, f"CNI_NETNS: {netns}: {e.strerror}") from None
    return [found.st_dev, found.st_ino]


def _processes(attachment: Attachment, users: Collection[int]) -> list[int]:
    """The processes of these users that serve an attachment."""
    marker = _control(attachment).encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        # What a process calls itself is its own choice, and may be of any length: so its user is looked at first
        with contextlib.suppress(OSError, ValueError):
            if _user(name) not in users:
                continue
            with open(f"/proc/{name}/cmdline", "rb", buffering=0) as file:
                words = file.read(CMDLINE_MAX).split(b"\0")
            if marker in words and words[words.index(marker) - 1] == b"--control":
                found.append(int(name))
    return found


def _user(pid: str) -> int:
    """The real user of a process; raises OSError or ValueError."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("Uid:"):
                return int(line.split()[1])
    raise ValueError


def _users(conf: dict[str, Any]) -> frozenset[int]:
    """The users that a pysplice of this network may run as: ours, and where we are root the one it changes to."""
    try:
        user = privileges.user_to_become(str(conf.get("runas") or ""))
    except ConfigError as e:
        raise Failure(INVALID, f"runas: {e}") from None
    return frozenset((os.geteuid(),) if user is None else (os.geteuid(), user[0]))


def _serves(attachment: Attachment) -> bool:
    """True if a process answers at the control socket."""
    from .control import client

    try:
        client.ask(_control(attachment), {"do": "show"})
    except (OSError, ValueError):
        return False
    return True


# ADD


def _add(request: Request) -> dict[str, Any]:
    attachment = request.attachment
    identity = _identity(request.netns)
    if request.conf.get("prevResult"):
        raise Failure(INVALID, "this plugin is the first of a list: it takes no prevResult")
    options = _options(request)
    users = _users(request.conf)
    if _attached(attachment) == identity and _serves(attachment):
        return _result(request)
    _end(attachment, users)
    # First of all, so that GC finds whatever is begun
    try:
        with open(_note(attachment), "w", encoding="utf-8") as file:
            json.dump(attachment._asdict() | {"netns": request.netns, "identity": identity}, file)
    except OSError as e:
        raise Failure(IO_FAILURE, f"cannot write {_note(attachment)}: {e.strerror}") from None
    try:
        _start(request, options)
        return _result(request)
    except Failure:
        _delete(attachment, users)
        raise


def _start(request: Request, options: list[str]) -> None:
    """Start the process that serves; raises Failure."""
    words = [
        sys.executable, "-m", "pysplice", "--quiet", "--config-net", "--tap", request.attachment.ifname,
        *options, "--control", _control(request.attachment), "--netns", request.netns,
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CNI_")}
    try:
        result = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_TIMEOUT, check=False,
            env=environment, cwd="/", errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failure(NOT_STARTED, "pysplice did not start in time") from None
    except OSError as e:
        raise Failure(NOT_STARTED, f"cannot start pysplice: {e.strerror}") from None
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no reason was given"]
        raise Failure(NOT_STARTED, lines[-1].removeprefix("pysplice: "), "\n".join(lines[:-1]))


def _options(request: Request) -> list[str]:
    """The options that the configuration amounts to; raises Failure."""
    conf, runtime = request.conf, request.conf.get("runtimeConfig") or {}
    if not isinstance(runtime, dict):
        raise Failure(INVALID, "runtimeConfig is no object")
    words: list[str] = []
    if conf.get("runas"):
        words += ["--runas", *_texts({"runas": [conf["runas"]]}, "runas")]
    if conf.get("mtu") is not None:
        if not isinstance(conf["mtu"], int) or isinstance(conf["mtu"], bool):
            raise Failure(INVALID, f"mtu: {conf['mtu']!r} is no number")
        words += ["--mtu", str(conf["mtu"])]
    wanted = [_interface(text) for text in _texts(runtime, "ips")]
    if len({address.version for address in wanted}) < len(wanted):
        raise Failure(UNSUPPORTED, "ips: there can be one address of each version of IP")
    for address in wanted:
        words += ["-a", str(address)]
    if not _dns(conf)["nameservers"]:
        words += ["--dns-forward", DNS_FORWARD]
    words += _published(runtime)
    words += ["-T", "none", "-U", "none"]
    words += _texts(conf, "options")
    return words


def _published(runtime: dict[str, Any]) -> list[str]:
    """-t and -u for the mappings of ports; raises Failure."""
    mappings = runtime.get("portMappings") or []
    if not isinstance(mappings, list) or not all(isinstance(mapping, dict) for mapping in mappings):
        raise Failure(INVALID, "portMappings is no list of objects")
    pairs: dict[tuple[str, str], None] = {}  # no pair twice
    for mapping in mappings:
        protocol = str(mapping.get("protocol") or "tcp").lower()
        option = {"tcp": "-t", "udp": "-u"}.get(protocol)
        if option is None:
            raise Failure(UNSUPPORTED, f"ports of {protocol} cannot be published")
        if not mapping.get("hostPort"):
            continue
        host, container = _port(mapping, "hostPort"), _port(mapping, "containerPort")
        where = f"{_address(mapping['hostIP'])}/" if mapping.get("hostIP") else ""
        pairs[option, f"{where}{host}:{container}"] = None
    words = [word for pair in pairs for word in pair]
    for option in ("-t", "-u"):
        if option not in words:
            words += [option, "none"]
    return words


def _port(mapping: dict[str, Any], name: str) -> int:
    port = mapping.get(name)
    if not isinstance(port, int) or isinstance(port, bool) or not 0 < port <= PORT_MAX:
        raise Failure(INVALID, f"{name}: {port!r} is no port")
    return port


def _address(text: Any) -> IPAddress:
    try:
        return ipaddress.ip_address(str(text))
    except ValueError:
        raise Failure(INVALID, f"hostIP: {text!r} is no address") from None


def _texts(conf: dict[str, Any], name: str) -> list[str]:
    """A list of texts; raises Failure."""
    texts = conf.get(name) or []
    if not isinstance(texts, list) or not all(
        isinstance(text, str) and text.isprintable() for text in texts
    ):
        raise Failure(INVALID, f"{name} is no list of texts")
    return texts


def _interface(text: str) -> Any:
    try:
        return ipaddress.ip_interface(text)
    except ValueError:
        raise Failure(INVALID, f"ips: '{text}' is no address") from None


def _dns(conf: dict[str, Any]) -> dict[str, list[str]]:
    """The name servers and search domains of the network, or those that the engine asks for; raises Failure."""
    runtime = conf.get("runtimeConfig") or {}
    found: dict[str, list[str]] = {}
    for dns in (runtime.get("dns"), conf.get("dns")):
        if isinstance(dns, dict):
            for name, other in (("nameservers", "servers"), ("search", "searches"), ("options", "options")):
                found.setdefault(name, [])
                found[name] = found[name] or _texts(dns, name) or _texts(dns, other)
    return {"nameservers": [], "search": [], "options": []} | found


def _domain(conf: dict[str, Any]) -> str:
    """The local domain of the network; empty if it has none."""
    dns = conf.get("dns")
    return str(dns.get("domain") or "") if isinstance(dns, dict) else ""


# The result


def _interfaces(netns: str, ifname: str) -> dict[str, Any]:
    """The MAC address, addresses and routes of an interface in a namespace; raises Failure."""

    def look(control: Any) -> int:
        from .setup import addresses

        children.report(control, addresses.found(ifname))
        return 0

    def main(control: Any) -> int:
        try:
            fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise ConfigError(f"cannot open {netns}: {e.strerror}") from None
        join.enter(fd, -1)
        return look(control)

    ours, pid = children.fork(main)
    try:
        return children.receive(ours)[1]
    except ConfigError as e:
        raise Failure(NOT_SERVED, f"cannot look at {ifname} in {netns}: {e}") from None
    finally:
        ours.close()
        os.waitpid(pid, 0)


def _result(request: Request) -> dict[str, Any]:
    """The result of ADD, in the form of the version that was asked for; raises Failure."""
    ifname = request.attachment.ifname
    found = _interfaces(request.netns, ifname)
    gateways = {_version(route["dst"]): route["gw"] for route in found["routes"] if _is_default(route)}
    ips = []
    for address in found["addresses"]:
        entry: dict[str, Any] = {"address": address, "interface": 0}
        gateway = gateways.get(_version(address))
        if gateway:
            entry["gateway"] = gateway
        ips.append(entry)
    defaults = filter(_is_default, found["routes"])
    routes = [{name: value for name, value in route.items() if value} for route in defaults]
    dns = _dns(request.conf)
    if not dns["nameservers"]:
        host = names.read_host(Config())
        dns = {
            "nameservers": [DNS_FORWARD],
            "search": dns["search"] or list(host.search),
            "options": dns["options"],
        }
    told: dict[str, Any] = {name: value for name, value in dns.items() if value}
    if _domain(request.conf):
        told["domain"] = _domain(request.conf)
    if request.version in ("0.1.0", "0.2.0"):
        return _old_result(request.version, ips, routes, told)
    interface = {"name": ifname, "mac": found["mac"], "sandbox": request.netns}
    if request.version in ("0.3.0", "0.3.1", "0.4.0"):
        ips = [{"version": str(_version(entry["address"])), **entry} for entry in ips]
    return {
        "cniVersion": request.version,
        "interfaces": [interface],
        "ips": ips,
        "routes": routes,
        "dns": told,
    }


def _old_result(
    version: str, ips: list[dict[str, Any]], routes: list[dict[str, Any]], dns: dict[str, Any]
) -> dict[str, Any]:
    """The result as versions before 0.3.0 have it: one address of each version of IP."""
    result: dict[str, Any] = {"cniVersion": version, "dns": dns}
    for entry in ips:
        number = _version(entry["address"])
        result.setdefault(
            f"ip{number}",
            {
                "ip": entry["address"],
                "gateway": entry.get("gateway", ""),
                "routes": [route for route in routes if _version(route["dst"]) == number],
            },
        )
    return result


def _version(text: str) -> int:
    return 6 if ":" in text else 4


def _is_default(route: dict[str, Any]) -> bool:
    return str(route["dst"]).endswith("/0")


# CHECK, DEL, GC, STATUS


def _check(request: Request) -> None:
    if request.version in ("0.1.0", "0.2.0", "0.3.0", "0.3.1"):
        raise Failure(INCOMPATIBLE, f"version {request.version} has no CHECK")
    if not _serves(request.attachment):
        raise Failure(NOT_SERVED, f"no process serves {request.attachment.container}")
    previous = request.conf.get("prevResult")
    if not isinstance(previous, dict):
        raise Failure(INVALID, "prevResult is missing")
    ips, interfaces = previous.get("ips") or [], previous.get("interfaces") or []
    if not isinstance(ips, list) or not isinstance(interfaces, list):
        raise Failure(INVALID, "prevResult is no result")
    found = _interfaces(request.netns, request.attachment.ifname)
    ours = [
        n
        for n, interface in enumerate(interfaces)
        if isinstance(interface, dict) and _is_ours(interface, request)
    ]
    for entry in ips:
        if not isinstance(entry, dict) or entry.get("interface") not in (None, *ours):
            continue  # of another plugin
        address = entry.get("address")
        if address not in found["addresses"]:
            raise Failure(NOT_SERVED, f"{request.attachment.ifname} has no address {address}")


def _is_ours(interface: dict[str, Any], request: Request) -> bool:
    """True for the interface that this plugin has made, in a result."""
    return interface.get("name") == request.attachment.ifname and bool(interface.get("sandbox"))


def _delete(attachment: Attachment, users: Collection[int]) -> None:
    """End what serves an attachment; it is no error if nothing does."""
    _end(attachment, users)
    for path in (_note(attachment), _control(attachment), _lock(attachment)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _end(attachment: Attachment, users: Collection[int]) -> None:
    """End the processes of an attachment; raises Failure if they do not end."""
    until = time.monotonic() + STOP_TIMEOUT
    number = signal.SIGTERM
    while pids := _processes(attachment, users):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                try:
                    os.kill(pid, number)
                except PermissionError:
                    raise Failure(IO_FAILURE, f"process {pid} is not ours to end") from None
        if time.monotonic() > until:
            if number == signal.SIGKILL:
                raise Failure(IO_FAILURE, f"process {pids[0]} does not end")
            number, until = signal.SIGKILL, time.monotonic() + STOP_TIMEOUT
        time.sleep(0.02)


def _collect(network: str, conf: dict[str, Any]) -> None:
    """End all attachments of a network that the engine does not list."""
    listed = conf.get("cni.dev/valid-attachments", conf.get("cni.dev/attachments"))
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise Failure(INVALID, "cni.dev/valid-attachments is missing")
    valid = [(entry.get("containerID"), entry.get("ifname")) for entry in listed]
    users = _users(conf)
    folder = _folder()
    for name in os.listdir(folder):
        if not name.endswith(".json"):
            continue
        try:
            with open(f"{folder}/{name}", encoding="utf-8") as file:
                fields = json.load(file)
            attachment = Attachment(fields["network"], fields["container"], fields["ifname"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if attachment.network == network and (attachment.container, attachment.ifname) not in valid:
            with _locked(attachment):
                _delete(attachment, users)


def _status() -> None:
    """Fails unless containers can be attached."""
    _folder()
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        raise Failure(NOT_AVAILABLE, f"cannot open /dev/net/tun: {e.strerror}") from None


if __name__ == "__main__":
    main()
