"""The configuration: every key as a typed value, checked as a whole.

``configs/default.toml`` holds every key with its unit, default and reason; :mod:`lazyfarm.settings`
reads files and the environment and hands plain mappings to :func:`check`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class FarmConfig:
    """Who the farm is."""

    #: Name: part of every Redis key, the Ray namespace and the bucket's prefix. [a-z0-9-]{1,32}.
    name: str = "lazyfarm"


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisConfig:
    """Where records, leases and flights are kept."""

    #: ``redis://HOST:PORT/DB``, ``rediss://…``, ``unix://…``, ``redis+sentinel://HOST:PORT,…/PRIMARY/DB`` or
    #: ``redis+cluster://HOST:PORT,…``; "" starts one.
    url: str = ""
    #: User to log in as, with the password; "" for the URL's, else Redis's ``default``.
    username: str = ""
    #: File that holds the password; "" for none.
    password_file: str = ""
    #: With ``rediss://``: file with PEM certificates to trust; "" for the system's.
    ca_file: str = ""
    #: With ``rediss://``: PEM file with the certificate that we show; "" for none.
    client_cert_file: str = ""
    #: PEM file with its key; "" where it is in the same file.
    client_key_file: str = ""
    #: Seconds that one command may take.
    timeout_s: float = 10.0
    #: Replicas that must have a write before an object is deleted for its sake; 0 where there are none.
    wait_replicas: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Config:
    """Where blobs are kept."""

    #: ``http://HOST:PORT``; "" starts one.
    endpoint: str = ""
    region: str = "us-east-1"
    bucket: str = "lazyfarm"
    #: File with ``access_key_id = …`` and ``secret_access_key = …`` lines, read again when it changes; "" uses
    #: boto3's own chain.
    credentials_file: str = ""
    #: File with PEM certificates to trust; "" for the system's.
    ca_file: str = ""
    #: Seconds without a byte until a request is given up.
    timeout_s: float = 60.0
    #: Tries of one request, the first included.
    attempts: int = 5
    #: Connections at most, a process.
    connections: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """The Ray cluster."""

    #: ``HOST:PORT`` of an existing cluster's GCS; "" starts one.
    address: str = ""
    #: File with the cluster's auth token; "" for none.
    token_file: str = ""
    #: ``redis://HOST:PORT`` that keeps the state of the cluster that is started, so that its head may die and come
    #: back; "" keeps it with the head.
    gcs_redis: str = ""
    #: Nodes to start on this machine.
    nodes: int = 1
    #: CPUs that each started node offers to jobs.
    node_cpus: int = 2
    #: Memory that each started node offers, in bytes.
    node_memory_bytes: int = 2 * 1024**3
    #: Object store of each started node, in bytes: control traffic only.
    object_store_bytes: int = 96 * 1024**2
    #: Start the part of Ray's dashboard that takes jobs (``ray job submit``).
    dashboard: bool = True
    #: Seconds a call to an actor may take before it is given up, where nothing else bounds it.
    call_timeout_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Cache shards and leases."""

    #: Cache-manager shards.
    shards: int = 2
    #: Seconds a driver's lease lives without being renewed.
    lease_ttl_s: float = 60.0
    #: Seconds that what a command line made stays held after the command has ended.
    keep_s: float = 7 * 24 * 3600.0
    #: Seconds a proof of access holds.
    proof_ttl_s: float = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectConfig:
    """Collection of what nobody holds, in the bucket."""

    #: Seconds between collections; 0: only when somebody prunes.
    every_s: float = 60.0
    #: Seconds between the end of a blob and that of its object.
    grace_s: float = 60.0
    #: Seconds after which what no record names is swept from the bucket; 0: never.
    stray_s: float = 3600.0
    #: Seconds between the beginnings of two rounds that look whether every present blob's object is there; 0: never.
    missing_every_s: float = 24 * 3600.0
    #: Requests a second to the bucket that each of these rounds, and the sweeper, makes at most.
    requests_per_s: float = 20.0
    #: Bytes a second that the whole farm reads of present blobs, and each node of its copies, to verify them; 0: none.
    scrub_bytes_per_s: int = 4 * 1024**2
    #: Seconds between the beginnings of two rounds in which all of them are verified.
    scrub_every_s: float = 7 * 24 * 3600.0
    #: Bytes below which no limit makes collection go.
    reserved_bytes: int = 0
    #: Bytes that all blobs together may take; 0: any number.
    max_used_bytes: int = 0
    #: Seconds after its last use for which what nobody holds is kept.
    unused_s: float = 60 * 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FlightConfig:
    """Flights."""

    #: Seconds an owner or waiter lives without renewing (it renews every third of it).
    lease_ttl_s: float = 6.0
    #: Seconds between looks at a flight for a message that was lost.
    poll_s: float = 2.0
    #: Seconds that one unlazy may take in all.
    deadline_s: float = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchConfig:
    """The byte path: registry to S3."""

    #: Bytes of a range and of a multi-part part, 5 MiB to 5 GiB; grows where 10,000 parts would not do.
    part_bytes: int = 8 * 1024**2
    #: Blobs up to this size are one part: one GET, one PUT.
    whole_up_to_bytes: int = 24 * 1024**2
    #: Layers from this size on are fetched in parallel ranges.
    parallel_from_bytes: int = 32 * 1024**2
    #: Ranges of one layer under way at once.
    ranges_per_layer: int = 3
    #: Layers under way at once, a node.
    layers_per_node: int = 4
    #: Calls under way at once at a node's worker, of all drivers and jobs.
    calls_per_node: int = 400
    #: Seconds without a byte until a source is given up.
    stall_timeout_s: float = 30.0
    #: Tries of one range at one source, the first included.
    attempts: int = 5
    #: Seconds that retries may add up to, a layer.
    retry_budget_s: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """Each node's disk."""

    #: Directory for the node's blob cache, snapshots and mounts; "" is under the state directory.
    root: str = ""
    #: Bytes of compressed blobs kept on the node at most.
    cache_bytes: int = 10 * 1024**3
    #: ``auto``, ``overlay`` or ``copying``.
    snapshotter: Literal["auto", "overlay", "copying"] = "auto"
    #: Bytes that one layer may unpack to.
    layer_bytes: int = 64 * 1024**3
    #: Files and directories that one layer may unpack to.
    layer_entries: int = 2_000_000
    #: Seconds between collections of what nothing needs on the node; 0: only when somebody prunes, or room is wanted.
    collect_every_s: float = 60.0
    #: Bytes below which no limit makes collection go.
    reserved_bytes: int = 0
    #: Bytes that snapshots, blobs and cache mounts together may take; 0: any number.
    max_used_bytes: int = 0
    #: Bytes of the disk that collection keeps free; 0: any number.
    min_free_bytes: int = 4 * 1024**3
    #: Seconds after its last use for which what nothing needs is kept.
    unused_s: float = 7 * 24 * 3600.0
    #: Seconds that a pull or an op waits for room on nodes' disks, an op once for all of them.
    disk_wait_s: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig:
    """Builds: schedulers and ops."""

    #: Solver schedulers; each runs many jobs.
    schedulers: int = 1
    #: Ops that run on one node at once.
    ops_per_node: int = 4
    #: Seconds that one op may take.
    op_timeout_s: float = 6 * 3600.0
    #: Seconds that a scheduler holds its jobs without renewing.
    claim_ttl_s: float = 10.0
    #: How new layers are compressed.
    compression: Literal["gzip", "zstd", "none"] = "gzip"
    #: Docker's ``config.json`` with the registry credentials of detached jobs, on every node; "" for none.
    credentials_file: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryConfig:
    """One registry host; the entry named ``default`` holds for all others."""

    #: Hosts tried in this order before the registry itself, as ``HOST[:PORT]``.
    mirrors: tuple[str, ...] = ()
    #: Allow plain HTTP (loopback is always allowed).
    plain_http: bool = False
    #: File with PEM certificates to trust, beside the system's.
    ca_file: str = ""
    #: Concurrent requests of the whole cluster at most.
    max_concurrency: int = 12
    #: Requests a second of the whole cluster at most; 0 for as many as come.
    max_requests_per_s: float = 0.0
    #: Seconds between two requests of one kind and account at most, where the registry says that little is left of
    #: what it allows; 0: what it says is not heeded.
    quota_pace_s: float = 10.0
    #: Failures in a row (no connection, no answer, 5xx) after which nobody in the cluster asks it; 0 for never.
    breaker_failures: int = 5
    #: Seconds until one request tries it again.
    breaker_open_s: float = 5.0
    #: Seconds until a connection or an answer is given up.
    timeout_s: float = 30.0
    #: Tries of one control request, the first included.
    attempts: int = 5
    #: Seconds that the retries of one control request may add up to.
    retry_budget_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WebConfig:
    """The farm's page."""

    #: Start it.
    enabled: bool = True
    #: Address that it listens on.
    host: str = "127.0.0.1"
    #: Its port; 0: any, and the same again.
    port: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig:
    """The audit stream: who had what done with which layer."""

    #: Entries kept at most; 0: none are written.
    most_entries: int = 100_000
    #: Seconds that an entry is kept.
    retention_s: float = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """Where drivers outside the cluster come in, and browsers for the page."""

    #: ``up`` starts it; else ``lazyfarm gateway`` does.
    enabled: bool = False
    #: Address that it listens on; beyond loopback only with a certificate.
    host: str = "127.0.0.1"
    port: int = 8443
    #: Certificate chain and key (PEM) for TLS; both or neither.
    cert_file: str = ""
    key_file: str = ""
    #: S3 as drivers outside reach it, for what they send; "": as the farm does.
    s3_endpoint: str = ""
    #: Seconds for which a driver whose connection dropped may come back.
    grace_s: float = 30.0
    #: Drivers at one time.
    sessions: int = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """Logs."""

    #: ``debug``, ``info``, ``warning`` or ``error``.
    level: str = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingConfig:
    """Traces, by OpenTelemetry."""

    #: ``http[s]://HOST[:PORT]`` of who takes OTLP over HTTP; "": nothing is traced.
    endpoint: str = ""
    #: File with ``NAME: VALUE`` lines, headers of every request there; "" for none.
    headers_file: str = ""
    #: Share of the traces that begin here that are kept.
    sample_ratio: float = 1.0
    #: Begins the ``service.name`` of every span: ``-driver``, ``-scheduler``, … follows.
    service_name: str = "lazyfarm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that can be set."""

    farm: FarmConfig = field(default_factory=FarmConfig)
    redis: RedisConfig = field(default_factory=RedisConfig)
    s3: S3Config = field(default_factory=S3Config)
    ray: RayConfig = field(default_factory=RayConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    flight: FlightConfig = field(default_factory=FlightConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    node: NodeConfig = field(default_factory=NodeConfig)
    build: BuildConfig = field(default_factory=BuildConfig)
    web: WebConfig = field(default_factory=WebConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    log: LogConfig = field(default_factory=LogConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    tracing: TracingConfig = field(default_factory=TracingConfig)
    #: By registry host; ``default`` for the rest.
    registries: dict[str, RegistryConfig] = field(default_factory=dict)

    def registry(self, host: str) -> RegistryConfig:
        """Return what holds for a registry host."""
        return self.registries.get(host) or self.registries.get("default") or RegistryConfig()
