"""lazyfarm: container layers stay lazy, and are fetched once for the whole cluster.

    async with await Farm.connect() as farm:
        ref = await farm.pull("debian:12")      # manifest and config are read, no layer
        await ref.extract()                     # now they are, once for the cluster

Names are imported when they are first used: the command line's reading commands can't afford Ray.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from lazyfarm.shadows import complaint as _complaint

if TYPE_CHECKING:
    from lazyfarm.farm import Farm as Farm
    from lazyfarm.ref import Ref as Ref

    __version__: str

_HOMES = {"Farm": "lazyfarm.farm", "Ref": "lazyfarm.ref"}

__all__ = ["Farm", "Ref", "__version__"]

if (_what := _complaint(sys.path, sys.modules)) is not None:
    # A driver gets an exception to catch; a command line one line and no traceback.
    if sys.argv[0].endswith("/lazyfarm") or sys.orig_argv[1:3] == ["-m", "lazyfarm"]:
        sys.exit(f"error: {_what}")
    raise ImportError(_what)


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415 - 20 ms that only who asks should pay

        return version("lazyfarm")
    msg = f"module 'lazyfarm' has no attribute {name!r}"
    raise AttributeError(msg)
