"""Errors a user can cause: one line that says what, where, what was found and what to do; exit code 2."""

import os
import sys
from collections.abc import Callable
from functools import wraps

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130  # what a shell expects after Ctrl-C


class UserError(Exception):
    """Something the user can mend. The message is a single line and is shown without a traceback."""


def one_line(message: object) -> str:
    """`message` with line breaks and runs of blanks folded, so that an error never takes more than one line."""
    return " ".join(str(message).split())


def exits_on_user_error(main: Callable) -> Callable:
    """Decorate a program's `main`: a `UserError` becomes `error: ...` on stderr and exit code 2, Ctrl-C 130."""

    @wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            if os.environ.get("RANK", "0") == "0":  # what is wrong with the input is wrong on every rank
                print(f"error: {one_line(error)}", file=sys.stderr)
            sys.exit(USER_ERROR_EXIT_CODE)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED_EXIT_CODE)

    return wrapper
