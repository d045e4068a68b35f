"""A process beside the test's own, which holds something until it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: What a program prints once it has what it is there for.
READY = "ready"


@contextmanager
def another_process(program: str) -> Iterator[subprocess.Popen[str]]:
    """Run *program*, and kill it in the end; yields once it has printed :data:`READY`."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == f"{READY}\n"
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        process.stdout.close()
