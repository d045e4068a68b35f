"""The farm's web page: a process of its own, which reads Redis and tells whoever has its token."""

from __future__ import annotations

from pathlib import Path

from cluster.config import WebConfig
from storage.services.http_service import HttpService
from storage.services.state_dir import StateDir

_OK = 200
#: Seconds that it may take to answer that it is there.
_ANSWER_S = 5.0


class PageService(HttpService[WebConfig]):
    """The page's process."""

    name = "page"
    module = "lazyfarm.web"
    stop_s = 2.0  # it drops who looks on at once

    def _scheme(self, config: WebConfig) -> str:  # noqa: ARG002 - the gateway's depends on it
        return "http"

    def _answers(self, host: str, port: int, scheme: str) -> bool:  # noqa: ARG002 - likewise
        from http.client import HTTPConnection  # noqa: PLC0415 - as in the base

        connection = HTTPConnection(host, port, timeout=_ANSWER_S)
        try:
            bearer = f"Bearer {self.token_file.read_text().strip()}"
            connection.request("HEAD", "/static/icon.svg", headers={"Authorization": bearer})
            return connection.getresponse().status == _OK
        finally:
            connection.close()


def page_url(state_dir: Path) -> str:
    """Return where a farm's page was started; "" where none was."""
    return PageService(StateDir(state_dir)).url


def page_link(state_dir: Path) -> str:
    """Return the address that opens the page, with the token in it; "" where none was started."""
    page = PageService(StateDir(state_dir))
    return f"{page.url}/?token={page.token_file.read_text().strip()}" if page.url else ""
