"""The walk that collects cache opts: what vertices published with their cache maps, for those above them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cluster.digest import Digest
from cluster.graph import Vertex


def collect_opts(
    vertices: Mapping[Digest, Vertex],
    start: Digest,
    wanted: Sequence[str],
    published: Callable[[Digest], Mapping[str, bytes] | None],
) -> dict[str, bytes]:
    """Return what is found of the opts *wanted*, beginning at *start* itself; missing ones are left out.

    Depth first, from a vertex to its inputs, the last input first, each visited once; ends when all are
    found. The first found is taken: any ancestor's will do. BuildKit's ``CacheOptGetter`` (``solver/cacheopts.go``).

    Args:
        vertices: The job's; an input that is not among them is skipped.
        start: For which something is loaded or run.
        wanted: Names of opts.
        published: Opts of a vertex, or None where it has failed or has published none: its own are skipped then, its
            inputs are visited all the same.
    """
    missing = dict.fromkeys(wanted)
    found: dict[str, bytes] = {}
    seen: set[Digest] = set()
    stack = [start]
    while stack and missing:
        digest = stack.pop()
        vertex = vertices.get(digest)
        if vertex is None or digest in seen:
            continue
        seen.add(digest)
        opts = published(digest)
        if opts:
            for name in [name for name in missing if name in opts]:
                found[name] = opts[name]
                del missing[name]
        stack.extend(below for below in vertex.inputs if below is not None)
    return found
