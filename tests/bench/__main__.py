"""``make bench``: lazyfarm against its peers, as ratios of one run.

    python -m tests.bench [--only redis|farm] [--json FILE]

Exit status: 0, 1 where a correctness ratio is not met. A missed speed target says so, and fails nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench import redis_latency
from tests.bench.farm import FarmBench
from tests.bench.peers import versions
from tests.bench.ratio import Ratio
from tests.demo.stage import Stage

_SIDES = {"at most": "≤", "at least": "≥", "exactly": "="}


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure lazyfarm against its peers.")
    parser.add_argument("--only", choices=["redis", "farm"], help="measure only that part")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), metavar="FILE", help="%(default)s")
    options = parser.parse_args()
    console = Console(soft_wrap=not sys.stdout.isatty())
    began = time.monotonic()

    def say(what: str) -> None:
        console.print(f"[{time.monotonic() - began:5.0f} s] {what}", highlight=False, markup=False)

    ratios: list[Ratio] = []
    if options.only != "farm":
        say("flights and lookups")
        ratios += redis_latency.measure()
    if options.only != "redis":
        with Stage(say) as stage:
            bench = FarmBench(stage)
            say("duplicate factor")
            ratios += bench.duplicate_factors()
            say("cold pull and extract")
            ratios += bench.pull_and_extract()
            say("bytes into S3")
            ratios.append(bench.bytes_into_s3())
            say("memory")
            ratios.append(bench.memory())
    used = versions()
    _show(ratios, used, console)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"ratios": [one.as_json() for one in ratios], "versions": used}, indent=2) + "\n"
    )
    say(f"written to {options.json}")
    return 0 if all(one.met for one in ratios if one.is_correctness) else 1


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
