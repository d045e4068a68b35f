"""Plays the rounds of a soak on a farm, and checks it after each."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from cluster.config import S3Config
from cluster.errors import ClusterError
from lazyfarm.farm import Farm
from lazyfarm.graph import image as image_state
from tests.doubles.faults import BrokenFarm, assert_extracted
from tests.doubles.registry import Image
from tests.doubles.shell_image import shell_image
from tests.faults.scenes import Scene, Source, happening
from tests.soak.schedule import Do, Harm, Round, Work

#: Seconds in which every call of a round has to have ended, faults and all.
_ENDS_WITHIN_S = 150.0


class Soak:
    """A farm that is worked and broken."""

    def __init__(self, lab: BrokenFarm, s3: S3Config) -> None:
        self._lab = lab
        self._s3 = s3
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
            case Do.PRUNE:
                await driver.prune(everything=True)
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
