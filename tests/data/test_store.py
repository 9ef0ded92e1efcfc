import errno
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import time
import tracemalloc
from itertools import islice

import numpy as np
import pytest
from filelock import FileLock
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mixlm.data import columns, hashing, store, tokenizing
from mixlm.data.batching import LengthBucketedBatches, training_batches
from mixlm.data.corpus import Document, read_documents
from mixlm.data.examples import InverseClozeExamples, SentenceOrderExamples
from mixlm.data.masking import TokenMasker
from mixlm.data.store import open_corpus
from mixlm.errors import UserError
from mixlm.files import earlier_name, partial_name, write_json

SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
TEXT = "aa b c\nb ab\n\na\n\nc c c\nabc\nb\n"  # three documents


def make_tokenizer(pieces="abc"):
    vocabulary = [*SPECIAL_TOKENS.values(), "[", "]", "mask", *pieces, *(f"##{piece}" for piece in pieces)]
    backend = Tokenizer(models.WordPiece({token: index for index, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def corpus_file(tmp_path):
    file = tmp_path / "corpus.dat"
    file.write_text(TEXT)
    return file


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def builds(monkeypatch):
    """Counts how often a corpus is tokenized."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return tokenizing.tokenize_documents(*arguments)

    monkeypatch.setattr(store, "tokenize_documents", counted)
    return calls


def open_small(corpus_path, tokenizer, cache, max_sentence_length=10):
    return open_corpus(corpus_path, tokenizer, max_sentence_length=max_sentence_length, cache_dir=cache)


def text_of(corpus, tokenizer):
    sizes = np.diff(corpus.document_offsets.read(0, corpus.num_documents + 1)).tolist()
    return [
        [tokenizer.convert_ids_to_tokens(sentence.tolist()) for sentence in corpus.sentences(document, 0, size)]
        for document, size in enumerate(sizes)
    ]


def test_a_store_holds_the_corpus(corpus_file, tokenizer, cache):
    corpus = open_small(corpus_file, tokenizer, cache)
    assert (corpus.num_documents, corpus.num_sentences, corpus.num_tokens, corpus.cut_sentences) == (3, 6, 15, 0)
    assert text_of(corpus, tokenizer) == [
        [["a", "##a", "b", "c"], ["b", "a", "##b"]],
        [["a"]],
        [["c", "c", "c"], ["a", "##b", "##c"], ["b"]],
    ]
    assert [sentence.tolist() for sentence in corpus.sentences(2, 1, 3)] == [
        tokenizer.convert_tokens_to_ids(["a", "##b", "##c"]),
        tokenizer.convert_tokens_to_ids(["b"]),
    ]
    assert corpus.sentences(0, 0, 1)[0].dtype == np.uint8  # the smallest that holds the vocabulary
    assert corpus.token_counts.dtype == np.int64 and len(corpus.token_counts) == len(tokenizer)
    assert corpus.token_counts[tokenizer.convert_tokens_to_ids(["a", "c", "##a"])].tolist() == [4, 4, 1]


def test_small_chunks_and_record_batches_change_nothing(corpus_file, tokenizer, cache, monkeypatch, tmp_path):
    expected = open_small(corpus_file, tokenizer, cache)
    monkeypatch.setattr(columns, "ROWS_PER_BATCH", 4)
    monkeypatch.setattr(tokenizing, "SENTENCES_PER_CHUNK", 2)
    found = open_small(corpus_file, tokenizer, tmp_path / "other")
    assert text_of(found, tokenizer) == text_of(expected, tokenizer)
    assert (found.token_counts == expected.token_counts).all()


def test_long_sentences_are_cut_between_words_and_nothing_is_lost(tmp_path, tokenizer, cache):
    file = tmp_path / "long.dat"
    file.write_text("a bc abc a b\n\na\n\nabcabcabc")
    corpus = open_small(file, tokenizer, cache, max_sentence_length=4)
    assert corpus.cut_sentences == 2
    assert text_of(corpus, tokenizer) == [
        [["a", "b", "##c"], ["a", "##b", "##c", "a"], ["b"]],
        [["a"]],
        [["a", "##b", "##c", "##a"], ["##b", "##c", "##a", "##b"], ["##c"]],  # a single word, too long
    ]
    assert corpus.max_sentence_length == 4


def test_the_names_of_special_tokens_in_a_text_are_text(tmp_path, tokenizer, cache):
    file = tmp_path / "special.dat"
    file.write_text("a [MASK] b\n\na")
    corpus = open_small(file, tokenizer, cache)
    assert text_of(corpus, tokenizer)[0][0][:2] == ["a", "["]
    assert corpus.token_counts[tokenizer.mask_token_id] == 0


def test_what_an_earlier_call_left_in_the_tokenizer_does_not_matter(corpus_file, tokenizer, cache, builds):
    tokenizer("a b c", truncation=True, max_length=2, padding="max_length")
    first = open_small(corpus_file, tokenizer, cache)
    second = open_small(corpus_file, make_tokenizer(), cache)
    assert first.num_tokens == second.num_tokens == 15
    assert len(builds) == 1


def test_sentences_without_tokens_are_dropped(tmp_path, tokenizer, cache):
    file = tmp_path / "odd.dat"
    file.write_text("a\n\u200b\u0001\n\n\u0001\n\nb")
    corpus = open_small(file, tokenizer, cache)
    assert text_of(corpus, tokenizer) == [[["a"]], [["b"]]]


def test_a_corpus_of_one_document_is_refused(tmp_path, tokenizer, cache):
    file = tmp_path / "one.dat"
    file.write_text("a\nb\n")
    with pytest.raises(UserError, match=r"one.dat: found 1 document.* blank line"):
        open_small(file, tokenizer, cache)
    assert not list(cache.glob("corpus-*.partial")) and not [path for path in cache.iterdir() if path.is_dir()]


def test_sentences_must_be_allowed_a_token(corpus_file, tokenizer, cache):
    with pytest.raises(UserError, match="at least 1"):
        open_small(corpus_file, tokenizer, cache, max_sentence_length=0)


def test_a_store_is_built_once_and_again_after_a_change(corpus_file, tokenizer, cache, builds):
    first = open_small(corpus_file, tokenizer, cache)
    assert open_small(corpus_file, tokenizer, cache).folder == first.folder
    assert len(builds) == 1
    moment = corpus_file.stat().st_mtime_ns
    corpus_file.write_text(TEXT.replace("aa", "bb"))  # the same size, within the resolution of the clock
    os.utime(corpus_file, ns=(moment, moment))
    second = open_small(corpus_file, tokenizer, cache)
    assert second.folder != first.folder
    assert text_of(second, tokenizer)[0][0][:2] == ["b", "##b"]
    open_small(corpus_file, make_tokenizer("abcd"), cache)
    open_small(corpus_file, tokenizer, cache, max_sentence_length=9)
    assert len(builds) == 4
    corpus_file.write_text(TEXT)
    assert open_small(corpus_file, tokenizer, cache).folder == first.folder
    assert len(builds) == 4


def test_an_unchanged_file_is_not_read_again(corpus_file, tokenizer, cache, monkeypatch):
    long_ago = time.time() - 3600
    os.utime(corpus_file, (long_ago, long_ago))
    first = open_small(corpus_file, tokenizer, cache)
    monkeypatch.setattr(hashing, "hash_file", None)  # would fail if it was called
    assert open_small(corpus_file, tokenizer, cache).folder == first.folder
    entries = json.loads((first.folder / "manifest.json").read_text())["source"]["files"]
    assert entries == {str(corpus_file.resolve()): [len(TEXT), corpus_file.stat().st_mtime_ns]}


def test_an_interrupted_build_is_done_again(corpus_file, tokenizer, cache, monkeypatch):
    def interrupted(folder, *arguments):
        (folder / "tokens.arrow").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "tokenize_documents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_small(corpus_file, tokenizer, cache)
    assert not [path for path in cache.iterdir() if path.is_dir()]

    # Killed, a build leaves its folder behind: one of this store, and one of a corpus that has changed since.
    folder = open_small(corpus_file, tokenizer, cache).folder
    folder.rename(partial_name(folder))
    (partial_name(folder) / "manifest.json").unlink()
    partial_name(cache / "corpus-0123").mkdir()
    earlier_name(cache / "corpus-4567").mkdir()
    assert open_small(corpus_file, tokenizer, cache).num_tokens == 15
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]


def test_files_that_change_while_they_are_read_are_noticed(corpus_file, tokenizer, cache, monkeypatch):
    def changing(path):
        yield from read_documents(path)
        corpus_file.write_text(TEXT + "b\n")

    monkeypatch.setattr(store, "read_documents", changing)
    with pytest.raises(UserError, match="changed while"):
        open_small(corpus_file, tokenizer, cache)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def truncate(file):
    os.truncate(file, file.stat().st_size - 2)  # without the last of a JSON file, its line end, nothing is lost


def overwrite(file):
    file.write_bytes(bytes(file.stat().st_size))


def append(file):
    file.write_bytes(file.read_bytes() + b"x")


@pytest.mark.parametrize("damage", [truncate, append, overwrite, os.remove])
@pytest.mark.parametrize(
    "name", ["tokens.arrow", "sentences.arrow", "documents.arrow", "token_counts.npy", "manifest.json"]
)
def test_a_damaged_store_is_noticed_and_built_again(corpus_file, tokenizer, cache, builds, caplog, damage, name):
    corpus = open_small(corpus_file, tokenizer, cache)
    damage(corpus.folder / name)
    with caplog.at_level(logging.WARNING):
        assert open_small(corpus_file, tokenizer, cache).num_tokens == 15
    assert "damaged" in caplog.text
    assert len(builds) == 2
    open_small(corpus_file, tokenizer, cache)
    assert len(builds) == 2


@pytest.mark.parametrize("name", ["num_documents", "num_sentences", "num_tokens"])
def test_a_manifest_that_counts_otherwise_than_the_columns_is_noticed(corpus_file, tokenizer, cache, builds, name):
    corpus = open_small(corpus_file, tokenizer, cache)
    manifest = json.loads((corpus.folder / "manifest.json").read_text("utf-8"))
    write_json(corpus.folder / "manifest.json", {**manifest, name: manifest[name] - 1})
    assert getattr(open_small(corpus_file, tokenizer, cache), name) == manifest[name] and len(builds) == 2


def open_and_count(corpus_file, cache, start, results):
    built = []

    def counted(*arguments):
        built.append(True)
        time.sleep(0.3)  # long enough for the other process to come upon the lock
        return tokenizing.tokenize_documents(*arguments)

    store.tokenize_documents = counted
    tokenizer = make_tokenizer()
    start.wait()
    corpus = open_small(corpus_file, tokenizer, cache)
    results.put((len(built), corpus.num_tokens, len(corpus.blocks(20))))


def test_processes_that_start_together_build_once(corpus_file, cache):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=open_and_count, args=(corpus_file, cache, start, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(built for built, _, _ in found) == [0, 0, 1]
    assert {(tokens, blocks) for _, tokens, blocks in found} == {(15, 3)}


def test_an_open_store_can_be_sent_to_another_process(corpus_file, tokenizer, cache):
    corpus = open_small(corpus_file, tokenizer, cache)
    copy = pickle.loads(pickle.dumps(corpus))
    assert text_of(copy, tokenizer) == text_of(corpus, tokenizer)
    assert len(pickle.dumps(corpus)) < 1000


def test_the_default_cache_is_that_of_the_environment(corpus_file, tokenizer, cache, monkeypatch):
    monkeypatch.setenv("MIXLM_CACHE", str(cache))
    assert open_corpus(corpus_file, tokenizer, max_sentence_length=10).folder.parent == cache
    monkeypatch.delenv("MIXLM_CACHE")
    monkeypatch.setenv("HOME", str(cache))
    assert open_corpus(corpus_file, tokenizer, max_sentence_length=10).folder.parent == cache / ".cache" / "mixlm"


def test_a_cache_that_cannot_be_written_is_named(corpus_file, tokenizer, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file/cache.*MIXLM_CACHE"):
        open_small(corpus_file, tokenizer, tmp_path / "file" / "cache")


def test_blocks_are_kept_beside_the_store(corpus_file, tokenizer, cache, monkeypatch):
    corpus = open_small(corpus_file, tokenizer, cache)
    blocks = corpus.blocks(10)
    assert blocks.tolist() == [[0, 0, 2, 7], [1, 0, 1, 1], [2, 0, 3, 7]]
    assert not blocks.flags.writeable
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_blocks", None)  # would fail if it was called
        assert (open_small(corpus_file, tokenizer, cache).blocks(10) == blocks).all()
    truncate(corpus.folder / "blocks_10.npy")
    assert (corpus.blocks(10) == blocks).all()
    with pytest.raises(UserError, match="max_sentence_length=9"):
        corpus.blocks(9)


def test_held_out_documents(tmp_path, tokenizer, cache):
    file = tmp_path / "many.dat"
    file.write_text("a\n\n" * 3000)
    corpus = open_small(file, tokenizer, cache)
    for fraction in (0.01, 0.1, 0.5):
        held_out = corpus.held_out(fraction)
        assert held_out.shape == (3000,) and held_out.dtype == bool
        assert held_out.mean() == pytest.approx(fraction, abs=4 * np.sqrt(fraction / 3000))
    assert not (corpus.held_out(0.1) & ~corpus.held_out(0.5)).any()
    file.write_text("a\n\n" * 2000)  # what is held out does not depend on what follows
    assert (open_small(file, tokenizer, cache).held_out(0.1) == corpus.held_out(0.1)[:2000]).all()
    file.write_text("a\n\nb")
    for fraction in (1e-9, 0.5, 1 - 1e-9):
        assert sorted(open_small(file, tokenizer, cache).held_out(fraction)) == [False, True]
    for fraction in (0, 1, -1, float("nan")):
        with pytest.raises(UserError, match="between 0 and 1"):
            corpus.held_out(fraction)


def test_a_dataset_is_a_corpus_too(tmp_path, tokenizer, cache, builds, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")

    def write(text):
        (tmp_path / "rows.json").write_text("\n".join(json.dumps({"body": line}) for line in ("aa b\nc", text)))

    def open_dataset():
        name = str(tmp_path / "rows.json")
        return open_corpus(None, tokenizer, max_sentence_length=9, cache_dir=cache, dataset=name, text_column="body")

    write("b.")
    open_dataset()
    corpus = open_dataset()
    assert len(builds) == 1
    assert text_of(corpus, tokenizer)[0] == [["a", "##a", "b"], ["c"]]
    write("c.")
    assert text_of(open_dataset(), tokenizer)[1][0][0] == "c"
    assert len(builds) == 2


def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(columns, "ROWS_PER_BATCH", 1 << 12)
    backend = tokenizer.backend_tokenizer.to_str()

    def peak(num_documents):
        folder = tmp_path / str(num_documents)
        folder.mkdir()
        documents = (Document(["a b c ab abc"] * 20, "", 1) for _ in range(num_documents))
        tracemalloc.start()
        tokenizing.tokenize_documents(folder, documents, backend, len(tokenizer), 100)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(200)  # what is imported and remembered on a first call
    assert peak(1500) < 1.1 * peak(300)


@pytest.mark.parametrize("examples_class", [SentenceOrderExamples, InverseClozeExamples])
@pytest.mark.parametrize("max_seq_length", [32, 128])
def test_real_documents_become_batches(real_data, tmp_path, examples_class, max_seq_length):
    tokenizer = AutoTokenizer.from_pretrained(real_data / "vocab_ko")
    texts = [document.sentences for document in islice(read_documents(real_data / "corpus_ko"), 60)]
    (tmp_path / "some.dat").write_text("\n\n".join(map("\n".join, texts)))
    longest = max_seq_length - SentenceOrderExamples.special_tokens
    corpus = open_small(tmp_path / "some.dat", tokenizer, tmp_path, max_sentence_length=longest)
    assert corpus.num_documents == 60
    assert corpus.num_sentences >= sum(map(len, texts))
    assert corpus.tokens.read(0, 1).dtype == np.uint16

    vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    word_start = np.array([not token.startswith("##") for token in vocabulary])
    masker = TokenMasker(len(tokenizer), tokenizer.mask_token_id, tokenizer.all_special_ids, word_start)
    ids = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    examples = examples_class(corpus, corpus.blocks(longest), masker, *ids, max_seq_length, seed=1)
    order = LengthBucketedBatches(examples.lengths, seed=1, rows_per_step=8)
    stream = training_batches(examples, order, None, tokenizer.pad_token_id)
    masked = tokens = 0
    for _ in range(order.steps_per_epoch):
        (batch,) = next(stream)[1]
        for prefix in ("", "context_") if examples_class is InverseClozeExamples else ("",):
            labels, attention_mask = batch[f"{prefix}labels"], batch[f"{prefix}attention_mask"]
            assert labels.shape[1] <= max_seq_length
            assert (batch[f"{prefix}input_ids"][attention_mask == 0] == tokenizer.pad_token_id).all()
            masked += int((labels != -100).sum())
            tokens += int(attention_mask.sum())
    assert 0.1 < masked / tokens < 0.17


def test_a_file_with_two_names_is_read_twice(corpus_file, tokenizer, cache):
    """As a person gives a text more weight; without the link it is another corpus."""
    once = open_small(corpus_file.parent, tokenizer, cache)
    (corpus_file.parent / "link.dat").symlink_to(corpus_file)
    twice = open_small(corpus_file.parent, tokenizer, cache)
    assert (once.num_documents, twice.num_documents) == (3, 6) and once.folder != twice.folder


def test_a_file_name_that_is_not_utf_8_does_no_harm(corpus_file, tokenizer, cache):
    named = corpus_file.rename(corpus_file.with_name(os.fsdecode("한글.dat".encode("cp949"))))
    os.utime(named, (1e9, 1e9))  # so long ago that its hash is remembered
    assert open_small(named, tokenizer, cache).num_documents == 3
    (manifest,) = cache.glob("*/manifest.json")
    assert list(json.loads(manifest.read_text("utf-8"))["source"]["files"]) == [str(named)]
    assert list(json.loads((cache / "file_hashes.json").read_text("utf-8"))) == [str(named)]


def test_a_corpus_file_that_cannot_be_read_is_no_error_of_the_cache(corpus_file, tokenizer, cache, monkeypatch):
    def refuse(file, progress):
        raise PermissionError(errno.EACCES, "Permission denied", file)

    monkeypatch.setattr(hashing, "hash_file", refuse)
    with pytest.raises(UserError, match=f"^{corpus_file}: Permission denied: the corpus file cannot be read$"):
        open_small(corpus_file, tokenizer, cache)


def test_a_disk_that_is_full_when_blocks_are_made_is_one_line(corpus_file, tokenizer, cache, monkeypatch):
    def fill(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_blocks", fill)
    with pytest.raises(UserError, match="cannot be kept there .*No space left on device.*set MIXLM_CACHE"):
        open_small(corpus_file, tokenizer, cache).blocks(10)


def test_a_leftover_that_disappears_meanwhile_is_no_error(corpus_file, tokenizer, cache, monkeypatch):
    """Another process finishes its build, or removes what it found, between this one's looking and removing."""
    (cache / ".corpus-0123.partial").mkdir(parents=True)
    rmtree = shutil.rmtree

    def after_another(path, **options):
        rmtree(path)
        rmtree(path, **options)

    monkeypatch.setattr(store.shutil, "rmtree", after_another)
    store._remove_leftovers(cache)
    assert not list(cache.glob("*.partial"))


def test_what_another_process_is_building_is_no_leftover(cache):
    being_built, left = cache / ".corpus-0123.partial", cache / ".corpus-4567.partial"
    for folder in (being_built, left):
        folder.mkdir(parents=True)
    with FileLock(cache / "corpus-0123.lock"):
        store._remove_leftovers(cache)
    assert being_built.is_dir() and not left.exists()


def test_the_longest_sentence_is_found_whatever_the_pieces(corpus_file, tokenizer, cache, monkeypatch):
    for sentences in (1, 2, 5, 6, 7):
        monkeypatch.setattr(store, "SENTENCES_PER_PASS", sentences)
        assert open_small(corpus_file, tokenizer, cache).longest_sentence_length == 4
