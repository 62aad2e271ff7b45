"""The command `pysplice-cni`: environment and stdin -> a request -> a result on stdout, and the exit status.

Owns nothing.  Imports the files of this room.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Collection
from typing import Any, NoReturn

from .attachment import (
    attached,
    control_path,
    end,
    identify,
    lock_path,
    locked,
    note_path,
    serves,
    state_folder,
    users_of,
)
from .options import options_of
from .request import (
    DEFECT,
    ENVIRONMENT,
    INCOMPATIBLE,
    INVALID,
    IO_FAILURE,
    NOT_AVAILABLE,
    NOT_DECODED,
    NOT_SERVED,
    NOT_STARTED,
    VERSIONS,
    Attachment,
    Failure,
    Request,
)
from .result import look_at, result_of

COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION")

# As the specification has them
CONTAINER_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
NETWORK = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
IFNAME = re.compile(r"[^\s/:\0]{1,15}")

START_TIMEOUT = 30.0  # seconds
INPUT_MAX = 16 << 20


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
    if "plugins" in conf:
        raise Failure(
            INVALID, "this is a list of plugins: a plugin gets one of them, with the name of the list"
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
    with locked(attachment):
        if command == "ADD":
            return _add(request)
        if command == "CHECK":
            _check(request)
        else:
            _delete(attachment, users_of(conf))
        return None


def _variable(name: str, pattern: re.Pattern[str]) -> str:
    value = os.environ.get(name, "")
    if not pattern.fullmatch(value) or value in (".", ".."):
        raise Failure(ENVIRONMENT, f"{name} is {'missing' if not value else 'invalid'}", value)
    return value


def _add(request: Request) -> dict[str, Any]:
    attachment = request.attachment
    identity = identify(request.netns)
    if request.conf.get("prevResult"):
        raise Failure(INVALID, "this plugin is the first of a list: it takes no prevResult")
    options = options_of(request)
    users = users_of(request.conf)
    if attached(attachment) == identity and serves(attachment):
        return result_of(request)
    end(attachment, users)
    # First of all, so that GC finds whatever is begun
    try:
        with open(note_path(attachment), "w", encoding="utf-8") as file:
            json.dump(attachment._asdict() | {"netns": request.netns, "identity": identity}, file)
    except OSError as e:
        raise Failure(IO_FAILURE, f"cannot write {note_path(attachment)}: {e.strerror}") from None
    try:
        _start(request, options)
        return result_of(request)
    except BaseException:
        _delete(attachment, users)
        raise


def _start(request: Request, options: list[str]) -> None:
    """Start the process that serves; raises Failure."""
    words = [
        *_program(), "--quiet", "--config-net", "--tap", request.attachment.ifname, *options,
        "--control", control_path(request.attachment), "--netns", request.netns,
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
        raise Failure(NOT_STARTED, lines[-1].removeprefix("pysplice: "))


def _program() -> list[str]:
    """The command `pysplice`: the script beside this one, because a security module knows a program by its path."""
    script = os.path.join(os.path.dirname(os.path.realpath(sys.argv[0])), "pysplice")
    return (
        [script]
        if os.access(script, os.X_OK) and os.path.isfile(script)
        else [sys.executable, "-m", "pysplice"]
    )


def _check(request: Request) -> None:
    if request.version in ("0.1.0", "0.2.0", "0.3.0", "0.3.1"):
        raise Failure(INCOMPATIBLE, f"version {request.version} has no CHECK")
    if not serves(request.attachment):
        raise Failure(NOT_SERVED, f"no process serves {request.attachment.container}")
    previous = request.conf.get("prevResult")
    if not isinstance(previous, dict):
        raise Failure(INVALID, "prevResult is missing")
    ips, interfaces = previous.get("ips") or [], previous.get("interfaces") or []
    if not isinstance(ips, list) or not isinstance(interfaces, list):
        raise Failure(INVALID, "prevResult is no result")
    found = look_at(request.netns, request.attachment.ifname)
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
    end(attachment, users)
    for path in (note_path(attachment), control_path(attachment), lock_path(attachment)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _collect(network: str, conf: dict[str, Any]) -> None:
    """End all attachments of a network that the engine does not list."""
    listed = conf.get("cni.dev/valid-attachments", conf.get("cni.dev/attachments"))
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise Failure(INVALID, "cni.dev/valid-attachments is missing")
    valid = [(entry.get("containerID"), entry.get("ifname")) for entry in listed]
    users = users_of(conf)
    folder = state_folder()
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
            with locked(attachment):
                _delete(attachment, users)


def _status() -> None:
    """Fails unless containers can be attached."""
    state_folder()
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        raise Failure(NOT_AVAILABLE, f"cannot open /dev/net/tun: {e.strerror}") from None


if __name__ == "__main__":
    main()
