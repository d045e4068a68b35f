"""``make soak MINUTES=… SEED=…``: work and faults at random, from a seed, with every invariant checked all along.

Prints what each round does before it is done: a run that breaks says its seed, and the same seed does the same again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from cluster.config import S3Config
from cluster.errors import ClusterError
from lazyfarm.farm import Farm
from lazyfarm.graph import image as image_state
from storage.blobs import S3ContentStore
from storage.services.state_dir import StateDir
from storage.services.swift import SwiftService
from tests.doubles.faults import BrokenFarm, assert_extracted, broken_farm
from tests.doubles.registry import Image
from tests.doubles.shell_image import shell_image
from tests.faults.scenes import Scene, Source, happening
from tests.soak.schedule import Do, Harm, Round, Work, rounds

#: Seconds in which every call of a round has to have ended, faults and all.
_ENDS_WITHIN_S = 150.0


class Soak:
    """A farm that is worked and broken."""

    def __init__(self, lab: BrokenFarm, s3: S3Config, seed: int) -> None:
        self._lab = lab
        self._s3 = s3
        self._seed = seed
        tag = secrets.token_hex(8)
        lab.registry.push("shell", tag, shell_image(tag))
        self._base = f"{lab.proxy.host}/shell:{tag}"
        self.calls = self.errors = self.harms = 0

    def __str__(self) -> str:
        again = f"{self.errors} of them ended with a typed error, and well when made again"
        return f"{self.calls} calls, {again}, {self.harms} faults"

    async def play(self, wanted: Round) -> None:
        """Do a round, and check the farm."""
        images = [self._lab.image(*sizes) for sizes in wanted.images]
        async with asyncio.timeout(_ENDS_WITHIN_S), AsyncExitStack() as stack:
            driver = await stack.enter_async_context(self._lab.driver())
            working = [asyncio.ensure_future(self._work(driver, work, *images[work.image])) for work in wanted.works]
            for harm in wanted.harms:
                await asyncio.sleep(harm.after_s)  # the moment itself
                await self._harm(harm, stack)
            outcomes = await asyncio.gather(*working, return_exceptions=True)
        self._lab.heal()
        for work, outcome in zip(wanted.works, outcomes, strict=True):
            self.calls += 1
            if isinstance(outcome, ClusterError) and wanted.harms:
                # It says what was away. Asked again, it has to be done.
                self.errors += 1
                print(f"        {work}: {type(outcome).__name__}", flush=True)
                async with asyncio.timeout(_ENDS_WITHIN_S), self._lab.driver() as driver:
                    await self._work(driver, replace(work, after_s=0.0), *images[work.image])
            elif isinstance(outcome, BaseException):
                raise outcome
        await self._lab.assert_whole()
        await self._lab.assert_nothing_left()

    async def _work(self, driver: Farm, work: Work, name: str, image: Image) -> None:
        await asyncio.sleep(work.after_s)  # the moment itself
        match work.do:
            case Do.EXTRACT:
                ref = await driver.pull(name, plain_http=True)
                assert_extracted((await ref.extract(work.node)).path, image)
            case Do.PUSH:
                ref = await driver.pull(name, plain_http=True)
                target = f"{self._lab.proxy.host}/soak-{secrets.token_hex(4)}:t"
                assert (await driver.push(ref, target, plain_http=True)).digest == image.digest
            case Do.BUILD:
                step = image_state(self._base, plain_http=True).run(f"echo {image.digest} > /made; sleep 1")
                result = await driver.solve(step)
                made = Path((await result.ref.extract()).path, "made")
                assert (await asyncio.to_thread(made.read_text)).strip() == image.digest

    async def _harm(self, harm: Harm, stack: AsyncExitStack) -> None:
        self.harms += 1
        source = Source(self._lab.registry, self._lab.proxy)
        scene = Scene(
            lab=self._lab,
            s3=self._s3,
            part=harm.part,
            fault=harm.fault,
            source=source,
            base=self._base,
            stack=stack,
            here=harm.node,
        )
        async with happening(scene):
            pass


@contextmanager
def _lab() -> Iterator[tuple[BrokenFarm, S3Config]]:
    """Bring a farm up, with an S3 server of its own."""
    wanted = S3Config(bucket="soak", timeout_s=10.0, attempts=3)
    with tempfile.TemporaryDirectory(prefix="lf-s3-") as root:
        state = StateDir(Path(root))
        service = SwiftService(state)
        try:
            with state.lock("s3", deadline_s=60.0):
                service.start(wanted)
            s3 = replace(service.reached_by(wanted), bucket=wanted.bucket)
            store = S3ContentStore(s3)
            store.ensure_bucket()
            store.close()
            with broken_farm(s3) as lab:
                yield lab, s3
        finally:
            service.stop()


def main() -> int:
    """Soak; return 1 where anything broke."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--seed", type=int, default=None, help="what is done (default: another each time)")
    parser.add_argument("--schedule", type=int, metavar="N", help="print the first N rounds, and do nothing")
    options = parser.parse_args()
    seed = secrets.randbits(32) if options.seed is None else options.seed
    if options.schedule is not None:
        for wanted, _ in zip(rounds(seed), range(options.schedule), strict=False):
            _show(wanted)
        return 0
    if os.geteuid() != 0:
        parser.error("containers, cgroups and the packet filter need root")
    print(f"soak: seed {seed}, {options.minutes:g} minutes", flush=True)
    with _lab() as (lab, s3):
        return asyncio.run(_soak(lab, s3, seed, options.minutes * 60))


async def _soak(lab: BrokenFarm, s3: S3Config, seed: int, duration_s: float) -> int:
    soak = Soak(lab, s3, seed)
    until_s = time.monotonic() + duration_s
    for wanted in rounds(seed):
        _show(wanted)
        started_s = time.monotonic()
        try:
            await soak.play(wanted)
        except Exception:  # noqa: BLE001 - whatever it is, the seed says how to have it again
            traceback.print_exc()
            print(f"soak: broken in round {wanted.number} of seed {seed}", flush=True)
            return 1
        print(f"        whole after {time.monotonic() - started_s:.1f} s", flush=True)
        if time.monotonic() > until_s:
            print(f"soak: seed {seed}: {wanted.number + 1} rounds, {soak}; every invariant holds", flush=True)
            return 0
    return 0


def _show(wanted: Round) -> None:
    sizes = ", ".join("+".join(f"{size / 2**20:.1f}" for size in image) for image in wanted.images)
    print(f"round {wanted.number}: images of {sizes} MiB", flush=True)
    for work in sorted(wanted.works, key=lambda work: work.after_s):
        print(f"    {work}", flush=True)
    for harm in wanted.harms:
        print(f"    then {harm}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
