"""What the registries' own access logs say of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from tests.doubles.oci_layout import LayoutImage
from tests.doubles.registry import Request

_OK = (200, 206)


@dataclass(slots=True)
class Traffic:
    """Counts for some images; filled when the step that is counted has ended."""

    manifest_gets: int = 0
    config_gets: int = 0
    layer_gets: int = 0
    #: GETs of any blob, of those images or not.
    blob_gets: int = 0
    mounts: int = 0
    #: Digests of the blobs that were uploaded.
    uploads: list[str] = field(default_factory=list)
    token_requests: int = 0
    heads: int = 0
    #: All that is neither a HEAD nor a mount that was granted, whatever it was for, by its method and kind.
    kinds: Counter[str] = field(default_factory=Counter)
    _bytes: Counter[str] = field(default_factory=Counter)

    @property
    def layer_bytes(self) -> int:
        """Bytes of layers that the registry sent, ranges and repetitions included."""
        return self._bytes.total()

    @property
    def others(self) -> int:
        """Requests that were neither a HEAD nor a mount that was granted."""
        return self.kinds.total()

    def bytes_of(self, digest: str) -> int:
        """Bytes of one layer that the registry sent."""
        return self._bytes[digest]

    def take(self, requests: Iterable[Request], *images: LayoutImage) -> None:
        """Count what was asked for *images* and answered."""
        layers = {layer.digest for image in images for layer in image.layers}
        configs = {image.config_digest for image in images}
        for request in requests:
            name = request.path.partition("?")[0].rpartition("/")[2]
            if request.method == "POST" and "mount=" in request.path and request.status == 201:
                self.mounts += 1
            elif request.method == "HEAD":
                self.heads += 1
            else:
                self.kinds[f"{request.method} {request.kind}"] += 1
            if request.method == "PUT" and request.kind == "upload" and request.status == 201:
                self.uploads += parse_qs(urlsplit(request.path).query)["digest"]
            if request.method != "GET" or request.status not in _OK:
                continue
            if request.kind == "manifest":
                self.manifest_gets += 1
            if request.kind != "blob":
                continue
            self.blob_gets += 1
            if name in configs:
                self.config_gets += 1
            elif name in layers:
                self.layer_gets += 1
                self._bytes[name] += request.size_bytes
