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
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cluster.config import S3Config
from storage.blobs import S3ContentStore
from storage.services.state_dir import StateDir
from storage.services.swift import SwiftService
from tests.doubles.faults import BrokenFarm, broken_farm
from tests.soak.schedule import Round, rounds
from tests.soak.soak import Soak


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
    soak = Soak(lab, s3)
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
