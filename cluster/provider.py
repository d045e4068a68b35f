"""Provider handles: how a blob can be fetched, as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.digest import Digest

#: Kind, and in the place of the registry, of a remote cache in a bucket at the farm's S3 endpoint: the repository is
#: ``BUCKET/PREFIX``. The farm's own credentials read it. No image reference has a host of that name.
S3_KIND = "s3"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ProviderHandle:
    """One repository of one registry that holds a blob. Never a credential, a session or a live object.

    A handle only says where; the caller's session says as whom, when it is used.
    """

    #: ``registry`` (OCI distribution), ``urls`` (a foreign layer's own addresses), ``farm`` (:data:`FARM`), or ``s3``
    #: (:data:`S3_KIND`).
    kind: str = "registry"
    #: Host and, unless it is the scheme's own, port: ``registry-1.docker.io``, ``127.0.0.1:5000``.
    registry: str
    #: Repository within it, e.g. ``library/debian``.
    repository: str
    #: True where the caller asked for plain HTTP (``--plain-http``); loopback and configuration allow it anyway.
    plain_http: bool = False
    #: Absolute addresses, for kind ``urls``.
    urls: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Return ``registry/repository``, the form used in messages and records."""
        return f"{self.registry}/{self.repository}"

    @property
    def is_farm(self) -> bool:
        """Tell whether it is :data:`FARM`, or claims to be: then there is nobody to ask, and nothing to fetch from."""
        return self.kind == "farm" or self.registry == "farm"


#: Of a layer that a build of this farm made: it came from nowhere else, so there is nowhere to fetch it from once it
#: is lost. Who may have it, its records' origins say (:mod:`cluster.origin`). Recorded by the farm's own workers; where
#: a caller passes it, it counts for nothing. No image reference has a host of that name.
FARM = ProviderHandle(kind="farm", registry="farm", repository="built")


@dataclass(frozen=True, slots=True, kw_only=True)
class DescHandler:
    """What a caller passes for one digest: its provider, and where to tell of progress."""

    digest: Digest
    provider: ProviderHandle
    #: Opaque progress stream ID; None where nobody looks.
    progress: str | None = None


def registries_of(handles: Iterable[ProviderHandle]) -> set[str]:
    """Return the registries that *handles* lead to: where a caller has to be somebody."""
    return {handle.registry for handle in handles if not handle.is_farm}
