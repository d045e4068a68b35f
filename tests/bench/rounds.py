"""One side of a comparison in rounds: a process of its own that does its round whenever it is told to.

Says ``{"ready": PID}`` on a line once it is connected and warm, then for each line on stdin ``{"seconds": S}`` for a
round, until stdin ends::

    LAZYFARM_STATE_DIR=… python -m tests.bench.rounds rebuild --vertices 1000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import sys
import time

from dask import delayed
from dask.delayed import Delayed
from distributed import Client, LocalCluster

from cluster.errors import ClusterError
from lazyfarm import Farm
from tests.bench.graphs import shape, stages


async def _rebuild(vertices: int) -> None:
    """Build a graph that is all cached, but for the first time."""
    graph = stages(secrets.token_hex(8), vertices)
    async with await Farm.connect() as farm:
        await farm.solve(graph)
        await farm.solve(graph)
        _say({"ready": os.getpid()})
        # Read in a thread: renewals and answers for credentials go on meanwhile.
        while await asyncio.to_thread(sys.stdin.readline):
            began = time.perf_counter()
            await farm.solve(graph)
            _say({"seconds": time.perf_counter() - began})


def _tasks(vertices: int) -> None:
    """Have tasks that do nothing done by dask.distributed, as its documentation starts it."""
    with LocalCluster(processes=True, dashboard_address=":0") as cluster, Client(cluster):
        _graph_of_tasks(vertices).compute()
        _say({"ready": os.getpid()})
        while sys.stdin.readline():
            graph = _graph_of_tasks(vertices)
            began = time.perf_counter()
            graph.compute()
            _say({"seconds": time.perf_counter() - began})


def _graph_of_tasks(vertices: int) -> Delayed:
    """Return a graph of the same shape whose tasks have not been done before."""
    task = delayed(_nothing, pure=False)
    return shape(
        None,
        lambda below, name: task(below),
        lambda chains: task(*chains),
        lambda below, stage, name: task(below, stage),
        vertices=vertices,
    )


def _nothing(*below: object) -> None:
    del below


def _say(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Do rounds; exit 1 with the error as JSON where one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.rounds")
    parser.add_argument("side", choices=["rebuild", "tasks"])
    parser.add_argument("--vertices", type=int, default=1000, metavar="N", help="default: %(default)s")
    options = parser.parse_args()
    try:
        if options.side == "rebuild":
            asyncio.run(_rebuild(options.vertices))
        else:
            _tasks(options.vertices)
    except ClusterError as error:
        _say({"error": {"type": type(error).__name__, "message": str(error)}})
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
