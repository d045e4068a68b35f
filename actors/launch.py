"""The composition root: configuration → running cluster. Used by the command line and by tests."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from actors.boot import Boot, nodes_dir
from actors.join import join, leave
from actors.options import namespace, options
from actors.remote import RemoteSupervisor
from actors.version import VERSION
from cluster.config import Config
from cluster.errors import FarmNotRunningError, StartError
from cluster.messages import ActorRecord, NodeRecord
from cluster.settings import FarmSettings, Running
from cluster.topology import Kind, supervisor_name
from cluster.wire import encode
from storage.blobs import S3ContentStore
from storage.connect import check_policy_sync, connect, connect_sync
from storage.farm_file import forget_running, write_running
from storage.keys import Keys
from storage.presence import Presence
from storage.services.local import LocalServices
from storage.services.state_dir import StateDir
from storage.snapshots import choose

_READY_S = 120.0
_POLL_S = 0.2
#: Seconds that one ``up`` or ``down`` waits for another; the S3 server's first start installs it.
_LOCK_S = 900.0

#: Under the state directory: a link to the directory that ``node.root`` names.
_NODE_ROOT = "node-root"

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpReport:
    """What ``up`` did."""

    #: False where everything ran already.
    changed: bool
    #: Parts that were started or repaired.
    started: tuple[str, ...]
    settings: FarmSettings


def up(settings: FarmSettings, *, nodes: int | None, report: Report = lambda _line: None) -> UpReport:
    """Start what the farm lacks and wait until all of it answers. Idempotent; repairs what was killed.

    Args:
        settings: The farm.
        nodes: Ray nodes on this machine; None: as many as run, or as configured.
        report: Told of each step in one line.

    Raises:
        StartError: a part did not start. UnsafeStoreError: a store would not keep the farm's promises.
        ConfigError: the settings can't be used.
    """
    wanted = settings.wanted
    services = LocalServices(settings.state_dir, wanted)
    with StateDir(settings.state_dir).lock("up", deadline_s=_LOCK_S):
        count = nodes or _running_nodes(services) or wanted.ray.nodes
        if wanted.redis.url:
            _check_redis(wanted)  # before anything is started for its sake
        config, started = _up_services(services, wanted, count)
        for name in started:
            report(f"started {name}")
        _check_redis(config)
        store = S3ContentStore(config.s3)
        try:
            store.ensure_bucket()
        finally:
            store.close()
        running = Running(
            farm_id=services.farm_id,
            config_file=settings.config_file,
            farm_name=config.farm.name,
            redis_url=config.redis.url,
            redis_password_file=config.redis.password_file,
            s3_endpoint=config.s3.endpoint,
            s3_region=config.s3.region,
            s3_bucket=config.s3.bucket,
            s3_credentials_file=config.s3.credentials_file,
            ray_address=config.ray.address,
            ray_token_file=config.ray.token_file,
        )
        _link_root(settings)
        write_running(settings.state_dir, running)
        settings = replace(settings, running=running)
        actors = _up_actors(config, settings, expected_nodes=1 if wanted.ray.address else count)
        for name in actors:
            report(f"started {name}")
    return UpReport(changed=bool(started or actors), started=(*started, *actors), settings=settings)


def _check_redis(config: Config) -> None:
    link = connect_sync(config.redis)
    try:
        check_policy_sync(link)
    finally:
        link.close()


def _up_services(services: LocalServices, wanted: Config, nodes: int) -> tuple[Config, list[str]]:
    """Start what *wanted* doesn't name, side by side; return how all of it is reached and what was started."""
    config = wanted
    started: list[str] = []
    with ThreadPoolExecutor(3, thread_name_prefix="up") as pool:
        redis = None if wanted.redis.url else pool.submit(services.up_redis)
        s3 = None if wanted.s3.endpoint else pool.submit(services.up_s3)
        ray_nodes = None if wanted.ray.address else pool.submit(services.up_ray, nodes)
    if redis is not None:
        config = replace(config, redis=redis.result().config)
        started += redis.result().started
    if s3 is not None:
        config = replace(config, s3=s3.result().config)
        started += s3.result().started
    if ray_nodes is not None:
        config = replace(config, ray=ray_nodes.result().config)
        started += ray_nodes.result().started
    return config, started


def _running_nodes(services: LocalServices) -> int:
    """Return how many Ray nodes were brought up and not taken down, dead or alive."""
    return sum(status.name.startswith("ray-") for status in services.status())


def _up_actors(config: Config, settings: FarmSettings, *, expected_nodes: int) -> list[str]:
    """Make sure of the supervisor, and wait until every actor it wants is ready; return those that were not."""
    before = _ready_names(asyncio.run(_presence(config))[1])
    join(config, state_dir=str(settings.state_dir))
    try:
        name = supervisor_name(VERSION)
        boot = Boot(
            config=config,
            state_dir=str(settings.state_dir),
            name=name,
            kind=Kind.SUPERVISOR.value,
            node="head",
        )
        chosen = options(Kind.SUPERVISOR, name=name, farm=config.farm.name, ray_node_id=None)
        _await_supervisor(chosen, encode("boot", boot), str(settings.state_dir / "logs"))
        after = asyncio.run(_wait_ready(config, expected_nodes))
    finally:
        leave()
    return sorted(after - before)


def _await_supervisor(chosen: dict[str, Any], boot: bytes, logs: str) -> None:
    """Find or make the supervisor and wait until it is ready.

    One whose node or process died just now is being restarted by Ray elsewhere: until that is done, calls fail.
    """
    give_up_s = time.monotonic() + _READY_S
    while True:
        supervisor: Any = ray.remote(RemoteSupervisor).options(**chosen).remote(boot)
        try:
            ray.get(supervisor.ready.remote(), timeout=max(1.0, give_up_s - time.monotonic()))
        except ray.exceptions.RayError as exc:
            if isinstance(exc, ray.exceptions.ActorUnavailableError) and time.monotonic() < give_up_s:
                time.sleep(_POLL_S)
                continue
            raise StartError("supervisor", str(exc).strip().splitlines()[-1], logs) from exc
        return


async def _presence(config: Config) -> tuple[list[NodeRecord], list[ActorRecord]]:
    link = connect(config.redis)
    try:
        presence = Presence(link, Keys(config.farm.name))
        return await presence.nodes(), await presence.actors()
    finally:
        await link.close()


async def _wait_ready(config: Config, expected_nodes: int) -> set[str]:
    """Wait until each node has its worker and every shard is there; return the names of all."""
    give_up_s = time.monotonic() + _READY_S
    while True:
        nodes, actors = await _presence(config)
        live = {node.id: node.ray_id for node in nodes if node.alive}
        ready = [actor for actor in actors if actor.state == "ready" and actor.version == VERSION]
        workers = {a.node for a in ready if a.kind == Kind.FETCH_WORKER.value and live.get(a.node) == a.ray_id}
        shards = [a for a in ready if a.kind == Kind.CACHE_SHARD.value and a.ray_id in live.values()]
        if len(live) >= expected_nodes and workers == set(live) and len(shards) >= config.cache.shards:
            return _ready_names(actors)
        if time.monotonic() > give_up_s:
            missing = sorted(set(live) - workers)
            raise StartError(
                "actors",
                f"after {_READY_S:.0f} s {len(live)} of {expected_nodes} nodes are alive, "
                f"workers are missing on {missing or 'none'}, {len(shards)} of {config.cache.shards} shards are ready",
                "",
            )
        await asyncio.sleep(_POLL_S)


def _ready_names(actors: list[ActorRecord]) -> set[str]:
    return {actor.name for actor in actors if actor.state == "ready"}


def down(settings: FarmSettings, *, purge: bool, report: Report = lambda _line: None) -> list[str]:
    """End exactly what ``up`` started, and keep the data; with *purge* remove that too. Returns what was ended."""
    services = LocalServices(settings.state_dir, settings.wanted)
    with StateDir(settings.state_dir).lock("up", deadline_s=_LOCK_S):
        # Actors end with the nodes they run on, but a cluster that was there before goes on.
        stopped = [] if settings.running is None or _running_nodes(services) else _retire_actors(settings, report)
        stopped += services.down()
        nodes = [nodes_dir(Config(), str(settings.state_dir)), *_named_root(settings.state_dir)]
        for root in (snapshots for one in nodes for snapshots in one.glob("*/snapshots")):
            snapshotter = choose(root, "auto")
            for name in snapshotter.mounts():
                snapshotter.unmount(name)
        for name in stopped:
            report(f"stopped {name}")
        forget_running(settings.state_dir)
        if purge:
            for one in nodes:
                _remove_nodes(one)
            services.purge()
            report(f"removed {settings.state_dir}")
    return stopped


def _retire_actors(settings: FarmSettings, report: Report) -> list[str]:
    """End this farm's actors in a cluster that the farm did not start; return their names."""
    config = settings.config
    space = namespace(config.farm.name)
    try:
        join(config, state_dir=str(settings.state_dir))
    except FarmNotRunningError as exc:
        report(str(exc))  # whatever ran there is gone with it
        return []
    try:
        listed = ray.util.list_named_actors(all_namespaces=True)
        names = sorted(actor["name"] for actor in listed if actor["namespace"] == space)
        # The supervisor first: it would bring the others back.
        names.sort(key=lambda name: not name.startswith(Kind.SUPERVISOR.value))
        for name in names:
            with contextlib.suppress(ValueError):  # it has ended by itself
                ray.kill(ray.get_actor(name, namespace=space), no_restart=True)
    finally:
        leave()
    return names


def _link_root(settings: FarmSettings) -> None:
    """Remember where ``node.root`` is, for a ``down --purge`` that comes after the configuration was forgotten."""
    if settings.wanted.node.root:
        link = settings.state_dir / _NODE_ROOT
        link.unlink(missing_ok=True)
        link.symlink_to(settings.wanted.node.root)


def _named_root(state_dir: Path) -> list[Path]:
    link = state_dir / _NODE_ROOT
    return [link.readlink()] if link.is_symlink() else []


def _remove_nodes(root: Path) -> None:
    """Remove the nodes' caches and snapshots under *root*, which may be a directory that holds other things, too."""
    for part in (*root.glob("*/cache"), *root.glob("*/snapshots")):
        shutil.rmtree(part, ignore_errors=True)
    for directory in (*root.glob("*"), root):
        with contextlib.suppress(OSError):  # somebody else's, or not empty
            directory.rmdir()
