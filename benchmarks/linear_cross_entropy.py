"""The head and the loss in one, against full logits, torch's own and the bare products of the head.

    OMP_NUM_THREADS=1 python benchmarks/linear_cross_entropy.py --model FOLDER_OR_ID [--rounds 3]

Without `--model` the steps of a real model are left out. All contenders in one process, in turn, round after round, by CPU
time of the process; with more threads than one, waiting counts too. Torch's own, with many small chunks, runs for the head
alone. The floor of a step is the body, forward and backward, and three bare products of the head over the trained positions,
and nothing else: no loss, no sum with the gradient of tied embeddings. Memory is the peak of the process beyond what it held
before, less the gradients of hidden states and weight.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _machine import describe, table
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.functional import linear_cross_entropy as torchs

from hf_objectives.losses import fused_linear_cross_entropy, next_token_loss

SHAPES = ((512, 576, 49_152),)  # torch's own takes ten times as long as the others
TOKENS, ENTRIES = (1024, 4096, 16_384), (50_000, 128_000, 256_000)
MAX_LOGITS = 2**30  # bytes; full logits beyond are not made

Head = Callable[[Tensor, Tensor, Tensor], None]


def bare(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Three products of the head's size."""
    with torch.no_grad():
        logits = hidden @ weight.t()
        of_hidden = logits @ weight
        logits.t() @ hidden
    if not hidden.is_leaf:
        hidden.backward(of_hidden)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """The default implementation."""
    (fused_linear_cross_entropy(hidden, weight, targets).loss / len(targets)).backward()


def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """All logits of the trained positions."""
    (next_token_loss(linear(hidden, weight), targets).loss / len(targets)).backward()


def torch_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Torch's own with its chunking options."""
    options = torch.nn.LinearCrossEntropyOptions()
    (torchs(hidden, weight, targets, reduction="sum", options=options) / len(targets)).backward()


HEADS: dict[str, Head] = {"bare products": bare, "ours": ours, "full logits": full}
STEPS = tuple(HEADS)
if hasattr(torch.nn, "LinearCrossEntropyOptions"):
    HEADS["torch's"] = torch_sum


def in_turn(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, after one call of each that is not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            if i:
                times[name].append(1000 * (time.process_time() - begin))
    return times


def tensors(tokens: int, width: int, entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = (torch.randn(entries, width) / width**0.5).requires_grad_()
    return hidden, weight, torch.randint(0, entries, (tokens,))


def heads(rounds: int) -> list[list[str]]:
    """Milliseconds of the head alone, forward and backward, by shape."""
    rows = []
    for tokens, width, entries in SHAPES:
        hidden, weight, targets = tensors(tokens, width, entries)

        def run(head: Head) -> None:
            hidden.grad = weight.grad = None  # noqa: B023
            head(hidden, weight, targets)  # noqa: B023

        times = in_turn({name: lambda head=head: run(head) for name, head in HEADS.items()}, rounds)
        floor = times["bare products"]
        cells = [
            f"{statistics.median(own):.0f} ({statistics.median(a / b for a, b in zip(own, floor, strict=True)):.2f})"
            for own in times.values()
        ]
        rows.append([f"{tokens:,} x {width:,} x {entries:,}", *cells])
    return rows


def steps(path: str, rounds: int) -> list[list[str]]:
    """Milliseconds of forward and backward of a real model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    weight, rows = model.get_output_embeddings().weight, []
    for tokens in (1024, 2048):
        for share in (0.25, 1.0):
            ids = torch.randint(0, len(weight), (1, tokens), generator=torch.Generator().manual_seed(0))
            trained = int(tokens * share)

            def run(head: Head) -> None:
                model.zero_grad()
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, -trained:]  # noqa: B023
                head(hidden, weight, ids[0, -trained:])  # noqa: B023

            contenders = {name: HEADS[name] for name in STEPS}
            times = in_turn({name: lambda head=head: run(head) for name, head in contenders.items()}, rounds)
            floor = times["bare products"]
            cells = [
                f"{statistics.median(own):.0f} ({statistics.median(a / b for a, b in zip(own, floor, strict=True)):.3f})"
                for own in times.values()
            ]
            rows.append([f"{tokens:,}, {share:.0%}", *cells])
    return rows


def peak(head: Head, shape: tuple[int, int, int]) -> float:
    """MiB that a call takes beyond its tensors and their gradients."""
    parts = tensors(*shape)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _status("VmRSS")
    head(*parts)
    gradients = sum(part.nbytes for part in parts[:2])
    return (_status("VmHWM") - before - gradients) / 2**20


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def memory() -> list[list[str]]:
    """Peak MiB by tokens and entries, ours and full logits."""
    peak(ours, (64, 64, 1000))  # what libraries keep for themselves
    rows = []
    for tokens in TOKENS:
        cells = []
        for entries in ENTRIES:
            shape = (tokens, 64, entries)
            logits = 4 * tokens * entries
            all_of_them = f"{peak(full, shape):,.0f}" if logits <= MAX_LOGITS else f"> {logits / 2**20:,.0f}"
            cells.append(f"{peak(ours, shape):,.0f} / {all_of_them}")
        rows.append([f"{tokens:,}", *cells])
    return rows


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(describe(), "\n")
    if options.model:
        print("Forward and backward of the model: ms, in brackets times the floor, round by round\n")
        print(table(["tokens, trained", *STEPS], steps(options.model, options.rounds)), "\n")
    print("The head alone: ms, in brackets times its bare products\n")
    print(table(["tokens x width x entries", *HEADS], heads(options.rounds)), "\n")
    print("Peak MiB beyond inputs, weight and gradients, width 64: ours / full logits\n")
    print(table(["tokens", *(f"{entries:,} entries" for entries in ENTRIES)], memory()))


if __name__ == "__main__":
    main()
