"""Progress bars: drawn over on a terminal, lines now and then in a log."""

import io
import sys
from types import SimpleNamespace

import pytest

from mixlm import progress
from mixlm.progress import progress_bar


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    monkeypatch.setattr(progress, "time", Clock())
    return progress.time


def go(seconds_per_turn: float, clock, **options) -> None:
    with progress_bar(total=10, desc="turning", delay=0, mininterval=0, **options) as bar:
        for _ in range(10):
            clock.now += seconds_per_turn
            bar.update()


def done_in(log: str) -> list[str]:
    return [line.split(" [")[0].split("| ")[1] for line in log.splitlines()]


def test_a_log_gets_a_line_every_half_minute_and_the_last(capsys, clock):
    go(7, clock)
    log = capsys.readouterr().err
    assert done_in(log) == ["5/10", "10/10"]
    assert "\r" not in log and log.endswith("\n")


def test_the_last_state_is_written_once(capsys, clock):
    go(30, clock)
    assert done_in(capsys.readouterr().err) == [f"{turn}/10" for turn in range(1, 11)]


def test_what_was_short_leaves_its_last_state_alone(capsys, clock):
    go(0.1, clock)
    assert done_in(capsys.readouterr().err) == ["10/10"]


def test_a_bar_that_does_not_stay_leaves_nothing_of_a_short_time(capsys, clock):
    go(0.1, clock, leave=False)
    assert capsys.readouterr().err == ""


def test_no_state_from_before_the_end_is_written_at_the_end(capsys, clock):
    with progress_bar(total=10, desc="turning", delay=0, mininterval=0) as bar:
        bar.update(9)
        clock.now += 29
        bar.update(1)
        clock.now += 1
    assert done_in(capsys.readouterr().err) == ["10/10"]


def test_the_last_line_has_what_was_said_of_the_last_turn(capsys, clock):
    with progress_bar(total=4, desc="turning", delay=0, mininterval=0) as bar:
        for turn in range(1, 5):
            clock.now += 40
            bar.set_postfix(loss=turn, refresh=False)
            bar.update()
    assert [line.rpartition("loss=")[2] for line in capsys.readouterr().err.splitlines()] == ["1]", "2]", "3]", "4]"]


def test_a_line_is_whole_where_what_is_done_breaks_off(capsys, clock):
    with pytest.raises(RuntimeError), progress_bar(total=10, desc="turning", delay=0, mininterval=0) as bar:
        bar.update(3)
        bar.write("beside")
        raise RuntimeError
    written = capsys.readouterr()
    assert done_in(written.err) == ["3/10"] and written.out == "beside\n"


def test_other_ranks_and_workers_show_nothing(capsys, clock, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    go(40, clock)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(progress, "_are_hidden", False)
    progress.hide_progress_bars()
    go(40, clock)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["none", "closed", "without isatty"])
def test_a_standard_error_that_is_no_stream_stops_nothing(clock, monkeypatch, kind):
    closed = io.StringIO()
    closed.close()
    stand_in = SimpleNamespace(write=lambda text: None, flush=lambda: None)
    monkeypatch.setattr(sys, "stderr", {"none": None, "closed": closed, "without isatty": stand_in}[kind])
    assert list(progress_bar(range(3))) == [0, 1, 2]


def test_bars_within_bars_write_whole_lines(capsys, clock):
    for _ in progress_bar(range(2), desc="outer", delay=0, mininterval=0):
        clock.now += 40
        go(7, clock, leave=False)
    assert done_in(capsys.readouterr().err) == ["5/10", "10/10", "1/2", "5/10", "10/10", "2/2"]


def test_nothing_is_shown_of_less_than_two_seconds(capsys):
    for _ in progress_bar(range(3), mininterval=0):
        pass
    assert capsys.readouterr().err == ""


def test_a_terminal_is_drawn_over(capsys, clock, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    go(0.1, clock)
    drawn = capsys.readouterr().err
    assert drawn.count("\r") > 10 and drawn.count("\n") == 1


def test_a_notebook_is_drawn_over(capsys, clock, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    go(0.1, clock)
    assert capsys.readouterr().err.count("\r") > 10
