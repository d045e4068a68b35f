"""What a demonstration does when it is to end: it takes everything down, whatever else comes."""

from __future__ import annotations

import signal
from types import FrameType

#: Exit status of what was interrupted, as a shell has it.
INTERRUPTED = 130


def end_as_interrupted() -> None:
    """Let SIGTERM end the process as Ctrl-C does, through every ``finally``."""
    signal.signal(signal.SIGTERM, _interrupt)


def be_deaf() -> None:
    """Ignore both from now on: what is being taken down is taken down to the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
