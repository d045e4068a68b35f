"""The walk for cache opts."""

from cluster.solver.cache_opts import collect_opts
from tests.doubles.solver import Graph


class Walk:
    def __init__(self):
        self.graph = Graph()
        self.opts = {}
        self.visited = []

    def add(self, name, *inputs, **opts):
        vertex = self.graph.add(name, *inputs)
        self.opts[vertex.digest] = {key: value.encode() for key, value in opts.items()}
        return vertex

    def __call__(self, start, *wanted):
        def published(digest):
            self.visited.append(self.graph.names[digest])
            return self.opts.get(digest)

        return collect_opts(self.graph.vertices, start.digest, wanted, published)


def test_the_vertex_itself_comes_first():
    """What it published is taken before any ancestor's, and the walk ends with it."""
    walk = Walk()
    top = walk.add("top", walk.add("below", k="below"), k="top")
    assert walk(top, "k") == {"k": b"top"}
    assert walk.visited == ["top"]


def test_the_nearest_ancestor_wins():
    """Of two on one way down the nearer one's is taken."""
    walk = Walk()
    top = walk.add("top", walk.add("near", walk.add("far", k="far"), k="near"))
    assert walk(top, "k") == {"k": b"near"}


def test_depth_comes_before_breadth_and_the_last_input_first():
    """As BuildKit: the last input's whole ancestry is searched before the first input."""
    walk = Walk()
    top = walk.add("top", walk.add("first", k="first"), walk.add("last", walk.add("deep", k="deep")))
    assert walk(top, "k") == {"k": b"deep"}


def test_each_vertex_is_visited_once():
    """Diamonds cost no more than their vertices."""
    walk = Walk()
    level = walk.add("base")
    for i in range(20):
        level = walk.add(f"top{i}", walk.add(f"l{i}", level), walk.add(f"r{i}", level))
    assert walk(level, "nowhere") == {}
    assert len(walk.visited) == len(set(walk.visited)) == 61


def test_a_failed_vertex_is_skipped_and_its_ancestors_are_not():
    """A vertex without published opts hides nothing below it."""
    walk = Walk()
    failed = walk.add("failed", walk.add("below", k="below"), k="failed")
    top = walk.add("top", failed)
    del walk.opts[failed.digest]
    assert walk(top, "k") == {"k": b"below"}


def test_an_unknown_input_is_skipped():
    """A vertex that isn't there doesn't end the walk."""
    walk = Walk()
    known, unknown = walk.add("known", k="known"), walk.add("unknown", k="unknown")
    top = walk.add("top", known, unknown)
    del walk.graph.vertices[unknown.digest]
    assert walk(top, "k") == {"k": b"known"}


def test_what_is_found_is_returned_though_something_is_missing():
    """Partial results: several vertices may each have some."""
    walk = Walk()
    top = walk.add("top", walk.add("a", x="1"), walk.add("b", y="2"))
    assert walk(top, "x", "y", "z") == {"x": b"1", "y": b"2"}
