"""What answers from a collection are worth and whose errors the wrong ones are, worked out by hand."""

import unicodedata

import pytest

from mixlm.evaluation.open_qa import JudgedAnswer, judge_answer, open_qa_metrics, score_open_answer
from mixlm.evaluation.reading import score_korquad_v1

# Text of a passage, and what was read in it.
RIGHT = ("세종은 1443년에 만들었다.", "1443년")
MISREAD = ("세종은 1443년에 만들었다.", "세종")
ELSEWHERE = ("큰 섬이다.", "섬")
NOTHING_READ = ("큰 섬이다.", "")


def judged(answer, candidates, references=("1443년",)):
    return judge_answer(answer, candidates, references, score_korquad_v1)


def test_a_right_answer_is_nobodys_fault():
    assert judged("1443년", [ELSEWHERE, RIGHT]) == JudgedAnswer(1, 1, 2, None)
    assert judged("1443년", [RIGHT, RIGHT]).first_hit == 1
    # Right by the metric, which does not see the comma, though no text has it so.
    assert judged("1,443년", [("1,443년", "1,443년")]) == JudgedAnswer(1, 1, None, None)


@pytest.mark.parametrize(
    ("answer", "candidates", "first_hit", "fault"),
    [
        ("섬", [ELSEWHERE], None, "retriever"),
        ("", [NOTHING_READ], None, "retriever"),
        ("", [], None, "retriever"),
        ("세종", [MISREAD, ELSEWHERE], 1, "reader"),
        ("섬", [ELSEWHERE, MISREAD], 2, "reader"),
        ("", [MISREAD], 1, "reader"),  # "no answer" was given, but what it held back was wrong too
        ("섬", [RIGHT, ELSEWHERE], 1, "choice"),
        ("", [ELSEWHERE, RIGHT], 2, "choice"),
        ("섬", [ELSEWHERE, ("", "1,443년")], None, "choice"),  # right by the metric alone
    ],
)
def test_a_wrong_answer_is_the_fault_of_the_first_part_that_failed(answer, candidates, first_hit, fault):
    assert judged(answer, candidates) == JudgedAnswer(0, 0, first_hit, fault)


def test_an_answer_that_is_partly_right_is_wrong():
    # Four of its characters are the four of the reference but the last: precision 1, recall 4/5.
    found = judged("1443", [("1443년에", "1443")])
    assert (found.exact_match, found.first_hit, found.fault) == (0, 1, "reader")
    assert found.f1 == pytest.approx(8 / 9)


def test_the_best_of_several_references_counts():
    assert judged("세종", [MISREAD], ("없음", "세종")) == JudgedAnswer(1, 1, 1, None)
    assert judged("섬", [ELSEWHERE, MISREAD], ("없음", "세종")) == JudgedAnswer(0, 0, 2, "choice")


def test_a_question_without_an_answer():
    assert judged("", [RIGHT], ()) == JudgedAnswer(1, 1, None, None, is_answerable=False)
    assert judged("", [], ()) == JudgedAnswer(1, 1, None, None, is_answerable=False)
    assert judged("1443년", [RIGHT], ()) == JudgedAnswer(0, 0, None, "choice", is_answerable=False)
    assert score_open_answer("", (), score_korquad_v1) == (1, 1)
    assert score_open_answer(".", (), score_korquad_v1) == (0, 0)  # an answer, though the metric sees none in it
    assert score_open_answer("", ("1443년",), score_korquad_v1) == (0, 0)


def test_texts_are_searched_as_they_look():
    decomposed = unicodedata.normalize("NFD", "가장  큰\n섬이다.")
    for text, reference in ((decomposed, "큰 섬"), ("가장 큰 섬이다.", unicodedata.normalize("NFD", "큰  섬"))):
        assert judged("", [(text, "")], (reference,)).first_hit == 1


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("other_form", ["NFC", "NFD"])
def test_an_answer_is_compared_as_it_looks(form, other_form):
    answer, text = (unicodedata.normalize(form, text) for text in ("큰 섬", "가장 큰 섬이다."))
    references = (unicodedata.normalize(other_form, "큰 섬"),)
    assert judged(answer, [(text, answer)], references) == JudgedAnswer(1, 1, 1, None)
    assert judged("", [(text, answer)], references) == JudgedAnswer(0, 0, 1, "choice")
    assert score_open_answer(answer, references, score_korquad_v1) == (1, 1)


def test_metrics_are_means_in_percent():
    metrics = open_qa_metrics(
        [
            JudgedAnswer(1, 1, 1, None),
            JudgedAnswer(0, 0.5, 2, "reader"),
            JudgedAnswer(0, 0, 6, "choice"),
            JudgedAnswer(0, 0, None, "retriever"),
            JudgedAnswer(0, 0.25, 5, "reader"),
        ],
        top_k=8,
    )
    assert metrics == pytest.approx(
        {
            "exact_match": 20,
            "f1": 35,
            "hits@1": 20,
            "hits@5": 60,
            "hits@8": 80,
            "fault_of_retriever": 20,
            "fault_of_reader": 40,
            "fault_of_choice": 20,
        }
    )
    assert list(metrics)[:5] == ["exact_match", "f1", "hits@1", "hits@5", "hits@8"]


def test_hits_are_of_questions_that_have_an_answer():
    unanswerable = JudgedAnswer(1, 1, None, None, is_answerable=False)
    metrics = open_qa_metrics([JudgedAnswer(1, 1, 1, None), JudgedAnswer(0, 0, None, "retriever"), unanswerable], 1)
    assert metrics["hits@1"] == 50 and metrics["exact_match"] == pytest.approx(200 / 3)
    assert "hits@1" not in open_qa_metrics([unanswerable], top_k=1)


@pytest.mark.parametrize(("top_k", "cutoffs"), [(1, [1]), (5, [1, 5]), (10, [1, 5, 10]), (50, [1, 5, 10, 20, 50])])
def test_hits_are_counted_as_far_as_passages_were_read(top_k, cutoffs):
    names = open_qa_metrics([JudgedAnswer(1, 1, 1, None)], top_k)
    assert [name for name in names if name.startswith("hits")] == [f"hits@{cutoff}" for cutoff in cutoffs]
