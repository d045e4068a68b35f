"""Calls of tenants within one number: shares, and room for who comes late."""

import random

import pytest

from cluster.fair.quota import CallQuota


@pytest.mark.parametrize("seed", range(10))
def test_calls_stay_within_their_number_and_leave_room_for_who_comes_late(seed):
    """However tenants come and go: never more than the limit, never all of it one's, and none is remembered."""
    rng, limit = random.Random(seed), 40  # noqa: S311 - a test's schedule
    quota, calls = CallQuota(limit), []
    for _ in range(2000):
        tenant = rng.choice("abcde")
        before = quota.of(tenant)
        if rng.random() < 0.6:
            if quota.try_begin(tenant):
                calls.append(tenant)
            else:
                assert before >= limit - len(calls) > 0
        elif calls:
            quota.end(calls.pop(rng.randrange(len(calls))))
        assert quota.calls == len(calls) < limit
        assert all(quota.of(one) == calls.count(one) for one in "abcde")
        assert quota.try_begin("late")
        quota.end("late")
    for tenant in calls:
        quota.end(tenant)
    assert not quota._calls


@pytest.mark.parametrize(("tenants", "share"), [(1, 20), (3, 10), (7, 5)])
def test_tenants_that_ask_for_all_they_can_get_have_equal_shares(tenants, share):
    """Alone half, two of them a third each, and so on."""
    quota = CallQuota(40)
    for _ in range(40):
        for tenant in range(tenants):
            quota.try_begin(str(tenant))
    assert {quota.of(str(tenant)) for tenant in range(tenants)} == {share}
