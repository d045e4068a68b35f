"""Who may come in at all: a pure decision."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from cluster.errors import WorkerBusyError

#: Seconds after which who was refused may ask again, at the earliest; each time there is more on top.
_RETRY_AFTER_S = 0.5


class CallQuota:
    """How many calls each tenant may have under way, of a number that all of them share.

    A tenant may begin another while it has fewer than there are places left: alone it gets half of them, two get a
    third each, and there is room left for one that comes late (Choudhury and Hahne 1998, "Dynamic queue length
    thresholds for shared-memory packet switches"). Nobody has to say beforehand how many tenants there will be.
    """

    __slots__ = ("_calls", "_limit", "_total")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._calls: Counter[str] = Counter()
        self._total = 0

    @contextlib.contextmanager
    def call(self, tenant: str) -> Iterator[None]:
        """Have a call under way while the body runs.

        Raises:
            WorkerBusyError: the tenant may not have another just now.
        """
        if not self.try_begin(tenant):
            mine = self.of(tenant)
            raise WorkerBusyError(
                "the fetch worker", f"{self._total} calls are under way, {mine} of them yours", _RETRY_AFTER_S
            )
        try:
            yield
        finally:
            self.end(tenant)

    @property
    def calls(self) -> int:
        """Return how many calls are under way."""
        return self._total

    def of(self, tenant: str) -> int:
        """Return how many calls a tenant has under way."""
        return self._calls[tenant]

    def try_begin(self, tenant: str) -> bool:
        """Count one call more, if the tenant may have it."""
        if self.of(tenant) >= self._limit - self._total:
            return False
        self._calls[tenant] += 1
        self._total += 1
        return True

    def end(self, tenant: str) -> None:
        """Count one call less; nothing is remembered of a tenant that has none."""
        self._total -= 1
        self._calls[tenant] -= 1
        if not self._calls[tenant]:
            del self._calls[tenant]
