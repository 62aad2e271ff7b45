"""The result of a request, in the form of the version that was asked for.

Owns nothing.  Imports `config`, `setup`, options.py and request.py.
"""

import os
from typing import Any

from ..config import Config, ConfigError
from ..setup import children, join, names
from .options import DNS_FORWARD, dns_of, domain_of
from .request import NOT_SERVED, Failure, Request


def look_at(netns: str, ifname: str) -> dict[str, Any]:
    """The MAC address, addresses and routes of an interface in a namespace; raises Failure."""

    def look(control: Any) -> int:
        from ..setup import addresses

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


def result_of(request: Request) -> dict[str, Any]:
    """The result of ADD, in the form of the version that was asked for; raises Failure."""
    ifname = request.attachment.ifname
    found = look_at(request.netns, ifname)
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
    dns = dns_of(request.conf)
    if not dns["nameservers"]:
        host = names.read_host(Config())
        dns = {
            "nameservers": [DNS_FORWARD],
            "search": dns["search"] or list(host.search),
            "options": dns["options"],
        }
    told: dict[str, Any] = {name: value for name, value in dns.items() if value}
    if domain_of(request.conf):
        told["domain"] = domain_of(request.conf)
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
