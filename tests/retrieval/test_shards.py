"""Several indexes that are searched as one."""

import json

import numpy as np
import pytest
from test_search import build, error_of

from mixlm.cli import main
from mixlm.data.passages import Passage
from mixlm.encoder import MixLMEncoder
from mixlm.errors import UserError
from mixlm.retrieval.analysers import BigramAnalyser
from mixlm.retrieval.index import build_index, open_index
from mixlm.retrieval.search import Search
from mixlm.retrieval.shards import ShardedIndex, open_shards

# Every third text is the same as another: there are equal scores, also from one shard to the next.
PASSAGES = [Passage(f"p{number}", "", f"서울 {number % 9} 한국 {number % 4}") for number in range(25)]
CUTS = (0, 7, 8, 25)
QUESTIONS = ["서울", "한국 3", "수도 1", " "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, retriever):
    """One index of all passages, `whole/index`, and three of parts of them."""
    folder = tmp_path_factory.mktemp("shards")
    build(PASSAGES, retriever, folder / "whole")
    for number, (first, last) in enumerate(zip(CUTS, CUTS[1:], strict=False)):
        build(PASSAGES[first:last], retriever, folder / str(number))
    return folder


@pytest.fixture(scope="module")
def encoder(retriever):
    return MixLMEncoder.from_pretrained(retriever, "cpu")


def shards(folder):
    return open_shards([folder / str(number) / "index" for number in range(3)])


@pytest.mark.parametrize("top_k", [1, 3, 10, 24, 25, 40])
def test_what_is_found_is_what_one_index_finds(folder, encoder, top_k):
    whole, several = open_index(folder / "whole" / "index"), shards(folder)
    expected = list(Search(whole, encoder).dense(QUESTIONS, top_k))
    assert list(Search(several, encoder).dense(QUESTIONS, top_k)) == expected
    scores = [score for _, score in expected[0].hits]
    assert top_k == 1 or len(set(scores)) < len(scores)
    assert len(several.passages) == len(several.dense) == 25
    for row, passage in enumerate(PASSAGES):
        assert several.passages[row] == passage and several.passages.id_of_row(row) == passage.id


def test_the_order_of_the_indexes_does_not_matter(folder, encoder):
    found = []
    for order in (range(3), reversed(range(3))):
        search = Search(open_shards([folder / str(number) / "index" for number in order]), encoder)
        found.append(
            [
                [(search.index.passages.id_of_row(row), score) for row, score in of_question.hits]
                for of_question in search.dense(QUESTIONS, 7)
            ]
        )
    assert found[0] == found[1]


def test_vectors_are_those_of_their_shards(folder, encoder):
    several, rows = shards(folder), np.array([0, 6, 7, 8, 24])
    expected = encoder.encode_passages([PASSAGES[row] for row in rows])
    np.testing.assert_allclose(several.dense.vectors_of(rows), expected, rtol=1e-5, atol=1e-6)
    assert Search(several, encoder).verify() == 25


def test_several_indexes_are_searched_by_the_command(folder, tmp_path, capsys):
    queries = "".join(
        json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(QUESTIONS[:3])
    )
    (tmp_path / "queries.jsonl").write_text(queries)
    found = {}
    for name, indexes in (("whole", ["whole"]), ("several", ["0", "1", "2"])):
        given = [part for each in indexes for part in ("--index", str(folder / each / "index"))]
        out = tmp_path / f"{name}.trec"
        mode = ["--mode", "dense"] if name == "whole" else []
        main(["search", *given, "--queries", str(tmp_path / "queries.jsonl"), "--out", str(out), *mode])
        found[name] = out.read_text()
    assert found["several"] == found["whole"] != ""
    assert "dense hits of 3 questions" in capsys.readouterr().out


def test_what_cannot_be_one_is_refused_in_one_line(folder, retriever, tmp_path, capsys):
    first = folder / "0" / "index"
    error = error_of(capsys, f"search --index {first} --index {first} --query x --mode hybrid")
    assert "--mode hybrid: several indexes are searched by vectors alone" in error
    with pytest.raises(UserError, match="passage 'p0' is in .*; index it once"):
        open_shards([first, folder / "whole" / "index"])
    build_index(PASSAGES, tmp_path / "lexical", BigramAnalyser())
    with pytest.raises(UserError, match="lexical: has no vectors; several indexes are searched by vectors alone"):
        open_shards([first, tmp_path / "lexical"])
    manifest = json.loads((folder / "1" / "index" / "manifest.json").read_text())
    other = open_index(folder / "1" / "index")
    other.manifest["dense"] = {**manifest["dense"], "encoder": {**manifest["dense"]["encoder"], "weights": "another"}}
    with pytest.raises(UserError, match="has vectors of another encoder than .*: weights"):
        ShardedIndex([open_index(first), other])
