"""Map the column names of every tracker to the Trainer's names. Upper and lower case, spaces and hyphens do not matter."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

#: Names of the step, best first: the step that the trainer logged comes before a tracker's own counter (`_step`).
STEP_KEYS = ("train/global_step", "trainer/global_step", "global_step", "step", "iteration", "iter", "_step", "steps")
#: Columns that say which split a line was measured on, and which run it belongs to.
SPLIT_KEYS = frozenset(("split", "phase", "mode"))
RUN_KEYS = ("run_name", "run")
#: Curves that are used under another name where the log has no curve of that name: means over a run, and a test set.
STAND_INS = {"train_loss": "loss", "test_loss": "eval_loss", "test_perplexity": "eval_perplexity"}
_TRAIN = frozenset(("train", "training"))
_EVAL = frozenset(("eval", "evaluation", "val", "valid", "validation", "dev"))
_SPLITS = _TRAIN | _EVAL | {"test"}
_NAMES = {
    **dict.fromkeys(("loss", "train_loss", "training_loss", "train_loss_step", "loss_step"), "loss"),
    **dict.fromkeys(("train_loss_epoch", "loss_epoch"), "train_loss"),
    **{f"{split}_loss": "eval_loss" for split in ("eval", "val", "valid", "validation", "dev")},
    **{"val_loss_epoch": "eval_loss", "lr": "learning_rate", "gradient_norm": "grad_norm"},
    **{name: name for name in ("learning_rate", "grad_norm", "test_loss", "perplexity", "eval_perplexity", "epoch")},
}
_BEFORE_SPLIT = ("loss", "perplexity")  # TensorBoard's tutorials write Loss/train and Loss/test
_WITHOUT_SPLIT = frozenset(("epoch", "learning_rate"))  # the same on every split
_NO_CURVES = frozenset(("timestamp", "_timestamp", "_runtime", "time", "wall_time", "date", *SPLIT_KEYS, *RUN_KEYS))


def canonical(key: str) -> str:
    """The Trainer's name for a key. Examples: val_loss and eval/loss are eval_loss; train/loss and Loss/train are loss."""
    plain = _plain(key)
    if plain in _NAMES:
        return _NAMES[plain]
    head, _, tail = plain.partition("/")
    if head in _BEFORE_SPLIT and tail in _SPLITS:
        return of_split(head, tail)
    if not tail or head not in _SPLITS:
        return key.strip()
    if tail == "train_loss":  # a tracker's name for the mean over the whole run, which the Trainer logs last
        return tail
    return of_split(key.strip()[len(head) + 1 :], head)


def of_split(key: str, split: str) -> str:
    """The name of a key that was measured on a split. Example: loss on "val" is eval_loss, on "wiki" eval_wiki_loss."""
    name, plain = canonical(key), _plain(split)
    if plain in _TRAIN or name in _WITHOUT_SPLIT or name.startswith(("eval_", "test_")):
        return name
    if plain in _EVAL:
        return f"eval_{name}"
    return f"test_{name}" if plain == "test" else f"eval_{split.strip()}_{name}"


@lru_cache
def step_of(keys: tuple[Any, ...]) -> str | None:
    """The key that holds the step; None where there is none."""
    plain = {_plain(key): key for key in keys}
    return next((plain[name] for name in STEP_KEYS if name in plain), None)


@lru_cache
def split_of(keys: tuple[Any, ...]) -> str | None:
    """The key that names the split; None where there is none."""
    return next((key for key in keys if _plain(key) in SPLIT_KEYS), None)


def is_curve(key: str) -> bool:
    """Whether a column may be a curve: it is no step, time, split, run, or index that pandas wrote."""
    plain = _plain(key)
    return plain not in STEP_KEYS and plain not in _NO_CURVES and plain != "" and not plain.startswith("unnamed:")


def _plain(key: Any) -> str:
    return key.strip().lower().replace(" ", "_").replace("-", "_") if isinstance(key, str) else ""
