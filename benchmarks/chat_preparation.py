"""Raw Alpaca rows to packed rows with labels: hf_objectives against TRL's own preparation, interleaved.

    python benchmarks/chat_preparation.py --tokenizer FOLDER_OR_ID [--rows alpaca.json] [--count 20000] [--rounds 5]
        [--template qwen3]

TRL gets a ChatML template with `{% generation %}` markers, which its assistant-only loss needs, or with `--template` the
twin of a model's template that TRL trains with; ours gets the same conversations under the same template. Both start from
the same Arrow table and end with packed rows of 2,048 tokens: TRL's in a file that is mapped into memory, ours in memory.
TRL's time has in it the `map` that a user writes to bring Alpaca rows into its form. TRL runs with every
`dataset_num_proc` that may be its best: None, its default, beats 1, for which datasets starts a process all the same. Run
it on a machine that does nothing else: a busy core takes most from two processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import trl
from _machine import describe, table
from datasets import Dataset, disable_caching, disable_progress_bars
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_objectives import demo, prepare_dataset

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LENGTH = 2048


def raw_rows(path: str | None, count: int) -> Dataset:
    """`count` Alpaca rows, repeated from a file or made from the built-in corpus."""
    if path:
        rows = json.loads(Path(path).read_text())
    else:
        rows = [{"instruction": q.question, "input": "", "output": q.answer} for q in demo.questions(1000)]
    return Dataset.from_list([rows[i % len(rows)] for i in range(count)])


def to_messages(row: dict) -> dict:
    """What a TRL user writes to bring Alpaca rows into TRL's form."""
    question = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]}


def trl_preparation(tokenizer, folder: str, num_proc: int | None):
    """A function from raw rows to TRL's packed rows."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                    num_attention_heads=1)
    )  # fmt: skip
    arguments = SFTConfig(
        folder, packing=True, max_length=LENGTH, assistant_only_loss=True, dataset_num_proc=num_proc, use_cpu=True,
        bf16=False, report_to="none",
    )  # fmt: skip
    tiny = Dataset.from_list([to_messages({"instruction": "a", "input": "", "output": "b"})])
    trainer = SFTTrainer(model, arguments, train_dataset=tiny, processing_class=tokenizer)

    def prepare(rows: Dataset) -> Dataset:
        mapped = rows.map(to_messages, remove_columns=rows.column_names, num_proc=num_proc)
        return trainer._prepare_dataset(mapped, tokenizer, arguments, True, None, "train")

    return prepare


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--template", help="name of a template of TRL that has a training twin, for example qwen3")
    options = parser.parse_args()
    disable_caching()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    twin = Path(trl.__file__).parent / "chat_templates" / f"{options.template}_training.jinja"
    tokenizer.chat_template = twin.read_text() if options.template else MARKED
    rows = raw_rows(options.rows, options.count)
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "TRL, in process (its default)": trl_preparation(tokenizer, folder, None),
            "TRL, 1 process": trl_preparation(tokenizer, folder, 1),
            "TRL, 2 processes": trl_preparation(tokenizer, folder, 2),
            "hf_objectives, 1 process": lambda data: prepare_dataset(data, tokenizer, max_length=LENGTH, num_proc=1),
            "hf_objectives, 2 processes": lambda data: prepare_dataset(data, tokenizer, max_length=LENGTH, num_proc=2),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        results = {}
        busy = os.getloadavg()[0]  # other people's work, before ours begins
        for _ in range(options.rounds):
            for name, prepare in ways.items():
                begin = time.perf_counter()
                results[name] = prepare(rows)
                rates[name].append(options.count / (time.perf_counter() - begin))
    best = max(statistics.median(rates[name]) for name in ways if name.startswith("TRL"))
    lines = []
    for name in ways:
        median = statistics.median(rates[name])
        counted = results[name]
        tokens, trained = token_count(counted)
        spread = f"{min(rates[name]):,.0f} to {max(rates[name]):,.0f}"
        lines.append([name, f"{median:,.0f}", spread, f"{median / best:.2f}", f"{tokens:,}", f"{trained:,}"])
    print(describe(), "\n")
    print(f"{options.count:,} rows, {options.rounds} rounds, medians; load average before the first {busy:.2f}\n")
    if busy > 0.5:
        print("The machine was busy: these figures compare nothing.\n")
    print(table(["", "rows/s", "range", "against TRL's best", "tokens", "trained"], lines))


def token_count(dataset: Dataset) -> tuple[int, int]:
    """Tokens and trained tokens, by labels or by the masks of TRL's form."""
    name = next(name for name in ("labels", "assistant_masks", "completion_mask") if name in dataset.column_names)
    values = dataset.with_format("arrow")[:][name].combine_chunks().flatten().to_numpy()
    return len(values), int((values != -100).sum() if name == "labels" else values.sum())


if __name__ == "__main__":
    main()
