"""S3 keys in a file, which may be exchanged while the farm runs. Imported with boto3, not before."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

from botocore.credentials import CredentialProvider, Credentials, ReadOnlyCredentials

from cluster.errors import ConfigError

_NEEDED = ("access_key_id", "secret_access_key")


class FileProvider(CredentialProvider):
    """Tells botocore of the keys in a file."""

    METHOD = "lazyfarm"

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def load(self) -> FileCredentials:
        """Return the keys.

        Raises:
            ConfigError: the file can't be read or lacks one of them.
        """
        return FileCredentials(self._path)


class FileCredentials(Credentials):
    """Keys of a file, read again when the file has changed: each request is signed with what it says then.

    A file that is no good just now, because it is being written, leaves the keys as they were.

    Raises:
        ConfigError: the file can't be read or lacks a key; its contents are never repeated.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._lock = threading.Lock()
        self._read_at = self._changed_at()
        super().__init__(*_read(self._path), method=FileProvider.METHOD)

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """Return the keys as they are now; botocore asks for each request."""
        with self._lock:
            changed_at = self._changed_at()
            if changed_at != self._read_at:
                with suppress(ConfigError):
                    self.access_key, self.secret_key, self.token = _read(self._path)
                    self._read_at = changed_at
            return ReadOnlyCredentials(self.access_key, self.secret_key, self.token)

    def _changed_at(self) -> tuple[int, int]:
        """Return what changes with the file, written or replaced; zeros where there is none."""
        try:
            found = self._path.stat()
        except OSError:
            return (0, 0)
        return (found.st_mtime_ns, found.st_ino)


def _read(path: Path) -> tuple[str, str, str | None]:
    """Return key ID, secret and, of temporary keys, their token."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as exc:
        raise ConfigError("s3.credentials_file", (f"{path}: {exc.strerror}",)) from exc
    except UnicodeDecodeError:
        # Without its cause, which quotes what may be a secret.
        raise ConfigError("s3.credentials_file", (f"{path}: it is not UTF-8 text",)) from None
    said = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines)}
    if missing := [name for name in _NEEDED if not said.get(name)]:
        raise ConfigError("s3.credentials_file", tuple(f"{path}: has no line `{name} = …`" for name in missing))
    return said["access_key_id"], said["secret_access_key"], said.get("session_token") or None
