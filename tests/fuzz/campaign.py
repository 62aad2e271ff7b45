"""Builds the fuzz targets and runs them; a command and the tests share it.

The targets in C are built with AddressSanitizer and UBSan, and run under libFuzzer; those in Python run under atheris,
which is libFuzzer too.  A corpus is a file of lines, an input in hexadecimal in each.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CORPUS_MAX = 200  # inputs kept of each target
INPUT_MAX = 400  # bytes of an input that is kept

FRAMES = ("frame_parse.c", "frame_build.c", "csum.c")
# Each target in C, and the files of the extension that it is made with
C_TARGETS: dict[str, tuple[str, ...]] = {
    "frame": FRAMES,
    "build": FRAMES,
    "runs": ("runs.c",),
    "datagram": ("emit.c", *FRAMES),
}
PYTHON_TARGETS = ("link", "packets", "control", "words")
TARGETS = (*C_TARGETS, *PYTHON_TARGETS)
SANITIZERS = ("-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all")
COVERAGE = ("-fsanitize=fuzzer", "-fprofile-instr-generate", "-fcoverage-mapping")


class Outcome(NamedTuple):
    """What a target's run gave; `problem` is what was found, in the fuzzer's words, and the input."""

    target: str
    executions: int
    per_second: int
    edges: int
    problem: str


def build(
    target: str, folder: Path, flags: tuple[str, ...] = SANITIZERS, cext: Path = ROOT / "cext"
) -> Path:
    """The program of a target in C."""
    program = folder / target
    libdir, version = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LDVERSION")
    subprocess.run(
        [
            "clang", "-g", "-O1", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", *flags,
            f"-I{sysconfig.get_path('include')}", "-o", str(program), str(HERE / f"{target}.c"),
            *(str(cext / name) for name in C_TARGETS[target]),
            *([f"-L{libdir}", f"-lpython{version}"] if target == "runs" else []),
        ],
        check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return program


def command(target: str, folder: Path) -> list[str]:
    """How a target is started; one in C is built first."""
    if target in C_TARGETS:
        return [str(build(target, folder))]
    return [sys.executable, str(HERE / "parsers.py"), target]


def inputs(target: str) -> list[bytes]:
    """The corpus of a target."""
    path = HERE / "corpus" / f"{target}.hex"
    return [bytes.fromhex(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def unpack(target: str, folder: Path) -> Path:
    """The corpus as a folder of files."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(inputs(target)):
        (corpus / f"{number:04}").write_bytes(data)
    return corpus


def fuzz(target: str, seconds: int, words: list[str] | None = None, seed: int = 0) -> Outcome:
    """Fuzz a target for some seconds, or until something is found; `words` start it if it is built already."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = words or command(target, folder)
        corpus = unpack(target, folder)
        run = subprocess.run(
            [
                *words, f"-max_total_time={seconds}", "-print_final_stats=1", "-timeout=20", f"-seed={seed}",
                f"-artifact_prefix={folder}/found-", str(corpus),
            ],
            cwd=folder, capture_output=True, text=True, errors="replace", timeout=seconds + 240, check=False,
        )  # fmt: skip
        found = [path.read_bytes().hex() for path in folder.glob("found-*")]
        if not run.returncode and not found:
            keep(target, corpus, words, folder)
    problem = ""
    if run.returncode or found:
        told = [
            line for line in run.stderr.splitlines() if re.search(r"ERROR|SUMMARY|Error|\.c:\d+: ", line)
        ]
        problem = "; ".join(told[:3]) + f"; input {' '.join(found)[:400] or 'none'}"
    return Outcome(
        target, _number(r"executed_units: (\d+)", run.stderr), _number(r"exec_per_sec: +(\d+)", run.stderr),
        _number(r".*cov: (\d+)", run.stderr), problem,
    )  # fmt: skip


keeping = False


def keep(target: str, corpus: Path, words: list[str], folder: Path) -> None:
    """Where this is asked for, keep the smallest inputs that reach what all of them reach."""
    if not keeping:
        return
    kept = corpus
    if target in C_TARGETS:
        kept = folder / "merged"
        kept.mkdir()
        subprocess.run(
            [*words, "-merge=1", str(kept), str(corpus)], capture_output=True, timeout=600, check=True
        )
    data = sorted((path.read_bytes() for path in kept.iterdir()), key=lambda text: (len(text), text))
    lines = [text.hex() for text in data if text and len(text) <= INPUT_MAX][:CORPUS_MAX]
    (HERE / "corpus").mkdir(exist_ok=True)
    (HERE / "corpus" / f"{target}.hex").write_text("".join(f"{line}\n" for line in lines))


def _number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0


def table(outcomes: list[Outcome]) -> str:
    """Markdown."""
    lines = ["| target | executions | a second | edges | found |", "| --- | ---: | ---: | ---: | --- |"]
    for one in outcomes:
        lines.append(
            f"| {one.target} | {one.executions:,} | {one.per_second:,} | {one.edges} | {one.problem or 'nothing'} |"
        )
    return "\n".join(lines) + "\n"


def coverage() -> str:
    """Which part of the lines of each file in C the corpus reaches; Markdown."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        programs = []
        for target in C_TARGETS:
            place = folder / target
            place.mkdir()
            programs.append(build(target, place, COVERAGE))
            corpus = unpack(target, place)
            subprocess.run(
                [str(programs[-1]), "-runs=0", str(corpus)], capture_output=True, check=True, timeout=120,
                env={"LLVM_PROFILE_FILE": str(folder / f"{target}.raw")},
            )  # fmt: skip
        profile = folder / "all.profile"
        subprocess.run(
            ["llvm-profdata", "merge", "-o", str(profile), *map(str, folder.glob("*.raw"))], check=True
        )
        objects = [word for program in programs[1:] for word in ("-object", str(program))]
        report = subprocess.run(
            ["llvm-cov", "report", str(programs[0]), *objects, f"-instr-profile={profile}"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    lines = ["| file | lines reached |", "| --- | ---: |"]
    for line in report.splitlines():
        words = line.split()
        if words and words[0].endswith(".c") and "cext/" in words[0]:
            lines.append(f"| {words[0][words[0].index('cext/') :]} | {words[9]} |")
    return "\n".join(lines) + "\n"
