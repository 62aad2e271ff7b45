"""The command line, in pasta's spelling."""

import ipaddress
import subprocess
import sys

import pytest

from pysplice.config import Command, ConfigError, Descriptor, NamespaceFile, Process, check
from pysplice.config import options as cli

IP4, IP6 = ipaddress.IPv4Address, ipaddress.IPv6Address


def test_defaults():
    config = cli.parse([])
    assert config.target == Command() and not config.attach
    assert (config.ifname, config.offload, config.config_net) == ("", True, False)


def test_forms():
    assert cli.parse(["123"]).target == Process(123, "/proc/123/ns/user")
    assert cli.parse(["--netns-only", "123"]).target == Process(123)
    assert cli.parse(["--userns", "/u", "123"]).target == Process(123, "/u")
    assert cli.parse(["--", "ls", "-l"]).target == Command(("ls", "-l"))
    assert cli.parse(["--netns-only", "ls"]).target == Command(("ls",), user_namespace=False)
    assert cli.parse(["ls", "--config-net"]).target == Command(("ls", "--config-net"))
    assert cli.parse(["12", "34"]).target == Command(("12", "34"))
    assert cli.parse(["-F", "5"]).target == Descriptor(5) and cli.parse(["-F", "5"]).tap_fd == 5
    config = cli.parse(["--netns", "/run/x"])
    assert config.target == NamespaceFile("/run/x") and config.attach and config.tap_fd == -1
    assert cli.parse(["--netns", "x", "--userns", "/y"]).target == NamespaceFile("x", "/y")
    assert (NamespaceFile("x").netns, NamespaceFile("./x").netns) == ("/run/netns/x", "./x")
    assert Process(7).netns == "/proc/7/ns/net"


@pytest.mark.parametrize("words", (["--tap", "x"], ["-I", "x"], ["--ns-ifname=x"], ["-I", "y", "--tap=x"]))
def test_name_of_the_tap(words):
    assert cli.parse(words).ifname == "x"


def test_abbreviations_and_joined_values():
    config = cli.parse(["--config", "--mt=1400", "-m1300", "-46"[:2], "--addr", "10.1.2.3/20"])
    assert (config.config_net, config.mtu, config.ipv6) == (True, 1300, False)
    assert (config.address4, config.prefix4) == (IP4("10.1.2.3"), 20)


def test_addresses():
    config = cli.parse(["-a", "10.0.0.1", "-a", "fd00::1/48", "-g", "10.0.0.9", "-g", "fe80::9"])
    assert (config.address4, config.prefix4, config.address6) == (IP4("10.0.0.1"), 8, IP6("fd00::1"))
    assert (config.gateway4, config.gateway6) == (IP4("10.0.0.9"), IP6("fe80::9"))
    assert cli.parse(["-a", "192.168.1.1"]).prefix4 == 24
    assert cli.parse(["-a", "172.16.1.1", "-n", "255.255.255.128"]).prefix4 == 25


def test_lists_keep_one_address_of_each_version():
    config = cli.parse(["-o", "10.0.0.1", "-o", "10.0.0.2", "-o", "fd00::1"])
    assert config.outbound == (IP4("10.0.0.2"), IP6("fd00::1"))
    config = cli.parse(["--map-guest-addr", "10.0.0.1", "--map-guest-addr", "none"])
    assert config.map_guest_addr == ()
    assert not cli.parse(["--map-host-loopback", "none"]).map_gateway


def test_the_window():
    config = cli.parse([])
    assert (config.window, config.limit_output, config.trace_window) == ("truesize", None, "")
    config = cli.parse(["--window", "peer", "--limit-output", "131072", "--trace-window", "out.jsonl"])
    assert (config.window, config.limit_output, config.trace_window) == ("peer", 131072, "out.jsonl")
    assert cli.parse(["--limit-output=off"]).limit_output == 0
    assert cli.parse(["--limit-output=off", "--limit-output=auto"]).limit_output is None


@pytest.mark.parametrize(
    ("words", "message"),
    (
        (["--window", "best"], "unknown estimator 'best' for --window: one of sndbuf, linear, segments,"),
        (["--limit-output", "0"], "invalid value for --limit-output"),
        (["--limit-output", "100k"], "invalid value for --limit-output: '100k' (bytes, auto or off)"),
        (["--trace-window", ""], "option --trace-window needs a path"),
        (["--no-such"], "unrecognized option '--no-such'"),
        (["-Z"], "invalid option -- 'Z'"),
        (["--no-"], "is ambiguous: --"),
        (["-m"], "requires argument"),
        (["--netns"], "requires argument"),
        (["--netns", "x", "y"], "neither PID nor COMMAND"),
        (["-4", "-6"], "exclude each other"),
        (["--userns", "x", "ls"], "--userns"),
        (["-m", "70000"], "invalid value for -m"),
        (["-m", "20"], "too small"),
        (["-m", "abc"], "invalid value"),
        (["-a", "300.1.1.1"], "invalid address for -a"),
        (["-a", "0.0.0.0"], "not a host's address"),
        (["-a", "224.0.0.1"], "not a host's address"),
        (["-a", "10.0.0.1/33"], "invalid value"),
        (["-a", "10.0.0.1/24", "-n", "8"], "exclude each other"),
        (["-n", "255.0.255.0"], "invalid netmask"),
        (["-n", "0"], "invalid netmask"),
        (["-M", "01:00:00:00:00:00"], "unicast"),
        (["-M", "xyz"], "invalid MAC"),
        (["-I", "a/b"], "invalid interface name"),
        (["-I", "abcdefghijklmnop"], "invalid interface name"),
        (["-I", "\udcae"], "invalid interface name"),  # a byte that is no UTF-8
        (["-F", "1"], "invalid value"),
        (["-F", "5", "ls"], "--fd goes with"),
        (["-F", "5", "--config-net"], "--config-net does not go with --fd"),
        (["-F", "5", "--ns-mac-addr", "02:00:00:00:00:01"], "--ns-mac-addr does not go with --fd"),
        (["-l", "x", "-p", "x"], "options -l and -p name the same file"),
        (["-p", "8080:80"], "to forward ports write -t 8080:80"),
        (["-p", "127.0.0.1:8080:80/tcp"], "to forward ports write -t 127.0.0.1/8080:80"),
        (["-p", "53:53/udp"], "to forward ports write -u 53:53"),
        (["--confignet"], "unrecognized option '--confignet'; did you mean --config-net?"),
        (["--dhcpdns"], "did you mean --dhcp-dns?"),
        (["--frobnicate"], "unrecognized option '--frobnicate'; try --help"),
        (["-a", "127.0.0.1"], "not a guest's address for -a: '127.0.0.1'"),
        (["-a", "::1/128"], "not a guest's address for -a: '::1/128'"),
        (["-g", "127.0.0.1"], "not a gateway's address for -g: '127.0.0.1'"),
        (["--log-size", "9"], "invalid value for --log-size"),
        (["-D", "10.0.0.1", "-D", "none"], "'none' after another dns option"),
        (["-S", "a..b"], "invalid name for -S"),
        (["-H", "a b"], "invalid name for -H"),
        (["--no-copy-routes"], "need --config-net"),
        (["--no-splice", "--splice-only"], "options --splice-only and --no-splice exclude each other"),
        (["--no-splice", "--host-lo-to-ns-lo"], "options --host-lo-to-ns-lo and --no-splice exclude"),
        (["0"], "invalid value for PID"),
        (["99999999999"], "invalid value for PID"),
    ),
)
def test_errors(words, message):
    with pytest.raises(ConfigError, match=None) as caught:
        cli.parse(words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


REFUSED = (
    "-s x", "--socket x", "--socket-path x", "-1", "--one-off", "--no-dhcp-dns", "--no-dhcp-search", "--vhost-user",
    "--print-capabilities", "--repair-path x", "--migrate-exit", "--migrate-no-linger",
)  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_for_virtual_machines_is_refused_by_name(words):
    with pytest.raises(ConfigError) as caught:
        cli.parse(words.split())
    assert f"option {words.split()[0]} is for passt only" in str(caught.value)


def test_ports_are_kept_in_their_order_for_later():
    """Their errors come after those of all other options."""
    words = ["-t", "none", "-u", "53", "--tcp-ports", "nonsense", "-T", "auto", "--udp-ns", "1-2"]
    config = cli.parse(words)
    with pytest.raises(ConfigError, match="nonsense"):
        check.rules(config)
    with pytest.raises(ConfigError, match="MTU 5"):
        cli.parse([*words, "-m", "5"])
    expected = (("-t", "none"), ("-u", "53"), ("-t", "nonsense"), ("-T", "auto"), ("-U", "1-2"))
    assert config.ports == expected


def test_names():
    config = cli.parse([])
    assert (config.dns, config.search) == (None, None)
    config = cli.parse(["-D", "10.0.0.1", "-D", "fd00::1", "-S", "a.example b.example", "-S", "c.example"])
    assert config.dns == (IP4("10.0.0.1"), IP6("fd00::1"))
    assert config.search == ("a.example", "b.example", "c.example")
    words = "-D none -S none -H box --fqdn box.example.org --dhcp-dns --dhcp-search"
    config = cli.parse(words.split(" "))
    assert (config.dns, config.search, config.hostname, config.fqdn) == ((), (), "box", "box.example.org")
    assert config.dhcp_dns and config.dhcp_search
    config = cli.parse(["--dns-forward", "10.0.0.1", "--dns-forward", "10.0.0.2", "--dns-host", "::1"])
    assert (config.dns_forward, config.dns_host) == ((IP4("10.0.0.2"),), (IP6("::1"),))


def test_what_is_said_and_where():
    words = "-f -l out --log-size 40960 --stats 2 -p cap -c conf --control ctl --runas 7:8 --trace"
    config = cli.parse(words.split(" "))
    assert (config.log_file, config.log_size, config.stats) == ("out", 40960, 2)
    assert (config.pcap, config.conf_path, config.control, config.runas) == ("cap", "conf", "ctl", "7:8")
    assert config.trace and config.debug


def test_splicing():
    assert cli.parse([]).splice
    assert not cli.parse(["--no-splice"]).splice
    config = cli.parse(["--splice-only"])
    assert config.splice_only and config.loopback_kept and not config.icmp


def test_as_pasta():
    assert not cli.parse([]).as_pasta
    assert cli.parse([], as_pasta=True).as_pasta


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "pysplice", *words], capture_output=True, text=True, timeout=30, check=False
    )


def test_help_and_version():
    result = run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    for option in (
        "--tap",
        "--tcp-ports",
        "--dns-forward",
        "--config-net",
        "--netns",
        "--no-offload",
        "--map-host-loopback",
    ):
        assert option in result.stdout
    result = run("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("pysplice ")


def test_an_error_is_one_line_and_status_1():
    result = run("--mtu", "5", "--", "true")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "pysplice: MTU 5 is too small, the minimum is 68\n"


def test_called_as_pasta(tmp_path):
    """The name decides, wherever it lies; podman calls it by its full path."""
    link = tmp_path / "pasta"
    link.write_text(f"#!{sys.executable}\nimport sys\nfrom pysplice.__main__ import main\nmain()\n")
    link.chmod(0o755)
    result = subprocess.run([link, "--version"], capture_output=True, text=True, timeout=30, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("pasta (pysplice) ")
    result = subprocess.run([link, "--no-such"], capture_output=True, text=True, timeout=30, check=False)
    assert (result.returncode, result.stderr) == (1, "pasta: unrecognized option '--no-such'; try --help\n")


def test_ports_that_cannot_be_read():
    result = run("-t", "8080,", "--", "true")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "pysplice: invalid ports for -t: '8080,' ('' is not a port)\n"


def test_ctl_explains_itself():
    result = run("ctl", "--help")
    assert result.returncode == 0 and "Usage: pysplice ctl" in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    (
        ((), "ctl needs the PATH of a control socket"),
        (("show",), "ctl show needs show, add or del after the path"),
        (("x", "frob"), "ctl takes show, add or del, not 'frob'"),
        (("x", "show", "all"), "show takes --json only, not 'all'"),
        (("x", "add"), "add needs an option and ports, as in: add -t 8080:80"),
        (("x", "add", "8082"), "add needs one of -t, -u, -T and -U before '8082'"),
        (("x", "add", "-t"), "-t needs ports, as in: add -t 8080:80"),
        (("x", "del", "-t", "1", "-t"), "-t needs ports, as in: del -t 8080:80"),
    ),
)
def test_ctl_refuses_in_a_line(words, said):
    result = run("ctl", *words)
    assert (result.returncode, result.stdout) == (1, "")
    assert said in result.stderr and result.stderr.count("\n") == 1


def test_ctl_without_a_server(tmp_path):
    result = run("ctl", str(tmp_path / "none"), "show")
    assert (result.returncode, result.stdout) == (1, "")
    said = f"cannot ask {tmp_path}/none: No such file or directory; start pysplice with --control and this path"
    assert result.stderr == f"pysplice: {said}\n"


@pytest.mark.parametrize(
    ("words", "warned"),
    (
        (["--log-size", "50000"], "--log-size has no effect: there is no --log-file"),
        (["--log-size", "50000", "-l", "x"], ""),
        (["-4", "-a", "fd00::1"], "-a fd00::1 has no effect: -4"),
        (["-6", "-g", "10.0.0.1"], "-g 10.0.0.1 has no effect: -6"),
        (["--splice-only", "--config-net"], "--config-net has no effect: --splice-only has no tap"),
        (["--stats", "1", "123"], "--stats has no effect: it is not for the background (-f)"),
        (["--stats", "1", "-f", "123"], ""),
        (["-f", "--stats", "1", "123"], ""),
        (["--stats", "1", "--", "ls"], ""),
        (["--new-session", "123"], "--new-session has no effect: there is no COMMAND"),
        (["--resolv-conf", "--fd", "5"], "--resolv-conf has no effect: there is no COMMAND"),
        (["--no-netns-quit", "--", "ls"], "--no-netns-quit has no effect: there is a COMMAND"),
        (["--splice-only", "-p", "x"], "--pcap has no effect: --splice-only has no tap"),
        (["-D", "10.0.0.1"], "--dns has no effect: there is neither --dhcp-dns nor --resolv-conf"),
        (["-D", "10.0.0.1", "--dhcp-dns"], ""),
        (["--no-udp", "-u", "53", "-t", "80"], "-u 53 has no effect: --no-udp"),
        (["--no-udp", "-u", "none"], ""),
        (["-t", "8080:80,all"], "all in -t 8080:80,all has no effect: other ports are named"),
        (["-t", "127.0.0.1/all,~22"], ""),
        (["-S", "a.example"], "--search has no effect: there is neither --dhcp-search nor --resolv-conf"),
        (["--dns-host", "10.0.0.1"], "--dns-host has no effect: there is no --dns-forward"),
        (["-e"], "option -e/--stderr has no effect"),
    ),
)
def test_options_without_effect_are_named(words, warned):
    assert cli.parse(words).warnings == ((warned,) if warned else ())


@pytest.mark.parametrize("option", ("--dns-forward", "--map-host-loopback"))
@pytest.mark.parametrize("address", ("127.0.0.1", "127.0.0.53", "::1"))
def test_a_loopback_address_leads_nowhere(option, address):
    """The guest's own loopback interface has it: nothing of it reaches the tap."""
    with pytest.raises(ConfigError, match=option):
        cli.parse([option, address])


def test_busy_poll():
    assert cli.parse([]).busy_poll == -1
    for text, value in (("auto", -1), ("off", 0), ("0", 0), ("50", 50)):
        assert cli.parse(["--busy-poll", text]).busy_poll == value
    for text in ("1001", "-1", "often", ""):
        with pytest.raises(ConfigError, match="--busy-poll"):
            cli.parse(["--busy-poll", text])


def test_udp_filter():
    assert cli.parse([]).udp_filter == "address"
    assert cli.parse(["--udp-filter", "port"]).udp_filter == "port"
    with pytest.raises(ConfigError, match="one of endpoint, address, port"):
        cli.parse(["--udp-filter", "none"])
