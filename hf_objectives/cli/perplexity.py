"""`hf-objectives perplexity`: exact perplexity and bits per byte of texts under a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_objectives.cli.options import PerplexityOptions
from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import compute_perplexity
from hf_objectives.inspection import visible
from hf_objectives.preparation import load_rows
from hf_objectives.recipes import named_sources


def perplexity(options: PerplexityOptions) -> None:
    """Print nats, tokens, perplexity and bits per byte, of all texts and of each source."""
    name = str(options.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=options.dtype).eval()
    except (OSError, ValueError, KeyError) as error:  # missing, or a folder of something else
        raise ConfigError(f"no model can be loaded from {name}: {error}") from error
    result = compute_perplexity(
        model,
        tokenizer,
        _rows(options),
        max_length=options.max_length,
        stride=options.stride,
        batch_tokens=options.batch_tokens,
        group_by="source",
    )
    if options.json:
        print(json.dumps(asdict(result), indent=1, ensure_ascii=False))
        return
    table = Table("texts", "tokens", "bytes", "nats a token", "perplexity", "bits per byte", header_style="bold")
    for name, found in {**result.groups, "all": result}.items():
        counts = f"{found.num_tokens:,}", f"{found.num_bytes:,}"
        figures = found.nll / found.num_tokens, found.perplexity, found.bits_per_byte
        table.add_row(Text(visible(name)), *counts, *(f"{value:.6g}" for value in figures))
    Console(highlight=False).print(table)


def _rows(options: PerplexityOptions) -> Iterator[dict[str, Any]]:
    for name, source in named_sources(options.sources, options.dataset_name).items():
        for row in load_rows(options.place(name, source)):
            yield {**row, "source": name}
