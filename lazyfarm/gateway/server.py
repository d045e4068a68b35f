"""The gateway's server: one WebSocket for each driver, for whoever has the token; and the way to the page."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import ssl
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from socket import gethostname

import structlog
from aiohttp import WSMsgType, web

from cluster.config import GatewayConfig
from cluster.errors import ClusterError, ConfigError, StartError, UnavailableError
from cluster.gateway import (
    HEALTH_PATH,
    HEARTBEAT_S,
    MAX_FRAME_BYTES,
    PATH,
    Frame,
    Hello,
    Verb,
    decode_frame,
    encode_frame,
)
from cluster.metrics import GATEWAY
from cluster.settings import FarmSettings
from cluster.wire import decode, encode, encode_error
from lazyfarm.gateway.hosted import Drivers
from lazyfarm.gateway.page import PageDoor, find_page
from storage.services.gateway import GatewayService, sign
from storage.services.state_dir import StateDir

#: Seconds that a connection has to say who it is.
_HELLO_S = 10.0
#: Seconds that connections have to end when the gateway does.
_LEAVE_S = 2.0
#: Seconds between two looks whether the certificate was exchanged for another.
_RENEWED_S = 30.0
#: Threads that wait for drivers' answers, for S3 and for sessions that are opened.
_THREADS = 64


def token_file(state_dir: Path) -> Path:
    """Return the file of the token that lets drivers in, made on first use."""
    return GatewayService(StateDir(state_dir)).token_file


class GatewayServer:
    """Answers connections.

    Args:
        drivers: Whom it serves.
        token: What each has to show.
        farm_id: Of the farm.
        find_page: As of :class:`lazyfarm.gateway.page.PageDoor`.
    """

    def __init__(
        self, drivers: Drivers, *, token: str, farm_id: str = "", find_page: Callable[[], str] = lambda: ""
    ) -> None:
        self._drivers = drivers
        self._farm_id = farm_id
        self._token = token.encode()
        self._find_page = find_page
        self._sockets: set[web.WebSocketResponse] = set()

    def __repr__(self) -> str:
        return f"<GatewayServer: {len(self._sockets)} connections>"

    @contextlib.asynccontextmanager
    async def listening(self, config: GatewayConfig, trust: ssl.SSLContext | None) -> AsyncIterator[int]:
        """Listen while the body runs; yields the port. Drivers may come back to the gateway that is started next.

        Raises:
            StartError: the address can't be listened on.
        """
        page = PageDoor(self._find_page, is_tls=trust is not None)
        app = web.Application()
        app.on_response_prepare.append(_nameless)
        app.router.add_get(PATH, self._serve)
        app.router.add_get(HEALTH_PATH, self._health)
        app.router.add_route("*", "/{path:.*}", page.answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=_LEAVE_S)
        await runner.setup()
        renewing = None if trust is None else asyncio.create_task(_renewed(config, trust))
        try:
            site = web.TCPSite(runner, config.host, config.port, ssl_context=trust)
            try:
                await site.start()
            except OSError as exc:
                raise StartError(f"the gateway at {config.host}:{config.port}", exc.strerror or str(exc), "") from exc
            yield runner.addresses[0][1]
        finally:
            if renewing is not None:
                renewing.cancel()
            for socket in list(self._sockets):
                await socket.close()
            await runner.cleanup()
            await page.close()

    async def drop(self) -> None:
        """Drop every connection, as a network does."""
        for socket in list(self._sockets):
            await socket.close()

    async def _health(self, _: web.Request) -> web.Response:
        """Say to anybody that a gateway is here, and to this machine's commands which one."""
        return web.Response(body=sign(self._farm_id, os.getpid()), content_type="text/plain")

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        # A header that no page of a browser can set on a WebSocket: no other site's scripts come in.
        if scheme.lower() != "bearer" or not hmac.compare_digest(shown.strip().encode(), self._token):
            raise web.HTTPUnauthorized(headers={"www-authenticate": "Bearer"})
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=2 * MAX_FRAME_BYTES, compress=False)
        await socket.prepare(request)
        self._sockets.add(socket)
        try:
            await self._talk(socket)
        except ClusterError as exc:
            with contextlib.suppress(ConnectionError):
                await socket.send_bytes(encode_frame(Frame(verb=Verb.FAILED, body=encode_error(exc))))
        finally:
            self._sockets.discard(socket)
            await socket.close()
        return socket

    async def _talk(self, socket: web.WebSocketResponse) -> None:
        hello = await _hello(socket)
        driver, welcome = await self._drivers.welcome(hello)
        outbox = driver.attach(hello)
        self._drivers.show()
        try:
            await socket.send_bytes(encode_frame(Frame(verb=Verb.WELCOME, body=encode("welcome", welcome))))
            writing = asyncio.create_task(_write(socket, outbox))
            try:
                async for message in socket:
                    if message.type is WSMsgType.BINARY:
                        driver.take(decode_frame(message.data))
            finally:
                writing.cancel()
                await asyncio.wait([writing])
        finally:
            if driver.detach(outbox):
                self._drivers.dropped(driver)


async def _nameless(_: web.Request, response: web.StreamResponse) -> None:
    """Say of nobody's software which it is, to whoever asks."""
    response.headers.pop("server", None)


async def _hello(socket: web.WebSocketResponse) -> Hello:
    try:
        async with asyncio.timeout(_HELLO_S):
            message = await socket.receive()
    except TimeoutError:
        raise UnavailableError("the gateway", "the driver didn't say who it is") from None
    if message.type is not WSMsgType.BINARY:
        raise UnavailableError("the gateway", "the driver left at once")
    frame = decode_frame(message.data)
    return decode("hello", Hello, frame.body)


async def _write(socket: web.WebSocketResponse, outbox: asyncio.Queue[Frame | None]) -> None:
    with contextlib.suppress(ConnectionError):
        while (frame := await outbox.get()) is not None:
            await socket.send_bytes(encode_frame(frame))
        await socket.close()  # another connection has taken its place


def tls(config: GatewayConfig) -> ssl.SSLContext | None:
    """Return what TLS is spoken with; None where there is no certificate.

    Raises:
        ConfigError: certificate or key can't be used.
    """
    if not config.cert_file:
        return None
    trust = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        trust.load_cert_chain(config.cert_file, config.key_file)
    except OSError as exc:  # SSLError too: not PEM, or the key of another certificate
        raise ConfigError("gateway", (f"gateway.cert_file: {exc.strerror or exc}",)) from exc
    return trust


async def _renewed(config: GatewayConfig, trust: ssl.SSLContext) -> None:
    """Show who comes next the certificate that is in its file by then: they are exchanged while the gateway runs."""
    files = (Path(config.cert_file), Path(config.key_file))
    shown = await asyncio.to_thread(_written, files)
    while True:
        await asyncio.sleep(_RENEWED_S)
        written = await asyncio.to_thread(_written, files)
        if written == shown:
            continue
        log = structlog.get_logger()
        try:
            # In one of its own first: a key that is not the certificate's leaves the other with neither.
            tls(config)
            trust.load_cert_chain(config.cert_file, config.key_file)
        except (ConfigError, OSError) as exc:
            log.warning("gateway.certificate.failed", error=str(exc))  # one of the two may be written just now
        else:
            shown = written
            log.info("gateway.certificate.renewed")


def _written(files: tuple[Path, ...]) -> tuple[int, ...]:
    """Return when files were written; of one that is gone, that it never was."""
    return tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files)


@contextlib.asynccontextmanager
async def open_gateway(settings: FarmSettings) -> AsyncIterator[tuple[GatewayServer, str]]:
    """Serve drivers of a farm while the body runs; yields the server and its address. Joins the cluster.

    Raises:
        ConfigError, StartError: it can't listen. FarmNotRunningError: there is no farm.
    """
    from actors.join import join_in_time  # noqa: PLC0415 - Ray, once all else is known to be right
    from actors.metrics import export_metrics  # noqa: PLC0415 - likewise

    config = settings.config
    trust = tls(config.gateway)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="gateway"))
    await join_in_time(config, state_dir=str(settings.state_dir))
    shown = export_metrics(GATEWAY, farm=config.farm.name, node=gethostname(), actor=GATEWAY)
    drivers = Drivers(config, settings.state_dir)
    drivers.show()
    server = GatewayServer(
        drivers,
        token=token_file(settings.state_dir).read_text().strip(),
        farm_id=StateDir(settings.state_dir).farm_id(),
        find_page=partial(find_page, settings.state_dir),
    )
    showing = asyncio.create_task(shown.refresh_forever())
    try:
        async with server.listening(config.gateway, trust) as port:
            host = f"[{config.gateway.host}]" if ":" in config.gateway.host else config.gateway.host
            yield server, f"{'https' if trust else 'http'}://{host}:{port}"
    finally:
        showing.cancel()
