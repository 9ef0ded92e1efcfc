"""Tables, and the places of pages that programs rewrite: what stands between `<!-- NAME -->` and `<!-- end -->`."""

from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from mixlm.errors import UserError
from mixlm.files import write_whole

END = "<!-- end -->"


def grid(rows: Sequence[dict[str, Any]], numbers: Set[str] = frozenset()) -> str:
    """A Markdown table of rows with the same columns.

    Args:
        rows: cells by the title of their column.
        numbers: titles of columns that are aligned to the right.
    """
    rules = ["--:" if title in numbers else "---" for title in rows[0]]
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    titles, *cells = (f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)
    return "\n".join([titles, f"|{'|'.join(rules)}|", *cells])


def _escaped(cell: object) -> str:
    return str(cell).replace("|", "\\|")


def replaced(text: str, name: str, block: str) -> str:
    """A page's text with `block` in the place of that name.

    Raises:
        UserError: the page has no such place.
    """
    mark = f"<!-- {name} -->"
    before, begin, rest = text.partition(mark)
    old, end, after = rest.partition(END)
    if not begin or not end or "<!-- " in old:
        raise UserError(f"the place of {name} is lost; put the lines {mark} and {END} where it belongs")
    return f"{before}{mark}\n\n{block}\n\n{END}{after}"


def replace(page: Path, name: str, block: str) -> None:
    """Put `block` in the place of that name of a page.

    Raises:
        UserError: the page has no such place.
    """
    try:
        write_whole(page, replaced(page.read_text("utf-8"), name, block))
    except UserError as error:
        raise UserError(f"{page}: {error}") from error
