"""Folders are whole or absent."""

import json
import os
import subprocess
import sys

import pytest

from mixlm.errors import UserError
from mixlm.files import new_folder, partial_name, require_free, whole_folder, write_json, write_whole


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


def test_what_another_process_is_writing_is_left_to_it(tmp_path):
    """Both fill one folder otherwise, and what becomes of it is a mixture."""
    folder = tmp_path / "folder"
    with whole_folder(folder) as first:
        (first / "file").write_text("first")
        with pytest.raises(UserError, match="another process is writing it"), whole_folder(folder):
            pass
        assert (first / "file").read_text() == "first"
    assert (folder / "file").read_text() == "first"
    with whole_folder(folder) as second:
        (second / "file").write_text("second")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and (folder / "file").read_text() == "second"


@pytest.mark.parametrize("write", [whole_folder, new_folder])
def test_what_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path, write):
    (tmp_path / "disk" / "target").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to("../disk/target")
    with write(tmp_path / "here" / "link") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "here" / "link").is_symlink()
    assert contents(tmp_path) == {"disk/target/file": "new"}
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["target"]


def test_where_a_disk_is_mounted_nothing_is_begun(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == os.path.realpath(tmp_path / "disk"))
    for name in ("disk", "link"):
        for write in (whole_folder, new_folder):
            with pytest.raises(UserError, match=f"{name}: a disk is mounted there"), write(tmp_path / name):
                pytest.fail("the folder was handed out")
        with pytest.raises(UserError, match=f"{name}: a disk is mounted there"):
            require_free(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


@pytest.mark.parametrize("step", ["replace", "rmtree"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_folder_whole(tmp_path, step):
    """Each process is killed one step later: where it renames, or where it deletes a file of the old folder."""
    target, names = tmp_path / "target", [f"file{number}" for number in range(3)]
    program = (
        "import os, shutil, sys; from pathlib import Path; from mixlm.files import whole_folder\n"
        "def killed_at(left, real):\n"
        "    def step(*given, **options):\n"
        "        nonlocal left\n"
        "        left -= 1\n"
        "        return os._exit(9) if left < 0 else real(*given, **options)\n"
        "    return step\n"
        "with whole_folder(Path(sys.argv[1])) as folder:\n"
        "    for name in sys.argv[4:]: (folder / name).write_text('new')\n"
        "    if sys.argv[2] == 'replace': os.replace = killed_at(int(sys.argv[3]), os.replace)\n"
        "    else: os.unlink = killed_at(int(sys.argv[3]), os.unlink)\n"
    )
    for steps in range(10):
        with whole_folder(target) as folder:
            for name in names:
                (folder / name).write_text("old")
        ended = subprocess.run([sys.executable, "-c", program, str(target), step, str(steps), *names]).returncode
        with pytest.raises(KeyError), whole_folder(target):  # puts back what the kill has left
            raise KeyError
        assert [path.name for path in tmp_path.iterdir()] == ["target"]
        assert list(contents(target).values()) in (3 * ["old"], 3 * ["new"]) and set(contents(target)) == set(names)
        if ended == 0:
            break
    assert ended == 0 and steps == 3


def test_where_the_new_folder_cannot_take_the_place_the_old_one_stays(tmp_path, monkeypatch):
    with whole_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("old")
    replace = os.replace

    def refuses(source, target):
        if source == partial_name(tmp_path / "target"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuses)
    with pytest.raises(OSError, match="No space left"), whole_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("new")
    assert contents(tmp_path) == {"target/file": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_file_has_its_old_or_its_new_content(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mixlm.files.flush", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    write_whole(tmp_path / "file", "new")
    assert contents(tmp_path) == {"file": "new"}


def test_json_is_for_people_and_holds_any_name_of_a_file(tmp_path):
    value = {"한글": ["\udcc7", 1]}
    write_json(tmp_path / "file", value)
    assert (tmp_path / "file").read_text("utf-8") == '{\n  "한글": [\n    "\\udcc7",\n    1\n  ]\n}\n'
    assert json.loads((tmp_path / "file").read_text("utf-8")) == value


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
