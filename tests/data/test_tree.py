"""Label trees from nested YAML: numbers, levels, distances, and messages that name what is wrong."""

from typing import Any

import pytest
import torch

from protoseg.data.tree import label_tree
from protoseg.runtime.errors import UserError
from protoseg.runtime.strict_yaml import parse_yaml

CLASSES = ("road", "car", "bus", "truck", "bicycle", "sky")
TEXT = """
flat: [road]
vehicle:
  light: [bicycle, car]
  heavy: {motor: [truck, bus]}
sky:
"""


def tree_of(text: str) -> Any:
    return label_tree(parse_yaml(text, "test"), CLASSES)


def test_nodes_are_numbered_after_the_classes() -> None:
    tree = tree_of(TEXT)
    assert tree.names == (*CLASSES, "flat", "vehicle", "light", "heavy", "motor")
    assert tree.parents == (6, 8, 10, 10, 8, -1, -1, -1, 7, 7, 9)
    assert tree.depths == (2, 3, 4, 4, 3, 1, 1, 1, 2, 2, 3)
    assert tree.height == 4
    assert [tree.names[v] for v in tree.path(3)] == ["vehicle", "heavy", "motor", "truck"]


def test_levels_show_a_class_by_its_ancestor() -> None:
    tree = tree_of(TEXT)
    shown = [[tree.names[v] for v in tree.level_of_classes(level)] for level in (1, 2, 3, 4)]
    assert shown[0] == ["flat", "vehicle", "vehicle", "vehicle", "vehicle", "sky"]
    assert shown[1] == ["road", "light", "heavy", "heavy", "light", "sky"]
    assert shown[2] == ["road", "car", "motor", "motor", "bicycle", "sky"]
    assert shown[3] == list(CLASSES)


def test_an_inner_node_has_the_colour_of_its_first_class() -> None:
    palette = [(c, c, c) for c in range(6)]
    assert [colour[0] for colour in tree_of(TEXT).colours(palette)] == [0, 1, 2, 3, 4, 5, 0, 1, 1, 2, 2]


def test_distances_and_order() -> None:
    tree = tree_of(TEXT)
    distance = tree.distances_VV
    assert distance[1, 4] == 2, "car and bicycle share a parent"
    assert distance[2, 3] == 2
    assert distance[1, 2] == 5, "car, light, vehicle, heavy, motor, bus"
    assert distance[0, 5] == 3, "by way of the root"
    assert torch.equal(distance, distance.t())
    leaves = tree.leaves()
    assert sorted(leaves) == list(range(6))
    assert [CLASSES[c] for c in tree.leaves(7)] == ["car", "bicycle", "bus", "truck"]
    assert tree.leaves(5) == [5]


def test_lists_may_hold_nodes_beside_classes() -> None:
    tree = tree_of("vehicle: [car, {heavy: [bus, truck]}, bicycle]\nroad:\nsky:")
    assert tree.parents == (-1, 6, 7, 7, 6, -1, -1, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flat: [raod, car, bus, truck, bicycle, sky]", "raod below flat is no class; did you mean road?"),
        ("{flat: [road, car, bus, truck, bicycle, xyz]}", "xyz below flat is no class; the classes are road"),
        ("{flat: [road, car], other: [road]}", "class road stands twice, below flat and below other"),
        ("{flat: [road, car, bus, truck, bicycle]}", "class sky stands nowhere; put it below a node"),
        ("{flat: [road], a: {flat: [car]}}", "node flat stands twice, at the top and below a"),
        ("{car: [road]}", "node car at the top is called like a class"),
        ("{flat: []}", "node flat has no children"),
        ("{}", "node root has no children"),
        ("{flat: [no]}", "a name below flat was read as False; give a class by its name, in quotes"),
        ("fixed", "below the root stands 'fixed'; give nested classes, or the word shipped"),
        ("{flat: road}", "below flat stands 'road'; give a list of classes"),
        ("{rod: }", "rod at the top is no class; did you mean road?"),
    ],
)
def test_messages_name_the_class_or_node(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        tree_of(text)
    assert message in str(caught.value)
    assert str(caught.value).startswith("data.tree: ")
    assert "\n" not in str(caught.value)
