"""Aligned columns, numbers and hints for a terminal."""

import difflib
import math
import unicodedata
from collections.abc import Iterable


def significant(value: float) -> str:
    """Four significant digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def number(value: float, form: str) -> str:
    """`value` in a format such as ".2%"; a dash where there is none (NaN)."""
    return "-" if math.isnan(value) else format(value, form)


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of a name, values and a remark, with the values aligned on the right and the others on the left."""
    widths = [max(map(columns, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *values, remark in rows:
        cells = [name + " " * (widths[0] - columns(name))]
        cells += [" " * (width - columns(value)) + value for width, value in zip(widths[1:-1], values, strict=True)]
        lines.append("  ".join(["", *cells, remark]).rstrip())
    return "\n".join(lines)


def columns(text: str) -> int:
    """Columns of a terminal that `text` takes: a Hangul syllable takes two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that is nearest, if one is near."""
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]}?" if close else ""
