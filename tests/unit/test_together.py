"""What several ask at the same moment goes into one request."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import UnavailableError
from cluster.fetch.together import Together
from tests.doubles.stores import eventually


class Requests:
    """Answers requests when told to: with the number of the request that an item was in."""

    def __init__(self):
        self.made = []
        self.answers = []
        self.together = Together(self._request)

    async def _request(self, group, items):
        self.made.append((group, list(items)))
        answer = asyncio.get_running_loop().create_future()
        self.answers.append(answer)
        number = len(self.made)
        await answer
        return [(number, item) for item in items]

    def ask(self, item, group="g"):
        return asyncio.create_task(self.together.ask(group, item))

    async def are(self, *made):
        """Wait until these have been made, in order, and no other."""
        await eventually(lambda: len(self.made) >= len(made))
        await asyncio.sleep(0)
        assert self.made == list(made)


async def test_what_comes_meanwhile_goes_into_the_next():
    """One request at a time; who asks for what is being asked for is told what is so afterwards."""
    requests = Requests()
    first = [requests.ask(item) for item in ("a", "b", "a")]
    await requests.are(("g", ["a", "b"]))
    later = [requests.ask(item) for item in ("c", "a")]
    await requests.are(("g", ["a", "b"]))
    requests.answers[0].set_result(None)
    assert await asyncio.gather(*first) == [(1, "a"), (1, "b"), (1, "a")]
    await requests.are(("g", ["a", "b"]), ("g", ["c", "a"]))
    requests.answers[1].set_result(None)
    assert await asyncio.gather(*later) == [(2, "c"), (2, "a")]
    assert not requests.together._next


async def test_groups_do_not_wait_for_one_another():
    """Each has a request of its own."""
    requests = Requests()
    one, other = requests.ask("a", "one"), requests.ask("a", "other")
    await requests.are(("one", ["a"]), ("other", ["a"]))
    requests.answers[1].set_result(None)
    assert await other == (2, "a")
    assert not one.done()
    requests.answers[0].set_result(None)
    assert await one == (1, "a")


async def test_an_error_is_told_to_those_whose_request_it_ended():
    """Each gets one of its own; who came later has another request."""
    requests = Requests()
    both = [requests.ask(item) for item in ("a", "b")]
    await requests.are(("g", ["a", "b"]))
    late = requests.ask("a")
    await requests.are(("g", ["a", "b"]))
    requests.answers[0].set_exception(UnavailableError("redis", "no answer"))
    errors = await asyncio.gather(*both, return_exceptions=True)
    assert [str(error) for error in errors] == [str(UnavailableError("redis", "no answer"))] * 2
    assert errors[0] is not errors[1]
    await requests.are(("g", ["a", "b"]), ("g", ["a"]))
    requests.answers[1].set_result(None)
    assert await late == (2, "a")


async def test_who_is_cancelled_leaves_the_others_alone():
    """Whoever asked first, for the same thing or another; also where nobody is left."""
    requests = Requests()
    first, same, other = requests.ask("a"), requests.ask("a"), requests.ask("b")
    await requests.are(("g", ["a", "b"]))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    requests.answers[0].set_result(None)
    assert await asyncio.gather(same, other) == [(1, "a"), (1, "b")]
    alone = requests.ask("c")
    await requests.are(("g", ["a", "b"]), ("g", ["c"]))
    alone.cancel()
    requests.answers[1].set_exception(UnavailableError("redis", "no answer"))
    with pytest.raises(asyncio.CancelledError):
        await alone
    await eventually(lambda: not requests.together._next)
