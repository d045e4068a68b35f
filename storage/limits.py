"""One limit a registry host for the whole cluster, in Redis."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import structlog

from cluster.circuit import BURST_S, BreakerLimits
from cluster.config import Config
from cluster.errors import CircuitOpenError, DeadlineExceededError, RateLimitedError, UnavailableError
from cluster.metrics import (
    REGISTRY_CIRCUIT_OPENED,
    REGISTRY_QUOTA_REMAINING,
    REGISTRY_QUOTA_WAIT_SECONDS,
    REGISTRY_WAIT_SECONDS,
)
from cluster.ports import Slot
from cluster.quota import ANYBODYS, Budget, Quota, pace_of, tightest, told_for_s
from storage.keys import Keys
from storage.link import RedisLink
from storage.registry.endpoint import registry_config

#: Seconds that a slot is kept when its holder has died; holders renew every third of it.
SLOT_TTL_S = 15.0
#: Seconds that a place in the queue is kept when nobody asks for it.
_PLACE_TTL_S = 5.0
#: Seconds between questions for a slot: for the first in the queue, more for each before, at most.
_ASK_FIRST_S = 0.02
_ASK_EACH_S = 0.01
_ASK_MOST_S = 1.0
#: What the script that takes slots answers first, where it isn't 0.
_TOO_LATE, _GIVEN_UP, _IS_PROBE = -2, -1, 2
#: Of what a host did, this much is kept.
_FAILURE_CHARS = 200
#: Seconds between two words to people on what is left of a quota of which there is enough.
_TELL_S = 60.0
#: Accounts of which it is remembered when that was, at most.
_TOLD_MOST = 1000

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToldQuota:
    """What an account may still ask of a host."""

    #: Of requests: a :class:`cluster.quota.RequestKind`, or what a later release counts apart.
    kind: str
    #: Of what sets the pace, as the registry last said; None: an earlier release heard it, and didn't note it.
    remaining: int | None
    #: Seconds until all are there again, and until any request is of use.
    window_s: float
    hold_s: float = 0.0
    #: That is little: the cluster goes slowly.
    is_low: bool = True
    #: Requests in all, where enough is left and the registry says it; else 0.
    limit: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBudget:
    """What a registry host may be asked now, and is."""

    host: str
    #: Requests under way at most, now and as configured; and those that are, and that wait to be.
    limit: int
    max_limit: int
    busy: int
    waiting: int
    #: Requests a second at most, now and as configured; 0: any number. And those of the last seconds.
    rate: float
    max_rate: float
    recent_rate: float
    #: 429s since it was last forgotten, after an hour without a request; seconds until anybody may ask again.
    refused: int
    closed_s: float
    #: Of each account and kind of request of which the registry told of late; the least first.
    quotas: tuple[ToldQuota, ...]

    @property
    def is_reduced(self) -> bool:
        """Tell whether 429s, or a quota of which little is left, hold it down."""
        is_held = self.limit < self.max_limit or self.closed_s > 0 or self.rate != self.max_rate
        return is_held or any(quota.is_low for quota in self.quotas)


class RedisHostLimiter:
    """Implements :class:`cluster.ports.HostLimiter`.

    Additive increase, multiplicative decrease (Chiu and Jain 1989) on concurrent requests: a burst of 429s
    halves the limit, as many successes as it is high add one. The request rate goes down and up alike, and is
    kept by a token bucket; where none is configured there is one only after a 429. With nothing in the way,
    entering costs one round trip and leaving none. Who waits has a place in a queue and asks for it again and
    again, with jitter, rarer the more come before; within a process, who leaves also nudges who has waited
    longest. The circuit breaker is looked at in the same round trip.
    """

    def __init__(self, link: RedisLink, keys: Keys, config: Config) -> None:
        self._link = link
        self._prefix = keys.prefix
        self._config = config
        self._held: dict[str, str] = {}
        self._waiting: dict[str, deque[asyncio.Event]] = {}
        #: Hosts whose limit or rate 429s had brought down, or that had failed, when last seen: only these need be
        #: told of success.
        self._reduced: set[str] = set()
        #: Budgets of hosts of which little was left when last seen: only of these need be told that it is more.
        self._low: set[tuple[str, Budget]] = set()
        #: When people were last told what is left of those of which there is enough, monotonic.
        self._told_s: dict[tuple[str, Budget], float] = {}
        self._renewing: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def slot(self, host: str, *, deadline_s: float, budget: Budget = ANYBODYS) -> AsyncIterator[Slot]:
        """Hold one of the host's slots."""
        slot = Slot(host, secrets.token_hex(8), budget=budget)
        began_s = time.monotonic()
        try:
            try:
                async with asyncio.timeout(deadline_s):
                    is_probe = await self._take(slot, began_s + deadline_s)
            except TimeoutError as exc:
                raise DeadlineExceededError(
                    f"a request slot for {host}", f"none came free in {deadline_s:g} s"
                ) from exc
            waited_s = time.monotonic() - began_s
            REGISTRY_WAIT_SECONDS.observe(waited_s, registry=host)
            if (host, budget) in self._low:
                REGISTRY_QUOTA_WAIT_SECONDS.add(waited_s, kind=budget.kind.value)
            self._held[slot.name] = host
            self._renew_while_held()
            yield replace(slot, is_probe=is_probe)
        finally:
            self._held.pop(slot.name, None)
            # Also where it was never granted, as far as we know: a grant may be on its way.
            self._link.run_soon("slot_release", self._prefix, host, slot.name, budget.kind, budget.account)
            self._nudge(host)

    async def quoted(self, slot: Slot, quotas: Sequence[Quota]) -> None:
        """Record what is left."""
        if quotas:
            left = min(quota.remaining for quota in quotas)
            REGISTRY_QUOTA_REMAINING.set(left, registry=slot.host, kind=slot.budget.kind.value)
        pace = pace_of(quotas, slowest_s=registry_config(self._config, slot.host).quota_pace_s)
        was_low = (slot.host, slot.budget) in self._low
        of = slot.host, slot.budget.kind, slot.budget.account
        if pace is None:
            if was_low:
                await self._link.run("host_quota", self._prefix, *of, 0, 0, 0, 0, may_repeat=True)
            self._tell_enough(slot, quotas)
            return
        if not was_low:
            self._low.add((slot.host, slot.budget))
            _log.info(
                "registry.little_left",
                host=slot.host,
                kind=slot.budget.kind,
                left=pace.remaining,
                every_s=round(pace.every_s, 3),
                hold_s=round(pace.hold_s, 3),
            )
        times_ms = [math.ceil(seconds * 1000) for seconds in (pace.every_s, pace.hold_s, pace.for_s)]
        await self._link.run("host_quota", self._prefix, *of, *times_ms, pace.remaining, may_repeat=True)

    def _tell_enough(self, slot: Slot, quotas: Sequence[Quota]) -> None:
        """Note for people, now and then, what is left where that is enough. Nobody waits for it."""
        least, now_s = tightest(quotas), time.monotonic()
        of = slot.host, slot.budget
        if least is None or now_s < self._told_s.get(of, float("-inf")) + _TELL_S:
            return
        if len(self._told_s) >= _TOLD_MOST:
            self._told_s.clear()
        self._told_s[of] = now_s
        told = least.remaining, least.limit or 0, math.ceil(told_for_s(least) * 1000)
        account = slot.host, slot.budget.kind, slot.budget.account
        self._link.run_soon("host_quota_enough", self._prefix, *account, *told)

    async def throttled(self, slot: Slot, retry_after_s: float) -> None:
        """Record a 429."""
        self._reduced.add(slot.host)
        retry_after_ms, burst_ms = int(max(0.0, retry_after_s) * 1000), int(BURST_S * 1000)
        configured = self._configured(slot.host)
        was_given_up = await self._link.run(
            "host_throttled", self._prefix, slot.host, retry_after_ms, *configured, burst_ms, slot.name
        )
        self._log_back(slot, bool(was_given_up))

    async def succeeded(self, slot: Slot) -> None:
        """Record an answer."""
        if slot.is_probe or slot.host in self._reduced:
            configured = self._configured(slot.host)
            was_given_up = await self._link.run("host_succeeded", self._prefix, slot.host, *configured, slot.name)
            self._log_back(slot, bool(was_given_up))

    async def failed(self, slot: Slot, failure: str) -> None:
        """Record a failure."""
        self._reduced.add(slot.host)
        limits = self._breaker(slot.host)
        times_ms = int(limits.open_s * 1000), int(BURST_S * 1000)
        told = failure[:_FAILURE_CHARS]
        if await self._link.run("host_failed", self._prefix, slot.host, slot.name, told, limits.failures, *times_ms):
            REGISTRY_CIRCUIT_OPENED.add()
            _log.warning("registry.given_up", host=slot.host, failures=limits.failures, last_failure=told)

    def _log_back(self, slot: Slot, was_given_up: bool) -> None:  # noqa: FBT001 - an answer of Redis
        if was_given_up:
            _log.info("registry.back", host=slot.host)

    async def budgets(self) -> list[HostBudget]:
        """Return how it stands with each host that was asked of late, by name."""
        found = await self._link.run("host_list", self._prefix, may_repeat=True)
        return sorted((self._budget(told) for told in found), key=lambda budget: budget.host)

    def _budget(self, found: list[Any]) -> HostBudget:
        name, limit, rate, closed_ms, refused, recent, busy, waiting, low, enough = found
        host = name.decode()
        max_limit, max_rate = self._configured(host)
        lowered = max_rate if rate is None else float(rate)
        return HostBudget(
            host=host,
            limit=max_limit if limit is None else min(max_limit, max(1, int(float(limit)))),
            max_limit=max_limit,
            busy=busy,
            waiting=waiting,
            rate=min(lowered, max_rate) if max_rate else lowered,
            max_rate=max_rate,
            recent_rate=float(recent),
            refused=refused,
            closed_s=closed_ms / 1000,
            quotas=tuple(
                sorted(
                    [*(_low_quota(*told) for told in low), *(_enough(*told) for told in enough)], key=_by_what_is_left
                )
            ),
        )

    def _configured(self, host: str) -> tuple[int, float]:
        entry = registry_config(self._config, host)
        return entry.max_concurrency, entry.max_requests_per_s

    def _breaker(self, host: str) -> BreakerLimits:
        entry = registry_config(self._config, host)
        return BreakerLimits(failures=entry.breaker_failures, open_s=entry.breaker_open_s)

    async def _take(self, slot: Slot, deadline_s: float) -> bool:
        """Wait for the slot; return whether it is for a probe."""
        host, budget = slot.host, slot.budget
        configured, times_s = self._configured(host), (SLOT_TTL_S, _PLACE_TTL_S, self._breaker(host).open_s)
        times_ms = [int(seconds * 1000) for seconds in times_s]
        nudged = asyncio.Event()
        waiting = self._waiting.setdefault(host, deque())
        waiting.append(nudged)
        try:
            while True:
                left_ms = max(0, int((deadline_s - time.monotonic()) * 1000))
                taken, wait_ms, *told = await self._link.run(
                    "slot_take",
                    self._prefix,
                    host,
                    slot.name,
                    *configured,
                    *times_ms,
                    budget.kind,
                    budget.account,
                    left_ms,
                    may_repeat=True,
                )
                if taken == _TOO_LATE:
                    raise _too_late(host, wait_ms / 1000)
                if taken == _GIVEN_UP:
                    since_ms, failure = told
                    raise CircuitOpenError(host, since_ms / 1000, failure.decode(), wait_ms / 1000)
                before, is_reduced, is_low = told
                (self._reduced.add if is_reduced else self._reduced.discard)(host)
                (self._low.add if is_low else self._low.discard)((host, budget))
                if taken:
                    return bool(taken == _IS_PROBE)
                pause_s = max(wait_ms / 1000, _ASK_FIRST_S + before * _ASK_EACH_S)
                # Jitter, so that processes don't ask in step; not a matter of security.
                pause_s = min(pause_s, _ASK_MOST_S) * random.uniform(1.0, 1.3)  # noqa: S311
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await nudged.wait()
                nudged.clear()
        finally:
            waiting.remove(nudged)
            if not waiting:
                del self._waiting[host]

    def _nudge(self, host: str) -> None:
        for nudged in self._waiting.get(host, ()):
            if not nudged.is_set():
                nudged.set()
                return

    def _renew_while_held(self) -> None:
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.get_running_loop().create_task(self._renew())

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(SLOT_TTL_S / 3)
            if not self._held:
                return
            held = [name for slot, host in self._held.items() for name in (host, slot)]
            # Redis is away: requests go on, their slots lapse, and the next renewal takes them again.
            with contextlib.suppress(UnavailableError):
                await self._link.run("slot_renew", self._prefix, int(SLOT_TTL_S * 1000), *held, may_repeat=True)


def _low_quota(kind: bytes, left: bytes | None, window_ms: int, hold_ms: int) -> ToldQuota:
    remaining = None if left is None else int(left)
    return ToldQuota(kind=kind.decode(), remaining=remaining, window_s=window_ms / 1000, hold_s=hold_ms / 1000)


def _enough(kind: bytes, left: int, window_ms: int, limit: int) -> ToldQuota:
    return ToldQuota(kind=kind.decode(), remaining=left, window_s=window_ms / 1000, is_low=False, limit=limit)


def _by_what_is_left(quota: ToldQuota) -> tuple[bool, bool, int, str]:
    return not quota.is_low, quota.remaining is None, quota.remaining or 0, quota.kind


def _too_late(host: str, wait_s: float) -> RateLimitedError:
    """Return the error of who can't wait for as long as the host wants to be left alone."""
    until = datetime.fromtimestamp(time.time() + wait_s, UTC)
    return RateLimitedError(
        f"a request to {host}", f"it allows none before {until:%Y-%m-%d %H:%M:%S} UTC, in {wait_s:.0f} s", wait_s
    )
