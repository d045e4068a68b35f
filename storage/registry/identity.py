"""Who somebody is to a registry, as far as the farm may know: a hash that only its drivers can compute."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from cluster.config import Config
from storage.registry.credentials import Credential, hostname

ANONYMOUS = "anonymous"


def identity_of(registry: str, credential: Credential | None, *, key: bytes) -> str:
    """Return ``anonymous``, or a keyed hash (hex HMAC-SHA256) of registry, user and secret.

    Args:
        registry: Host, with its port if it has one.
        credential: What is presented there.
        key: Secret of the farm: without it nobody can try passwords on an identity.
    """
    if credential is None:
        return ANONYMOUS
    parts = (hostname(registry), credential.username, credential.identity_token or credential.secret)
    # Each with its length, so that no two triples are one text.
    text = b"".join(len(part.encode()).to_bytes(8, "big") + part.encode() for part in parts)
    return hmac.new(key, text, hashlib.sha256).hexdigest()


def identity_key(config: Config) -> bytes:
    """Return the key under which identities are hashed: known to the farm's drivers and actors, kept nowhere itself."""
    secret = Path(config.redis.password_file).read_bytes() if config.redis.password_file else b""
    return hashlib.sha256(b"identity\0" + config.farm.name.encode() + b"\0" + secret.strip()).digest()
