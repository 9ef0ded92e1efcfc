"""`mixlm fill-mask`."""

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
