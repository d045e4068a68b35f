"""What is seen of a build, from recorded events: lines, documents, and frames of any size."""

from __future__ import annotations

import io
import json
import re

import pytest
import typer
from rich.console import Console

from cluster import wire
from cluster.digest import digest_of
from cluster.errors import ManifestNotFoundError, ProcessFailedError
from cluster.job import (
    JobEnded,
    JobState,
    LogStream,
    VertexEvent,
    VertexLayers,
    VertexLog,
    VertexLogDropped,
    VertexState,
)
from cluster.progress import LayerPhase, ProgressItem
from lazyfarm.cli.human import short
from lazyfarm.cli.job_frame import JobFrame, StoreTime
from lazyfarm.cli.job_progress import JsonProgress, LiveProgress, PlainProgress, check_mode, showing
from lazyfarm.cli.job_view import JobView, at
from lazyfarm.cli.layers import watching
from lazyfarm.cli.output import Output
from lazyfarm.cli.terminal import visible

MIB = 1 << 20
T = 1_700_000_000.0
IMAGE, APT, MAKE = "image debian:12", "[build] RUN apt-get install -y gcc", "[build] RUN make"
BIG, SMALL = digest_of(b"big"), digest_of(b"small")
FAILED = wire.encode_error(ProcessFailedError(("make",), 2, ("main.c: error",)))


def step(at_s, name, state, error=b""):
    return VertexEvent(vertex=digest_of(name.encode()), name=name, state=state, error=error, wall_s=T + at_s)


def log(at_s, name, text, stream=LogStream.STDOUT):
    return VertexLog(vertex=digest_of(name.encode()), stream=stream, text=text, wall_s=T + at_s)


def layer(at_s, item, phase, current=0, total=0, *, name=IMAGE, detail=""):
    moved = ProgressItem(item=item, phase=phase, current_bytes=current * MIB, total_bytes=total * MIB, detail=detail)
    return VertexLayers(vertex=digest_of(name.encode()), item=moved, wall_s=T + at_s)


def end(at_s, state=JobState.DONE, error=b""):
    return JobEnded(state=state, error=error, wall_s=T + at_s)


#: An image is found, its layers come and are extracted on two nodes while a command waits; then it runs.
BUILD = [
    step(0.0, MAKE, VertexState.WAITING),
    step(0.0, APT, VertexState.WAITING),
    step(0.1, IMAGE, VertexState.RUNNING),
    step(0.3, IMAGE, VertexState.COMPLETED),
    layer(0.4, f"fetch:{BIG}", LayerPhase.WAITING, 0, 48),
    layer(0.4, f"fetch:{SMALL}", LayerPhase.PRESENT, 0, 3),
    layer(0.5, f"fetch:{BIG}", LayerPhase.FETCHING, 12, 48),
    layer(0.6, f"fetch:{BIG}", LayerPhase.FETCHING, 13, 48),
    layer(1.4, f"fetch:{BIG}", LayerPhase.DONE, 48, 48),
    layer(1.5, f"extract:n0:{BIG}", LayerPhase.EXTRACTING, 12, 48),
    layer(1.5, f"extract:n1:{BIG}", LayerPhase.EXTRACTING, 24, 48),
    layer(2.0, f"extract:n0:{BIG}", LayerPhase.DONE, 48, 48),
    layer(2.1, f"extract:n1:{BIG}", LayerPhase.DONE, 48, 48),
    step(2.2, APT, VertexState.RUNNING),
    log(2.55, APT, "Setting up gc"),
    log(2.75, APT, "c\nhalf"),
    step(3.2, APT, VertexState.COMPLETED),
    step(3.3, MAKE, VertexState.RUNNING),
    log(3.4, MAKE, "gcc -c main.c\n"),
    log(3.5, MAKE, "main.c: error\n", LogStream.STDERR),
    step(4.0, MAKE, VertexState.FAILED, FAILED),
    end(4.0, JobState.FAILED, FAILED),
]


def plain(events):
    told = io.StringIO()
    progress = PlainProgress(told)
    for event in events:
        progress(event)
    progress.close()
    return told.getvalue().splitlines()


def frame(events, *, width=80, height=24, now_s=None, is_final=False):
    """Return the lines of the frame that is drawn *now_s* seconds into the build, the last event's time for None."""
    clock = [T]
    drawn = JobFrame(lambda: clock[0])
    for event in events:
        clock[0] = event.wall_s
        drawn.handle(event)
    clock[0] = clock[0] if now_s is None else T + now_s
    if is_final:
        drawn.finish()
    console = Console(width=width, height=height, file=io.StringIO(), record=True, highlight=False)
    console.print(drawn, height=height)
    return [line.rstrip() for line in console.export_text().splitlines()]


def until(at_s):
    return [event for event in BUILD if event.wall_s <= T + at_s]


# -- lines ---------------------------------------------------------------------------------------


def test_plain_tells_of_each_vertex_under_its_number():
    """In BuildKit's form: name, layers, lines with their time, and how it ended; numbers in order of appearance."""
    assert plain(BUILD) == [
        "#1 image debian:12",
        "#1 DONE 0.2s",
        f"#1 {short(BIG)} 12.0 MiB / 48.0 MiB 0.1s",
        f"#1 {short(BIG)} 48.0 MiB done 1.0s",
        f"#1 extracting {short(BIG)} on n0 12.0 MiB / 48.0 MiB 0.0s",
        f"#1 extracting {short(BIG)} on n1 24.0 MiB / 48.0 MiB 0.0s",
        f"#1 extracting {short(BIG)} on n0 48.0 MiB done 0.5s",
        f"#1 extracting {short(BIG)} on n1 48.0 MiB done 0.6s",
        "",
        f"#2 {APT}",
        "#2 0.350 Setting up gcc",
        "#2 0.550 half",
        "#2 DONE 1.0s",
        "",
        f"#3 {MAKE}",
        "#3 0.100 gcc -c main.c",
        "#3 0.200 main.c: error",
        "#3 ERROR: 'make' ended with exit code 2",
        "------",
        f" > {MAKE}:",
        "0.100 gcc -c main.c",
        "0.200 main.c: error",
        "------",
    ]


def test_who_only_waited_is_not_listed():
    """Neither while it waits, nor when the job is cancelled before it ran."""
    events = [
        step(0, APT, VertexState.WAITING),
        step(0, MAKE, VertexState.WAITING),
        step(1, APT, VertexState.RUNNING),
        step(2, APT, VertexState.CANCELLED),
        step(2, MAKE, VertexState.CANCELLED),
        end(2, JobState.CANCELLED),
    ]
    assert plain(events[:2]) == []
    assert plain(events) == [f"#1 {APT}", "#1 CANCELED"]
    assert frame(events[:2]) == ["[+] Building 0.0s (0/2)"]
    assert frame(events, is_final=True) == [
        "[+] Building 2.0s (0/2) CANCELED",
        f" => CANCELED {APT}".ljust(74) + " 1.0s",
    ]


def test_a_cached_vertex_is_two_lines():
    """Its name, and that it is cached; no time was spent."""
    assert plain([step(0, APT, VertexState.CACHED), end(0)]) == [f"#1 {APT}", "#1 CACHED"]


def test_events_that_are_there_twice_are_told_once():
    """A publisher whose connection dropped, or a scheduler that took the job over, says again what is known."""
    done = step(1, APT, VertexState.COMPLETED)
    again = [done, step(2, APT, VertexState.WAITING), step(3, APT, VertexState.CACHED)]
    assert plain([step(0, APT, VertexState.RUNNING), done, *again, end(4)]) == [f"#1 {APT}", "#1 DONE 1.0s"]


def test_what_runs_again_is_told_again():
    """Its result was lost: it is running, whatever it was before."""
    events = [
        step(0, APT, VertexState.CACHED),
        step(1, APT, VertexState.RUNNING),
        step(3, APT, VertexState.COMPLETED),
    ]
    assert plain(events) == [f"#1 {APT}", "#1 CACHED", "#1 DONE 2.0s"]


def test_the_streams_of_a_command_are_joined_each_by_itself():
    """Half a line of one stream is not continued by the other's."""
    events = [
        step(0, APT, VertexState.RUNNING),
        log(1, APT, "out "),
        log(2, APT, "err\r\n", LogStream.STDERR),
        log(3, APT, "more\n"),
    ]
    assert plain(events)[1:] == ["#1 2.000 err", "#1 1.000 out more"]


def test_a_line_without_an_end_does_not_grow_for_ever():
    """It is cut: what a command prints may have no newline at all."""
    events = [step(0, APT, VertexState.RUNNING), *(log(1, APT, "x" * 10_000) for _ in range(10))]
    lines = plain(events)[1:]
    assert len(lines) == 2
    assert sum(line.count("x") for line in lines) == 100_000


def test_missing_lines_are_told():
    """A log that was cut says so where it was cut."""
    events = [
        step(0, APT, VertexState.RUNNING),
        log(1, APT, "half"),
        VertexLogDropped(vertex=digest_of(APT.encode()), wall_s=T + 2),
        step(3, APT, VertexState.COMPLETED),
    ]
    assert plain(events)[1:] == [
        "#1 1.000 half",
        "#1 [the job has said more than is kept: lines are missing from here on]",
        "#1 DONE 3.0s",
    ]


def test_the_last_lines_come_from_the_error_where_the_log_has_none():
    """The log of a job that said too much stops before the failure."""
    events = [step(0, MAKE, VertexState.RUNNING), step(1, MAKE, VertexState.FAILED, FAILED), end(1, JobState.FAILED)]
    assert plain(events)[2:] == ["------", f" > {MAKE}:", "main.c: error", "------"]


@pytest.mark.parametrize("error", [b"", b"\xc1garbage"])
def test_an_error_that_cannot_be_read_is_an_error_all_the_same(error):
    """Another release wrote it, or nobody did."""
    assert plain([step(0, MAKE, VertexState.FAILED, error)])[1].startswith("#1 ERROR: ")


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.35, "0.350"), (12.345, "12.35"), (123.45, "123.5"), (12345.6, "12345.6")]
)
def test_moments_have_four_digits(seconds, told):
    """As in BuildKit's logs, so that columns hold for as long as they can."""
    assert at(seconds) == told


# -- documents -----------------------------------------------------------------------------------


def test_json_is_one_object_a_line():
    """Every event, nothing else, with the keys that docs/progress.md has."""
    told = io.StringIO()
    progress = JsonProgress(told)
    for event in BUILD:
        progress(event)
    progress.close()
    documents = [json.loads(line) for line in told.getvalue().splitlines()]
    assert len(documents) == len(BUILD)
    assert {document["event"]: document.keys() for document in documents} == {
        "vertex": {"event", "vertex", "name", "state", "failure", "time"},
        "log": {"event", "vertex", "stream", "text", "time"},
        "layer": {"event", "vertex", "work", "digest", "node", "phase", "current", "total", "time"},
        "end": {"event", "state", "failure", "time"},
    }
    assert documents[-1]["failure"] == {
        "type": "ProcessFailedError",
        "message": "'make' ended with exit code 2",
        "hint": ProcessFailedError((), 2, ()).hint,
    }
    assert (documents[0]["state"], documents[0]["time"]) == ("waiting", T)
    assert "failure" not in documents[0]


def test_json_tells_what_went_wrong_with_a_layer():
    """And that lines are missing."""
    told = io.StringIO()
    progress = JsonProgress(told)
    progress(layer(1, f"fetch:{BIG}", LayerPhase.FAILED, detail="gone"))
    progress(VertexLogDropped(vertex=BIG, wall_s=T))
    first, second = (json.loads(line) for line in told.getvalue().splitlines())
    assert (first["work"], first["digest"], first["detail"]) == ("fetch", BIG, "gone")
    assert second == {"event": "log-dropped", "vertex": BIG, "time": T}


# -- frames --------------------------------------------------------------------------------------


def test_layers_show_under_the_vertex_that_owns_the_image():
    """It was found long ago; it is busy all the same, and who waits for its layers is not running."""
    assert frame(until(0.6)) == [
        "[+] Building 0.6s (1/3)",
        " => image debian:12                                                        0.4s",
        f" => => {short(BIG)}          ━━━━──────────── 13.0/48.0 MiB         0.2s",
    ]


def test_an_extract_on_several_nodes_is_one_bar():
    """Nobody wants forty bars for forty nodes; the bytes are those of all of them."""
    _, _, bar = frame(until(1.5))
    assert bar.startswith(f" => => extract {short(BIG)[7:]} 2 nodes ━━━━━━")
    assert "36.0/96.0 MiB" in bar


def test_what_is_done_is_one_line_and_what_moved():
    """Layers that were there all along are not worth a word."""
    assert frame(until(2.1))[1:] == [
        " => image debian:12                                                        1.8s",
        " => => 1 layer fetched (48.0 MiB), 1 layer extracted",
    ]


def test_a_running_command_shows_its_last_lines():
    """As a terminal would have left them, without what would disturb the frame."""
    events = [step(0, APT, VertexState.RUNNING)]
    events += [log(1, APT, f"line {number}\n") for number in range(20)]
    events += [log(1, APT, "\x1b]0;title\x07 1%\r 50%\r\x1b[31m100%\x1b[0m\tdone\a\r\n"), log(1, APT, "half")]
    lines = frame(events)[2:]
    assert lines[:-1] == [f" => => # line {number}" for number in range(15, 20)]
    assert lines[-1] == " => => # 100%    done"


def test_time_passes_while_nothing_is_heard():
    """The seconds of what runs go on, by the clock of this machine."""
    assert frame(until(2.2), now_s=65.0)[0] == "[+] Building 65.0s (1/3)"
    assert frame(until(2.2), now_s=65.0)[-1].endswith(" 62.8s")


def test_the_last_frame_is_whole():
    """However high the terminal; it says how the job ended."""
    lines = frame(BUILD, height=4, is_final=True)
    assert lines[0] == "[+] Building 4.0s (2/3) FAILED"
    assert [line.split("  ")[0].strip() for line in lines[1:]] == [
        "=> image debian:12",
        "=> => 1 layer fetched (48.0 MiB), 1 layer extracted",
        f"=> {APT}",
        f"=> ERROR {MAKE}",
    ]


def test_who_failed_without_a_word_says_why():
    """There are no lines to repeat: the error stands where it happened."""
    error = wire.encode_error(ManifestNotFoundError("debian:nosuch"))
    lines = frame(
        [step(0, IMAGE, VertexState.RUNNING), step(1, IMAGE, VertexState.FAILED, error), end(1, JobState.FAILED)]
    )
    assert lines[-1] == " => => debian:nosuch is not in its registry"


@pytest.mark.parametrize("height", [3, 4, 6, 10, 24, 60])
@pytest.mark.parametrize("width", [1, 10, 40, 80, 200])
def test_a_frame_fits_its_terminal(width, height):
    """No line is longer, no frame higher, whatever is going on; what runs comes before what is done."""
    events = [step(0, f"done {number}", VertexState.COMPLETED) for number in range(40)]
    for number in range(12):
        name = f"[stage-{number}] RUN 构建 everything there is to build with a very long command line, truly"
        events += [step(1, name, VertexState.RUNNING), *(log(2, name, "行" * 60 + "\n") for _ in range(8))]
        events += [layer(2, f"fetch:{digest_of(bytes([at]))}", LayerPhase.FETCHING, 1, 2, name=name) for at in range(9)]
    console = Console(width=width, height=height, file=io.StringIO())
    drawn = JobFrame(lambda: T + 3)
    for event in events:
        drawn.handle(event)
    lines = console.render_lines(drawn, console.options.update(height=None), pad=False)
    assert len(lines) <= max(height - 1, 3)
    for line in lines:
        assert sum(segment.cell_length for segment in line) <= max(width - 1, 1)
    if width == 80 and height == 24:
        texts = ["".join(segment.text for segment in line) for line in lines]
        assert sum("[stage-" in text for text in texts) == 12
        assert "done 39" in texts[1] or any("done 39" in text for text in texts)


def test_old_steps_make_room_and_are_counted():
    """The newest of what is done stays in sight."""
    events = [step(number, f"step {number}", VertexState.COMPLETED) for number in range(10)]
    events.append(step(10, APT, VertexState.RUNNING))
    lines = frame(events, height=7)
    assert len(lines) == 6
    assert lines[1] == " => … 7 steps before that"
    assert [line.split("  ")[0] for line in lines[2:]] == [" => step 7", " => step 8", " => step 9", f" => {APT}"]


def test_many_layers_are_counted_too():
    """Those that move come first."""
    items = [f"fetch:{digest_of(bytes([number]))}" for number in range(12)]
    events = [layer(0, item, LayerPhase.WAITING, 0, 5) for item in items]
    events.append(layer(1, items[11], LayerPhase.FETCHING, 1, 5))
    lines = frame(events)
    assert short(items[11][6:]) in lines[2]
    assert lines[-1] == " => => and 4 more layers"


# -- the store's clock ----------------------------------------------------------------------------


def test_a_replay_is_as_old_as_it_is():
    """Who comes late sees for how long a step has been running, not since when they look."""
    clock = [T + 100.0]
    time = StoreTime(lambda: clock[0])
    time.hear(T)
    assert time.now_wall_s() == T + 100.0


@pytest.mark.parametrize("ahead_s", [-3600.0, 3600.0])
def test_a_clock_that_is_wrong_is_noticed(ahead_s):
    """What comes live tells what time it is there."""
    clock = [T + ahead_s]
    time = StoreTime(lambda: clock[0])
    for seconds in range(5):
        clock[0] = T + ahead_s + seconds
        time.hear(T + seconds)
    assert time.now_wall_s() == T + 4


# -- where it goes -------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def output(*, as_json=False, stdout=None):
    out = Output(as_json=as_json)
    out.stdout, out.stderr = stdout or io.StringIO(), io.StringIO()
    return out


def test_auto_is_lines_where_there_is_no_terminal():
    """And a frame where there is one."""
    for stdout, begins in ((io.StringIO(), "#1 "), (Terminal(), "\x1b")):
        out = output(stdout=stdout)
        with showing(out, "auto") as watch:
            for event in BUILD:
                watch(event)
        assert out.stdout.getvalue().startswith(begins)
        assert out.stderr.getvalue() == ""


def test_with_json_nothing_but_the_document_is_on_stdout():
    """Progress is for who asks for it, and then on stderr."""
    out = output(as_json=True)
    with showing(out, "auto") as watch:
        assert watch is None
    with showing(out, "plain") as watch:
        watch(step(0, APT, VertexState.CACHED))
    assert out.stdout.getvalue() == ""
    assert out.stderr.getvalue() == f"#1 {APT}\n#1 CACHED\n"


def test_a_frame_without_a_terminal_is_the_last_one():
    """There is nothing to redraw on; the failed step's lines come below it."""
    out = output()
    with showing(out, "tty") as watch:
        for event in BUILD:
            watch(event)
    lines = out.stdout.getvalue().splitlines()
    assert lines[0].rstrip() == "[+] Building 4.0s (2/3) FAILED"
    assert lines[-5:] == ["------", f" > {MAKE}:", "0.100 gcc -c main.c", "0.200 main.c: error", "------"]


#: A foreground or background colour, of 16, 256 or all: not bold, dim or a move of the cursor.
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[0-9;]*m")


@pytest.mark.parametrize("is_wanted", [True, False], ids=["colours", "NO_COLOR"])
def test_a_terminal_has_colours_unless_nobody_wants_them(is_wanted, monkeypatch):
    """`NO_COLOR` holds for the display of a build and for bars of layers; both still redraw themselves."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not is_wanted:
        monkeypatch.setenv("NO_COLOR", "1")
    build, layers = output(stdout=Terminal()), output(stdout=Terminal())
    with showing(build, "auto") as watch:
        for event in BUILD:
            watch(event)
    with watching(layers) as watch:
        watch(ProgressItem(item="fetch:sha256:aa", phase=LayerPhase.FAILED, current_bytes=5, total_bytes=10))
    for out in (build, layers):
        shown = out.stdout.getvalue()
        assert "\x1b[" in shown
        assert bool(COLOUR.search(shown)) == is_wanted, shown


def test_a_display_that_is_left_early_ends_tidily():
    """Ctrl-C: what ran still stands there, the cursor is back, and nobody is told of a failure."""
    terminal = Terminal()
    progress = LiveProgress(terminal)
    for event in until(2.3):
        progress(event)
    progress.close()
    assert f"=> {APT}" in terminal.getvalue()
    assert "------" not in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[?25h")


@pytest.mark.parametrize(("mode", "as_json"), [("fancy", False), ("json", True)])
def test_a_mode_that_cannot_be_is_wrong_usage(mode, as_json):
    """Before anything is done."""
    with pytest.raises(typer.BadParameter):
        check_mode(mode, as_json=as_json)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("plain ü", "plain ü"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]8;;http://x\x1b\\link", "link"),
        ("a\rb\r", "b"),
        ("\x9b", ""),
        ("\x1b(B", ""),
        ("a\x1b[2", "a"),
        ("\x1b\x1b(B[2J", "[2J"),
        ("a\tb", "a\tb"),
    ],
)
def test_lines_cannot_disturb_the_frame(line, shown):
    """Colours, cursor movements and titles are left out; what is left makes no other one."""
    assert visible(line) == shown


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("\x1b[1;31mred", "\x1b[1;31mred\x1b[0m"),
        ("\x1b[2J\x1b[31m 1%\r\x1b[32m100%\x1b[0m", "\x1b[32m100%\x1b[0m"),
        ("\x1b[\x1b(B31mno colour", "31mno colour"),
        ("\x9b31m", ""),
    ],
)
def test_colours_may_be_kept_and_nothing_else(line, shown):
    """They end with their line, whatever the command meant."""
    assert visible(line, colours=True) == shown


def test_a_view_counts_what_has_its_result():
    """Cached and completed; failed and cancelled have none."""
    view = JobView()
    for event in BUILD:
        view.handle(event)
    assert (view.done, len(view.vertices), view.failed.name) == (2, 3, MAKE)
