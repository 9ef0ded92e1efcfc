"""Questions and passages as token ids, and where they come from."""

import gzip
import json
import pickle
import unicodedata

import numpy as np
import pytest
from remote_models import tiny_tokenizer
from test_examples import BLOCKS, CLS, MAX_SEQ_LENGTH, SEP, ListedCorpus, make, unmasked

from mixlm.data import retrieval
from mixlm.data.batching import collate
from mixlm.data.examples import InverseClozeExamples
from mixlm.data.passages import Passage
from mixlm.data.retrieval import (
    EMPTY_PASSAGE,
    ClozePairs,
    PassageNumbers,
    RetrievalPairs,
    RetrievalQuestion,
    RetrievalTokenizer,
    read_hard_negatives,
    retrieval_questions,
)
from mixlm.data.squad import ReadingExample
from mixlm.errors import UserError

SEOUL, KOREA, CAPITAL = 5, 7, 9  # 서울, 한국, 수도


def lists(arrays) -> list[list[int]]:
    return [array.tolist() for array in arrays]


def test_a_passage_has_its_title_before_it():
    found = RetrievalTokenizer(tiny_tokenizer()).passages(
        [Passage("1", "서울", "한국 수도"), Passage("2", "", "한국"), Passage("3", "서울", "")]
    )
    assert lists(found) == [[CLS, SEOUL, SEP, KOREA, CAPITAL, SEP], [CLS, KOREA, SEP], [CLS, SEOUL, SEP, SEP]]


def test_what_is_too_long_is_cut_at_its_end():
    tokenizer = RetrievalTokenizer(tiny_tokenizer(), max_query_length=4, max_passage_length=6)
    queries = tokenizer.queries(["서울 한국", "서울 한국 수도"])
    assert lists(queries) == [[CLS, SEOUL, KOREA, SEP], [CLS, SEOUL, KOREA, SEP]]
    passages = [
        Passage("whole", "서울", "한국 수도"),
        Passage("long", "서울", "한국 수도 서울"),
        Passage("long title", "서울 서울 서울 서울 서울 서울", "한국"),
    ]
    whole = [CLS, SEOUL, SEP, KOREA, CAPITAL, SEP]
    assert lists(tokenizer.passages(passages)) == [whole, whole, [CLS, *[SEOUL] * 4, SEP]]


def test_decomposed_hangul_has_the_tokens_of_its_syllables():
    tokenizer = RetrievalTokenizer(tiny_tokenizer())
    decomposed = [unicodedata.normalize("NFD", text) for text in ("서울", "한국 수도")]
    assert lists(tokenizer.queries(decomposed)) == [[CLS, SEOUL, SEP], [CLS, KOREA, CAPITAL, SEP]]
    assert lists(tokenizer.passages([Passage("1", *decomposed)])) == [[CLS, SEOUL, SEP, KOREA, CAPITAL, SEP]]


def test_the_name_of_a_special_token_in_a_text_is_text():
    given = tiny_tokenizer()
    given.backend_tokenizer.enable_truncation(3)
    given.backend_tokenizer.enable_padding(length=9)
    (query,) = RetrievalTokenizer(given).queries(["[SEP] 서울 [CLS] 한국 [MASK]"])
    assert query[0] == CLS and query.tolist().index(SEP) == len(query) - 1 > 9
    assert (query == CLS).sum() == 1 and not (query == given.mask_token_id).any()
    assert given.backend_tokenizer.truncation["max_length"] == 3  # that tokenizer is as it was
    assert given.backend_tokenizer.encode("[SEP]", add_special_tokens=False).ids[0] == SEP


def test_texts_keep_their_order_from_one_batch_to_the_next(monkeypatch):
    monkeypatch.setattr(retrieval, "ENCODE_BATCH", 2)
    texts = ["서울", "한국", "수도", "서울 서울", ""]
    found = RetrievalTokenizer(tiny_tokenizer()).queries(texts)
    assert lists(found) == [
        [CLS, SEOUL, SEP],
        [CLS, KOREA, SEP],
        [CLS, CAPITAL, SEP],
        [CLS, SEOUL, SEOUL, SEP],
        [CLS, SEP],
    ]


def pairs_of(questions: list[RetrievalQuestion], passages: list[Passage]) -> RetrievalPairs:
    tokenizer = RetrievalTokenizer(tiny_tokenizer())
    queries = tokenizer.queries([question.text for question in questions])
    return RetrievalPairs(questions, queries, tokenizer.passages(passages), tokenizer.empty_passage)


def test_the_longest_pair_has_the_longest_question_and_the_most_and_longest_passages():
    passages = [Passage("0", "", "한국"), Passage("1", "서울", "한국 수도"), Passage("2", "", "서울")]
    questions = [
        RetrievalQuestion("서울 한국 수도", EMPTY_PASSAGE),
        RetrievalQuestion("서울", 0, (1,)),
        RetrievalQuestion("수도", 0, (2, EMPTY_PASSAGE)),
    ]
    pairs = pairs_of(questions, passages)
    longest = pairs.longest()
    assert longest["input_ids"].tolist() == [CLS, SEOUL, KOREA, CAPITAL, SEP]
    assert lists(longest["context_input_ids"]) == [[CLS, SEOUL, SEP, KOREA, CAPITAL, SEP]] * 3
    batch = collate([longest] * 4, pad_token_id=0)
    for index in range(3):
        for name, tensor in collate([pairs[0, index]] * 4, pad_token_id=0).items():
            assert all(own <= most for own, most in zip(tensor.shape, batch[name].shape, strict=True)), name


def test_pairs_are_as_the_objective_takes_them():
    passages = [Passage("0", "", "한국"), Passage("1", "서울", "한국 수도")]
    questions = [RetrievalQuestion("서울", 0, (1,)), RetrievalQuestion("수도 수도", EMPTY_PASSAGE)]
    pairs = pairs_of(questions, passages)
    assert len(pairs) == 2 and pairs.lengths.tolist() == [3 + 6, 4 + 2]
    batch = collate([pairs[0, 1], pairs[5, 0]], pad_token_id=0)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[CLS, CAPITAL, CAPITAL, SEP], [CLS, SEOUL, SEP, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
        "passage": [EMPTY_PASSAGE, 0],
        "context_first_rows": [0, 1],
        "context_input_ids": [
            [CLS, SEP, 0, 0, 0, 0],
            [CLS, KOREA, SEP, 0, 0, 0],
            [CLS, SEOUL, SEP, KOREA, CAPITAL, SEP],
        ],
        "context_attention_mask": [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1] * 6],
        "context_passage": [EMPTY_PASSAGE, 0, 1],
    }


def test_a_passage_has_one_number():
    number_of = PassageNumbers()
    asked = [("A", "x"), ("A", "y"), ("A", "x"), ("B", "x"), ("A", "y")]
    assert [number_of(*passage) for passage in asked] == [0, 1, 0, 2, 1]
    assert number_of.passages == [Passage("0", "A", "x"), Passage("1", "A", "y"), Passage("2", "B", "x")]


def example(identifier: str, context: str, is_impossible: bool = False) -> ReadingExample:
    return ReadingExample(identifier, "T", context, f"{identifier}?", (), (), is_impossible, 0)


def test_questions_and_their_passages():
    examples = [example("a", "x"), example("b", "x", is_impossible=True), example("c", "y"), example("d", "z")]
    mined = {
        "a": [("T", "z"), ("T", "x"), ("T", "z")],  # one of them twice, and its own paragraph
        "b": [("T", "y"), ("T", "x")],
        "c": [("U", "y"), ("T", "z")],  # its own text under another title is no negative of it
        # The paragraph of another question under another title, or none, is that paragraph, and counts once.
        "d": [("T", "z"), ("", "x"), ("T", "x"), ("U", "y")],
        "x": [("T", "not asked for")],
    }
    number_of = PassageNumbers()
    found = retrieval_questions(examples, number_of, mined, 2)
    texts = [(passage.title, passage.text) for passage in number_of.passages]
    x, y, z = (texts.index(("T", text)) for text in "xyz")
    assert found == [
        RetrievalQuestion("a?", x, (z,)),
        RetrievalQuestion("b?", EMPTY_PASSAGE, (x, y)),
        RetrievalQuestion("c?", y, (z,)),
        RetrievalQuestion("d?", z, (x, y)),
    ]
    assert len(texts) == 3


def test_hard_negatives_by_question(tmp_path):
    lines = [
        {"id": "a", "negatives": [{"title": "T", "text": "x"}, {"title": None, "text": "y"}, {"text": "z"}]},
        {"id": "b", "negatives": [], "more": 1},
    ]
    file = tmp_path / "negatives.jsonl.gz"
    file.write_bytes(gzip.compress(("\n\n".join(map(json.dumps, lines)) + "\n").encode()))
    assert read_hard_negatives(file) == {"a": [("T", "x"), ("", "y"), ("", "z")], "b": []}


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        "5",
        '{"id": "a"}',
        '{"negatives": []}',
        '{"id": 5, "negatives": []}',
        '{"id": "a", "negatives": {"text": "x"}}',
        '{"id": "a", "negatives": ["x"]}',
        '{"id": "a", "negatives": [{"title": "x"}]}',
        '{"id": "a", "negatives": [{"text": 5}]}',
        '{"id": "a", "negatives": [{"title": ["x"], "text": "x"}]}',
        r'{"id": "a", "negatives": [{"text": "\ud800"}]}',
    ],
)
def test_a_line_that_is_no_hard_negatives_is_named(tmp_path, line):
    file = tmp_path / "negatives.jsonl"
    file.write_text('{"id": "x", "negatives": []}\n\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        read_hard_negatives(file)
    assert str(caught.value).startswith(f"{file}, line 3")
    assert "\n" not in str(caught.value)


def test_a_file_without_hard_negatives(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in (("empty.jsonl", "has no hard negatives"), ("nowhere.jsonl", "nowhere.jsonl")):
        with pytest.raises(UserError, match=message):
            read_hard_negatives(tmp_path / name)


def test_cloze_pairs_are_the_examples_of_pretraining_without_masks():
    corpus = ListedCorpus([5, 8, 3, 12, 30, 9, 9, 9, 1, 2])
    pairs, examples = ClozePairs(corpus, BLOCKS, CLS, SEP, MAX_SEQ_LENGTH, 1), make(InverseClozeExamples, corpus)
    pickle.dumps(pairs)  # as for worker processes that are spawned
    assert len(pairs) == len(examples) and np.array_equal(pairs.lengths, examples.lengths)
    for key in [(epoch, index) for epoch in range(20) for index in range(len(pairs))]:
        pair, masked = pairs[key], examples[key]
        assert pair.keys() == {"input_ids", "context_input_ids"}
        assert pair["input_ids"].tolist() == unmasked(masked["input_ids"], masked["labels"])
        assert pair["context_input_ids"].tolist() == unmasked(masked["context_input_ids"], masked["context_labels"])
