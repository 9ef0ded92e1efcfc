import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mixlm.data.passages import Passage
from mixlm.errors import UserError
from mixlm.retrieval import index as index_module
from mixlm.retrieval.analysers import BigramAnalyser, MorphemeAnalyser
from mixlm.retrieval.index import build_index, is_tuned, open_index

PASSAGES = [Passage("a", "제주도", "섬이다."), Passage("b", "", "학교에 갔다."), Passage("c", "", "dogs run")]


@pytest.fixture
def folder(tmp_path):
    assert build_index(PASSAGES, tmp_path / "index", BigramAnalyser())["passages"]["count"] == 3
    return tmp_path / "index"


def found(folder, question):
    index = open_index(folder)
    return [index.passages[row] for row, _ in next(index.lexical.search([question], 5))]


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_is_built_is_found(folder):
    assert found(folder, "제주도는?") == [PASSAGES[0]]
    assert found(folder, "dog") == [PASSAGES[2]]


def test_the_manifest_says_what_is_there(folder):
    manifest = open_index(folder).manifest
    assert manifest["passages"]["count"] == 3
    assert manifest["lexical"] == {"analyser": "bigrams", "k1": 0.9, "b": 0.4}
    assert set(manifest["files"]) == {str(file) for file in contents(folder)} - {"manifest.json"}


def test_questions_are_taken_apart_as_the_passages_were(tmp_path):
    build_index(PASSAGES, tmp_path / "index", MorphemeAnalyser())
    assert open_index(tmp_path / "index").manifest["lexical"]["analyser"] == "morphemes"
    assert found(tmp_path / "index", "학교가") == [PASSAGES[1]]


def test_every_build_gives_the_same_bytes(folder, tmp_path):
    program = (
        "import sys; from pathlib import Path; from mixlm.data.passages import Passage\n"
        "from mixlm.retrieval.analysers import BigramAnalyser; from mixlm.retrieval.index import build_index\n"
        f"build_index({PASSAGES!r}, Path(sys.argv[1]), BigramAnalyser())"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "other")], check=True)  # has another hash seed
    assert contents(tmp_path / "other") == contents(folder)


def test_a_new_index_takes_the_place_of_the_old_one(folder):
    (folder / ".manifest.json.partial").write_text("{")  # of a `store_tuning` that was killed
    build_index(PASSAGES[:1], folder, BigramAnalyser())
    assert len(open_index(folder).passages) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["index"]


def test_tuning_keeps_what_another_process_has_stored(folder):
    one, other = open_index(folder), open_index(folder)
    one.store_tuning("hybrid", {"weight": 0.3})
    other.store_tuning("answers", {"weight": 8.0})
    one.store_tuning("hybrid", {"weight": 0.4})
    manifest = open_index(folder).manifest
    assert (manifest["hybrid"], manifest["answers"]) == ({"weight": 0.4}, {"weight": 8.0})
    assert one.weight == 0.4 and other.weight is None


@pytest.mark.parametrize("of", ["hybrid", "answers"])
def test_an_index_is_tuned_once_something_is_stored(folder, of):
    assert not is_tuned(folder) and not is_tuned(folder / "absent")
    open_index(folder).store_tuning(of, {"weight": None})
    assert is_tuned(folder)


def test_what_an_index_was_tuned_to_is_not_stored_in_another(folder):
    opened = open_index(folder)
    build_index(PASSAGES[:2], folder, BigramAnalyser())
    before = contents(folder)
    with pytest.raises(UserError, match="index: was built again meanwhile; tune again"):
        opened.store_tuning("hybrid", {"weight": 0.3})
    assert contents(folder) == before and opened.weight is None
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="the manifest cannot be written .*No such file"):
        opened.store_tuning("hybrid", {"weight": 0.3})


@pytest.mark.parametrize("error", [UserError("line 3"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_the_old_index(folder, error):
    def passages():
        yield PASSAGES[0]
        raise error

    before = contents(folder)
    with pytest.raises(type(error)):
        build_index(passages(), folder, BigramAnalyser())
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["index"]


def test_a_killed_build_leaves_the_old_index_and_the_next_one_succeeds(folder):
    program = (
        "import os, sys; from pathlib import Path; from mixlm.retrieval import index\n"
        "from mixlm.data.passages import Passage; from mixlm.retrieval.analysers import BigramAnalyser\n"
        "index._write_manifest = lambda *_: os._exit(9)\n"
        "index.build_index([Passage('z', '', 'new')], Path(sys.argv[1]), BigramAnalyser())"
    )
    before = contents(folder)
    assert subprocess.run([sys.executable, "-c", program, str(folder)]).returncode == 9
    assert contents(folder) == before and (folder.parent / ".index.partial").exists()
    build_index(PASSAGES[:1], folder, BigramAnalyser())
    assert [path.name for path in folder.parent.iterdir()] == ["index"]


def test_without_passages_nothing_is_built(tmp_path):
    with pytest.raises(UserError, match="no passage"):
        build_index([], tmp_path / "index", BigramAnalyser())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
def test_what_is_no_index_is_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="exists and is no index"):
        build_index(PASSAGES, tmp_path, BigramAnalyser())
    with pytest.raises(UserError, match="is a file"):
        build_index(PASSAGES, tmp_path / name, BigramAnalyser())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def assert_refused(folder, *parts):
    with pytest.raises(UserError) as caught:
        open_index(folder)
    message = str(caught.value)
    assert all(part in message for part in [str(folder), "build it again with mixlm index", *parts]), message


def test_every_damaged_file_is_named(folder):
    for file in [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        whole = file.read_bytes()
        file.write_bytes(content)
        assert_refused(folder, file.relative_to(folder).as_posix(), "changed")
        file.unlink()
        assert_refused(folder, file.name, "No such file")
        file.write_bytes(whole)
    assert found(folder, "섬") == []  # a single syllable in a word of several is no term
    assert found(folder, "섬이") == [PASSAGES[0]]


def test_a_damaged_manifest_is_refused(folder):
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for text, part in [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ("[" * 10**5, "damaged"),
        (json.dumps({**manifest, "format": 99}), "format 99"),
        (json.dumps({**manifest, "lexical": {"analyser": "x"}}), "damaged"),
        (json.dumps({**manifest, "files": {}}), "damaged"),
        (json.dumps({**manifest, "files": {"../other": ""}}), "damaged"),
        (json.dumps({**manifest, "passages": [5]}), "damaged"),
        (json.dumps({name: value for name, value in manifest.items() if name != "libraries"}), "damaged"),
    ]:
        file.write_text(text)
        assert_refused(folder, part)
    file.unlink()
    assert_refused(folder, "manifest.json")
    build_index(PASSAGES, folder, BigramAnalyser())  # as the message says
    assert found(folder, "dog") == [PASSAGES[2]]


def test_an_index_of_another_library_is_refused(folder, monkeypatch):
    monkeypatch.setattr(index_module, "version", lambda name: "0.1.0")
    assert_refused(folder, "was built with bm25s", "0.1.0 is installed")


@pytest.mark.parametrize(("number", "is_another"), [(0, True), (1, True), (2, False)])
def test_corrections_of_a_library_change_no_index(folder, monkeypatch, number, is_another):
    def other(name):
        numbers = version(name).split(".")
        numbers[number] = "999"
        return ".".join(numbers)

    monkeypatch.setattr(index_module, "version", other)
    if is_another:
        assert_refused(folder, "was built with bm25s", "999")
    else:
        assert len(open_index(folder).passages) == 3


def test_what_a_library_cannot_read_is_one_line(folder, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("in a\nlibrary")

    monkeypatch.setattr(index_module.LexicalIndex, "load", fails)
    assert_refused(folder, "cannot open it (in a library)")


@pytest.mark.parametrize("name", [".", "..", "/", "../here"])
def test_the_folder_somebody_stands_in_is_not_replaced(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="is the folder that this is run in, or holds it"):
        build_index(PASSAGES, Path(name), BigramAnalyser())
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert_refused(tmp_path / "absent", "No such file")
