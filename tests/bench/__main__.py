"""``make bench``: lazyfarm against its peers, as ratios of one run.

    python -m tests.bench [--only redis|solver|farm|builds] [--json FILE]

Exit status: 0; 1 where a correctness ratio is not met or a measure failed; 130 interrupted, with what was measured
so far. A missed speed target says so, and fails nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench import redis_latency, solver_state
from tests.bench.builds import BuildBench
from tests.bench.farm import FarmBench
from tests.bench.peers import versions
from tests.bench.ratio import Ratio
from tests.demo.farm_process import CommandFailedError, DriverFailedError
from tests.demo.signals import INTERRUPTED, end_as_interrupted
from tests.demo.stage import Stage
from tests.doubles.oci_layout import ImageToolError

_SIDES = {"at most": "≤", "at least": "≥", "exactly": "="}


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure lazyfarm against its peers.")
    parser.add_argument("--only", choices=["redis", "solver", "farm", "builds"], help="measure only that part")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), metavar="FILE", help="%(default)s")
    options = parser.parse_args()
    console = Console(soft_wrap=not sys.stdout.isatty())
    began = time.monotonic()

    def say(what: str) -> None:
        console.print(f"[{time.monotonic() - began:5.0f} s] {what}", highlight=False, markup=False)

    ratios: list[Ratio] = []
    failed: list[str] = []

    def measure(title: str, take: Callable[[], list[Ratio]]) -> None:
        say(title)
        try:
            ratios.extend(take())
        except (CommandFailedError, DriverFailedError, ImageToolError) as error:
            # The others are measured all the same.
            say(f"error: {error}")
            failed.append(title)

    end_as_interrupted()
    interrupted = False
    try:
        if options.only in (None, "redis"):
            measure("flights and lookups", redis_latency.measure)
        if options.only in (None, "solver"):
            measure("decisions of the solver", solver_state.measure)
        if options.only in (None, "farm"):
            with Stage(say) as stage:
                bench = FarmBench(stage)
                # First: idle is what a worker has that has done nothing yet, not what earlier work left it with.
                measure("memory", bench.memory)
                measure("start of a command", bench.command_start)
                measure("duplicate factor", bench.duplicate_factors)
                measure("cold pull and extract", bench.pull_and_extract)
                measure("bytes into S3", bench.bytes_into_s3)
        if options.only in (None, "builds"):
            # A farm that has done nothing else.
            with Stage(say) as stage:
                builds = BuildBench(stage)
                measure("retag", builds.retag)
                measure("cached Dockerfile", builds.dockerfile)
                measure("rebuild of a large graph", builds.rebuild)
    except KeyboardInterrupt:
        interrupted = True
    used = versions()
    _show(ratios, used, console)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"ratios": [one.as_json() for one in ratios], "versions": used}, indent=2) + "\n"
    )
    say(f"written to {options.json}")
    if interrupted:
        return INTERRUPTED
    if failed:
        say(f"not measured: {', '.join(failed)}")
    return 1 if failed or not all(one.met for one in ratios if one.is_correctness) else 0


def _show(ratios: list[Ratio], used: dict[str, str], console: Console) -> None:
    table = Table(title="ratios", title_justify="left", pad_edge=False)
    for heading in ("name", "value", "target", "met", "of"):
        table.add_column(heading, overflow="fold", justify="right" if heading in ("value", "target") else "left")
    for one in ratios:
        met = "[green]yes[/green]" if one.met else "[red]no[/red]"
        table.add_row(one.name, f"{one.value:.2f}", f"{_SIDES[one.side]} {one.target:g}", met, one.detail)
    console.print(table)
    for name, version in used.items():
        console.print(f"{name}: {version}", highlight=False, markup=False)


if __name__ == "__main__":
    raise SystemExit(main())
