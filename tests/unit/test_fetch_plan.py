"""How a blob is cut, and what a source's failure means."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import (
    BlobNotFoundError,
    CircuitOpenError,
    DigestMismatchError,
    InternalError,
    LeaseLostError,
    RateLimitedError,
    SessionGoneError,
    SizeMismatchError,
    UnavailableError,
)
from cluster.fetch.plan import (
    MAX_PARTS,
    MIN_PART_BYTES,
    GiveUp,
    NextSource,
    SourceState,
    StartOver,
    TryAgain,
    missing_parts,
    part_size,
    parts_of,
    runs_of,
)

MIB = 1024**2
RESET = UnavailableError("r", "reset")
ABSENT = BlobNotFoundError("d", "r")


@given(size=st.integers(0, 5 * 1024**4), configured=st.integers(1, 5 * 1024**3))
def test_parts_keep_within_s3s_limits(size, configured):
    """From 5 MiB up, at most 10,000 of them, whole MiB where the blob asks for more than is configured."""
    part_bytes = part_size(size, configured)
    assert part_bytes >= max(MIN_PART_BYTES, configured)
    assert -(-size // part_bytes) <= MAX_PARTS
    assert part_bytes in (MIN_PART_BYTES, configured) or part_bytes % MIB == 0


@given(size=st.integers(0, 10_000), part_bytes=st.integers(1, 3000), data=st.data())
def test_parts_cover_the_blob_and_runs_cover_the_parts(size, part_bytes, data):
    """No byte twice, none left out; what is uploaded already is left out."""
    parts = parts_of(size, part_bytes)
    assert [p.number for p in parts] == list(range(1, len(parts) + 1))
    assert sum(p.length_bytes for p in parts) == size
    assert all(a.end == b.offset for a, b in itertools.pairwise(parts))
    there = data.draw(st.sets(st.sampled_from(parts))) if parts else set()
    missing = missing_parts(parts, {p.number: p.length_bytes for p in there})
    assert set(missing) == set(parts) - there
    longest = data.draw(st.sampled_from([None, 1, 2, 3]))
    runs = runs_of(missing, max_parts=longest)
    assert [p for run in runs for p in run.parts] == list(missing)
    for run in runs:
        assert longest is None or len(run.parts) <= longest
        assert run.length_bytes == sum(p.length_bytes for p in run.parts)


def test_a_part_of_another_length_is_missing():
    """It was cut short, or belongs to another plan."""
    parts = parts_of(25, 10)
    assert missing_parts(parts, {1: 10, 2: 9, 3: 5}) == (parts[1],)


def state(sources=2, **more):
    return SourceState(sources, **{"attempts": 3, "budget_s": 100.0, **more})


def test_transient_errors_are_tried_again_with_growing_pauses():
    """Twice at this source, then the next, from which it counts anew."""
    s = state()
    pauses = [s.failed(RESET, draw=0.5) for _ in range(2)]
    assert [p.delay_s for p in pauses] == pytest.approx([0.2, 0.4])
    assert s.failed(RESET, draw=0.5) == NextSource()
    assert s.index == 1
    assert isinstance(s.failed(RESET, draw=0.5), TryAgain)


def test_progress_refills_the_tries_and_not_the_budget():
    """A source that comes on a little each time is kept, for as many seconds of pauses as are allowed."""
    s = state(sources=1, budget_s=1.0)
    decisions = []
    for _ in range(9):
        s.progressed()
        decisions.append(s.failed(RESET, draw=0.5))
    assert sum(d.delay_s for d in decisions if isinstance(d, TryAgain)) <= 1.0
    assert isinstance(decisions[-1], GiveUp)


def test_a_retry_after_is_a_floor():
    """The registry is obeyed, unless it asks for more than the budget has."""
    limited = RateLimitedError("r", "429", 7.0)
    assert state().failed(limited, draw=0.0) == TryAgain(delay_s=7.0)
    assert state().failed(limited, draw=0.9).delay_s > 7.0
    assert state(budget_s=5.0).failed(limited, draw=0.0) == NextSource()


def test_a_host_that_is_given_up_is_left_at_once():
    """The next source is asked; where there is none, the error says more than a session that is gone does."""
    given_up = CircuitOpenError("r.example", 1.0, "HTTP 500", 5.0)
    sources = SourceState(2, attempts=5, budget_s=60)

    assert sources.failed(given_up, draw=0.5) == NextSource()
    assert sources.failed(SessionGoneError("s"), draw=0.5) == GiveUp(error=given_up)


@pytest.mark.parametrize(
    ("error", "decision"),
    [
        (ABSENT, NextSource()),
        (SessionGoneError("s"), NextSource()),
        (SizeMismatchError("d", 1, 2, "r"), NextSource()),
        (DigestMismatchError("d", "e", "r"), StartOver()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_definite_errors_go_to_the_next_source(error, decision):
    """At once; only wrong bytes make what came so far worthless."""
    assert state().failed(error, draw=0.0) == decision


def test_what_is_no_sources_fault_ends_it():
    """Another source would not help."""
    error = LeaseLostError("l1")
    assert state().failed(error, draw=0.0) == GiveUp(error=error)


@pytest.mark.parametrize("errors", [[RESET, ABSENT, SessionGoneError("s")], [SessionGoneError("s"), ABSENT, RESET]])
def test_the_most_telling_error_is_kept(errors):
    """Definite before transient before "nobody could answer", in whatever order they came."""
    s = state(sources=3, attempts=1)
    decisions = [s.failed(error, draw=0.0) for error in errors]
    assert decisions[-1] == GiveUp(error=ABSENT)


def test_a_fetch_without_a_source_is_our_bug():
    """Who plans has checked."""
    with pytest.raises(InternalError):
        state(sources=0)
