"""A label tree: classes as leaves of named nodes, read from the nested `data.tree`.

C classes, V nodes: ids 0 … C − 1 are the classes, those of inner nodes follow, from the top down in the order
of the file. The root is no node. Depth 1 are its children; level d shows a class by its ancestor at depth d,
or by itself where it stands higher; the last level is that of the classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protoseg.core.tree_losses import TreeTables, ancestor_matrix, tree_distances
from protoseg.runtime.errors import UserError, did_you_mean


@dataclass(frozen=True)
class LabelTree:
    """Names and parents (−1: the root) of all V nodes, the C classes first."""

    names: tuple[str, ...]
    parents: tuple[int, ...]
    num_classes: int

    @cached_property
    def ancestors_VV(self) -> Tensor:
        """(V, V) bool: whether node u (column) is v (row) or above it."""
        return ancestor_matrix(self.parents)

    @cached_property
    def distances_VV(self) -> Tensor:
        """(V, V) int64: edges between two nodes."""
        return tree_distances(self.ancestors_VV)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Of all nodes, from 1."""
        return tuple(self.ancestors_VV.sum(1).tolist())

    @property
    def height(self) -> int:
        """Number of levels."""
        return max(self.depths)

    def level_of_classes(self, level: int) -> Tensor:
        """(C,) int64: the node that stands for each class at a level, 1 … height."""
        found = []
        for v in range(self.num_classes):
            while self.depths[v] > level:
                v = self.parents[v]
            found.append(v)
        return torch.tensor(found)

    def path(self, node: int) -> list[int]:
        """Node ids from the top down to a node."""
        above = [] if self.parents[node] < 0 else self.path(self.parents[node])
        return [*above, node]

    def children(self, node: int) -> list[int]:
        """Ids of a node's children (of the root's: −1), inner ones in the order of the file, then classes."""
        mine = [v for v, parent in enumerate(self.parents) if parent == node]
        return sorted(mine, key=lambda v: (v < self.num_classes, v))

    def depth_first(self, node: int = -1) -> list[int]:
        """All nodes below a node, each before its children."""
        return [each for child in self.children(node) for each in (child, *self.depth_first(child))]

    def leaves(self, node: int = -1) -> list[int]:
        """Class ids of a subtree (−1: of all), siblings side by side."""
        below = [v for v in self.depth_first(node) if v < self.num_classes]
        return below or [node]

    def colours(self, palette: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """Of all nodes, from those of the classes: an inner node has the colour of its first class."""
        return [palette[self.leaves(node)[0]] for node in range(len(self.names))]

    def settled(self, label: NDArray, prediction: NDArray) -> NDArray:
        """Labels, in which an inner node is the predicted class where that lies below it, and so is right."""
        known = np.where(label < len(self.names), label, 0)
        below = self.ancestors_VV.numpy()[prediction, known] & (label < len(self.names))
        return np.where(below, prediction, label)

    def tables(self) -> TreeTables:
        """What the losses take."""
        return TreeTables(self.parents, self.num_classes)


def label_tree(nested: Mapping[Any, Any], classes: Sequence[str]) -> LabelTree:
    """The tree of a nested mapping: name → mapping, list of classes or mappings, or nothing for a class.

    Errors: UserError naming the class or node: a name that is no class, a class that stands twice or nowhere,
    a node without children or called like a class or another node.
    """
    nodes: dict[str, int] = {}
    parents: dict[str, str | None] = {}  # of classes and nodes, by name

    def add(name: Any, below: str | None, content: Any) -> None:
        where = f"below {below}" if below else "at the top"
        if not isinstance(name, str):
            raise UserError(
                f"data.tree: a name {where} was read as {name!r}; give a class by its name, in quotes if need"
                " be, as 'no'"
            )
        inner = content is not None
        if not inner and name not in classes:
            hint = did_you_mean(name, classes, f"the classes are {', '.join(classes)}")
            raise UserError(f"data.tree: {name} {where} is no class{hint}")
        if inner and name in classes:
            raise UserError(f"data.tree: node {name} {where} is called like a class; give it another name")
        if name in parents:
            what, first = "node" if inner else "class", parents[name]
            place = f"below {first}" if first else "at the top"
            raise UserError(
                f"data.tree: {what} {name} stands twice, {place} and {where}; keep one of the two"
            )
        parents[name] = below
        if inner:
            nodes[name] = len(classes) + len(nodes)
            add_all(content, name)

    def add_all(content: Any, below: str | None) -> None:
        if not isinstance(content, Mapping | list | tuple):
            hint = "a list of classes" if below else "nested classes, or the word shipped"
            raise UserError(f"data.tree: below {below or 'the root'} stands {content!r:.60}; give {hint}")
        if not content:
            raise UserError(f"data.tree: node {below or 'root'} has no children; give it some or remove it")
        for each in content.items() if isinstance(content, Mapping) else content:
            if isinstance(each, tuple):
                add(each[0], below, each[1])
            elif isinstance(each, Mapping):
                add_all(each, below)
            else:
                add(each, below, None)

    add_all(nested, None)
    missing = [name for name in classes if name not in parents]
    if missing:
        raise UserError(f"data.tree: class {missing[0]} stands nowhere; put it below a node or at the top")
    names = (*classes, *nodes)
    numbers = [-1 if (below := parents[name]) is None else nodes[below] for name in names]
    return LabelTree(names, tuple(numbers), len(classes))
