"""The documentation: nothing generated from the code is stale, links lead somewhere, and a recipe can be followed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def run(*words, cwd=ROOT, **kwargs):
    return subprocess.run(
        list(map(str, words)), cwd=cwd, capture_output=True, text=True, timeout=120, check=False, **kwargs
    )


def test_nothing_is_stale():
    result = run(sys.executable, "contrib/make-docs", "--check")
    assert result.returncode == 0, result.stdout + result.stderr


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links(page):
    for link, picture in LINK.findall(page.read_text()):
        target, _, anchor = (link or picture).partition("#")
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_are_named_exist(page):
    for name in re.findall(
        r"`((?:pysplice|cext|tests|examples|contrib|docs)/[\w./@*-]+)`", page.read_text()
    ):
        if "NAME" not in name and "*" not in name:
            assert (ROOT / name).exists(), name


SOURCES = sorted(
    path
    for pattern in ("pysplice/**/*.py", "pysplice/*.pyi", "cext/*.[ch]", "tests/**/*.py", "examples/*.py")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_comments_name_exist(source):
    named = r"\b(?:[a-z]+/)+\w+\.(?:py|md)\b|\bcext/\w+\.[ch]\b"
    for name in re.findall(named, source.read_text()):
        places = (ROOT, ROOT / "pysplice", source.parent)
        assert any((place / name).exists() for place in places), name


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="sphinx is not installed")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "examples/pictures", tmp_path / "examples/pictures")
    (tmp_path / "pysplice").mkdir()
    shutil.copy(ROOT / "pysplice/__init__.py", tmp_path / "pysplice")
    result = run(sys.executable, "-m", "sphinx", "-q", "-W", "docs", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "All options" in (tmp_path / "out/usage.html").read_text()


# What is made of the table of options


MANUAL = {
    "pysplice.1": "--map-host-loopback",
    "pysplice-ctl.1": "--json",
    "pysplice-pesto.1": "--clear",
    "pysplice-cni.8": "CNI_CONTAINERID",
    "pysplice-netavark.8": "netavark_plugin_dirs",
}


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs/man").iterdir()))
def test_the_manual_is_well_formed(page):
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is not installed")
    path = ROOT / "docs/man" / page
    assert run("mandoc", "-Tlint", "-Wwarning", path).stdout == ""
    text = re.sub(r".\x08", "", run("mandoc", "-Tascii", path).stdout)
    assert MANUAL[page] in text and "EXIT STATUS" in text


def complete(*words) -> list[str]:
    """What bash offers for the last of these words."""
    script = (
        f"source {ROOT}/contrib/completion/{words[0]}.bash; COMP_WORDS=({' '.join(repr(w) for w in words)}); "
        f"COMP_CWORD={len(words) - 1}; _{words[0]}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    result = run("bash", "-c", script)
    assert result.stderr == ""
    return result.stdout.splitlines()


def test_completion_for_bash(tmp_path):
    assert complete("pysplice", "--config") == ["--config-net"]
    assert complete("pysplice", "--window", "seg") == ["segments", "segments-wmem"]
    assert complete("pysplice", "-t", "a") == ["auto", "all"]
    assert complete("pysplice", "--limit-output", "") == ["auto", "off"]
    (tmp_path / "here").write_text("")
    (tmp_path / "$(exit) there").write_text("")
    assert complete("pysplice", "-P", f"{tmp_path}/h") == [f"{tmp_path}/here"]
    assert complete("pysplice", "ctl", f"{tmp_path}/h") == [f"{tmp_path}/here"]
    assert complete("pysplice", "ctl", "PATH", "s") == ["show"]
    assert complete("pysplice", "ctl", "PATH", "show", "--j") == ["--json"]
    assert complete("pysplice", "ctl", "PATH", "add", "--tcp-ports", "=") == ["none", "auto", "all"]
    assert complete("pysplice", "--window", "=", "seg") == ["segments", "segments-wmem"]
    assert complete("pesto", "--cl") == ["--clear"]
    assert complete("pesto", "-C", "") == ["HOST", "SPLICE"]
    assert complete("pesto", f"{tmp_path}/h") == [f"{tmp_path}/here"]
    assert complete("pesto", f"{tmp_path}/$") == [f"{tmp_path}/$(exit) there"]


@pytest.mark.parametrize(
    ("shell", "file", "names"),
    (
        ("zsh", "_pysplice", ("config-net", "map-host-loopback", "(show add del)")),
        ("fish", "pysplice.fish", ("config-net", "map-host-loopback", "'show add del'")),
        ("zsh", "_pesto", ("clear", "tcp-ports")),
        ("fish", "pesto.fish", ("clear", "tcp-ports")),
    ),
)
def test_completion_for_others(shell, file, names):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    result = run(shell, "-n", ROOT / "contrib/completion" / file)
    assert (result.returncode, result.stderr) == (0, "")
    text = (ROOT / "contrib/completion" / file).read_text()
    assert all(name in text for name in names)


def test_a_recipe_can_be_followed(tmp_path):
    """docs/hacking.md, "A new option": its steps, and nothing else."""
    for name in ("pysplice", "contrib", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)

    def insert(path, before, text):
        file = tmp_path / path
        assert before in file.read_text()
        file.write_text(file.read_text().replace(before, text + before, 1))

    insert("pysplice/config/options.py", '    Option(("-h", "--help")',
           '    Option(("--greet",), "NAME", _value("greet", parse_name), RUNNING, "Greet NAME"),\n')  # fmt: skip
    insert("pysplice/config/__init__.py", '    warnings: tuple[str, ...] = ()\n', '    greet: str = ""\n')  # fmt: skip
    insert("pysplice/config/check.py", '        "--stats": values',
           '        "--greet": values.get("greet") and values.get("quiet") and "-q",\n')  # fmt: skip
    python = [sys.executable]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert run(*python, "contrib/make-docs", cwd=tmp_path, env=env).returncode == 0
    for made in ("docs/usage.md", "docs/man/pysplice.1", "contrib/completion/_pysplice"):
        assert "greet" in (tmp_path / made).read_text()
    code = (
        "from pysplice.config import options; c = options.parse(['--greet', 'you', '-q']);"
        "print(c.greet, c.warnings)"
    )
    assert run(*python, "-c", code, cwd=tmp_path, env=env).stdout == "you ('--greet has no effect: -q',)\n"
    assert "Greet NAME" in run(*python, "-m", "pysplice", "--help", cwd=tmp_path, env=env).stdout


def test_the_page_of_what_can_be_trusted_is_as_it_is_made():
    made = run(sys.executable, str(ROOT / "contrib/make-trust"), "--check")
    assert made.returncode == 0, made.stderr
