"""Align a chat model with preference pairs by DPO, and report what it gained and what it cost the language model.

    accelerate launch recipes/dpo.py --config dpo_quickstart --model_name_or_path runs/quickstart
    accelerate launch recipes/dpo.py --config smollm2_dpo \\
        --model_name_or_path path/or/id --dataset_name pairs.jsonl --output_dir runs/mine
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from trl import get_peft_config

from hf_objectives.labels import encode_pair
from hf_objectives.recipes.data_arguments import WatchedArguments
from hf_objectives.recipes.models import RecipeModel, load_policy
from hf_objectives.recipes.pairs import PairRecipe
from hf_objectives.trainers import PerplexityDPOConfig, PerplexityDPOTrainer
from hf_objectives.types import option


@dataclass
class DpoData(WatchedArguments):
    """Where the pairs come from, and what is watched beside them."""

    chat_template: str | None = option(None, "A template, or the path of a .jinja file.")


class Dpo(PairRecipe):
    """Direct preference optimisation."""

    arguments = (RecipeModel, DpoData, PerplexityDPOConfig)
    objective = "dpo"
    of_model_alone = r"eval_(?!reference)\w+_perplexity"
    encode_row = encode_pair
    encoding_options = ("max_length", "train_on", "control_tokens")
    built_in = (8_000, 500)
    figures: ClassVar[dict[str, str]] = {
        "eval_chosen_perplexity": "perplexity of chosen answers",
        "eval_rejected_perplexity": "perplexity of rejected answers",
        "eval_reference_chosen_perplexity": "  chosen, under the reference",
        "eval_reference_rejected_perplexity": "  rejected, under the reference",
        "eval_rewards/accuracies": "reward accuracy",
        "eval_rewards/margins": "reward margin",
        "eval_logps_change/chosen": "change of chosen, nats per token",
        "eval_logps_change/rejected": "change of rejected, nats per token",
    }

    def build_trainer(self) -> PerplexityDPOTrainer:
        """Load the policy and the pairs; the reference is the policy as it came."""
        data, args = self.data, self.args
        model, tokenizer = load_policy(self.model_config, **self.loading)
        self.load_rows(tokenizer)
        lora = get_peft_config(self.model_config)
        # A copy, since the parent would load the model by its name again. LoRA's reference is the model without it.
        reference = None if lora or args.precompute_ref_log_probs else copy.deepcopy(model)
        return PerplexityDPOTrainer(
            model,
            reference,
            args,
            train_dataset=self.train_rows,
            eval_dataset=self.encode(self.held_out, tokenizer) if self.held_out else None,
            processing_class=tokenizer,
            peft_config=lora,
            eval_lm_datasets=data.watched(),
        )


main = Dpo.run
