"""The bench is run by hand: that it still fits the code it measures is looked at here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_bench_begins():
    """Every part of it is imported, and it says what it can measure."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.bench", "--help"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "--only {redis,solver,farm,builds}" in done.stdout
