"""`mixlm verify-engines` says of each engine whether it is right."""

import pytest

from mixlm.cli import main
from mixlm.errors import UserError
from mixlm.training import verification
from mixlm.training.verification import CASES, TOLERANCES, Case, Tolerance, Verdict, available_cases, verify_engines

NONE, FULL = CASES[0], Case(2, "torch", auto_wrap=False)


@pytest.mark.slow
def test_an_engine_that_trains_as_one_process_is_right_and_one_that_fails_says_why():
    said = []
    cases = [FULL._replace(muon=True), Case(3, "fairscale", auto_wrap=False, muon=True)]
    right, failed = verify_engines(cases, 2, "mixlm", ["fp32"], said.append)
    assert said == ["one process", "zero 2 torch", "zero 3 fairscale"]
    assert right.is_right and right.is_repeatable and right.differences is not None
    assert right.peak_bytes > 0 and right.samples_per_second > 0
    assert not failed.is_right
    assert "--muon=True: must be left out" in failed.failure


@pytest.mark.parametrize("precision", TOLERANCES)
def test_an_engine_is_right_within_every_tolerance_and_if_it_repeats(precision):
    allowed = TOLERANCES[precision]
    assert Verdict(FULL, precision, allowed, is_repeatable=True).is_right
    assert not Verdict(FULL, precision, allowed, is_repeatable=False).is_right
    assert not Verdict(FULL, precision, is_repeatable=True, failure="no end").is_right
    for name in Tolerance._fields:
        for beyond in (1.01 * getattr(allowed, name), float("nan")):
            assert not Verdict(FULL, precision, allowed._replace(**{name: beyond}), is_repeatable=True).is_right


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_muon_is_verified_with_the_engines_that_take_it(make_arguments, case):
    with_muon = case._replace(muon=True)
    if with_muon in available_cases(muon=True):
        assert make_arguments(**with_muon._asdict()).muon
    else:
        assert case.sharding_backend == "fairscale" and (case.zero == 3 or case.auto_wrap)
        with pytest.raises(UserError, match="--muon=True: must be left out"):
            make_arguments(**with_muon._asdict())


def test_without_fairscale_its_engines_are_left_out(monkeypatch):
    monkeypatch.setattr(verification.importlib.util, "find_spec", lambda name: None)
    assert {case.sharding_backend for case in [*available_cases(), *available_cases(muon=True)]} == {"torch"}


def test_a_wrong_engine_is_in_the_table_and_in_the_exit_code(monkeypatch, capsys):
    verdicts = [
        Verdict(NONE, "fp32", Tolerance(1e-7, 2e-7, 3e-5, 4e-7), True, 2**25, 41.0),
        Verdict(FULL, "fp32", Tolerance(1e-2, 2e-7, 3e-5, 4e-7), True, 2**24, 20.0),
        Verdict(FULL, "bf16", failure="exit code -9"),
    ]
    monkeypatch.setattr(verification, "verify_engines", lambda *arguments: iter(verdicts))
    with pytest.raises(SystemExit) as exit:
        main(["verify-engines"])
    assert exit.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == "zero 0 fp32 1e-07 2e-07 3e-05 4e-07 yes 32 41 right".split()
    assert lines[3].split() == "zero 2 torch fp32 1e-02 2e-07 3e-05 4e-07 yes 16 20 WRONG".split()
    assert lines[4].split() == "zero 2 torch bf16 FAILED: exit code -9".split()
    assert lines[5] == "1 of 3 are right"

    verdicts[1:] = []
    main(["verify-engines"])
    assert capsys.readouterr().out.endswith("1 of 1 are right\n")
