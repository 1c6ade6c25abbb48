"""The cost of a conversation's turns: `encode_chat` against one plain `apply_chat_template`, under TRL's chat templates.

    python benchmarks/chat_turns.py --tokenizer FOLDER_OR_ID [--against CHECKOUT] [--rounds 3] [--turns 10 40 160 640]

Two conversations: questions and answers without tools, and with tools one call and its result in every third question. Both
are encoded once before the clock starts. The clock is the process's CPU time, so that other people's work does not count.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import trl
from _machine import describe, table
from _sides import clocked, measure, median, report

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Search the documents",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string", "description": "what for"}, "page": {"type": "integer"}},
                "required": ["query"],
            },
        },
    }
]


def conversation(turns: int, tools: bool, blocks: bool = False) -> list[dict]:
    """A conversation of `turns` messages."""
    messages: list[dict] = []
    number = 0
    while len(messages) < turns:
        number += 1
        messages.append(
            {"role": "user", "content": f"Question {number}: what does document {number * 7} say about it?"}
        )
        if tools and number % 3 == 0 and len(messages) + 3 <= turns:
            call = {"name": "search", "arguments": {"query": f"document {number * 7}", "page": number}}
            calls = [{"id": f"call{number:05}", "type": "function", "function": call}]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            messages.append(
                {"role": "tool", "name": "search", "tool_call_id": f"call{number:05}", "content": "Found it."}
            )
        messages.append({"role": "assistant", "content": f"Answer {number}: it says that {number} is a number. " * 3})
    messages = messages[:turns]
    if blocks:
        return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return messages


def side(options: argparse.Namespace) -> None:
    """Measure the package on the path."""
    from transformers import AutoTokenizer

    from hf_objectives import encode_chat

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    numbers = {}
    for name in options.templates:
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
        for tools in (False, True):
            given = TOOLS if tools else None
            for turns in options.turns:
                messages = conversation(turns, tools, blocks=name in ("idefics3", "llava_next", "smolvlm"))
                try:
                    encode_chat(tokenizer, messages, tools=given)
                    plain = [clocked(lambda m=messages, g=given: tokenizer.apply_chat_template(m, tools=g), time.process_time)
                             for _ in range(3)]  # fmt: skip
                except Exception as error:  # a template without tools refuses calls
                    if not tools:
                        raise SystemExit(f"{name}: {error}") from error
                    break
                mine = [clocked(lambda m=messages, g=given: encode_chat(tokenizer, m, tools=g), time.process_time)
                        for _ in range(3)]  # fmt: skip
                key = f"{name}|{'tools' if tools else 'plain'}|{turns}"
                numbers[key], numbers[key + "|apply"] = min(mine), min(plain)
    report(numbers)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--against")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, nargs="+", default=[10, 40, 160, 640])
    parser.add_argument("--templates", nargs="+", default=NAMES)
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return side(options)
    arguments = [
        "--tokenizer",
        options.tokenizer,
        "--turns",
        *map(str, options.turns),
        "--templates",
        *options.templates,
    ]
    sides = measure(__file__, arguments, options.against, options.rounds)
    print(describe(), "\n")
    print(f"{options.rounds} rounds, medians, milliseconds of CPU time; in brackets: times one apply_chat_template\n")
    lines = []
    for kind in ("plain", "tools"):
        for name in options.templates:
            cells = [name, kind]
            for turns in options.turns:
                key = f"{name}|{kind}|{turns}"
                if key not in sides[0]:
                    break
                apply = median(sides[0], key + "|apply")
                times = [median(numbers, key) for numbers in sides[::-1]]
                cells.append(f"{apply * 1e3:.1f}")
                cells += [f"{seconds * 1e3:.1f} ({seconds / apply:.1f})" for seconds in times]
            else:
                lines.append(cells)
    heads = ["apply", *(["before"] if options.against else []), "now"]
    print(table(["template", "", *(f"{turns}: {head}" for turns in options.turns for head in heads)], lines))


if __name__ == "__main__":
    main()
