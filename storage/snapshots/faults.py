"""What the operating system says against a snapshot, as errors of ours."""

from __future__ import annotations

import errno
from typing import Final

from cluster.errors import ClusterError, NodeDiskError, SnapshotError

#: What another node's disk may well do.
DISK_FAULTS: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS))


def snapshot_error(snapshot: str, doing: str, fault: OSError) -> ClusterError:
    """Return the error for a fault in *doing* something to *snapshot*: the disk's, or else the kernel's."""
    if fault.errno in DISK_FAULTS:
        return NodeDiskError(f"{doing} snapshot {snapshot}", str(fault))
    return SnapshotError(snapshot, doing, str(fault))
