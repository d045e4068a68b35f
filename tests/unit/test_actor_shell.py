"""What a shell does with a call: a payload in, a payload out, whatever happens in between."""

import asyncio
from dataclasses import dataclass

import pytest

from actors.replies import ERROR, RESULT, unwrap
from actors.shell import answers
from cluster.errors import BlobNotFoundError, InternalError, MalformedPayloadError
from cluster.wire import encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    number: int


class Shell:
    def __init__(self, work):
        self.work = work

    @answers("ask", Ask)
    async def ask(self, request):
        return self.work(request.number)


async def call(work, payload=None):
    reply = await Shell(work).ask(encode("ask", Ask(number=20)) if payload is None else payload)
    return unwrap("ask", int, reply)


def raises(error):
    def work(_number):
        raise error

    return work


async def test_a_result_comes_back():
    """Payload to value to payload to value."""
    assert await call(lambda number: number + 1) == 21


async def test_our_errors_come_back_as_themselves():
    """With their arguments."""
    with pytest.raises(BlobNotFoundError) as caught:
        await call(raises(BlobNotFoundError("sha256:x", "r.example/app")))
    assert caught.value.where == "r.example/app"


@pytest.mark.parametrize("error", [RuntimeError("surprise"), SystemExit(3), KeyboardInterrupt()])
async def test_what_is_not_ours_is_our_bug_and_never_leaves_as_it_is(error):
    """SystemExit in an actor method would hang this call and all later ones."""
    with pytest.raises(InternalError, match=type(error).__name__):
        await call(raises(error))


async def test_a_malformed_request_is_an_answer():
    """Truncated: a typed error, at the caller."""
    with pytest.raises(MalformedPayloadError):
        await call(lambda number: number, payload=encode("ask", Ask(number=20))[:-1])


async def test_a_cancellation_is_raised():
    """Ray must see it."""
    with pytest.raises(asyncio.CancelledError):
        await call(raises(asyncio.CancelledError()))


@pytest.mark.parametrize("reply", [b"", RESULT, ERROR, b"\x07nonsense"])
def test_a_truncated_reply_is_a_typed_error(reply):
    """Whatever is left of it."""
    with pytest.raises(MalformedPayloadError):
        unwrap("ask", int, reply)
