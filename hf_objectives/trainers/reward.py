"""A Trainer of reward models: TRL's, with generation-exact rows, scores read at the end of the text, and exact figures."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput
from trl import RewardTrainer
from trl.data_utils import get_dataset_column_names
from trl.trainer.reward_trainer import DataCollatorForPreference

from hf_objectives.distributed import gather_objects
from hf_objectives.errors import ConfigError, FormatError
from hf_objectives.evaluation import PairRewards
from hf_objectives.labels import encode_pair
from hf_objectives.trainers.guards import check_stream
from hf_objectives.trainers.score_position import check_batch, check_vocabulary, read_past_end, spare_pad_token

logger = logging.getLogger(__name__)

_SIDES = ("chosen_ids", "rejected_ids")
_LENGTHS = ("chosen_length", "rejected_length")
_ROW, _BATCH = "row_number", "pair_rows"
# The figures that TRL means over batches, in `_metrics`; ours are exact and stand in their place.
REPLACED = ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")


def encode_reward_row(
    tokenizer: Any,
    row: Mapping[str, Any],
    *,
    max_length: int | None = None,
    control_tokens: str = "plain",
    source: str | None = None,
    row_index: int | None = None,
) -> dict[str, Any]:
    """One preference row as `RewardModelTrainer` takes it.

    Args:
        tokenizer, row, max_length, control_tokens, source, row_index: see `encode_pair`.

    Returns:
        `chosen_ids`, `rejected_ids`, lists of int, each the whole conversation; `chosen_length`, `rejected_length`, tokens
        that the model would produce of each answer; `margin` where the row has one.

    Raises:
        DataError: see `encode_pair`.
    """
    pair = encode_pair(
        tokenizer,
        row,
        max_length=max_length,
        control_tokens=control_tokens,
        source=source,
        row_index=row_index,
    )
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


class RewardModelTrainer(RewardTrainer):
    """`trl.RewardTrainer`, a drop-in with its signature, its loss (Bradley and Terry's) and its options.

    Rows are those of `encode_pair`: any preference format, no control tokens out of a user's text, errors that name the
    row. A row longer than `max_length` loses the beginning of its prompt; none is dropped. Rows that came as `chosen_ids` and
    `rejected_ids` are taken as they are, and are an error where they are too long.

    The score is read at the last token of a text: where the padding token is EOS, or missing, tokenizer and model are given
    another of the tokenizer's (see `score_position`), saved with them.

    `evaluate` adds, each row counted once whatever batch size and number of processes:

    - `eval_loss`, `eval_margin`, `eval_min_reward`, `eval_mean_reward`, `eval_max_reward`: the parent's, over rows and not
      over batches;
    - `eval_accuracy`: the share of the `eval_num_pairs` pairs whose chosen answer has the higher reward, a tie counting half
      (`eval_ties` of them), with `eval_accuracy_low` and `eval_accuracy_high`, its 95 % interval (Wilson);
    - `eval_expected_calibration_error`: how far the model's confidence in its choices, sigmoid of the margin, is from how
      often they are right, in ten bins (see `calibration.reliability`);
    - `eval_length_bias`: Spearman's correlation of reward and tokens over all answers; `eval_longer_preferred`: of the pairs
      of two lengths, the share where the longer answer has the higher reward, and `eval_longer_accuracy`, the share where it
      is the chosen one, which is what preferring the longer one would reach. Absent where there are no two lengths.

    After an evaluation `pair_rewards` holds its rows.

    Args:
        args: `RewardModelConfig`, or TRL's `RewardConfig`.

    Raises:
        ConfigError: the padding token would end texts, and there is no other.
        TokenizerError: tokens without an embedding.
        DataError: a row that cannot be used.
    """

    model: Any
    args: Any
    processing_class: Any
    train_dataset: Any
    _signature_columns: Any

    def __init__(self, model: Any, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        self.pair_rewards: PairRewards | None = None
        self._seen: list[tuple[Tensor, Tensor, Tensor | None]] = []
        super().__init__(model, args, *rest, **kwargs)
        config = self.model.config
        embeddings = self.model.get_input_embeddings()
        self._num_embeddings = getattr(embeddings, "num_embeddings", config.get_text_config().vocab_size)
        self._own_pad_token()
        check_vocabulary(self.processing_class, self._num_embeddings)
        self._say_if_head_is_new()
        self.data_collator = _Numbered(
            self.data_collator,
            pad_token_id=config.get_text_config().pad_token_id,
            token=self.processing_class.pad_token,
            num_embeddings=self._num_embeddings,
            allow_eos_padding=getattr(self.args, "allow_eos_padding", False),
        )

    # -- where the score is read -----------------------------------------------------------------------------------

    def _own_pad_token(self) -> None:
        """Pad with a token that ends no text, if there is one."""
        tokenizer = self.processing_class
        if tokenizer.pad_token_id != tokenizer.eos_token_id:
            return
        spare = spare_pad_token(tokenizer, self._num_embeddings)
        if spare is None:
            allowed = getattr(self.args, "allow_eos_padding", False)
            first = next(iter(self.train_dataset))
            if not allowed and any(first[side][-1] == tokenizer.pad_token_id for side in _SIDES):
                raise ConfigError(read_past_end(tokenizer.pad_token, "row 0"))
            return
        logger.info("padding with %r and not with EOS, so that scores are read at a closing EOS", spare)
        tokenizer.pad_token = spare
        self.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if isinstance(self.data_collator, DataCollatorForPreference):
            self.data_collator = dataclasses.replace(self.data_collator, pad_token_id=tokenizer.pad_token_id)

    def _say_if_head_is_new(self) -> None:
        made_as = self.model.config.architectures or []
        if not any("SequenceClassification" in name for name in made_as):
            logger.info(
                "the model was no reward model before (%s): its score head is new", ", ".join(made_as) or "built"
            )

    # -- rows ------------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Any, processing_class: PreTrainedTokenizerBase, args: Any, dataset_name: str
    ) -> Any:
        names = get_dataset_column_names(dataset)
        if "chosen_input_ids" in names and "chosen_ids" not in names:
            unlimited = copy.copy(args)
            unlimited.max_length = None
            dataset = super()._prepare_dataset(dataset, processing_class, unlimited, dataset_name)  # new names only
            names = get_dataset_column_names(dataset)
        if dataset_name != "train":
            check_stream(dataset, args.dataloader_num_workers, dataset_name)
        described = {}
        if isinstance(dataset, Dataset):
            described = {"num_proc": args.dataset_num_proc, "desc": f"Encoding {dataset_name}"}
        settings: dict[str, Any] = {"max_length": args.max_length, "source": dataset_name}
        encode: Any = _measured
        remove: list[str] = []
        if not set(_SIDES) <= set(names):
            settings |= {"tokenizer": processing_class, "control_tokens": getattr(args, "control_tokens", "plain")}
            if isinstance(dataset, Dataset) and "margin" in names and dataset.features["margin"].dtype == "null":
                dataset = dataset.remove_columns("margin")  # of other sources, and none of these rows has one
            encode, remove = _encoded, [name for name in get_dataset_column_names(dataset) if name != "margin"]
        with args.main_process_first(desc=f"encoding {dataset_name}"):
            return dataset.map(encode, with_indices=True, fn_kwargs=settings, remove_columns=remove, **described)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), *_LENGTHS, _ROW]))

    # -- loss and evaluation ---------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The parent's; in an evaluation the rewards of each row are kept."""
        rows = inputs.pop(_BATCH, None)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if rows is not None and not self.model.training:
            self._seen.append((rows, outputs.logits.detach().squeeze(-1).float(), inputs.get("margin")))
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The parent's, with figures over all rows of all ranks, each once.

        Raises:
            NonFiniteError: a reward that is not finite; names its row.
        """
        self._seen = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        # On the host from here: a rank's own rows, float64, gathered once.
        self.pair_rewards = PairRewards.of_ranks(gather_objects(_joined(self._seen)))
        self._seen = []
        figures = self.pair_rewards.metrics(center=self.args.center_rewards_coefficient)
        metrics: Any = output.metrics
        metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        # The parent's `log` overwrites with means of what each batch left here.
        for name in REPLACED:
            self._metrics["eval"][name] = [figures[name]]
        return output

    # -- saving ----------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Learned absolute positions count from the first column: padded on the left, such a model scores otherwise.
        side, self.processing_class.padding_side = self.processing_class.padding_side, "right"
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.processing_class.padding_side = side
        if hasattr(self.model, "peft_config"):
            _keep_head(self.model, Path(output_dir or self.args.output_dir), state_dict)


@dataclasses.dataclass
class _Numbered:
    """A collator of pairs whose batches also say which rows they hold and how long the answers are, int64 [n, 3]; each
    batch is held against what the model will read."""

    collate: Any
    pad_token_id: int
    token: str
    num_embeddings: int
    allow_eos_padding: bool

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ours = (_ROW, *_LENGTHS)
        batch = self.collate([{k: v for k, v in one.items() if k not in ours} for one in examples])
        numbered = all(name in one for one in examples for name in ours)
        check_batch(
            batch["input_ids"],
            batch.get("attention_mask"),
            pad_token_id=self.pad_token_id,
            num_embeddings=self.num_embeddings,
            rows=[one[_ROW] for one in examples] if numbered else range(len(examples)),
            token=self.token,
            allow_eos_padding=self.allow_eos_padding,
        )
        if numbered:
            batch[_BATCH] = torch.tensor([[one[name] for name in ours] for one in examples])
        return batch


def _encoded(row: Mapping[str, Any], index: int, *, tokenizer: Any, source: str, **settings: Any) -> dict[str, Any]:
    return {**encode_reward_row(tokenizer, row, source=source, row_index=index, **settings), _ROW: index}


def _measured(row: Mapping[str, Any], index: int, *, max_length: int | None, source: str) -> dict[str, Any]:
    """A row of ids: checked, numbered, and with the lengths of its answers, what follows the tokens that both begin with."""
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
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = min(len(chosen), len(rejected)) if shared is None else shared
    return {"chosen_length": len(chosen) - shared, "rejected_length": len(rejected) - shared, _ROW: index}


def _joined(seen: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> PairRewards:
    """A rank's batches as arrays."""
    rows = [rows for rows, _, _ in seen]
    sides = [rewards.chunk(2) for _, rewards, _ in seen]
    asked = [torch.zeros(len(rows)) if margin is None else margin for rows, _, margin in seen]
    number, *lengths = (_array([part[:, i] for part in rows], np.int64) for i in range(3))
    chosen, rejected = (_array([pair[i] for pair in sides], np.float64) for i in range(2))
    return PairRewards(number, chosen, rejected, lengths[0], lengths[1], _array(asked, np.float64))


def _array(parts: Sequence[Tensor], dtype: Any) -> np.ndarray:
    return np.concatenate([part.cpu().numpy() for part in parts]).astype(dtype) if parts else np.zeros(0, dtype)


def _keep_head(model: Any, folder: Path, state_dict: Any) -> None:
    """Put a score head that the adapter does not hold beside it: a new head is drawn at random, and a loaded adapter would
    score with another one."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import load_file, save_file

    weights = folder / SAFETENSORS_WEIGHTS_NAME
    config_file = folder / "adapter_config.json"
    if not weights.exists():
        return
    heads = ("score", "classifier")
    config = json.loads(config_file.read_text())
    held = load_file(weights)
    if any(f".{head}." in name for name in held for head in heads):
        return
    state = model.state_dict() if state_dict is None else state_dict
    head = {
        name: value.detach().cpu().contiguous()
        for name, value in state.items()
        if any(name.startswith(f"base_model.model.{head}.") for head in heads)
    }
    if not head:
        return
    save_file({**held, **head}, weights, metadata={"format": "pt"})
    names = {name.split(".")[2] for name in head}
    config["modules_to_save"] = sorted({*(config.get("modules_to_save") or []), *names})
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True))
