"""Folders are whole or absent."""

import pytest

from mixlm.errors import UserError
from mixlm.files import new_folder, partial_name, require_free, whole_folder, write_whole


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_takes_the_place_of_the_older_one(tmp_path):
    target = tmp_path / "a" / "target"
    for name in ("one", "two"):
        with whole_folder(target) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / name).write_text(name)
            assert folder != target
    assert contents(tmp_path) == {"a/target/deep/two": "two"}


def test_after_an_error_everything_is_as_before(tmp_path):
    with whole_folder(tmp_path / "old") as folder:
        (folder / "file").write_text("old")
    for name in ("old", "new"):
        with pytest.raises(KeyError), whole_folder(tmp_path / name) as folder:
            (folder / "file").write_text("half")
            raise KeyError
    assert contents(tmp_path) == {"old/file": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    partial = partial_name(tmp_path / "target")
    partial.mkdir()
    (partial / "stranger").write_text("half")
    with whole_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("new")
    assert contents(tmp_path) == {"target/file": "new"}


def test_a_file_has_its_old_or_its_new_content(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mixlm.files.flush", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    write_whole(tmp_path / "file", "new")
    assert contents(tmp_path) == {"file": "new"}


def test_a_users_folder_is_never_replaced(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, reason in (("full", "not empty"), ("file", "is a file")):
        with pytest.raises(UserError, match=reason):
            require_free(tmp_path / name)
        with pytest.raises(UserError, match=reason), new_folder(tmp_path / name):
            pytest.fail("the folder was handed out")
    with pytest.raises(UserError, match="not empty"), new_folder(tmp_path / "later") as folder:
        (folder / "file").write_text("new")
        (tmp_path / "later").mkdir()
        (tmp_path / "later" / "precious").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"), new_folder(tmp_path / "file" / "below"):
        pytest.fail("the folder was handed out")
    assert contents(tmp_path) == {"full/precious": "mine", "file": "mine", "later/precious": "mine"}


def test_an_empty_folder_may_be_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("new")
    assert contents(tmp_path) == {"empty/file": "new"}
