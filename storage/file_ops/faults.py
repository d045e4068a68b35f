"""What goes wrong in an action on files, as errors that name the action and its path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import FileActionError, InvalidPatternError, NodeDiskError
from storage.snapshots.faults import DISK_FAULTS
from storage.snapshots.names import shown


class BadArchiveError(Exception):
    """An archive that is to be unpacked is damaged, or has an entry that must not be made."""


@contextmanager
def naming(action: str, path: str, *, root: str = "") -> Iterator[None]:
    """Raise what goes wrong within as an error of *action* at *path*.

    Args:
        action: What is done, e.g. ``copy``.
        path: To what.
        root: Where the tree lies on the node, to be left out of what is said.

    Raises:
        FileActionError: an OSError, a malformed pattern or a bad archive.
        NodeDiskError: an OSError that is the disk's fault.
    """
    try:
        yield
    except InvalidPatternError as exc:
        raise FileActionError(action, path, f"malformed pattern {exc.pattern!r}: {exc.reason}") from exc
    except BadArchiveError as exc:
        raise FileActionError(action, path, str(exc)) from exc
    except OSError as exc:
        reason = exc.strerror or str(exc)
        if exc.errno in DISK_FAULTS:
            raise NodeDiskError(f"{action} {path}", reason) from exc
        name = shown(os.fsencode(exc.filename)) if isinstance(exc.filename, str | bytes) else ""
        # Descriptors' numbers say nothing to anyone.
        is_told = name and not name.startswith("/proc/self/fd/") and name.removeprefix(root) != path
        raise FileActionError(action, path, f"{reason}: {name.removeprefix(root)}" if is_told else reason) from exc
