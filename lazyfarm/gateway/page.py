"""The page under the gateway's address: what a browser asks is passed on to the page's process, and its answer back.

The two are processes of their own (decision 15). What is passed on, and where to, is chosen here and not by who asks:
the page's address on this machine, GET and HEAD without a body, and headers that a browser needs. Who may look is the
page's to say: it asks for its own token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import aiohttp
from aiohttp import web
from yarl import URL

from lazyfarm.web.guard import FORWARDED_PROTO, HEADERS, OTHER_NAME, READ_ONLY, READING, is_address
from storage.services.page import PageService
from storage.services.state_dir import StateDir

#: Seconds until an answer begins, at most, and between two looks whether the browser is there still.
_BEGIN_S = 60.0
_LOOK_S = 1.0
_CONNECT_S = 2.0
#: What of a request is passed on; and whatever begins as htmx's own headers do.
_ASKED = frozenset({
    "accept", "accept-encoding", "accept-language", "authorization", "cookie", "if-modified-since", "if-none-match",
    "if-range", "last-event-id", "range",
})  # fmt: skip
_HTMX = "hx-"
#: What of an answer is this connection's alone (RFC 9110, 7.6.1); and `Date` is told by each server itself.
_NOT_ANSWERED = frozenset({
    "connection", "date", "keep-alive", "proxy-authenticate", "proxy-connection", "te", "trailer", "transfer-encoding",
    "upgrade",
})  # fmt: skip
_NOT_THERE = "The farm's page doesn't run: `lazyfarm up` starts it, where web.enabled is true.\n"
_NO_BODY = "This page takes no request with a body.\n"
_NO_PROXY = "This is no proxy: ask for a path.\n"


class PageDoor:
    """Passes on to a farm's page.

    Args:
        find: Returns where the page is, ``http://HOST:PORT`` on this machine; "" where it doesn't run.
        is_tls: Whether browsers come by TLS: then the certificate proves the name that they came by.
    """

    def __init__(self, find: Callable[[], str], *, is_tls: bool) -> None:
        self._find = find
        self._is_tls = is_tls
        self._http: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"<PageDoor to {self._find() or 'nothing'}>"

    async def close(self) -> None:
        """Let go of all connections to the page."""
        if self._http is not None:
            await self._http.close()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer a request as the page does."""
        refused = self._refused(request)
        if refused is not None:
            refused.force_close()  # the body that was refused may still be on its way
            return refused
        page = self._find()
        if not page:
            return _said(503, _NOT_THERE)
        if self._http is None:
            self._http = _session()
        here = URL(page)
        # Built of its parts: a path such as //other.example/ stays a path. What it says is for the page to read.
        address = URL.build(
            scheme=here.scheme,
            host=here.host or "",
            port=here.port,
            path=request.rel_url.raw_path,
            query_string=request.rel_url.raw_query_string,
            encoded=True,
        )
        try:
            async with asyncio.timeout(_BEGIN_S):
                answer = await self._http.request(
                    request.method, address, headers=self._asked(request), allow_redirects=False
                )
        except (aiohttp.ClientError, TimeoutError):
            return _said(503, _NOT_THERE)
        # Left also where the browser does first: the page is to look no longer for somebody who has gone.
        async with answer:
            return await _passed_on(request, answer, str(here.origin()))

    def _refused(self, request: web.Request) -> web.Response | None:
        """Return what is answered instead of the page's answer; None: nothing."""
        if not request.raw_path.startswith("/"):  # http://other.example/, as a proxy is asked
            return _said(400, _NO_PROXY)
        if not self._is_tls and not is_address(request.headers.get("host", "")):
            return _said(421, OTHER_NAME)
        if request.method not in READING:
            return _said(405, READ_ONLY, allow=", ".join(READING))
        if request.body_exists:
            return _said(413, _NO_BODY)
        return None

    def _asked(self, request: web.Request) -> list[tuple[str, str]]:
        """Return the headers that the page is asked with; its own address as ``Host`` comes to them."""
        # By plain HTTP it may be a server beside us that speaks TLS, which says so itself.
        wanted, said = (_ASKED, [(FORWARDED_PROTO, "https")]) if self._is_tls else (_ASKED | {FORWARDED_PROTO}, [])
        asked = [
            (name, value)
            for name, value in request.headers.items()
            if name.lower() in wanted or name.lower().startswith(_HTMX)
        ]
        return asked + said


def find_page(state_dir: Path) -> str:
    """Return where a farm's page runs; "" where it doesn't: by now its port may be somebody else's."""
    page = PageService(StateDir(state_dir))
    return page.url if page.process.is_alive() else ""


def _session() -> aiohttp.ClientSession:
    """Return what asks the page: it adds nothing, keeps nothing, and looks into nothing."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),  # streams last; whoever has one has a connection to us as well
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("accept", "accept-encoding", "user-agent"),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
    )


async def _passed_on(request: web.Request, answer: aiohttp.ClientResponse, page: str) -> web.StreamResponse:
    """Pass the page's answer on as it comes."""
    response = web.StreamResponse(status=answer.status, reason=answer.reason)
    for name, value in answer.headers.items():
        if name.lower() not in _NOT_ANSWERED:
            # Under the address that the browser knows.
            response.headers.add(name, value.removeprefix(page) if name.lower() == "location" else value)
    try:
        await response.prepare(request)
        while chunk := await _next(request, answer):
            await response.write(chunk)
        await response.write_eof()
    except (ConnectionError, aiohttp.ClientError):
        response.force_close()  # either end has gone, and a part is no whole: it ends without its end
        if request.transport is not None:
            request.transport.close()
    return response


async def _next(request: web.Request, answer: aiohttp.ClientResponse) -> bytes:
    """Return what comes next, "" at the end.

    Raises:
        ConnectionError: the browser has gone. Nothing else would say so, while there is nothing to be written.
    """
    while True:
        try:
            async with asyncio.timeout(_LOOK_S):
                return await answer.content.readany()
        except TimeoutError:
            if request.transport is None or request.transport.is_closing():
                raise ConnectionResetError from None


def _said(status: int, line: str, **headers: str) -> web.Response:
    return web.Response(status=status, text=line, headers={**HEADERS, **headers})
