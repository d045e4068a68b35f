"""Remote caches through a fetch worker of a real farm: export, import, and what a forgotten cache comes to."""

from __future__ import annotations

import secrets

import pytest

from cluster.cache_options import parse_cache_source, parse_cache_target
from cluster.digest import digest_of
from cluster.messages import ExportCacheRequest, ImportCacheRequest
from cluster.remote_cache import ExportCandidate
from tests.doubles.registry import random_image

pytestmark = [pytest.mark.cluster, pytest.mark.registry]

KEY = digest_of(b"key")


@pytest.mark.parametrize("kind", ["registry", "s3"])
async def test_a_cache_is_exported_and_imported(farm, registry, kind):
    """By the worker of some node, with the driver's session; a lazy result is mounted, and a bucket's is fetched."""
    name = f"cache-{secrets.token_hex(4)}"
    image = random_image(int(name[-8:], 16))
    registry.push(f"{name}/app", "1", image)
    where = {
        "registry": f"type=registry,ref={registry.host}/{name}/cache:1",
        "s3": f"type=s3,bucket={farm.settings.config.s3.bucket},prefix=caches,name={name}",
    }[kind]
    async with await farm.connect() as driver:
        ref = await driver.pull(f"{registry.host}/{name}/app:1")
        info = await driver._info([registry.host], None)
        exported = await driver._on_worker(
            None,
            lambda worker: worker.export_cache(
                ExportCacheRequest(
                    session=info,
                    target=parse_cache_target(where),
                    candidates=(ExportCandidate(keys=(KEY,), ref=ref.id, is_target=True),),
                    handlers=(),
                    lease_id=driver.lease_id(),
                ),
                timeout_s=60.0,
            ),
        )
        assert {layer.how for layer in exported.layers} == {{"registry": "mounted", "s3": "copied"}[kind]}
        imported = await driver._on_worker(
            None,
            lambda worker: worker.import_cache(
                ImportCacheRequest(session=info, source=parse_cache_source(where)),
                timeout_s=60.0,
            ),
        )
        assert imported.warning == ""
        assert [entry.keys for entry in imported.cache.entries] == [(KEY,)]
        assert imported.cache.ref_ids()[-1] == ref.id
        missing = await driver._on_worker(
            None,
            lambda worker: worker.import_cache(
                ImportCacheRequest(session=info, source=parse_cache_source(f"{registry.host}/{name}/none:1")),
                timeout_s=60.0,
            ),
        )
        assert "is not in its registry" in missing.warning
