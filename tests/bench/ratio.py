"""Ratios: what is measured, against what, and what it has to be."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One figure of a run. ``value`` is ours over the peer's, unless *name* says another unit."""

    name: str
    value: float
    target: float
    #: On which side of the target it is met.
    side: Literal["at most", "at least", "exactly"] = "at most"
    #: The figures it was made of, for people.
    detail: str = ""
    #: A missed correctness ratio fails the run; a missed speed ratio is said.
    is_correctness: bool = False

    @property
    def met(self) -> bool:
        """Tell whether the target is met."""
        match self.side:
            case "at most":
                return self.value <= self.target
            case "at least":
                return self.value >= self.target
            case "exactly":
                return self.value == self.target

    def as_json(self) -> dict[str, object]:
        """Return it as the report has it."""
        return {
            "name": self.name,
            "value": round(self.value, 3),
            "target": self.target,
            "met": self.met,
            "detail": self.detail,
        }


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile (1 to 99)."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
