"""Hard negatives: what a search finds and what is no answer."""

import gzip
import json
import unicodedata

import pytest

from mixlm.cli import main
from mixlm.data.passages import Passage
from mixlm.data.retrieval import read_hard_negatives
from mixlm.data.squad import ReadingExample
from mixlm.retrieval.hits import Found, PassageHit
from mixlm.retrieval.mining import hard_negatives

OWN = "1443년에 세종이 한글을 만들었다."
PASSAGES = [
    Passage("own", "한글", OWN),
    Passage("own-again", "훈민정음", "1443년에  세종이\n한글을 만들었다."),  # the same text under another title
    Passage("answer", "세종", "세종은 1443년에 글자를 만들었다."),
    Passage("king", "왕", "세종은 왕이다."),
    Passage("king-again", "임금", "세종은 왕이다."),
    Passage("day", "", "한글날은 10월 9일이다."),
    Passage("school", "", "한글은 학교에서 배운다."),
]


def example(*answers, name="1", context=OWN):
    return ReadingExample(name, "한글", context, "한글은 언제?", (), answers, is_impossible=not answers, article=0)


def mined(examples, rows, per_question=8, passages=PASSAGES):
    """The ids of the negatives of each question, of which all have the same hits."""
    found = [Found([PassageHit(row, -float(row)) for row in rows]) for _ in examples]
    return [
        [passage.id for passage in negatives]
        for _, negatives in hard_negatives(examples, found, passages, per_question)
    ]


def test_what_answers_the_question_is_no_negative():
    assert mined([example("1443년", "왕")], [2, 5, 3, 6]) == [["day", "school"]]
    assert mined([example("없음")], [2, 5, 3, 6]) == [["answer", "day", "king", "school"]]


def test_an_answer_is_looked_for_in_titles_too_and_in_either_case():
    passages = [
        Passage("title", "ISO 639", "한국어는 ko이다."),
        Passage("text", "", "iso  639는 언어의 부호이다."),
        Passage("across", "ISO", "639번지에 산다."),  # the end of a title and the beginning of a text are apart
        Passage("street", "Straße", "길이다."),
    ]
    assert mined([example("Iso 639")], [0, 1, 2, 3], passages=passages) == [["across", "street"]]
    assert mined([example("STRASSE")], [0, 3], passages=passages) == [["title"]]


def test_nor_is_its_own_text_under_whichever_title():
    assert mined([example("없음")], [1, 6, 0, 5]) == [["school", "day"]]
    assert mined([example("없음", context="other")], [1, 6, 0]) == [["own-again", "school"]]


def test_of_equal_texts_the_better_hit_is_kept():
    assert mined([example("없음")], [4, 3, 5]) == [["king-again", "day"]]


def test_the_best_hits_are_taken():
    assert mined([example("1443년")], [0, 2, 6, 5, 3], per_question=2) == [["school", "day"]]
    assert mined([example("1443년")], [0, 2], per_question=2) == [[]]


def test_every_question_starts_anew():
    assert mined([example("1443년"), example("10월")], [2, 5, 3]) == [["day", "king"], ["answer", "king"]]


def test_a_question_without_an_answer_leaves_out_its_own_text_alone():
    assert mined([example()], [0, 2, 3]) == [["answer", "king"]]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("other_form", ["NFC", "NFD"])
def test_texts_are_compared_as_they_look(form, other_form):
    passages = [Passage(*(unicodedata.normalize(form, field) for field in passage)) for passage in PASSAGES]
    of_other_form = example(
        unicodedata.normalize(other_form, "1443년에  글자"), context=unicodedata.normalize(other_form, OWN)
    )
    assert mined([of_other_form], [0, 1, 2, 3], passages=passages) == [["king"]]


@pytest.fixture
def folder(tmp_path, monkeypatch, capsys):
    """A folder with an index and questions about it, where the verb runs."""
    monkeypatch.chdir(tmp_path)
    passages = [passage._asdict() for passage in PASSAGES]
    (tmp_path / "passages.jsonl").write_text("\n".join(map(json.dumps, passages)))
    articles = []
    for number, (question, context, answer) in enumerate(
        [("한글은 언제?", OWN, "1443년"), ("학교에서?", PASSAGES[6].text, "한글"), ("zzz", PASSAGES[5].text, "9일")]
    ):
        answers = [{"text": answer, "answer_start": context.index(answer)}]
        qas = [{"id": f"q{number}", "question": question, "answers": answers}]
        articles.append({"title": "", "paragraphs": [{"context": context, "qas": qas}]})
    (tmp_path / "squad.json").write_text(json.dumps({"data": articles}))
    main("index --passages passages.jsonl --lexical_only --out index".split())
    capsys.readouterr()
    return tmp_path


def test_the_verb_writes_what_the_training_reads(folder, capsys):
    mine = ["mine", "--index", "index", "--questions", "squad.json", "--per_question", "2", "--out"]
    main([*mine, "negatives.jsonl"])
    assert capsys.readouterr().out == "lexical hard negatives of 3 questions: negatives.jsonl; 1 have 2, 2 none\n"
    negatives = read_hard_negatives("negatives.jsonl")
    assert sorted(negatives["q0"]) == [("", PASSAGES[5].text), ("", PASSAGES[6].text)]
    assert (list(negatives), negatives["q1"], negatives["q2"]) == (["q0", "q1", "q2"], [], [])
    main([*mine, "some.jsonl.gz", "--articles", ":1", "--depth", "2"])
    with gzip.open("some.jsonl.gz", "rt", encoding="utf-8") as file:
        assert [json.loads(line)["id"] for line in file] == ["q0"]


def test_questions_are_also_lines_as_the_help_says(folder, capsys):
    answers = {"text": ["1443년"], "answer_start": [0]}
    row = {"id": "row", "question": "한글은 언제?", "context": OWN, "answers": answers}
    (folder / "squad.jsonl").write_text(json.dumps(row))
    main("mine --index index --questions squad.jsonl --out negatives.jsonl".split())
    assert list(read_hard_negatives("negatives.jsonl")) == ["row"]
    for verb in ("mine", "ask"):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert "SQuAD-style .json, or .jsonl with SQuAD's columns" in " ".join(capsys.readouterr().out.split())


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "negatives.json"], "--out negatives.json: negatives are written a question a line; name it .jsonl"),
        (["--out", "negatives.gz"], "name it .jsonl"),
        (["--out", "absent/negatives.jsonl"], "--out absent/negatives.jsonl: no such folder"),
        (["--out", "folder.jsonl"], "--out folder.jsonl: is no file"),
        (["--out", "q.jsonl", "--questions", "q.jsonl"], "--out q.jsonl: is what --questions reads, or lies in it"),
        (["--out", "x.jsonl", "--questions", "."], "--out x.jsonl: is what --questions reads, or lies in it"),
        (["--out", "x.jsonl", "--per_question", "0"], "--per_question 0: must be from 1 to --depth, which is 50"),
        (["--out", "x.jsonl", "--per_question", "3", "--depth", "2"], "--per_question 3"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_read(folder, capsys, monkeypatch, options, message):
    (folder / "folder.jsonl").mkdir()
    before = sorted(folder.iterdir())
    monkeypatch.setattr("mixlm.data.squad.read_squad", None)
    monkeypatch.setattr("mixlm.retrieval.index.open_index", None)
    assert message in error_of(capsys, "mine", "--index", "index", "--questions", "squad.json", *options)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--index", "absent"], "absent: not a whole index"),
        (["--questions", "absent.json"], "absent.json: no such file"),
        (["--articles", "7:"], 'articles "7:": no question is in this range'),
        (["--mode", "dense"], "has no vectors to search by"),
        (["--model", "retriever"], "--model retriever: is for search by vectors, and this is lexical; leave it out"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, capsys, options, message):
    before = sorted(folder.iterdir())
    usual = ["mine", "--index", "index", "--questions", "squad.json", "--out", "x.jsonl"]
    assert message in error_of(capsys, *usual, *options)  # of an option that comes twice, the last counts
    assert sorted(folder.iterdir()) == before
