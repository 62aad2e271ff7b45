#!/usr/bin/env python3
"""pysplice beside pasta, slirp4netns and no proxy at all, on one topology in one run.

    examples/compare_pasta.py                        a quick look: RTT 0, both MTUs, three rounds
    examples/compare_pasta.py --rounds 5 --seconds 5 --workloads all --rtt 0,1,20 --ip 4,6
    examples/compare_pasta.py --peer 'other=/opt/pasta --config-net -m {mtu} --' --json result.json

Any user can run it: it makes namespaces of its own for a host and a remote host, and everything ends with
it.  The two are joined by a veth pair; with a delay, loss, reordering or rate by netem, or where the kernel
has none by examples/link.py.  In each round all peers run one after the other, because machines drift.

A peer is a command that takes the guest's command behind it, with {mtu} filled in; with {pid} in it, it is
attached to a namespace that is there.  CUBIC and the kernel's default tcp_rmem are set everywhere, and said
so in the result.  A peer that hangs or fails is a row that says so.  Workloads that begin with splice_ need
`-T 5003` among a peer's options.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOST = {4: "10.98.0.1", 6: "fd98::1"}
REMOTE = {4: "10.98.0.2", 6: "fd98::2"}
GATEWAY = {4: "10.98.0.254", 6: "fd98::fe"}  # another address: pasta maps the gateway to the host
PORT = 5001
# The server on the host's loopback, for the workloads whose name begins with splice_: the guest reaches it at its own
LOOPBACK, LOOPBACK_PORT = "127.0.0.1", 5003
SPLICE = "splice_"
TCP_RMEM = "4096 131072 6291456"
BULK = ("upload", "download", "streams8", "bidirectional", "tiny64", "udp_up", "udp_down")
MESSAGES = ("rr1", "rr64", "crr1", "crr64", "loaded", "idle1000", "udp_rr1")
SPLICED = tuple(SPLICE + workload for workload in ("upload", "download", "rr1", "rr64", "crr1"))
WORKLOADS = (*BULK, *MESSAGES, *SPLICED)
TICK = os.sysconf("SC_CLK_TCK")

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWNS = 0x10000000, 0x40000000, 0x00020000


def isolate() -> bool:
    """Namespaces of our own; True if we are the machine's root and stay so."""
    uid, gid = os.geteuid(), os.getegid()
    with open("/proc/self/uid_map") as file:
        root = uid == 0 and file.read().split() == ["0", "0", "4294967295"]
    libc = ctypes.CDLL(None, use_errno=True)
    flags = CLONE_NEWNET | CLONE_NEWNS | (0 if root else CLONE_NEWUSER)
    if libc.unshare(flags):
        sys.exit(f"cannot make namespaces: {os.strerror(ctypes.get_errno())}")
    if not root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None)
    if libc.mount(b"tmpfs", b"/run", b"tmpfs", 0, None):
        sys.exit("cannot mount /run")
    return root


def end_in_order() -> None:
    """SIGTERM ends what we have started, as Ctrl-C does."""

    def ended(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, ended)


def result_file(text: str) -> Path:
    """A file that can be written, which is known before hours of work."""
    path = Path(text).resolve()
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {path}")
    return path


def sh(*words: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(words, check=check, capture_output=True, text=True)


def inside(namespace: str, *words: str) -> list[str]:
    return ["nsenter", f"--net=/run/netns/{namespace}", "--", *words]


class Topology:
    """A host and a remote host; `close()` ends what it started.

    `args` has loss, reorder (percent) and rate (Mbit/s); `rtt` is in milliseconds, `remote_rmem` the remote
    host's tcp_rmem.
    """

    def __init__(
        self, args: argparse.Namespace, rtt: float, worker: str, remote_rmem: str = TCP_RMEM
    ) -> None:
        self.processes: list[subprocess.Popen] = []
        self.rmem = {"host": TCP_RMEM, "remote": remote_rmem}
        for name in ("host", "remote"):
            sh("ip", "netns", "add", name)
            sh(*inside(name, "ip", "link", "set", "lo", "up"))
        self.how = self.link(args, rtt)
        for name, device, addresses in (
            ("host", "link0", (f"{HOST[4]}/24", f"{HOST[6]}/64")),
            (
                "remote",
                "link1",
                tuple(f"{a[v]}/{n}" for a in (REMOTE, GATEWAY) for v, n in ((4, 24), (6, 64))),
            ),
        ):
            for address in addresses:
                more = ("nodad",) if ":" in address else ()
                sh(*inside(name, "ip", "addr", "add", address, "dev", device, *more))
            sh(*inside(name, "ip", "link", "set", device, "up"))
        for v in (4, 6):
            sh(*inside("host", "ip", f"-{v}", "route", "add", "default", "via", GATEWAY[v]))
        self.settings()
        servers = [
            ("remote", REMOTE[4], PORT),
            ("remote", REMOTE[6], PORT),
            ("host", LOOPBACK, LOOPBACK_PORT),
        ]
        for name, address, port in servers:
            words = inside(name, sys.executable, worker, "server", address, str(port))
            server = subprocess.Popen(words, stdout=subprocess.PIPE)
            self.processes.append(server)
            server.stdout.readline()

    def link(self, args: argparse.Namespace, rtt: float) -> str:
        impaired = rtt or args.loss or args.reorder or args.rate
        peer = ("peer", "name", "link1", "netns", "/run/netns/remote")
        sh(*inside("host", "ip", "link", "add", "link0", "type", "veth", *peer))
        if not impaired:
            return "veth"
        netem = ["delay", f"{rtt / 2}ms", "limit", "100000"]
        netem += ["loss", f"{args.loss}%"] if args.loss else []
        netem += ["reorder", f"{100 - args.reorder}%"] if args.reorder else []
        netem += ["rate", f"{args.rate}mbit"] if args.rate else []
        words = ("tc", "qdisc", "add", "dev")
        if all(
            sh(*inside(name, *words, device, "root", "netem", *netem), check=False).returncode == 0
            for name, device in (("host", "link0"), ("remote", "link1"))
        ):
            return "netem"
        sh(*inside("host", "ip", "link", "del", "link0"))
        words = [sys.executable, str(HERE / "link.py"), "--a", "host:link0", "--b", "remote:link1"]
        words += ["--delay", str(rtt / 2), "--loss", str(args.loss), "--reorder", str(args.reorder)]
        process = subprocess.Popen([*words, "--rate", str(args.rate)], stdout=subprocess.PIPE)
        self.processes.append(process)
        if process.stdout.readline() != b"ready\n":
            sys.exit("examples/link.py did not start")
        return "link.py"

    def settings(self) -> None:
        """CUBIC and the default tcp_rmem; where CUBIC may not be the default it is set by route."""
        for name in ("host", "remote"):
            # Many short connections in a row must not run out of ports
            for path, value in (
                ("tcp_rmem", self.rmem[name]),
                ("tcp_max_tw_buckets", "500"),
                ("tcp_congestion_control", "cubic"),
            ):
                words = f"echo {value} > /proc/sys/net/ipv4/{path}"
                if sh(*inside(name, "sh", "-c", words), check=False).returncode and "cong" in path:
                    for v in (4, 6):
                        for route in sh(*inside(name, "ip", f"-{v}", "route")).stdout.splitlines():
                            words = [w for w in route.split() if w not in ("linkdown", "pref", "medium")]
                            sh(
                                *inside(name, "ip", f"-{v}", "route", "change", *words, "congctl", "cubic"),
                                check=False,
                            )

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()
        for name in ("host", "remote"):
            sh("ip", "netns", "del", name, check=False)


class Watch(threading.Thread):
    """Processor time and memory of a proxy: of all processes below `pid` outside the guest's namespace."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.cpu, self.rss = pid, {}, {}
        self.host = os.stat("/run/netns/host").st_ino
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.1):
            self.sample()

    def tree(self) -> list[int]:
        parents: dict[int, list[int]] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    stat = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
                    parents.setdefault(int(stat[1]), []).append(int(entry))
        found, todo = [], [self.pid]
        while todo:
            pid = todo.pop()
            found.append(pid)
            todo += parents.get(pid, [])
        return found

    def sample(self) -> None:
        for pid in self.tree():
            with contextlib.suppress(OSError, ValueError, IndexError):
                # A process that hides its namespaces is a proxy that locked itself up
                with contextlib.suppress(PermissionError):
                    if os.stat(f"/proc/{pid}/ns/net").st_ino != self.host:
                        continue
                stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                self.cpu[pid] = (int(stat[11]) + int(stat[12])) / TICK
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmHWM"):
                        self.rss[pid] = int(line.split()[1]) / 1024


def kill(process: subprocess.Popen) -> None:
    """End a peer and everything below it: it leads a process group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measure(
    peer: str,
    command: str,
    workload: str,
    mtu: int,
    version: int,
    seconds: float,
    worker: str,
    log: list[str] | None = None,
) -> dict:
    """One run of one peer: the worker's result, or {"failed": why}; `log` gets its lines on stderr."""
    if workload.startswith(SPLICE):
        target = [workload.removeprefix(SPLICE), LOOPBACK, str(LOOPBACK_PORT)]
    else:
        target = [workload, REMOTE[version], str(PORT)]
    guest = ["python3", worker, "client", *target, str(seconds)]
    attach = holder = None
    if peer == "direct":
        words = guest
    elif "{pid}" in command:
        holder = subprocess.Popen(
            inside("host", "unshare", "-Urn", "sleep", "1000"), start_new_session=True
        )
        time.sleep(0.3)
        filled = shlex.split(command.format(mtu=mtu, pid=holder.pid))
        attach = subprocess.Popen(inside("host", *filled), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                  start_new_session=True)  # fmt: skip
        time.sleep(1)
        words = ["nsenter", "-t", str(holder.pid), "-U", "-n", "--preserve-credentials", *guest]
    else:
        words = [*shlex.split(command.format(mtu=mtu)), *guest]
    process = subprocess.Popen(inside("host", *words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    watch = Watch(attach.pid if attach else process.pid)
    watch.start()
    try:
        out, err = process.communicate(timeout=seconds + 20)
        lines = [line for line in out.splitlines() if line.startswith("{")]
        if log is not None:
            log += err.splitlines()
        if process.returncode or not lines:
            reason = (err.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            return {"failed": reason[:60]}
        result = json.loads(lines[-1])
    except subprocess.TimeoutExpired:
        return {"failed": "hung"}
    finally:
        watch.stop.set()
        watch.join()
        for running in (process, attach, holder):
            if running is not None:
                kill(running)
    if peer != "direct":
        result["cpu"] = sum(watch.cpu.values())
        result["rss"] = max(watch.rss.values(), default=0)
    return result


# The table


def is_bulk(workload: str) -> bool:
    """True if the result is in bit/s."""
    return workload.removeprefix(SPLICE) in BULK


def number(value: float, workload: str) -> str:
    return f"{value / 1e9:.2f}" if is_bulk(workload) else f"{value:.0f}"


def row(cell: dict, peer: str, runs: list[dict], direct: float) -> str:
    workload = cell["workload"]
    good = [run for run in runs if "failed" not in run]
    name = f"{workload:<14}{cell['mtu']:>6}{cell['rtt']:>6g}{cell['ip']:>4}  {peer:<10}"
    failed = [run["failed"] for run in runs if "failed" in run]
    if not good:
        return f"{name} failed: {failed[0]}"
    values = [run["value"] for run in good]
    median = statistics.median(values)
    spread = f"[{number(min(values), workload)}..{number(max(values), workload)}]"
    text = f"{name}{number(median, workload):>8} {spread:<18}{median / direct if direct else 0:>7.3f}"
    text = text if direct else text[:-7] + " " * 7
    text += f"{max(run['retransmissions'] for run in good):>8}{max(run['drops'] for run in good):>7}"
    if peer != "direct":
        # Seconds for a GB, or microseconds for one of what is counted
        unit = 8e9 if is_bulk(workload) else 1e6
        cpu = statistics.median(
            run["cpu"] / (max(run["value"], 1) * cell["seconds"] / unit) for run in good
        )
        text += f"{cpu:>9.2f}" if is_bulk(workload) else f"{cpu:>6.0f} us"
        text += f"{max(run['rss'] for run in good):>8.0f}"
    else:
        text += f"{'':>17}"
    lows = [
        min(run["seconds"]) / statistics.median(run["seconds"])
        for run in good
        if any(run.get("seconds", ()))
    ]
    text += f"{min(lows):>8.2f}" if lows else f"{'':>8}"
    p99 = [run["p99"] * 1e6 for run in good if "p99" in run]
    text += f"  p99 {statistics.median(p99):.0f} us" if p99 else ""
    uploads = [run["upload"] / 1e9 for run in good if "upload" in run]
    text += f" beside {statistics.median(uploads):.2f} Gbit/s" if uploads else ""
    return text + (f"  {len(failed)} of {len(runs)} failed: {failed[0]}" if failed else "")


HEADER = (
    f"{'workload':<14}{'MTU':>6}{'RTT':>6}{'IP':>4}  {'peer':<10}{'median':>8} {'spread':<18}{'/direct':>7}"
    f"{'retrans':>8}{'drops':>7}{'CPU s/GB':>9}{'RSS MB':>8}{'low s':>8}"
)


def default_peers(root: bool) -> dict[str, str]:
    venv = HERE.parent / ".venv/bin/python"
    python = venv if venv.exists() else sys.executable
    if subprocess.run(
        [python, "-m", "pysplice", "--version"], capture_output=True, cwd=HERE.parent
    ).returncode:
        sys.exit("pysplice is not installed: run examples/quickstart first")
    none = f"-t none -u none -T {LOOPBACK_PORT} -U none --"
    ours = f"env PYTHONPATH={HERE.parent} {python} -m pysplice"
    peers = {"direct": "", "pysplice": f"{ours} --config-net -m {{mtu}} {none}"}
    if shutil.which("pasta"):
        # It will not be root: as root we run it as nobody
        drop = "setpriv --reuid 65534 --regid 65534 --clear-groups " if root else ""
        peers["pasta"] = f"{drop}pasta -q --config-net -m {{mtu}} {none}"
    if shutil.which("slirp4netns"):
        peers["slirp4netns"] = "slirp4netns --configure --enable-ipv6 --mtu={mtu} {pid} tap0"
    return peers


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def numbers(text: str) -> list[float]:
        return [float(part) for part in text.split(",")]

    numbers.__name__ = "list of numbers"
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="of each run")
    parser.add_argument("--workloads", default="upload,download", help=f"or all: {','.join(WORKLOADS)}")
    parser.add_argument(
        "--mtu",
        type=numbers,
        default=[1500, 65520],
        help="a list, as --rtt and --ip (default: 1500,65520)",
    )
    parser.add_argument("--rtt", type=numbers, default=[0], help="milliseconds (default: 0)")
    parser.add_argument("--ip", type=numbers, default=[4])
    parser.add_argument("--loss", type=float, default=0, help="percent, between host and remote host")
    parser.add_argument("--reorder", type=float, default=0, help="percent")
    parser.add_argument("--rate", type=float, default=0, help="Mbit/s")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--only", default="", help="names of the peers to run")
    parser.add_argument("--json", type=result_file, metavar="FILE")
    args = parser.parse_args()
    args.workloads = WORKLOADS if args.workloads == "all" else tuple(args.workloads.split(","))
    unknown = set(args.workloads) - set(WORKLOADS)
    if unknown or any("=" not in peer for peer in args.peer):
        parser.error(f"unknown workload: {', '.join(unknown)}" if unknown else "--peer takes NAME=COMMAND")
    return args


class Progress:
    """How many of all runs are done, and the time that is left, on stderr if that is a terminal."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._begun = time.monotonic()
        self._on = sys.stderr.isatty()

    def step(self) -> None:
        """One run more is done."""
        self._done += 1
        if self._on:
            left = (time.monotonic() - self._begun) / self._done * (self._total - self._done)
            text = f"{self._done} of {self._total} runs, {int(left // 60)}:{int(left % 60):02} left"
            end = "\r" if self._done < self._total else "\r" + " " * len(text) + "\r"
            print(text, end=end, file=sys.stderr, flush=True)


def main() -> None:
    args = parse()
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # where an ordinary user does not look
    output = args.json
    root = isolate()
    peers = default_peers(root)
    peers.update(peer.split("=", 1) for peer in args.peer)
    if args.only:
        unknown = set(args.only.split(",")) - set(peers)
        if unknown:
            sys.exit(f"no such peer, or not installed: {', '.join(unknown)}")
        peers = {name: command for name, command in peers.items() if name in args.only.split(",")}
    end_in_order()
    cells = len(args.rtt) * len(args.ip) * len(args.mtu) * len(args.workloads)
    progress = Progress(cells * len(peers) * args.rounds)
    results = []
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        worker = shutil.copy(HERE / "traffic.py", directory)
        os.chmod(worker, 0o755)
        try:
            for rtt in args.rtt:
                topology = Topology(args, rtt, worker)
                try:
                    print(
                        f"\nlink: {topology.how}, CUBIC, tcp_rmem {TCP_RMEM}; bulk in Gbit/s, others per second"
                    )
                    print(HEADER, flush=True)
                    for version in map(int, args.ip):
                        for mtu in map(int, args.mtu):
                            for workload in args.workloads:
                                cell = {"workload": workload, "mtu": mtu, "rtt": rtt, "ip": version,
                                        "seconds": args.seconds}  # fmt: skip
                                results.append(
                                    {**cell, "peers": compare(args, peers, cell, worker, progress)}
                                )
                finally:
                    topology.close()
        finally:
            if output:
                output.write_text(json.dumps(results, indent=1))
    failed = {
        name for cell in results for name, runs in cell["peers"].items() if any("failed" in r for r in runs)
    }
    sys.exit("pysplice failed" if "pysplice" in failed else 0)


def compare(
    args: argparse.Namespace, peers: dict, cell: dict, worker: str, progress: Progress
) -> dict[str, list[dict]]:
    runs: dict[str, list[dict]] = {name: [] for name in peers}
    for _ in range(args.rounds):
        for name, command in peers.items():
            runs[name].append(
                measure(name, command, cell["workload"], cell["mtu"], cell["ip"], args.seconds, worker)
            )
            progress.step()
    direct = [run["value"] for run in runs.get("direct", []) if "value" in run]
    for name, done in runs.items():
        print(row(cell, name, done, statistics.median(direct) if direct else 0), flush=True)
    return runs


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
