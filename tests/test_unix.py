"""Sockets that have a file, and the process that keeps them: here a thread."""

import os
import socket
import stat
import threading
import time

import pytest

from pysplice.config import ConfigError
from pysplice.setup import files
from pysplice.sockets import unix


class Kept:
    """A Keeper, and what serves it."""

    def __init__(self, control=None, owner=None, allowed=None) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.keeper = unix.Keeper(ours)
        owner = os.geteuid() if owner is None else owner

        def serve():
            controls = {} if control is None else {unix.UPDATES: control}
            unix.keep(theirs, controls, owner, allowed, lambda: None)
            theirs.close()

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()

    def clients(self, wanted=1, seconds=5.0):
        got = []
        until = time.monotonic() + seconds
        while len(got) < wanted and time.monotonic() < until:
            got += self.keeper.clients()
            time.sleep(0.01)
        return got

    def close(self):
        self.keeper.close()
        self.thread.join(5)
        assert not self.thread.is_alive()


@pytest.mark.parametrize("mask", (0, 0o777))
def test_a_socket_is_for_its_owner_alone(tmp_path, mask):
    before = os.umask(mask)
    try:
        listener = unix.listen(str(tmp_path / "sock"))
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.lstat(tmp_path / "sock").st_mode) & 0o177 == 0
    listener.sock.close()


def test_files_go_at_the_end(tmp_path):
    control = unix.listen(str(tmp_path / "control"))
    kept = Kept(control)
    path = str(tmp_path / "web")
    with kept.keeper.listen(path) as listener:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
        assert listener.accept()
    gone = str(tmp_path / "gone")
    kept.keeper.listen(gone).close()
    kept.keeper.unlink(gone)
    with pytest.raises(OSError):
        kept.keeper.listen(str(tmp_path / "no" / "such" / "directory"))
    assert not os.path.exists(gone) and os.path.exists(path)
    # What has taken a file's place is not ours
    os.unlink(path)
    (tmp_path / "web").write_text("another's")
    kept.close()
    assert sorted(os.listdir(tmp_path)) == ["web"]


def test_clients_are_passed_on(tmp_path):
    control = unix.listen(str(tmp_path / "control"))
    kept = Kept(control)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "control"))
        # One that comes while a socket is asked for waits
        kept.keeper.listen(str(tmp_path / "web")).close()
        ((name, taken),) = kept.clients()
        assert name == unix.UPDATES
        client.sendall(b"hello")
        assert taken.recv(10) == b"hello"
        taken.close()
    kept.close()


@pytest.mark.parametrize("user, welcome", ((0, True), (4711, True), (4712, False)))
def test_others_are_not(tmp_path, monkeypatch, user, welcome):
    """Our own user and root, by SO_PEERCRED, whatever the mode of the file has become."""
    monkeypatch.setattr(unix, "peer_user", lambda sock: user)
    control = unix.listen(str(tmp_path / "control"))
    kept = Kept(control, owner=4711)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(tmp_path / "control"))
        if not welcome:
            assert client.recv(1) == b""
        assert len(kept.clients(1, 5 if welcome else 0.1)) == welcome
    kept.close()


def test_another_user_gets_the_named_paths_alone(tmp_path):
    """A process that was started as root, and is another user by now."""
    kept = Kept(allowed=frozenset({str(tmp_path / "web")}))
    kept.keeper.listen(str(tmp_path / "web")).close()
    with pytest.raises(PermissionError):
        kept.keeper.listen(str(tmp_path / "other"))
    assert os.listdir(tmp_path) == ["web"]
    kept.close()


# Files that are written


OPENS = (files.open_output, files.open_pid_file, files.open_trace)


@pytest.mark.parametrize("open_file", OPENS)
def test_a_link_of_another_users_is_not_followed(tmp_path, open_file, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "link").symlink_to("victim")
    # The link is another's as soon as we are
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    uid = os.lstat(tmp_path / "link").st_uid
    if uid == 0:
        real = os.fstat

        def fstat(fd):
            found = real(fd)
            if stat.S_ISLNK(found.st_mode):
                return os.stat_result((*found[:4], 4712, *found[5:]))
            return found

        monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(ConfigError, match="another user"):
        open_file(str(tmp_path / "link"))
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("open_file", OPENS)
def test_our_own_links_are_followed(tmp_path, open_file):
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to(tmp_path / "file")
    made = open_file(str(tmp_path / "one"))
    assert stat.S_IMODE(os.stat(tmp_path / "file").st_mode) == 0o600
    if isinstance(made, int):
        os.close(made)
    else:
        made.close()
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(ConfigError, match="Too many levels"):
        open_file(str(tmp_path / "round"))


def test_a_fifo_without_a_reader_blocks_nobody(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    os.close(files.open_output(str(tmp_path / "fifo")))
    with pytest.raises(ConfigError):
        files.open_trace(str(tmp_path / "fifo"))


def test_a_keeper_that_is_slow(tmp_path, monkeypatch):
    """An answer that was given up is not the next one's, and its file goes."""
    monkeypatch.setattr(unix, "TIMEOUT", 0.1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    keeper = unix.Keeper(ours)
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    with pytest.raises(OSError, match="timed out"):
        keeper.listen(first)
    late = unix.listen(first)
    assert theirs.recv(100) == unix.LISTEN + first.encode()
    socket.send_fds(theirs, [b"l0 " + first.encode()], [late.sock.fileno()])
    made = unix.listen(second)
    socket.send_fds(theirs, [b"l0 " + second.encode()], [made.sock.fileno()])
    with keeper.listen(second) as sock:
        assert sock.getsockname() == second
    assert theirs.recv(100) == unix.LISTEN + second.encode()
    assert theirs.recv(100) == unix.UNLINK + first.encode()
    # Or nobody asks again
    socket.send_fds(theirs, [b"l0 " + first.encode()], [late.sock.fileno()])
    assert list(keeper.clients()) == []
    assert theirs.recv(100) == unix.UNLINK + first.encode()
    for sock in (late.sock, made.sock, ours, theirs):
        sock.close()
