"""`--train_batch_size 0`."""

from types import SimpleNamespace

import pytest
import torch
from small_runs import build_arguments, run_small

from mixlm.errors import UserError
from mixlm.training import batch_size as module
from mixlm.training import loop, memory
from mixlm.training.arguments import PretrainingArguments
from mixlm.training.batch_size import RememberedSizes, find_batch_size, largest_batch
from mixlm.training.memory import MemoryMeter, parse_memory
from mixlm.training.objectives import SentenceOrderObjective

MIB = 2**20
CPU = torch.device("cpu")


class Machine:
    """A step of n rows takes `base` + n x `row` bytes; it keeps what was tried."""

    def __init__(self, base: int, row: int):
        self.base, self.row, self.tried = base, row, []

    def __call__(self, rows: int) -> int:
        self.tried.append(rows)
        return self.base + rows * self.row


@pytest.mark.parametrize("limit_in_rows", [1, 2, 3, 7, 8, 31, 100, 1000])
def test_the_answer_fits_and_is_within_an_eighth_of_the_largest(limit_in_rows):
    machine = Machine(base=50, row=10)
    trials = largest_batch(machine, 50 + 10 * limit_in_rows, most_rows=4096)
    answer = max(trial.rows for trial in trials if trial.fits)
    assert answer <= limit_in_rows < answer + max(1, answer // 8) + 1
    # Beyond the first two nothing is run that does not fit.
    assert all(rows <= max(2, limit_in_rows) for rows in machine.tried)


def test_it_doubles_and_then_bisects():
    machine = Machine(base=0, row=1)
    trials = largest_batch(machine, limit=52, most_rows=4096)
    assert [(trial.rows, trial.fits, trial.was_run) for trial in trials] == [
        *((rows, True, True) for rows in (1, 2, 4, 8, 16, 32)),
        (64, False, False),
        (48, True, True),
        (56, False, False),
        (52, True, True),
    ]


def test_it_stops_at_the_most_rows():
    assert max(trial.rows for trial in largest_batch(Machine(0, 1), limit=10**9, most_rows=100) if trial.fits) >= 88


def test_a_curve_that_bends_upwards_is_seen_when_it_is_run():
    trials = largest_batch(lambda rows: rows**2, limit=950, most_rows=4096)
    assert max(trial.rows for trial in trials if trial.fits) in range(27, 31)
    assert any(trial.was_run and not trial.fits for trial in trials)


def test_not_even_one_row_is_an_error_that_says_how_much_it_takes():
    with pytest.raises(UserError) as caught:
        largest_batch(Machine(base=90 * MIB, row=20 * MIB), limit=100 * MIB, most_rows=4096)
    assert "one row takes 110 MiB, and 100 MiB may be used" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("900MB", 900 * 10**6), ("4GiB", 4 * 2**30), (" 1.5 gb ", 15 * 10**8), ("2 mib", 2**21)],
)
def test_sizes_of_memory(text, size):
    assert parse_memory("--memory_limit", text) == size


@pytest.mark.parametrize("text", ["", "much", "4TBs", "-3GB", "0", "nanGB", "infGB", "1e999"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="--device_memory="):
        parse_memory("--device_memory", text)
    with pytest.raises(UserError, match="--memory_limit="):
        build_arguments("somewhere", train_batch_size=0, memory_limit=text)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def find(machine: Machine, limit: str = "1000", rows: int = 4096, **settings) -> tuple[int, list[str]]:
    said: list[str] = []
    return find_batch_size(machine, settings, limit, MemoryMeter(CPU), said.append, rows), said


def test_no_more_rows_are_tried_than_there_are(cache):
    machine = Machine(0, 10)
    assert find(machine, rows=37)[0] <= 37 and max(machine.tried) <= 37
    assert find(Machine(0, 10))[0] > 37  # what was found with few rows is not what fits


def test_an_answer_is_remembered_for_the_same_settings_and_machine(cache, monkeypatch):
    first, said = find(Machine(0, 10), model="a")
    assert first in range(88, 101) and "too large, by what the others took" in said[0]
    again = Machine(0, 10)
    assert find(again, model="a") == (first, [f"--train_batch_size {first}, as was found on this machine before"])
    assert again.tried == []
    for change in ({"model": "b"}, {"model": "a", "limit": "2000"}):
        other = Machine(0, 10)
        find(other, **change)
        assert other.tried
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(module.platform, "machine", lambda: "another")
        other = Machine(0, 10)
        find(other, model="a")
        assert other.tried


@pytest.mark.parametrize(("limit", "is_remembered"), [("1000", True), ("1001", False), ("989", False)])
def test_an_answer_is_that_of_the_limit_that_was_given(cache, limit, is_remembered):
    find(Machine(30, 10), limit="1000")  # 96 rows in 990
    machine = Machine(30, 10)
    found, _ = find(machine, limit=limit)
    assert (machine.tried == []) == is_remembered
    assert 30 + 10 * found <= int(limit)


def test_without_a_limit_the_margin_is_what_may_come_and_go(cache, monkeypatch):
    """What was found in nine tenths of the free memory holds while all of that is enough for it."""
    free = 1000
    monkeypatch.setattr(MemoryMeter, "level", lambda meter: 0)
    monkeypatch.setattr(MemoryMeter, "available", lambda meter: free)
    found, _ = find(Machine(30, 10), limit=None)
    peak = 30 + 10 * found
    assert 800 <= peak <= 900
    remembered = (cache / "batch_sizes.json").read_text()
    for free, is_remembered in ((peak, True), (1090, True), (peak - 1, False), (1200, False)):
        (cache / "batch_sizes.json").write_text(remembered)
        machine = Machine(30, 10)
        find(machine, limit=None)
        assert (machine.tried == []) == is_remembered, free


def test_memory_is_also_of_the_share_that_is_masked(tmp_path, cache, monkeypatch):
    """Scores of the vocabulary are those of the masked tokens."""
    monkeypatch.setattr(PretrainingArguments, "data_sources", lambda arguments: {})
    seen = []

    def find(try_rows, settings, *others):
        seen.append(settings)
        return 4

    monkeypatch.setattr(loop, "find_batch_size", find)
    for share in (0.15, 0.4):
        fields = {**PRETRAINING, "mlm_probability": share, "output_dir": str(tmp_path / str(share))}
        run_small(PretrainingArguments(**fields))
    assert seen[0] != seen[1] and {**seen[0], "mlm_probability": 0.4} == seen[1]


PRETRAINING = {
    "model_name": "run", "corpus_path": "corpus", "tokenizer": "tokenizer", "learning_rate": 1e-3, "num_steps": 1,
    "num_workers": 0, "train_batch_size": 0, "gradient_accumulation_steps": 1,
}  # fmt: skip
CONTROL_GROUPS = {
    "version 2": ("0::/job/step", "", "memory.max", "memory.current", "inactive_file"),
    "version 1": (
        "5:cpu,memory:/job/step", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    ),
}  # fmt: skip


@pytest.mark.parametrize("version", CONTROL_GROUPS)
def test_the_memory_of_a_container_or_a_job_is_what_is_available(tmp_path, monkeypatch, version):
    """The least of what the machine, the job and the step of it have left; what files have taken is given up."""
    line, subsystem, limit, usage, cached = CONTROL_GROUPS[version]
    (tmp_path / "own").write_text(f"7:pids:/\n{line}\n")
    monkeypatch.setattr(memory, "OWN_CONTROL_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def write(group, most, used, of_files):
        folder = tmp_path / "groups" / subsystem / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / usage).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{cached} {of_files}\n")

    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000 * MIB))
    available = MemoryMeter(CPU).available
    assert available() == 1000 * MIB  # no such groups: of the machine
    write("job/step", "max", 10 * MIB, 0)
    assert available() == 1000 * MIB
    write("job", 100 * MIB, 60 * MIB, 10 * MIB)
    assert available() == 50 * MIB
    write("", 90 * MIB, 80 * MIB, 20 * MIB)  # within a container the names may be those of the machine
    assert available() == 30 * MIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert available() == 10 * MIB
    (tmp_path / "groups" / subsystem / "memory.stat").write_text("anon 1\n")
    assert available() == 10 * MIB // 3  # nothing is said of files


@pytest.mark.parametrize("content", ["", "[1, 2", "[]", "7", '{"x": "many"}', '{"x": 8}', '{"x": {"rows": "a"}}'])
def test_a_damaged_memory_remembers_nothing_and_is_mended(cache, content):
    cache.mkdir()
    (cache / "batch_sizes.json").write_text(content)
    assert RememberedSizes(cache / "batch_sizes.json").get("x", limit=10, most=10) is None
    found, _ = find(Machine(0, 10))
    again = Machine(0, 10)
    assert find(again)[0] == found and again.tried == []


def test_a_memory_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path / "file" / "cache"))
    assert find(Machine(0, 10))[0] > 0


def step_of(rows: int, **fields):
    return build_arguments("x", effective_batch_size=rows, gradient_accumulation_steps=1, **fields)


@pytest.mark.parametrize(
    ("effective", "fitting", "processes", "rows", "micro_batches"),
    [(64, 100, 2, 32, 1), (64, 20, 2, 16, 2), (60, 7, 1, 6, 10), (64, 1, 4, 1, 16), (14, 5, 2, 1, 7)],
)
def test_the_effective_batch_is_kept_by_accumulation(effective, fitting, processes, rows, micro_batches):
    arguments = step_of(effective, train_batch_size=0)
    arguments.fit_effective_batch(processes)
    assert arguments.train_batch_size == 0
    arguments.take_batch_size(fitting, effective // processes)
    assert (arguments.train_batch_size, arguments.gradient_accumulation_steps) == (rows, micro_batches)
    assert rows * micro_batches * processes == effective


def test_an_effective_batch_that_cannot_be_cut_equally_is_refused():
    with pytest.raises(UserError, match="effective_batch_size=10: must be a multiple of train_batch_size x processes"):
        step_of(10, train_batch_size=4).fit_effective_batch(1)
    with pytest.raises(UserError, match="effective_batch_size=10: must be a multiple of processes = 4"):
        step_of(10, train_batch_size=0).fit_effective_batch(4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_batch_size": 0, "tokens_per_step": 100}, "train_batch_size=0: must be above 0 with tokens_per_step"),
        ({"effective_batch_size": 64, "tokens_per_step": 100}, "tokens_per_step=100: must be left out with effective"),
        ({"effective_batch_size": 64, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2: must be"),
        ({"train_batch_size": 8, "memory_limit": "4GB"}, "memory_limit='4GB': must be left out unless"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        build_arguments("x", **{"gradient_accumulation_steps": 1, **fields})


def test_out_of_memory_on_one_process_is_a_batch_that_does_not_fit(cache):
    def try_rows(rows: int) -> int:
        if rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1  # before anything shows how it grows

    assert find(try_rows)[0] == 4


def checkpoint_bytes(folder, step: int) -> list[bytes]:
    path = folder / "run" / "checkpoints" / f"step-{step:08d}"
    return [(path / name).read_bytes() for name in ("model/model.safetensors", "optimizer.safetensors")]


def test_an_overflow_while_searching_does_not_reach_the_weights(tmp_path, cache, monkeypatch):
    """With such weights the first fp16 gradients overflow."""
    monkeypatch.setattr(module, "MOST_ROWS", 2)
    limit = MemoryMeter(CPU).level() + 500 * MIB
    arguments = build_arguments(
        str(tmp_path),
        num_steps=1,
        fp16=True,
        train_batch_size=0,
        effective_batch_size=8,
        gradient_accumulation_steps=1,
        memory_limit=str(limit),
    )
    model = run_small(arguments, initializer_range=3.0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("task", ["SOP", "ICT"])
def test_a_search_leaves_no_trace_in_the_training(tmp_path, cache, monkeypatch, capsys, task, fp16):
    """Model, moments, generators, order of data: as in a run that was told the same size; also when it goes on."""
    monkeypatch.setattr(module, "MOST_ROWS", 4)
    common = {"num_steps": 2, "scheduler_num_steps": 4, "fp16": fp16, "gradient_accumulation_steps": 1}
    told = {"train_batch_size": 4, "effective_batch_size": 8}
    limit = MemoryMeter(CPU).level() + 500 * MIB
    found = {"train_batch_size": 0, "effective_batch_size": 8, "memory_limit": str(limit)}
    for name, sizes in (("told", told), ("found", found)):
        run_small(build_arguments(str(tmp_path / name), **common, **sizes), task=task)
    assert checkpoint_bytes(tmp_path / "found", 2) == checkpoint_bytes(tmp_path / "told", 2)
    more = {**common, "num_steps": 4, "resume": "auto"}
    run_small(build_arguments(str(tmp_path / "told"), **more, **told), task=task)
    # Without an effective batch size a run keeps that of its checkpoint.
    capsys.readouterr()
    run_small(build_arguments(str(tmp_path / "found"), **more, train_batch_size=0), task=task)
    assert "train_batch_size 4 ->" not in capsys.readouterr().out
    assert checkpoint_bytes(tmp_path / "found", 4) == checkpoint_bytes(tmp_path / "told", 4)


@pytest.mark.parametrize(
    ("sizes", "micro_batches", "rows_there_are"),
    [
        ({"gradient_accumulation_steps": 1}, 1, 4096),
        ({"gradient_accumulation_steps": 2}, 2, 2048),
        ({"gradient_accumulation_steps": 1, "effective_batch_size": 8}, 2, 8),
    ],
)
def test_what_is_tried_is_a_step_with_all_that_fills_the_memory(
    tmp_path, monkeypatch, sizes, micro_batches, rows_there_are
):
    """It has the moments of a step before, and where there are several micro-batches the gradient of another one."""
    steps = []

    class Watching(SentenceOrderObjective):
        def begin_step(self, batches):
            steps.append(([len(batch["input_ids"]) for batch in batches], bool(self.engine.optimizer.state)))
            return super().begin_step(batches)

    def find(try_rows, settings, limit, meter, say, most_rows):
        assert most_rows == rows_there_are and settings["accumulates"] == (micro_batches > 1)
        try_rows(3)
        return 4

    monkeypatch.setattr(loop, "find_batch_size", find)
    run_small(build_arguments(str(tmp_path), num_steps=1, train_batch_size=0, **sizes), objective_class=Watching)
    *tried, (_, has_moments) = steps
    assert tried == [([3] * micro_batches, False), ([3] * micro_batches, True)] and not has_moments


def test_a_small_limit_gives_a_small_batch(tmp_path, cache, capsys):
    """A real search: a model whose rows take megabytes, in what is there now and some megabytes more."""
    sizes = {}
    for mebibytes in (120, 240):
        limit = MemoryMeter(CPU).level() + mebibytes * MIB
        arguments = build_arguments(
            str(tmp_path / str(mebibytes)), num_steps=1, train_batch_size=0, memory_limit=str(limit), save_steps=0
        )
        run_small(arguments, hidden_size=64, ff_dim=8192, num_hidden_layers=2)
        sizes[mebibytes] = arguments.train_batch_size
        assert "rows" in capsys.readouterr().out
    assert 1 <= sizes[120] < sizes[240]
