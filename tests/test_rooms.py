"""The structure of the house: who imports whom, who owns what, and that the theory names real things."""

import ast
import re
from pathlib import Path

import pytest

import pysplice
from pysplice import tcp
from pysplice.tcp import connection, doors, events, seq, small_queue, timing, transfer, window

PACKAGE = Path(pysplice.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Room -> rooms it may import; a room that is not here may import nothing of ours
ALLOWED = {
    "__main__": {
        *(
            "births",
            "cli",
            "config",
            "control",
            "forward",
            "inside",
            "observe",
            "own",
            "ports",
            "proxy",
            "services",
        ),
        *("setup", "tap", "translate", "unix", ""),
    },
    "cli": {"config", ""},
    "ports": {"config"},
    "control": {"config", "ports", "unix"},
    "setup": {"config", "inside"},
    "proxy": {
        *(
            "births",
            "budget",
            "control",
            "datagram",
            "ending",
            "flows",
            "forward",
            "host",
            "inbound",
            "inside",
            "linger",
            "observe",
        ),
        *("ports", "services", "splice", "tap", "tcp", "translate", "unix", "_cext"),
    },
    "births": {"flows", "host", "linger", "observe", "tap", "tcp", "translate"},
    "forward": {"_cext", "config", "inside", "ports", "translate", "unix"},
    "splice": {"linger"},
    "datagram": {
        "_cext",
        "budget",
        "forward",
        "inside",
        "observe",
        "ports",
        "services",
        "tap",
        "translate",
    },
    "ending": {"flows", "host", "splice", "tcp"},
    "flows": {"tcp"},
    "inbound": {
        *("births", "datagram", "flows", "forward", "inside", "linger", "observe", "ports", "splice"),
        "translate",
    },
    "own": {"translate"},
    "tap": {"_cext", "services", "tcp"},
    "host": {"_cext", "budget", "linger", "tcp"},
}


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


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
    rooms = {room(p) for p in FILES} | {"_cext"}
    return {name if name in rooms else "" for name in found} - {room(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    assert imported_rooms(path) <= ALLOWED.get(room(path), set())


def test_seven_floors_and_no_circle():
    graph = {}
    for path in FILES:
        graph.setdefault(room(path), set()).update(imported_rooms(path) - {""})

    def height(name, above=()):
        assert name not in above, f"circle: {above}"
        return 1 + max((height(below, (*above, name)) for below in graph.get(name, ())), default=0)

    assert max(height(name) for name in graph) <= 7  # with _cext, which is no Python room


def users(pattern: str) -> set[str]:
    return {str(p.relative_to(PACKAGE)) for p in FILES if re.search(pattern, p.read_text(), re.MULTILINE)}


def test_owners():
    assert users(r"^import uvloop|^from uvloop") == {"proxy.py"}
    assert users(r"_cext\.Tap\(") == {"tap.py"}
    assert users(r"_table\[[^]]*\] = |del self\._table") == {"flows.py"}
    assert users(r"self\.facts = ") == {"tcp/transfer.py"}
    assert len(re.findall(r"self\.facts = ", (PACKAGE / "tcp/transfer.py").read_text())) == 2
    assert users(r"import random|import time$|from time ") == {
        "ending.py",
        "inbound.py",
        "observe/log.py",
        "proxy.py",
    }
    assert users(r"^import pyroute2|^from pyroute2") == {"setup/netlink.py"}


def test_every_file_says_what_it_is():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_rooms_are_small():
    for path in [*FILES, *PACKAGE.parent.joinpath("cext").glob("*.c")]:
        assert len(path.read_text().splitlines()) <= 645, f"{path} is to be split along the flow"


def test_the_theory_names_what_there_is():
    """Every name in double backquotes of the theory of operation exists."""
    known = set()
    for module in (
        *(connection, doors, events, seq, timing, window, small_queue, connection.Connection),
        *(doors.HostDoor, doors.TapDoor, timing.RoundTrip, doors.SocketFacts, small_queue.SmallQueue),
    ):
        known |= set(vars(module))
        known |= set(getattr(module, "__annotations__", ()))
    known |= set(transfer.Transfer.__slots__) | set(vars(transfer)) | set(vars(transfer.Transfer))
    names = re.findall(r"``([A-Za-z_]\w*)(?:\(\))?``", tcp.__doc__)
    assert len(names) > 30
    missing = {name for name in names if name not in known}
    assert not missing
