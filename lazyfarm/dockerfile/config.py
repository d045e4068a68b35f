"""The image config that a stage builds up: OCI image-spec v1.1 (``config.md``) with Docker's extensions."""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime
from typing import Any

from cluster.errors import MalformedManifestError
from cluster.reference import Platform

#: What a command finds where the base doesn't say, as Docker's.
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_SHELL = ("/bin/sh", "-c")

#: What of a base's config is not true of what is built upon it.
_NOT_INHERITED = ("rootfs", "created", "container", "container_config", "docker_version", "id", "parent")


class StageConfig:
    """An image config while it is built. Its rootfs is left to who knows the layers."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        #: The part that says how containers run.
        self.run: dict[str, Any] = document["config"]

    @classmethod
    def scratch(cls, platform: Platform) -> StageConfig:
        """Return the config of an empty image."""
        document: dict[str, Any] = {"architecture": platform.architecture, "os": platform.os}
        if platform.variant:
            document["variant"] = platform.variant
        return cls({**document, "config": {"Env": [f"PATH={DEFAULT_PATH}"], "WorkingDir": "/"}, "history": []})

    @classmethod
    def of_base(cls, data: bytes, reference: str) -> StageConfig:
        """Return the config of what is built upon an image.

        Args:
            data: The image's config.
            reference: The image, for messages.

        Raises:
            MalformedManifestError: it is no image config.
        """
        what = f"config of {reference}"
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise MalformedManifestError(what, "it is not JSON") from exc
        run = document.get("config") or {} if isinstance(document, dict) else None
        if not isinstance(run, dict):
            raise MalformedManifestError(what, "it is not a JSON object, or its config is none")
        _check(run, what)
        history = document.get("history") or []
        kept = {key: value for key, value in document.items() if key not in _NOT_INHERITED}
        return cls({**kept, "config": run, "history": history if isinstance(history, list) else []})

    def copy(self) -> StageConfig:
        """Return one that changes by itself."""
        return StageConfig(copy.deepcopy(self._document))

    def to_json(self) -> bytes:
        """Return the config; equal configs are equal bytes."""
        return json.dumps(self._document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @property
    def env(self) -> dict[str, str]:
        """The environment, with a PATH in any case."""
        pairs = (item.partition("=") for item in self.run.get("Env") or ())
        return {"PATH": DEFAULT_PATH} | {name: value for name, _, value in pairs}

    def set_env(self, name: str, value: str) -> None:
        """Set a variable, at its place where it has one."""
        pairs = (item.partition("=") for item in self.run.get("Env") or ())
        env = {known: old for known, _, old in pairs} | {name: value}
        self.run["Env"] = [f"{known}={text}" for known, text in env.items()]

    @property
    def user(self) -> str:
        """Who runs commands; "" for root."""
        return self.run.get("User") or ""

    @property
    def directory(self) -> str:
        """Where commands run."""
        return self.run.get("WorkingDir") or "/"

    @property
    def shell(self) -> tuple[str, ...]:
        """The shell of shell forms."""
        return tuple(self.run.get("Shell") or DEFAULT_SHELL)

    @property
    def triggers(self) -> list[str]:
        """The ONBUILD instructions that the base brings."""
        return self.run.get("OnBuild") or []

    def add_keys(self, section: str, keys: list[str]) -> None:
        """Add keys to one of the sections that are sets: ``Volumes``, ``ExposedPorts``."""
        self.run[section] = (self.run.get(section) or {}) | {key: {} for key in keys}

    def set_label(self, name: str, value: str) -> None:
        """Set a label."""
        self.run["Labels"] = (self.run.get("Labels") or {}) | {name: value}

    def set_author(self, name: str) -> None:
        """Set who made the image."""
        self._document["author"] = name

    def set_created(self, epoch_s: int) -> None:
        """Set when the image was made, in seconds since 1970."""
        made = datetime.fromtimestamp(epoch_s, tz=UTC)
        self._document["created"] = made.isoformat(timespec="seconds").replace("+00:00", "Z")

    def add_history(self, created_by: str, *, has_layer: bool) -> None:
        """Tell what was done. Who exports gives these entries their times."""
        entry: dict[str, Any] = {"created_by": created_by}
        if not has_layer:
            entry["empty_layer"] = True
        self._document["history"] = [*self._document["history"], entry]


def _check(run: dict[str, Any], what: str) -> None:
    """Check the fields that are read here."""
    for field, kind in (
        ("User", str),
        ("WorkingDir", str),
        ("Labels", dict),
        ("Volumes", dict),
        ("ExposedPorts", dict),
    ):
        if not isinstance(run.get(field), kind | None):
            raise MalformedManifestError(what, f"its {field} is of the wrong type")
    for field in ("Env", "Shell", "OnBuild"):
        words = run.get(field) or []
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise MalformedManifestError(what, f"its {field} is not a list of strings")
