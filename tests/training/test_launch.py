"""When accelerate's launcher starts one process where several were meant."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from mixlm.errors import UserError
from mixlm.training.launch import option_value, run_ranks, start_missing_processes

LAUNCHED = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}


@pytest.fixture
def replaced(monkeypatch):
    """The command lines that would replace this process, and a way to pretend how it was started."""
    commands = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: commands.append(arguments))
    monkeypatch.setattr(sys, "argv", ["run_pretraining.py", "--model_name", "x"])

    def started_by(command_line: list[str], **environment: str) -> list[list[str]]:
        for name in (*LAUNCHED, "RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(psutil.Process, "cmdline", lambda self: command_line)
        start_missing_processes()
        return commands

    return started_by


@pytest.mark.parametrize("option", [["--num_processes", "3"], ["--num-processes=3"]])
def test_the_ranks_that_were_meant_are_started(replaced, option):
    (command,) = replaced(["python", "accelerate", "launch", "--cpu", *option, "run_pretraining.py"], **LAUNCHED)
    assert command[0] == sys.executable
    assert command[1:5] == ["-m", "torch.distributed.run", "--nproc_per_node", "3"]
    assert command[5:9] == ["--master_addr", "127.0.0.1", "--master_port", "1234"]
    assert command[9:] == ["run_pretraining.py", "--model_name", "x"]


def test_nothing_happens_elsewhere(replaced):
    launcher = ["accelerate", "launch", "--num_processes", "2"]
    assert replaced(["bash"]) == []
    assert replaced(launcher, ACCELERATE_USE_CPU="True") == []
    assert replaced(launcher, **{**LAUNCHED, "ACCELERATE_USE_CPU": "False"}) == []
    assert replaced(launcher, **LAUNCHED, RANK="0") == []


@pytest.mark.parametrize("launcher", [["accelerate", "launch"], ["x", "--num_processes=4", "--num_machines", "2"]])
def test_an_unknown_number_is_an_error_that_names_torchrun(replaced, launcher):
    with pytest.raises(UserError, match="torchrun --nproc_per_node"):
        replaced(launcher, **LAUNCHED)


def test_option_value():
    assert option_value(["a", "--one", "1", "--two=2"], "one") == "1"
    assert option_value(["a", "--one", "1", "--two=2"], "two") == "2"
    assert option_value(["a", "--one"], "three") is None


def test_ranks_that_do_not_end_are_ended_with_their_launcher(tmp_path, monkeypatch):
    """The time is over as soon as the rank is there."""
    program = (
        "import os, pathlib, sys, time\npathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\ntime.sleep(600)\n"
    )
    (tmp_path / "sleeps.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    file, communicate, ranks = tmp_path / "rank", subprocess.Popen.communicate, []

    def time_is_over_with_the_rank(launcher, timeout=None):
        if timeout is None:
            return communicate(launcher)
        while not (file.exists() and file.read_text()):
            assert launcher.poll() is None
            time.sleep(0.05)
        ranks.append(psutil.Process(int(file.read_text())))
        raise subprocess.TimeoutExpired("torchrun", timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", time_is_over_with_the_rank)
    assert run_ranks("sleeps", [str(file)], processes=1, timeout=100) == "no end after 100 seconds"
    assert not psutil.wait_procs(ranks, timeout=10)[1]
