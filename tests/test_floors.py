"""Policy as tests: imports point down, files and functions stay short, collectives stay in one place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_objectives"

# The floor of each module; a package's modules stand on its floor. A new module is put here on purpose.
FLOORS = {
    0: {"errors", "losses", "perplexity", "packing"},
    1: {
        *("messages", "templates", "styles", "spans", "chat", "formats", "encode", "ledger", "tokenization"),
        *("byte_lengths", "collators", "dataset_packing", "prepare", "data_files", "demo"),
    },
    2: {"distributed", "projection", "isolation", "evaluation", "trainers", "diagnostics"},
    3: {"cli_args", "plan", "preview", "hub"},
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
# Tests that stand elsewhere: a package's parts share a file, and re-exports have nothing of their own to test.
TESTED_ELSEWHERE = {
    "demo/skills": "test_demo.py",
    "demo/corpus": "test_demo.py",
    "demo/model": "test_demo.py",
    "demo/accuracy": "test_demo.py",
    "trainers/config": "trainers/test_causal_lm.py",
    "distributed": "invariant/test_two_processes.py",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "hf_objectives":
                yield from (f"hf_objectives.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", [f for f in FILES if f.parent != PACKAGE or f.name != "__init__.py"], ids=str)
def test_imports_point_down(path):
    module = module_of(path)
    assert module in FLOOR_OF, f"{module} stands on no floor; add it to FLOORS"
    for name in imports(path):
        if name.startswith("hf_objectives."):
            other = name.split(".")[1]
            if other in FLOOR_OF:
                assert FLOOR_OF[other] <= FLOOR_OF[module], f"{path.name} imports {name} from a floor above"
        if FLOOR_OF[module] == 0:
            assert name.split(".")[0] not in ("transformers", "trl", "accelerate", "datasets"), f"{path.name}: {name}"
        if name.startswith("torch.distributed"):
            assert module == "distributed", f"{path.name} calls collectives; only distributed.py may"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_are_short(path):
    source = path.read_text()
    assert source.count("\n") <= 450, f"{path.name} is two concepts long"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{path.name}: {node.name}"
        if isinstance(node, ast.ExceptHandler):
            assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), f"{path.name} swallows an error"
    assert "dist." not in source or path.name == "distributed.py" or "torch.distributed" not in source


@pytest.mark.parametrize("path", FILES, ids=str)
def test_public_things_are_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.name} does not say what it is"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_every_module_has_its_test():
    for path in FILES:
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if path.name == "__init__.py" or name == "errors":
            continue
        expected = TESTED_ELSEWHERE.get(name, f"{Path(name).parent / ('test_' + Path(name).name)}.py")
        assert (ROOT / "tests" / expected).exists(), f"{name} has no test at tests/{expected}"


def test_paths_in_documents_exist():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for found in re.findall(r"`((?:recipes|docs|benchmarks|hf_objectives|tests)/[\w./-]+)`", document.read_text()):
            assert (ROOT / found).exists(), f"{document.name} names {found}"


def test_no_machine_path_in_the_tree():
    for path in [
        *FILES,
        *(ROOT / "recipes").rglob("*"),
        *(ROOT / "benchmarks").rglob("*"),
        *(ROOT / "docs").rglob("*"),
    ]:
        if path.is_file() and path.suffix in (".py", ".md", ".yaml"):
            assert not re.search(r"/(?:home|root|work|Users)/", path.read_text()), path
