"""A model card of measured facts, with metadata that the Hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_objectives import __version__
from hf_objectives.inspection import Finding, without_secrets

# What a run of each objective did to its base model, the task of the result, and its class in transformers.
_MADE = {
    "sft": ("Fine-tuned", "text-generation"),
    "pretraining": ("Pretrained further", "text-generation"),
    "dpo": ("Aligned with preference pairs (DPO)", "text-generation"),
    "reward": ("A reward model, trained on preference pairs", "text-classification"),
    "ppo": ("Trained by reward (PPO)", "text-generation"),
    "rloo": ("Trained by reward (RLOO)", "text-generation"),
    "grpo": ("Trained by reward (GRPO)", "text-generation"),
    "distill": ("Trained on a teacher's distributions (distillation)", "text-generation"),
}
_DEFINITIONS = {
    "perplexity": "exp of total nats over total predicted tokens; for chats those of the assistant's turns alone",
    "bits_per_byte": "total nats / ln 2 over the UTF-8 bytes of the predicted tokens; models of other tokenizers compare",
}
_METRICS = ("perplexity", "bits_per_byte", "exact_match", "accuracy")
TRAINING = "training.yaml"
_TABLE = "| held out | tokens | before | after |"
_QUERY = re.compile(r"(?<=://)([^\s?]*)\?\S*")  # of an address; signed ones have their key there


@dataclass
class CardFacts:
    """What a card tells of a run.

    Attributes:
        objective: a key of `_MADE`.
        recipe: the command's name.
        results: the metrics `before` and `after`; `figures` names those that are shown beside perplexities; `ledger` and
            `mixture` are shown where they are there, and so is the `teacher`, a folder or a Hub id.
        base_model: the model that was trained, a folder or a Hub id; None for random weights.
        sources: name and path (or Hub id) of each source of rows.
        parts: `config` and `revision` of a source on the Hub, where the run named them, by source.
        labels: which tokens were trained, in words.
        settings: those that were given, by name, without secrets; see `TRAINING`.
        findings: what `diagnose` found in the run, or why it could not judge it.
    """

    objective: str
    recipe: str
    results: Mapping[str, Any]
    base_model: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    labels: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    findings: Sequence[Finding] | str = ()


def write_card(folder: Path, facts: CardFacts) -> Path:
    """Write `README.md` and `training.yaml` into the folder of a run; returns the card's path.

    Licence and language are those of the base model's card, where a local folder has one. Otherwise the card names none.
    """
    (folder / TRAINING).write_text(yaml.safe_dump(dict(facts.settings), sort_keys=False, allow_unicode=True), "utf-8")
    path = folder / "README.md"
    sections = [
        _intro(folder, facts),
        _usage(folder, facts),
        _figures(facts.results),
        _content(facts),
        _training(facts),
    ]
    text = "\n\n".join("\n".join(section) for section in sections)
    path.write_text(f"---\n{_metadata(folder, facts).to_yaml()}\n---\n\n{text}\n", encoding="utf-8")
    return path


def _metadata(folder: Path, facts: CardFacts) -> ModelCardData:
    adapter = (folder / "adapter_config.json").exists()
    base, inherited = facts.base_model, _card_of(facts.base_model)
    return ModelCardData(
        base_model=base if base and _is_hub_id(base) else None,
        base_model_relation=("adapter" if adapter else "finetune") if base and _is_hub_id(base) else None,
        datasets=[path for path in facts.sources.values() if _is_hub_id(path)] or None,
        language=inherited.get("language"),
        library_name="peft" if adapter else "transformers",
        license=inherited.get("license"),
        pipeline_tag=_MADE[facts.objective][1],
        tags=["hf-objectives", facts.objective],
        model_name=folder.absolute().name,
        eval_results=_index(facts) or None,
    )


def _index(facts: CardFacts) -> list[EvalResult]:
    """The figures as the Hub's model index has them: one result for each figure and held-out set."""
    results = []
    for key, value in facts.results["after"].items():
        metric = next((name for name in _METRICS if key.endswith(f"_{name}")), None)
        if metric is None or not isinstance(value, float):
            continue
        source = key.removeprefix("eval_").removesuffix(metric).strip("_") or "all"
        path = facts.sources.get(source, "")
        results.append(
            EvalResult(
                task_type=_MADE[facts.objective][1],
                dataset_type=path if _is_hub_id(path) else "held-out",
                dataset_name=f"held-out rows, {source}",
                dataset_config=facts.parts.get(source, {}).get("config"),
                dataset_revision=facts.parts.get(source, {}).get("revision"),
                metric_type=metric,
                metric_name=key.removeprefix("eval_"),
                metric_value=value,
            )
        )
    return results


def card_figures(card: Path) -> dict[str, float]:
    """The figures that a card publishes, by metric (`eval_perplexity`)."""
    found = ModelCard.load(card).data.eval_results or []
    return {f"eval_{result.metric_name}": float(result.metric_value) for result in found}


def card_table(card: Path) -> dict[str, str]:
    """The column `after` of a card's table of figures, as people read it, by metric (`eval_perplexity`)."""
    _, _, below = ModelCard.load(card).text.partition(f"{_TABLE}\n")
    rows = [line.strip("|").split("|") for line in below.split("\n\n")[0].splitlines()[1:]]
    return {f"eval_{cells[0].strip()}": cells[-1].strip() for cells in rows}


def _intro(folder: Path, facts: CardFacts) -> list[str]:
    made = _MADE[facts.objective][0]
    made = f"{made} from `{_shown(facts.base_model)}`" if facts.base_model else "Pretrained from scratch"
    if teacher := facts.results.get("teacher"):
        made += f", teacher `{_shown(teacher)}`,"
    return [f"# {folder.absolute().name}", "", f"{made} with hf_objectives {__version__}."]


def _usage(folder: Path, facts: CardFacts) -> list[str]:
    kind = "AutoModelForSequenceClassification" if facts.objective == "reward" else "AutoModelForCausalLM"
    lines = [f"from transformers import AutoTokenizer, {kind}", ""]
    lines += [f'name = "{folder.absolute().name}"  # or the id of its repository']
    lines += ["tokenizer = AutoTokenizer.from_pretrained(name)", f"model = {kind}.from_pretrained(name)"]
    if facts.objective == "pretraining":
        lines += ['inputs = tokenizer("Once", return_tensors="pt", return_token_type_ids=False)']
    else:
        answer = ', {"role": "assistant", "content": "Hello."}' if facts.objective == "reward" else ""
        asks = "" if facts.objective == "reward" else "add_generation_prompt=True, "
        lines += [f'messages = [{{"role": "user", "content": "Hello?"}}{answer}]']
        lines += [f'inputs = tokenizer.apply_chat_template(messages, {asks}return_dict=True, return_tensors="pt")']
    if facts.objective == "reward":
        lines += ["print(model(**inputs).logits.item())"]
    else:
        lines += ["answer = model.generate(**inputs, max_new_tokens=64)"]
        lines += ['print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))']
    return ["```python", *lines, "```"]


def _figures(results: Mapping[str, Any]) -> list[str]:
    lines = ["## Figures", "", _TABLE, "|---|---|---|---|"]
    for key, after in results["after"].items():
        if key.endswith(("_perplexity", "_bits_per_byte")) or key in results.get("figures", ()):
            stem = key.removesuffix("_perplexity").removesuffix("_bits_per_byte")
            tokens = results["after"].get(f"{stem}_num_tokens", "")
            before = results["before"].get(key)
            lines.append(
                f"| {key.removeprefix('eval_')} | {tokens} | {figure_of_card(before)} | {figure_of_card(after)} |"
            )
    lines += ["", *(f"- {name}: {words}." for name, words in _DEFINITIONS.items())]
    return [
        *lines,
        "",
        "`hf-objectives verify` on this repository measures them again.",
        "",
        "![curves](training_curves.png)",
    ]


def _content(facts: CardFacts) -> list[str]:
    """What was trained on: the fields of a summary of training content, as far as a run knows them."""
    told = "Sources:" if facts.sources else "The rows were prepared before the run."
    lines = ["## Training content", "", f"Modality: text. {told}", ""]
    for name, path in facts.sources.items():
        parts = "".join(f", {part} `{value}`" for part, value in facts.parts.get(name, {}).items())
        local = "built into hf_objectives" if path.startswith("builtin") else "local file"
        lines.append(f"- {name}: " + (f"public data set `{path}`{parts}" if _is_hub_id(path) else local))
    if ledger := facts.results.get("ledger"):
        lines += ["", "| source | rows | tokens | trained | dropped |", "|---|---|---|---|---|"]
        for source, account in ledger.items():
            dropped = sum(account["dropped_tokens"].values())
            cells = (source, account["rows_in"], account["tokens_in"], account["trained"], dropped)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    if mixture := facts.results.get("mixture"):
        lines += ["", f"| source | asked, {mixture['unit']} | given | tokens | epochs |", "|---|---|---|---|---|"]
        for entry in mixture["sources"]:
            shares = f"{entry['asked']:.2%} | {entry['share']:.2%}"
            lines.append(f"| {entry['name']} | {shares} | {entry['tokens']} | {entry['epochs']:.2f} |")
    return lines


def _training(facts: CardFacts) -> list[str]:
    lines = ["## Training", ""]
    lines += [facts.labels, ""] if facts.labels else []
    lines += [f"    hf-objectives {facts.recipe} --config {TRAINING}", "", "```yaml"]
    lines += [yaml.safe_dump(dict(facts.settings), sort_keys=False, allow_unicode=True).rstrip(), "```", ""]
    lines += _found(facts.findings)
    return lines


def _found(findings: Sequence[Finding] | str) -> list[str]:
    if isinstance(findings, str):
        return [f"Diagnosis of the curves: not judged, {findings}."]
    lines = [f"- {finding.severity}, {finding.kind}, {finding.steps}: {finding.evidence}" for finding in findings]
    return ["Diagnosis of the curves:", "", *(lines or ["- nothing was found"])]


def _card_of(base_model: str | None) -> dict[str, Any]:
    card = Path(base_model or "") / "README.md"
    return ModelCard.load(card).data.to_dict() if base_model and card.exists() else {}


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith(("/", ".")) and not Path(name).exists()


def _shown(model: str) -> str:
    """The name of a model: of a local folder its last part alone."""
    return Path(model).name if Path(model).exists() else model


def figure_of_card(value: float | None) -> str:
    """A figure as the table of a card has it."""
    return "-" if value is None else f"{value:.4g}"


def settings_to_show(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were given, as a card may show them: without secrets, folders of this machine and the Hub's fields."""
    own = {name: value for name, value in given.items() if name not in ("output_dir", "push_to_hub")}
    own = {name: _without_folders(value) for name, value in own.items() if not name.startswith("hub_")}
    return without_secrets(own)


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, str) and value.startswith("{"):  # a mapping as JSON text
        try:
            return _without_folders(json.loads(value))
        except ValueError:
            return value
    if isinstance(value, (list, tuple)):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, str):
        return Path(value).name if Path(value).is_absolute() else _QUERY.sub(r"\1", value)
    return value
