"""A Trainer of reward models: TRL's, with exact rows, scores read at the end of the text, and exact figures."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput
from trl import RewardConfig

from hf_objectives.distributed import gather_objects
from hf_objectives.errors import ConfigError, FormatError
from hf_objectives.evaluation import PairRewards, check_vocabulary
from hf_objectives.labels import encode_pair
from hf_objectives.trainers.checkpoints import CheckpointSettings
from hf_objectives.trainers.guards import map_numbered
from hf_objectives.trainers.refusals import refuse_fp16_on_cpu
from hf_objectives.trainers.score_position import check_batch, read_past_end, spare_pad_token
from hf_objectives.trainers.shared_prompt_scores import SharedPromptScores
from hf_objectives.trainers.trl_compat import RewardCollator, RewardHooks, get_dataset_column_names
from hf_objectives.types import check_one_of, option

logger = logging.getLogger(__name__)

_SIDES = ("chosen_ids", "rejected_ids")
_LENGTHS = ("chosen_length", "rejected_length")
_ROW, _BATCH = "row_number", "pair_rows"
# TRL logs the means of its batches under these names. Ours are exact and replace them.
REPLACED = ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")
_HEADS = ("score", "classifier")


def encode_reward_row(
    tokenizer: Any,
    row: Mapping[str, Any],
    *,
    max_length: int | None = None,
    control_tokens: str = "plain",
    source: str | None = None,
    row_index: int | None = None,
) -> dict[str, Any]:
    """Encode one preference row for `RewardModelTrainer`.

    Args:
        tokenizer, row, max_length, control_tokens, source, row_index: see `encode_pair`.

    Returns:
        `chosen_ids`, `rejected_ids`: lists of int, each the whole conversation; `chosen_length`, `rejected_length`: number of
        tokens that the model would produce of each answer; `margin` where the row has one.

    Raises:
        DataError: see `encode_pair`.
    """
    place: dict[str, Any] = {"source": source, "row_index": row_index}
    pair = encode_pair(tokenizer, row, max_length=max_length, control_tokens=control_tokens, **place)
    encoded: dict[str, Any] = {
        f"{side}_ids": pair["prompt_ids"] + pair[f"{side}_ids"] for side in ("chosen", "rejected")
    }
    encoded |= {f"{side}_length": sum(pair[f"{side}_mask"]) for side in ("chosen", "rejected")}
    if "margin" in row:
        if row["margin"] is None:
            raise FormatError(
                "margin is missing; expected a number in every row, or no such column", source=source, row=row_index
            )
        encoded["margin"] = float(row["margin"])
    return encoded


@dataclasses.dataclass
class RewardModelConfig(CheckpointSettings, RewardConfig):
    """`trl.RewardConfig` with the settings of encoding.

    `max_length` has another meaning than for the parent, which drops longer rows: here their prompt is shortened, see
    `encode_pair`.

    Args:
        control_tokens: see `encode_chat`.
        allow_eos_padding: where EOS is the only token to pad with, read the score of a text that ends with EOS before it, as
            TRL does. Without it, such a text is an error.
        padding_free: pairs are packed, and each prompt is computed once; docs/alignment.md.

    Raises:
        ConfigError: an unknown `control_tokens`.
    """

    control_tokens: str = option("plain", "plain or allow.")
    allow_eos_padding: bool = option(
        False, "Pad with EOS where there is nothing else, and read scores before a closing EOS."
    )
    padding_free: bool = option(False, "Pack pairs, and compute each prompt once.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("control_tokens", self.control_tokens, ("plain", "allow"))


class RewardModelTrainer(RewardHooks):
    """`trl.RewardTrainer` with its signature, its loss (Bradley and Terry's) and its options.

    Rows are those of `encode_pair`: any preference format, no control tokens out of a user's text, errors that name the row.
    A row longer than `max_length` loses the beginning of its prompt; none is dropped. Rows with `chosen_ids` and
    `rejected_ids` are used as they are, and are an error where they are too long.

    The score is read at the last token of a text. Where the padding token is EOS, or missing, tokenizer and model get another
    one (see `score_position`), which is saved with them.

    `evaluate` adds figures over all rows, each once, whatever the batch size and number of processes:

    - `eval_loss`, `eval_margin`, `eval_min_reward`, `eval_mean_reward`, `eval_max_reward`: the parent's, over rows and not
      over batches;
    - `eval_accuracy`: the share of the `eval_num_pairs` pairs whose chosen answer has the higher reward. A tie counts half
      (`eval_ties` of them). `eval_accuracy_low` and `eval_accuracy_high` are its 95 % interval (Wilson);
    - `eval_expected_calibration_error`: the difference between the model's confidence in its choices, sigmoid of the margin,
      and their accuracy, in ten bins (see `calibration.reliability`);
    - `eval_length_bias`: Spearman's correlation of reward and tokens over all answers. `eval_longer_preferred`: the share of
      the pairs of two lengths where the longer answer has the higher reward. `eval_longer_accuracy`: the share of them where
      the longer answer is the chosen one, which a model that prefers the longer one would reach. Absent where there are no
      two lengths.

    After an evaluation `pair_rewards` holds its rows.

    Args:
        args: `RewardModelConfig`, or TRL's `RewardConfig`.

    Raises:
        ConfigError: the padding token would end texts, and there is no other; or what `padding_free` does not go with.
        TokenizerError: tokens without an embedding.
        DataError: a row that cannot be used.
        PackingLeakError: under `padding_free`, before a model is used that does not give the numbers of the padded batch.
    """

    extra_columns = (*_LENGTHS, _ROW)

    def __init__(self, model: Any, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        self.pair_rewards: PairRewards | None = None
        self._seen: list[tuple[Tensor, Tensor, Tensor | None]] = []
        refuse_fp16_on_cpu(args)
        super().__init__(model, args, *rest, **kwargs)
        self._shared = SharedPromptScores(self) if getattr(self.args, "padding_free", False) else None
        if self._shared is not None:
            self._shared.install()
        config = self.model.config
        embeddings = self.model.get_input_embeddings()
        self._num_embeddings = getattr(embeddings, "num_embeddings", config.get_text_config().vocab_size)
        self._allow_eos_padding = getattr(self.args, "allow_eos_padding", False)
        self._own_pad_token()
        check_vocabulary(self.processing_class, self.model)
        made_as = config.architectures or []
        if not any("SequenceClassification" in name for name in made_as):
            logger.info(
                "the model was no reward model before (%s): its score head is new", ", ".join(made_as) or "built"
            )
        self.data_collator = _Numbered(
            self.data_collator,
            {
                "pad_token_id": config.get_text_config().pad_token_id,
                "token": self.processing_class.pad_token,
                "num_embeddings": self._num_embeddings,
                "allow_eos_padding": self._allow_eos_padding,
            },
        )

    def _own_pad_token(self) -> None:
        """Pad with a token that ends no text, if there is one."""
        tokenizer = self.processing_class
        if tokenizer.pad_token_id != tokenizer.eos_token_id:
            return
        spare = spare_pad_token(tokenizer, self._num_embeddings)
        if spare is None:
            first = next(iter(self.train_dataset))
            if not self._allow_eos_padding and any(first[side][-1] == tokenizer.pad_token_id for side in _SIDES):
                raise ConfigError(read_past_end(tokenizer.pad_token, "row 0"))
            return
        logger.info("padding with %r and not with EOS, so that scores are read at a closing EOS", spare)
        tokenizer.pad_token = spare
        self.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if isinstance(self.data_collator, RewardCollator):
            self.data_collator = dataclasses.replace(self.data_collator, pad_token_id=tokenizer.pad_token_id)

    # -- rows ------------------------------------------------------------------------------------------------------

    def prepare_dataset(
        self, dataset: Any, processing_class: PreTrainedTokenizerBase, args: Any, dataset_name: str
    ) -> Any:
        """Encode and number the rows."""
        names = get_dataset_column_names(dataset)
        if "chosen_input_ids" in names and "chosen_ids" not in names:
            unlimited = copy.copy(args)
            unlimited.max_length = None
            dataset = super().prepare_dataset(dataset, processing_class, unlimited, dataset_name)  # only renames
            names = get_dataset_column_names(dataset)
        settings: dict[str, Any] = {"max_length": args.max_length, "source": dataset_name}
        if set(_SIDES) <= set(names):
            return map_numbered(dataset, _measured, dataset_name, args, fn_kwargs=settings)
        settings |= {"tokenizer": processing_class, "control_tokens": getattr(args, "control_tokens", "plain")}
        if isinstance(dataset, Dataset) and "margin" in names and dataset.features["margin"].dtype == "null":
            dataset = dataset.remove_columns("margin")  # the column is from other sources; no row here has a margin
        others = [name for name in get_dataset_column_names(dataset) if name != "margin"]
        return map_numbered(dataset, _encoded, dataset_name, args, fn_kwargs=settings, remove_columns=others)

    # -- loss and evaluation ---------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the parent's loss; an evaluation keeps the rewards of each row."""
        rows = inputs.pop(_BATCH, None)
        if self._shared is not None:
            self._shared.prove(model)
        with nullcontext() if self._shared is None else self._shared.packing(model):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if rows is not None and not self.model.training:
            self._seen.append((rows, outputs.logits.detach().squeeze(-1).float(), inputs.get("margin")))
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as the parent does, with figures over all rows of all ranks, each once."""
        self._seen = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.pair_rewards = PairRewards.of_ranks(gather_objects(_joined(self._seen)))
        self._seen = []
        figures = self.pair_rewards.metrics(center=self.args.center_rewards_coefficient)
        self.add_figures(output, figures, metric_key_prefix, REPLACED)
        return output

    def save_weights(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write model and tokenizer, padding on the right, and the score head beside an adapter."""
        # Learned absolute positions count from the first column: padded on the left, such a model gives other scores.
        side, self.processing_class.padding_side = self.processing_class.padding_side, "right"
        try:
            super().save_weights(output_dir, state_dict)
        finally:
            self.processing_class.padding_side = side
        if hasattr(self.model, "peft_config"):
            _keep_head(self.model, Path(output_dir or self.args.output_dir), state_dict)


@dataclasses.dataclass
class _Numbered:
    """A collator of pairs that checks each batch by `check_batch`, and adds numbers and lengths of its rows, int64 [n, 3]."""

    collate: Any
    checks: dict[str, Any]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        extra = (_ROW, *_LENGTHS)
        batch = self.collate([{k: v for k, v in example.items() if k not in extra} for example in examples])
        numbered = all(name in example for example in examples for name in extra)
        rows = [example[_ROW] for example in examples] if numbered else range(len(examples))
        check_batch(batch["input_ids"], batch.get("attention_mask"), rows=rows, **self.checks)
        if numbered:
            batch[_BATCH] = torch.tensor([[example[name] for name in extra] for example in examples])
        return batch


def _encoded(row: Mapping[str, Any], index: int, *, tokenizer: Any, source: str, **settings: Any) -> dict[str, Any]:
    return {**encode_reward_row(tokenizer, row, source=source, row_index=index, **settings), _ROW: index}


def _measured(row: Mapping[str, Any], index: int, *, max_length: int | None, source: str) -> dict[str, Any]:
    """Check and number a row of ids. The lengths of its answers are what follows the tokens that both begin with."""
    chosen, rejected = (row[side] for side in _SIDES)
    for name, ids in zip(_SIDES, (chosen, rejected), strict=True):
        if not ids or (max_length is not None and len(ids) > max_length):
            raise FormatError(
                f"{name} has {len(ids or ())} tokens; expected 1 to max_length, {max_length}. Where its prompt ends is not "
                "known, so that nothing can be cut: leave the row out, or raise max_length",
                source=source,
                row=index,
            )
    if all(row.get(name) is not None for name in _LENGTHS):
        return {_ROW: index}
    if chosen == rejected:
        raise FormatError("chosen_ids and rejected_ids are equal; expected two answers", source=source, row=index)
    shortest = min(len(chosen), len(rejected))
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), shortest)
    return {"chosen_length": len(chosen) - shared, "rejected_length": len(rejected) - shared, _ROW: index}


def _joined(seen: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> PairRewards:
    """A rank's batches as arrays."""

    def array(parts: Sequence[Tensor], dtype: Any) -> np.ndarray:
        return np.concatenate([part.cpu().numpy() for part in parts]).astype(dtype) if parts else np.zeros(0, dtype)

    number, chosen_length, rejected_length = (array([rows[:, i] for rows, _, _ in seen], np.int64) for i in range(3))
    chosen, rejected = (array([rewards.chunk(2)[i] for _, rewards, _ in seen], np.float64) for i in range(2))
    targets = [torch.zeros(len(rows)) if margin is None else margin for rows, _, margin in seen]
    return PairRewards(number, chosen, rejected, chosen_length, rejected_length, array(targets, np.float64))


def _keep_head(model: Any, folder: Path, state_dict: Any) -> None:
    """Put a score head that the adapter does not hold beside it. Otherwise loading the adapter would draw a new head."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import load_file, save_file

    weights, config_file = folder / SAFETENSORS_WEIGHTS_NAME, folder / "adapter_config.json"
    if not weights.exists():
        return
    held = load_file(weights)
    if any(f".{head}." in name for name in held for head in _HEADS):
        return
    state = model.state_dict() if state_dict is None else state_dict
    prefixes = tuple(f"base_model.model.{head}." for head in _HEADS)
    head = {name: value.detach().cpu().contiguous() for name, value in state.items() if name.startswith(prefixes)}
    if head:
        save_file({**held, **head}, weights, metadata={"format": "pt"})
        config = json.loads(config_file.read_text())
        names = {name.split(".")[2] for name in head}
        config["modules_to_save"] = sorted({*(config.get("modules_to_save") or []), *names})
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True))
