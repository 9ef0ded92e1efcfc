"""Which particles are dropped from the end of a part of a Korean text."""

import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlm.data.particles import end_without_particles, require_kiwi
from mixlm.errors import UserError


def without_particles(context: str, part: str, form: str = "NFC") -> str:
    context, part = unicodedata.normalize(form, context), unicodedata.normalize(form, part)
    start = context.index(part)
    end = end_without_particles(context, start, start + len(part))
    return unicodedata.normalize("NFC", context[start:end])


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize(
    ("context", "part", "expected"),
    [
        # One particle, several, and what a particle is made of.
        ("그는 서울에서 태어났다.", "서울에서", "서울"),
        ("그는 서울에서 태어났다.", "그는", "그"),
        ("서울에서는 비가 왔다.", "서울에서는", "서울"),
        ("서울로부터 온 편지다.", "서울로부터", "서울"),
        ("이것이 세종(世宗)의 이름이다.", "세종(世宗)의", "세종(世宗)"),
        ("그는 1397년에 태어났다.", "1397년에", "1397년"),
        ("죄와 벌을 읽었다.", "죄와 벌을", "죄와 벌"),
        ("그는 '봄봄'을 썼다.", "'봄봄'을", "'봄봄'"),
        ("그는 서울 에서 태어났다.", "서울 에서", "서울"),
        # The part ends before the particle, or within it.
        ("그는 서울에서 태어났다.", "서울", "서울"),
        ("그는 서울에서 태어났다.", "서울에", "서울"),
        ("그는 서울에서 태어났다.", "울에", "울"),
        # A particle that shares a syllable, with another particle and with a noun.
        ("학교에선 조용히 해라.", "학교에선", "학교"),
        ("학교에서 난 공부했다.", "난", "난"),
        ("그걸 누가 가져갔나?", "그걸", "그걸"),
        # No particles: a copula, what follows a particle, words that only look like one.
        ("그것은 학생이다.", "학생이다", "학생이다"),
        ("그는 학교에서, 나는 집에서 잤다.", "학교에서,", "학교에서,"),
        ("우리는 제주도에 갔다.", "제주도", "제주도"),
        ("호랑이가 고양이를 보았다.", "고양이", "고양이"),
        ("나는 사과와 포도를 먹었다.", "사과", "사과"),
        # Nothing would be left.
        ("그는 서울에서는 잤다.", "에서는", "에서는"),
        ("그는 서울에서는 잤다.", "서는", "서는"),
        # Characters of several code points or none that can be seen.
        ("👨‍👩‍👧 그는 😀 서울에서 태어났다.", "서울에서", "서울"),
        ("Cafe\u0301 옆의 서울에서 태어났다.", "서울에서", "서울"),
        ("𠮷野家의 음식이다.", "𠮷野家의", "𠮷野家"),
        ("The end of it all.", "of it", "of it"),
    ],
)
def test_by_hand(form, context, part, expected):
    assert without_particles(context, part, form) == expected


WORDS = "서울 학교 에서 는 의 을 까지 난 그걸 에선 이다 했다 사과 1397년 ( ) . 😀 👨‍👩‍👧 abc".split()
BLANKS_AND_MARKS = [" ", "\n", "\u3000", "\u200b", "\u0301"]
TEXTS = st.lists(
    st.sampled_from([*WORDS, *BLANKS_AND_MARKS]) | st.text(max_size=3),
    max_size=12,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_is_left_is_the_beginning_of_the_part(data):
    context = data.draw(TEXTS.filter(str.strip))
    if data.draw(st.booleans()):
        context = unicodedata.normalize("NFD", context)
    places = [place for place, character in enumerate(context) if not character.isspace()]
    start, last = sorted((data.draw(st.sampled_from(places)), data.draw(st.sampled_from(places))))
    end = end_without_particles(context, start, last + 1)
    assert start < end <= last + 1
    assert context[start:end].strip() == context[start:end]
    assert end_without_particles(context, start, end) == end


def test_without_kiwi_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "kiwipiepy", None)
    with pytest.raises(UserError, match=r"kiwipiepy is not installed; install it with: pip install 'mixlm\[korean\]'"):
        require_kiwi()
