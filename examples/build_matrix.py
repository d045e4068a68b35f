"""Build a Dockerfile for every combination of build arguments: ``python build_matrix.py CONTEXT TARGET ARG=A,B…``.

``build_matrix.py . registry.example/app PYTHON=3.11,3.12 VARIANT=slim,full`` pushes four images:
``app:3.11-slim`` and so on. They are built at once; a step that several have runs once.
"""

import asyncio
import itertools
import sys

from lazyfarm import Farm
from lazyfarm.dockerfile.frontend import dockerfile_graph


async def build(farm: Farm, context: str, target: str, args: dict[str, str]) -> str:
    """Build and push one combination; return its name."""
    built = await dockerfile_graph(farm, context, args=args)
    result = await farm.solve(built.state, config=built.config)
    pushed = await farm.push(result, f"{target}:{'-'.join(args.values())}")
    return f"{pushed.target}@{pushed.digest}"


async def build_matrix(context: str, target: str, *axes: str) -> None:
    """Build and push all of them; each that fails is told of, and none stops another."""
    names = [axis.partition("=")[0] for axis in axes]
    values = [axis.partition("=")[2].split(",") for axis in axes]
    matrix = [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]
    async with await Farm.connect() as farm:
        done = await asyncio.gather(*(build(farm, context, target, args) for args in matrix), return_exceptions=True)
    for args, outcome in zip(matrix, done, strict=True):
        print(f"{' '.join(f'{name}={value}' for name, value in args.items())}: {outcome}")
    sys.exit(any(isinstance(outcome, BaseException) for outcome in done))


if __name__ == "__main__":
    asyncio.run(build_matrix(*sys.argv[1:]))
