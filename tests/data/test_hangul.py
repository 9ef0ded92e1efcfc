import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlm.data.hangul import compose_hangul

LETTERS = "".join(map(chr, [0x1100, 0x1112, 0x1113, 0x1161, 0x1175, 0x1176, 0x11A7, 0x11A8, 0x11C2, 0x11C3]))
TEXTS = st.text(
    st.one_of(st.sampled_from(LETTERS + "가각힣e\u0301\u1100\u1161 漢\uf9e1"), st.characters(codec="utf-8"))
)


def nfd(text):
    return unicodedata.normalize("NFD", text)


@settings(derandomize=True, max_examples=300, deadline=None, database=None)
@given(text=TEXTS)
def test_each_character_is_its_part_of_the_text(text):
    composed, borders = compose_hangul(text)
    assert borders[0] == 0 and borders[-1] == len(text) and len(borders) == len(composed) + 1
    for character, (start, end) in zip(composed, pairwise(borders.tolist()), strict=True):
        part = text[start:end]
        assert part and character == (unicodedata.normalize("NFC", part) if len(part) > 1 else part)
    assert unicodedata.normalize("NFC", composed) == unicodedata.normalize("NFC", text)


def test_every_syllable_is_composed():
    syllables = "".join(map(chr, range(ord("가"), ord("힣") + 1)))
    assert compose_hangul(nfd(syllables))[0] == syllables
    composed, borders = compose_hangul(f"a{nfd('한')}각{nfd('가')}.")
    assert (composed, borders.tolist()) == ("a한각가.", [0, 1, 4, 5, 7, 8])


@pytest.mark.parametrize("text", ["", "한글 abc", "e\u0301", "ㅎㅏㄴ", "\u1112", "\u1161\u1100", "漢\uf9e1"])
def test_all_else_stays(text):
    composed, borders = compose_hangul(text)
    assert composed == text and borders.tolist() == list(range(len(text) + 1))
