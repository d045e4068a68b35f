"""What a seed is in CI: small runs of every scenario, each with another mixture of what may go wrong."""

from __future__ import annotations

import random

from tests.simulation.builds import BuildChaos, BuildRun
from tests.simulation.caches import CacheChaos, CacheRun
from tests.simulation.collection import CollectedRefs
from tests.simulation.farm import Farm, Links, Parts
from tests.simulation.network import Weather
from tests.simulation.pulls import Chaos, PullRun, image_of

#: Slow enough that a layer takes seconds, in which something can go wrong.
_LINKS = Links(registry=20e6, bucket=1e9, node=400e6)
#: So slow that a layer takes longer than its flight's lease lives without renewal.
_SLOW_LINKS = Links(registry=4e6, bucket=1e9, node=400e6)
_ROUGH = Weather(delay_s=(0.0002, 0.1), loss=0.01, late=0.02)
_LATE_BUCKET = Weather(delay_s=(0.0002, 0.02), late=0.2, late_at=("s3",))

#: Pulls by name: what goes wrong, the weather, the links.
PULLS = {
    "calm": (Chaos(), Weather(), _LINKS),
    "slow": (Chaos(), Weather(), _SLOW_LINKS),
    "crashes": (Chaos(crashes=3, machines_down=1, cancels=2), Weather(), _LINKS),
    "refusals": (Chaos(refused=1, crashes=1), Weather(), _LINKS),
    "wrong bytes": (Chaos(wrong=1, crashes=1), Weather(), _LINKS),
    "pauses": (Chaos(pauses=3, crashes=1), Weather(), _LINKS),
    "partitions": (Chaos(cuts=3, crashes=1), Weather(), _LINKS),
    "outage": (Chaos(outages=1, cancels=1), Weather(), _LINKS),
    "late bucket": (Chaos(wrong=3), _LATE_BUCKET, _LINKS),
    "everything": (
        Chaos(crashes=1, machines_down=1, pauses=1, cuts=1, cancels=1, wrong=1, refused=1),
        _ROUGH,
        _LINKS,
    ),
}
BUILDS = {
    "calm": (BuildChaos(), Weather()),
    "crashes": (BuildChaos(crashes=3, cancels=1, failing=1), Weather()),
    "pauses": (BuildChaos(pauses=2, cuts=1, failing=1), Weather()),
    "everything": (BuildChaos(crashes=1, pauses=1, cuts=1, cancels=1, failing=1), _ROUGH),
}
CACHES = {
    "calm": (CacheChaos(), Weather()),
    "crashes": (CacheChaos(crashes=3), Weather()),
    "stops": (CacheChaos(pauses=1, stops=2), Weather()),
    "everything": (CacheChaos(crashes=1, pauses=1, stops=1, cuts=1), _ROUGH),
}
#: Pulls with collection by name: the weather. Where messages are slow, much comes between two of them.
COLLECTIONS = {
    "calm": Weather(),
    "slow messages": Weather(delay_s=(0.0002, 0.5)),
    "everything": Weather(delay_s=(0.0002, 0.5), loss=0.01),
}


def pull_of(name, seed, parts=None):
    """Return a pull of three layers by three to six nodes."""
    chaos, weather, links = PULLS[name]
    rng = random.Random(seed)
    farm = Farm(
        seed=seed, machines=rng.randint(3, 6), links=links, weather=weather, parts=parts or Parts(), deadline_s=60.0
    )
    image = image_of(seed, [rng.randint(8, 100) for _ in range(3)])
    return PullRun(farm=farm, image=image, chaos=chaos, drivers_per_node=rng.choice([1, 1, 2]))


def collection_of(name, seed, collects=CollectedRefs, parts=None):
    """Return a pull over some minutes, in which what nobody holds is collected."""
    weather, rng = COLLECTIONS[name], random.Random(seed)
    farm = Farm(
        seed=seed, machines=rng.randint(3, 6), links=_LINKS, weather=weather, parts=parts or Parts(), deadline_s=60.0
    )
    image = image_of(seed, [rng.randint(8, 60) for _ in range(3)])
    return PullRun(farm=farm, image=image, drivers_per_node=3, stagger_s=400.0, collects=collects)


def build_of(name, seed, **broken):
    """Return builds of three jobs over one graph of eight vertices."""
    chaos, weather = BUILDS[name]
    return BuildRun(seed=seed, chaos=chaos, weather=weather, schedulers=1 if name == "calm" else 2, **broken)


def cache_of(name, seed, **broken):
    """Return four drivers' calls of two shards."""
    chaos, weather = CACHES[name]
    return CacheRun(seed=seed, chaos=chaos, weather=weather, **broken)
