"""The house's plan, read off the syntax tree: who imports whom, and how long things are."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("memory", "trainer", "bench")
MAY_IMPORT = {"memory": {"memory"}, "trainer": {"trainer", "memory"}, "bench": {"bench", "trainer", "memory"},
              "run": {"trainer", "memory"}}
LONG = {"trainer/loop.py": 120}  # everything else: 80


def _files(*packages: str) -> list[Path]:
    return sorted(f for p in packages for f in (ROOT / p).rglob("*.py"))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(f): f for f in [*_files(*PACKAGES), ROOT / "run.py"]}


def _imported(node: ast.AST) -> list[str]:
    """Full names that one import statement may bind modules by."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def _module_level(tree: ast.AST):
    """Nodes that run on import: not in functions, not under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _module_level(node)


def _imports(path: Path, *, everywhere: bool) -> set[str]:
    nodes = ast.walk(_tree(path)) if everywhere else _module_level(_tree(path))
    return {name for node in nodes for name in _imported(node)}


def _tops(path: Path, *, everywhere: bool = True) -> set[str]:
    return {name.split(".")[0] for name in _imports(path, everywhere=everywhere)}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_direction_of_imports(package):
    files = [ROOT / "run.py"] if package == "run" else _files(package)
    assert files
    ours = {*PACKAGES, "run", "tests"}
    for file in files:
        foreign = _tops(file) & ours - MAY_IMPORT[package]
        assert not foreign, f"{file.relative_to(ROOT)} imports {', '.join(sorted(foreign))}"


def test_memory_knows_torch_and_nothing_above_it():
    allowed = {*sys.stdlib_module_names, "torch", "memory", "bitsandbytes", "pynvml"}
    for file in _files("memory"):
        foreign = _tops(file) - allowed
        assert not foreign, f"{file.relative_to(ROOT)} imports {', '.join(sorted(foreign))}"
        lazy = _tops(file, everywhere=False) & {"bitsandbytes", "pynvml"}
        assert not lazy, f"{file.relative_to(ROOT)} imports {lazy} at module level"


@pytest.mark.parametrize("file", [*MODULES.values()], ids=lambda f: str(f.relative_to(ROOT)))
def test_what_is_imported_is_used(file):
    bound = {(alias.asname or alias.name).split(".")[0]: node.lineno for node in ast.walk(_tree(file)) if isinstance(node, ast.Import | ast.ImportFrom)
             for alias in node.names if alias.name != "annotations"}
    text = file.read_text().splitlines()
    used = {node.id for node in ast.walk(_tree(file)) if isinstance(node, ast.Name)}
    named = {word for node in ast.walk(_tree(file)) if isinstance(node, ast.Constant) and isinstance(node.value, str)
             for word in re.findall(r"\w+", node.value)}  # annotations may be strings
    unused = {name: line for name, line in bound.items() if name not in used | named and "noqa" not in text[line - 1]}
    assert not unused


def test_no_import_cycles_between_modules():
    graph = {name: {m for m in _imports(file, everywhere=False) if m in MODULES and m != name}
             for name, file in MODULES.items()}
    done, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, "cycle: " + " -> ".join([*path[path.index(name):], name])
        if name in done:
            return
        path.append(name)
        for target in sorted(graph[name]):
            visit(target)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)
    assert "memory.plan" in graph["trainer.config"]  # the graph is not empty


@pytest.mark.parametrize("module", ["memory.plan", "memory.cards", "trainer.config", "trainer.cli", "trainer.errors", "run"])
def test_import_without_torch(module):
    """Statically: nothing that these import at module level imports torch at module level."""
    pending, seen = [module], set()
    while pending:
        name = pending.pop()
        if name in seen or name not in MODULES:
            continue
        seen.add(name)
        assert "torch" not in _tops(MODULES[name], everywhere=False), f"{module} -> {name} -> torch"
        pending += _imports(MODULES[name], everywhere=False)


def test_cli_imports_no_torch_in_fact():
    code = "import sys, trainer.cli, memory.plan, memory.cards; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("file", [*MODULES.values()], ids=lambda f: str(f.relative_to(ROOT)))
def test_functions_are_short_and_handlers_name_what_they_catch(file):
    limit = LONG.get(str(file.relative_to(ROOT)), 80)
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= limit, f"{node.name} has {length} lines"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"


def test_memory_package_is_empty_and_nothing_is_called_utils():
    assert (ROOT / "memory" / "__init__.py").read_text() == ""
    assert not [name for name in MODULES if name.split(".")[-1] in ("utils", "util", "helpers", "common", "misc")]


def test_no_pickle_but_the_released_eraser():
    for name, file in MODULES.items():
        calls = [ast.unparse(n) for n in ast.walk(_tree(file)) if isinstance(n, ast.Call)]
        loads = [c for c in calls if c.startswith("torch.load(")]
        assert not loads or (name == "trainer.eraser_files" and all("weights_only=True" in c for c in loads)), name
        if name != "trainer.eraser_files":
            assert not [c for c in calls if c.startswith(("pickle.load", "torch.save("))], name
