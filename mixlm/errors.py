"""Errors a user can cause: one line that says what, where, what was found and what to do; exit code 2."""

import codecs
import errno
import json
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps

USER_ERROR_EXIT_CODE = 2
STOPPED_EXIT_CODE = 3
LOST_RANK_EXIT_CODE = 4
NOT_PUSHED_EXIT_CODE = 5
# What a shell expects of a program after Ctrl-C, and of one whose output nobody reads any more.
INTERRUPTED_EXIT_CODE, UNREAD_EXIT_CODE = 130, 141
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NOT_TO_BE_OPENED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


class UserError(Exception):
    """Something the user can mend. The message is a single line and is shown without a traceback."""


class RunStopped(Exception):
    """A run ended before its last step because it was asked to, and can go on from there. A single line."""


class NotPushed(Exception):
    """A run has ended well and its model is whole, but it could not be pushed to the Hub. A single line."""


def one_line(message: object) -> str:
    """`message` with line breaks and runs of blanks folded, so that an error never takes more than one line."""
    return " ".join(str(message).split())


def file_error(error: OSError) -> str:
    """What the system says went wrong, and with which file."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else one_line(error)


def is_without_room(error: OSError) -> bool:
    """Whether a disk is full, or what a user may have of it: libraries in Rust say so in words alone."""
    return error.errno in _NO_ROOM or any(f"(os error {number})" in str(error) for number in _NO_ROOM)


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether a device, or the machine, had no more memory: torch says so in words alone, and in several."""
    words_of_torch = ("out of memory", "allocate memory", "enough memory")
    return isinstance(error, MemoryError) or any(words in str(error) for words in words_of_torch)


def _is_about_another_rank(error: RuntimeError) -> bool:
    """Whether torch.distributed has lost a rank: gloo says so in words alone, NCCL and the store have classes."""
    by_class = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    by_words = any(
        words in str(error) for words in ("Connection closed by peer", "Connection reset by peer", "Timed out waiting")
    )
    return by_class or by_words


def _rank_unless_first() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def _escape_letters(error: UnicodeError) -> tuple[str, int]:
    """Letters that an encoding lacks, as JSON escapes them, for what is printed may be JSON."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _flush_output() -> None:
    if sys.stdout is not None:  # a daemon's
        sys.stdout.flush()


def _drop_output() -> None:
    """Drop what cannot be written: Python flushes once more when it ends, and its exit code would be of that."""
    try:
        _flush_output()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_output_unread() -> bool:
    """Whether the output is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout, 0)  # what breaks is told unasked
        return bool(poll.poll(0))
    except (OSError, TypeError, ValueError):  # an output without a file, as a notebook's
        return False


codecs.register_error("json_escapes", _escape_letters)


def exits_on_user_error(main: Callable) -> Callable:
    """Decorate a program's `main`: a `UserError` becomes `error: ...` on stderr and exit code 2, `RunStopped` its line
    and exit code 3 (0 where torchrun would start it again), a rank that is lost 4, `NotPushed` its line and 5, Ctrl-C
    130, and an output that nobody reads any more (`mixlm ... | head`) 141. A full disk, too little memory and a file
    that may not be opened are errors of the user's. Letters that the output's encoding lacks are written as JSON
    escapes them."""

    @wraps(main)
    def wrapper(*args, **kwargs):
        with suppress(AttributeError):  # a notebook's output is of another class
            sys.stdout.reconfigure(errors="json_escapes")
        try:
            result = main(*args, **kwargs)
            _flush_output()
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                # Communication threads can abort a process while it ends; a finished run would have failed.
                sys.stderr.flush()
                os._exit(0)
            return result
        except UserError as error:
            # What is wrong with the input is wrong on every rank of a machine.
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"error: {_rank_unless_first()}{one_line(error)}", file=sys.stderr)
            sys.exit(USER_ERROR_EXIT_CODE)
        except RunStopped as stop:
            if os.environ.get("RANK", "0") == "0":
                print(one_line(stop), file=sys.stderr)
            # torchrun takes any other code for a failure, and would start the run again.
            restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
            sys.exit(0 if restarts else STOPPED_EXIT_CODE)
        except NotPushed as failure:
            print(f"not pushed: {one_line(failure)}", file=sys.stderr)
            sys.exit(NOT_PUSHED_EXIT_CODE)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                print(
                    f"error: {_rank_unless_first()}out of memory: use smaller batches or a smaller model; in training "
                    "a smaller --train_batch_size with more --gradient_accumulation_steps, or more --zero "
                    f"({one_line(error)[:200] or type(error).__name__})",
                    file=sys.stderr,
                )
                sys.exit(USER_ERROR_EXIT_CODE)
            if not _is_about_another_rank(error):
                raise
            rank = os.environ.get("RANK", "0")
            print(
                f"error: rank {rank}: another rank has ended or does not answer; what the launcher or that rank says "
                f"first is the cause ({one_line(error)[:200]})",
                file=sys.stderr,
            )
            sys.exit(LOST_RANK_EXIT_CODE)
        except OSError as error:
            if isinstance(error, BrokenPipeError) and _is_output_unread():
                sys.exit(UNREAD_EXIT_CODE)
            if is_without_room(error):
                advice = "make room there, or write elsewhere"
            elif error.filename and error.errno in _NOT_TO_BE_OPENED:
                advice = "give another file or folder"
            else:
                raise
            print(f"error: {file_error(error)}: {advice}", file=sys.stderr)
            sys.exit(USER_ERROR_EXIT_CODE)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED_EXIT_CODE)
        finally:
            _drop_output()

    return wrapper
