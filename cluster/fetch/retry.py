"""When to try again, and after how long: a pure decision. Who asks has the clock and the dice."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import CircuitOpenError, RateLimitedError, WorkerBusyError


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Full jitter under two bounds: tries, and seconds that all of them may take together.

    Full jitter (a delay drawn evenly between 0 and an exponential ceiling) is from Brooker 2015,
    "Exponential Backoff And Jitter": of the variants compared there it needs the fewest calls, and
    callers that failed together don't come back together.
    """

    #: Tries, the first included; at least 1.
    attempts: int
    #: Seconds, counted as who asks counts them, after which no other try begins.
    budget_s: float
    #: Ceiling of the first delay in seconds; doubles with each try.
    base_s: float = 0.2
    #: Ceiling of every delay in seconds.
    cap_s: float = 10.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.budget_s < 0 or not 0 < self.base_s <= self.cap_s:
            raise ValueError(f"impossible retry policy {self!r}")

    def next_delay_s(self, error: BaseException, attempt: int, elapsed_s: float, draw: float) -> float | None:
        """Return the seconds to wait before the next try, or None to give up.

        A registry's ``Retry-After``, or a worker's, is a floor, with jitter on top; one that is further away than the
        budget reaches means giving up at once, not waiting in vain.

        Args:
            error: What the try that just ended came to. Only errors that call themselves ``retryable``
                are tried again, and not a host that the whole cluster has given up for a while.
            attempt: Which try it was, from 1.
            elapsed_s: Seconds of the budget that are gone: all since the first try began, or what of them
                was of no use.
            draw: A random number in [0, 1).
        """
        if not getattr(error, "retryable", False) or isinstance(error, CircuitOpenError) or attempt >= self.attempts:
            return None
        # The exponent is bounded: 2.0 ** 1100 overflows.
        delay_s = draw * min(self.cap_s, self.base_s * 2.0 ** min(attempt - 1, 60))
        if isinstance(error, RateLimitedError | WorkerBusyError):
            delay_s += max(0.0, error.retry_after_s)
        return delay_s if elapsed_s + delay_s <= self.budget_s else None
