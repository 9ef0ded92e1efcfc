"""WordPiece tokenizers that are right for Korean: train one, load one, measure one.

What comes out is a plain fast tokenizer: the saved folder loads with `AutoTokenizer.from_pretrained` wherever
transformers is installed, without this package.

What happens to text before it is cut, and what does not:

* Control, format and private-use characters (zero-width space, byte-order mark, ...) are dropped, every Han character
  and every punctuation mark becomes a word of its own: the conventions of BERT.
* Accents are never stripped, with lowercasing neither: stripping works by canonical decomposition, which takes every
  Hangul syllable apart.
* Text is not composed to NFC. The NFC normalizer of `tokenizers` maps a composed character to the *first* of the code
  points it was made of, so the end of a token over decomposed Hangul falls inside a syllable and `text[start:end]`
  loses its last letters. Offsets that are always right matter more, so text is composed before it comes here, with
  `unicodedata.normalize("NFC", text)`; of contexts of machine reading, whose answers are places in the text as it is,
  the Hangul alone, with `mixlm.data.hangul`. Decomposed text that comes through anyway is cut into the tokens of its
  own code points.
"""

import copy
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .data.chunks import in_chunks
from .data.cutting import text_backend
from .data.hangul import compose_hangul
from .data.squad import Answer, SkippedAnswer, read_squad
from .errors import UserError, one_line
from .loading import require_source
from .progress import draws_over, progress_bar

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUING_PREFIX = "##"

# A longer word becomes one [UNK]: WordPiece needs time that grows with the cube of a word's length, and what is longer
# is no word but a base64 block. BERT's 100 is too little for Korean written without spaces.
LONGEST_WORD = 500

# Characters get tokens before anything longer does. Where all of them would fill more than half of the vocabulary
# (an encyclopedia has thousands of Han characters that occur once), the rarest are left out, up to this share of text;
# beyond it only if they would fill more than three quarters.
RARE_CHARACTERS = 0.0001

# Korean writes particles onto the noun: "학교에서" is "at the school". A noun and its particle that often occur side
# by side would become one token, and no reader of token spans could then answer "학교": with 32,000 tokens, one in six
# answers of KorQuAD was lost this way. So merges are learned from stems and particles apart. Many particles have two
# forms, for nouns that end in a vowel or a consonant; heeding this leaves alone most words that only look alike.
_ENDINGS_AND_PARTICLES = (
    (
        ("vowel", "ㄹ", "consonant", "foreign"),
        "에 에는 에도 에의 에서 에서는 에서도 에서의 에게 에게는 에게서 한테 께서 "
        "의 도 만 만을 까지 까지의 부터 처럼 보다 마다 밖에 조차",
    ),
    (
        ("ㄹ", "consonant", "foreign"),
        "은 을 이 과 과는 과의 이나 이라 이라고 이라는 이라도 이란 이며 이고 이다 이었다",
    ),
    (("vowel", "foreign"), "는 를 가 와 와는 와의 나 라 라고 라는 라도 란 며 였다"),
    (("consonant", "foreign"), "으로 으로는 으로도 으로의 으로서 으로써 으로부터"),
    (("vowel", "ㄹ", "foreign"), "로 로는 로도 로의 로서 로써 로부터"),
)
PARTICLES = {particle: endings for endings, particles in _ENDINGS_AND_PARTICLES for particle in particles.split()}
LONGEST_PARTICLE = max(map(len, PARTICLES))

PRIVATE_USE = 0xF0000

# Words are counted in two steps, see `_count_words`: this many distinct eojeols are held at a time.
EOJEOLS_HELD = 1_000_000

ENCODE_BATCH = 1000


def _normalizer(lowercase: bool) -> normalizers.Normalizer:
    return normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=lowercase
    )


def _wordpiece_tokenizer(vocabulary: dict[str, int], lowercase: bool) -> PreTrainedTokenizerFast:
    """The fast tokenizer around a complete vocabulary (token -> id) that holds the five special tokens."""
    tokenizer = Tokenizer(
        models.WordPiece(
            vocabulary,
            unk_token="[UNK]",
            continuing_subword_prefix=CONTINUING_PREFIX,
            max_input_chars_per_word=LONGEST_WORD,
        )
    )
    tokenizer.normalizer = _normalizer(lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUING_PREFIX)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        # A tokenizer that is not tied to a model's class emits token_type_ids only if they are named here.
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def train_tokenizer(
    sentences: Iterable[str],
    vocab_size: int = 32000,
    *,
    lowercase: bool = False,
    min_frequency: int = 2,
    total: int | None = None,
    show_progress: bool = True,
) -> PreTrainedTokenizerFast:
    """Train a WordPiece tokenizer. The same sentences always give the same vocabulary, ids included.

    The sentences are read once and not kept: memory grows with the number of distinct words. Every character of the
    sentences gets tokens, as a word's beginning and as its continuation, so that only characters which were never
    seen become [UNK] (for the exception in a very large alphabet see `RARE_CHARACTERS`).

    Korean nouns and their particles are kept in different tokens, see `PARTICLES`.

    Args:
        sentences: the text, in pieces of any length.
        vocab_size: tokens to find, special tokens included. Text with too few distinct words yields fewer, see
            `len(tokenizer)`.
        lowercase: fold case.
        min_frequency: two tokens are merged into one if they stand side by side at least this often.
        total: the number of sentences, if known, for the progress bar.
        show_progress: show a bar while reading, and on a terminal the trainer's own bars.

    Returns:
        The tokenizer, with [PAD] [UNK] [CLS] [SEP] [MASK] at ids 0 to 4.

    Raises:
        UserError: a size without a place for any character, or sentences without any text.
    """
    if vocab_size <= len(SPECIAL_TOKENS):
        raise UserError(
            f"vocab_size {vocab_size}: the {len(SPECIAL_TOKENS)} special tokens alone need as many; 32000 is usual"
        )
    if min_frequency < 1:
        raise UserError(f"min_frequency {min_frequency}: must be 1 or more; 2 is usual")

    def split_into_words(text: str) -> list[str]:
        return [word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))]

    normalizer, pre_tokenizer = _normalizer(lowercase), pre_tokenizers.BertPreTokenizer()
    if show_progress:
        sentences = progress_bar(sentences, desc="reading the corpus", total=total, unit=" sentences", unit_scale=True)
    word_counts = _count_words(sentences, split_into_words)
    if not word_counts:
        raise UserError("cannot train a tokenizer: the corpus holds no text")

    def stands_alone(character: str) -> bool:
        return len(split_into_words("a" + character)) > 1

    characters = _alphabet(word_counts, vocab_size - len(SPECIAL_TOKENS), stands_alone)
    if not characters:
        raise UserError(
            f"vocab_size {vocab_size}: too small for a single character of the text: it takes up to 2, and half "
            f"of what the {len(SPECIAL_TOKENS)} special tokens leave is for characters; 32000 is usual"
        )
    # While merges are learned, a character that continues a word is another one than the same character at a word's
    # beginning: one of the private-use planes, which no text holds after normalization. (WordPieceTrainer would write
    # "##" instead. But it numbers those in the order of a hash map that is seeded anew each time and breaks ties by
    # number, so it finds another vocabulary at every call; and no word can be handed to it from its middle on.)
    continuing = {character: chr(PRIVATE_USE + index) for index, character in enumerate(characters)}
    alphabet = [*characters, *(continuing[each] for each in characters if not stands_alone(each))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=show_progress and draws_over(),  # the trainer's own bars leave blank lines in a log
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(_repeat_pieces(word_counts, continuing), trainer)

    written = {private: character for character, private in continuing.items()}
    vocabulary = {
        (CONTINUING_PREFIX if token[0] in written else "") + "".join(written.get(each, each) for each in token): index
        for token, index in learner.get_vocab().items()
    }
    return _wordpiece_tokenizer(vocabulary, lowercase)


def _count_words(sentences: Iterable[str], split_into_words: Callable[[str], list[str]]) -> Counter[str]:
    """How often each word occurs.

    `str.split` is ten times faster than the tokenizer's own splitting and agrees with it at blanks. So eojeols are
    counted as they come, and only distinct ones are split further, whenever enough of them have piled up.
    """
    words: Counter[str] = Counter()
    eojeols: Counter[str] = Counter()

    def split_eojeols() -> None:
        for eojeol, count in eojeols.items():
            for word in split_into_words(eojeol):
                words[word] += count
        eojeols.clear()

    for sentence in sentences:
        eojeols.update(sentence.split())
        if len(eojeols) > EOJEOLS_HELD:
            split_eojeols()
    split_eojeols()
    return words


def _alphabet(word_counts: Counter[str], room: int, stands_alone: Callable[[str], bool]) -> list[str]:
    """The characters that get tokens, in code point order; `room` is the number of tokens there may be at all."""
    occurrences: Counter[str] = Counter()
    for word, count in word_counts.items():
        for character in word:
            occurrences[character] += count
    may_be_left_out = RARE_CHARACTERS * occurrences.total()
    tokens_needed = sum(1 if stands_alone(character) else 2 for character in occurrences)
    left_out = 0
    kept = set(occurrences)
    for character in sorted(occurrences, key=lambda character: (occurrences[character], character)):
        left_out += occurrences[character]
        if tokens_needed <= room // 2 or (tokens_needed <= room * 3 // 4 and left_out > may_be_left_out):
            break
        kept.remove(character)
        tokens_needed -= 1 if stands_alone(character) else 2
    return sorted(kept)


def _repeat_pieces(word_counts: Counter[str], continuing: dict[str, str]) -> Iterator[str]:
    """Lines in which every word, without its particle, and every particle occur as often as they were counted.

    The trainer takes text, not counts. `continuing` maps the known characters to their form inside a word.
    """
    pieces: Counter[str] = Counter()
    for word, count in word_counts.items():
        # The trainer would skip an unknown character and learn from neighbours that are none.
        if len(word) <= LONGEST_WORD and continuing.keys() >= set(word):
            stem, particle = _split_particle(word)
            pieces[stem[0] + "".join(continuing[character] for character in stem[1:])] += count
            if particle:
                pieces["".join(continuing[character] for character in particle)] += count
    for piece, count in pieces.items():
        for done in range(0, count, ENCODE_BATCH):
            yield " ".join([piece] * min(ENCODE_BATCH, count - done))


def _split_particle(word: str) -> tuple[str, str]:
    """Cut the longest particle off a word that has one and is at least two characters long without it."""
    for length in range(min(LONGEST_PARTICLE, len(word) - 2), 0, -1):
        stem, particle = word[:-length], word[-length:]
        if particle in PARTICLES and final_consonant(stem[-1]) in PARTICLES[particle]:
            return stem, particle
    return word, ""


def final_consonant(character: str) -> str | None:
    """How a syllable ends as far as particles care: "vowel", "ㄹ", "consonant"; "foreign" for another script."""
    if "가" <= character <= "힣":
        # The code points of 28 syllables in a row differ in their final consonant alone: the first has none.
        number = (ord(character) - ord("가")) % 28
        return {0: "vowel", 8: "ㄹ"}.get(number, "consonant")
    return "foreign" if character.isalnum() else None


def tokenizer_from_vocab(vocab_file: str | PathLike, *, lowercase: bool = False) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a `vocab.txt`: UTF-8, one token a line, the line's number (from 0) is the token's id.

    Args:
        vocab_file: the file. The special tokens may stand on any line.
        lowercase: whether the vocabulary was made from lowercased text.

    Returns:
        The tokenizer; apart from its vocabulary it is what `train_tokenizer` returns.

    Raises:
        UserError: no such file, not UTF-8, an empty line, a token twice, or a special token that is not there.
    """
    path = Path(vocab_file)
    text = _read_utf8(path)
    # Not str.splitlines: it also splits at characters that can be tokens, such as U+2028.
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").rstrip("\r\n").split("\n")]
    vocabulary: dict[str, int] = {}
    for index, token in enumerate(lines):
        if not token:
            raise UserError(
                f"{path}, line {index + 1}: empty line; every line must hold a token, because its number is the id"
            )
        if token in vocabulary:
            raise UserError(
                f"{path}, line {index + 1}: '{token}' is already on line {vocabulary[token] + 1}; remove one of them"
            )
        vocabulary[token] = index
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise UserError(
            f"{path}: no {' '.join(missing)} in its {len(lines)} lines; a vocabulary needs {' '.join(SPECIAL_TOKENS)}"
        )
    return _wordpiece_tokenizer(vocabulary, lowercase)


def _read_utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 at byte offset {error.start} (0x{error.object[error.start]:02x}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def load_tokenizer(name_or_path: str | PathLike) -> PreTrainedTokenizerFast:
    """Load a tokenizer that has what this package needs: offsets (a fast tokenizer) and the five special tokens.

    Args:
        name_or_path: a folder, or a name on the Hub.

    Returns:
        Any fast tokenizer that `AutoTokenizer` knows; it need not be WordPiece.

    Raises:
        UserError: it cannot be loaded, is not fast, has no vocabulary, or lacks a special token.
    """
    name = str(name_or_path)
    require_source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    # Loading fails with errors of many kinds (OSError, ValueError, KeyError, bare Exception from Rust, ...), all of
    # which mean that the name or the files are wrong.
    except Exception as error:
        raise UserError(f"cannot load tokenizer '{name}': {_why_not_loaded(Path(name), error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer '{name}' is not a fast one: it has no offsets; convert it to a tokenizer.json")
    missing = [role for role in ("pad", "unk", "cls", "sep", "mask") if getattr(tokenizer, f"{role}_token_id") is None]
    if missing:
        raise UserError(
            f"tokenizer '{name}' has no {', '.join(missing)} token; an encoder needs pad, unk, cls, sep and mask"
        )
    # transformers builds an empty tokenizer for a folder with a config.json it knows and no vocabulary beside it.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"tokenizer '{name}' has no vocabulary, only special tokens; is its tokenizer.json missing?")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer into a folder; OSError where that cannot be done.

    Where a model is in it already, texts are cut at no more than its length if `truncation` is asked for.
    """
    try:
        config = folder / "config.json"
        longest = json.loads(config.read_text("utf-8")).get("max_position_embeddings") if config.is_file() else None
        if longest is not None:
            tokenizer = copy.copy(tokenizer)
            tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the `tokenizers` library has no other class for a full disk
        raise OSError(str(error)) from error


def _why_not_loaded(path: Path, error: Exception) -> str:
    if path.is_file():
        return "this is a file; give the folder that holds it"
    if path.is_dir() and not (path / "tokenizer.json").exists():
        if (path / "vocab.txt").exists():
            return f"no tokenizer.json in it; make one: mixlm tokenizer from-vocab {path / 'vocab.txt'} --out DIR"
        return "no tokenizer.json in it"
    reason = one_line(error) or type(error).__name__
    return reason if path.is_dir() else f"no such folder, and not to be had from the Hub: {reason}"


def word_start_table(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Which token ids begin a word: index it with ids to find whole words without asking the tokenizer again.

    In WordPiece a token continues a word if it has the prefix "##". In vocabularies that mark the blank instead
    ("▁" of Metaspace, "Ġ" of byte-level BPE) a token continues a word if it lacks the mark. Special and added tokens
    are words of their own.

    Args:
        tokenizer: any fast tokenizer of these kinds.

    Returns:
        Array of bool, shape (len(tokenizer),).

    Raises:
        UserError: the vocabulary marks neither words nor continuations.
    """
    vocabulary = tokenizer.get_vocab()
    model = tokenizer.backend_tokenizer.model
    prefix = getattr(model, "continuing_subword_prefix", None)
    if prefix:
        starts = {token: not token.startswith(prefix) for token in vocabulary}
    else:
        marked = {mark: sum(token.startswith(mark) for token in vocabulary) for mark in ("▁", "Ġ")}
        mark = max(marked, key=marked.__getitem__)
        if not marked[mark]:
            raise UserError(
                f"a {type(model).__name__} vocabulary without '##', '▁' or 'Ġ' does not tell where words begin; "
                "use another tokenizer"
            )
        starts = {token: token.startswith(mark) for token in vocabulary}
    table = np.zeros(max(len(tokenizer), max(vocabulary.values()) + 1), dtype=bool)
    for token, index in vocabulary.items():
        table[index] = starts[token]
    table[list(tokenizer.added_tokens_decoder)] = True  # the special tokens are among them
    return table


@dataclass(frozen=True)
class TokenizerReport:
    """How a tokenizer cuts text. Ratios of nothing are NaN.

    Attributes:
        sentences: sentences read.
        eojeols: words between blanks.
        characters: characters that are not blanks.
        tokens: tokens, without [CLS] and [SEP].
        unknown_tokens: how many of them are [UNK].
        answers: distinct (question, answer) pairs of the reading data, without the misplaced ones.
        misplaced_answers: pairs whose text is neither at their offset nor to be found from there.
        answers_on_token_borders: answers that begin where a token begins and end where a token ends.
    """

    sentences: int
    eojeols: int
    characters: int
    tokens: int
    unknown_tokens: int
    answers: int = 0
    misplaced_answers: int = 0
    answers_on_token_borders: int = 0

    @property
    def unk_rate(self) -> float:
        """Share of tokens that are [UNK]."""
        return _ratio(self.unknown_tokens, self.tokens)

    @property
    def tokens_per_eojeol(self) -> float:
        """Tokens for one word between blanks."""
        return _ratio(self.tokens, self.eojeols)

    @property
    def tokens_per_character(self) -> float:
        """Tokens for one character that is not a blank."""
        return _ratio(self.tokens, self.characters)

    @property
    def em_ceiling(self) -> float:
        """Share of answers that a reader which picks token spans can hit exactly."""
        return _ratio(self.answers_on_token_borders, self.answers)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def tokenizer_report(
    tokenizer: PreTrainedTokenizerFast,
    sentences: Iterable[str],
    squad_files: Iterable[str | PathLike] | None = None,
) -> TokenizerReport:
    """Measure how a tokenizer cuts sentences, and how many answers of reading data its tokens can cut out exactly.

    Args:
        tokenizer: any fast tokenizer.
        sentences: the text to count; read once, not kept.
        squad_files: SQuAD-style files, each as `read_squad` takes it. Contexts are tokenized whole, whatever the
            longest input of a model.

    Returns:
        The counts.

    Raises:
        UserError: as `read_squad`.
    """
    backend = text_backend(tokenizer.backend_tokenizer)
    sentence_count = eojeols = characters = tokens = unknown_tokens = 0
    with progress_bar(desc="reading the corpus", unit=" sentences", unit_scale=True) as progress:
        for batch in in_chunks(sentences, ENCODE_BATCH):
            sentence_count += len(batch)
            for sentence in batch:
                words = sentence.split()
                eojeols += len(words)
                characters += sum(map(len, words))
            for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
                tokens += len(encoding)
                unknown_tokens += encoding.ids.count(tokenizer.unk_token_id)
            progress.update(len(batch))

    pairs: set[tuple[str, str, Answer]] = set()  # id, context, answer
    misplaced: set[SkippedAnswer] = set()
    for file in squad_files or ():
        data = read_squad(file)  # one by one, because here a file may be given twice
        misplaced.update(data.skipped)
        pairs.update((example.id, example.context, answer) for example in data.examples for answer in example.answers)
    on_borders = answers_on_token_borders(tokenizer, ((context, answer) for _, context, answer in pairs))
    return TokenizerReport(
        sentences=sentence_count,
        eojeols=eojeols,
        characters=characters,
        tokens=tokens,
        unknown_tokens=unknown_tokens,
        answers=len(pairs),
        misplaced_answers=len(misplaced),
        answers_on_token_borders=sum((context, answer) in on_borders for _, context, answer in pairs),
    )


def answers_on_token_borders(
    tokenizer: PreTrainedTokenizerFast, answers: Iterable[tuple[str, Answer]]
) -> set[tuple[str, Answer]]:
    """Which answers begin where a token begins and end where a token ends, so that a span of tokens can hit them.

    Blanks around a token do not count, as they do not in an answer that is read: some tokenizers have them in it.
    Hangul is composed before it is cut, as in `mixlm.data.reading`.

    Args:
        tokenizer: any fast tokenizer.
        answers: contexts, each with an answer in it. They are tokenized whole, whatever the longest input of a model.

    Returns:
        Those of them, each once.
    """
    answers_of: dict[str, set[Answer]] = defaultdict(set)
    for context, answer in answers:
        answers_of[context].add(answer)
    backend = text_backend(tokenizer.backend_tokenizer)
    on_borders = set()
    with progress_bar(desc="reading the contexts", unit=" contexts") as progress:
        for batch in in_chunks(answers_of.items(), ENCODE_BATCH):
            composed, borders = zip(*(compose_hangul(context) for context, _ in batch), strict=True)
            encodings = backend.encode_batch(composed, add_special_tokens=False)
            for (context, golds), of_context, encoding in zip(batch, borders, encodings, strict=True):
                offsets = of_context[np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)].tolist()
                tokens = [(start, end, context[start:end]) for start, end in offsets]
                starts = {end - len(token.lstrip()) for _, end, token in tokens}
                ends = {start + len(token.rstrip()) for start, _, token in tokens}
                on_borders.update((context, gold) for gold in golds if gold.start in starts and gold.end in ends)
            progress.update(len(batch))
    return on_borders
