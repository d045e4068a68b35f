"""``lazyfarm explain`` over a real Redis."""

from __future__ import annotations

import asyncio
import json

import pytest
from typer.testing import CliRunner

from cluster.digest import digest_of
from cluster.errors import RefNotFoundError
from cluster.job import JobId
from lazyfarm.cli.main import app
from lazyfarm.explain import LayerWait, Waiting, open_explain
from lazyfarm.settings import load_settings
from tests.doubles.busy_farm import FLYING, GONE, LAZY, NAME, PRESENT, busy_farm
from tests.doubles.redis import redis_binaries

pytestmark = pytest.mark.redis


@pytest.fixture
async def farm(redis_servers, tmp_path):
    farm = await busy_farm(redis_servers(next(iter(redis_binaries()))).config, tmp_path / "state")
    yield farm
    await farm.close()


async def test_a_chain_is_explained_layer_by_layer(farm):
    """Who fetches a layer, how fast, who waits, for which job; what is present or lazy waits for nobody."""
    async with open_explain(load_settings(farm.state_dir, None, {})) as explain:

        async def goes_on():
            await asyncio.sleep(0.05)
            await farm.stores().flights.report(farm.fence, 60, 100)

        (present, flying, lazy), _ = await asyncio.gather(explain.wait(farm.top[:20], watch_s=0.5), goes_on())
    assert present == LayerWait(digest=PRESENT.digest, state="present", current_bytes=100, total_bytes=100)
    assert lazy == LayerWait(digest=LAZY.digest, state="lazy")
    assert (flying.state, flying.owner, flying.waiters) == ("fetching", "n0/a", 1)
    assert (flying.current_bytes, flying.total_bytes, flying.rate, flying.left_s) == (60, 100, 80.0, 0.5)
    assert 500 < flying.lease_left_s <= 600
    assert flying.asked_by == (Waiting(job=JobId("j1"), vertex=farm.vertex),)


async def test_a_blob_is_named_by_its_digest(farm):
    """Present or on its way; a digest that nobody knows is no ref either."""
    async with open_explain(load_settings(farm.state_dir, None, {})) as explain:
        (flying,) = await explain.wait(FLYING.digest, watch_s=0.01)
        assert (flying.state, flying.rate, flying.left_s) == ("fetching", 0.0, None)
        assert [layer.state for layer in await explain.wait(PRESENT.digest)] == ["present"]
        with pytest.raises(RefNotFoundError):
            await explain.wait(digest_of(b"nothing"))


def test_the_command_tells_it(farm):
    """One line a layer, and who asked below; the same as JSON."""
    words = ["explain", "wait", farm.top, "--state-dir", str(farm.state_dir)]
    said = CliRunner().invoke(app, words).stdout.splitlines()
    assert "present, 100 B: waits for nothing" in said[0]
    assert "fetching by n0/a, 20 B of 100 B, nothing came while this looked, 1 worker waiting" in said[1]
    assert said[2].endswith("of job j1")
    assert "nobody fetches it" in said[3]
    layers = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["layers"]
    assert [(layer["state"], layer["owner"]) for layer in layers] == [
        ("present", None),
        ("fetching", "n0/a"),
        ("lazy", None),
    ]


async def test_how_a_chain_was_pulled_is_told_layer_by_layer(farm):
    """Who pulled it; who needed each layer, who brought it and from where; where a lazy one would come from."""
    async with open_explain(load_settings(farm.state_dir, None, {})) as explain:
        story = await explain.pull(farm.top, watch_s=0.01)
        (lazy,) = (await explain.pull(LAZY.digest, watch_s=0.01)).layers
        (gone,) = (await explain.pull(GONE, watch_s=0.01)).layers
        with pytest.raises(RefNotFoundError):
            await explain.pull(digest_of(b"nothing"))
    assert [(entry.who, entry.image) for entry in story.pulls] == [("d1", NAME)]
    present, flying, last = story.layers
    assert (present.wait.state, present.came_from) == ("present", "r.example/debian")
    assert [(entry.outcome, entry.who) for entry in present.asked] == [("fetched", "d1"), ("joined", "s-j1")]
    assert [(e.source, e.rate, e.fence) for e in present.attempts] == [("mirror.example/debian", 50.0, present.fence)]
    assert (flying.wait.owner, flying.entries) == ("n0/a", ())
    assert last == lazy
    assert (lazy.wait.state, lazy.providers, lazy.entries) == ("lazy", ("r.example/debian",), ())
    assert (gone.wait.state, [entry.operation for entry in gone.others]) == ("gone", ["delete"])


def test_the_command_tells_how_it_was_pulled(farm):
    """A line a layer, and below it what was noted; the same as JSON; an unknown digest is a typed error."""
    words = ["explain", "pull", farm.top, "--state-dir", str(farm.state_dir)]
    said = CliRunner().invoke(app, words).stdout.splitlines()
    assert f"pull ok ref {farm.top[:19]} {NAME} for driver d1" in said[0]
    assert "present, 100 B, from r.example/debian, in 2.00 s (50 B/s), 1 of 2 callers joined" in said[1]
    assert (
        "fetch committed 100 B from mirror.example/debian in 2.00 s (50 B/s) for driver d1 as alice by n0/a" in said[2]
    )
    assert "unlazy joined for job j1" in said[4]
    assert "fetching by n0/a" in said[5]
    assert said[6].endswith("lazy: nobody has needed its bytes; it would come from r.example/debian")
    document = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [layer["state"] for layer in document["layers"]] == ["present", "fetching", "lazy"]
    assert document["layers"][0]["attempts"][0]["credential"] == "alice"
    unknown = CliRunner().invoke(app, ["explain", "pull", digest_of(b"no"), "--json", *words[-2:]])
    assert (unknown.exit_code, json.loads(unknown.stdout)["error"]["type"]) == (1, "RefNotFoundError")


def test_the_audit_stream_is_exported_as_json_lines(farm):
    """One object an entry, oldest first; of one job or digest alone, or one operation; in words without --json."""
    words = ["audit", "--state-dir", str(farm.state_dir)]

    def lines(*more):
        return [json.loads(line) for line in CliRunner().invoke(app, [*words, "--json", *more]).stdout.splitlines()]

    everything = lines("--since", "1h")
    assert [entry["operation"] for entry in everything] == ["pull", "pull", "fetch", "unlazy", "unlazy", "delete"]
    assert [entry["time"] for entry in everything] == sorted(entry["time"] for entry in everything)
    assert [entry["outcome"] for entry in lines("--job", "j1")] == ["joined"]
    assert lines("--digest", GONE[:20]) == everything[-1:]
    assert lines("--operation", "fetch") == everything[2:3]
    assert CliRunner().invoke(app, [*words, "--digest", GONE]).stdout.strip().endswith("from blobs/gone by tests")
    wrong = CliRunner().invoke(app, [*words, "--operation", "fly"])
    assert (wrong.exit_code, wrong.stdout) == (1, "")
