"""What the recipes that learn from preference pairs share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pyarrow as pa
from datasets import Dataset

from hf_objectives.errors import FormatError
from hf_objectives.labels import SIDES, Account, Ledger
from hf_objectives.preparation import mapped_dataset, mapped_table
from hf_objectives.recipes.data import Rows, digest, set_template, set_tokens, split_rows, usable_rows
from hf_objectives.recipes.run import Recipe
from hf_objectives.types import Row

_ROWS_AT_ONCE = 2_000  # that are Python values at a time


class PairRecipe(Recipe):
    """A recipe that trains on encoded pairs.

    Attributes:
        encode_row: `encode_pair` or its like.
        encoding_options: which of the training arguments it takes.
        built_in: how many built-in pairs to train on, and how many to hold out.
        held_out: pairs that are held out, not encoded; set by `load_rows`.
        ledger: what happened to the pairs to train on; set by `load_rows`.
    """

    encode_row: ClassVar[Callable[..., dict[str, Any]]]
    encoding_options: ClassVar[tuple[str, ...]]
    built_in: ClassVar[tuple[int, int]]
    held_out: Rows
    ledger: Ledger

    def load_rows(self, tokenizer: Any) -> None:
        """Load the pairs, and encode those to train on."""
        set_template(tokenizer, self.data.chat_template)
        # TRL sets them when rows are encoded already.
        set_tokens(tokenizer, **{name: getattr(self.args, name, None) for name in ("eos_token", "pad_token")})
        pairs, self.held_out = split_rows(self.data, seed=self.args.seed, built_in=self.built_in)
        self.ledger = Ledger()
        account = self.ledger[pairs[0]["source"]]
        self.train_rows = self.encode(pairs, tokenizer, account)
        for row in self.train_rows:
            tokens = len(row.get("prompt_ids", ())) + sum(len(row[f"{side}_ids"]) for side in SIDES)
            trained = sum(_trained(row, side) for side in SIDES)
            account.tokens_in += tokens
            account.trained += trained
            account.masked += tokens - trained
        self.num_rows, self.rows_digest = len(self.train_rows), digest(self.train_rows)
        self.results |= {"num_pairs": self.num_rows, "ledger": self.ledger.to_dict()}

    def encode(self, pairs: Rows, tokenizer: Any, account: Account | None = None) -> Dataset:
        """Pairs as ids, with their `source` and `row`, on disk."""
        options = {name: getattr(self.args, name) for name in self.encoding_options}
        encode = type(self).encode_row
        rows = usable_rows(
            *(self.data, pairs),
            lambda pair: encode(tokenizer, pair, source=pair["source"], row_index=pair["row"], **options),
            account,
        )
        return mapped_dataset(mapped_table(_tables(rows)))

    def introduce(self, trainer: Any) -> None:
        """Print the plan, and what happened to every pair."""
        super().introduce(trainer)
        for line in self.ledger.lines():
            self.console.print(line, highlight=False, markup=False)


def _tables(rows: Iterator[dict[str, Any]]) -> Iterator[pa.Table]:
    schema: pa.Schema | None = None
    while batch := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        known = [*batch[0]] if schema is None else schema.names
        for row in batch:
            if {*row} != {*known}:
                raise FormatError(
                    f"the pair gives {', '.join(row)} among pairs that give {', '.join(known)}; expected pairs of one kind",
                    source=row["source"],
                    row=row["row"],
                )
        table = pa.Table.from_pylist(batch, schema)
        schema = table.schema
        yield table


def _trained(row: Row, side: str) -> int:
    """Tokens of the answer that the model has to produce."""
    return row[f"{side}_length"] if f"{side}_length" in row else sum(row[f"{side}_mask"])
