"""Entries of the audit stream, for people and for programs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from cluster.audit import Operation
from lazyfarm.cli.human import count, duration, short, size

if TYPE_CHECKING:
    from cluster.audit import AuditEntry
    from lazyfarm.cli import documents

#: Fields of an entry to what documents call the like.
_NAMED = {"size_bytes": "size", "moved_bytes": "bytes", "wall_s": "time", "error": "error_type"}


def audit_document(entry: AuditEntry) -> documents.AuditEntry:
    """Return an entry for programs: every field, those with a unit named as in all documents."""
    told: documents.AuditEntry = {  # type: ignore[assignment]  # tests compare their fields
        _NAMED.get(name, name): value for name, value in asdict(entry).items()
    }
    return told


def audit_line(entry: AuditEntry, *, of_digest: bool = False) -> str:
    """Return an entry in words; without its digest where *of_digest* says that it is told already."""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.wall_s))
    told = [f"{at}  {entry.operation} {entry.outcome}"]
    if entry.error:
        told.append(f"({entry.error})")
    told += [] if of_digest or not entry.digest else [short(entry.digest)]
    told += [f"ref {short(entry.ref)}"] if entry.ref else []
    told += [entry.image] if entry.image else []
    if entry.moved_bytes:
        told.append(size(entry.moved_bytes))
    if entry.source:
        told.append(f"{'to' if entry.operation in _TO else 'from'} {entry.source}")
    if entry.seconds:
        told.append(f"in {duration(entry.seconds)}" + (f" ({size(entry.rate)}/s)" if entry.moved_bytes else ""))
    if entry.job:
        told.append(f"for job {entry.job}" + (f", vertex {short(entry.vertex)}" if entry.vertex else ""))
    elif entry.who:
        told.append(f"for driver {entry.who}")
    told += [f"as {entry.credential}"] if entry.credential else []
    told += [f"by {entry.by}"] if entry.by else []
    return " ".join(told)


def story_lines(entries: Sequence[AuditEntry]) -> list[str]:
    """Return what was done with one layer, in words: whoever found it there again and again is told of once.

    A build asks for each layer below each of its steps, and all but the first time it is present.
    """
    told: dict[AuditEntry | tuple[str, ...], list[AuditEntry]] = {}
    for entry in entries:
        is_repeated = entry.operation == Operation.UNLAZY and entry.outcome == "present"
        alike = (entry.who, entry.job, entry.by, entry.source)
        told.setdefault(alike if is_repeated else entry, []).append(entry)
    return [
        audit_line(first, of_digest=True) + (f", and {count(len(again), 'time')} more" if again else "")
        for first, *again in told.values()
    ]


#: What goes to its source, as the entry calls the other end.
_TO = frozenset({"push", "push-layer", "export_cache", "extract"})
