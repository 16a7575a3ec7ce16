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


def module_of(path: Path) -> str:
    """Dotted name of a file, relative to the package; that of its folder for an ``__init__``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").strip(".")


FILES = {module_of(path): path for path in ROOT.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, inside functions too, relative to the package."""
    found = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = ".".join((*base, *(node.module.split(".") if node.module else ())))
            for alias in node.names:
                name = f"{module}.{alias.name}".strip(".")
                found.add(name if name in FILES else module)
    return found - {""}  # what the package itself says of itself


def below(path: Path, order: list[str], room: str = "") -> list[str]:
    """Imports of a file that do not point downward in the ``order`` of the floors of ``room``, lowest first."""

    def floor(module: str) -> int | None:
        inside = module.removeprefix(f"{room}.") if room else module
        return order.index(inside.split(".")[0]) if inside.split(".")[0] in order else None

    own = floor(module_of(path))
    return [name for name in imports(path) if own is not None and (f := floor(name)) is not None and f > own]


def test_the_hot_path_knows_nothing_of_passes_config_or_upstream():
    files = list((ROOT / "runtime").rglob("*.py"))
    assert files
    for path in files:
        outside = {name for name in imports(path) if not name.startswith(("runtime", "errors"))}
        assert not outside, f"{path.name} imports {outside}"
        assert "chatterbox." not in path.read_text(encoding="utf-8")


def test_layers_point_downward():
    house = ["errors", "text", "config", "patching", "runtime", "upstream", "passes", "memory", "plan", "budget",
             "instruments", "report", "speech", "entry_points", "handle", "api", "launch", "measure", "synthetic",
             "training", "server", "cluster", "cli"]  # fmt: skip
    assert {module.split(".")[0] for module in FILES if module} <= {*house}
    for path in FILES.values():
        assert not (wrong := below(path, house)), f"{path.relative_to(ROOT)} imports {wrong}"


def test_rooms_of_the_hot_path_point_downward():
    floors = [
        "arguments",
        "forks",
        "device",
        "layers",
        "cpu",
        "memory",
        "quantization",
        "loading",
        "voice",
        "t3",
        "s3gen",
    ]
    inside = {name: path for name, path in FILES.items() if name.startswith("runtime.")}
    assert {name.split(".")[1] for name in inside} == {*floors}
    for name, path in inside.items():
        assert not (wrong := below(path, floors, "runtime")), f"{name} imports {wrong}"
        halves = {"t3": "runtime.s3gen", "s3gen": "runtime.t3"}
        other = halves.get(name.split(".")[1], "nothing")
        assert not [one for one in imports(path) if one.startswith(other)], f"{name} imports the other half"


def test_nothing_imports_in_a_circle():
    """Not inside functions either."""
    graph = {name: imports(path) & FILES.keys() - {name} for name, path in FILES.items() if name}
    order: list[str] = []

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in order:
            for other in sorted(graph[name]):
                visit(other, (*way, name))
            order.append(name)

    for name in graph:
        visit(name, ())
    assert len(order) == len(graph) > 80


def test_every_room_says_what_lives_there():
    for path in ROOT.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_only_upstream_and_synthetic_import_chatterbox():
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] in ("upstream", "synthetic"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [n for n in names if n.split(".")[0] == "chatterbox"], path


def test_what_is_optional_may_be_missing():
    """A server's environment, into which the package goes without dependencies."""
    code = """
import sys, warnings
missing = "psutil", "matplotlib", "sentencex", "num2words", "accelerate", "bitsandbytes", "ray"
sys.modules.update(dict.fromkeys(missing))
warnings.simplefilter("ignore")
import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
model = synthetic.build("turbo", "tiny", stop_after=4)
for offload in ("idle", "adaptive"):
    turbo.apply(model, {"decoding": {"progress": "off", "kernel": "torch"}, "offload": {"mode": offload}})
    print(model.generate("A fox.").shape[0], model.turbo.plan.step("offload").status)
    turbo.revert(model)
"""
    assert run(code).splitlines()[-2:] == ["1 on", "1 on"]
