"""Metrics, at Ray's own endpoint on each node."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.request

import pytest

from tests.doubles.registry import random_image

pytestmark = pytest.mark.cluster

#: Ray's workers hand their metrics over every ten seconds.
_HANDED_OVER_S = 40.0


def _metrics(farm) -> str:
    """Return what every node's endpoint says, without a token."""
    texts = []
    for record in sorted((farm.state_dir / "run").glob("ray-n*.json")):
        port = json.loads(record.read_text())["ports"]["metrics"]
        # A node's endpoint is up some seconds after the node.
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer,
        ):
            texts.append(answer.read().decode())
    return "\n".join(texts)


async def test_bytes_read_from_registries_are_counted(farm, registry):
    """Layer bytes that a worker read show at its node's endpoint, under a name that ends in their unit."""
    image = random_image(4711, layers=2)
    registry.push("metrics/app", "1", image)
    async with await farm.connect() as joined:
        ref = await joined.pull(f"{registry.host}/metrics/app:1")
        await ref.unlazy()

    give_up_s = time.monotonic() + _HANDED_OVER_S
    while "ray_lazyfarm_registry_read_bytes_total" not in (text := _metrics(farm)):
        assert time.monotonic() < give_up_s, "no worker's metrics showed up"
        await asyncio.sleep(1)

    assert "ray_lazyfarm_unlazy_layers_total" in text
    assert "ray_lazyfarm_unlazy_seconds_bucket" in text
