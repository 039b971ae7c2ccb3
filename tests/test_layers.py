"""Layers: who may import what, and the README's tree against the disk."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import CHATML, ROOT, tokenizer_folder

CORE = ROOT / "qlora_core"
HEAVY = {"torch", "peft", "bitsandbytes", "accelerate"}
MODULES = sorted(CORE.rglob("*.py"))
# The fenced tree of README.md; each line is "├── name" or "└── name" at its depth, then what it is.
TREE = re.compile(r"^```[a-z]*\nqlora-lab/\n(.*?)^```", re.MULTILINE | re.DOTALL)
BRANCH = re.compile(r"^((?:│   |    )*)(?:├──|└──) (\S+)")


def layer(path: Path) -> str:
    """ "ui", "worker", or "pure" for what both may use."""
    part = path.relative_to(CORE).parts[0]
    return part if part in ("ui", "worker") else "pure"


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Every name that the module imports, in full, and whether that is at import; type-checking blocks count too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_import = set(map(id, _outside_functions(tree)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, id(node) in at_import
        elif isinstance(node, ast.ImportFrom):
            package = list(path.relative_to(ROOT).with_suffix("").parts)[: -node.level] if node.level else []
            module = ".".join([*package, *(node.module or "").split(".")]).strip(".")
            for name in node.names:
                yield f"{module}.{name.name}", id(node) in at_import


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from _outside_functions(child)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_libraries_stay_in_their_layer(path: Path) -> None:
    packages = {name.partition(".")[0] for name, _ in imported(path)}
    if layer(path) != "ui":
        assert "gradio" not in packages, "only qlora_core/ui imports gradio"
    if layer(path) != "worker":
        assert not packages & HEAVY, "only qlora_core/worker imports torch and what needs it"
        transformers = {(name, at_import) for name, at_import in imported(path) if name.startswith("transformers")}
        allowed = {("transformers.PreTrainedTokenizerFast", False)} if path.name == "tokens.py" else set()
        assert transformers <= allowed, "the rest of transformers imports torch"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows_point_from_page_and_worker_to_the_pure_modules(path: Path) -> None:
    names = {name for name, _ in imported(path)}
    other = {"ui": ("worker",), "worker": ("ui",), "pure": ("ui", "worker")}[layer(path)]
    for part in other:
        assert not any(f"{name}.".startswith(f"qlora_core.{part}.") for name in names)


def test_page_never_reaches_for_the_worker() -> None:
    names = {name for name, _ in imported(ROOT / "app.py")}
    assert not {name.partition(".")[0] for name in names} & HEAVY
    assert not any(name.startswith("qlora_core.worker") for name in names)


def test_pure_modules_and_rendering_leave_torch_and_gradio_out(tmp_path: Path) -> None:
    """What an import says is not all: a library may bring torch along."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if layer(path) == "pure" and path.name != "__main__.py"
    ]
    tokenizer_folder(tmp_path, chat_template=CHATML)
    code = f"""
import importlib, sys
from pathlib import Path
for name in {names!r}:
    importlib.import_module(name)
from qlora_core.data.rows import Example, Message
from qlora_core.tokens import load_tokenizer, prompt_ids, render
tokenizer = load_tokenizer(Path({str(tmp_path)!r}))
example = Example(1, (Message("user", "a"), Message("assistant", "b")))
assert render(example, tokenizer).end_supervised(100) and prompt_ids(example, tokenizer)
print(sorted({HEAVY | {"gradio"}!r} & sys.modules.keys()))
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "[]\n"


def test_nothing_runs_at_import() -> None:
    """A module holds imports, definitions and constants; only `if __name__ == "__main__"` does something."""
    for path in MODULES:
        if path.name == "__main__.py":
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            loop = isinstance(node, (ast.For, ast.While, ast.With))
            assert not call and not loop, f"{name_of(path)}:{node.lineno} runs at import"


def test_every_module_says_first_what_it_does() -> None:
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{name_of(path)} has no first sentence"


def tree_of_readme() -> set[str]:
    """Paths of README.md's tree, relative to the repository; folders without their last slash."""
    found = TREE.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found, 'README.md has no fenced block that starts with the line "qlora-lab/"'
    paths, folders = set(), []
    for line in filter(lambda line: line.strip("│ "), found[1].splitlines()):
        branch = BRANCH.match(line)
        assert branch, (
            f"the tree's line {line!r} is no branch: expected '├── name   what it is' at a depth of 4 a level"
        )
        depth = len(branch[1]) // 4
        folders[depth:] = [branch[2].rstrip("/")]
        paths.add("/".join(folders))
    return paths


def project_files() -> list[str]:
    """What git tracks; in an unpacked archive, what is there."""
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = git.stdout.splitlines() or [name_of(path) for path in ROOT.rglob("*") if path.is_file()]
    return [path for path in files if not path.startswith(".") and "__pycache__" not in path]


def test_readme_tree_is_the_tree_on_disk() -> None:
    told, files = tree_of_readme(), [path.split("/") for path in project_files()]
    gone = {path for path in told if not list(ROOT.glob(path))}
    there = {parts[0] for parts in files} | {f"qlora_core/{parts[1]}" for parts in files if parts[0] == "qlora_core"}
    untold = {path for path in there if not path.endswith(("__init__.py", "__main__.py"))} - told
    assert not gone, f"README.md names what is not there: {sorted(gone)}"
    assert not untold, f"README.md does not name: {sorted(untold)}"
