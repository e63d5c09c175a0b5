"""The arrows of the README's architecture section, kept by reading imports."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A file imports only from its left; files in one group do not import each other.
ORDER = [
    ["config"],
    ["distributed"],
    ["data"],
    ["maps"],
    ["mit", "hrnet", "swin", "timm_features"],
    ["backbones"],
    ["heads"],
    ["losses", "scores"],
    ["clustering"],
    ["editing"],
    ["memory"],
    ["sampling"],
    ["prototypes", "contrast"],
    ["official"],
    ["model"],
    ["weight_names"],
    ["weight_names_heads", "weight_files"],
    ["weights"],
    ["segmenter_weights"],
    ["optim", "checkpoint"],
    ["inference", "evaluate"],
    ["metrics"],
    ["atlas"],
    ["visualize"],
    ["score_figures", "video"],
    ["predict"],
    ["figures"],
    ["report"],
    ["step"],
    ["trainer"],
    ["scoring"],
    ["commands"],
    ["explorer"],
    ["gallery"],
    ["sweep_tables"],
    ["sweep"],
    ["cli"],
]
TORCH_ONLY = ["losses", "scores", "clustering", "editing", "prototypes", "memory", "sampling", "contrast"]
POSITION = {name: i for i, group in enumerate(ORDER) for name in group}


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> dict[str, list[Path]]:
    """Name in ORDER → its files."""
    found: dict[str, list[Path]] = {}
    for path in sorted(Path("protoseg").rglob("*.py")):
        name = path.relative_to("protoseg").with_suffix("").parts[0]
        if name != "__init__":
            found.setdefault(name, []).append(path)
    return found


def test_every_module_has_its_place() -> None:
    missing = sorted(set(modules()) - set(POSITION))
    assert not missing, f"{missing}: add it to ORDER here and to the README's architecture section"


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_left(name: str) -> None:
    for path in modules()[name]:
        for imported in sorted(imports(path)):
            parts = imported.split(".")
            if parts[0] != "protoseg" or len(parts) < 2 or parts[1] not in POSITION or parts[1] == name:
                continue
            allowed = POSITION[parts[1]] < POSITION[name]
            assert allowed, (
                f"{path} imports {imported}, which stands to its right: move the shared piece left"
            )


@pytest.mark.parametrize("name", TORCH_ONLY)
def test_core_needs_torch_only(name: str) -> None:
    for path in modules()[name]:
        foreign = {i for i in imports(path) if i.split(".")[0] not in {"torch", "protoseg", *STANDARD}}
        assert not foreign, f"{path} imports {sorted(foreign)}: the core is for anybody's model, torch only"


STANDARD = {
    "__future__",
    "collections",
    "contextlib",
    "dataclasses",
    "functools",
    "math",
    "typing",
    "warnings",
}


def test_no_grab_bag() -> None:
    bad = [p for p in Path("protoseg").rglob("*.py") if p.stem in {"utils", "helpers", "misc", "common"}]
    assert not bad, f"{bad}: a helper lives with its user"


def test_the_head_and_the_contrast_need_torch_alone() -> None:
    program = (
        "import sys; from protoseg import PrototypeHead; import protoseg.contrast, protoseg.losses;"
        "print([m for m in ('timm', 'torchvision', 'yaml', 'pydantic', 'PIL', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_commands_shorten_the_spinning_of_threads_before_torch_comes() -> None:
    program = """
import os, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, Finder())
import protoseg.cli
"""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    rest = {name: value for name, value in os.environ.items() if name not in names}
    for given, expected in (
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=rest | given
        )
        assert done.stdout.strip() == expected
