"""A model's folder goes to the Hub in one commit: what is there is always one whole model.

The token is the one of the environment (HF_TOKEN) or of `hf auth login`; huggingface_hub finds it, and here it is
neither read out nor written anywhere. Of a push that broke off, what has arrived is not sent again: large files are
known by their content, and small ones travel with the commit.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RemoteEntryNotFoundError
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, logging, validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files

from .errors import UserError, one_line

CARD_FILE = "README.md"
MODULES_FILE = "modules.json"  # of sentence-transformers
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
# What of a model's folder goes to the Hub, beside the code that its config.json and modules.json name.
PUBLISHED = (
    "config.json",
    *WEIGHTS,
    "model.safetensors.index.json",
    *TOKENIZER_FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("reader.json", "encoder.json", "run.json", "eval_results.json"),
    *(MODULES_FILE, "config_sentence_transformers.json"),
    *(CARD_FILE, "curves.png", "reading.png"),
)
_ADVICE = {
    401: "log in with hf auth login, or set HF_TOKEN to a token that is good",
    403: "use a token with write access to it",
}


class HubError(UserError):
    """The Hub did not do what it was asked; another time it may."""


def require_repository_name(name: str, argument: str) -> None:
    """Raise UserError unless `name`, the value of `argument`, is USER/NAME as the Hub allows it."""
    try:
        validate_repo_id(name)
        is_allowed = name.count("/") == 1
    except HFValidationError:
        is_allowed = False
    if not is_allowed:
        raise UserError(
            f"{argument} {name}: is not USER/NAME, each of letters, digits, '-', '_' and '.', such as me/my-model"
        )


def require_token() -> None:
    """Raise UserError where it is clear without asking the Hub that nothing can be pushed."""
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, and a push needs the Hub; unset it")
    if get_token() is None:
        raise UserError("no token for the Hub; log in with hf auth login, or set HF_TOKEN")


def require_access(argument: str) -> None:
    """Raise UserError unless the Hub can be reached and takes the token; `argument` is what needs that."""
    require_token()
    try:
        with _hub_errors(argument):
            HfApi().whoami()
    except HubError as error:
        raise HubError(f"{error}; or leave it out, and push the finished model with mixlm push") from error


def open_repository(name: str, private: bool) -> None:
    """See that the repository is there, and make it where it is not.

    Args:
        name: USER/NAME.
        private: nobody else shall see it.

    Raises:
        HubError: the Hub does not let it, or cannot be reached.
        UserError: there is no token; it is public and must not be.
    """
    require_token()
    with _hub_errors(name):
        HfApi().create_repo(name, private=private or None, exist_ok=True)
        if private and not HfApi().model_info(name).private:
            raise UserError(
                f"{name}: is on the Hub already, and public; make it private in its settings there, or do not ask for "
                "a private one"
            )


def address(name: str) -> str:
    """Where people see the repository."""
    return f"{constants.ENDPOINT}/{name}"


def files_to_push(folder: Path) -> list[str]:
    """The names of the files in a model's folder that go to the Hub.

    Raises:
        UserError: there is no finished model.
    """
    configuration = folder / "config.json"
    names = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    if configuration.name not in names or not any(fnmatchcase(name, pattern) for name in names for pattern in WEIGHTS):
        raise UserError(
            f"{folder}: no finished model is there (config.json and model.safetensors); give the folder of a run that "
            "has ended, or one of save_pretrained"
        )
    published = {name for name in names if any(fnmatchcase(name, pattern) for pattern in PUBLISHED)}
    with _reading(configuration):
        classes = json.loads(configuration.read_text("utf-8")).get("auto_map", {}).values()
        published |= _code_of(classes, folder)
    if MODULES_FILE in names:
        with _reading(folder / MODULES_FILE):
            modules = json.loads((folder / MODULES_FILE).read_text("utf-8"))
            if elsewhere := [module["path"] for module in modules if module["path"]]:
                raise UserError(
                    f"{folder / MODULES_FILE}: has a module in the folder {elsewhere[0]}, and mixlm push takes none; "
                    "use SentenceTransformer(...).push_to_hub"
                )
            published |= _code_of([module["type"] for module in modules], folder)
    return sorted(published)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Within it, what goes wrong with the file and the code that it names is a UserError."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, RecursionError, AttributeError) as error:
        raise UserError(f"{file}: the code it names cannot be found: {one_line(error)}") from error


def _code_of(classes: Iterable[str], folder: Path) -> set[str]:
    """The files of classes, each named as module.Class, and of what these import from beside them."""
    modules = {folder / f"{name.partition('.')[0]}.py" for name in classes}
    return {Path(file).name for module in modules for file in (module, *get_relative_import_files(module))}


def card_on_hub(name: str) -> str | None:
    """The README.md of a repository, if it has one.

    Raises:
        HubError: it does not give it.
    """
    with _hub_errors(name), TemporaryDirectory() as folder:
        try:
            return Path(HfApi().hf_hub_download(name, CARD_FILE, local_dir=folder)).read_text("utf-8")
        except RemoteEntryNotFoundError:  # that the Hub cannot be reached is another one
            return None


def push_files(folder: Path, files: list[str], name: str, message: str, quiet: bool = False) -> bool:
    """Send files in one commit. What another model has left there under such names is deleted with it.

    Args:
        folder: where the files are.
        files: their names, from `files_to_push`. A README.md that is not among them stays as it is there.
        name: of the repository.
        message: of the commit.
        quiet: show no progress.

    Returns:
        whether anything has changed there.

    Raises:
        HubError: it failed; there is what was there before.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that nothing has changed is said by the caller
    if quiet:
        disable_progress_bars()
    try:
        with _hub_errors(name):
            api = HfApi()
            before = api.model_info(name)
            obsolete = {
                sibling.rfilename
                for sibling in before.siblings
                if any(fnmatchcase(sibling.rfilename, pattern) for pattern in PUBLISHED)
            } - {*files, CARD_FILE}
            operations = [CommitOperationAdd(file, folder / file) for file in files]
            operations += [CommitOperationDelete(file) for file in sorted(obsolete)]
            return api.create_commit(name, operations, commit_message=message).oid != before.sha
    finally:
        if quiet:
            enable_progress_bars()
        logging.set_verbosity(verbosity)


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Within it, what goes wrong with the Hub is a HubError about `name`: it has many classes."""
    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(f"{name}: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    # Uploads of large files tell what happened only as the cause.
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return _cause(error.__cause__)
    if not isinstance(error, HfHubHTTPError):
        what = "the Hub cannot be reached" if isinstance(error, HTTPError) else "it cannot be pushed"
        return f"{what}: {one_line(error) or type(error).__name__}"
    status = error.response.status_code
    said = error.server_message or error.response.reason_phrase
    advice = _ADVICE.get(status)
    return f"the Hub answers {status} ({one_line(said)})" + (f"; {advice}" if advice else "")
