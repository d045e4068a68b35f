"""Results that jobs imported, beside the farm's own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from cluster.digest import Digest
from cluster.job import JobId
from cluster.solver.ports import KeyStore
from cluster.solver.values import CacheRecord, Result

#: What a result is made of when it is loaded; opaque here.
T = TypeVar("T")

#: Keys that are kept of all jobs' imports: some 100 MB.
MAX_KEYS = 200_000
_PREFIX = "import:"


@dataclass(frozen=True, slots=True)
class Imported(Generic[T]):
    """A result that a job imported."""

    job: JobId
    record: CacheRecord
    source: T


@dataclass(slots=True)
class _Import(Generic[T]):
    """What one job imported, by record ID and by key."""

    by_id: dict[str, Imported[T]] = field(default_factory=dict)
    by_key: dict[Digest, list[str]] = field(default_factory=dict)
    #: Entries of all lists in *by_key*.
    keys: int = 0


class ImportedKeys(Generic[T]):
    """Implements :class:`cluster.solver.ports.KeyStore`: the farm's records, and after them what live jobs imported.

    Imports are known to the process that did them, until their jobs end; what jobs publish goes to the farm's store.
    They are found by every job, as whatever a job publishes is: who loads one proves its own access.
    """

    def __init__(self, farm: KeyStore, *, max_keys: int = MAX_KEYS) -> None:
        self._farm = farm
        self._max_keys = max_keys
        self._keys = 0
        self._imports: dict[JobId, _Import[T]] = {}
        self._numbers = itertools.count()

    def __repr__(self) -> str:
        return f"<ImportedKeys {self._keys} keys of {len(self._imports)} jobs>"

    def add(self, job: JobId, results: Iterable[tuple[Sequence[Digest], Result, T]]) -> int:
        """Add what a job imported, which may be several caches: each result under its keys.

        Returns:
            How many results were left out, as there is no room for more.
        """
        held = self._imports.setdefault(job, _Import())
        left_out = 0
        for keys, result, source in results:
            if self._keys + len(keys) > self._max_keys:
                left_out += 1
                continue
            # Older than all that the farm has: what is tried last.
            record = CacheRecord(id=f"{_PREFIX}{job}:{next(self._numbers)}", result=result, created_wall_s=0.0)
            held.by_id[record.id] = Imported(job, record, source)
            for key in keys:
                held.by_key.setdefault(key, []).append(record.id)
            held.keys += len(keys)
            self._keys += len(keys)
        return left_out

    def drop(self, job: JobId) -> None:
        """Forget what a job imported; it has ended. May be repeated."""
        if (held := self._imports.pop(job, None)) is not None:
            self._keys -= held.keys

    def imported(self, record: CacheRecord) -> Imported[T] | None:
        """Return what a record of an import stands for; None for the farm's own, and once its job has ended."""
        if not record.id.startswith(_PREFIX):
            return None
        job, _, _number = record.id.removeprefix(_PREFIX).rpartition(":")
        held = self._imports.get(JobId(job))
        return None if held is None else held.by_id.get(record.id)

    def is_imported(self, record: CacheRecord) -> bool:
        """Tell whether a record is of an import, also once its job has ended."""
        return record.id.startswith(_PREFIX)

    async def lookup(self, keys: Sequence[Digest]) -> list[CacheRecord]:
        """Return the farm's records, then those that were imported, of the first job first."""
        found = list(await self._farm.lookup(keys))
        for held in self._imports.values():
            ids = dict.fromkeys(record_id for key in keys for record_id in held.by_key.get(key, ()))
            found += [held.by_id[record_id].record for record_id in ids]
        return found

    async def publish(self, keys: Sequence[Digest], result: Result) -> CacheRecord:
        """Record a result in the farm's store."""
        return await self._farm.publish(keys, result)
