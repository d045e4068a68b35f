"""Endpoints: the addresses at which a blob or manifest can be asked for, and under which trust."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from cluster.config import Config, RegistryConfig
from cluster.errors import ConfigError, InsecureRegistryError, RegistryProtocolError
from cluster.provider import ProviderHandle
from cluster.reference import DOCKER_HUB, DOCKER_HUB_HOST

#: Redirects that one request follows at most.
MAX_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
USER_AGENT = "lazyfarm/0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One repository at one host, mirrors included, or one address of a foreign layer."""

    #: Host and port: the key for credentials, limits and configuration.
    registry: str
    repository: str
    scheme: str
    is_mirror: bool = False
    #: The whole address, for a foreign layer; nobody is authorized there.
    url: str | None = None

    @property
    def source(self) -> str:
        """Return ``registry/repository``, or the foreign layer's address; for messages.

        Of the address no more than scheme, host and path: a query or a user's part may hold a secret.
        """
        if self.url is None:
            return f"{self.registry}/{self.repository}"
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    @property
    def plain_http(self) -> bool:
        """Tell whether it is asked without TLS."""
        return self.scheme == "http"

    def _v2(self, rest: str) -> str:
        return f"{self.scheme}://{self.registry}/v2/{self.repository}/{rest}"

    def blob_url(self, digest: str) -> str:
        """Return the address of a blob."""
        return self.url or self._v2(f"blobs/{digest}")

    def manifest_url(self, selector: str) -> str:
        """Return the address of a manifest, by tag or digest."""
        return self._v2(f"manifests/{selector}")

    def upload_url(self, **query: str) -> str:
        """Return the address at which uploads begin."""
        # "/" stays as it is: some registries don't decode it in a mount's "from".
        text = "&".join(f"{key.rstrip('_')}={quote(value, safe='/:')}" for key, value in query.items())
        return self._v2("blobs/uploads/") + (f"?{text}" if text else "")


def registry_config(config: Config, host: str) -> RegistryConfig:
    """Return what is configured for *host*; Docker Hub may be configured under either of its names."""
    if host == DOCKER_HUB_HOST and host not in config.registries and DOCKER_HUB in config.registries:
        return config.registry(DOCKER_HUB)
    return config.registry(host)


def web_address(url: str) -> SplitResult | None:
    """Take an address apart that a stranger named; None where nobody could be asked there."""
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a bracket that isn't closed, a port that is no number
        return None
    return parts if is_whole else None


def is_loopback(host: str) -> bool:
    """Tell whether ``HOST[:PORT]`` is this machine itself, by name or address, without asking DNS."""
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def may_use_plain_http(config: Config, host: str) -> bool:
    """Tell whether *host* may be asked without TLS at all."""
    return is_loopback(host) or registry_config(config, host).plain_http


def origin(config: Config, handle: ProviderHandle) -> Endpoint:
    """Return the registry itself."""
    return _endpoint(config, handle.registry, handle.repository, plain_http=handle.plain_http)


def endpoints(config: Config, handle: ProviderHandle) -> list[Endpoint]:
    """Return where to read from, in order: the mirrors, then the registry; or a foreign layer's addresses.

    Nowhere, for what a build of the farm made: the content store has it, or nobody.

    Raises:
        InsecureRegistryError: a foreign layer's addresses are all plain HTTP to a host that isn't
            configured for it.
    """
    if handle.is_farm:
        return []
    if handle.kind == "urls":
        return _foreign(config, handle)
    mirrors = [
        _endpoint(config, mirror, handle.repository, plain_http=False, is_mirror=True)
        for mirror in registry_config(config, handle.registry).mirrors
    ]
    return [*mirrors, origin(config, handle)]


def _endpoint(config: Config, host: str, repository: str, *, plain_http: bool, is_mirror: bool = False) -> Endpoint:
    own = registry_config(config, host)
    # A loopback registry is taken to speak plain HTTP unless an authority is configured for it.
    insecure = plain_http or own.plain_http or (is_loopback(host) and not own.ca_file)
    return Endpoint(registry=host, repository=repository, scheme="http" if insecure else "https", is_mirror=is_mirror)


def _foreign(config: Config, handle: ProviderHandle) -> list[Endpoint]:
    found, refused = [], ""
    for url in handle.urls:
        parts = web_address(url)
        if parts is None:
            continue
        secure = parts.scheme == "https"
        if not (secure or handle.plain_http or may_use_plain_http(config, parts.netloc)):
            refused = parts.netloc
            continue
        found.append(Endpoint(registry=parts.netloc, repository="", scheme=parts.scheme, url=url))
    if not found and refused:
        raise InsecureRegistryError(refused)
    return found


# -- redirects ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """Where a request goes next."""

    url: str
    #: True where scheme, host or port differ from before: what authorizes there is not ours to send.
    crosses: bool


def next_hop(config: Config, url: str, location: str, *, doing: str) -> Hop:
    """Return where a redirect from *url* leads.

    Raises:
        InsecureRegistryError: from HTTPS to plain HTTP, at a host that isn't configured for it.
        RegistryProtocolError: it leads nowhere.
    """
    target = joined(url, location)
    before, after = urlsplit(url), web_address(target)
    if not location or after is None:
        raise RegistryProtocolError(doing, 0, "redirected to no address")
    if before.scheme == "https" and after.scheme == "http" and not may_use_plain_http(config, after.netloc):
        raise InsecureRegistryError(after.netloc)
    return Hop(url=target, crosses=_origin_of(before.scheme, before.netloc) != _origin_of(after.scheme, after.netloc))


def joined(url: str, location: str) -> str:
    """Return where *location* leads from *url*; "" where it can't be read."""
    try:
        return urljoin(url, location)
    except ValueError:
        return ""


def _origin_of(scheme: str, netloc: str) -> tuple[str, str | None, int]:
    parts = urlsplit(f"//{netloc}")
    return scheme, parts.hostname, parts.port or (443 if scheme == "https" else 80)


# -- trust ------------------------------------------------------------------------------------------------


class Trust:
    """TLS contexts by certificate file, each loaded once. Thread-safe: loading one twice is harmless."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._contexts: dict[str, ssl.SSLContext] = {}

    def context(self, host: str, *, redirected_from: str | None = None) -> ssl.SSLContext:
        """Return the context for *host*.

        A host that a registry redirects to and for which nothing is configured is trusted as the
        registry is: a site's own authority usually signs both its registry and its object store.

        Raises:
            ConfigError: the configured file can't be read.
        """
        ca_file = registry_config(self._config, host).ca_file
        if not ca_file and redirected_from is not None:
            ca_file = registry_config(self._config, redirected_from).ca_file
        known = self._contexts.get(ca_file)
        if known is None:
            known = ssl.create_default_context()
            if ca_file:
                try:
                    known.load_verify_locations(cafile=ca_file)
                except (OSError, ssl.SSLError) as exc:
                    raise ConfigError(f'registries."{host}"', (f"ca_file: {ca_file} can't be read as PEM",)) from exc
            self._contexts[ca_file] = known
        return known

    def __repr__(self) -> str:
        return f"<Trust {len(self._contexts)} contexts>"
