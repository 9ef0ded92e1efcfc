"""Whatever happens to a run, nothing is lost beyond its last save, and going on gives what would have been."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from mixlm.training.checkpoint import checkpoints_in, verify

HERE = Path(__file__).parent
STEPS, SAVE_STEPS = 6, 2


@pytest.fixture(scope="module")
def nursery():
    """A function that runs two ranks: see nursery.py."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "nursery.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=HERE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )

    def run(output_dir: Path, zero: int = 0, **options) -> dict:
        arguments = {"num_steps": STEPS, "save_steps": SAVE_STEPS, "resume": "auto", "zero": zero}
        process.stdin.write(json.dumps({"output_dir": str(output_dir), "arguments": arguments, **options}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    run.process = psutil.Process(process.pid)
    yield run
    process.kill()
    process.wait()


def checkpoints(output_dir: Path) -> list[Path]:
    return checkpoints_in(output_dir / "run" / "checkpoints")


def weights(output_dir: Path) -> dict:
    last = output_dir / "run" / "checkpoints" / f"step-{STEPS:08d}"
    files = ("model/model.safetensors", "optimizer.safetensors")
    return {f"{file}:{name}": tensor for file in files for name, tensor in load_file(last / file).items()}


@pytest.fixture(scope="module")
def whole(nursery, tmp_path_factory):
    """(zero) -> what a run that nobody disturbs comes to, how long it takes, and its file events."""
    found = {}

    def get(zero: int) -> tuple[dict, dict]:
        if zero not in found:
            folder = tmp_path_factory.mktemp("whole")
            done = nursery(folder, zero)
            assert done["exit_codes"] == [0, 0]
            found[zero] = weights(folder), done
        return found[zero]

    return get


def assert_it_goes_on(nursery, folder: Path, zero: int, expected: dict) -> None:
    """Every checkpoint is whole; the next run comes to the same end and leaves nothing else behind."""
    before = checkpoints(folder)
    for path in before:
        verify(path)
    assert nursery.process.children(recursive=True) == []
    done = nursery(folder, zero)
    assert done["exit_codes"] == [0, 0]
    found = weights(folder)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not found[name].equal(expected[name])] == []
    if not before or before[-1].name != f"step-{STEPS:08d}":  # else there was nothing more to be saved
        left = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
        assert left == [f"step-{step:08d}" for step in (STEPS - SAVE_STEPS, STEPS)]


def kill_at_random_instants(nursery, whole, tmp_path, times: int, seed: int) -> None:
    instants = random.Random(seed)
    for number in range(times):
        zero = (0, 3)[number % 2]
        expected, done = whole(zero)
        folder = tmp_path / str(number)
        nursery(folder, zero, kill_after=instants.uniform(0.2, 1.0) * done["seconds"])
        assert_it_goes_on(nursery, folder, zero, expected)


def test_killed_at_some_instants(nursery, whole, tmp_path):
    kill_at_random_instants(nursery, whole, tmp_path, times=2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_a_hundred_instants(nursery, whole, tmp_path):
    kill_at_random_instants(nursery, whole, tmp_path, times=100, seed=2)


def kill_at_file_events(nursery, whole, tmp_path, events) -> None:
    expected, _ = whole(0)
    for event in events:
        folder = tmp_path / str(event)
        assert nursery(folder, fatal=event)["exit_codes"][0] == -9
        assert_it_goes_on(nursery, folder, 0, expected)


def test_killed_at_some_file_operations(nursery, whole, tmp_path):
    last = whole(0)[1]["events"]
    assert last > 100
    kill_at_file_events(nursery, whole, tmp_path, range(1, last, last // 3))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_every_file_operation(nursery, whole, tmp_path):
    """Of the first save, of one that takes the place of an older one, and of the last."""
    kill_at_file_events(nursery, whole, tmp_path, range(1, whole(0)[1]["events"] + 1))
