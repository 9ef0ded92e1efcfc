"""transformers' `Trainer`, for people who do not want our loop: it trains and evaluates every head."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import (
    ENCODERS,
    HEADS,
    MASKED_LM,
    NAMES,
    PRETRAINING,
    READERS,
    RETRIEVERS,
    VOCABULARY,
    build,
)
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from mixlm import MixLMForMaskedLM, MixLMForPreTraining
from mixlm.data.batching import collate

ROWS, LENGTH, IGNORE = 10, 9, -100
TRAINABLE = [(head, name) for head, name in zip(HEADS, NAMES, strict=True) if head[0] not in ENCODERS]
EVERY_HEAD = pytest.mark.parametrize(
    ("model_class", "fields"), [head for head, _ in TRAINABLE], ids=[name for _, name in TRAINABLE]
)


def examples(model, rows=ROWS):
    """Rows of different lengths, with what the head learns from."""
    generator = np.random.default_rng(0)
    data = []
    for row in range(rows):
        ids = generator.integers(5, VOCABULARY, LENGTH - row % 3)
        labels = np.where(np.arange(len(ids)) % 3 == 1, ids, IGNORE)
        context = generator.integers(5, VOCABULARY, LENGTH)
        example = {"input_ids": ids, "token_type_ids": np.zeros_like(ids)}
        if isinstance(model, READERS):
            example |= {"start_positions": row % 4, "end_positions": row % 4 + 1}
        elif isinstance(model, RETRIEVERS):
            example |= {"context_input_ids": context}
        else:
            example |= {"labels": labels}
        if isinstance(model, PRETRAINING):
            if model.config.pretraining_objective == "sop":
                example |= {"sentence_order_label": row % 2}
            else:
                example |= {"context_input_ids": context, "context_labels": np.where(context % 3, IGNORE, context)}
        data.append(example)
    return data


def label_names(model):
    """The fields of an example that are its labels, as docs/transformers.md lists them."""
    if isinstance(model, PRETRAINING):
        return ["labels", "sentence_order_label" if model.config.pretraining_objective == "sop" else "context_labels"]
    return ["context_input_ids"] if isinstance(model, RETRIEVERS) else None


@pytest.fixture
def trainer_of(tmp_path):
    def make(model, compute_metrics=None, data=None, **arguments):
        settings = {
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,  # of ten rows: the last batch is smaller than the others
            "max_steps": 5,
            "learning_rate": 1e-3,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 1,
            "label_names": label_names(model),
            **arguments,
        }
        trainer = Trainer(
            model,
            TrainingArguments(tmp_path / "trainer", **settings),
            data_collator=lambda batch: collate(batch, pad_token_id=0),
            train_dataset=data or examples(model),
            eval_dataset=examples(model),
            compute_metrics=compute_metrics,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@EVERY_HEAD
def test_trains_and_evaluates(model_class, fields, trainer_of, tmp_path):
    model = build(model_class, **fields)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    found = {}

    def compute_metrics(prediction):
        found["predictions"], found["labels"] = prediction.predictions, prediction.label_ids
        return {"rows": len(prediction.label_ids[0] if isinstance(prediction.label_ids, tuple) else prediction[1])}

    trainer = trainer_of(model, compute_metrics)
    trainer.train()
    assert len(losses(trainer)) == 5 and np.isfinite(losses(trainer)).all()
    unchanged = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not unchanged

    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_loss"]) and metrics["eval_rows"] == ROWS
    predictions = found["predictions"]
    for array in predictions if isinstance(predictions, tuple) else (predictions,):
        assert len(array) == ROWS  # a row of predictions for each example, whatever the batches were

    trainer.save_model(tmp_path / "saved")
    loaded = model_class.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("model_class", MASKED_LM)
def test_predictions_of_tokens_stand_where_their_labels_are(model_class, trainer_of):
    model = build(model_class)

    def compute_metrics(prediction):
        labels, logits = prediction.label_ids, prediction.predictions
        assert logits.shape == (*labels.shape, VOCABULARY)
        labelled = labels != IGNORE
        return {"accuracy": (logits.argmax(-1)[labelled] == labels[labelled]).mean(), "tokens": labelled.sum()}

    metrics = trainer_of(model, compute_metrics).evaluate()
    right = tokens = 0
    for example in examples(model):
        with torch.no_grad():
            logits = model(torch.from_numpy(example["input_ids"])[None]).logits[0]
        labelled = example["labels"] != IGNORE
        right += (logits.argmax(-1).numpy() == example["labels"])[labelled].sum()
        tokens += labelled.sum()
    assert metrics["eval_tokens"] == tokens
    assert metrics["eval_accuracy"] == pytest.approx(right / tokens)


@EVERY_HEAD
def test_loss_falls_on_a_repeated_batch(model_class, fields, trainer_of):
    model = build(model_class, dropout_prob=0.0, **fields)
    trainer = trainer_of(model, data=examples(model, rows=4), max_steps=30, learning_rate=1e-2)
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]


@pytest.mark.parametrize("model_class", MASKED_LM)
def test_accumulated_gradients_are_of_the_same_size(model_class, trainer_of):
    """Two batches of two rows, with as many labels each, step as one batch of four."""
    stepped = {}
    for accumulation in (1, 2):
        model = build(model_class, dropout_prob=0.0)
        trainer = trainer_of(
            model,
            data=[examples(model)[row] for row in (0, 1, 3, 4)],
            max_steps=1,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            max_grad_norm=0.0,
        )
        trainer.train()
        stepped[accumulation] = model.state_dict()
    for name, parameter in stepped[1].items():
        torch.testing.assert_close(stepped[2][name], parameter, rtol=1e-4, atol=1e-6, msg=f"{name} differs")


@EVERY_HEAD
def test_gradient_checkpointing_changes_no_step(model_class, fields, trainer_of):
    trained = {}
    for checkpointing in (False, True):
        model = build(model_class, **fields)
        trainer_of(model, max_steps=2, activation_checkpointing=checkpointing, optim="sgd").train()
        assert model.is_activation_checkpointing == checkpointing
        trained[checkpointing] = model.state_dict()
    for name, parameter in trained[False].items():
        torch.testing.assert_close(trained[True][name], parameter, rtol=1e-5, atol=1e-6, msg=f"{name} differs")


@pytest.mark.parametrize("model_class", [MixLMForMaskedLM, MixLMForPreTraining])
def test_goes_on_from_its_own_checkpoint(model_class, trainer_of):
    model = build(model_class)
    trainer_of(model, max_steps=4, save_steps=2).train()
    again = build(model_class)
    trainer = trainer_of(again, max_steps=4)
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(other, parameter, msg=f"{name} differs")


def test_the_page_works_as_printed(tmp_path, monkeypatch, capsys):
    """In both languages it is the same program."""
    repository = Path(__file__).parents[2]
    pages = [(repository / "docs" / name).read_text("utf-8") for name in ("transformers.md", "transformers.ko.md")]
    program, other = (re.search(r"```python\n(.*?)```", page, re.DOTALL)[1] for page in pages)
    assert program == other
    (tmp_path / "mixlm").mkdir()
    (tmp_path / "mixlm" / "sample").symlink_to(repository / "mixlm" / "sample")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "transformers.md", "exec"), {"__name__": "__main__"})
    assert "eval_accuracy" in capsys.readouterr().out
