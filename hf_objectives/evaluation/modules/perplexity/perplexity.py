"""Exact perplexity as a module of `evaluate`: total nats over total predicted tokens, see `compute_perplexity`."""

import datasets
import evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_objectives.evaluation import compute_perplexity

_DESCRIPTION = "exp of total nats over total predicted tokens; evaluate's own metric averages documents."


class Perplexity(evaluate.Metric):
    """`compute(predictions=[...], model_id=...)` gives `perplexity`, `bits_per_byte`, `nll`, `num_tokens` and `num_bytes`."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description="texts", features=features)

    def _compute(self, predictions, model_id=None, model=None, tokenizer=None, max_length=None, stride=None):
        """Texts under a model: `model_id`, a folder or Hub id, or a `model` with its `tokenizer`."""
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(model_id, dtype="float32").eval()
            tokenizer = AutoTokenizer.from_pretrained(model_id)
        found = compute_perplexity(model, tokenizer, predictions, max_length=max_length, stride=stride)
        return {key: getattr(found, key) for key in ("perplexity", "bits_per_byte", "nll", "num_tokens", "num_bytes")}
