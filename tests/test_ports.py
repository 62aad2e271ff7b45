"""The grammar of forwarded ports."""

import errno
import os

import pytest

from pysplice.config import ConfigError, ports
from pysplice.forward import forward


def parse(text, option="-t"):
    return ports.parse(option, *ports.OPTIONS[option], text)


# Those of pasta's manual, and what they say when they are written out
WRITTEN = {
    "22": ["22"],
    "22:23": ["22:23"],
    "22,25": ["22", "25"],
    "22-80": ["22-80"],
    "22-80:32-90": ["22-80:32-90"],
    "192.0.2.1/22": ["192.0.2.1/22"],
    "192.0.2.1%eth0/22": ["192.0.2.1%eth0/22"],
    "%eth0/22": ["%eth0/22"],
    "0.0.0.0/5000:192.0.2.5/6000": ["0.0.0.0/5000:192.0.2.5/6000"],
    "0.0.0.0/5000:192.0.2.5": ["0.0.0.0/5000:192.0.2.5/5000"],
    "2000-5000,~3000-3010": ["2000-2999", "3011-5000"],
    "192.0.2.1/20-30,~25": ["192.0.2.1/20-24", "192.0.2.1/26-30"],
    "20-30:120-130,~25": ["20-24:120-124", "26-30:126-130"],
    "1-9,~3-4,~4-5,~9": ["1-2", "6-8"],
    "::/5000:2001:db8::1/80": ["::/5000:2001:db8::1/80"],
    "[::1]/80": ["::1/80"],
    "*/80": ["80"],
    "8000,all": ["8000"],
    "5555-5555:80-80": ["5555:80"],
    "::1/5200-5202:5201-5203": ["::1/5200-5202:5201-5203"],
    "8000-8010,auto": ["8000-8010,auto"],
    "unix:/run/a:b.sock:80": ["unix:/run/a:b.sock:80"],
}


@pytest.mark.parametrize("text", WRITTEN)
def test_written(text):
    rules = parse(text)
    assert [str(rule) for rule in rules] == WRITTEN[text]
    assert not any(rule.weak for rule in rules)
    # What was written out says the same again
    assert rules == [rule for line in WRITTEN[text] for rule in parse(line)]


@pytest.mark.parametrize(
    ("text", "auto", "ranges"),
    (
        ("all", False, [(1, 65535)]),
        ("auto", True, [(1, 65535)]),
        ("all,auto", True, [(1, 65535)]),
        ("~20000-20010", False, [(1, 19999), (20011, 65535)]),
        ("::1/auto", True, [(1, 65535)]),
        ("127.0.0.6/all:192.0.2.6", False, [(1, 65535)]),
        ("auto,~22", True, [(1, 21), (23, 65535)]),
    ),
)
def test_all_ports_that_can_be_had(text, auto, ranges):
    rules = parse(text)
    assert [(rule.first, rule.last) for rule in rules] == ranges
    assert all(rule.weak and rule.auto == auto and rule.to_first == rule.first for rule in rules)


@pytest.mark.parametrize(
    "text",
    (
        *("", ",", "80,", ",80", "0", "65536", "-1", "9-8", "80-", "x", " 80", "80 ", "+80", "\u0661"),
        *("22-30:1-3", "22-30:1", "22:0", "22:", "22:80-81", "22:70000", "~", "~0", "~1-65535", "22,~22"),
        *("/22", "x/22", "1.2.3/22", "::1%/22", "[::1/22", "1.2.3.4/", "1.2.3.4/5/6", "%/22", "%a/b/22"),
        *("::1/22:1.2.3.4", "22:1.2.3.4", "*/22:1.2.3.4", "1.2.3.4/22:::1", "all:x", "auto:1", "none,22"),
        *("unix:", "unix:/x", "unix:/x:0", "unix::80", "unix:/" + "x" * 107 + ":80"),
    ),
)
def test_errors(text):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert "invalid" in str(caught.value) and "-t" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ("-T", "-U"))
@pytest.mark.parametrize("text", ("127.0.0.1/80", "%lo/80", "80:1.2.3.4/80", "unix:/x:80"))
def test_the_guests_side_listens_on_loopback_alone(option, text):
    with pytest.raises(ConfigError):
        parse(text, option)


def test_a_unix_socket_is_for_tcp():
    with pytest.raises(ConfigError, match="-t only"):
        parse("unix:/x:80", "-u")


def test_targets():
    (rule,) = parse("100-200:1100-1200")
    assert (rule.target(100), rule.target(150), rule.target(200)) == (1100, 1150, 1200)


def test_options_add_up():
    rules = ports.parse_all(
        [("-t", "none"), ("-t", "80"), ("-u", "53"), ("-t", "81"), ("-T", "none")], "none"
    )
    assert [(r.side, r.protocol, str(r)) for r in rules] == [
        ("host", "tcp", "80"), ("host", "tcp", "81"), ("host", "udp", "53"),
    ]  # fmt: skip
    rules = ports.parse_all([("-t", "80")])
    assert [(r.side, r.protocol, r.auto) for r in rules] == [
        ("host", "tcp", False), ("host", "udp", True), ("guest", "tcp", True), ("guest", "udp", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "clash"),
    (
        ("80", "80", True),
        ("80", "81", False),
        ("1-100", "50", True),
        ("80", "127.0.0.1/80", True),
        ("::/80", "0.0.0.0/80", False),
        ("0.0.0.0/80", "127.0.0.1/80", True),
        ("127.0.0.2/80", "127.0.0.1/80", False),
        ("%a/80", "%b/80", False),
        ("%a/80", "80", True),
        ("unix:/a:80", "unix:/b:80", False),
        ("unix:/a:80", "unix:/a:81", True),
        ("80", "none", True),
    ),
)
def test_rules_that_overlap(one, other, clash):
    options = [("-t", one), ("-t", other)]
    if clash:
        with pytest.raises(ConfigError):
            ports.parse_all(options, "none")
    else:
        assert len(ports.parse_all(options, "none")) == 2
    # Another protocol, another side: another thing
    if other != "none" and "unix" not in one:
        assert ports.parse_all([("-t", one), ("-u", other)], "none")


@pytest.mark.parametrize(
    ("text", "port", "error", "hint"),
    (
        ("80", 80, errno.EACCES, True),
        ("8080", 8080, errno.EACCES, False),
        ("80", 80, errno.EADDRINUSE, False),
    ),
)
def test_a_port_that_takes_privileges(text, port, error, hint):
    """The message names the sysctl that decides, and only where it does."""
    (rule,) = ports.parse("-t", "host", "tcp", text)
    said = forward._cannot_listen(rule, port, OSError(error, os.strerror(error)), 1024)
    assert said.startswith(f"cannot listen on port {port} (tcp): {os.strerror(error)}")
    assert ("; ports below 1024 (net.ipv4.ip_unprivileged_port_start) require privileges" in said) == hint


@pytest.mark.parametrize(
    ("text", "hint"),
    (
        ("127.0.0.1:8080:80", "-t 127.0.0.1/8080:80"),
        ("[::1]:8080", "-t ::1/8080"),
        ("8080:80/tcp", "-t 8080:80"),
        ("53/udp", "-u 53"),
        ("127.0.0.1:53:5353/udp", "-u 127.0.0.1/53:5353"),
        ("127.0.0.1/80/tcp", "-t 127.0.0.1/80"),
        ("22,unix:/x.sock:80", "an option of its own"),
        ("/run/x.sock:80", "unix:/run/x.sock:80"),
        ("eth0/80", "written %eth0"),
        ("8080:10.0.0.1/80", "a target address needs a listening address"),
        ("unix:/x.sock", "the port is missing"),
    ),
)
def test_spellings_of_other_programs(text, hint):
    with pytest.raises(ConfigError, match="invalid ports for -t") as caught:
        ports.parse("-t", "host", "tcp", text)
    assert hint in str(caught.value)


def test_what_follows_and_what_is_written_out_add_up():
    rules = ports.parse_all([("-t", "auto"), ("-t", "9001")], "none")
    assert [str(rule) for rule in rules] == ["auto", "9001"]
    with pytest.raises(ConfigError, match="'9000-9002' overlaps '9001'"):
        ports.parse_all([("-t", "9001"), ("-t", "9000-9002")], "none")


def test_parts_of_a_rule():
    (rule,) = ports.parse("-t", "host", "tcp", "9000-9003:80-83")

    def part(text):
        return ports.parse("-t", "host", "tcp", text)[0]

    assert rule.has_part(rule) and rule.has_part(part("9001:81")) and rule.has_part(part("9002-9003:82-83"))
    for other in ("9001", "9001:82", "8999-9001:79-81", "9001:81,auto", "127.0.0.1/9001:81"):
        assert not rule.has_part(part(other))
    assert [str(left) for left in rule.without(part("9001-9002:81-82"))] == ["9000:80", "9003:83"]
    before, after = rule.without(rule)
    assert before.last < before.first and after.last < after.first


@pytest.mark.parametrize("text", ("%\udcae/80", "unix:/" + "\udcae" * 108 + ":80"))
def test_bytes_that_are_no_utf8(text):
    """They stand as surrogates in what a program is called with."""
    with pytest.raises(ConfigError, match="-t"):
        ports.parse("-t", ports.HOST, ports.TCP, text)
