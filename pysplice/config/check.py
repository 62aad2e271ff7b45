"""Conflicts between options: every rule about more than one option, in one place.

Pure.  Imports the other files of this room, except the table.
"""

from collections.abc import Sequence
from typing import Any

from . import Command, Config, ConfigError, Descriptor, NamespaceFile, Process, Target
from .ports import GUEST, OPTIONS, TCP, Rule, parse_all
from .values import MTU_MIN_IPV6, class_prefix, parse_int

PID_MAX = 2**22  # PID_MAX_LIMIT of the kernel

# Values of the table that are not fields of Config: they say what to serve
TARGET_VALUES = ("tap_fd", "netns", "userns", "netns_only", "netmask")


def finish(values: dict[str, Any], words: Sequence[str]) -> Config:
    """The Config made of the values that options have set and the words after the options; raises ConfigError."""
    target = _target(values, words)
    _exclusions(values)
    warnings = [*values.get("warnings", ()), *_mtu(values), *_without_effect(values, target)]
    _prefix(values)
    fields = {name: value for name, value in values.items() if name not in TARGET_VALUES}
    return Config(**fields | {"target": target, "warnings": tuple(warnings)})


def _target(values: dict[str, Any], words: Sequence[str]) -> Target:
    """What is served."""
    netns, userns = values.get("netns"), values.get("userns")
    netns_only = values.get("netns_only", False)
    is_pid = len(words) == 1 and words[0].isascii() and words[0].isdigit()
    if netns and words:
        raise ConfigError("--netns goes with neither PID nor COMMAND")
    if userns and netns_only:
        raise ConfigError("--userns and --netns-only exclude each other")
    if "tap_fd" in values:
        if netns or words:
            raise ConfigError("--fd goes with neither PID, --netns nor COMMAND")
        for field, option in (("config_net", "--config-net"), ("ns_mac", "--ns-mac-addr")):
            if values.get(field):
                raise ConfigError(f"{option} does not go with --fd")
    if userns and not netns and not is_pid:
        raise ConfigError("--userns goes with PID or --netns only")
    if "tap_fd" in values:
        return Descriptor(values["tap_fd"])
    if netns:
        return NamespaceFile(netns, userns or "")
    if is_pid:
        pid = parse_int(words[0], "PID", 1, PID_MAX)
        return Process(pid, "" if netns_only else userns or f"/proc/{pid}/ns/user")
    return Command(tuple(words), not netns_only)


def _exclusions(values: dict[str, Any]) -> None:
    """Options that contradict each other."""
    if not values.get("splice", True) and values.get("loopback_kept"):
        kept = "--splice-only" if values.get("splice_only") else "--host-lo-to-ns-lo"
        raise ConfigError(f"options {kept} and --no-splice exclude each other")
    if not values.get("config_net") and not (
        values.get("copy_routes", True) and values.get("copy_addresses", True)
    ):
        raise ConfigError("--no-copy-routes and --no-copy-addrs need --config-net")
    if not values.get("ipv4", True) and not values.get("ipv6", True):
        raise ConfigError("options -4 and -6 exclude each other")
    if values.get("log_file") and values["log_file"] == values.get("pcap"):
        raise ConfigError("options -l and -p name the same file")
    if values.get("control") and values["control"] == values.get("conf_path"):
        raise ConfigError("options -c and --control name the same path")
    if "netmask" in values and "prefix4" in values:
        raise ConfigError("-a ADDR/LEN and -n exclude each other")


def _mtu(values: dict[str, Any]) -> list[str]:
    """IPv6 needs a larger MTU than IPv4; a warning where it is switched off for that."""
    if not 0 < (values.get("mtu") or 0) < MTU_MIN_IPV6 or not values.get("ipv6", True):
        return []
    if not values.get("ipv4", True):
        raise ConfigError(f"IPv6 needs an MTU of at least {MTU_MIN_IPV6}")
    values["ipv6"] = False
    return [f"no IPv6: it needs an MTU of at least {MTU_MIN_IPV6}"]


def _prefix(values: dict[str, Any]) -> None:
    """The length of the IPv4 prefix: of -a or -n, else that of the address's class."""
    if "netmask" in values:
        values["prefix4"] = values["netmask"]
    elif values.get("address4") and "prefix4" not in values:
        values["prefix4"] = class_prefix(values["address4"])


def _without_effect(values: dict[str, Any], target: Target) -> list[str]:
    """A warning for each option that has no effect beside the others."""
    command = isinstance(target, Command)
    background = not command and not values.get("foreground")
    idle = {
        "--log-size": "log_size" in values and not values.get("log_file") and "there is no --log-file",
        "--log-time": values.get("log_time")
        and not (values.get("log_file") or values.get("debug"))
        and "there is neither --log-file nor --debug",
        "--config-net": values.get("config_net")
        and values.get("splice_only")
        and "--splice-only has no tap",
        "--follow-host": values.get("follow_host")
        and not values.get("config_net")
        and "there is no --config-net",
        "--stats": values.get("stats") and background and "it is not for the background (-f)",
        "--new-session": values.get("new_session") and not command and "there is no COMMAND",
        "--no-pidns": not values.get("pidns", True) and not command and "there is no COMMAND",
        "--no-netns-quit": not values.get("netns_quit", True) and command and "there is a COMMAND",
        "--pcap": values.get("pcap") and values.get("splice_only") and "--splice-only has no tap",
        "--resolv-conf": values.get("resolv_conf") and not command and "there is no COMMAND",
        "--dns": values.get("dns")
        and not any(values.get(field) for field in ("dhcp_dns", "resolv_conf"))
        and "there is neither --dhcp-dns nor --resolv-conf",
        "--search": values.get("search")
        and not any(values.get(field) for field in ("dhcp_search", "resolv_conf"))
        and "there is neither --dhcp-search nor --resolv-conf",
        "--dns-host": values.get("dns_host")
        and not values.get("dns_forward")
        and "there is no --dns-forward",
    }
    for option, text in values.get("ports", ()):
        protocol = OPTIONS[option][1]
        idle[f"{option} {text}"] = text != "none" and not values.get(protocol, True) and f"--no-{protocol}"
        chunks = text.rpartition("/")[2].split(",")
        named = any(chunk[:1].isdigit() for chunk in chunks)
        idle[f"all in {option} {text}"] = "all" in chunks and named and "other ports are named"
    for version, off in ((4, "-6"), (6, "-4")):
        if values.get(f"ipv{version}", True):
            continue
        idle |= {
            f"-a {values.get(f'address{version}')}": f"address{version}" in values and off,
            f"-g {values.get(f'gateway{version}')}": f"gateway{version}" in values and off,
            f"--outbound-if{version}": f"outbound_if{version}" in values and off,
        }
    return [f"{option} has no effect: {why}" for option, why in idle.items() if why]


def rules(config: Config) -> tuple[Rule, ...]:
    """The rules of -t, -u, -T and -U, except for protocols that are switched off; raises ConfigError."""
    by_fd = isinstance(config.target, Descriptor)
    parsed = parse_all(config.ports, "none" if by_fd else "auto")
    for rule in parsed:
        version = rule.address.version if rule.address is not None else 0
        if version and not (config.ipv4 if version == 4 else config.ipv6):
            raise ConfigError(f"'{rule}': IPv{version} is switched off")
        if by_fd and (rule.side == GUEST or rule.auto or rule.path):
            raise ConfigError(f"'{rule}' does not go with --fd: no process of ours is in the namespace")
    return tuple(rule for rule in parsed if (config.tcp if rule.protocol == TCP else config.udp))


def needs_agent(config: Config, rules: Sequence[Rule]) -> bool:
    """True if sockets may have to be made in the namespace."""
    if config.splice_only or config.control or config.conf_path:
        return True
    return any(r.side == GUEST or r.auto or r.path or config.splice for r in rules)
