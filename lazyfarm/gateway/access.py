"""How a gateway is reached: its address, the token that it is shown, and whose word it is taken for."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cluster.errors import InvalidArgumentError

if TYPE_CHECKING:
    import ssl

URL_VARIABLE = "LAZYFARM_URL"
TOKEN_FILE_VARIABLE = "LAZYFARM_TOKEN_FILE"  # noqa: S105 - the variable's name
CA_FILE_VARIABLE = "LAZYFARM_CA_FILE"


def gateway_url(state_dir: Path | str | None, config: Path | str | None, environ: Mapping[str, str]) -> str | None:
    """Return the address of the gateway that is meant; None: a farm of this machine, or of this network."""
    if isinstance(state_dir, str) and state_dir.startswith(("https://", "http://")):
        return state_dir
    if state_dir is None and config is None:
        return environ.get(URL_VARIABLE) or None
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """A gateway's address, and what it takes to get in."""

    #: ``http[s]://HOST[:PORT]``.
    url: str
    token: str = field(repr=False)
    #: Whose certificates count; None: no TLS.
    trust: ssl.SSLContext | None = field(repr=False)

    def trust_of(self, url: str) -> ssl.SSLContext | bool:
        """Return whose certificates count at another server of the farm, its S3; True: the machine's own."""
        return self.trust if url.startswith("https") and self.trust else True

    @classmethod
    def of(
        cls,
        url: str,
        environ: Mapping[str, str],
        *,
        token: str | None = None,
        token_file: Path | str | None = None,
        ca_file: Path | str | None = None,
    ) -> Access:
        """Return the access to a gateway; what is not given is of the environment.

        Raises:
            InvalidArgumentError: an address that can't be meant, a file that can't be read, or plain HTTP to another
                machine: the token and credentials would cross the network in clear.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("https", "http") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise InvalidArgumentError("the gateway's address", repr(url), "it is https://HOST[:PORT]")
        if parts.scheme == "http" and not _is_loopback(parts.hostname):
            reason = "the token and credentials would cross the network in clear: use https://"
            raise InvalidArgumentError("the gateway's address", repr(url), reason)
        named = token_file or environ.get(TOKEN_FILE_VARIABLE)
        if token is None:
            token = _read("token_file", Path(named)).strip() if named else ""
        return cls(
            url=f"{parts.scheme}://{parts.netloc}",
            token=token,
            trust=_trust(ca_file or environ.get(CA_FILE_VARIABLE)) if parts.scheme == "https" else None,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read(name: str, path: Path) -> str:
    try:
        return path.expanduser().read_text("utf-8")
    except OSError as exc:
        raise InvalidArgumentError(name, str(path), exc.strerror or str(exc)) from exc
    except UnicodeDecodeError:
        # Without its cause, which quotes what may be a secret.
        raise InvalidArgumentError(name, str(path), "it is not UTF-8 text") from None


def _trust(ca_file: Path | str | None) -> ssl.SSLContext:
    import ssl  # noqa: PLC0415 - every command asks whether a gateway is meant, and few mean one

    trust = ssl.create_default_context()
    if ca_file:
        try:
            trust.load_verify_locations(cafile=Path(ca_file).expanduser())
        except OSError as exc:  # SSLError: it holds no certificate
            raise InvalidArgumentError("ca_file", str(ca_file), exc.strerror or str(exc)) from exc
    return trust
