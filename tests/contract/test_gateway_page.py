"""The page under the gateway's address, over real sockets: what is passed on, what is not, and who is told what."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import sys
from functools import partial
from types import SimpleNamespace

import aiohttp
import pytest
import structlog

from cluster.config import GatewayConfig, WebConfig
from cluster.errors import GatewayRefusedError
from lazyfarm.farm import Farm
from lazyfarm.gateway import server
from lazyfarm.gateway.page import find_page
from lazyfarm.gateway.server import GatewayServer, tls
from lazyfarm.web.guard import HEADERS
from storage.services.gateway import GatewayService
from storage.services.loopback import choose_ports
from storage.services.page import PageService
from storage.services.state_dir import StateDir
from tests.doubles.browser import browser, has_browser
from tests.doubles.observed import eventually
from tests.doubles.redis import free_port, redis_binaries
from tests.doubles.registry import make_authority
from tests.doubles.stores import FarmOfRedis

NOT_THERE = "The farm's page doesn't run: `lazyfarm up` starts it, where web.enabled is true.\n"


class Page:
    """What stands where the page is: it keeps what it was asked, word by word, and answers what a test says."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[str] = []
        self.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
        #: Set: the rest of an answer goes out.
        self.go_on = asyncio.Event()
        self.rest = b""
        self.left = asyncio.Event()

    async def serve(self, reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                self.asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
                writer.write(self.answer)
                await writer.drain()
                if self.rest:
                    gone = asyncio.create_task(reader.read())
                    go_on = asyncio.create_task(self.go_on.wait())
                    await asyncio.wait([gone, go_on], return_when=asyncio.FIRST_COMPLETED)
                    gone.cancel()
                    go_on.cancel()
                    if not self.go_on.is_set():
                        self.left.set()
                    writer.write(self.rest)
                    break
        writer.close()


@pytest.fixture
async def page():
    found = Page()
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield found
    server.close()


@contextlib.asynccontextmanager
async def gateway(find, authority=None, **options):
    """Listen as a gateway, and yield its port."""
    config = GatewayConfig(
        port=free_port(),
        cert_file=str(authority.certificate) if authority else "",
        key_file=str(authority.key) if authority else "",
    )
    made = GatewayServer(None, token="the-gateway's", find_page=find, **options)
    async with made.listening(config, tls(config)) as port:
        yield port


@pytest.fixture
async def port(page):
    async with gateway(lambda: page.url) as found:
        yield found


async def say(port, text, trust=None):
    """Send a request word by word and return the whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust, server_hostname=trust and "x")
    writer.write(text.replace("\n", "\r\n").encode())
    async with asyncio.timeout(30):
        answer = await reader.read()
    writer.close()
    return answer.decode()


def head(request_line, *headers):
    return "\n".join([request_line, "Host: 127.0.0.1:1", "Connection: close", *headers, "", ""])


def any_name():
    trust = ssl.create_default_context()
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    return trust


# -- what is passed on -----------------------------------------------------------------------------------------


async def test_a_path_is_asked_for_as_it_was_written_and_at_the_page_alone(port, page):
    """Whatever it looks like, it leads nowhere else; and what it means is the page's to say."""
    paths = ("/", "/refs?q=a+b%20c&state=", "//evil.example/x", "/a/../b", "/%2e%2e/x%2Fy", "/@evil.example:1/")
    for path in paths:
        assert (await say(port, head(f"GET {path} HTTP/1.1"))).endswith("\r\n\r\nok"), path
    assert [asked.split()[1] for asked in page.asked] == list(paths)
    host = page.url.removeprefix("http://")
    assert all(f"\r\nHost: {host}\r\n" in asked for asked in page.asked)


async def test_it_is_no_proxy(port, page):
    """Not by an address, not by CONNECT."""
    for line in ("GET http://evil.example/ HTTP/1.1", f"GET {page.url}/ HTTP/1.1", "CONNECT evil.example:443 HTTP/1.1"):
        answer = await say(port, head(line))
        assert re.match(r"HTTP/1\.[01] 40[045] ", answer), answer
    assert page.asked == []


async def test_headers_are_those_that_a_browser_needs(port, page):
    """None that is of one connection alone, none that says who asked or how, and nothing is added."""
    kept = {
        "accept": "text/html",
        "accept-encoding": "br",
        "authorization": "Bearer t",
        "cookie": "a=b; c=d",
        "hx-request": "true",
        "if-none-match": '"e"',
        "last-event-id": "7",
        "range": "bytes=0-1",
        "x-forwarded-proto": "https",  # a server that speaks TLS for us: the cookie is to go by that alone
    }
    dropped = {
        "connection": "close, x-mine",
        "forwarded": "for=1.2.3.4;proto=https",
        "keep-alive": "1",
        "proxy-authorization": "Basic x",
        "te": "trailers",
        "upgrade-insecure-requests": "1",
        "x-forwarded-for": "1.2.3.4",
        "x-forwarded-host": "evil.example",
        "x-mine": "1",
    }
    sent = [f"{name}: {value}" for name, value in {**kept, **dropped}.items()]
    await say(port, "\n".join(["GET / HTTP/1.1", "Host: localhost", *sent, "", ""]))
    (asked,) = page.asked
    said = dict(line.split(": ", 1) for line in asked.split("\r\n")[1:] if line)
    assert {name.lower(): value for name, value in said.items()} == {**kept, "host": page.url.removeprefix("http://")}


async def test_answers_come_back_whole(port, page):
    """With all that they say but what is of the connection; under the address that the browser knows."""
    said = (
        "HTTP/1.1 303 See Other", "content-length: 3", "set-cookie: a=1", "set-cookie: b=2", "content-type: a/b",
        "content-encoding: gzip", "keep-alive: timeout=5", f"location: {page.url}/jobs?x=1", "x-mine: 1", "", "abc",
    )  # fmt: skip
    page.answer = "\r\n".join(said).encode()
    answer = await say(port, head("GET /jobs/ HTTP/1.1"))
    begin, _, body = answer.partition("\r\n\r\n")
    status, *lines = begin.split("\r\n")
    assert (status, body) == ("HTTP/1.1 303 See Other", "abc")
    assert {line for line in lines if not line.startswith(("Date", "Connection"))} == {
        "Content-Length: 3",
        "Set-Cookie: a=1",
        "Set-Cookie: b=2",
        "Content-Type: a/b",
        "Content-Encoding: gzip",
        "Location: /jobs?x=1",
        "x-mine: 1",
    }


@pytest.mark.parametrize("line", ["content-length: 0", "content-length: 5\r\nx-sent: now"])
async def test_a_head_has_no_body(port, page, line):
    """Whatever length it names."""
    page.answer = b"HTTP/1.1 200 OK\r\n" + line.encode() + b"\r\n\r\n"
    answer = await say(port, head("HEAD /x HTTP/1.1"))
    assert (answer.endswith("\r\n\r\n"), f"content-length: {line[16]}" in answer.lower()) == (True, True)
    assert page.asked[0].startswith("HEAD /x ")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
async def test_nothing_but_reading_is_passed_on(port, page, method):
    """The page only shows."""
    answer = await say(port, head(f"{method} / HTTP/1.1"))
    assert "405 " in answer.splitlines()[0]
    assert "\r\nallow: GET, HEAD\r\n" in answer
    assert page.asked == []


@pytest.mark.parametrize("how", ["Content-Length: 3\n\nabc", "Transfer-Encoding: chunked\n\n3\nabc\n0\n"])
async def test_a_body_is_refused(port, page, how):
    """Of whatever form; the connection ends with it, so that it is no next request."""
    answer = await say(port, "GET / HTTP/1.1\nHost: localhost\n" + how + "\n")
    assert "413 " in answer.splitlines()[0]
    assert page.asked == []


# -- names -----------------------------------------------------------------------------------------------------


async def test_over_plain_http_a_name_that_another_site_may_take_is_refused(port, page):
    """The page is asked under its own address, and couldn't tell any more."""
    for host in ("evil.example", "localhost.evil:80", ""):
        answer = await say(port, f"GET / HTTP/1.1\nHost: {host}\nConnection: close\n\n")
        assert "421 " in answer.splitlines()[0], host
    assert page.asked == []
    for host in ("127.0.0.1:1", "LOCALHOST", "[::1]:1"):
        answer = await say(port, f"GET / HTTP/1.1\nHost: {host}\nConnection: close\n\n")
        assert "200 " in answer.splitlines()[0], host


async def test_over_tls_the_certificate_has_proven_the_name(page, tmp_path):
    """Any is answered, and the page is told that its cookie may go by TLS alone."""
    authority = make_authority(tmp_path)
    async with gateway(lambda: page.url, authority) as port:
        told = "GET / HTTP/1.1\nHost: farm.example:1\nX-Forwarded-Proto: http\nConnection: close\n\n"
        assert "200 OK" in await say(port, told, any_name())
    assert page.asked[0].lower().count("x-forwarded-proto: https") == page.asked[0].lower().count("x-forwarded") == 1


async def shown_by(port):
    """Return the certificate that a gateway shows."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=any_name(), server_hostname="x")
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return found


async def test_a_certificate_is_exchanged_while_the_gateway_runs(page, tmp_path, monkeypatch):
    """Who comes next is shown the new one; until its key is there, too, the old one goes on."""
    monkeypatch.setattr(server, "_RENEWED_S", 0.01)
    (tmp_path / "new").mkdir()
    authority, new = make_authority(tmp_path), make_authority(tmp_path / "new")
    async with gateway(lambda: page.url, authority) as port:
        old = await shown_by(port)
        with structlog.testing.capture_logs() as logs:
            authority.certificate.write_bytes(new.certificate.read_bytes())
            await eventually(lambda: logs, "a look at the file")
            assert await shown_by(port) == old
            authority.key.write_bytes(new.key.read_bytes())
            await eventually(lambda: logs[-1]["event"] == "gateway.certificate.renewed", "the new one")
        assert ssl.DER_cert_to_PEM_cert(await shown_by(port)) in new.certificate.read_text()


# -- as it comes -----------------------------------------------------------------------------------------------

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n"


async def test_events_come_at_once(port, page):
    """What is told is passed on before there is more."""
    page.answer, page.rest = STREAM, b"6\r\nsecond\r\n0\r\n\r\n"
    async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}/jobs/j/events") as answer:
        assert await answer.content.readany() == b"first"
        page.go_on.set()
        assert await answer.content.read() == b"second"


async def test_who_leaves_ends_what_was_asked_for_him(port, page):
    """Also while there is nothing to be told: the page looks no longer for nobody."""
    page.answer, page.rest = STREAM, b"-"
    async with aiohttp.ClientSession() as http:
        answer = await http.get(f"http://127.0.0.1:{port}/jobs/j/events")
        assert await answer.content.readany() == b"first"
        answer.close()
        async with asyncio.timeout(30):
            await page.left.wait()


async def test_a_page_that_dies_meanwhile_is_no_end(port, page):
    """A part is not taken for the whole."""
    page.answer, page.rest = STREAM, b"-"
    async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}/jobs/j/events") as answer:
        assert await answer.content.readany() == b"first"
        page.rest = b""
        page.go_on.set()
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.content.read()


async def test_a_page_that_is_away_is_said_to_be():
    """One clear line, whether nobody is there or none was started; the gateway itself goes on."""
    nobody = f"http://127.0.0.1:{choose_ports(['page'], {})['page']}"
    for found in ("", nobody):
        async with gateway(lambda found=found: found) as port, aiohttp.ClientSession() as http:
            async with http.get(f"http://127.0.0.1:{port}/jobs") as answer:
                assert (answer.status, await answer.text()) == (503, NOT_THERE)
                assert HEADERS.items() <= {name.lower(): value for name, value in answer.headers.items()}.items()
            async with http.get(f"http://127.0.0.1:{port}/gateway/health") as answer:
                assert (answer.status, len(await answer.text())) == (200, 64)
            with pytest.raises(GatewayRefusedError):
                await Farm.connect(f"http://127.0.0.1:{port}", token="wrong", credentials={})


# -- which it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_tls", [True, False], ids=["https", "http"])
async def test_a_gateway_is_told_from_another_at_its_port(tmp_path, monkeypatch, is_tls):
    """By its process and its farm, whatever name its certificate has; nobody there is shown a token."""
    state = StateDir(tmp_path / "state")
    service = GatewayService(state)
    authority = make_authority(tmp_path) if is_tls else None
    process = service.process
    async with (
        gateway(lambda: "", authority, farm_id=state.farm_id()) as port,
        gateway(lambda: "", authority, farm_id="another's") as other,
    ):
        waiting = (sys.executable, "-c", "import signal; signal.pause()")
        try:
            for at, pid, is_it in ((port, None, False), (port, "its", True), (other, "its", False)):
                process.start((*waiting, "0.0.0.0", str(at)), ports={"https" if is_tls else "http": at})  # noqa: S104
                with monkeypatch.context() as patched:
                    if pid:
                        patched.setattr(server, "os", SimpleNamespace(getpid=lambda: process.pid))
                    assert await asyncio.to_thread(service.is_alive) is is_it
            assert service.url == f"{'https' if is_tls else 'http'}://127.0.0.1:{other}"
        finally:
            process.stop()
        assert (service.url, await asyncio.to_thread(service.is_alive)) == ("", False)


# -- the page itself -------------------------------------------------------------------------------------------


@pytest.fixture
async def farm(redis_servers, tmp_path):
    """A farm whose page runs as a process."""
    made = FarmOfRedis(redis_servers(next(iter(redis_binaries()))).config, tmp_path / "state")
    service = PageService(StateDir(made.state_dir))
    await asyncio.to_thread(service.start, WebConfig(), "d")
    made.page = service
    yield made
    await asyncio.to_thread(service.stop)
    await made.close()


@pytest.mark.redis
async def test_the_page_opens_under_the_gateway_s_address(farm, tmp_path):
    """With its own token, by a cookie that never goes in clear; without, and once it has ended, there is none."""
    token = farm.page.token_file.read_text().strip()
    async with (
        gateway(partial(find_page, farm.state_dir), authority := make_authority(tmp_path)) as port,
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=authority.ca_file))
        ) as http,
    ):
        here = f"https://localhost:{port}"
        async with http.get(f"{here}/", headers={"authorization": "Bearer the-gateway's"}) as answer:
            assert answer.status == 401
        async with http.get(f"{here}/refs?token={token}&q=x", allow_redirects=False) as answer:
            assert (answer.status, answer.headers["location"]) == (303, "/refs?q=x")
            (cookie,) = answer.headers.getall("set-cookie")
            name, *rest = cookie.partition("=")[0], *(part.strip().lower() for part in cookie.split(";")[1:])
            assert (name[:16], set(rest)) == ("__Host-lazyfarm-", {"httponly", "path=/", "samesite=strict", "secure"})
        async with http.get(f"{here}/refs") as answer:
            assert (answer.status, "<title>Refs" in await answer.text()) == (200, True)
        async with http.get(f"{here}/refs", headers={"accept-encoding": "gzip"}) as answer:
            assert "server" not in answer.headers
        await asyncio.to_thread(farm.page.stop)
        async with http.get(f"{here}/refs") as answer:
            assert (answer.status, await answer.text()) == (503, NOT_THERE)


@pytest.mark.redis
@pytest.mark.skipif(not has_browser(), reason="there is no chromium")
async def test_a_browser_finds_the_page_by_the_farm_s_name(farm, tmp_path):
    """It keeps the cookie, scripts and styles are loaded, and a list that stays open keeps up."""
    token = farm.page.token_file.read_text().strip()
    options = ("--ignore-certificate-errors", "--host-resolver-rules=MAP farm.example 127.0.0.1")
    async with (
        gateway(partial(find_page, farm.state_dir), make_authority(tmp_path)) as port,
        browser(*options) as running,
        running.tab() as tab,
    ):
        await tab.open(f"https://farm.example:{port}/?token={token}")
        assert await tab.ask("location.pathname + location.search") == "/"
        await tab.until("document.styleSheets.length > 0 && document.styleSheets[0].cssRules.length > 0")
        await tab.until("typeof htmx === 'object'")
        assert await tab.ask("document.cookie") == ""
        assert tab.complaints == []
