"""Which rooms a wheel has compiled: contrib/build_backend.py, without running it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pysplice"


def patterns():
    tree = ast.parse((ROOT / "contrib/build_backend.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROOMS":
            return ast.literal_eval(node.value)
    raise AssertionError("there is no ROOMS")


COMPILED = {path for pattern in patterns() for path in PACKAGE.glob(pattern) if path.name != "__init__.py"}
FILES = sorted(PACKAGE.rglob("*.py"))


def module(path: Path, node: ast.ImportFrom) -> Path:
    """The file that `from ... import` of this package refers to."""
    folder = path.parents[node.level - 1]
    return folder.joinpath(*(node.module or "").split(".")).with_suffix(".py")


def test_a_source_distribution_has_its_build_backend():
    """Nothing else of contrib/ that is Python is needed to install from one."""
    assert (ROOT / "MANIFEST.in").read_text() == "include contrib/build_backend.py\n"
    assert (ROOT / "contrib/build_backend.py").is_file()


def test_each_pattern_names_something():
    assert all(list(PACKAGE.glob(pattern)) for pattern in patterns())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_class_and_its_base_are_both_compiled_or_neither(path):
    """mypyc: a class with __slots__ cannot derive from one that is not compiled, nor the other way round."""
    tree = ast.parse(path.read_text())
    origin = {
        name.asname or name.name: module(path, node)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for name in node.names
    }
    bases = {
        base.id
        for c in ast.walk(tree)
        if isinstance(c, ast.ClassDef)
        for base in c.bases
        if isinstance(base, ast.Name)
    }
    for base in bases & set(origin):
        assert (origin[base] in COMPILED) == (path in COMPILED), base
