"""The invariants of DESIGN §5 by name, each with its fault injected. I10 is in ``test_paused_owner``."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
from pathlib import Path
from secrets import token_hex

import pytest
import ray

from cluster.digest import digest_of
from cluster.errors import ClusterError, ProcessFailedError
from cluster.faultpoints import FaultPoint
from cluster.provider import DescHandler
from lazyfarm.graph import image, secret
from tests.doubles.at_rest import in_files, in_gcs, in_object_stores, in_processes, in_redis
from tests.doubles.builds import BuildFarm, Gate, log_of, wait_for
from tests.doubles.faults import MIB, PART_BYTES, RANGES, BrokenFarm, assert_extracted, eventually
from tests.doubles.registry import HTPASSWD_PASSWORD, HTPASSWD_USER, docker_registry, htpasswd_config
from tests.doubles.registry_faults import Hang, Respond, blobs, registry_fault_proxy
from tests.doubles.s3_faults import Answer
from tests.doubles.token_server import TokenRegistry

pytestmark = [pytest.mark.cluster, pytest.mark.registry, pytest.mark.s3]

NODES = ("n0", "n1", "n2")


async def test_i1_each_byte_is_served_once(lab: BrokenFarm):
    """Nine callers on three nodes, of three drivers: every layer byte leaves the registry exactly once."""
    name, image = lab.image(17 * MIB, 6 * MIB, MIB)
    async with lab.driver() as one, lab.driver() as two, lab.driver() as three:
        refs = [await farm.pull(name, plain_http=True) for farm in (one, two, three)]
        got = await asyncio.gather(*(ref.extract(node) for ref in refs for node in NODES))
    for result in got:
        assert_extracted(result.path, image)
    lab.assert_fetched(image)
    assert sum(layer.bytes_fetched for result in got for layer in result.layers) == sum(lab.fetched(image).values())
    await lab.assert_whole(image)


async def test_i1_a_lost_owner_costs_a_part_for_each_open_range(lab: BrokenFarm):
    """The owner is killed while its ranges are in the middle: the rest is fetched, and these ranges again."""
    name, image = lab.image(22 * MIB)
    (layer,) = image.layers
    lab.proxy.bytes_per_s = 3 * MIB
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        both = asyncio.gather(mine.extract("n1"), theirs.extract("n2"))
        # All the ranges' first parts are done, and the next ones have begun.
        await eventually(lambda: lab.proxy.blob_bytes[layer.digest] > (RANGES + 0.5) * PART_BYTES, "three parts")
        owner = await lab.owner_of(layer.digest)
        assert owner is not None
        os.kill((await lab.worker_pids())[owner], signal.SIGKILL)
        for result in await both:
            assert_extracted(result.path, image)
    again = lab.proxy.blob_bytes[layer.digest] - len(layer.data)
    assert again <= RANGES * PART_BYTES
    await lab.assert_whole(image)


@pytest.mark.parametrize("point", [FaultPoint.UPLOAD_COMPLETE_BEFORE, FaultPoint.COMMIT_BEFORE], ids=str)
async def test_i2_a_blob_is_not_present_before_it_is_whole_and_hashed(lab: BrokenFarm, point: FaultPoint):
    """Stopped right before the step, and killed there: nobody sees the blob, on any node, until it is committed."""
    name, image = lab.image(6 * MIB)
    async with lab.driver() as one:
        ref = await one.pull(name, plain_http=True)
        gate = lab.faults.hang(point)
        running = asyncio.ensure_future(_unlazy(ref))
        pid = await gate.arrival()
        assert await lab.blob(image.layers[0].digest) is None
        await ref.refresh()
        assert ref.is_lazy
        os.kill(pid, signal.SIGKILL)
        gate.open()
        await running
        assert not ref.is_lazy
        assert await lab.blob(image.layers[0].digest) is not None
    await lab.assert_whole(image)


async def test_i4_one_record_and_one_snapshot_whatever_dies(lab: BrokenFarm):
    """Four drivers make one ref and extract it on one node, whose worker dies as it publishes: one of each."""
    name, image = lab.image(MIB, MIB)
    async with lab.driver() as one, lab.driver() as two, lab.driver() as three, lab.driver() as four:
        farms = (one, two, three, four)
        refs = await asyncio.gather(*(farm.pull(name, plain_http=True) for farm in farms))
        assert len({ref.id for ref in refs}) == 1
        bottom = refs[0].layers[0]
        handlers = [DescHandler(digest=bottom.record.blob.digest, provider=bottom.providers[0])]
        made = await asyncio.gather(*(farm.get_by_blob(bottom.record.blob, handlers=handlers) for farm in farms))
        assert {ref.id for ref in made} == {bottom.record.id}
        killed = lab.faults.kill(FaultPoint.SNAPSHOT_PUBLISH_BEFORE)
        got = await asyncio.gather(*(ref.extract("n1") for ref in refs))
        assert killed()
        assert len({result.path for result in got}) == 1
    lab.assert_fetched(image, lost_owners=1)
    await lab.assert_whole(image)


async def test_i5_every_caller_ends_when_nothing_answers(lab: BrokenFarm):
    """The registry falls silent in the middle, for good: each caller gets a typed error within its deadline."""
    name, image = lab.image(6 * MIB)
    silence = Hang()
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        lab.proxy.script(silence, times=None)
        async with asyncio.timeout(60):
            outcomes = await asyncio.gather(mine.extract("n1"), theirs.extract("n2"), return_exceptions=True)
        assert all(isinstance(outcome, ClusterError) for outcome in outcomes), outcomes
        lab.proxy.forget()
        silence.proceed.set()
        assert_extracted((await mine.extract("n1")).path, image)
    await lab.assert_whole(image)


@pytest.mark.parametrize("node", ["n1", "n2"], ids=["same-node", "another-node"])
async def test_i6_cancelling_the_owner_fails_nobody(lab: BrokenFarm, node: str):
    """Whose call began the fetch cancels it; whoever waits goes on waiting, for the same bytes, and gets them."""
    name, image = lab.image(8 * MIB)
    lab.proxy.bytes_per_s = 3 * MIB
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        first = asyncio.ensure_future(_extract(mine, "n1"))
        await eventually(lambda: sum(lab.fetched(image).values()) > MIB, "a MiB")
        second = asyncio.ensure_future(_extract(theirs, node))
        await eventually(lambda: sum(lab.fetched(image).values()) > 3 * MIB, "three MiB")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert_extracted((await second).path, image)
    lab.assert_fetched(image)
    await lab.assert_whole(image)


async def test_i6_cancelling_the_last_one_ends_the_work(lab: BrokenFarm):
    """Both callers cancel: the fetch stops, its flight goes, and the next caller is not told of it."""
    name, image = lab.image(8 * MIB)
    lab.proxy.bytes_per_s = 1 * MIB
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        both = [asyncio.ensure_future(_extract(mine, "n1")), asyncio.ensure_future(_extract(theirs, "n2"))]
        await eventually(lambda: sum(lab.fetched(image).values()) > MIB, "a MiB")
        for call in both:
            call.cancel()
        await asyncio.gather(*both, return_exceptions=True)

        async def is_over() -> bool:
            return not await lab.live_flights() and not lab.staged()

        await eventually(is_over, "the work to end")
        assert sum(lab.fetched(image).values()) < len(image.layers[0].data)
        lab.proxy.bytes_per_s = None
        assert_extracted((await mine.extract("n2")).path, image)
    await lab.assert_whole(image)


async def test_i7_what_needs_no_bytes_moves_none(lab: BrokenFarm):
    """Pull, look up, list, re-tag and mount-push while the registry gives no blob at all, and workers die."""
    name, image = lab.image(6 * MIB, MIB)
    digests = {layer.digest for layer in image.layers}
    tag = name.rpartition(":")[2]
    lab.proxy.script(Respond(500), of=lambda seen: blobs(seen) and seen.digest in digests, times=None)
    killed = [lab.faults.kill(FaultPoint.PULL_RECORDED), lab.faults.kill(FaultPoint.PUSH_MANIFEST_BEFORE)]
    async with lab.driver() as one:
        ref = await one.pull(name, plain_http=True)
        again = await one.get(ref.id)
        assert [state.record.id for state in again.layers] == [state.record.id for state in ref.layers]
        assert ref.id in {state.record.id for state in await one.refs()}
        await one.push(ref, f"{lab.proxy.host}/app:again-{tag}", plain_http=True)
        pushed = await one.push(ref, f"{lab.proxy.host}/other:{tag}", plain_http=True)
        assert pushed.digest == image.digest
        assert {layer.how for layer in pushed.layers} <= {"mounted", "exists"}
        assert ref.is_lazy
    assert all(happened() for happened in killed)
    assert not [seen for seen in lab.proxy.blob_gets() if seen.digest in digests]
    await lab.assert_whole(image)


async def test_i8_no_credential_is_at_rest_or_in_a_log(lab: BrokenFarm, token_registry: TokenRegistry, tmp_path: Path):
    """After pulls, fetches, pushes, refusals and a killed worker, on basic auth and on tokens: no secret anywhere.

    Not in Redis (keys and values), S3, a file of the state directory (logs, node caches, Ray's sessions), a command
    line, an environment, or the memory of Ray's GCS, which is all that it stores of jobs and actors. The
    farm's own secrets are in ``secrets/`` alone.
    """
    token_registry.tokens.allow("alice", "wonder-land-2f9c-i8", {"*": {"pull", "push"}})
    token_registry.tokens.allow("mallory", "no-thing-0d13-i8", {})
    with (
        docker_registry(htpasswd_config(tmp_path), authorize=lambda _scope: _basic()) as basic,
        registry_fault_proxy(token_registry.registry.url) as proxy,
    ):
        of_tokens, _ = lab.image(6 * MIB, registry=token_registry.registry)
        of_tokens = of_tokens.replace(token_registry.registry.host, proxy.host)
        of_basic, _ = lab.image(6 * MIB, registry=basic)
        credentials = {
            proxy.host: ("alice", "wonder-land-2f9c-i8"),
            basic.host: (HTPASSWD_USER, HTPASSWD_PASSWORD),
        }
        async with lab.driver(credentials=credentials) as alice:
            for name, host in ((of_tokens, proxy.host), (of_basic, basic.host)):
                ref = await alice.pull(name, plain_http=True)
                killed = lab.faults.kill(FaultPoint.COMMIT_BEFORE)
                await ref.extract("n1")
                assert killed()
                await ref.extract("n2")
                await alice.push(ref, f"{host}/pushed:t", plain_http=True)
        async with lab.driver(credentials={proxy.host: ("mallory", "no-thing-0d13-i8")}) as mallory:
            with pytest.raises(ClusterError):
                await mallory.pull(of_tokens, plain_http=True)
        headers = {seen.authorization for seen in proxy.seen} - {None}
    tokens = {header.partition(" ")[2] for header in headers}
    assert any(token.count(".") == 2 for token in tokens), "no bearer token was ever sent"
    plain = {"wonder-land-2f9c-i8", "no-thing-0d13-i8", HTPASSWD_PASSWORD, _basic().partition(" ")[2]}
    plain |= {base64.b64encode(b"alice:wonder-land-2f9c-i8").decode()}
    secrets = {secret.encode() for secret in tokens | plain}
    # A token's signature is a secret part by itself.
    secrets |= {token.rpartition(".")[2].encode() for token in tokens if token.count(".") == 2}

    # A search that could find nothing would prove nothing.
    known = {b"fetch-worker-n1"}
    assert any(key.endswith(":audit") for key in await in_redis(lab.redis, known))
    assert await asyncio.to_thread(_in_s3, lab, {b"rootfs"})
    assert await asyncio.to_thread(in_files, lab.running.state_dir, known)
    assert in_processes(lab.processes(), {b"RAY_AUTH_MODE"})
    assert await asyncio.to_thread(in_gcs, lab.processes(), known)

    assert not await in_redis(lab.redis, secrets)
    assert not await asyncio.to_thread(_in_s3, lab, secrets)
    assert not await asyncio.to_thread(in_files, lab.running.state_dir, secrets)
    assert not in_processes(lab.processes(), secrets)
    assert not await asyncio.to_thread(in_gcs, lab.processes(), secrets)
    own = {path.read_bytes().strip(): path for path in (lab.running.state_dir / "secrets").iterdir() if path.is_file()}
    assert own
    for path in own.values():
        assert path.stat().st_mode & 0o077 == 0, f"{path} can be read by others"
    assert not in_processes(lab.processes(), set(own))
    assert not await asyncio.to_thread(in_files, lab.running.state_dir / "logs", set(own))
    await lab.assert_whole()


def _basic() -> str:
    return "Basic " + base64.b64encode(f"{HTPASSWD_USER}:{HTPASSWD_PASSWORD}".encode()).decode()


def _in_s3(lab: BrokenFarm, secrets: set[bytes]) -> list[str]:
    """Return the small objects that hold a secret; layers are what the test made them."""
    found = []
    for info in lab.store.objects(""):
        held = info.key.encode()
        if info.size_bytes < 256 * 1024:
            buffer = bytearray(info.size_bytes)
            filled = 0
            with lab.store.open(info.key) as stream:
                while filled < len(buffer) and (count := stream.readinto(memoryview(buffer)[filled:])):
                    filled += count
            held += bytes(buffer)
        found += [info.key for secret in secrets if secret in held]
    return found


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="containers need root")
async def test_i8_a_builds_secret_is_at_rest_nowhere(lab: BrokenFarm, builds: BuildFarm, base: str):
    """A command has it as a file and as a variable, one fails with it, and a worker is killed while one has it.

    Afterwards it is not in Redis, S3, a file of the state directory (events, logs, leftovers of containers, Ray's
    sessions), a process's arguments or environment, the GCS, an object store, an error or what the commands
    said; and not in what was built.
    """
    canary = f"canary-{token_hex(12)}"
    mount = secret("token", target="/run/secrets/token", env="TOKEN", required=True)
    start, gate = image(base, plain_http=True), Gate(builds)
    uses = start.run('test "$TOKEN" = "$(cat /run/secrets/token)" && echo used > /made', mounts=[mount]).named("uses")
    held = uses.run(f"{gate.command}; cat /made > /again", mounts=[mount, gate.mount]).named("held")
    fails = start.run('test -n "$TOKEN" && exit 3', mounts=[mount])
    given, events = {"token": canary}, []
    # In the object store for sure, to see that the search finds what is there.
    known = f"known-{token_hex(12)}".encode()
    async with lab.driver() as driver:
        kept = await asyncio.to_thread(ray.put, known * 20_000)
        job = driver.solve([uses, held], secrets=given, on_event=events.append)
        waiting = asyncio.ensure_future(wait_for(job))
        await log_of(job, "at the gate")
        victims = [each for each in await builds.of_kind("op-worker") if each.node in builds.containers()]
        assert victims
        await builds.kill(*victims)
        result = await gate.open_until(waiting)
        with pytest.raises(ProcessFailedError) as failed:
            await driver.solve(fails, secrets=given)
        extracted = await result.refs[1].extract("n0")
        said = "".join([str(failed.value), failed.value.hint, repr(failed.value), *map(repr, events)])
        tree = Path(extracted.path)
        assert (tree / "again").read_text() == "used\n"
        assert canary not in said
        assert not (tree / "run/secrets/token").exists() or not (tree / "run/secrets/token").read_bytes()
        await builds.are_back(*victims)

        # A search that could find nothing would prove nothing.
        assert in_object_stores(lab.processes(), {known})
        assert await in_redis(lab.redis, {b"at the gate"})
        wanted = {canary.encode(), base64.b64encode(canary.encode())}
        assert not in_object_stores(lab.processes(), wanted)
        assert not await in_redis(lab.redis, wanted)
        assert not await asyncio.to_thread(_in_s3, lab, wanted)
        assert not await asyncio.to_thread(in_files, lab.running.state_dir, wanted)
        assert not in_processes(lab.processes(), wanted)
        assert not await asyncio.to_thread(in_gcs, lab.processes(), wanted)
        del kept


async def test_i9_a_crash_of_everything_leaves_nothing_that_can_not_be_finished(lab: BrokenFarm):
    """All workers and Redis are killed at once in the middle of two fetches; the farm repairs itself and ends them."""
    name, image = lab.image(12 * MIB, 6 * MIB)
    lab.proxy.bytes_per_s = 3 * MIB
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        both = asyncio.gather(mine.extract("n1"), theirs.extract("n2"))
        await eventually(lambda: sum(lab.fetched(image).values()) > 7 * MIB, "seven MiB")
        for pid in (await lab.worker_pids()).values():
            os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(lab.restart_redis)
        lab.proxy.bytes_per_s = None
        for result in await both:
            assert_extracted(result.path, image)
    await lab.assert_whole(image)


async def test_i9_a_pull_that_could_not_store_its_manifest_is_simply_made_again(lab: BrokenFarm):
    """S3 refuses the manifest: a typed error, no image and no half of one; the next pull has it."""
    name, image = lab.image(MIB)
    async with lab.driver() as one:
        lab.s3_proxy.plan(Answer(503, "ServiceUnavailable"), method="PUT", times=10_000)
        with pytest.raises(ClusterError):
            await one.pull(name, plain_http=True)
        assert name not in {found.name for found in await one.images()}
        lab.s3_back()
        ref = await one.pull(name, plain_http=True)
        assert ref.digest == image.digest == digest_of(image.manifest)
        assert json.loads(image.manifest)["layers"][0]["digest"] == ref.layers[0].record.blob.digest
    await lab.assert_whole(image)


async def _unlazy(ref):
    return await ref.unlazy()


async def _extract(ref, node):
    return await ref.extract(node)
