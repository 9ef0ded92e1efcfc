"""`mixlm <verb>`: everything that is not training.

A verb is a function `add_..._parser(subparsers)` that ends with `set_defaults(run=function)`. The function imports
what it needs when it runs.
"""

import argparse
import sys
from itertools import takewhile

from ..errors import UserError, exits_on_user_error
from .ask import add_ask_parser
from .costs import add_plan_parser, add_profile_parser
from .data import add_data_parser
from .export import add_export_parser
from .index import add_encode_parser, add_index_parser
from .mine import add_mine_parser
from .models import add_convert_parser, add_fill_mask_parser, add_read_parser
from .push import add_push_parser
from .runs import add_report_parser, add_verify_engines_parser
from .search import add_evaluate_parser, add_search_parser, add_tune_parser
from .serve import add_serve_parser
from .tables import did_you_mean
from .tokenizer import add_tokenizer_parser


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and that knows which option was meant."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        # Looked at before parsing: argparse would first complain that the misspelled option is missing.
        args = sys.argv[1:] if args is None else list(args)
        options = takewhile(lambda argument: argument != "--", args)
        if self._subparsers is not None:
            options = takewhile(lambda argument: argument.startswith("-"), options)
        for option in options:
            name = option.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                self.error(f"unknown option {name}{did_you_mean(name, self._option_string_actions)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; what it returns has the verb's function as `run`."""
    parser = _Parser(prog="mixlm", description="Encoders for retrieval and machine reading: everything but training.")
    subparsers = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    add_data_parser(subparsers)
    add_tokenizer_parser(subparsers)
    add_fill_mask_parser(subparsers)
    add_read_parser(subparsers)
    add_encode_parser(subparsers)
    add_index_parser(subparsers)
    add_search_parser(subparsers)
    add_tune_parser(subparsers)
    add_mine_parser(subparsers)
    add_ask_parser(subparsers)
    add_serve_parser(subparsers)
    add_evaluate_parser(subparsers)
    add_report_parser(subparsers)
    add_push_parser(subparsers)
    add_profile_parser(subparsers)
    add_plan_parser(subparsers)
    add_verify_engines_parser(subparsers)
    add_convert_parser(subparsers)
    add_export_parser(subparsers)
    return parser


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Run one verb.

    Args:
        argv: the arguments after `mixlm`; those of the process if None.

    Raises:
        SystemExit: with 2 after an error of the user's, with 0 after `--help`.
    """
    arguments = build_parser().parse_args(argv)
    arguments.run(arguments)
