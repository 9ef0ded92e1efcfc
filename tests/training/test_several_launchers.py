"""Runs as launchers start them: several machines, a rank that dies, a rank that hangs, a signal."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent


def start(output_dir: Path, launcher: list[str], arguments: dict, run: dict | None = None) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(HERE / "small_run_program.py")]
    return subprocess.Popen(
        [*command, str(output_dir), json.dumps(arguments), json.dumps(run or {})],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def weights(output_dir: Path, step: int) -> dict:
    return load_file(output_dir / "run" / "checkpoints" / f"step-{step:08d}" / "model" / "model.safetensors")


@pytest.mark.slow
def test_two_machines_of_two_ranks_train_as_one_of_four(tmp_path):
    """Two launchers that know of each other by an address, as on two machines; the folder is shared."""
    arguments = {"num_steps": 3, "zero": 3, "gradient_accumulation_steps": 2}
    one = start(tmp_path / "one", ["--standalone", "--nproc_per_node", "4"], arguments)
    output, _ = one.communicate(timeout=120)
    assert one.returncode == 0, output
    meeting_point = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    machines = [
        start(
            tmp_path / "two",
            ["--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "2", *meeting_point],
            arguments,
        )
        for rank in (0, 1)
    ]
    outputs = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    expected, found = weights(tmp_path / "one", 3), weights(tmp_path / "two", 3)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 3])
def test_a_rank_that_dies_brings_the_others_down_at_once_and_is_named(tmp_path, zero):
    arguments = {"num_steps": 50, "save_steps": 1, "zero": zero, "timeout_minutes": 5}
    run = start(tmp_path, ["--standalone", "--nproc_per_node", "2"], arguments, {"dies": 1})
    family = psutil.Process(run.pid)
    output, _ = run.communicate(timeout=60)
    assert run.returncode != 0
    assert "error: rank 0: another rank has ended or does not answer" in output
    # The launcher's own report.
    assert "rank      : 1" in output and "SIGKILL" in output
    assert not family.is_running()
    assert (tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json").exists()


@pytest.mark.slow
def test_a_rank_that_hangs_is_waited_for_no_longer_than_the_timeout(tmp_path):
    arguments = {"num_steps": 50, "timeout_minutes": 0.1}
    started = time.monotonic()
    run = start(tmp_path, ["--standalone", "--nproc_per_node", "2"], arguments, {"hangs": 1})
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0 and time.monotonic() - started < 90
    assert "error: rank 0: another rank has ended or does not answer" in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_to_the_launcher_saves_and_ends_all_ranks_and_the_run_goes_on(tmp_path, number):
    arguments = {"num_steps": 100_000, "logging_steps": 50, "save_steps": 0, "resume": "auto", "num_workers": 1}
    run = start(tmp_path, ["--standalone", "--nproc_per_node", "2"], arguments)
    curves = tmp_path / "run" / "tensorboard"
    deadline = time.monotonic() + 60
    while not curves.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    # As a terminal or a cluster does: to launcher, ranks and their workers; and the launcher passes it on.
    os.killpg(run.pid, number)
    output, _ = run.communicate(timeout=60)
    saved = list((tmp_path / "run" / "checkpoints").glob("step-*/state.json"))
    assert len(saved) == 1, output
    assert f"{number.name}: stopped after step" in output and "--resume auto" in output
    step = int(saved[0].parent.name.removeprefix("step-"))
    again = {**arguments, "num_steps": step + 2}
    run = start(tmp_path, ["--standalone", "--nproc_per_node", "2"], again)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0, output
