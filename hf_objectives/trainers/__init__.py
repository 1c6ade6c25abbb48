"""Trainers, each with its config beside it."""

from hf_objectives.trainers.causal_lm import PerplexityTrainer
from hf_objectives.trainers.config import PerplexityTrainingArguments

__all__ = ["PerplexityTrainer", "PerplexityTrainingArguments"]
