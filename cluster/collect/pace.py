"""A rate that slow work keeps to."""

from __future__ import annotations


class Pace:
    """Tells how long to wait so that what is done stays within a rate. One thread, or one task, at a time.

    Args:
        per_s: What may be done in a second; 0: as much as one can.
    """

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._free_at_s = 0.0

    def wait_s(self, amount: float, now_s: float) -> float:
        """Return the seconds to wait after *amount* was done, at *now_s* of a clock that only goes on.

        Time in which nothing was done is not made up for.
        """
        if not self._per_s:
            return 0.0
        self._free_at_s = max(self._free_at_s, now_s) + amount / self._per_s
        return self._free_at_s - now_s
