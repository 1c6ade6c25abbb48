"""What the numbers mean: exact counts, perplexity, calibration, pairs."""

from __future__ import annotations

from hf_objectives.evaluation.calibration import (
    Reliability,  # Pairs by the confidence of their choice, in bins of equal width over [0.5, 1]
)
from hf_objectives.evaluation.counts import (
    TokenCount,  # Predicted tokens and what they cost
)
from hf_objectives.evaluation.language_model import (
    EvaluatesLanguageModels,  # For a Trainer: `evaluate` also measures `eval_lm_datasets`, and training may stop wher
    LanguageModelEvaluation,  # Rows of named datasets, encoded once, and their perplexity under a model whenever it i
)
from hf_objectives.evaluation.pair_counts import (
    COLUMNS,  # reference (NaN: unknown); their tokens; their rewards
    PairScores,  # Log-probabilities of a batch of `n` pairs, chosen and rejected
    nats_per_token,  # Mean negative log-likelihood of a token of the chosen and of the rejected answers; NaN where it
    pair_figures,  # Metrics of an evaluation over pairs, float64 [n, columns], each counted once
    unique_rows,  # The pairs of all ranks, each numbered row once: the last batches of ranks repeat rows to be of one
)
from hf_objectives.evaluation.pair_rewards import (
    PairRewards,  # Rewards of `n` preference pairs, each an array [n]
)
from hf_objectives.evaluation.perplexity import (
    EvaluationCounts,  # What evaluation adds up
    compute_perplexity,  # Exact perplexity: total nats over total tokens, whatever the batching
    count_batch,  # Counts of one batch
    split_extra_columns,  # A batch as what the model takes, and what rides along for loss and evaluation
)
from hf_objectives.evaluation.selected_logits import selected_logits
