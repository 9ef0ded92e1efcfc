"""Parts of the questions of an evaluation, and the file they come from."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlm.errors import UserError
from mixlm.evaluation.reading_errors import ERROR_KINDS
from mixlm.evaluation.reading_report import (
    ASPECTS,
    ERRORS,
    QUESTION_WORDS,
    JudgedQuestion,
    Scores,
    answer_length,
    answer_type,
    error_of,
    load_judged,
    question_word,
    scores_by_part,
    scores_of,
    telling_aspects,
    window_count,
)

RIGHT = JudgedQuestion("1", "누가 왔는가?", ["세종"], "세종", 1, True, 1.0, 1.0, "correct")
NEARLY = JudgedQuestion("2", "When?", ["1997년"], "1997", 2, True, 0.0, 0.5, "unit")
INSIDE = JudgedQuestion("3", "그 이름은?", ["《훈민정음》 해례본"], "정음", 9, False, 0.0, 0.25, "other")
TRAP = JudgedQuestion("4", "왜?", [], "비", 1, True, 0.0, 0.0, "other")
LITTLE_SET = [RIGHT, NEARLY, INSIDE, TRAP]

JUDGED = st.builds(
    JudgedQuestion,
    id=st.just("x"),
    question=st.text("누가 몇왜howmany?", max_size=12),
    references=st.lists(st.text("가a1( ", min_size=1, max_size=25), max_size=2),
    prediction=st.text("가a", max_size=2),
    windows=st.integers(1, 9),
    expressible=st.booleans(),
    exact_match=st.sampled_from([0.0, 1.0]),
    f1=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    error=st.sampled_from(ERROR_KINDS),
)


def asking(question: str) -> JudgedQuestion:
    return replace(RIGHT, question=question)


def answered_by(*references: str) -> JudgedQuestion:
    return replace(RIGHT, references=list(references))


def test_a_little_set_by_hand():
    assert scores_of(LITTLE_SET) == Scores(4, 75.0, 25.0, 43.75)
    parted = {aspect.title: parts for aspect, parts in telling_aspects(LITTLE_SET)}
    assert parted["windows"] == {
        "1": Scores(2, 100.0, 50.0, 50.0),
        "2": Scores(1, 100.0, 0.0, 50.0),
        "4+": Scores(1, 0.0, 0.0, 25.0),
    }
    assert parted["answerability"]["HasAns"].questions == 3 and parted["answerability"]["NoAns"].f1 == 0
    assert parted["answer on token borders"]["no"] == Scores(1, 0.0, 0.0, 25.0)
    assert list(parted["question word"]) == ["who", "when", "why", "other"]
    assert list(parted["answer type"]) == ["number", "Hangul", "marked", "none"]
    assert {kind: part.questions for kind, part in scores_by_part(LITTLE_SET, ERRORS).items()} == {
        "correct": 1,
        "unit": 1,
        "answered anyway": 1,
        "other": 1,
    }


def test_an_aspect_in_which_all_are_alike_is_left_out():
    assert telling_aspects([RIGHT, RIGHT]) == []


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(questions=st.lists(JUDGED, min_size=1, max_size=12))
def test_parts_add_up_to_the_whole(questions):
    whole = scores_of(questions)
    for aspect in (*ASPECTS, ERRORS):
        parts = scores_by_part(questions, aspect)
        assert list(parts) == [name for name in aspect.parts if name in parts]
        assert sum(part.questions for part in parts.values()) == whole.questions
        for column in ("expressible", "exact_match", "f1"):
            weighted = sum(part.questions * getattr(part, column) for part in parts.values())
            assert weighted == pytest.approx(whole.questions * getattr(whole, column))


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("이 책을 쓴 사람은 누구인가?", "who"),
        ("누가 썼는가?", "who"),
        ("누가복음은 몇 장인가?", "how many"),
        ("혹 속에 저장하는 것은 무엇인가?", "what"),
        ("뭐라고 부르나?", "what"),
        ("언제부터인가?", "when"),
        ("어디에서 태어났나?", "where"),
        ("왜 그랬는가?", "why"),
        ("임진왜란을 일으킨 나라는?", "other"),
        ("왜군을 이끈 장수는?", "other"),
        ("어떻게 부르는가?", "how"),
        ("몇 명인가?", "how many"),
        ("몇몇 나라가 참가한 대회는?", "other"),
        ("높이는 얼마인가?", "how many"),
        ("며칠 걸렸나?", "how many"),
        ("어느 나라인가?", "which"),
        ("무슨 색인가?", "which"),
        ("어떤 동물인가?", "which"),
        ("Who wrote it?", "who"),
        ("In what year did those who fled return?", "what"),
        ("How much is it?", "how many"),
        ("How is it made?", "how"),
        ("Whatever happened, name it.", "other"),
        ("WHO 본부가 있는 도시는?", "other"),
        ("", "other"),
    ],
)
def test_question_words(question, word):
    assert question_word(asking(question)) == word


def test_every_question_word_has_its_row():
    (aspect,) = [aspect for aspect in ASPECTS if aspect.part_of is question_word]
    assert list(aspect.parts) == [*QUESTION_WORDS, "other"]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("세종 대왕", "Hangul"),
        ("세종, 문종", "Hangul"),
        ("Café Müller", "Latin"),
        ("O'Brien", "Latin"),
        ("1997년 2월", "number"),
        ("약 300명", "number"),
        ("IBM사", "other"),
        ("世宗", "other"),
        ("%", "other"),
        ("세종(1397)", "marked"),
        ("《훈민정음》", "marked"),
        ("'훈민정음'", "marked"),
    ],
)
def test_answer_types(answer, kind):
    assert answer_type(answered_by(answer, "1")) == kind


@pytest.mark.parametrize(
    ("length", "part"),
    [
        (1, "1-2"),
        (2, "1-2"),
        (3, "3-5"),
        (5, "3-5"),
        (6, "6-10"),
        (10, "6-10"),
        (11, "11-20"),
        (20, "11-20"),
        (21, "21+"),
    ],
)
def test_answer_lengths(length, part):
    assert answer_length(answered_by("가" * length, "가")) == part


def test_windows_from_four_on_are_one_part():
    assert [window_count(replace(RIGHT, windows=count)) for count in (1, 3, 4, 40)] == ["1", "3", "4+", "4+"]


def test_whether_there_is_an_answer_comes_before_how_it_is_written():
    assert error_of(replace(NEARLY, prediction="", error="other")) == "not answered"
    assert error_of(TRAP) == "answered anyway"
    assert error_of(replace(TRAP, prediction="", error="correct")) == "correct"
    assert error_of(NEARLY) == "unit"


class TestFile:
    @pytest.fixture
    def file(self, tmp_path):
        file = tmp_path / "questions.jsonl"
        questions = [RIGHT, replace(NEARLY, question="줄\u2028바꿈?")]
        file.write_text("".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in questions), "utf-8")
        return file

    def test_it_is_read_as_it_was_written(self, file):
        assert load_judged(file) == [RIGHT, replace(NEARLY, question="줄\u2028바꿈?")]

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda text: text[:-20], "line 2, column .*: not JSON"),
            (lambda text: "", "line 1, column .*: not JSON"),
            (lambda text: text + "[]\n", "line 3: not what an evaluation says about a question"),
            (lambda text: text.replace('"windows": 1', '"windows": "1"'), "line 1: not what"),
            (lambda text: text.replace('"windows": 1', '"windows": 0'), "line 1: not what"),
            (lambda text: text.replace('"windows": 1', '"places": 1'), "line 1: not what"),
            (lambda text: text.replace('["세종"]', "[5]"), "line 1: not what"),
            (lambda text: text.replace('"unit"', '"typo"'), "line 2: not what"),
        ],
    )
    def test_damage_is_one_line_that_says_where(self, file, damage, message):
        file.write_text(damage(file.read_text("utf-8")), "utf-8")
        with pytest.raises(UserError, match=f"questions.jsonl, {message}.*; evaluate again"):
            load_judged(file)

    def test_not_utf_8(self, file):
        file.write_bytes(b"\xb0\xa1")
        with pytest.raises(UserError, match=r"questions.jsonl: not UTF-8 at byte offset 0; evaluate again"):
            load_judged(file)
