"""EM and F1 of SQuAD 2.0 for `evaluate.load(mixlm.evaluation.metric_path("squad_v2"))`.

`evaluate` runs a copy of this file from its cache, so all imports are absolute.
"""

import evaluate

from mixlm.evaluation.reading import records_by_id, squad_v2
from mixlm.evaluation.reading_modules import reading_info


class SquadV2(evaluate.Metric):
    """`mixlm.evaluation.reading.squad_v2` over records; `compute` returns what it returns."""

    def _info(self):
        return reading_info(
            "EM and F1 over words of SQuAD 2.0, in percent, and the best thresholds for giving no answer.",
            "Rajpurkar et al., Know What You Don't Know: Unanswerable Questions for SQuAD, 2018",
            no_answer_probability=True,
        )

    def _compute(self, predictions, references, no_answer_threshold=1.0):
        return squad_v2(
            records_by_id(predictions, lambda record: record["prediction_text"]),
            records_by_id(references, lambda record: record["answers"]["text"]),
            records_by_id(predictions, lambda record: record["no_answer_probability"]),
            no_answer_threshold,
        )
