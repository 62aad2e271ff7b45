#!/usr/bin/env python3
"""Spliced loopback connections beside pasta's: a stream from the host's loopback into a namespace, in turn, in one run.

    examples/compare_loopback.py                                   2 GiB a run, three rounds
    examples/compare_loopback.py --gib 10 --hash --rounds 1        both ends hash what they see
    examples/compare_loopback.py --peer 'other=/opt/pasta --config-net -t {port} -u none -T none -U none --'

Any user can run it: it makes a network namespace of its own that plays the host.  A peer is a command that takes
the guest's command behind it, with {port} filled in; `direct` is a server on the same loopback, without a proxy.
With --hash the hash decides the speed: it is a test that the bytes are equal, not a measurement.
"""

import argparse
import contextlib
import hashlib
import os
import select
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PORT = 5002
BLOCK = 1 << 20
READY = "listening"


def serve(port: int, hashed: bool) -> None:
    """Take one stream to its end, and answer with its length and hash."""
    with socket.create_server(("0.0.0.0", port)) as listener:
        print(READY, flush=True)
        sock, _ = listener.accept()
    buffer = bytearray(BLOCK)
    view = memoryview(buffer)
    sha = hashlib.sha256()
    total = 0
    with sock:
        while n := sock.recv_into(buffer):
            total += n
            if hashed:
                sha.update(view[:n])
        sock.sendall(f"{total} {sha.hexdigest()}\n".encode())


def send(port: int, size: int, hashed: bool) -> float:
    """Send a stream; Gbit/s until the other end has confirmed all of it."""
    until = time.monotonic() + 10
    while True:
        with contextlib.suppress(OSError):
            sock = socket.create_connection(("127.0.0.1", port), 2)
            break
        if time.monotonic() > until:
            raise TimeoutError("nobody listens")
        time.sleep(0.05)
    sock.settimeout(120)
    sha = hashlib.sha256()
    block = bytes(range(251)) * (BLOCK // 251)
    begun = time.monotonic()
    with sock:
        left = size
        while left:
            part = block if left >= len(block) else block[:left]
            sock.sendall(part)
            if hashed:
                sha.update(part)
            left -= len(part)
        sock.shutdown(socket.SHUT_WR)
        answer = sock.makefile().readline().split()
    seconds = time.monotonic() - begun
    if answer != [str(size), sha.hexdigest()]:
        raise ValueError(f"what arrived is not what was sent: {answer}")
    return size * 8 / seconds / 1e9


def run(command: str, program: Path, port: int, size: int, hashed: bool) -> float:
    """One stream through a peer, to a server that `program` is."""
    server = [
        os.path.realpath(sys.executable),
        str(program),
        "--serve",
        str(port),
        *(["--hash"] if hashed else []),
    ]
    process = subprocess.Popen(
        [*shlex.split(command.format(port=port)), *server],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        # A connection is to meet the server, and not only the proxy
        if not select.select([process.stdout], [], [], 20)[0] or READY not in process.stdout.readline():
            raise TimeoutError("the server does not start")
        result = send(port, size, hashed)
        process.wait(20)
        return result
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        process.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hash", action="store_true")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.hash)
        return
    # The server needs nothing of this; and where it runs there may be nothing of this
    import compare_pasta

    root = compare_pasta.isolate()
    options = "--config-net -t {port} -u none -T none -U none --"
    peers = {"direct": "", "pysplice": f"{sys.executable} -m pysplice {options}"}
    if shutil.which("pasta"):
        # It will not be root
        drop = "setpriv --reuid 65534 --regid 65534 --clear-groups " if root else ""
        peers["pasta"] = f"{drop}pasta -q {options}"
    for text in args.peer:
        name, _, command = text.partition("=")
        peers[name] = command
    compare_pasta.sh("ip", "link", "set", "lo", "up")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    program = folder / "loopback.py"
    shutil.copy(__file__, program)
    results: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(args.rounds):
        for offset, (name, command) in enumerate(peers.items()):
            try:
                rate = run(
                    command,
                    program,
                    PORT + number * len(peers) + offset,
                    int(args.gib * (1 << 30)),
                    args.hash,
                )
            except (OSError, ValueError, subprocess.TimeoutExpired) as e:
                print(f"{name}: {e}", flush=True)
                continue
            results[name].append(rate)
            print(f"{name}: {rate:.1f} Gbit/s{', hashes equal' if args.hash else ''}", flush=True)
    shutil.rmtree(folder)
    print()
    for name, rates in results.items():
        if rates:
            print(f"{name:12} {statistics.median(rates):6.1f} [{min(rates):.1f}..{max(rates):.1f}] Gbit/s")


if __name__ == "__main__":
    main()
