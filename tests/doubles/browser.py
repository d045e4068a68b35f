"""A real browser: Debian's Chromium without a screen, driven by its own debugging protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

_OPTIONS = (
    "--headless",
    "--no-sandbox",  # tests run as root
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--remote-debugging-port=0",
)
_START_S = 60.0


def has_browser() -> bool:
    """Tell whether there is a Chromium here."""
    return shutil.which("chromium") is not None


class Tab:
    """One tab of a browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        #: What scripts complained of, and what was refused to the page.
        self.complaints: list[str] = []

    async def call(self, method: str, **params: object) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json()
            self._note(message)
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    async def open(self, address: str) -> None:
        """Go to an address and wait until it is loaded."""
        loaded = await self.call("Page.navigate", url=address)
        assert "errorText" not in loaded, loaded["errorText"]
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def ask(self, expression: str) -> Any:
        """Return what a JavaScript expression comes to."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    async def until(self, expression: str, *, within_s: float = 30.0) -> Any:
        """Wait until a JavaScript expression is true, which an element is not; return what it came to."""
        try:
            async with asyncio.timeout(within_s):
                while not (found := await self.ask(expression)):  # noqa: ASYNC110 - a page wakes nobody
                    await asyncio.sleep(0.05)
        except TimeoutError:
            shown = await self.ask("document.body.textContent")
            raise AssertionError(f"not in {within_s:g} s: {expression}\n{shown}\n{self.complaints}") from None
        return found

    async def text(self, selector: str = "body") -> str:
        """Return the text of an element."""
        # Not innerText, which is what was drawn of it: nothing where a tab is behind another one.
        return await self.ask(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''")

    async def press(self, key: str, **more: object) -> None:
        """Press a key and let it go."""
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, **(more if kind == "keyDown" else {}))

    async def look_like(self, *, scheme: str, width: int, height: int) -> None:
        """Prefer a colour scheme, on a screen of that size."""
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    async def screenshot(self, path: Path) -> None:
        """Save what is seen, as a PNG."""
        found = await self.call("Page.captureScreenshot", format="png")
        await asyncio.to_thread(path.write_bytes, base64.b64decode(found["data"]))

    def _note(self, message: dict[str, Any]) -> None:
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(message["params"]["exceptionDetails"]["text"])
            case "Log.entryAdded":
                self.complaints.append(message["params"]["entry"]["text"])
            case _:
                pass


class Browser:
    """A browser that runs; every tab of it shares its cookies."""

    def __init__(self, http: aiohttp.ClientSession, debugging: str) -> None:
        self._http = http
        self._debugging = debugging

    @asynccontextmanager
    async def tab(self) -> AsyncIterator[Tab]:
        """Open a tab, and close it at the end."""
        async with self._http.put(f"{self._debugging}/json/new?about:blank") as answer:
            target = await answer.json(content_type=None)
        async with self._http.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = Tab(socket)
            for domain in ("Page", "Runtime", "Log"):
                await tab.call(f"{domain}.enable")
            yield tab
        async with self._http.get(f"{self._debugging}/json/close/{target['id']}"):
            pass


@asynccontextmanager
async def browser(*options: str) -> AsyncIterator[Browser]:
    """Start a browser with an empty profile and *options* of Chromium, and end it."""
    profile = Path(tempfile.mkdtemp(prefix="lf-browser-"))
    process = await asyncio.create_subprocess_exec(
        "chromium",
        *_OPTIONS,
        *options,
        f"--user-data-dir={profile}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        port_file = profile / "DevToolsActivePort"
        async with asyncio.timeout(_START_S):
            while not (port_file.exists() and port_file.read_text().count("\n")):
                assert process.returncode is None, f"chromium ended: {process.returncode}"
                await asyncio.sleep(0.05)
        async with aiohttp.ClientSession() as http:
            yield Browser(http, f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}")
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(10):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        shutil.rmtree(profile, ignore_errors=True)
