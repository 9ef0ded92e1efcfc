import gzip
import json
import lzma
import os
import subprocess
import sys
import unicodedata

import pytest

from mixlm.data import corpus
from mixlm.data.corpus import Document, corpus_files, read_dataset_documents, read_documents, split_sentences
from mixlm.errors import UserError

TEXT = "첫 문장.\n둘째 문장.\n\n\n다른 문서.\n"
DOCUMENTS = [["첫 문장.", "둘째 문장."], ["다른 문서."]]


def sentences_of(documents):
    return [document.sentences for document in documents]


@pytest.mark.parametrize(
    ("name", "opener"), [("a.dat", open), ("a.dat.xz", lzma.open), ("a.dat.gz", gzip.open)], ids=["dat", "xz", "gz"]
)
@pytest.mark.parametrize(
    "text",
    [TEXT, TEXT.replace("\n", "\r\n"), "\ufeff" + TEXT, "\n\n" + TEXT.strip(), TEXT.replace("첫", "  첫")],
    ids=["plain", "crlf", "bom", "no final newline", "blanks"],
)
def test_every_form_of_file_gives_the_same_documents(tmp_path, name, opener, text):
    with opener(tmp_path / name, "wb") as file:
        file.write(text.encode())
    assert sentences_of(read_documents(tmp_path)) == DOCUMENTS
    assert sentences_of(read_documents(tmp_path / name)) == DOCUMENTS


def test_documents_know_their_file_and_line(tmp_path):
    file = tmp_path / "a.dat"
    file.write_text(TEXT)
    assert list(read_documents(file)) == [Document(DOCUMENTS[0], str(file), 1), Document(DOCUMENTS[1], str(file), 5)]


def test_folders_are_searched_in_order_and_hidden_files_are_left_out(tmp_path):
    for name in ("b/2.dat", "a.dat", "b/1.dat.gz", ".hidden/3.dat", "b/._1.dat", "notes.txt"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(gzip.compress(b"x") if name.endswith("gz") else b"x")
    assert [str(file.relative_to(tmp_path)) for file in corpus_files(tmp_path)] == ["a.dat", "b/1.dat.gz", "b/2.dat"]


def test_a_file_ends_its_last_document(tmp_path):
    (tmp_path / "a.dat").write_text("one")
    (tmp_path / "b.dat").write_text("two")
    assert sentences_of(read_documents(tmp_path)) == [["one"], ["two"]]


def assert_user_error(path, *parts):
    with pytest.raises(UserError) as caught:
        list(read_documents(path))
    message = str(caught.value)
    assert str(path) in message and all(part in message for part in parts), message


def test_what_is_wrong_with_a_path_is_said(tmp_path):
    assert_user_error(tmp_path / "absent", "no such file")
    assert_user_error(tmp_path, "empty folder")
    (tmp_path / "readme.md").write_text("x")
    assert_user_error(tmp_path, "1 other files", "readme.md", ".dat.xz")
    assert_user_error(tmp_path / "readme.md", "not a corpus file")


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", "\ufeff\n".encode()], ids=["empty", "blank", "bom"])
def test_a_file_without_a_sentence_is_refused(tmp_path, content):
    (tmp_path / "a.dat").write_bytes(content)
    assert_user_error(tmp_path / "a.dat", "no sentence")


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    good = "좋은 줄\n".encode()
    (tmp_path / "a.dat").write_bytes(good + b"ab" + "한글".encode("cp949"))
    assert_user_error(tmp_path / "a.dat", "line 2", f"0xc7 at offset {len(good) + 2}", "UTF-8")


def test_a_byte_order_mark_is_counted_among_the_bytes_before_the_wrong_one(tmp_path):
    (tmp_path / "a.dat").write_bytes("\ufeffab".encode() + "한글".encode("cp949"))
    assert_user_error(tmp_path / "a.dat", "line 1", "0xc7 at offset 5 of")
    (tmp_path / "a.dat").write_bytes("\ufeff좋은 줄\n".encode() + "한글".encode("cp949"))
    assert_user_error(tmp_path / "a.dat", "line 2", f"0xc7 at offset {3 + 10 + 1} of")


@pytest.mark.parametrize(("suffix", "compress"), [("xz", lzma.compress), ("gz", gzip.compress)])
def test_truncated_and_damaged_compressed_files_are_named(tmp_path, suffix, compress):
    packed = compress("".join(f"sentence {number}\n\n" for number in range(5000)).encode())
    file = tmp_path / f"a.dat.{suffix}"
    file.write_bytes(packed[: len(packed) // 2])
    assert_user_error(file, "after line", "truncated or damaged")
    file.write_bytes(packed[:1000] + bytes(200) + packed[1200:])
    assert_user_error(file, "truncated or damaged")
    file.write_bytes(b"this was never compressed")
    assert_user_error(file, "after line 0", "truncated or damaged")


def test_a_corpus_without_blank_lines_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_SENTENCES_PER_DOCUMENT", 10)
    (tmp_path / "a.dat").write_text("\n" + "line\n" * 11)
    assert_user_error(tmp_path / "a.dat", "line 12", "starts at line 2", "blank line")


def test_sentences_are_split_at_line_breaks_or_else_after_punctuation():
    assert split_sentences("One. Two!\n Three? \n\n") == ["One. Two!", "Three?"]
    assert split_sentences('갔다. "왔다!" 버전 3.5는 다르다? 끝') == ["갔다.", '"왔다!"', "버전 3.5는 다르다?", "끝"]
    assert split_sentences(" \n ") == []


@pytest.fixture
def dataset_cache(tmp_path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


ROWS = [{"text": "One. Two.", "title": "a"}, {"text": None, "title": "b"}, {"text": "Three\nFour", "title": "c"}]


def write_json(folder):
    (folder / "rows.json").write_text("\n".join(map(json.dumps, ROWS)))
    return folder / "rows.json"


def write_csv(folder):
    (folder / "rows.csv").write_text('text,title\nOne. Two.,a\n,b\n"Three\nFour",c\n')
    return folder / "rows.csv"


def write_parquet(folder):
    from datasets import Dataset

    Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def write_text(folder):
    (folder / "rows.txt").write_text("One. Two.\n\nThree\nFour\n")
    return folder / "rows.txt"


def write_folder(folder):
    (folder / "inner").mkdir()
    write_json(folder / "inner")
    return folder / "inner"


def write_text_folder(folder):
    (folder / "inner").mkdir()
    write_text(folder / "inner")
    return folder / "inner"


def write_text_folder_with_notes(folder):
    inner = write_text_folder(folder)
    for name in ("README.md", "LICENSE"):
        (inner / name).write_text("of the texts\n")
    return inner


def save_dataset(folder):
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def save_dataset_dict(folder):
    from datasets import Dataset, DatasetDict

    splits = {"test": Dataset.from_list([{"text": "no"}]), "train": Dataset.from_list(ROWS)}
    DatasetDict(splits).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.usefixtures("dataset_cache")
@pytest.mark.parametrize(
    "write",
    [
        write_json,
        write_csv,
        write_parquet,
        write_text,
        write_folder,
        write_text_folder,
        write_text_folder_with_notes,
        save_dataset,
        save_dataset_dict,
    ],
)
def test_each_row_of_a_dataset_is_a_document(tmp_path, write):
    documents = list(read_dataset_documents(write(tmp_path), "text"))
    assert sentences_of(documents) == [["One.", "Two."], ["Three", "Four"]]
    assert documents[0].line == 1


@pytest.mark.usefixtures("dataset_cache")
def test_a_folder_with_a_card_is_the_data_set_that_it_describes(tmp_path):
    """As a clone of a repository on the Hub."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}.\n")
    fields = "".join(f"- config_name: {name}\n  data_files: {name}.txt\n" for name in "ab")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{fields}---\n")
    assert sentences_of(read_dataset_documents(tmp_path, "text", config_name="b")) == [["b."]]


@pytest.mark.usefixtures("dataset_cache")
def test_what_is_wrong_with_a_dataset_is_said(tmp_path):
    def message_for(name, column="text"):
        with pytest.raises(UserError) as caught:
            list(read_dataset_documents(name, column))
        return str(caught.value)

    rows = write_json(tmp_path)
    assert 'no column "body"; choose one of text, title' in message_for(rows, "body")
    assert "cannot be loaded" in message_for("nobody/no-such-dataset")
    assert "cannot be loaded" in message_for(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text('{"text": ')
    assert "cannot be loaded" in message_for(tmp_path / "broken.json")
    (tmp_path / "rows.xyz").write_text("x")
    assert ".parquet" in message_for(tmp_path / "rows.xyz")
    (tmp_path / "numbers.csv").write_text("text\n1\n2\n")
    assert "choose a column of text" in message_for(tmp_path / "numbers.csv")

    from datasets import Dataset, DatasetDict

    DatasetDict({"a": Dataset.from_list(ROWS), "b": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    assert "splits a, b" in message_for(tmp_path / "splits")


def test_decomposed_hangul_is_composed(tmp_path):
    decomposed = unicodedata.normalize("NFD", "한강은 서울을 지난다.")
    assert decomposed != "한강은 서울을 지난다."
    file = tmp_path / "text.dat"
    file.write_text(f"{decomposed}\n\n둘째 문서이다.\n", "utf-8")
    assert next(read_documents(file)).sentences == ["한강은 서울을 지난다."]
    assert split_sentences(decomposed) == ["한강은 서울을 지난다."]


def test_loading_a_dataset_leaves_no_bar_in_a_log(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    file = str(tmp_path / "text.jsonl")
    program = f"from mixlm.data.corpus import load_splits; print(len(load_splits({file!r})['train']))"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("2\n", "")
