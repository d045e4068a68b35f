"""Where the Redis is that takes writes: one server, the primary that sentinels name, or a node of a cluster.

Only what is decided is here: whom to connect to, what to ask, and what the answers mean. The links connect.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from hiredis import ReplyError

from cluster.errors import UnavailableError
from cluster.redis_url import Place, RedisKind
from storage.address import RedisAddress
from storage.protocol import Command
from storage.translate import error_code

#: Seconds for one of several places to answer, before the next is asked.
_TRY_S = 2.0


@dataclass(frozen=True, slots=True)
class Dial:
    """Connect to *address* and send *greeting*; the answer is the replies to it, or why there are none."""

    address: RedisAddress
    greeting: list[Command]
    timeout_s: float


#: What is tried, one after the other; each is answered. The last one is the primary.
Search = Generator[Dial, list[Any] | UnavailableError, None]


class RedisPrimary:
    """Where the primary is, as far as one client knows. It moves: by a fail-over, or with a cluster's slots.

    All keys of a farm are in one slot of a cluster: of its nodes, too, exactly one takes writes.
    """

    def __init__(self, named: RedisAddress) -> None:
        self._named = named
        self._kind = named.kind
        #: Sentinels or nodes to ask, the best first.
        self._places = list(named.places)
        self._address = named

    @property
    def address(self) -> RedisAddress:
        """Return where it was last seen; before that, as it is configured."""
        return self._address

    def search(self) -> Search:
        """Look for the primary.

        Raises:
            UnavailableError: there is none just now. Its cause is the error reply, if one was the reason.
        """
        if self._kind is RedisKind.SENTINEL:
            yield from self._ask_sentinels()
        failure: UnavailableError | None = None
        for address in self._candidates():
            answer = yield Dial(address, [*address.greeting(), *self._questions()], self._patience_s())
            failure = self._refusal(address, answer)
            if failure is None:
                self._settle_on(address, answer)
                return
        raise failure or UnavailableError(self._named.shown, "no place to look for it is known")

    def bounced(self, error: ReplyError) -> None:
        """Learn from the answer of a server that left a command undone because it is not the primary, or not yet."""
        if error_code(error) == "MOVED":
            host, _, port = str(error).split(" ")[2].rpartition(":")
            self._kind = RedisKind.CLUSTER  # whatever the URL took it for
            self._prefer(Place(_host(host) or self._address.host, int(port)))
        elif self._kind is RedisKind.CLUSTER:
            # It may be cut off from the others, who have another one by now.
            self._places.append(self._places.pop(0))

    def _ask_sentinels(self) -> Search:
        named = self._named
        said = []
        for place in tuple(self._places):
            # Sentinels may want the same password, or none.
            question: Command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", named.primary)
            answer = yield Dial(named.moved_to(place), [*named.login(), question], self._patience_s())
            match answer:
                case [*_, [bytes(host), bytes(port)]]:
                    self._prefer(place)
                    self._address = named.moved_to(Place(host.decode(), int(port)))
                    return
                case [*_, None]:
                    said.append(f"{place} knows none of that name")
                case [*_, reply]:
                    said.append(f"{place} says {reply}")
                case UnavailableError():
                    said.append(f"{place}: {answer.reason}")
        raise UnavailableError(f"Redis {named.primary!r}", f"no sentinel tells where it is ({'; '.join(said)})")

    def _candidates(self) -> list[RedisAddress]:
        if self._kind is RedisKind.CLUSTER:
            return [self._address.moved_to(place) for place in self._places]
        return [self._address]

    def _questions(self) -> list[Command]:
        match self._kind:
            case RedisKind.SERVER:
                return []
            case RedisKind.SENTINEL:
                return [("ROLE",)]
            case RedisKind.CLUSTER:
                return [("CLUSTER", "SLOTS")]

    def _refusal(self, address: RedisAddress, answer: list[Any] | UnavailableError) -> UnavailableError | None:
        if isinstance(answer, UnavailableError):
            return answer
        for reply in answer:
            if isinstance(reply, ReplyError):
                refusal = UnavailableError(address.shown, str(reply))
                refusal.__cause__ = reply
                return refusal
        if self._kind is RedisKind.SENTINEL and answer[-1][0] != b"master":
            return UnavailableError(address.shown, "it is a replica: a fail-over is under way")
        return None

    def _settle_on(self, address: RedisAddress, answer: list[Any] | UnavailableError) -> None:
        self._address = address
        if self._kind is RedisKind.CLUSTER and not isinstance(answer, UnavailableError):
            nodes = [Place(_host(node[0]) or address.host, node[1]) for slots in answer[-1] for node in slots[2:]]
            # Those that are configured stay known: a cluster may move away node by node, and come back.
            self._places = [*dict.fromkeys([Place(address.host, address.port), *nodes, *self._named.places])]

    def _prefer(self, place: Place) -> None:
        self._places = [place, *(other for other in self._places if other != place)]

    def _patience_s(self) -> float:
        """Return how long one place may take: less than a command, where there are others to ask."""
        timeout_s = self._named.timeout_s
        return timeout_s if self._kind is RedisKind.SERVER else min(timeout_s, _TRY_S)


def _host(told: str | bytes | None) -> str:
    """Return the host that a cluster tells; "" where it leaves it to the client, which knows how it got there."""
    host = told.decode() if isinstance(told, bytes) else told or ""
    return "" if host == "?" else host
