"""Feed the readers with bytes that atheris makes, and stop at the first raw error.

    pip install atheris
    python benchmarks/fuzz.py --minutes 10 [--seeds FOLDER] [--only template]

Each input goes to one of seven readers: a row, a file of rows, a log, a YAML file, a manifest, a checkpoint's manifest and a
chat template. A result or an error of `hf_objectives.errors` is fine. Anything else stops the run: atheris writes the input
to `crash-...`; it belongs into `tests/hostile/test_regressions.py`. An input that takes over ten seconds or four gigabytes
stops it too. The package is instrumented, so that inputs that reach new lines are kept and changed.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["hf_objectives"]):
    from hf_objectives import demo, diagnose
    from hf_objectives.errors import HFObjectivesError
    from hf_objectives.labels import Renderer, encode_row
    from hf_objectives.mixture import MixtureConfig
    from hf_objectives.preparation import load_rows
    from hf_objectives.preparation.manifest import MANIFEST, Manifest
    from hf_objectives.trainers.checkpoints import MANIFEST as CHECKPOINT
    from hf_objectives.trainers.checkpoints import fault_of, step_rows_of
    from hf_objectives.types import parse_json

#: Inputs to begin with; the first byte chooses the reader.
SEEDS = [
    b'0{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "tool_calls": []}]}',
    b'0{"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "{\\"name\\": \\"f\\"}"}]}',
    b'0{"instruction": "a", "input": "", "output": "b", "history": [["a", "b"]], "system": "s"}',
    b'0{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c", "tools": "[]"}',
    b'0{"input_ids": [1, 2], "labels": [-100, 2]}',
    b'1{"text": "a"}\n{"text": "b", "source": "x", "row": 3}\n',
    b'1[{"text": "a"}, {"text": "b"}]',
    b'2{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1e999, "grad_norm": NaN}\n',
    b'2{"log_history": [{"step": 1, "loss": 2.0, "epoch": 0.1}], "global_step": 1}',
    b"2step,loss\n1,2.0\n2,x\n",
    b"3sources:\n  a: &a {path: x.jsonl, weight: 1}\n  b: *a\nunit: tokens\n",
    b'4{"policy": {"preparation_version": 3, "max_length": 1, "eval_share": 0}, "ledgers": {}, "shards": [{"path": "x"}]}',
    b'5{"version": 1, "files": {"a": {"size": 1, "crc32": "x"}}, "step_rows": {}}',
    b"6{% for m in messages %}{{ m.role + m['content'] | trim }}{% endfor %}{{ 'a' * 3 }}",
    b"6{% macro f(n) %}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}{{ messages | tojson(indent=2) }}",
    b"6{% set ns = namespace(x='') %}{% for i in range(9) %}{% set ns.x = ns.x ~ i %}{% endfor %}{{ ns.x.split('1') }}",
]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


class Readers:
    """The readers, by the first byte of an input."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokenizer = folder, demo.build_tokenizer()
        self.all = [self.row, self.rows, self.log, self.yaml, self.manifest, self.checkpoint, self.template]
        self.seen: Counter[str] = Counter()

    def __call__(self, data: bytes) -> None:
        """Read an input; an error of the package is a result."""
        reader = self.all[(data[0] - ord("0") if data else 0) % len(self.all)]
        self.seen[reader.__name__] += 1
        with contextlib.suppress(HFObjectivesError):
            reader(data[1:])

    def _file(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def row(self, data: bytes) -> None:
        """A row of any format, to ids and labels."""
        try:
            row = parse_json(data)
        except ValueError:  # what `parse_json` promises
            return
        encode_row(self.tokenizer, row, source="fuzz", row_index=0)

    def rows(self, data: bytes) -> None:
        """A file of rows."""
        for name in ("rows.jsonl", "rows.json", "rows.txt", "rows.jsonl.gz", "rows.parquet"):
            with contextlib.suppress(HFObjectivesError):
                load_rows(str(self._file(name, data)))

    def log(self, data: bytes) -> None:
        """A log of a run."""
        for name in ("log.jsonl", "trainer_state.json", "log.csv"):
            with contextlib.suppress(HFObjectivesError):
                diagnose(str(self._file(name, data)))

    def yaml(self, data: bytes) -> None:
        """A mixture."""
        MixtureConfig.read(str(self._file("mixture.yaml", data)))

    def manifest(self, data: bytes) -> None:
        """The manifest of a prepared folder."""
        Manifest.read(self._file(MANIFEST, data).parent).lines()

    def checkpoint(self, data: bytes) -> None:
        """The manifest of a checkpoint."""
        folder = self._file(CHECKPOINT, data).parent
        fault_of(folder)
        step_rows_of(folder)

    def template(self, data: bytes) -> None:
        """A chat template."""
        Renderer(self.tokenizer, data.decode("utf-8", "replace"), None, {})(CHAT)


def main() -> None:
    """Run until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", help="a folder of inputs, kept from run to run; a fresh one without it")
    parser.add_argument("--only", help="one reader: row, rows, log, yaml, manifest, checkpoint or template")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(options.seeds or f"{folder}/seeds")
        seeds.mkdir(parents=True, exist_ok=True)
        for i, seed in enumerate(SEEDS):
            (seeds / f"seed-{i}").write_bytes(seed)
        readers = Readers(Path(folder))
        if options.only:
            readers.all = [reader for reader in readers.all if reader.__name__ == options.only]
        end = time.monotonic() + 60 * options.minutes

        def read(data: bytes) -> None:
            readers(data)
            if time.monotonic() > end:
                print(f"{sum(readers.seen.values()):,} inputs without a raw error: {dict(readers.seen)}", flush=True)
                raise SystemExit

        atheris.Setup([sys.argv[0], "-timeout=10", "-rss_limit_mb=4096", "-max_len=4096", str(seeds)], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
