"""``lazyfarm du``, ``prune`` and ``explain kept`` over a real Redis; Ray and S3 are nowhere."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from cluster.errors import InvalidArgumentError
from cluster.lease import LeaseId
from lazyfarm.cli.main import app
from lazyfarm.collection import open_collection
from lazyfarm.settings import load_settings
from tests.doubles.collect import Bench, L, chain, layer
from tests.doubles.redis import redis_binaries
from tests.doubles.stores import FarmOfRedis

pytestmark = pytest.mark.redis

ONE, TWO = "docker.io/example/one:1", "docker.io/example/two:1"


@pytest.fixture
async def farm(redis_servers, tmp_path):
    """A farm with two images on one base; a driver holds the first one."""
    farm = FarmOfRedis(redis_servers(next(iter(redis_binaries()))).config, tmp_path / "state")
    bench = Bench(farm.stores())
    await bench.pull(ONE, "base", "one", lease=L)
    await bench.pull(TWO, "base", "two", lease=LeaseId("driver-2"))
    for name in ("base", "two"):
        await bench.fetch(layer(name).digest)
    await bench.leave(LeaseId("driver-2"))
    yield farm
    await farm.close()


def run(farm, *words, code=0):
    result = CliRunner().invoke(app, [*words, "--state-dir", str(farm.state_dir)])
    assert result.exit_code == code, result.output
    return result.stdout


def told(farm, *words, code=0):
    return json.loads(run(farm, *words, "--json", code=code))


def test_du_tells_images_refs_and_totals(farm):
    """What is lazy takes nothing and is told as avoided; what two images share is exclusive to neither."""
    found = told(farm, "du")
    assert [(i["image"], i["size"], i["exclusive"], i["avoided"], i["in_use"]) for i in found["images"]] == [
        (ONE, 100, 0, 100, True),
        (TWO, 200, 100, 0, False),
    ]
    assert (found["total"], found["reclaimable"], found["avoided"]) == (222, 111, 100)
    assert {ref["ref"] for ref in found["refs"] if ref["in_use"]} == {record.id for record in chain("base", "one")}
    assert "reclaimable  111 B" in run(farm, "du")
    assert run(farm, "du", "--refs").splitlines()[0].split()[:3] == ["REF", "SIZE", "AVOIDED"]


def test_prune_takes_what_nobody_holds(farm):
    """First only said, then done; what is held stays."""
    before = told(farm, "prune", "--dry-run")
    assert (before["dry_run"], [item["id"] for item in before["items"]]) == (True, [chain("base", "two")[1].id])
    assert told(farm, "du")["total"] == 222
    assert run(farm, "prune", "--keep-duration", "1d", "--dry-run").startswith("0 items, would free 0 B")
    assert run(farm, "prune", "--filter", "lazy").startswith("0 items")
    after = told(farm, "prune", "--all")
    assert (after["freed"], after["kept"], len(after["items"])) == (111, 0, 1)
    assert told(farm, "du")["total"] == 111
    assert [image["image"] for image in told(farm, "du")["images"]] == [ONE]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--filter", "size==3"), "no field 'size'"),
        (("--keep-bytes", "much"), "--keep-bytes can't be 'much'"),
        (("--keep-duration", "5"), "--keep-duration can't be '5'"),
    ],
)
def test_what_can_not_be_meant_is_one_line(farm, words, said):
    assert said in told(farm, "prune", *words, code=1)["error"]["message"]


async def test_a_negative_number_is_refused(farm):
    async with open_collection(load_settings(farm.state_dir, None, {})) as collection:
        with pytest.raises(InvalidArgumentError, match="keep_bytes can't be -1"):
            await collection.prune(keep_bytes=-1)


def test_explain_kept_names_lease_and_children(farm):
    """Who holds it, directly or by what stands on it; and that nobody does."""
    base, one = chain("base", "one")
    found = told(farm, "explain", "kept", base.id)
    assert set(found["children"]) == {one.id, chain("base", "two")[1].id}
    assert {(hold["lease"]["id"], hold["ref"], hold["image"]) for hold in found["holds"]} == {
        (L, base.id, None),
        (L, one.id, None),
        (L, one.id, ONE),
    }
    said = run(farm, "explain", "kept", "example/one:1")
    assert f"lease {L} (owner=driver) holds it, expires in" in said
    assert f"lease {L} (owner=driver) holds {ONE}, whose top is it, expires in" in said
    assert "nothing holds it: it goes with the next collection" in run(farm, "explain", "kept", "example/two:1")
    assert told(farm, "explain", "kept", "example/none:1", code=1)["error"]["type"] == "RefNotFoundError"
