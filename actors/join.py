"""Joins the farm's Ray cluster as a driver, exactly that one."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

import ray
import ray.exceptions
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]  # likewise

from actors.options import namespace
from cluster.config import Config
from cluster.errors import FarmNotRunningError, OtherClusterError


def set_ray_environment(config: Config) -> None:
    """Set what Ray reads from the environment of a driver: the token's file, and no calls home."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    if config.ray.token_file:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = config.ray.token_file
        # Ray reads the mode when it is imported, which was before anybody could know it; its own
        # `enable_token_auth` makes it read it again in this way. A token of another cluster is forgotten.
        RayConfig.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def join(config: Config, *, state_dir: str) -> None:
    """Connect this process to the farm's cluster; does nothing where it is connected already.

    The address is always exact: a bare ``ray.init()`` joins whatever cluster the machine last started. A
    process is in one cluster at a time, which is Ray's way.

    Raises:
        FarmNotRunningError: nothing answers there.
        OtherClusterError: the process is in another cluster.
    """
    if ray.is_initialized():
        current = ray.get_runtime_context().gcs_address
        if current != config.ray.address:
            raise OtherClusterError(current, config.ray.address)
        return
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
    """Disconnect this process."""
    ray.shutdown()
