"""Metrics: every one that the farm keeps, defined here and told where the thing happens.

Code says ``FLIGHT_JOINS.add(outcome="joined")``. Like fault points that does nothing, in less than a microsecond,
until the process has a :class:`MetricSink`: actors install one when they start (:mod:`actors.metrics`), drivers and
tests have none. What is *decided* tells nothing: shells, adapters and runners do.

Names follow Prometheus (https://prometheus.io/docs/practices/naming/): base units, which end the name. Every label has
few values: a series a value, a process and a metric is kept for as long as the process lives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Final, Literal, Protocol

from cluster.topology import Kind

#: For a label that is open (:attr:`Metric.labels`): what values beyond the first :data:`MOST_OPEN` are told as.
OTHER = "other"
MOST_OPEN = 20

#: Who keeps a metric and is no actor.
GATEWAY: Final = "gateway"
#: Kind of actor, or that.
Keeper = Kind | Literal["gateway"]

_EVERYBODY: frozenset[Keeper] = frozenset(Kind)
_STORES: frozenset[Keeper] = frozenset({Kind.CACHE_SHARD, Kind.FETCH_WORKER, Kind.OP_WORKER})
_FLIERS: frozenset[Keeper] = frozenset({Kind.FETCH_WORKER, Kind.OP_WORKER})
_FETCH: frozenset[Keeper] = frozenset({Kind.FETCH_WORKER})
_OPS: frozenset[Keeper] = frozenset({Kind.OP_WORKER})
_SHARD: frozenset[Keeper] = frozenset({Kind.CACHE_SHARD})
_SCHEDULER: frozenset[Keeper] = frozenset({Kind.SCHEDULER})
_SUPERVISOR: frozenset[Keeper] = frozenset({Kind.SUPERVISOR})
_GATEWAY: frozenset[Keeper] = frozenset({GATEWAY})


class MetricSink(Protocol):
    """Takes what is told, in any thread. Must neither block nor raise."""

    def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Add *value* to a counter, set a gauge to it, or put it into a histogram."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What is told under one name."""

    #: As the code names it; :attr:`exported` is what Prometheus sees.
    name: str
    #: One sentence, without its full stop.
    help: str
    #: Who keeps it.
    by: frozenset[Keeper]
    #: Labels to the values that they may have; one without any is open: the first :data:`MOST_OPEN` that are seen.
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def exported(self) -> str:
        """Return the name at Ray's endpoint."""
        return f"ray_{self.name}"

    def combinations(self) -> Iterator[dict[str, str]]:
        """Return every set of labels that it may have; none where one of them is open."""
        for values in product(*self.labels.values()):
            yield dict(zip(self.labels, values, strict=True))

    def _tell(self, value: float, labels: Mapping[str, str]) -> None:
        if _sink is not None:
            _sink.record(self, value, labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter(Metric):
    """Only rises. Shows as 0 from the start of who keeps it: a rate knows no series that begins at 1."""

    @property
    def exported(self) -> str:
        """Return the name at Ray's endpoint."""
        return f"ray_{self.name}_total"

    def add(self, amount: float = 1, /, **labels: str) -> None:
        """Add *amount*, >= 0."""
        self._tell(amount, labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauge(Metric):
    """Stands at what it was last set to."""

    def set(self, value: float, /, **labels: str) -> None:
        """Set it."""
        self._tell(value, labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram(Metric):
    """Counts how long things took, by buckets: ``…_bucket``, ``…_sum`` and ``…_count`` at Ray's endpoint."""

    #: Upper bounds, seconds, rising.
    buckets: tuple[float, ...]

    def observe(self, seconds: float, /, **labels: str) -> None:
        """Count one that took so long."""
        self._tell(seconds, labels)


_sink: MetricSink | None = None


def install(sink: MetricSink | None) -> None:
    """Tell *sink* from now on; nobody where it is None."""
    global _sink  # noqa: PLW0603 - a process has one endpoint, and what happens in it may happen anywhere
    _sink = sink


#: A store in the same rack answers within milliseconds; beyond `redis.timeout_s` there are no answers.
_REDIS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2, 10)
#: A small object takes tens of milliseconds, a part of 8 MiB up to seconds; `s3.timeout_s` ends a try.
_S3_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 20, 60)
#: From a manifest nearby to a queue behind a rate limit.
_REGISTRY_S = (0.01, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
#: From a layer that is there to gigabytes through a thin link.
_LAYER_S = (0.01, 0.05, 0.2, 1, 5, 20, 60, 300)
#: From a copied file to a compilation.
_WORK_S = (0.1, 0.5, 1, 5, 20, 60, 300, 1200, 3600)

# -- refs ------------------------------------------------------------------------------------------------------------

REFS_ASKED = Counter(
    name="lazyfarm_refs_asked",
    help="Refs that shards made or found: blob in the store, blob lazy, or none of the caller's providers would do",
    by=_SHARD,
    labels={"state": ("present", "lazy", "refused")},
)
PULLED_BYTES = Counter(
    name="lazyfarm_pulled_bytes",
    help="Bytes of the layers of images that were pulled; lazy ones have moved none",
    by=_FETCH,
    labels={"state": ("present", "lazy")},
)
REFS = Gauge(
    name="lazyfarm_refs",
    help="Refs of the farm, as the last collection found them; 0 at shards that did not collect",
    by=_SHARD,
    labels={"state": ("present", "lazy")},
)

# -- bytes -----------------------------------------------------------------------------------------------------------

READ_BYTES = Counter(
    name="lazyfarm_read_bytes",
    help="Bytes of blobs that workers read, from registries or from S3",
    by=_FETCH,
    labels={"source": ("registry", "s3")},
)
UNLAZY_BYTES = Counter(
    name="lazyfarm_unlazy_bytes",
    help="Bytes of the layers that were asked for, by how they came",
    by=_FETCH,
    labels={"how": ("fetched", "joined", "present")},
)
UNLAZY_SECONDS = Histogram(
    name="lazyfarm_unlazy_seconds",
    help="Seconds until a layer that was asked for was present",
    by=_FETCH,
    labels={"how": ("fetched", "joined", "present")},
    buckets=_LAYER_S,
)
PUSHED_LAYERS = Counter(
    name="lazyfarm_pushed_layers",
    help="Layers of pushes and cache exports, by how they got to the target",
    by=_FETCH,
    labels={"how": ("exists", "mounted", "uploaded", "copied", "foreign")},
)
PUSHED_BYTES = Counter(name="lazyfarm_pushed_bytes", help="Bytes of layers uploaded to registries", by=_FETCH)

# -- flights ---------------------------------------------------------------------------------------------------------

FLIGHT_JOINS = Counter(
    name="lazyfarm_flight_joins",
    help="Answers to who wanted to join or own a flight of the cluster, or looked whether one still goes on",
    by=_FLIERS,
    labels={"outcome": ("owned", "joined", "present", "aborting", "free")},
)
FLIGHT_ACQUIRE_SECONDS = Histogram(
    name="lazyfarm_flight_acquire_seconds",
    help="Seconds until who wanted to join or own a flight was told which of them it is",
    by=_FLIERS | _SCHEDULER,
    buckets=_REDIS_S,
)
FLIGHT_WAIT_SECONDS = Counter(
    name="lazyfarm_flight_wait_seconds",
    help="Seconds that workers waited for layers that another worker fetches; a second: how many waited on average",
    by=_FETCH,
)
FLIGHT_TAKE_OVERS = Counter(
    name="lazyfarm_flight_take_overs",
    help="Flights owned anew because their owner's hold had lapsed; resumed where it had uploaded parts",
    by=_FLIERS,
    labels={"upload": ("resumed", "none")},
)
FLIGHT_ENDS = Counter(
    name="lazyfarm_flight_ends",
    help="Ends of flights, as their owners told them",
    by=_FLIERS,
    labels={"how": ("committed", "failed", "vacated")},
)
FLIGHT_WRITES_REFUSED = Counter(
    name="lazyfarm_flight_writes_refused",
    help="Writes of owners that were refused because their hold had lapsed",
    by=_FLIERS,
)
COMMITTED_BYTES = Counter(
    name="lazyfarm_committed_bytes", help="Bytes of blobs that became present, each once", by=_FLIERS
)

# -- registries, S3, Redis -------------------------------------------------------------------------------------------

REGISTRY_ANSWERS = Counter(
    name="lazyfarm_registry_answers",
    help="Answers of registries and mirrors to single requests; none: no answer, or a broken one",
    by=_EVERYBODY,
    labels={"registry": (), "answer": ("2xx", "3xx", "401", "403", "404", "429", "4xx", "5xx", "none")},
)
REGISTRY_WAIT_SECONDS = Histogram(
    name="lazyfarm_registry_wait_seconds",
    help="Seconds that requests waited for their turn at a registry's host",
    by=_EVERYBODY,
    labels={"registry": ()},
    buckets=_REGISTRY_S,
)
REGISTRY_CIRCUIT_OPEN = Gauge(
    name="lazyfarm_registry_circuit_open",
    help="Whether a registry's host is given up, 1 or 0, of those that ever were; of many, `other` is any of the rest",
    by=_SUPERVISOR,
    labels={"registry": ()},
)
REGISTRY_CIRCUIT_OPENED = Counter(
    name="lazyfarm_registry_circuit_opened",
    help="Times that the cluster gave a registry's host up, each told by whose request was one failure too many",
    by=_EVERYBODY,
)
REGISTRY_QUOTA_REMAINING = Gauge(
    name="lazyfarm_registry_quota_remaining",
    help="Requests that a registry told this actor last are left of what it allows; nothing where it tells nothing",
    by=_EVERYBODY,
    labels={"registry": (), "kind": ("manifest", "blob", "push")},
)
REGISTRY_QUOTA_WAIT_SECONDS = Counter(
    name="lazyfarm_registry_quota_wait_seconds",
    help="Seconds that requests waited where a registry had said that little is left",
    by=_EVERYBODY,
    labels={"kind": ("manifest", "blob", "push")},
)
S3_SECONDS = Histogram(
    name="lazyfarm_s3_seconds",
    help="Seconds of calls to S3, tries again among them, up to the head of the answer",
    by=_STORES,
    labels={"operation": (), "outcome": ("ok", "failed")},
    buckets=_S3_S,
)
REDIS_SECONDS = Histogram(
    name="lazyfarm_redis_seconds",
    help="Seconds from a call to Redis to its answer, waits for a connection among them",
    by=_EVERYBODY,
    buckets=_REDIS_S,
)
REDIS_FAILURES = Counter(
    name="lazyfarm_redis_failures", help="Calls to Redis that ended without an answer", by=_EVERYBODY
)

# -- leases ----------------------------------------------------------------------------------------------------------

LEASES = Gauge(
    name="lazyfarm_leases",
    help="Live leases, as the last collection found them; 0 at shards that did not collect",
    by=_SHARD,
)
LEASES_LOST = Counter(name="lazyfarm_leases_lost", help="Renewals and holds that found their lease gone", by=_EVERYBODY)

# -- collection ------------------------------------------------------------------------------------------------------

COLLECT_SECONDS = Histogram(
    name="lazyfarm_collect_seconds",
    help="Seconds of rounds of collection, by their outcome",
    by=_SHARD,
    labels={"outcome": ("ok", "failed")},
    buckets=_WORK_S,
)
COLLECT_LAST = Gauge(
    name="lazyfarm_collect_last_timestamp_seconds",
    help="When a round last ended well at this shard, Unix time; at its start: when it started",
    by=_SHARD,
)
COLLECTED_ITEMS = Counter(
    name="lazyfarm_collected_items", help="Refs, and images without one, that collection removed", by=_SHARD
)
COLLECTED_BYTES = Counter(
    name="lazyfarm_collected_bytes", help="Bytes of objects whose deletion collection decided", by=_SHARD
)
DELETED_OBJECTS = Counter(name="lazyfarm_deleted_objects", help="Objects deleted from S3 after the grace", by=_SHARD)
SWEPT_STRAYS = Counter(
    name="lazyfarm_swept_strays", help="Objects and uploads that no record named, swept from the bucket", by=_SHARD
)
STORED_BYTES = Gauge(
    name="lazyfarm_stored_bytes",
    help="Bytes of present blobs, as the last collection found them; 0 at shards that did not collect",
    by=_SHARD,
)
AVOIDED_BYTES = Gauge(
    name="lazyfarm_avoided_bytes",
    help="Bytes of lazy blobs, as the last collection found them; 0 at shards that did not collect",
    by=_SHARD,
)

# -- builds ----------------------------------------------------------------------------------------------------------

JOBS = Gauge(name="lazyfarm_jobs", help="Jobs that this scheduler builds now", by=_SCHEDULER)
JOB_SECONDS = Histogram(
    name="lazyfarm_job_seconds",
    help="Seconds from a scheduler's claim of a job to the job's end, by its outcome",
    by=_SCHEDULER,
    labels={"outcome": ("done", "failed", "cancelled")},
    buckets=_WORK_S,
)
VERTICES = Counter(
    name="lazyfarm_vertices",
    help="Vertices of jobs that ended, by how",
    by=_SCHEDULER,
    labels={"how": ("completed", "cached", "failed", "cancelled")},
)
OPS = Gauge(
    name="lazyfarm_ops",
    help="Ops at this node: that run, and that wait for one of `build.ops_per_node` places",
    by=_OPS,
    labels={"state": ("running", "waiting")},
)
OP_SECONDS = Histogram(
    name="lazyfarm_op_seconds",
    help="Seconds of ops, their wait for a place among them",
    by=_OPS,
    labels={"op": (), "outcome": ("ok", "failed")},
    buckets=_WORK_S,
)

# -- drivers outside the cluster ---------------------------------------------------------------------------------------

GATEWAY_DRIVERS = Gauge(
    name="lazyfarm_gateway_drivers",
    help="Drivers that a gateway has: connected, or gone, for `gateway.grace_s` at most",
    by=_GATEWAY,
    labels={"state": ("connected", "gone")},
)
GATEWAY_CALL_SECONDS = Histogram(
    name="lazyfarm_gateway_call_seconds",
    help="Seconds of drivers' calls at a gateway, to their last word",
    by=_GATEWAY,
    labels={"call": (), "outcome": ("ok", "failed", "cancelled")},
    buckets=_WORK_S,
)

# -- nodes -----------------------------------------------------------------------------------------------------------

NODES = Gauge(
    name="lazyfarm_nodes",
    help="Nodes as the supervisor sees them",
    by=_SUPERVISOR,
    labels={"state": ("alive", "dead")},
)
ACTOR_STARTS = Counter(
    name="lazyfarm_actor_starts",
    help="Times that an actor has become ready: more than once where Ray or the supervisor started it again",
    by=_EVERYBODY,
)
PULSE_MISSED = Counter(
    name="lazyfarm_pulse_missed_seconds",
    help="Seconds for which leases stood still, as neither Redis nor a supervisor kept their time",
    by=_SUPERVISOR,
)
DISK_SIZE_BYTES = Gauge(name="lazyfarm_disk_size_bytes", help="Size of the disk under a node's root", by=_FETCH)
DISK_FREE_BYTES = Gauge(name="lazyfarm_disk_free_bytes", help="Free bytes of that disk", by=_FETCH)
NODE_CACHE_BYTES = Gauge(name="lazyfarm_node_cache_bytes", help="Bytes of whole blobs in a node's cache", by=_FETCH)

#: Every metric, in the order in which they are defined.
METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
