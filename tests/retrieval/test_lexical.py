import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlm.data.passages import Passage
from mixlm.errors import UserError
from mixlm.retrieval.analysers import BigramAnalyser
from mixlm.retrieval.lexical import K1, B, LexicalIndex
from mixlm.retrieval.passages import StoredPassages, write_passages

ANALYSER = BigramAnalyser()


def index_of(folder, *texts):
    write_passages(folder / "passages.arrow", [Passage(str(row), "", text) for row, text in enumerate(texts)])
    return LexicalIndex.build(StoredPassages(folder / "passages.arrow"), ANALYSER)


def search(index, question, top_k=10):
    return next(index.search([question], top_k))


def plain_bm25(texts, question):
    """Scores by the formula alone."""
    counts = [Counter(ANALYSER.terms(text)) for text in texts]
    mean_length = sum(map(Counter.total, counts)) / len(texts)
    scores = []
    for count in counts:
        score = 0.0
        for term in set(ANALYSER.terms(question)):
            having = sum(term in other for other in counts)
            if count[term]:
                rarity = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
                score += rarity * count[term] / (count[term] + K1 * (1 - B + B * count.total() / mean_length))
        scores.append(score)
    return scores


def test_scores_computed_by_hand(tmp_path):
    """Two passages of 1 and 3 terms: "b" is in both of them, "a" in one, twice."""
    index = index_of(tmp_path, "b", "a a b")
    hits = search(index, "a b c")
    a = math.log(1 + 1.5 / 1.5) * 2 / (2 + 0.9 * (0.6 + 0.4 * 3 / 2))
    b_long = math.log(1 + 0.5 / 2.5) * 1 / (1 + 0.9 * (0.6 + 0.4 * 3 / 2))
    b_short = math.log(1 + 0.5 / 2.5) * 1 / (1 + 0.9 * (0.6 + 0.4 * 1 / 2))
    assert [hit.row for hit in hits] == [1, 0]
    assert [hit.score for hit in hits] == pytest.approx([a + b_long, b_short], rel=1e-6)


words = st.lists(st.sampled_from(["학교", "학교에", "dog", "dogs", "2013년", "섬", "😀"]), max_size=8).map(" ".join)


@settings(max_examples=50)
@given(st.lists(words, min_size=1, max_size=8), words, st.integers(1, 10))
def test_hits_are_those_of_the_formula(tmp_path_factory, texts, question, top_k):
    texts = [*texts, "섬"]  # one of them has a word
    hits = search(index_of(tmp_path_factory.mktemp("index"), *texts), question, top_k)
    wanted = plain_bm25(texts, question)
    assert [hit.score for hit in hits] == pytest.approx(sorted(filter(None, wanted), reverse=True)[:top_k], rel=1e-5)
    assert [hit.score for hit in hits] == pytest.approx([wanted[hit.row] for hit in hits], rel=1e-5)
    order = [(-hit.score, hit.row) for hit in hits]
    assert order == sorted(order)


def test_equal_scores_come_in_the_order_of_the_passages(tmp_path):
    index = index_of(tmp_path, "섬 바다", *["학교 섬"] * 50, "학교 산")
    assert [hit.row for hit in search(index, "학교", 20)] == list(range(1, 21))


def test_there_are_no_more_hits_than_passages_with_a_term(tmp_path):
    index = index_of(tmp_path, "학교", "섬", "학교 섬")
    assert [hit.row for hit in search(index, "학교", 1000)] == [0, 2]
    assert len(search(index, "학교 섬", 1000)) == 3


@pytest.mark.parametrize("question", ["", "   ", "?!", "😀", "없음"])
def test_a_question_without_a_known_term_has_no_hits(tmp_path, question):
    assert search(index_of(tmp_path, "학교", "섬"), question) == []


def test_terms_count_once_in_a_question(tmp_path):
    index = index_of(tmp_path, "학교", "섬")
    assert search(index, "섬 섬 섬") == search(index, "섬")


def test_a_very_long_question_is_answered(tmp_path):
    assert search(index_of(tmp_path, "학교", "섬"), "학교에 가자 " * 15_000)[0].row == 0


def test_titles_are_searched_too(tmp_path):
    write_passages(tmp_path / "p", [Passage("a", "", "섬"), Passage("b", "제주", "섬")])
    assert search(LexicalIndex.build(StoredPassages(tmp_path / "p"), ANALYSER), "제주")[0].row == 1


def test_saved_and_loaded_it_finds_the_same(tmp_path):
    built = index_of(tmp_path, "학교에서", "섬 dogs", "학교")
    built.save(tmp_path / "lexical")
    loaded = LexicalIndex.load(tmp_path / "lexical", ANALYSER)
    assert isinstance(loaded._bm25.scores["data"], np.memmap)
    questions = ["학교", "dog", "", "섬 학교"]
    assert list(loaded.search(questions, 3)) == list(built.search(questions, 3))


def test_passages_without_any_word_are_refused(tmp_path):
    with pytest.raises(UserError, match="no passage has a word"):
        index_of(tmp_path, "😀", "...")
