"""The order of the data and its batches.

Which rows an optimizer step sees is a pure function of (seed, epoch, position in the epoch). Ranks and micro-batches
only deal the rows of that global batch out among themselves, so a run can resume at any step, on any number of ranks.
"""

import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from ..heads import IGNORE

FEISTEL_ROUNDS = 6

Key = tuple[int, int]  # (epoch, index of the example)


class Permutation:
    """A pseudo-random bijection on range(size), without a table: a Feistel network with cycle walking.

    A Feistel network permutes range(4 ** half_bits), the smallest such range that holds `size`; a value that falls
    outside of range(size) is permuted again until it is inside (Black and Rogaway, 2002, "Ciphers with Arbitrary
    Finite Domains").

    Args:
        size: number of positions.
        seed: an integer, or a sequence of them, none negative; every value gives another permutation.
    """

    def __init__(self, size: int, seed: int | Sequence[int]):
        self.size = size
        self.half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self.half_mask = (np.uint64(1) << self.half_bits) - np.uint64(1)
        self.round_keys = np.random.SeedSequence(seed).generate_state(FEISTEL_ROUNDS, np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Where each of `positions` (integers in range(size), any shape) goes: int64 of the same shape."""
        values = self._network(np.asarray(positions).astype(np.uint64).ravel())
        outside = np.flatnonzero(values >= self.size)
        while len(outside):
            walked = self._network(values[outside])
            values[outside] = walked
            outside = outside[walked >= self.size]
        return values.astype(np.int64).reshape(np.shape(positions))

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self.half_bits, values & self.half_mask
        for key in self.round_keys:
            left, right = right, left ^ (scramble(right ^ key) & self.half_mask)
        return (left << self.half_bits) | right


def scramble(values: np.ndarray) -> np.ndarray:
    """A 64-bit mix in which every input bit reaches the low bits (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Position:
    """A place between two optimizer steps: the next one is batch `batch` of window `window` of epoch `epoch`."""

    epoch: int = 0
    window: int = 0
    batch: int = 0
    step_in_epoch: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, int]) -> "Position":
        return cls(**values)


class LengthBucketedBatches:
    """Global batches of rows of similar length, in an order that can be entered anywhere.

    The shuffled order of an epoch is cut into windows. The rows of a window are sorted by length and cut into batches,
    and the batches are shuffled: padding is small although every window is a random sample. Getting to a position
    costs one window, whatever the size of the data.

    Args:
        lengths: tokens of each row, [rows].
        seed: of the order.
        rows_per_step: rows of a global batch. The rows that are left at the end of an epoch are dropped.
        tokens_per_step: instead of `rows_per_step`, the padded tokens of a global batch (rows x longest row). Where
            that is too little, a batch has ranks x micro_batches rows all the same. The last batch of a window can be
            small; with fewer than ranks x micro_batches rows it is passed over.
        ranks: processes that share a global batch.
        rank: this one.
        micro_batches: parts in which a rank works through its share of a batch.
        window_steps: steps in a window, about.
        max_steps_per_epoch: end an epoch after this many steps.

    Raises:
        UserError: there are fewer rows than a step needs, or than `max_steps_per_epoch` steps need.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        seed: int,
        rows_per_step: int | None = None,
        tokens_per_step: int | None = None,
        ranks: int = 1,
        rank: int = 0,
        micro_batches: int = 1,
        window_steps: int = 64,
        max_steps_per_epoch: int | None = None,
    ):
        if (rows_per_step is None) == (tokens_per_step is None):
            raise ValueError("give exactly one of rows_per_step and tokens_per_step")
        self.lengths = lengths
        self.seed = seed
        self.rows_per_step = rows_per_step
        self.tokens_per_step = tokens_per_step
        self.ranks = ranks
        self.rank = rank
        self.micro_batches = micro_batches
        self.max_steps_per_epoch = max_steps_per_epoch

        self.parts = parts = ranks * micro_batches

        rows = len(lengths)
        if rows_per_step is None:
            fewest_rows = parts
            expected_rows = max(parts, int(tokens_per_step / max(1.0, float(np.mean(lengths))))) if rows else parts
            self.rows_per_epoch = rows
        else:
            if rows_per_step < parts:
                raise UserError(
                    f"a step of {rows_per_step} rows cannot be shared by {ranks} ranks x {micro_batches} micro-batches"
                    f"; use at least {parts} rows per step"
                )
            fewest_rows = expected_rows = rows_per_step
            self.rows_per_epoch = rows // rows_per_step * rows_per_step
        if rows < fewest_rows:
            raise UserError(
                f"the data has {rows} rows and one step needs {fewest_rows}; use more data or a smaller batch"
            )
        if rows_per_step is not None and max_steps_per_epoch is not None and max_steps_per_epoch > self._full_steps:
            raise UserError(
                f"max_steps_per_epoch {max_steps_per_epoch} x {rows_per_step} rows per step is more than the {rows} "
                f"rows of the data; use at most {self._full_steps}"
            )
        self.window_rows = window_steps * expected_rows
        # A last window too small for a batch is no window: every window has a batch.
        self.windows = -(-self.rows_per_epoch // self.window_rows)
        if self.rows_per_epoch - (self.windows - 1) * self.window_rows < fewest_rows:
            self.windows -= 1

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; known beforehand only where `rows_per_step` was given."""
        if self.rows_per_step is None:
            raise ValueError("with tokens_per_step the number of steps differs between epochs")
        return self._full_steps if self.max_steps_per_epoch is None else self.max_steps_per_epoch

    def steps(self, position: Position | None = None) -> Iterator[tuple[Position, list[list[Key]]]]:
        """Steps from `position` (default: the beginning) on, over the epochs without end.

        Yields:
            The position after the step, and the keys of this rank's rows, one list for each micro-batch.

        Raises:
            UserError: the position does not exist, because the data has changed.
        """
        position = position or Position()
        while True:
            # Where tokens cut the steps, a last window that was one on fewer ranks can be too small for those here.
            if self.rows_per_step is None and position.window == self.windows and position.batch == 0:
                position = Position(position.epoch + 1)
            epoch = position.epoch
            batches = self._window_batches(epoch, position.window)
            if position.window >= self.windows or position.batch >= len(batches):
                raise UserError(
                    f"window {position.window}, batch {position.batch} of epoch {epoch} is not in this data; "
                    "resume with the data with which the run began"
                )
            numbers = [number for number in range(position.batch, len(batches)) if len(batches[number]) >= self.parts]
            if not numbers:  # resumed on more ranks, for which the rest of the window is too small
                position = self._next_window(epoch, position.window, position.step_in_epoch)
            for number, following in zip(numbers, [*numbers[1:], None], strict=True):
                position = self._after(position, following)
                yield position, self._deal(epoch, batches[number])
                if position.epoch != epoch:  # max_steps_per_epoch can end an epoch within a window
                    break

    @property
    def _full_steps(self) -> int:
        return self.rows_per_epoch // self.rows_per_step

    def _after(self, position: Position, following: int | None) -> Position:
        """The position after a step; `following` is the number of the next batch of the window, if there is one."""
        step = position.step_in_epoch + 1
        if self.max_steps_per_epoch is not None and step >= self.max_steps_per_epoch:  # it may have become less
            return Position(position.epoch + 1)
        if following is not None:
            return Position(position.epoch, position.window, following, step)
        return self._next_window(position.epoch, position.window, step)

    def _next_window(self, epoch: int, window: int, step: int) -> Position:
        return Position(epoch, window + 1, 0, step) if window + 1 < self.windows else Position(epoch + 1)

    def _window_batches(self, epoch: int, window: int) -> list[np.ndarray]:
        """The global batches of a window, each an array of row indices from the longest row to the shortest."""
        first = window * self.window_rows
        rows = np.arange(first, min(first + self.window_rows, self.rows_per_epoch))
        rows = Permutation(len(self.lengths), (self.seed, epoch))(rows)
        lengths = np.asarray(self.lengths[rows])
        order = np.argsort(-lengths.astype(np.int64), kind="stable")
        rows, lengths = rows[order], lengths[order]

        if self.rows_per_step is not None:
            batches = list(rows.reshape(-1, self.rows_per_step))
        else:
            batches = []
            while len(rows):
                size = max(self.parts, self.tokens_per_step // max(1, int(lengths[0])))
                batches.append(rows[:size])
                rows, lengths = rows[size:], lengths[size:]
        order = np.random.default_rng((self.seed, epoch, window)).permutation(len(batches))
        return [batches[index] for index in order]

    def _deal(self, epoch: int, batch: np.ndarray) -> list[list[Key]]:
        """This rank's rows of a sorted global batch.

        A micro-batch is a run of the sorted rows, which keeps its padding small; the ranks take the rows of that run
        in turn, so that all of them have the same work at the same time.
        """
        runs = np.array_split(batch, self.micro_batches)
        return [[(epoch, index) for index in run[self.rank :: self.ranks].tolist()] for run in runs]


def collate(examples: Sequence[dict[str, np.ndarray | int | list]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad examples to a batch.

    Args:
        examples: dictionaries of the same fields. An array [length] is padded to the longest of the batch: labels with
            -100, token types with 0, ids with `pad_token_id`. A number becomes an entry of a tensor [batch]. A list of
            arrays or numbers becomes as many rows.
        pad_token_id: the padding token.

    Returns:
        int64 tensors [rows, longest] or [rows], and beside each `<prefix>input_ids` its `<prefix>attention_mask`;
        where examples have lists of these, `<prefix>first_rows` [batch] says in which row each example begins.
    """
    batch = {}
    for field in examples[0]:
        values = [example[field] for example in examples]
        if isinstance(values[0], list):
            if field.endswith("input_ids"):
                firsts = np.cumsum([0, *map(len, values[:-1])])
                batch[field.removesuffix("input_ids") + "first_rows"] = torch.from_numpy(firsts)
            values = list(chain.from_iterable(values))
        if np.ndim(values[0]) == 0:
            batch[field] = torch.tensor(values, dtype=torch.int64)
            continue
        is_input = field.endswith("input_ids")
        fill = pad_token_id if is_input else 0 if field.endswith("token_type_ids") else IGNORE
        shape = (len(values), max(map(len, values)))
        padded = np.full(shape, fill, dtype=np.int64)
        for row, value in enumerate(values):
            padded[row, : len(value)] = value
        batch[field] = torch.from_numpy(padded)
        if is_input:
            lengths = np.array([len(value) for value in values])
            mask = np.arange(shape[1]) < lengths[:, None]
            batch[field.removesuffix("input_ids") + "attention_mask"] = torch.from_numpy(mask.astype(np.int64))
    return batch


def training_batches(
    examples: Dataset,
    batches: LengthBucketedBatches,
    position: Position | None,
    pad_token_id: int,
    num_workers: int = 0,
) -> Iterator[tuple[Position, list[dict[str, Tensor]]]]:
    """Collated micro-batches of one optimizer step after the other, without end.

    Args:
        examples: maps a key (epoch, index) to an example.
        batches: the order.
        position: where to begin; None is the beginning.
        pad_token_id: the padding token.
        num_workers: processes that make the examples. They change nothing but the speed.

    Yields:
        The position after the step (to resume there), and this rank's micro-batches.
    """
    positions_ahead: deque[Position] = deque()  # the loader asks for keys some steps before it hands out their batches

    def keys() -> Iterator[list[Key]]:
        for after, micro_batches in batches.steps(position):
            positions_ahead.append(after)
            yield from micro_batches

    loader = iter(_loader(examples, keys(), pad_token_id, num_workers))
    while True:
        micro_batches = [next(loader) for _ in range(batches.micro_batches)]
        yield positions_ahead.popleft(), micro_batches


def evaluation_batches(
    examples: Dataset, rows: int, pad_token_id: int, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """Every example exactly once over the ranks, as it is in epoch 0, from the longest to the shortest.

    Args:
        examples: a dataset with `lengths`, of the keys (epoch, index).
        rows: most rows in a batch of one rank.
        pad_token_id: the padding token.
        rank: this process.
        ranks: processes that share the examples. All of them get the same number of batches, because a sharded model
            is called by all of them at once or by none.

    Yields:
        Collated batches, and whether they count: a rank for which no row is left gets a row of another one.
    """
    order = np.argsort(-np.asarray(examples.lengths, dtype=np.int64), kind="stable")
    steps = -(-len(order) // (rows * ranks))
    shares = [share for share in np.array_split(order, max(1, steps)) if len(share)]
    keys = [[(0, index) for index in share[min(rank, len(share) - 1) :: ranks].tolist()] for share in shares]
    for share, batch in zip(shares, _loader(examples, keys, pad_token_id, num_workers=0), strict=True):
        yield batch, rank < len(share)


def _loader(examples: Dataset, keys: Iterable[list[Key]], pad_token_id: int, num_workers: int) -> DataLoader:
    return DataLoader(
        examples,
        batch_sampler=keys,
        collate_fn=partial(collate, pad_token_id=pad_token_id),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # The loader draws a seed for its workers. Nothing here uses it; drawn from the global generator, it would
        # change the dropout masks of a run that resumes.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_run,
    )


def _leave_signals_to_the_run(worker: int) -> None:
    """A launcher or a terminal sends a signal to all processes. The run ends its workers itself, when it has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
