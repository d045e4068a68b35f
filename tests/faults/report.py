"""Writes ``docs/faults.md`` from a run: every cell of the matrix with its promise and its result, and every other test.

Registered by ``make faults``, which runs the long ones, too. Results are kept: who runs a part of the suite again
(``PYTEST="-k Redis"``) writes the page with those, and with what the others came to when they were last run.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.matrix import FAULTS, SITUATIONS, Cell, Fault, Part, Situation, cells, every_cell

_KEPT, _BROKEN, _NOT_RUN = "kept", "**broken**", "not run"
#: Where pytest keeps them.
_RESULTS = "faults/results"
_SUMMARY = """\
Written by `make faults` at {commit}, of {date}: {kept} promises kept, {broken} broken, {not_run} not run.

Each part of a farm of three nodes meets each fault while something is under way. What is promised is checked, and
afterwards that all is there again and nothing is left: no flight, lease, key, file, mount, container or process of
what is over ([the invariants](architecture.md)). `make test` runs what is killed, cut off and restarted; `make faults`
runs all of it.
"""


@dataclass(frozen=True)
class Told:
    """A test of the suite beside the matrix."""

    module: str
    name: str
    #: The first line of its docstring.
    promise: str
    result: str


@dataclass
class FaultsReport:
    """Collects what came of a run, and writes it in the end."""

    file: Path
    cache: pytest.Cache
    _items: dict[str, pytest.Item] = field(default_factory=dict)
    _results: dict[str, str] = field(default_factory=dict)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note what is going to be run."""
        self._items = {item.nodeid: item for item in session.items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what came of a test: what fails in its setup or teardown has failed, too."""
        if report.failed:
            self._results[report.nodeid] = _BROKEN
        elif report.when == "call" and report.passed:
            self._results.setdefault(report.nodeid, _KEPT)

    def pytest_sessionfinish(self) -> None:
        """Write it."""
        known = {str(cell): cell for cell in cells()}
        date = time.strftime("%Y-%m-%d", time.gmtime())
        kept: dict[str, dict[str, str]] = self.cache.get(_RESULTS, {})
        for nodeid, item in self._items.items():
            callspec = getattr(item, "callspec", None)
            cell = callspec.params.get("cell") if callspec is not None else None
            if nodeid in self._results:
                kept[nodeid] = {
                    "cell": str(cell) if isinstance(cell, Cell) else "",
                    "module": item.path.stem,
                    "name": item.name,
                    "promise": _promise_of(item),
                    "result": self._results[nodeid],
                    "date": date,
                }
        self.cache.set(_RESULTS, kept)
        results = {known[each["cell"]]: each["result"] for each in kept.values() if each["cell"] in known}
        others = [
            Told(each["module"], each["name"], each["promise"], each["result"])
            for _, each in sorted(kept.items())
            if not each["cell"]
        ]
        since = min((each["date"] for each in kept.values()), default=date)
        page = render(results, others, date=date if since == date else f"{since} to {date}", commit=_commit())
        self.file.write_text(page, encoding="utf-8")


def _promise_of(item: pytest.Item) -> str:
    text = (getattr(item.obj, "__doc__", None) or "").strip() if isinstance(item, pytest.Function) else ""
    return " ".join(text.partition("\n\n")[0].split())


def _commit() -> str:
    said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return said.stdout.strip() or "unknown"


def render(results_of: Mapping[Cell, str], others: Sequence[Told], *, date: str, commit: str) -> str:
    """Return the page."""
    results = [results_of.get(cell, _NOT_RUN) for cell in cells()] + [told.result for told in others]
    left_out = [cell for cell in every_cell() if cell.why_left_out]
    lines = [
        "# Faults",
        "",
        _SUMMARY.format(
            date=date,
            commit=commit,
            kept=results.count(_KEPT),
            broken=results.count(_BROKEN),
            not_run=results.count(_NOT_RUN),
        ),
        "| fault | what is done |",
        "| --- | --- |",
        *(f"| {fault} | {FAULTS[fault]} |" for fault in Fault),
        "",
        "| situation | what is under way |",
        "| --- | --- |",
        *(f"| {situation} | {SITUATIONS[situation]} |" for situation in Situation),
        "",
        "## The matrix",
    ]
    for part in Part:
        lines += ["", f"### {part}", "", f"| | {' | '.join(Situation)} |", "| --- " * (len(Situation) + 1) + "|"]
        reasons: dict[str, list[Cell]] = {}
        for fault in Fault:
            row = []
            for situation in Situation:
                cell = Cell(part, fault, situation)
                if cell.why_left_out:
                    reasons.setdefault(cell.why_left_out, []).append(cell)
                row.append("left out" if cell.why_left_out else results_of.get(cell, _NOT_RUN))
            lines.append(f"| {fault} | {' | '.join(row)} |")
        lines.append("")
        promises: dict[str, set[str]] = {}
        for cell in every_cell():
            if cell.part is part and not cell.why_left_out:
                promises.setdefault(f"{cell.situation}: {cell.promise}", set()).add(cell.fault)
        usual = max(len(faults) for faults in promises.values())
        for promise, faults in promises.items():
            when = "" if len(faults) == usual else f" ({', '.join(fault for fault in Fault if fault in faults)})"
            lines.append(f"- {promise}{when}.")
        for reason, which in reasons.items():
            faults = ", ".join(fault for fault in Fault if any(cell.fault is fault for cell in which))
            lines.append(f"- left out: {faults}: {reason}.")
    lines += ["", "## Beside the matrix", "", "| test | promise | result |", "| --- | --- | --- |"]
    lines += [f"| `{_cell(t.module)}` {_cell(t.name)} | {_cell(t.promise)} | {t.result} |" for t in others]
    lines += ["", f"{len(list(every_cell()))} cells, {len(left_out)} of them left out for the reasons above.", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
