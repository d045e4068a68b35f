"""The renewing thread's rounds: what is renewed when. What it promises is in the contract of flights."""

import asyncio

import pytest

from cluster.errors import UnavailableError
from storage.renewer import ThreadFlightRenewer
from tests.doubles.stores import eventually

#: A third of it is far off.
TTL_S = 600.0


class Renewals:
    """A store that notes what it is asked to renew, and answers when a test says so."""

    def __init__(self):
        self.asked = []
        self.is_away = False

    def renew(self, kept, timeout_s):
        self.asked.append([what.key for what, _ttl_s in kept])
        if self.is_away:
            raise UnavailableError("redis", "it is away")
        return [True] * len(kept)

    def close(self):
        pass


@pytest.fixture
async def store():
    return Renewals()


@pytest.fixture
async def renewer(store):
    renewer = ThreadFlightRenewer(store)
    yield renewer
    await asyncio.to_thread(renewer.close)


async def test_what_is_new_is_renewed_by_itself(store, renewer):
    """Who begins to wait for one more flight doesn't renew the others before their turn."""
    for number, key in enumerate("abc", start=1):
        renewer.keep_waiting(key, worker="w", ttl_s=TTL_S)
        await eventually(lambda number=number: len(store.asked) == number)

    assert store.asked == [["a"], ["b"], ["c"]]


async def test_a_round_renews_all(store, renewer):
    """After a third of the shortest time to live all are renewed together."""
    renewer.keep_waiting("a", worker="w", ttl_s=TTL_S)
    await eventually(lambda: len(store.asked) == 1)
    renewer.keep_waiting("b", worker="w", ttl_s=0.15)

    await eventually(lambda: sorted(store.asked[-1]) == ["a", "b"])


async def test_what_was_not_answered_is_asked_for_with_the_next_round(store, renewer):
    """While the store is away nothing new is asked for by itself; the rounds, more often then, ask for all."""
    store.is_away = True
    renewer.keep_waiting("a", worker="w", ttl_s=0.5)
    await eventually(lambda: len(store.asked) >= 2)
    renewer.keep_waiting("b", worker="w", ttl_s=0.5)
    await eventually(lambda: sorted(store.asked[-1]) == ["a", "b"])

    assert ["b"] not in store.asked
