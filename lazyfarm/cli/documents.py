"""Shapes of what ``--json`` and ``--progress json`` print: each is said here once, and nowhere else.

Commands name these types where they make a document, so that mypy compares; :func:`schema` makes of them what readers
and tests check with; the page "Documents" of the site is written from them. Commands import this for their types only:
pydantic, which makes the schemas, would cost each of them a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Annotated, Any, Literal, NotRequired, TypeAlias

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict  # typing's own can't be read by pydantic before Python 3.12

from cluster.collect.values import ItemKind
from cluster.collect.verify import FaultKind
from cluster.job import JobState, LogStream, VertexState
from cluster.progress import LayerPhase


def _one_of(kinds: Iterable[Enum | str]) -> Any:  # as pydantic's Field, which stands for a value of any type
    return Field(json_schema_extra={"enum": [kind.value if isinstance(kind, Enum) else kind for kind in kinds]})


DIALECT = "https://json-schema.org/draft/2020-12/schema"

Bytes: TypeAlias = Annotated[int, Field(ge=0, description="bytes")]
Count: TypeAlias = Annotated[int, Field(ge=0)]
Seconds: TypeAlias = Annotated[float, Field(ge=0, description="seconds")]
BytesPerSecond: TypeAlias = Annotated[float, Field(ge=0, description="bytes a second")]
WallTime: TypeAlias = Annotated[float, Field(description="seconds since 1970, by the clock of the farm's Redis")]
Digest: TypeAlias = Annotated[str, Field(pattern=r"^sha(256|512):[0-9a-f]+$", description="of a blob or a vertex")]
RefName: TypeAlias = Annotated[str, Field(min_length=1, description="a ref's ID")]
JobName: TypeAlias = Annotated[str, Field(min_length=1, description="a job's ID")]
JobStateName: TypeAlias = Annotated[str, _one_of(JobState)]
VertexStateName: TypeAlias = Annotated[str, _one_of(VertexState)]
StreamName: TypeAlias = Annotated[str, _one_of(LogStream)]


class Problem(TypedDict):
    """What went wrong."""

    type: Annotated[str, Field(description="name of the error's type, for programs")]
    message: Annotated[str, Field(description="one line, for people")]
    hint: Annotated[str, Field(description="what to do; empty: nothing is known")]


class Failure(TypedDict):
    """What every command prints in place of its document when it fails, with exit status 1, or 130."""

    error: Problem


# -- the farm ---------------------------------------------------------------------------------------------


class Node(TypedDict):
    """A node of the farm."""

    id: str
    address: str
    alive: bool
    draining: bool


class Actor(TypedDict):
    """An actor, as the supervisor last recorded it."""

    name: str
    kind: str
    node: str
    pid: int
    state: Annotated[str, Field(description="`ready` where all is well")]


class Status(TypedDict):
    """What runs. The exit status is 1 where there are problems."""

    nodes: list[Node]
    redis: str
    s3: str
    ray: str
    jobs: Annotated[str | None, Field(description="where `ray job submit` goes")]
    page: str | None
    gateway: Annotated[str | None, Field(description="where `up` started it")]
    actors: list[Actor]
    problems: NotRequired[Annotated[list[str], Field(description="not there where all is well")]]


class Up(Status):
    """What runs, and what was done for it."""

    changed: bool
    started: list[str]
    stopped: list[str]


class Down(TypedDict):
    """What was ended."""

    stopped: list[str]


class Finding(TypedDict):
    """What one check came to."""

    check: str
    ok: Literal["ok", "warn", "fail"]
    detail: str
    advice: str


class Findings(TypedDict):
    """What was looked at. The exit status is 1 where a check fails."""

    findings: list[Finding]


class PageAddress(TypedDict):
    """Where the page is."""

    page: Annotated[str, Field(description="with the token that opens it: a secret")]


class GatewayAddress(TypedDict):
    """Where drivers from outside the cluster come in."""

    gateway: Annotated[str, Field(description="for LAZYFARM_URL")]
    token_file: Annotated[str, Field(description="for LAZYFARM_TOKEN_FILE")]


class BusyNode(TypedDict):
    """What a node does."""

    id: str
    alive: bool
    draining: bool
    ops: Count


class FlightNow(TypedDict):
    """A flight that goes on."""

    key: str
    owner: str
    current: Bytes
    total: Bytes
    rate: BytesPerSecond
    waiters: Count


class JobNow(TypedDict):
    """A job that goes on."""

    job: JobName
    state: JobStateName
    targets: list[str]


class Top(TypedDict):
    """What goes on now."""

    nodes: list[BusyNode]
    flights: list[FlightNow]
    jobs: list[JobNow]


# -- images and refs --------------------------------------------------------------------------------------


class Layer(TypedDict):
    """A layer of an image."""

    digest: Digest
    size: Bytes
    lazy: bool
    ref: RefName


class Pulled(TypedDict):
    """An image that was made known."""

    ref: RefName
    image: str
    digest: Digest
    layers: Annotated[list[Layer], Field(description="the lowest first")]


class RefSummary(TypedDict):
    """A ref."""

    ref: RefName
    digest: Digest
    size: Bytes
    media_type: str
    diff_id: Digest | None
    chain_id: Digest
    parent: RefName | None
    depth: Count
    lazy: bool
    images: Annotated[list[str], Field(description="that it is a layer of")]
    created: WallTime
    description: str


class RefList(TypedDict):
    """Every ref."""

    refs: list[RefSummary]


class StoredBlob(TypedDict):
    """Where a blob lies in the bucket."""

    key: str
    etag: str
    size: Bytes


class KnownProvider(TypedDict):
    """Where a blob may be fetched from."""

    kind: str
    registry: str
    repository: str
    plain_http: bool
    urls: list[str]


class MadeOf(TypedDict):
    """A blob that a built layer was made of."""

    digest: Digest
    size: Bytes
    source: Annotated[str, Field(description="registry and repository that it is shown at")]


class RefDetails(RefSummary):
    """All that is known of a ref."""

    state: Literal["lazy", "present"]
    blob: StoredBlob | None
    last_used: WallTime
    usage_count: Count
    providers: list[KnownProvider]
    made_of: Annotated[
        list[list[MadeOf]], Field(description="who may use what is below, and is shown all of one, may have it")
    ]
    leases: list[str]
    tops: Annotated[list[str], Field(description="images that it is the top of")]
    layers: Annotated[list[Layer], Field(description="its chain, the lowest first")]


class FetchedLayer(TypedDict):
    """How a layer came into the content store."""

    digest: Digest
    source: Annotated[str, Field(description="registry and repository, or `present`: it was there")]
    bytes: Annotated[Bytes, Field(description="that this call fetched")]
    seconds: Seconds
    joined: Annotated[bool, Field(description="another call's fetch was waited for")]


class Unlazied(TypedDict):
    """A ref whose layers are in the content store."""

    ref: RefName
    layers: list[FetchedLayer]


class Mount(TypedDict):
    """Where a ref is mounted."""

    node: str
    path: str
    seconds: Seconds


class Extracted(TypedDict):
    """A ref that is unpacked."""

    ref: str
    nodes: list[Mount]


class PushedLayer(TypedDict):
    """How a layer got to a registry."""

    digest: Digest
    how: Annotated[str, _one_of(("exists", "mounted", "uploaded", "copied", "foreign"))]
    bytes: Bytes


class Pushed(TypedDict):
    """An image that was pushed."""

    target: str
    digest: Digest
    layers: list[PushedLayer]


# -- builds -----------------------------------------------------------------------------------------------


class DetachedBuild(TypedDict):
    """A build that was submitted and left (``--detach``)."""

    job: JobName
    detached: Literal[True]


class BuiltLayer(TypedDict):
    """A layer of what was built."""

    digest: Digest
    size: Bytes
    lazy: bool


class BuiltImage(TypedDict):
    """A name of what was built."""

    name: str
    digest: Digest
    pushed: Annotated[list[PushedLayer] | None, Field(description="null: it was not to be pushed")]


class Build(TypedDict):
    """What came of a build."""

    job: JobName
    ref: RefName
    layers: list[BuiltLayer]
    images: list[BuiltImage]
    outputs: list[str]


class JobSummary(TypedDict):
    """A job."""

    job: JobName
    state: JobStateName
    created: WallTime
    ended: WallTime | None
    targets: list[str]
    detached: bool
    cancel_requested: bool
    abandoned: Annotated[bool, Field(description="its driver is gone")]
    driver: Annotated[str, Field(description="ID of its session")]
    scheduler: str | None
    labels: dict[str, str]


class JobList(TypedDict):
    """The last jobs, newest first."""

    jobs: list[JobSummary]


class Vertex(TypedDict):
    """A step of a job."""

    vertex: Digest
    number: int | None
    name: str
    state: VertexStateName
    started: WallTime | None
    ended: WallTime | None
    failure: Problem | None


class JobDetails(JobSummary):
    """All that is known of a job."""

    failure: Annotated[Problem | None, Field(description="what the job failed with")]
    vertices: list[Vertex]


class LogChunk(TypedDict):
    """Something that a command said."""

    vertex: Digest
    name: str
    stream: StreamName
    text: str
    time: WallTime


class JobLogs(TypedDict):
    """What a job's commands said."""

    job: JobName
    logs: list[LogChunk]


class JobEnd(TypedDict):
    """Where a job stands after it was cancelled, or followed to its end."""

    job: JobName
    state: JobStateName


class Report(TypedDict):
    """A report that was written."""

    job: JobName
    file: str


class Submission(TypedDict):
    """A driver script that was submitted. The exit status is the script's."""

    job: JobName
    status: Literal["pending", "running", "succeeded", "failed", "stopped"]
    exit_code: Annotated[int | None, Field(description="null: it has not ended, or never ran")]


# -- what is kept -----------------------------------------------------------------------------------------


class RefUse(TypedDict):
    """What a ref takes in the bucket."""

    ref: RefName
    digest: Digest
    size: Bytes
    avoided: Bytes
    shared: bool
    in_use: bool
    created: WallTime
    last_used: WallTime
    usage_count: Count
    description: str


class ImageUse(TypedDict):
    """What an image takes in the bucket."""

    image: str
    ref: Annotated[RefName | None, Field(description="of its top; null: it has no layer")]
    size: Bytes
    exclusive: Bytes
    avoided: Bytes
    in_use: bool


class BucketUsage(TypedDict):
    """What the bucket is used for."""

    refs: list[RefUse]
    images: list[ImageUse]
    total: Bytes
    reclaimable: Bytes
    avoided: Annotated[Bytes, Field(description="what lazy layers would take")]
    local: Annotated[Bytes, Field(description="what drivers sent of directories")]


class DiskItem(TypedDict):
    """Something on a node's disk."""

    id: str
    type: Annotated[str, _one_of(ItemKind)]
    parents: list[str]
    size: Bytes
    created: WallTime
    last_used: WallTime
    held_by: str
    description: str


class NodeUsage(TypedDict):
    """What a node's disk is used for."""

    node: str
    items: list[DiskItem]
    disk: Bytes
    free: Bytes


class NodesUsage(TypedDict):
    """What the nodes' disks are used for (``--nodes``, ``--node``)."""

    nodes: list[NodeUsage]


class PrunedItem(TypedDict):
    """Something that went from the bucket."""

    id: str
    type: Annotated[str, _one_of(ItemKind)]
    size: Bytes
    last_used: WallTime
    usage_count: Count
    shared: bool
    description: str


class BucketPruned(TypedDict):
    """What went, or would go, from the bucket."""

    items: list[PrunedItem]
    freed: Bytes
    kept: Annotated[Count, Field(description="items that were taken up meanwhile")]
    dry_run: bool


class NodePruned(TypedDict):
    """What went, or would go, from a node's disk."""

    node: str
    items: list[DiskItem]
    freed: Bytes
    kept: Annotated[Count, Field(description="items that were taken up meanwhile")]
    dry_run: bool


class NodesPruned(TypedDict):
    """What went, or would go, from the nodes' disks (``--nodes``, ``--node``)."""

    nodes: list[NodePruned]


class Fault(TypedDict):
    """A blob that is not what its record says."""

    digest: Digest
    key: str
    size: Bytes
    kind: Annotated[str, _one_of(FaultKind)]
    reason: str
    repaired: bool
    quarantine: Annotated[str, Field(description="where the damaged object was put; empty: nowhere")]
    node: Annotated[str, Field(description="whose copy it is; empty: the bucket's")]


class Verified(TypedDict):
    """What was read. The exit status is 1 where something is unrepaired."""

    blobs: Count
    size: Bytes
    faults: list[Fault]
    unrepaired: Count


class QuarantinedObject(TypedDict):
    """A damaged object that was put aside."""

    key: str
    size: Bytes


class Quarantine(TypedDict):
    """What was put aside (``--quarantine``)."""

    quarantine: list[QuarantinedObject]


class Lease(TypedDict):
    """A lease."""

    id: str
    created: WallTime
    expires: Annotated[WallTime | None, Field(description="null: pinned until it is released")]
    labels: dict[str, str]
    resources: list[str]


class LeaseList(TypedDict):
    """The live leases."""

    leases: list[Lease]


class Leak(Lease):
    """A lease that nobody will let go of."""

    reason: str


class Leaks(TypedDict):
    """What leaks. The exit status is 1 where some are left."""

    leaks: list[Leak]
    released: bool


class Released(TypedDict):
    """Leases that were deleted."""

    released: list[str]


# -- why --------------------------------------------------------------------------------------------------


class Asker(TypedDict):
    """A vertex that waits for a layer."""

    job: JobName
    vertex: Digest


class LayerWait(TypedDict):
    """How far a layer is from being present, and on whom that depends."""

    digest: Digest
    state: Annotated[str, _one_of(("present", "lazy", "fetching", "stopping", "gone"))]
    owner: str | None
    current: Bytes
    total: Bytes
    rate: BytesPerSecond
    left: Seconds | None
    lease_left: Annotated[float, Field(description="seconds within which another takes over if the owner dies")]
    waiters: Count
    asked_by: list[Asker]


class Waits(TypedDict):
    """Whom layers wait for."""

    layers: list[LayerWait]


class AuditEntry(TypedDict):
    """What was done with a layer or an image; a text that is empty: it is not known, or there is none."""

    operation: Annotated[str, Field(description="what was done; a later release has more")]
    outcome: Annotated[str, Field(description="`ok`, `failed`, `cancelled`, or one of the operation's own")]
    who: Annotated[str, Field(description="whose session it was done for")]
    job: str
    vertex: str
    credential: Annotated[str, Field(description="says only which credentials are the same; or `anonymous`")]
    by: Annotated[str, Field(description="actor, process or driver that did it")]
    digest: str
    ref: str
    image: str
    source: Annotated[str, Field(description="where it came from, or went")]
    size: Bytes
    bytes: Annotated[Bytes, Field(description="that this very step moved")]
    seconds: Seconds
    fence: Annotated[int, Field(description="number of the flight's owner; 0: none")]
    error_type: Annotated[str, Field(description="empty: it did not fail")]
    time: WallTime


class LayerStory(LayerWait):
    """How a layer came here, or why it has not."""

    came_from: str | None
    fence: int | None
    providers: list[str]
    asked: list[AuditEntry]
    attempts: list[AuditEntry]
    others: list[AuditEntry]


class Stories(TypedDict):
    """How layers came here."""

    pulls: list[AuditEntry]
    layers: list[LayerStory]


class Difference(TypedDict):
    """What differs from the nearest build that had a step."""

    vertex: Digest
    name: str
    what: str
    before: str
    now: str
    files: list[str]
    more_files: Annotated[Count, Field(description="further paths that differ, and are not listed")]


class Miss(TypedDict):
    """Why a step was not found in the cache."""

    job: JobName
    vertex: Digest
    name: str
    state: VertexStateName | None
    fresh: Annotated[bool, Field(description="the job was told not to look")]
    against: Annotated[str | None, Field(description="the job that it is compared with")]
    differs: list[Difference]
    images: list[str]


class Hold(TypedDict):
    """What keeps a ref."""

    lease: Lease
    ref: RefName
    image: str | None


class Kept(TypedDict):
    """What keeps a ref from being collected."""

    ref: RefName
    holds: list[Hold]
    children: Annotated[list[str], Field(description="refs that stand on it")]


class Drain(TypedDict):
    """A node that drains. The exit status is 1 where something was left at the timeout."""

    node: str
    draining: Literal[True]
    drained: bool
    ops: Count
    fetches: Count
    calls: Count


class Undrained(TypedDict):
    """A node that takes work again (``--undo``)."""

    node: str
    draining: Literal[False]


class ConfigKey(TypedDict):
    """A key of the configuration."""

    key: str
    default: Annotated[str, Field(description="as TOML")]
    set: Annotated[Any, Field(description="what it is here; null: its default")]
    environment: str
    text: str


class ConfigKeys(TypedDict):
    """What keys mean."""

    keys: list[ConfigKey]


class ConfigSet(TypedDict):
    """What differs from the defaults."""

    set: dict[str, Any]


# -- progress ---------------------------------------------------------------------------------------------


class VertexTold(TypedDict):
    """A step has reached a state."""

    event: Literal["vertex"]
    vertex: Digest
    name: str
    state: VertexStateName
    node: NotRequired[str]
    failure: NotRequired[Problem]
    time: WallTime


class LogTold(TypedDict):
    """A command said something."""

    event: Literal["log"]
    vertex: Digest
    stream: StreamName
    text: str
    time: WallTime


class LogDroppedTold(TypedDict):
    """From here on lines of a step are missing."""

    event: Literal["log-dropped"]
    vertex: Digest
    time: WallTime


class WarningTold(TypedDict):
    """Something of the job as a whole is not as it was asked for."""

    event: Literal["warning"]
    text: str
    time: WallTime


class LayerTold(TypedDict):
    """A layer moves."""

    event: Literal["layer"]
    vertex: Digest
    work: Literal["fetch", "extract", "push"]
    digest: Digest
    node: NotRequired[str]
    phase: Annotated[str, _one_of(LayerPhase)]
    current: Bytes
    total: Bytes
    detail: NotRequired[str]
    time: WallTime


class EndTold(TypedDict):
    """The job has ended."""

    event: Literal["end"]
    state: JobStateName
    failure: NotRequired[Problem]
    time: WallTime


#: What each command prints with ``--json`` when it does not fail.
DOCUMENTS: Mapping[str, Any] = {
    "up": Up,
    "down": Down,
    "status": Status,
    "top": Top,
    "doctor": Findings,
    "page": PageAddress,
    "gateway": GatewayAddress,
    "pull": Pulled,
    "refs ls": RefList,
    "refs show": RefDetails,
    "unlazy": Unlazied,
    "extract": Extracted,
    "push": Pushed,
    "build": Build | DetachedBuild,
    "jobs ls": JobList,
    "jobs show": JobDetails,
    "jobs logs": JobLogs,
    "jobs cancel": JobEnd,
    "attach": JobEnd,
    "report": Report,
    "submit": Submission,
    "du": BucketUsage | NodesUsage,
    "prune": BucketPruned | NodesPruned,
    "verify": Verified | Quarantine,
    "leases ls": LeaseList,
    "leases show": Lease,
    "leases pin": Lease,
    "leases release": Released,
    "leases leaks": Leaks,
    "explain pull": Stories,
    "explain wait": Waits,
    "explain miss": Miss,
    "explain kept": Kept,
    #: One an entry: JSON lines.
    "audit": AuditEntry,
    "drain": Drain | Undrained,
    "config explain": ConfigKeys,
    "config show": ConfigSet,
}

#: One line of ``--progress json``.
PROGRESS: Any = VertexTold | LogTold | LogDroppedTold | WarningTold | LayerTold | EndTold

#: How every command ends.
EXIT_STATUSES: Mapping[int, str] = {
    0: "done",
    1: "it failed, or what it looked at is not well (`status`, `doctor`, `verify`, `leases leaks`), or not over "
    "(`drain`); of `attach`: the job failed or was cancelled",
    2: "wrong usage: nothing was done, and the usage is on standard error; with `--json`, too",
    130: "interrupted, by Ctrl-C or SIGTERM",
}


def schema(shape: Any) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a shape of this file; keys that it does not name are allowed."""
    return {"$schema": DIALECT, **TypeAdapter(shape).json_schema()}
