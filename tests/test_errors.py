"""How a program ends when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixlm import errors
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
    assert code == 2 and said.startswith("error: out of memory: use smaller batches")
    lost = RuntimeError("Connection closed by peer [127.0.0.1]")
    code, said = ending_of(lost, monkeypatch, capsys, RANK="1", LOCAL_RANK="1")
    assert code == 4 and said.startswith("error: rank 1: another rank has ended") and said.count("\n") == 1
    assert ending_of(RunStopped("stopped"), monkeypatch, capsys) == (3, "stopped\n")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert ending_of(RunStopped("stopped"), monkeypatch, capsys) == (3, "stopped\n")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")  # torchrun would start it again
    assert ending_of(RunStopped("stopped"), monkeypatch, capsys) == (0, "stopped\n")
    assert ending_of(KeyboardInterrupt(), monkeypatch, capsys) == (130, "interrupted\n")


# The module alone, for the package takes seconds to be imported.
PROGRAM = f"""
import sys
sys.path.append({str(Path(errors.__file__).parent)!r})
from errors import UserError, exits_on_user_error

@exits_on_user_error
def main():
    print('{{"text": "제주도 é 😀"}}')
    BODY

main()
"""


def ending_of_program(body: str = "", encoding: str = "utf-8", **options) -> subprocess.CompletedProcess:
    """Of one that prints a line and does what `body` says, with a buffered output as people have it."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    environment.pop("PYTHONUNBUFFERED", None)
    program = [sys.executable, *options.pop("flags", ()), "-c", PROGRAM.replace("BODY", body)]
    return subprocess.run(program, env=environment, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise PermissionError(13, 'Permission denied', '/secret/corpus')", "/secret/corpus: Permission denied: "),
        ("open('가' * 2000)", "가: File name too long: give another file or folder"),
        ("raise MemoryError('Unable to allocate 9 TiB')", "out of memory: use smaller batches or a smaller model"),
        ("raise MemoryError", "--zero (MemoryError)"),
        ("raise RuntimeError('CUDA out of memory')", "out of memory: use smaller batches or a smaller model"),
    ],
)
def test_what_a_user_can_mend_is_a_line(body, said):
    ended = ending_of_program(body, stdout=subprocess.PIPE)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and said in ended.stderr


def test_another_error_of_the_system_is_a_mistake():
    ended = ending_of_program("raise OSError(5, 'Input/output error', '/some')", stdout=subprocess.PIPE)
    assert ended.returncode == 1 and "Traceback" in ended.stderr


@pytest.fixture
def unread():
    """The end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("flags", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_an_output_that_nobody_reads_any_more_is_no_mistake(unread, flags):
    ended = ending_of_program(stdout=unread, flags=flags)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_an_output_that_nobody_reads_hides_no_error(unread):
    ended = ending_of_program("raise UserError('no such file')", stdout=unread)
    assert (ended.returncode, ended.stderr) == (2, "error: no such file\n")


def test_another_pipe_that_breaks_is_a_mistake():
    ended = ending_of_program("raise BrokenPipeError(32, 'Broken pipe')", stdout=subprocess.PIPE)
    assert ended.returncode == 1 and "Traceback" in ended.stderr and "제주도" in ended.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("flags", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_an_output_that_is_full_is_a_line(flags):
    with open("/dev/full", "wb") as full:
        ended = ending_of_program(stdout=full, flags=flags)
    said = "error: [Errno 28] No space left on device: make room there, or write elsewhere\n"
    assert (ended.returncode, ended.stderr) == (2, said)


def test_what_was_printed_before_a_disk_was_full_is_there():
    body = "raise OSError(28, 'No space left on device', '/mnt/model.safetensors')"
    ended = ending_of_program(body, stdout=subprocess.PIPE)
    said = "error: /mnt/model.safetensors: No space left on device: make room there, or write elsewhere\n"
    assert (ended.returncode, ended.stderr) == (2, said) and "제주도" in ended.stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp949", "utf-8"])
def test_letters_that_the_output_has_not_are_escaped_as_json_does(encoding, tmp_path):
    with (tmp_path / "printed").open("wb") as printed:
        assert ending_of_program(stdout=printed, encoding=encoding).returncode == 0
    assert json.loads((tmp_path / "printed").read_text(encoding)) == {"text": "제주도 é 😀"}


def test_a_program_without_an_output_ends_well():
    ended = ending_of_program("sys.exit(0)", preexec_fn=lambda: os.close(1))
    assert (ended.returncode, ended.stderr) == (0, "")


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
