"""The house holds: imports go launch -> actors -> zoray, the core knows no cluster, and its layers point downwards.

Every import statement counts, also those inside functions and those for the type checker: what a module names it knows.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = ("zoray", "actors", "launch")
"""A package may import itself and those before it."""

LAYERS = (
    {"errors", "files", "partitioned", "exact"},
    {"schedule", "commits", "layout", "digest", "product", "rounding", "stores"},
    {"optim", "fused"},
    {"config", "coverage", "inputs"},
    {"directions"},
    {"perturb", "update", "ledger"},
    {"loss", "aggregate"},
    {"strays", "objective"},
    {"proof"},
    {"probe"},
    {"estimators"},
    {"memory"},
    {"selection"},
    {"replica"},
    {"protocol"},
    {"tasks", "runs", "shelf"},
    {"tuning"},
    {"models"},
    {"planning"},
    {"identity"},
    {"snapshot"},
)
"""The core from the bottom up, by the first name below `zoray`; a module may import itself and the layers below it."""

FOREIGN_TO_CORE = ("ray", "deepspeed", "prometheus_client")
DOOR = "zoray.memory.zero3"
"""The only module that may name DeepSpeed, and imports it late."""
KERNEL = "zoray.fused.kernel"
"""The only module that needs Triton, which comes with torch where there is an accelerator."""
LIGHT = (
    "errors",
    "files",
    "stores",
    "schedule",
    "commits",
    "optim",
    "config",
    "ledger",
    "aggregate",
    "protocol",
    "tuning",
)
"""What the command line and the coordinator load: never torch or transformers, which take seconds."""


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file, for every module of `package`."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported; `from a import b` counts as `a.b`, which is `a` or below it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def outward(module: str, source: str) -> list[str]:
    """Imports that leave the package of `module` for one above it, or bring a cluster into the core."""
    package = module.split(".")[0]
    above = PACKAGES[PACKAGES.index(package) + 1 :]
    forbidden = above + FOREIGN_TO_CORE if package == "zoray" else above
    forbidden = tuple(name for name in forbidden if (module, name) != (DOOR, "deepspeed"))
    return [f"line {line}: {name}" for line, name in imports(source) if name.split(".")[0] in forbidden]


def layer(name: str) -> int:
    """The layer of `zoray.<name>...`."""
    at = [index for index, names in enumerate(LAYERS) if name in names]
    assert at, f"zoray.{name} has no place in the house yet: give it one in LAYERS"
    return at[0]


def upward(name: str, source: str) -> list[str]:
    """Imports by the core's module `name` (the part below `zoray`) of modules that are not below it."""
    found = []
    for line, imported in imports(source):
        package, _, rest = imported.partition(".")
        below = rest.split(".")[0]
        if package == "zoray" and below not in ("__version__", name) and layer(below) >= layer(name):
            found.append(f"line {line}: {imported}")
    return found


def core_files() -> list[tuple[str, Path]]:
    """(part below `zoray`, file) of every module of the core but its `__init__`."""
    return [(name.split(".")[1], path) for name, path in modules("zoray").items() if "." in name]


def run_clean(code: str) -> str:
    """What `code` prints in an interpreter of its own."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    files = modules(package)
    assert files
    assert {name: bad for name, path in files.items() if (bad := outward(name, path.read_text("utf-8")))} == {}


def test_core_layers_point_downwards() -> None:
    faults = {str(path): bad for name, path in core_files() if (bad := upward(name, path.read_text("utf-8")))}
    assert faults == {}


def test_every_room_is_in_use() -> None:
    assert set().union(*LAYERS) == {name for name, _ in core_files()}
    assert sum(map(len, LAYERS)) == len(set().union(*LAYERS))


def test_deepspeed_has_one_door() -> None:
    users = {}
    for name, path in {name: path for package in PACKAGES for name, path in modules(package).items()}.items():
        tree = ast.parse(path.read_text("utf-8"))
        if any(imported.split(".")[0] == "deepspeed" for _, imported in imports(path.read_text("utf-8"))):
            early = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            users[name] = any("deepspeed" in ast.unparse(node) for node in early)
    assert users.keys() == {DOOR}, f"deepspeed belongs in one module, not in {sorted(users)}"
    assert not any(users.values()), f"deepspeed must be imported late in {sorted(users)}"


def test_core_runs_without_a_cluster() -> None:
    code = f"""
import importlib, sys
for name in {[name for name in modules("zoray") if name != KERNEL]!r}:
    importlib.import_module(name)
print([name for name in {FOREIGN_TO_CORE!r} if name in sys.modules], "torch" in sys.modules)
"""
    assert run_clean(code) == "[] True\n"


def test_without_deepspeed_sharding_says_what_to_install() -> None:
    code = """
import sys
for name in ("deepspeed", "accelerate"):
    sys.modules[name] = None
import torch
from zoray.errors import ZorayError
from zoray.memory.zero3 import Zero3
from zoray.replica import Replica
print(Replica(torch.nn.Linear(2, 2)).digest() > 0)
for world in (False, True):
    if world:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        Replica(torch.nn.Linear(2, 2), memory=Zero3)
    except ZorayError as error:
        print(type(error).__name__, error.advice)
"""
    said = run_clean(code).splitlines()
    assert said[0] == "True" and "init_process_group" in said[1]
    assert said[2].startswith("ConfigError") and "zoray[zero3]" in said[2]


def test_light_modules_load_neither_torch_nor_transformers() -> None:
    names = [name for name in modules("zoray") if name == "zoray" or name.split(".")[1] in LIGHT]
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    heavy = [heavy for heavy in ("torch", "transformers") if heavy in sys.modules]
    assert not heavy, (name, heavy)
print(len({names!r}))
"""
    assert int(run_clean(code)) >= len(LIGHT)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("zoray", "import ray"),
        ("zoray", "def late():\n    from ray.util import placement_group"),
        ("zoray", "import prometheus_client as metrics"),
        ("zoray", "from actors.fleet import Fleet"),
        ("actors", "import launch.cli"),
        ("zoray.memory.resident", "import deepspeed"),
        ("zoray.memory.zero3", "import ray"),
    ],
)
def test_an_import_outwards_is_seen(package: str, source: str) -> None:
    assert len(outward(package, source)) == 1


@pytest.mark.parametrize(
    ("name", "source", "faults"),
    [
        ("update", "from zoray.replica import Replica", 1),
        ("update", "from zoray import replica", 1),
        ("config", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import zoray.tasks.base", 1),
        ("perturb", "from zoray.update import apply_commits", 1),
        ("perturb", "from zoray.perturb.context import Active\nfrom zoray.directions import Directions", 0),
        ("identity", "from zoray import __version__", 0),
    ],
)
def test_an_import_upwards_is_seen(name: str, source: str, faults: int) -> None:
    assert len(upward(name, source)) == faults


def test_a_module_without_a_place_is_seen() -> None:
    with pytest.raises(AssertionError, match="LAYERS"):
        upward("update", "from zoray.attic import chest")
