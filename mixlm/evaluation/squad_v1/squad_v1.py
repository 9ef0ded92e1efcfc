"""EM and F1 of SQuAD 1.1 for `evaluate.load(mixlm.evaluation.metric_path("squad_v1"))`.

`evaluate` runs a copy of this file from its cache, so all imports are absolute.
"""

import evaluate

from mixlm.evaluation.reading import records_by_id, squad_v1
from mixlm.evaluation.reading_modules import reading_info


class SquadV1(evaluate.Metric):
    """`mixlm.evaluation.reading.squad_v1` over records; `compute` returns what it returns."""

    def _info(self):
        return reading_info(
            "EM and F1 over words of SQuAD 1.1, in percent.",
            "Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, 2016",
        )

    def _compute(self, predictions, references):
        return squad_v1(
            records_by_id(predictions, lambda record: record["prediction_text"]),
            records_by_id(references, lambda record: record["answers"]["text"]),
        )
