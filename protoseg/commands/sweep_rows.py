"""What a sweep compares: rows of settings, from a sweep file or from `--vary`."""

import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field

from protoseg.config import Section, load_config, read_yaml, validated
from protoseg.runtime.errors import UserError
from protoseg.runtime.shipped import find_config


class SweepFile(Section):
    """What a sweep file holds: a config (relative to the file), what differs from it, and how many seeds."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    config: Path
    rows: dict[str, dict[str, Any] | None] = Field(default={})  # name → key: value
    vary: dict[str, list[Any]] = Field(default={})  # key → values, every one with every other
    overrides: dict[str, Any] = Field(default={})  # of all rows
    seeds: Annotated[int, Field(ge=1)] = 1


@dataclass(frozen=True)
class Row:
    """One line of the table: a name and what differs from the config."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """A config, the rows to compare, and how many seeds each gets."""

    config: Path
    rows: tuple[Row, ...]
    seeds: int


def load_sweep(path: Path, vary: Sequence[str], seeds: int | None) -> Sweep:
    """A sweep from a run config and `--vary key=a,b` options, or from a `SweepFile`.

    Errors: UserError naming the file and key; every row's configuration is checked at once.
    """
    path = find_config(path)
    content = read_yaml(path)
    file = validated(SweepFile, content, str(path)) if "config" in content else SweepFile(config=path)
    config = path.parent / file.config if "config" in content else path
    common = _settings(file.overrides)
    rows = [Row(name, (*common, *_settings(values or {}))) for name, values in file.rows.items()]
    grid = {key: [_yaml(value) for value in values] for key, values in file.vary.items()}
    for option in vary:
        key, equals, text = option.partition("=")
        if not equals or not text:
            raise UserError(f"--vary {option!r}: expected key=a,b,c")
        grid[key] = text.split(",")
    for chosen in itertools.product(*grid.values()) if grid else ():
        name = ", ".join(f"{key.split('.')[-1]}={value}" for key, value in zip(grid, chosen))
        rows.append(Row(name, (*common, *(f"{key}={value}" for key, value in zip(grid, chosen)))))
    if not rows:
        raise UserError(f"{path}: nothing to compare; give --vary key=a,b,c or a sweep file with rows")
    if seeds is not None and seeds < 1:
        raise UserError(f"--seeds: expected 1 or more, got {seeds}")
    folders: dict[str, Row] = {}
    for row in rows:
        load_config(config, row.overrides)
        other = folders.setdefault(slug(row.name), row)
        if other is not row:
            raise UserError(
                f"{path}: rows {other.name!r} and {row.name!r} would share the folder {slug(row.name)};"
                " rename one"
            )
    return Sweep(config, tuple(rows), seeds or file.seeds)


def _settings(values: dict[str, Any]) -> list[str]:
    return [f"{key}={_yaml(value)}" for key, value in values.items()]


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def slug(name: str) -> str:
    """A row's name as a folder name that no shell makes anything of: `μ = 0.9` → `mu-0.9`."""
    letters = unicodedata.normalize("NFKD", name)
    greek = {c: unicodedata.name(c).split()[-1] for c in letters if "\u0370" <= c <= "\u03ff"}
    text = "".join(greek.get(c, c) for c in letters).replace("LAMDA", "LAMBDA")
    text = re.sub(r"[^a-z0-9._+-]+", "-", text.encode("ascii", "ignore").decode().lower())
    return re.sub(r"-\++(?=-|$)", "", text).strip("-.") or "row"  # a lone plus says nothing
