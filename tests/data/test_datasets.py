"""Text and questions out of the `datasets` library: objects, streams and files give the same examples."""

import json

import datasets
import pytest
from datasets import Dataset, IterableDataset, IterableDatasetDict, load_dataset
from test_store import make_tokenizer, text_of

from mixlm.data import store, tokenizing
from mixlm.data.corpus import load_splits, read_dataset_documents, read_documents
from mixlm.data.squad import read_rows, read_squad
from mixlm.data.store import open_corpus
from mixlm.errors import UserError

TEXTS = ["aa b c\nb ab", "a", "", "c c c\nabc\nb"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def files(tmp_path):
    """The same documents as a corpus, and as rows."""
    (tmp_path / "corpus.dat").write_text("\n\n".join(TEXTS))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text, "more": 1}) for text in TEXTS))
    return tmp_path


def rows_of(texts):
    for text in texts:
        yield {"text": text, "more": 1}


def sources(folder):
    """What can be given instead of the corpus, by how it was made."""
    name = str(folder / "rows.jsonl")
    table = Dataset.from_list(list(rows_of(TEXTS)))
    return {
        "name": (name, {}),
        "name, streaming": (name, {"streaming": True}),
        "loaded": (load_dataset("json", data_files=name, split="train"), {}),
        "loaded, with its splits": (load_dataset("json", data_files=name), {}),
        "streaming": (load_dataset("json", data_files=name, split="train", streaming=True), {}),
        "streaming, with its splits": (load_dataset("json", data_files=name, streaming=True), {}),
        "in memory": (table, {}),
        "generated": (IterableDataset.from_generator(rows_of, gen_kwargs={"texts": TEXTS}), {}),
        "mapped": (table.to_iterable_dataset().map(as_it_is), {}),  # whose columns are not known before it is read
    }


def as_it_is(row):
    return row


def test_every_source_gives_the_same_store(files):
    tokenizer = make_tokenizer()

    def open_it(corpus_path=None, **arguments):
        corpus = open_corpus(corpus_path, tokenizer, max_sentence_length=9, cache_dir=files / "cache", **arguments)
        return (
            text_of(corpus, tokenizer),
            corpus.blocks(9).tolist(),
            corpus.token_counts.tolist(),
            corpus.held_out(0.3).tolist(),
        )

    expected = open_it(files / "corpus.dat")
    assert len(expected[0]) == 3
    for made, (source, arguments) in sources(files).items():
        assert open_it(dataset=source, **arguments) == expected, made
        documents = read_dataset_documents(source)
        assert [each.sentences for each in documents] == [each.sentences for each in read_documents(files)], made


def test_a_stream_is_read_once(files, monkeypatch):
    builds = []
    monkeypatch.setattr(
        store, "tokenize_documents", lambda *given: builds.append(1) or tokenizing.tokenize_documents(*given)
    )
    name, tokenizer = str(files / "rows.jsonl"), make_tokenizer()

    def open_it(rows):
        return open_corpus(None, tokenizer, max_sentence_length=9, cache_dir=files / "cache", dataset=rows)

    def stream():
        return load_dataset("json", data_files=name, split="train", streaming=True)

    begun = stream()
    next(iter(begun))
    folders = {open_it(rows).folder for rows in (stream(), stream(), begun, begun)}
    assert len(folders) == len(builds) == 1
    assert open_it(stream().take(2)).num_documents == 2  # other rows, another store
    (files / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("a", "c")))
    assert open_it(stream()).num_documents == 2
    assert len(builds) == 3


def test_a_stream_is_not_copied_to_the_disk(files):
    open_corpus(
        None,
        make_tokenizer(),
        max_sentence_length=9,
        cache_dir=files / "cache",
        dataset=str(files / "rows.jsonl"),
        streaming=True,
    )
    copies = [file for file in (files / "datasets-cache").rglob("*") if file.suffix in (".arrow", ".parquet")]
    assert not copies


def test_what_is_wrong_with_a_stream_is_said(files):
    def message_for(rows, column="text"):
        given = {"max_sentence_length": 9, "cache_dir": files / "cache", "dataset": rows, "text_column": column}
        with pytest.raises(UserError) as caught:
            open_corpus(None, make_tokenizer(), **given, streaming=True)
        return str(caught.value)

    stream = load_dataset("json", data_files=str(files / "rows.jsonl"), split="train", streaming=True)
    assert 'no column "body"; choose one of more, text' in message_for(stream, "body")
    assert "choose a column of text" in message_for(stream, "more")
    numbers = stream.map(as_it_is)
    assert "after row 0: cannot be read on" in message_for(numbers, "body")
    assert 'object with text in "more"' in message_for(numbers, "more")
    two = IterableDatasetDict({"a": stream, "b": stream})
    assert 'IterableDatasetDict: has the splits a, b; one of them must be called "train"' in message_for(two)

    (files / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    assert "broken.jsonl, after row 0: cannot be read on" in message_for(str(files / "broken.jsonl"))
    assert "nobody/nothing: cannot be loaded" in message_for("nobody/nothing")

    def broken_off():
        yield {"text": "a"}
        raise ConnectionError("the line is dead")

    broken = IterableDataset.from_generator(broken_off)
    assert "cannot be read on (ConnectionError: the line is dead)" in message_for(broken)
    others = (text for text in TEXTS)
    unknown = stream.map(lambda row: {"text": next(others)})
    assert "cannot be told from others (TypeError: cannot pickle 'generator' object)" in message_for(unknown)
    assert not [folder for folder in (files / "cache").iterdir() if folder.is_dir()]


QUESTIONS = [
    {
        "id": str(number),
        "title": f"article {number // 2}",
        "context": f"제주도는 섬이다. {number}",
        "question": "무엇인가?",
        "answers": {"text": ["섬"], "answer_start": [5]},
    }
    for number in range(6)
]


def test_every_source_gives_the_same_questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(json.dumps(question, ensure_ascii=False) for question in QUESTIONS))
    expected = read_squad(file)
    assert len(expected.examples) == 6 and expected.examples[0].answers[0].text == "섬"
    for streaming in (False, True):
        loaded = load_dataset("json", data_files=str(file), split="train", streaming=streaming)
        assert read_rows(loaded, "questions") == expected
        assert read_rows(load_splits(loaded)["train"], "questions") == expected
    assert read_rows(Dataset.from_list(QUESTIONS), "questions") == expected
    assert read_rows(IterableDataset.from_generator(lambda: iter(QUESTIONS)), "questions") == expected
