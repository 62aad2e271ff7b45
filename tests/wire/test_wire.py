"""Each script holds on Linux's own stack and on pysplice, with offloads and without."""

import itertools

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from . import campaign, player
from .language import Mistake, all_scripts, parse, parse_step

SCRIPTS = {script.title: script for script in all_scripts() if not script.is_long}
CASES = [(title, version) for title, script in SCRIPTS.items() for version in script.versions]


@pytest.fixture(scope="module", params=campaign.OURS)
def results(isolated, request):
    """What each script gives on one stack."""
    return request.param, campaign.run([request.param], campaign.choose([], with_long=False))


@pytest.mark.parametrize(("title", "version"), CASES)
def test_script(results, title, version):
    stack, problems = results
    assert problems[title, version, stack] == ""


# The language


def script_of(tmp_path, text):
    path = tmp_path / "one.wire"
    path.write_text(text)
    return list(parse(path))


def test_there_are_enough_scripts_and_no_two_with_one_title():
    scripts = all_scripts()
    assert len(scripts) >= 80
    assert len({script.title for script in scripts}) == len(scripts)


def test_a_script_is_read(tmp_path):
    (script,) = script_of(
        tmp_path,
        "== A title\n# why\nsource: RFC 1\nonly: 6\n\n> SYN mss=1460  # why\n0.5 < SYN,ACK seq=0..1\n",
    )
    assert (script.title, script.versions, len(script.steps)) == ("A title", (6,), 2)
    step = script.steps[1]
    assert (step.delay, step.actor, step.flags, step.fields) == (0.5, "<", {"SYN", "ACK"}, {"seq": "0..1"})


@pytest.mark.parametrize(
    "text",
    (
        "> SYN\n",
        "== T\nsource: x\n",
        "== T\n\n> SYN\n",
        "== T\nsource: x\nodd: y\n\n> SYN\n",
        "== T\nsource: x\n\n> SIN\n",
        "== T\nsource: x\n\nserver dances\n",
        "== T\nsource: x\n\nlinux| > SYN\n",
        "== T\nsource: x\npysplice: why\n\n> SYN\n",
        "== T\nsource: x\npysplice: why\n\nbsd| > SYN\n",
        "== T\nsource: x\n\n> SYN ms=9\n",
        "== T\nsource: x\n\n> SYN times=2 within=1..\n",
        "== T\nsource: x\n\n< SYN within=0..0.5\n",
        "== T\nsource: x\n\n< SYN within=3\n",
        "== T\nsource: x\n\n< SYN acknowledged\n",
        "== T\nsource: x\n\nserver read upto=9\n",
        "== T\nsource: x\n\n> SYN mss=70000\n",
        "== T\nsource: x\n\n> SYN win=-1\n",
        "== T\nsource: x\n\n> SYN seq=abc\n",
        "== T\nsource: x\n\n> ACK data=5:1\n",
        "== T\nsource: x\n\n> ACK data=5\n",
        "== T\nsource: x\n\n> SYN bad=transprt\n",
        "== T\nsource: x\n\n> UDP len=3 len=4\n",
        "== T\nsource: x\n\n< ERROR code=prot\n",
        "== T\nsource: x\n\n< UDP content=sever:3\n",
        "== T\nsource: x\nonly: 5\n\n> SYN\n",
        "== T\nsource: x\ntakes: forever\n\n> SYN\n",
        "== T\nsource: x\nfrom: nobody\n\n> SYN\n",
        "== T\nsource: x\n> SYN\n",
    ),
)
def test_a_mistake_is_named(tmp_path, text):
    with pytest.raises(Mistake, match=r"one\.wire:\d"):
        script_of(tmp_path, text)


@pytest.mark.parametrize("stack", ("linux", "pasta", "slirp4netns"))
def test_lines_for_one_stack(tmp_path, stack):
    text = "== T\nsource: x\npysplice: y\n\nlinux| < RST\npysplice| < nothing 1\n> SYN\n"
    (script,) = script_of(tmp_path, text)
    assert [step.verb for step in script.steps_for(stack)] == ["RST", "SYN"]
    assert [step.verb for step in script.steps_for("pysplice-no-offload")] == ["nothing", "SYN"]


@pytest.mark.parametrize(
    ("got", "wanted", "holds"), ((5, "5", 1), (5, "1..9", 1), (5, "6..", 0), ("none", "1..", 0))
)
def test_ranges(got, wanted, holds):
    assert player.within(got, wanted) == bool(holds)


# The player notices what a script asks for


@pytest.fixture(scope="module")
def linux(isolated):
    stack = campaign.STACKS["linux"]()
    yield stack
    stack.close()


_numbers = itertools.count(600)


@pytest.mark.parametrize(
    ("lines", "why"),
    (
        ("> SYN\n< SYN,ACK ack=2", "got SYN,ACK"),
        ("> SYN\n< SYN", "got SYN,ACK"),
        ("> SYN to=closed\n< SYN,ACK", "got RST"),
        ("> SYN\n< nothing 0.5", "got SYN,ACK"),
        ("> SYN\n< SYN,ACK\n> ACK\nserver accept\n> ACK data=0:10\nserver read 0:11", "nothing comes"),
        ("> SYN\n< SYN,ACK\n> ACK\nserver accept\n> ACK data=5:10 seq=1\nserver read 0:5", "other bytes"),
        ("> SYN\n< SYN,ACK\n> ACK\nserver accept\nserver write 0:9\n< data 0:10", "only bytes up to 9"),
        ("> SYN\n< SYN,ACK\n> ACK\nserver accept\nserver end", "nothing comes"),
        ("> SYN\n< SYN,ACK\n> ACK\nserver accept\n> FIN,ACK\nserver waits", "something to read"),
        ("> UDP len=10\nserver receive 11", "another datagram"),
        ("> UDP len=10 to=closed\n< ERROR code=host", "got ERROR"),
        ("> SYN\n< SYN,ACK within=3..", "after 0."),
        ("> UDP len=4\nserver receive 4\nserver answer 5\n< UDP content=server:4", "differs in content"),
        ("server read", "cannot be played"),
    ),
)
def test_a_script_can_fail(tmp_path, linux, monkeypatch, lines, why):
    monkeypatch.setattr(player, "PATIENCE", 1.0)
    (script,) = script_of(tmp_path, f"== T\nsource: x\n\n{lines}\n")
    assert why in player.play(script, linux, 4, next(_numbers))


def test_a_segment_by_hand_is_that_of_scapy():
    ends = player.Ends(
        4, "10.0.0.1", "10.0.0.2", "10.0.0.3", "02:00:00:00:00:01", "02:00:00:00:00:02", 5, 6
    )
    for version, addresses in ((4, ("10.0.0.1", "10.0.0.2")), (6, ("fd00::1", "fd00::2"))):
        ends.version, (ends.guest, ends.server) = version, addresses
        step = parse_step("> ACK data=0:10", 1, "")
        scapys = player.frames.tcp_of("ACK", {"data": "0:10"}, ends, 1, 2, 65535, 0)
        (frame,) = player.frames.frames_of(step, ends, scapys)
        ours = player.frames.segment_of(ends, 1, 2, player.pattern("guest", 0, 10))
        # The identification of IPv4 may differ, and the sum over it
        assert (frame[34:], frame[:18]) == (ours[34:], ours[:18]) or version == 4
        assert frame[26:] == ours[26:]


@pytest.mark.parametrize("version", (4, 6))
def test_a_segment_parsed_by_hand_is_that_of_scapy(version, monkeypatch):
    src, dst = ("10.0.0.1", "10.0.0.2") if version == 4 else ("fd00::1", "fd00::2")
    ip = IP(src=src, dst=dst) if version == 4 else IPv6(src=src, dst=dst)
    tcp = TCP(sport=5, dport=6, seq=7, ack=8, window=9, flags="FPA", urgptr=3)
    data = bytes(Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / ip / tcp / b"hello") + b"padding"
    ours = player.frames.parse(data, 1.0)
    monkeypatch.setattr(player.frames, "_plain", lambda *_: None)
    scapys = player.frames.parse(data, 1.0)
    assert (ours.kind, ours.payload, ours.key, ours.raw) == (
        scapys.kind,
        scapys.payload,
        scapys.key,
        scapys.raw,
    )
    for name in ("seq", "ack", "win", "urg", "len", "mss", "mac", "dst", "ttl", "version"):
        assert ours.values[name] == scapys.values[name], name


# A stack that is a program may end


class Mortal:
    """A stack whose process ends in the middle of one script."""

    starts = 0
    deadly = "B"

    def __init__(self):
        type(self).starts += 1
        self.has_ended = False

    def close(self):
        pass


def test_a_stack_that_ends_is_started_again_and_the_script_is_named(tmp_path, monkeypatch):
    titles = "ABCDEFGH"
    scripts = script_of(tmp_path, "".join(f"== {t}\nsource: x\nonly: 4\n\n> SYN\n" for t in titles))
    played: dict[str, int] = {}

    def play(script, stack, version, number):
        played[script.title] = played.get(script.title, 0) + 1
        if script.title == Mortal.deadly:
            stack.has_ended = True
        return "nothing comes" if stack.has_ended else ""

    monkeypatch.setattr(Mortal, "starts", 0)
    monkeypatch.setitem(campaign.STACKS, "mortal", Mortal)
    monkeypatch.setattr(campaign, "play", play)
    results = campaign.run(["mortal"], scripts)
    assert {t: results[t, 4, "mortal"] for t in titles} == {
        t: "its process ends" if t == "B" else "" for t in titles
    }
    assert Mortal.starts <= 4 and sum(played.values()) <= len(titles) + campaign.AT_A_TIME


def test_scripts_are_chosen_by_words_of_their_titles():
    assert {s.title for s in campaign.choose(["challenge acks"], False)} == {
        "Challenge ACKs are not given without limit"
    }
    assert campaign.choose(["no such title"], True) == []
    assert len(campaign.choose([], True)) > len(campaign.choose([], False))
