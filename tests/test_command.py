"""How the program of a command is found and run."""

import builtins
import os

import pytest

from pysplice.setup import command


def test_a_program_is_found_without_an_import(monkeypatch):
    """Started as root, this process is another user by then, and may not be able to read Python's files."""

    def fail(name, *args):
        raise ImportError(name)

    monkeypatch.setattr(builtins, "__import__", fail)
    assert os.access(command._find("sh"), os.X_OK)
    with pytest.raises(FileNotFoundError):
        command._find("no-such-program")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    (
        (FileNotFoundError(2, "No such file or directory"), 127, "No such file or directory"),
        (PermissionError(13, "Permission denied"), 126, "Permission denied"),
        (RuntimeError("a defect"), 1, "RuntimeError: a defect"),
    ),
)
def test_whatever_goes_wrong_is_said(monkeypatch, capfd, error, status, said):
    def find(program):
        raise error

    monkeypatch.setattr(command, "_find", find)
    child = os.fork()
    if not child:
        command._exec("prog", ["prog"], "pysplice", False)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    assert capfd.readouterr().err == f"pysplice: cannot run 'prog': {said}\n"
