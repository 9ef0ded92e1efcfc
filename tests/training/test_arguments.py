import json
from dataclasses import fields

import pytest

from mixlm.errors import UserError
from mixlm.training.arguments import PretrainingArguments, TrainingArguments, parse_arguments

REQUIRED = {"model_name": "m", "corpus_path": "corpus", "tokenizer": "tok"}


def from_command_line(*argv, **values):
    named = [part for name, value in {**REQUIRED, **values}.items() for part in (f"--{name}", str(value))]
    return parse_arguments(PretrainingArguments, [*named, *argv])


def write_json(tmp_path, values):
    path = tmp_path / "arguments.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), "utf-8")
    return path


def from_json(tmp_path, **values):
    return parse_arguments(PretrainingArguments, [str(write_json(tmp_path, {**REQUIRED, **values}))])


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


EVERY_KIND = {
    "output_dir": "somewhere",
    "resume": "auto",
    "seed": 7,
    "train_batch_size": 4,
    "tokens_per_step": 512,
    "learning_rate": 0.5,
    "weight_decay": 0,
    "num_steps": 30,
    "scheduler_num_steps": 40,
    "max_steps_per_epoch": 3,
    "bf16": True,
    "zero": 2,
    "sharding_backend": "fairscale",
    "max_minutes": 1.5,
    "overwrite_output_dir": False,
    "task": "ICT",
    "family": "switch",
    "config_file": "config.json",
    "masking": "word",
}


def test_command_line_and_json_give_the_same_arguments(tmp_path):
    by_json = from_json(tmp_path, **EVERY_KIND)
    assert from_command_line(**EVERY_KIND) == by_json
    assert json.dumps(from_command_line(**EVERY_KIND).to_dict()) == json.dumps(by_json.to_dict())
    assert from_command_line() == from_json(tmp_path)


def test_every_field_has_help_and_a_line_in_the_usage(capsys):
    assert all(field.metadata.get("help") for field in fields(PretrainingArguments))
    with pytest.raises(SystemExit) as exited:
        parse_arguments(PretrainingArguments, ["--help"])
    assert exited.value.code == 0
    usage = capsys.readouterr().out
    assert all(f"--{field.name}" in usage for field in fields(PretrainingArguments))


def test_none_sentinels_are_resolved_or_stay():
    arguments = from_command_line(num_steps=70)
    assert arguments.scheduler_num_steps == 70
    assert arguments.preset == "mixlm-mini"
    assert from_command_line(family="switch").preset == "mixlm-switch-mini"
    assert from_command_line(config_file="c.json").preset is None
    for name in ("max_minutes", "tokens_per_step", "max_steps_per_epoch", "dataset_name", "cache_dir"):
        assert getattr(arguments, name) is None


def test_null_in_json_is_the_sentinel(tmp_path):
    arguments = from_json(tmp_path, max_minutes=None, scheduler_num_steps=None, max_steps_per_epoch=None)
    assert arguments == from_command_line()


def test_scheduler_num_steps_is_at_least_num_steps():
    assert from_command_line(num_steps=10, scheduler_num_steps=25).scheduler_num_steps == 25
    message = error_of(from_command_line, num_steps=10, scheduler_num_steps=9)
    assert "--scheduler_num_steps=9" in message and "num_steps=10" in message


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], False),
        (["--bf16"], True),
        (["--bf16", "true"], True),
        (["--bf16=false"], False),
        (["--bf16", "0"], False),
    ],
)
def test_booleans_on_the_command_line(argv, expected):
    assert from_command_line(*argv).bf16 is expected


def wrong_values():
    for field in fields(PretrainingArguments):
        kind = field.type
        if kind is str or kind == str | None:
            values = [3, ["a"]]
        elif kind is int or kind == int | None:
            values = [1.5, "7", True]
        elif kind is float or kind == float | None:
            values = ["fast", False]
        elif kind is bool:
            values = ["true", 1]
        else:
            values = ["neither", 4, True, 3.0]
        if None not in getattr(kind, "__args__", ()) and type(None) not in getattr(kind, "__args__", ()):
            values.append(None)
        yield from ((field.name, value) for value in [*values, {}])


@pytest.mark.parametrize(("name", "value"), wrong_values())
def test_a_wrong_json_type_names_file_and_field(tmp_path, name, value):
    message = error_of(from_json, tmp_path, **{name: value})
    assert message.startswith(f"{tmp_path / 'arguments.json'}: field {name!r} is {json.dumps(value)}, expected ")


def test_the_expected_type_is_said_in_json_words(tmp_path):
    assert error_of(from_json, tmp_path, seed="1").endswith("expected int")
    assert error_of(from_json, tmp_path, cache_dir=1).endswith("expected text or null")
    assert error_of(from_json, tmp_path, fp16=1).endswith("expected true or false")
    assert error_of(from_json, tmp_path, task="sop").endswith("expected 'SOP' or 'ICT'")
    assert error_of(from_json, tmp_path, zero="3").endswith("expected 0 or 1 or 2 or 3")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not a JSON file"),
        ("[1]", "expected an object"),
        ("null", "expected an object"),
        ("", "not a JSON file"),
    ],
)
def test_a_file_that_holds_no_arguments_is_named(tmp_path, content, expected):
    path = write_json(tmp_path, content)
    message = error_of(parse_arguments, PretrainingArguments, [str(path)])
    assert message.startswith(f"{path}: ") and expected in message


def test_files_that_cannot_be_read_are_named(tmp_path):
    not_utf8 = tmp_path / "latin.json"
    not_utf8.write_bytes('{"model_name": "é"}'.encode("latin-1"))
    folder = tmp_path / "folder.json"
    folder.mkdir()
    for path in (tmp_path / "absent.json", not_utf8, folder):
        assert error_of(parse_arguments, PretrainingArguments, [str(path)]).startswith(f"{path}: ")


def test_an_unknown_field_gives_a_hint(tmp_path):
    message = error_of(from_json, tmp_path, learning_rte=1)
    assert f"{tmp_path / 'arguments.json'}: unknown field 'learning_rte'" in message
    assert "did you mean learning_rate?" in message


@pytest.mark.parametrize("argv", [["--learning_rte", "1"], ["--learning_rte=1"]])
def test_an_unknown_flag_gives_a_hint(argv):
    assert error_of(from_command_line, *argv) == "unknown argument --learning_rte; did you mean --learning_rate?"


def test_a_misspelled_required_flag_gives_the_hint_instead_of_missing():
    message = error_of(parse_arguments, PretrainingArguments, ["--model_nam", "m"])
    assert "--model_nam;" in message and "did you mean --model_name?" in message


def test_abbreviations_are_unknown():
    assert "--num_work" in error_of(from_command_line, "--num_work", "0")


def test_something_far_from_every_name_points_to_the_help():
    assert error_of(from_command_line, "--zzz") == "unknown argument --zzz; --help lists them"


@pytest.mark.parametrize("name", ["model_name"])
def test_a_missing_required_argument_is_named(tmp_path, name):
    assert f"--{name}" in error_of(parse_arguments, PretrainingArguments, ["--corpus_path", "c", "--tokenizer", "t"])
    path = write_json(tmp_path, {"corpus_path": "c", "tokenizer": "t"})
    assert error_of(parse_arguments, PretrainingArguments, [str(path)]) == f"{path}: field {name!r} is missing"


def test_missing_text_or_tokenizer_is_named():
    given = {name: value for name, value in REQUIRED.items() if name != "corpus_path"}
    message = error_of(PretrainingArguments, **given)
    assert "--corpus_path" in message and "--dataset_name" in message
    assert "--corpus_path" in error_of(PretrainingArguments, **REQUIRED, dataset_name="d")
    assert "--tokenizer" in error_of(PretrainingArguments, model_name="m", corpus_path="c")


def test_preset_and_config_file_exclude_each_other():
    message = error_of(from_command_line, preset="mixlm-tiny", config_file="c.json")
    assert "--preset=mixlm-tiny" in message and "--config_file=c.json" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 2**32),
        ("train_batch_size", -1),
        ("effective_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("tokens_per_step", 0),
        ("num_workers", -1),
        ("learning_rate", 0),
        ("learning_rate", -1e-4),
        ("learning_rate", "nan"),
        ("learning_rate", "inf"),
        ("weight_decay", -0.1),
        ("weight_decay", "nan"),
        ("weight_decay", "inf"),
        ("adam_epsilon", 0),
        ("max_grad_norm", -1),
        ("num_steps", 0),
        ("warmup_steps", -1),
        ("warmup_ratio", -0.1),
        ("warmup_ratio", 1),
        ("max_steps_per_epoch", 0),
        ("logging_steps", 0),
        ("save_steps", -1),
        ("save_total_limit", 0),
        ("eval_steps", -1),
        ("max_minutes", 0),
        ("max_minutes", -1),
        ("timeout_minutes", 0),
        ("timeout_minutes", "inf"),
        ("eval_split", 0),
        ("eval_split", 1),
        ("max_eval_examples", 0),
        ("max_seq_length", 7),
        ("mlm_probability", 0),
        ("mlm_probability", 1),
        ("remove_query_probability", -0.1),
        ("remove_query_probability", 1.1),
        ("model_name", ""),
        ("model_name", ".."),
        ("model_name", "a/b"),
    ],
)
def test_values_out_of_range_are_named(name, value):
    message = error_of(from_command_line, **{name: value})
    assert message.startswith(f"--{name}=") and ": must be " in message


def test_the_warm_up_is_a_share_of_the_schedule_unless_it_is_given():
    assert from_command_line(num_steps=200).warmup_steps == 10
    assert from_command_line(num_steps=100, scheduler_num_steps=200, warmup_ratio=0.1).warmup_steps == 20
    assert from_command_line(num_steps=200, warmup_ratio=0.1, warmup_steps=0).warmup_steps == 0


def test_the_learning_rate_falls_with_the_width_unless_it_is_given():
    def fitted(hidden_size: int, *flags: str, **given: float) -> float:
        arguments = from_command_line(*flags, **given)
        arguments.fit_learning_rate(hidden_size)
        return arguments.learning_rate

    assert [fitted(128), fitted(256), fitted(1024)] == [1e-3, 1e-3, 2.5e-4]
    assert [fitted(256, "--muon"), fitted(1024, "--muon")] == [2e-3, 5e-4]
    assert fitted(1024, learning_rate=2e-3) == fitted(1024, "--muon", learning_rate=2e-3) == 2e-3


def test_fp16_and_bf16_exclude_each_other():
    assert "--fp16" in error_of(from_command_line, "--fp16", "--bf16")


@pytest.mark.parametrize(
    ("given", "asked", "expected"),
    [
        ([], "no", "fp32"),
        ([], "fp16", "fp16"),
        ([], "bf16", "bf16"),
        ([], "fp8", "fp32"),
        (["--fp16"], "bf16", "fp16"),
        (["--bf16"], "fp16", "bf16"),
        (["--bf16"], "no", "bf16"),
    ],
)
def test_the_launcher_chooses_a_precision_where_the_arguments_do_not(given, asked, expected):
    arguments = from_command_line(*given)
    arguments.take_precision(asked)
    assert arguments.precision == expected
    assert TrainingArguments(model_name="m", fp16=arguments.fp16, bf16=arguments.bf16).precision == expected


def test_zero3_is_another_name_for_zero_3():
    assert from_command_line("--zero3").zero == from_command_line("--zero3", zero=3).zero == 3
    assert error_of(from_command_line, "--zero3", zero=2).startswith("--zero=2: must be 3")


@pytest.mark.parametrize(
    ("name", "value"), [("num_steps", "many"), ("task", "sop"), ("bf16", "perhaps"), ("zero", "4")]
)
def test_a_wrong_value_on_the_command_line_is_named(name, value):
    message = error_of(from_command_line, **{name: value})
    assert f"--{name}" in message and value in message


def test_the_run_folder_and_the_dictionary():
    arguments = TrainingArguments(model_name="a", output_dir="out")
    assert arguments.run_folder.parts == ("out", "a")
    assert TrainingArguments(**arguments.to_dict()) == arguments
