"""Keeps pydantic out of commands that have 0.6 s in all.

Newer releases of typer build a pydantic adapter for every parameter they read, and importing pydantic takes
0.1 s (0.2 s where no byte code is kept). A text or a flag comes from the parser as what it is to be, so those are
given typer's own adapter that does nothing. This is no public interface: where another release has none,
commands are merely slower, and ``tests/unit/test_cli.py`` notices.
"""

from __future__ import annotations

from typing import Any

import typer.core


def spare_pydantic() -> None:
    """Let texts and flags pass as the parser gives them; other types are converted as before."""
    try:
        from typer._coercion import PassThroughRuntimeParam  # noqa: PLC0415 - may not be there
    except ImportError:
        return
    build: Any = getattr(typer.core, "build_runtime_param", None)
    if build is None:
        return

    def build_sparingly(descriptor: Any) -> Any:
        if descriptor.annotation in {str, bool}:
            return PassThroughRuntimeParam(parameter_info=descriptor.parameter_info, annotation=descriptor.annotation)
        return build(descriptor)

    typer.core.build_runtime_param = build_sparingly  # type: ignore[attr-defined]  # see the module
