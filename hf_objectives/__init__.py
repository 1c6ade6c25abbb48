"""hf_objectives: exact training objectives for the Hugging Face stack.

Public names are imported when they are first used, so that `import hf_objectives` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "encode_chat": "chat",
    "encode_chats": "chat",
    "encode_row": "encode",
    "DataCollatorForAssistantOnlyLM": "collators",
    "DataCollatorWithEosPacking": "collators",
    "DataCollatorForPreferencePairs": "preference_collator",
    "pack_lengths": "packing",
    "pack_dataset": "dataset_packing",
    "StreamPacker": "stream_packing",
    "prepare_dataset": "prepare",
    "CorpusSettings": "corpus.config",
    "prepare_corpus": "corpus.build",
    "load_prepared": "corpus.build",
    "mixture_schedule": "schedule",
    "build_mixture": "mixture.build",
    "MixtureConfig": "mixture.config",
    "SourceConfig": "mixture.config",
    "StageConfig": "mixture.config",
    "DatasetMixture": "mixture.dataset",
    "compute_perplexity": "evaluation",
    "probe_isolation": "isolation",
    "OrderedStreamCallback": "trainers",
    "PPOConfig": "trainers.ppo_config",
    "PPOTrainer": "trainers.ppo",
    "RewardModelTrainer": "trainers.reward",
    "RewardModelConfig": "trainers.reward_config",
    "PerplexityDPOConfig": "trainers.dpo_config",
    "PerplexityDPOTrainer": "trainers.dpo",
    "PerplexityTrainer": "trainers",
    "PerplexityTrainingArguments": "trainers",
    "plot_training_metrics": "diagnostics.plot",
    "plot_mixture": "diagnostics.mixture",
    "diagnose": "diagnostics.detect",
    "DiagnosticsCallback": "diagnostics.callback",
    "Finding": "diagnostics.findings",
}

__all__ = [
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
    "StreamPacker",
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
    from hf_objectives.chat import encode_chat, encode_chats
    from hf_objectives.collators import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking
    from hf_objectives.corpus.build import load_prepared, prepare_corpus
    from hf_objectives.corpus.config import CorpusSettings
    from hf_objectives.dataset_packing import pack_dataset
    from hf_objectives.diagnostics.callback import DiagnosticsCallback
    from hf_objectives.diagnostics.detect import diagnose
    from hf_objectives.diagnostics.findings import Finding
    from hf_objectives.diagnostics.mixture import plot_mixture
    from hf_objectives.diagnostics.plot import plot_training_metrics
    from hf_objectives.encode import encode_row
    from hf_objectives.evaluation import compute_perplexity
    from hf_objectives.isolation import probe_isolation
    from hf_objectives.mixture.build import build_mixture
    from hf_objectives.mixture.config import MixtureConfig, SourceConfig, StageConfig
    from hf_objectives.mixture.dataset import DatasetMixture
    from hf_objectives.packing import pack_lengths
    from hf_objectives.preference_collator import DataCollatorForPreferencePairs
    from hf_objectives.prepare import prepare_dataset
    from hf_objectives.schedule import mixture_schedule
    from hf_objectives.stream_packing import StreamPacker
    from hf_objectives.trainers import OrderedStreamCallback, PerplexityTrainer, PerplexityTrainingArguments
    from hf_objectives.trainers.dpo import PerplexityDPOTrainer
    from hf_objectives.trainers.dpo_config import PerplexityDPOConfig
    from hf_objectives.trainers.ppo import PPOTrainer
    from hf_objectives.trainers.ppo_config import PPOConfig
    from hf_objectives.trainers.reward import RewardModelTrainer
    from hf_objectives.trainers.reward_config import RewardModelConfig


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"hf_objectives.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hf_objectives' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
