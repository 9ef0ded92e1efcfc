"""run_pretraining.py from the arguments to the finished folder, and everything a user can get wrong."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer, pipeline

import mixlm
from mixlm.data.batching import scramble
from mixlm.data.corpus import read_documents
from mixlm.errors import RunStopped, UserError, exits_on_user_error
from mixlm.tokenization import train_tokenizer
from mixlm.training.report import read_curves

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

import run_pretraining

SAMPLE = Path(mixlm.__file__).parent / "sample"
MODEL_FIELDS = {
    "mixlm": {"model_type": "mixlm", "n_experts": 2, "num_heads": 2, "kernel_size": 5, "ff_dim": 64},
    "switch": {"model_type": "mixlm_switch", "n_experts": 2, "num_heads": 2, "ff_dim": 32},
}
MODEL_CLASSES = {"mixlm": "MixLMForPreTraining", "switch": "MixLMSwitchForPreTraining"}
CURVES = {"train/lr", "train/loss", "train/mlm_loss", "train/aux_loss", "train/grad_norm", "train/tokens_per_second"}
ROUTING = {"train/expert_0_share", "train/expert_1_share", "train/dropped_share"}
METRICS = {"eval/mlm_loss", "eval/mlm_accuracy", "eval/perplexity", "eval/unigram_loss", "eval/examples"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with a tokenizer of the bundled corpus, a configuration of each family, and a cache."""
    folder = tmp_path_factory.mktemp("prepared")
    sentences = [sentence for document in read_documents(SAMPLE) for sentence in document.sentences]
    tokenizer = train_tokenizer(sentences, 2000, show_progress=False)
    tokenizer.save_pretrained(folder / "tokenizer")
    for family, fields in MODEL_FIELDS.items():
        common = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "max_position_embeddings": 64,
            "vocab_size": len(tokenizer),
            "dropout_prob": 0.0,
        }
        (folder / f"{family}.json").write_text(json.dumps({**common, **fields}), "utf-8")
    return folder


@pytest.fixture
def arguments(prepared, tmp_path):
    """(changes) -> the arguments of a short run by name; None leaves one out."""

    def build(family: str = "mixlm", **changes) -> dict:
        defaults = {
            "model_name": "run",
            "output_dir": str(tmp_path / "outputs"),
            "corpus_path": str(SAMPLE),
            "cache_dir": str(prepared / "cache"),
            "tokenizer": str(prepared / "tokenizer"),
            "family": family,
            "config_file": str(prepared / f"{family}.json"),
            "max_seq_length": 64,
            "train_batch_size": 8,
            "num_steps": 2,
            "logging_steps": 1,
            "num_workers": 0,
            "eval_split": 0.1,
        }
        return {name: value for name, value in {**defaults, **changes}.items() if value is not None}

    return build


def command_line(arguments: dict) -> list[str]:
    return [part for name, value in arguments.items() for part in (f"--{name}", str(value))]


@pytest.fixture
def run(monkeypatch):
    """Run the script in this process with arguments by name, or as they are."""

    def run_main(arguments: dict | list[str]) -> None:
        argv = command_line(arguments) if isinstance(arguments, dict) else arguments
        monkeypatch.setattr(sys, "argv", ["run_pretraining.py", *argv])
        run_pretraining.main()

    return run_main


@pytest.fixture
def refused(run, capsys):
    """Run it, and return the one line of the error."""

    def run_and_fail(arguments: dict | list[str]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            run(arguments)
        assert exited.value.code == 2
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        *before, line, end = output.err.split("\n")
        assert end == "" and line.startswith("error: ") and len(line) > 20
        # Nothing else, except how far it had come.
        assert all(" [00:" in line for line in before), output.err
        return line.removeprefix("error: ")

    return run_and_fail


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def check_finished_folder(folder: Path, family: str, task: str, capsys) -> None:
    results = json.loads((folder / "eval_results.json").read_text("utf-8"))
    assert results.keys() == {*METRICS, "eval/sop_accuracy" if task == "SOP" else "eval/ict_recall@1"}
    assert all(isinstance(value, (int, float)) for value in results.values())
    curves = read_curves(folder)
    expected = CURVES | {f"train/{task.lower()}_loss"} | results.keys() | (ROUTING if family == "switch" else set())
    expected |= {"train/ict_accuracy", "train/ict_candidates"} if task == "ICT" else set()
    assert curves.keys() == expected
    for tag, value in results.items():
        assert curves[tag][-1][1] == pytest.approx(value, rel=1e-5)

    model = AutoModelForPreTraining.from_pretrained(folder)
    assert type(model).__name__ == MODEL_CLASSES[family]
    assert model.config.pretraining_objective == task.lower()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    masked = AutoModelForMaskedLM.from_pretrained(folder)
    assert torch.equal(masked.mlm_head.decoder.weight, model.mlm_head.decoder.weight)
    fill_mask = pipeline("fill-mask", model=masked, tokenizer=tokenizer)
    filled = fill_mask("서울은 한국의 [MASK]이다.", top_k=3)
    assert len(filled) == 3 and all(0 < candidate["score"] <= 1 for candidate in filled)
    two = fill_mask(["서울은 한국의 [MASK]이다."] * 2, top_k=3, batch_size=2)
    assert [[guess["token"] for guess in of_one] for of_one in two] == [[guess["token"] for guess in filled]] * 2
    longest = model.config.max_position_embeddings
    assert tokenizer.model_max_length == longest
    vectors = pipeline("feature-extraction", model=str(folder), tokenize_kwargs={"truncation": True})("서울 " * 999)
    assert len(vectors[0]) == longest
    assert not [path for path in folder.rglob("*") if "incomplete" in path.name or path.name == "final"]
    output = capsys.readouterr().out
    for name, value in results.items():
        assert output.count(f" {name.removeprefix('eval/')} ") == 1, name
        assert f"{value:,.4f}" in output


@pytest.mark.parametrize(("family", "task"), [("mixlm", "ICT"), ("switch", "SOP"), ("switch", "ICT")])
def test_a_short_run_leaves_a_folder_that_everything_loads(run, arguments, tmp_path, capsys, family, task):
    run(arguments(family, task=task, gradient_accumulation_steps=2, train_batch_size=4, num_steps=3))
    check_finished_folder(tmp_path / "outputs" / "run", family, task, capsys)


def test_a_checkpoint_has_a_model_and_its_tokenizer(run, arguments, tmp_path):
    run(arguments())
    folder = tmp_path / "outputs" / "run"
    model = folder / "checkpoints" / "step-00000002" / "model"
    text = "서울은 한국의 [MASK]이다."
    filled = [
        pipeline(
            "fill-mask",
            model=AutoModelForMaskedLM.from_pretrained(place),
            tokenizer=AutoTokenizer.from_pretrained(place),
        )(text)
        for place in (model, folder)
    ]
    assert filled[0] == filled[1]


def test_a_dataset_is_trained_on_as_a_corpus_is(run, arguments, tmp_path, monkeypatch):
    """Loaded, or as a stream: the same blocks, held-out documents and weights."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    rows = [{"text": "\n".join(document.sentences)} for document in read_documents(SAMPLE)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    weights = []
    for number, changes in enumerate(
        (
            {},
            {"corpus_path": None, "dataset_name": tmp_path / "rows.jsonl"},
            {"corpus_path": None, "dataset_name": tmp_path / "rows.jsonl", "streaming": True},
        )
    ):
        run(arguments(model_name=f"run-{number}", **changes))
        weights.append(load_file(tmp_path / "outputs" / f"run-{number}" / "model.safetensors"))
    for others in weights[1:]:
        assert all(torch.equal(value, others[name]) for name, value in weights[0].items())


def test_the_loss_goes_down(run, arguments, tmp_path, capsys):
    """60 steps from a JSON file, with a worker."""
    settings = arguments(num_steps=60, learning_rate=0.01, warmup_steps=5, logging_steps=5, num_workers=1)
    (tmp_path / "arguments.json").write_text(json.dumps(settings), "utf-8")
    run([str(tmp_path / "arguments.json")])
    check_finished_folder(tmp_path / "outputs" / "run", "mixlm", "SOP", capsys)
    losses = [value for _, value in read_curves(tmp_path / "outputs" / "run")["train/mlm_loss"]]
    assert len(losses) == 12
    assert sorted(losses[-3:])[1] < sorted(losses[3:6])[1] < losses[0]


def test_a_new_model_knows_how_often_each_token_occurs(run, arguments, tmp_path):
    """It begins with the loss of guessing by frequency, not with that of equal odds."""
    run(arguments(num_steps=1, learning_rate=1e-9, warmup_steps=0))
    folder = tmp_path / "outputs" / "run"
    curves = read_curves(folder)
    ((_, loss),), ((_, unigram),) = curves["eval/mlm_loss"], curves["eval/unigram_loss"]
    assert loss == pytest.approx(unigram, abs=0.1)
    assert loss < math.log(len(AutoTokenizer.from_pretrained(folder))) - 0.5


def test_a_preset_gets_the_vocabulary_of_the_tokenizer(run, arguments, tmp_path):
    run(arguments(config_file=None, preset="mixlm-tiny", num_steps=1))
    config = mixlm.MixLMConfig.from_pretrained(tmp_path / "outputs" / "run")
    assert config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "outputs" / "run"))


def test_steps_can_be_cut_by_tokens(run, arguments, tmp_path):
    run(arguments(tokens_per_step=200, num_steps=3))
    assert (tmp_path / "outputs" / "run" / "eval_results.json").is_file()


def test_an_interrupted_run_goes_on_and_ends_in_the_same_place(run, arguments, tmp_path, monkeypatch):
    settings = {
        "num_steps": 4,
        "save_steps": 2,
        "task": "ICT",
        "gradient_accumulation_steps": 2,
        "train_batch_size": 4,
    }
    run(arguments(model_name="whole", **settings))

    from mixlm.training import loop

    class PowerCut(Exception):
        pass

    save = loop.save_checkpoint

    def save_and_die(*args):
        save(*args)
        raise PowerCut

    monkeypatch.setattr(loop, "save_checkpoint", save_and_die)
    with pytest.raises(PowerCut):
        run(arguments(model_name="broken", **settings))
    monkeypatch.setattr(loop, "save_checkpoint", save)
    run(arguments(model_name="broken", resume="auto", **settings))
    whole, broken = (tmp_path / "outputs" / name for name in ("whole", "broken"))
    for file in ("model.safetensors", "eval_results.json"):
        assert (whole / file).read_bytes() == (broken / file).read_bytes()


def test_a_run_that_is_stopped_has_its_own_exit_code_and_goes_on(run, arguments, tmp_path, capsys):
    settings = {"num_steps": 2, "resume": "auto", "fp16": True}
    with pytest.raises(SystemExit) as exited:
        run(arguments(max_minutes=1e-9, **settings))
    assert exited.value.code == 3
    checkpoint = tmp_path / "outputs" / "run" / "checkpoints" / "step-00000001"
    *_, line, end = capsys.readouterr().err.split("\n")
    assert line.startswith(f"--max_minutes are over: stopped after step 1; the last good checkpoint is {checkpoint}: ")
    assert end == "" and not (tmp_path / "outputs" / "run" / "model.safetensors").exists()
    run(arguments(max_minutes=60, **settings))
    assert (tmp_path / "outputs" / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("two\nlines"), 2, "error: two lines\n"),
        (RunStopped("SIGTERM: stopped after step 3"), 3, "SIGTERM: stopped after step 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(capsys, raised, code, line):
    @exits_on_user_error
    def main():
        raise raised

    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == code and capsys.readouterr().err == line


def test_a_second_run_of_the_same_name_is_refused_or_replaces_the_first(run, refused, arguments, tmp_path):
    run(arguments(num_steps=1))
    before = {path: path.read_bytes() for path in files_in(tmp_path / "outputs")}
    assert "--overwrite_output_dir" in refused(arguments(num_steps=1))
    # A mistake in the new run must not cost the old one.
    assert "corpus" in refused(arguments(num_steps=1, overwrite_output_dir=True, corpus_path="no-corpus"))
    assert {path: path.read_bytes() for path in files_in(tmp_path / "outputs")} == before
    run(arguments(num_steps=2, overwrite_output_dir=True))
    assert [path.name for path in (tmp_path / "outputs" / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_sentence_longer_than_max_seq_length_is_cut_and_counted(run, arguments, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    long = " ".join(["서울은 한국의 수도이다"] * 40)
    documents = [f"{long}\n짧은 문장이다.\n또 하나의 문장이다." for _ in range(12)]
    (corpus / "a.dat").write_text("\n\n".join(documents), "utf-8")
    run(arguments(corpus_path=str(corpus), cache_dir=str(tmp_path / "cache"), num_steps=1, train_batch_size=2))
    output = capsys.readouterr().out
    assert "12 sentences were longer than max_seq_length and cut" in output


# What a user can get wrong.


def corpus_of(tmp_path, content: bytes | str | None, name: str = "a.dat") -> str:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    if content is not None:
        (corpus / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(corpus)


TWO_DOCUMENTS = "하나의 문장이다.\n둘째 문장이다.\n\n셋째 문장이다.\n넷째 문장이다.\n"
WRONG_CORPORA = {
    "empty folder": (None, "a.dat", ["empty folder", ".dat"]),
    "no .dat": ("text", "a.txt", ["a.txt", ".dat"]),
    "empty file": ("", "a.dat", ["a.dat", "no sentence"]),
    "blank file": ("\n \n\n", "a.dat", ["a.dat", "no sentence"]),
    "one document": ("하나.\n둘.\n", "a.dat", ["1 document", "blank line"]),
    "not UTF-8": ("하나.\n".encode() + b"\xb0\xa1\n", "a.dat", ["a.dat, line 2", "0xb0", "offset 8", "UTF-8"]),
    "not xz": ("text", "a.dat.xz", ["a.dat.xz", "damaged"]),
    "too little": (TWO_DOCUMENTS, "a.dat", ["rows", "smaller batch"]),
}


@pytest.mark.parametrize("task", ["SOP", "ICT"])
@pytest.mark.parametrize("case", WRONG_CORPORA)
def test_a_wrong_corpus(refused, arguments, tmp_path, case, task):
    content, name, expected = WRONG_CORPORA[case]
    corpus = corpus_of(tmp_path, content, name)
    message = refused(arguments(corpus_path=corpus, cache_dir=str(tmp_path / "cache"), task=task))
    assert corpus in message or case == "too little"
    assert all(part in message for part in expected), message
    assert files_in(tmp_path / "outputs") == []
    assert case == "too little" or not list((tmp_path / "cache").glob("corpus-*/"))


def test_a_corpus_that_is_not_there(refused, arguments):
    assert refused(arguments(corpus_path="nowhere")).startswith("nowhere: no such file or folder")


def test_held_out_documents_without_a_query_and_its_context(refused, arguments, tmp_path):
    held_out = int(np.argmin(scramble(np.arange(1, 13, dtype=np.uint64))))  # of 12 documents, where it is but one
    documents = ["하나의 문장이다.\n둘째 문장이다.\n셋째 문장이다."] * 12
    documents[held_out] = "한 문장이다."
    settings = {"task": "ICT", "eval_split": 1e-6, "train_batch_size": 2, "cache_dir": str(tmp_path / "cache")}
    message = refused(arguments(corpus_path=corpus_of(tmp_path, "\n\n".join(documents)), **settings))
    assert message.startswith("--eval_split=1e-06: no held-out document")
    assert files_in(tmp_path / "outputs") == []


def changed_config(prepared, tmp_path, family="mixlm", **changes) -> str:
    fields = json.loads((prepared / f"{family}.json").read_text("utf-8"))
    path = tmp_path / "changed.json"
    path.write_text(json.dumps({**fields, **changes}), "utf-8")
    return str(path)


WRONG_CONFIGURATIONS = {
    "other vocabulary": ("mixlm", {"vocab_size": 1999}, ["vocab_size=1999", "tokenizer", "2000"]),
    "hidden size": ("mixlm", {"hidden_size": 30}, ["hidden_size=30", "n_experts x num_heads = 2 x 2", "28 or 32"]),
    "feed-forward": ("mixlm", {"ff_dim": 66}, ["ff_dim=66", "64 or 68"]),
    "experts": ("mixlm", {"n_experts": 3}, ["hidden_size=32", "3 x 2"]),
    "heads": ("switch", {"num_heads": 3}, ["hidden_size=32", "num_heads=3"]),
    "even kernel": ("mixlm", {"kernel_size": 4}, ["kernel_size=4", "odd", "3 or 5"]),
    "activation": ("mixlm", {"act_fn": "tanh"}, ["act_fn='tanh'", "gelu, relu, swish"]),
    "layer group": ("mixlm", {"layer_group": 3}, ["layer_group=3", "num_hidden_layers=2", "1, 2"]),
    "zero layers": ("switch", {"num_hidden_layers": 0}, ["num_hidden_layers=0", "at least 1"]),
    "text for a number": ("mixlm", {"hidden_size": "32"}, ["hidden_size", "'32'"]),
    "a list for a number": ("switch", {"capacity_factor": [1]}, ["capacity_factor"]),
    "null": ("mixlm", {"ff_dim": None}, ["ff_dim"]),
    "a fraction": ("mixlm", {"num_heads": 2.5}, ["num_heads"]),
    "number for a text": ("mixlm", {"act_fn": 1}, ["act_fn"]),
    "choice": ("mixlm", {"pooler": "max"}, ["pooler", "max"]),
    "one token type": ("switch", {"type_vocab_size": 1}, ["type_vocab_size=1", "--task SOP", "--task ICT"]),
    "other family": ("mixlm", {"model_type": "mixlm_switch"}, ["mixlm_switch", "model_type"]),
}


@pytest.mark.parametrize("case", WRONG_CONFIGURATIONS)
def test_a_wrong_configuration(refused, arguments, prepared, tmp_path, case):
    family, changes, expected = WRONG_CONFIGURATIONS[case]
    path = changed_config(prepared, tmp_path, family, **changes)
    message = refused(arguments(family, config_file=path))
    assert message.startswith(f"{path}: ") and message.count(path) == 1, message
    assert all(part in message for part in expected), message
    assert files_in(tmp_path / "outputs") == []


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_configuration_that_is_not_one(refused, arguments, tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    message = refused(arguments(config_file=str(path)))
    assert message.startswith(f"{path}: ") and message.count(str(path)) == 1


def test_a_preset_that_is_not_there_or_of_the_other_family(refused, arguments):
    message = refused(arguments(config_file=None, preset="mixlm-huge"))
    assert message.startswith("mixlm-huge: ") and "mixlm-tiny" in message and message.count("mixlm-huge") == 1
    message = refused(arguments(config_file=None, preset="mixlm-switch-tiny"))
    assert message.startswith("mixlm-switch-tiny: ") and message.count("mixlm-switch-tiny") == 1


def test_max_seq_length_above_the_positions(refused, arguments, prepared):
    message = refused(arguments(max_seq_length=65))
    assert "--max_seq_length=65" in message and "max_position_embeddings=64" in message
    assert str(prepared / "mixlm.json") in message


def test_max_steps_per_epoch_too_large(refused, arguments):
    assert "use at most" in refused(arguments(max_steps_per_epoch=10_000))


def test_a_tokenizer_that_is_not_there(refused, arguments, tmp_path):
    message = refused(arguments(tokenizer=str(tmp_path / "none")))
    assert str(tmp_path / "none") in message and "tokenizer" in message
    assert files_in(tmp_path / "outputs") == []


def test_an_output_folder_that_cannot_be_written(refused, arguments, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(arguments(output_dir=str(tmp_path / "file" / "outputs")))
    assert message.startswith(f"--output_dir {tmp_path / 'file' / 'outputs'}: cannot be written")


def test_an_unknown_flag_has_a_hint_and_makes_no_folder(refused, arguments, tmp_path):
    message = refused([*command_line(arguments()), "--learning_rte", "1"])
    assert message == "unknown argument --learning_rte; did you mean --learning_rate?"
    assert not (tmp_path / "outputs").exists()


def test_wrong_types_in_the_arguments_file(refused, arguments, tmp_path):
    path = tmp_path / "arguments.json"
    for name, value in {"num_steps": "2", "bf16": 1, "task": "sop", "corpus_path": ["a"]}.items():
        path.write_text(json.dumps(arguments(**{name: value})), "utf-8")
        assert refused([str(path)]).startswith(f"{path}: field {name!r} is {json.dumps(value)}, expected ")
    assert not (tmp_path / "outputs").exists()


def test_a_checkpoint_that_is_not_there(refused, arguments):
    assert "--resume nowhere" in refused(arguments(resume="nowhere"))


def test_a_loss_that_is_not_a_number(refused, arguments, tmp_path):
    message = refused(arguments(learning_rate=1e30, num_steps=20, save_steps=1))
    assert message.startswith("step ") and "--learning_rate" in message
    checkpoints = tmp_path / "outputs" / "run" / "checkpoints"
    assert str(checkpoints) in message
    (newest,) = sorted(checkpoints.iterdir())[-1:]
    assert int(newest.name.removeprefix("step-")) == int(message.split()[1].rstrip(":")) - 1
    assert not (tmp_path / "outputs" / "run" / "model.safetensors").exists()


# Two processes.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(arguments: dict, launcher: str = "accelerate") -> subprocess.CompletedProcess:
    """Run the script on two ranks."""
    launchers = {
        "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port"],
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
    }
    return subprocess.run(
        [sys.executable, "-m", *launchers[launcher], str(free_port()), "run_pretraining.py", *command_line(arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=500,
    )


def assert_same_run(one: Path, two: Path) -> None:
    weights, others = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert weights.keys() == others.keys()
    for name in weights:
        # The bias of keys has no effect (softmax does not see it) and a gradient of rounding errors alone.
        if not (name.endswith("bias") and ".key." in name):
            torch.testing.assert_close(
                weights[name], others[name], rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    results = [json.loads((folder / "eval_results.json").read_text("utf-8")) for folder in (one, two)]
    assert results[1] == pytest.approx(results[0], rel=1e-4)
    curves = [read_curves(folder) for folder in (one, two)]
    for tag in curves[0].keys() - {"train/tokens_per_second"}:
        steps, values = zip(*curves[0][tag], strict=True)
        other_steps, other_values = zip(*curves[1][tag], strict=True)
        assert other_steps == steps, tag
        assert other_values == pytest.approx(values, rel=1e-3, abs=1e-5), tag


@pytest.mark.parametrize(
    ("launcher", "family", "task"), [("accelerate", "switch", "SOP"), ("torchrun", "mixlm", "ICT")]
)
def test_two_ranks_give_the_result_of_one_process(run, arguments, tmp_path, launcher, family, task):
    settings = {"task": task, "num_steps": 4, "eval_steps": 2, "max_eval_examples": 11}
    run(arguments(family, model_name="one", train_batch_size=8, **settings))
    two = arguments(family, model_name="two", train_batch_size=2, gradient_accumulation_steps=2, **settings)
    finished = launch(two, launcher)
    assert finished.returncode == 0, finished.stderr
    assert "terminate" not in finished.stderr and "Traceback" not in finished.stderr
    assert_same_run(tmp_path / "outputs" / "one", tmp_path / "outputs" / "two")
    assert read_curves(tmp_path / "outputs" / "two")["eval/examples"] == [(2, 11), (4, 11)]
    lines = [line for line in finished.stdout.splitlines() if line.strip()]
    assert len(lines) == len(set(lines)) and len(lines) == 8, finished.stdout
    assert finished.stderr.count("training 100% 4/4") == 1


@pytest.mark.slow
def test_a_rank_without_anything_to_evaluate_does_not_hang(arguments, tmp_path):
    finished = launch(arguments(task="ICT", train_batch_size=2, num_steps=1, max_eval_examples=1))
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "outputs" / "run" / "eval_results.json").read_text("utf-8"))
    assert results["eval/examples"] == 1 and results["eval/ict_recall@1"] == 1


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks(run, arguments, tmp_path):
    """Two ranks begin, one process goes on."""
    settings = {"num_steps": 4, "save_steps": 2, "eval_steps": 2, "scheduler_num_steps": 4}
    run(arguments(model_name="one", train_batch_size=8, **settings))
    half = {**settings, "num_steps": 2}
    finished = launch(arguments(model_name="two", train_batch_size=2, gradient_accumulation_steps=2, **half))
    assert finished.returncode == 0, finished.stderr
    run(arguments(model_name="two", train_batch_size=8, resume="auto", **settings))
    assert_same_run(tmp_path / "outputs" / "one", tmp_path / "outputs" / "two")


@pytest.mark.slow
def test_an_error_on_two_ranks_ends_them(arguments, tmp_path):
    run_folder = tmp_path / "outputs" / "run"
    run_folder.mkdir(parents=True)
    (run_folder / "something").write_text("")
    finished = launch(arguments())
    assert finished.returncode != 0
    assert f"error: {run_folder}: an earlier run is there" in finished.stderr
    assert finished.stderr.count("error: /") == 1
