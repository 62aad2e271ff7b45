"""What is made from the table of options: help, manual pages, shell completion, and tables in Markdown.

Pure.  Imports options.py and pages.py.  contrib/make-docs writes the files; a test compares them.
"""

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from .options import GROUPS, OPTIONS, Option
from .pages import CTL, Page, Switch

DATE = "2026-11-28"  # of the manual pages
WIDTH = 100
COLUMN = 29  # where the help of an option begins

SYNOPSIS = (
    "[OPTION]... [COMMAND [ARG]...]",
    "[OPTION]... PID",
    "[OPTION]... --netns PATH|NAME",
    "[OPTION]... --fd FD",
)
CTL_SYNOPSIS = "ctl PATH show|add|del [--json|-t|-u|-T|-U PORTS]..."

ABOUT = (
    "Connect a network namespace to the host's network over a tap device, without privileges.  Without PID, --netns or"
    " --fd, run COMMAND (default: $SHELL) in new namespaces, of which it is root."
)

# The grammar of -t, -u, -T and -U: what to write, and what it means
PORTS_GRAMMAR = (
    ("none", "no port"),
    ("22", "a port"),
    ("22-80,443", "a range and a port"),
    ("8080:80", "port 8080 leads to port 80"),
    ("22-80:1022-1080", "a range leads to another range of the same length"),
    ("2000-5000,~3000-3010", "a range without some ports; ~22 alone: all ports except 22"),
    ("192.0.2.1/22", "a port at one address of the host's"),
    ("%eth0/22", "a port on one interface; */22: anywhere"),
    (
        "0.0.0.0/5000:192.0.2.5/6000",
        "a port leads to another address of the guest's (of the same version of IP)",
    ),
    (
        "unix:/run/web.sock:80",
        "-t only, in an option of its own: a UNIX socket on the host leads to port 80",
    ),
    ("all", "every port that is free and not ephemeral"),
    ("auto", "each port while a socket listens on the same port on the other side"),
    ("8000-8010,auto", "those of these ports on which a socket listens on the other side"),
)

FORMS = (
    ("pysplice [OPTIONS] [--] COMMAND ARG...",
     "runs the command in new user, network, PID, IPC, UTS and mount namespaces; exits with its status, 128 + n if"
     " signal n ended it"),
    ("pysplice [OPTIONS]", "the same with your shell"),
    ("pysplice [OPTIONS] PID", "serves the namespaces of a process, in the background, until it ends"),
    ("pysplice [OPTIONS] --netns PATH|NAME [--userns PATH]",
     "serves a network namespace, until its file is removed"),
    ("pysplice [OPTIONS] --fd N",
     "serves a tap that the caller has opened (`IFF_TAP|IFF_NO_PI`, with or without `IFF_VNET_HDR`)"),
    ("pysplice ctl PATH show|add|del ...",
     "shows and changes the forwarded ports of a process that runs with `--control PATH`"),
    ("pesto [OPTIONS] PATH",
     "does so for a pysplice or a pasta that runs with `-c PATH`; make a link of this name, or use the one of passt"),
    ("pasta ...",
     "the same as pysplice, under the name that engines call (make a link): the tap then has the name of the host's"
     " interface"),
)  # fmt: skip

EXIT_STATUS = (
    ("the command's", "when a command was run; 128 + n if signal n ended it, 127 if it was not found, 126 if it could"
     " not be run (both give 1 when called as pasta)"),
    ("0", "when the namespace that was served went away, and on SIGTERM and SIGQUIT"),
    ("1", "with one line on stderr, for anything that cannot be set up"),
)  # fmt: skip


Described = Option | Switch


def listed(options: Iterable[Option] = OPTIONS) -> Iterator[Option]:
    """The options that are described."""
    return (option for option in options if option.help)


def spellings(option: Described) -> str:
    """The names of an option and its metavar, as help and manual have them: -P, --pid FILE."""
    return ", ".join(option.names) + (f" {option.metavar}" if option.metavar else "")


def help_text(name: str = "pysplice") -> str:
    """What --help prints, for a program that was called by this name."""
    lines = [f"{'Usage:' if n == 0 else '      '} {name} {form}" for n, form in enumerate(SYNOPSIS)]
    if name == "pysplice":
        lines.append(f"       {name} {CTL_SYNOPSIS}")
    lines += ["", *textwrap.wrap(ABOUT, WIDTH)]
    for group in GROUPS:
        options = [option for option in listed() if option.group == group]
        if not options:
            continue
        lines += ["", f"{group}:"]
        for option in options:
            lines += _help_lines(option)
        if group == "Forwarded ports":
            lines += ["", "  PORTS, for instance:"]
            lines += [f"    {spec:<{COLUMN}} {meaning}" for spec, meaning in PORTS_GRAMMAR]
    return "\n".join([*lines, ""])


def switches_text(switches: Iterable[Switch]) -> str:
    """Switches as --help lists them."""
    return "".join(f"{line}\n" for switch in switches for line in _help_lines(switch))


def _help_lines(option: Described) -> list[str]:
    short = option.names[0] if len(option.names[0]) == 2 else ""
    rest = ", ".join(option.names[1:] if short else option.names)
    head = f"  {short + (', ' if rest else '') if short else '    '}{rest}"
    head += f" {option.metavar}" if option.metavar else ""
    text = textwrap.wrap(option.help, WIDTH - COLUMN)
    if len(head) <= COLUMN - 2:
        return [f"{head:<{COLUMN}}{text[0]}", *(" " * COLUMN + line for line in text[1:])]
    return [head, *(" " * COLUMN + line for line in text)]


# The manual page


def _roff(text: str) -> str:
    """Text for troff: dashes as typed, no line that looks like a request."""
    return re.sub(r"^([.'])", r"\\&\1", text.replace("\\", "\\e").replace("-", "\\-"), flags=re.MULTILINE)


def _entry(option: Described) -> list[str]:
    value = f" \\fI{_roff(option.metavar)}\\fR" if option.metavar else ""
    names = ", ".join(f"\\fB{_roff(name)}\\fR" for name in option.names)
    return [".TP", names + value, _roff(option.help) + "."]


def manual_of(page: Page, version: str) -> str:
    """One page of the manual, of another command."""
    kind = "User Commands" if page.section == 1 else "System Administration"
    lines = [
        f'.TH {page.page.upper()} {page.section} "{DATE}" "pysplice {version}" "{kind}"',
        ".SH NAME",
        f"{_roff(page.page)} \\- {_roff(page.purpose)}",
        ".SH SYNOPSIS",
    ]
    for n, form in enumerate(page.synopsis):
        lines += [*([".br"] if n else []), f".B {_roff(page.name)}", *([_roff(form)] if form else [])]
    lines += [".SH DESCRIPTION", _roff(page.about)]
    if page.switches:
        lines.append(".SH OPTIONS")
        for switch in page.switches:
            lines += _entry(switch)
    for heading, content in page.sections:
        lines.append(f".SH {heading}")
        if isinstance(content, str):
            lines += [".nf", _roff(content), ".fi"]
            continue
        for term, meaning in content:
            lines += [".TP", f"\\fB{_roff(term)}\\fR", _roff(meaning)]
    return "\n".join([*lines, ".SH SEE ALSO", _roff(page.see_also), ""])


def manual(version: str) -> str:
    """The manual page pysplice(1)."""
    lines = [
        f'.TH PYSPLICE 1 "{DATE}" "pysplice {version}" "User Commands"',
        ".SH NAME",
        "pysplice \\- connect a network namespace to the host's network, without privileges",
        ".SH SYNOPSIS",
    ]
    for n, form in enumerate((*SYNOPSIS, CTL_SYNOPSIS)):
        lines += [*([".br"] if n else []), ".B pysplice", _roff(form)]
    lines += [".SH DESCRIPTION", _roff(ABOUT), ".SH OPTIONS"]
    for group in GROUPS:
        options = [option for option in listed() if option.group == group]
        if not options:
            continue
        lines += [f".SS {group}"]
        for option in options:
            lines += _entry(option)
    lines += [".SH PORTS", "What \\-t, \\-u, \\-T and \\-U take, as pasta(1) does:"]
    for spec, meaning in PORTS_GRAMMAR:
        lines += [".TP", f"\\fB{_roff(spec)}\\fR", _roff(meaning)]
    lines += [
        ".PP",
        "The options add up.  It is an error if two of them name the same port, unless one of them follows (auto): the"
        " other gets the port.",
        _roff(
            "The default of -t, -u, -T and -U is auto.  So services on the host's loopback interface can be reached"
        ),
        "from the namespace, and servers in the namespace can be reached from the host's network.",
        "none switches it off.",
        ".SH NOTES",
        "Started as root, pysplice and the command become nobody on the host, or the user of",
        _roff("--runas: files that only root may read are closed to them.  --runas root keeps root."),
        ".SH EXIT STATUS",
    ]
    for status, meaning in EXIT_STATUS:
        lines += [".TP", f"\\fB{_roff(status)}\\fR", _roff(meaning)]
    lines += [
        ".SH EXAMPLES",
        ".nf",
        _roff("pysplice --config-net -- curl https://example.org/"),
        _roff("pysplice --config-net -t 8080 -- python3 -m http.server 8080"),
        _roff("pysplice --config-net --tap eth0 4711"),
        ".fi",
        ".SH SEE ALSO",
        _roff(
            "pysplice-ctl(1), pysplice-pesto(1), pysplice-cni(8), pysplice-netavark(8), pasta(1), ip-netns(8), "
            "user_namespaces(7)"
        ),
    ]
    return "\n".join([*lines, ""])


# Completion

_FILES = {"FILE", "PATH", "PATH|NAME"}
_CTL_OPTIONS = ("--json", *(name for switch in CTL.switches for name in switch.names))
_BASH_FILES = 'compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$cur")'
_WORDS = {name: name.split("|") for name in ("endpoint|address|port", "BYTES|auto|off", "ADDR|none")}


def _choices(option: Described) -> list[str]:
    """The words that a value may be, as far as they are known."""
    if option.names[0] == "--window":
        return [
            word.strip(" ,") for word in option.help.partition(":")[2].replace("or ", "").split(",")[:5]
        ] + ["truesize"]
    if option.metavar == "PORTS":
        return ["none", "auto", "all"]
    if option.metavar == "PIF":
        return ["HOST", "SPLICE"]
    return [word for word in _WORDS.get(option.metavar, []) if word.islower()]


def bash_completion(names: Sequence[str], options: Iterable[Described], inner: Sequence[str] = ()) -> str:
    """The completion for bash of a program with these names.

    `inner`: the words of `ctl PATH WORD`; without any, the words that are no options are files, else commands.
    """
    options = list(options)
    takes_file = "|".join(n for o in options if o.metavar in _FILES for n in o.names)
    takes_value = "|".join(
        n for o in options if o.metavar and o.metavar not in _FILES and not _choices(o) for n in o.names
    )
    spelled = " ".join(name for option in options for name in option.names)
    lines = [
        f"# bash completion for {' and '.join(names)}; made by contrib/make-docs",
        f"_{names[0]}()",
        "{",
        "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}",
        # --name=value is three words
        "    if [[ $cur == '=' ]]; then cur=; elif [[ $prev == '=' ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi",
    ]
    if inner:
        lines += [
            "    if [[ ${COMP_WORDS[1]} == ctl && $COMP_CWORD == 2 ]]; then",
            f"        {_BASH_FILES}; return",
            "    elif [[ ${COMP_WORDS[1]} == ctl && $COMP_CWORD == 3 ]]; then",
            f'        COMPREPLY=($(compgen -W "{" ".join(inner)}" -- "$cur")); return',
            "    elif [[ ${COMP_WORDS[1]} == ctl && $COMP_CWORD -gt 3 && $cur == -* ]]; then",
            f'        COMPREPLY=($(compgen -W "{" ".join(_CTL_OPTIONS)}" -- "$cur")); return',
            "    fi",
        ]
    lines.append("    case $prev in")
    if takes_file:
        lines.append(f"    {takes_file}) {_BASH_FILES}; return ;;")
    for option in options:
        if _choices(option):
            words = " ".join(_choices(option))
            lines.append(
                f'    {"|".join(option.names)}) COMPREPLY=($(compgen -W "{words}" -- "$cur")); return ;;'
            )
    if takes_value:
        lines.append(f"    {takes_value}) return ;;")
    lines += [
        "    esac",
        "    if [[ $cur == -* ]]; then",
        f'        COMPREPLY=($(compgen -W "{spelled}" -- "$cur"))',
        "    else",
        '        COMPREPLY=($(compgen -c -- "$cur"))' if inner else f"        {_BASH_FILES}",
        "    fi",
        "}",
        f"complete -F _{names[0]} {' '.join(names)}",
        "",
    ]
    return "\n".join(lines)


def zsh_completion(names: Sequence[str], options: Iterable[Described], inner: Sequence[str] = ()) -> str:
    """The completion for zsh; see bash_completion()."""
    lines = [f"#compdef {' '.join(names)}", "# made by contrib/make-docs"]
    if inner:
        lines += [
            "if [[ ${words[2]} == ctl ]]; then",
            f"    _arguments '1:ctl:(ctl)' '2:path:_files' '3:request:({' '.join(inner)})'",
            "    return",
            "fi",
        ]
    lines.append("_arguments -s -S \\")
    for option in options:
        about = re.sub(r"[\[\]:'`]", "", option.help)
        value = ""
        if option.metavar:
            words = " ".join(_choices(option))
            action = "_files" if option.metavar in _FILES else f"({words})" if words else " "
            value = f":{option.metavar.lower()}:{action}"
        group = "(" + " ".join(option.names) + ")" if len(option.names) > 1 else ""
        for name in option.names:
            lines.append(f"    '{group}{name}[{about}]{value}' \\")
    lines += ["    '*::command:_normal'" if inner else "    '*:path:_files'", ""]
    return "\n".join(lines)


def fish_completion(names: Sequence[str], options: Iterable[Described], inner: Sequence[str] = ()) -> str:
    """The completion for fish; see bash_completion()."""
    lines = [f"# fish completion for {' and '.join(names)}; made by contrib/make-docs"]
    if inner:
        lines.append(f"complete -c {names[0]} -n '__fish_seen_subcommand_from ctl' -a '{' '.join(inner)}'")
    for option in options:
        flags = " ".join(f"-s {n[1]}" if len(n) == 2 else f"-l {n[2:]}" for n in option.names)
        about = option.help.replace("\\", "\\\\").replace("'", "\\'")
        value = ""
        if option.metavar:
            words = " ".join(_choices(option))
            value = " -r -F" if option.metavar in _FILES else f" -x -a '{words}'" if words else " -x"
        for command in names:
            lines.append(f"complete -c {command} {flags}{value} -d '{about}'")
    return "\n".join([*lines, ""])


# Markdown


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def markdown_options(first_only: bool = False, groups: Iterable[str] = GROUPS) -> str:
    """A table of options; with `first_only` those that a newcomer needs."""
    lines = []
    for group in groups:
        options = [o for o in listed() if o.group == group and (o.first or not first_only)]
        if not options:
            continue
        if not first_only:
            lines += [f"### {group}", "", "| option | meaning |", "| --- | --- |"]
        for option in options:
            lines.append(f"| `{_cell(spellings(option))}` | {_cell(option.help)} |")
        if not first_only:
            lines.append("")
    if first_only:
        lines = ["| option | meaning |", "| --- | --- |", *lines]
    return "\n".join(lines).rstrip() + "\n"


def markdown_ports() -> str:
    """A table of the grammar of ports."""
    lines = ["| ports | meaning |", "| --- | --- |"]
    lines += [f"| `{_cell(spec)}` | {_cell(meaning)} |" for spec, meaning in PORTS_GRAMMAR]
    return "\n".join(lines) + "\n"


def markdown_forms() -> str:
    """A table of the ways to call it."""
    lines = ["| form | what it does |", "| --- | --- |"]
    lines += [f"| `{_cell(form)}` | {_cell(meaning)} |" for form, meaning in FORMS]
    return "\n".join(lines) + "\n"


def markdown_exit_status() -> str:
    """A table of exit statuses."""
    lines = ["| status | when |", "| --- | --- |"]
    lines += [f"| {_cell(status)} | {_cell(meaning)} |" for status, meaning in EXIT_STATUS]
    return "\n".join(lines) + "\n"
