"""A real farm for tests: Redis, Swift, Ray nodes and actors of a state directory of its own."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from actors import launch
from actors.join import leave
from cluster.lease import Lease
from cluster.settings import FarmSettings
from lazyfarm.farm import Farm
from lazyfarm.records import open_records
from lazyfarm.settings import load_settings
from tests.doubles.documents import check_output, read_document

#: Settings that make faults show within a test's patience.
FAST = {
    "LAZYFARM__FLIGHT__LEASE_TTL_S": "3",
    "LAZYFARM__FLIGHT__POLL_S": "1",
    "LAZYFARM__COLLECT__EVERY_S": "2",
    "LAZYFARM__COLLECT__GRACE_S": "1",
    "LAZYFARM__COLLECT__SCRUB_BYTES_PER_S": "0",
    "LAZYFARM__FETCH__PART_BYTES": "5242880",
    "LAZYFARM__FETCH__WHOLE_UP_TO_BYTES": "0",
    "LAZYFARM__FETCH__PARALLEL_FROM_BYTES": "20971520",
    # A process less, which takes a second to start.
    "LAZYFARM__WEB__ENABLED": "false",
}
#: With the page, too.
WHOLE = {**FAST, "LAZYFARM__WEB__ENABLED": "true"}


@dataclass
class RunningFarm:
    """A farm that is up."""

    state_dir: Path
    settings: FarmSettings
    environ: dict[str, str] = field(default_factory=dict)

    async def connect(self, **options) -> Farm:
        """Join it as a driver of this process."""
        options.setdefault("credentials", {})
        return await Farm.connect(self.state_dir, **options)

    def cli(self, *arguments: str, timeout_s: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command line as a process of its own."""
        done = subprocess.run(
            [sys.executable, "-m", "lazyfarm", *arguments],
            env={**os.environ, **self.environ, "LAZYFARM_STATE_DIR": str(self.state_dir)},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        check_output(arguments, done.stdout, done.stderr, done.returncode)
        return done

    def cli_json(self, *arguments: str, **options) -> dict:
        """Run the command line with ``--json`` and return its document, which is as its schema says."""
        return read_document(arguments, self.cli(*arguments, "--json", **options).stdout)

    def leases(self) -> list[Lease]:
        """Return the live leases."""

        async def read() -> list[Lease]:
            async with open_records(self.settings) as records:
                return await records.leases()

        return asyncio.run(read())


@contextmanager
def running_farm(*, nodes: int, environ: Mapping[str, str] = FAST) -> Iterator[RunningFarm]:
    """Bring a farm up in a new directory, and purge it at the end.

    This process leaves the farm that earlier tests joined, at both ends: a process is in one cluster at a time.
    """
    root = Path(tempfile.mkdtemp(prefix="lf-test-"))
    settings = load_settings(root, None, {**environ})
    leave()
    try:
        report = launch.up(settings, nodes=nodes)
        yield RunningFarm(state_dir=root, settings=report.settings, environ=dict(environ))
    finally:
        leave()
        launch.down(settings, purge=True)
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def farm() -> Iterator[RunningFarm]:
    """Three nodes, shared by the tests of a session; whoever breaks something repairs it.

    ``LAZYFARM_TEST_FARM=DIR`` uses the farm that runs there and leaves it running: for who works on tests.
    """
    if root := os.environ.get("LAZYFARM_TEST_FARM"):
        yield RunningFarm(state_dir=Path(root), settings=load_settings(root, None, WHOLE), environ=dict(WHOLE))
        return
    with running_farm(nodes=3, environ=WHOLE) as found:
        yield found
