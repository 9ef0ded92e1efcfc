"""Runs that a signal or `--max_minutes` stops."""

import multiprocessing
import os
import signal
from functools import partial
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from small_runs import NotANumberAt, assert_same_checkpoint, checkpoint_names, curves_without_speed, signalled_at

from mixlm.errors import RunStopped, UserError
from mixlm.training import loop, stopping
from mixlm.training.precision import LossScale
from mixlm.training.report import read_curves


@pytest.mark.parametrize("precision", [{}, {"fp16": True}, {"bf16": True}], ids=["fp32", "fp16", "bf16"])
def test_a_run_in_pieces_of_a_step_equals_one_in_one_piece(
    make_arguments, run_training, checkpoint_folder, monkeypatch, precision
):
    # Overflows at first, and grows several times after that.
    monkeypatch.setattr(loop, "LossScale", partial(LossScale, initial=2.0**24, growth_interval=2))
    whole = make_arguments(model_name="whole", num_steps=5, **precision)
    run_training(whole)
    pieces = make_arguments(num_steps=5, resume="auto", max_minutes=1e-9, **precision)
    for step in range(1, 5):
        stopped = f"--max_minutes are over: stopped after step {step}; the last good checkpoint is "
        with pytest.raises(RunStopped) as caught:
            run_training(pieces)
        assert str(caught.value).startswith(f"{stopped}{checkpoint_folder(pieces, step)}: go on with --resume auto")
    run_training(pieces)
    assert_same_checkpoint(checkpoint_folder(pieces, 5), checkpoint_folder(whole, 5))
    found, expected = curves_without_speed(pieces.run_folder), curves_without_speed(whole.run_folder)
    assert found == expected and len(found["train/loss"]) == 5


def test_time_that_is_not_over_stops_nothing(make_arguments, run_training):
    arguments = make_arguments(num_steps=2, max_minutes=60)
    run_training(arguments)
    assert checkpoint_names(arguments.run_folder) == ["step-00000002"]


@pytest.fixture
def handlers():
    """What the signals do before and, whatever happens, after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("times", [1, 2])  # the second time as a launcher's echo
def test_a_signal_saves_stops_and_loses_nothing(
    make_arguments, run_training, checkpoint_folder, handlers, number, times
):
    whole = make_arguments(model_name="whole", num_steps=5)
    run_training(whole)
    with pytest.raises(RunStopped, match=f"^{number.name}: stopped after step 3; .*--resume auto"):
        run_training(make_arguments(num_steps=5), objective_class=signalled_at(3, *[number] * times))
    assert {each: signal.getsignal(each) for each in handlers} == handlers
    resumed = make_arguments(num_steps=5, resume="auto")
    assert checkpoint_names(resumed.run_folder) == ["step-00000003"]
    run_training(resumed)
    assert_same_checkpoint(checkpoint_folder(resumed, 5), checkpoint_folder(whole, 5))


def test_a_signal_during_an_evaluation_stops_after_the_next_step(make_arguments, run_training, handlers):
    def evaluate(engine):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    arguments = make_arguments(eval_steps=2)
    with pytest.raises(RunStopped, match="^SIGTERM: stopped after step 3"):
        run_training(arguments, evaluate=evaluate)
    assert checkpoint_names(arguments.run_folder) == ["step-00000003"]


def test_a_signal_in_the_last_step_stops_nothing(make_arguments, run_training, handlers):
    arguments = make_arguments(num_steps=2, eval_steps=1)
    run_training(arguments, objective_class=signalled_at(2, signal.SIGTERM))
    assert [step for step, _ in read_curves(arguments.run_folder)["eval/parameters"]] == [1, 2]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_signals_do_what_they_did_before_after_an_error_too(make_arguments, run_training, handlers):
    with pytest.raises(UserError):
        run_training(make_arguments(), objective_class=NotANumberAt)
    assert {each: signal.getsignal(each) for each in handlers} == handlers


@pytest.mark.parametrize(
    ("seconds", "second", "expected"),
    [
        (stopping.ECHO_SECONDS + 0.1, signal.SIGTERM, 128 + signal.SIGTERM),
        (stopping.ECHO_SECONDS + 0.1, signal.SIGINT, 128 + signal.SIGINT),
        (stopping.ECHO_SECONDS - 0.1, signal.SIGTERM, 0),
    ],
)
def test_a_second_signal_ends_the_process_unless_it_is_an_echo(seconds, second, expected):
    accelerator = Accelerator(cpu=True)

    def receive_two():
        now = 100.0
        stopping.time = SimpleNamespace(monotonic=lambda: now)
        with stopping.StopRequest(None, accelerator) as request:
            os.kill(os.getpid(), signal.SIGTERM)
            now += seconds
            os.kill(os.getpid(), second)
            os._exit(0 if request.reason() == "SIGTERM" else 1)

    process = multiprocessing.get_context("fork").Process(target=receive_two)
    process.start()
    process.join(60)
    assert process.exitcode == expected
