"""Korean particles (josa) at the end of an answer: 학교에서 ("at the school") is 학교 and the particle 에서.

What is a particle depends on the sentence, so morphemes are those that Kiwi finds in the whole context.
"""

from functools import lru_cache

import numpy as np

from .hangul import compose_hangul
from .packages import kiwi, required

ANALYSED_CONTEXTS = 10_000  # that are remembered: the candidates of a question, and its neighbours, share a context

_PARTICLE, _BLANK, _OTHER = "p", " ", "o"


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
    composed, borders = compose_hangul(context)  # Kiwi knows no syllables that are written as their letters
    kinds = [_OTHER] * len(composed)
    morphemes = kiwi().tokenize(composed)
    for is_particle in (True, False):  # what a particle shares with another morpheme is not its own
        for morpheme in morphemes:
            if morpheme.tag.startswith("J") == is_particle:
                kinds[morpheme.start : morpheme.end] = (_PARTICLE if is_particle else _OTHER) * morpheme.len
    lengths = np.diff(borders).tolist()
    return "".join(
        (_BLANK if character.isspace() else kind) * length
        for kind, character, length in zip(kinds, composed, lengths, strict=True)
    )
