"""Small worlds for PPO: a tokenizer of words, a small model, a trainer of both, and answers by script."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_objectives.trainers.ppo import PPOTrainer
from hf_objectives.trainers.ppo_config import PPOConfig

PAD, EOS = 0, 1
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "steps_per_generation": 1,
}


def words(*known: str) -> PreTrainedTokenizerFast:
    """One token a word, split at spaces; 0 is padding and 1 the end."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *known])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


LETTERS = words("ask", "a", "b", "c", "d", "e")
CHAT = "{% for message in messages %}{{ ' ' + message['content'] }}{% endfor %}{% if add_generation_prompt %} ask{% endif %}"
LETTERS.chat_template = CHAT


def small_model(vocab_size: int = len(LETTERS), *, seed: int = 0, kind: Any = LlamaForCausalLM, **options) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=32, **{**sizes, **ids, **options})
    return kind(config).eval()


class ScriptedPPO(PPOTrainer):
    """Says what the script has for a prompt's ids, in place of what the policy would."""

    script: dict[tuple[int, ...], list[int]]

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        return [list(self.script[tuple(ids)]) for ids in prompt_ids]


def count_a(completion_ids, **_) -> list[float]:
    """How many of an answer's words are `a`."""
    return [float(ids.count(LETTERS.convert_tokens_to_ids("a"))) for ids in completion_ids]


def ppo(folder, rows=None, *, reward=count_a, model=None, tokenizer=LETTERS, kind=PPOTrainer, script=None, **options):
    """A trainer; what is no setting of PPOConfig goes to the trainer."""
    fields = PPOConfig.__dataclass_fields__
    settings = {"per_device_train_batch_size": 4, "max_completion_length": 4, "max_steps": 2, **SETTINGS}
    settings.update({key: options.pop(key) for key in [*options] if key in fields})
    rows = [{"prompt": f"ask {letter}"} for letter in "abcd"] if rows is None else rows
    run = kind(
        small_model() if model is None else model,
        reward,
        PPOConfig(str(folder), **settings),
        train_dataset=rows,
        processing_class=tokenizer,
        **options,
    )
    if script is not None:
        run.script = {
            tuple(tokenizer(prompt)["input_ids"]): tokenizer(text)["input_ids"] for prompt, text in script.items()
        }
    return run


def logged(run: PPOTrainer, key: str) -> list[float]:
    """What was logged under a key, step after step."""
    return [log[key] for log in run.state.log_history if log.get(key) is not None]
