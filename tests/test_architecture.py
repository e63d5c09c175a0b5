"""The arrows of the README's architecture section, kept by reading imports."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A room imports only from rooms above it. Inside a room a file imports only from lines above its own; files
# of one line do not import each other.
HOUSE = {
    "core": [
        "reference ranks similarity draws settings prior",
        "losses clustering health pixel_scores contrast_memory tree_losses",
        "update contrast_sampling",
        "start",
        "editing",
        "prototypes contrast",
    ],
    "runtime": ["errors signals", "distributed files memory console shipped strict_yaml config_keys extras"],
    "config": [],
    "data": [
        "reading.pixels reading.label_ids reading.text_lists classes.palette transforms tree",
        "reading.value_range classes.published digits",
        "reading.decode",
        "reading.pairing file_dataset",
        "order specs doctor.facts annotations in_memory",
        "loader datasets doctor.class_table doctor.label_map_advice",
        "doctor.diagnosis ade20k_conversion",
        "doctor.report",
        "doctor.check",
    ],
    "models": [
        "maps",
        "mit hrnet swin timm_features decode_heads official",
        "backbones",
        "segmenter",
        "build",
        "checkpoint",
    ],
    "weights": [
        "names foreign_files pretrained graph",
        "head_names",
        "foreign_backbone",
        "foreign_segmenter",
    ],
    "evaluation": ["inference nearest_patches level_scores", "prototype_use scores predictor", "tables"],
    "figures": ["pictures survey", "training_figures sample_figures prototype_figures score_figures", "page"],
    "training": ["objective feature_cache placement track", "optimizer log", "step", "resume", "loop"],
    "commands": [
        "arguments parser video sweep_rows sweep_tables",
        "prediction_files",
        "train fit evaluate predict vis_prototypes sweep check_data import_weights export convert_labels"
        " configs",
        "cli",
    ],
}
ROOMS = list(HOUSE)
PLACE = {
    f"{room}.{name}": i
    for room, lines in HOUSE.items()
    for i, line in enumerate(lines)
    for name in line.split()
}
STANDARD = set(sys.stdlib_module_names)


def name_of(path: Path) -> str:
    """protoseg/core/losses.py → core.losses; a package is called like its folder."""
    name = ".".join(path.relative_to("protoseg").with_suffix("").parts)
    return name.removesuffix("__init__").removesuffix(".")


FILES = {name_of(path): path for path in sorted(Path("protoseg").rglob("*.py"))}
MODULES = {name: path for name, path in FILES.items() if path.parent != Path("protoseg") or name == "config"}


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def inside(path: Path) -> list[str]:
    """The modules of this package that a file imports, by their names here."""
    names = {name.removeprefix("protoseg.") for name in imports(path) if name.startswith("protoseg.")}
    return sorted(name for name in names if name in MODULES and MODULES[name].name != "__init__.py")


def test_ten_rooms() -> None:
    allowed = {"__init__.py", "__main__.py", "py.typed", "__pycache__"}
    names = {path.stem for path in Path("protoseg").iterdir() if path.name not in allowed}
    assert names == set(ROOMS), "a new name beside the rooms: find the room that it belongs to"


def test_every_module_has_its_place() -> None:
    real = {name for name, path in MODULES.items() if path.name != "__init__.py" and name != "config"}
    assert not real - set(PLACE), "add it to HOUSE here and to the README's architecture section"
    assert not set(PLACE) - real, "in HOUSE, but not there"


def test_no_two_modules_share_a_name() -> None:
    stems = [path.stem for path in MODULES.values() if path.name != "__init__.py"]
    assert sorted(stems) == sorted(set(stems)), "say in its name what sets the second one apart"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_up(name: str) -> None:
    room = name.split(".")[0]
    for imported in inside(MODULES[name]):
        other = imported.split(".")[0]
        same = other == room
        right = PLACE[imported] < PLACE[name] if same else ROOMS.index(other) < ROOMS.index(room)
        assert right, (
            f"{MODULES[name]} imports {imported}, which stands below or beside it: move the shared piece up"
        )


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("core")])
def test_core_needs_torch_only(name: str) -> None:
    known = {"torch", "protoseg", *STANDARD}
    foreign = {i for i in imports(MODULES[name]) if i.split(".")[0] not in known}
    assert not foreign, (
        f"{MODULES[name]} imports {sorted(foreign)}: the core is for anybody's model, torch only"
    )


def test_no_grab_bag_and_no_crowd() -> None:
    bad = [p for p in MODULES.values() if p.stem in {"utils", "helpers", "misc", "common"}]
    assert not bad, f"{bad}: a helper lives with its user"
    long = [str(p) for p in MODULES.values() if len(p.read_text().splitlines()) > 350]
    assert not long, f"{long}: more than 350 lines are two things; part them"


def test_the_head_and_the_contrast_need_torch_alone() -> None:
    program = (
        "import sys; from protoseg import PrototypeHead; import protoseg.core.contrast, protoseg.core.losses;"
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
import protoseg.commands.cli, protoseg.commands.train
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


def test_a_model_is_built_without_scikit_learn() -> None:
    program = (
        "import sys; from protoseg import build_model, load_config;"
        "build_model(load_config('configs/digits_resnet18_k4.yaml')); print('sklearn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
