"""Where credentials come from, on the driver's machine: docker's and podman's files and helpers.

Nothing here is ever logged or put into an error: not a secret, not a file's contents, not what a
helper printed.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import CredentialFileError, CredentialHelperError
from cluster.reference import DOCKER_HUB, DOCKER_HUB_HOST

#: Under this key docker keeps Docker Hub's credentials, and asks its helpers for them.
DOCKER_HUB_KEY = "https://index.docker.io/v1/"
_DOCKER_HUB_HOSTS = frozenset({DOCKER_HUB, DOCKER_HUB_HOST, "index.docker.io"})
#: The user name under which helpers hand out an identity token.
_TOKEN_USER = "<token>"  # noqa: S105 -- docker's marker, not a secret
_NOT_FOUND = "credentials not found"
_HELPER = re.compile(r"[A-Za-z0-9._-]+\Z")
_HELPER_TIMEOUT_S = 30.0
#: Seconds after which files and helpers are asked again: a `docker login` meanwhile counts.
_KEPT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """A user and a secret, or an identity token (an OAuth2 refresh token)."""

    username: str = ""
    secret: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)


class CredentialSource:
    """Credentials by registry: given ones first, then files in order. Thread-safe; blocks (files, helpers).

    In one file: its helper for that registry (``credHelpers``), its store (``credsStore``), then
    ``auths``. The first credential found is used.
    """

    def __init__(
        self,
        given: Mapping[str, tuple[str, str] | Credential] | None = None,
        *,
        files: Sequence[Path] = (),
        helper_timeout_s: float = _HELPER_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a source.

        Args:
            given: Credentials by registry host, or (user, password).
            files: ``config.json`` and ``auth.json`` files; those that aren't there are passed over.
            helper_timeout_s: Seconds that one run of a credential helper may take.
            clock: Monotonic seconds.
        """
        self._given = {
            hostname(registry): value
            if isinstance(value, Credential)
            else Credential(username=value[0], secret=value[1])
            for registry, value in (given or {}).items()
        }
        self._files = tuple(files)
        self._helper_timeout_s = helper_timeout_s
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[float, Credential | None]] = {}

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str], given: Mapping[str, tuple[str, str] | Credential] | None = None
    ) -> CredentialSource:
        """Return the source that docker and podman would use.

        ``REGISTRY_AUTH_FILE``, else ``DOCKER_CONFIG/config.json``, ``~/.docker/config.json`` and podman's
        ``XDG_RUNTIME_DIR/containers/auth.json``.
        """
        if environ.get("REGISTRY_AUTH_FILE"):
            return cls(given, files=[Path(environ["REGISTRY_AUTH_FILE"])])
        files = []
        if environ.get("DOCKER_CONFIG"):
            files.append(Path(environ["DOCKER_CONFIG"]) / "config.json")
        elif environ.get("HOME"):
            files.append(Path(environ["HOME"]) / ".docker" / "config.json")
        if environ.get("XDG_RUNTIME_DIR"):
            files.append(Path(environ["XDG_RUNTIME_DIR"]) / "containers" / "auth.json")
        return cls(given, files=files)

    def __repr__(self) -> str:
        return f"<CredentialSource {len(self._given)} given, files {[str(path) for path in self._files]}>"

    def lookup(self, registry: str) -> Credential | None:
        """Return the credential for a registry host, or None.

        Raises:
            CredentialFileError: a file is there and can't be read.
            CredentialHelperError: a helper is named and fails.
        """
        host = hostname(registry)
        if host in self._given:
            return self._given[host]
        with self._lock:
            kept = self._kept.get(host)
            if kept is None or self._clock() - kept[0] > _KEPT_S:
                kept = self._clock(), self.search(host)
                self._kept[host] = kept
            return kept[1]

    def forget(self, registry: str) -> None:
        """Look in files and ask helpers again at the next lookup: what they said was refused."""
        with self._lock:
            self._kept.pop(hostname(registry), None)

    def search(self, host: str) -> Credential | None:
        """Look in files and ask helpers, whatever they said before; raises as :meth:`lookup`."""
        for path in self._files:
            document = _read(path)
            found = document and self._in_file(path, document, host)
            if found:
                return found
        return None

    def _in_file(self, path: Path, document: dict[str, Any], host: str) -> Credential | None:
        server = DOCKER_HUB_KEY if host == DOCKER_HUB else host
        helpers = document.get("credHelpers")
        for key, helper in helpers.items() if isinstance(helpers, dict) else ():
            if hostname(key) == host:
                return self._ask_helper(str(helper), server)
        store = document.get("credsStore")
        found = self._ask_helper(str(store), server) if store else None
        return found or _in_auths(path, document.get("auths"), host)

    def _ask_helper(self, helper: str, server: str) -> Credential | None:
        """Run ``docker-credential-HELPER get``: docker-credential-helpers' protocol."""
        if _HELPER.match(helper) is None:
            raise CredentialHelperError(helper, server, "no valid name")
        try:
            done = subprocess.run(  # noqa: S603 -- docker's protocol; the name was checked, there is no shell
                [f"docker-credential-{helper}", "get"],
                input=server.encode(),
                capture_output=True,
                timeout=self._helper_timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            # Without its cause: that holds what the helper printed.
            raise CredentialHelperError(helper, server, f"no answer in {self._helper_timeout_s:g} s") from None
        except OSError as exc:
            raise CredentialHelperError(helper, server, exc.strerror or "it can't be run") from exc
        if done.returncode != 0:
            if _NOT_FOUND in done.stdout.decode(errors="replace"):
                return None
            raise CredentialHelperError(helper, server, f"exit status {done.returncode}")
        try:
            answer = json.loads(done.stdout)
            username, secret = answer["Username"], answer["Secret"]
        except (ValueError, KeyError, TypeError):
            raise CredentialHelperError(helper, server, "its answer can't be read") from None
        if not isinstance(username, str) or not isinstance(secret, str):
            raise CredentialHelperError(helper, server, "its answer can't be read")
        if username == _TOKEN_USER:
            return Credential(identity_token=secret)
        return Credential(username=username, secret=secret) if secret else None


def hostname(key: str) -> str:
    """Return the host that a key of ``auths`` means: without scheme and path, Docker Hub under one name."""
    host = key.partition("://")[2] or key
    host = host.partition("/")[0].lower()
    return DOCKER_HUB if host in _DOCKER_HUB_HOSTS else host


def _read(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise CredentialFileError(str(path), (f"it can't be read: {exc.strerror}",)) from exc
    except ValueError:
        # Without its cause: that quotes what couldn't be parsed.
        raise CredentialFileError(str(path), ("it is not JSON",)) from None
    if not isinstance(document, dict):
        raise CredentialFileError(str(path), ("it is not a JSON object",))
    return document


def _in_auths(path: Path, auths: object, host: str) -> Credential | None:
    entries = auths.items() if isinstance(auths, dict) else ()
    for key, entry in entries:
        if hostname(key) != host or not isinstance(entry, dict):
            continue
        username, secret = str(entry.get("username") or ""), str(entry.get("password") or "")
        if entry.get("auth"):
            try:
                decoded = base64.b64decode(str(entry["auth"]), validate=True).decode()
            except (binascii.Error, UnicodeDecodeError):
                fault = f'auths."{key}".auth: it is not base64 of USER:PASSWORD'
                raise CredentialFileError(str(path), (fault,)) from None
            username, _, secret = decoded.partition(":")
            secret = secret.rstrip("\0")  # Old clients padded it.
        token = str(entry.get("identitytoken") or "")
        if token or secret:
            return Credential(username=username, secret=secret, identity_token=token)
    return None
