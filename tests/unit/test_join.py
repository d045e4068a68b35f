"""Joining Ray's cluster: in time, or not at all."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from dataclasses import replace

import pytest

from actors import join as joining
from cluster.config import Config
from cluster.errors import FarmNotRunningError


def config_of(address):
    return replace(Config(), ray=replace(Config().ray, address=address))


async def test_a_cluster_where_nobody_listens_is_said_to_be_gone_at_once():
    """Ray itself would try for minutes."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(FarmNotRunningError, match=f"Ray at {address} does not answer"):
            await joining.join_in_time(config_of(address), state_dir="/farm")


async def test_joining_ends_in_time(monkeypatch):
    """What hangs is left behind, and the caller told."""
    release = threading.Event()
    monkeypatch.setattr(joining, "join", lambda _config, *, state_dir: release.wait(60))
    monkeypatch.setattr(joining, "_JOIN_S", 0.05)
    with pytest.raises(FarmNotRunningError, match="gave no answer"):
        await joining.join_in_time(config_of("127.0.0.1:1"), state_dir="/farm")
    release.set()


async def test_who_waits_for_joining_can_be_cancelled(monkeypatch):
    """Ctrl-C doesn't wait for Ray."""
    release, begun = threading.Event(), threading.Event()

    def hang(_config, *, state_dir):
        begun.set()
        release.wait(60)

    monkeypatch.setattr(joining, "join", hang)
    task = asyncio.create_task(joining.join_in_time(config_of("127.0.0.1:1"), state_dir="/farm"))
    await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    release.set()


async def test_what_joining_raises_is_raised(monkeypatch):
    """An error in the thread reaches the caller as itself."""

    def refuse(_config, *, state_dir):
        raise FarmNotRunningError(state_dir, "no")

    monkeypatch.setattr(joining, "join", refuse)
    with pytest.raises(FarmNotRunningError, match="in /farm: no"):
        await joining.join_in_time(config_of("127.0.0.1:1"), state_dir="/farm")


async def test_drivers_of_one_process_join_one_after_the_other(monkeypatch):
    """Ray is not made for two at a time; the second finds the process connected."""
    inside, overlaps, joined = 0, 0, 0

    def connect(_config, *, state_dir):
        nonlocal inside, overlaps, joined
        inside += 1
        overlaps += inside > 1
        time.sleep(0.02)
        joined += 1
        inside -= 1

    monkeypatch.setattr(joining, "_join", connect)
    config = config_of("127.0.0.1:1")
    await asyncio.gather(*(joining.join_in_time(config, state_dir="/farm") for _ in range(4)))
    assert (joined, overlaps) == (4, 0)
