"""Who may look at the page: whoever has its token, under an address that no other site can take."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: For every answer. No script, style or picture but our own files; nobody may frame the page; and what it says is
#: neither kept by the browser nor told to where a link leads.
HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
#: Said by a server that speaks TLS for the page. Whoever says it himself has a stricter cookie, and that is all.
FORWARDED_PROTO = "x-forwarded-proto"
READING = ("GET", "HEAD")
OTHER_NAME = "This page answers under an IP address or localhost only: another site could take any other name.\n"
READ_ONLY = "This page only shows.\n"
_NO_TOKEN = "No token, no page: `lazyfarm page` prints the address that opens it.\n"  # noqa: S105 - says so


class Guard:
    """Lets through what comes with the token, in a header or a cookie; with it in the address, makes the cookie.

    Args:
        app: What is guarded.
        token: The token.
        cookie: Name of the cookie: browsers don't tell the ports of one host apart, so each farm has its own.
    """

    def __init__(self, app: ASGIApp, *, token: str, cookie: str) -> None:
        self._app = app
        self._token = token
        self._cookie = cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # a web socket: there is none, and what is not accepted is refused

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = self._refused(scope)
        await (self._app if refused is None else refused)(scope, receive, sealed)

    def _refused(self, scope: Scope) -> Response | None:
        """Return what is answered instead of the page; None: nothing."""
        headers = Headers(scope=scope)
        if not is_address(headers.get("host", "")):
            # A name that its owner lets point here: his site's scripts would count as the page's own (DNS rebinding).
            return PlainTextResponse(OTHER_NAME, 421)
        if scope["method"] not in READING:
            return PlainTextResponse(READ_ONLY, 405, {"allow": ", ".join(READING)})
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if any(name == "token" and self._is_token(value) for name, value in query):
            kept = [(name, value) for name, value in query if name != "token"]
            return self._entered(scope["path"], kept, is_tls=_is_tls(headers))
        if not self._is_token(self._shown(headers)):
            return PlainTextResponse(_NO_TOKEN, 401, {"www-authenticate": "Bearer"})
        return None

    def _shown(self, headers: Headers) -> str:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return bearer.strip()
        return cookie_parser(headers.get("cookie", "")).get(self._cookie_name(is_tls=_is_tls(headers)), "")

    def _cookie_name(self, *, is_tls: bool) -> str:
        # Begun like this, a browser takes it by TLS and from this very host alone, and another name than by plain HTTP:
        # the page has two addresses on one host, and what one of them set the other could not replace.
        return f"__Host-{self._cookie}" if is_tls else self._cookie

    def _entered(self, path: str, query: list[tuple[str, str]], *, is_tls: bool) -> Response:
        """Go on without the token in the address, where it would be seen, kept and passed on."""
        # One slash: an address that begins with two names another host.
        place = "/" + path.lstrip("/\\")
        response = RedirectResponse(f"{place}?{urlencode(query)}" if query else place, 303)
        name = self._cookie_name(is_tls=is_tls)
        response.set_cookie(name, self._token, httponly=True, samesite="strict", secure=is_tls)
        return response

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self._token.encode())


def _is_tls(headers: Headers) -> bool:
    return headers.get(FORWARDED_PROTO, "").lower() == "https"


def is_address(host: str) -> bool:
    """Tell whether a ``Host`` header names an IP address or localhost."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
