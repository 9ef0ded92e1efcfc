"""Errors a user can cause: one line that says what, where, what was found and what to do; exit code 2."""

import errno
import os
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


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the machine, had no more memory: torch says so in words alone, and in several."""
    return any(words in str(error) for words in ("out of memory", "allocate memory", "enough memory"))


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


def _discard_output() -> None:
    """Python flushes the output once more when it ends, and must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exits_on_user_error(main: Callable) -> Callable:
    """Decorate a program's `main`: a `UserError` becomes `error: ...` on stderr and exit code 2, `RunStopped` its line
    and exit code 3 (0 where torchrun would start it again), a rank that is lost 4, `NotPushed` its line and 5, Ctrl-C
    130, and an output that nobody reads any more (`mixlm ... | head`) 141. Letters that its encoding lacks are written
    as escapes."""

    @wraps(main)
    def wrapper(*args, **kwargs):
        with suppress(AttributeError):  # a notebook's output is of another class
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            result = main(*args, **kwargs)
            sys.stdout.flush()
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
        except RuntimeError as error:
            if is_out_of_memory(error):
                print(
                    f"error: {_rank_unless_first()}out of memory: use a smaller --train_batch_size with more "
                    f"--gradient_accumulation_steps, or more --zero ({one_line(error)[:200]})",
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
        except BrokenPipeError:
            _discard_output()
            sys.exit(UNREAD_EXIT_CODE)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            _discard_output()
            print(f"error: {file_error(error)}: make room there, or write elsewhere", file=sys.stderr)
            sys.exit(USER_ERROR_EXIT_CODE)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED_EXIT_CODE)

    return wrapper
