"""Runs go to the Hub: at their end, and where that is asked for with every checkpoint."""

import os
import shlex
import shutil
from concurrent.futures import Future
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import run_as_future

from ..errors import NotPushed, UserError, file_error
from ..files import whole_folder
from ..hub import CARD_FILE, TOKENIZER_FILES, address, card_on_hub, files_to_push, open_repository, push_files
from .arguments import TrainingArguments
from .card import is_generated, write_card
from .checkpoint import MODEL_FOLDER, step_of
from .record import RECORD_FILE, read_record, write_record

STAGE = ".hub"  # in the run's folder: what of a checkpoint is being pushed


def publish(
    folder: Path, name: str, private: bool = False, license: str | None = None, step: int | None = None
) -> list[str]:
    """Write the card of a model's folder, and push what of the folder belongs on the Hub.

    Args:
        folder: of a run that has ended, or any other with a model.
        name: USER/NAME.
        private: if the repository is to be made, make it one that only its owner sees.
        license: see `write_card`.
        step: after which the training was not over yet; nothing is shown then.

    Returns:
        lines that the user should see.

    Raises:
        UserError: it failed. What is in the folder is as before, but for the card.
    """
    files_to_push(folder)
    notes = write_card(folder, name, license, step)
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        notes.append(
            f"{folder} has no tokenizer, without which nobody can use the model: save it there and push again"
        )
    open_repository(name, private)
    if (record := read_record(folder)) is not None:
        try:
            write_record(folder, {**record, "hub_model_id": name})  # for the card of what is trained on it
        except OSError as error:
            raise UserError(f"{file_error(error)}; the run's record cannot be written") from error
    files = files_to_push(folder)
    there, here = card_on_hub(name), (folder / CARD_FILE).read_text("utf-8")
    if there is not None and there != here and not is_generated(there):
        if is_generated(here):
            files.remove(CARD_FILE)
            notes.append(f"{CARD_FILE} of {name} was written by hand and stays; delete it there for the new card")
        else:
            notes.append(f"{CARD_FILE} of {name} was written by hand too, and is now in its history alone")
    message = "The finished model" if step is None else f"The model after step {step}"
    is_new = push_files(folder, files, name, message, quiet=step is not None)
    return [*notes, f"{'pushed to' if is_new else 'nothing has changed at'} {address(name)}"]


def push_run(arguments: TrainingArguments, accelerator: Accelerator) -> None:
    """Push a run that has ended, if that is asked for; the main process does it, and the others do not wait.

    Raises:
        NotPushed: it failed.
    """
    if not arguments.push_to_hub or not accelerator.is_main_process:
        return
    name, private = arguments.hub_model_id, arguments.hub_private_repo
    try:
        run_as_future(lambda: None).result()  # one after the other: the last checkpoint may still be on its way
        notes = publish(arguments.run_folder, name, private)  # in this thread, where Ctrl-C ends it
    except (Exception, KeyboardInterrupt) as error:  # whatever it is, the training has ended well
        raise NotPushed(
            f"{str(error) or 'interrupted'}; the model is whole in {arguments.run_folder}, push it with: "
            f"{command_to_push(arguments.run_folder, name, private)}"
        ) from error
    for note in notes:
        print(note)


def command_to_push(folder: Path, name: str, private: bool, license: str | None = None) -> str:
    """What a user types to push a folder."""
    options = ["--private"] * private + (["--license", license] if license else [])
    return shlex.join(["mixlm", "push", str(folder), name, *options])


class CheckpointPusher:
    """Pushes checkpoints in the background, one at a time: what comes while one is on its way is left out."""

    def __init__(self, arguments: TrainingArguments):
        self.arguments = arguments
        self.under_way: Future | None = None

    def push(self, checkpoint: Path) -> str | None:
        """Begin to push a checkpoint.

        Returns:
            what went wrong with the one before, if something did.
        """
        if self.under_way is not None and not self.under_way.done():
            return None
        failure = None if self.under_way is None else self.under_way.exception()
        try:
            stage = self._stage(checkpoint)
        except (OSError, UserError) as error:
            self.under_way = None
            return f"{checkpoint} cannot be pushed: {error}; training goes on"
        self.under_way = run_as_future(self._push, stage, step_of(checkpoint))
        return None if failure is None else f"not pushed: {failure}; training goes on, and this checkpoint is tried"

    def _push(self, stage: Path, step: int) -> None:
        arguments = self.arguments
        try:
            publish(stage, arguments.hub_model_id, arguments.hub_private_repo, step=step)
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _stage(self, checkpoint: Path) -> Path:
        """A folder with what is to be pushed: the checkpoint itself may be deleted meanwhile."""
        run, stage = self.arguments.run_folder, self.arguments.run_folder / STAGE
        with whole_folder(stage) as partial:
            shutil.copytree(checkpoint / MODEL_FOLDER, partial, copy_function=_link, dirs_exist_ok=True)
            for name in (RECORD_FILE, CARD_FILE):
                if (run / name).exists():
                    shutil.copy(run / name, partial / name)
        return stage


def _link(source: str, target: str) -> None:
    """A second name for a file that nobody writes to; a copy where there cannot be one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
