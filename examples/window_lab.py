#!/usr/bin/env python3
"""The laboratory of the window: every estimator, over many paths, beside pasta.

    examples/window_lab.py grid                       the whole table; hours, so see the options
    examples/window_lab.py grid --rtt 0,10 --condition plain,loss --rounds 1 --json grid.json
    examples/window_lab.py summary --json grid.json       its last part once more
    examples/window_lab.py throughput --json grid.json    throughput against RTT, a line for each estimator
    examples/window_lab.py window --rtt 10            window, buffer, queue and sequence numbers of one upload
    examples/window_lab.py latency                    a second connection beside an upload

`grid` uploads over each path with each estimator in turn and prints throughput, its ratio to no proxy at all,
the time to 90 % of it (at the receiver), retransmissions of the guest, short writes, and frames dropped by the
tap; at the end, where the default is not the best.  pasta takes part if it is installed, others by --peer
NAME=COMMAND.  The last three draw (matplotlib) into --out.  Namespaces, links and settings are those of
compare_pasta.py: CUBIC, default tcp_rmem, nothing outside of the namespaces.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import compare_pasta as yard

ESTIMATORS = ("sndbuf", "linear", "segments", "segments-wmem", "peer", "truesize")
DEFAULT = "truesize"
RTTS = "0,0.2,1,10,50,100"
STEP = 0.1  # of the receiver's account, seconds

# What is between host and remote host: loss in percent, Mbit/s, tcp_rmem of the remote host
CONDITIONS = {
    "plain": {},
    "loss": {"loss": 1},
    "rate": {"rate": 100},
    "small": {"rmem": "4096 32768 65536"},
    "huge": {"rmem": "4096 131072 67108864"},
}

SHORT = re.compile(r"(\d+) of (\d+) sends short$")


@contextmanager
def topology(rtt: float, condition: str, worker: str) -> Iterator[yard.Topology]:
    what = {"loss": 0, "rate": 0, "reorder": 0, "rmem": yard.TCP_RMEM, **CONDITIONS[condition]}
    made = yard.Topology(types.SimpleNamespace(**what), rtt, worker, what["rmem"])
    try:
        yield made
    finally:
        made.close()


@contextmanager
def laboratory() -> Iterator[tuple[dict[str, str], str]]:
    """Namespaces of our own: the commands of the peers that are not ours, and the worker's path."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    peers = yard.default_peers(yard.isolate())
    peers.pop("slirp4netns", None)
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        worker = shutil.copy(Path(yard.__file__).with_name("traffic.py"), directory)
        os.chmod(worker, 0o755)
        yield peers, worker


def ours(command: str, *options: str) -> str:
    """pysplice's command with more options."""
    return command.replace(" --config-net", f" {' '.join(options)} --config-net", 1)


# The grid


def run(name: str, command: str, mtu: int, seconds: float, worker: str) -> dict:
    log: list[str] = []
    result = yard.measure(name, command, "upload", mtu, 4, seconds, worker, log)
    found = [match for match in map(SHORT.search, log) if match]
    result["short"] = sum(int(match[1]) for match in found)
    result["sends"] = sum(int(match[2]) for match in found)
    return result


def rise(run: dict) -> float:
    """Seconds until the receiver got 90 % of the rate that it had in the second half."""
    tenths = run.get("tenths") or [0]
    rate = statistics.mean(tenths[len(tenths) // 2 : -1] or tenths)
    return next((i * STEP for i, n in enumerate(tenths) if n and n >= 0.9 * rate), len(tenths) * STEP)


def line(name: str, runs: list[dict], direct: float) -> tuple[str, float]:
    """A row of the table, and the median throughput."""
    good = [run for run in runs if "failed" not in run]
    if not good:
        return f"  {name:<14} failed: {runs[0]['failed']}", 0.0
    values = [run["value"] for run in good]
    median = statistics.median(values)
    sends, short = (sum(run[key] for run in good) for key in ("sends", "short"))
    text = f"  {name:<14}{median / 1e6:>9.1f} [{min(values) / 1e6:.1f}..{max(values) / 1e6:.1f}]"
    text = f"{text:<45}{median / direct if direct else 0:>7.2f}{statistics.median(map(rise, good)):>7.1f}"
    text += f"{max(run['retransmissions'] for run in good):>9}"
    text += f"{100 * short / sends:>9.3f}" if sends else f"{'':>9}"
    text += f"{max(run['drops'] for run in good):>7}"
    if len(good) < len(runs):
        text += f"  {len(runs) - len(good)} of {len(runs)} failed"
    return text, median


def medians(cell: dict) -> dict[str, float]:
    """The median throughput of each peer that worked."""
    return {
        name: statistics.median(run["value"] for run in runs if "failed" not in run)
        for name, runs in cell["peers"].items()
        if any("failed" not in run for run in runs)
    }


def findings(cell: dict) -> list[str]:
    """Where the default is not what it should be."""
    rates = medians(cell)
    if not cell["peers"].get(DEFAULT):
        return []
    mine = rates.get(DEFAULT, 0.0)
    found = []
    best = max((name for name in ESTIMATORS if name in rates), key=rates.__getitem__, default=DEFAULT)
    if mine < 0.95 * rates.get(best, 0.0):
        found.append(f"{mine / rates[best]:.2f} of {best}")
    for name, rate in rates.items():
        if name not in (*ESTIMATORS, "direct") and mine < rate:
            found.append(f"{mine / rate:.2f} of {name}")
    runs = [run for run in cell["peers"].get(DEFAULT, ()) if "failed" not in run]
    retransmissions = sum(run["retransmissions"] for run in runs)
    sends, short, drops = (sum(run[key] for run in runs) for key in ("sends", "short", "drops"))
    found += [f"{retransmissions} retransmissions"] if retransmissions else []
    found += [f"{drops} drops"] if drops else []
    found += [f"{short} of {sends} sends short"] if short > 0.001 * sends else []
    return found


def grid(args: argparse.Namespace) -> int:
    cells = []
    with laboratory() as (peers, worker):
        command = peers.pop("pysplice")
        for name in args.estimators:
            peers[name] = ours(command, "-d", "--window", name)
        peers.update(peer.split("=", 1) for peer in args.peer)
        if unknown := set(args.without) - set(peers):
            sys.exit(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(peers)}")
        peers = {name: command for name, command in peers.items() if name not in args.without}
        cells_in_all = len(args.condition) * len(args.rtt) * len(args.mtu)
        progress = yard.Progress(cells_in_all * len(peers) * args.rounds)
        try:
            for condition in args.condition:
                for rtt in args.rtt:
                    with topology(rtt, condition, worker) as path:
                        for mtu in args.mtu:
                            cell = {"condition": condition, "rtt": rtt, "mtu": int(mtu), "link": path.how}
                            cells.append({**cell, "peers": fill(args, peers, cell, worker, progress)})
        finally:
            if args.json:
                args.json.write_text(json.dumps(cells))
    summarise(cells)
    return 0


def summarise(cells: list[dict]) -> None:
    """Each peer over all cells of a condition, and where the default is not what it should be."""
    names = list(dict.fromkeys(name for cell in cells for name in cell["peers"] if name != "direct"))
    conditions = list(dict.fromkeys(cell["condition"] for cell in cells))
    print("\ngeometric mean over the cells of throughput / direct (cells in which the peer worked)")
    print(f"  {'':<14}" + "".join(f"{condition:>12}" for condition in conditions))
    for name in names:
        text = f"  {name:<14}"
        for condition in conditions:
            row = [medians(cell) for cell in cells if cell["condition"] == condition]
            ratios = [m[name] / m["direct"] for m in row if m.get(name) and m.get("direct")]
            text += (
                f"{statistics.geometric_mean(ratios):>7.2f} ({len(ratios):>2})" if ratios else f"{'':>12}"
            )
        print(text)
    print(f"\nwhere the default, {DEFAULT}, is below 0.95 of the best estimator or below a pasta, has")
    print("retransmissions or drops, or more than 0.1 % short writes:")
    for cell in cells:
        if found := findings(cell):
            print(f"  {cell['condition']}, RTT {cell['rtt']:g} ms, MTU {cell['mtu']}: {', '.join(found)}")
    print(f"of {len(cells)} cells", flush=True)


def fill(
    args: argparse.Namespace, peers: dict[str, str], cell: dict, worker: str, progress: yard.Progress
) -> dict[str, list[dict]]:
    """One cell: all peers in turn, round by round."""
    rounds, seconds = args.rounds, args.seconds or (2 if cell["rtt"] < 10 else 4)
    head = f"{cell['condition']}, RTT {cell['rtt']:g} ms, MTU {cell['mtu']} ({cell['link']})"
    print(f"\n{head:<38}Mbit/s {'/direct':>7}{'t90 s':>7}{'retrans':>9}{'short %':>9}{'drops':>7}")
    runs: dict[str, list[dict]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, command in peers.items():
            runs[name].append(run(name, command, cell["mtu"], seconds, worker))
            progress.step()
    _, direct = line("direct", runs["direct"], 0)
    for name, done in runs.items():
        print(line(name, done, direct)[0], flush=True)
    return runs


def summary(args: argparse.Namespace) -> int:
    summarise(results(args))
    return 0


def results(args: argparse.Namespace) -> list[dict]:
    """What `grid` has written."""
    if not args.json or not args.json.exists():
        sys.exit("--json names the result of a grid")
    try:
        cells = json.loads(args.json.read_text())
    except ValueError:
        sys.exit(f"{args.json} is not the result of a grid")
    return [cell for cell in cells if cell["condition"] in args.condition]


# The pictures


def check_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("drawing needs matplotlib: .venv/bin/pip install matplotlib")


def pyplot(height: float = 4.5) -> tuple:
    """Imported late: it starts threads, and a process with threads can make no user namespace."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "svg.fonttype": "none"})
    return plt, (8, height)


def save(plt, args: argparse.Namespace, name: str) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{name}.png"
    plt.tight_layout()
    plt.savefig(path, dpi=110)
    print(path)
    return 0


def window(args: argparse.Namespace) -> int:
    """One upload under two estimators: what the socket said, and what the guest was told."""
    check_matplotlib()
    traces = {}
    with laboratory() as (peers, worker), topology(args.rtt[0], args.condition[0], worker):
        for name in args.estimators:
            file = Path(worker).with_name(f"{name}.jsonl")
            command = ours(peers["pysplice"], "--window", name, "--trace-window", str(file))
            result = yard.measure(name, command, "upload", int(args.mtu[0]), 4, args.seconds or 1.0, worker)
            if "failed" in result:
                sys.exit(f"{name}: {result['failed']}")
            lines = [json.loads(text) for text in file.read_text().splitlines()]
            flows = [line["flow"] for line in lines]
            longest = max(set(flows), key=flows.count)
            traces[name] = [line for line in lines if line["flow"] == longest]
    plt, size = pyplot(7)
    # At the start everything grows; later one line hides the other
    most = args.until or 0.04 + 0.02 * args.rtt[0]
    figure, axes = plt.subplots(3, len(traces), figsize=size, sharex=True, sharey="row", squeeze=False)
    for column, (name, lines) in enumerate(traces.items()):
        lines = [line for line in lines if line["time"] - lines[0]["time"] <= most]
        said = [line for line in lines if "sndbuf" in line]
        start = lines[0]["time"]

        def curve(axis, rows, key, *style, start=start, **more) -> None:
            axis.plot(
                [1e3 * (row["time"] - start) for row in rows], [key(row) for row in rows], *style, **more
            )

        socket, window, sequence = (axes[row][column] for row in range(3))
        curve(socket, said, lambda row: row["sndbuf"] / 1e6, "C0", label="S: send buffer")
        curve(socket, said, lambda row: row["wmem_queued"] / 1e6, "C1", label="W: charged to it", lw=1)
        curve(socket, said, lambda row: row["outq"] / 1e6, "C2:", label="Q: payload in it", lw=1)
        curve(
            window, said, lambda row: (row["sndbuf"] - row["wmem_queued"]) / 1e6, "C0:", label="S - W", lw=1
        )
        curve(window, lines, lambda row: row["window"] / 1e6, "k", label="window advertised", lw=1)
        cut = [row for row in lines if row["short"]]
        curve(
            window, cut, lambda row: row["short"] / 1e6, "rx", label="cut off by sendmsg(), at that height"
        )
        curve(sequence, lines, lambda row: row["edge"] / 1e6, "k", label="right edge", lw=1)
        curve(sequence, lines, lambda row: row["read"] / 1e6, "C2", label="read from the guest", lw=1)
        socket.set_title(f"--window {name}")
        sequence.set_xlabel("milliseconds")
    for row, label in enumerate(("socket, MB", "window, MB", "sequence number, MB")):
        axes[row][0].set_ylabel(label)
        axes[row][0].legend(fontsize=7, framealpha=0.6)
    figure.suptitle(
        f"the first moments of an upload, RTT {args.rtt[0]:g} ms, MTU {args.mtu[0]:g}, {args.condition[0]}"
    )
    return save(plt, args, "window")


def throughput(args: argparse.Namespace) -> int:
    """From the result of `grid`: throughput against RTT."""
    cells = [cell for cell in results(args) if cell["condition"] == args.condition[0]]
    if not cells:
        sys.exit(f"no cell with condition {args.condition[0]} in {args.json}")
    check_matplotlib()
    plt, size = pyplot()
    mtus = sorted({cell["mtu"] for cell in cells})
    figure, axes = plt.subplots(1, len(mtus), figsize=size, sharey=True, squeeze=False)
    for axis, mtu in zip(axes[0], mtus, strict=True):
        row = sorted((cell for cell in cells if cell["mtu"] == mtu), key=lambda cell: cell["rtt"])
        for name in row[0]["peers"]:
            points = [
                statistics.median([r["value"] for r in cell["peers"][name] if "failed" not in r] or [0])
                / 1e6
                for cell in row
            ]
            style = "k--" if name == "direct" else "-o" if name in ESTIMATORS else ":s"
            axis.plot(range(len(row)), points, style, label=name, markersize=3, linewidth=1)
        axis.set_xticks(range(len(row)), [f"{cell['rtt']:g}" for cell in row])
        axis.set_yscale("log")
        axis.set_xlabel("round-trip time, ms")
        axis.set_title(f"MTU {mtu}")
    axes[0][0].set_ylabel("Mbit/s")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(f"upload, {args.condition[0]}")
    return save(plt, args, "throughput")


def latency(args: argparse.Namespace) -> int:
    """One byte there and back beside an upload: the share of exchanges that took no longer."""
    check_matplotlib()
    mtu, seconds = int(args.mtu[0]), args.seconds or 3.0
    with laboratory() as (peers, worker), topology(args.rtt[0], args.condition[0], worker):
        command = peers["pysplice"]
        runs = [
            ("no upload", "pysplice", command, "rr1", "k--"),
            ("small queues", "pysplice", command, "loaded", "-"),
            ("--limit-output off", "off", ours(command, "--limit-output", "off"), "loaded", "-"),
        ]
        runs += [("pasta", "pasta", peers["pasta"], "loaded", ":")] if "pasta" in peers else []
        runs += [(*peer.split("=", 1)[:1] * 2, peer.split("=", 1)[1], "loaded", ":") for peer in args.peer]
        plt, size = pyplot()
        plt.figure(figsize=size)
        print(f"{'':<22}{'per s':>8}{'p50 us':>9}{'p99 us':>9}  upload, Gbit/s")
        for label, name, text, workload, style in runs:
            result = yard.measure(name, text, workload, mtu, 4, seconds, worker)
            if "failed" in result:
                print(f"{label:<22} failed: {result['failed']}")
                continue
            text = (
                f"{label:<22}{result['value']:>8.0f}{result['p50'] * 1e6:>9.0f}{result['p99'] * 1e6:>9.0f}"
            )
            if "upload" in result:
                text += f"{result['upload'] / 1e9:>10.2f}"
                label += f" (upload: {result['upload'] / 1e9:.1f} Gbit/s)"
            print(text)
            points = result["percentiles"]
            share = [100 * i / len(points) for i in range(len(points))]
            plt.plot([p * 1e6 for p in points], share, style, label=label, linewidth=1.2)
    plt.xscale("log")
    plt.xlabel("microseconds for one byte there and back")
    plt.ylabel("% of exchanges")
    plt.title(f"a second connection beside an upload, RTT {args.rtt[0]:g} ms, MTU {mtu}")
    plt.legend(fontsize=8)
    return save(plt, args, "latency")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("grid", "summary", "window", "throughput", "latency"))

    def numbers(text: str) -> list[float]:
        return [float(part) for part in text.split(",")]

    def names(text: str) -> list[str]:
        return text.split(",")

    numbers.__name__, names.__name__ = "list of numbers", "list of names"
    parser.add_argument("--rtt", type=numbers, help=f"milliseconds; default: {RTTS}, or 0 to draw")
    parser.add_argument("--mtu", type=numbers, help="of the tap; default: 1500,65520, or 65520 to draw")
    parser.add_argument(
        "--condition", type=names, help=f"default: {','.join(CONDITIONS)}, or plain to draw"
    )
    parser.add_argument("--estimators", type=names, help=f"default: {','.join(ESTIMATORS)}")
    parser.add_argument("--until", type=float, default=0, help="of the picture of a window, seconds")
    parser.add_argument("--without", type=names, default=[], help="peers to leave out, a list")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=0, help="of each run; default: 2, or 4 from 10 ms on"
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--json", type=yard.result_file, metavar="FILE")
    parser.add_argument(
        "--out", type=lambda text: Path(text).resolve(), default=yard.HERE / "pictures", metavar="DIRECTORY"
    )
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds is 1 or more")
    drawing = args.what not in ("grid", "summary")
    args.rtt = args.rtt or numbers("0" if drawing else RTTS)
    args.mtu = args.mtu or numbers("65520" if drawing else "1500,65520")
    args.condition = args.condition or (["plain"] if drawing else [*CONDITIONS])
    args.estimators = args.estimators or ([DEFAULT, "peer"] if drawing else [*ESTIMATORS])
    for given, known in ((args.condition, CONDITIONS), (args.estimators, ESTIMATORS)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if any("=" not in peer for peer in args.peer):
        parser.error("--peer takes NAME=COMMAND")
    return args


if __name__ == "__main__":
    arguments = parse()
    yard.end_in_order()
    try:
        sys.exit(globals()[arguments.what](arguments))
    except KeyboardInterrupt:
        sys.exit("interrupted")
