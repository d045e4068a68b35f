"""The composition root: configuration → running cluster. Used by the command line and by tests."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from actors.boot import Boot, nodes_dir
from actors.join import join, leave
from actors.nodes import live_nodes, observe_nodes
from actors.options import namespace, options
from actors.ray_errors import telling
from actors.remote import RemoteSupervisor
from actors.version import VERSION
from cluster.config import Config
from cluster.config_record import actor_digest, differing_keys
from cluster.errors import FarmNotRunningError, StartError
from cluster.messages import ActorRecord, NodeRecord
from cluster.settings import FarmSettings, Running
from cluster.topology import NUMBERED, ON_EACH_NODE, Kind, NodeView, numbers, supervisor_name, unlike, version_of
from cluster.wire import encode
from storage.blobs import S3ContentStore
from storage.connect import check_policy, connect, connect_sync
from storage.farm_file import forget_running, read_running, write_running
from storage.keys import Keys
from storage.presence import Presence
from storage.services.local import LocalServices
from storage.services.state_dir import StateDir
from storage.snapshots import choose

_READY_S = 120.0
_POLL_S = 0.2
#: Seconds that Ray may take to end or restart an actor, or to free its name.
_RESTART_S = 30.0
#: Seconds that one ``up`` or ``down`` waits for another; the S3 server's first start installs it.
_LOCK_S = 900.0

#: Under the state directory: a link to the directory that ``node.root`` names.
_NODE_ROOT = "node-root"

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpReport:
    """What ``up`` did."""

    #: Parts that were started or repaired.
    started: tuple[str, ...]
    #: Parts that were ended: nodes that are wanted no more, actors that had another configuration or release.
    stopped: tuple[str, ...] = ()
    #: Other releases, whose actors go on for the drivers that use them.
    others: tuple[str, ...] = ()
    settings: FarmSettings

    @property
    def changed(self) -> bool:
        """Tell whether anything was done: False where everything ran already, as it is wanted."""
        return bool(self.started or self.stopped)


@dataclass(frozen=True, slots=True, kw_only=True)
class DownReport:
    """What ``down`` did."""

    #: Whether a farm was ever brought up there; where not, nothing was done.
    was_farm: bool
    stopped: tuple[str, ...] = ()
    #: After a purge: what is in the directory still, because it is not the farm's.
    left: tuple[str, ...] = ()


def up(
    settings: FarmSettings, *, nodes: int | None, retire: bool = False, report: Report = lambda _line: None
) -> UpReport:
    """Start what the farm lacks and wait until all of it answers. Idempotent; repairs what was killed.

    Actors that run with another configuration than is wanted now are ended and started anew. What is recorded
    for drivers changes in between: none ever reads a configuration that actors run without.

    Actors of other releases go on: drivers that joined before an upgrade use them until they leave.

    Args:
        settings: The farm.
        nodes: Ray nodes on this machine; None: as configured where that was changed, else as many as run.
        retire: End actors of other releases, once this one's are ready; jobs that they build go on at these.
        report: Told of each step in one line.

    Raises:
        StartError: a part did not start. UnsafeStoreError: a store would not keep the farm's promises.
        ConfigError: the settings can't be used.
    """
    wanted = settings.wanted
    state = StateDir(settings.state_dir)
    state.claim()
    services = LocalServices(settings.state_dir, wanted)
    with state.lock("up", deadline_s=_LOCK_S):
        before = read_running(settings.state_dir)
        count = nodes or _wanted_nodes(services, wanted, before)
        if wanted.redis.url:
            _check_redis(wanted)  # before anything is started for its sake
        config, started, stopped = _up_services(services, wanted, count)
        _tell(report, started, stopped)
        _check_redis(config)
        store = S3ContentStore(config.s3)
        try:
            store.ensure_bucket()
        finally:
            store.close()
        running = Running(
            farm_id=services.farm_id,
            config_file=settings.config_file,
            config=wanted,
            overrides=settings.overrides,
            farm_name=config.farm.name,
            redis_url=config.redis.url,
            redis_password_file=config.redis.password_file,
            s3_endpoint=config.s3.endpoint,
            s3_region=config.s3.region,
            s3_bucket=config.s3.bucket,
            s3_credentials_file=config.s3.credentials_file,
            ray_address=config.ray.address,
            ray_token_file=config.ray.token_file,
            ray_jobs_url="" if wanted.ray.address else services.jobs_url,
        )
        _link_root(settings)
        retired = _retire_elsewhere(settings, before, running, report)
        join(config, state_dir=str(settings.state_dir))
        try:
            retired += _retire_outdated(config)
            if before is not None and (changed := differing_keys(before.config, wanted)):
                report(f"configuration changed: {', '.join(changed)}")
            _tell(report, [], retired)
            write_running(settings.state_dir, running)
            expected = None if wanted.ray.address else frozenset(f"n{index}" for index in range(count))
            actors = _up_actors(config, settings.state_dir, expected)
            former = _former(config)
            if retire:
                _retire(config, former)
        finally:
            leave()
        _tell(report, actors, former if retire else [])
        page, no_page = services.up_page(config, release=VERSION)
        _tell(report, page, no_page)
        gateway, no_gateway = services.up_gateway(config, release=VERSION)
        _tell(report, gateway, no_gateway)
    return UpReport(
        started=(*started, *actors, *page, *gateway),
        stopped=(*stopped, *retired, *(former if retire else ()), *no_page, *no_gateway),
        others=() if retire else tuple(sorted({version_of(name) for name in former})),
        settings=replace(settings, running=running),
    )


def _tell(report: Report, started: Iterable[str], stopped: Iterable[str]) -> None:
    for name in stopped:
        report(f"stopped {name}")
    for name in started:
        report(f"started {name}")


def _check_redis(config: Config) -> None:
    link = connect_sync(config.redis)
    try:
        check_policy(link, Keys(config.farm.name))
    finally:
        link.close()


def _up_services(services: LocalServices, wanted: Config, nodes: int) -> tuple[Config, list[str], list[str]]:
    """Start what *wanted* doesn't name, side by side; return how all is reached, what was started and what ended."""
    config = wanted
    started: list[str] = []
    stopped: list[str] = []
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
        stopped += ray_nodes.result().stopped
    return config, started, stopped


def _wanted_nodes(services: LocalServices, wanted: Config, before: Running | None) -> int:
    """Return how many Ray nodes there are to be: as many as there were, unless the configuration was changed."""
    if before is not None and before.config.ray.nodes != wanted.ray.nodes:
        return wanted.ray.nodes
    return _running_nodes(services) or wanted.ray.nodes


def _running_nodes(services: LocalServices) -> int:
    """Return how many Ray nodes were brought up and not taken down, dead or alive."""
    return sum(status.name.startswith("ray-n") for status in services.status())


# -- actors --------------------------------------------------------------------------------------------------


def _retire_elsewhere(settings: FarmSettings, before: Running | None, now: Running, report: Report) -> list[str]:
    """End the farm's actors where its name, or the cluster it uses, was another; return their names."""
    if before is None or (before.farm_name, before.ray_address) == (now.farm_name, now.ray_address):
        return []
    return _retire_actors(replace(settings, wanted=before.config, running=before), report)


def _retire_outdated(config: Config) -> list[str]:
    """End this release's actors unless all have *config*; return their names. The process has joined the cluster.

    All of them: where one has another, they don't belong together any more. Their callers call again. Where all have
    it, those alone that a node started with another release's code: it may have this one's by now.
    """
    digest = actor_digest(config)
    space = namespace(config.farm.name)
    ours = [name for name in _named_actors(space) if version_of(name) == VERSION]
    records = asyncio.run(_presence(config))[1]
    others = {actor.name for actor in unlike(records, VERSION)}
    # Another release's code has other keys, and so another digest of the same configuration.
    said = {actor.name: actor.config for actor in records if actor.name not in others}
    name = supervisor_name(VERSION)
    if all(said.get(name, digest) == digest for name in ours) and (
        name in others or _supervisor_digest(name, space) in (None, digest)
    ):
        ours = sorted(others.intersection(ours))
    _retire(config, ours)
    return ours


def _former(config: Config) -> list[str]:
    """Return the actors of other releases, in the order in which they are to end."""
    return [name for name in _named_actors(namespace(config.farm.name)) if version_of(name) != VERSION]


def _retire(config: Config, names: Sequence[str]) -> None:
    """End actors, and have them told of no more."""
    _end_actors(names, namespace(config.farm.name))
    asyncio.run(_forget(config, names))


def _supervisor_digest(name: str, space: str) -> str | None:
    """Ask the supervisor for its configuration, as what it says in Redis may be in another one; None: none runs."""
    give_up_s = time.monotonic() + _RESTART_S
    while True:
        try:
            supervisor: Any = ray.get_actor(name, namespace=space)
            digest: Any = ray.get(supervisor.config_digest.remote(), timeout=_RESTART_S)
        except (ValueError, ray.exceptions.ActorDiedError):
            return None
        except ray.exceptions.RayError as exc:
            if not isinstance(exc, ray.exceptions.ActorUnavailableError) or time.monotonic() >= give_up_s:
                return ""  # it is no use as it is
            time.sleep(_POLL_S)
        else:
            return str(digest)


def _named_actors(space: str) -> list[str]:
    """Return the farm's actors, the supervisor first: it would bring the others back."""
    listed = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in listed if actor["namespace"] == space]
    return sorted(names, key=lambda name: (not name.startswith(Kind.SUPERVISOR.value), name))


def _end_actors(names: Sequence[str], space: str) -> None:
    """End actors in this order, and wait until their names are free."""
    for name in names:
        with contextlib.suppress(ValueError):  # it has ended by itself
            ray.kill(ray.get_actor(name, namespace=space), no_restart=True)
    give_up_s = time.monotonic() + _RESTART_S
    while left := set(names) & set(_named_actors(space)):
        if time.monotonic() >= give_up_s:
            raise StartError("actors", f"{', '.join(sorted(left))} did not end in {_RESTART_S:.0f} s", "")
        time.sleep(_POLL_S)


def _up_actors(config: Config, state_dir: Path, expected: frozenset[str] | None) -> list[str]:
    """Make sure of the supervisor, and wait until every actor it wants is ready; return those that were not."""
    before = _ready_names(asyncio.run(_presence(config))[1])
    name = supervisor_name(VERSION)
    give_up_s = time.monotonic() + _READY_S
    died_s = time.monotonic() + _RESTART_S
    while True:
        head = _head_node()
        boot = Boot(
            config=config,
            state_dir=str(state_dir),
            name=name,
            kind=Kind.SUPERVISOR.value,
            node=head.name,
            ray_id=head.ray_id,
        )
        chosen = options(Kind.SUPERVISOR, name=name, farm=config.farm.name, ray_node_id=head.ray_id)
        supervisor: Any = ray.remote(RemoteSupervisor).options(**chosen).remote(encode("boot", boot))
        try:
            ray.get(supervisor.ready.remote(), timeout=max(1.0, give_up_s - time.monotonic()))
            break
        except ray.exceptions.RayError as exc:
            # One whose node or process died just now: Ray restarts it, or frees its name.
            unavailable = isinstance(exc, ray.exceptions.ActorUnavailableError) and time.monotonic() < give_up_s
            died = isinstance(exc, ray.exceptions.ActorDiedError) and not exc.actor_init_failed
            if not (unavailable or (died and time.monotonic() < died_s)):
                raise StartError("supervisor", telling(exc), str(state_dir / "logs")) from exc
            time.sleep(_POLL_S)
    return sorted(asyncio.run(_wait_ready(config, expected)) - before)


def _head_node() -> NodeView:
    """Return the node of the GCS, where the supervisor belongs: without it there is no cluster to supervise."""
    give_up_s = time.monotonic() + _RESTART_S
    while True:
        for node in observe_nodes():
            if node.is_alive and node.is_head:
                return node.view
        if time.monotonic() >= give_up_s:
            raise StartError("supervisor", "Ray names no live head node", "")
        time.sleep(_POLL_S)


async def _presence(config: Config) -> tuple[list[NodeRecord], list[ActorRecord]]:
    link = connect(config.redis)
    try:
        presence = Presence(link, Keys(config.farm.name))
        return await presence.nodes(), await presence.actors()
    finally:
        await link.close()


async def _forget(config: Config, names: Sequence[str]) -> None:
    link = connect(config.redis)
    try:
        await Presence(link, Keys(config.farm.name)).forget(names)
    finally:
        await link.close()


async def _wait_ready(config: Config, expected: frozenset[str] | None) -> set[str]:
    """Wait until what is told of the farm is so, and as it is wanted; return the names of all ready actors.

    Each node has its workers, every shard and scheduler is there, all with this configuration, and nobody is told
    of a node or an actor that has gone. *expected* names the nodes; None: those of a cluster that somebody else runs.
    """
    digest = actor_digest(config)
    wanted = numbers(config)
    give_up_s = time.monotonic() + _READY_S
    while True:
        nodes, actors = await _presence(config)
        seen = {(node.name, node.ray_id) for node in live_nodes(await asyncio.to_thread(observe_nodes))}
        told = {(node.id, node.ray_id) for node in nodes if node.alive}
        names = {name for name, _ in told}
        places = {ray_id for _, ray_id in told}
        # By name: an older release's actor that Ray restarts runs this release's code, too.
        current = [actor for actor in actors if version_of(actor.name) == VERSION]
        if wrong := [actor for actor in unlike(current, VERSION) if actor.state == "ready"]:
            there = ", ".join(sorted({f"node {actor.node} has release {actor.version}" for actor in wrong}))
            raise StartError(wrong[0].name, f"{there}, not {VERSION}: install that, and `lazyfarm up` again", "")
        ready = [a for a in current if a.state == "ready" and a.config == digest and a.ray_id in places]
        on_nodes = {kind: {a.node for a in ready if a.kind == kind.value} for kind in ON_EACH_NODE}
        counted = {kind: sum(a.kind == kind.value for a in ready) for kind in NUMBERED}
        # A name twice: Ray has not noticed yet that the node was killed.
        are_nodes_right = told == seen and len(told) == len(names) > 0 and names == (expected or names)
        are_workers_right = all(there == names for there in on_nodes.values())
        if are_nodes_right and are_workers_right and counted == wanted and len(ready) == len(current):
            return _ready_names(actors)
        if time.monotonic() > give_up_s:
            raise StartError(
                "actors",
                f"after {_READY_S:.0f} s nodes {sorted(names)} are told of as alive, Ray has {sorted(seen)}, "
                f"wanted are {sorted(expected or names)}; "
                + "".join(
                    f"{kind.value}s are missing on {sorted(names - there)}, "
                    for kind, there in on_nodes.items()
                    if names - there
                )
                + "".join(f"{counted[kind]} of {number} {kind.value}s are ready, " for kind, number in wanted.items())
                + f"{len(current) - len(ready)} actors are lost or outdated",
                "",
            )
        await asyncio.sleep(_POLL_S)


def _ready_names(actors: list[ActorRecord]) -> set[str]:
    return {actor.name for actor in actors if actor.state == "ready"}


# -- down ----------------------------------------------------------------------------------------------------


def down(settings: FarmSettings, *, purge: bool, report: Report = lambda _line: None) -> DownReport:
    """End exactly what ``up`` started, and keep the data; with *purge* remove that too, and nothing else.

    A directory in which no farm was ever brought up is left as it is, or not made.
    """
    state = StateDir(settings.state_dir)
    if state.known_farm_id() is None:
        return DownReport(was_farm=False)
    services = LocalServices(settings.state_dir, settings.wanted)
    left: list[str] = []
    with state.lock("up", deadline_s=_LOCK_S):
        # Actors end with the nodes they run on, but a cluster that was there before goes on.
        stopped = [] if settings.running is None or _running_nodes(services) else _retire_actors(settings, report)
        stopped += services.down()
        nodes = [nodes_dir(Config(), str(settings.state_dir)), *_named_root(settings.state_dir)]
        for root in (snapshots for one in nodes for snapshots in one.glob("*/snapshots")):
            snapshotter = choose(root, "auto")
            for name in snapshotter.mounts():
                snapshotter.unmount(name)
        _tell(report, [], stopped)
        forget_running(settings.state_dir)
        if purge:
            for one in nodes:
                _remove_nodes(one)
            left = services.purge()
    return DownReport(was_farm=True, stopped=tuple(stopped), left=tuple(left))


def _retire_actors(settings: FarmSettings, report: Report) -> list[str]:
    """End this farm's actors, of every release, in the cluster that is recorded; return their names."""
    config = settings.config
    space = namespace(config.farm.name)
    try:
        join(config, state_dir=str(settings.state_dir))
    except FarmNotRunningError as exc:
        report(str(exc))  # whatever ran there is gone with it
        return []
    try:
        names = _named_actors(space)
        _end_actors(names, space)
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
    for lock in root.glob("*/lock"):
        lock.unlink(missing_ok=True)
    for directory in (*root.glob("*"), root):
        with contextlib.suppress(OSError):  # somebody else's, or not empty
            directory.rmdir()
