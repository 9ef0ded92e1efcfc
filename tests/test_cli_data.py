import json
import re
import shlex
from pathlib import Path

import pytest

from mixlm.cli import main

CORPUS = (
    "제주도는 우리나라에서 가장 큰 섬으로 한반도 남쪽 바다에 있다.\n화산이 있다.\n\n화산이 있다.\n\n화산이 있다.\n"
)
QUESTIONS = {
    "id": "q1",
    "context": "제주도는 우리나라에서 가장 큰 섬으로, 한반도 남쪽 바다에 있다.",
    "question": "제주도는 어디에 있는가?",
    "answers": {"text": ["한반도 남쪽 바다"], "answer_start": [23]},
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    (tmp_path / "corpus.dat").write_text(CORPUS, "utf-8")
    rows = [{"text": text} for text in CORPUS.split("\n\n")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    (tmp_path / "dev.jsonl").write_text(json.dumps(QUESTIONS), "utf-8")
    return tmp_path


def stats(capsys, *options):
    main(["data", "stats", *map(str, options)])
    return capsys.readouterr().out


def test_every_form_of_corpus_gives_the_same(files, capsys):
    evaluation = ("--evaluation_file", files / "dev.jsonl", "--json")
    expected = json.loads(stats(capsys, "--corpus_path", files / "corpus.dat", *evaluation))
    assert (expected["documents"], expected["sentences"]) == (3, 4)
    assert expected["duplicates"] == {"documents": 1, "similar_documents": 1, "sentences": 2}
    assert expected["overlaps"][0]["known_texts"] == expected["overlaps"][0]["questions_about_known_texts"] == 1
    assert expected["overlaps"][0]["most_known"][0]["place"].endswith("corpus.dat:1")
    del expected["overlaps"][0]["most_known"]
    for options in ((), ("--streaming",)):
        found = json.loads(stats(capsys, "--dataset_name", files / "rows.jsonl", *options, *evaluation))
        assert found["overlaps"][0].pop("most_known")[0]["place"].endswith("rows.jsonl:1")
        assert found == expected


def test_what_is_printed_tells_of_leaks(files, capsys):
    printed = stats(capsys, "--corpus_path", files / "corpus.dat", "--evaluation_file", files / "dev.jsonl")
    lines = {tuple(line.split()[:3]) for line in printed.splitlines()}
    assert {("documents", "3"), ("documents", "1", "33.33%"), ("known", "texts", "1")} <= lines
    assert f"100.0% of the text of question q1: {files / 'corpus.dat'}:1" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "one of the arguments --corpus_path --dataset_name is required"),
        (("--corpus_path", "absent"), "absent: no such file or folder; give the folder that holds the corpus files"),
        (("--corpus_path", "{}/dev.jsonl"), "not a corpus file"),
        (("--corpus_path", "{}/corpus.dat", "--streaming"), "--streaming and --dataset_config_name are for"),
        (("--corpus_path", "{}/corpus.dat", "--evaluation_file", "{}/corpus.dat"), "not a file of questions"),
        (("--corpus_path", "{}/corpus.dat", "--tokenizer", "{}"), "{}"),
        (("--dataset_name", "{}/rows.jsonl", "--text_column", "body"), 'no column "body"; choose one of text'),
    ],
)
def test_what_is_wrong_is_said_in_a_line(files, capsys, options, message):
    with pytest.raises(SystemExit) as end:
        stats(capsys, *(option.format(files) for option in options))
    assert end.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message.format(files) in error[0]


def test_the_page_works_as_printed(files, monkeypatch, capsys):
    """In both languages it has the same program and command."""
    repository = Path(__file__).parents[1]
    pages = [(repository / "docs" / name).read_text("utf-8") for name in ("data.md", "data.ko.md")]
    blocks, others = (re.findall(r"```(python|console)\n(.*?)```", page, re.DOTALL) for page in pages)
    assert blocks == others
    (_, program), (_, command) = blocks
    (files / "mixlm").mkdir()
    (files / "mixlm" / "sample").symlink_to(repository / "mixlm" / "sample")
    monkeypatch.chdir(files)
    monkeypatch.setenv("MIXLM_CACHE", str(files / "cache"))
    exec(compile(program, "data.md", "exec"), {})
    assert re.search(r"^\d+ documents, \d+ tokens\n\(Answer\(text='섬', start=5\),\)$", capsys.readouterr().out, re.M)
    main(shlex.split(command.removeprefix("$ mixlm ")))
    assert re.search(r"known texts +66 +100.00%", capsys.readouterr().out)
