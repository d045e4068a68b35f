"""Memory of a process tree, as the kernel shares it out."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_SAMPLE_S = 0.05


def tree_bytes(pid: int) -> int:
    """Return the proportional set size of a process and all its descendants; of what has ended, nothing."""
    return sum(_pss_bytes(one) for one in _tree(pid))


class PeakMemory:
    """Samples process trees until left; keeps the most that each had."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self.idle_bytes = {name: tree_bytes(pid) for name, pid in pids.items()}
        self.peak_bytes = dict(self.idle_bytes)
        self.samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def busiest(self) -> str:
        """Return the tree that rose most."""
        return max(self.peak_bytes, key=lambda name: self.peak_bytes[name] - self.idle_bytes[name])

    @property
    def most_over_idle_bytes(self) -> int:
        """Return how much it rose."""
        return self.peak_bytes[self.busiest] - self.idle_bytes[self.busiest]

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self.samples += 1
            for name, pid in self._pids.items():
                self.peak_bytes[name] = max(self.peak_bytes[name], tree_bytes(pid))


def _tree(pid: int) -> list[int]:
    found = [pid]
    for one in found:  # grows while it is walked
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except OSError:
                continue
    return found


def _pss_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
