"""A user's own folder or module named as one of our packages would be imported in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

_PACKAGES = ("cluster", "storage", "actors")


def complaint(search_path: Sequence[str], loaded: Mapping[str, ModuleType]) -> str | None:
    """Return one line about what shadows our packages; None where nothing does.

    A folder without ``__init__.py`` shadows nothing: a package found later on the path wins over it.
    """
    ours = Path(__file__).resolve().parent.parent
    for name in _PACKAGES:
        where = _home(name, search_path, loaded)
        if where is not None and where.parent != ours:
            return (
                f"{where} hides lazyfarm's own package {name!r}: rename it, "
                "or start Python where it is not on the import path"
            )
    return None


def _home(name: str, search_path: Sequence[str], loaded: Mapping[str, ModuleType]) -> Path | None:
    """Return the folder or file that ``import name`` takes, without importing it."""
    if (module := loaded.get(name)) is not None:
        origin = getattr(module, "__file__", None)
    else:
        spec = PathFinder.find_spec(name, list(search_path))
        origin = spec.origin if spec else None
    if not origin:
        return None  # not found, or a namespace
    path = Path(origin).resolve()
    return path.parent if path.name == "__init__.py" else path
