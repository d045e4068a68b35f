"""A small real token server for ``docker-registry``: RS256 JWTs with ``x5c``, users with rights by repository."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import json
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.doubles.registry import Registry, docker_registry

SERVICE, ISSUER = "test-registry", "test-issuer"
#: The registry forgives clocks this much when it looks at a token's end.
_LEEWAY_S = 60
#: As whom :meth:`TokenServer.root` asks: may do everything, is not counted.
_EVERYTHING = {"pull", "push", "delete", "*"}

#: Repository to actions; the repository ``*`` stands for all.
Rights = Mapping[str, set[str]]


@dataclass(frozen=True)
class TokenRequest:
    """One request that was answered."""

    method: str
    #: "" for anonymous.
    user: str
    scopes: tuple[str, ...]
    status: int


@dataclass
class TokenServer:
    """A running token server; its attributes may be changed at any time."""

    url: str
    certificate: Path
    _key: Any = field(repr=False)
    _x5c: str = field(repr=False)
    #: User to password.
    passwords: dict[str, str] = field(default_factory=dict)
    #: User to rights; "" is anybody.
    rights: dict[str, Rights] = field(default_factory=dict)
    #: Identity (refresh) token to user.
    refresh_tokens: dict[str, str] = field(default_factory=dict)
    #: What ``expires_in`` says; None leaves it out.
    expires_in: float | None = 300
    #: Tokens are over for the registry when they are made.
    makes_expired: bool = False
    #: Answers POST, the OAuth2 form.
    takes_post: bool = True
    #: Refuses who asks for more than it may have, rather than granting less.
    is_strict: bool = False
    #: (status, headers) of the next answers, before anything else is done.
    script: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    requests: list[TokenRequest] = field(default_factory=list)
    #: While it is clear, requests wait.
    gate: threading.Event = field(default_factory=threading.Event, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def registry_config(self) -> dict[str, Any]:
        """Return the configuration of a registry that sends its clients here."""
        return {
            "auth": {
                "token": {
                    "realm": f"{self.url}/token",
                    "service": SERVICE,
                    "issuer": ISSUER,
                    "rootcertbundle": str(self.certificate),
                }
            }
        }

    def allow(self, user: str, password: str, rights: Rights) -> None:
        """Add a user; ``""`` with any password is who comes without credentials."""
        self.passwords[user] = password
        self.rights[user] = rights

    def root(self, scope: str) -> str:
        """Return an ``Authorization`` header for everything in *scope*, uncounted."""
        return f"Bearer {self._mint('root', [_access(scope, {'*': _EVERYTHING})] if scope else [], 300)}"

    def answer(self, method: str, authorization: str | None, form: Mapping[str, list[str]]) -> tuple[int, dict, dict]:
        """Return (status, headers, body) for one request."""
        scopes = tuple(word for scope in form.get("scope", []) for word in scope.split())
        self.gate.wait(30)
        with self._lock:
            status, headers, body, user = self._decide(method, authorization, form, scopes)
            self.requests.append(TokenRequest(method, user or "", scopes, status))
        return status, headers, body

    def _decide(self, method, authorization, form, scopes):
        user = self._who(method, authorization, form)
        if self.script:
            status, headers = self.script.pop(0)
            return status, headers, {}, user
        if method == "POST" and not self.takes_post:
            return 405, {}, {}, user
        if user is None:
            return 401, {}, {"details": "incorrect username or password"}, user
        access = [_access(scope, self.rights.get(user, {})) for scope in scopes]
        if self.is_strict and any(
            set(scope.rpartition(":")[2].split(",")) != set(entry["actions"])
            for scope, entry in zip(scopes, access, strict=True)
        ):
            return 403, {}, {}, user
        lifetime_s = -(_LEEWAY_S + 60) if self.makes_expired else 300
        body = {"access_token" if method == "POST" else "token": self._mint(user, access, lifetime_s)}
        if self.expires_in is not None:
            body["expires_in"] = self.expires_in
        return 200, {}, body, user

    def _who(self, method, authorization, form) -> str | None:
        if method == "POST":
            return self.refresh_tokens.get(form.get("refresh_token", [""])[0])
        if authorization is None:
            return ""
        user, _, password = base64.b64decode(authorization.partition(" ")[2]).decode().partition(":")
        return user if self.passwords.get(user) == password else None

    def _mint(self, user: str, access: list[dict[str, Any]], lifetime_s: float) -> str:
        from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric import padding  # noqa: PLC0415

        now = int(time.time())
        header = {"typ": "JWT", "alg": "RS256", "x5c": [self._x5c]}
        claims = {
            "iss": ISSUER,
            "sub": user,
            "aud": SERVICE,
            "exp": int(now + lifetime_s),
            "nbf": now - 600,
            "iat": now - 600,
            "jti": uuid.uuid4().hex,
            "access": access,
        }
        text = f"{_base64url(json.dumps(header).encode())}.{_base64url(json.dumps(claims).encode())}"
        return f"{text}.{_base64url(self._key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


def _access(scope: str, rights: Rights) -> dict[str, Any]:
    resource, _, actions = scope.rpartition(":")
    kind, _, name = resource.partition(":")
    allowed = rights.get(name, rights.get("*", set()))
    return {"type": kind, "name": name, "actions": sorted(set(actions.split(",")) & allowed)}


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class _Handler(BaseHTTPRequestHandler):
    tokens: TokenServer
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer(parse_qs(urlsplit(self.path).query))

    def do_POST(self):
        self._answer(parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()))

    def _answer(self, form):
        status, headers, document = self.tokens.answer(self.command, self.headers.get("Authorization"), form)
        body = json.dumps(document).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Idle kept-alive connections would be waited for.
    block_on_close = False


@contextlib.contextmanager
def token_server(directory: Path) -> Iterator[TokenServer]:
    """Run a token server with a key of its own."""
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import rsa  # noqa: PLC0415

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    now = dt.datetime.now(dt.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, ISSUER)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    bundle = directory / "tokens.pem"
    bundle.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    x5c = base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()
    handler = type("Handler", (_Handler,), {})
    server = _Server(("127.0.0.1", 0), handler)
    handler.tokens = TokenServer(f"http://127.0.0.1:{server.server_port}", bundle, key, x5c)
    handler.tokens.gate.set()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield handler.tokens
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass(frozen=True)
class TokenRegistry:
    """A registry and the token server that it trusts."""

    registry: Registry
    tokens: TokenServer


@pytest.fixture
def token_registry(tmp_path: Path) -> Iterator[TokenRegistry]:
    """A registry with a token server of the test's own; nobody has any rights yet."""
    with (
        token_server(tmp_path) as tokens,
        docker_registry(tokens.registry_config, authorize=tokens.root) as registry,
    ):
        yield TokenRegistry(registry, tokens)
