"""Vectors on the disk: what is kept, what is encoded again, and what is refused."""

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
import torch

from mixlm.data.passages import Passage
from mixlm.encoder import MixLMEncoder
from mixlm.errors import UserError
from mixlm.retrieval import vectors as module
from mixlm.retrieval.vectors import StoredVectors, encode_passages


@pytest.fixture
def encode(retriever, tmp_path, monkeypatch):
    """Encodes into a folder, two passages a shard; gives the ids of those that had to be encoded."""
    encoded = []
    whole = MixLMEncoder.encode_passages

    def counted(self, passages):
        encoded.extend(passage.id for passage in passages)
        return whole(self, passages)

    monkeypatch.setattr(MixLMEncoder, "encode_passages", counted)

    def encode(passages, folder="vectors", **options):
        encoded.clear()
        assert encode_passages(passages, retriever, tmp_path / folder, passages_per_shard=2, **options) == len(
            passages
        )
        return list(encoded)

    return encode


def read(folder):
    stored = StoredVectors(folder)
    return list(stored.passages()), np.concatenate(list(stored.shards()))


def assert_has(folder, passages, retriever):
    """The passages, in their order, with the vectors that they have when encoded at once."""
    found, vectors = read(folder)
    assert found == passages
    np.testing.assert_allclose(
        vectors, MixLMEncoder.from_pretrained(retriever, "cpu").encode_passages(passages), rtol=1e-4, atol=1e-5
    )


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_every_passage_has_its_vector(encode, passages, retriever, tmp_path):
    assert encode(passages) == [passage.id for passage in passages]
    assert_has(tmp_path / "vectors", passages, retriever)
    stored = StoredVectors(tmp_path / "vectors")
    assert (len(stored), stored.dimension, stored.dtype) == (7, 16, "float32")
    assert [len(shard) for shard in stored.shards()] == [2, 2, 2, 1]


def test_a_model_that_was_not_trained_for_retrieval_is_told(passages, retriever, tmp_path, caplog):
    """As a reader or a pretrained model, whose folder has no encoder.json."""
    encode_passages(passages, retriever, tmp_path / "vectors")
    assert caplog.messages == []
    pretrained = tmp_path / "pretrained"
    shutil.copytree(retriever, pretrained)
    (pretrained / "encoder.json").unlink()
    encode_passages(passages, str(pretrained), tmp_path / "others")
    (message,) = caplog.messages
    assert message.startswith(f"{pretrained}: is not what run_ict.py writes (it has no encoder.json)")


def test_what_is_too_long_for_a_vector_is_told(passages, retriever, tmp_path, caplog):
    """The encoder takes 32 tokens, and each of 99 words is one at least."""
    long = Passage("long", "서울", " ".join(["섬"] * 99))
    tokens = MixLMEncoder.from_pretrained(retriever, "cpu").tokenizer.passage_lengths([*passages, long])
    assert max(tokens[:-1]) <= 32 < tokens[-1]
    encode_passages([*passages, long], retriever, tmp_path / "vectors")
    (message,) = caplog.messages
    share = 100 * (tokens[-1] - 32) / sum(tokens)
    assert message.startswith("1 of the first 8 passages are longer than the 32 tokens that the encoder takes")
    assert f"of all tokens {share:.1f}% are in no vector" in message


def test_what_is_there_is_not_encoded_again(encode, passages, tmp_path):
    encode(passages)
    before = contents(tmp_path)
    assert encode(passages) == []
    assert contents(tmp_path) == before


CHANGES = {
    "added at the end": (lambda p: [*p, Passage("new", "", "산")], ["new"]),
    "added at the front": (lambda p: [Passage("new", "", "산"), *p], ["new"]),
    "many added at the front": (
        lambda p: [*(Passage(f"new{n}", "", f"산 {n}") for n in range(6)), *p],
        [f"new{n}" for n in range(6)],
    ),
    "changed": (lambda p: [*p[:2], p[2]._replace(text="산에 갔다."), *p[3:]], ["school"]),
    "another title": (lambda p: [p[0]._replace(title="섬"), *p[1:]], ["jeju"]),
    "removed": (lambda p: [p[0], *p[3:]], []),
    "moved": (lambda p: p[::-1], []),
    "other ids": (lambda p: [passage._replace(id=f"{passage.id}-2") for passage in p], []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_encoded_and_nothing_else(encode, passages, retriever, tmp_path, change):
    encode(passages)
    changed, expected = CHANGES[change][0](passages), CHANGES[change][1]
    assert encode(changed) == expected
    assert_has(tmp_path / "vectors", changed, retriever)
    assert len(list((tmp_path / "vectors").iterdir())) == 1 + -(-len(changed) // 2)  # nothing of the old ones is left


def test_a_run_that_was_killed_goes_on(encode, passages, retriever, tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from mixlm.data.passages import Passage\n"
        "from mixlm.retrieval import vectors\n"
        "writing, written = vectors.write_passages, []\n"
        "def write(*arguments):\n"
        "    written.append(1)\n"
        "    return writing(*arguments) if len(written) < 3 else os._exit(9)\n"
        "vectors.write_passages = write\n"
        f"vectors.encode_passages({passages!r}, sys.argv[1], Path(sys.argv[2]), passages_per_shard=2)"
    )
    folder = tmp_path / "vectors"
    assert subprocess.run([sys.executable, "-c", program, retriever, str(folder)]).returncode == 9
    with pytest.raises(UserError, match="not all passages are encoded yet; run mixlm encode again"):
        StoredVectors(folder)
    (folder / ".shard-0.earlier").mkdir()  # of a process that was killed while it replaced a damaged one
    assert encode(passages) == ["dogs", "seoul"]  # "again" has the text of "sea", which was written
    assert_has(folder, passages, retriever)
    assert not list(folder.glob(".*"))


def test_a_run_that_fails_leaves_the_old_vectors(encode, passages, retriever, tmp_path):
    def failing():
        yield from [Passage("new", "", "산"), Passage("newer", "", "산 산"), Passage("newest", "", "산 섬")]
        raise UserError("line 4")

    with pytest.raises(UserError, match="line 4"):
        encode_passages(failing(), retriever, tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    encode(passages)
    with pytest.raises(UserError, match="line 4"):
        encode_passages(failing(), retriever, tmp_path / "vectors", passages_per_shard=1)
    assert_has(tmp_path / "vectors", passages, retriever)
    with pytest.raises(UserError, match="there is no passage"):
        encode([])
    assert_has(tmp_path / "vectors", passages, retriever)


@pytest.mark.parametrize("name", ["vectors.npy", "passages.arrow", "hashes.npy", "shard.json"])
@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: content[:-1] + b"?", None])
def test_a_damaged_shard_is_refused_and_mended(encode, passages, retriever, tmp_path, name, damage):
    encode(passages)
    shard = next(path for path in (tmp_path / "vectors").iterdir() if path.is_dir())
    file = shard / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=f"{shard.name}: .*run mixlm encode again, and it mends the folder"):
        StoredVectors(tmp_path / "vectors")
    assert 1 <= len(encode(passages)) <= 2
    assert_has(tmp_path / "vectors", passages, retriever)


def test_vectors_of_another_encoder_are_refused(encode, passages, retriever, other_retriever, tmp_path):
    encode(passages)
    before = contents(tmp_path)
    weights = [MixLMEncoder.from_pretrained(name).fingerprint()["weights"] for name in (retriever, other_retriever)]
    with pytest.raises(UserError, match=f"weights is {weights[0]} there and {weights[1]} now; use another folder"):
        encode_passages(passages, other_retriever, tmp_path / "vectors")
    with pytest.raises(UserError, match="dtype is float32 there and float16 now"):
        encode(passages, dtype="float16")
    assert contents(tmp_path) == before


def test_several_processes_give_the_same(encode, passages, tmp_path):
    encode(passages)
    assert encode(passages, folder="others", processes=2) == []  # not here
    assert contents(tmp_path / "others") == contents(tmp_path / "vectors")


def test_float16(encode, passages, tmp_path):
    encode(passages)
    encode(passages, folder="half", dtype="float16")
    (_, single), (_, half) = read(tmp_path / "vectors"), read(tmp_path / "half")
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, single, rtol=1e-3, atol=1e-3)


def test_a_vector_that_is_no_number_is_refused(encode, passages, tmp_path, monkeypatch):
    monkeypatch.setattr(
        MixLMEncoder, "encode_passages", lambda self, passages: np.full((len(passages), 16), 1e6, "f4")
    )
    encode(passages)
    with pytest.raises(UserError, match="'jeju': its vector has what is no number in float16"):
        encode(passages, folder="half", dtype="float16")


def test_few_shards_are_in_memory(encode, passages, tmp_path, monkeypatch):
    """A passage is not read before those some shards earlier are written."""
    most = 0

    def stream():
        nonlocal most
        for number in range(20):
            written = 2 * len(list((tmp_path / "vectors").glob("shard-*")))
            most = max(most, number - written)
            yield Passage(str(number), "", f"섬 {number}")

    class Stream:
        def __iter__(self):
            return stream()

        def __len__(self):
            return 20

    encode(Stream())
    assert most <= 2 * 3


def test_what_is_no_folder_of_vectors_is_left_alone(encode, passages, retriever, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for name in ("mine", "mine/notes.txt"):
        with pytest.raises(UserError, match="exists and has no vectors"):
            encode(passages, folder=name)
        with pytest.raises(UserError, match="has no vectors .*make them with mixlm encode"):
            StoredVectors(tmp_path / name)
    assert contents(tmp_path / "mine") == {"notes.txt": b"mine"}


def test_a_damaged_manifest_is_refused(encode, passages, tmp_path):
    encode(passages)
    file = tmp_path / "vectors" / "vectors.json"
    manifest = json.loads(file.read_text())
    for text, part in [
        ("{", "is damaged; use another folder, or delete it"),
        ("{}", "is damaged"),
        (json.dumps({**manifest, "shards": 5}), "is damaged"),
        (json.dumps({name: value for name, value in manifest.items() if name != "dtype"}), "is damaged"),
        (json.dumps({**manifest, "shards": ["../other"]}), "is damaged"),
        (json.dumps({**manifest, "passages": "7"}), "is damaged"),
        ("[" * 10**5, "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({**manifest, "format": 99}), "is of format 99, this version has 2; use another folder"),
    ]:
        file.write_text(text)
        for act in (lambda: StoredVectors(tmp_path / "vectors"), lambda: encode(passages)):
            with pytest.raises(UserError, match=part):
                act()


def test_a_process_that_dies_is_one_line(passages, retriever, tmp_path, monkeypatch):
    class Broken(module._OtherProcesses):
        def submit(self, *arguments):
            raise module.BrokenExecutor

    monkeypatch.setattr(module, "_OtherProcesses", Broken)
    with pytest.raises(UserError, match="without enough memory; use a smaller --batch_size or fewer --processes"):
        encode_passages(passages, retriever, tmp_path / "vectors", processes=2)


def test_too_little_memory_is_one_line_and_what_is_written_stays(encode, passages, tmp_path, monkeypatch):
    whole = MixLMEncoder.encode_passages

    def full(self, texts):
        if texts[-1].id == "dogs":
            raise RuntimeError("CUDA out of memory. Tried to allocate\n2 GiB")
        return whole(self, texts)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="out of memory; use a smaller --batch_size"):
        patch.setattr(MixLMEncoder, "encode_passages", full)
        encode(passages)
    assert len(list((tmp_path / "vectors").glob("shard-*"))) == 2
    assert encode(passages) == ["dogs", "seoul"]


PROCESSES = """
import multiprocessing, os, sys, time
from pathlib import Path
from mixlm.data.passages import Passage
from mixlm.retrieval.vectors import encode_passages

def passages():
    yield from [Passage(str(number), "", f"섬 {number}") for number in range(8)]
    while not list(Path(sys.argv[2]).glob("shard-*")):
        yield Passage("waits", "", "바다")
    print(*[process.pid for process in multiprocessing.active_children()], flush=True)
    time.sleep(600)

if __name__ == "__main__":
    encode_passages(passages(), sys.argv[1], Path(sys.argv[2]), processes=2, passages_per_shard=2)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_one_that_has_begun_them(retriever, tmp_path, number):
    """What Ctrl-C leaves is whole shards and no process; so does a kill."""
    (tmp_path / "program.py").write_text(PROCESSES)
    vectors = tmp_path / "vectors"
    command = [sys.executable, str(tmp_path / "program.py"), retriever, str(vectors)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        children = [int(child) for child in program.stdout.readline().split()]
        assert len(children) == 2
        program.send_signal(number)
        error = program.stderr.read()
        program.wait(60)
    assert error.count("Traceback") == (number == signal.SIGINT)  # of this program, and not of its children
    until = time.monotonic() + 30
    while any(psutil.pid_exists(child) for child in children) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(child) for child in children)
    assert list(vectors.glob("shard-*"))


def test_ctrl_c_does_not_reach_processes_that_are_beginning(retriever, tmp_path):
    """A terminal sends it to all of them; one that is still importing would say so in a traceback."""
    passages = (json.dumps({"id": f"{number}", "text": f"섬 {number}"}) for number in range(2))
    (tmp_path / "passages.jsonl").write_text("\n".join(passages))
    options = ["--model", retriever, "--passages", "passages.jsonl", "--out", "vectors", "--processes", "2"]
    with subprocess.Popen(
        [sys.executable, "-c", "from mixlm.cli import main; main()", "encode", *options],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    ) as program:  # fmt: skip
        begun = []
        while not begun:
            with suppress(psutil.Error):  # of short-lived ones
                begun = [
                    each for each in psutil.Process(program.pid).children() if "spawn_main" in str(each.cmdline())
                ]
        for seconds in (0.3, 0.6):  # of the several that importing torch takes
            while begun[0].cpu_times().user < seconds:
                time.sleep(0.01)
            begun[0].send_signal(signal.SIGINT)
        program.send_signal(signal.SIGINT)
        assert (program.stderr.read(), program.wait(60)) == ("interrupted\n", 130)


def test_processes_share_the_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    given = []

    class Pool:
        def __init__(self, processes, context, initializer, arguments):
            given.append(arguments[-1])

        def shutdown(self, **options):
            pass

    monkeypatch.setattr(module, "_OtherProcesses", Pool)
    for processes in (3, 16):
        with module._encoding_processes(processes, "model", 1):
            pass
    assert given == [2, 1]
