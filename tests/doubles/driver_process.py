"""A driver that is a process of its own: to be killed, cut off and paused, and to outlive a cluster or not.

``python -m tests.doubles.driver_process STATE_DIR (extract IMAGE NODE | push IMAGE TARGET | get REF… | unlazy IMAGE… |
build BASE GATE COMMAND | submit BASE GATE COMMAND | prune FILTER)`` says what comes of it in lines of JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ClusterError

if TYPE_CHECKING:
    from lazyfarm.farm import Farm

#: Seconds after which Ray ends a driver whose cluster has lost its head; by itself it would be 60.
HEADLESS_S = 10


@dataclass
class DriverProcess:
    """One that runs."""

    process: asyncio.subprocess.Process

    @property
    def pid(self) -> int:
        """Return its process ID."""
        return self.process.pid

    async def said(self) -> dict[str, str]:
        """Wait for what it says next; ``error`` alone where it ended without a word."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        found: dict[str, str] = json.loads(line) if line else {"error": "it ended"}
        return found


@contextlib.asynccontextmanager
async def driver_process(
    state_dir: Path, *arguments: str, within: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> AsyncIterator[DriverProcess]:
    """Run one, by the command *within* where there is one; it is killed in the end."""
    program = [*within, sys.executable, "-m", "tests.doubles.driver_process", str(state_dir), *arguments]
    process = await asyncio.create_subprocess_exec(
        *program,
        env={**os.environ, **(environ or {}), "RAY_gcs_rpc_server_reconnect_timeout_s": str(HEADLESS_S)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield DriverProcess(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _main(state_dir: str, do: str, *arguments: str) -> None:
    if do == "prune":
        await _prune(state_dir, *arguments)
        return
    # Not before it is a process of its own: Ray is slow to import.
    from lazyfarm.farm import Farm  # noqa: PLC0415
    from lazyfarm.graph import cache, image  # noqa: PLC0415

    async with await Farm.connect(Path(state_dir), credentials={}) as farm:
        if do == "unlazy":
            for name in arguments:
                await (await farm.pull(name, plain_http=True)).unlazy()
            _say(unlazied=arguments[-1])
            return
        if do == "get":
            for ref_id in arguments:
                await _get(farm, ref_id)
            return
        if do in ("extract", "push"):
            name, where = arguments
            ref = await farm.pull(name, plain_http=True)
            _say(pulled=ref.id)
            if do == "extract":
                _say(path=(await ref.extract(where)).path)
            else:
                _say(digest=(await farm.push(ref, where, plain_http=True)).digest)
            return
        base, gate, command = arguments
        graph = image(base, plain_http=True).run(command, mounts=[cache("/gate", id=gate)])
        job = await farm.solve(graph, detached=do == "submit").submitted()
        _say(job=job.id)
        if do == "build":
            _say(ref=(await job).ref.id)


async def _prune(state_dir: str, wanted: str) -> None:
    from lazyfarm.collection import open_collection  # noqa: PLC0415
    from lazyfarm.settings import load_settings  # noqa: PLC0415
    from storage.faults import arm_from_environment  # noqa: PLC0415

    arm_from_environment(os.environ)
    async with open_collection(load_settings(state_dir, None, {})) as collection:
        pruned = await collection.prune(everything=True, filters=[wanted])
        _say(pruned=str(len(pruned.items)))


async def _get(farm: Farm, ref_id: str) -> None:
    try:
        _say(got=(await farm.get(ref_id)).id)
    except ClusterError as exc:
        _say(error=type(exc).__name__)


def _say(**what: str) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    try:
        asyncio.run(_main(*sys.argv[1:]))
    except ClusterError as exc:
        _say(error=type(exc).__name__)
