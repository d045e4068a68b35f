"""What must hold of a farm once nobody wants anything of it: after every scenario that breaks it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

import storage.keys
from cluster.digest import Digest
from cluster.lease import ref_resource
from cluster.ref import BlobRecord
from storage.blobs import S3ContentStore
from storage.connect import connect
from storage.refs import BLOB
from storage.services.process import FARM_MARK, marked_pids
from storage.services.state_dir import StateDir
from tests.doubles.builds import BuildFarm
from tests.doubles.observed import eventually
from tests.doubles.registry import Image

MIB = 1024 * 1024
#: A row of the table in :mod:`storage.keys`: a key, then its type and how long it lasts.
_ROW = re.compile(r"\| ``([^`]+)`` \| (\w+)([^|]*)\|")
#: A word of a key that stands for anything.
_ANYTHING = re.compile(r"([A-Z]{2,})")
_BATCH = 500

Ask = Callable[..., Awaitable[Any]]


@dataclass(kw_only=True)
class CheckedFarm(BuildFarm):
    """A farm whose invariants are checked from outside."""

    store: S3ContentStore

    async def assert_consistent(self, image: Image | None = None) -> None:
        """I2, I3, I4 and I9: what is recorded is true, what is held is there, and nothing is left behind."""
        await self._assert_nothing_under_way()
        async with self._asking() as ask:
            await self._assert_present_is_whole(ask)
            await self._assert_one_record_each(ask, image)
            await self._assert_held_is_there(ask)
            await self._assert_keys_are_known(ask)
        await self._assert_every_process_is_somebody()

    def processes(self) -> set[int]:
        """Return the pids of all of the farm's processes."""
        mark = StateDir(self.running.state_dir).farm_id()
        return set(marked_pids({FARM_MARK: mark}))

    def staged(self) -> list[str]:
        """Return what is being written on the nodes, or was."""
        nodes = self.running.state_dir / "nodes"
        found = [str(path) for path in nodes.glob("*/cache/staging/*")]
        return found + [str(path) for path in nodes.glob("*/snapshots/*/staging/*")]

    def digest_in_s3(self, record: BlobRecord) -> str:
        """Hash what S3 has."""
        hasher, size = hashlib.sha256(), 0
        buffer = memoryview(bytearray(MIB))
        with self.store.open(record.key) as stream:
            while count := stream.readinto(buffer):
                hasher.update(buffer[:count])
                size += count
        assert size == record.size_bytes
        return f"sha256:{hasher.hexdigest()}"

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[Ask]:
        """Lend one connection to the farm's Redis."""
        link = connect(self.running.settings.config.redis)
        try:
            yield lambda *command: link.execute(*command, may_repeat=True)
        finally:
            await link.close()

    # -- each invariant -----------------------------------------------------------------------------------------

    async def _assert_nothing_under_way(self) -> None:
        """I9: no flight, no waiter, no upload of what is done, no staging file."""

        async def left() -> list[str]:
            keys = await self.live_flights()
            # What a fetch that nobody wanted any more had uploaded is kept for the next one; not once that is done.
            uploads = await self.keys("upload:*")
            done = [await self.redis("EXISTS", f"{self.prefix}:{key.removeprefix('upload:')}") for key in uploads]
            return keys + [key for key, is_done in zip(uploads, done, strict=True) if is_done] + self.staged()

        last: list[str] = []

        async def nothing() -> bool:
            last[:] = await left()
            return not last

        within_s = 4 * self.running.settings.config.flight.lease_ttl_s + 6
        await eventually(nothing, lambda: f"these to go: {last}", within_s=within_s)

    async def _assert_present_is_whole(self, ask: Ask) -> None:
        """I2: each blob record names an object of S3 that hashes to its digest."""
        for key, value in await self._values(ask, "blob:*"):
            record = BLOB.decode(value)
            assert f"blob:{record.digest}" == key
            if _verified.get(record.digest) != record.key:
                assert await asyncio.to_thread(self.digest_in_s3, record) == record.digest, f"{key} is not whole in S3"
                _verified[record.digest] = record.key

    async def _assert_one_record_each(self, ask: Ask, image: Image | None) -> None:
        """I4: one record a blob chain ID, and one snapshot a chain ID and node, by name and by content."""
        refs = [(key, msgpack.unpackb(value)[2]) for key, value in await self._values(ask, "ref:*")]
        for key, record in refs:
            assert key == f"ref:{record['id']}"
        assert int(await ask("ZCARD", f"{self.prefix}:refs")) == len(refs)
        if image is not None:
            digests = {layer.digest for layer in image.layers}
            assert len([ref for _, ref in refs if ref["blob"]["digest"] in digests]) == len(digests)
        for node in (self.running.state_dir / "nodes").glob("*"):
            chains = [json.loads(path.read_bytes())["chain"] for path in node.glob("snapshots/*/s/*/snapshot.json")]
            assert len(chains) == len(set(chains)), f"{node.name} has a chain twice"

    async def _assert_held_is_there(self, ask: Ask) -> None:
        """I3: each ref that a live lease holds has its record, and so have all that it stands on."""
        refs = {key: msgpack.unpackb(value)[2] for key, value in await self._values(ask, "ref:*")}
        now_ms = int((await ask("TIME"))[0]) * 1000
        for lease in await ask("ZRANGE", f"{self.prefix}:leases", f"({now_ms}", "+inf", "BYSCORE") or []:
            for resource in await ask("SMEMBERS", f"{self.prefix}:held:{lease.decode()}"):
                wanted = resource.decode() if resource.startswith(b"ref:") else None
                while wanted is not None:
                    # By now it may have lapsed, and been collected: a lease that goes takes nothing wrong with it.
                    is_live = await ask("ZSCORE", f"{self.prefix}:leases", lease)
                    assert wanted in refs or is_live is None, f"lease {lease.decode()} holds {wanted}, which is gone"
                    parent = refs[wanted]["parent"] if wanted in refs else None
                    wanted = ref_resource(parent) if parent else None

    async def _assert_keys_are_known(self, ask: Ask) -> None:
        """I9: every key is one of the table in :mod:`storage.keys`, of its type; what expires there does."""
        table = _table()
        found = await self.keys("*")
        for batch in _batches(found):
            names = [f"{self.prefix}:{key}" for key in batch]
            kinds = await asyncio.gather(*(ask("TYPE", name) for name in names))
            left_ms = await asyncio.gather(*(ask("PTTL", name) for name in names))
            for key, kind, ttl_ms in zip(batch, kinds, left_ms, strict=True):
                if kind in (b"none", "none"):
                    continue  # it has expired since
                rows = [row for row in table if row.pattern.fullmatch(key)]
                assert rows, f"no row of storage.keys is about {key}"
                said = kind.decode() if isinstance(kind, bytes) else kind
                assert any(row.kind in (said, "counter") for row in rows), f"{key} is a {said}"
                assert int(ttl_ms) != -1 or not all(row.expires for row in rows), f"{key} never expires"

    async def _assert_every_process_is_somebody(self) -> None:
        """I9: each process of an actor is one that says it is there: no dead one's goes on."""
        last: set[int] = set()

        async def all_known() -> bool:
            told = {actor.pid for actor in await self.actors()}
            last.clear()
            last.update(pid for pid in self.processes() if _is_actor(pid) and pid not in told)
            return not last

        await eventually(all_known, lambda: f"processes {last} to end, or to be told of")

    async def _values(self, ask: Ask, pattern: str) -> list[tuple[str, bytes]]:
        """Return the string keys that match, with their values."""
        found: list[tuple[str, bytes]] = []
        for batch in _batches(await self.keys(pattern)):
            values = await ask("MGET", *(f"{self.prefix}:{key}" for key in batch))
            found += [(key, value) for key, value in zip(batch, values, strict=True) if value is not None]
        return found


#: Digests whose object was read already, with its key: a second look costs as much as the first.
_verified: dict[Digest, str] = {}


@dataclass(frozen=True)
class _Row:
    pattern: re.Pattern[str]
    kind: str
    expires: bool


def _table() -> list[_Row]:
    """Read which keys there are from where they are spelled."""
    rows = []
    for name, kind, lasts in _ROW.findall(storage.keys.__doc__ or ""):
        words = _ANYTHING.split(name)
        pattern = "".join(".*" if _ANYTHING.fullmatch(word) else re.escape(word) for word in words)
        rows.append(_Row(re.compile(pattern), kind, "," in lasts and "score" not in lasts))
    assert len(rows) > 40, "the table of storage.keys can't be read"
    return rows


def _batches(keys: Sequence[str]) -> list[Sequence[str]]:
    return [keys[start : start + _BATCH] for start in range(0, len(keys), _BATCH)]


def _is_actor(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("ray::Remote")
    except OSError:
        return False  # it has ended
