"""The keys under which a vertex's result is looked up and published."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from cluster.digest import Digest
from cluster.solver.values import CacheMap, cache_key, content_key

#: Combinations of inputs' keys that are made into keys of one sort, fast or slow: a vertex has at most twice as many.
MAX_COMBINATIONS = 4


def fast_keys(cache_map: CacheMap, inputs: Sequence[Sequence[Digest]]) -> tuple[Digest, ...]:
    """Return the keys that follow from the definition, given each input's keys."""
    return tuple(dict.fromkeys(cache_key(cache_map.key, combined) for combined in _combinations(inputs)))


def slow_keys(
    cache_map: CacheMap, inputs: Sequence[Sequence[Digest]], contents: Mapping[int, Digest]
) -> tuple[Digest, ...]:
    """Return the keys in which the content of some inputs, by index, stands for these inputs' own keys."""
    replaced = [(content_key(contents[i]),) if i in contents else keys for i, keys in enumerate(inputs)]
    return fast_keys(cache_map, replaced)


def _combinations(inputs: Sequence[Sequence[Digest]]) -> Iterator[tuple[Digest, ...]]:
    """Yield at most :data:`MAX_COMBINATIONS` ways of taking one key of each input; may repeat one.

    A vertex lists its keys from that of the pure definition to that which rests on content most. These two are
    kept along any number of vertices, whatever is cut off in between: the first one is what an unchanged build
    asks for, the last one what a build with other definitions of the same content does.
    """
    yield tuple(keys[0] for keys in inputs)
    if all(len(keys) == 1 for keys in inputs):
        return
    yield from itertools.islice(itertools.product(*inputs), 1, MAX_COMBINATIONS - 1)
    yield tuple(keys[-1] for keys in inputs)
