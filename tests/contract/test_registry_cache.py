"""Caches in a real docker-registry: what an export and an import ask of it, and what comes back."""

from __future__ import annotations

import base64
import json

import pytest

from cluster.cache_options import CacheMode, parse_cache_source, parse_cache_target
from cluster.config import Config
from cluster.descriptor import MANIFEST_OCI
from cluster.digest import digest_of
from cluster.errors import NeedsRemoteProvidersError, RegistryError
from cluster.fetch.cache_import import results_of
from cluster.remote_cache import CACHE_CONFIG, CacheEntry, ExportCandidate, embed
from storage.registry.auth import CredentialAuthorizer
from storage.registry.credentials import CredentialSource
from tests.doubles.registry import (
    HTPASSWD_PASSWORD,
    HTPASSWD_USER,
    build_image,
    docker_registry,
    htpasswd_config,
    random_image,
)
from tests.doubles.remote_cache import AMD64, LEASE, CacheFarm, layers_of

pytestmark = pytest.mark.registry

K1, K2, K3 = (digest_of(f"key {n}".encode()) for n in range(3))


def config_of(registry, repository, selector):
    """Return the config's descriptor in a manifest."""
    path = f"/v2/{repository}/manifests/{selector}"
    return json.loads(registry.call("GET", path, headers={"Accept": MANIFEST_OCI})[2])["config"]


@pytest.fixture
async def farms():
    """Make farms: ``farms({host: (user, password)})``."""
    made = []

    def make(given=None, store=None):
        made.append(CacheFarm(given, store))
        return made[-1]

    yield make
    for farm in made:
        await farm.close()


def digests(states):
    return [state.record.blob.digest for state in states]


async def test_an_export_is_lazy_refs_in_another_farm(registry, farms):
    """Mounted there, imported by manifest and config alone: not one layer is read, by either farm."""
    image = random_image(101)
    registry.push("export/app", "1", image)
    farm = farms()
    refs = await farm.pull(registry, "export/app", image)
    target = parse_cache_target(f"type=registry,ref={registry.host}/export/cache:1,mode=max")
    registry.forget()
    result = await farm.export(
        target,
        ExportCandidate(keys=(K1,), ref=refs[0], config=b"{}"),
        ExportCandidate(keys=(K2, K3), ref=refs[2], is_target=True),
    )
    assert [layer.how for layer in result.layers] == ["mounted"] * 3
    assert registry.count("GET", "blob") == 0
    assert farm.transfers.fetches == []

    registry.forget()
    other = farms()
    found, warning = await other.load(parse_cache_source(target.ref))
    wanted = [layer.digest for layer in image.layers]
    assert ({key: digests(states) for key, states in found.items()}, warning) == (
        {K1: wanted[:1], K2: wanted, K3: wanted},
        "",
    )
    assert all(state.is_lazy for states in found.values() for state in states)
    assert [(r.method, r.kind) for r in registry.requests() if r.kind != "base"] == [
        ("GET", "manifest"),
        ("GET", "blob"),
    ]
    config = config_of(registry, "export/cache", "1")
    assert config["mediaType"] == CACHE_CONFIG
    assert registry.requests()[-2].path.endswith(config["digest"])
    assert {handle.repository for handle in found[K1][0].providers} == {"export/cache"}


async def test_a_second_export_costs_heads(registry, farms):
    """One for each layer and one for the config; then the manifest."""
    image = random_image(102)
    registry.push("again/app", "1", image)
    farm = farms()
    refs = await farm.pull(registry, "again/app", image)
    target = parse_cache_target(f"{registry.host}/again/cache:1")
    candidate = ExportCandidate(keys=(K1,), ref=refs[-1], is_target=True)
    first = await farm.export(target, candidate)
    registry.forget()
    second = await farm.export(target, candidate)
    assert second.digest == first.digest
    assert [layer.how for layer in second.layers] == ["exists"] * 3
    asked = [(r.method, r.kind) for r in registry.requests() if r.kind != "base"]
    assert asked == [("HEAD", "blob")] * 4 + [("PUT", "manifest")]


async def test_an_export_to_another_registry_uploads(registry, farms):
    """What the farm has in its content store; the cache is whole there."""
    image = random_image(103)
    registry.push("away/app", "1", image)
    farm = farms()
    refs = await farm.pull(registry, "away/app", image)
    farm.keep(image, f"{registry.host}/away/app")
    with docker_registry() as away:
        result = await farm.export(
            parse_cache_target(f"{away.host}/cache:1"), ExportCandidate(keys=(K1,), ref=refs[-1], is_target=True)
        )
        assert [layer.how for layer in result.layers] == ["uploaded"] * 3
        assert sum(layer.bytes for layer in result.layers) == sum(len(layer.data) for layer in image.layers)
        found, _ = await farms().load(parse_cache_source(f"{away.host}/cache:1"))
        assert digests(found[K1]) == [layer.digest for layer in image.layers]
        assert farm.transfers.fetches == []
        status, _, data = away.call("GET", f"/v2/cache/blobs/{image.layers[1].digest}")
        assert (status, data) == (200, image.layers[1].data)


async def test_deleted_content_is_not_in_the_cache(registry, farms):
    """The layer is in no registry any more: its result and what is on it are left out, and that is told."""
    image = random_image(104)
    registry.push("lost/app", "1", image)
    farm = farms()
    refs = await farm.pull(registry, "lost/app", image)
    registry.call("DELETE", f"/v2/lost/app/blobs/{image.layers[1].digest}")
    result = await farm.export(
        parse_cache_target(f"type=registry,ref={registry.host}/lost/cache:1,mode=max"),
        *(ExportCandidate(keys=(key,), ref=ref) for key, ref in zip((K1, K2, K3), refs, strict=True)),
    )
    assert (result.results, result.left_out) == (1, 2)
    assert "2 of 3 results" in result.warning
    found, _ = await farms().load(parse_cache_source(f"{registry.host}/lost/cache:1"))
    assert set(found) == {K1}


async def test_a_cache_that_is_missing_or_deleted_is_a_miss(registry, farms):
    """Never written, its manifest deleted, its config deleted: a warning each, and no error."""
    image = random_image(105)
    registry.push("gone/app", "1", image)
    farm = farms()
    refs = await farm.pull(registry, "gone/app", image)
    source = parse_cache_source(f"{registry.host}/gone/cache:1")
    assert (await farm.load(source))[1] == f"nothing is cached in {source.ref}: {source.ref} is not in its registry"

    exported = await farm.export(
        parse_cache_target(source.ref), ExportCandidate(keys=(K1,), ref=refs[0], is_target=True)
    )
    config = config_of(registry, "gone/cache", exported.digest)["digest"]
    registry.call("DELETE", f"/v2/gone/cache/blobs/{config}")
    found, warning = await farms().load(source)
    assert (found, config in warning) == ({}, True)
    registry.call("DELETE", f"/v2/gone/cache/manifests/{exported.digest}")
    found, warning = await farms().load(source)
    assert (found, "is not in its registry" in warning) == ({}, True)


async def test_an_image_is_a_cache_if_it_has_one_within(registry, farms):
    """Inline: read from the image's config; without one, a miss with a warning."""
    image = random_image(106)
    layers = layers_of(image)
    config = embed(image.config, layers, [CacheEntry(keys=(K1,), layers=layers[:2])])
    manifest = json.loads(image.manifest)
    manifest["config"].update(digest=digest_of(config), size=len(config))
    registry.push("inline/app", "plain", image)
    registry.push_blob("inline/app", config)
    registry.push_manifest("inline/app", "1", image.media_type, json.dumps(manifest).encode())

    registry.forget()
    found, warning = await farms().load(parse_cache_source(f"{registry.host}/inline/app:1"))
    assert (digests(found[K1]), warning) == ([layer.digest for layer in layers[:2]], "")
    assert registry.count("GET", "blob") == 1
    found, warning = await farms().load(parse_cache_source(f"{registry.host}/inline/app:plain"))
    assert (found, "without an inline cache" in warning) == ({}, True)


async def test_who_may_not_read_a_cache_has_a_miss_and_no_layer(tmp_path, farms):
    """Another identity's import and its handlers open nothing: it proves its own access, and can't."""
    image = random_image(107)
    basic = "Basic " + base64.b64encode(f"{HTPASSWD_USER}:{HTPASSWD_PASSWORD}".encode()).decode()
    with docker_registry(htpasswd_config(tmp_path), authorize=lambda _scope: basic) as private:
        private.push("app", "1", image)
        alice = farms({private.host: (HTPASSWD_USER, HTPASSWD_PASSWORD)})
        refs = await alice.pull(private, "app", image)
        target = parse_cache_target(f"{private.host}/cache:1")
        await alice.export(target, ExportCandidate(keys=(K1,), ref=refs[-1], is_target=True))
        source = parse_cache_source(target.ref)
        imported = await alice.importer.read(source, AMD64, alice.authorizer)
        ((_, _, result),) = results_of(imported)

        mallory = CredentialAuthorizer(CredentialSource({}), Config(), identity_key=b"key")
        try:
            found = await alice.importer.read(source, AMD64, mallory)
            assert (found.cache.entries, found.handlers) == ((), ())
            assert found.warning
            with pytest.raises((NeedsRemoteProvidersError, RegistryError)):
                await alice.cache.get_by_blob(
                    result.entry.layers, parent=None, handlers=result.handlers, authorizer=mallory, lease_id=LEASE
                )
        finally:
            await mallory.aclose()


async def test_min_exports_what_the_target_is_made_of(registry, farms):
    """Another result of the job has layers that the target lacks: they are not in the cache."""
    image, aside = random_image(108), build_image(random_image(109).layers[:1])
    registry.push("min/app", "1", image)
    registry.push("min/aside", "1", aside)
    farm = farms()
    refs = await farm.pull(registry, "min/app", image)
    (other,) = await farm.pull(registry, "min/aside", aside)
    candidates = (
        ExportCandidate(keys=(K1,), ref=refs[0]),
        ExportCandidate(keys=(K2,), ref=refs[1], is_target=True),
        ExportCandidate(keys=(K3,), ref=other),
    )
    target = parse_cache_target(f"{registry.host}/min/cache:1")
    assert target.mode is CacheMode.MIN
    await farm.export(target, *candidates)
    found, _ = await farms().load(parse_cache_source(target.ref))
    assert set(found) == {K1, K2}
