"""What a build makes of refs: by what it is open afterwards. Told in docs/decisions/0014."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from cluster.digest import Digest
from cluster.fetch.access import AccessControl
from cluster.origin import MAX_ORIGINS, Needed, decode_origin, encode_origin
from cluster.ports import Authorizer
from cluster.ref import RefState


async def origin_of(
    access: AccessControl, authorizer: Authorizer, states: Iterable[RefState], *, beside: Collection[Digest]
) -> str:
    """Return the origin (:mod:`cluster.origin`) of what this caller has made of *states*.

    What was pulled is needed itself; of what was built, what that was made of: in the way that this caller is shown,
    where it was made in several. Nobody is asked, and proofs are looked up for the latter alone.

    Args:
        access: Knows the proofs.
        authorizer: Who has it made.
        states: All that went into it, whole chains.
        beside: Blobs of the chain that it is put in: they are proven with that, always.
    """
    needs: list[Needed] = []
    for state in states:
        origins = [decode_origin(text) for text in state.record.origins]
        if not origins:
            needs.append(_pulled(state))
        elif len(origins) == 1:
            needs += origins[0]
        else:
            needs += await access.first_shown(authorizer, origins)
    return encode_origin(need for need in needs if need.digest not in beside)


def origins_of(states: Iterable[RefState], *, beside: Collection[Digest]) -> tuple[str, ...]:
    """Return the origins of what is made of *states*, whoever has it made: each way in which all of them may be had.

    Who is shown all blobs of one of these could make it himself. Of two ways of which one needs all that the other
    does, and more, that one tells nothing. As many are returned as are kept of one ref.
    """
    ways: list[frozenset[Needed]] = [frozenset()]
    for state in states:
        origins = [decode_origin(text) for text in state.record.origins] or [(_pulled(state),)]
        own = [frozenset(need for need in origin if need.digest not in beside) for origin in origins]
        ways = _least(way | more for way in ways for more in own)[:MAX_ORIGINS]
    return tuple(encode_origin(way) for way in ways)


def _least(ways: Iterable[frozenset[Needed]]) -> list[frozenset[Needed]]:
    """Return those that contain no other, once each, in order."""
    distinct = list(dict.fromkeys(ways))
    return [way for way in distinct if not any(other < way for other in distinct)]


def _pulled(state: RefState) -> Needed:
    blob = state.record.blob
    return Needed(
        digest=blob.digest,
        size_bytes=blob.size_bytes,
        providers=tuple(handle for handle in state.providers if not handle.is_farm),
        came_from=state.present.source if state.present is not None else "",
    )
