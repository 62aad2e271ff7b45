"""The structure of the house: the map is true, imports go down, each thing has one owner, and no room is too large."""

import ast
import re
from pathlib import Path

import pytest

import pysplice
from pysplice import tcp
from pysplice.tcp import (
    connection,
    doors,
    events,
    handshake,
    receive,
    send,
    seq,
    small_queue,
    timing,
    window,
)

PACKAGE = Path(pysplice.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
C_FILES = sorted((ROOT / "cext").glob("*.[ch]"))

FILE_LINES, CLASS_LINES, FUNCTION_LINES, ARGUMENTS = 620, 350, 80, 8


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


ROOMS = {room(path) for path in FILES} | {"_cext"}


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports, its own left out."""
    depth = len(path.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.relative_to(PACKAGE).parts[: depth - node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(".".join((*base, name))).split(".")[0] for name in names}
        else:
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any((m or "").startswith("pysplice") for m in modules), "imports are relative"
    return {name for name in found if name in ROOMS} - {room(path), ""}


def the_map() -> list[str]:
    """The rooms as the map has them, from the top down."""
    return re.findall(r"^    (\w+)/? {2,}\S", pysplice.__doc__, re.MULTILINE)


def test_the_map_has_all_rooms():
    assert sorted(the_map()) == sorted(ROOMS - {""})


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    order = the_map()
    if room(path):
        below = set(order[order.index(room(path)) + 1 :])
        assert imported_rooms(path) <= below


def test_the_way_of_a_frame_names_real_things():
    sources = "\n".join(path.read_text() for path in FILES)
    for name in re.findall(r"`([A-Z]\w+)(?:\.\w+)?`", pysplice.__doc__):
        assert re.search(rf"^class {name}\b", sources, re.MULTILINE), name
    for name in re.findall(r"`[A-Z]\w+\.(\w+)`", pysplice.__doc__):
        assert re.search(rf"def {name}\(|self\.{name} = ", sources), name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_a_file_says_about_its_imports_is_true(path):
    """A docstring of a module says "Imports `a`, `b` and the files of this room" or "imports no other room"."""
    doc = " ".join(ast.get_docstring(ast.parse(path.read_text())).split())
    if path.name in ("__init__.py", "syscalls.py") or "Imports every room" in doc:
        return
    said = re.search(r"[Ii]mports (.*?)(?:\.(?: |$)|;|: )", doc)
    assert said, "it does not say what it imports"
    assert set(re.findall(r"`(\w+)(?:\.\w+)?`", said[1])) == imported_rooms(path)


# Owners


def users(pattern: str) -> set[str]:
    return {str(p.relative_to(PACKAGE)) for p in FILES if re.search(pattern, p.read_text(), re.MULTILINE)}


@pytest.mark.parametrize(
    ("what", "pattern", "owners"),
    (
        ("the loop", r"^import uvloop|^from uvloop", {"loop.py"}),
        ("timers", r"call_later|heapq", {"loop.py"}),
        (
            "the clock",
            r"import time$|from time ",
            {
                "cni/attachment.py",
                "control/client.py",
                "control/pesto.py",
                "loop.py",
                "observe/log.py",
                "setup/follow.py",
            },
        ),
        ("chance", r"import random|import secrets", set()),
        ("the tap", r"_cext\.Tap\(", {"link/tap.py"}),
        ("the table of flows", r"_table\[[^]]*\] = |del self\._table", {"stream/flows.py"}),
        ("facts", r"self\.facts = ", {"tcp/connection.py"}),
        ("netlink", r"^import pyroute2|^from pyroute2", {"setup/netlink.py"}),
        ("the C library", r"ctypes\.(CDLL|PyDLL)", {"setup/libc.py"}),
        ("descriptors", r"share_out\(", {"assemble.py", "budget.py", "proxy.py"}),
        ("options", r"import getopt", {"config/options.py", "control/pesto.py"}),
    ),
)
def test_owners(what, pattern, owners):
    assert users(pattern) == owners


def test_sockets_are_made_in_one_way():
    """But for those of set-up, of the client of the control socket, and of UNIX sockets."""
    made = users(r"(?<![\w.\"])socket\.socket\((?!fileno)(?!\])(?=\w)")
    assert made <= {
        "control/client.py",
        "control/pesto.py",
        "host_changes.py",
        "setup/addresses.py",
        "setup/follow.py",
        "setup/netlink.py",
        "sockets/request.py",
        "sockets/unix.py",
    }


def test_ethertypes_are_in_the_wire_room():
    assert users(r'"\\x08\\x00"|"\\x86\\xdd"|0x0806|0x86DD') == {"wire.py"}


def test_facts_are_changed_in_one_method():
    text = (PACKAGE / "tcp/connection.py").read_text()
    assert len(re.findall(r"self\.facts = ", text)) == 2  # the constructor, and _learn()


# Sizes


def test_files_are_small():
    for path in [*FILES, *C_FILES]:
        assert len(path.read_text().splitlines()) <= FILE_LINES, path


def definitions(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, (node.end_lineno or 0) - node.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_classes_and_functions_are_small(path):
    for node, lines in definitions(path):
        most = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
        assert lines <= most, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_constructors_take_few_arguments(path):
    for node, _ in definitions(path):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len(arguments) - 1 <= ARGUMENTS, f"line {node.lineno}: {len(arguments) - 1} arguments"


# Words


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_is_public_is_documented(path):
    """Modules, classes and functions without an underscore, except methods that a Protocol or a door describes."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name}: what is it?"


NOUNS = "whoever|somebody|someone|anybody|births?|born|desk|short cut|what is said|who talk|outside world"


@pytest.mark.parametrize("path", [*FILES, *C_FILES], ids=lambda p: p.name)
def test_actors_have_names(path):
    """Plain English: the glossary of docs/design.md."""
    assert not re.search(rf"\b({NOUNS})\b", path.read_text(), re.IGNORECASE)


def test_the_theory_names_what_there_is():
    """Every name in double backquotes of the theory of operation exists."""
    known = set()
    for module in (
        *(connection, doors, events, handshake, receive, send, seq, timing, window, small_queue),
        *(
            connection.Connection,
            handshake.Handshake,
            receive.Receive,
            send.Send,
            doors.HostDoor,
            doors.TapDoor,
        ),
        *(timing.RoundTrip, doors.SocketFacts, small_queue.SmallQueue),
    ):
        known |= set(vars(module))
        known |= set(getattr(module, "__annotations__", ()))
        known |= set(getattr(module, "__slots__", ()))
    names = re.findall(r"``(?:\w+\.)?([A-Za-z_]\w*)(?:\(\))?``", tcp.__doc__)
    assert len(names) > 30
    missing = {name for name in names if name not in known}
    assert not missing
