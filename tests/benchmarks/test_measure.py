"""How the benchmarks measure, with clocks and competitors whose times are known."""

import os
import time

import measure
import pytest
from allocations import MIB
from measure import Result, Row, interleaved, median_ratio, medians, peak_memory


def result(value: float = 1.0, target: str = "") -> Result:
    return Result("speed", value, "x", target, "8 x 128", 1, 5)


class TestTargets:
    @pytest.mark.parametrize(
        "target, below, at, above",
        [
            (">= 1.8", False, True, True),
            ("<= 1.8", True, True, False),
            ("< 1.8", True, False, False),
            ("> 1.8", False, False, True),
        ],
    )
    def test_comparisons(self, target, below, at, above):
        assert [result(value, target).is_met() for value in (1.79, 1.8, 1.81)] == [below, at, above]

    def test_numbers_in_any_notation(self):
        assert result(2e-7, "<= 1e-6").is_met()

    def test_without_a_target_nothing_is_met_or_missed(self):
        assert result().is_met() is None

    @pytest.mark.parametrize("target", ["1.8", "=> 1.8", ">=1.8", ">= fast", ">= "])
    def test_an_unreadable_target_is_refused_at_once(self, target):
        with pytest.raises(ValueError):
            result(target=target)


def test_a_result_says_how_to_get_it_again():
    assert result().command == "python benchmarks/run.py --only speed"


def test_a_row_is_described_by_its_function_or_by_name():
    def run():
        """Time of a step.

        More of it.
        """

    row = Row(("one", "two"), run, {"two": "memory of a step"})
    assert [row.description(name) for name in row.names] == ["Time of a step", "memory of a step"]


class TestInterleaved:
    def test_competitors_take_turns_and_warm_up_is_not_counted(self):
        calls = []
        competitors = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
        seconds = interleaved(competitors, pairs=2, warm_up=1)
        assert calls == ["a", "b"] * 3
        assert list(map(len, seconds.values())) == [2, 2]

    def test_seconds_are_those_of_the_clock(self):
        now = 0.0
        durations = iter([9, 9, 1, 2, 3, 4])

        def work():
            nonlocal now
            now += next(durations)

        assert interleaved({"a": work, "b": work}, pairs=2, clock=lambda: now) == {"a": [1, 3], "b": [2, 4]}

    def test_waiting_costs_no_cpu_time(self):
        assert interleaved({"sleeper": lambda: time.sleep(0.2)}, pairs=1, warm_up=0)["sleeper"][0] < 0.1


def test_medians():
    assert medians({"a": [5.0, 1.0, 3.0], "b": [4.0, 1.0]}) == {"a": 3.0, "b": 2.5}


def test_a_slow_spell_cancels_in_the_ratio():
    """Rounds of 2, 2 and 6 times, of which the second met a slow machine; the ratio of the medians would be 6."""
    assert median_ratio([2.0, 20.0, 6.0], [1.0, 10.0, 1.0]) == 2.0


def test_rounds_must_match():
    with pytest.raises(ValueError):
        median_ratio([1.0, 2.0], [1.0])


def test_the_peak_of_matrix_products_is_a_plausible_number():
    assert 1e8 < measure.gemm_peak(size=256, repeats=2) < 1e13


class TestPeakMemory:
    def test_a_known_allocation(self):
        assert peak_memory("allocations:prepare_allocation", mebibytes=64) == pytest.approx(64 * MIB, rel=0.05)

    @pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux can forget an earlier peak")
    def test_what_the_preparation_took_is_not_counted(self):
        peak = peak_memory("allocations:prepare_after_allocation", freed=128, kept=16, mebibytes=32)
        assert peak == pytest.approx(32 * MIB, rel=0.05)

    def test_a_failure_names_its_reason(self):
        with pytest.raises(RuntimeError, match="prepare_failure failed: ValueError: the work went wrong"):
            peak_memory("allocations:prepare_failure")


class TestWithoutProc:
    """As on macOS. In this process, whose highest level is whatever earlier tests took."""

    @pytest.fixture(autouse=True)
    def without_proc(self, monkeypatch, tmp_path):
        monkeypatch.setattr(measure, "PROC", tmp_path / "absent")

    def test_the_growth_of_the_highest_level_is_taken(self, monkeypatch):
        levels = iter([1000, 3000])
        monkeypatch.setattr(measure.sys, "platform", "darwin")
        monkeypatch.setattr(measure.resource, "getrusage", lambda who: type("Usage", (), {"ru_maxrss": next(levels)}))
        assert measure._measure_peak("allocations:prepare_allocation", {"mebibytes": 1}) == 2000

    def test_no_growth_is_an_error_and_not_zero(self, monkeypatch):
        monkeypatch.setattr(measure.resource, "getrusage", lambda who: type("Usage", (), {"ru_maxrss": 1000}))
        with pytest.raises(RuntimeError, match="run this row on Linux"):
            measure._measure_peak("allocations:prepare_allocation", {"mebibytes": 1})
