"""The way of one chat row to tensors: the functions of hf_objectives that a warm collator passes, and their lines.

    python benchmarks/row_walk.py --tokenizer FOLDER_OR_ID [--against CHECKOUT]

A function counts once, with all its source lines, decorators and docstring included.
"""

from __future__ import annotations

import argparse
import inspect
import sys

from _machine import describe, table
from _sides import measure, report

ROW = {
    "messages": [
        {"role": "user", "content": "What is two and two?"},
        {"role": "assistant", "content": "It is four."},
        {"role": "user", "content": "And three and three?"},
        {"role": "assistant", "content": "That makes six."},
    ]
}


def side(options: argparse.Namespace) -> None:
    """Walk the package on the path."""
    from transformers import AutoTokenizer

    import hf_objectives

    folder = hf_objectives.__path__[0]
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    collator = hf_objectives.DataCollatorForAssistantOnlyLM(tokenizer)
    for _ in range(3):
        collator([ROW])
    seen = {}

    def watch(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(folder) and frame.f_code.co_name[0] != "<":
            seen.setdefault(frame.f_code, None)

    sys.setprofile(watch)
    collator([ROW])
    sys.setprofile(None)
    lines = {code: len(inspect.getsourcelines(code)[0]) for code in seen}
    if options.verbose:
        for code, count in lines.items():
            print(f"{count:4} {code.co_filename.removeprefix(folder)}:{code.co_qualname}", file=sys.stderr)
    report({"functions": len(lines), "lines": sum(lines.values()), "files": len({code.co_filename for code in lines})})


def main() -> None:
    """Walk and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--against")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return side(options)
    sides = measure(__file__, ["--tokenizer", options.tokenizer], options.against, 1)
    print(describe(), "\n")
    lines = [
        [name, *(f"{int(numbers[key][0])}" for key in ("functions", "lines", "files"))]
        for name, numbers in zip(("now", "before"), sides, strict=False)
    ]
    print(table(["", "functions", "lines", "files"], lines))


if __name__ == "__main__":
    main()
