"""What the recipes that learn from preference pairs share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pyarrow as pa
from datasets import Dataset

from hf_objectives.errors import FormatError
from hf_objectives.labels import SIDES, Account, Ledger
from hf_objectives.preparation import mapped_dataset, mapped_tables
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
        known: list[str] = []  # the columns of the first pair

        def use(pair: Row) -> Row:
            made = type(self).encode_row(tokenizer, pair, source=pair["source"], row_index=pair["row"], **options)
            if set(known or made) != set(made):
                found = f"the pair gives {', '.join(made)} among pairs that give {', '.join(known)}"
                raise FormatError(f"{found}; expected pairs of one kind", source=pair["source"], row=pair["row"])
            known[:] = made
            return made

        tables = mapped_tables(_tables(usable_rows(self.data, pairs, use, account)))
        return mapped_dataset(tables[0]) if tables else Dataset.from_list([])

    def introduce(self, trainer: Any) -> None:
        """Print the plan, and what happened to every pair."""
        super().introduce(trainer)
        for line in self.ledger.lines():
            self.console.print(line, highlight=False, markup=False)


def _tables(rows: Iterator[dict[str, Any]]) -> Iterator[pa.Table]:
    schema: pa.Schema | None = None
    while batch := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        table = pa.Table.from_pylist(batch, schema)
        if schema is None:  # of lists that are all empty Arrow does not know what they are of
            lists = [
                field.with_type(pa.list_(pa.int64())) if pa.types.is_list(field.type) else field
                for field in table.schema
            ]
            table = table.cast(schema := pa.schema(lists))
        yield table


def _trained(row: Row, side: str) -> int:
    """Tokens of the answer that the model has to produce."""
    return row[f"{side}_length"] if f"{side}_length" in row else sum(row[f"{side}_mask"])
