"""hf_objectives: exact training objectives for the Hugging Face stack.

Public names are imported when they are first used, so that `import hf_objectives` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: The room of each public name.
_HOMES = {
    "encode_chat": "labels",
    "encode_chats": "labels",
    "encode_row": "labels",
    "DataCollatorForAssistantOnlyLM": "collators",
    "DataCollatorWithEosPacking": "collators",
    "DataCollatorForPreferencePairs": "collators",
    "pack_lengths": "packing",
    "pack_dataset": "packing",
    "prepare_dataset": "preparation",
    "CorpusConfig": "preparation",
    "CorpusSettings": "preparation",
    "prepare_corpus": "preparation",
    "load_prepared": "preparation",
    "mixture_schedule": "mixture",
    "build_mixture": "mixture",
    "MixtureConfig": "mixture",
    "SourceConfig": "mixture",
    "StageConfig": "mixture",
    "DatasetMixture": "mixture",
    "compute_perplexity": "evaluation",
    "probe_isolation": "trainers",
    "OrderedStreamCallback": "trainers",
    "PPOConfig": "trainers",
    "PPOTrainer": "trainers",
    "RewardModelTrainer": "trainers",
    "RewardModelConfig": "trainers",
    "PerplexityDPOConfig": "trainers",
    "PerplexityDPOTrainer": "trainers",
    "PerplexityTrainer": "trainers",
    "PerplexityTrainingArguments": "trainers",
    "plot_training_metrics": "diagnostics",
    "plot_mixture": "diagnostics",
    "diagnose": "diagnostics",
    "DiagnosticsCallback": "diagnostics",
    "Finding": "inspection",
}

__all__ = [
    "CorpusConfig",
    "CorpusSettings",
    "DataCollatorForAssistantOnlyLM",
    "DataCollatorForPreferencePairs",
    "DataCollatorWithEosPacking",
    "DatasetMixture",
    "DiagnosticsCallback",
    "Finding",
    "MixtureConfig",
    "OrderedStreamCallback",
    "PPOConfig",
    "PPOTrainer",
    "PerplexityDPOConfig",
    "PerplexityDPOTrainer",
    "PerplexityTrainer",
    "PerplexityTrainingArguments",
    "RewardModelConfig",
    "RewardModelTrainer",
    "SourceConfig",
    "StageConfig",
    "build_mixture",
    "compute_perplexity",
    "diagnose",
    "encode_chat",
    "encode_chats",
    "encode_row",
    "load_prepared",
    "mixture_schedule",
    "pack_dataset",
    "pack_lengths",
    "plot_mixture",
    "plot_training_metrics",
    "prepare_corpus",
    "prepare_dataset",
    "probe_isolation",
]

if TYPE_CHECKING:
    from hf_objectives.collators import (
        DataCollatorForAssistantOnlyLM,
        DataCollatorForPreferencePairs,
        DataCollatorWithEosPacking,
    )
    from hf_objectives.diagnostics import DiagnosticsCallback, diagnose, plot_mixture, plot_training_metrics
    from hf_objectives.evaluation import compute_perplexity
    from hf_objectives.inspection import Finding
    from hf_objectives.labels import encode_chat, encode_chats, encode_row
    from hf_objectives.mixture import (
        DatasetMixture,
        MixtureConfig,
        SourceConfig,
        StageConfig,
        build_mixture,
        mixture_schedule,
    )
    from hf_objectives.packing import pack_dataset, pack_lengths
    from hf_objectives.preparation import CorpusConfig, CorpusSettings, load_prepared, prepare_corpus, prepare_dataset
    from hf_objectives.trainers import (
        OrderedStreamCallback,
        PerplexityDPOConfig,
        PerplexityDPOTrainer,
        PerplexityTrainer,
        PerplexityTrainingArguments,
        PPOConfig,
        PPOTrainer,
        RewardModelConfig,
        RewardModelTrainer,
        probe_isolation,
    )


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"hf_objectives.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hf_objectives' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
