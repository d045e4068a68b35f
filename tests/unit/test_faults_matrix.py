"""The matrix of faults is whole: each cell is run for a promise, or left out for a reason; the page says all of it."""

from __future__ import annotations

from tests.faults.matrix import LEFT_OUT, Cell, Fault, Part, Situation, cells, every_cell
from tests.faults.report import Told, render


def test_every_cell_is_run_or_left_out_for_a_reason():
    """Run cells have a promise; a reason that no cell needs is none."""
    needed = set()
    for cell in every_cell():
        if cell.why_left_out:
            needed.add(cell.why_left_out)
        else:
            assert cell.promise
    assert needed == set(LEFT_OUT.values())
    assert len(set(map(str, cells()))) == len(cells())


def test_what_is_mandatory_is_run_by_every_run():
    """Every part killed, cut off and restarted while it pulls, takes over, runs an op and collects."""
    for part in Part:
        for fault in (Fault.KILLED, Fault.CUT_OFF, Fault.RESTARTED):
            for situation in (Situation.PULLING, Situation.TAKING_OVER, Situation.RUNNING, Situation.COLLECTING):
                cell = Cell(part, fault, situation)
                assert not cell.why_left_out
                assert not cell.is_long


def test_the_page_says_what_came_of_each_cell():
    """Promises, results and reasons: none is left out, and a broken one is counted."""
    results = dict.fromkeys(cells(), "kept")
    results[cells()[0]] = "**broken**"
    page = render(results, [Told("test_x", "test_y[a|b]", "It holds.", "kept")], date="2026-01-02", commit="abc")
    assert f"at abc, of 2026-01-02: {len(cells())} promises kept, 1 broken, 0 not run" in page
    assert "| `test_x` test_y[a\\|b] | It holds. | kept |" in page
    for cell in every_cell():
        assert (cell.why_left_out or f"- {cell.situation}: {cell.promise}") in page
