"""The actor classes as Ray sees them. Each imports what it is made of where it runs, and nowhere else.

Whoever looks an actor up, every driver and every command, imports its class for the names of its methods:
the real ones would bring the registry client, S3 and the unpackers along, which takes longer than Ray itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.topology import Kind

if TYPE_CHECKING:
    from actors.cache_shard import CacheShard
    from actors.fetch_worker import FetchWorker
    from actors.op_worker import OpWorker
    from actors.scheduler import SolverScheduler
    from actors.session_host import SessionServer


class RemoteSupervisor:
    """See :class:`actors.supervisor.Supervisor`."""

    def __init__(self, boot: bytes) -> None:
        from actors.supervisor import Supervisor  # noqa: PLC0415  # see above

        self._actor = Supervisor(
            boot,
            {
                Kind.CACHE_SHARD: RemoteCacheShard,
                Kind.FETCH_WORKER: RemoteFetchWorker,
                Kind.OP_WORKER: RemoteOpWorker,
                Kind.SCHEDULER: RemoteScheduler,
            },
        )

    async def config_digest(self) -> str:
        """Forward."""
        return self._actor.config_digest()

    async def ready(self) -> bool:
        """Forward."""
        return await self._actor.ready()


class _RemoteSessionServer:
    """See :class:`actors.session_host.SessionServer`."""

    _actor: SessionServer

    async def session_next(self, session_id: str, wait_s: float) -> bytes:
        """Forward."""
        return await self._actor.session_next(session_id, wait_s)

    async def session_answer(self, session_id: str, payload: bytes) -> None:
        """Forward."""
        await self._actor.session_answer(session_id, payload)


class RemoteCacheShard(_RemoteSessionServer):
    """See :class:`actors.cache_shard.CacheShard`."""

    _actor: CacheShard

    def __init__(self, boot: bytes) -> None:
        from actors.cache_shard import CacheShard  # noqa: PLC0415  # see above

        self._actor = CacheShard(boot)

    async def ready(self) -> bool:
        """Forward."""
        return await self._actor.ready()

    async def get_by_blob(self, payload: bytes) -> bytes:
        """Forward."""
        return await self._actor.get_by_blob(payload)

    async def get(self, payload: bytes) -> bytes:
        """Forward."""
        return await self._actor.get(payload)


class RemoteFetchWorker(_RemoteSessionServer):
    """See :class:`actors.fetch_worker.FetchWorker`."""

    _actor: FetchWorker

    def __init__(self, boot: bytes) -> None:
        from actors.fetch_worker import FetchWorker  # noqa: PLC0415  # see above

        self._actor = FetchWorker(boot)

    async def ready(self) -> bool:
        """Forward."""
        return await self._actor.ready()

    async def resolve_image(self, payload: bytes) -> bytes:
        """Forward."""
        return await self._actor.resolve_image(payload)

    async def pull(self, payload: bytes) -> bytes:
        """Forward."""
        return await self._actor.pull(payload)

    async def assemble(self, payload: bytes) -> bytes:
        """Forward."""
        return await self._actor.assemble(payload)

    async def unlazy(self, payload: bytes) -> bytes:
        """Forward."""
        return await self._actor.unlazy(payload)

    async def extract(self, payload: bytes) -> bytes:
        """Forward."""
        return await self._actor.extract(payload)

    async def node_usage(self, payload: bytes) -> bytes:
        """Forward."""
        return await self._actor.node_usage(payload)

    async def prune_node(self, payload: bytes) -> bytes:
        """Forward."""
        return await self._actor.prune_node(payload)

    async def push(self, payload: bytes) -> bytes:
        """Forward."""
        return await self._actor.push(payload)

    async def verify(self, payload: bytes) -> bytes:
        """Forward."""
        return await self._actor.verify(payload)

    async def export_cache(self, payload: bytes) -> bytes:
        """Forward."""
        return await self._actor.export_cache(payload)

    async def import_cache(self, payload: bytes) -> bytes:
        """Forward."""
        return await self._actor.import_cache(payload)


class RemoteOpWorker(_RemoteSessionServer):
    """See :class:`actors.op_worker.OpWorker`."""

    _actor: OpWorker

    def __init__(self, boot: bytes) -> None:
        from actors.op_worker import OpWorker  # noqa: PLC0415  # see above

        self._actor = OpWorker(boot)

    async def ready(self) -> bool:
        """Forward."""
        return await self._actor.ready()

    async def run_op(self, payload: bytes) -> bytes:
        """Forward."""
        return await self._actor.run_op(payload)

    async def watch_op(self, payload: bytes) -> bytes:
        """Forward."""
        return await self._actor.watch_op(payload)

    async def content_key(self, payload: bytes) -> bytes:
        """Forward."""
        return await self._actor.content_key(payload)


class RemoteScheduler(_RemoteSessionServer):
    """See :class:`actors.scheduler.SolverScheduler`."""

    _actor: SolverScheduler

    def __init__(self, boot: bytes) -> None:
        from actors.scheduler import SolverScheduler  # noqa: PLC0415  # see above

        self._actor = SolverScheduler(boot)

    async def ready(self) -> bool:
        """Forward."""
        return await self._actor.ready()

    async def look_for_jobs(self) -> None:
        """Forward."""
        await self._actor.look_for_jobs()
