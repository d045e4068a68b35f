"""Fault plans performed on this process: signals, gates and counts in files. Armed by shells, for tests."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from cluster.errors import ConfigError, DeadlineExceededError, InternalError
from cluster.faultpoints import Count, FaultPlan, FaultPoint, FaultRule, arm

#: A plan's text, or the path of a file that holds it.
PLAN_VARIABLE = "LAZYFARM_FAULTS"
#: A file to which every hit of every point is appended, beside any plan.
HITS_VARIABLE = "LAZYFARM_FAULT_HITS"


class ProcessFaults:
    """Performs fault plans on the process that it is in.

    Args:
        hang_s: Seconds after which a hang gives up (DeadlineExceededError), so that a test that died
            leaves no process behind for ever.
        poll_s: Seconds between two looks for a gate.
    """

    def __init__(self, *, hang_s: float = 300.0, poll_s: float = 0.01) -> None:
        self._hang_s = hang_s
        self._poll_s = poll_s

    def kill(self) -> None:
        """SIGKILL this process: no handler runs, no buffer is flushed."""
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(self, gate: str) -> None:
        """Write ``gate.arrived``, then block until *gate* exists.

        Raises:
            DeadlineExceededError: it did not within ``hang_s`` seconds.
        """
        deadline_s = self._arrive(gate)
        while not self._is_open(gate, deadline_s):
            time.sleep(self._poll_s)

    async def ahang(self, gate: str) -> None:
        """Do the same in a coroutine."""
        deadline_s = self._arrive(gate)
        while not self._is_open(gate, deadline_s):  # noqa: ASYNC110 - the gate is another process's file
            await asyncio.sleep(self._poll_s)

    def count(self, file: str, point: FaultPoint) -> None:
        """Append the point and this process's ID as one line."""
        _append(file, f"{point} {os.getpid()}\n")

    def claim(self, file: str) -> bool:
        """Make *file* unless it exists; tell whether this call made it."""
        try:
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            return False
        except OSError as exc:
            raise InternalError(f"fault claim {file}: {exc.strerror}") from exc
        return True

    def _arrive(self, gate: str) -> float:
        """Tell that somebody is at the gate; return when to give up (monotonic)."""
        _append(f"{gate}.arrived", f"{os.getpid()}\n")
        return time.monotonic() + self._hang_s

    def _is_open(self, gate: str, deadline_s: float) -> bool:
        if os.path.exists(gate):  # noqa: PTH110 - a look of microseconds, taken from an event loop too
            return True
        if time.monotonic() > deadline_s:
            raise DeadlineExceededError(f"fault gate {gate}", f"it did not open within {self._hang_s:g} s")
        return False


def arm_from_environment(environ: Mapping[str, str]) -> bool:
    """Arm this process with the plan that *environ* names, if any; each shell calls it once, at its start.

    Returns:
        True if something was armed.

    Raises:
        ConfigError: the plan can't be read.
    """
    rules = _plan_of(environ.get(PLAN_VARIABLE, "")).rules
    hits = environ.get(HITS_VARIABLE, "")
    if hits:
        rules = (FaultRule(point=None, action=Count(hits)), *rules)
    if rules:
        arm(FaultPlan(rules), ProcessFaults())
    return bool(rules)


def hits_recorded(path: str | Path) -> Counter[FaultPoint]:
    """Return how often each point was hit, by the file that ``count`` appended to; all zero without one.

    Lines of points that no longer exist are left out.
    """
    hits: Counter[FaultPoint] = Counter(dict.fromkeys(FaultPoint, 0))
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return hits
    known = set(FaultPoint)
    hits.update(FaultPoint(name) for name in (line.partition(" ")[0] for line in lines) if name in known)
    return hits


def never_hit(path: str | Path) -> list[FaultPoint]:
    """Return the points that nobody hit, by that file: each is a promise that no test has tried."""
    return [point for point, count in hits_recorded(path).items() if count == 0]


def _plan_of(value: str) -> FaultPlan:
    if not value or "=" in value:
        return FaultPlan.parse(value, source=PLAN_VARIABLE)
    try:
        text = Path(value).read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(PLAN_VARIABLE, (f"{value}: {exc.strerror}",)) from exc
    return FaultPlan.parse(text, source=value)


def _append(file: str, line: str) -> None:
    """Append *line* in one write: lines of several processes don't mix, and survive a SIGKILL."""
    try:
        handle = os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)
    except OSError as exc:
        raise InternalError(f"fault file {file}: {exc.strerror}") from exc
