"""Rows about the data: padding, tokenization, going on in the middle, and waiting for batches.

They read the trial data under MIXLM_DATA.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import Result, Row, interleaved, median_ratio, medians, peak_memory
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast
from transformers.utils import ModelOutput

import run_pretraining
from mixlm import MixLMConfig, MixLMForQuestionAnswering, MixLMForRetrieval, MixLMModel
from mixlm.data.batching import LengthBucketedBatches, Position, collate, training_batches
from mixlm.data.corpus import read_documents
from mixlm.data.examples import SentenceOrderExamples
from mixlm.data.passages import read_passages
from mixlm.data.squad import read_squad
from mixlm.data.store import TokenizedCorpus, open_corpus
from mixlm.data.tokenizing import SENTENCES_PER_CHUNK
from mixlm.encoder import MixLMEncoder
from mixlm.errors import UserError
from mixlm.reader import MixLMReader, in_order, scores_by_window
from mixlm.tokenization import load_tokenizer, train_tokenizer
from mixlm.training.arguments import PretrainingArguments
from mixlm.training.loop import train
from mixlm.training.run import prepare_run

DATA = Path(os.environ.get("MIXLM_DATA", Path(__file__).resolve().parent.parent.parent / "shared" / "data"))

PADDED_LENGTH = 384  # tokens of every row without bucketing
ROWS_PER_STEP = 32
TIMED_BATCHES, TIMED_ROWS, PADDING_PAIRS = 8, 16, 3
READ_QUESTIONS, ENCODED_PASSAGES = 200, 200

TOKENIZING_PAIRS = 3
MEMORY_PAIRS = 3

EVERY_NTH_DOCUMENT = 5  # of corpus_ko makes the corpus "1x": 100,809 sentences
COPIES = 8
STEPS = (10, 1_000_000)
RESUME_PAIRS = 9

WATCHED_STEPS = 20


def required_data(name: str) -> Path:
    """A file or folder of the trial data.

    Raises:
        UserError: it is not there.
    """
    path = DATA / name
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder; set MIXLM_DATA to the folder of the trial data, which has it"
        )
    return path


@contextmanager
def silence() -> Iterator[None]:
    """Without the progress bars and reports of what is measured."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def corpus_sentences() -> Iterator[str]:
    """The sentences of corpus_ko."""
    for document in read_documents(required_data("corpus_ko")):
        yield from document.sentences


# Padding


def read_pairs() -> list[tuple[str, str]]:
    """Question and paragraph of each question of KorQuAD's dev set."""
    articles = json.loads(required_data("mrc/KorQuAD_v1.0_dev.json").read_text("utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    return [(qa["question"], paragraph["context"]) for paragraph in paragraphs for qa in paragraph["qas"]]


def encode_pairs(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> list[list[int]]:
    """[CLS] question [SEP] paragraph [SEP]; a long paragraph is cut."""
    questions, paragraphs = zip(*pairs, strict=True)
    encoded = tokenizer(list(questions), list(paragraphs), truncation="only_second", max_length=PADDED_LENGTH)
    return encoded["input_ids"]


def bucketed_epoch(lengths: np.ndarray, rows_per_step: int) -> list[list[int]]:
    """The rows of each batch of the first epoch."""
    batches = []
    for after, micro_batches in LengthBucketedBatches(lengths, seed=0, rows_per_step=rows_per_step).steps():
        batches.append([index for batch in micro_batches for _, index in batch])
        if after.epoch:
            return batches


def padded_token_ratio(lengths: np.ndarray, batches: list[list[int]]) -> float:
    """Tokens of rows padded to PADDED_LENGTH / tokens of rows padded to the longest of their batch.

    The real tokens are the same, so this is the ratio of real tokens a second at equal time for a padded token.
    """
    rows = sum(map(len, batches))
    return rows * PADDED_LENGTH / sum(len(batch) * int(lengths[batch].max()) for batch in batches)


def padding_token_ratio() -> list[Result]:
    """Padded tokens of KorQuAD pairs: every row padded to 384 / length-bucketed batches. Exact"""
    pairs = read_pairs()
    words = MixLMConfig.from_preset("mixlm-base").vocab_size
    results = []
    for name, target, vocabulary, tokenizer in (
        ("padding_token_ratio", ">= 1.6", "vocab_ko", load_tokenizer(required_data("vocab_ko"))),
        (
            "padding_token_ratio_own_vocabulary",
            "",
            "own vocabulary of these paragraphs",
            train_tokenizer(dict.fromkeys(paragraph for _, paragraph in pairs), show_progress=False),
        ),
        (
            "padding_token_ratio_learned_vocabulary",
            "",
            f"vocabulary of {words:,} learned from corpus_ko",
            train_tokenizer(corpus_sentences(), words, show_progress=False),
        ),
    ):
        lengths = np.array([len(ids) for ids in encode_pairs(tokenizer, pairs)])
        batches = bucketed_epoch(lengths, ROWS_PER_STEP)
        shape = (
            f"{len(lengths):,} pairs of {lengths.mean():.0f} tokens on average ({vocabulary}), {ROWS_PER_STEP} rows a "
            f"step; without any padding {PADDED_LENGTH / lengths.mean():.2f}"
        )
        results.append(Result(name, padded_token_ratio(lengths, batches), "x", target, shape, 1, 1))
    return results


def padding_time_ratio() -> list[Result]:
    """CPU time of the encoder's forward on the same KorQuAD rows: padded to 384 / length-bucketed batches"""
    tokenizer = load_tokenizer(required_data("vocab_ko"))
    rows = encode_pairs(tokenizer, read_pairs())
    lengths = np.array(list(map(len, rows)))
    epoch = bucketed_epoch(lengths, TIMED_ROWS)
    # The batches of an epoch are shuffled, but a few of them are not like all: they are taken evenly by length.
    by_length = sorted(epoch, key=lambda batch: int(lengths[batch].max()))
    places = ((np.arange(TIMED_BATCHES) + 0.5) / TIMED_BATCHES * len(by_length)).astype(int)
    sample = [by_length[place] for place in places]
    bucketed = [
        collate([{"input_ids": np.array(rows[index])} for index in batch], tokenizer.pad_token_id) for batch in sample
    ]
    padded = [pad_to_length(batch, tokenizer.pad_token_id) for batch in bucketed]
    torch.manual_seed(0)
    model = MixLMModel(MixLMConfig.from_preset("mixlm-mini", vocab_size=len(tokenizer))).eval()

    @torch.inference_mode()
    def forward(batches: list[dict[str, Tensor]]) -> None:
        for batch in batches:
            model(**batch)

    seconds = interleaved({"padded": partial(forward, padded), "bucketed": partial(forward, bucketed)}, PADDING_PAIRS)
    shape = (
        f"mixlm-mini, {TIMED_BATCHES} batches of {TIMED_ROWS} rows (vocab_ko), whose ratio of tokens is "
        f"{padded_token_ratio(lengths, sample):.2f}"
    )
    ratio = median_ratio(seconds["padded"], seconds["bucketed"])
    return [Result("padding_time_ratio", ratio, "x", ">= 1.6", shape, 1, PADDING_PAIRS)]


def pad_to_length(batch: dict[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """The batch with rows of PADDED_LENGTH."""
    missing = PADDED_LENGTH - batch["input_ids"].shape[1]
    fill = {"input_ids": pad_token_id, "attention_mask": 0}
    return {name: F.pad(batch[name], (0, missing), value=value) for name, value in fill.items()}


def reading_rate() -> list[Result]:
    """Questions a CPU second of `MixLMReader`, from texts to answers / when every window is padded to 384 tokens"""
    tokenizer = load_tokenizer(required_data("vocab_ko"))
    questions = read_squad([str(required_data("mrc/KorQuAD_v1.0_dev.json"))]).examples
    questions = questions[:: len(questions) // READ_QUESTIONS][:READ_QUESTIONS]
    torch.manual_seed(0)
    config = MixLMConfig.from_preset("mixlm-mini", vocab_size=len(tokenizer))
    reader = MixLMReader(MixLMForQuestionAnswering(config), tokenizer, batch_size=TIMED_ROWS)

    padding_model = partial(call_padded, reader.model, reader.decoding.max_seq_length, tokenizer.pad_token_id)

    def answer(model: Callable[..., ModelOutput]) -> None:
        windows = reader.decoding.windows(questions, tokenizer)
        cpu, pad = torch.device("cpu"), tokenizer.pad_token_id
        scores = in_order(windows, scores_by_window(model, cpu, windows, TIMED_ROWS, pad))
        list(reader.decoding.read(windows, scores))

    with silence():
        seconds = interleaved(
            {"padded": partial(answer, padding_model), "bucketed": partial(answer, reader.model)}, PADDING_PAIRS
        )
    rate = len(questions) / statistics.median(seconds["bucketed"])
    shape = f"mixlm-mini (vocab_ko), {len(questions)} questions of KorQuAD, {rate:.0f} a second"
    ratio = median_ratio(seconds["padded"], seconds["bucketed"])
    return [Result("reading_rate_vs_padded", ratio, "x", "", shape, 1, PADDING_PAIRS)]


def call_padded(model: Callable[..., ModelOutput], length: int, pad_token_id: int, **batch: Tensor) -> ModelOutput:
    """What a model says of a batch when every row is padded to `length`."""
    padded = {}
    for name, tensor in batch.items():
        fill = pad_token_id if name.endswith("input_ids") else 0
        padded[name] = F.pad(tensor, (0, length - tensor.shape[1]), value=fill)
    return model(**padded)


def encoding_rate() -> list[Result]:
    """Passages a CPU second of `MixLMEncoder`, from texts to vectors / when every passage is padded to 256 tokens"""
    tokenizer = load_tokenizer(required_data("vocab_ko"))
    passages = list(read_passages(required_data("mrc/KorQuAD_v1.0_dev.json")))
    passages = passages[:: len(passages) // ENCODED_PASSAGES][:ENCODED_PASSAGES]
    torch.manual_seed(0)
    config = MixLMConfig.from_preset("mixlm-mini", vocab_size=len(tokenizer))
    encoder = MixLMEncoder(MixLMForRetrieval(config), tokenizer, batch_size=TIMED_ROWS)
    model = encoder.model

    class Padding(torch.nn.Module):
        config, device = model.config, model.device

        def forward(self, **batch: Tensor) -> ModelOutput:
            return call_padded(model, encoder.encoding.max_passage_length, tokenizer.pad_token_id, **batch)

    def encode(used: torch.nn.Module) -> None:
        encoder.model = used
        encoder.encode_passages(passages)

    with silence():
        seconds = interleaved(
            {"padded": partial(encode, Padding()), "bucketed": partial(encode, model)}, PADDING_PAIRS
        )
    rate = len(passages) / statistics.median(seconds["bucketed"])
    shape = f"mixlm-mini (vocab_ko), {len(passages)} passages of KorQuAD, {rate:.0f} a second"
    ratio = median_ratio(seconds["padded"], seconds["bucketed"])
    return [Result("encoding_rate_vs_padded", ratio, "x", "", shape, 1, PADDING_PAIRS)]


# Tokenization


def tokenize_rate() -> list[Result]:
    """Wall-clock rate of `open_corpus` into an empty cache / that of `tokenizers` on the same texts in memory"""
    corpus_path = required_data("corpus_ko")
    tokenizer = load_tokenizer(required_data("vocab_ko"))
    texts = list(corpus_sentences())
    chunks = [texts[first : first + SENTENCES_PER_CHUNK] for first in range(0, len(texts), SENTENCES_PER_CHUNK)]

    def project() -> None:
        with tempfile.TemporaryDirectory() as cache, silence():
            build_store(corpus_path, tokenizer, cache)

    def raw(encode: Callable) -> None:
        for chunk in chunks:
            encode(chunk, add_special_tokens=False)

    backend = tokenizer.backend_tokenizer
    seconds = interleaved(
        {
            "project": project,
            "raw": partial(raw, backend.encode_batch),
            "raw fast": partial(raw, backend.encode_batch_fast),
        },
        TOKENIZING_PAIRS,
        warm_up=0,  # a round takes a minute; what warms up is nothing beside it
        clock=time.perf_counter,  # all cores work, and reading and writing are waited for
    )
    rates = {name: len(texts) / median for name, median in medians(seconds).items()}
    shape = f"corpus_ko, {len(texts):,} sentences; {rates['project']:,.0f} / {{:,.0f}} sentences a second"
    return [
        Result(
            name,
            median_ratio(seconds[other], seconds["project"]),
            "x",
            target,
            shape.format(rates[other]),
            os.cpu_count(),
            TOKENIZING_PAIRS,
        )
        for name, other, target in (
            ("tokenize_rate_vs_raw", "raw", ">= 0.8"),
            ("tokenize_rate_vs_raw_fast", "raw fast", ""),
        )
    ]


def build_store(corpus_path: Path, tokenizer: PreTrainedTokenizerFast, cache: str | Path) -> TokenizedCorpus:
    """The tokenized corpus, for `run_pretraining.py`'s default length."""
    longest = PretrainingArguments.max_seq_length - SentenceOrderExamples.special_tokens
    return open_corpus(corpus_path, tokenizer, max_sentence_length=longest, cache_dir=cache)


def write_corpus(path: Path, copies: int) -> int:
    """Write every fifth document of corpus_ko `copies` times; returns the number of sentences."""
    documents = [
        document.sentences
        for number, document in enumerate(read_documents(required_data("corpus_ko")))
        if number % EVERY_NTH_DOCUMENT == 0
    ]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(copies):
            file.writelines("\n".join(sentences) + "\n\n" for sentences in documents)
    return copies * sum(map(len, documents))


def prepare_store(corpus_path: str, cache: str) -> Callable[[], object]:
    """The work whose memory is measured: building the store."""
    tokenizer = load_tokenizer(required_data("vocab_ko"))
    return partial(build_store, Path(corpus_path), tokenizer, cache)


def tokenize_memory() -> list[Result]:
    """Peak memory of building the store of a corpus 8 times as large / of the corpus"""
    required_data("vocab_ko")
    sentences: dict[int, int] = {}
    peaks: dict[int, list[int]] = {1: [], COPIES: []}
    with tempfile.TemporaryDirectory() as folder:
        for copies in peaks:
            sentences[copies] = write_corpus(Path(folder) / f"{copies}x.dat", copies)
        for number in range(MEMORY_PAIRS):
            for copies, found in peaks.items():
                arguments = {"corpus_path": f"{folder}/{copies}x.dat", "cache": f"{folder}/{copies}x-{number}"}
                found.append(peak_memory("data_rows:prepare_store", **arguments))
    typical = {copies: statistics.median(found) for copies, found in peaks.items()}
    shape = (
        f"{sentences[COPIES]:,} sentences: {typical[COPIES] / 2**20:.1f} MiB; {sentences[1]:,} sentences: "
        f"{typical[1] / 2**20:.1f} MiB"
    )
    ratio = median_ratio(peaks[COPIES], peaks[1])
    return [Result("tokenize_memory_8x_over_1x", ratio, "x", "<= 1.1", shape, 1, MEMORY_PAIRS)]


# Going on in the middle


def position_at(step: int, order: LengthBucketedBatches) -> Position:
    """Where a run is after `step` optimizer steps. `order` must be by rows: its windows then have equal steps."""
    epoch, step_in_epoch = divmod(step, order.steps_per_epoch)
    window, batch = divmod(step_in_epoch, order.window_rows // order.rows_per_step)
    return Position(epoch, window, batch, step_in_epoch)


def pretraining_arguments(folder: str, **fields: object) -> PretrainingArguments:
    """The defaults of `run_pretraining.py`."""
    return PretrainingArguments(
        model_name="benchmark",
        output_dir=folder,
        corpus_path=f"{folder}/1x.dat",
        tokenizer=str(required_data("vocab_ko")),
        **fields,
    )


def first_batch(
    arguments: PretrainingArguments, tokenizer: PreTrainedTokenizerFast, corpus: TokenizedCorpus, step: int
) -> None:
    """What `run_pretraining.py` does from the open corpus to the first batch after `step` steps."""
    training, _ = run_pretraining.build_examples(arguments, tokenizer, corpus)
    order = LengthBucketedBatches(training.lengths, seed=arguments.seed, rows_per_step=arguments.train_batch_size)
    next(training_batches(training, order, position_at(step, order), tokenizer.pad_token_id, num_workers=0))


def resume_first_batch() -> list[Result]:
    """Wall-clock time from the open corpus to the first batch: worst / best of steps 10 and 10^6, corpus 1x and 8x"""
    tokenizer = load_tokenizer(required_data("vocab_ko"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = pretraining_arguments(folder)
        competitors, blocks = {}, {}
        for copies in (1, COPIES):
            path = Path(folder) / f"{copies}x.dat"
            write_corpus(path, copies)
            with silence():
                corpus = build_store(path, tokenizer, folder)
            blocks[copies] = len(corpus.blocks(corpus.max_sentence_length))
            for step in STEPS:
                competitors[f"step {step:,} of {copies}x"] = partial(first_batch, arguments, tokenizer, corpus, step)
        seconds = medians(interleaved(competitors, RESUME_PAIRS, clock=time.perf_counter))
    milliseconds = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in seconds.items())
    shape = f"{blocks[1]:,} and {blocks[COPIES]:,} blocks, {arguments.train_batch_size} rows; {milliseconds}"
    ratio = max(seconds.values()) / min(seconds.values())
    return [Result("resume_first_batch_ratio", ratio, "x", "<= 1.5", shape, 1, RESUME_PAIRS)]


# Waiting for batches


def share_of_waiting(num_workers: int, folder: str) -> tuple[float, float]:
    """Train a new model with the defaults of `run_pretraining.py`, but for `num_workers`.

    Returns:
        The share of the time that the loop waited for its next batch, and the seconds of a step. Both begin with the
        end of the first wait: the start of the workers is paid once in a run, not once in a step.
    """
    tokenizer = load_tokenizer(required_data("vocab_ko"))
    arguments = pretraining_arguments(
        folder, num_workers=num_workers, num_steps=WATCHED_STEPS + 1, overwrite_output_dir=True
    )
    accelerator = prepare_run(arguments)
    model = run_pretraining.build_model(arguments, tokenizer)
    arguments.fit_learning_rate(model.config.hidden_size)
    corpus = build_store(Path(arguments.corpus_path), tokenizer, folder)
    training, _ = run_pretraining.build_examples(arguments, tokenizer, corpus)
    order = LengthBucketedBatches(training.lengths, seed=arguments.seed, rows_per_step=arguments.train_batch_size)
    asked, received = [], []

    def timed_batches(position: Position) -> Iterator:
        batches = training_batches(training, order, position, tokenizer.pad_token_id, num_workers)
        while True:
            asked.append(time.perf_counter())
            batch = next(batches)
            received.append(time.perf_counter())
            yield batch

    objective_class = run_pretraining.OBJECTIVES[arguments.task]
    train(model, objective_class, timed_batches, arguments, accelerator, evaluate=lambda model: {})
    accelerator.end_training()
    waited = sum(end - start for start, end in zip(asked[1:], received[1:], strict=True))
    total = received[-1] - received[0]
    return waited / total, total / WATCHED_STEPS


def data_wait() -> list[Result]:
    """Share of the training loop's time that it waits for its next batch"""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "1x.dat", copies=1)
        workers_of = {"data_wait_share": PretrainingArguments.num_workers, "data_wait_share_without_workers": 0}
        for name, num_workers in workers_of.items():
            with silence():
                share, seconds = share_of_waiting(num_workers, folder)
            target = "< 0.02" if name == "data_wait_share" else ""
            shape = (
                f"mixlm-mini (vocab_ko), SOP, {PretrainingArguments.train_batch_size} x "
                f"{PretrainingArguments.max_seq_length} tokens, num_workers {num_workers}, {WATCHED_STEPS} steps of "
                f"{seconds:.2f} s"
            )
            results.append(Result(name, share, "", target, shape, 1, 1))
    return results


ROWS = [
    Row(
        ("padding_token_ratio", "padding_token_ratio_own_vocabulary", "padding_token_ratio_learned_vocabulary"),
        padding_token_ratio,
        {
            "padding_token_ratio_own_vocabulary": "the same with a vocabulary trained on these very paragraphs: fewer "
            "tokens a row",
            "padding_token_ratio_learned_vocabulary": "the same with a vocabulary trained on other text by `mixlm "
            "tokenizer train`'s defaults, as a user has it",
        },
    ),
    Row(("padding_time_ratio",), padding_time_ratio),
    Row(("reading_rate_vs_padded",), reading_rate),
    Row(("encoding_rate_vs_padded",), encoding_rate),
    Row(
        ("tokenize_rate_vs_raw", "tokenize_rate_vs_raw_fast"),
        tokenize_rate,
        {
            "tokenize_rate_vs_raw": "wall-clock rate of `open_corpus` into an empty cache (from the .xz to the "
            "finished store) / `encode_batch` alone on the same chunks of sentences in memory",
            "tokenize_rate_vs_raw_fast": "the same / `encode_batch_fast`, which keeps no offsets",
        },
    ),
    Row(("tokenize_memory_8x_over_1x",), tokenize_memory),
    Row(("resume_first_batch_ratio",), resume_first_batch),
    Row(
        ("data_wait_share", "data_wait_share_without_workers"),
        data_wait,
        {"data_wait_share_without_workers": "the same with `--num_workers 0`"},
    ),
]
