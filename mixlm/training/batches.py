"""The batches of a run, as `loop.train` asks for them."""

import hashlib
from collections.abc import Iterator

import numpy as np
from accelerate import Accelerator
from torch.utils.data import Dataset

from ..data.batching import LengthBucketedBatches, Position, collate, training_batches
from ..errors import UserError
from .arguments import TrainingArguments
from .objectives import Batch


class TrainingBatches:
    """Examples in the order and the batches that the arguments ask for; called with a position in the data.

    Args:
        examples: maps a key (epoch, index) to an example; has `lengths`, and `longest()`, an example as long as any.
        pad_token_id: the padding token.
        arguments: of the run. They are read with each call: a batch size may be found in the meantime.
        accelerator: says which part of each step is this rank's.
        window_steps: steps whose rows are sorted by length together; with 1 it is chance alone which rows meet.
    """

    def __init__(
        self,
        examples: Dataset,
        pad_token_id: int,
        arguments: TrainingArguments,
        accelerator: Accelerator,
        window_steps: int = 64,
    ):
        self.examples, self.pad_token_id = examples, pad_token_id
        self.arguments, self.accelerator, self.window_steps = arguments, accelerator, window_steps

    def __call__(self, position: Position) -> Iterator[tuple[Position, list[Batch]]]:
        """Step by step the position after it and this rank's micro-batches."""
        arguments, ranks = self.arguments, self.accelerator.num_processes
        micro_batches = arguments.gradient_accumulation_steps
        rows_per_step = arguments.train_batch_size * micro_batches * ranks
        order = LengthBucketedBatches(
            self.examples.lengths,
            seed=arguments.seed,
            rows_per_step=rows_per_step if arguments.tokens_per_step is None else None,
            tokens_per_step=arguments.tokens_per_step,
            ranks=ranks,
            rank=self.accelerator.process_index,
            micro_batches=micro_batches,
            window_steps=self.window_steps,
            max_steps_per_epoch=arguments.max_steps_per_epoch,
        )
        return training_batches(self.examples, order, position, self.pad_token_id, arguments.num_workers)

    def __len__(self) -> int:
        """Examples there are."""
        return len(self.examples)

    def fingerprint(self) -> str:
        """What the order is of, the lengths of all examples, as a hash: for other data a position means nothing."""
        lengths = np.ascontiguousarray(self.examples.lengths, dtype=np.int64)
        return hashlib.blake2b(lengths.data, digest_size=8).hexdigest()

    def longest(self, rows: int) -> Batch:
        """So many rows, each as long as any of the examples.

        Raises:
            UserError: there are no examples.
        """
        if not len(self.examples):
            raise UserError("the data has 0 rows and one step needs 1; use more data")
        return collate([self.examples.longest()] * rows, self.pad_token_id)
