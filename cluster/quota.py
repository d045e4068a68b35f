"""What a registry says is left of the requests that it allows, and how fast to go on with it: pure decisions.

Understood are the IETF's ``RateLimit`` and ``RateLimit-Policy`` (draft-ietf-httpapi-ratelimit-headers, in its
structured form and in that of its seventh draft), the three headers of its first drafts (``RateLimit-Limit``,
``-Remaining`` and ``-Reset``), and Docker Hub's use of two of these: ``ratelimit-remaining: 76;w=21600``, without a
time of reset.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

#: Little is left when it is less than this part of all, or, where the registry doesn't say how many there are, less
#: than so many.
LOW_PART = 0.2
LOW_REQUESTS = 10
#: Longest time that is believed, in seconds.
_LONGEST_S = 86400.0
#: Seconds for which a pace holds where the registry says nothing of time.
_UNTOLD_S = 60.0
#: Resets from here on are moments since the Unix epoch, not seconds from now (GitLab).
_EPOCH_S = 1_000_000_000
_READ_CHARS = 1000

_TEXT = r'"(?:[^"\\]|\\.)*"'
_PARAMETER = rf";\s*[a-z*][a-z0-9_.*-]*(?:=(?:{_TEXT}|[^\s,;\"]*))?\s*"
_ITEM = re.compile(rf"\s*({_TEXT}|[^\s,;\"=]+)\s*((?:{_PARAMETER})*)(?:,|\Z)")
_NUMBER = re.compile(r"\s*(\d{1,15})(?:\.\d*)?\s*(?:[,;]|\Z)")
_NAMED_NUMBER = re.compile(r"(?:\A|[\s,;])([a-z]+)=(\d{1,15})(?=[\s,;.]|\Z)")


class Headers(Protocol):
    """Of an answer, case-insensitive, whichever client received it."""

    def get(self, name: str, default: str, /) -> str:
        """Return a header's value, the first where there are several."""
        ...


class RequestKind(StrEnum):
    """What registries count apart: Docker Hub counts pulls of manifests and nothing else."""

    MANIFEST = "manifest"
    BLOB = "blob"
    PUSH = "push"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Of what a request takes: of one kind, by one account."""

    kind: RequestKind = RequestKind.BLOB
    #: Who the caller is to the registry, as :meth:`cluster.ports.Authorizer.identity` says.
    account: str = "anonymous"


#: Of what a request takes whose caller doesn't say.
ANYBODYS = Budget()


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What one answer says of one limit."""

    remaining: int
    #: Requests in a window; None: the registry doesn't say.
    limit: int | None = None
    #: Seconds until all are there again, as the registry says.
    reset_s: float | None = None
    #: Length of the window in seconds.
    window_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast to go on while little is left."""

    #: Requests that are left of what sets the pace.
    remaining: int
    #: Seconds between two requests.
    every_s: float
    #: Seconds in which no request is of use.
    hold_s: float
    #: Seconds after which all that is forgotten.
    for_s: float


def parse_quotas(headers: Headers, *, now_wall_s: float) -> tuple[Quota, ...]:
    """Return what an answer's headers say, of each limit; nothing where they say nothing that can be read.

    Args:
        headers: Of the answer.
        now_wall_s: Seconds since the epoch by this machine's clock, for resets that are moments.
    """
    current, policy = (headers.get(name, "")[:_READ_CHARS].lower() for name in ("RateLimit", "RateLimit-Policy"))
    return tuple(_structured(current, policy)) or tuple(_joined(current, policy)) or tuple(_apart(headers, now_wall_s))


def pace_of(quotas: Sequence[Quota], *, slowest_s: float) -> Pace | None:
    """Return the pace at which what is left lasts until there is more; None where there is enough.

    No slower than one request in *slowest_s* seconds, however little is left: who has one request left of six hours'
    had better make it. Where none is left, and the registry says until when, nobody need ask before.
    """
    paces = [pace for quota in quotas if slowest_s > 0 and (pace := _pace(quota, slowest_s)) is not None]
    return max(paces, key=lambda pace: (pace.hold_s, pace.every_s), default=None)


def tightest(quotas: Sequence[Quota]) -> Quota | None:
    """Return the quota of which the least part is left, or where parts aren't told, the fewest; None of none."""
    return min(quotas, key=lambda quota: (_part_left(quota), quota.remaining), default=None)


def told_for_s(quota: Quota) -> float:
    """Return the seconds for which what a registry said of a quota may be told: until all is there again, or so."""
    told = quota.reset_s if quota.reset_s is not None else quota.window_s
    return _UNTOLD_S if told is None else min(told, _LONGEST_S)


def _part_left(quota: Quota) -> float:
    return quota.remaining / quota.limit if quota.limit else 1.0


def _pace(quota: Quota, slowest_s: float) -> Pace | None:
    low = LOW_REQUESTS if quota.limit is None else max(1.0, quota.limit * LOW_PART)
    if quota.remaining >= low:
        return None
    for_s = told_for_s(quota)
    if for_s <= 0:
        return None
    every_s = min(slowest_s, for_s / max(1, quota.remaining))
    hold_s = for_s if quota.remaining == 0 and quota.reset_s else 0.0
    return Pace(remaining=quota.remaining, every_s=every_s, hold_s=hold_s, for_s=for_s)


# -- the spellings ---------------------------------------------------------------------------------------


def _structured(current: str, policy: str) -> Iterator[Quota]:
    """``RateLimit: "default";r=50;t=30`` with ``RateLimit-Policy: "default";q=100;w=60``."""
    policies = dict(_items(policy))
    for name, told in _items(current):
        if "r" in told:
            of_it = policies.get(name, {})
            reset_s = told.get("t")
            yield Quota(
                remaining=told["r"],
                limit=of_it.get("q"),
                reset_s=None if reset_s is None else min(float(reset_s), _LONGEST_S),
                window_s=_seconds(of_it.get("w")),
            )


def _joined(current: str, policy: str) -> Iterator[Quota]:
    """``RateLimit: limit=100, remaining=50, reset=5`` with ``RateLimit-Policy: 100;w=60``."""
    told = {name: int(value) for name, value in _NAMED_NUMBER.findall(current)}
    if "remaining" in told:
        yield Quota(
            remaining=told["remaining"],
            limit=told.get("limit"),
            reset_s=_seconds(told.get("reset")),
            window_s=_seconds(_window(policy)),
        )


def _apart(headers: Headers, now_wall_s: float) -> Iterator[Quota]:
    """``RateLimit-Remaining: 50``, ``RateLimit-Limit: 100``, ``RateLimit-Reset: 5``, each perhaps with ``;w=60``."""
    limit, remaining, reset = (
        headers.get(f"RateLimit-{name}", "")[:_READ_CHARS].lower() for name in ("Limit", "Remaining", "Reset")
    )
    left, reset_s = _number(remaining), _number(reset)
    if left is None:
        return
    if reset_s is not None and reset_s >= _EPOCH_S:
        reset_s = max(0, int(reset_s - now_wall_s))
    window = _window(remaining)
    yield Quota(
        remaining=left,
        limit=_number(limit),
        reset_s=_seconds(reset_s),
        window_s=_seconds(_window(limit) if window is None else window),
    )


def _items(text: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Take a list apart that is structured as RFC 9651 says, of which names and whole numbers are of interest."""
    start = 0
    while start < len(text) and (found := _ITEM.match(text, start)) is not None:
        start = found.end()
        yield found[1].strip('"'), {name: int(value) for name, value in _NAMED_NUMBER.findall(found[2])}


def _number(text: str) -> int | None:
    found = _NUMBER.match(text)
    return int(found[1]) if found else None


def _window(text: str) -> int | None:
    return next((int(value) for name, value in _NAMED_NUMBER.findall(text) if name == "w"), None)


def _seconds(value: int | None) -> float | None:
    return None if value is None else min(float(value), _LONGEST_S)
