"""What the documents say: their code runs, their commands have these options, their messages exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset

import hf_objectives
from hf_objectives import demo
from hf_objectives.cli.main import SHELLS
from hf_objectives.cli.options import COMMANDS, make_parser
from hf_objectives.cli.recipe_options import read_table, recipe_keys

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
}
RUN = (
    "README.md",
    "docs/tutorial.md",
    "docs/evaluation.md",
)  # whose code is run; that of others is compiled, and its imports are made
LAUNCHER = {name for action in launch_command_parser()._actions for name in action.option_strings}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(text):
    """Lines that call a command or a recipe of ours, continued lines joined, comments and what follows a pipe left out."""
    lines = "\n".join([*blocks(text, ""), *blocks(text, "bash"), *re.findall(r"^    (\S(?:\\\n|.)*)", text, re.M)])
    for line in re.sub(r"\\\n", " ", lines).splitlines():
        words = line.strip().removeprefix("HF_HUB_OFFLINE=1 ")
        if re.match(r"(hf-objectives \w|accelerate launch .*recipes/|python recipes/|torchrun .*recipes/)", words):
            yield re.split(r" [#|>] | && ", words)[0]


PYTHON = [(page, i, code) for page, text in PAGES.items() for i, code in enumerate(blocks(text, "python"))]
SHELL = [(page, line) for page, text in PAGES.items() for line in commands(text)]


@pytest.mark.parametrize(
    ("page", "i", "code"), [(p, i, c) for p, i, c in PYTHON if p not in RUN], ids=lambda value: str(value)[:40]
)
def test_code_compiles_and_its_imports_are_there(page, i, code):
    tree = ast.parse(code)
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    exec(compile(ast.Module([node for node in imports if _is_ours(node)], []), page, "exec"), {})


def _is_ours(node):
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return all(name.split(".")[0] in ("hf_objectives", "transformers", "trl", "datasets", "torch") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_code_runs(page, tmp_path, monkeypatch):
    """With what a reader has at hand: a model, a tokenizer, rows and texts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tokenizer = demo.build_tokenizer()
    rows = [row for row in demo.chats(24) if "tools" not in row]
    names = {
        "tokenizer": tokenizer,
        "model": demo.build_model(tokenizer, hidden_size=32, num_layers=1),
        "dataset": Dataset.from_list(rows[:12]),
        "held_out": Dataset.from_list(rows[12:]),
        "messages": rows[0]["messages"],
        "tools": None,
        "texts": [row["text"] for row in demo.texts(3)],
    }
    for code in blocks(PAGES[page], "python"):
        exec(compile(code, page, "exec"), names)


@pytest.mark.parametrize(("page", "line"), SHELL, ids=lambda value: value[:60])
def test_a_command_has_these_options(page, line):
    words = shlex.split(line.replace("...", ""), comments=True)
    given = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    if words[0] == "hf-objectives":
        name = words[1].replace("-", "_")
        assert name in COMMANDS or name in read_table()["recipes"] or name == "completion", name
    else:
        name = next(Path(word).stem for word in words if "recipes/" in word and word.endswith(".py"))
    if name == "completion":
        assert words[2] in SHELLS
        return
    known = recipe_keys(name) if name in read_table()["recipes"] else {a.dest for a in make_parser(name)._actions}
    launcher = {option.removeprefix("--").replace("-", "_") for option in LAUNCHER} | {
        "nproc_per_node",
        "nnodes",
        "node_rank",
    }
    assert given - known - launcher - {"config", "print_config"} == set(), line
    if "--config" in words and not (config := words[words.index("--config") + 1]).endswith(".yaml"):
        assert (ROOT / "hf_objectives" / "recipes" / "configs" / f"{config}.yaml").exists(), config


def test_there_is_code_and_there_are_commands():
    assert len(PYTHON) >= 10 and len(SHELL) >= 40


@pytest.mark.parametrize("message", re.findall(r"^\| `([^`]+)` \|", PAGES["docs/troubleshooting.md"], re.M))
def test_a_message_is_one_of_ours(message):
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "hf_objectives").rglob("*.py"))
    assert message in re.sub(r'"\s*\n\s*f?"', "", source)


def test_every_page_is_on_the_site_and_every_name_in_its_reference():
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.BaseLoader)  # tags stay text
    listed = json.dumps(site["nav"])
    assert [page for page in PAGES if page.startswith("docs/") and f'"{Path(page).name}"' not in listed] == []
    reference = PAGES["docs/api.md"]
    assert [name for name in hf_objectives.__all__ if f".{name}\n" not in reference] == []


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not target.startswith(("http", "mailto")):
                assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
