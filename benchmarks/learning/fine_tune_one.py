"""Does it carry over? `python fine_tune_one.py SPECIFICATION.json FOLDER`; what came of it is in FOLDER/result.json.

A model that a study has kept is fine-tuned by run_mrc.py or run_ict.py for a budget of steps or CPU minutes, and
evaluated on articles that it was not trained on; with a budget of 0 it is evaluated as it is. It takes minutes: killed
and started again it begins anew, with the steps that were timed at first.

A retriever is judged as it is used: in an index, by its vectors alone and together with BM25. The weight of the two is
chosen on articles that it was neither trained nor is judged on.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from metering import STEPS_BEFORE_TIMING, TIMED_STEPS, Meter, Steps, cost_of_a_step
from models import PEERS, PeerForRetrieval
from one_run import make_one
from search_quality import search_quality

sys.path.insert(0, str(Path(__file__).parents[2]))
import run_ict
import run_mrc
from mixlm.data.batching import Position
from mixlm.encoder import Encoding, MixLMEncoder
from mixlm.tokenization import load_tokenizer
from mixlm.training.batches import TrainingBatches
from mixlm.training.reading import ReadingArguments
from mixlm.training.retrieval import RetrievalArguments

# A script and what it is told, where a specification says nothing else. Retrievers are judged on articles of their
# own, because the weight of hybrid search is chosen on the validation articles.
TASKS: dict[str, tuple[Any, type, dict[str, Any]]] = {
    "reading": (
        run_mrc,
        ReadingArguments,
        {
            "train_articles": "0:110",
            "validation_articles": "110:140",
            "max_seq_length": 256,
            "doc_stride": 128,
            "train_batch_size": 16,
            "learning_rate": 5e-4,
            "metric": "korquad_v1",
            "do_train": True,  # and no second evaluation: the loop has made one after its last step
        },
    ),
    "retrieval": (
        run_ict,
        RetrievalArguments,
        {
            "train_articles": "0:95",
            "validation_articles": "95:110",
            "judged_on": "110:140",
            "max_passage_length": 256,
            "train_batch_size": 64,
            "learning_rate": 5e-4,
        },
    ),
}
AS_IT_IS = {"num_steps": 1, "learning_rate": 1e-12}  # a step that changes nothing


def metered(meter: Meter) -> type[TrainingBatches]:
    """Batches that go through the meter."""

    class MeteredBatches(TrainingBatches):
        def __call__(self, position: Position) -> Steps:
            return meter.over(super().__call__(position))

    return MeteredBatches


def fine_tune_one(specification: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fine-tune to the end of the budget and evaluate; returns what is to be written down.

    Args:
        specification: what study.py says of a line with a `task`, with one seed, and the paths `source`, of the kept
            model, and `questions`.
        folder: for the checkpoints, which are of no use afterwards.
    """
    script, arguments_class, defaults = TASKS[specification["task"]]
    arguments_of_task = {**defaults, **specification["arguments"]}
    judged_on = arguments_of_task.pop("judged_on", None)
    is_peer = specification["model"] in PEERS

    def run(name: str, meter: Meter, **more: Any) -> dict[str, float]:
        arguments = arguments_class(
            model_name=name,
            output_dir=str(folder),
            model_name_or_path=specification["source"],
            train_file=[specification["questions"]],
            seed=specification["seed"],
            num_workers=0,
            eval_steps=0,
            save_steps=0,
            overwrite_output_dir=True,
            **{**arguments_of_task, **more},
        )
        with ExitStack() as patches:
            patches.enter_context(patch.object(script, "TrainingBatches", metered(meter)))
            if is_peer and specification["task"] == "retrieval":
                patches.enter_context(patch.object(script, "load_for_retrieval", PeerForRetrieval.load))
            return script.run(arguments)

    if specification.get("minutes"):
        timed = 1 + STEPS_BEFORE_TIMING + TIMED_STEPS
        train: Callable[[Meter], Any] = lambda meter: run("timing", meter, num_steps=timed)  # noqa: E731
        seconds, _ = cost_of_a_step(train, folder / "cost_of_a_step.json")
        steps = max(1, round(60 * specification["minutes"] / seconds))
    else:
        steps = specification.get("steps", 0)
    meter = Meter()
    metrics = run("run", meter, **({"num_steps": steps} if steps else AS_IT_IS))
    if specification["task"] == "retrieval":
        encoder = load_encoder(str(folder / "run"), is_peer)
        file, tuned_on = Path(specification["questions"]), arguments_of_task["validation_articles"]
        metrics = search_quality(encoder, file, folder / "index", tuned_on, judged_on)
        if not steps:  # it has seen none of the questions
            of_all = search_quality(encoder, file, folder / "index", None, None)
            metrics |= {f"all questions/{name}": value for name, value in of_all.items()}
    return {"steps": steps, "tokens_seen": meter.tokens, "metrics": metrics}


def load_encoder(folder: str, is_peer: bool) -> MixLMEncoder:
    """What run_ict.py has left, as an index takes it."""
    if not is_peer:
        return MixLMEncoder.from_pretrained(folder)
    return MixLMEncoder(PeerForRetrieval.load_fine_tuned(folder), load_tokenizer(folder), Encoding.load(folder))


if __name__ == "__main__":
    make_one(fine_tune_one, *sys.argv[1:])
