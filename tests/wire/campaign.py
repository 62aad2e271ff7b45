"""All scripts against some stacks, many at a time: most of a script is waiting."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

from .language import Script, all_scripts
from .player import play
from .stacks import STACKS, Pasta

OURS = ("linux", "pysplice", "pysplice-no-offload")
AT_A_TIME = 12
# Script, version of IP, stack: what does not hold, empty if all does
Results = dict[tuple[str, int, str], str]


def is_there(name: str) -> bool:
    """True if a stack can be tried on this machine."""
    return name in OURS or shutil.which(Pasta.program if name == "pasta" else name) is not None


def choose(words: list[str], with_long: bool) -> list[Script]:
    """All scripts, or those whose titles have one of the words, in capitals or not; raises Mistake."""
    return [
        script for script in all_scripts()
        if (with_long or not script.is_long)
        and (not words or any(word.lower() in script.title.lower() for word in words))
    ]  # fmt: skip


def run(names: list[str], scripts: list[Script]) -> Results:
    """The scripts against each stack in turn; those that take minutes only against Linux and pysplice."""
    results: Results = {}
    for name in names:
        with Campaign(name, [s for s in scripts if name in OURS or not s.is_long]) as campaign:
            results |= campaign.run()
        failed = sum(problem != "" for (_, _, stack), problem in results.items() if stack == name)
        print(f"{name}: {failed} do not hold", file=sys.stderr)
    return results


class Campaign:
    """Scripts against one stack; a stack whose process ends is started again."""

    def __init__(self, name: str, scripts: list[Script]) -> None:
        self.name = name
        self.jobs = [(script, version) for script in scripts for version in script.versions]
        self.results: Results = {}
        self._stack = STACKS[name]()
        self._suspects: list[int] = []

    def run(self) -> Results:
        """Play them together, but for those that must be alone."""
        waiting = [n for n, (script, _) in enumerate(self.jobs) if not script.is_alone]
        while waiting:
            with ThreadPoolExecutor(AT_A_TIME) as pool:
                list(pool.map(self._play, waiting))
            self._blame()
            waiting = [n for n in waiting if not self._is_played(n)]
        alone = [n for n, (script, _) in enumerate(self.jobs) if script.is_alone]
        # What the two versions of IP have in common is not tried
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self._in_turn, [[n for n in alone if self.jobs[n][1] == v] for v in (4, 6)]))
        self._blame()
        for number in alone:
            if not self._is_played(number):
                self._alone(number)
        return self.results

    def _is_played(self, number: int) -> bool:
        script, version = self.jobs[number]
        return (script.title, version, self.name) in self.results

    def _blame(self) -> None:
        """If the stack's process has ended, find the one that ends it among those that were on their way."""
        suspects, self._suspects = self._suspects, []
        for number in suspects:
            self._alone(number)
        self._revive()

    def _revive(self) -> None:
        if self._stack.has_ended:
            self._stack.close()
            self._stack = STACKS[self.name]()

    def _in_turn(self, numbers: list[int]) -> None:
        for number in numbers:
            self._play(number)

    def _play(self, number: int) -> None:
        """Play one script, unless the stack's process has ended."""
        if self._stack.has_ended:
            return
        script, version = self.jobs[number]
        problem = play(script, self._stack, version, number)
        self.results[script.title, version, self.name] = problem
        if problem and self._stack.has_ended:
            self._suspects.append(number)

    def _alone(self, number: int) -> None:
        """Play one by itself, to see whether it is the one that ends the stack."""
        self._revive()
        self._play(number)
        self._suspects.clear()
        if self._stack.has_ended:
            script, version = self.jobs[number]
            self.results[script.title, version, self.name] = "its process ends"

    def __enter__(self) -> Campaign:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def table(names: list[str], results: Results) -> str:
    """Markdown: a row for each script, a column for each stack, and the reasons below."""
    scripts = {script.title: script for script in all_scripts()}
    titles = list(dict.fromkeys(title for title, _, _ in results))
    titles.sort(key=list(scripts).index)
    lines = ["| behaviour | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    notes: list[str] = []
    topic = ""
    for title in titles:
        script = scripts[title]
        if script.path.stem != topic:
            topic = script.path.stem
            lines.append(f"| **{topic}** |" + " |" * len(names))
        cells = []
        for name in names:
            problems = {v: results.get((title, v, name), "not tried") for v in script.versions}
            bad = {v: p for v, p in problems.items() if p}
            if not bad:
                differs = name.startswith("pysplice") and "pysplice" in script.head
                cells.append("as written" if differs else "yes")
            else:
                which = "" if len(bad) == len(problems) else f" (IPv{next(iter(bad))})"
                cells.append(f"no{which}")
                notes.append(f"- {name}{which}, {title}: {next(iter(bad.values()))}".replace("|", "/"))
        if "pysplice" in script.head:
            notes.append(f"- why pysplice differs, {title}: {script.head['pysplice']}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *notes, ""])
