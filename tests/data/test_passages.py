import gzip
import json
import lzma
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlm.data import passages as passages_module
from mixlm.data.passages import Passage, read_passages, windows
from mixlm.errors import UserError

PASSAGES = [Passage("a", "제목", "첫 글."), Passage("b", "", "둘째 글.")]
JSON_LINES = '{"id": "a", "title": "제목", "text": "첫 글."}\n{"id": "b", "text": "둘째 글."}\n'
OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}


def read(folder, name, text, **options):
    (folder / name).write_text(text)
    return list(read_passages(folder / name, **options))


def squad(*articles):
    """Articles are (title, contexts); their paragraphs have no questions."""
    paragraphs = [[{"context": context, "qas": []} for context in contexts] for _, contexts in articles]
    data = [{"title": title, "paragraphs": of} for (title, _), of in zip(articles, paragraphs, strict=True)]
    return json.dumps({"data": data})


@pytest.mark.parametrize("suffix", OPENERS)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", JSON_LINES),
        ("p.jsonl", "\ufeff" + JSON_LINES.replace("\n", "\r\n\r\n")),
        ("p.jsonl", JSON_LINES.replace('"id"', '"_id"')),
        ("p.tsv", "a\t첫 글.\t제목\nb\t둘째 글.\n"),
        ("p.tsv", 'id\ttext\ttitle\na\t"첫 글."\t제목\nb\t둘째 글.\t\n'),
        ("p.tsv", "_id\tText\tTitle\na\t첫 글.\t제목\nb\t둘째 글.\t\n"),
    ],
    ids=["json lines", "windows", "beir", "tsv", "dpr", "other names"],
)
def test_every_form_of_file_gives_the_same_passages(tmp_path, suffix, name, text):
    with OPENERS[suffix](tmp_path / (name + suffix), "wb") as file:
        file.write(text.encode())
    assert list(read_passages(tmp_path / (name + suffix))) == PASSAGES


def test_a_beir_folder_is_its_corpus(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(JSON_LINES)
    (tmp_path / "queries.jsonl").write_text("not read")
    assert list(read_passages(tmp_path)) == PASSAGES


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".tsv"])
def test_a_folder_of_one_kind_is_all_its_files(tmp_path, suffix):
    lines = ["a\t첫 글.\t제목", "b\t둘째 글."] if suffix == ".tsv" else JSON_LINES.splitlines()
    (tmp_path / "deeper").mkdir()
    for name, line in zip((f"deeper/1{suffix}", f"2{suffix}"), lines, strict=True):
        with OPENERS[".gz" if suffix.endswith(".gz") else ""](tmp_path / name, "wb") as file:
            file.write(line.encode())
    (tmp_path / "questions.json").write_text("not read")
    (tmp_path / "README.md").write_text("not read")
    assert sorted(read_passages(tmp_path)) == sorted(PASSAGES)


def test_a_folder_of_several_kinds_is_refused(tmp_path):
    for name in ("a.jsonl", "b.jsonl.xz", "c.dat", "d.json"):
        (tmp_path / name).write_text("not read")
    with pytest.raises(UserError, match=r"has 1 \.dat and 2 \.jsonl files; name those that are passages"):
        list(read_passages(tmp_path))


def test_several_files_are_read_in_their_order(tmp_path):
    for name, line in zip("21", JSON_LINES.splitlines(), strict=True):
        (tmp_path / f"{name}.jsonl").write_text(line)
    assert list(read_passages([tmp_path / "2.jsonl", tmp_path / "1.jsonl"])) == PASSAGES


def test_text_is_taken_as_it_is_and_numbers_are_ids(tmp_path):
    assert read(tmp_path, "p.jsonl", r'{"id": 7, "text": " \u1112\u1161 "}') == [Passage("7", "", " \u1112\u1161 ")]


def test_quotation_marks_of_a_tsv_field_are_its_own_unless_they_enclose_it(tmp_path):
    text = 'a\t"one ""two"" three"\nb\t"one" two\nc\tone "two"\nd\t"one\t"two"\n'
    texts = ['one "two" three', '"one" two', 'one "two"', '"one']
    assert [passage.text for passage in read(tmp_path, "p.tsv", text)] == texts


def test_paragraphs_of_squad_are_numbered_by_article(tmp_path):
    found = read(tmp_path, "my data.v1.json", squad(("하나", ["가", "나"]), ("둘", ["다"])))
    assert found == [
        Passage("my_data.v1-0-0", "하나", "가"),
        Passage("my_data.v1-0-1", "하나", "나"),
        Passage("my_data.v1-1-0", "둘", "다"),
    ]


def test_documents_are_cut_into_windows_of_sentences(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.dat").write_text("하나.\n둘.\n셋.\n\n\n넷.\n")
    found = list(read_passages(tmp_path, window_characters=7))
    assert found == [
        Passage("sub/a-1-0", "", "하나. 둘."),
        Passage("sub/a-1-1", "", "셋."),
        Passage("sub/a-6-0", "", "넷."),
    ]
    assert [passage.id for passage in read_passages(tmp_path / "sub" / "a.dat")] == ["a-1-0", "a-6-0"]


words = st.text(st.sampled_from("가나다ab."), min_size=1, max_size=12)


@given(st.lists(st.lists(words, min_size=1, max_size=8).map(" ".join), max_size=8), st.integers(1, 30))
def test_windows_keep_every_character_and_their_limit(sentences, limit):
    found = list(windows(sentences, limit))
    assert "".join("".join(found).split()) == "".join("".join(sentences).split())
    assert all(0 < len(window) <= limit for window in found)


def test_windows_are_as_full_as_they_can_be():
    assert list(windows(["aa", "bb", "c", "dddd"], 5)) == ["aa bb", "c", "dddd"]
    assert list(windows(["one two three", "four"], 8)) == ["one two", "three", "four"]


def test_what_is_not_utf8_in_the_name_of_a_file_is_escaped_in_ids(tmp_path):
    """As names are out of archives in CP949."""
    file = tmp_path / os.fsdecode("한.dat".encode("cp949"))
    try:
        file.write_text("첫 글.\n", "utf-8")
    except OSError:
        pytest.skip("names of files are UTF-8 here")
    (passage,) = read_passages(tmp_path)
    assert passage.id == r"\udcc7\udcd1-1-0"
    passage.id.encode()


ONE = '{"id": "a", "text": "x"}\n'


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("p.jsonl", ONE + "{x\n", ["line 2, column 2", "not JSON"]),
        ("p.jsonl", ONE + "[" * 10**5 + "\n", ["line 2", "cannot be read as JSON"]),
        ("p.jsonl", ONE + "9" * 10**4 + "\n", ["line 2", "cannot be read as JSON"]),
        ("p.json", "[" * 10**5, ["line 1", "cannot be read as JSON"]),
        ("p.jsonl", ONE + "[1]\n", ["line 2", "[1]", "as an object"]),
        ("p.jsonl", ONE + '{"text": "x"}\n', ["line 2", 'no "id"', "found there: text"]),
        ("p.jsonl", ONE + '{"id": "b"}\n', ["line 2", 'no "text"']),
        ("p.jsonl", ONE + '{"id": "b", "text": null}\n', ["line 2", '"text" is None']),
        ("p.jsonl", ONE + '{"id": true, "text": "x"}\n', ["line 2", '"id" is True']),
        ("p.jsonl", ONE + '{"id": "b", "text": " "}\n', ["line 2", "'b'", "empty"]),
        ("p.jsonl", ONE + '{"id": "", "text": "x"}\n', ["line 2", "''", "empty"]),
        ("p.jsonl", ONE + '{"id": "b c", "text": "x"}\n', ["line 2", "'b c'", "blank"]),
        ("p.jsonl", ONE + '{"id": "b", "text": "\\ud800"}\n', ["line 2", "surrogate"]),
        ("p.jsonl", ONE + "\n" + ONE, ["line 3", "'a'", "line 1)"]),
        ("p.jsonl", "\n", ["no passage"]),
        ("p.tsv", "id\ttext\ttitle\n", ["no passage"]),
        ("p.tsv", "a\tx\nb\n", ["line 2", "1 columns"]),
        ("p.tsv", "id\ttitle\ttext\na\tb\tx\n", ["line 1", "the columns are id, title, text; give id, text and"]),
        ("p.tsv", "a\tx\nb\tx\ty\tz\n", ["line 2", "4 columns"]),
        ("p.tsv", "a\t\n", ["line 1", "'a'", "empty"]),
        ("p.tsv", 'a\tx\nb\t"가\t나"\n', ["line 2", "a tab or a line break; put a blank there"]),
        ("p.tsv", 'a\t"가\n나"\t제목\n', ["line 2", "a tab or a line break"]),
        ("p.tsv", 'a\t"one ""two"" \tthree"\n', ["line 1", "a tab or a line break"]),
        ("p.json", "{}", ["no list 'data'"]),
        ("p.json", squad(), ["no passage"]),
        ("p.dat", "", ["no sentence"]),
        ("p.txt", "x", ["not a file of passages", ".jsonl"]),
    ],
)
def test_bad_input_is_named(tmp_path, name, text, parts):
    with pytest.raises(UserError) as caught:
        read(tmp_path, name, text)
    assert all(part in str(caught.value) for part in [str(tmp_path / name), *parts]), caught.value


def test_an_id_that_two_files_have_is_named_with_both(tmp_path):
    (tmp_path / "1.jsonl").write_text(ONE)
    (tmp_path / "2.tsv").write_text("b\ty\na\tz\n")
    with pytest.raises(UserError, match=r"2\.tsv, line 2: 'a' .*1\.jsonl, line 1\)"):
        list(read_passages([tmp_path / "1.jsonl", tmp_path / "2.tsv"]))


def test_ids_of_the_same_hash_are_different_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(passages_module, "hash", lambda _: 5, raising=False)
    assert read(tmp_path, "p.jsonl", JSON_LINES) == PASSAGES
    with pytest.raises(UserError, match="line 3: 'a' .*line 1"):
        read(tmp_path, "p.jsonl", JSON_LINES + ONE)


def test_a_title_is_enough(tmp_path):
    """Data sets of BEIR have such passages."""
    assert read(tmp_path, "p.jsonl", '{"id": "a", "title": "x", "text": ""}') == [Passage("a", "x", "")]


def test_wrong_paths_and_windows_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        list(read_passages(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match=r"has no \.dat, \.jsonl, \.tsv file"):
        list(read_passages(tmp_path))
    with pytest.raises(UserError, match="1 or more"):
        read(tmp_path, "p.jsonl", ONE, window_characters=0)


def test_every_paragraph_of_korquad_is_a_passage(real_data):
    found = list(read_passages(real_data / "mrc" / "KorQuAD_v1.0_dev.json"))
    assert len(found) == 964
    assert found[0].id == "KorQuAD_v1.0_dev-0-0" and found[0].title == "임종석"
