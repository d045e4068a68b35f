"""Procedures of docs/operations.md, as an operator does them on a real farm."""

from __future__ import annotations

import asyncio
import http.client
import os
import secrets
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cluster.errors import TreeLostError
from lazyfarm.graph import image, local
from storage.blobs import S3ContentStore
from tests.doubles.registry import random_image
from tests.doubles.shell_image import shell_image

pytestmark = [pytest.mark.cluster, pytest.mark.registry]


def empty_bucket(farm):
    """Delete every object of the farm's bucket."""
    store = S3ContentStore(farm.settings.config.s3)
    try:
        for found in list(store.objects("")):
            store.delete(found.key)
    finally:
        store.close()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="containers need root")
async def test_a_bucket_that_was_emptied_is_found_out_at_once_and_filled_by_use(farm, registry, tmp_path):
    """`verify --repair` turns lazy all that was in it; pulls fetch anew, builds make anew, drivers send anew."""
    tag = secrets.token_hex(8)
    registry.push("operations/shell", tag, shell_image(tag))
    registry.push("operations/app", tag, made := random_image(secrets.randbits(64), layers=2, layer_bytes=20_000))
    (tmp_path / "src").mkdir()
    (tmp_path / "src/file").write_text(tag)
    shell = image(f"{registry.host}/operations/shell:{tag}", plain_http=True)
    graph = shell.copy(local(tmp_path / "src"), "/", "/src/").run("cat /src/file > /made")
    async with await farm.connect() as driver:
        ref = await driver.pull(f"{registry.host}/operations/app:{tag}", plain_http=True)
        await ref.unlazy()
        built = await driver.solve(graph)
        await built.ref.unlazy()

        await asyncio.to_thread(empty_bucket, farm)
        found = await asyncio.to_thread(farm.cli_json, "verify", "--repair", "--rate", "0")
        # Or the farm's own scrubbers have come first.
        assert {fault["kind"] for fault in found["faults"]} <= {"missing"}
        assert found["unrepaired"] == 0
        assert (await asyncio.to_thread(farm.cli_json, "verify"))["blobs"] == 0
        for each in (ref, built.ref):
            await each.refresh()
            assert each.is_lazy

        registry.forget()
        wanted = {layer.digest for layer in made.layers}
        for node in ("n0", "n1", "n2"):
            path = (await ref.extract(node)).path
            assert await asyncio.to_thread(os.listdir, path)
        assert 0 < len([r for r in registry.requests() if r.path.rpartition("/")[2] in wanted]) <= len(wanted)
        with pytest.raises(TreeLostError):
            await driver.solve(graph, no_cache=True)
        again = await driver.solve(graph, no_cache=True)
        where = await again.ref.extract()
        assert await asyncio.to_thread(Path(where.path, "made").read_text) == tag
        assert (await asyncio.to_thread(farm.cli_json, "verify"))["faults"] == []


def status_of(page, token):
    """Return what the page says to who comes with a token."""
    connection = http.client.HTTPConnection(urlsplit(page).netloc, timeout=10)
    try:
        connection.request("GET", "/static/icon.svg", headers={"Authorization": f"Bearer {token}"})
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_new_token_of_the_page_closes_it_to_the_old_one(farm):
    """Its file is deleted, and `up` makes another and starts the page with it; nothing else is started anew."""
    file = farm.state_dir / "secrets/page-token"
    old = file.read_text().strip()
    before = farm.cli_json("status")
    assert status_of(before["page"], old) == 200
    file.unlink()
    after = farm.cli_json("up")
    new = file.read_text().strip()
    assert new != old
    assert status_of(after["page"], new) == 200
    assert status_of(after["page"], old) in (401, 403)
    assert {actor["pid"] for actor in after["actors"]} == {actor["pid"] for actor in before["actors"]}
