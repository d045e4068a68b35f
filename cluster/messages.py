"""What crosses actor boundaries: requests and results, as plain values in :mod:`cluster.wire` payloads.

Small on purpose: digests, handles and figures. No layer bytes, and no credential but in
:class:`SessionAnswer`, which travels in a method call from the driver and is never kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.cache_options import CacheSource, CacheTarget
from cluster.collect.policy import KeepPolicy
from cluster.collect.values import Item
from cluster.descriptor import Descriptor
from cluster.digest import Digest
from cluster.lease import LeaseId
from cluster.provider import DescHandler
from cluster.ref import ImageRecord, RefId, RefState
from cluster.remote_cache import ExportCandidate, RemoteCache


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo:
    """Who calls: a driver's session, as whom it goes to registries, and where it looks for progress."""

    session_id: str
    #: Registry host to opaque identity (:meth:`cluster.ports.Authorizer.identity`).
    identities: dict[str, str] = field(default_factory=dict)
    #: Progress stream ID of this call; None where nobody looks.
    progress: str | None = None
    #: Seconds after which the caller has given up.
    deadline_s: float = 3600.0
    #: Ties the log lines of one call together.
    trace: str = ""
    #: The job's session where this one is for one thing that is done for a job; "" where it is a driver's.
    part_of: str = ""
    #: The job that it is done for; "" for none.
    job: str = ""
    #: The span that the call is made under (:mod:`cluster.tracing`); "" where it is not traced.
    traceparent: str = ""

    @property
    def tenant(self) -> str:
        """Return whose share of a worker the call uses, a job's or a driver's; see :mod:`cluster.fair.state`."""
        return self.part_of or self.session_id


# -- pull ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PullRequest:
    """Resolve an image: manifest and config are read, refs are made, no layer moves."""

    session: SessionInfo
    image: str
    platform: str | None
    plain_http: bool
    lease_id: LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class PullResult:
    """A resolved image and its refs, lowest layer first."""

    image: ImageRecord
    layers: tuple[RefState, ...]


# -- refs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GetByBlobRequest:
    """Make or find refs, lowest first: see DESIGN §3."""

    session: SessionInfo
    descriptors: tuple[Descriptor, ...]
    parent: RefId | None
    handlers: tuple[DescHandler, ...]
    lease_id: LeaseId
    image_ref: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GetRequest:
    """Look a ref up by ID, with access proven for every blob of its chain."""

    session: SessionInfo
    ref_id: RefId
    handlers: tuple[DescHandler, ...]
    lease_id: LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class RefsResult:
    """Refs, lowest layer first."""

    layers: tuple[RefState, ...]


# -- images of builds ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveRequest:
    """Read an image's manifest and config, and keep these; no ref is made."""

    session: SessionInfo
    image: str
    platform: str | None
    plain_http: bool
    #: Holds manifest and config.
    lease_id: LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveResult:
    """A resolved image, without a record of it: its *ref* is None."""

    image: ImageRecord
    #: As stored.
    config: bytes
    #: One for each way to get each layer.
    handlers: tuple[DescHandler, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AssembleRequest:
    """Make an image of a chain of layers and a config, under a name; no layer moves."""

    session: SessionInfo
    #: Normalised reference that the image is recorded under.
    name: str
    #: Top of the chain; None for an image without layers.
    ref_id: RefId | None
    #: Image config (JSON); its rootfs and times are filled in.
    config: bytes
    handlers: tuple[DescHandler, ...]
    lease_id: LeaseId
    #: Seconds since 1970 that everything in it is said to be made at; None: when its top layer was.
    created_s: int | None = None


# -- a node's disk --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeUsageRequest:
    """Tell what lies on a node's disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeUsageResult:
    """What lies on a node's disk: snapshots, cached blobs, cache mounts."""

    node: str
    items: tuple[Item, ...]
    #: Bytes of the disk that are free, and that it has, whoever uses it.
    free_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePruneRequest:
    """Remove from a node's disk what nothing needs and a policy lets go."""

    policy: KeepPolicy
    #: Only say what would go.
    is_dry_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePruneResult:
    """What a prune of a node took, or would take."""

    node: str
    #: In the order in which it went.
    items: tuple[Item, ...]
    freed_bytes: int
    #: Items of the plan that were taken up meanwhile, and stay.
    kept: int
    is_dry_run: bool


# -- unlazy, extract, push ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlazyRequest:
    """Make sure that every blob of a ref's chain is in the content store."""

    session: SessionInfo
    ref_id: RefId
    handlers: tuple[DescHandler, ...]
    lease_id: LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFetch:
    """How one layer got into the content store."""

    digest: Digest
    #: ``present``, or the registry/repository it was fetched from, by whoever fetched it.
    source: str
    #: Bytes that this call's own flight read from registries; 0 where it joined or nothing was to do.
    bytes_fetched: int
    seconds: float
    #: True where another caller's flight did the work.
    joined: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlazyResult:
    """What an unlazy came to, lowest layer first."""

    ref_id: RefId
    layers: tuple[LayerFetch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractRequest:
    """Unlazy, bring to the called node, unpack and mount."""

    session: SessionInfo
    ref_id: RefId
    handlers: tuple[DescHandler, ...]
    lease_id: LeaseId
    #: False: it is only unpacked, for who mounts it himself.
    mount: bool = True
    #: Seconds for which it may wait for room on the node's disk; None: ``node.disk_wait_s``.
    disk_wait_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractResult:
    """Where a ref's filesystem is mounted on one node."""

    ref_id: RefId
    node: str
    #: "" where it was not to be mounted.
    path: str
    seconds: float
    layers: tuple[LayerFetch, ...]
    #: Seconds of those for which it waited for room on the node's disk.
    disk_waited_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PushRequest:
    """Push an image to a repository; layers are mounted where they can be."""

    session: SessionInfo
    #: The image's record: its manifest and config are pushed as they are.
    image: ImageRecord
    target: str
    plain_http: bool
    lease_id: LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest:
    """Read present blobs in the content store, or the called node's copies, and compare their digests."""

    digests: tuple[Digest, ...]
    #: The node's copies, which are dropped where they are damaged.
    copies: bool = False
    #: Turn lazy what is missing or damaged.
    repair: bool = False
    #: 0: as fast as it goes.
    bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPush:
    """How one layer got to the target."""

    digest: Digest
    #: ``exists``, ``mounted``, ``uploaded``, ``copied`` (within S3) or ``foreign`` (never pushed: the layer is
    #: non-distributable).
    how: str
    #: Bytes uploaded to the target.
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PushResult:
    """What a push came to."""

    #: Normalised target reference.
    target: str
    #: Digest of the manifest there.
    digest: Digest
    layers: tuple[LayerPush, ...]


# -- remote caches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportCacheRequest:
    """Export what a job's vertices came to, to a cache of its own; layers are mounted where they can be."""

    session: SessionInfo
    target: CacheTarget
    #: Every vertex that has a result; the target's mode says which of them are exported.
    candidates: tuple[ExportCandidate, ...]
    handlers: tuple[DescHandler, ...]
    lease_id: LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportCacheResult:
    """What an export came to."""

    #: As :attr:`cluster.cache_options.CacheTarget.name`.
    target: str
    #: Digest of the manifest there; None: there was nothing to export, or it failed and may.
    digest: Digest | None
    layers: tuple[LayerPush, ...] = ()
    #: Results that are in the cache now.
    results: int = 0
    #: Results that can't be had any more, and are not in it.
    left_out: int = 0
    #: What people should know; "" for nothing.
    warning: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportCacheRequest:
    """Read a remote cache: its manifest and config; no ref is made, and no layer moves."""

    session: SessionInfo
    source: CacheSource
    #: Of the image that an inline cache is in; None: the worker's own.
    platform: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportCacheResult:
    """What a remote cache holds; nothing, with a warning, where there is none that can be read."""

    cache: RemoteCache
    #: One for each way to get each layer.
    handlers: tuple[DescHandler, ...] = ()
    #: As :attr:`ExportCacheResult.warning`.
    warning: str = ""


# -- sessions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionQuestion:
    """What a worker asks the driver whose session it serves."""

    question_id: str
    registry: str
    plain_http: bool
    scopes: tuple[str, ...]
    challenge: str | None
    was_refused: bool
    #: ID of a secret that is asked for, instead of all the above; "" for none.
    secret: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionAnswer:
    """The driver's answer. Never stored, logged or shown."""

    question_id: str
    header: str | None = field(default=None, repr=False)
    #: A secret's value; None where the driver gives none.
    secret: bytes | None = field(default=None, repr=False)
    expires_in_s: float | None = None
    #: Wire form of an error instead of an answer.
    error: bytes | None = None


# -- who is there ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorRecord:
    """What an actor says of itself in Redis every few seconds; gone when it stops saying so."""

    #: Ray actor name.
    name: str
    #: ``supervisor``, ``cache-shard`` or ``fetch-worker``.
    kind: str
    #: Node name (``n0``).
    node: str
    pid: int
    #: ``ready``; readers add ``lost`` where the record has expired but the actor is wanted.
    state: str
    #: Release of the code it runs.
    version: str = ""
    #: Ray ID of the node it is pinned to: a node that is restarted keeps its name and gets a new one.
    ray_id: str = ""
    #: Digest of the configuration it was started with (:func:`cluster.config_record.actor_digest`).
    config: str = ""
    #: Calls that a fetch worker has under way; 0 for all others.
    calls: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """A node of the cluster as the supervisor sees it."""

    #: Node name: ``n0``, or the host's own where the farm did not start it.
    id: str
    #: Ray's node ID.
    ray_id: str
    address: str
    alive: bool
    #: It gets nothing new to do, and ends what it has. Told by Redis, not by the supervisor.
    draining: bool = False

    @property
    def state(self) -> str:
        """Return ``alive``, ``draining`` or ``dead``, for people; one that is dead may drain, too."""
        return ("draining" if self.draining else "alive") if self.alive else "dead"
