"""Joins the farm's Ray cluster as a driver, exactly that one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator

import ray
import ray.exceptions
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]  # likewise

from actors.options import namespace
from cluster.config import Config
from cluster.errors import FarmNotRunningError, OtherClusterError

#: Seconds that joining may take: a second or two on a quiet machine.
_JOIN_S = 60.0
_CONNECT_S = 5.0


def set_ray_environment(config: Config) -> None:
    """Set what Ray reads from the environment of a driver: the token's file, and no calls home."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # What it tells of nodes that are gone would be coloured in pipes, too.
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    if config.ray.token_file:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = config.ray.token_file
        # Ray reads the mode when it is imported, which was before anybody could know it; its own
        # `enable_token_auth` makes it read it again in this way. A token of another cluster is forgotten.
        RayConfig.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


#: Held by who joins: drivers of one process may do so at one time, and Ray is not made for that.
_JOINING = threading.Lock()


def join(config: Config, *, state_dir: str) -> None:
    """Connect this process to the farm's cluster; does nothing where it is connected already.

    The address is always exact: a bare ``ray.init()`` joins whatever cluster the machine last started. A
    process is in one cluster at a time, which is Ray's way.

    Raises:
        FarmNotRunningError: nothing answers there.
        OtherClusterError: the process is in another cluster.
    """
    with _JOINING:
        _join(config, state_dir=state_dir)


def _join(config: Config, *, state_dir: str) -> None:
    if ray.is_initialized():
        current = ray.get_runtime_context().gcs_address
        if current == config.ray.address:
            return
        if _refusal(current) is None:
            raise OtherClusterError(current, config.ray.address)
        ray.shutdown()  # of a cluster that is gone: this farm's last one, where its head was started anew
    if (reason := _refusal(config.ray.address)) is not None:
        # Ray itself would go on trying for minutes, deaf to signals.
        raise FarmNotRunningError(state_dir, f"Ray at {config.ray.address} does not answer: {reason}")
    set_ray_environment(config)
    try:
        with _as_guest():
            ray.init(
                address=config.ray.address,
                namespace=namespace(config.farm.name),
                logging_level=logging.ERROR,
                log_to_driver=False,
                configure_logging=False,
            )
    except (ConnectionError, TimeoutError, ray.exceptions.RayError, RuntimeError, ValueError) as exc:
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise FarmNotRunningError(state_dir, f"Ray at {config.ray.address} does not answer: {reason}") from exc


def _refusal(address: str) -> str | None:
    """Return why nobody accepts connections there; None where somebody does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as exc:
        return str(exc)
    return None


async def join_in_time(config: Config, *, state_dir: str) -> None:
    """Do what :func:`join` does, in a thread that is left behind if it takes too long or the caller is cancelled.

    Raises:
        FarmNotRunningError: nothing answers there, or not in time.
        OtherClusterError: the process is in another cluster.
    """
    loop = asyncio.get_running_loop()
    joined: asyncio.Future[None] = loop.create_future()

    def tell(error: BaseException | None) -> None:
        if joined.done():
            return
        if error is None:
            joined.set_result(None)
        else:
            joined.set_exception(error)

    def work() -> None:
        error: BaseException | None = None
        try:
            join(config, state_dir=state_dir)
        except BaseException as exc:  # noqa: BLE001  # raised where it is awaited
            error = exc
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, error)

    try:
        with _as_guest():
            threading.Thread(target=work, name="lazyfarm-join", daemon=True).start()
            async with asyncio.timeout(_JOIN_S):
                await joined
    except TimeoutError as exc:
        raise FarmNotRunningError(state_dir, f"Ray at {config.ray.address} gave no answer in {_JOIN_S:.0f} s") from exc


@contextlib.contextmanager
def _as_guest() -> Iterator[None]:
    """Keep what is the program's own while Ray starts: its SIGTERM handler, and its standard error."""
    handler = signal.getsignal(signal.SIGTERM)
    logger = logging.getLogger("ray")
    level = logger.level
    # Joined from a thread, Ray complains that it can't put in its handler, which nobody wants.
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's would exit on the spot


def leave() -> None:
    """Disconnect this process, if it is connected."""
    if ray.is_initialized():
        ray.shutdown()
