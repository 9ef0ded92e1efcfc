"""`mixlm ask`."""

import errno
import gzip
import json
import sys

import pytest
from answering import StubReader, save_reader

from mixlm.cli import main
from mixlm.open_qa import Choice, OpenQA
from mixlm.reader import MixLMReader
from mixlm.retrieval.index import open_index

HANGUL = "한글은\n1443년에 만들어졌다."
PASSAGES = [
    {"id": "island", "title": "제주도", "text": "한국에서 가장 큰 섬이다."},
    {"id": "hangul", "title": "한글", "text": HANGUL},
    {"id": "day", "title": "", "text": "한글날은 9일이다." + " 쉰다." * 40},
    {"id": "letters", "title": "글자", "text": ""},
]
ASK = ["ask", "--index", "index", "--reader", "reader"]


@pytest.fixture
def folder(tmp_path, monkeypatch, capsys):
    """A folder with an index and questions, where the verb runs; its reader takes the first number for the answer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    use_reader(monkeypatch, StubReader())
    (tmp_path / "passages.jsonl").write_text("\n".join(map(json.dumps, PASSAGES)))
    main("index --passages passages.jsonl --lexical_only --out index".split())
    capsys.readouterr()
    return tmp_path


def use_reader(monkeypatch, reader):
    monkeypatch.setattr(MixLMReader, "from_pretrained", lambda name: reader)


def write_questions(*questions):
    """A SQuAD-style file with an article for each question, its context and its answer or None."""
    articles = []
    for number, (question, context, answer) in enumerate(questions):
        answers = [] if answer is None else [{"text": answer, "answer_start": context.index(answer)}]
        qas = [{"id": f"q{number}", "question": question, "answers": answers, "is_impossible": answer is None}]
        articles.append({"title": "", "paragraphs": [{"context": context, "qas": qas}]})
    with open("squad.json", "w", encoding="utf-8") as file:
        json.dump({"data": articles}, file)


def usual_questions():
    """One that is right, and one wrong answer for each part that may be at fault: reader, choice, retriever."""
    write_questions(
        ("한글이 만들어진 해는?", HANGUL, "1443년"),
        ("큰 섬은 어느 나라에?", PASSAGES[0]["text"], "한국"),
        ("한글날은 한글날은?", PASSAGES[2]["text"], "9일"),
        ("zzz", PASSAGES[0]["text"], "섬"),
    )


class MarkingReader(StubReader):
    """Its answers are words, as people give them: a number with what follows it."""

    def read(self, examples):
        for example, reading in zip(examples, super().read(examples), strict=True):
            longer = [
                span._replace(text=example.context[span.start_char : span.end_char + 1], end_char=span.end_char + 1)
                if span.text
                else span
                for span in reading.candidates
            ]
            yield reading._replace(answer=longer[0], candidates=longer)


def metrics_of(out):
    """The lines of a table by their first word."""
    return {line.split()[0]: line.split()[1] for line in out.splitlines() if line.strip()}


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_an_answer_is_printed_in_its_passage(folder, capsys):
    main([*ASK, "한글은 언제 만들어졌나? 글자는?"])
    answer, *blocks = capsys.readouterr().out.split("\n\n")
    assert answer == "1443" and len(blocks) == 3
    assert blocks[0] == "hangul  한글\n   reader 4.00, retriever 1.00\n   한글은 [1443]년에 만들어졌다."
    name, scores, text = blocks[1].splitlines()
    assert name == "day" and scores.startswith("   reader 1.00, ")  # no title, and no blank in its place
    assert text.startswith("   한글날은 [9]일이다. 쉰다.") and text.endswith("...") and len(text) < 110
    name, scores = blocks[2].splitlines()
    assert name == "letters  글자" and scores.startswith("   reader finds nothing, ")  # a title alone


def test_what_is_before_an_answer_is_cut_too(folder, capsys, monkeypatch):
    passage = {"id": "long", "title": "", "text": "가나다라 " * 30 + "77 " + "마바사아 " * 30}
    (folder / "passages.jsonl").write_text(json.dumps(passage))
    main("index --passages passages.jsonl --lexical_only --out index".split())
    capsys.readouterr()
    main([*ASK, "가나다라"])
    shown = capsys.readouterr().out.splitlines()[-1]
    before, after = passage["text"].split("77")
    assert shown == f"   ...{before[-80:]}[77]{after[:80]}..."


@pytest.mark.parametrize(("no_color", "has_style"), [(None, True), ("", True), ("1", False)])
def test_in_a_terminal_the_answer_is_in_reverse_video(folder, capsys, monkeypatch, no_color, has_style):
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main([*ASK, "한글은 언제 만들어졌나?"])
    out = capsys.readouterr().out
    assert ("   한글은 \033[7m1443\033[0m년에" in out) == has_style and ("[1443]" in out) == (not has_style)


def test_no_answer_shows_what_was_held_back(folder, capsys, monkeypatch):
    use_reader(monkeypatch, StubReader(null_score=9.0))
    main([*ASK, "한글은 언제 만들어졌나?"])
    out = capsys.readouterr().out
    assert out.startswith("(no answer)\n\nhangul  한글  (what would be the answer)\n   reader -5.00, retriever 1.00\n")
    assert out.count("what would be") == 1 and "[1443]" in out
    main([*ASK, "가장 큰 섬이"])  # a passage without a number
    out = capsys.readouterr().out
    assert out.startswith("(no answer)\n\nisland  제주도\n   reader finds nothing") and "[" not in out
    main([*ASK, "zzz"])
    assert capsys.readouterr().out == "no passage is found for this question\n"


def test_one_answer_as_json(folder, capsys):
    main([*ASK, "한글은 언제 만들어졌나?", "--json", "--top_k", "2"])
    record = json.loads(capsys.readouterr().out)
    assert (record["question"], record["answer"]) == ("한글은 언제 만들어졌나?", "1443")
    assert [each["passage"] for each in record["candidates"]] == [PASSAGES[1], PASSAGES[2]]
    main([*ASK, "zzz", "--json"])
    assert json.loads(capsys.readouterr().out) == {"question": "zzz", "answer": "", "candidates": []}


def test_a_real_reader_answers(folder, capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    reader = save_reader(folder / "reader", [passage["text"] for passage in PASSAGES])
    expected = OpenQA(open_index(folder / "index"), MixLMReader.from_pretrained(reader)).answer("한글은 언제?")
    main([*ASK, "한글은 언제?", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["answer"] == expected.text != ""
    assert [each["text"] for each in record["candidates"]] == [each.text for each in expected.candidates]


def test_the_answers_to_a_file_are_judged(folder, capsys, monkeypatch):
    use_reader(monkeypatch, MarkingReader())
    usual_questions()
    main([*ASK, "--questions", "squad.json", "--top_k", "3", "--out", "answers.jsonl.gz"])
    out = capsys.readouterr().out
    assert metrics_of(out) == {
        "exact_match": "25.00",
        "f1": "25.00",
        "hits@1": "75.00",
        "hits@3": "75.00",
        "fault_of_retriever": "25.00",
        "fault_of_reader": "25.00",
        "fault_of_choice": "25.00",
    }
    assert "% of 4 questions, as korquad_v1 has it" in out
    with gzip.open("answers.jsonl.gz", "rt", encoding="utf-8") as file:
        answers = [json.loads(line) for line in file]
    assert [(each["id"], each["answer"], each["first_hit"], each["fault"]) for each in answers] == [
        ("q0", "1443년", 1, None),
        ("q1", "", 1, "reader"),
        ("q2", "1443년", 1, "choice"),
        ("q3", "", None, "retriever"),
    ]
    assert [each["references"] for each in answers] == [["1443년"], ["한국"], ["9일"], ["섬"]]
    assert answers[2]["question"] == "한글날은 한글날은?" and answers[2]["exact_match"] == 0
    assert {each["text"] for each in answers[2]["candidates"]} >= {"1443년", "9일"}


@pytest.mark.parametrize("articles", [["--articles", ":1"], ["--articles=-4:1"]])
def test_the_questions_of_some_articles_alone(folder, capsys, monkeypatch, articles):
    use_reader(monkeypatch, MarkingReader())
    usual_questions()
    main([*ASK, "--questions", "squad.json", *articles, "--json"])
    metrics = json.loads(capsys.readouterr().out)
    assert (metrics["questions"], metrics["exact_match"], metrics["metric"]) == (1, 100, "korquad_v1")
    assert (metrics["weight"], metrics["threshold"]) == (2, None)


def test_the_choice_is_tuned_stored_and_used(folder, capsys, monkeypatch):
    use_reader(monkeypatch, reader := MarkingReader())
    usual_questions()
    asked = [*ASK, "--questions", "squad.json"]
    main([*asked, "--tune"])
    table, metrics = capsys.readouterr().out.split("\n\n")
    head, *rows = table.splitlines()
    # Of q2 the right answer has 1 and all of the weight, the wrong one 4 and, as the worse of two hits, none of it.
    assert head.split() == "weight of the retriever f1 answers from a reader score of".split()
    assert [row.split()[0] for row in rows] == ["0", "0.5", "1", "2", "4", "8", "16", "32"]
    chosen = [row.split() for row in rows if "chosen" in row]
    assert chosen == [["4", "50.00", "chosen"]] and metrics_of(metrics)["exact_match"] == "50.00"
    assert OpenQA(open_index(folder / "index"), reader).choice == Choice(4.0)
    main([*asked, "--json"])  # by what was stored
    first = json.loads(capsys.readouterr().out)
    assert (first["weight"], first["exact_match"], first["fault_of_choice"]) == (4, 50, 0)
    main([*asked, "--tune", "--json"])
    out, error = capsys.readouterr()
    assert json.loads(out) == first and error == ""  # one object, and no table before it
    main([*asked, "--json", "--top_k", "2"])
    out, error = capsys.readouterr()
    assert json.loads(out)["weight"] == 2 and error.count("\n") == 1
    assert error.startswith("note: what is tuned in index is not used, because top_k is 10 there and 2 now; to choose")
    use_reader(monkeypatch, MarkingReader(seed=1))
    main([*asked, "--json"])
    assert json.loads(capsys.readouterr().out)["weight"] == 2


def test_questions_without_an_answer_have_a_threshold_tuned(folder, capsys, monkeypatch):
    use_reader(monkeypatch, MarkingReader())
    write_questions(("한글이 만들어진 해는?", HANGUL, "1443년"), ("쉰다 쉰다", PASSAGES[2]["text"], None))
    asked = [*ASK, "--questions", "squad.json", "--top_k", "1"]
    main([*asked, "--json"])
    before = json.loads(capsys.readouterr().out)
    assert (before["exact_match"], before["fault_of_choice"], before["hits@1"]) == (50, 50, 100)
    main([*asked, "--tune"])
    out = capsys.readouterr().out
    assert "hits@1              100.00  % of 1 questions that have an answer\n" in out
    assert "  100.00  " in out and "4.00  chosen\n" in out and metrics_of(out)["exact_match"] == "100.00"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments QUESTION --questions is required"),
        (["x", "--questions", "squad.json"], "not allowed with argument"),
        (["x", "--articles", "0:1"], "--articles is of --questions; leave it out"),
        (["x", "--articles", ""], "--articles is of --questions; leave it out"),
        (["x", "--tune"], "--tune is of --questions; leave it out"),
        (["x", "--out", "answers.jsonl"], "--out is of --questions; leave it out"),
        ([" "], "the question: is empty; ask something"),
        ([""], "the question: is empty; ask something"),
        (["x\udcff"], "the question: character 1 is no text"),
        (["x", "--top_k", "0"], "--top_k 0: must be 1 or more"),
        (["--questions", "squad.json", "--top_k", "-1"], "--top_k -1: must be 1 or more"),
        (["--questions", "squad.json", "--out", "answers.json"], "answers are written a question a line; name it .js"),
        (["--questions", "squad.json", "--out", "answers.txt.gz"], "name it .jsonl"),
        (["--questions", "squad.json", "--out", "absent/answers.jsonl"], "no such folder; make it first"),
        (["--questions", "squad.json", "--out", "folder.jsonl"], "--out folder.jsonl: is no file"),
        (
            ["--questions", "q.jsonl", "--out", "../{here}/q.jsonl"],
            "q.jsonl: is what --questions reads, or lies in it",
        ),
        (["--questions", ".", "--out", "answers.jsonl"], "--out answers.jsonl: is what --questions reads, or lies in"),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_read(folder, capsys, monkeypatch, options, message):
    usual_questions()
    (folder / "folder.jsonl").mkdir()
    before = sorted(folder.iterdir())
    monkeypatch.setattr("mixlm.data.squad.read_squad", None)
    monkeypatch.setattr("mixlm.retrieval.index.open_index", None)
    assert message in error_of(capsys, *ASK, *(option.format(here=folder.name) for option in options))
    assert sorted(folder.iterdir()) == before


def test_an_index_that_cannot_be_written_is_told_before_anything_is_read(folder, capsys, monkeypatch):
    def read_only(**options):
        raise OSError(errno.EROFS, "Read-only file system", "index")

    usual_questions()
    monkeypatch.setattr("mixlm.retrieval.index.TemporaryFile", read_only)
    use_reader(monkeypatch, reader := StubReader())
    error = error_of(capsys, *ASK, "--questions", "squad.json", "--tune")
    assert "index: nothing can be stored in it (index: Read-only file system)" in error and not reader.read_texts
    main([*ASK, "--questions", "squad.json"])  # which stores nothing
    assert reader.read_texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--index", "absent"], "absent: not a whole index"),
        (["--questions", "absent.json"], "absent.json: no such file"),
        (["--articles", "9:"], 'articles "9:": no question is in this range'),
        (["--questions", "blank.jsonl"], "blank.jsonl: question 'b' is empty; ask something, or remove it"),
        (["--mode", "hybrid"], "has no vectors to search by"),
        (["--model", "retriever"], "--model retriever: is for search by vectors, and this is lexical; leave it out"),
        (["--model", "retriever", "--mode", "lexical"], "--model retriever: is for search by vectors"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, capsys, options, message):
    usual_questions()
    answers = {"text": ["한글"], "answer_start": [0]}
    blank = {"id": "b", "question": " ", "context": HANGUL, "answers": answers}
    (folder / "blank.jsonl").write_text(json.dumps(blank))
    before = sorted(folder.iterdir())
    usual = [*ASK, "--questions", "squad.json", "--out", "answers.jsonl"]
    assert message in error_of(capsys, *usual, *options)  # of an option that comes twice, the last counts
    assert sorted(folder.iterdir()) == before


def test_a_reader_that_is_not_there_is_one_line(folder, capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    (folder / "reader").mkdir()
    assert "reader: cannot be loaded" in error_of(capsys, *ASK, "한글은?")
