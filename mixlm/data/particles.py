"""Korean particles (josa) at the end of an answer: 학교에서 ("at the school") is 학교 and the particle 에서.

What is a particle depends on the sentence, so morphemes are those that Kiwi finds in the whole context.
"""

import re
import unicodedata
from functools import lru_cache

from .packages import kiwi, required

ANALYSED_CONTEXTS = 10_000  # that are remembered: the candidates of a question, and its neighbours, share a context

_PARTICLE, _BLANK, _OTHER = "p", " ", "o"
# A syllable in letters of its own (NFD), or any one character: what becomes one character when it is composed.
_COMPOSED_AS_ONE = re.compile("[\u1100-\u1112][\u1161-\u1175][\u11a8-\u11c2]?|.", re.DOTALL)


def require_kiwi() -> None:
    """Raise UserError unless Kiwi is installed."""
    required("kiwipiepy", extra="korean")


def end_without_particles(context: str, start: int, end: int) -> int:
    """Where a part of a context ends once the particles at its end are dropped.

    A part that ends within a particle loses what it has of it. A particle that shares a syllable with its noun (난 is
    나 and ㄴ) cannot be dropped, and particles alone, without a noun, stay.

    Args:
        context: a text; it is analysed whole, once.
        start, end: of the part, in characters, without blanks around it.

    Returns:
        the new end, in characters, above `start`; no blank stands before it.
    """
    kept = _kinds_of_characters(context)[start:end].rstrip(_PARTICLE + _BLANK)
    return start + len(kept) if kept else end


@lru_cache(maxsize=ANALYSED_CONTEXTS)
def _kinds_of_characters(context: str) -> str:
    """For each character of a text `_PARTICLE`, if it belongs to particles alone, or else `_BLANK` or `_OTHER`."""
    originals = _COMPOSED_AS_ONE.findall(context)  # Kiwi knows no syllables in letters of their own
    composed = "".join(unicodedata.normalize("NFC", part) if len(part) > 1 else part for part in originals)
    kinds = [_OTHER] * len(composed)
    morphemes = kiwi().tokenize(composed)
    for is_particle in (True, False):  # what a particle shares with another morpheme is not its own
        for morpheme in morphemes:
            if morpheme.tag.startswith("J") == is_particle:
                kinds[morpheme.start : morpheme.end] = (_PARTICLE if is_particle else _OTHER) * morpheme.len
    return "".join(
        (_BLANK if part.isspace() else kind) * len(part) for kind, part in zip(kinds, originals, strict=True)
    )
