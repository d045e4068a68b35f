"""OCI image layouts on disk: read, written, pushed and fetched as they are.

Follows image-spec v1.1, ``image-layout.md``.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_OCI = "application/vnd.oci.image"
_CREATED = "2024-01-01T00:00:00Z"
_COPY_TIMEOUT_S = 600


class ImageToolError(Exception):
    """A program that builds or copies images failed; says what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLayer:
    """One layer as it is stored."""

    digest: str
    size_bytes: int
    diff_id: str
    media_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutImage:
    """One image of a layout."""

    layout: Path
    tag: str
    config_digest: str
    #: Lowest first.
    layers: tuple[ImageLayer, ...]
    #: The image's own configuration document.
    config: dict[str, Any]

    @property
    def size_bytes(self) -> int:
        """Compressed size of the layers, each distinct blob once."""
        return sum({layer.digest: layer.size_bytes for layer in self.layers}.values())

    def blob(self, digest: str) -> Path:
        """Return the file of a blob."""
        return self.layout / "blobs" / digest.replace(":", "/")


def read_image(layout: Path, tag: str) -> LayoutImage:
    """Read the image with *tag*."""

    def read(digest: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((layout / "blobs" / digest.replace(":", "/")).read_bytes())
        return document

    index = json.loads((layout / "index.json").read_bytes())
    [entry] = [
        entry
        for entry in index["manifests"]
        if entry.get("annotations", {}).get("org.opencontainers.image.ref.name") == tag
    ]
    manifest = read(entry["digest"])
    config = read(manifest["config"]["digest"])
    return LayoutImage(
        layout=layout,
        tag=tag,
        config_digest=manifest["config"]["digest"],
        layers=tuple(
            ImageLayer(digest=layer["digest"], size_bytes=layer["size"], diff_id=diff_id, media_type=layer["mediaType"])
            for layer, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True)
        ),
        config=config,
    )


class LayoutWriter:
    """Writes blobs and images into a new layout."""

    def __init__(self, layout: Path) -> None:
        self.layout = layout
        self._manifests: list[dict[str, object]] = []
        (layout / "blobs/sha256").mkdir(parents=True)
        (layout / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))

    def new_blob(self, name: str) -> BinaryIO:
        """Open a file to write a blob to; :meth:`keep` it under the same name once it is closed."""
        return (self.layout / f"new-{name}").open("wb")

    def keep(self, name: str) -> tuple[str, int]:
        """Put what was written to ``new_blob(name)`` in its place; return digest and size."""
        path = self.layout / f"new-{name}"
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size_bytes = path.stat().st_size
        path.rename(self.layout / "blobs/sha256" / digest)
        return f"sha256:{digest}", size_bytes

    def add_image(
        self, tag: str, layers: Sequence[ImageLayer], *, base: dict[str, Any], history: Sequence[str] = ()
    ) -> LayoutImage:
        """Write configuration and manifest of an image of *layers*, and list it in the index.

        Args:
            tag: Its tag in this layout.
            layers: Lowest first; their blobs are kept already.
            base: The rest of the configuration: architecture, os, config.
            history: What made each layer; given, a last entry tells of a step without a layer.
        """
        config: dict[str, Any] = {**base, "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]}}
        if history:
            config["history"] = [
                *({"created": _CREATED, "created_by": what} for what in history),
                {"created": _CREATED, "created_by": "CMD", "empty_layer": True},
            ]
        described = self._add_json(config, f"{_OCI}.config.v1+json")
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{_OCI}.manifest.v1+json",
            "config": described,
            "layers": [
                {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size_bytes} for layer in layers
            ],
        }
        entry = self._add_json(manifest, f"{_OCI}.manifest.v1+json")
        self._manifests.append({**entry, "annotations": {"org.opencontainers.image.ref.name": tag}})
        (self.layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self._manifests}))
        return read_image(self.layout, tag)

    def _add_json(self, value: object, media_type: str) -> dict[str, object]:
        with self.new_blob("json") as out:
            out.write(json.dumps(value, separators=(",", ":")).encode())
        digest, size_bytes = self.keep("json")
        return {"mediaType": media_type, "digest": digest, "size": size_bytes}


# -- to and from registries -----------------------------------------------------------------------------------


def push(image: LayoutImage, target: str, *, as_docker: bool = False, credentials: str | None = None) -> None:
    """Push to ``HOST:PORT/REPOSITORY:TAG`` over plain HTTP with skopeo, every blob as it is.

    Args:
        image: What to push.
        target: Where to.
        as_docker: As Docker schema 2 instead of OCI (gzip layers only).
        credentials: ``USER:PASSWORD``.
    """
    # A schema 2 manifest names the very same blobs, but has another digest than the OCI one.
    kind = ["--format", "v2s2"] if as_docker else ["--preserve-digests"]
    with tempfile.TemporaryDirectory(prefix="lazyfarm-push-") as work:
        authfile: list[str] = []
        if credentials is not None:
            # A file, not an argument: arguments are visible to everybody on the machine.
            path = Path(work) / "auth.json"
            path.touch(mode=0o600)
            host = target.split("/", 1)[0]
            path.write_text(json.dumps({"auths": {host: {"auth": b64encode(credentials.encode()).decode()}}}))
            authfile = ["--dest-authfile", str(path)]
        run_tool(
            *("skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", *kind, *authfile),
            *(f"oci:{image.layout}:{image.tag}", f"docker://{target}"),
        )


def fetch(reference: str, layout: Path, *, plain_http: bool = False) -> LayoutImage:
    """Copy an image from its registry, with the user's own logins, into a new layout under the tag ``image``."""
    run_tool(
        *("skopeo", "--insecure-policy", "copy", "--quiet"),
        *(["--src-tls-verify=false"] if plain_http else []),
        *(f"docker://{reference}", f"oci:{layout}:image"),
    )
    return read_image(layout, "image")


def run_tool(*command: str, timeout_s: float = _COPY_TIMEOUT_S) -> str:
    """Run a program to its end; return its output.

    Raises:
        ImageToolError: it failed, is not there or took too long.
    """
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=timeout_s
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ImageToolError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        tail = (done.stderr or done.stdout).strip()[-2000:]
        raise ImageToolError(f"{command[0]} failed with exit code {done.returncode}:\n{tail}")
    return done.stdout
