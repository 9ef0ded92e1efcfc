"""`mixlm push`: a model's folder goes to the Hub."""

import argparse
from pathlib import Path


def add_push_parser(subparsers) -> None:
    """Add `mixlm push`."""
    parser = subparsers.add_parser(
        "push",
        help="push a finished model to the Hub, with a model card",
        description=(
            "Write the model card (README.md) of a model's folder from what its run has left there, and push model, "
            "tokenizer, code, results and card in one commit. Checkpoints, TensorBoard's files and predictions stay "
            "here. The token is that of HF_TOKEN or of hf auth login. After a push that broke off, the same command "
            "sends what has not arrived."
        ),
        epilog="example:\n  mixlm push outputs/my-model me/my-model --private",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of a run that has ended, or of a model")
    parser.add_argument("name", metavar="USER/NAME", help="the repository; it is made if it is not there")
    parser.add_argument("--private", action="store_true", help="make it one that only you see")
    parser.add_argument(
        "--license",
        metavar="ID",
        help="of the model, for the card, as the Hub abbreviates it (default: what the run was told, or apache-2.0)",
    )
    parser.set_defaults(run=push_verb)


def push_verb(arguments: argparse.Namespace) -> None:
    """`mixlm push`."""
    from ..hub import HubError, require_repository_name
    from ..training.publishing import command_to_push, publish

    folder, name = arguments.folder, arguments.name
    require_repository_name(name, "USER/NAME")
    try:
        notes = publish(folder, name, arguments.private, arguments.license)
    except HubError as error:
        again = command_to_push(folder, name, arguments.private, arguments.license)
        raise HubError(f"{error}; nothing here is lost, push again with: {again}") from error
    for note in notes:
        print(note)
