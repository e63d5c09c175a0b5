"""Training with a label tree: what its terms are, and what labels at inner nodes do and do not."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from protoseg.config import config_from
from protoseg.core.losses import downsample_labels
from protoseg.core.tree_losses import node_log_odds, tree_min_cross_entropy
from protoseg.data.datasets import dataset_spec, label_ids
from protoseg.data.loader import Batch
from protoseg.runtime.errors import UserError
from protoseg.training.step import Run, build_run, known_labels, to_device, train_step

CLASSES = ["road", "car", "bus", "sky"]
TREE = {"flat": ["road"], "vehicle": ["car", "bus"], "sky": None}
VEHICLE = 5


def values(**changes: Any) -> dict[str, Any]:
    return {
        "data": {
            "classes": CLASSES,
            "tree": TREE,
            "batch_size": 2,
            "label_map": {0: 0, 1: 1, 2: 2, 3: 3, 40: "vehicle"},
        },
        "decode_head": {"dim": 16, "dropout": 0},
        "prototypes": {"num_per_class": 2},
        "loss": {"tree": 0.5, "tree_triplet": 0.25},
        "optim": {"lr": 1e-3},
        **changes,
    }


def run_of(**changes: Any) -> Run:
    return build_run(
        config_from(values(**changes), "t"), tuple(CLASSES), ((0, 0, 0),) * 4, 8, torch.device("cpu")
    )


def batch_of(columns: Sequence[int]) -> Batch:
    """Two images whose labels are columns of 16 pixels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, 3, 64, 16 * len(columns)), dtype=torch.uint8, generator=generator)
    label = torch.tensor(columns, dtype=torch.uint8).repeat_interleave(16).repeat(2, 64, 1)
    return Batch(image, label, torch.arange(2))


@pytest.mark.parametrize("classifier", ["prototypes", "linear"])
def test_terms_are_weighted_into_the_sum(classifier: str) -> None:
    run = run_of(classifier=classifier)
    terms = train_step(run, batch_of([0, 1, 2, 3, VEHICLE, 255]))
    weights = {"ce": 1, "ppc": 0.01, "ppd": 0.01, "tree": 0.5, "tree_triplet": 0.25}
    expected = sum(weight * terms[name] for name, weight in weights.items() if name in terms)
    assert terms["loss"] == pytest.approx(expected, rel=1e-5)
    assert terms["tree"] > 0
    assert terms["tree_triplet"] > 0


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_tree_term_is_the_mean_over_labelled_pixels(share: float) -> None:
    """Of all pixels, or of those drawn in this step."""
    run = run_of(classifier="linear", loss={"tree": 0.5, "tree_pixels": share})
    batch = batch_of([0, 1, VEHICLE, 255])
    part = to_device(batch, run)
    labels = known_labels(run, part)
    scales = run.objective.loss_scales([labels])
    out = run.objective(part.image, labels, scales, part.indices, torch.tensor(0))
    logits = run.model.train()(part.image)
    label_BP = downsample_labels(batch.label.long(), logits.shape[-2:]).flatten(1)
    drawn_BP = torch.arange(label_BP.shape[1]).repeat(2, 1) if labels.drawn is None else labels.drawn
    assert drawn_BP.shape == (2, share * label_BP.shape[1])
    image_B1 = torch.arange(2)[:, None]
    label_N = label_BP[image_B1, drawn_BP].flatten()
    logits_NC = logits.flatten(2)[image_B1, :, drawn_BP].flatten(0, 1)
    known_N = label_N != 255
    odds = node_log_odds(logits_NC[known_N].t(), run.objective.tree)
    expected = tree_min_cross_entropy(odds, label_N[known_N], run.objective.tree, 1 / int(known_N.sum()))
    torch.testing.assert_close(out.terms["tree"], expected.detach())


def test_inner_labels_move_no_prototype_and_are_in_no_other_term() -> None:
    """With the tree's weights at 0 a pixel labelled `vehicle` is as good as ignored."""
    runs = []
    for column in (VEHICLE, 255):
        run = run_of(loss={})
        train_step(run, batch_of([0, 1, 2, 3, column]))
        runs.append(run)
    for (name, a), b in zip(runs[0].model.state_dict().items(), runs[1].model.state_dict().values()):
        assert torch.equal(a, b), name


def test_inner_labels_train_and_still_move_no_prototype() -> None:
    run = run_of()
    train_step(run, batch_of([0, 1, 2, 3]))
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    train_step(run, batch_of([VEHICLE, VEHICLE]))
    after = run.model.state_dict()
    assert torch.equal(before["classifier.prototypes"], after["classifier.prototypes"])
    assert any(not torch.equal(before[name], p) for name, p in run.model.named_parameters())


def test_classes_without_prototypes_take_no_part() -> None:
    run = run_of(loss={"tree": 0.5, "tree_pixels": 1})
    train_step(run, batch_of([0, 3]))
    part = to_device(batch_of([0, 1, 2, 3, VEHICLE, 4]), run)
    nodes = known_labels(run, part).nodes
    assert isinstance(nodes, Tensor)
    assert nodes[0, :24].unique_consecutive().tolist() == [0, -1, 3, -1, 4], "no vehicle has prototypes"


def test_a_resumed_draw_is_the_same() -> None:
    run = run_of()
    train_step(run, batch_of([0, 1, 2, 3]))
    part = to_device(batch_of([0, 1, 2, 3]), run)
    first, second = (known_labels(run, part).triplets for _ in range(2))
    other = copy.copy(run)
    other.step = 7
    assert torch.equal(first, second)
    assert not torch.equal(first, known_labels(other, part).triplets)


def test_label_map_leads_to_nodes() -> None:
    spec = dataset_spec(config_from(values(), "t").data)
    ids = label_ids(spec)
    assert spec.label_names[ids.target(40)] == "vehicle"
    assert ids.target(40) == VEHICLE
    assert ids.target(41) == -1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"label_map": {0: "vehicles"}},
            "raw id 0 goes to 'vehicles', which is no class id 0-3, no class name, no node",
        ),
        ({"ignore_index": 5}, "ignore_index: 5 is the id of a node of data.tree; use fewer nodes, or give 6"),
        ({"ignore_index": 4, "label_map": None}, "ignore_index: 4 is the id of a node of data.tree"),
        ({"tree": {"flat": CLASSES[:3]}}, "data.tree: class sky stands nowhere"),
        (
            {"tree": "shipped"},
            "data.tree: none is shipped for 'folder', only for camvid, cityscapes, pcontext",
        ),
    ],
)
def test_messages(changes: dict[str, Any], message: str) -> None:
    config = config_from(values(data={**values()["data"], **changes}), "t")
    with pytest.raises(UserError) as caught:
        dataset_spec(config.data)
    assert message in str(caught.value)


def test_terms_want_a_tree() -> None:
    with pytest.raises(UserError, match=r"t: loss\.tree needs a label tree: give data\.tree"):
        config_from({"loss": {"tree": 1}}, "t")


@pytest.mark.parametrize("name", ["camvid", "cityscapes", "pcontext", "pcontext_png", "pcontext60"])
def test_shipped_trees_fit_their_classes(name: str) -> None:
    run_tree = config_from({"data": {"name": name, "tree": "shipped"}}, "t")
    assert dataset_spec(run_tree.data).tree is not None
