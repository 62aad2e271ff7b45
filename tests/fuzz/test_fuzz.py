"""Each target for a short time, from its corpus; `tests/fuzz/run SECONDS` does it for longer."""

import shutil

import pytest

from ..support.namespaces import have
from . import campaign, parsers

SECONDS = 20
FEWEST = 2000  # executions; a machine that does less has not fuzzed
needs_clang = pytest.mark.skipif(not have("clang"), reason="not installed: clang")


@pytest.mark.parametrize("target", campaign.TARGETS)
def test_nothing_is_found(target):
    if target in campaign.C_TARGETS and not have("clang"):
        pytest.skip("not installed: clang")
    if target in campaign.PYTHON_TARGETS and parsers.atheris is None:
        pytest.skip("not installed: atheris")
    outcome = campaign.fuzz(target, SECONDS)
    assert outcome.problem == ""
    assert outcome.executions > FEWEST


@pytest.mark.parametrize("target", campaign.PYTHON_TARGETS)
def test_a_corpus_by_itself(target):
    """Also where there is no fuzzer."""
    inputs = campaign.inputs(target)
    assert len(inputs) >= 20
    for data in inputs:
        parsers.TARGETS[target](data)


# What a target must notice: a change of the C code, and the target that finds it
CHANGES = {
    "a frame's length": ("frame", "frame_parse.c", "len > l4->len)", "len > l4->len + 9)"),
    "a port of 0": ("frame", "frame_parse.c", "!memcmp(ports, none, 2) ||", "0 &&"),
    "a sum": ("build", "csum.c", "return ", "return 1 + "),
    "a sequence number": ("build", "frame_build.c", "put32(fields->seq)", "put32(fields->seq & ~0x100u)"),
    "a hole in a run": ("runs", "runs.c", "seg->seq != run->first.seq + run->len ||", ""),
    "a piece too much": ("runs", "runs.c", "if (n > len)", "if (0)"),
    "an offset of a fragment": ("datagram", "frame_build.c", "from / 8", "from / 16"),
    "a header that is not restored": (
        "datagram",
        "emit.c",
        "memcpy(payload + at - sizeof(kept), kept",
        "memcpy(kept, kept",
    ),
}


@needs_clang
@pytest.mark.parametrize("name", CHANGES)
def test_a_target_finds_what_is_wrong(tmp_path, name):
    target, file, before, after = CHANGES[name]
    cext = tmp_path / "cext"
    shutil.copytree(campaign.ROOT / "cext", cext)
    text = (cext / file).read_text()
    assert before in text
    (cext / file).write_text(text.replace(before, after))
    program = campaign.build(target, tmp_path, cext=cext)
    assert campaign.fuzz(target, 60, [str(program)]).problem != ""


@needs_clang
def test_what_was_built_is_reported():
    assert "| cext/frame_parse.c |" in campaign.coverage()


def test_the_table():
    text = campaign.table([campaign.Outcome("frame", 12345, 67, 8, "")])
    assert "| frame | 12,345 | 67 | 8 | nothing |" in text
