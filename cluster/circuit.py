"""When a registry host is given up, and when it is tried again: a pure decision, the same for all of a cluster.

A circuit breaker (Nygard 2007, "Release It!"). ``storage/lua/lib/circuit.lua`` is the same in Redis, where the
cluster's processes share it; what is here serves the fakes, and says what both must do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from cluster.errors import (
    CircuitOpenError,
    ClusterError,
    InternalError,
    InvalidTransitionError,
    NodeDiskError,
    RateLimitedError,
    RedirectTargetError,
    UnavailableError,
)

#: Seconds within which failures count as one: those of requests that were under way together.
BURST_S = 1.0


class Circuit(StrEnum):
    """Whether a host is asked."""

    #: It is.
    CLOSED = "closed"
    #: It isn't: it failed too often.
    OPEN = "open"
    #: One request is under way to see whether it is back; no other is made.
    HALF_OPEN = "half_open"


class Turn(StrEnum):
    """What makes a circuit another one. Nothing else does: the outcome of an earlier request, say."""

    FAILED_TOO_OFTEN = "failed too often"
    PROBE_BEGUN = "probe begun"
    PROBE_ANSWERED = "probe answered"
    PROBE_FAILED = "probe failed"


MOVES: Mapping[tuple[Circuit, Turn], Circuit] = MappingProxyType(
    {
        (Circuit.CLOSED, Turn.FAILED_TOO_OFTEN): Circuit.OPEN,
        (Circuit.OPEN, Turn.PROBE_BEGUN): Circuit.HALF_OPEN,
        # The probe before it is gone without an outcome, or takes too long.
        (Circuit.HALF_OPEN, Turn.PROBE_BEGUN): Circuit.HALF_OPEN,
        (Circuit.HALF_OPEN, Turn.PROBE_ANSWERED): Circuit.CLOSED,
        (Circuit.HALF_OPEN, Turn.PROBE_FAILED): Circuit.OPEN,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerLimits:
    """When a host is given up, and for how long."""

    #: Failures in a row until it is, 0 for never.
    failures: int
    #: Seconds until it is tried again, and that a probe has before another may be made.
    open_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenUp:
    """A host whose circuit isn't closed."""

    host: str
    #: For how long it has been given up.
    failing_s: float
    last_failure: str
    #: Seconds until it is tried again; 0 where the next request does so.
    retry_in_s: float


class HostCircuit:
    """The circuit of one host. Requests are known by the names of their slots.

    In half-open the probe's outcome alone counts: those that were under way when the host was given up may end
    long after it is back, or once more has gone.
    """

    def __init__(self, limits: BreakerLimits) -> None:
        self._limits = limits
        self.state = Circuit.CLOSED
        #: Failures in a row, and when the last of them was counted.
        self.failures = 0
        self._failed_s = float("-inf")
        #: Since when it is not closed, and what the last failure was.
        self.opened_s = 0.0
        self.last_failure = ""
        #: When the next probe may begin, and which one is under way.
        self.retry_s = 0.0
        self.probe = ""

    def __repr__(self) -> str:
        return f"<HostCircuit {self.state} failures={self.failures} probe={self.probe!r}>"

    def admits(self, slot: str, now_s: float) -> bool:
        """Tell whether a request may be made now; unless the circuit is closed, it is a probe."""
        return self.state is Circuit.CLOSED or slot == self.probe or now_s >= self.retry_s

    def begun(self, slot: str, now_s: float) -> bool:
        """Note that a request that was admitted is made; tell whether it is the probe."""
        if self.state is Circuit.CLOSED:
            return False
        if slot != self.probe:
            self._turn(Turn.PROBE_BEGUN)
            self.probe, self.retry_s = slot, now_s + self._limits.open_s
        return True

    def answered(self, slot: str) -> bool:
        """Note that a request was answered, be it by a refusal; tell whether that closed the circuit."""
        is_probe = self._is_probe(slot)
        if is_probe:
            self._turn(Turn.PROBE_ANSWERED)
            self.probe = ""
        if self.state is Circuit.CLOSED:
            self.failures, self._failed_s = 0, float("-inf")
        return is_probe

    def failed(self, slot: str, reason: str, now_s: float) -> bool:
        """Note that a request failed; tell whether that opened a closed circuit."""
        if self.state is Circuit.CLOSED:
            return self._counted(reason, now_s)
        if self._is_probe(slot):
            self._turn(Turn.PROBE_FAILED)
            self.probe, self.retry_s, self.last_failure = "", now_s + self._limits.open_s, reason
        return False

    def left(self, slot: str, now_s: float) -> None:
        """Note that a request ended; one without an outcome, a cancelled one say, holds up no other probe."""
        if self._is_probe(slot):
            self.retry_s = now_s

    def validate(self) -> None:
        """Check the invariants."""
        if self.probe and self.state is not Circuit.HALF_OPEN:
            raise InternalError(f"a probe without a circuit that is half-open: {self!r}")
        if self.state is not Circuit.CLOSED and not self.last_failure:
            raise InternalError(f"given up for no reason: {self!r}")

    def _counted(self, reason: str, now_s: float) -> bool:
        self.last_failure = reason
        if now_s - self._failed_s < BURST_S:
            return False
        self.failures += 1
        self._failed_s = now_s
        if not 0 < self._limits.failures <= self.failures:
            return False
        self._turn(Turn.FAILED_TOO_OFTEN)
        self.opened_s, self.retry_s = now_s, now_s + self._limits.open_s
        return True

    def _is_probe(self, slot: str) -> bool:
        return self.state is Circuit.HALF_OPEN and slot == self.probe

    def _turn(self, turn: Turn) -> None:
        if (self.state, turn) not in MOVES:
            raise InvalidTransitionError("the circuit of a registry host", self.state, turn)
        self.state = MOVES[self.state, turn]


def is_failure(error: ClusterError) -> bool:
    """Tell whether what a request to a host came to counts against that host.

    A 429 doesn't, nor does a 503 that says when to ask again: who answers so is there. Nor does what this node
    or the store that the host sent us to did.
    """
    return isinstance(error, UnavailableError) and not isinstance(
        error, RateLimitedError | RedirectTargetError | NodeDiskError | CircuitOpenError
    )
