"""The command `pysplice-cni`: environment and stdin -> a request -> a result on stdout, and the exit status.

Owns nothing.  Imports the files of this room.
"""

import json
import os
import re
import sys
from typing import Any, NoReturn

from .attachment import locked, serves, state_folder, users_of
from .request import (
    DEFECT,
    ENVIRONMENT,
    INCOMPATIBLE,
    INVALID,
    NOT_AVAILABLE,
    NOT_SERVED,
    VERSIONS,
    Attachment,
    Failure,
    Request,
    read_conf,
)
from .result import look_at
from .serve import add, delete

COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION")

# As the specification has them
CONTAINER_ID = NETWORK = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
IFNAME = re.compile(r"[^\s/:\0]{1,15}")


def main() -> NoReturn:
    """The command `pysplice-cni`: exits with its status."""
    version = VERSIONS[-1]
    try:
        command = os.environ.get("CNI_COMMAND", "")
        conf = read_conf()
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
            return add(request)
        if command == "CHECK":
            _check(request)
        else:
            delete(attachment, conf)
        return None


def _variable(name: str, pattern: re.Pattern[str]) -> str:
    value = os.environ.get(name, "")
    if not pattern.fullmatch(value) or value in (".", ".."):
        raise Failure(ENVIRONMENT, f"{name} is {'missing' if not value else 'invalid'}", value)
    return value


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


def _collect(network: str, conf: dict[str, Any]) -> None:
    """End all attachments of a network that the engine does not list."""
    listed = conf.get("cni.dev/valid-attachments", conf.get("cni.dev/attachments"))
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise Failure(INVALID, "cni.dev/valid-attachments is missing")
    valid = [(entry.get("containerID"), entry.get("ifname")) for entry in listed]
    users_of(conf)  # says what is wrong before anything is ended
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
                delete(attachment, conf)


def _status() -> None:
    """Fails unless containers can be attached."""
    state_folder()
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        raise Failure(NOT_AVAILABLE, f"cannot open /dev/net/tun: {e.strerror}") from None


if __name__ == "__main__":
    main()
