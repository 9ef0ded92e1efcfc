"""Runs that go on from a checkpoint: from which one, and to the same end."""

import dataclasses
import shutil

import pytest
import small_runs
import torch
from accelerate import Accelerator
from small_runs import NotANumberAt, assert_same_checkpoint, checkpoint_names, curves_without_speed

from mixlm.errors import UserError
from mixlm.training.arguments import PretrainingArguments
from mixlm.training.checkpoint import read_state
from mixlm.training.loop import changed_arguments, order_has_changed
from mixlm.training.reading import ReadingArguments
from mixlm.training.retrieval import RetrievalArguments
from mixlm.training.run import choose_checkpoint, prepare_run


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("mixlm", "SOP"),
        ("switch", "ICT"),
        pytest.param("mixlm", "ICT", marks=pytest.mark.slow),
        pytest.param("switch", "SOP", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_one_without_interruption(make_arguments, run_training, checkpoint_folder, family, task):
    """11 steps of 8 of 37 rows: epochs of 4 steps, windows of 2; the break is within a window."""
    settings = {"scheduler_num_steps": 20, "warmup_steps": 2, "save_steps": 7, "eval_steps": 4}
    whole = make_arguments(model_name="whole", num_steps=11, **settings)
    run_training(whole, task, family=family)
    broken = make_arguments(model_name="broken", num_steps=7, **settings)
    run_training(broken, task, family=family)
    resumed = make_arguments(model_name="broken", num_steps=11, resume="auto", **settings)
    torch.manual_seed(1234)  # nothing may depend on what the process did before
    run_training(resumed, task, family=family, initializer_range=0.01)

    assert_same_checkpoint(checkpoint_folder(resumed, 11), checkpoint_folder(whole, 11))
    found, expected = curves_without_speed(resumed.run_folder), curves_without_speed(whole.run_folder)
    assert {tag: points for tag, points in found.items() if tag.startswith("train/")} == {
        tag: points for tag, points in expected.items() if tag.startswith("train/")
    }
    assert [step for step, _ in found["train/loss"]] == list(range(1, 12))
    assert expected["eval/parameters"][-1] == found["eval/parameters"][-1]


def test_resume_never_auto_path_and_missing(make_arguments, run_training, checkpoint_folder):
    accelerator = Accelerator(cpu=True)
    arguments = make_arguments(num_steps=4, save_steps=2)
    assert choose_checkpoint(make_arguments(resume="auto"), accelerator) is None
    run_training(arguments)
    newest, first = checkpoint_folder(arguments, 4), checkpoint_folder(arguments, 2)
    accelerator = Accelerator(cpu=True)
    assert choose_checkpoint(arguments, accelerator) is None
    assert choose_checkpoint(make_arguments(resume="auto"), accelerator) == newest
    assert choose_checkpoint(make_arguments(resume=str(first)), accelerator) == first
    with pytest.raises(UserError, match="--resume nowhere: no such folder"):
        prepare_run(make_arguments(resume="nowhere"))
    with pytest.raises(UserError, match="not a checkpoint"):
        prepare_run(make_arguments(resume=str(arguments.run_folder)))


def test_resume_auto_without_a_checkpoint_starts_anew(make_arguments, run_training, checkpoint_folder):
    """Also where a run was killed before, or while, its first checkpoint was written."""
    once = make_arguments(model_name="once", num_steps=2)
    run_training(once)
    auto = make_arguments(num_steps=2, resume="auto")
    shutil.copytree(once.run_folder / "tensorboard", auto.run_folder / "tensorboard")
    (auto.run_folder / "checkpoints" / ".step-00000002.partial" / "model").mkdir(parents=True)
    run_training(auto)
    assert_same_checkpoint(checkpoint_folder(auto, 2), checkpoint_folder(once, 2))
    assert [path.name for path in (auto.run_folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert curves_without_speed(auto.run_folder) == curves_without_speed(once.run_folder)


def test_resume_auto_without_a_checkpoint_leaves_the_files_of_others(make_arguments, run_training):
    arguments = make_arguments(num_steps=2, resume="auto")
    arguments.run_folder.mkdir(parents=True)
    (arguments.run_folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="other files are there; choose another --model_name"):
        run_training(arguments)


@pytest.mark.parametrize("file", ["optimizer.safetensors", "state.json"])
def test_a_damaged_newest_checkpoint_is_passed_over(make_arguments, run_training, checkpoint_folder, capsys, file):
    settings = {"scheduler_num_steps": 10, "save_steps": 2, "save_total_limit": 3}
    whole = make_arguments(model_name="whole", num_steps=6, **settings)
    run_training(whole)
    run_training(make_arguments(num_steps=4, **settings))
    resumed = make_arguments(num_steps=6, resume="auto", **settings)
    damaged = checkpoint_folder(resumed, 4) / file
    damaged.write_bytes(damaged.read_bytes()[:-3])
    capsys.readouterr()
    run_training(resumed)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"passed over: {damaged}: damaged")
    assert said[1] == f"going on from {checkpoint_folder(resumed, 2)} (step 2)"
    assert checkpoint_names(resumed.run_folder) == ["step-00000002", "step-00000004", "step-00000006"]
    for step in (4, 6):
        assert_same_checkpoint(checkpoint_folder(resumed, step), checkpoint_folder(whole, step))


def test_nothing_but_damaged_checkpoints_is_an_error(make_arguments, run_training, checkpoint_folder):
    arguments = make_arguments(num_steps=4, save_steps=2)
    run_training(arguments)
    for step in (2, 4):
        (checkpoint_folder(arguments, step) / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match="every checkpoint in .*checkpoints is damaged; .*--overwrite_output_dir"):
        run_training(make_arguments(num_steps=6, resume="auto"))
    named = checkpoint_folder(arguments, 2)
    with pytest.raises(UserError, match=f"^{named}/optimizer.safetensors: damaged or missing"):
        run_training(make_arguments(num_steps=6, resume=str(named)))
    assert checkpoint_names(arguments.run_folder) == ["step-00000002", "step-00000004"]


def test_a_finished_run_is_evaluated_again_and_never_goes_back(make_arguments, run_training, checkpoint_folder):
    """Its process may have died between its last checkpoint and its results."""
    arguments = make_arguments(num_steps=2)
    run_training(arguments)
    weights = checkpoint_folder(arguments, 2) / "model" / "model.safetensors"
    before = weights.read_bytes()
    evaluated = []
    run_training(make_arguments(num_steps=2, resume="auto"), evaluate=lambda engine: evaluated.append(1) or {"x": 1.0})
    assert evaluated == [1] and weights.read_bytes() == before
    with pytest.raises(UserError, match="is at step 2; give --num_steps of that or more"):
        run_training(make_arguments(num_steps=1, resume="auto"))


def test_another_run_can_begin_with_a_checkpoint(make_arguments, run_training, checkpoint_folder):
    first = make_arguments(model_name="first", num_steps=4, save_steps=2)
    run_training(first)
    other = make_arguments(model_name="other", num_steps=4, resume=str(checkpoint_folder(first, 2)))
    run_training(other)
    one, two = (checkpoint_folder(arguments, 4) / "optimizer.safetensors" for arguments in (first, other))
    assert one.read_bytes() == two.read_bytes()
    assert checkpoint_names(first.run_folder) == ["step-00000002", "step-00000004"]


def test_going_back_to_an_earlier_checkpoint_keeps_what_is_written_then(
    make_arguments, run_training, checkpoint_folder
):
    arguments = make_arguments(num_steps=8, save_steps=2, save_total_limit=3)
    run_training(arguments)
    assert checkpoint_names(arguments.run_folder) == ["step-00000004", "step-00000006", "step-00000008"]
    back = make_arguments(num_steps=5, save_steps=0, save_total_limit=2, resume=str(checkpoint_folder(arguments, 4)))
    run_training(back)
    assert checkpoint_names(arguments.run_folder) == ["step-00000004", "step-00000005"]
    assert choose_checkpoint(make_arguments(resume="auto"), Accelerator(cpu=True)) == checkpoint_folder(arguments, 5)


def test_going_back_keeps_the_ancestor_and_drops_the_abandoned_branch(make_arguments, run_training, checkpoint_folder):
    arguments = make_arguments(num_steps=6, save_steps=2, save_total_limit=3)
    run_training(arguments)
    assert checkpoint_names(arguments.run_folder) == ["step-00000002", "step-00000004", "step-00000006"]
    second = str(checkpoint_folder(arguments, 2))
    run_training(make_arguments(num_steps=7, save_steps=0, save_total_limit=2, resume=second))
    assert checkpoint_names(arguments.run_folder) == ["step-00000002", "step-00000007"]


def test_a_run_that_went_back_and_fails_says_where_from(make_arguments, run_training, checkpoint_folder):
    """And not the newest checkpoint of what it has left behind."""
    arguments = make_arguments(num_steps=6, save_steps=2, save_total_limit=3)
    run_training(arguments)
    second = str(checkpoint_folder(arguments, 2))
    from_second = make_arguments(num_steps=6, save_steps=2, resume=second)
    said = f"^step 3: .*the last good checkpoint is {second}: go on with --resume {second}$"
    with pytest.raises(UserError, match=said):
        run_training(from_second, objective_class=type("AtOnce", (NotANumberAt,), {"step": 1}))


def test_what_changed_since_the_checkpoint_is_said(make_arguments, run_training, capsys):
    run_training(make_arguments(num_steps=2))
    run_training(make_arguments(num_steps=3, resume="auto", learning_rate=1e-3))
    said = [line.strip() for line in capsys.readouterr().out.splitlines() if "changed since then" in line]
    assert said == [
        "changed since then: learning_rate 0.003 -> 0.001",
        "changed since then: num_steps 2 -> 3",
        "changed since then: scheduler_num_steps 2 -> 3",
    ]


def test_what_an_older_version_did_not_know_and_is_off_has_not_changed():
    before = {"zero": 1, "fp16": True}
    now = {"zero": 0, "fp16": False, "muon": False, "memory_limit": None, "bf16": True, "data": "5eed"}
    changes = {"zero": (1, 0), "fp16": (True, False), "bf16": (None, True)}
    assert changed_arguments(before, now) == changes


def test_where_a_run_lies_and_is_pushed_to_is_no_change():
    before = {"output_dir": "here", "resume": "never", "hub_model_id": "me/one", "hub_strategy": "end"}
    now = {"output_dir": "there", "resume": "auto", "hub_model_id": "me/other", "hub_strategy": "every_save"}
    assert changed_arguments(before, now) == {}


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"num_workers": 1, "learning_rate": 1e-3}, {"epoch": 1, "step_in_epoch": 3}),
        ({"train_batch_size": 8, "gradient_accumulation_steps": 8}, {"epoch": 1, "step_in_epoch": 3}),
        ({"train_batch_size": 8}, {"epoch": 2, "step_in_epoch": 1}),
        ({"seed": 1}, {"epoch": 2, "step_in_epoch": 1}),
    ],
    ids=lambda values: ", ".join(values),
)
def test_where_rows_come_in_another_order_they_come_anew(
    make_arguments, run_training, checkpoint_folder, capsys, changed, place
):
    """Epochs of 4 steps; the break is in the middle of the second. Other rows would be passed over or seen twice."""
    run_training(make_arguments(num_steps=6))
    again = make_arguments(num_steps=7, resume="auto", **changed)
    capsys.readouterr()
    run_training(again)
    position = read_state(checkpoint_folder(again, 7))["position"]
    assert {name: position[name] for name in place} == place
    assert ("  so its data comes in another order" in capsys.readouterr().out) == (place["epoch"] == 2)


LAID_OUT = {
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "processes": 2,
    "tokens_per_step": None,
    "seed": 1,
}


@pytest.mark.parametrize(
    ("changed", "has_changed"),
    [
        ({}, False),
        ({"gradient_accumulation_steps": 1}, True),
        ({"processes": 1}, True),
        ({"processes": 1, "gradient_accumulation_steps": 4}, False),
        ({"seed": 2}, True),
    ],
    ids=str,
)
def test_the_order_is_of_the_rows_of_all_processes(changed, has_changed):
    assert order_has_changed({**LAID_OUT, **changed}, LAID_OUT, ("seed",)) == has_changed


def test_tokens_cut_steps_whatever_the_processes():
    by_tokens = {**LAID_OUT, "tokens_per_step": 512, "max_seq_length": 128}
    assert not order_has_changed({**by_tokens, "processes": 1}, by_tokens, ("tokens_per_step",))
    assert order_has_changed(LAID_OUT, by_tokens, ("tokens_per_step",))


def test_a_step_has_a_row_for_each_process_also_where_these_have_more_tokens():
    """512 tokens are 4 rows of 128, and 8 processes have one each."""
    by_tokens = {**LAID_OUT, "gradient_accumulation_steps": 1, "tokens_per_step": 512, "max_seq_length": 128}
    eight, two = {**by_tokens, "processes": 8}, by_tokens
    assert order_has_changed(eight, two, ("tokens_per_step",)) and order_has_changed(two, eight, ("tokens_per_step",))
    assert not order_has_changed(eight, eight, ("tokens_per_step",))


def test_where_the_data_has_changed_it_comes_anew(
    make_arguments, run_training, checkpoint_folder, capsys, monkeypatch
):
    """In the middle of an epoch of 4 steps the same place would be that of other rows."""
    run_training(make_arguments(num_steps=6))
    before = read_state(checkpoint_folder(make_arguments(), 6))["arguments"]["data"]
    rows = small_runs.Rows
    monkeypatch.setattr(small_runs, "Rows", lambda task, size=37: rows(task, size + 1))
    again = make_arguments(num_steps=7, resume="auto")
    run_training(again)
    state = read_state(checkpoint_folder(again, 7))
    assert state["position"]["epoch"] == 2 and state["arguments"]["data"] != before
    said = capsys.readouterr().out
    assert f"changed since then: data {before} -> {state['arguments']['data']}\n" in said
    assert "so its data comes in another order, and begins anew" in said


def test_what_an_older_version_did_not_know_has_not_changed():
    earlier = {name: value for name, value in LAID_OUT.items() if name not in ("seed", "processes")}
    assert not order_has_changed(earlier, {**LAID_OUT, "data": "5eed"}, ("seed", "data"))


@pytest.mark.parametrize(
    "arguments_class", [PretrainingArguments, ReadingArguments, RetrievalArguments], ids=lambda each: each.__name__
)
def test_the_order_is_of_arguments_that_there_are(arguments_class):
    assert set(arguments_class.ordered_by) <= {each.name for each in dataclasses.fields(arguments_class)}
    assert len(set(arguments_class.ordered_by)) == len(arguments_class.ordered_by)


def test_between_two_epochs_another_order_passes_nothing_over(make_arguments, run_training, checkpoint_folder):
    run_training(make_arguments(num_steps=4))
    longer = make_arguments(num_steps=5, resume="auto", train_batch_size=8)
    run_training(longer)
    assert read_state(checkpoint_folder(longer, 5))["position"]["epoch"] == 1
