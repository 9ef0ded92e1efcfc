"""EM and F1 of KorQuAD 1.0 for `evaluate.load(mixlm.evaluation.metric_path("korquad_v1"))`.

`evaluate` runs a copy of this file from its cache, so all imports are absolute.
"""

import evaluate

from mixlm.evaluation.reading import korquad_v1, records_by_id
from mixlm.evaluation.reading_modules import reading_info


class KorquadV1(evaluate.Metric):
    """`mixlm.evaluation.reading.korquad_v1` over records; `compute` returns what it returns."""

    def _info(self):
        return reading_info(
            "EM and F1 over characters of KorQuAD 1.0, in percent.",
            "Lim et al., KorQuAD1.0: Korean QA Dataset for Machine Reading Comprehension, 2019",
        )

    def _compute(self, predictions, references):
        return korquad_v1(
            records_by_id(predictions, lambda record: record["prediction_text"]),
            records_by_id(references, lambda record: record["answers"]["text"]),
        )
