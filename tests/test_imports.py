"""Importing is free of side effects, and layers point downward."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import chatterbox_turbo

ROOT = Path(chatterbox_turbo.__file__).parent


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def test_import_loads_nothing_heavy_and_says_nothing():
    code = "import sys, chatterbox_turbo; print([m for m in ('torch', 'chatterbox', 'pydantic') if m in sys.modules])"
    assert run(code).strip() == "[]"


def test_configuration_needs_no_torch():
    code = "import sys, chatterbox_turbo as t; t.OptimizationConfig(); print('torch' in sys.modules)"
    assert run(code).strip() == "False"


def test_every_public_name_can_be_had():
    for name in chatterbox_turbo.__all__:
        assert getattr(chatterbox_turbo, name) is not None


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, relative to the package."""
    found = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = ".".join((*base, *(node.module.split(".") if node.module else ())))
            found |= {f"{module}.{alias.name}".strip(".") for alias in node.names}
    return found


def test_the_hot_path_knows_nothing_of_passes_config_or_upstream():
    files = list((ROOT / "runtime").glob("*.py"))
    assert files
    for path in files:
        outside = {name for name in imports(path) if not name.startswith(("runtime", "errors"))}
        assert not outside, f"{path.name} imports {outside}"
        assert "chatterbox." not in path.read_text(encoding="utf-8")


def test_layers_point_downward():
    order = ["errors", "presets", "config", "config_io", "patching", "runtime", "upstream", "passes", "plan", "report",
             "instruments", "batch", "handle", "api", "divergence", "fidelity", "benchmark", "synthetic",
             "cli"]  # fmt: skip
    rank = {name: index for index, name in enumerate(order)}
    allowed = {("config", "config_io"), ("plan", "report"), ("handle", "api")}  # inside a function, for messages
    for path in ROOT.rglob("*.py"):
        layer = path.relative_to(ROOT).with_suffix("").parts[0]
        if layer == "__init__":
            continue
        for name in imports(path):
            below = name.split(".")[0]
            if below in rank and below != layer and (layer, below) not in allowed:
                assert rank[below] < rank[layer], f"{path.relative_to(ROOT)} imports {name}"


def test_only_upstream_and_synthetic_import_chatterbox():
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] in ("upstream", "synthetic"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [n for n in names if n.split(".")[0] == "chatterbox"], path
