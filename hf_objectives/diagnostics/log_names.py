"""The names of a log's columns: every tracker's under the Trainer's own, compared without case."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

#: Names of the step, best first: a tracker's own counter comes after the step that the trainer gave it.
STEP_KEYS = ("train/global_step", "trainer/global_step", "global_step", "step", "iteration", "iter", "_step", "steps")
#: Columns that say whose a line is: of training or an evaluation, and of which run.
SPLIT_KEYS = frozenset(("split", "phase", "mode"))
RUN_KEYS = ("run_name", "run")
#: What a curve is called where the log has no other of that name: means over a run, and a test set.
STAND_INS = {"train_loss": "loss", "test_loss": "eval_loss", "test_perplexity": "eval_perplexity"}
_TRAIN = frozenset(("train", "training"))
_EVAL = frozenset(("eval", "evaluation", "val", "valid", "validation", "dev"))
_NAMES = {
    **dict.fromkeys(("loss", "train_loss", "training_loss", "train_loss_step", "loss_step"), "loss"),
    **dict.fromkeys(("train_loss_epoch", "loss_epoch"), "train_loss"),
    **dict.fromkeys(
        ("eval_loss", "val_loss", "valid_loss", "validation_loss", "dev_loss", "val_loss_epoch"), "eval_loss"
    ),
    **dict.fromkeys(("lr", "learning_rate"), "learning_rate"),
    **dict.fromkeys(("gradient_norm", "grad_norm"), "grad_norm"),
    **{name: name for name in ("test_loss", "perplexity", "eval_perplexity", "epoch")},
}
_BY_SPLIT = ("loss", "perplexity")  # of which TensorBoard's tutorials write Loss/train and Loss/test
_OF_A_LINE = frozenset(("epoch", "learning_rate"))  # the same, whatever the line measures
_WORDS = frozenset(("timestamp", "_timestamp", "_runtime", "time", "wall_time", "date", *SPLIT_KEYS, *RUN_KEYS))


def _plain(key: Any) -> str:
    return key.strip().lower().replace(" ", "_").replace("-", "_") if isinstance(key, str) else ""


def canonical(key: str) -> str:
    """A key under the Trainer's name for it: val_loss and eval/loss are eval_loss, train/loss and Loss/train are loss."""
    plain = _plain(key)
    if plain in _NAMES:
        return _NAMES[plain]
    head, _, tail = plain.partition("/")
    if head in _BY_SPLIT and tail in _TRAIN | _EVAL | {"test"}:
        return of_split(head, tail)
    rest = key.strip()[len(head) + 1 :]
    if not tail or head not in _TRAIN | _EVAL | {"test"}:
        return key.strip()
    if tail == "train_loss":  # a tracker's name for the mean over the whole run, which the Trainer logs last
        return tail
    return of_split(rest, head)


def of_split(key: str, split: str) -> str:
    """The name of what was measured on a split: of training, of evaluation, of a test set, or of another by its name."""
    name, plain = canonical(key), _plain(split)
    if plain in _TRAIN or name in _OF_A_LINE or name.startswith(("eval_", "test_")):
        return name
    if plain in _EVAL:
        return f"eval_{name}"
    return f"test_{name}" if plain == "test" else f"eval_{split.strip()}_{name}"


def step_of(keys: Iterable[Any]) -> str | None:
    """The key that holds the step."""
    plain = {_plain(key): key for key in keys}
    return next((plain[name] for name in STEP_KEYS if name in plain), None)


def split_of(keys: Iterable[Any]) -> str | None:
    """The key that names a split."""
    return next((key for key in keys if _plain(key) in SPLIT_KEYS), None)


def is_curve(key: str) -> bool:
    """Whether a column may be a curve: no step, no time, no name, no index that pandas wrote."""
    plain = _plain(key)
    return plain not in STEP_KEYS and plain not in _WORDS and plain != "" and not plain.startswith("unnamed:")
