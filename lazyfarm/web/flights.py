"""Flights that are under way, with how fast they go: a rate is told of two looks at one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: Seconds between two looks that make a rate, at least.
_LOOK_S = 0.5
#: How much of a rate is the last look's.
_WEIGHT = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A flight as it is shown."""

    key: str
    #: What it is for: ``blob``, or what else a flight's key begins with.
    work: str
    #: A blob's digest, or the rest of the key.
    subject: str
    #: Worker that owns it: ``NODE/…``.
    owner: str
    waiters: int
    current_bytes: int
    total_bytes: int
    #: Bytes a second; 0: none came, or it was only looked at once.
    rate: float
    is_aborting: bool

    @property
    def node(self) -> str:
        """Return the node that its owner is on."""
        return self.owner.partition("/")[0]

    @property
    def state(self) -> str:
        """Return ``running``, or ``stopping`` where nobody waits any more."""
        return "stopping" if self.is_aborting else "running"

    @property
    def left_s(self) -> float | None:
        """Return the seconds that it takes at this rate; None where that can't be told."""
        return (self.total_bytes - self.current_bytes) / self.rate if self.rate > 0 and self.total_bytes else None


@dataclass(slots=True)
class _Look:
    fence: int
    current_bytes: int
    at_s: float
    rate: float = 0.0


class FlightRates:
    """What was seen of flights before, by whoever looked."""

    def __init__(self) -> None:
        self._looks: dict[str, _Look] = {}

    def look(self, under_way: Mapping[str, Mapping[str, str | int | float]], now_s: float) -> list[Flight]:
        """Return the flights, those with most bytes to come first; *now_s* is monotonic."""
        self._looks = {key: self._look(key, told, now_s) for key, told in under_way.items()}
        flights = [_flight(key, told, self._looks[key].rate) for key, told in under_way.items()]
        return sorted(flights, key=lambda flight: (flight.current_bytes - flight.total_bytes, flight.key))

    def _look(self, key: str, told: Mapping[str, str | int | float], now_s: float) -> _Look:
        fence, current = int(told["fence"]), int(told["current_bytes"])
        before = self._looks.get(key)
        if before is None or before.fence != fence:
            return _Look(fence, current, now_s)
        if (passed_s := now_s - before.at_s) < _LOOK_S:
            return before  # several look on
        rate = max(current - before.current_bytes, 0) / passed_s
        smooth = rate if not before.rate else _WEIGHT * rate + (1 - _WEIGHT) * before.rate
        return _Look(fence, current, now_s, smooth)


def _flight(key: str, told: Mapping[str, str | int | float], rate: float) -> Flight:
    work, _, subject = key.partition(":")
    return Flight(
        key=key,
        work=work,
        subject=subject,
        owner=str(told["owner"]),
        waiters=int(told["waiters"]),
        current_bytes=int(told["current_bytes"]),
        total_bytes=int(told["total_bytes"]),
        rate=rate,
        is_aborting=told["state"] != "running",
    )
