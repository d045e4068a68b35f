"""The Python API on a real farm of three nodes: asynchronous, its blocking twin, and drivers that are scripts."""

import asyncio
import json
import os
import secrets
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cluster.descriptor import MANIFEST_OCI, Descriptor
from cluster.errors import (
    ClusterError,
    FarmClosedError,
    LeaseLostError,
    LeaseNotFoundError,
    NeedsRemoteProvidersError,
    NodeNotFoundError,
    NotAnImageError,
    RefNotFoundError,
    RefReleasedError,
)
from cluster.lease import image_resource, ref_resource
from cluster.messages import AssembleRequest, ResolveRequest
from cluster.progress import LayerPhase
from cluster.provider import DescHandler, ProviderHandle
from lazyfarm import blocking
from lazyfarm.graph import image as graph_image
from lazyfarm.graph import scratch
from tests.doubles.program import program_image
from tests.doubles.registry import (
    HTPASSWD_PASSWORD,
    HTPASSWD_USER,
    build_image,
    build_layer,
    docker_registry,
    htpasswd_config,
    random_image,
)

pytestmark = [pytest.mark.cluster, pytest.mark.registry]

MIB = 1024**2
BASIC = "Basic YWxpY2U6d29uZGVybGFuZA=="


def fresh_image(*, layers=3, layer_bytes=20_000):
    """Make an image that no farm has seen."""
    return random_image(secrets.randbits(64), layers=layers, layer_bytes=layer_bytes)


def fresh_layer():
    return build_layer({"data": secrets.token_bytes(5000)})


def descriptor(layer):
    return Descriptor(
        media_type=layer.media_type, digest=layer.digest, size_bytes=len(layer.data), diff_id=layer.diff_id
    )


def handler(registry, repository, layer):
    return DescHandler(
        digest=layer.digest, provider=ProviderHandle(registry=registry.host, repository=repository, plain_http=True)
    )


def layer_gets(registry, image):
    digests = {layer.digest for layer in image.layers}
    return sum(r.method == "GET" and r.path.rpartition("/")[2] in digests for r in registry.requests())


def ends(items):
    """Return the last phase of each item."""
    return {item.item: item.phase for item in items}


# -- one image -----------------------------------------------------------------------------------------------


async def test_a_ref_is_lazy_until_its_bytes_are_wanted(farm, registry):
    """Pull, get and the lists move no layer byte; unlazy moves each once, and the ref knows it then."""
    registry.push("api/lazy", "1", image := fresh_image())
    name = f"{registry.host}/api/lazy:1"
    async with await farm.connect() as driver:
        ref = await driver.pull(name)
        assert ref.is_lazy
        assert (ref.image, ref.digest) == (name, image.digest)
        assert [state.record.blob.digest for state in ref.layers] == [layer.digest for layer in image.layers]
        by_id, by_prefix, by_name = await driver.get(ref.id), await driver.get(ref.id[:20]), await driver.get(name)
        assert by_id.id == by_prefix.id == by_name.id == ref.id
        assert by_name.digest == image.digest
        assert ref.id in {state.record.id for state in await driver.refs()}
        assert name in {record.name for record in await driver.images()}
        assert layer_gets(registry, image) == 0
        result = await ref.unlazy()
        assert result.ref_id == ref.id
        assert [layer.bytes_fetched for layer in result.layers] == [len(layer.data) for layer in image.layers]
        assert not ref.is_lazy
        assert by_id.is_lazy, "what was read before stays what it was"
        await by_id.refresh()
        assert not by_id.is_lazy
        assert layer_gets(registry, image) == 3


async def test_extract_gives_a_path_with_the_files(farm, registry):
    """On any node, on the one that is named, and everywhere; an unknown one is an error."""
    registry.push("api/extract", "1", image := program_image(f"hello {secrets.token_hex(4)}"))
    async with await farm.connect() as driver:
        ref = await driver.pull(f"{registry.host}/api/extract:1")
        anywhere = await ref.extract()
        assert anywhere.node in {node.id for node in await driver.nodes()}
        assert b"hello" in await asyncio.to_thread(Path(anywhere.path, "srv/hello").read_bytes)
        named = await ref.extract("n2")
        everywhere = await ref.extract_everywhere()
        assert {one.node: one.path for one in everywhere}["n2"] == named.path
        assert len({one.path for one in everywhere}) == 3
        with pytest.raises(NodeNotFoundError):
            await ref.extract("n9")
        assert layer_gets(registry, image) == 3


async def test_every_progress_item_ends(farm, registry):
    """A layer's bytes and its unpacking are items of their own; the last word of each is an end."""
    registry.push("api/progress", "1", image := fresh_image(layer_bytes=MIB))
    async with await farm.connect() as driver:
        ref = await driver.pull(f"{registry.host}/api/progress:1")
        operation = ref.extract()
        seen = ends([item async for item in operation.progress()])
        extracted = await operation
        assert all(phase.is_end for phase in seen.values())
        for layer in image.layers:
            assert seen[f"fetch:{layer.digest}"] is LayerPhase.DONE
        for state in ref.layers:
            assert seen[f"extract:{extracted.node}:{state.record.chain}"] is LayerPhase.DONE
        told = []
        await ref.unlazy(progress=told.append)
        assert ends(told) == {f"fetch:{layer.digest}": LayerPhase.PRESENT for layer in image.layers}


async def test_progress_items_end_when_the_work_fails_or_is_cancelled(farm, registry, registry_proxy):
    """Whoever looks on sees every item end, and the iterator itself ends, whatever became of the work."""
    registry.push("api/ends", "1", fresh_image(layers=2, layer_bytes=4 * MIB))
    registry_proxy.bytes_per_s = MIB / 2
    async with await farm.connect() as driver:
        ref = await driver.pull(f"{registry_proxy.host}/api/ends:1")
        operation = ref.unlazy()
        waiting = asyncio.ensure_future(_result(operation))
        seen = []
        async with asyncio.timeout(30):
            async for item in operation.progress():
                seen.append(item)
                if item.current_bytes:
                    waiting.cancel()
        assert len(ends(seen)) == 2
        assert set(ends(seen).values()) == {LayerPhase.CANCELLED}
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def _result(operation):
    return await operation


async def test_a_released_ref_is_of_no_more_use(farm, registry):
    """Every act raises; what it was can still be read."""
    registry.push("api/released", "1", fresh_image(layers=1))
    async with await farm.connect() as driver:
        ref = await driver.pull(f"{registry.host}/api/released:1")
        ref.release()
        for act in (ref.unlazy, ref.extract, ref.extract_everywhere):
            with pytest.raises(RefReleasedError):
                await act()
        with pytest.raises(RefReleasedError):
            await driver.push(ref, f"{registry.host}/api/elsewhere:1")
        with pytest.raises(RefReleasedError):
            await driver.get_by_blob(descriptor(fresh_layer()), ref)
        assert ref.id
        assert (await driver.get(ref.id)).is_lazy


async def test_a_closed_farm_says_that_it_is_closed(farm):
    """Not that Redis is away."""
    async with await farm.connect() as driver:
        pass
    for act in (driver.refs, driver.nodes, driver.leases, driver.images, lambda: driver.pull("a/b:1")):
        with pytest.raises(FarmClosedError):
            await act()


async def test_an_image_without_layers_is_an_empty_directory(farm, registry):
    """It has no ref to show, and all else works."""
    registry.push("api/empty", "1", fresh_image(layers=0))
    name = f"{registry.host}/api/empty:1"
    async with await farm.connect() as driver:
        ref = await driver.pull(name)
        assert (ref.layers, ref.is_lazy) == ((), False)
        extracted = await ref.extract("n0")
        assert await asyncio.to_thread(os.listdir, extracted.path) == []
    told = farm.cli("refs", "show", name, check=False)
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr.startswith(f"error: image {name} has no layers")


async def test_only_an_images_top_is_pushed(farm, registry):
    """A layer below it has no manifest, which is another thing than being unknown."""
    registry.push("api/inner", "1", fresh_image(layers=2))
    async with await farm.connect() as driver:
        ref = await driver.pull(f"{registry.host}/api/inner:1")
        with pytest.raises(NotAnImageError, match="the top of no image"):
            await driver.push(ref.layers[0].record.id, f"{registry.host}/api/elsewhere:1")


async def test_a_push_names_how_each_layer_got_there(farm, registry):
    """To another registry the bytes go, each once; there again they exist."""
    registry.push("api/push", "1", image := fresh_image(layers=2))
    async with await farm.connect() as driver:
        ref = await driver.pull(f"{registry.host}/api/push:1")
        with docker_registry() as other:
            first = await driver.push(ref, f"{other.host}/copy/of:1")
            second = await driver.push(ref.id, f"{other.host}/copy/of:2")
            assert [(x.how, x.bytes) for x in first.layers] == [("uploaded", len(x.data)) for x in image.layers]
            assert {x.how for x in second.layers} == {"exists"}
            assert other.call("GET", "/v2/copy/of/manifests/2", headers={"Accept": image.media_type})[2] == (
                image.manifest
            )
        with pytest.raises(RefNotFoundError):
            await driver.push("no/such:image", f"{registry.host}/copy/of:1")


async def test_an_image_is_resolved_without_refs_and_one_is_assembled_of_its_layers(farm, registry):
    """What a scheduler asks of a worker: a config and handlers first, and an image of a chain in the end.

    The assembled image is pushed to the base's registry without a byte of a layer.
    """
    registry.push("api/base", "1", image := fresh_image(layers=2))
    name = f"{registry.host}/api/base:1"
    async with await farm.connect() as driver:
        session, lease = await driver._info([registry.host], None), driver.lease_id()
        known = {state.record.id for state in await driver.refs()}
        resolved = await driver._on_worker(
            None,
            lambda worker: worker.resolve_image(
                ResolveRequest(session=session, image=name, platform=None, plain_http=False, lease_id=lease),
                timeout_s=60,
            ),
        )
        assert (resolved.config, resolved.image.manifest.digest, resolved.image.ref) == (
            image.config,
            image.digest,
            None,
        )
        assert [handler.digest for handler in resolved.handlers] == [layer.digest for layer in image.layers]
        assert {state.record.id for state in await driver.refs()} == known

        ref = await driver.pull(name)
        request = AssembleRequest(
            session=session,
            name=f"{registry.host}/api/built:1",
            ref_id=ref.id,
            config=json.dumps({"config": {"Cmd": ["/built"]}}).encode(),
            handlers=resolved.handlers,
            lease_id=lease,
        )
        first, second = [
            await driver._on_worker(None, lambda worker: worker.assemble(request, timeout_s=60)) for _ in range(2)
        ]
        assert first.manifest == second.manifest
        registry.forget()
        pushed = await driver.push(first.manifest.digest, f"{registry.host}/api/built:1")
    assert (pushed.digest, {layer.how for layer in pushed.layers}) == (first.manifest.digest, {"mounted"})
    assert registry.count("GET", "blob") == 0
    status, _, manifest = registry.call("GET", "/v2/api/built/manifests/1", headers={"Accept": MANIFEST_OCI})
    assert (status, json.loads(manifest)["config"]["digest"]) == (200, first.config.digest)


# -- chains --------------------------------------------------------------------------------------------------


async def test_the_same_layer_on_other_parents_is_another_ref(farm, registry):
    """A→B→C and A→D→C: one blob, two refs; every layer needs a provider of its own."""
    a, b, c, d = (fresh_layer() for _ in range(4))
    registry.push("api/chains", "1", build_image([a, b, c]))
    registry.push("api/chains", "2", build_image([a, d, c]))
    given = {layer: handler(registry, "api/chains", layer) for layer in (a, b, c, d)}
    async with await farm.connect() as driver:
        bottom = await driver.get_by_blob(descriptor(a), None, [given[a]])
        with pytest.raises(NeedsRemoteProvidersError) as caught:
            await driver.get_by_blob(descriptor(d), bottom)
        assert caught.value.digests == (d.digest,)
        over_b = await driver.get_by_blob(
            descriptor(c), await driver.get_by_blob(descriptor(b), bottom, [given[b]]), [given[c]]
        )
        over_d = await driver.get_by_blob(
            descriptor(c), await driver.get_by_blob(descriptor(d), bottom, [given[d]]), [given[c]]
        )
        again = await driver.get_by_blob(descriptor(c), over_b_parent := await driver.get(over_b.layers[1].record.id))
        assert again.id == over_b.id != over_d.id
        assert over_b_parent.id == over_b.layers[1].record.id
        assert [x.record.blob.digest for x in over_b.layers] == [a.digest, b.digest, c.digest]
        assert [x.record.blob.digest for x in over_d.layers] == [a.digest, d.digest, c.digest]
        registry.forget()
        await over_b.unlazy()
        fetched = await over_d.unlazy()
        assert [layer.source == "present" for layer in fetched.layers] == [True, False, True]
        assert layer_gets(registry, build_image([a, b, c, d])) == 4


async def test_a_descriptor_without_a_provider_changes_nothing(farm, registry):
    """Every digest that lacks one is named, and no ref has come to be."""
    layer = fresh_layer()
    async with await farm.connect() as driver:
        with pytest.raises(NeedsRemoteProvidersError) as caught:
            await driver.get_by_blob(descriptor(layer))
        assert caught.value.digests == (layer.digest,)
        assert layer.digest not in {state.record.blob.digest for state in await driver.refs()}


async def test_a_second_driver_proves_its_own_access(farm, tmp_path):
    """Who may not read the repository gets neither the lazy nor the present ref of another; who may, does."""
    login = {HTPASSWD_USER: HTPASSWD_PASSWORD}
    with docker_registry(htpasswd_config(tmp_path), authorize=lambda _scope: BASIC) as private:
        private.push("api/private", "1", image := fresh_image(layers=2))
        allowed = {private.host: next(iter(login.items()))}
        async with await farm.connect(credentials=allowed) as first, await farm.connect() as second:
            ref = await first.pull(f"{private.host}/api/private:1")
            for _ in ("lazy", "present"):
                with pytest.raises(NeedsRemoteProvidersError) as caught:
                    await second.get(ref.id)
                assert set(caught.value.digests) == {layer.digest for layer in image.layers}
                assert (await first.unlazy_chain(ref, None)).ref_id == ref.id
        async with await farm.connect(credentials=allowed) as third:
            found = await third.get(ref.id)
            assert found.id == ref.id
            assert {layer.source for layer in (await found.unlazy()).layers} == {"present"}


# -- the audit stream ----------------------------------------------------------------------------------------


async def test_the_audit_stream_tells_who_had_what_as_whom_and_from_where(farm, tmp_path):
    """Each driver by its session, each account by a handle; what moved is told once, and no login anywhere."""
    login = (HTPASSWD_USER, HTPASSWD_PASSWORD)
    with docker_registry(htpasswd_config(tmp_path), authorize=lambda _scope: BASIC) as private:
        private.push("audit/app", "1", image := fresh_image(layers=2))
        name = f"{private.host}/audit/app:1"
        async with (
            await farm.connect(credentials={private.host: login}) as first,
            await farm.connect(credentials={private.host: login}) as second,
        ):
            await (await first.pull(name)).unlazy()
            await (await second.pull(name)).extract("n1")
            await first.push(await first.get(name), f"{private.host}/audit/copy:1")
            layers = {layer.digest for layer in image.layers}
            entries = [
                e for e in await first.audit(last_s=300) if e.digest in layers or e.image.startswith(private.host)
            ]
            told = [(e.operation, e.outcome, e.who) for e in entries]
            explained = await first.audit(digest=image.layers[0].digest)
            job = first.solve(scratch().copy(graph_image(name), "/data-0", "/copied"))
            await job
            built = await first.audit(job=job.id)
    one, two = first.session_id, second.session_id
    assert told.count(("pull", "ok", one)) == told.count(("pull", "ok", two)) == 1
    assert told.count(("unlazy", "fetched", one)) == told.count(("unlazy", "present", two)) == 2
    assert told.count(("push-layer", "mounted", one)) + told.count(("push-layer", "exists", one)) == 2
    assert told.count(("push", "ok", one)) == 1
    fetches = [e for e in entries if e.operation == "fetch"]
    assert sorted((e.outcome, e.who, e.source, e.moved_bytes) for e in fetches) == sorted(
        ("committed", one, f"{private.host}/audit/app", len(layer.data)) for layer in image.layers
    )
    assert {"resolve", "unlazy", "extract"} <= {e.operation for e in built}
    assert {e.who for e in built} == {f"{one}-{job.id}"}
    assert all(e.vertex for e in built if e.operation == "unlazy")
    (handle,) = {e.credential for e in entries if e.operation in ("pull", "fetch", "push")}
    assert handle != "anonymous"
    assert HTPASSWD_PASSWORD not in repr(entries)
    assert {e.digest for e in explained} == {image.layers[0].digest}
    document = await asyncio.to_thread(farm.cli_json, "explain", "pull", name)
    assert [layer["attempts"][0]["who"] for layer in document["layers"]] == [one, one]


# -- leases --------------------------------------------------------------------------------------------------


async def test_a_lease_holds_while_its_body_runs(farm, registry):
    """It is listed with what it holds and its labels; afterwards it is gone, also after an error."""
    registry.push("api/leases", "1", image := fresh_image(layers=1))
    async with await farm.connect() as driver:
        given = [handler(registry, "api/leases", image.layers[0])]
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the error is the block's own
            async with driver.lease(ttl_s=5, labels={"build": "7"}) as lease:
                ref = await driver.get_by_blob(descriptor(image.layers[0]), None, given, lease=lease)
                await lease.attach([image_resource("a/b:1")])
                held = {one.id: one for one in await driver.leases()}[lease.id]
                assert held.labels == {"build": "7"}
                assert set(held.resources) >= {ref_resource(ref.id), image_resource("a/b:1")}
                raise ZeroDivisionError
        assert lease.id not in {one.id for one in await driver.leases()}
        pinned = await driver.pin(ref, ttl_s=60, labels={"why": "release"})
        assert (pinned.resources, pinned.labels["why"]) == ((ref_resource(ref.id),), "release")
        await driver.unpin(pinned.id)
        with pytest.raises(LeaseNotFoundError):
            await driver.unpin(pinned.id)
        with pytest.raises(LeaseLostError):
            await driver.get_by_blob(descriptor(image.layers[0]), None, given, lease=lease)


async def test_a_driver_that_leaves_gives_its_lease_back(farm, registry):
    """Unless it is to be kept, and the work was done."""
    registry.push("api/gone", "1", fresh_image(layers=1))

    async def drive(*, keep, fail):
        async with await farm.connect(keep=keep) as driver:
            await driver.pull(f"{registry.host}/api/gone:1")
            if fail:
                raise ZeroDivisionError
        return f"driver-{driver.session_id}"

    gone, kept = await drive(keep=False, fail=False), await drive(keep=True, fail=False)
    async with await farm.connect() as driver:
        before = {lease.id: lease for lease in await driver.leases()}
        with pytest.raises(ZeroDivisionError):
            await drive(keep=True, fail=True)
        assert {lease.id for lease in await driver.leases()} == set(before)
    assert gone not in before
    assert before[kept].expires_wall_s > time.time() + 24 * 3600


# -- the blocking twin ---------------------------------------------------------------------------------------


def test_the_blocking_twin_does_the_same_without_await(farm, registry):
    """Same names, same results, same errors."""
    registry.push("api/blocking", "1", image := fresh_image(layers=2))
    name = f"{registry.host}/api/blocking:1"
    with blocking.Farm.connect(farm.state_dir, credentials={}) as driver:
        ref = driver.pull(name)
        assert ref.is_lazy
        assert (ref.image, ref.digest) == (name, image.digest)
        assert len(ref.layers) == 2
        assert driver.get(name).id == driver.get(ref.id).id == ref.id
        told = []
        assert [layer.joined for layer in ref.unlazy(progress=told.append).layers] == [False, False]
        assert all(phase.is_end for phase in ends(told).values())
        assert not ref.is_lazy
        assert Path(ref.extract("n0").path, "data-0").exists()
        assert len(ref.extract_everywhere()) == 3
        assert {x.how for x in driver.push(ref, f"{registry.host}/api/blocking:2").layers} == {"exists"}
        with driver.lease(labels={"build": "8"}) as lease:
            lease.attach([image_resource("a/b:2")])
            assert image_resource("a/b:2") in {one.id: one for one in driver.leases()}[lease.id].resources
        assert lease.id not in {one.id for one in driver.leases()}
        assert ref.id in {state.record.id for state in driver.refs()}
        assert name in {record.name for record in driver.images()}
        assert [node.id for node in driver.nodes()] == ["n0", "n1", "n2"]
        layer = image.layers[0]
        bottom = driver.get_by_blob(descriptor(layer), None, [handler(registry, "api/blocking", layer)])
        assert driver.get_by_blob(descriptor(image.layers[1]), bottom).id == ref.id
        with pytest.raises(RefNotFoundError):
            driver.get("no/such:image")
        ref.release()
        with pytest.raises(RefReleasedError):
            ref.unlazy()


# -- scripts -------------------------------------------------------------------------------------------------

_ASYNCHRONOUS = """
import asyncio, json, sys
from lazyfarm import Farm

async def main():
    async with await Farm.connect() as farm:
        ref = await farm.pull(sys.argv[1])
        operation = ref.extract("n1")
        items = [item.item async for item in operation.progress()]
        extracted = await operation
        print(json.dumps({"ref": ref.id, "path": extracted.path, "items": len(set(items))}))

asyncio.run(main())
"""
_BLOCKING = """
import json, sys
from lazyfarm.blocking import Farm

with Farm.connect() as farm:
    ref = farm.pull(sys.argv[1])
    items = []
    extracted = ref.extract("n1", progress=lambda item: items.append(item.item))
    print(json.dumps({"ref": ref.id, "path": extracted.path, "items": len(set(items))}))
"""


@pytest.mark.parametrize("script", [_ASYNCHRONOUS, _BLOCKING], ids=["asynchronous", "blocking"])
def test_a_plain_script_is_a_driver(farm, registry, tmp_path, script):
    """``python driver.py``, wherever it lies; it says what it prints, and nothing else."""
    registry.push("api/script", "1", fresh_image(layers=2))
    file = tmp_path / "driver.py"
    file.write_text(textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, str(file), f"{registry.host}/api/script:1"],
        cwd=tmp_path,
        env={**os.environ, **farm.environ, "LAZYFARM_STATE_DIR": str(farm.state_dir)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert Path(told["path"], "data-1").exists()
    assert told["items"] == 4


async def test_a_farm_that_is_closed_is_of_no_more_use(farm):
    """Closing twice is no error; using it then is one of ours."""
    driver = await farm.connect()
    await driver.close()
    await driver.close()
    with pytest.raises(ClusterError):
        await driver.refs()


async def test_a_layer_that_came_from_another_private_repository_is_proven_by_the_puller(farm, token_registry):
    """Pulling is enough: the registry is asked for what is here from elsewhere, in the name of who pulls."""
    name, password = f"user-{secrets.token_hex(4)}", secrets.token_urlsafe(16)
    token_registry.tokens.allow(name, password, {"*": {"pull"}})
    registry, shared = token_registry.registry, build_layer({"shared": secrets.token_bytes(1000)})
    one, other = (f"{registry.host}/twice/{secrets.token_hex(4)}:1" for _ in range(2))
    for image in (one, other):
        top = build_layer({"own": secrets.token_bytes(10)})
        registry.push(image.partition("/")[2].rpartition(":")[0], "1", build_image([shared, top]))
    async with await farm.connect(credentials={registry.host: (name, password)}) as driver:
        await (await driver.pull(one)).unlazy()
        async with asyncio.timeout(30):
            ref = await driver.pull(other)
    assert [layer.is_lazy for layer in ref.layers] == [False, True]
