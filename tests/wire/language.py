"""The language of the scripts.

A file holds several scripts.  Each begins with `== TITLE`, then its head, an empty line, and its steps:

    == A SYN that comes again gets the same SYN-ACK
    source: RFC 9293, 3.10.7.4

    > SYN
    < SYN,ACK seq=0 ack=1
    0.2 > SYN
    < SYN,ACK seq=0 ack=1
    server accept

The head has one field a line:

    source: TEXT     where the behaviour is written down
    pysplice: TEXT   why pysplice differs; a script has it if it has lines for one stack alone, and only then
    only: 4 or 6     the version of IP that the script is about; both without it
    isn: NUMBER      the guest's first sequence number (default 1000)
    takes: long      it lasts more than 20 seconds: only `tests/wire/table --long` plays it
    takes: all       it must run by itself, because it meets a limit that all flows share
    from: server     the server connects to the guest, where `server connect` says so

A step is one line.  A number in front of it is how many seconds pass before (`0.5 wait` does nothing else).  `linux|`
or `pysplice|` in front means that the line is for that stack alone (stacks for comparison take Linux's lines).  What
follows a `#` is a comment.  Then comes who acts:

    > KIND name=value ...    the guest sends a frame
    < KIND name=value ...    the stack sends such a frame within 5 seconds; frames that differ are passed over,
                             but a RST that the line does not ask for fails the script
    < nothing SECONDS        no frame of this script in that time, but for a repetition that has crossed what the guest
                             has just sent
    < data FROM:TO           the server's bytes FROM to TO arrive, their content is right, and their segments are
                             within the window; `acknowledged`: the guest acknowledges each segment
    server VERB ...          the application behind the stack acts (see player.py)
    guest VERB ...           the guest changes: `mac ADDRESS`; `fill`: it sends all that the window permits

KIND is flags of TCP joined by commas (SYN, ACK, FIN, RST, PSH, URG, ECE, CWR, NONE), or UDP, ECHO, ECHO-REPLY, ERROR,
WHO-HAS, IS-AT, SOLICIT-ROUTER, ADVERTISE-ROUTER.  Sequence numbers count from the first of their side.  A frame from
the guest has the numbers that are due, unless the step has others.  In an expectation a value may be a range, LOW..HIGH
with either left out.

Values of a step to send (all are optional):

    seq= ack=          relative to the first number of their side;  urg=: the urgent pointer
    data=FROM:TO       bytes of the guest's stream, whose byte 0 has sequence number 1;  len=: of a datagram or echo
    win=               the field, as it stands in the header
    shrinks=1          the right edge of the guest's window moves left to where this segment says
    probe=1            one number before the one that is due;  beyond=1: one byte that the window does not permit
    counts=1           what this odd segment takes of the sequence numbers counts as sent
    mss= wscale= sackok=1 ts=VALUE:ECHO sack=FROM:TO fastopen=HEX options=HEX    of TCP
    doff= udplen= iplen=                a length field that is not true
    bad=ip or bad=transport             a checksum that is wrong;  checksum=0: none
    ttl= tos= id= df=1 ipoptions=HEX    of IP;  header=hop, destination, routing: of IPv6;  protocol=: another one
    fragments=0:1480,1480:2000          parts of the packet's payload, sent in this order;  more=1: the last lies
    cut= pad=                           bytes taken off and added at the end of the frame
    sport= dport= to=closed             ports that are not the script's;  to=gateway, nobody, ADDRESS: another address
    target= source=none hops= to=unicast hwlen= plen= hwtype= ptype=
                                        of WHO-HAS and its like; target is server, gateway, guest or nobody
    code= mtu= quote=                   of ERROR: port, host, too-big, time;  about=sent or received (what it quotes)
    seq= id= code=                      of ECHO
    times=                              the same frame so many times

Values of a frame that a step can ask for:

    seq ack len win mss wscale sackok ts sack urg     of TCP;  `ack=same` is what was acknowledged last
    ttl tos df fragments                              of IP: the last is in how many it came
    code mtu quotes                                   of ERROR: code is as above, or prohibited, net, protocol,
                                                      reassembly, parameter; quotes: how many bytes it quotes
    target from mac dst solicited lifetime            of WHO-HAS and its like; mac and dst are those of Ethernet
    id seq                                            of ECHO-REPLY
    content=SIDE:LENGTH                               the payload is the beginning of what that side sends
    within=LOW..HIGH                                  so many seconds after the last frame that was expected; HIGH is
                                                      at least 1, or left out: less would be a bound of the machine
    count=LOW..HIGH in=SECONDS                        so many such frames in that time
    most= least=                                      bounds of the length of segments of `data` (the last may be less)

A value that the frame does not have is `none`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SCRIPTS = Path(__file__).parent / "scripts"
FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")
OTHER_KINDS = {
    "UDP", "ECHO", "ECHO-REPLY", "ERROR", "WHO-HAS", "IS-AT", "SOLICIT-ROUTER", "ADVERTISE-ROUTER",
}  # fmt: skip
SENT = {
    "seq", "ack", "urg", "data", "len", "win", "shrinks", "probe", "beyond", "counts", "mss", "wscale", "sackok", "ts",
    "sack", "fastopen", "options", "doff", "udplen", "iplen", "bad", "checksum", "ttl", "tos", "id", "df", "ipoptions",
    "header", "protocol", "fragments", "more", "cut", "pad", "sport", "dport", "to", "target", "source", "hops",
    "hwlen", "plen", "hwtype", "ptype", "code", "mtu", "quote", "about", "times",
}  # fmt: skip
EXPECTED = {
    "seq", "ack", "len", "win", "mss", "wscale", "sackok", "ts", "sack", "urg", "ttl", "tos", "df", "fragments", "code",
    "mtu", "quotes", "target", "from", "mac", "dst", "solicited", "lifetime", "id", "content", "within", "count", "in",
    "most", "least",
}  # fmt: skip
NUMBER, SPAN, HEX = r"-?\d+", r"\d+:\d+", r"([0-9a-f]{2})*"
# What values of a step to send may be: the largest number, or a pattern
LIMITS = {
    "win": 0xFFFF, "mss": 0xFFFF, "wscale": 255, "urg": 0xFFFF, "doff": 15, "udplen": 0xFFFF, "iplen": 0xFFFF,
    "len": 65507, "checksum": 0xFFFF, "ttl": 255, "tos": 255, "id": 0xFFFFFFFF, "protocol": 255, "cut": 1500,
    "pad": 1500, "sport": 0xFFFF, "dport": 0xFFFF, "hops": 255, "mtu": 0xFFFFFFFF, "quote": 1500, "times": 100_000,
}  # fmt: skip
PATTERNS = {
    "seq": NUMBER, "ack": NUMBER, "data": SPAN, "sack": SPAN, "ts": SPAN, "fastopen": HEX, "options": HEX,
    "ipoptions": HEX, "fragments": rf"{SPAN}(,{SPAN})*", "bad": "ip|transport", "source": "none",
    "about": "sent|received", "header": "hop|destination|routing",
    **dict.fromkeys(("shrinks", "probe", "beyond", "counts", "sackok", "df", "more"), "1"),
}  # fmt: skip
EXPECTED_PATTERNS = {
    "content": r"(guest|server):\d+", "count": r"\d*\.\.\d*|\d+", "in": r"\d+(\.\d+)?", "most": NUMBER, "least": NUMBER,
    "code": "net|host|protocol|port|prohibited|too-big|time|reassembly|parameter",
}  # fmt: skip
HEADS = {
    "only": "[46]",
    "isn": r"\d+|0x[0-9a-fA-F]+",
    "takes": "(long|all)(, ?(long|all))?",
    "from": "server",
}
HEAD = {"source", "pysplice", *HEADS}
STACKS = ("linux", "pysplice")
SERVER = {
    "accept", "read", "write", "shutdown", "close", "abort", "end", "reset", "connect", "connected", "refused",
    "option", "receive", "answer", "waits", "drain", "error",
}  # fmt: skip
GUEST = {"mac", "fill"}

_STEP = re.compile(
    r"(?:(?P<stack>\w+)\|\s*)?(?:(?P<delay>\d+(?:\.\d+)?)\s+)?(?P<actor>[<>]|server|guest|wait)\s*(?P<rest>.*)"
)
_WITHIN = re.compile(r"(\d+(\.\d+)?)?\.\.([1-9]\d*(\.\d+)?)?")


class Mistake(ValueError):
    """A line that is not in the language: file, line, what is wrong."""


@dataclass(frozen=True)
class Step:
    line: int
    text: str
    actor: str  # ">", "<", "server", "guest" or "wait"
    verb: str  # the kind of frame, or what is done
    words: tuple[str, ...] = ()
    fields: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0  # seconds
    stack: str = ""  # empty: for all

    @property
    def flags(self) -> frozenset[str]:
        """The flags of a TCP segment; empty for NONE."""
        return frozenset(self.verb.split(",")) - {"NONE"}

    @property
    def is_tcp(self) -> bool:
        return self.verb == "NONE" or set(self.verb.split(",")) <= set(FLAGS)


@dataclass
class Script:
    title: str
    path: Path
    line: int
    head: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions of IP that it is for."""
        return (int(self.head["only"]),) if "only" in self.head else (4, 6)

    @property
    def is_long(self) -> bool:
        return "long" in self.head.get("takes", "")

    @property
    def is_alone(self) -> bool:
        return "all" in self.head.get("takes", "")

    def steps_for(self, stack: str) -> list[Step]:
        own = "pysplice" if stack.startswith("pysplice") else "linux"
        return [step for step in self.steps if step.stack in ("", own)]


def parse_step(text: str, line: int, where: str) -> Step:
    """One step; Mistake if it is none."""
    match = _STEP.fullmatch(text)
    if match is None:
        raise Mistake(f"{where}:{line}: no step: {text}")
    verb, *more = match["rest"].split() or [""]
    words = tuple(word for word in more if "=" not in word)
    fields = dict(word.split("=", 1) for word in more if "=" in word)
    step = Step(
        line, text, match["actor"], verb, words, fields, float(match["delay"] or 0), match["stack"] or ""
    )
    known = {
        "server": verb in SERVER,
        "guest": verb in GUEST,
        "wait": verb == "",
        "<": step.is_tcp or verb in OTHER_KINDS or verb in ("nothing", "data"),
        ">": step.is_tcp or verb in OTHER_KINDS,
    }
    if not known[step.actor] or (step.stack and step.stack not in STACKS):
        raise Mistake(f"{where}:{line}: no step: {text}")
    odd = fields.keys() - {">": SENT, "<": EXPECTED}.get(step.actor, set())
    if odd:
        raise Mistake(f"{where}:{line}: no value of such a step: {min(odd)}")
    if step.actor in "<>" and len(words) > {"nothing": 1, "data": 2}.get(verb, 0):
        raise Mistake(f"{where}:{line}: not understood: {words[-1]}")
    if len(fields) < len(more) - len(words):
        raise Mistake(f"{where}:{line}: a value is given twice: {text}")
    for name, value in fields.items():
        problem = wrong(step.actor, name, value)
        if problem:
            raise Mistake(f"{where}:{line}: {name}={value}: {problem}")
    if "within" in fields and not _WITHIN.fullmatch(fields["within"]):
        raise Mistake(f"{where}:{line}: within=LOW..HIGH, with a HIGH of at least 1 or none")
    return step


def wrong(actor: str, name: str, value: str) -> str:
    """What is wrong with a value; empty if nothing is."""
    if actor == "<":
        pattern = EXPECTED_PATTERNS.get(name, ".*")
        return "" if re.fullmatch(pattern, value) else f"it must match {pattern}"
    if name in LIMITS and value != "none":
        most = LIMITS[name]
        return "" if value.isdigit() and int(value) <= most else f"it must be 0 to {most}"
    pattern = PATTERNS.get(name, ".*")
    if not re.fullmatch(pattern, value):
        return f"it must match {pattern}"
    start, _, end = value.partition(":")
    return (
        "the end lies before the beginning"
        if pattern == SPAN and name != "ts" and int(end) < int(start)
        else ""
    )


def parse(path: Path) -> Iterator[Script]:
    """The scripts of a file, in order."""
    script: Script | None = None
    in_head = False
    for line, raw in enumerate(path.read_text().splitlines(), 1):
        text = raw.split("#", 1)[0].strip()
        if not text and raw.strip():
            continue  # a comment
        if text.startswith("== "):
            if script:
                yield _checked(script)
            script, in_head = Script(text[3:], path, line), True
        elif script is None:
            if text:
                raise Mistake(f"{path.name}:{line}: before the first title: {text}")
        elif in_head and text:
            name, _, value = text.partition(":")
            if name not in HEAD:
                raise Mistake(f"{path.name}:{line}: no field of a head (an empty line ends it): {name}")
            script.head[name] = value.strip()
            if not re.fullmatch(HEADS.get(name, ".+"), script.head[name]):
                raise Mistake(f"{path.name}:{line}: {name}: it must match {HEADS.get(name, 'something')}")
        elif not text:
            in_head = False
        else:
            script.steps.append(parse_step(text, line, path.name))
    if script:
        yield _checked(script)


def _checked(script: Script) -> Script:
    where = f"{script.path.name}:{script.line}"
    if not script.steps:
        raise Mistake(f"{where}: no steps")
    if "source" not in script.head:
        raise Mistake(f"{where}: no source")
    if ("pysplice" in script.head) != any(step.stack for step in script.steps):
        raise Mistake(f"{where}: lines for one stack, and a reason in the head, go together")
    return script


def all_scripts() -> list[Script]:
    """Every script, by file and line; raises Mistake."""
    scripts = [script for path in sorted(SCRIPTS.glob("*.wire")) for script in parse(path)]
    titles: dict[str, Script] = {}
    for script in scripts:
        other = titles.setdefault(script.title, script)
        if other is not script:
            raise Mistake(f"{script.path.name}:{script.line}: the title of {other.path.name}:{other.line}")
    return scripts
