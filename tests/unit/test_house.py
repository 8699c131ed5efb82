"""The house: who may import whom, and what the core may not import at all."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("zoray", "actors", "launch")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

LAYERS: list[set[str]] = [
    {"errors"},
    {"schedule", "commits", "layout", "rounding", "digest"},
    {"config", "directions", "product", "aggregate", "ledger"},
    {"perturb", "update"},
    {"loss", "memory"},
    {"proof"},
    {"probe"},
    {"replica"},
    {"protocol", "tasks"},
    {"models", "runs"},
    {"identity"},
    {"snapshot"},
]
"""Modules of `zoray`, lower first: none imports one of a higher layer."""


def imports(path: Path) -> Iterator[str]:
    """Dotted names a file imports, wherever in the file; those for type checkers alone do not count."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped.update(child for statement in node.body for child in ast.walk(statement))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    forbidden = {"zoray": {"actors", "launch", "ray", "prometheus_client", "deepspeed"}, "actors": {"launch"}}
    found = {name.split(".")[0] for name in imports(path)}
    assert not found & forbidden.get(package, set())


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[len(ROOT.parts)] == "zoray"], ids=name_of)
def test_lower_modules_never_import_higher_ones(path: Path) -> None:
    level = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    own = path.relative_to(ROOT / "zoray").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "zoray" and len(parts) > 1 and parts[1] != own:
            assert level[parts[1]] < level[own] or {own, parts[1]} <= LAYERS[level[own]], name


def test_every_module_of_the_core_has_its_layer() -> None:
    modules = {path.name.removesuffix(".py") for path in (ROOT / "zoray").iterdir() if path.suffix == ".py"}
    packages = {path.name for path in (ROOT / "zoray").iterdir() if (path / "__init__.py").exists()}
    assert (modules | packages) - {"__init__"} == set().union(*LAYERS)


def test_the_core_needs_no_cluster_library() -> None:
    """A clean interpreter imports every module of the core; the libraries of the cluster stay out."""
    names = [name_of(p).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for p in FILES]
    core = [name for name in names if name.startswith("zoray")]
    code = (
        f"import importlib, sys\nfor name in {core!r}: importlib.import_module(name)\n"
        "print(sorted({'ray', 'deepspeed', 'prometheus_client'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['zoray', '--help']\nfrom launch.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'pydantic', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert "resume" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_every_shipped_configuration_loads() -> None:
    from zoray.config import load

    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(paths) >= 2
    for path in paths:
        config = load(str(path), [])
        assert config.max_steps > 0
        assert config.threads_per_replica == 1, "shipped runs must be comparable byte for byte"
