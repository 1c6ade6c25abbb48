"""Share of answers that are right to the letter, as a module of `evaluate`."""

import datasets
import evaluate

from hf_objectives.evaluation import wilson_interval

_DESCRIPTION = "The share of predictions that equal their reference to the letter, with Wilson's 95 % interval."


class ExactMatch(evaluate.Metric):
    """`compute(predictions=[...], references=[...])` gives `exact_match`, `exact_match_low` and `exact_match_high`."""

    def _info(self):
        features = datasets.Features({name: datasets.Value("string") for name in ("predictions", "references")})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description="texts", features=features)

    def _compute(self, predictions, references):
        right = sum(said == expected for said, expected in zip(predictions, references, strict=True))
        low, high = wilson_interval(right, len(references))
        return {"exact_match": right / len(references), "exact_match_low": low, "exact_match_high": high}
