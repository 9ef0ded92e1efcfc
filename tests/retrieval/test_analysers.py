import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlm.data.packages import required
from mixlm.errors import UserError
from mixlm.retrieval.analysers import ANALYSERS, BigramAnalyser, MorphemeAnalyser

bigrams = BigramAnalyser().terms


@pytest.fixture(scope="module")
def morphemes():
    return MorphemeAnalyser().terms


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("제주도는 섬", ["제주", "주도", "도는", "섬"]),
        ("Running dogs, RUN!", ["run", "dog", "run"]),
        ("2013년 12월", ["2013", "2013년", "년", "12", "12월", "월"]),
        ("KBS는 x_y", ["kbs", "kbs는", "는", "x", "y"]),
        ("1,234.5", ["1", "234", "5"]),
        ("東京は", ["東京", "京は"]),
        ("Größe café", ["größe", "café"]),
        ("😀 👍🏽 ...!", []),
        ("한글😀한글", ["한글", "한글"]),
        ("", []),
        ("\ud800 가", ["가"]),
    ],
)
def test_bigrams(text, terms):
    assert bigrams(text) == terms


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("제주도에서 귤을 먹었다.", ["제주도", "귤", "먹"]),
        ("KBS는 2013년에", ["kbs", "2013", "년"]),
        ("Running dogs", ["run", "dog"]),
        ("학교를 도왔다", ["학교", "돕"]),
        ("😀 ...!", []),
        ("", []),
    ],
)
def test_morphemes(text, terms, morphemes):
    assert morphemes(text) == terms


@pytest.mark.parametrize("text", ["학교에서 2013년 café를", "뷁 값이 ㅋㅋ"])
def test_composed_and_decomposed_text_are_the_same(text, morphemes):
    for terms in (bigrams, morphemes):
        assert terms(unicodedata.normalize("NFD", text)) == terms(text) != []


@given(st.text(), st.text())
def test_bigrams_of_words_do_not_depend_on_their_neighbours(one, other):
    assert bigrams(f"{one} {other}") == bigrams(one) + bigrams(other)


def test_analysers_are_known_by_name():
    assert {name: analyser.name for name, analyser in ANALYSERS.items()} == {
        "bigrams": "bigrams",
        "morphemes": "morphemes",
    }


def test_a_missing_package_is_named():
    with pytest.raises(UserError, match=r"no_such_module is not installed.*mixlm\[retrieval\]"):
        required("no_such_module")
