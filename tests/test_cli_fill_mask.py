"""`mixlm fill-mask`."""

import json
import shutil
import unicodedata

import pytest
from remote_models import tiny_model, tiny_tokenizer

import mixlm
from mixlm.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(mixlm.MixLMForMaskedLM).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_what_the_model_expects_is_printed(folder, capsys):
    main(["fill-mask", "--model", folder, "--top", "3", "서울 은 [MASK] 의 수도"])
    text, *answers = capsys.readouterr().out.splitlines()
    assert text == "서울 은 [MASK] 의 수도" and len(answers) == 3 and all(line.endswith("%") for line in answers)


def test_decomposed_syllables_are_composed(folder, capsys):
    printed = []
    for form in ("NFC", "NFD"):
        main(["fill-mask", "--model", folder, unicodedata.normalize(form, "서울 은 [MASK] 의 수도")])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["\udcff [MASK]"], "the text: character 0 is no text; write it in UTF-8"),
        (["서울"], "no [MASK] in '서울'; put it where a word is to be found"),
        (["[MASK]", "--top", "0"], "--top 0: must be 1 or more"),
    ],
)
def test_what_is_wrong_is_one_line(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["fill-mask", "--model", folder, *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error == f"error: {message}\n"


def refusal(folder, capsys) -> str:
    """The one line of the error about a model."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["fill-mask", "--model", str(folder), "서울 은 [MASK]"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", ["/nosuch", "./nosuch", "~/nosuch", "outputs/run/nosuch", "outputs/nosuch/"])
def test_a_folder_that_is_not_there(name, capsys):
    assert refusal(name, capsys) == f"error: {name}: no such folder; check its name\n"


def test_a_folder_that_is_not_there_beside_others(tmp_path, capsys, monkeypatch):
    """It could be a name on the Hub, of which transformers would ask for most of a minute."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    line = "error: outputs/my-modle: no such folder, and no model that the Hub gives; check its name\n"
    assert refusal("outputs/my-modle", capsys) == line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"ff_dim": 128}, "cannot be loaded: its weights do not have the shapes that its config.json says"),
    ],
)
def test_a_configuration_that_is_wrong_or_of_another_model(folder, tmp_path, capsys, changes, message):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**fields, **changes}), "utf-8")
    line = refusal(tmp_path, capsys)
    assert str(tmp_path) in line and message in line


def test_a_model_without_a_head_for_masked_tokens(tmp_path, capsys):
    tiny_model(mixlm.MixLMForQuestionAnswering).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert f"--model {tmp_path}: lacks 5 weights that fill masks, such as mlm_head." in refusal(tmp_path, capsys)
