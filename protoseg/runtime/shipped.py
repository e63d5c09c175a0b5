"""The configs that come with the package, found by their names."""

from pathlib import Path

from protoseg.runtime.errors import UserError, did_you_mean

_PACKAGE = Path(__file__).parents[1]
# Inside an installed package; in a clone they stand beside it.
FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def shipped_configs() -> dict[str, Path]:
    """Every shipped config by name, such as digits_resnet18_k4 or sweeps/k."""
    folder = next((each for each in FOLDERS if each.is_dir()), FOLDERS[0])
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))
    }


def find_config(name: str | Path) -> Path:
    """The file that a path, or the name of a shipped config, stands for; a file that is there goes first.

    Errors: UserError for a name without ending that is neither, with the nearest shipped name.
    """
    path = Path(name)
    if path.is_file() or path.suffix:
        return path
    known = shipped_configs()
    if path.as_posix() in known:
        return known[path.as_posix()]
    hint = did_you_mean(path.as_posix(), known, "`protoseg configs` lists those")
    raise UserError(f"{name}: no such file, and no shipped config of this name{hint}")
