"""Which of Korean and English a text is in, as far as its letters and commonest words tell."""

import re
from collections.abc import Iterable
from pathlib import Path

from .text_files import COMPRESSED

SAMPLE_BYTES, SAMPLED_FILES = 200_000, 50
# Words that English text is full of, and that are no keys of its JSON files.
ENGLISH_WORDS = frozenset("the of and to in was for that with by on from as it at be".split())
_WORD = re.compile(r"[^\W\d_]+")
_HANGUL = re.compile(r"[가-힣]")
_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")


def languages_of(texts: Iterable[str]) -> list[str]:
    """ "ko" where a tenth of the words has Hangul, "en" where a twentieth is among the commonest of English.

    Other languages are not recognised: a wrong name is worse than none.
    """
    words = [word for text in texts for word in _WORD.findall(text)]
    korean = sum(_HANGUL.search(word) is not None for word in words)
    english = sum(word.lower() in ENGLISH_WORDS for word in words)
    found = {"ko": korean >= 0.1 * len(words), "en": english >= 0.05 * len(words)}
    return [language for language, is_there in found.items() if words and is_there]


def samples_of(files: list[Path]) -> list[str]:
    """The beginnings of some of these text files, evenly spread; they may be compressed, and JSON with escapes."""
    samples = []
    for file in files[:: -(-len(files) // SAMPLED_FILES) or 1]:
        with COMPRESSED.get(file.suffix, open)(file, "rb") as stream:
            text = stream.read(SAMPLE_BYTES).decode("utf-8", errors="ignore")
        samples.append(_ESCAPED.sub(lambda match: chr(int(match[1], 16)), text))
    return samples
