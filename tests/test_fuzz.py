"""Whatever is in a file, reading it gives a result or a `UserError` of one line: no traceback, and no end in sight.

Each parser is given random bytes, its own files with bytes changed, and its own JSON with values of other kinds.
`make test` tries some of each, the slow test ten thousand in all.
"""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from answering import save_reader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mixlm
from mixlm.configuration import read_config
from mixlm.data.batching import Position
from mixlm.data.corpus import read_documents
from mixlm.data.hashing import content_hashes, file_stamps
from mixlm.data.passages import Passage, read_passages
from mixlm.data.retrieval import read_hard_negatives
from mixlm.data.squad import read_squad
from mixlm.data.store import _open_whole, open_corpus
from mixlm.encoder import Encoding, MixLMEncoder
from mixlm.errors import UserError, one_line
from mixlm.evaluation.reading_report import load_judged
from mixlm.evaluation.retrieval_files import read_qrels, read_queries, read_run, read_squad_judgements
from mixlm.hub import files_to_push
from mixlm.reader import MixLMReader
from mixlm.retrieval.analysers import BigramAnalyser
from mixlm.retrieval.index import build_index, is_tuned, open_index
from mixlm.retrieval.vectors import StoredVectors, encode_passages
from mixlm.tokenization import load_tokenizer, tokenizer_from_vocab
from mixlm.training import checkpoint
from mixlm.training.arguments import PretrainingArguments, parse_arguments
from mixlm.training.batch_size import RememberedSizes
from mixlm.training.card import write_card
from mixlm.training.reading import ReadingArguments
from mixlm.training.retrieval import RetrievalArguments

INPUTS = 10_000
SECONDS = 20  # for a single input, on a busy machine

TEXT = "한글은 1443년에 만들어졌다."
PASSAGES = [Passage("a", "글", TEXT), Passage("b", "", "섬이다.")]
QUESTION = {"id": "1", "question": "언제?", "answers": [{"text": "1443년", "answer_start": 4}]}
SQUAD = {"data": [{"title": "글", "paragraphs": [{"context": TEXT, "qas": [QUESTION]}]}]}
ROW = {"title": "글", "context": TEXT, **QUESTION, "is_impossible": False}
JUDGED = {
    "id": "1", "question": "언제?", "references": ["1443년"], "prediction": "1443년", "windows": 1,
    "expressible": True, "exact_match": 1.0, "f1": 1.0, "error": "correct",
}  # fmt: skip
RUN = {"corpus_path": "c", "tokenizer": "t", "model_name": "m", "num_steps": 3, "learning_rate": 1e-3, "bf16": True}
FINE_TUNING = {"model_name_or_path": "m", "train_file": ["t.json"], "output_dir": "o", "max_minutes": None}


FILE = {"name": "t.json", "bytes": 7, "blake2b": "ab"}
RECORD = {
    "commands": [{"command": "python run_mrc.py", "first_step": 0}],
    "arguments": {"processes": 1, "max_seq_length": 24},
    "base_model": {"name": "m", "hub_model_id": None},
    "languages": ["ko"],
    "data": [
        {"argument": "train_file", "name": "t.json", "files": [FILE]},
        {"argument": "dataset_name", "name": "me/data", "fingerprints": {"train": "f00"}},
    ],
    "device": "CPU",
    "versions": {"torch": "2.13.0"},
}


def lines(*records) -> bytes:
    return b"\n".join(as_json(record) for record in records)


def as_json(value) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


class Parser(NamedTuple):
    """Something that reads a file.

    Attributes:
        file: its name, in a folder that `make` has filled.
        valid: a content that can be read; None is what `make` has written.
        read: reads it.
        make: fills the folder with what belongs to the file.
        share: of the inputs; less than 1 for what is slow.
        errors: that it may raise instead of a UserError.
        refuses: whether it does; if not, what is damaged is made anew.
    """

    file: str
    valid: bytes | None
    read: Callable[[Path], object]
    make: Callable[[Path], object] = lambda folder: None
    share: float = 1.0
    errors: tuple[type[Exception], ...] = ()
    refuses: bool = True


def make_model(folder: Path) -> None:
    save_reader(folder, [TEXT, "섬이다."])
    Encoding(max_query_length=8, max_passage_length=32).save(folder)


def make_weights(folder: Path) -> None:
    (folder / "model.safetensors").touch()


def make_index(folder: Path) -> None:
    build_index(PASSAGES, folder / "index", BigramAnalyser())


def make_vectors(folder: Path) -> None:
    make_model(folder / "model")
    encode_passages(PASSAGES, str(folder / "model"), folder / "vectors")
    (shard,) = (folder / "vectors").glob("shard-*")
    (folder / "shard").symlink_to(shard)


def make_checkpoint(folder: Path) -> None:
    model = mixlm.MixLMForMaskedLM(
        mixlm.MixLMConfig.from_preset("mixlm-tiny", vocab_size=10, max_position_embeddings=16)
    )
    state = checkpoint.TrainingState(1, Position(0, 0))
    parameters = dict(model.named_parameters())
    checkpoint.save_checkpoint(folder / "step-1", checkpoint.skeleton_of(model), parameters, {}, state, RUN)


def make_store(folder: Path) -> None:
    make_model(folder / "model")
    (folder / "text.dat").write_text(f"{TEXT}\n{TEXT}\n\n섬이다.\n")
    open_corpus(
        folder / "text.dat", load_tokenizer(folder / "model"), max_sentence_length=9, cache_dir=folder / "cache"
    )
    (store,) = (folder / "cache").glob("corpus-*/")
    (folder / "store").symlink_to(store)


def read_everything(folder: Path) -> None:
    MixLMReader.from_pretrained(folder, "cpu").answer("언제?", TEXT)
    MixLMEncoder.from_pretrained(folder, "cpu").encode_passages(PASSAGES)


def write_card_of(file: Path) -> None:
    """Always a new one, of what is in the folder."""
    (file.parent / "README.md").unlink(missing_ok=True)
    write_card(file.parent, "me/m", None)


def all_of(read: Callable[[Path], object]) -> Callable[[Path], object]:
    """Reads to the end what is read in a stream."""
    return lambda file: list(read(file))


def arguments_of(arguments_class: type) -> Callable[[Path], object]:
    return lambda file: parse_arguments(arguments_class, [str(file)])


DOCUMENTS = f"{TEXT}\n섬이다.\n\n바다이다.\n".encode()
BEIR_QRELS = b"query-id\tcorpus-id\tscore\n1\ta\t1\n1\tb\t0\n"
CONFIG = as_json(mixlm.MixLMConfig.from_preset("mixlm-tiny").to_dict())
OLDER_CONFIG = as_json(
    {"hidden_size": 64, "num_hidden_layers": 4, "n_experts": 2, "num_heads": 2, "kernel_size": 5, "ff_dim": 64,
     "layer_group": 2, "max_position_embedding": 64, "act_fn": "gelu"}
)  # fmt: skip

PARSERS = {
    "corpus": Parser("c.dat", DOCUMENTS, all_of(read_documents)),
    "corpus-gz": Parser("c.dat.gz", gzip.compress(DOCUMENTS, mtime=0), all_of(read_documents)),
    "corpus-xz": Parser("c.dat.xz", lzma.compress(DOCUMENTS), all_of(read_documents)),
    "squad": Parser("s.json", as_json(SQUAD), read_squad),
    "squad-gz": Parser("s.json.gz", gzip.compress(as_json(SQUAD), mtime=0), read_squad),
    "squad-lines": Parser("s.jsonl", lines(ROW, {**ROW, "id": "2"}), read_squad),
    "passages-lines": Parser("p.jsonl", lines(*(each._asdict() for each in PASSAGES)), all_of(read_passages)),
    "passages-tsv": Parser("p.tsv", f'id\ttext\ttitle\na\t"{TEXT}"\t글\n'.encode(), all_of(read_passages)),
    "passages-squad": Parser("s.json", as_json(SQUAD), all_of(read_passages)),
    "passages-corpus": Parser("c.dat", DOCUMENTS, all_of(lambda file: read_passages(file, window_characters=8))),
    "beir": Parser("corpus.jsonl", lines({"_id": "a", "text": TEXT}), lambda file: list(read_passages(file.parent))),
    "queries": Parser("q.jsonl", lines({"id": "1", "text": "언제?"}, {"_id": 2, "text": "왜?"}), read_queries),
    "queries-squad": Parser("q.json", as_json(SQUAD), read_queries),
    "qrels-beir": Parser("q.tsv", BEIR_QRELS, read_qrels),
    "qrels-trec": Parser("q.txt", b"1 0 a 1\n1 0 b -1\n", read_qrels),
    "qrels-squad": Parser("q.json", as_json(SQUAD), read_squad_judgements),
    "run": Parser("h.trec", b"1 Q0 a 1 3.5 mixlm\n1 Q0 b 2 1e-3 mixlm\n", read_run),
    "negatives": Parser("n.jsonl", lines({"id": "1", "negatives": [{"text": TEXT}]}), read_hard_negatives),
    "judged": Parser("questions.jsonl", lines(JUDGED), load_judged),
    "config": Parser("c.json", CONFIG, read_config, errors=(ValueError,)),
    "older-config": Parser("c.json", OLDER_CONFIG, read_config, errors=(ValueError,)),
    "card-record": Parser("run.json", as_json(RECORD), write_card_of),
    "card-results": Parser("eval_results.json", as_json({"eval/f1": 61.25, "eval/total": 16}), write_card_of),
    "card-config": Parser("config.json", CONFIG, write_card_of),
    "card-weights": Parser("model.safetensors", None, write_card_of, make_model),
    "batch-sizes": Parser("s.json", as_json({"a": 8}), RememberedSizes, refuses=False),
    "published": Parser(
        "config.json", as_json({"auto_map": {}}), lambda file: files_to_push(file.parent), make_weights
    ),
    "arguments": Parser("a.json", as_json(RUN), arguments_of(PretrainingArguments)),
    "arguments-reading": Parser("a.json", as_json(FINE_TUNING), arguments_of(ReadingArguments)),
    "arguments-retrieval": Parser("a.json", as_json(FINE_TUNING), arguments_of(RetrievalArguments)),
    "vocabulary": Parser("v.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n한\n##글\n".encode(), tokenizer_from_vocab),
    "index": Parser("index/manifest.json", None, lambda file: open_index(file.parent), make_index),
    "tuned-index": Parser("index/manifest.json", None, lambda file: is_tuned(file.parent), make_index, refuses=False),
    "vectors": Parser("vectors/vectors.json", None, lambda file: StoredVectors(file.parent), make_vectors),
    "shard": Parser("shard/shard.json", None, lambda file: StoredVectors(file.parents[1] / "vectors"), make_vectors),
    "checkpoint": Parser("step-1/state.json", None, lambda file: checkpoint.verify(file.parent), make_checkpoint),
    "store": Parser("store/manifest.json", None, lambda file: _open_whole(file.parent), make_store, refuses=False),
    "file-hashes": Parser(
        "cache/file_hashes.json",
        None,
        lambda file: content_hashes(file_stamps([file.parents[1] / "text.dat"]), file.parent),
        make_store,
        refuses=False,
    ),
    "encoder-settings": Parser("encoder.json", None, lambda file: read_everything(file.parent), make_model, 0.3),
    "reader-settings": Parser("reader.json", None, lambda file: read_everything(file.parent), make_model, 0.3),
    "model-config": Parser("config.json", None, lambda file: read_everything(file.parent), make_model, 0.3),
    "tokenizer": Parser("tokenizer.json", None, lambda file: load_tokenizer(file.parent), make_model, 0.3),
    "tokenizer-config": Parser(
        "tokenizer_config.json", None, lambda file: load_tokenizer(file.parent), make_model, 0.3
    ),
}

NUMBERS = st.sampled_from([0, 1, -1, 2, 7, 0.5, -0.0, 1e300, float("nan"), float("inf"), 2**31, 2**63, 10**18, 10**30])
STRINGS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", " ", "a", "1", "../a", "\ud800", "\0", "true", "가" * 50, "cpu", "mixlm"]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), NUMBERS, STRINGS),
    lambda values: st.one_of(st.lists(values, max_size=3), st.dictionaries(STRINGS, values, max_size=3)),
    max_leaves=6,
)
DEEP = b"[" * 100_000


@st.composite
def changed_bytes(draw, valid: bytes) -> bytes:
    """A content with some of its bytes gone, doubled or replaced."""
    content = valid
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, len(content)))
        last = min(len(content), first + draw(st.sampled_from([0, 1, 1, 2, 8, 1000])))
        put = draw(
            st.one_of(
                st.binary(max_size=4),
                st.sampled_from(
                    [b"", b"\n", b"\t", b" ", b'"', b"\xff", b"\xef\xbb\xbf", b"\0", b"9" * 5000, b"\r", DEEP]
                ),
                st.just(content[first:last] * 2),
            )
        )
        content = content[:first] + put + content[last:]
    return content


@st.composite
def changed_json(draw, valid: bytes) -> bytes:
    """JSON, or lines of it, with a value replaced, a key gone, or a key more."""
    documents = [json.loads(line) for line in valid.splitlines()] if valid.count(b"\n{") else [json.loads(valid)]
    number = draw(st.integers(0, len(documents) - 1))
    for _ in range(draw(st.integers(1, 2))):
        documents[number] = draw(changed_value(documents[number]))
    return b"\n".join(as_json(document) for document in documents)


@st.composite
def changed_value(draw, value):
    children = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not children or draw(st.integers(0, 5)) == 0:
        return draw(VALUES)
    key = draw(st.sampled_from(children))
    copy = value.copy()
    match draw(st.sampled_from(["deeper", "deeper", "deeper", "gone", "more"])):
        case "deeper":
            copy[key] = draw(changed_value(value[key]))
        case "gone":
            del copy[key]
        case "more" if isinstance(copy, dict):
            copy[draw(STRINGS)] = draw(VALUES)
        case "more":
            copy.append(draw(VALUES))
    return copy


def contents(file: str, valid: bytes) -> st.SearchStrategy[bytes]:
    """What a file may hold: anything, or nearly what it should."""
    name = Path(file)
    kinds = [st.binary(max_size=64), changed_bytes(valid), changed_bytes(valid)]
    if name.suffix in (".json", ".jsonl"):
        kinds += [changed_json(valid), changed_json(valid), changed_json(valid), VALUES.map(as_json)]
    if name.suffix == ".gz":
        text = gzip.decompress(valid)
        kinds.append(changed_bytes(text).map(lambda content: gzip.compress(content, mtime=0)))
        kinds.append(changed_json(text).map(gzip.compress) if ".json" in file else st.just(valid))
    if name.suffix == ".xz":
        kinds.append(changed_bytes(lzma.decompress(valid)).map(lzma.compress))
    return st.one_of(*kinds)


def attack(parser: Parser, folder: Path, inputs: int) -> None:
    """Give a parser so many inputs."""
    parser.make(folder)
    file = folder / parser.file
    valid = file.read_bytes() if parser.valid is None else parser.valid
    file.write_bytes(valid)
    parser.read(file)  # what is changed below could be read
    refused = set()

    @settings(
        max_examples=inputs, derandomize=True, database=None, deadline=1000 * SECONDS,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(contents(parser.file, valid))
    def try_out(content: bytes) -> None:
        file.write_bytes(content)
        try:
            parser.read(file)
        except (UserError, *parser.errors) as error:
            assert type(error) in (UserError, *parser.errors), "a kind of one, such as UnicodeDecodeError"
            refused.add(one_line(error))

    try_out()
    assert bool(refused) == parser.refuses and "" not in refused


@pytest.mark.parametrize("name", PARSERS)
def test_a_result_or_one_line(tmp_path, name):
    parser = PARSERS[name]
    attack(parser, tmp_path, round(30 * parser.share))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", PARSERS)
def test_ten_thousand(tmp_path, name):
    parser = PARSERS[name]
    shares = sum(each.share for each in PARSERS.values())
    attack(parser, tmp_path, 1 + round(INPUTS * parser.share / shares))
