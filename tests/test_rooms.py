"""Imports go one way, remelt_jobs -> remelt_evals -> remelt, and the core stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "remelt": (ROOT / "pipeline" / "remelt", {"remelt"}),
    "remelt_evals": (ROOT / "evals" / "remelt_evals", {"remelt", "remelt_evals"}),
    "remelt_jobs": (ROOT / "jobs" / "remelt_jobs", {"remelt", "remelt_evals", "remelt_jobs"}),
}
# Third-party packages that only the named rooms may import, anywhere in a module.
RESERVED = {
    "ray": {"remelt_jobs"},
    "lm_eval": {"remelt_evals"},
    "transformers": {"remelt_evals"},
}
HEAVY = ("ray", "lm_eval", "transformers", "deepspeed", "pyarrow", "optuna", "cmaes", "pandas", "datasets")


def imported_names(path: Path) -> set[str]:
    """Top-level names of every import in a module, those inside functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_imports_only_its_own_room_and_those_below(room: str) -> None:
    folder, allowed = ROOMS[room]
    modules = sorted(folder.rglob("*.py"))
    assert modules
    for path in modules:
        names = imported_names(path)
        assert names & ROOMS.keys() <= allowed, path
        for package, rooms in RESERVED.items():
            assert package not in names or room in rooms, f"{path} imports {package}"


def loaded_after(code: str) -> set[str]:
    """Top-level modules in sys.modules after running code in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_core_loads_nothing_heavy() -> None:
    loaded = loaded_after("import remelt, remelt.planner, remelt.recipe, remelt.operators")
    assert not loaded & {*HEAVY, "torch", "yaml", "pydantic", "huggingface_hub", "obstore", "numba"}


def test_a_local_merge_from_python_objects_works_with_everything_else_unimportable(tmp_path: Path) -> None:
    blocked = [*HEAVY, "torch", "pydantic", "huggingface_hub", "obstore", "typer", "rich"]
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import json, numpy as np
from pathlib import Path
from remelt.layout import header_bytes
root = Path({str(tmp_path)!r})
for number in range(2):
    folder = root / f"parent{{number}}"
    folder.mkdir()
    values = np.full((64, 32), 1.0 + number, np.float32)
    header = header_bytes([("model.norm.weight", "F32", (64, 32), 0, values.nbytes)])
    (folder / "model.safetensors").write_bytes(header + values.tobytes())
from remelt.recipe import CheckpointRef, Entry, Recipe
from remelt.merge import merge_recipe
recipe = Recipe(
    merge_method="linear",
    checkpoints=tuple(CheckpointRef(str(root / f"parent{{n}}"), f"p{{n}}", n) for n in range(2)),
    entries=tuple(Entry(n, (("weight", 0.5),)) for n in range(2)),
)
merged = merge_recipe(recipe, root / "out", threads=1)
from remelt.formats import open_checkpoint
from remelt.range_reader import RangeReader
with RangeReader(open_checkpoint(str(root / "out"))) as reader:
    assert (reader.read("model.norm.weight") == 1.5).all()
print(merged.digest)
"""
    loaded = loaded_after(code)
    assert "numba" in loaded


def test_the_command_line_merges_locally_without_heavy_imports(tmp_path: Path) -> None:
    loaded = loaded_after("import remelt_jobs.cli")
    assert not loaded & {*HEAVY, "torch", "numba", "rich", "yaml"}
