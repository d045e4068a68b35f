"""Digests, and the two chain recurrences over them."""

from __future__ import annotations

import hashlib
import re
from typing import NewType

from cluster.errors import InvalidDigestError

#: ``sha256:`` and 64 lower-case hex digits, checked by :func:`parse_digest`.
Digest = NewType("Digest", str)

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


def parse_digest(text: str) -> Digest:
    """Check *text* and return it as a digest.

    Raises:
        InvalidDigestError: it is not ``sha256:`` and 64 lower-case hex digits.
    """
    if not isinstance(text, str) or _DIGEST.match(text) is None:
        raise InvalidDigestError(str(text))
    return Digest(text)


def is_digest(text: str) -> bool:
    """Tell whether *text* is a digest."""
    return _DIGEST.match(text) is not None


def digest_of(data: bytes | bytearray | memoryview) -> Digest:
    """Return the sha256 digest of *data*."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def hex_of(digest: str) -> str:
    """Return the hex part of a digest, as used in paths and object keys."""
    return digest.partition(":")[2]


#: Chain ID and ref ID of "no layers at all": the digest of nothing.
EMPTY_CHAIN = digest_of(b"")


def chain_id(parent: Digest | None, diff_id: Digest) -> Digest:
    """Return the chain ID of a layer on top of *parent*'s chain ID.

    The OCI image-spec's recurrence (``config.md``, "Layer ChainID").
    """
    return diff_id if parent is None else digest_of(f"{parent} {diff_id}".encode())


def blob_chain_id(parent: Digest | None, blob: Digest, diff_id: Digest) -> Digest:
    """Return the blob chain ID of a compressed layer on top of *parent*'s blob chain ID.

    BuildKit's recurrence: the chain-ID formula over ``digest(blob + " " + diff ID)``, so that two
    compressions of one layer have one chain ID and two blob chain IDs.
    """
    own = digest_of(f"{blob} {diff_id}".encode())
    return own if parent is None else digest_of(f"{parent} {own}".encode())
