"""`mixlm index` and `search`."""

import gzip
import json
import os

import pytest

import mixlm.data.packages as packages
from mixlm.cli import main
from mixlm.data.passages import WINDOW_CHARACTERS

PASSAGES = [
    {"id": "jeju", "title": "제주도", "text": "한국에서 가장 큰 섬이다."},
    {"id": "sejong", "title": "세종", "text": "1443년에 한글을 만들었다. " * 20},
]


@pytest.fixture
def folder(tmp_path, monkeypatch, capsys):
    """A folder with passages, questions and an index, where the verbs run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "passages.jsonl").write_text("\n".join(map(json.dumps, PASSAGES)))
    questions = [{"id": "1", "text": "한글을 만든 해는?"}, {"id": "2", "text": "없음"}, {"id": "3", "text": "큰 섬이"}]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    main("index --passages passages.jsonl --lexical_only --out index".split())
    assert capsys.readouterr().out == "2 passages: index\n"
    return tmp_path


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_hits_are_written_as_a_trec_run(folder):
    main("search --index index --queries questions.jsonl --top_k 5 --mode lexical --out hits.trec".split())
    lines = [line.split() for line in (folder / "hits.trec").read_text().splitlines()]
    assert [(*line[:4], line[5]) for line in lines] == [
        ("1", "Q0", "sejong", "1", "mixlm"),
        ("3", "Q0", "jeju", "1", "mixlm"),
    ]
    assert all(float(line[4]) > 0 for line in lines)


def test_questions_of_squad_are_searched(folder):
    question = {"id": "7", "question": "한글을?", "answers": []}
    data = [{"title": "", "paragraphs": [{"context": "-", "qas": [question]}]}]
    (folder / "squad.json").write_text(json.dumps({"data": data}))
    main("search --index index --queries squad.json --out hits.trec".split())
    assert (folder / "hits.trec").read_text().startswith("7 Q0 sejong 1 ")


def test_the_hits_of_a_question_are_printed(folder, capsys):
    main(["search", "--index", "index", "--query", "한글은"])
    out = capsys.readouterr().out
    assert out.startswith("1  ") and "sejong  세종\n   1443년에" in out and out.endswith("...\n") and len(out) < 300
    main(["search", "--index", "index", "--query", "?"])
    assert capsys.readouterr().out == "no passage is found for this question\n"


def test_morphemes(folder, capsys):
    main("index --passages passages.jsonl --lexical_only --morphemes --out morphemes".split())
    capsys.readouterr()
    main(["search", "--index", "morphemes", "--query", "섬에서"])
    assert "jeju" in capsys.readouterr().out


def test_what_cannot_be_written_is_refused_before_the_search(folder, capsys):
    os.mkfifo("pipe.jsonl")
    for out in ("index", "pipe.jsonl"):
        error = error_of(capsys, *f"search --index absent --queries questions.jsonl --out {out}".split())
        assert f"--out {out}: is no file; use another name" in error


def test_bad_input_is_one_line_and_leaves_nothing(folder, capsys):
    before = sorted(folder.iterdir())
    (folder / "passages.jsonl").write_text("\n".join(map(json.dumps, [*PASSAGES, PASSAGES[0]])))
    index = ["index", "--lexical_only", "--out", "new", "--passages"]
    assert "line 3: 'jeju'" in error_of(capsys, *index, "passages.jsonl")
    assert "no such file" in error_of(capsys, *index, "absent.jsonl")
    assert "--vectors" in error_of(capsys, "index", "--passages", "passages.jsonl", "--out", "new")
    window = ["--window_characters", "0"]
    assert "1 or more" in error_of(capsys, *index, ".", *window)
    assert "--window_characters cuts .dat documents" in error_of(capsys, *index, "questions.jsonl", *window)
    assert "absent.dat: no such file" in error_of(capsys, *index, "absent.dat", "--window_characters", "9")
    vectors = ["index", "--vectors", "vectors", "--out", "new"]
    assert "--window_characters is of --passages" in error_of(capsys, *vectors, *window)
    encode = ["encode", "--model", "absent", "--passages", "passages.jsonl", "--out", "vectors"]
    assert "--window_characters cuts .dat documents" in error_of(capsys, *encode, *window)
    search = ["search", "--index", "index"]
    assert "--queries" in error_of(capsys, *search)
    assert "belong together" in error_of(capsys, *search, "--queries", "questions.jsonl")
    assert "belong together" in error_of(capsys, *search, "--query", "x", "--out", "hits.trec")
    assert "--top_k 0" in error_of(capsys, *search, "--query", "x", "--top_k", "0")
    assert "name it .jsonl" in error_of(capsys, *search, "--queries", "questions.jsonl", "--out", "hits.json")
    assert "--json is for --query" in error_of(capsys, *search, "--queries", "questions.jsonl", "--out", "x", "--json")
    for blank in ("", " \n"):
        assert "--query: is empty; ask something" in error_of(capsys, *search, "--query", blank)
    assert "--query: character 1 is no text" in error_of(capsys, *search, "--query", "x\udcff")
    assert "no such folder" in error_of(capsys, *search, "--queries", "questions.jsonl", "--out", "absent/hits.trec")
    assert "not a whole index" in error_of(capsys, "search", "--index", "absent", "--query", "x")
    over = ["--queries", "questions.jsonl", "--out", "questions.jsonl"]
    assert "--out questions.jsonl: is what --queries reads" in error_of(capsys, *search, *over)
    assert "--model x: is for search by vectors" in error_of(capsys, *search, "--query", "x", "--model", "x")
    assert sorted(folder.iterdir()) == before


def test_hits_as_json(folder, capsys):
    main("search --index index --queries questions.jsonl --out hits.jsonl.gz".split())
    with gzip.open(folder / "hits.jsonl.gz", "rt", encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    assert [each["id"] for each in found] == ["1", "2", "3"] and found[1]["hits"] == []
    capsys.readouterr()
    main(["search", "--index", "index", "--query", found[0]["question"], "--json"])
    assert {"id": "1", **json.loads(capsys.readouterr().out)} == found[0]
    hit = found[0]["hits"][0]
    assert hit.pop("score") > 0
    assert hit == {"rank": 1, **PASSAGES[1]}


def test_ids_that_no_run_can_have_are_found_before_the_search(folder, capsys, monkeypatch):
    (folder / "questions.jsonl").write_text('{"id": "a b", "text": "섬이"}')
    monkeypatch.setattr("mixlm.retrieval.index.open_index", None)
    error = error_of(capsys, *"search --index index --queries questions.jsonl --out hits.trec".split())
    assert "'a b' cannot stand in a TREC run" in error


@pytest.mark.parametrize("options", [[], ["--morphemes"]])
def test_a_question_of_any_length(folder, capsys, options):
    main(["index", "--passages", "passages.jsonl", "--lexical_only", "--out", "new", *options])
    capsys.readouterr()
    main(["search", "--index", "new", "--query", "한글을 " * 25_000])
    assert "sejong" in capsys.readouterr().out
    main(["search", "--index", "new", "--query", "?"])
    assert capsys.readouterr().out == "no passage is found for this question\n"


def test_a_missing_package_is_one_line(folder, capsys, monkeypatch):
    def fails(module):
        raise ImportError(module)

    monkeypatch.setattr(packages, "import_module", fails)
    error = error_of(capsys, "index", "--passages", "passages.jsonl", "--lexical_only", "--out", "new")
    assert "mixlm[retrieval]" in error


def test_the_help_names_the_default_that_there_is(capsys):
    with pytest.raises(SystemExit):
        main(["index", "--help"])
    assert f"(default: {WINDOW_CHARACTERS})" in " ".join(capsys.readouterr().out.split())


def test_the_help_says_what_a_question_without_any_word_finds(folder, capsys):
    """Vectors find something: tests/retrieval/test_search.py."""
    main(["search", "--index", "index", "--query", "?!"])
    assert capsys.readouterr().out == "no passage is found for this question\n"
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "By common terms, a question without any word finds none." in said
