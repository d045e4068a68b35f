"""Everything that one machine runs for a farm, behind one object: start, stop, look, remove."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from cluster.config import Config, RayConfig, RedisConfig, S3Config
from cluster.config_record import actor_digest, gateway_digest
from storage.blobs import S3ContentStore
from storage.services.gateway import GatewayService
from storage.services.page import PageService
from storage.services.process import FARM_MARK, ServiceProcess, end_marked
from storage.services.ray_nodes import RayService
from storage.services.redis_server import RedisService
from storage.services.state_dir import StateDir
from storage.services.swift import SwiftService

#: Seconds that a command waits for another that starts or stops the same service; the S3 server's first
#: start installs it.
_LOCK_S = 900.0

_Reached = TypeVar("_Reached", RedisConfig, S3Config, RayConfig)


@dataclass(frozen=True, slots=True)
class Started(Generic[_Reached]):
    """How to reach a service, and what was started for it."""

    config: _Reached
    #: Names of what this call started; empty where all of it ran already.
    started: tuple[str, ...] = ()
    #: Names of what this call ended, because it is wanted no more.
    stopped: tuple[str, ...] = ()

    @property
    def was_started(self) -> bool:
        """Tell whether this call started anything."""
        return bool(self.started)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStatus:
    """One process of the farm."""

    name: str
    pid: int | None
    alive: bool
    #: File that it prints to.
    log: str


class LocalServices:
    """The Redis, S3, Ray nodes, page and gateway of the farm in *state_dir*.

    Each ``up_`` method starts what doesn't run, also after a ``kill -9`` of any part of it, and does nothing
    else; they may run in parallel threads, and several commands at once wait for each other. Nothing outside
    the farm is ever touched: processes are known by pid and start time, and by the farm's mark.
    """

    def __init__(self, state_dir: Path, config: Config) -> None:
        self._state = StateDir(state_dir.absolute())
        self._config = config
        self._redis = RedisService(self._state)
        self._s3 = SwiftService(self._state)
        self._ray = RayService(self._state)
        self._page = PageService(self._state)
        self._gateway = GatewayService(self._state)

    def __repr__(self) -> str:
        alive = sum(status.alive for status in self.status())
        return f"LocalServices({str(self._state.root)!r}, alive={alive})"

    @property
    def farm_id(self) -> str:
        """Return the farm's UUID."""
        self._state.create()
        return self._state.farm_id()

    def up_redis(self) -> Started[RedisConfig]:
        """Start Redis unless it runs.

        Raises:
            StartError: it did not start.
            DeadlineExceededError: another command is at it and does not end.
        """
        with self._state.lock("redis", deadline_s=_LOCK_S):
            was_started = self._redis.start()
            return Started(self._redis.reached_by(self._config.redis), ("redis",) if was_started else ())

    def up_s3(self) -> Started[S3Config]:
        """Start the S3 server unless it runs, and make the bucket; errors as :meth:`up_redis`."""
        with self._state.lock("s3", deadline_s=_LOCK_S):
            was_started = self._s3.start(self._config.s3)
            reached = self._s3.reached_by(self._config.s3)
            if was_started:
                store = S3ContentStore(reached)
                try:
                    store.ensure_bucket()
                finally:
                    store.close()
            return Started(reached, ("s3",) if was_started else ())

    @property
    def jobs_url(self) -> str:
        """Return ``http://HOST:PORT`` where Ray takes jobs; "" where nothing was started that does."""
        return self._ray.jobs_url

    def up_ray(self, nodes: int) -> Started[RayConfig]:
        """Bring Ray to *nodes* nodes; errors as :meth:`up_redis`."""
        with self._state.lock("ray", deadline_s=_LOCK_S):
            started, stopped = self._ray.start(self._config.ray, nodes)
            reached = self._ray.reached_by(self._config.ray, nodes)
            return Started(reached, tuple(started), tuple(stopped))

    def up_page(self, config: Config, *, release: str = "") -> tuple[list[str], list[str]]:
        """Start the page unless it runs, or end one that is not wanted; return the names of what was started and ended.

        Args:
            config: As everything is reached. The farm's record is written: the page reads it.
            release: Of this code: after an upgrade it starts anew.

        Raises:
            StartError, DeadlineExceededError: as :meth:`up_redis`.
        """
        with self._state.lock("page", deadline_s=_LOCK_S):
            if not config.web.enabled:
                return [], self._page.stop()
            return ["page"] if self._page.start(config.web, f"{actor_digest(config)}@{release}") else [], []

    def up_gateway(self, config: Config, *, release: str = "") -> tuple[list[str], list[str]]:
        """Start the gateway, as :meth:`up_page` the page; anew also where the cluster that it joined was.

        Args:
            config: As of :meth:`up_page`.
            release: Likewise.

        Raises:
            StartError, DeadlineExceededError: as :meth:`up_redis`.
        """
        with self._state.lock("gateway", deadline_s=_LOCK_S):
            if not config.gateway.enabled:
                return [], self._gateway.stop()
            heads = [str(node.process.pid) for node in self._ray.nodes[:1]]
            digest = gateway_digest(config, release, *heads)
            return ["gateway"] if self._gateway.start(config.gateway, digest) else [], []

    def down(self) -> list[str]:
        """End everything, Ray after who uses it and Redis last, and keep the data; return the names of what ran."""
        stopped: list[str] = []
        for service in (self._gateway, self._page, self._ray, self._s3, self._redis):
            with self._state.lock(_lock_of(service), deadline_s=_LOCK_S):
                stopped += service.stop()
        farm_id = self._state.known_farm_id()
        if farm_id is not None:
            end_marked({FARM_MARK: farm_id})  # whatever was started between a crash and its record
        return stopped

    def purge(self) -> list[str]:
        """Stop everything and remove what the farm keeps in its directory, data and secrets included.

        Returns:
            Names of what is left there, because it is not the farm's.
        """
        if self._state.known_farm_id() is None:
            return []  # no farm's: nothing in it is touched
        self.down()
        self._ray.purge()
        return self._state.purge()

    def status(self) -> list[ServiceStatus]:
        """Return each process that should run, dead or alive; what was stopped on purpose is not listed."""
        return [
            ServiceStatus(name=process.name, pid=process.pid, alive=process.is_alive(), log=str(process.log))
            for process in self._processes()
            if process.pid is not None
        ]

    def _processes(self) -> Iterable[ServiceProcess]:
        yield from self._redis.processes
        yield from self._s3.processes
        yield from self._ray.processes
        yield from self._page.processes
        yield from self._gateway.processes


def _lock_of(service: RedisService | SwiftService | RayService | PageService | GatewayService) -> str:
    match service:
        case PageService() | GatewayService():
            return service.name
        case RedisService():
            return "redis"
        case SwiftService():
            return "s3"
        case RayService():
            return "ray"
