"""Which of the nodes that Ray knows the farm tells of, and what of Ray's errors."""

import pytest
import ray.exceptions

from actors.nodes import ObservedNode, worth_telling
from actors.ray_errors import telling
from cluster.topology import NodeView


def node(name, ray_id, *, alive=True, labelled=True):
    view = NodeView(name=name, ray_id=ray_id)
    return ObservedNode(view=view, address="127.0.0.2", is_alive=alive, is_head=False, is_labelled=labelled)


@pytest.mark.parametrize(
    ("observed", "taken_down", "told"),
    [
        pytest.param([node("n0", "a"), node("n1", "b", alive=False)], set(), ["a", "b"], id="a dead one is missed"),
        pytest.param([node("n0", "a"), node("n1", "b", alive=False)], {"n1"}, ["a"], id="unless it was taken down"),
        pytest.param([node("n0", "a"), node("n1", "b")], {"n1"}, ["a", "b"], id="Ray has not noticed yet"),
        pytest.param([node("n1", "b", alive=False), node("n1", "c")], set(), ["c"], id="it runs again"),
        pytest.param([node("n1", "b", alive=False), node("n1", "c", alive=False)], set(), ["c"], id="it died twice"),
        pytest.param([node("node-x", "x", alive=False, labelled=False)], set(), [], id="not a farm's node"),
    ],
)
def test_the_farm_tells_of_nodes_that_live_or_are_missed(observed, taken_down, told):
    """A node that nobody will start again is no fault that somebody could mend."""
    assert [n.view.ray_id for n in worth_telling(observed, taken_down)] == told


_DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: RemoteSupervisor
\tactor_id: 0c1a
\tip: 127.0.0.3
The actor died because its node has died. Node Id: 6b37
\tthe actor's node was terminated expectedly: received SIGTERM
The actor never ran - it was cancelled before it started running."""


def test_of_ray_s_errors_the_telling_lines_are_shown():
    """That it died, and why: in one line, and without a page of particulars."""
    error = ray.exceptions.RayActorError(error_msg=_DIED)
    assert telling(error) == (
        "The actor died unexpectedly before finishing this task. "
        "The actor died because its node has died. Node Id: 6b37"
    )
    assert telling(ray.exceptions.GetTimeoutError("Get timed out: some object(s) not ready.")) == "it does not answer"
    failed = ray.exceptions.RayTaskError("ready", "Traceback …\nValueError: no\n", ValueError("no"))
    assert telling(failed) == "ValueError: no"
