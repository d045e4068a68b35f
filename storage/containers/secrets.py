"""Secrets on their way into a container: checked here, kept in memory only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from cluster.errors import MissingSecretError, UnusableSecretError
from cluster.graph import RunOp, SecretMount
from storage.containers.spec import Mount, bind


def given(op: RunOp, values: Mapping[str, bytes]) -> list[tuple[SecretMount, bytes]]:
    """Return the op's secrets that are given; those that needn't be and aren't are left out.

    Raises:
        MissingSecretError: a required one isn't given.
    """
    found: list[tuple[SecretMount, bytes]] = []
    for mount in op.secrets:
        value = values.get(mount.id)
        if value is not None:
            found.append((mount, value))
        elif mount.is_required:
            raise MissingSecretError(mount.id)
    return found


def environment(secrets: list[tuple[SecretMount, bytes]]) -> dict[str, str]:
    """Return the environment variables that have secrets.

    Raises:
        UnusableSecretError: a value can't be in one.
    """
    env: dict[str, str] = {}
    for mount, value in secrets:
        if not mount.env:
            continue
        if b"\0" in value:
            raise UnusableSecretError(mount.id, "it has a zero byte, which an environment variable can't have")
        try:
            env[mount.env] = value.decode()
        except UnicodeDecodeError:
            raise UnusableSecretError(mount.id, "it is no UTF-8, as an environment variable must be") from None
    return env


def write_files(secrets: list[tuple[SecretMount, bytes]], directory: Path) -> list[Mount]:
    """Write the secrets that are wanted as files into *directory*, which must be in memory; return their mounts."""
    mounts: list[Mount] = []
    for index, (mount, value) in enumerate(secrets):
        if not mount.target:
            continue
        path = directory / f"secret-{index}"
        path.touch(mode=0o600)
        path.write_bytes(value)
        path.chmod(mount.mode & 0o777)
        os.chown(path, mount.uid, mount.gid)
        mounts.append(bind(str(path), mount.target, is_read_only=True, extra=("nosuid", "nodev", "noexec")))
    return mounts
