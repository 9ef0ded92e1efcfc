"""Kinds of wrong answers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlm.evaluation.reading import normalize_squad, score_korquad_v1
from mixlm.evaluation.reading_errors import ERROR_KINDS, error_kind

TEXTS = st.text("가나은는에1 3년도만()", max_size=8)


@pytest.mark.parametrize(
    ("prediction", "reference", "kind"),
    [
        ("《훈민정음》", "훈민정음", "correct"),
        ("세종 대왕", "세종대왕", "spacing"),
        ("학교에서", "학교", "particle"),
        ("학교", "학교에서", "particle"),
        ("학교에서", "학교의", "particle"),
        ("세종 대왕이", "세종대왕", "particle"),  # blanks beside
        ("‘세종’은", "세종", "particle"),
        ("왕이", "왕", "particle"),
        ("고도", "고의", "other"),  # one syllable in common is no word
        ("부산로", "부산", "other"),  # 로 does not follow ㄴ
        ("서울로", "서울", "particle"),
        ("학교에 서", "학교", "other"),  # a particle is not written in two words
        ("IBM은", "IBM", "particle"),
        ("서울 사람은", "서울", "other"),
        ("세종(世宗)", "세종", "brackets"),
        ("세종", "세종(1397~1450(?))", "brackets"),
        ("유엔[1]", "유엔", "brackets"),
        ("세종（世宗）", "세종(1397)", "brackets"),
        ("(世宗)", "(1397)", "other"),  # nothing is left
        ("세종(世宗)은", "세종", "other"),  # two differences
        ("1997년", "1997", "unit"),
        ("10", "10 km", "unit"),
        ("2007년 3월 6", "2007년 3월 6일", "unit"),
        ("3도", "3", "unit"),  # degrees, not "also"
        ("1997에", "1997", "particle"),
        ("3만", "3", "other"),  # thirty thousand
        ("3 million", "3", "other"),
        ("3만", "3만을", "particle"),
        ("1997년 5월", "1997", "other"),
        ("1997년5월", "1997", "other"),
        ("3명의 사람", "3", "other"),
        ("30%", "30", "correct"),  # by KorQuAD's own normalization
        ("부산", "서울", "other"),
        ("", "서울", "other"),
        ("은", "", "other"),
    ],
)
def test_kinds(prediction, reference, kind):
    assert error_kind(prediction, [reference]) == kind


def test_the_nearest_reference_counts():
    assert error_kind("세종대왕", ["이도", "세종대왕(世宗)", "세종 대왕"]) == "spacing"


def test_no_references():
    assert error_kind("", []) == "correct"
    assert error_kind("세종", []) == "other"


def test_another_normalization():
    assert error_kind("The end", ["end"]) == "other"
    assert error_kind("The end", ["end"], normalize_squad) == "correct"


@settings(derandomize=True, deadline=None, database=None, max_examples=150)
@given(prediction=TEXTS, reference=TEXTS)
def test_kinds_are_symmetric_and_agree_with_em(prediction, reference):
    kind = error_kind(prediction, [reference])
    assert kind in ERROR_KINDS
    assert kind == error_kind(reference, [prediction])
    assert (kind == "correct") == (score_korquad_v1(prediction, [reference]).exact_match == 1)
