"""What comes before and after the training loop: the run's folder, the processes, the checkpoint to go on from, and
the finished model."""

import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ..encoder import Encoding
from ..errors import UserError, file_error, is_without_room
from ..evaluation.reading_report import QUESTIONS_FILE
from ..files import partial_name, whole_folder, write_json
from ..hub import CARD_FILE, require_access
from ..loading import StoredSettings
from ..reader import Decoding
from ..tokenization import save_tokenizer
from .arguments import TrainingArguments
from .card import CURVES_FILE, READING_FILE, is_generated
from .checkpoint import MODEL_FOLDER, Evaluation, checkpoint_of, checkpoints_in, prune, read_state, verify
from .launch import start_missing_processes
from .record import RECORD_FILE, RESULTS_FILE

# What a finished run has put into its folder, and what a new one in its place removes. The configuration comes last:
# without it the folder is no model.
FINAL_FOLDER, CONFIGURATION_FILE = "final", "config.json"
CHECKPOINTS, CURVES = "checkpoints", "tensorboard"
PREDICTIONS_FOLDER = "predict"  # of the questions of `predict_file`
SKIPPED_FILE = "skipped_answers.jsonl"
PROBE = ".writable"  # written and deleted to see whether the folder can be written to, and is one for all
SECONDS_TO_BE_SEEN = 60
REMOVED_BY_A_NEW_RUN = (
    CURVES,
    Decoding.file_name,
    Encoding.file_name,
    "predictions.json",
    "nbest_predictions.json",
    "null_odds.json",
    PREDICTIONS_FOLDER,
    QUESTIONS_FILE,
    CONFIGURATION_FILE,
    RESULTS_FILE,
    RECORD_FILE,
    "model.safetensors",
    CURVES_FILE,
    READING_FILE,
)


def prepare_run(arguments: TrainingArguments) -> Accelerator:
    """Make the run's folder, seed the process, and start accelerate.

    Raises:
        UserError: the folder cannot be written or belongs to an earlier run; there is no such checkpoint; the rows of
            a step cannot be shared out among the processes; these do not know of each other, or do not see one folder;
            the Hub, which is to be pushed to, does not let it.
    """
    require_checkpoint(arguments)
    start_missing_processes()
    disable_progress_bar()  # of saving and loading weights: they would break the one of the training
    folder = arguments.run_folder
    accelerator = build_accelerator(arguments)
    _require_that_tasks_have_met(accelerator.num_processes)
    # `accelerate config` may ask for a precision. The engine sees to it: on a CPU accelerate passes over fp16.
    arguments.take_precision(accelerator.mixed_precision)
    arguments.fit_effective_batch(accelerator.num_processes)
    if arguments.push_to_hub:
        on_main_process(accelerator, lambda: require_access("--push_to_hub"))
    written = on_main_process(accelerator, lambda: _claim(folder, arguments))
    _require_one_folder(folder, arguments.output_dir, written, accelerator)
    torch.manual_seed(arguments.seed)
    return accelerator


def build_accelerator(arguments: TrainingArguments) -> Accelerator:
    """Join the processes of a run; one of them alone where there are no others."""
    return Accelerator(
        # Without this, ranks on CPUs would not find each other, and each would train alone.
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=arguments.timeout_minutes))],
    )


def on_main_process(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """Let the main process do something while the others wait; returns on all of them what it returns there.

    Raises:
        UserError: on all of them, what went wrong there and a user can mend.
    """
    outcome: list[Any] = [None, None]  # what is returned, and what went wrong
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
        except OSError as error:
            outcome[1] = file_error(error)
    broadcast_object_list(outcome)
    result, message = outcome
    if message is not None:
        raise UserError(message)
    return result


def _claim(folder: Path, arguments: TrainingArguments) -> str:
    """Make the folder and write `PROBE` into it; returns its content."""
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not (_goes_on_in(folder, arguments) or arguments.overwrite_output_dir):
        is_run = any((folder / name).exists() for name in (CHECKPOINTS, *REMOVED_BY_A_NEW_RUN))
        found = "an earlier run is there" if is_run else "other files are there"
        go_on = "go on with --resume auto, " if checkpoints_in(folder / CHECKPOINTS) else ""
        raise UserError(f"{folder}: {found}; {go_on}choose another --model_name, or give --overwrite_output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = secrets.token_hex(8)
        (folder / PROBE).write_text(written)
        return written
    except OSError as error:
        raise UserError(f"--output_dir {arguments.output_dir}: cannot be written: {error}") from error


def _require_that_tasks_have_met(processes: int) -> None:
    """Raise UserError where a job's tasks would each train alone, into one folder: accelerate knows torchrun's names
    alone, and mpirun's on CPUs."""
    for variable in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        tasks = os.environ.get(variable, "")
        if processes == 1 and tasks.isdecimal() and int(tasks) > 1:
            raise UserError(
                f"{variable}={tasks}: each of {tasks} tasks would train alone; start one task a machine, and in it "
                "torchrun, such as srun --ntasks-per-node 1 torchrun ...; where they are to train alone, unset it"
            )


def _require_one_folder(folder: Path, name: str, written: str, accelerator: Accelerator) -> None:
    """Raise UserError unless all ranks see what the main process has written as `PROBE`, which is deleted then."""
    sees = gather_object([_reads(folder / PROBE, written)])
    on_main_process(accelerator, (folder / PROBE).unlink)
    if not all(sees):
        raise UserError(
            f"--output_dir {name}: rank {sees.index(False)} sees another folder there than rank 0; give one that all "
            "machines share"
        )


def _reads(file: Path, content: str) -> bool:
    """Whether a file has that content; a network's file system may take a moment to show it."""
    end = time.monotonic() + SECONDS_TO_BE_SEEN
    while True:
        with suppress(OSError):
            if file.read_text() == content:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def say(accelerator: Accelerator, text: str, end: str = "\n") -> None:
    """Print on the main process alone; `accelerator.print` does so once a machine."""
    if accelerator.is_main_process:
        print(text, end=end)


def _goes_on_in(folder: Path, arguments: TrainingArguments) -> bool:
    """Whether what is in the folder is the run that is to go on."""
    if arguments.resume == "auto":
        # Killed before its first checkpoint, a run has left these alone.
        left = {CHECKPOINTS, CURVES, SKIPPED_FILE, RECORD_FILE, partial_name(Path(RECORD_FILE)).name, PROBE}
        return bool(checkpoints_in(folder / CHECKPOINTS)) or {path.name for path in folder.iterdir()} <= left
    return arguments.resume != "never" and is_of_run(Path(arguments.resume), folder)


def is_of_run(checkpoint: Path, folder: Path) -> bool:
    """Whether a checkpoint is among those of the run in `folder`; a copy elsewhere below it is not."""
    return checkpoint.absolute().parent.resolve() == (folder / CHECKPOINTS).resolve()


def require_checkpoint(arguments: TrainingArguments) -> None:
    """Raise UserError where `--resume` names a folder that is no checkpoint."""
    if arguments.resume not in ("auto", "never"):
        path = Path(arguments.resume)
        if not path.is_dir():
            found = "a file" if path.is_file() else "no such folder"
            raise UserError(f"--resume {path}: {found}; give a checkpoint's folder, or auto for the run's newest")
        read_state(Path(arguments.resume))


def choose_checkpoint(arguments: TrainingArguments, accelerator: Accelerator) -> Path | None:
    """The checkpoint to go on from, the same on every rank; None to start anew.

    With `--resume auto` it is the newest that is whole: a damaged one is reported and passed over.

    Raises:
        UserError: the named one is damaged, or all of the run's are.
    """

    def choose() -> Path | None:
        if arguments.resume == "never":
            return None
        if arguments.resume != "auto":
            verify(Path(arguments.resume))
            return Path(arguments.resume)
        found = checkpoints_in(arguments.run_folder / CHECKPOINTS)
        for path in reversed(found):
            try:
                verify(path)
            except UserError as error:
                print(f"passed over: {error}")
            else:
                return path
        if found:
            raise UserError(
                f"--resume auto: every checkpoint in {arguments.run_folder / CHECKPOINTS} is damaged; start again "
                "with --resume never --overwrite_output_dir"
            )
        return None

    return on_main_process(accelerator, choose)


def remove_earlier_run(folder: Path) -> None:
    """Delete what an earlier run has left in its folder.

    Raises:
        OSError: something cannot be deleted.
    """
    if (folder / CHECKPOINTS).is_dir():  # it may be a link to a larger disk, which stays
        prune(folder / CHECKPOINTS, kept=[])
    for name in REMOVED_BY_A_NEW_RUN:
        path = folder / name
        is_folder = path.is_dir() and not path.is_symlink()
        shutil.rmtree(path) if is_folder else path.unlink(missing_ok=True)
    card = folder / CARD_FILE
    if card.is_file() and is_generated(card.read_text("utf-8", errors="replace")):  # and not a person's
        card.unlink()


def finish_run(
    tokenizer: PreTrainedTokenizerBase,
    chosen: Evaluation,
    arguments: TrainingArguments,
    accelerator: Accelerator,
    settings: StoredSettings | None = None,
) -> None:
    """Put the model of the checkpoint that `train` has chosen, the tokenizer, `settings` if there are any, and
    eval_results.json into the run's folder.

    Raises:
        UserError: it cannot be written, or that checkpoint is damaged.
    """
    folder = arguments.run_folder

    def write() -> None:
        try:
            with whole_folder(folder / FINAL_FOLDER) as partial:
                checkpoint = checkpoint_of(folder / CHECKPOINTS, chosen.step)
                verify(checkpoint)
                shutil.copytree(checkpoint / MODEL_FOLDER, partial, dirs_exist_ok=True)
                save_tokenizer(tokenizer, partial)
                if settings is not None:
                    settings.save(partial)
                results = {f"eval/{name}": value for name, value in chosen.metrics.items()}
                write_json(partial / RESULTS_FILE, results)
            written = list((folder / FINAL_FOLDER).iterdir())
            for path in sorted(written, key=lambda path: path.name == CONFIGURATION_FILE):
                os.replace(path, folder / path.name)
            (folder / FINAL_FOLDER).rmdir()
        except OSError as error:
            advice = "make room, then --resume auto" if is_without_room(error) else "--resume auto tries again"
            raise UserError(f"{file_error(error)}; the model is in {folder / CHECKPOINTS}: {advice}") from error
        for name, value in chosen.metrics.items():
            print(f"  {name:>16}  {value:,.4f}")
        print(f"model, tokenizer and results are in {folder}; draw its curves with: mixlm report {folder}")

    on_main_process(accelerator, write)


def end_processes() -> None:
    """End the process group, after the last run of this process."""
    if dist.is_initialized():
        dist.destroy_process_group()
