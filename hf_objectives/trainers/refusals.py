"""What trainers refuse when they are made: arguments that would be passed over in silence, or would make numbers wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import check_vocabulary

if TYPE_CHECKING:  # `hf_compat` needs this file, and a program that shows labels needs `hf_compat`, but no model
    from transformers import PreTrainedModel

_CALLABLES = {
    "compute_metrics": "compute_metrics needs the logits of all tokens, which are never gathered; evaluate() gives exact "
    "loss, perplexity and bits per byte, and a callback's on_evaluate may add to them",
    "preprocess_logits_for_metrics": "preprocess_logits_for_metrics would never be called: logits are computed only where a "
    "token is predicted and are never gathered; leave it out",
    "compute_loss_func": "compute_loss_func would never be called: the loss is the summed nats of a step over its trained "
    "tokens. For another loss override compute_loss in a subclass, or use transformers.Trainer; z_loss, "
    "label_smoothing_factor and loss_weights in the rows are built in",
}

_OTHER_HEADS = re.compile(
    r"For(\w*Classification|\w*QuestionAnswering|MultipleChoice|MaskedLM|NextSentencePrediction)$"
)


def is_bidirectional(model: PreTrainedModel) -> bool:
    """Whether a text model was built so that tokens see those after them (BERT as a language model, EmbeddingGemma)."""
    if model.config.get_text_config() is not model.config or getattr(model.config, "causal", False):
        return False  # modules that read pictures or sounds are bidirectional, the text's are not; XLM says `causal`
    if getattr(model.config, "use_bidirectional_attention", None) in (True, "all"):
        return True
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if type(model).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return False
    return any(getattr(module, "is_decoder", None) is False for module in model.modules())


def refuse_callables(given: Mapping[str, Any]) -> None:
    """Refuse arguments of a Trainer that a loss and an evaluation of exact sums would never call.

    Raises:
        ConfigError: names the argument and what to do instead.
    """
    for name, reason in _CALLABLES.items():
        if given.get(name) is not None:
            raise ConfigError(reason)


def refuse_cut_rows(parallelism: Any, *, takes_parts: bool = False) -> None:
    """Refuse parallelism under which losses, scores or counts would be wrong.

    Context and sequence parallelism give each process a part of each row. A token at a cut has its label, or the score of its
    text, on another process.

    Args:
        parallelism: `ParallelismConfig` of accelerate, or None.
        takes_parts: whether the trainer takes the parts that context parallelism gives. It takes neither those of DeepSpeed's
            sequence parallelism, of which neither the count of tokens nor the scale of gradients has been proved, nor tensor
            parallelism: its evaluation gives every process other rows, and its logs count the tokens of each.

    Raises:
        ConfigError: names the setting.
    """
    context, sequence, tensor = (getattr(parallelism, name, None) or 1 for name in ("cp_size", "sp_size", "tp_size"))
    if sequence > 1 and takes_parts:
        raise ConfigError(
            f"parallelism_config has sp_size={sequence}: the loss over DeepSpeed's parts of rows is not proved and may be "
            f"wrong. Set sp_size to 1, and cp_size to {sequence} with FSDP2 in its place"
        )
    if tensor > 1 and takes_parts:
        raise ConfigError(
            f"parallelism_config has tp_size={tensor}: an evaluation would give the processes that share a model different "
            "rows, and logs would count each token several times. Set tp_size to 1, and dp_shard_size with FSDP2 in its place"
        )
    for name, size in (("cp_size", 1 if takes_parts else context), ("sp_size", sequence)):
        if size > 1:
            raise ConfigError(
                f"parallelism_config has {name}={size}: it gives each process a part of each row, and the label of a part's "
                f"last token lies on another process, so that losses and scores would be wrong. Set {name} to 1; FSDP and "
                "dp_shard_size share a model among processes without cutting rows, and gradient checkpointing makes room for "
                "longer ones"
            )


def refuse_data_parallel(args: Any) -> None:
    """Refuse one process with several GPUs: `DataParallel` cuts all tensors of a batch alike, bounds of documents too.

    Raises:
        ConfigError: says how to start.
    """
    if args.n_gpu > 1:
        raise ConfigError(
            f"one process with {args.n_gpu} GPUs would cut batches with torch's DataParallel, the bounds of documents among "
            "them; start one process a GPU with accelerate launch or torchrun, or let CUDA_VISIBLE_DEVICES show one"
        )


def refuse_other_models(model: Any, tokenizer: Any = None) -> None:
    """Refuse a model that does not predict each token from those before it, or has no embedding for one of the tokenizer.

    A model of one's own is taken if its forward returns logits of all positions; nothing is known of it.

    Raises:
        ConfigError: says what the model is.
        TokenizerError: see `check_vocabulary`.
    """
    check_vocabulary(tokenizer, model)
    from transformers import PreTrainedModel

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, name = getattr(inner, "config", None), type(inner).__name__
    if not isinstance(inner, PreTrainedModel) or config is None:
        return
    text = config.get_text_config(decoder=True)
    other = _OTHER_HEADS.search(name)
    reason = None
    if config.is_encoder_decoder or text.is_encoder_decoder:
        reason = "is an encoder-decoder, whose labels are not shifted against its inputs; use Seq2SeqTrainer"
    elif other and other[1] == "MaskedLM":
        reason = "is a masked language model, in which a token sees the one that it would have to predict"
    elif other:
        reason = f"has a head for {other[1]}; load a causal language model (AutoModelForCausalLM)"
    elif is_bidirectional(inner):
        reason = (
            "lets each token see those after it, which it would have to predict; set is_decoder=True (BERT), "
            "causal=True (XLM) or use_bidirectional_attention=False in its config"
        )
    elif type(inner).__module__.startswith("transformers.") and not _has_head(inner):
        reason = "has no language-model head; load a causal language model (AutoModelForCausalLM)"
    elif getattr(text, "z_loss_coefficient", None):
        reason = (
            f"adds z_loss_coefficient={text.z_loss_coefficient} to its own loss, over all tokens; set it to 0 in the config, "
            "and z_loss in PerplexityTrainingArguments, which is over trained tokens"
        )
    if reason is not None:
        raise ConfigError(f"{name} {reason}")


def _has_head(model: PreTrainedModel) -> bool:
    """Whether the model, or one inside it that writes its text, has output embeddings."""
    from transformers import PreTrainedModel

    inside = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return any(module.get_output_embeddings() is not None for module in inside)
