"""Trainers, each with its config beside it."""

from hf_objectives.trainers.causal_lm import PerplexityTrainer
from hf_objectives.trainers.config import PerplexityTrainingArguments
from hf_objectives.trainers.stream_callback import OrderedStreamCallback

__all__ = ["OrderedStreamCallback", "PerplexityTrainer", "PerplexityTrainingArguments"]
