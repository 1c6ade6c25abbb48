"""Every shipped config is read by its recipe's parser."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_objectives.recipes.arguments import parse_config
from hf_objectives.recipes.distill import Distill
from hf_objectives.recipes.dpo import Dpo
from hf_objectives.recipes.mixture_search import CLASSES
from hf_objectives.recipes.ppo import Ppo
from hf_objectives.recipes.pretrain import Pretrain
from hf_objectives.recipes.reward import Reward
from hf_objectives.recipes.sft import Sft

CONFIGS = sorted((Path(__file__).parents[2] / "hf_objectives" / "recipes" / "configs").glob("*.yaml"))
RECIPES = {
    "distill": Distill.arguments,
    "dpo": Dpo.arguments,
    "ppo": Ppo.arguments,
    "pretrain": Pretrain.arguments,
    "reward": Reward.arguments,
    "mixture_search": CLASSES,
    "smollm2_dpo": Dpo.arguments,
    "smollm2_reward": Reward.arguments,
}
#: What a config leaves to the command line.
CHATS = ["--dataset_name", "chats.jsonl", "--model_name_or_path", "folder"]
WORDS = {
    "full": CHATS,
    "smollm2_lora": CHATS,
    "pretrain_small": ["--dataset_name", "rows.jsonl", "--tokenizer_name", "folder"],
}


def classes_of(name: str) -> tuple[type, ...]:
    known = [start for start in RECIPES if name.startswith(start)]
    return RECIPES[max(known, key=len)] if known else Sft.arguments


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_shipped_config_is_read_by_its_recipe(path, tmp_path):
    words = ["--config", str(path), "--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    parsed, origin = parse_config(classes_of(path.stem), [*words, *WORDS.get(path.stem, [])])
    assert len(parsed) == len(classes_of(path.stem))
    assert path.name in origin.values()
