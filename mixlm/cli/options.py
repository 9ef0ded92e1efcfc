"""What the values of options must be, whichever verb they are of."""

import argparse

from ..errors import UserError


def require_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raise UserError unless each of these options is 1 or more."""
    for name in names:
        if (value := getattr(arguments, name)) < 1:
            raise UserError(f"--{name} {value}: must be 1 or more")


def text_of(name: str, text: str) -> str:
    """A text from the command line, where what is not UTF-8 arrives as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: character {error.start} is no text; write it in UTF-8") from error
    return text


def question_of(name: str, text: str) -> str:
    """A question from the command line, as `text_of`, that asks something."""
    if not text.strip():
        raise UserError(f"{name}: is empty; ask something")
    return text_of(name, text)
