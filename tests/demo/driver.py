"""One driver: a process of its own that uses the farm as a user's script does.

Started by the demo and the benchmarks. Says ``{"ready": PID}`` on a line once it is connected and has its
ref (``pull+extract`` and ``build``: only connected), waits there for a line on stdin, and then does what it is for and
prints the result as JSON::

    LAZYFARM_STATE_DIR=… python -m tests.demo.driver extract 127.0.0.1:5000/demo:1 --node n1
    LAZYFARM_STATE_DIR=… python -m tests.demo.driver build DIR --build-arg VERSION=2 --tag 127.0.0.1:5000/app:2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from typing import Any

from cluster.errors import ClusterError
from cluster.job import VertexEvent, VertexLog
from lazyfarm import Farm
from lazyfarm.dockerfile.frontend import dockerfile_graph


async def _drive(do: str, image: str, node: str | None) -> dict[str, Any]:
    async with await Farm.connect() as farm:
        ref = None if do == "pull+extract" else await farm.pull(image)
        _say({"ready": os.getpid()})
        # Read in a thread: renewals and answers for credentials go on meanwhile.
        await asyncio.to_thread(sys.stdin.readline)
        began = time.monotonic()
        if ref is None:
            ref = await farm.pull(image)
        if do == "unlazy":
            result = await ref.unlazy()
            return {"layers": _layers(result.layers), "seconds": time.monotonic() - began}
        extracted = await ref.extract(node)
        return {
            "node": extracted.node,
            "path": str(extracted.path),
            "layers": _layers(extracted.layers),
            "seconds": time.monotonic() - began,
        }


async def _build(directory: str, args: dict[str, str], tag: str) -> dict[str, Any]:
    states: dict[str, str] = {}
    said: dict[str, str] = {}

    def see(event: object) -> None:
        match event:
            case VertexEvent():
                states[event.vertex] = event.state.value
            case VertexLog():
                said[event.vertex] = said.get(event.vertex, "") + event.text

    async with await Farm.connect() as farm:
        _say({"ready": os.getpid()})
        await asyncio.to_thread(sys.stdin.readline)
        began = time.monotonic()
        built = await dockerfile_graph(farm, directory, args=args)
        result = await farm.solve(built.state, config=built.config, on_event=see)
        image = await farm.tag(result, tag)
        return {
            "digest": image.digest,
            "layers": [layer.record.blob.digest for layer in image.layers],
            "states": states,
            "said": said,
            "seconds": time.monotonic() - began,
        }


def _layers(layers: Any) -> list[dict[str, Any]]:
    return [
        {
            "digest": str(fetch.digest),
            "source": fetch.source,
            "bytes_fetched": fetch.bytes_fetched,
            "joined": fetch.joined,
        }
        for fetch in layers
    ]


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Drive; exit 1 with the error as JSON where it fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo.driver")
    parser.add_argument("do", choices=["unlazy", "extract", "pull+extract", "build"])
    parser.add_argument("subject", metavar="IMAGE|DIR")
    parser.add_argument("--node", help="extract there")
    parser.add_argument("--build-arg", metavar="NAME=VALUE", action="append", default=[])
    parser.add_argument("--tag", metavar="NAME", help="of what is built")
    options = parser.parse_args()
    try:
        if options.do == "build":
            args = dict(arg.split("=", 1) for arg in options.build_arg)
            _say(asyncio.run(_build(options.subject, args, options.tag)))
        else:
            _say(asyncio.run(_drive(options.do, options.subject, options.node)))
    except ClusterError as error:
        _say({"error": {"type": type(error).__name__, "message": str(error)}})
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
