"""What the configuration of a network amounts to: the options of a pysplice.

Pure.  Imports `config` and request.py.
"""

import ipaddress
from typing import Any

from ..config import Config, ConfigError, IPAddress
from ..config.options import Usage, parse
from ..config.ports import PORT_MAX
from .request import INVALID, UNSUPPORTED, Failure, Request

# Fields of Config that options of a network may not change: one process serves each container, and no files are written
OURS = (
    "target", "ifname", "foreground", "pid_file", "log_file", "pcap", "trace_window", "runas", "control", "conf_path",
    "stats",
)  # fmt: skip

DNS_FORWARD = "169.254.1.1"  # where queries go, unless the network has name servers of its own


def options_of(request: Request) -> list[str]:
    """The options that the configuration amounts to; raises Failure."""
    conf, runtime = request.conf, request.conf.get("runtimeConfig") or {}
    if not isinstance(runtime, dict):
        raise Failure(INVALID, "runtimeConfig is no object")
    words: list[str] = []
    if conf.get("runas"):
        words += ["--runas", *texts({"runas": [conf["runas"]]}, "runas")]
    if conf.get("mtu") is not None:
        if not isinstance(conf["mtu"], int) or isinstance(conf["mtu"], bool):
            raise Failure(INVALID, f"mtu: {conf['mtu']!r} is no number")
        words += ["--mtu", str(conf["mtu"])]
    wanted = [_interface(text) for text in texts(runtime, "ips")]
    if len({address.version for address in wanted}) < len(wanted):
        raise Failure(UNSUPPORTED, "ips: there can be one address of each version of IP")
    for address in wanted:
        words += ["-a", str(address)]
    if not dns_of(conf)["nameservers"]:
        words += ["--dns-forward", DNS_FORWARD]
    words += _published(runtime)
    words += ["-T", "none", "-U", "none"]
    given = texts(conf, "options")
    _check(given)
    return words + given


def _check(words: list[str]) -> None:
    """Raises Failure for words that are no options, or that say what is this plugin's to say."""
    try:
        found, untouched = parse(words), Config()
    except ConfigError as e:
        raise Failure(INVALID, f"options: {e}") from None
    except Usage as e:
        raise Failure(INVALID, f"options: there is nothing to print for {e.what}") from None
    for field in OURS:
        if getattr(found, field) != getattr(untouched, field):
            raise Failure(INVALID, f"options: {field.replace('_', ' ')} is not for a network to choose")


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


def texts(conf: dict[str, Any], name: str) -> list[str]:
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


def dns_of(conf: dict[str, Any]) -> dict[str, list[str]]:
    """The name servers and search domains of the network, or those that the engine asks for; raises Failure."""
    runtime = conf.get("runtimeConfig") or {}
    found: dict[str, list[str]] = {}
    for dns in (runtime.get("dns"), conf.get("dns")):
        if isinstance(dns, dict):
            for name, other in (("nameservers", "servers"), ("search", "searches"), ("options", "options")):
                found.setdefault(name, [])
                found[name] = found[name] or texts(dns, name) or texts(dns, other)
    return {"nameservers": [], "search": [], "options": []} | found


def domain_of(conf: dict[str, Any]) -> str:
    """The local domain of the network; empty if it has none."""
    dns = conf.get("dns")
    return str(dns.get("domain") or "") if isinstance(dns, dict) else ""
