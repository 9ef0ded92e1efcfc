#!/usr/bin/env python
"""The bundled Korean questions as a retrieval task of MTEB, for any model of sentence-transformers. Works offline.

    mixlm export sentence-transformers outputs/my-retriever outputs/exported
    python benchmarks/mteb_sample.py outputs/exported

A question is to find its own paragraph among all. MTEB puts the title in front of the text with a blank between them;
mixlm's own evaluations give both as a pair, so that their numbers differ a little. Needs `mteb` (extra `dev`).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer

sys.path.insert(0, str(Path(__file__).parents[1]))
from mixlm.data.retrieval import PassageNumbers
from mixlm.data.squad import read_squad

SAMPLE = Path(__file__).parents[1] / "mixlm" / "sample" / "ko_questions.json"
METRICS = ("ndcg_at_10", "mrr_at_10", "hit_rate_at_1", "recall_at_10")


class BundledQuestions(AbsTaskRetrieval):
    """330 questions, 66 paragraphs."""

    metadata = TaskMetadata(
        name="MixLMBundledQuestions",
        description="Questions about the bundled Korean articles, each with its paragraph.",
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        dataset={"path": "mixlm/sample", "revision": "1"},
        reference=None,
        eval_splits=["test"],
        eval_langs=["kor-Hang"],
        main_score="ndcg_at_10",
    )

    def load_data(self, *arguments: Any, **options: Any) -> None:
        """Read what lies beside the package."""
        number_of, queries, relevant = PassageNumbers(), [], {}
        for example in read_squad(SAMPLE).examples:
            queries.append({"id": example.id, "text": example.question})
            relevant[example.id] = {str(number_of(example.title, example.context)): 1}
        corpus = [passage._asdict() for passage in number_of.passages]
        split = {
            "corpus": Dataset.from_list(corpus),
            "queries": Dataset.from_list(queries),
            "relevant_docs": relevant,
            "top_ranked": None,
        }
        self.dataset, self.data_loaded = {"default": {"test": split}}, True


def evaluate(model: SentenceTransformer) -> dict[str, float]:
    """Scores of a model, by MTEB's names, between 0 and 1."""
    result = mteb.evaluate(model, BundledQuestions(), cache=None, show_progress_bar=False)
    (scores,) = result.task_results[0].scores["test"]
    return {name: scores[name] for name in METRICS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what mixlm export sentence-transformers has written")
    model = SentenceTransformer(parser.parse_args().model, trust_remote_code=True)
    for name, score in evaluate(model).items():
        print(f"{name:14} {score:.3f}")


if __name__ == "__main__":
    main()
