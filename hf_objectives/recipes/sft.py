"""Fine-tune a chat model on what it has to produce, and report exact perplexity before and after.

    accelerate launch recipes/sft.py --config recipes/configs/quickstart.yaml
    accelerate launch recipes/sft.py --config recipes/configs/smollm2_lora.yaml \\
        --model_name_or_path path/or/id --dataset_name chats.jsonl --output_dir runs/mine
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import set_seed

from hf_objectives import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking, DiagnosticsCallback, demo
from hf_objectives.demo import exact_match
from hf_objectives.errors import ConfigError
from hf_objectives.inspection import save_label_preview
from hf_objectives.recipes.arguments import parse_config
from hf_objectives.recipes.mixture_rows import of_rows, read_mixture
from hf_objectives.recipes.plan import check_launch, print_plan, resolve_plan
from hf_objectives.recipes.preview import print_preview
from hf_objectives.recipes.run import (
    BUILT_IN,
    DataArguments,
    RecipeModel,
    finish,
    for_report,
    load_model,
    on_main,
    prepare,
    print_mixture,
    resume_point,
    with_lora,
)
from hf_objectives.trainers import PerplexityTrainer, PerplexityTrainingArguments


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns the held-out metrics before and after."""
    (model_config, data, args), origin = parse_config((RecipeModel, DataArguments, PerplexityTrainingArguments), argv)
    console = Console(stderr=False, soft_wrap=False)
    check_launch(args)
    set_seed(args.seed)
    model, tokenizer = load_model(model_config, use_cpu=args.device.type == "cpu")
    prepared = prepare(data, tokenizer, seed=args.seed, output_dir=args.output_dir)
    train, settings = prepared.train, read_mixture(data.mixture, data.named_sources())
    if settings is not None:
        train = of_rows(settings, train, max_length=data.max_length, packing=data.packing, seed=args.seed)
        if args.max_steps <= 0:
            raise ConfigError("a mixture has no length; say how long with max_steps")
    model = with_lora(model, model_config, gradient_checkpointing=args.gradient_checkpointing)
    if on_main():
        print_plan(resolve_plan(args, data, model, len(prepared.train), origin), console)
        for note in getattr(train, "notes", ()):
            console.print(note, highlight=False, markup=False)
        print_preview(tokenizer, prepared.examples, prepared.ledger, console)
        for_report(args, data, model_config)
        save_label_preview(tokenizer, prepared.examples, Path(args.output_dir) / "labels.json")
    wants_push, args.push_to_hub = args.push_to_hub, False  # pushed at the end, when everything is on disk
    collator: Any = DataCollatorForAssistantOnlyLM(tokenizer)
    if data.packing:
        collator = DataCollatorWithEosPacking(tokenizer, max_length=data.max_length)
    trainer = PerplexityTrainer(
        model,
        args,
        collator,
        train_dataset=train,
        eval_dataset=prepared.evaluation,
        processing_class=tokenizer,
    )
    trainer.add_callback(DiagnosticsCallback(trainer))
    asked = demo.questions(200, split="test") if BUILT_IN in data.named_sources().values() else []
    before, _ = _evaluate(trainer, tokenizer, asked)
    trainer.train(resume_from_checkpoint=resume_point(args))
    after, answers = _evaluate(trainer, tokenizer, asked)
    trainer.save_model()
    trainer.save_state()
    results = {"before": before, "after": after, "ledger": prepared.ledger.to_dict()}
    if settings is not None:
        results["mixture"] = train.report(trainer.rows_taken).to_dict()
    if on_main():
        if settings is not None:
            print_mixture(train.report(trainer.rows_taken), trainer, console)
        finish(trainer, results, model_config.model_name_or_path, data, console, wants_push)
        for question, said in answers[:6]:
            verdict = "right" if said == question.answer else f"wrong, it is {question.answer!r}"
            console.print(f"  {question.question} -> {said!r} ({verdict})", highlight=False, markup=False)
    trainer.accelerator.wait_for_everyone()
    return results


def _evaluate(trainer: PerplexityTrainer, tokenizer: Any, asked: list[demo.Question]) -> tuple[dict[str, float], list]:
    metrics: dict[str, float] = trainer.evaluate() if trainer.eval_dataset is not None else {}
    if not asked:
        return metrics, []
    plain = [question for question in asked if not question.expression]
    share, answers = exact_match(trainer.accelerator.unwrap_model(trainer.model), tokenizer, plain)
    return {**metrics, "eval_exact_match": share}, answers
