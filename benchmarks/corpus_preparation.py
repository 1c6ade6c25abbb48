"""Raw text to packed rows: hf_objectives against TRL's own preparation and against the tokenizer alone, interleaved.

    python benchmarks/corpus_preparation.py --tokenizer FOLDER_OR_ID --texts FILE [FILE ...] [--megabytes 500] [--rounds 3]

The corpus is the given texts over and over, one word in twenty changed, as JSON lines. All start from that file. TRL reads it
with `load_dataset`, tokenises and packs (`bfd`, 2,048 tokens) with each `dataset_num_proc` that may be its best, on a part of
the corpus (its rate does not grow with size), and ends with an Arrow file; ours ends with Arrow or Parquet shards, manifest
and checksums. The tokenizer alone is `encode_batch_flat` of fastokens on texts in memory, all threads, 20,000 texts a call.
Every contender runs in a process of its own; imports are not timed. Peak memory is that of the largest process of ours (its
workers included), for a tenth of the corpus and for all of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _corpus import write_corpus

LENGTH = 2048
TRL = {"TRL, in process (its default)": None, "TRL, 1 process": 1, "TRL, 2 processes": 2}
OURS = {"hf_objectives, Arrow shards": "arrow", "hf_objectives, Parquet shards": "parquet"}
ALONE = "the tokenizer alone"


def run_trl(path: str, tokenizer_name: str, folder: str, num_proc: int | None) -> tuple[float, int]:
    """Seconds and tokens of TRL's preparation."""
    from datasets import disable_caching, load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                    num_attention_heads=1)
    )  # fmt: skip
    arguments = SFTConfig(
        folder, packing=True, max_length=LENGTH, dataset_num_proc=num_proc, use_cpu=True, bf16=False, report_to="none"
    )
    tiny = load_dataset("json", data_files=path, split="train[:2]", cache_dir=folder)
    trainer = SFTTrainer(model, arguments, train_dataset=tiny, processing_class=tokenizer)
    begin = time.perf_counter()
    rows = load_dataset("json", data_files=path, split="train", cache_dir=folder + "/fresh")
    packed = trainer._prepare_dataset(rows, tokenizer, arguments, True, None, "train")
    seconds = time.perf_counter() - begin
    return seconds, sum(
        len(batch["input_ids"].combine_chunks().flatten()) for batch in packed.with_format("arrow").iter(1000)
    )


def run_ours(path: str, tokenizer_name: str, folder: str, file_format: str) -> tuple[float, int]:
    """Seconds and tokens of ours."""
    from datasets import disable_progress_bars
    from transformers import AutoTokenizer

    from hf_objectives import CorpusSettings, prepare_corpus

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    begin = time.perf_counter()
    manifest = prepare_corpus({"c": path}, tokenizer, folder, CorpusSettings(LENGTH, file_format=file_format))
    return time.perf_counter() - begin, manifest.num_tokens


def run_alone(path: str, tokenizer_name: str) -> tuple[float, int]:
    """Seconds and tokens of the tokenizer alone."""
    import fastokens
    import orjson
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(tokenizer_name).backend_tokenizer
    fast = fastokens.Tokenizer.from_json_str(backend.to_str())
    with Path(path).open("rb") as lines:
        texts = [orjson.loads(line)["text"] for line in lines]
    begin, tokens = time.perf_counter(), 0
    for i in range(0, len(texts), 20_000):
        tokens += len(fast.encode_batch_flat(texts[i : i + 20_000])[0]) // 4
    return time.perf_counter() - begin, tokens


def work(name: str, path: str, tokenizer: str) -> None:
    """One contender in this process; prints seconds, tokens and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        if name in TRL:
            seconds, tokens = run_trl(path, tokenizer, folder, TRL[name])
        elif name in OURS:
            seconds, tokens = run_ours(path, tokenizer, folder, OURS[name])
        else:
            seconds, tokens = run_alone(path, tokenizer)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print("RESULT" + json.dumps({"seconds": seconds, "tokens": tokens, "peak": max(peaks) / 2**10}))


def measured(name: str, path: Path, tokenizer: str) -> dict:
    """A contender in a fresh process."""
    command = [sys.executable, __file__, "--tokenizer", tokenizer, "--worker", name, "--texts", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    if line is None:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-4000:]}")
    return {**json.loads(line[6:]), "megabytes": path.stat().st_size / 1e6}


def main() -> None:
    """Run the rounds and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--trl-megabytes", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--worker")
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.texts[0], options.tokenizer)
        return
    from _machine import describe, table

    whole = write_corpus(options.texts, options.folder, options.megabytes)
    part = write_corpus(options.texts, options.folder, options.trl_megabytes)
    results: dict[str, list[dict]] = {name: [] for name in (*TRL, *OURS, ALONE)}
    for _ in range(options.rounds):
        for name, of in results.items():
            of.append(measured(name, part if name in TRL else whole, options.tokenizer))
    rates = {name: [one["megabytes"] / one["seconds"] for one in of] for name, of in results.items()}
    best = max(TRL, key=lambda name: statistics.median(rates[name]))
    lines = []
    for name, of in results.items():
        against = [
            statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True)) for other in (best, ALONE)
        ]
        lines.append(
            [name, f"{of[0]['megabytes']:.0f}", f"{statistics.median(rates[name]):.1f}",
             f"{min(rates[name]):.1f} to {max(rates[name]):.1f}", f"{of[0]['tokens'] / 1e6:.1f}", f"{against[0]:.2f}",
             f"{against[1]:.2f}"]
        )  # fmt: skip
    print(describe(), f"\n\n{options.rounds} rounds in turn, medians\n")
    print(
        table(
            ["", "MB of JSON lines", "MB/s", "range", "million tokens", f"against {best}", "against the tokenizer"],
            lines,
        )
    )
    tenth = write_corpus(options.texts, options.folder, options.megabytes // 10)
    print("\nPeak memory of the largest process of ours, MiB\n")
    lines = [
        [name, *(f"{measured(name, path, options.tokenizer)['peak']:.0f}" for path in (tenth, whole))] for name in OURS
    ]
    print(table(["", f"{options.megabytes // 10} MB", f"{options.megabytes} MB"], lines))


if __name__ == "__main__":
    main()
