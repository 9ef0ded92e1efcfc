"""What a corpus is made of: its size, its lengths, what is in it twice, and what of an evaluation is in it.

It is read once, in memory that does not grow with it but for 8 bytes a sentence and 16 a document.
"""

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from os import PathLike, fspath

import numpy as np
from tokenizers import Tokenizer

from ..errors import UserError
from ..progress import progress_bar
from .batching import scramble
from .chunks import in_chunks
from .corpus import Document
from .cutting import text_backend
from .squad import read_squad

DOCUMENTS_AT_ONCE = 100  # that are tokenized together
HASHES_AT_ONCE = 100_000  # that are compared together

# A text counts as known where at least this share of its runs of this many words is in the corpus (PaLM,
# arXiv:2204.02311, section 8).
WORDS_OF_A_RUN, KNOWN_SHARE = 8, 0.7
MOST_KNOWN = 5  # texts that are named

_WORD = re.compile(r"\w+")
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class LengthSummary:
    """Lengths of all documents or sentences: the mean, and what half, 90% and 99% of them do not exceed."""

    mean: float
    median: int
    p90: int
    p99: int
    longest: int


@dataclass(frozen=True)
class Duplicates:
    """What has occurred before in the corpus.

    Args:
        documents: that are the same, sentence by sentence.
        similar_documents: that have the same words, but for case and digits; those are among them.
        sentences: that are the same.
    """

    documents: int
    similar_documents: int
    sentences: int


@dataclass(frozen=True)
class KnownText:
    """A text of the evaluation that is in the corpus.

    Args:
        question: the id of the first question about it.
        share: of its runs of words that are in the corpus, wherever.
        place: where most of them are: FILE:LINE, or DATASET:ROW.
    """

    question: str
    share: float
    place: str


@dataclass(frozen=True)
class Overlap:
    """What of the texts and questions of an evaluation is in the corpus.

    Args:
        file: of the evaluation.
        texts: how many different ones it has.
        short_texts: of these, such as have no run of words that can be looked for.
        touched_texts: those with one run at least in the corpus.
        known_texts: those of which `KNOWN_SHARE` of the runs are there.
        questions, questions_about_known_texts: how many there are, in all and about those.
        known_questions: that are a sentence of the corpus, but for case and punctuation.
        most_known: the texts with the largest share, largest first.
    """

    file: str
    texts: int
    short_texts: int
    touched_texts: int
    known_texts: int
    questions: int
    questions_about_known_texts: int
    known_questions: int
    most_known: list[KnownText]


@dataclass(frozen=True)
class CorpusStatistics:
    """What a corpus is made of.

    Args:
        documents, sentences, words, characters: how many there are; blanks are no characters here.
        tokens, unknown_tokens: without special ones; None without a tokenizer.
        lengths: by what is counted in what: "sentences of a document".
        duplicates: what is there twice.
        overlaps: one for each evaluation.
    """

    documents: int
    sentences: int
    words: int
    characters: int
    tokens: int | None
    unknown_tokens: int | None
    lengths: dict[str, LengthSummary]
    duplicates: Duplicates
    overlaps: list[Overlap]


def corpus_statistics(
    documents: Iterable[Document],
    tokenizer: Tokenizer | None = None,
    unknown_id: int | None = None,
    evaluation_files: Iterable[str | PathLike] = (),
) -> CorpusStatistics:
    """Read a corpus and say what is in it.

    Args:
        documents: of the corpus; read once.
        tokenizer: counts tokens too; its truncation and padding are not used, and "[MASK]" in a text is text.
        unknown_id: of its token for what it does not know.
        evaluation_files: SQuAD-style files or folders (`mixlm.data.squad.read_squad`) that are looked for in it.

    Raises:
        UserError: an evaluation file is wrong; there is no document; or what reading the documents raises.
    """
    evaluations = [_Evaluation(file) for file in evaluation_files]
    counts = Counter()
    lengths = {"sentences of a document": _Lengths(), "characters of a sentence": _Lengths()}
    if tokenizer is not None:
        tokenizer = text_backend(tokenizer)
        lengths |= {"tokens of a sentence": _Lengths(), "tokens of a document": _Lengths()}
    exact, similar, sentence_hashes = _Hashes(), _Hashes(), _Hashes()
    progress = progress_bar(documents, desc="reading the corpus", unit=" documents")
    for batch in in_chunks(progress, DOCUMENTS_AT_ONCE):
        for document in batch:
            sentences = document.sentences
            words = [_words(sentence) for sentence in sentences]
            counts["documents"] += 1
            counts["sentences"] += len(sentences)
            counts["words"] += sum(map(len, words))
            counts["characters"] += sum(len(part) for sentence in sentences for part in sentence.split())
            lengths["sentences of a document"].add([len(sentences)])
            lengths["characters of a sentence"].add(map(len, sentences))
            exact.add(tuple(sentences))
            similar.add(_DIGITS.sub("0", " ".join(map(" ".join, words))))
            for sentence in sentences:
                sentence_hashes.add(sentence)
            for evaluation in evaluations:
                evaluation.look_into(document, words)
        if tokenizer is not None:
            texts = [sentence for document in batch for sentence in document.sentences]
            ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
            sizes = list(map(len, ids))
            counts["tokens"] += sum(sizes)
            counts["unknown"] += sum(each.count(unknown_id) for each in ids)
            lengths["tokens of a sentence"].add(sizes)
            remaining = iter(sizes)
            lengths["tokens of a document"].add(sum(islice(remaining, len(each.sentences))) for each in batch)
    if not counts["documents"]:
        raise UserError("no document has text: there is nothing to measure")
    return CorpusStatistics(
        documents=counts["documents"],
        sentences=counts["sentences"],
        words=counts["words"],
        characters=counts["characters"],
        tokens=None if tokenizer is None else counts["tokens"],
        unknown_tokens=None if tokenizer is None else counts["unknown"],
        lengths={name: each.summary() for name, each in lengths.items()},
        duplicates=Duplicates(exact.repeated(), similar.repeated(), sentence_hashes.repeated()),
        overlaps=[evaluation.overlap() for evaluation in evaluations],
    )


class _Lengths:
    """How often each length occurs: quantiles are exact, and there are not many different lengths."""

    def __init__(self):
        self.counts = Counter()

    def add(self, lengths: Iterable[int]) -> None:
        self.counts.update(lengths)

    def summary(self) -> LengthSummary:
        lengths = np.array(sorted(self.counts), dtype=np.int64)
        counts = np.array([self.counts[length] for length in lengths.tolist()], dtype=np.int64)
        total = counts.sum()
        median, p90, p99 = (
            int(lengths[np.searchsorted(counts.cumsum(), np.ceil(share * total))]) for share in (0.5, 0.9, 0.99)
        )
        return LengthSummary(float(lengths @ counts / total), median, p90, p99, int(lengths[-1]))


class _Hashes:
    """What was there before, by hashes of 8 bytes: two of a hundred million texts have the same with p = 0.0003."""

    def __init__(self):
        self.values = array("q")

    def add(self, text: object) -> None:
        self.values.append(hash(text))

    def repeated(self) -> int:
        """How many were there before. The hashes are sorted where they are: np.unique takes six times their memory."""
        values = np.frombuffer(self.values, dtype=np.int64) if self.values else np.empty(0, np.int64)
        values.sort()
        blocks = (values[first : first + HASHES_AT_ONCE + 1] for first in range(0, len(values), HASHES_AT_ONCE))
        return sum(int(np.count_nonzero(block[1:] == block[:-1])) for block in blocks)


class _Evaluation:
    """The texts and questions of an evaluation, and what of them was found so far."""

    def __init__(self, file: str | PathLike):
        self.file = fspath(file)
        self.examples = read_squad(file, to_learn_from=False).examples
        self.texts = list(dict.fromkeys(example.context for example in self.examples))
        runs = [np.unique(_runs(_words(text))) for text in self.texts]
        self.runs = np.unique(np.concatenate([np.empty(0, np.uint64), *runs]))
        self.is_found = np.zeros(len(self.runs), dtype=bool)
        self.runs_of_text = [np.searchsorted(self.runs, each) for each in runs]
        # The texts in which each run is: run k has text_of_run[borders[k] : borders[k + 1]].
        text_numbers = np.repeat(np.arange(len(runs)), list(map(len, runs)))
        places = np.concatenate([np.empty(0, np.int64), *self.runs_of_text])
        order = np.argsort(places, kind="stable")
        self.text_of_run = text_numbers[order]
        self.borders = np.searchsorted(places[order], np.arange(len(self.runs) + 1))
        self.most = np.zeros(len(self.texts), dtype=np.int64)  # runs of a text in the document that has the most
        self.place = [""] * len(self.texts)
        self.questions = Counter(" ".join(_words(example.question)) for example in self.examples)
        self.found_questions: set[str] = set()

    def look_into(self, document: Document, words: list[list[str]]) -> None:
        """Look for all of it in a document, whose sentences have these words."""
        self.found_questions.update(text for each in words if (text := " ".join(each)) in self.questions)
        runs = np.unique(_runs([word for sentence in words for word in sentence]))
        places = np.searchsorted(self.runs, runs)
        places = places[places < len(self.runs)]
        places = np.unique(places[np.isin(self.runs[places], runs)])  # also what lies just below a run has its place
        if len(places):
            self.is_found[places] = True
            texts = np.concatenate([self.text_of_run[self.borders[k] : self.borders[k + 1]] for k in places])
            for text, count in zip(*np.unique(texts, return_counts=True), strict=True):
                if count > self.most[text]:
                    self.most[text] = count
                    self.place[text] = f"{document.source}:{document.line}"

    def overlap(self) -> Overlap:
        shares = np.array([self.is_found[runs].mean() if len(runs) else 0.0 for runs in self.runs_of_text])
        known = {text for text, share in zip(self.texts, shares, strict=True) if share >= KNOWN_SHARE}
        first_question = {example.context: example.id for example in reversed(self.examples)}
        ranked = [int(number) for number in np.argsort(-shares, kind="stable")[:MOST_KNOWN] if shares[number] > 0]
        return Overlap(
            file=self.file,
            texts=len(self.texts),
            short_texts=sum(not len(runs) for runs in self.runs_of_text),
            touched_texts=int((shares > 0).sum()),
            known_texts=len(known),
            questions=len(self.examples),
            questions_about_known_texts=sum(example.context in known for example in self.examples),
            known_questions=sum(self.questions[text] for text in self.found_questions),
            most_known=[
                KnownText(first_question[self.texts[number]], float(shares[number]), self.place[number])
                for number in ranked
            ],
        )


def _words(text: str) -> list[str]:
    """Words without case and punctuation, in NFC as the corpus is."""
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold())


def _runs(words: list[str]) -> np.ndarray:
    """A hash of each run of `WORDS_OF_A_RUN` consecutive words, uint64."""
    if len(words) < WORDS_OF_A_RUN:
        return np.empty(0, dtype=np.uint64)
    hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(hashes, WORDS_OF_A_RUN)
    mixed = np.zeros(len(windows), dtype=np.uint64)
    for column in windows.T:  # in this order: the same words in another one are another run
        mixed = scramble(mixed * np.uint64(3) + column)
    return mixed
