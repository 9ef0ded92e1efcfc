"""Steps of a run: what they depend on, and what is evaluated and logged between them."""

import json
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from small_runs import NotANumberAt, assert_same_checkpoint, checkpoint_names

from mixlm.errors import UserError
from mixlm.progress import progress_bar
from mixlm.training import loop
from mixlm.training.checkpoint import checkpoints_in, load_checkpoint
from mixlm.training.objectives import InverseClozeObjective
from mixlm.training.optimization import learning_rate_factor
from mixlm.training.report import read_curves
from mixlm.training.tracking import Progress


def test_a_run_is_repeatable_and_its_seed_matters(make_arguments, run_training, checkpoint_folder):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = make_arguments(model_name=name, seed=seed, num_steps=2)
        run_training(arguments)
        weights.append((checkpoint_folder(arguments, 2) / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_dropout_is_another_one_for_each_seed_step_and_rank():
    def drawn(seed, step, rank):
        loop._seed_dropout(seed, step, rank)
        return tuple(torch.rand(3).tolist())

    with torch.random.fork_rng():
        of_each = [drawn(*each) for each in product(range(3), repeat=3)]
        again = [drawn(*each) for each in product(range(3), repeat=3)]
    assert len(set(of_each)) == 27 and again == of_each


def test_workers_change_nothing(make_arguments, run_training, checkpoint_folder):
    weights = []
    for workers in (0, 2):
        arguments = make_arguments(model_name=f"workers-{workers}", num_steps=3, num_workers=workers)
        run_training(arguments)
        weights.append((checkpoint_folder(arguments, 3) / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("task", ["SOP", "ICT"])
def test_accumulation_changes_nothing(make_arguments, run_training, checkpoint_folder, task):
    """Without dropout, 1 x 8 and 2 x 4 rows are the same run."""
    models = []
    for micro_batches in (1, 2):
        arguments = make_arguments(model_name=f"x{micro_batches}", gradient_accumulation_steps=micro_batches)
        models.append(run_training(arguments, task, dropout_prob=0.0))
    for (name, one), (_, two) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        if "key" not in name or "bias" not in name:  # their gradient is rounding alone
            torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_zero_on_one_process_says_so_and_trains_as_zero_0(make_arguments, run_training, checkpoint_folder, capsys):
    plain, sharded = make_arguments(num_steps=2), make_arguments(model_name="sharded", num_steps=2, zero=3)
    run_training(plain)
    assert "--zero" not in capsys.readouterr().out
    run_training(sharded)
    assert "--zero 3: one process has nothing to share out; as --zero 0\n" in capsys.readouterr().out
    assert_same_checkpoint(checkpoint_folder(sharded, 2), checkpoint_folder(plain, 2))


def test_the_learning_rate_follows_the_schedule(make_arguments, run_training):
    arguments = make_arguments(num_steps=6, warmup_steps=2, scheduler_num_steps=9, decay_ratio=0.5)
    run_training(arguments)
    curve = read_curves(arguments.run_folder)["train/lr"]
    expected = [3e-3 * learning_rate_factor(step, 2, 9, 0.5) for step in range(6)]
    assert [step for step, _ in curve] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in curve] == pytest.approx(expected)


def test_zero_max_grad_norm_never_clips(make_arguments, run_training, checkpoint_folder):
    weights = []
    for name, largest in (("never", 0.0), ("huge", 1e9), ("small", 1e-3)):
        arguments = make_arguments(model_name=name, num_steps=2, max_grad_norm=largest, weight_decay=0.5)
        run_training(arguments)
        weights.append((checkpoint_folder(arguments, 2) / "optimizer.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_max_steps_per_epoch_too_large_names_the_largest(make_arguments, run_training):
    with pytest.raises(UserError, match="use at most 4"):  # 37 rows, 8 to a step
        run_training(make_arguments(max_steps_per_epoch=5))
    run_training(make_arguments(num_steps=5, max_steps_per_epoch=4))


def test_max_steps_per_epoch_ends_the_epoch(make_arguments, run_training, checkpoint_folder):
    arguments = make_arguments(num_steps=5, max_steps_per_epoch=3, save_steps=3)
    run_training(arguments)
    positions = [
        json.loads((checkpoint_folder(arguments, step) / "state.json").read_text())["position"] for step in (3, 5)
    ]
    assert positions[0] == {"epoch": 1, "window": 0, "batch": 0, "step_in_epoch": 0}
    assert (positions[1]["epoch"], positions[1]["step_in_epoch"]) == (1, 2)


def test_saving_evaluating_and_logging_happen_when_they_are_due(make_arguments, run_training):
    arguments = make_arguments(num_steps=7, save_steps=2, save_total_limit=3, eval_steps=3, logging_steps=2)
    run_training(arguments)
    assert checkpoint_names(arguments.run_folder) == ["step-00000004", "step-00000006", "step-00000007"]
    curves = read_curves(arguments.run_folder)
    assert [step for step, _ in curves["train/loss"]] == [2, 4, 6, 7]
    assert [step for step, _ in curves["eval/parameters"]] == [3, 6, 7]


def test_zero_means_only_at_the_end(make_arguments, run_training):
    arguments = make_arguments(num_steps=3, save_steps=0, eval_steps=0)
    run_training(arguments)
    assert checkpoint_names(arguments.run_folder) == ["step-00000003"]
    assert [step for step, _ in read_curves(arguments.run_folder)["eval/parameters"]] == [3]


def test_evaluation_is_in_evaluation_mode_and_training_goes_on_in_training_mode(make_arguments, run_training):
    modes = []

    def evaluate(engine):
        modes.append(engine.module.training)
        return {}

    model = run_training(make_arguments(num_steps=2, eval_steps=1), evaluate=evaluate)
    assert modes == [False, False] and model.training


def test_a_curve_is_the_mean_since_the_last_point(make_arguments, run_training):
    """All tokens of all steps between two points weigh the same: not a mean of means."""
    each = make_arguments(model_name="each", num_steps=4, logging_steps=1)
    run_training(each, dropout_prob=0.0)
    all_four = make_arguments(model_name="all", num_steps=4, logging_steps=4)
    run_training(all_four, dropout_prob=0.0)
    single = [value for _, value in read_curves(each.run_folder)["train/mlm_loss"]]
    ((step, mean),) = read_curves(all_four.run_folder)["train/mlm_loss"]
    assert step == 4 and min(single) < mean < max(single)
    assert mean == pytest.approx(sum(single) / 4, rel=0.05)


def test_the_speed_is_of_the_real_tokens_of_queries_and_contexts(make_arguments, run_training, monkeypatch):
    counted, given, add = [], [], Progress.add

    def add_and_count(progress, terms, tokens):
        counted.append(tokens)
        add(progress, terms, tokens)

    class Watching(InverseClozeObjective):
        def loss(self, batch, number, step):
            texts = (batch["input_ids"], batch["context_input_ids"])
            given.append(sum(int((ids != 0).sum()) for ids in texts))  # 0 is padding
            return super().loss(batch, number, step)

    monkeypatch.setattr(Progress, "add", add_and_count)
    run_training(make_arguments(num_steps=2), "ICT", objective_class=Watching)
    assert counted == given and len(given) == 4


def test_the_last_line_of_a_log_has_the_last_loss(make_arguments, run_training, capsys, monkeypatch):
    """Also where its line is due in the middle of that step, as with steps of half a minute."""
    clock = SimpleNamespace(now=0.0)
    step_of_bar = Progress.step

    def step_later(progress: Progress) -> None:
        clock.now += 40
        step_of_bar(progress)

    monkeypatch.setattr("mixlm.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr("mixlm.training.tracking.progress_bar", partial(progress_bar, mininterval=0))
    monkeypatch.setattr(Progress, "step", step_later)
    arguments = make_arguments(num_steps=3, logging_steps=1)
    run_training(arguments)
    last = capsys.readouterr().err.splitlines()[-1]
    _, (step, loss) = read_curves(arguments.run_folder)["train/loss"][-2:]
    assert step == 3 and "3/3" in last and f"loss={loss:.3f}, " in last


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_checkpoint(
    make_arguments, run_training, make_model, capfd
):
    arguments = make_arguments(num_steps=8, save_steps=3)
    with pytest.raises(UserError) as caught:
        run_training(arguments, objective_class=NotANumberAt)
    message = str(caught.value)
    assert message.startswith("step 4: ") and "\n" not in message
    assert str(arguments.run_folder / "checkpoints") in message and "--learning_rate" in message
    assert capfd.readouterr().err.endswith("\n")  # the progress bar has ended: the error gets its own line
    assert checkpoint_names(arguments.run_folder) == ["step-00000003"]
    model = make_model(dropout_prob=0.2)
    state, _, _ = load_checkpoint(checkpoints_in(arguments.run_folder / "checkpoints")[0], model)
    assert state.step == 3
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    run_training(make_arguments(num_steps=5, resume="auto"))
    assert checkpoint_names(arguments.run_folder)[-1] == "step-00000005"


def test_a_loss_that_is_not_a_number_before_the_first_checkpoint(make_arguments, run_training):
    class AtOnce(NotANumberAt):
        step = 1

    arguments = make_arguments(num_steps=3, save_steps=1)
    # There is no checkpoint to send the user to.
    message = "^step 1: .* no checkpoint was written yet: start again with --overwrite_output_dir"
    with pytest.raises(UserError, match=message):
        run_training(arguments, objective_class=AtOnce)
    assert checkpoint_names(arguments.run_folder) == []
    with pytest.raises(UserError, match="an earlier run is there; choose another --model_name"):
        run_training(make_arguments())
