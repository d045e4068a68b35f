"""Where commands reach the farm: imported lazily, so that reading commands never pay for Ray."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cluster import tracing
from cluster.errors import FarmNotRunningError, NotThroughGatewayError
from lazyfarm.cli.output import Output
from lazyfarm.cli.reach import accepts, url_address
from lazyfarm.gateway.access import gateway_url
from lazyfarm.settings import FarmSettings, load_settings

if TYPE_CHECKING:
    from cluster.collect.stock import Kept
    from cluster.ports import AuditLog, AuditReader, ObjectInfo
    from lazyfarm.collection import FarmCollection
    from lazyfarm.drain import FarmDrain
    from lazyfarm.explain import FarmExplain
    from lazyfarm.farm import Farm
    from lazyfarm.gateway.farm import GatewayFarm
    from lazyfarm.jobs import FarmJobs
    from lazyfarm.leases import FarmLeases
    from lazyfarm.now import Look
    from lazyfarm.records import FarmRecords
    from lazyfarm.status import FarmStatus

T = TypeVar("T")
P = TypeVar("P")

#: Loopback answers in well under a millisecond, or has nobody there.
_CONNECT_S = 1.0


def running_settings(state_dir: str | None) -> FarmSettings:
    """Return the settings of a farm that was brought up.

    Raises:
        ConfigError: they have faults.
        FarmNotRunningError: nothing was brought up there.
        NotThroughGatewayError: a gateway is named instead, and the command doesn't go through one.
    """
    raise_if_outside(state_dir)
    return _running_settings(state_dir)


def raise_if_outside(state_dir: str | None, config: str | None = None) -> None:
    """Raise NotThroughGatewayError where a gateway is named instead of a farm of this machine."""
    if gateway_url(state_dir, config, os.environ) is not None:
        raise NotThroughGatewayError("this command")


def driving_settings(state_dir: str | None) -> FarmSettings:
    """Return the settings of a farm that was brought up, or of the gateway that ``LAZYFARM_URL`` names.

    Raises:
        ConfigError, FarmNotRunningError: as :func:`running_settings`.
    """
    if (url := gateway_url(state_dir, None, os.environ)) is not None:
        return replace(load_settings(None, None, os.environ), gateway=url)
    return _running_settings(state_dir)


def _running_settings(state_dir: str | None) -> FarmSettings:
    settings = load_settings(state_dir, None, os.environ)
    if settings.running is None:
        raise FarmNotRunningError(str(settings.state_dir), "nothing was brought up there")
    return settings


def with_records(settings: FarmSettings, act: Callable[[FarmRecords], Coroutine[None, None, T]]) -> T:
    """*act* on what the farm has recorded, which needs only Redis, or its gateway; Ctrl-C cancels it.

    Raises:
        FarmNotRunningError: the Redis that ``up`` started is gone: the machine was restarted, say.
        KeyboardInterrupt: it was interrupted.
    """
    if settings.gateway:
        from lazyfarm.gateway.records import GatewayRecords  # noqa: PLC0415 - what only drivers outside need

        return _over_gateway(settings.gateway, lambda farm: act(GatewayRecords(farm)))
    return _over_redis(settings, open_records, act)


def open_records(settings: FarmSettings) -> contextlib.AbstractAsyncContextManager[FarmRecords]:
    """Return the farm's records."""
    from lazyfarm.records import open_records  # noqa: PLC0415 - see the module

    return open_records(settings)


def status(settings: FarmSettings) -> FarmStatus:
    """Return what runs; raises as :func:`with_records`."""
    if settings.gateway:
        return _over_gateway(settings.gateway, lambda farm: farm.status())
    from lazyfarm.status import status_of  # noqa: PLC0415 - see the module

    return with_records(settings, lambda records: status_of(settings, records))


def with_looks(settings: FarmSettings, act: Callable[[Look], Coroutine[None, None, T]]) -> T:
    """*act* on looks at what goes on; raises as :func:`with_records`."""
    if settings.gateway:
        return _over_gateway(settings.gateway, lambda farm: act(farm.now))
    return _over_redis(settings, open_looks, act)


def open_looks(settings: FarmSettings) -> contextlib.AbstractAsyncContextManager[Look]:
    """Return what looks at what goes on."""
    from lazyfarm.now import open_looks  # noqa: PLC0415 - see the module

    return open_looks(settings)


def with_jobs(settings: FarmSettings, act: Callable[[FarmJobs], Coroutine[None, None, T]]) -> T:
    """*act* on the farm's jobs; raises as :func:`with_records`."""
    if settings.gateway:
        from lazyfarm.gateway.jobs import GatewayJobs  # noqa: PLC0415 - as above
        from lazyfarm.gateway.records import GatewayRecords  # noqa: PLC0415 - as above

        return _over_gateway(settings.gateway, lambda farm: act(GatewayJobs(farm.builds, GatewayRecords(farm))))
    return _over_redis(settings, open_jobs, act)


def open_jobs(settings: FarmSettings) -> contextlib.AbstractAsyncContextManager[FarmJobs]:
    """Return the farm's jobs."""
    from lazyfarm.jobs import open_jobs  # noqa: PLC0415 - see the module

    return open_jobs(settings)


def with_leases(settings: FarmSettings, act: Callable[[FarmLeases], Coroutine[None, None, T]]) -> T:
    """*act* on the farm's leases; raises as :func:`with_records`."""
    if settings.gateway:
        from lazyfarm.gateway.pins import GatewayPins  # noqa: PLC0415 - as above

        return _over_gateway(settings.gateway, lambda farm: act(GatewayPins(farm.gateway)))
    return _over_redis(settings, open_leases, act)


def open_leases(settings: FarmSettings) -> contextlib.AbstractAsyncContextManager[FarmLeases]:
    """Return the farm's leases."""
    from lazyfarm.leases import open_leases  # noqa: PLC0415 - see the module

    return open_leases(settings)


def with_explain(settings: FarmSettings, act: Callable[[FarmExplain], Coroutine[None, None, T]]) -> T:
    """*act* on what explains the farm; raises as :func:`with_records`."""
    if settings.gateway:
        from lazyfarm.gateway.explain import GatewayExplain  # noqa: PLC0415 - as above

        return _over_gateway(settings.gateway, lambda farm: act(GatewayExplain(farm.gateway)))
    return _over_redis(settings, open_explain, act)


def open_explain(settings: FarmSettings) -> contextlib.AbstractAsyncContextManager[FarmExplain]:
    """Return what explains the farm."""
    from lazyfarm.explain import open_explain  # noqa: PLC0415 - see the module

    return open_explain(settings)


def with_audit(settings: FarmSettings, act: Callable[[AuditReader], Coroutine[None, None, T]]) -> T:
    """*act* on the farm's audit stream; raises as :func:`with_records`."""
    if settings.gateway:
        return _over_gateway(settings.gateway, lambda farm: act(farm.audit_reader))
    return _over_redis(settings, open_audit, act)


def open_audit(settings: FarmSettings) -> contextlib.AbstractAsyncContextManager[AuditLog]:
    """Return the farm's audit stream."""
    from lazyfarm.redis_only import open_audit  # noqa: PLC0415 - see the module

    return open_audit(settings)


def with_collection(settings: FarmSettings, act: Callable[[FarmCollection], Coroutine[None, None, T]]) -> T:
    """*act* on the farm's collection; raises as :func:`with_records`."""
    return _over_redis(settings, open_collection, act)


def open_collection(settings: FarmSettings) -> contextlib.AbstractAsyncContextManager[FarmCollection]:
    """Return the farm's collection."""
    from lazyfarm.collection import open_collection  # noqa: PLC0415 - see the module

    return open_collection(settings)


def kept(settings: FarmSettings, ref: str) -> Kept:
    """Return why a ref is kept; raises as :func:`with_records`."""
    if settings.gateway:
        return _over_gateway(settings.gateway, lambda farm: farm.kept(ref))
    return with_collection(settings, lambda farm: farm.kept(ref))


def page_link(settings: FarmSettings) -> str:
    """Return the address that opens the farm's page; "" where it has none."""
    if settings.gateway:
        return _over_gateway(settings.gateway, lambda farm: farm.page())
    from storage.services.page import page_link  # noqa: PLC0415 - processes, which drivers outside have none of

    return page_link(settings.state_dir)


def with_drain(settings: FarmSettings, act: Callable[[FarmDrain | Farm], Coroutine[None, None, T]]) -> T:
    """*act* on what drains the farm's nodes; raises as :func:`with_records`."""
    if settings.gateway:
        return _over_gateway(settings.gateway, act)
    return _over_redis(settings, open_drain, act)


def open_drain(settings: FarmSettings) -> contextlib.AbstractAsyncContextManager[FarmDrain]:
    """Return what drains the farm's nodes."""
    from lazyfarm.drain import open_drain  # noqa: PLC0415 - see the module

    return open_drain(settings)


def quarantined(settings: FarmSettings) -> list[ObjectInfo]:
    """Return the damaged objects that were put aside: S3 alone is asked."""
    if settings.gateway:
        return _over_gateway(settings.gateway, lambda farm: farm.quarantined())
    from lazyfarm.verify import quarantined  # noqa: PLC0415 - see the module

    return quarantined(settings)


def _over_gateway(url: str, act: Callable[[GatewayFarm], Coroutine[None, None, T]]) -> T:
    from lazyfarm.cli.driving import run_to_end  # noqa: PLC0415 - as below
    from lazyfarm.farm import source_of  # noqa: PLC0415 - see the module
    from lazyfarm.gateway.access import Access  # noqa: PLC0415 - as above
    from lazyfarm.gateway.farm import GatewayFarm  # noqa: PLC0415 - as above

    async def connected() -> T:
        access = Access.of(url, os.environ)
        async with await GatewayFarm.open(access, credentials=source_of(None), keep=False) as farm:
            return await act(farm)

    return run_to_end(connected)


def _over_redis(
    settings: FarmSettings,
    opened: Callable[[FarmSettings], contextlib.AbstractAsyncContextManager[P]],
    act: Callable[[P], Coroutine[None, None, T]],
) -> T:
    from lazyfarm.cli.driving import run_to_end  # noqa: PLC0415 - asyncio, which reading commands do without

    async def connected() -> T:
        async with opened(settings) as part:
            return await act(part)

    _raise_if_redis_is_gone(settings)
    return run_to_end(connected)


def _raise_if_redis_is_gone(settings: FarmSettings) -> None:
    address = url_address(settings.config.redis.url)
    if not settings.wanted.redis.url and address and not accepts(address, timeout_s=_CONNECT_S):
        # Asked first, as the client would go on trying for as long as a restart may take.
        raise FarmNotRunningError(str(settings.state_dir), f"its Redis at {address.host}:{address.port} is gone")


async def connect(place: Path | str) -> Farm:
    """Join the farm of a state directory or a gateway as a driver; what is made stays held after the command's end."""
    from lazyfarm.farm import Farm  # noqa: PLC0415 - see the module

    return await Farm.connect(place, keep=True)


def acting(settings: FarmSettings, out: Output, command: str, act: Callable[[Farm], Awaitable[T]]) -> T:
    """Join the farm, *act*, and leave it; Ctrl-C cancels *act*. One line in ``STATE/logs/cli.log``."""
    from actors.traces import start_driver_traces  # noqa: PLC0415 - likewise
    from lazyfarm.cli.driving import run_to_end  # noqa: PLC0415 - asyncio, which reading commands do without

    async def joined() -> T:
        # A command goes on with its caller's trace, as BuildKit's do: a step of a CI's pipeline, say.
        start_driver_traces(settings.config)
        with tracing.beginning(f"lazyfarm {command}", parent=os.environ.get("TRACEPARENT", "")):
            async with await connect(settings.gateway or settings.state_dir) as farm:
                return await act(farm)

    with _driver_logs(settings, command), out.undisturbed():
        try:
            return run_to_end(joined)
        finally:
            tracing.flush()
            _leave()


def serving(settings: FarmSettings, command: str, serve: Callable[[], Coroutine[None, None, None]]) -> None:
    """Serve until Ctrl-C or SIGTERM, which are its ends; logs go where :func:`acting` has them."""
    from lazyfarm.cli.driving import run_to_end  # noqa: PLC0415 - as above

    with _driver_logs(settings, command):
        try:
            with contextlib.suppress(KeyboardInterrupt):
                run_to_end(serve)
        finally:
            _leave()


def _leave() -> None:
    """Leave Ray's cluster, if it was joined: left to the interpreter's end, Ray sleeps for half a second first."""
    if "actors.join" in sys.modules:
        from actors.join import leave  # noqa: PLC0415 - see the module

        leave()


@contextlib.contextmanager
def _driver_logs(settings: FarmSettings, command: str) -> Iterator[None]:
    """Send this process's logs to the state directory, and tell there how the command ended."""
    if settings.gateway:  # the farm's own directory is elsewhere
        yield
        return
    import structlog  # noqa: PLC0415 - 0.25 s, which reading commands are spared

    from actors.logs import logs_to  # noqa: PLC0415 - likewise

    began_s = time.monotonic()
    with logs_to(
        settings.state_dir / "logs" / "cli.log", level=settings.config.log.level, command=command, pid=os.getpid()
    ):
        log = structlog.get_logger()
        try:
            yield
        except BaseException as exc:
            log.warning("command.failed", error_type=type(exc).__name__, error=str(exc), elapsed_s=_since(began_s))
            raise
        log.info("command.complete", elapsed_s=_since(began_s))


def _since(began_s: float) -> float:
    return round(time.monotonic() - began_s, 3)
