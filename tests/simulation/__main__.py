"""``make simulate``: a pull by thousands of nodes in virtual time, with faults, and what it took.

    python -m tests.simulation --nodes 2000 --seed 1             one image of 50 layers, crashes and partitions
    python -m tests.simulation --nodes 2000 --seed 1 --calm      the same, and nothing goes wrong

A seed gives the same run each time. Exit status: 0 no invariant is broken, 1 one is.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import sys
import time
from collections.abc import Sequence

import structlog

from tests.simulation.farm import Farm, Links
from tests.simulation.network import Weather
from tests.simulation.pulls import Chaos, PullRun, image_of
from tests.simulation.services import BYTE, REDIS_OPS_PER_S

_MIB = 1024**2
#: Layers are of all sizes: median and spread of their distribution, least and most.
_MEDIAN_BYTES, _SPREAD, _LEAST_BYTES, _MOST_BYTES = 32 * _MIB, 1.2, 512 * 1024, 1024 * _MIB
#: Bytes a second: a registry's gigabit, S3's 200, each node's 10.
_LINKS = Links(registry=125e6, bucket=25e9, node=1.25e9)
#: Seconds in which nodes begin, and in which faults do.
_STAGGER_S, _SPAN_S = 30.0, 40.0
#: Shown of what is broken.
_SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description="Pull in virtual time.")
    parser.add_argument("--nodes", type=int, default=2000, help="how many nodes want the image")
    parser.add_argument("--layers", type=int, default=50, help="how many layers it has")
    parser.add_argument("--seed", type=int, default=1, help="what decides everything")
    parser.add_argument("--calm", action="store_true", help="nothing goes wrong")
    options = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    run = pull(options.nodes, options.layers, options.seed, is_calm=options.calm)
    began_s = time.monotonic()
    run.run()
    report(run, time.monotonic() - began_s)
    violations = run.farm.watch.violations
    for violation in violations[:_SHOWN]:
        print(f"BROKEN {violation}")
    if violations:
        calm = " --calm" if options.calm else ""
        print(f"again: python -m tests.simulation --nodes {options.nodes} --layers {options.layers}", end=" ")
        print(f"--seed {options.seed}{calm}")
    return 1 if violations else 0


def pull(nodes: int, layers: int, seed: int, *, is_calm: bool) -> PullRun:
    """Return a pull of one image; a fault of each kind for every hundred nodes, mostly for those that own flights."""
    rng = random.Random(seed)
    sizes = [
        round(min(_MOST_BYTES, max(_LEAST_BYTES, rng.lognormvariate(math.log(_MEDIAN_BYTES), _SPREAD))) / BYTE)
        for _ in range(layers)
    ]
    some = max(1, nodes // 100)
    chaos = Chaos(
        crashes=some, machines_down=some, pauses=some, cuts=some, cancels=some, span_s=_SPAN_S, longest_s=20.0
    )
    weather = Weather() if is_calm else Weather(delay_s=(0.0002, 0.005), loss=0.0001)
    farm = Farm(seed=seed, machines=nodes, weather=weather, links=_LINKS, deadline_s=3600.0)
    return PullRun(farm=farm, image=image_of(seed, sizes), chaos=Chaos() if is_calm else chaos, stagger_s=_STAGGER_S)


def report(run: PullRun, took_s: float) -> None:
    """Print what a run took."""
    farm, redis = run.farm, run.farm.redis.service
    unique = run.image.size_bytes
    served = farm.registry.served.total()
    take_overs = sorted(farm.watch.take_overs_s)
    done = [driver for driver in run.drivers if driver.done_s is not None]
    count, key = redis.busiest_key
    rows = [
        ("nodes, layers, image", f"{len(farm.nodes)}, {len(run.image.refs)}, {unique * BYTE / 1e9:.2f} GB"),
        ("nodes that have it", f"{len(done)} (others: {len(run.drivers) - len(done)} given up or cancelled)"),
        ("bytes from the registry", f"{served * BYTE / 1e9:.2f} GB"),
        ("duplicate factor", f"{served / unique:.4f}"),
        ("bytes from S3", f"{farm.bucket.bytes_out * BYTE / 1e12:.3f} TB"),
        ("time to the last node", f"{run.ended_s:.1f} s"),
        ("take-overs", _spread(take_overs)),
        ("Redis operations", f"{redis.operations}, at most {redis.busiest_s}/s ({_share(redis.busiest_s)})"),
        ("busiest key", f"{count}/s ({_share(count)}): {key[:28]}"),
        ("Redis messages to listeners", f"{redis.messages}, at most {redis.most_messages_s}/s"),
        ("violations", str(len(farm.watch.violations))),
        ("simulated in", f"{took_s:.1f} s, {farm.loop.turns} turns"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _spread(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    return f"{len(seconds)}: median {seconds[len(seconds) // 2]:.2f} s, longest {seconds[-1]:.2f} s"


def _share(per_s: float) -> str:
    return f"{per_s / REDIS_OPS_PER_S:.1%} of a primary's {REDIS_OPS_PER_S:.0f}/s"


if __name__ == "__main__":
    # Next to nothing that lives for long is garbage: looking for it as often as usual takes a third of the time.
    gc.set_threshold(100_000, 50, 100)
    sys.exit(main())
