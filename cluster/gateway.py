"""What crosses the gateway: frames of one connection, and the calls of a farm that go over it.

A driver outside the cluster has one WebSocket to the gateway. Each binary message is one :class:`Frame`, a
:mod:`cluster.wire` payload; docs/decisions/0015 tells why. A call has a number that its driver chose, and a driver that
comes back after its connection dropped names it again: what ran goes on, and what was told meanwhile is told then.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeVar

from cluster.audit import AuditEntry
from cluster.cache_options import CacheSource, CacheTarget
from cluster.collect.runner import Pruned
from cluster.collect.stock import Kept, Usage
from cluster.collect.values import Item
from cluster.collect.verify import Verified
from cluster.descriptor import Descriptor
from cluster.digest import Digest
from cluster.drain import UnderWay
from cluster.job import JobId, JobRecord, JobState
from cluster.job_result import InlineEntry
from cluster.lease import Lease, LeaseId
from cluster.messages import (
    ExtractResult,
    NodePruneResult,
    NodeRecord,
    NodeUsageResult,
    PushResult,
    UnlazyResult,
)
from cluster.progress import ProgressItem
from cluster.provider import DescHandler
from cluster.ref import BlobRecord, ImageRecord, RefId, RefState
from cluster.wire import Reader, encode

Q = TypeVar("Q")
R = TypeVar("R")

#: Where the gateway is, below its address.
PATH = "/gateway"
#: Where it tells anybody that it is there. What is not under one of the two is the page's.
HEALTH_PATH = f"{PATH}/health"
#: Bytes of one frame at most: a directory's manifest has some 100 for each file.
MAX_FRAME_BYTES = 64 * 1024**2
#: Items of one call that are on their way or not looked at yet; then its work waits.
WINDOW = 1000
#: Items after which a driver says that it has looked at them.
SEEN_EVERY = WINDOW // 4
#: Seconds between signs of life on a connection; one that is silent for longer has dropped.
HEARTBEAT_S = 10.0
#: Bytes of a driver's key: what it chose, and nobody can guess.
KEY_BYTES = 32

_FRAME = "gateway"


class Verb(Enum):
    """What a frame says."""

    #: From a driver, first of all: who it is (:class:`Hello`).
    HELLO = "hello"
    #: Answers it (:class:`Welcome`).
    WELCOME = "welcome"
    #: Make a call; or, of one that was made before, go on from item *number*.
    CALL = "call"
    #: Nobody waits for a call any more.
    CANCEL = "cancel"
    #: Items of a call were looked at, up to *number*.
    SEEN = "seen"
    #: An end was heard of: the gateway may forget the call.
    HEARD = "heard"
    #: From the gateway: an item of a call, the *number*-th.
    ITEM = "item"
    #: A call's result.
    END = "end"
    #: A call's error.
    FAILED = "failed"
    #: A question for a credential (:class:`Asked`).
    ASK = "ask"
    #: Its answer (:class:`Answered`).
    ANSWER = "answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One message of a connection."""

    verb: Verb
    #: Which call, or question; 0 where it is about the connection.
    call: int = 0
    number: int = 0
    #: Of a call.
    method: str = ""
    #: A payload of its own. It may hold a secret, and never shows.
    body: bytes = field(default=b"", repr=False)


_frames: Reader[Frame] = Reader(_FRAME, Frame)


def encode_frame(frame: Frame) -> bytes:
    """Return a frame's payload."""
    return encode(_FRAME, frame)


def decode_frame(data: bytes) -> Frame:
    """Return the frame in a payload; raises as :func:`cluster.wire.decode`."""
    return _frames.decode(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Who a driver is."""

    #: Its key: whoever has it is that driver.
    key: bytes = field(repr=False)
    #: Keep what it makes for ``cache.keep_s`` after it has gone.
    keep: bool = False
    #: It was there before, and comes back.
    is_back: bool = False
    #: Calls that it waits for.
    calls: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """What a driver is told of the farm."""

    session_id: str
    farm: str
    #: The gateway knows nothing of its calls: it was restarted, or the driver was away for too long.
    is_new: bool
    lease_ttl_s: float
    deadline_s: float
    #: Of the gateway.
    release: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question for the credential of a registry."""

    registry: str
    #: The one that was given last was refused.
    was_refused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A credential, none, or why that can't be told."""

    is_known: bool = False
    username: str = field(default="", repr=False)
    secret: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    #: Payload of an error.
    error: bytes = b""


def session_of(key: bytes) -> str:
    """Return the session's ID that a driver's key stands for: the same at each gateway, and no way back to the key."""
    return hashlib.sha256(b"session\0" + key).hexdigest()[:16]


# -- calls ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Method(Generic[Q, R]):
    """A call: its name on the wire, what it is given and what it comes to."""

    name: str
    request: type[Q]
    result: type[R]
    #: Made twice it comes to the same as made once: it may be made anew where nobody knows what became of it.
    may_repeat: bool = True


@dataclass(frozen=True, slots=True)
class Stream(Generic[Q, R]):
    """A call that tells items; its name, what it is given, and what each item is.

    One that replays tells the same items if it is made again.
    """

    name: str
    request: type[Q]
    item: type[R]
    replays: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RefView:
    """A ref as a driver has it."""

    layers: tuple[RefState, ...]
    image: ImageRecord | None = None
    handlers: tuple[DescHandler, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    """What a call is given that needs nothing, and what one comes to that only does something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """One thing's name: of a ref, a job, a lease, a stream."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PullCall:
    """Resolve an image and make refs of it."""

    image: str
    platform: str | None
    plain_http: bool
    stream: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveCall:
    """Read what an image's name stands for."""

    image: str
    platform: str | None
    plain_http: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What a name stands for."""

    #: With its digest.
    reference: str
    digest: Digest
    platform: str
    config: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GetByBlobCall:
    """Make or find the ref of one layer."""

    descriptor: Descriptor
    parent: RefView | None
    handlers: tuple[DescHandler, ...]
    lease_id: LeaseId | None
    image_ref: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RefCall:
    """Unlazy a ref's chain, or extract it on a node."""

    ref: RefView
    node: str | None = None
    stream: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PushCall:
    """Push a ref's image."""

    ref: RefView
    target: str
    plain_http: bool
    stream: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobWay:
    """Where a blob can be had by HTTP GET, for some time."""

    blob: BlobRecord
    url: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportWays:
    """The blobs of an image that are present; asked for again, they have new URLs."""

    ways: tuple[BlobWay, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefIds:
    """Refs."""

    ids: tuple[RefId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseCall:
    """Make a lease, renew it, or attach resources to it."""

    id: LeaseId
    ttl_s: float | None = None
    labels: dict[str, str] = field(default_factory=dict)
    resources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PinCall:
    """Pin a ref."""

    ref: RefView
    ttl_s: float | None
    labels: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneCall:
    """Remove what nobody holds: from the content store, or from nodes' disks."""

    everything: bool = False
    keep_bytes: int
    keep_duration_s: float
    filters: tuple[str, ...]
    dry_run: bool
    #: Where it is about nodes' disks: which node; None: all.
    node: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneTold:
    """An item that went, or, at last, the whole."""

    removed: Item | None = None
    result: Pruned | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCall:
    """Look at a node's disk; None: at each."""

    node: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyCall:
    """Verify blobs."""

    refs: tuple[str, ...]
    repair: bool
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyTold:
    """What has come of verifying so far, or at last."""

    verified: Verified
    is_end: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditCall:
    """Read the audit stream; as :class:`cluster.audit.AuditFilter`."""

    #: Of the last so many seconds; None: all that is kept.
    last_s: float | None
    job: str = ""
    digest: str = ""
    operation: str = ""
    #: Go on with what comes.
    follow: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainCall:
    """Drain a node."""

    node: str
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainTold:
    """What is under way on a node that drains, at a look or at last."""

    left: UnderWay
    is_end: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitCall:
    """Submit a job; its local directories are sent already."""

    job: JobId
    #: Its payload.
    definition: bytes
    no_cache: bool
    detached: bool
    labels: dict[str, str]
    cache_from: tuple[CacheSource, ...]
    cache_to: tuple[CacheTarget, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendCall:
    """Be there for an attached job until this call is cancelled."""

    job: JobId
    #: What it may ask for, by ID; kept in memory for as long as the call runs.
    secrets: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class EventTold:
    """A job's event."""

    kind: str
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TagCall:
    """Make an image of what a build came to."""

    job: JobId
    ref: RefView
    config: bytes | None
    inline: tuple[tuple[InlineEntry, ...], ...]
    name: str
    created_s: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeCall:
    """A local directory's manifest."""

    #: Payload of the tree.
    tree: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """Digests."""

    digests: tuple[Digest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadCall:
    """Open the way for one object straight to S3, in so many parts."""

    size_bytes: int
    parts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadWay:
    """Where the parts of an object go, each by HTTP PUT."""

    key: str
    urls: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedContent:
    """Where a content lies in an object."""

    digest: Digest
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadedCall:
    """An object's parts are in S3."""

    key: str
    #: ETags of the parts, in their order; nothing for an object that was put as a whole.
    etags: tuple[str, ...]
    contents: tuple[PlacedContent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLink:
    """What opens the farm's page."""

    #: Below the gateway's address, with the token in it.
    path: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseCall:
    """Leave."""

    discard: bool


PULL = Method("pull", PullCall, RefView)
GET = Method("get", Named, RefView)
GET_BY_BLOB = Method("get-by-blob", GetByBlobCall, RefView)
RESOLVE = Method("resolve", ResolveCall, Resolution)
REFS: Method[Nothing, list[RefState]] = Method("refs", Nothing, list[RefState])
IMAGES: Method[Nothing, list[ImageRecord]] = Method("images", Nothing, list[ImageRecord])
STATES: Method[RefIds, list[RefState | None]] = Method("states", RefIds, list[RefState | None])
CHAIN: Method[Named, list[RefState]] = Method("chain", Named, list[RefState])
HOLD = Method("hold", RefIds, Nothing)
UNLAZY = Method("unlazy", RefCall, UnlazyResult)
EXTRACT = Method("extract", RefCall, ExtractResult)
PUSH = Method("push", PushCall, PushResult)
EXPORT = Method("export", RefCall, ExportWays)
#: Tells whether the gateway, too, found a blob damaged, and it is lazy now.
DAMAGED = Method("damaged", Named, bool)
END_STREAM = Method("end-stream", Named, Nothing)
FOLLOW = Stream("follow", Named, ProgressItem)

PAGE = Method("page", Nothing, PageLink)
NODES: Method[Nothing, list[NodeRecord]] = Method("nodes", Nothing, list[NodeRecord])
LEASES: Method[Nothing, list[Lease]] = Method("leases", Nothing, list[Lease])
LEASE_CREATE = Method("lease-create", LeaseCall, Lease)
LEASE_RENEW = Method("lease-renew", LeaseCall, Nothing)
LEASE_ATTACH = Method("lease-attach", LeaseCall, Nothing)
LEASE_DELETE = Method("lease-delete", LeaseCall, bool)
#: Each makes a lease.
PIN = Method("pin", PinCall, Lease, may_repeat=False)
UNPIN = Method("unpin", Named, Nothing)
DU = Method("du", Nothing, Usage)
KEPT = Method("kept", Named, Kept)
PRUNE = Stream("prune", PruneCall, PruneTold, replays=False)
NODE_USAGE: Method[NodeCall, list[NodeUsageResult]] = Method("node-usage", NodeCall, list[NodeUsageResult])
NODE_PRUNE: Method[PruneCall, list[NodePruneResult]] = Method("node-prune", PruneCall, list[NodePruneResult])
VERIFY = Stream("verify", VerifyCall, VerifyTold, replays=False)
#: Old entries go meanwhile.
AUDIT = Stream("audit", AuditCall, AuditEntry, replays=False)
DRAIN = Stream("drain", DrainCall, DrainTold, replays=False)
UNDRAIN = Method("undrain", Named, Nothing)

SUBMIT = Method("submit", SubmitCall, Nothing)
ATTEND = Method("attend", AttendCall, Nothing)
JOB = Method("job", Named, JobRecord)
FIND_JOB = Method("find-job", Named, JobRecord)
FOLLOW_JOB = Stream("follow-job", Named, EventTold)
CANCEL_JOB = Method("cancel-job", Named, JobState)
TAG = Method("tag", TagCall, RefView)

TREE_LACKS = Method("tree-lacks", TreeCall, Digests)
TREE_UPLOAD = Method("tree-upload", UploadCall, UploadWay)
TREE_UPLOADED = Method("tree-uploaded", UploadedCall, Nothing)
TREE_SENT = Method("tree-sent", TreeCall, Nothing)

CLOSE = Method("close", CloseCall, Nothing)

#: Any: a method's types are its own.
AnyMethod = Method[Any, Any]
AnyStream = Stream[Any, Any]
