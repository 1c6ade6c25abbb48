"""What only a GPU shows: leaks, the head, steps of training against the peers, evaluation, settings, numbers.

    python benchmarks/gpu.py --minutes 8 --out DIR [--stages machine head ...] [--small]

Models are drawn at random in the shapes of Qwen3-0.6B and 1.7B, and rows of random ids, so that neither a hub nor a network
is needed. The stages are in order of worth. Each is a process of its own with a part of the time. Each figure is written at
once to `DIR/<stage>.jsonl`, and after each stage all of them to `DIR/results.md`. What fails is written as failed, and the
next one begins. `--small` is for a CPU: tiny models, which show that the script runs and nothing else.

Contenders run one after another, since a GPU is nobody else's; the parts of the head are timed in turn with its bare
products. Peak memory is what torch allocated at most during the timed steps. MFU counts 6 operations a weight and token, the
head's included, and those of causal attention, over the dense bf16 peak of the device.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _machine import describe, table
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_objectives import (
    DataCollatorForAssistantOnlyLM,
    DataCollatorWithEosPacking,
    PerplexityDPOConfig,
    PerplexityDPOTrainer,
    PerplexityTrainer,
    PerplexityTrainingArguments,
    PPOConfig,
    PPOTrainer,
    demo,
)
from hf_objectives.errors import PackingLeakError
from hf_objectives.losses import IMPLEMENTATIONS, fused_linear_cross_entropy, next_token_loss
from hf_objectives.trainers import probe_isolation

GIB = 2**30
_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # dense bf16, operations a second
_SHARED = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-5, "logging_steps": 1,
           "per_device_train_batch_size": 1, "gradient_checkpointing": True}  # fmt: skip
_PAIRS = 4
_ATTENTION = ("sdpa", "flex_attention", "flash_attention_2", "eager")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


#: A trial: what is tried, and the function that measures it.
Trials = Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]


@dataclass
class Lab:
    """Where a stage works: its sizes, and the time when no more trials begin."""

    small: bool
    end: float

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return torch.cuda.is_available() and not self.small

    @property
    def device(self) -> torch.device:
        """Where models are."""
        return torch.device("cuda" if self.cuda else "cpu")

    def run(self, trials: Trials, file: Path) -> None:
        """Write a line for each trial: its figures, its error, or that no time was left."""
        for what, measure in trials:
            free()
            try:
                figures = measure() if time.time() < self.end else {"note": "left out: no time"}
            except Exception as error:  # a failed trial is a result
                traceback.print_exc()
                figures = {"note": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            with file.open("a") as lines:
                lines.write(json.dumps({**what, **figures}) + "\n")

    def model(
        self, size: str = "0.6B", attention: str = "sdpa", dtype: torch.dtype = torch.float32, **more: Any
    ) -> Any:
        """Random weights in the shape of a Qwen3 model."""
        torch.manual_seed(0)
        hidden, inner, layers = {"0.6B": (1024, 3072, 28), "1.7B": (2048, 6144, 28)}[size]
        shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
                 "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}  # fmt: skip
        if self.small:
            shape |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                      "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 1024}  # fmt: skip
        config = Qwen3Config(**{**shape, "max_position_embeddings": 65_536, "tie_word_embeddings": True, **more})
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)

    def arguments(self, kind: type, **settings: Any) -> Any:
        """Arguments of a trainer."""
        given = {**_SHARED, "use_cpu": not self.cuda, "bf16": self.cuda, **settings}
        return kind(tempfile.mkdtemp(), **given)


def free() -> None:
    """Give memory back, and forget the peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def settled() -> float:
    """The time when the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak() -> float | None:
    """Peak memory of torch, GiB."""
    return round(torch.cuda.max_memory_allocated() / GIB, 2) if torch.cuda.is_available() else None


class Clock(TrainerCallback):
    """Times the steps of a Trainer after the first ones."""

    def __init__(self, warm: int) -> None:
        self.warm, self.seconds = warm, list[float]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin."""
        if state.global_step == self.warm and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._begin = settled()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End."""
        if state.global_step > self.warm:
            self.seconds.append(settled() - self._begin)


def train(trainer: Any, warm: int = 2) -> dict[str, Any]:
    """Run a trainer: seconds of a step after the first ones, peak memory, and the first loss."""
    clock = Clock(warm)
    trainer.add_callback(clock)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = statistics.median(clock.seconds)
    return {"s/step": round(seconds, 4), "peak GiB": peak(), "first loss": losses[0] if losses else None}


def stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of one length as a batch: every contender gets the same."""
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def random_rows(count: int, length: int, trained: float) -> Dataset:
    """Rows of random tokens, of which the last part is trained. The built-in tokenizer has few, whatever the head has."""
    ids = torch.randint(0, len(demo.build_tokenizer()), (count, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : round(length * (1 - trained))] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


# -- the stages ------------------------------------------------------------------------------------------------------


def machine(lab: Lab) -> Trials:
    """The device, and whether packed documents see each other under each attention and dtype."""
    device = torch.cuda.get_device_name() if lab.cuda else "cpu"
    yield {"attention": device, "dtype": f"{describe()}"}, dict
    for attention, (name, dtype) in itertools.product(_ATTENTION, _DTYPES.items()):
        yield {"attention": attention, "dtype": name}, partial(_isolation, lab, attention, dtype)


def _isolation(lab: Lab, attention: str, dtype: torch.dtype) -> dict[str, Any]:
    rows = texts([40, 25, 63] if lab.small else [700, 450, 900])
    model = lab.model(attention=attention, dtype=dtype).eval()
    change = probe_isolation(model).change
    collator = DataCollatorWithEosPacking(
        demo.build_tokenizer(), max_length=4096, train_on="all", return_flash_attn_kwargs=False
    )
    batch = {name: value.to(lab.device) for name, value in collator(rows).items() if name != "labels"}
    lengths, gaps = [len(row["input_ids"]) for row in rows], []
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits[0].float()
        begins = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        for begin in begins[: len(lengths)]:
            end = min([other for other in begins if other > begin], default=len(together))
            ids = batch["input_ids"][:, begin:end]
            alone = model(input_ids=ids, use_cache=False).logits[0].float()
            gaps.append((together[begin:end] - alone).abs().max() / alone.abs().max())
    return {"change by another document": change, "packed against alone, of the largest logit": float(max(gaps))}


def texts(lengths: list[int]) -> list[dict[str, Any]]:
    """Rows of random ids of the built-in tokenizer's range, with the EOS that the packing collator would add."""
    draw, end = torch.Generator().manual_seed(0), demo.build_tokenizer().eos_token_id
    drawn = [[*torch.randint(4, 400, (length,), generator=draw).tolist(), end] for length in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def head(lab: Lab) -> Trials:
    """Forward and backward of the head alone, each in turn with its bare products."""
    entries, width, tokens = (512, 32, 128) if lab.small else (151_936, 4096, 8192)
    draw = torch.Generator(lab.device).manual_seed(0)
    hidden, weight = (
        (torch.randn(n, width, device=lab.device, generator=draw) * width**-0.5)
        .to(torch.float32 if lab.small else torch.bfloat16)
        .requires_grad_()
        for n in (tokens, entries)
    )
    targets = torch.randint(0, entries, (tokens,), device=lab.device, generator=draw)

    def full() -> None:
        (next_token_loss(hidden @ weight.T, targets).loss / tokens).backward()

    def fused(name: str) -> None:
        (fused_linear_cross_entropy(hidden, weight, targets, implementation=name).loss / tokens).backward()

    @torch.no_grad()
    def bare() -> None:
        for part in hidden.split(1024):
            logits = part @ weight.T
            _ = logits @ weight, logits.T @ part

    def measure(compute: Callable[[], None]) -> dict[str, Any]:
        held = torch.cuda.memory_allocated() if lab.cuda else 0
        compute()
        above = round(torch.cuda.max_memory_allocated() / GIB - held / GIB, 2) if lab.cuda else None
        times = in_turn({"bare": bare, "own": compute}, 2 if lab.small else 8)
        hidden.grad = weight.grad = None
        return {
            "ms": round(1000 * times["own"], 2),
            "of the bare products": round(times["own"] / times["bare"], 3),
            "above inputs and weight, GiB": above,
        }

    for name, compute in {"full logits": full, **{name: partial(fused, name) for name in IMPLEMENTATIONS}}.items():
        yield {"head": name}, partial(measure, compute)


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, after one round that is not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            begin = settled()
            call()
            if i:
                times[name].append(settled() - begin)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def sft(lab: Lab) -> Trials:
    """The step of fine-tuning on one row against TRL's and transformers' trainers, with gradient checkpointing."""
    sizes = [(64, 1.0)] if lab.small else [(8192, 0.25), (8192, 1.0), (32_768, 0.25), (32_768, 1.0)]
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    liger = {"use_liger_kernel": True}
    kinds: dict[str, tuple[type, type, dict[str, Any]]] = {
        "hf_objectives": (PerplexityTrainer, PerplexityTrainingArguments, {}),
        "TRL": (SFTTrainer, SFTConfig, skip),
        "transformers": (Trainer, TrainingArguments, {}),
    }
    if lab.cuda:
        kinds |= {
            "hf_objectives with Liger": (PerplexityTrainer, PerplexityTrainingArguments, liger),
            "TRL with Liger": (SFTTrainer, SFTConfig, skip | liger),
            "transformers with Liger": (Trainer, TrainingArguments, liger),
        }
    cases = [("0.6B", *size) for size in sizes]
    cases.insert(2, ("1.7B", *sizes[0]))
    for (size, length, trained), (name, (trainer, config, more)) in itertools.product(cases, kinds.items()):
        given = more | ({"max_length": length} if config is SFTConfig else {})
        what = {"model": size, "tokens": length, "trained": trained, "trainer": name}
        yield (
            what,
            partial(_fine_tune, lab, size, length, trained, trainer, lab.arguments(config, max_steps=6, **given)),
        )


def _fine_tune(lab: Lab, size: str, length: int, trained: float, trainer: type, arguments: Any) -> dict[str, Any]:
    model = lab.model(size)
    rows = random_rows(6, length, trained)
    figures = train(trainer(model, arguments, stack, train_dataset=rows, processing_class=demo.build_tokenizer()))
    seconds = figures["s/step"]
    return {"tokens/s": round(length / seconds), "MFU": mfu(model.config, length, seconds), **figures}


def mfu(config: Any, length: int, seconds: float) -> float | None:
    """Share of the device's peak that a step of one row takes."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    most = next((rate for key, rate in _PEAKS.items() if key in name), None)
    if most is None:
        return None
    attention, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    layer = config.hidden_size * (2 * attention + 2 * keys + 3 * config.intermediate_size)
    weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    operations = 6 * weights * length + 6 * config.num_hidden_layers * attention * length**2
    return round(operations / seconds / most, 3)


def dpo(lab: Lab) -> Trials:
    """The step of DPO on 4 pairs against TRL's, with short and with long prompts."""
    shapes = {"short prompts": (16, 24)} if lab.small else {"short prompts": (128, 512), "long prompts": (2048, 512)}
    kinds: dict[str, tuple[type, type, dict[str, Any]]] = {
        "TRL": (DPOTrainer, DPOConfig, {}),
        "hf_objectives": (PerplexityDPOTrainer, PerplexityDPOConfig, {}),
        "hf_objectives, padding-free": (PerplexityDPOTrainer, PerplexityDPOConfig, {"padding_free": True}),
    }
    for (shape, lengths), (name, (trainer, config, more)) in itertools.product(shapes.items(), kinds.items()):
        settings = {"per_device_train_batch_size": _PAIRS, "max_steps": 6, "max_length": sum(lengths), **more}
        yield {"shape": shape, "trainer": name}, partial(_prefer, lab, lengths, trainer, config, settings)


def _prefer(
    lab: Lab, lengths: tuple[int, int], trainer: type, config: type, settings: dict[str, Any]
) -> dict[str, Any]:
    model, draw = lab.model(), torch.Generator().manual_seed(0)
    most = {"prompt_ids": lengths[0], "chosen_ids": lengths[1], "rejected_ids": lengths[1]}

    def some(most: int) -> list[int]:
        length = int(torch.randint(most // 2, most + 1, (1,), generator=draw))
        return torch.randint(0, model.config.vocab_size, (length,), generator=draw).tolist()

    pairs = [{name: some(length) for name, length in most.items()} for _ in range(6 * _PAIRS)]
    masks = [{f"{side}_mask": [1] * len(pair[f"{side}_ids"]) for side in ("chosen", "rejected")} for pair in pairs]
    rows = Dataset.from_list([pair | mask for pair, mask in zip(pairs, masks, strict=True)])
    arguments = lab.arguments(config, **settings)
    tokenizer = demo.build_tokenizer()
    # TRL encodes what it is given, and takes no ids.
    text = Dataset.from_list([{"prompt": "1 plus 1?", "chosen": "2", "rejected": "3"}])
    made = trainer(model, deepcopy(model), arguments, train_dataset=text, processing_class=tokenizer)
    made.train_dataset = rows
    figures = train(made)
    return {"pairs/s": round(_PAIRS / figures["s/step"], 2), **figures}


def evaluation(lab: Lab) -> Trials:
    """An evaluation in turn with forward passes that read no loss."""
    length, count = (64, 8) if lab.small else (2048, 64)
    model = lab.model(dtype=torch.bfloat16 if lab.cuda else torch.float32)
    rows = random_rows(count, length, 1.0)

    def measure(size: int) -> dict[str, Any]:
        settings = lab.arguments(PerplexityTrainingArguments, per_device_eval_batch_size=size, bf16=False)
        trainer = PerplexityTrainer(model, settings, stack, eval_dataset=rows, processing_class=demo.build_tokenizer())
        batches = [stack(rows.select(range(i, i + size)).to_list()) for i in range(0, count, size)]

        @torch.no_grad()
        def bare() -> None:
            model.eval()
            for batch in batches:
                inputs = {name: batch[name].to(lab.device) for name in ("input_ids", "attention_mask")}
                model(**inputs, use_cache=False, logits_to_keep=1)

        times = in_turn({"bare": bare, "evaluate": trainer.evaluate}, 1 if lab.small else 3)
        ratio = times["evaluate"] / times["bare"]
        return {"tokens/s": round(count * length / times["evaluate"]), "of a bare forward": round(ratio, 3)}

    for size in (1, 8):
        yield {"batch size": size}, partial(measure, size)


def settings(lab: Lab) -> Trials:
    """Whether training and evaluation run, and their memory."""
    yield {"setting": "plain"}, partial(_a_few_steps, lab)
    backend = "eager" if lab.small else None
    yield {"setting": "torch.compile"}, partial(_a_few_steps, lab, torch_compile=True, torch_compile_backend=backend)
    if lab.cuda:
        yield {"setting": "fp16 with its scaler"}, partial(_a_few_steps, lab, bf16=False, fp16=True)
        yield {"setting": "QLoRA, 1.7B"}, partial(_qlora, lab)


def fsdp2(lab: Lab) -> Trials:
    """FSDP2 on one device, in a process group of one."""
    sharding = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}
    yield {"setting": "FSDP2"}, partial(_a_few_steps, lab, fsdp=True, fsdp_config=sharding)


def _qlora(lab: Lab) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:
        lab.model("1.7B", dtype=torch.bfloat16).save_pretrained(folder)
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized, device_map={"": 0})
    adapted = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(target_modules="all-linear"))
    return _a_few_steps(lab, adapted)


def _a_few_steps(lab: Lab, model: Any = None, **more: Any) -> dict[str, Any]:
    model = lab.model() if model is None else model
    length = 64 if lab.small else 2048
    rows = random_rows(12, length, 1.0)
    given = lab.arguments(PerplexityTrainingArguments, per_device_train_batch_size=2, max_steps=6, **more)
    some = rows.select(range(3))
    tokenizer = demo.build_tokenizer()
    trainer = PerplexityTrainer(model, given, stack, train_dataset=rows, eval_dataset=some, processing_class=tokenizer)
    figures = train(trainer)
    return {"tokens/s": round(2 * length / figures["s/step"]), **figures, "eval loss": trainer.evaluate()["eval_loss"]}


def ppo(lab: Lab) -> Trials:
    """A few steps of PPO, generation included."""
    yield {"trainer": "PPOTrainer"}, partial(_ppo, lab)


def _ppo(lab: Lab) -> dict[str, Any]:
    tokenizer = demo.build_tokenizer()
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("eos", "pad")}
    model = lab.model(vocab_size=len(tokenizer), **special)
    rows = [{"prompt": f"What is {a} plus {b}?"} for a in range(8) for b in range(8)]
    given = lab.arguments(
        PPOConfig, per_device_train_batch_size=4 if lab.small else 16, max_steps=4, num_iterations=1,
        max_completion_length=8 if lab.small else 128, gradient_checkpointing=False,
    )  # fmt: skip

    def length_of(completions: list[str], **_: Any) -> list[float]:
        return [float(len(answer)) for answer in completions]

    return train(PPOTrainer(model, length_of, given, train_dataset=rows, processing_class=tokenizer), warm=1)


def resume(lab: Lab) -> Trials:
    """Runs of 6 steps: the same again, and one that goes on from its checkpoint of step 3."""
    for name in ("fp32", *(["bf16", "fp16"] if lab.cuda else [])):
        yield {"precision": name}, partial(_resume, lab, name)


def _resume(lab: Lab, precision: str) -> dict[str, Any]:
    rows, tokenizer = random_rows(24, 64, 0.5), demo.build_tokenizer()
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 4096}

    def one(folder: str, **settings: Any) -> tuple[list[float], list[torch.Tensor]]:
        model = lab.model(attention_dropout=0.1, **shape)
        given = lab.arguments(
            PerplexityTrainingArguments, per_device_train_batch_size=4, max_steps=6, save_strategy="steps", save_steps=3,
            bf16=precision == "bf16", fp16=precision == "fp16",
        )  # fmt: skip
        given.output_dir = folder
        trainer = PerplexityTrainer(model, given, stack, train_dataset=rows, processing_class=tokenizer)
        trainer.train(**settings)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, [parameter.detach().cpu() for parameter in model.parameters()]

    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        whole, again = one(first), one(second)
        on = one(first, resume_from_checkpoint=f"{first}/checkpoint-3")
    return {
        f"{name}: {what}": value
        for name, other in {"again": again, "resumed": on}.items()
        for what, value in {
            "largest difference of losses": max(abs(a - b) for a, b in zip(whole[0], other[0], strict=True)),
            "weights equal": all(torch.equal(a, b) for a, b in zip(whole[1], other[1], strict=True)),
        }.items()
    }


def leaks(lab: Lab) -> Trials:
    """What the probe says of tiny models in each precision: the largest change that passed, or why not."""
    dtypes = {**_DTYPES, "float16": torch.float16}
    for (kind, shape), (name, dtype) in itertools.product(_TINY.items(), dtypes.items()):
        yield {"model": kind, "dtype": name}, partial(_leak, lab, kind, shape, dtype)


def _leak(lab: Lab, kind: str, shape: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=264, **shape)).to(lab.device, dtype)
    try:
        report = probe_isolation(model)
    except PackingLeakError as error:
        return {"attention": model.config._attn_implementation, "refused": str(error)[:120]}
    return {"attention": report.attention, "change": report.change, "bound": report.tolerance}


_USUAL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_KV = {"num_key_value_heads": 2}
_TINY: dict[str, dict[str, Any]] = {
    "llama": _USUAL | _KV,
    "qwen3": _USUAL | _KV | {"head_dim": 16},
    "gemma3_text": _USUAL | _KV | {"head_dim": 16},
    "mixtral": _USUAL | _KV | {"num_local_experts": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "opt": {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "lfm2": _USUAL | _KV | {"layer_types": ["conv", "full_attention"]},
    "jamba": _USUAL | _KV | {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8, "attn_layer_period": 2,
                             "attn_layer_offset": 1},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 4},
    "bert": _USUAL,
}  # fmt: skip


def numbers(lab: Lab) -> Trials:
    """The loss of one model on the same rows, by batch size, packing, attention and dtype."""
    longest = 40 if lab.small else 800
    rows = Dataset.from_list(texts([longest // 4 + 7 * i * longest // 160 for i in range(16)]))

    def measure(attention: str, dtype: torch.dtype) -> dict[str, Any]:
        model, tokenizer = lab.model(attention=attention, dtype=dtype), demo.build_tokenizer()
        packing = DataCollatorWithEosPacking(tokenizer, max_length=4 * longest, train_on="all")
        padding = DataCollatorForAssistantOnlyLM(tokenizer, train_on="all")
        losses = {}
        for name, size, collator in (("batch 1", 1, padding), ("batch 8", 8, padding), ("packed", 8, packing)):
            given = lab.arguments(PerplexityTrainingArguments, per_device_eval_batch_size=size, bf16=False)
            trainer = PerplexityTrainer(model, given, collator, eval_dataset=rows, processing_class=tokenizer)
            losses[name] = trainer.evaluate()["eval_loss"]
        return losses

    for attention, (name, dtype) in itertools.product(_ATTENTION, _DTYPES.items()):
        yield {"attention": attention, "dtype": name}, partial(measure, attention, dtype)


#: In order of worth, with the share of the time that each may take at most.
STAGES: dict[str, tuple[Callable[[Lab], Trials], float]] = {
    "machine": (machine, 0.15),
    "head": (head, 0.12),
    "sft": (sft, 0.4),
    "dpo": (dpo, 0.2),
    "evaluation": (evaluation, 0.15),
    "settings": (settings, 0.2),
    "fsdp2": (fsdp2, 0.12),
    "ppo": (ppo, 0.12),
    "numbers": (numbers, 0.25),
    "leaks": (leaks, 0.06),
    "resume": (resume, 0.08),
}
#: `accelerate launch` sets these for a launch of one process under FSDP2.
_ONE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
_FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **_ONE_PROCESS}


def render(out: Path) -> str:
    """All figures as Markdown."""
    parts = []
    for name in STAGES:
        file = out / f"{name}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        if lines:
            columns = list(dict.fromkeys(key for line in lines for key in line))
            cells = [["" if line.get(key) is None else str(line[key]) for key in columns] for line in lines]
            parts.append(f"### {name}\n\n{(STAGES[name][0].__doc__ or '').strip()}\n\n{table(columns, cells)}\n")
    return "\n".join(parts)


def main() -> None:
    """Run the stages in turn, each as a process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--stage", choices=STAGES, help="Run this one here, for --seconds.")
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage:
        lab = Lab(options.small, time.time() + 0.8 * options.seconds)
        lab.run(STAGES[options.stage][0](lab), options.out / f"{options.stage}.jsonl")
        return
    end, failed = time.time() + 60 * options.minutes, []
    for name in options.stages:
        seconds = min(60 * options.minutes * STAGES[name][1], end - time.time())
        if seconds < 5:
            failed.append(f"{name}: no time was left")
            continue
        words = [sys.executable, __file__, "--out", str(options.out), "--stage", name, "--seconds", f"{seconds:.0f}"]
        (options.out / f"{name}.jsonl").unlink(missing_ok=True)
        with (options.out / f"{name}.log").open("w") as log:
            begin = time.time()
            try:
                done = subprocess.run(
                    [*words, *(["--small"] if options.small else [])], stdout=log, stderr=subprocess.STDOUT,
                    timeout=seconds, env={**os.environ, **(_FSDP if name == "fsdp2" else {})},
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                done = f"stopped after {seconds:.0f} s"
        print(f"{name}: {time.time() - begin:.0f} s" + (f", {done}" if done else ""), flush=True)
        if done:
            failed.append(f"{name}: {done}; see {name}.log")
        (options.out / "results.md").write_text("\n".join([render(options.out), *failed]) + "\n")
    print(render(options.out), *failed, sep="\n")


if __name__ == "__main__":
    main()
