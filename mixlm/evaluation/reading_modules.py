"""What the metrics of reading have in common as modules of `evaluate`."""

import datasets
import evaluate


def reading_info(description: str, citation: str, *, no_answer_probability: bool = False) -> evaluate.MetricInfo:
    """What a metric of reading takes, as `evaluate`'s own squad and squad_v2 do.

    Args:
        description: what is computed.
        citation: the paper that defines it.
        no_answer_probability: whether predictions have this field too.
    """
    prediction = {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")}
    if no_answer_probability:
        prediction["no_answer_probability"] = datasets.Value("float64")
    answers = {"text": datasets.Value("string"), "answer_start": datasets.Value("int32")}
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=(
            'predictions: [{"id": ..., "prediction_text": ...'
            + (', "no_answer_probability": ...' if no_answer_probability else "")
            + '}], references: [{"id": ..., "answers": {"text": [...], "answer_start": [...]}}]'
        ),
        features=datasets.Features(
            {
                "predictions": prediction,
                "references": {"id": datasets.Value("string"), "answers": datasets.Sequence(answers)},
            }
        ),
    )
