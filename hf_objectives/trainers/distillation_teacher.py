"""What distillation asks of a teacher: the student's vocabulary, and to be another model than the student."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import probed_logits
from hf_objectives.trainers.hf_compat import origin_of

logger = logging.getLogger(__name__)
_TOKENS = 16  # of the comparison of both models


def check_sizes(student: Any, teacher: Any, args: Any) -> None:
    """Refuse models, or paths of models, whose vocabularies are of different sizes.

    Raises:
        ConfigError: names both sizes.
    """
    sizes = [
        _size(student, (args.model_init_kwargs or {}).get("revision"), args),
        _size(teacher, args.teacher_model_revision, args),
    ]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the student has a vocabulary of {sizes[0]} ids and the teacher one of {sizes[1]}; distillation compares their "
            "distributions id by id. Take a teacher of the student's family and vocabulary (where they differ only in unused "
            "ids at the end, resize_token_embeddings of one to the size of the other), or trl's GOLDTrainer"
        )


def _size(model: Any, revision: str | None, args: Any) -> int:
    if isinstance(model, str):
        options = {"revision": revision} if revision else {}
        config = AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code, **options)
    else:
        config = model.config
    return int(config.get_text_config().vocab_size)


def teacher_tokenizer(teacher: Any, args: Any) -> Any:
    """The tokenizer in the folder or repository that a teacher came from.

    Raises:
        ConfigError: it came from none, or there is none.
    """
    origin, asked = origin_of(teacher), "pass teacher_processing_class, the tokenizer that the teacher was trained with"
    if not origin:
        raise ConfigError(
            f"the teacher comes from no folder and no repository, so that its tokenizer is unknown; {asked}"
        )
    options = {"revision": args.teacher_model_revision} if args.teacher_model_revision else {}
    try:
        return AutoTokenizer.from_pretrained(origin, trust_remote_code=args.trust_remote_code, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the teacher's tokenizer cannot be read from {origin} ({reason:.200}); {asked}") from error


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Refuse tokenizers in which an id means two tokens. A warning tells of another chat template.

    Raises:
        ConfigError: names the first id that differs.
    """
    ours, theirs = ({i: token for token, i in one.get_vocab().items()} for one in (student, teacher))
    for i in sorted(ours.keys() | theirs.keys()):
        if ours.get(i) != theirs.get(i):
            raise ConfigError(
                f"id {i} is {ours.get(i)!r} for the student's tokenizer and {theirs.get(i)!r} for the teacher's; expected "
                "one vocabulary, since distillation compares distributions id by id. Take a teacher with the student's "
                "tokenizer, or trl's GOLDTrainer"
            )
    templates = [getattr(one, "chat_template", None) for one in (student, teacher)]
    if templates[0] != templates[1] and templates[1]:
        logger.warning(
            "the teacher has another chat template than the student, and reads conversations in the student's; set the "
            "student's tokenizer.chat_template to the teacher's where the student has to learn it"
        )


def refuse_same_model(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that computes what the student does: the divergence would be 0, and nothing would be learnt.

    Raises:
        ConfigError: says so.
    """
    config: Any = student.config
    ids = torch.arange(1, 1 + _TOKENS)[None] % int(config.get_text_config().vocab_size)
    modes = {module: module.training for model in (student, teacher) for module in model.modules()}
    try:
        found = [probed_logits(model.eval(), ids).cpu() for model in (student, teacher)]
    finally:
        for module, is_training in modes.items():
            module.training = is_training
    if torch.equal(*found):
        raise ConfigError(
            "teacher_model gives the student's own logits: the divergence is 0 and nothing would be learnt; expected another "
            "model than the student, such as a larger one of its family"
        )
