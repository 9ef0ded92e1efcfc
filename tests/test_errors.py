"""How a program ends when something is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixlm.errors import RunStopped, UserError, exits_on_user_error, file_error


def ending_of(error: BaseException, monkeypatch, capsys, **environment: str) -> tuple[int, str]:
    """Exit code and what is said of a program in which `error` is raised."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    @exits_on_user_error
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ({}, "error: no such file\n"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "error: no such file\n"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, ""),  # the first of the machine says it
        ({"RANK": "8", "LOCAL_RANK": "0"}, "error: rank 8: no such file\n"),  # a file that one machine lacks
    ],
)
def test_a_user_error_is_one_line_for_each_machine(monkeypatch, capsys, ranks, said):
    assert ending_of(UserError("no such\n  file"), monkeypatch, capsys, **ranks) == (2, said)


def test_the_other_endings(monkeypatch, capsys):
    code, said = ending_of(torch.OutOfMemoryError("CUDA out of memory. Tried"), monkeypatch, capsys)
    assert code == 2 and said.startswith("error: out of memory: use a smaller --train_batch_size")
    lost = RuntimeError("Connection closed by peer [127.0.0.1]")
    code, said = ending_of(lost, monkeypatch, capsys, RANK="1", LOCAL_RANK="1")
    assert code == 4 and said.startswith("error: rank 1: another rank has ended") and said.count("\n") == 1
    assert ending_of(RunStopped("stopped"), monkeypatch, capsys) == (3, "stopped\n")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert ending_of(RunStopped("stopped"), monkeypatch, capsys) == (3, "stopped\n")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")  # torchrun would start it again
    assert ending_of(RunStopped("stopped"), monkeypatch, capsys) == (0, "stopped\n")
    assert ending_of(KeyboardInterrupt(), monkeypatch, capsys) == (130, "interrupted\n")


PRINTS = """
from mixlm.errors import exits_on_user_error

@exits_on_user_error
def main():
    print("제주도")

main()
"""


def ending_of_printing(**options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONIOENCODING": options.pop("encoding", "utf-8")}
    program = [sys.executable, "-c", PRINTS]
    return subprocess.run(program, env=environment, stderr=subprocess.PIPE, text=True, **options)


def test_an_output_that_nobody_reads_any_more_is_no_mistake():
    reading, writing = os.pipe()
    os.close(reading)
    ended = ending_of_printing(stdout=writing)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_output_that_is_full_is_named():
    with open("/dev/full", "wb") as full:
        ended = ending_of_printing(stdout=full)
    said = "error: [Errno 28] No space left on device: make room there, or write elsewhere\n"
    assert (ended.returncode, ended.stderr) == (2, said)


def test_letters_that_the_output_has_not_are_escaped():
    ended = ending_of_printing(stdout=subprocess.PIPE, encoding="ascii")
    assert (ended.returncode, ended.stdout) == (0, "\\uc81c\\uc8fc\\ub3c4\n")


def test_a_mistake_of_the_program_keeps_its_traceback():
    @exits_on_user_error
    def main():
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        main()


def test_a_file_error_names_the_file(tmp_path):
    with pytest.raises(OSError) as caught:
        (tmp_path / "missing").read_text()
    assert file_error(caught.value) == f"{tmp_path}/missing: No such file or directory"
    assert file_error(OSError("disk on\nfire")) == "disk on fire"
