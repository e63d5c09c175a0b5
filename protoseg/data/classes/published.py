"""The published class lists; names, colours and ids stand in lists.yaml, with where each list comes from."""

from importlib.resources import files
from typing import Any, NamedTuple

from protoseg.data.classes.palette import Palette, hex_colours
from protoseg.runtime.strict_yaml import parse_yaml


class ClassList(NamedTuple):
    """Classes in the order of their ids, 0 … C − 1; colours and ids in the label files where it has them."""

    classes: tuple[str, ...]
    palette: Palette
    ids: tuple[int, ...]


def _class_list(
    classes: str = "", palette: str = "", ids: str = "", unused: str = "", numbered: str = ""
) -> ClassList:
    """unused: ids from 1 on that are no class; numbered: id and name of each class."""
    names = [" ".join(name.split()) for name in (classes or numbered).split(";")]
    id_list = [int(word) for word in ids.split()]
    if numbered:
        id_list = [int(name.split()[0]) for name in names]
        names = [name.split(" ", 1)[1] for name in names]
    if unused:
        left_out = [int(word) for word in unused.split()]
        id_list = [i for i in range(1, len(names) + len(left_out) + 1) if i not in left_out]
    return ClassList(tuple(names), hex_colours(palette), tuple(id_list))


_TEXT = files("protoseg.data.classes").joinpath("lists.yaml").read_text(encoding="utf-8")
LISTS = {name: _class_list(**parts) for name, parts in parse_yaml(_TEXT, "lists.yaml").items()}
_TREES = files("protoseg.data.classes").joinpath("trees.yaml").read_text(encoding="utf-8")
TREES: dict[str, Any] = parse_yaml(_TREES, "trees.yaml")
ADE20K_FULL_HIGHEST_ID = 3688  # categories of the release, parts included
