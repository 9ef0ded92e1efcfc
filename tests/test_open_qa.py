"""Answers from a collection, against what was worked out by hand for readers whose answers are known."""

import json
import math
from types import SimpleNamespace

import pytest
from answering import StubReader, save_reader
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlm.data.passages import Passage
from mixlm.data.squad import ReadingExample
from mixlm.errors import UserError
from mixlm.open_qa import WEIGHTS, Candidate, Choice, OpenAnswer, OpenQA, ReadPassages, best_choice
from mixlm.reader import MixLMReader
from mixlm.retrieval.analysers import BigramAnalyser
from mixlm.retrieval.hits import Found, PassageHit
from mixlm.retrieval.index import build_index, open_index

PROPERTY = settings(derandomize=True, deadline=None, database=None, max_examples=200)

PASSAGES = [
    Passage("jeju", "제주도", "한국에서 가장 큰 섬이다."),
    Passage("hangul", "한글", "한글은 1443년에 만들어졌다. 세종이 한글을 만들었다. " * 3),
    Passage("day", "", "한글날은 10월 9일이다."),
    Passage("title", "한글 상", ""),
]


def candidate(text, reader_score, retriever_score):
    return Candidate(text, Passage(text, "", text), 0, len(text), reader_score, retriever_score)


def example(*answers, name="1"):
    return ReadingExample(name, "", "-", "?", (), answers, is_impossible=not answers, article=0)


def exact(answer, references):
    """The F1 of these tests: 1 or 0."""
    return float(answer in references if references else not answer)


def answering_with(reader=None, find=None, **options):
    """Without an index: all passages are found in their order, with scores 6, 4, 2, 0 (1, 2/3, 1/3, 0)."""

    def find_all(questions, top_k):
        return iter([Found([PassageHit(row, 6.0 - 2 * row) for row in range(4)][:top_k]) for _ in questions])

    index = SimpleNamespace(passages=PASSAGES, manifest={}, find=find or find_all)
    return OpenQA(index, reader or StubReader(), **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "index"
    build_index(PASSAGES, folder, BigramAnalyser())
    return folder


def test_each_passage_has_its_candidate_in_the_order_of_the_hits():
    reader = StubReader()
    (read,) = answering_with(reader, top_k=3).read(["언제?"])
    assert reader.read_texts == [("언제?", passage.text) for passage in PASSAGES[:3]]
    assert [each.text for each in read.candidates] == ["", "1443", "10"]
    assert [each.passage.id for each in read.candidates] == ["jeju", "hangul", "day"]
    assert [each.retriever_score for each in read.candidates] == [1, 0.5, 0]
    assert [each.reader_score for each in read.candidates[1:]] == [4, 2]
    assert all(each.passage.text[each.start : each.end] == each.text for each in read.candidates)


@pytest.mark.parametrize(("weight", "expected"), [(0, "reader"), (0.5, "reader"), (2, "retriever")])
def test_the_weight_decides_between_reader_and_retriever(weight, expected):
    # reader 5 and 0.25 + weight; retriever 4 and 1: they are equal at a weight of 1.
    passages = ReadPassages([candidate("retriever", 4, 1), candidate("reader", 5, 0)])
    answer = answering_with().choose(passages, Choice(weight))
    assert answer.text == answer.candidates[0].text == expected and len(answer.candidates) == 2


def test_of_equally_good_answers_that_of_the_better_hit_is_chosen():
    first, second = candidate("first", 4, 1), candidate("second", 5, 0)
    for order in ([first, second], [second, first]):
        assert answering_with().choose(ReadPassages(order), Choice(1.0)).candidates == order


def test_below_the_threshold_there_is_no_answer():
    # It is of the reader's score of what is chosen, 4, whatever weighs besides, and however sure another answer is.
    passages = ReadPassages([candidate("chosen", 4, 1), candidate("surer", 5, 0)])
    for threshold, expected in ((4.0, "chosen"), (4.01, ""), (None, "chosen")):
        answer = answering_with().choose(passages, Choice(2.0, threshold))
        assert answer.text == expected and answer.candidates == passages.candidates


def test_the_retriever_may_say_that_there_is_no_answer():
    candidates = [candidate("answer", 4, 1)]
    for has_answer, expected in ((False, ""), (True, "answer"), (None, "answer")):
        assert answering_with().choose(ReadPassages(candidates, has_answer), Choice()) == (expected, candidates)


def test_what_the_retriever_says_comes_with_its_hits():
    def find(questions, top_k):
        return iter([Found([PassageHit(1, 2.0)], 3.0, False), Found([PassageHit(2, 2.0)], 1.0, True)])

    assert [answer.text for answer in answering_with(find=find).answers(["a", "b"])] == ["", "10"]


def test_a_passage_without_any_span_is_last():
    # Their logits are negative, as those of poor answers are; what was not found has 0.
    passages = ReadPassages([candidate("", 0, 1), candidate("poor", -9, 0), candidate("better", -8, 0)])
    answer = answering_with().choose(passages, Choice(32.0))
    assert (answer.text, [each.text for each in answer.candidates]) == ("better", ["better", "poor", ""])
    assert answering_with().choose(ReadPassages([candidate("", 0, 1)]), Choice()).text == ""


@pytest.mark.parametrize(("null_threshold", "expected"), [(-1.0, "1443"), (-1.01, ""), (0.0, "1443")])
def test_a_reader_that_knows_no_answer_is_asked_by_how_much_its_answer_is_better(null_threshold, expected):
    # "No answer" has 3: 1443 with its four digits 1 more, 10 with its two 1 less; the passages without numbers 3 less.
    answering = answering_with(StubReader(null_score=3.0, null_threshold=null_threshold))
    answer = answering.answer("언제?")
    assert [each.text for each in answer.candidates[:2]] == ["1443", "10"]
    assert [each.reader_score for each in answer.candidates] == [1, -1, -3, -3]
    assert answer.text == expected
    (read,) = answering.read(["언제?"])
    assert answering.choose(read, Choice(threshold=1.0)).text == "1443"  # instead of the reader's own threshold
    assert answering.choose(read, Choice(threshold=1.01)).text == ""


def test_questions_without_hits_have_no_answer_and_move_no_other():
    def find(questions, top_k):
        rows = {"글": [1], "날": [2], "둘": [2, 1]}
        return iter([Found([PassageHit(row, 1.0) for row in rows.get(question, [])]) for question in questions])

    questions = ["", "글", "없음", "날", "둘"] * 20  # more than are read together
    answers = list(answering_with(find=find).answers(questions))
    assert [answer.text for answer in answers] == ["", "1443", "", "10", "1443"] * 20
    assert [len(answer.candidates) for answer in answers] == [0, 1, 0, 1, 2] * 20
    assert answers[0] == OpenAnswer("", []) and [each.text for each in answers[4].candidates] == ["1443", "10"]


def test_nothing_is_read_where_nothing_is_found(built):
    reader = StubReader()
    reader.read = None  # a real one is not made for no question at all
    answering = OpenQA(open_index(built), reader)
    assert list(answering.answers(["?", "zzz"])) == [("", []), ("", [])] and list(answering.answers([])) == []


def test_weights_are_compared_by_their_f1():
    # The right answers are the retriever's first for one question and the reader's for the other.
    passages = [
        ReadPassages([candidate("right", 1, 1), candidate("wrong", 4, 0)]),  # right above a weight of 3
        ReadPassages([candidate("wrong", 1, 1), candidate("right", 10, 0)]),  # right below a weight of 9
    ]
    scores = answering_with().tune([example("right")] * 2, passages, exact)
    assert scores == {
        Choice(weight): expected for weight, expected in zip(WEIGHTS, (50, 50, 50, 50, 100, 100, 50, 50), strict=True)
    }
    assert best_choice(scores) == Choice(4.0)  # of 4 and 8


def test_with_unanswerable_questions_the_threshold_is_chosen_too():
    passages = [ReadPassages([candidate("right", score, 1)]) for score in (5, 3, 1)]
    examples = [example("right"), example("right"), example()]
    scores = answering_with().tune(examples, passages, exact)
    assert scores == {Choice(weight, 3): 100 for weight in WEIGHTS}
    # Of thresholds that are as good, the least: from 1 on one answer more is right than from 5 on, and one is wrong.
    examples = [example("right"), example(), example("right")]
    scores = answering_with().tune(examples, passages, exact)
    assert scores == {Choice(weight, 1): pytest.approx(200 / 3) for weight in WEIGHTS}
    # Where nothing should be answered, nothing is; and what no threshold decides does not move it.
    scores = answering_with().tune([example(), example()], [passages[0], ReadPassages([])], exact)
    assert all(score == 100 and choice.threshold > 5 for choice, score in scores.items())
    scores = answering_with().tune([example("right"), example()], [passages[0], ReadPassages([])], exact)
    assert scores == {Choice(weight, 5): 100 for weight in WEIGHTS}


def test_without_any_answer_no_threshold_is_made_up():
    passages = [ReadPassages([]), ReadPassages([candidate("right", 5, 1)], has_answer=False)]
    scores = answering_with().tune([example(), example("right")], passages, exact)
    assert scores == {Choice(weight): 50 for weight in WEIGHTS}


def test_tuning_needs_questions():
    with pytest.raises(UserError, match="no question to tune with"):
        answering_with().tune([], [], exact)


CANDIDATES = st.lists(
    st.builds(
        candidate,
        st.sampled_from(["right", "wrong", "half", ""]),
        st.integers(-3, 3).map(float),
        st.sampled_from([0.0, 0.25, 1.0]),
    ),
    max_size=3,
)
READ = st.builds(ReadPassages, CANDIDATES, st.sampled_from([None, None, True, False]))


def shared(answer, references):
    """An F1 with a value between 0 and 1."""
    return 0.5 if answer == "half" and references else exact(answer, references)


@PROPERTY
@given(st.lists(st.tuples(READ, st.booleans()), min_size=1, max_size=6), st.sampled_from([None, 0.5]))
def test_no_threshold_is_better_than_the_one_that_is_chosen(asked, null_score):
    answering = answering_with(StubReader(null_score))
    passages = [read for read, _ in asked]
    examples = [example("right") if has_answer else example() for _, has_answer in asked]

    def f1_of(choice):
        found = (answering.choose(read, choice).text for read in passages)
        references = (each.answer_texts for each in examples)
        return 100 * math.fsum(map(shared, found, references)) / len(examples)

    scores = answering.tune(examples, passages, shared)
    assert [choice.weight for choice in scores] == list(WEIGHTS)
    thresholds = {each.reader_score for read in passages for each in read.candidates} | {-math.inf, math.inf}
    for choice, score in scores.items():
        assert score == pytest.approx(f1_of(choice))
        if any(each.is_impossible for each in examples):
            assert score == pytest.approx(max(f1_of(Choice(choice.weight, threshold)) for threshold in thresholds))
            assert choice.threshold is None or math.isfinite(choice.threshold)  # JSON has no other
        else:
            assert choice.threshold is None
    best = best_choice(scores)
    assert scores[best] == max(scores.values())
    assert all(score < scores[best] for choice, score in scores.items() if choice.weight < best.weight)


class FindsNothing:
    """In place of a search by vectors."""

    def dense(self, questions, top_k):
        return iter(())

    def hybrid(self, questions, top_k):
        return iter(())


def test_a_stored_choice_is_of_what_it_was_tuned_under(tmp_path):
    build_index(PASSAGES, tmp_path / "index", BigramAnalyser())

    def opened(mode="hybrid", reader=None, **options):
        search = None if mode == "lexical" else FindsNothing()
        return OpenQA(open_index(tmp_path / "index"), reader or StubReader(), search, mode, **options)

    answering = opened(top_k=5)
    assert (answering.choice, answering.unused) == (Choice(), None)  # nothing is stored
    answering.index.store_tuning("hybrid", {"weight": 0.5})
    answering.store(Choice(8.0, 1.5), f1=66.66666)
    assert answering.choice == Choice(8.0, 1.5)
    assert open_index(tmp_path / "index").manifest["answers"]["f1"] == 66.6667

    same = opened(top_k=5)
    assert (same.choice, same.unused) == (Choice(8.0, 1.5), None)
    assert opened(top_k=5, choice=Choice(0.0)).choice == Choice(0.0)
    for other, why in [
        (opened(top_k=6), "top_k is 5 there and 6 now"),
        (opened("dense", top_k=5), "mode is hybrid there and dense now"),
        (opened("lexical", top_k=5), "mode is hybrid there and lexical now"),
        (opened(top_k=5, reader=StubReader(seed=1)), "reader is "),  # other weights
        (opened(top_k=5, reader=StubReader(null_score=1.0)), "unanswerable is False there and True now"),
    ]:
        assert other.choice == Choice() and other.unused.startswith(
            f"what is tuned in {tmp_path / 'index'} is not used, because {why}"
        )
    same.index.store_tuning("hybrid", {"weight": 0.7})
    retuned = opened(top_k=5)
    assert retuned.choice == Choice() and "hybrid_weight is 0.5 there and 0.7 now" in retuned.unused

    answering = opened("dense", top_k=5)
    answering.store(Choice(1.0), f1=50.0)
    answering.index.store_tuning("hybrid", {"weight": 0.9})  # is nothing to search by vectors alone
    assert opened("dense", top_k=5).choice == Choice(1.0, None)


def test_several_indexes_have_no_choice_of_one(tmp_path):
    build_index(PASSAGES, tmp_path / "index", BigramAnalyser())
    index = open_index(tmp_path / "index")
    OpenQA(index, StubReader(), FindsNothing(), "dense").store(Choice(8.0), f1=50.0)
    several = SimpleNamespace(folder=index.folder, manifest=index.manifest, passages=[*index.passages] * 2)
    answering = OpenQA(several, StubReader(), FindsNothing(), "dense")
    assert answering.choice == Choice() and "passages is 4 there and 8 now" in answering.unused


def test_a_real_reader_over_a_real_index(built, tmp_path):
    reader = MixLMReader.from_pretrained(save_reader(tmp_path, [passage.text for passage in PASSAGES]), device="cpu")
    answering = OpenQA(open_index(built), reader, top_k=3)
    question = "한글은 언제 만들었나?"
    answer = answering.answer(question)
    assert {each.passage.id for each in answer.candidates} == {"hangul", "day", "title"}
    assert max(each.retriever_score for each in answer.candidates) == 1
    assert answer.text == answer.candidates[0].text != "" and answer.candidates[-1].passage.id == "title"
    for each in answer.candidates[:-1]:
        alone = reader.answer(question, each.passage.text)
        assert (each.text, each.start, each.end) == alone[:3]
        assert each.passage.text[each.start : each.end] == each.text
    assert list(answering.answers([question, "?"])) == [answer, ("", [])]


def test_an_answer_as_json():
    answer = answering_with(top_k=2).answer("언제?")
    record = json.loads(json.dumps(answer.record("언제?")))
    first = record["candidates"][0]
    assert (record["question"], record["answer"], len(record["candidates"])) == ("언제?", "1443", 2)
    assert first == {
        "text": "1443",
        "passage": {"id": "hangul", "title": "한글", "text": PASSAGES[1].text},
        "start": 4,
        "end": 8,
        "reader_score": 4.0,
        "retriever_score": 0.0,
    }


def test_a_search_has_two_modes():
    with pytest.raises(ValueError, match="mode='lexical' must be 'dense' or 'hybrid'"):
        OpenQA(index=None, reader=None, search=object(), mode="lexical")
