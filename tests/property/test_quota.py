"""What registries say is left, in every spelling, and the pace that follows from it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.quota import LOW_PART, Pace, Quota, pace_of, parse_quotas

NOW_S = 1_800_000_000.0
DAY_S = 86400
COUNTS = st.integers(0, 10**9)
SECONDS = st.integers(1, DAY_S)
#: Of a policy, with what would end it elsewhere.
NAMES = st.text(st.sampled_from('ab ;,=r\\"'), max_size=6).map(lambda s: s.replace("\\", "\\\\").replace('"', '\\"'))
QUOTAS = st.builds(
    Quota,
    remaining=COUNTS,
    limit=st.none() | COUNTS,
    reset_s=st.none() | st.floats(0, DAY_S),
    window_s=st.none() | st.floats(1, DAY_S),
)
SLOWEST_S = st.floats(0.1, 3600)


class Headers(dict):
    """As of an answer: case-insensitive."""

    def __init__(self, **headers):
        super().__init__({name.lower().replace("_", "-"): value for name, value in headers.items()})

    def get(self, name, default=None):
        return super().get(name.lower(), default)


def parse(**headers):
    return parse_quotas(Headers(**headers), now_wall_s=NOW_S)


@given(st.lists(st.tuples(NAMES, COUNTS, SECONDS, COUNTS, SECONDS), min_size=1, max_size=3, unique_by=lambda e: e[0]))
def test_the_structured_headers_are_read(entries):
    """Any number of limits, in any order, by name; whatever the names are."""
    found = parse(
        RateLimit=", ".join(f'"{name}";r={left};t={reset}' for name, left, reset, _, _ in entries),
        RateLimit_Policy=",".join(
            f'"{name}"; q={limit}; w={window}' for name, _, _, limit, window in reversed(entries)
        ),
    )

    assert found == tuple(
        Quota(remaining=left, limit=limit, reset_s=reset, window_s=window) for _, left, reset, limit, window in entries
    )


@given(COUNTS, SECONDS, COUNTS, SECONDS)
def test_the_seventh_draft_is_read(left, reset, limit, window):
    """All in one header, each by its name."""
    (found,) = parse(
        RateLimit=f"limit={limit}, remaining={left}, reset={reset}", RateLimit_Policy=f"{limit};w={window}"
    )

    assert found == Quota(remaining=left, limit=limit, reset_s=reset, window_s=window)


@given(COUNTS, SECONDS, COUNTS, st.booleans())
def test_three_headers_are_read(left, reset, limit, is_moment):
    """The first drafts'; a reset that can't be a duration is a moment."""
    (found,) = parse(
        RateLimit_Limit=f"{limit}, {limit};w=60",
        RateLimit_Remaining=f"{left}",
        RateLimit_Reset=str(int(NOW_S) + reset if is_moment else reset),
    )

    assert found == Quota(remaining=left, limit=limit, reset_s=reset, window_s=60.0)


def test_docker_hub_is_read():
    """Two headers, each with its window, and no reset."""
    (found,) = parse(RateLimit_Limit="100;w=21600", RateLimit_Remaining="76;w=21600", Docker_RateLimit_Source="::1")

    assert found == Quota(remaining=76, limit=100, window_s=21600.0)


@settings(max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from(["RateLimit", "RateLimit_Policy", "RateLimit_Limit", "RateLimit_Remaining", "RateLimit_Reset"]),
        st.text(st.sampled_from('"\\;,= rtqw0123456789.-elmnsi\x00é'), max_size=60) | st.text(),
    ),
    SLOWEST_S,
)
def test_nothing_that_a_registry_sends_does_harm(headers, slowest_s):
    """What can't be read says nothing; what can is a pace within bounds."""
    found = parse(**headers)

    for quota in found:
        assert quota.remaining >= 0
        assert quota.reset_s is None or 0 <= quota.reset_s <= DAY_S
    pace = pace_of(found, slowest_s=slowest_s)
    assert pace is None or (0 < pace.every_s <= slowest_s and 0 <= pace.hold_s <= pace.for_s <= DAY_S)


@given(QUOTAS, SLOWEST_S)
def test_enough_is_no_reason_to_go_slowly(quota, slowest_s):
    """Only where little is left is there a pace."""
    if quota.limit is not None and quota.remaining > 0 and quota.remaining >= quota.limit * LOW_PART:
        assert pace_of([quota], slowest_s=slowest_s) is None


@given(QUOTAS, SLOWEST_S)
def test_what_is_left_lasts_until_there_is_more(quota, slowest_s):
    """At its pace no more is asked before the reset than is left, unless that pace would be slower than is allowed."""
    pace = pace_of([quota], slowest_s=slowest_s)
    if pace is not None and pace.every_s < slowest_s and quota.remaining:
        assert pace.for_s / pace.every_s <= quota.remaining * (1 + 1e-9)


@given(QUOTAS, SLOWEST_S)
def test_nobody_stands_still_on_a_guess(quota, slowest_s):
    """Only where nothing is left, and the registry itself says until when, does nobody ask."""
    pace = pace_of([quota], slowest_s=slowest_s)
    if pace is not None and pace.hold_s:
        assert (quota.remaining, quota.reset_s) == (0, pace.hold_s)


@given(st.lists(QUOTAS, max_size=4), SLOWEST_S)
def test_the_tightest_limit_counts(quotas, slowest_s):
    """Of several limits each holds."""
    pace = pace_of(quotas, slowest_s=slowest_s)
    each = [one for quota in quotas if (one := pace_of([quota], slowest_s=slowest_s)) is not None]

    assert (pace is None) == (not each)
    assert pace is None or pace.hold_s == max(one.hold_s for one in each)


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        (Quota(remaining=21, limit=100, window_s=21600.0), None),
        (Quota(remaining=19, limit=100, window_s=21600.0), Pace(remaining=19, every_s=10.0, hold_s=0.0, for_s=21600.0)),
        (Quota(remaining=0, limit=100, window_s=21600.0), Pace(remaining=0, every_s=10.0, hold_s=0.0, for_s=21600.0)),
        (Quota(remaining=10, limit=100, reset_s=5.0), Pace(remaining=10, every_s=0.5, hold_s=0.0, for_s=5.0)),
        (Quota(remaining=0, limit=100, reset_s=1800.0), Pace(remaining=0, every_s=10.0, hold_s=1800.0, for_s=1800.0)),
    ],
    ids=str,
)
def test_paces(quota, expected):
    """As an administrator would have it."""
    assert pace_of([quota], slowest_s=10.0) == expected


def test_none_is_heeded_where_that_is_turned_off():
    """``quota_pace_s = 0``."""
    assert pace_of([Quota(remaining=0, limit=100, reset_s=5.0)], slowest_s=0.0) is None
