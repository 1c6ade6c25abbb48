"""hf_objectives: exact training objectives for the Hugging Face stack.

Public names are imported when they are first used, so that `import hf_objectives` costs nothing.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

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
    "PerplexityDistillationConfig",
    "PerplexityDistillationTrainer",
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
        PerplexityDistillationConfig,
        PerplexityDistillationTrainer,
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


def import_on_use(module: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a module that imports a name when the name is first used.

    The names and their modules are those that the file imports from this package under `if TYPE_CHECKING`, where editors
    and type checkers read them.

    Args:
        module: the module's `__name__`.
        file: its `__file__`.
    """
    source = sys.modules[module].__loader__.get_data(file)  # type: ignore[union-attr]  # a file may be in a zip
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    homes = {
        alias.name: str(n.module) for n in nodes for alias in n.names if str(n.module).startswith("hf_objectives.")
    }

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(sys.modules[module], name, value)
        return value

    return load, lambda: sorted({*vars(sys.modules[module]), *homes})


if not TYPE_CHECKING:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
