"""Every cell of the matrix: a part of the farm, what happens to it, and what is under way meanwhile.

What each promises is in :mod:`tests.faults.matrix`, which makes the tests' names.
"""

from __future__ import annotations

import os
import secrets
import traceback
from collections.abc import Collection

import pytest

from cluster.config import S3Config
from tests.doubles.faults import BrokenFarm
from tests.doubles.shell_image import shell_image
from tests.faults.matrix import Cell, cells
from tests.faults.scenes import play

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.registry,
    pytest.mark.s3,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers, cgroups and the packet filter need root"),
]

#: What came of the cells that were played; the scene of a part and a fault is played for all of its cells at once.
_outcomes: dict[Cell, str] = {}
_bases: dict[int, str] = {}


async def _base(lab: BrokenFarm) -> str:
    """Return the image that ops are built upon, which one node has: that is where they run."""
    if id(lab) not in _bases:
        tag = secrets.token_hex(8)
        lab.registry.push("shell", tag, shell_image(tag))
        name = f"{lab.proxy.host}/shell:{tag}"
        async with lab.driver() as driver:
            await (await driver.pull(name, plain_http=True)).extract("n1")
        _bases[id(lab)] = name
    return _bases[id(lab)]


@pytest.mark.timeout(240, func_only=True)
@pytest.mark.parametrize(
    "cell", [pytest.param(cell, id=str(cell), marks=[pytest.mark.long] * cell.is_long) for cell in cells()]
)
async def test_a_farm_keeps_its_promise(
    lab: BrokenFarm, swift_s3: S3Config, request: pytest.FixtureRequest, cell: Cell
):
    """The cell's promise is kept; afterwards all is there again, consistent, and nothing is left behind."""
    if cell not in _outcomes:
        wanted = [item.callspec.params["cell"] for item in request.session.items if item.path == request.path]
        _outcomes.update(
            await _played(
                lab, swift_s3, [each for each in wanted if (each.part, each.fault) == (cell.part, cell.fault)]
            )
        )
    if broken := _outcomes[cell]:
        pytest.fail(f"promised is: {cell.promise}\n{broken}", pytrace=False)


async def _played(lab: BrokenFarm, s3: S3Config, scene: Collection[Cell]) -> dict[Cell, str]:
    """Play a scene, and check the farm after it; return what each promise was broken by, "" where it was kept."""
    try:
        outcomes = await play(lab, s3, await _base(lab), scene)
        told = {each: "".join(traceback.format_exception(exc)) if exc else "" for each, exc in outcomes.items()}
        await lab.assert_whole()
        await lab.assert_nothing_left()
    except Exception:  # noqa: BLE001 - each cell's test says so, and the next scene is played all the same
        return dict.fromkeys(scene, traceback.format_exc())
    return told
