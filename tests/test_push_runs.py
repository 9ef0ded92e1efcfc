"""The three scripts and `mixlm push` bring what they made to the Hub, and lose nothing where that fails."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hub_stand_in import TOKEN, HubStandIn
from huggingface_hub import ModelCard
from remote_models import tiny_model, tiny_tokenizer

import mixlm
from mixlm.cli import main
from mixlm.encoder import Encoding
from mixlm.reader import Decoding
from mixlm.training.arguments import PretrainingArguments
from mixlm.training.checkpoint import checkpoints_in
from mixlm.training.publishing import CheckpointPusher, publish

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

import run_ict
import run_mrc
import run_pretraining

NAME = "someone/made-here"
PUSH = {"push_to_hub": True, "hub_model_id": NAME}
SCRIPTS = {"pretraining": run_pretraining, "mrc": run_mrc, "ict": run_ict}
MODEL_FILES = {
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "eval_results.json", "run.json"),
    *("configuration.py", "heads.py", "kernels.py", "modeling_mixlm.py"),
}
ALSO = {"pretraining": set(), "mrc": {"reader.json"}, "ict": {"encoder.json"}}
METRICS = {"pretraining": "mlm_accuracy", "mrc": "f1", "ict": "mrr@10"}


@pytest.fixture
def hub(monkeypatch):
    with HubStandIn() as hub:
        hub.use_here(monkeypatch)
        yield hub


@pytest.fixture
def data(tmp_path) -> Path:
    """A corpus, questions, a tokenizer that knows their words, and a pretrained model."""
    (tmp_path / "corpus.dat").write_text("서울 은 한국 의 수도 이다 .\n수도 은 서울 이다 .\n\n" * 12, "utf-8")
    context, articles = "서울 은 한국 의 수도 이다 .", []
    for number in range(6):
        answer = {"text": "서울", "answer_start": 0}
        questions = [{"id": f"{number}", "question": "한국 의 수도 은", "answers": [answer]}]
        articles.append({"title": f"{number}", "paragraphs": [{"context": context * (number + 1), "qas": questions}]})
    (tmp_path / "questions.json").write_text(json.dumps({"data": articles}, ensure_ascii=False), "utf-8")
    model = tiny_model(mixlm.MixLMForPreTraining)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    return tmp_path


@pytest.fixture
def flags(data):
    """The command line of a short run of a script; True stands for a flag alone."""
    common = {"train_batch_size": 4, "num_steps": 2, "num_workers": 0, "logging_steps": 1}
    fine_tuning = {"output_dir": data / "run", "model_name_or_path": data / "base", "validation_split": 0.3}
    fine_tuning["train_file"] = data / "questions.json"
    of_script = {
        "pretraining": {
            **{"model_name": "run", "output_dir": data, "corpus_path": data / "corpus.dat", "eval_split": 0.3},
            **{"tokenizer": data / "base", "config_file": data / "config.json", "max_seq_length": 24},
            "cache_dir": data / "cache",
        },
        "mrc": {**fine_tuning, "max_seq_length": 24, "max_query_length": 8, "doc_stride": 8},
        "ict": {**fine_tuning, "max_passage_length": 24, "max_query_length": 8},
    }

    def build(script: str, **changes) -> list[str]:
        given = {**common, **of_script[script], **changes}
        return [
            word for name, value in given.items() for word in (f"--{name}", *([] if value is True else [f"{value}"]))
        ]

    return build


@pytest.fixture
def run(data, flags, monkeypatch):
    """Run a script; returns the run's folder."""

    def run_script(script: str, **changes) -> Path:
        monkeypatch.setattr(sys, "argv", [f"run_{script}.py", *flags(script, **changes)])
        SCRIPTS[script].main()
        return data / "run"

    return run_script


def contents(folder: Path) -> dict[str, bytes]:
    """Of the files of a run, but for what its Hub name and picture are in."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if not name.startswith(("checkpoints", "tensorboard")) and name not in ("run.json", "README.md", "curves.png")
    }


def places_of_the_token(*folders: Path) -> list[Path]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_pushed_at_its_end(script, run, hub, data, monkeypatch, capsys):
    monkeypatch.setenv("MIXLM_CACHE", str(data / "cache"))
    folder = run(script, **PUSH, hub_private_repo=True, hub_license="mit")
    assert f"pushed to {hub.url}/{NAME}" in capsys.readouterr().out
    there = hub.repositories[NAME]
    pictures = {name for name in ("curves.png", "reading.png") if (folder / name).exists()}
    assert set(there) == MODEL_FILES | ALSO[script] | pictures | {"README.md"}
    assert all((folder / name).read_bytes() == content for name, content in there.items())
    assert len(hub.commits[NAME]) == 1 and hub.private == {NAME}

    card = ModelCard(there["README.md"].decode())
    results = json.loads(there["eval_results.json"])
    found = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert found[METRICS[script]] == results[f"eval/{METRICS[script]}"]
    assert card.data.license == "mit" and card.data.language == ["ko"]
    assert shlex.join(["python", *sys.argv]) in card.text
    source = data / ("corpus.dat" if script == "pretraining" else "questions.json")
    digest = subprocess.run(["b2sum", "--length", "128", source], capture_output=True, text=True, check=True)
    assert f"  * {source.name}, {source.stat().st_size:,} bytes, `{digest.stdout.split()[0]}`" in card.text

    assert places_of_the_token(data) == []
    assert not any(TOKEN.encode() in content for content in there.values())


def test_a_reader_is_pushed_after_its_evaluation(run, hub, tmp_path):
    """Which comes after its training, changes its settings and leaves what reading.png is drawn of."""
    folder = run("mrc", **PUSH)
    assert "reading.png" in hub.repositories[NAME]
    assert hub.repositories[NAME]["eval_results.json"] == (folder / "eval_results.json").read_bytes()
    for name in ("reader.json", "run.json"):
        (tmp_path / name).write_bytes(hub.repositories[NAME][name])
    assert Decoding.load(tmp_path) == Decoding.load(folder)
    assert json.loads((tmp_path / "run.json").read_text())["hub_model_id"] == NAME


@pytest.mark.parametrize("broken", ["PUT /objects/.+", "POST /api/models/.+/commit/.+"])
def test_a_failed_push_loses_nothing_and_says_how_to_repeat_it(broken, run, hub, capsys):
    plain = contents(run("ict"))
    hub.refuse(broken, 403)
    with pytest.raises(SystemExit) as exited:
        run("ict", **PUSH, hub_private_repo=True, hub_license="mit", overwrite_output_dir=True)
    assert exited.value.code == 5
    *_, line = capsys.readouterr().err.splitlines()
    found = re.fullmatch(rf"not pushed: {NAME}: .*; the model is whole in (\S+), push it with: (mixlm push .*)", line)
    folder = Path(found[1])
    assert contents(folder) == plain
    assert mixlm.MixLMForRetrieval.from_pretrained(folder) and Encoding.load(folder)
    assert hub.repositories[NAME] == {}

    hub.refusals.clear()
    main(shlex.split(found[2])[1:])
    assert hub.repositories[NAME]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert hub.private == {NAME} and len(hub.arrived) == 1
    assert ModelCard(hub.repositories[NAME]["README.md"].decode()).data.license == "mit"


@pytest.mark.parametrize(
    ("script", "changes", "message"),
    [
        ("pretraining", {"push_to_hub": True}, "--push_to_hub: --hub_model_id USER/NAME is missing"),
        ("pretraining", {**PUSH, "hub_model_id": "made-here"}, "--hub_model_id made-here: is not USER/NAME"),
        ("ict", {"hub_model_id": NAME}, "--hub_model_id='someone/made-here': must be left out without push_to_hub"),
        ("ict", {"hub_private_repo": True}, "--hub_private_repo=True: must be left out without push_to_hub"),
        ("mrc", {"hub_strategy": "every_save"}, "--hub_strategy='every_save': must be left out without push_to_hub"),
        ("mrc", {**PUSH, "do_eval": True}, "--push_to_hub=True: must be left out where nothing is trained"),
        ("ict", {**PUSH, "seeds": 1}, "--push_to_hub=True: must be left out with seeds"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_made(script, changes, message, run, hub, data, capsys):
    with pytest.raises(SystemExit) as exited:
        run(script, **changes)
    assert exited.value.code == 2 and message in capsys.readouterr().err
    assert not (data / "run").exists() and hub.requests == []


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_a_token_that_is_missing_or_wrong_is_told_before_anything_is_made(token, run, hub, data, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(data / "none"))
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit) as exited:
        run("pretraining", **PUSH)
    (line,) = capsys.readouterr().err.splitlines()
    assert exited.value.code == 2 and "hf auth login" in line and "hf_wrong" not in line
    assert not (data / "run").exists() and hub.repositories == {}


def test_a_repository_that_is_not_to_be_had_ends_the_run_before_its_first_step(run, hub, data, capsys):
    """And leaves the earlier run in the folder as it is."""
    before = contents(run("pretraining"))
    hub.refuse("POST /api/repos/create", 403)
    with pytest.raises(SystemExit) as exited:
        run("pretraining", **PUSH, overwrite_output_dir=True, seed=5)
    assert exited.value.code == 2 and f"{NAME}: the Hub answers 403" in capsys.readouterr().err
    assert contents(data / "run") == before


def test_every_checkpoint_is_pushed_where_that_is_asked_for(run, hub, capsys):
    folder = run("pretraining", **PUSH, hub_strategy="every_save", num_steps=4, save_steps=1)
    first, *_, last = hub.commits[NAME]
    assert MODEL_FILES - {"eval_results.json"} <= set(first) and "eval_results.json" not in first
    assert {"README.md", "eval_results.json", "model.safetensors"} <= set(last)
    assert hub.repositories[NAME]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b"its training goes on" not in hub.repositories[NAME]["README.md"]
    assert not (folder / ".hub").exists() and "not pushed" not in "".join(capsys.readouterr())


def test_a_checkpoint_is_pushed_with_what_it_is_used_with(run, hub):
    run("ict", **PUSH, hub_strategy="every_save", num_steps=2, save_steps=1)
    first, *_ = hub.commits[NAME]
    assert "encoder.json" in first and "reader.json" not in first


class TestCheckpointPusher:
    @pytest.fixture
    def pusher(self, run, data) -> tuple[CheckpointPusher, list[Path]]:
        """One for a run with two checkpoints."""
        folder = run("pretraining", num_steps=2, save_steps=1)
        arguments = PretrainingArguments(
            model_name="run", output_dir=str(data), corpus_path="x", tokenizer=str(data / "base"), **PUSH
        )
        return CheckpointPusher(arguments), checkpoints_in(folder / "checkpoints")

    def test_a_failure_is_told_with_the_next_one(self, pusher, hub):
        pusher, (first, second) = pusher
        hub.refuse("POST /api/models/.+/commit/.+", 500, once=True)
        assert pusher.push(first) is None
        assert pusher.under_way.exception() is not None
        assert re.match(f"not pushed: {NAME}: the Hub answers 500.*; training goes on", pusher.push(second))
        assert pusher.under_way.exception() is None
        assert hub.repositories[NAME]["model.safetensors"] == (second / "model/model.safetensors").read_bytes()
        assert b"**This is the model after step 2 of 2**" in hub.repositories[NAME]["README.md"]

    def test_one_at_a_time_and_the_training_does_not_wait(self, pusher, hub, monkeypatch):
        pusher, (first, second) = pusher
        may_go_on = threading.Event()
        monkeypatch.setattr("mixlm.training.publishing.publish", lambda *_, **__: may_go_on.wait(60))
        assert pusher.push(first) is None
        under_way = pusher.under_way
        assert pusher.push(second) is None and pusher.under_way is under_way
        may_go_on.set()
        under_way.result()

    def test_a_checkpoint_that_is_deleted_meanwhile_arrives_whole(self, pusher, hub, monkeypatch):
        pusher, (first, _) = pusher
        weights = (first / "model/model.safetensors").read_bytes()
        monkeypatch.setattr(
            "mixlm.training.publishing.publish", lambda *given, **more: (shutil.rmtree(first), publish(*given, **more))
        )
        pusher.push(first)
        pusher.under_way.result()
        assert not first.exists() and hub.repositories[NAME]["model.safetensors"] == weights


def test_of_several_ranks_one_pushes(flags, hub, data):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **hub.environment}
    command = [*torchrun, "run_ict.py", *flags("ict", **PUSH, train_batch_size=2)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pushed to") == 1 and len(hub.commits[NAME]) == 1
    assert hub.requests.count("GET /api/whoami-v2") == 1
    assert "On 2 processes" in hub.repositories[NAME]["README.md"].decode()


class TestPushVerb:
    def push(self, *words) -> None:
        main(["push", *map(str, words)])

    @pytest.fixture
    def folder(self, data) -> Path:
        return data / "base"

    def test_a_folder_without_a_run_has_a_card_too(self, folder, hub, capsys):
        self.push(folder, NAME)
        assert capsys.readouterr().out == f"pushed to {hub.url}/{NAME}\n"
        assert b"# made-here" in hub.repositories[NAME]["README.md"]
        self.push(folder, NAME)
        assert capsys.readouterr().out == f"nothing has changed at {hub.url}/{NAME}\n"

    def test_a_model_without_a_tokenizer_is_pushed_with_a_note(self, folder, hub, capsys):
        (folder / "tokenizer.json").unlink()
        self.push(folder, NAME)
        assert f"{folder} has no tokenizer, without which" in capsys.readouterr().out

    def test_what_a_person_has_written_on_the_hub_stays_there(self, folder, hub, capsys):
        self.push(folder, NAME)
        hub.repositories[NAME]["README.md"] = "제가 쓴 글".encode()
        self.push(folder, NAME, "--license", "mit")
        assert f"README.md of {NAME} was written by hand and stays" in capsys.readouterr().out
        assert hub.repositories[NAME]["README.md"].decode() == "제가 쓴 글"

    def test_what_a_person_has_written_here_goes_there(self, folder, hub, capsys):
        (folder / "README.md").write_text("첫째", "utf-8")
        self.push(folder, NAME)
        (folder / "README.md").write_text("둘째", "utf-8")
        self.push(folder, NAME)
        assert f"README.md of {NAME} was written by hand too" in capsys.readouterr().out
        assert hub.repositories[NAME]["README.md"].decode() == "둘째"

    def test_a_failure_says_the_command_again(self, folder, hub, capsys):
        hub.refuse("PUT /objects/.+", 403)
        with pytest.raises(SystemExit) as exited:
            self.push(folder, NAME, "--private", "--license", "cc-by-4.0")
        *_, line = capsys.readouterr().err.splitlines()
        assert exited.value.code == 2
        assert line.endswith(f"push again with: mixlm push {folder} {NAME} --private --license cc-by-4.0")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["nothing", NAME], "nothing: no finished model is there"),
            (["base", "made-here"], "made-here: is not USER/NAME"),
            (["base"], "USER/NAME"),
            (["base", NAME, "--privat"], "did you mean --private?"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, words, message, data, hub, monkeypatch, capsys):
        monkeypatch.chdir(data)
        with pytest.raises(SystemExit) as exited:
            self.push(*words)
        (line,) = capsys.readouterr().err.splitlines()
        assert exited.value.code == 2 and message in line and hub.requests == []


class TestPage:
    """What docs/hub.md says is so, and docs/hub.ko.md says the same."""

    PAGES = [(REPOSITORY / "docs" / name).read_text("utf-8") for name in ("hub.md", "hub.ko.md")]

    def test_both_have_the_same_commands_code_and_flags(self):
        english, korean = (re.findall(r"```.*?```|^    .+?$|`--.+?`", page, flags=re.M | re.S) for page in self.PAGES)
        assert sorted(english) == sorted(korean) and len(english) > 10
        options = {f"--{field}" for field in PretrainingArguments.__dataclass_fields__} | {"--private", "--license"}
        flags = {flag.strip("`").split()[0] for flag in english if flag.startswith("`--")} - {"--seeds"}
        assert flags <= options

    def test_its_commands_run(self, data, hub, monkeypatch, capsys):
        (data / "mixlm").symlink_to(REPOSITORY / "mixlm")
        shutil.copytree(data / "base", data / "demo-output" / "tiny")
        tiny_model(mixlm.MixLMForPreTraining, max_position_embeddings=128).save_pretrained(data / "demo-output/tiny")
        monkeypatch.chdir(data)
        lines = re.findall(r"^\$ (.+)$", self.PAGES[0], flags=re.M)
        login, train, push, read = map(shlex.split, lines)
        assert login == ["hf", "auth", "login"]  # asks for a token, which the stand-in does not give
        assert train[:2] == ["python", "run_mrc.py"]
        monkeypatch.setattr(sys, "argv", [*train[1:], "--num_steps", "1", "--train_batch_size", "2"])
        run_mrc.main()
        assert hub.private == {"USER/my-reader"} == set(hub.repositories)
        for command in (push, read):
            capsys.readouterr()
            main(command[1:])
        assert "characters" in capsys.readouterr().out
