"""The release of this code: part of every actor's name, so that two releases can run side by side."""

from __future__ import annotations

from importlib.metadata import version

VERSION = version("lazyfarm")
