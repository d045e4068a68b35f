"""What an actor is started with, and the adapters it builds from that. No secret: only files that hold them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import ray
import ray.exceptions
import structlog

from actors.logs import configure_logs
from actors.metrics import export_metrics
from actors.traces import start_traces
from actors.version import VERSION
from cluster.cache.runner import CacheManager
from cluster.config import Config
from cluster.config_record import actor_digest
from cluster.errors import ClusterError
from cluster.fetch.access import AccessControl
from cluster.messages import ActorRecord
from cluster.metrics import ACTOR_STARTS
from cluster.ports import ProgressStore
from cluster.topology import Kind, version_of
from storage.audit import RedisAudit
from storage.blobs import S3ContentStore
from storage.bucket_caches import BucketCaches, Probers
from storage.connect import connect
from storage.faults import arm_from_environment
from storage.flights import RedisFlightStore
from storage.job_events import RedisJobEvents
from storage.keys import Keys
from storage.leases import RedisLeaseStore
from storage.limits import RedisHostLimiter
from storage.link import RedisLink
from storage.presence import PRESENCE_TTL_S, Presence
from storage.progress import JobProgress, RedisProgressStore
from storage.proofs import RedisProofStore
from storage.refs import RedisRefStore
from storage.registry.client import RegistryClient
from storage.traffic import RedisTraffic
from storage.whereabouts import RedisWhereabouts

log = structlog.get_logger()

#: Seconds between an actor's tries to start.
_START_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """What every actor is given: Ray stores it, so it holds no secret."""

    config: Config
    #: The farm's directory on this machine, for logs and node data; "" where the node has none.
    state_dir: str
    #: Actor name and node.
    name: str
    kind: str
    node: str
    #: Ray ID of that node.
    ray_id: str = ""
    #: Number of a shard.
    index: int = 0

    @property
    def version(self) -> str:
        """Return the release it serves, its name's: Ray restarts it with the code that is installed by then."""
        return version_of(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """The adapters over Redis and registries that shards and workers share."""

    link: RedisLink
    refs: RedisRefStore
    leases: RedisLeaseStore
    flights: RedisFlightStore
    proofs: RedisProofStore
    limiter: RedisHostLimiter
    progress: ProgressStore
    presence: Presence
    whereabouts: RedisWhereabouts
    traffic: RedisTraffic
    audit: RedisAudit
    registry: RegistryClient
    buckets: BucketCaches
    access: AccessControl
    cache: CacheManager

    async def aclose(self) -> None:
        """Close every connection."""
        await self.registry.aclose()
        self.buckets.close()
        await self.link.close()


def build_stores(config: Config, *, name: str = "") -> Stores:
    """Build the adapters, for the running event loop of the actor *name*."""
    link = connect(config.redis)
    keys = Keys(config.farm.name)
    audit = RedisAudit(link, keys, config.audit, by=name)
    limiter = RedisHostLimiter(link, keys, config)
    registry = RegistryClient(config, limiter=limiter)
    proofs = RedisProofStore(link, keys)
    refs = RedisRefStore(link, keys, audit)
    buckets = BucketCaches(S3ContentStore(config.s3))
    access = AccessControl(proofs, Probers(registry, buckets), proof_ttl_s=config.cache.proof_ttl_s)
    return Stores(
        link=link,
        refs=refs,
        leases=RedisLeaseStore(link, keys),
        flights=RedisFlightStore(link, keys, audit),
        proofs=proofs,
        limiter=limiter,
        progress=JobProgress(RedisProgressStore(link, keys), RedisJobEvents(link, keys)),
        presence=Presence(link, keys),
        whereabouts=RedisWhereabouts(link, keys),
        traffic=RedisTraffic(link, keys),
        audit=audit,
        registry=registry,
        buckets=buckets,
        access=access,
        cache=CacheManager(refs, access),
    )


class Background:
    """An actor's background tasks: owned, logged when they fail, ended with the actor."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()

    def spawn(self, work: Coroutine[object, object, object] | Awaitable[object]) -> asyncio.Task[object]:
        """Run *work* until it ends by itself or the actor does."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("background.failed", error=str(error), error_type=type(error).__name__)

    async def aclose(self) -> None:
        """Cancel what still runs."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2.0)


class Starter:
    """Builds an actor's parts at its first call, once: its event loop doesn't run in its constructor.

    That first call is the actor's own, to its ``ready``: where Ray restarts an actor that was killed, nobody
    else may call it for a long time, and until it is started it neither cleans up nor shows as there.
    """

    def __init__(self, boot: Boot) -> None:
        self.boot = boot
        self.background = Background()
        #: Tells how many calls the actor has under way; replaced by one that counts them.
        self.calls: Callable[[], int] = lambda: 0
        self._lock: asyncio.Lock | None = None
        self._is_started = False
        self._is_exported = False
        if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
            me = ray.get_runtime_context().current_actor
            threading.Thread(target=_call_ready, args=(me,), name="start", daemon=True).start()

    async def start(self, build: Callable[[], Awaitable[Presence]]) -> None:
        """Run *build* unless it was run, then announce the actor every few seconds."""
        if self._is_started:
            return
        if self._lock is None:
            self._lock = asyncio.Lock()
        async with self._lock:
            if self._is_started:
                return
            configure_logs(
                level=self.boot.config.log.level, stream=log_file(self.boot), actor=self.boot.name, node=self.boot.node
            )
            arm_from_environment(os.environ)
            start_traces(self.boot.config, component=self.boot.kind, instance=self.boot.name, node=self.boot.node)
            self._export_metrics()
            presence = await build()
            await presence.announce(self._record())
            self.background.spawn(self._keep_announcing(presence))
            self._is_started = True
            ACTOR_STARTS.add()
            log.info("actor.ready", pid=os.getpid())

    def _export_metrics(self) -> None:
        # Once, however often it takes to start; and not where no actor is.
        if ray.is_initialized() and not self._is_exported:
            self._is_exported = True
            farm = self.boot.config.farm.name
            shown = export_metrics(Kind(self.boot.kind), farm=farm, node=self.boot.node, actor=self.boot.name)
            self.background.spawn(shown.refresh_forever())

    def _record(self) -> ActorRecord:
        return ActorRecord(
            name=self.boot.name,
            kind=self.boot.kind,
            node=self.boot.node,
            pid=os.getpid(),
            state="ready",
            version=VERSION,
            ray_id=self.boot.ray_id,
            config=actor_digest(self.boot.config),
            calls=self.calls(),
        )

    async def _keep_announcing(self, presence: Presence) -> None:
        while True:
            await asyncio.sleep(PRESENCE_TTL_S / 3)
            with contextlib.suppress(ClusterError):  # Redis is away: said again in a moment
                await presence.announce(self._record())


def _call_ready(actor: Any) -> None:
    """Call the actor's ``ready`` until it is: a store may be away at the moment."""
    while True:
        try:
            ray.get(actor.ready.remote())
        except ray.exceptions.RayError:
            time.sleep(_START_PAUSE_S)
        else:
            return


def log_file(boot: Boot) -> TextIO:
    """Open this actor's log for appending: a file of its own under the state directory, else standard error."""
    if not boot.state_dir:
        return sys.stderr
    path = Path(boot.state_dir) / "logs" / f"{boot.name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a", encoding="utf-8", buffering=1)


def new_token() -> str:
    """Return a token that nobody else has."""
    return secrets.token_hex(12)


def nodes_dir(config: Config, state_dir: str) -> Path:
    """Return the directory with one directory a node of this machine."""
    return Path(config.node.root or Path(state_dir, "nodes"))


def node_root(boot: Boot) -> Path:
    """Return the directory for this node's cache, snapshots and mounts."""
    return nodes_dir(boot.config, boot.state_dir) / boot.node
