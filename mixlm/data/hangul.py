"""Hangul whose syllables are written as their letters (NFD), as some file systems and editors write it."""

import re
import unicodedata

import numpy as np

_WITHOUT_FINAL = "".join(map(chr, range(ord("가"), ord("힣"), 28)))  # syllables that end with their vowel
# What NFC makes one character of.
_SYLLABLE = re.compile(f"[\u1100-\u1112][\u1161-\u1175][\u11a8-\u11c2]?|[{_WITHOUT_FINAL}][\u11a8-\u11c2]")


def compose_hangul(text: str) -> tuple[str, np.ndarray]:
    """Write each syllable as one character, and tell where it was. All other text stays as it is.

    Args:
        text: of any Unicode form.

    Returns:
        The composed text, and where in `text` each of its characters begins, with the end of `text` behind them, int64
        [characters + 1]: its part `[start:end]` is `text[borders[start]:borders[end]]`.
    """
    is_border = np.ones(len(text) + 1, dtype=bool)
    for syllable in _SYLLABLE.finditer(text):
        is_border[syllable.start() + 1 : syllable.end()] = False
    composed = _SYLLABLE.sub(lambda syllable: unicodedata.normalize("NFC", syllable[0]), text)
    return composed, np.flatnonzero(is_border)
