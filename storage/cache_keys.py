"""Cache keys in Redis."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.digest import Digest, digest_of
from cluster.solver.values import CacheRecord, Result
from storage.codec import Codec
from storage.keys import Keys
from storage.link import RedisLink

#: Records that one key keeps.
RECORDS = 16
#: Seconds for which a key or record is kept without being used.
_KEPT_S = 30 * 24 * 3600
_US = 1_000_000

_RESULT: Codec[Result] = Codec("result", Result)


class RedisKeyStore:
    """Implements :class:`cluster.solver_ports.KeyStore`; each method is one script, so one atomic step.

    A record's ID is the digest of its result, so that publishing an equal one again makes no second record.
    """

    def __init__(self, link: RedisLink, keys: Keys) -> None:
        self._link = link
        self._prefix = keys.prefix

    async def lookup(self, keys: Sequence[Digest]) -> list[CacheRecord]:
        """Return the records under any of *keys*, most recent first."""
        found = await self._link.run("cache_lookup", self._prefix, _KEPT_S, *keys, may_repeat=True)
        # By the digits, not by the seconds: these are coarser.
        found.sort(key=lambda record: int(record[2]), reverse=True)
        return [_record(record_id.decode(), _RESULT.decode(result), stamp) for record_id, result, stamp in found]

    async def publish(self, keys: Sequence[Digest], result: Result) -> CacheRecord:
        """Record *result* under each of *keys*."""
        record_id, payload = name_result(result)
        limits = (RECORDS, _KEPT_S)
        stamp = await self._link.run("cache_publish", self._prefix, record_id, payload, *limits, *keys, may_repeat=True)
        return _record(record_id, result, stamp)

    async def forget(self, record: CacheRecord) -> bool:
        """Forget a record, unless it was published again."""
        stamp = round(record.created_wall_s * _US)
        # A repeated call would tell that it was not this one; it is never wrong to forget once.
        return bool(await self._link.run("cache_forget", self._prefix, record.id, stamp, may_repeat=True))


def name_result(result: Result) -> tuple[str, bytes]:
    """Return the ID of a result's record, and the result's payload."""
    payload = _RESULT.encode(result)
    return digest_of(payload), payload


def _record(record_id: str, result: Result, stamp: bytes) -> CacheRecord:
    # Microseconds since 1970 have less than 53 bits for centuries: the way there and back is exact.
    return CacheRecord(id=record_id, result=result, created_wall_s=int(stamp) / _US)
