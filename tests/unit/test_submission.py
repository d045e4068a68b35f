"""Submitting driver scripts to a job server that is not as it should be, from an environment that names another."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray

from cluster.config import Config
from cluster.errors import InvalidArgumentError, UnavailableError
from cluster.settings import FarmSettings
from lazyfarm import submission


class Server(BaseHTTPRequestHandler):
    """Answers as Ray's job server does for as long as it is well; its server says how long that is."""

    def do_GET(self):
        if self.path == "/api/version" and self.server.is_well:
            self._answer(200, {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""})
        elif self.path.startswith("/api/packages/"):
            self._answer(200, {})
        else:
            self._answer(self.server.status, {})

    def do_POST(self):
        self.server.submitted += 1
        if self.server.status == 200:
            self._answer(200, {"submission_id": "s1", "job_id": "s1"})
        elif self.server.status:
            self._answer(self.server.status, {})
        else:
            self.close_connection = True  # and no answer

    def _answer(self, status, document):
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_UV_RUN_RUNTIME_ENV"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # what is set meanwhile is taken back
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as found:
        found.is_well, found.status, found.submitted = True, 200, 0
        serving = threading.Thread(target=found.serve_forever, args=(0.05,))
        serving.start()
        yield found
        found.shutdown()
        serving.join()


async def submit(server, tmp_path, **options):
    (tmp_path / "driver.py").touch()
    address = f"http://127.0.0.1:{server.server_port}"
    settings = FarmSettings(state_dir=tmp_path / "farm", wanted=Config())
    return await submission.submit(settings, "driver.py", working_dir=tmp_path, address=address, **options)


async def test_what_the_environment_says_of_another_cluster_is_not_heeded(server, tmp_path, monkeypatch):
    """As in each of Ray's own jobs, and where its command line was used; the process keeps it."""
    elsewhere = {"RAY_ADDRESS": "127.0.0.1:1", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}
    for name, value in elsewhere.items():
        monkeypatch.setenv(name, value)
    assert await submit(server, tmp_path) == submission.Submitted(id="s1", status="PENDING")
    assert server.submitted == 1
    assert {name: os.environ.get(name) for name in elsewhere} == elsewhere


@pytest.mark.parametrize(
    ("is_well", "status", "error"),
    [
        (True, 0, UnavailableError),  # it ends as it is asked
        (True, 500, InvalidArgumentError),
        (True, 403, InvalidArgumentError),  # another token
        (False, 500, UnavailableError),
    ],
)
async def test_what_goes_wrong_is_one_of_our_errors(server, tmp_path, is_well, status, error):
    """Whatever Ray's client, and what that is made of, calls it."""
    server.is_well, server.status = is_well, status
    with pytest.raises(error):
        await submit(server, tmp_path)


@pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")  # of Ray's client
async def test_a_log_that_breaks_off_is_one_of_our_errors(server, tmp_path):
    """The job was submitted; its server does not speak of its log."""
    with pytest.raises(UnavailableError):
        await submit(server, tmp_path, on_log=print)
