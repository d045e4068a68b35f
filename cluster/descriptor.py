"""Descriptors and media types."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from cluster.digest import Digest, is_digest
from cluster.errors import InvalidDescriptorError

MANIFEST_OCI = "application/vnd.oci.image.manifest.v1+json"
INDEX_OCI = "application/vnd.oci.image.index.v1+json"
CONFIG_OCI = "application/vnd.oci.image.config.v1+json"
MANIFEST_DOCKER = "application/vnd.docker.distribution.manifest.v2+json"
INDEX_DOCKER = "application/vnd.docker.distribution.manifest.list.v2+json"
CONFIG_DOCKER = "application/vnd.docker.container.image.v1+json"
#: Docker schema 1, signed and not: recognised in order to be refused by name.
SCHEMA1 = frozenset(
    {
        "application/vnd.docker.distribution.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    }
)

#: The annotation under which BuildKit and containerd keep a layer's diff ID.
ANNOTATION_DIFF_ID = "containerd.io/uncompressed"


class Compression(Enum):
    """How a layer's tar is compressed."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"


_LAYER_COMPRESSION = {
    "application/vnd.oci.image.layer.v1.tar": Compression.NONE,
    "application/vnd.oci.image.layer.v1.tar+gzip": Compression.GZIP,
    "application/vnd.oci.image.layer.v1.tar+zstd": Compression.ZSTD,
    "application/vnd.oci.image.layer.nondistributable.v1.tar": Compression.NONE,
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": Compression.GZIP,
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": Compression.ZSTD,
    "application/vnd.docker.image.rootfs.diff.tar": Compression.NONE,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": Compression.GZIP,
    "application/vnd.docker.image.rootfs.diff.tar.zstd": Compression.ZSTD,
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": Compression.GZIP,
    "application/vnd.docker.image.rootfs.foreign.diff.tar": Compression.NONE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """What is known of a blob before a single byte of it is here.

    Follows the OCI content descriptor (image-spec v1.1, ``descriptor.md``).
    """

    #: Media type, e.g. ``application/vnd.oci.image.layer.v1.tar+gzip``.
    media_type: str
    #: Digest of the blob as stored, that is, compressed.
    digest: Digest
    #: Length of the stored blob in bytes; 0 is legal (the empty blob).
    size_bytes: int
    #: Digest of the uncompressed layer tar; None for what is not a layer, or where it is not known.
    diff_id: Digest | None = None
    annotations: dict[str, str] = field(default_factory=dict)
    #: Where a foreign (non-distributable) layer is to be had, outside the registry.
    urls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not is_digest(self.digest):
            raise InvalidDescriptorError(str(self.digest), "its digest is malformed")
        if self.diff_id is not None and not is_digest(self.diff_id):
            raise InvalidDescriptorError(self.digest, f"its diff ID {self.diff_id!r} is malformed")
        if self.size_bytes < 0:
            raise InvalidDescriptorError(self.digest, f"its size is {self.size_bytes}")

    @property
    def is_layer(self) -> bool:
        """Tell whether the media type is that of a layer we can unpack."""
        return self.media_type in _LAYER_COMPRESSION

    @property
    def is_foreign(self) -> bool:
        """Tell whether the layer is non-distributable: never pushed, fetched from its ``urls``."""
        return "nondistributable" in self.media_type or ".foreign." in self.media_type

    @property
    def compression(self) -> Compression:
        """Return how the layer's tar is compressed.

        Raises:
            InvalidDescriptorError: the media type is not a layer's.
        """
        try:
            return _LAYER_COMPRESSION[self.media_type]
        except KeyError:
            raise InvalidDescriptorError(self.digest, f"{self.media_type!r} is no layer media type") from None
