"""Every test runs in namespaces of the test process's own."""

import os
import resource

import pytest

import pysplice

from .support import namespaces

_reason = "not tried"


def pytest_configure(config: pytest.Config) -> None:
    global _reason
    expected = os.environ.get("PYSPLICE_EXPECT")
    assert expected in (None, os.path.dirname(pysplice.__file__)), "another pysplice is installed"
    # nginx and sshd are where an ordinary user does not look
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    # Some tests are many clients
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # A system call that is not on the list of a process of ours ends it
    os.environ["PYSPLICE_SECCOMP"] = "kill"
    _reason = namespaces.isolate(hasattr(config, "workerinput"))


@pytest.fixture(scope="session")
def isolated() -> None:
    """Skips, with the reason, where namespaces cannot be made."""
    if _reason:
        pytest.skip(_reason)


@pytest.fixture
def world(isolated):
    """A host, a remote host and a guest's namespace, made anew for each test."""
    with namespaces.World() as made:
        yield made


@pytest.fixture(scope="module")
def shared_world(isolated):
    """The same for tests that leave nothing behind."""
    with namespaces.World() as made:
        yield made


@pytest.fixture(scope="module")
def served(shared_world):
    """A world whose guest is served and configured."""
    shared_world.process = shared_world.pysplice("--config-net")
    return shared_world
