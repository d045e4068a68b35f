"""Drivers that are Ray jobs: submitted as Ray's documentation says, to a farm that was merely brought up."""

import asyncio
import base64
import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cluster.lease import LeaseId
from storage.connect import connect
from storage.farm_file import read_running
from storage.flights import RedisFlightStore
from storage.keys import Keys
from storage.services.process import FARM_MARK, marked_pids
from tests.doubles.at_rest import in_files, in_gcs, in_processes, in_redis
from tests.doubles.documents import read_document
from tests.doubles.farm import RunningFarm
from tests.doubles.hosts import Network
from tests.doubles.registry import random_image
from tests.doubles.registry_faults import Hang, blobs, registry_fault_proxy

pytestmark = [pytest.mark.cluster, pytest.mark.registry, pytest.mark.timeout(240)]

#: Ray gives a driver 3 s to end, and its leases another few.
SOON_S = 60.0


@dataclass
class Jobs:
    """Ray's command line, pointed at a farm as docs/operations.md says."""

    farm: RunningFarm
    url: str
    token_file: Path

    def ray(self, *arguments, cwd=None):
        """Run ``ray job …`` and return how it went; what it prints is one text."""
        return subprocess.run(
            [Path(sys.executable).with_name("ray"), "job", *arguments],
            cwd=cwd,
            env={
                **os.environ,
                "RAY_API_SERVER_ADDRESS": self.url,
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(self.token_file),
                "RAY_USAGE_STATS_ENABLED": "0",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )

    def get(self, path, token=None):
        """Ask the server itself; return status and document."""
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
        sent = self.token_file.read_text().strip() if token is None else token
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {sent}"} if sent else {})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def details(self, submission_id):
        """Return what Ray knows of a job, as ``ray job list`` does."""
        _, text = self.get("/api/jobs/")
        (job,) = [job for job in json.loads(text) if job["submission_id"] == submission_id]
        return job

    def until(self, submission_id, *statuses):
        """Wait until a job has come to one of *statuses*."""
        give_up_s = time.monotonic() + SOON_S
        while (job := self.details(submission_id))["status"] not in statuses:
            assert time.monotonic() < give_up_s, job
            time.sleep(0.1)
        return job


@pytest.fixture
def jobs(farm):
    """The shared farm, which takes jobs although nobody asked for it."""
    status = farm.cli_json("status")
    return Jobs(farm, status["jobs"], farm.state_dir / "secrets" / "ray-token")


def write_driver(directory, text):
    directory.mkdir()
    (directory / "driver.py").write_text(textwrap.dedent(text))
    return directory


def test_a_driver_uses_the_docker_login_of_where_it_runs_and_leaves_no_trace_of_it(jobs, token_registry, tmp_path):
    """`ray job submit --working-dir . -- python driver.py` pulls a private image; the job is told the path of a login.

    The login is in no place afterwards: what Ray knows of the job, its sessions, logs and GCS, Redis, the state
    directory, a command line or an environment.
    """
    password = secrets.token_urlsafe(24)
    token_registry.tokens.allow("alice", password, {"*": {"pull"}})
    login = base64.b64encode(f"alice:{password}".encode()).decode()
    registry = token_registry.registry
    registry.push("jobs/private", "1", random_image(secrets.randbits(64), layers=2))
    docker = tmp_path / "docker"
    docker.mkdir()
    (docker / "config.json").write_text(json.dumps({"auths": {registry.host: {"auth": login}}}))
    directory = write_driver(
        tmp_path / "work",
        """
        import asyncio, sys
        from lazyfarm import Farm

        async def main():
            async with await Farm.connect() as farm:
                ref = await farm.pull(sys.argv[1])
                await ref.unlazy()
                print("pulled", ref.id, "lazy" if ref.is_lazy else "present")

        asyncio.run(main())
        """,
    )
    job_id, image = f"pull-{secrets.token_hex(4)}", f"{registry.host}/jobs/private:1"
    environment = json.dumps({"env_vars": {"DOCKER_CONFIG": str(docker)}})
    command = ["submit", "--submission-id", job_id, "--runtime-env-json", environment, "--working-dir", "."]
    done = jobs.ray(*command, "--", "python", "driver.py", image, cwd=directory)
    assert done.returncode == 0, done.stdout
    pulled = next(line for line in done.stdout.splitlines() if line.startswith("pulled "))
    assert pulled.endswith(" present")
    assert any(request.user == "alice" and request.status == 200 for request in token_registry.tokens.requests)

    job = jobs.details(job_id)
    assert (job["status"], job["driver_exit_code"]) == ("SUCCEEDED", 0)
    # What the driver joined as is this submission, and nothing beside it.
    assert job["driver_info"]["id"] == job["job_id"]
    assert job["runtime_env"]["env_vars"] == {"DOCKER_CONFIG": str(docker)}

    secret = {password.encode(), login.encode()}
    pids = set(marked_pids({FARM_MARK: (jobs.farm.state_dir / "farm-id").read_text().strip()}))
    # A search that could find nothing would prove nothing.
    known = {job_id.encode()}
    assert in_files(jobs.farm.state_dir, known)
    assert in_gcs(pids, known)
    assert _in_redis(jobs.farm, {b"jobs/private"})
    assert in_processes(pids, {b"RAY_AUTH_MODE"})
    assert _in_ray(jobs, known)

    assert not in_files(jobs.farm.state_dir, secret)
    assert not in_gcs(pids, secret)
    assert not _in_redis(jobs.farm, secret)
    assert not in_processes(pids, secret)
    assert not _in_ray(jobs, secret)


def _in_redis(farm, wanted):
    async def search():
        link = connect(farm.settings.config.redis)
        try:
            return await in_redis(link.execute, wanted)
        finally:
            await link.close()

    return asyncio.run(search())


def _in_ray(jobs, wanted):
    return [text for text in wanted if text.decode() in jobs.get("/api/jobs/")[1]]


def test_a_driver_that_fails_is_told_of_with_its_exit_code_and_words(jobs, tmp_path):
    """Here, because a folder in the working directory hides one of our packages: its log names it."""
    directory = write_driver(
        tmp_path / "work",
        """
        import sys
        try:
            import lazyfarm
        except ImportError as exc:
            print("refused:", exc)
            sys.exit(3)
        """,
    )
    (directory / "cluster").mkdir()
    (directory / "cluster" / "__init__.py").touch()
    job_id = f"fail-{secrets.token_hex(4)}"
    done = jobs.ray(
        "submit", "--submission-id", job_id, "--working-dir", ".", "--", "python", "driver.py", cwd=directory
    )
    assert done.returncode == 1
    assert "exit code 3" in done.stdout
    job = jobs.details(job_id)
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 3)
    logs = jobs.ray("logs", job_id).stdout
    assert "refused: /" in logs
    assert "hides lazyfarm's own package 'cluster'" in logs


def test_a_job_that_is_stopped_leaves_no_lease(jobs, tmp_path):
    """`ray job stop` ends the driver; what it held is let go when its lease has lapsed."""
    directory = write_driver(
        tmp_path / "work",
        """
        import asyncio
        from lazyfarm import Farm

        async def main():
            async with await Farm.connect() as farm:
                print("session", farm.session_id)
                await asyncio.Event().wait()

        asyncio.run(main())
        """,
    )
    job_id = f"stop-{secrets.token_hex(4)}"
    environment = json.dumps({"env_vars": {"LAZYFARM__CACHE__LEASE_TTL_S": "3"}})
    command = ["submit", "--no-wait", "--submission-id", job_id, "--runtime-env-json", environment]
    done = jobs.ray(*command, "--working-dir", ".", "--", "python", "driver.py", cwd=directory)
    assert done.returncode == 0, done.stdout
    lease = LeaseId(f"driver-{_told(jobs, job_id, 'session')}")
    assert lease in _leases(jobs.farm)

    assert jobs.ray("stop", job_id).returncode == 0
    assert jobs.until(job_id, "STOPPED", "FAILED", "SUCCEEDED")["status"] == "STOPPED"
    give_up_s = time.monotonic() + SOON_S
    while lease in _leases(jobs.farm):
        assert time.monotonic() < give_up_s, f"{lease} is still there"
        time.sleep(0.2)


def _told(jobs, job_id, word):
    """Wait until a driver has said something, and return the word after it."""
    give_up_s = time.monotonic() + SOON_S
    while True:
        status, text = jobs.get(f"/api/jobs/{job_id}/logs")
        words = (json.loads(text)["logs"] if status == 200 else "").split()
        if word in words[:-1]:
            return words[words.index(word) + 1]
        assert time.monotonic() < give_up_s, (jobs.details(job_id), text)
        time.sleep(0.2)


def _leases(farm):
    return {lease.id for lease in farm.leases()}


#: Submits a job of the farm's, and waits for it.
BUILDING = """
import asyncio, os, sys
from lazyfarm import Farm
from lazyfarm.graph import image

async def main(name, is_detached):
    async with await Farm.connect(credentials={}) as farm:
        graph = image(name, plain_http=True).mkfile("/made", name)
        job = await farm.solve(graph, detached=is_detached).submitted()
        print("session", farm.session_id, "pid", os.getpid(), "build", job.id, "", flush=True)
        await job

asyncio.run(main(sys.argv[1], sys.argv[2] == "detached"))
"""


@pytest.mark.timeout(300)
def test_a_driver_that_dies_leaves_its_detached_job_and_nothing_else(jobs, registry, tmp_path):
    """Killed or stopped, while a layer comes: lease, job and flight are gone after the grace, but a detached job's."""
    directory = write_driver(tmp_path / "work", BUILDING)
    environment = json.dumps({"env_vars": {"LAZYFARM__CACHE__LEASE_TTL_S": "3"}})
    layer, silence = {}, Hang()
    with registry_fault_proxy(registry.url) as proxy, ThreadPoolExecutor(3) as clients:
        proxy.script(silence, of=lambda seen: blobs(seen) and seen.digest in layer.values(), times=None)

        def begin(how):
            repository, made = f"dying/{secrets.token_hex(4)}", random_image(secrets.randbits(64), layers=1)
            layer[how] = made.layers[0].digest
            registry.push(repository, "1", made)
            command = ["submit", "--no-wait", "--submission-id", f"{how}-{tag}", "--runtime-env-json", environment]
            name, kind = f"{proxy.host}/{repository}:1", how.partition("-")[0]
            done = jobs.ray(*command, "--working-dir", ".", "--", "python", "driver.py", name, kind, cwd=directory)
            assert done.returncode == 0, done.stdout
            said = {word: _told(jobs, f"{how}-{tag}", word) for word in ("session", "pid", "build")}
            return {f"driver-{said['session']}", f"job-{said['build']}"}, int(said["pid"]), said["build"]

        tag = secrets.token_hex(4)
        cases = ("attached-killed", "attached-stopped", "detached-killed")
        (killed, killed_pid, _), (stopped, _, _), (detached, detached_pid, job) = clients.map(begin, cases)
        _until(lambda: _flights(jobs.farm) >= set(layer.values()))
        assert killed | stopped | detached <= _leases(jobs.farm)

        os.kill(killed_pid, signal.SIGKILL)
        os.kill(detached_pid, signal.SIGKILL)
        assert jobs.ray("stop", f"attached-stopped-{tag}").returncode == 0
        goes_on = {f"job-{job}"}
        _until(lambda: (killed | stopped | detached) & _leases(jobs.farm) == goes_on)
        _until(lambda: _flights(jobs.farm) & set(layer.values()) == {layer["detached-killed"]})
        for lease in sorted(lease for lease in killed | stopped if lease.startswith("job-")):
            assert jobs.farm.cli_json("jobs", "show", lease.removeprefix("job-"))["state"] == "cancelled"

        silence.proceed.set()
        _until(lambda: jobs.farm.cli_json("jobs", "show", job)["state"] == "done")


def _until(found):
    give_up_s = time.monotonic() + 2 * SOON_S
    while not found():
        assert time.monotonic() < give_up_s
        time.sleep(0.2)


def _flights(farm):
    """Return the digests of all layers that are being fetched."""

    async def look():
        link = connect(farm.settings.config.redis)
        try:
            return await RedisFlightStore(link, Keys(farm.settings.config.farm.name)).under_way()
        finally:
            await link.close()

    return {key.partition(":")[2] for key in asyncio.run(look())}


def lazyfarm_submit(jobs, directory, *arguments):
    """Run ``lazyfarm submit`` in a directory."""
    return subprocess.run(
        [sys.executable, "-m", "lazyfarm", "submit", *arguments],
        cwd=directory,
        # As in a job of another Ray: what that one says of itself is not heeded.
        env={
            **os.environ,
            **jobs.farm.environ,
            "LAZYFARM_STATE_DIR": str(jobs.farm.state_dir),
            "RAY_ADDRESS": "127.0.0.1:1",
            "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_submit_shows_what_a_driver_prints_and_exits_as_it_does(jobs, tmp_path):
    """The short form, as a document, too, and from within a job. What can't be submitted is said in one line."""
    directory = write_driver(
        tmp_path / "work",
        """
        import asyncio, os, sys
        from pathlib import Path
        from lazyfarm.blocking import Farm
        from lazyfarm.settings import load_running
        from lazyfarm.submission import submit

        with Farm.connect() as farm:
            print("nodes", len(farm.nodes()), os.environ["WORD"], *sys.argv[1:])
            settings = load_running(None, os.environ)
            begun = asyncio.run(submit(settings, "next.py", working_dir=Path.cwd()))
            print("next", begun.status, len(farm.nodes()))
        sys.exit(int(sys.argv[1]))
        """,
    )
    (directory / "next.py").touch()
    done = lazyfarm_submit(jobs, directory, "--env", "WORD=hello", "driver.py", "0", "--json")
    assert done.returncode == 0, done.stderr
    assert {"nodes 3 hello 0 --json", "next PENDING 3"} <= set(done.stdout.splitlines())

    job_id = f"short-{secrets.token_hex(4)}"
    failed = lazyfarm_submit(jobs, directory, "--json", "--id", job_id, "--env", "WORD=hello", "driver.py", "7")
    assert json.loads(failed.stdout) == {"job": job_id, "status": "failed", "exit_code": 7}
    assert "nodes 3 hello 7" in failed.stderr
    assert failed.returncode == 7
    assert jobs.details(job_id)["driver_exit_code"] == 7

    for wrong, words in ((("none.py",), "no such file"), (("--env", "WORD", "driver.py"), "NAME=VALUE")):
        refused = lazyfarm_submit(jobs, directory, *wrong)
        assert refused.returncode == 1
        assert refused.stderr.count("\n") == 1
        assert words in refused.stderr


def test_submit_that_is_interrupted_stops_its_job(jobs, tmp_path):
    """Ctrl-C: the driver is told to end, as `ray job stop` tells it."""
    directory = write_driver(tmp_path / "work", "import time; print('here', flush=True); time.sleep(600)")
    job_id = f"break-{secrets.token_hex(4)}"
    with subprocess.Popen(
        [sys.executable, "-m", "lazyfarm", "submit", "--id", job_id, "driver.py"],
        cwd=directory,
        env={**os.environ, **jobs.farm.environ, "LAZYFARM_STATE_DIR": str(jobs.farm.state_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as submitting:
        while submitting.stdout.readline() != "here\n":
            assert submitting.poll() is None
        submitting.send_signal(signal.SIGINT)
        assert submitting.wait(timeout=60) == 130
    assert jobs.until(job_id, "STOPPED", "FAILED", "SUCCEEDED")["status"] == "STOPPED"


def test_who_has_no_token_submits_nothing(jobs):
    """On loopback only, and not to every process there."""
    assert urlsplit(jobs.url).hostname == "127.0.0.1"
    assert jobs.get("/api/jobs/", token="")[0] == 401
    assert jobs.get("/api/jobs/", token="guessed")[0] == 403
    assert jobs.get("/api/jobs/")[0] == 200


def test_who_has_no_token_joins_nothing(farm, tmp_path):
    """A node that would be one of the cluster's, and be given work with its secrets, is refused: by Ray itself."""
    wrong = tmp_path / "token"
    wrong.write_text(secrets.token_hex(32))
    address = read_running(farm.state_dir).ray_address
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(wrong)}
    nodes = len(farm.cli_json("status")["nodes"])
    with tempfile.TemporaryDirectory(prefix="lf-") as short:
        intruders = [
            subprocess.Popen(
                [
                    sys.executable, "-P", "-m", "ray.scripts.scripts", "start", f"--address={address}",
                    "--node-ip-address=127.0.0.99", f"--temp-dir={short}/{n}", "--block", "--num-cpus=0",
                    "--memory=100000000", "--object-store-memory=80000000", "--disable-usage-stats",
                ],
                env={**os.environ, "RAY_ADDRESS": "", **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for n, environment in enumerate((own, {"RAY_AUTH_MODE": "disabled"}))
        ]  # fmt: skip
        try:
            for intruder in intruders:
                said, _ = intruder.communicate(timeout=120)
                assert intruder.returncode != 0
                assert "InvalidAuthToken" in said
        finally:
            for intruder in intruders:
                intruder.kill()
                intruder.wait()
    assert len(farm.cli_json("status")["nodes"]) == nodes


# -- from another machine ------------------------------------------------------------------------------------


@dataclass
class Elsewhere:
    """A machine of another address, which has the token and no state directory of the farm's."""

    url: str
    within: list[str]
    environ: dict[str, str]

    def run(self, *command, cwd=None):
        """Run a command there; its path begins with the name of a program of this environment."""
        return subprocess.run(
            [*self.within, Path(sys.executable).with_name(command[0]), *command[1:]],
            cwd=cwd,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture
def elsewhere(jobs, tmp_path):
    """A network namespace from which the farm's loopback is reached at its gateway, as through a forwarded port."""
    network = Network(number=60, count=1)
    token = tmp_path / "token"
    token.write_text(jobs.token_file.read_text())
    url = jobs.url.replace("127.0.0.1", network.gateway)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("LAZYFARM", "RAY"))}
    environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    environ |= {"RAY_API_SERVER_ADDRESS": url, "LAZYFARM_STATE_DIR": str(tmp_path / "none")}
    with network.up():
        yield Elsewhere(url, network.inside(0), environ)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

#: Reads a file that was sent along and a variable, and joins the farm; ends as it is told to.
TELLING = """
import os, sys
from pathlib import Path
from lazyfarm.blocking import Farm

with Farm.connect() as farm:
    print("told", len(farm.nodes()), Path("beside.txt").read_text(), os.environ["WORD"], sys.argv[1], flush=True)
if sys.argv[1] == "wait":
    import time
    time.sleep(600)
sys.exit(int(sys.argv[1]))
"""

#: What a program of Ray's own does there: submits, follows, asks, stops.
CLIENT = """
import sys, time
from ray.job_submission import JobSubmissionClient

client = JobSubmissionClient(sys.argv[1])
runtime_env = {"working_dir": ".", "env_vars": {"WORD": "client"}}
job = client.submit_job(entrypoint="python driver.py wait", runtime_env=runtime_env)
while "told" not in client.get_job_logs(job):
    assert not client.get_job_status(job).is_terminal(), client.get_job_logs(job)
    time.sleep(0.2)
print(client.get_job_logs(job))
assert client.stop_job(job)
while not client.get_job_status(job).is_terminal():
    time.sleep(0.2)
print("status", client.get_job_status(job).value)
"""


@pytest.mark.root
@needs_root
def test_jobs_come_from_another_machine(jobs, elsewhere, tmp_path):
    """Ray's command line, its client and `lazyfarm submit --address`: what is sent along, variables, exit codes, logs.

    No port of the farm's but the job server's is asked for, and nothing is read from a state directory.
    """
    directory = write_driver(tmp_path / "work", TELLING)
    (directory / "beside.txt").write_text("beside")

    environment = json.dumps({"env_vars": {"WORD": "ray"}})
    command = ["ray", "job", "submit", "--working-dir", ".", "--runtime-env-json", environment]
    failed = elsewhere.run(*command, "--", "python", "driver.py", "3", cwd=directory)
    assert failed.returncode == 1
    assert "told 3 beside ray 3" in failed.stdout
    assert "exit code 3" in failed.stdout

    (tmp_path / "client.py").write_text(CLIENT)
    stopped = elsewhere.run("python", str(tmp_path / "client.py"), elsewhere.url, cwd=directory)
    assert stopped.returncode == 0, stopped.stderr
    assert "told 3 beside client wait" in stopped.stdout
    assert stopped.stdout.splitlines()[-1] == "status STOPPED"

    short = ["lazyfarm", "submit", "--address", elsewhere.url, "--env", "WORD=short", "--json", "driver.py", "7"]
    told = elsewhere.run(*short, cwd=directory)
    assert told.returncode == 7, told.stderr
    document = read_document(("submit",), told.stdout)
    assert (document["status"], document["exit_code"]) == ("failed", 7)
    assert "told 3 beside short 7" in told.stderr
    assert jobs.details(document["job"])["driver_exit_code"] == 7
    assert not Path(elsewhere.environ["LAZYFARM_STATE_DIR"]).exists()

    wrong = tmp_path / "wrong"
    wrong.write_text("guessed")
    refused = elsewhere.run(*short[:4], "--token-file", str(wrong), *short[4:], cwd=directory)
    assert refused.returncode == 1
    error = read_document(("submit",), refused.stdout)["error"]
    assert (error["type"], "Authentication failed" in error["message"]) == ("InvalidArgumentError", True), error
