"""Whether a model predicts each token from those before it: by what it is, and by a probe."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_objectives.errors import ConfigError
from hf_objectives.evaluation.head import unwrapped
from hf_objectives.evaluation.logits import virtual_tokens
from hf_objectives.evaluation.vocabulary import check_vocabulary

_OTHER_HEADS = re.compile(
    r"For(\w*Classification|\w*QuestionAnswering|MultipleChoice|MaskedLM|NextSentencePrediction)$"
)
_LENGTH = 8  # tokens before the change, and as many after it


def refuse_other_models(model: Any, tokenizer: Any = None, *, own_loss: bool = False) -> None:
    """Refuse a model that does not predict each token from those before it, or has no embedding for one of the tokenizer.

    A model of one's own is taken if its forward returns logits of all positions; nothing is known of it. The path of a model
    is not opened.

    Args:
        model: the model, or its path.
        tokenizer: its tokenizer, or None.
        own_loss: whether the trainer has what a model adds to its own loss.

    Raises:
        ConfigError: says what the model is.
        TokenizerError: see `check_vocabulary`.
    """
    check_vocabulary(tokenizer, model)
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
    elif _is_bidirectional(inner):
        reason = (
            "lets each token see those after it, which it would have to predict; set is_decoder=True (BERT), "
            "causal=True (XLM) or use_bidirectional_attention=False in its config"
        )
    elif type(inner).__module__.startswith("transformers.") and not _has_head(inner):
        reason = "has no language-model head; load a causal language model (AutoModelForCausalLM)"
    elif own_loss and getattr(text, "z_loss_coefficient", None):
        reason = (
            f"adds z_loss_coefficient={text.z_loss_coefficient} to its own loss, over all tokens; set it to 0 in the config, "
            "and z_loss in PerplexityTrainingArguments, which is over trained tokens"
        )
    if reason is not None:
        raise ConfigError(f"{name} {reason}")


def _has_head(model: PreTrainedModel) -> bool:
    """Whether the model, or one inside it that writes its text, has output embeddings."""
    inside = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return any(module.get_output_embeddings() is not None for module in inside)


def _is_bidirectional(model: PreTrainedModel) -> bool:
    """Whether a text model was built so that tokens see those after them (BERT as a language model, EmbeddingGemma)."""
    if model.config.get_text_config() is not model.config or getattr(model.config, "causal", False):
        return False  # modules that read pictures or sounds are bidirectional, the text's are not; XLM says `causal`
    if getattr(model.config, "use_bidirectional_attention", None) in (True, "all"):
        return True
    if type(model).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return False
    return any(getattr(module, "is_decoder", None) is False for module in model.modules())


def probe_causality(model: nn.Module) -> None:
    """Change the second half of a text, and require the logits of the first half to stay.

    The model runs in evaluation mode, on its device, in its dtype; mode and random state stay as they were. What moves may be
    four times what the same change moves in another row of a batch: experts that share their batches round otherwise.
    Only text models of transformers are asked. Of others, and of those that learn a prompt (PEFT), nothing is known.

    Args:
        model: a language model, wrapped or not.

    Raises:
        ConfigError: a token sees those after it; such a model's loss is no loss of next tokens.
    """
    inner = unwrapped(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if not isinstance(inner, PreTrainedModel) or virtual_tokens(model) or inner.config.is_encoder_decoder:
        return
    if inner.config.get_text_config() is not inner.config:
        return  # a random id could stand for a picture
    draw = torch.Generator().manual_seed(0)
    size = inner.config.vocab_size
    ids = torch.randint(0, size, (1, 2 * _LENGTH), generator=draw)
    other = (ids + torch.randint(1, max(2, size), ids.shape, generator=draw)) % size
    other[:, :_LENGTH] = ids[:, :_LENGTH]
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # two shapes that training never has would be compiled
            change, noise = (
                float((probed_logits(model, a)[0] - probed_logits(model, b)[0])[:_LENGTH].abs().max())
                for a, b in ((ids, other), (ids.view(2, -1), other.view(2, -1)))
            )
    finally:
        model.train(was_training)
    if not change <= 4 * noise:
        raise ConfigError(
            f"{type(inner).__name__} lets a token see those after it, which it would have to predict: changing a later token "
            f"moved earlier logits by {change:.3g}. Load a causal language model"
        )


@torch.no_grad()
def probed_logits(model: nn.Module, input_ids: Tensor, **inputs: Any) -> Tensor:
    """Logits [rows, tokens, vocabulary] in float32; dropout draws the same numbers in every call."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return model(input_ids=input_ids.to(device), **inputs, use_cache=False).logits.float()
