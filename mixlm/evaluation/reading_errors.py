"""By how little a wrong answer is wrong: a particle, a bracket, a unit or a blank more or less than the reference."""

import re
from collections.abc import Callable, Sequence

from ..tokenization import LONGEST_PARTICLE, PARTICLES, final_consonant
from .reading import normalize_korquad

# From the smallest difference to the greatest.
ERROR_KINDS = ("correct", "spacing", "particle", "brackets", "unit", "other")

_INNERMOST_BRACKETS = re.compile(r"\([^()]*\)|\[[^\[\]]*\]|（[^（）]*）|［[^［］]*］")
# "3도" is three degrees and "3만" thirty thousand: the words for "also" and "only" seldom follow a digit.
_NO_PARTICLES_AFTER_DIGITS = ("도", "만", "만을")
# What is no unit, because it makes another number.
_MAGNITUDE = re.compile(r"[십백천만억조]|thousand|million|billion|trillion")


def error_kind(
    prediction: str,
    references: Sequence[str],
    normalize: Callable[[str], str] = normalize_korquad,
) -> str:
    """What separates an answer from the reference that it differs least from.

    All but "correct" are told apart without blanks, and are one difference each: an answer with a particle and a
    bracketed part too much is "other".

    Args:
        prediction: the answer.
        references: the reference answers; none where no answer is right.
        normalize: what is done to both before they are compared.

    Returns:
        One of `ERROR_KINDS`:

        * "correct": equal, an exact match by `normalize`;
        * "spacing": equal without blanks;
        * "particle": equal up to a particle (josa) at the end: 학교에서, 학교; both may have one: 학교에서, 학교의;
        * "brackets": equal without what stands in round or square brackets: 세종(世宗), 세종;
        * "unit": one ends in a number, and the other has a word without digits after it: 1997년, 1997;
        * "other": everything else.
    """
    same_up_to = {
        "correct": lambda answer, reference: normalize(answer) == normalize(reference),
        "spacing": lambda answer, reference: _compact(normalize(answer)) == _compact(normalize(reference)),
        "particle": lambda answer, reference: _same_up_to_particle(normalize(answer), normalize(reference)),
        "brackets": lambda answer, reference: _same_up_to_brackets(answer, reference, normalize),
        "unit": lambda answer, reference: _same_up_to_unit(normalize(answer), normalize(reference)),
    }
    for kind, same in same_up_to.items():
        if any(same(prediction, reference) for reference in references or [""]):
            return kind
    return "other"


def _compact(text: str) -> str:
    return "".join(text.split())


def _same_up_to_particle(first: str, second: str) -> bool:
    first_stems, second_stems = _stems(first), _stems(second)
    # Where both are cut, one syllable is too little to go by: 고도 and 고의 are not the same word.
    both_cut = any(len(stem) >= 2 for stem in first_stems & second_stems)
    return both_cut or _compact(first) in second_stems or _compact(second) in first_stems


def _stems(text: str) -> set[str]:
    """What is left, without blanks, when a particle is cut off the end, for each particle that may stand there."""
    compact = _compact(text)
    stems = set()
    for length in range(1, min(LONGEST_PARTICLE, len(compact) - 1) + 1):
        stem, particle = compact[:-length], compact[-length:]
        if (
            final_consonant(stem[-1]) in PARTICLES.get(particle, ())
            and length <= len(text.split()[-1])
            and not (stem[-1].isdigit() and particle in _NO_PARTICLES_AFTER_DIGITS)
        ):
            stems.add(stem)
    return stems


def _same_up_to_brackets(first: str, second: str, normalize: Callable[[str], str]) -> bool:
    first, second = (_compact(normalize(_without_brackets(text))) for text in (first, second))
    return first == second != ""


def _without_brackets(text: str) -> str:
    while (shorter := _INNERMOST_BRACKETS.sub(" ", text)) != text:
        text = shorter
    return text


def _same_up_to_unit(first: str, second: str) -> bool:
    shorter, longer = sorted((first, second), key=lambda text: len(_compact(text)))
    number, with_unit = _compact(shorter), _compact(longer)
    if not (number and number[-1].isdigit() and with_unit.startswith(number)):
        return False
    unit = with_unit.removeprefix(number)
    return (
        len(unit) <= len(longer.split()[-1])  # one word
        and not any(character.isdigit() for character in unit)
        and not _MAGNITUDE.match(unit)
    )
