"""The command `pysplice-netavark`: a plugin of netavark(1), by which podman gives containers a network.

Owns nothing.  Imports `setup`, and the files of this room but the other command.

netavark runs the plugin with a word (info, create, setup, teardown) and, for the last two, the path of the container's
namespace; stdin has the network or the request, stdout takes the answer, all as JSON.  An ordinary user's containers
share one namespace that pasta connects to the host: there each gets a pysplice of its own.  Ports of the host lead
into that namespace by podman's own means, and come to pysplice there.
"""

import json
import os
import sys
from typing import Any, NoReturn

from .. import __version__
from ..setup import privileges
from .attachment import locked
from .request import ENVIRONMENT, INVALID, UNSUPPORTED, Attachment, Failure, Request, read_conf
from .serve import add, delete

API_VERSION = "1.0.0"
RESULT_VERSION = "1.0.0"  # of CNI, from which the answer is made
PORTS_MAX = 1024
MTU_DIGITS = 5
OPTIONS = ("mtu", "options", "runas")  # of `podman network create -o`


def main() -> NoReturn:
    """The command `pysplice-netavark`: exits with its status."""
    status = 1
    try:
        answer, status = _run(sys.argv[1:]), 0
    except Failure as e:
        answer = {"error": f"{e.message}: {e.details}" if e.details else e.message}
    except Exception as e:
        answer = {"error": f"internal error: {type(e).__name__}: {e}"}
    if answer is not None:
        print(json.dumps(answer))
    sys.stdout.flush()
    os._exit(status)


def _run(words: list[str]) -> dict[str, Any] | None:
    """What is printed for a request that succeeds; raises Failure."""
    if words == ["info"]:
        return {"version": __version__, "api_version": API_VERSION}
    if words == ["create"]:
        return _create(read_conf())
    if len(words) != 2 or words[0] not in ("setup", "teardown"):
        raise Failure(ENVIRONMENT, "netavark calls this with info, create, setup PATH or teardown PATH")
    asked = read_conf()
    attachment = _attachment(asked)
    if words[0] == "setup":
        request = Request("ADD", _conf(asked), RESULT_VERSION, attachment, words[1])
        with locked(attachment):
            return _status(add(request), request)
    with locked(attachment):
        delete(attachment, _object(_object(asked, "network"), "options"))
    return None


def _create(network: dict[str, Any]) -> dict[str, Any]:
    """A new network, which is kept as it is if it asks for nothing that cannot be had; raises Failure."""
    if network.get("internal"):
        raise Failure(UNSUPPORTED, "an internal network has no use: containers do not reach each other")
    if network.get("subnets") or network.get("routes"):
        raise Failure(
            UNSUPPORTED, "a container has the host's addresses and routes: there is no subnet to choose"
        )
    _options(network)
    return network


def _options(network: dict[str, Any]) -> dict[str, Any]:
    """The options of a network, as a configuration of CNI has them; raises Failure."""
    given = _object(network, "options")
    for name, value in given.items():
        if name not in OPTIONS:
            raise Failure(UNSUPPORTED, f"there is no option '{name}': there are {', '.join(OPTIONS)}")
        if not isinstance(value, str) or not value.isprintable():
            raise Failure(INVALID, f"option {name} is invalid")
    conf: dict[str, Any] = {"options": given.get("options", "").split(), "runas": given.get("runas", "")}
    if "mtu" in given:
        if not given["mtu"].isascii() or not given["mtu"].isdigit() or len(given["mtu"]) > MTU_DIGITS:
            raise Failure(INVALID, f"mtu: '{given['mtu']}' is no number")
        conf["mtu"] = int(given["mtu"])
    return conf


def _attachment(asked: dict[str, Any]) -> Attachment:
    """What a request is for; raises Failure."""
    network, wanted = _object(asked, "network"), _object(asked, "network_options")
    names = (network.get("name"), asked.get("container_id"), wanted.get("interface_name"))
    if not all(isinstance(name, str) and name and name.isprintable() for name in names):
        raise Failure(INVALID, "the network, the container or the interface has no name, or an invalid one")
    return Attachment(*map(str, names))


def _conf(asked: dict[str, Any]) -> dict[str, Any]:
    """What a request asks for, as a configuration of CNI has it; raises Failure."""
    network, wanted = _object(asked, "network"), _object(asked, "network_options")
    conf = _options(network)
    if wanted.get("static_mac"):
        conf["options"] += ["--ns-mac-addr", str(wanted["static_mac"])]
    conf["dns"] = {"nameservers": network.get("network_dns_servers") or []}
    conf["runtimeConfig"] = {
        "ips": wanted.get("static_ips") or [],
        "portMappings": _ports(asked.get("port_mappings") or []),
    }
    return conf


def _object(conf: dict[str, Any], name: str) -> dict[str, Any]:
    value = conf.get(name) or {}
    if not isinstance(value, dict):
        raise Failure(INVALID, f"{name} is no object")
    return value


def _ports(mappings: Any) -> list[dict[str, Any]]:
    """The mappings of ports, as a configuration of CNI has them; raises Failure."""
    if not isinstance(mappings, list) or not all(isinstance(mapping, dict) for mapping in mappings):
        raise Failure(INVALID, "port_mappings is no list of objects")
    found: list[dict[str, Any]] = []
    for mapping in mappings:
        host, container = mapping.get("host_port"), mapping.get("container_port")
        count = mapping.get("range") or 1
        # A bool is an int
        if not (type(host) is type(container) is type(count) is int and count > 0):
            raise Failure(INVALID, "port_mappings has a port that is no number")
        for protocol in str(mapping.get("protocol") or "tcp").split(","):
            if len(found) + count > PORTS_MAX:
                raise Failure(UNSUPPORTED, f"there are more than {PORTS_MAX} ports to publish")
            for n in range(count):
                found.append({"hostPort": host + n, "containerPort": container + n, "protocol": protocol})
                # What comes from podman into the namespace of an ordinary user's containers has another address
                if mapping.get("host_ip") and privileges.is_root():
                    found[-1]["hostIP"] = mapping["host_ip"]
    return found


def _status(result: dict[str, Any], request: Request) -> dict[str, Any]:
    """A result of CNI, as netavark has it."""
    interface = result["interfaces"][0]
    subnets = [
        {"ipnet": entry["address"]} | ({"gateway": entry["gateway"]} if "gateway" in entry else {})
        for entry in result["ips"]
    ]
    return {
        "dns_server_ips": result["dns"].get("nameservers", []),
        "dns_search_domains": result["dns"].get("search", []),
        "interfaces": {request.attachment.ifname: {"mac_address": interface["mac"], "subnets": subnets}},
    }
