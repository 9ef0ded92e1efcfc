"""Files of retrieval, the mistakes in them, and `mixlm evaluate`."""

import gzip
import json
import lzma
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlm.cli import main
from mixlm.data.text_files import write_text
from mixlm.errors import UserError
from mixlm.evaluation.retrieval import METRICS, ranking
from mixlm.evaluation.retrieval_files import (
    beir_files,
    read_qrels,
    read_queries,
    read_run,
    read_squad_judgements,
    write_run,
)

RUN = "1 Q0 b 1 2.5 system\n1 Q0 a 2 1e-3 system\n\n2\tQ0\ta  1 -4 system\r\n"
HITS = {"1": [("b", 2.5), ("a", 0.001)], "2": [("a", -4.0)]}
BEIR_QRELS = "query-id\tcorpus-id\tscore\n1\ta b\t1\n1\tc\t0\n2\ta b\t2\n"
TREC_QRELS = "1 0 a 1\n1 0 c 0\n2\t0\ta  2\n"

IDS = st.text(st.characters(exclude_categories=("Z", "C")), min_size=1, max_size=4)
SCORES = st.floats(allow_nan=False, width=32) | st.floats(allow_nan=False)


def written(folder: Path, text: str, name: str = "file") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode())
    return file


def test_a_run(tmp_path):
    assert read_run(written(tmp_path, RUN)) == HITS


def test_writing_a_run(tmp_path):
    write_run(tmp_path / "run", {"1": [("a", 0.1), ("b", 3)], "2": []})
    assert (tmp_path / "run").read_text("utf-8") == "1 Q0 b 1 3.0 mixlm\n1 Q0 a 2 0.1 mixlm\n"


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(hits=st.dictionaries(IDS, st.dictionaries(IDS, SCORES, min_size=1), min_size=1))
def test_what_is_written_is_read(hits, tmp_path_factory):
    file = tmp_path_factory.mktemp("run") / "run.trec"
    hits = {query: list(found.items()) for query, found in hits.items()}
    write_run(file, hits)
    found = read_run(file)
    assert {query: dict(of_query) for query, of_query in found.items()} == {
        query: dict(of_query) for query, of_query in hits.items()
    }
    assert {query: [passage for passage, _ in of_query] for query, of_query in found.items()} == {
        query: ranking(of_query) for query, of_query in hits.items()
    }


@pytest.mark.parametrize(("suffix", "opened"), [(".gz", gzip.open), (".xz", lzma.open)])
def test_compressed_files(tmp_path, suffix, opened):
    file = tmp_path / f"run.trec{suffix}"
    write_run(file, HITS)
    with opened(file, "rt", encoding="utf-8") as stream:
        assert stream.read().startswith("1 Q0 b 1 2.5 mixlm\n")
    assert read_run(file) == HITS


def test_qrels_in_both_forms(tmp_path):
    assert read_qrels(written(tmp_path, BEIR_QRELS)) == {"1": {"a b": 1, "c": 0}, "2": {"a b": 2}}
    assert read_qrels(written(tmp_path, TREC_QRELS)) == {"1": {"a": 1, "c": 0}, "2": {"a": 2}}
    assert read_qrels(written(tmp_path, "1 0 a 1\n1 0 a 1\n")) == {"1": {"a": 1}}


def test_queries_in_both_forms(tmp_path):
    lines = '{"id": "1", "text": "누가\u2028왔나?"}\n{"_id": 2, "text": "When?", "metadata": {}}\n'
    assert read_queries(written(tmp_path, lines)) == {"1": "누가\u2028왔나?", "2": "When?"}


def test_a_beir_folder(tmp_path):
    expected = (
        written(tmp_path, "", "corpus.jsonl.gz"),
        written(tmp_path, "", "queries.jsonl"),
        written(tmp_path, BEIR_QRELS, "qrels/dev.tsv"),
    )
    assert beir_files(tmp_path, "dev") == expected
    with pytest.raises(UserError, match=r"test\.tsv: no such file \(found there: dev\.tsv\); a BEIR folder has"):
        beir_files(tmp_path, "test")
    with pytest.raises(UserError, match=r"corpus\.jsonl: no such file \(found there: nothing\)"):
        beir_files(tmp_path / "nowhere", "test")


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_run, "1 Q0 a 1 2.5\n", "line 1: 5 fields, and a hit has six"),
        (read_run, RUN + "2 Q0 b 1 high x\n", "line 5: the score 'high' is not a number"),
        (read_run, "1 Q0 a 1 nan x\n", "line 1: the score 'nan' is not a number"),
        (read_run, RUN + "1 Q0 a 3 0 x\n", "line 5: passage 'a' is a hit of query '1' above too"),
        (read_run, " \n", "the file has no hits"),
        (read_qrels, "", "the file has no judgements"),
        (read_qrels, "1 0 a 1\n1 a 1\n", "line 2: 3 fields, and a judgement has four"),
        (read_qrels, "1\ta\t1\n", "line 1: 3 fields.* begins with the header query-id corpus-id score"),
        (read_qrels, "1 0 a 0.5\n", "line 1: the grade '0.5' is not a whole number"),
        (read_qrels, "1 0 a 1\n1 0 a 2\n", "line 2: passage 'a' has the grade 2 for query '1', and 1 above"),
        (read_qrels, BEIR_QRELS + "3 0 a 1\n", "line 5: not a query, a passage and a grade, separated by tabs"),
        (read_qrels, BEIR_QRELS + "3\t\t1\n", "line 5: not a query, a passage and a grade"),
        (read_qrels, BEIR_QRELS + "3\ta\tyes\n", "line 5: the grade 'yes' is not a whole number"),
        (read_qrels, "query-id\tcorpus-id\tscore\n", "line 1: no judgement after the header"),
        (read_queries, "", "the file has no query"),
        (read_queries, '{"id": "1", "text": "a"}\n{"id"', "line 2, column 6: not JSON: "),
        (read_queries, '{"id": "1"}', 'line 1: found {"id": "1"} where a query is wanted'),
        (read_queries, '{"_id": "", "text": "a"}', "line 1: found .* where a query is wanted"),
        (read_queries, '{"id": "1", "text": " "}', "line 1: found .* where a query is wanted"),
        (read_queries, '["1", "a"]', "line 1: found .* where an object is wanted; every line must hold one query"),
        (read_queries, '{"id": "1", "text": "\\ud800"}', "line 1: half of a surrogate pair"),
        (
            read_queries,
            '{"id": "1", "text": "a"}\n{"_id": "1", "text": "b"}',
            "line 2: '1' is the id of a query above",
        ),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path, read, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read(written(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path / "file")) and "\n" not in str(caught.value)


def test_a_question_of_squad_that_is_blank(tmp_path):
    paragraph = {"context": "글", "qas": [{"id": "q", "question": "\u3000"}]}
    file = written(tmp_path, json.dumps({"data": [{"paragraphs": [paragraph]}]}), "squad.json")
    with pytest.raises(UserError, match=r"squad.json: question 'q' is empty; ask something, or remove it"):
        read_queries(file)


@pytest.mark.parametrize(
    ("read", "advice"),
    [
        (read_run, "a TREC run is wanted; write one with mixlm search --out NAME.trec"),
        (read_qrels, "TREC's or BEIR's, or a SQuAD-style file, whose name ends in .json"),
    ],
)
@pytest.mark.parametrize("name", ["file.jsonl", "file.jsonl.gz"])
def test_json_lines_are_told_by_their_name(tmp_path, read, advice, name):
    with pytest.raises(UserError, match=f"{name}: JSON lines, and .*{advice}$"):
        read(written(tmp_path, '{"id": "1", "question": "왔나?", "hits": []}', name))


@pytest.mark.parametrize("read", [read_run, read_qrels, read_queries])
def test_files_that_are_no_text(tmp_path, read):
    file = tmp_path / "file"
    file.write_bytes(b"\n" + "가".encode("cp949"))
    with pytest.raises(UserError, match="file, line 2: byte 0xb0 at offset 1 of the text is not UTF-8"):
        read(file)
    with pytest.raises(UserError, match="absent: no such file; check its name$"):
        read(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot be read: it is a folder; give a file$"):
        read(tmp_path)


def test_a_run_that_cannot_be_written(tmp_path):
    for hits in ({"a b": [("c", 1.0)]}, {"a": [("", 1.0)]}, {"a": [("b\n", 1.0)]}):
        with pytest.raises(UserError, match="cannot stand in a TREC run"):
            write_run(tmp_path / "run", hits)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="it is no file"):
        write_run(tmp_path, HITS)
    with pytest.raises(UserError, match="absent/run: cannot be written: No such file"):
        write_run(tmp_path / "absent" / "run", HITS)


@pytest.mark.parametrize("name", ["run", "run.gz", "run.xz"])
def test_a_file_is_whole_or_as_it_was(tmp_path, name):
    def pieces():
        yield "new"
        raise KeyboardInterrupt

    write_run(tmp_path / name, HITS)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / name, pieces())
    assert read_run(tmp_path / name) == HITS and len(list(tmp_path.iterdir())) == 1


def evaluate(*arguments: str | Path) -> None:
    main(["evaluate", *map(str, arguments)])


@pytest.fixture
def data(tmp_path) -> Path:
    """Twenty queries for which "good" finds the passage first and "bad" second; one of them it misses."""
    qrels = "".join(f"{query}\ta\t1\n" for query in range(20))
    written(tmp_path, "query-id\tcorpus-id\tscore\n" + qrels, "qrels/test.tsv")
    written(tmp_path, "", "corpus.jsonl")
    written(tmp_path, "", "queries.jsonl")
    write_run(tmp_path / "good.trec", {str(query): [("a", 2.0), ("b", 1.0)] for query in range(21)})
    write_run(tmp_path / "bad.trec", {str(query): [("b", 2.0), ("a", 1.0)] for query in range(19)})
    return tmp_path


def test_evaluate_prints_a_table(data, capsys):
    evaluate("--hits", data / "bad.trec", "--qrels", data / "qrels" / "test.tsv")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["hits"],
        ["accuracy@1", "0.00", "%"],
        ["accuracy@5", "95.00", "%"],
    ]
    assert "mrr@10            47.50  %" in "\n".join(lines)
    assert "missing               1  of them without hits, which score 0" in lines[-3]


def test_evaluate_compares(data, capsys):
    evaluate("--hits", data / "good.trec", "--beir", data, "--compare", data / "bad.trec")
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["hits", "compare", "difference", "from", "to", "p"]
    assert printed.splitlines()[1].split()[1:] == ["100.00", "0.00", "+100.00", "+100.00", "+100.00", "0.0001", "%"]
    assert printed.splitlines()[-1].split()[:3] == ["unjudged", "1", "0"]


def test_a_query_that_is_a_passage_is_no_hit_of_itself_in_beir(data, capsys):
    """As in ArguAna, whose queries are passages; by qrels of one's own it counts."""
    write_run(data / "itself.trec", {str(query): [(str(query), 3.0), ("a", 2.0)] for query in range(20)})
    found = {}
    for source, file in (("--beir", data), ("--qrels", data / "qrels" / "test.tsv")):
        evaluate("--hits", data / "itself.trec", source, file, "--json")
        found[source] = json.loads(capsys.readouterr().out)["hits"]["mrr@10"]
    assert found == {"--beir": 100.0, "--qrels": 50.0}


def test_evaluate_as_json(data, capsys):
    evaluate("--hits", data / "good.trec", "--beir", data, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"hits"} and found["hits"]["mrr@10"] == 100.0 and found["hits"]["total"] == 20
    evaluate("--hits", data / "good.trec", "--beir", data, "--compare", data / "bad.trec", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["compare"]["missing"] == 1 and found["difference"].keys() == METRICS.keys()
    assert found["difference"]["accuracy@5"]["mean"] == pytest.approx(5.0)


@pytest.fixture
def korquad(tmp_path) -> Path:
    """Two articles of two paragraphs, each with a question: the number of the paragraph is its answer."""
    articles = []
    for article in range(2):
        paragraphs = []
        for number in range(2):
            answer = {"text": f"답{article}{number}", "answer_start": 0}
            question = {"id": f"q{article}{number}", "question": "?", "answers": [answer]}
            paragraphs.append({"context": f"답{article}{number} 글", "qas": [question]})
        articles.append({"title": "", "paragraphs": paragraphs})
    articles[1]["paragraphs"][0]["qas"].append({"id": "none", "question": "?", "answers": [], "is_impossible": True})
    return written(tmp_path, json.dumps({"data": articles}), "squad.json")


def test_a_squad_file_judges_by_paragraph(korquad):
    qrels, answers = read_squad_judgements(korquad)
    assert qrels == {f"q{place}": {f"squad-{place[0]}-{place[1]}": 1} for place in ("00", "01", "10", "11")}
    assert answers["q10"] == ("답10",)
    assert read_squad_judgements(korquad, "1:").qrels.keys() == {"q10", "q11"}


def test_evaluate_by_a_squad_file(korquad, tmp_path, capsys):
    """The first question finds its paragraph; the second another passage, in which its answer is too."""
    other = written(tmp_path, json.dumps({"id": "x", "text": unicodedata.normalize("NFD", "답11")}), "other.jsonl")
    write_run(tmp_path / "run", {"q10": [("squad-1-0", 1.0)], "q11": [("x", 1.0)], "none": [("x", 1.0)]})
    asked = ["--hits", tmp_path / "run", "--qrels", korquad, "--articles", "1:2", "--json"]
    evaluate(*asked, "--passages", korquad, other, "--compare", tmp_path / "run")
    found = json.loads(capsys.readouterr().out)
    assert found["hits"]["accuracy@1"] == 50 and found["hits"]["answer_accuracy@1"] == 100
    assert found["hits"]["total"] == 2 and found["hits"]["unjudged"] == 1
    assert found["difference"]["answer_accuracy@1"]["mean"] == 0
    evaluate(*asked)
    assert "answer_accuracy@1" not in json.loads(capsys.readouterr().out)["hits"]


def test_what_is_for_squad_files_alone_is_refused_elsewhere(data, korquad, capsys):
    asked = ["--hits", data / "good.trec", "--qrels"]
    for arguments, part in [
        ([data / "qrels" / "test.tsv", "--articles", "1:"], "--articles are of SQuAD-style"),
        ([data / "qrels" / "test.tsv", "--passages", korquad], "--passages are for SQuAD-style"),
        ([korquad, "--articles", "7:"], "no question is in this range"),
        ([korquad, "--window_characters", "9"], "--window_characters is of --passages; leave it out"),
        ([korquad, "--passages", korquad, "--window_characters", "9"], "--window_characters cuts .dat documents"),
    ]:
        with pytest.raises(SystemExit):
            evaluate(*asked, *arguments)
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1


def test_evaluate_notes_that_no_passage_is_judged(data, capsys):
    """As where hits are of the same passages in a file of another name."""
    write_run(data / "other.trec", {"0": [("other-0", 1.0)]})
    evaluate("--hits", data / "other.trec", "--beir", data, "--compare", data / "good.trec")
    printed = capsys.readouterr()
    judged = f"no passage is judged in {data}/qrels/test.tsv (such as 'other-0' here and 'a' there); are the ids the"
    assert printed.err == f"note: {data}/other.trec: {judged} same?\n"
    assert "accuracy@1" in printed.out


def test_evaluate_says_what_is_wrong(data, capsys):
    other = written(data, "x 0 a 1\n", "other.tsv")
    hits = ["--hits", data / "good.trec"]
    for arguments, message in [
        (
            [*hits, "--qrels", other],
            f"error: {data}/good.trec: no query is judged in {other} (such as '0' here and 'x'",
        ),
        ([*hits, "--qrels", other, "--split", "dev"], "error: --split is for --beir; leave it out\n"),
        (
            [*hits, "--beir", data, "--split", "dev"],
            f"error: {data}/qrels/dev.tsv: no such file (found there: test.tsv)",
        ),
        ([*hits], "error: one of the arguments --qrels --beir is required"),
        (["--hits", other, "--beir", data], f"error: {other}, line 1: 4 fields, and a hit has six"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            evaluate(*arguments)
        printed = capsys.readouterr()
        assert stopped.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
        assert printed.err.startswith(message)
