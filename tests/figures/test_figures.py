"""Pictures, figures, and what is collected for them; the planted set shows its three looks."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from planted import LOOKS, SIZE, SQUARE, PlantedSet, planted_model
from tiny import tiny_config, write_checkpoint, write_folder

from protoseg.commands.cli import execute as command
from protoseg.core.health import Health
from protoseg.core.prototypes import PrototypeHead
from protoseg.data.classes.palette import default_palette
from protoseg.data.tree import label_tree
from protoseg.figures import survey as survey_module
from protoseg.figures.pictures import (
    ONLY_FIRST,
    ONLY_SECOND,
    RIGHT,
    WRONG,
    difference_map,
    outlined,
    resized,
    save_figure,
    shades,
    without_maths,
)
from protoseg.figures.prototype_figures import (
    assignment_figure,
    cosine_figure,
    distance_figure,
    embedding_figure,
    project,
    tree_figure,
)
from protoseg.figures.sample_figures import patches_figure, sample_figure, which_prototype_figure
from protoseg.figures.survey import (
    Patch,
    Survey,
    crop_around,
    read_samples,
    similarity_maps,
    spread_indices,
    survey,
)
from protoseg.figures.training_figures import curves_figure, health_figure
from protoseg.models.official import OfficialPrototypeHead
from protoseg.models.segmenter import Segmenter


def test_planted_looks_get_a_prototype_each() -> None:
    model, data = planted_model(), PlantedSet()
    deeds, pixels = survey(model, data, range(len(data)), patches=4, per_class=50)
    assert deeds is not None
    looks_found = []
    for k in range(3):
        patches = deeds.patches[1 * 3 + k]
        assert len(patches) == 4
        looks = {patch.image % 3 for patch in patches}
        assert len(looks) == 1, f"prototype {k} of the class mixes looks {looks}"
        looks_found.append(looks.pop())
        assert len({patch.image for patch in patches}) == 4, "one patch per image"
        for patch in patches:
            # All matched pixels of the crop are of the look's colour, and nothing else in it is.
            distance = np.abs(patch.picture.astype(int) - LOOKS[looks_found[-1]].numpy()).max(-1)
            assert np.array_equal(distance <= 20, patch.matched), patch.name
            assert patch.label == 1
        assert [patch.cosine for patch in patches] == sorted((p.cosine for p in patches), reverse=True)
    assert sorted(looks_found) == [0, 1, 2]
    assert deeds.share_CK[1] == pytest.approx([1 / 3] * 3, abs=0.01)
    assert deeds.precision_CK[1] == pytest.approx([1.0] * 3)
    assert deeds.won_CK[1].sum() == 30 * (SQUARE // 4) ** 2 - ignored_cells(data)
    assert np.bincount(pixels.label_N).tolist() == [50, 50]


def test_planted_looks_by_the_commands(tmp_path: Path) -> None:
    """The same set as files, learned in forty steps: the page shows a look per prototype."""
    data = PlantedSet()
    for split, indices in (("train", range(30)), ("val", range(6))):
        for i in indices:
            image, label = data.read(i)
            for kind, picture in (("images", image.permute(1, 2, 0)), ("labels", label)):
                path = tmp_path / "data" / kind / split / f"{data.name(i)}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture.numpy()).save(path)
    values = {
        "data": {
            "name": "folder", "root": str(tmp_path / "data"), "classes": list(data.classes),
            "palette": [list(colour) for colour in data.palette], "crop": [48, 48], "scale": [1, 1],
            "cat_max_ratio": 1, "flip": 0, "photometric": False, "batch_size": 6, "workers": 0,
        },
        "backbone": {"name": "timm:test_efficientnet"},
        "decode_head": {"dim": 16, "dropout": 0},
        "prototypes": {"num_per_class": 3, "momentum": 0.9},
        "optim": {"lr": 2e-3, "warmup_iterations": 5},
        "train": {"iterations": 40, "seed": 3},
        "eval": {"samples": 0},
    }  # fmt: skip
    (tmp_path / "planted.yaml").write_text(yaml.safe_dump(values))
    run = tmp_path / "run"
    assert command("train", [str(tmp_path / "planted.yaml"), "--out", str(run)]) == 0
    assert command("vis_prototypes", [str(run), "--samples", "2"]) == 0
    page = (run / "prototypes/index.html").read_text()
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))  # type: ignore[union-attr]
    commonest = []
    for prototype in shown["prototypes"][3:]:  # of the class "thing"
        looks = Counter(patch["name"][-1] for patch in prototype["patches"])
        look, count = looks.most_common(1)[0]
        assert count >= 5, f"six patches of one prototype mix looks: {dict(looks)}"
        assert prototype["share"] == pytest.approx(1 / 3, abs=0.15)
        commonest.append(look)
    assert sorted(commonest) == ["0", "1", "2"]


def ignored_cells(data: PlantedSet) -> int:
    """Cells of squares that lie at the image's ignored first row, where a cell's centre is not: none."""
    return sum(int((data.label(i)[2::4, 2::4] == 255).sum()) for i in range(len(data)))


def test_survey_counts_like_a_loop() -> None:
    """Share, precision and cosine against loops over the pixels, with prototypes that are often wrong."""
    model, data = planted_model(2), PlantedSet()
    assert model.prototypes is not None
    torch.manual_seed(1)
    model.prototypes.prototypes.copy_(torch.nn.functional.normalize(torch.randn(2, 2, 4), dim=-1))
    protos = model.prototypes.prototypes.double().numpy()
    deeds, _ = survey(model, data, [0, 1, 2])
    assert deeds is not None
    won, right, own, cosine = (np.zeros((2, 2)) for _ in range(4))
    for index in (0, 1, 2):
        image, label = data.read(index)
        values = (image.double() - model.mean[0]) / model.std[0]
        for y in range(0, SIZE, 4):
            for x in range(0, SIZE, 4):
                c = int(label[y + 2, x + 2])
                if c == 255:
                    continue
                emb = np.append(values[:, y : y + 4, x : x + 4].mean((1, 2)).numpy(), 0.6)
                emb /= np.linalg.norm(emb)
                sims = protos @ emb
                best = np.unravel_index(sims.argmax(), sims.shape)
                won[best] += 1
                right[best] += best[0] == c
                own[c, sims[c].argmax()] += 1
                cosine[c, sims[c].argmax()] += sims[c].max()
    assert deeds.won_CK.tolist() == won.tolist()
    assert deeds.share_CK == pytest.approx(own / own.sum(1, keepdims=True))
    with np.errstate(invalid="ignore"):
        assert deeds.precision_CK == pytest.approx(right / won, nan_ok=True)
        assert deeds.cosine_CK == pytest.approx(cosine / own, abs=1e-5, nan_ok=True)


def test_samples_answer_what_the_page_asks() -> None:
    model, data = planted_model(), PlantedSet()
    assert model.prototypes is not None
    (sample,) = read_samples(model, data, [4])
    protos = model.prototypes.prototypes.flatten(0, 1).numpy()
    maps = similarity_maps(sample.emb_hwD, protos)
    assert np.array_equal(maps.argmax(0), sample.nearest)
    classes = maps.reshape(2, 3, *maps.shape[1:]).max(1)
    assert np.array_equal(sample.classes[..., 0], classes.argmax(0))
    assert sample.scores[..., 0] == pytest.approx(classes.max(0), abs=1e-5)
    assert sample.scores[..., 1] == pytest.approx(classes.min(0), abs=1e-5)
    assert np.array_equal(sample.nearest // 3, sample.classes[..., 0])
    top, left = data.corner(4)
    assert sample.prediction[top + 8, left + 8] == 1
    assert similarity_maps(sample.emb_hwD, protos, (3, 5)).shape == (6, 3, 5)


def disagreeing_model(official: bool) -> Segmenter:
    """Scores are normalised over classes, and nearly every pixel is class 1 although class 0 is nearer."""
    model = planted_model()
    assert model.prototypes is not None
    torch.manual_seed(0)
    head = (OfficialPrototypeHead if official else PrototypeHead)(
        4, 2, 3, score_norm="layer_norm", start="random"
    )
    if not official:
        head.prototypes.copy_(model.prototypes.prototypes)
    with torch.no_grad():
        head.norm_bias[1] = 3.0
    model.classifier = head.eval()
    return model


@pytest.mark.parametrize("official", [False, True])
def test_the_winner_is_of_the_class_that_the_model_predicts(official: bool) -> None:
    model, data = disagreeing_model(official), PlantedSet()
    head = model.prototypes
    assert head is not None
    (sample,) = read_samples(model, data, [4])
    with torch.inference_mode():
        features = model.embed(data.read(4)[0][None])
        logits = head(features)[0]
        emb = head.unit_rows(features).view(*logits.shape[1:], 4).numpy()
    sims = np.einsum("hwd,ckd->hwck", emb, head.prototypes.numpy())
    best = sims.max((2, 3))
    for y, x in np.ndindex(*best.shape):
        c = int(logits[:, y, x].argmax())
        assert sample.nearest[y, x] == 3 * c + sims[y, x, c].argmax(), (y, x)
        order = logits[:, y, x].argsort(descending=True)
        assert sample.classes[y, x].tolist() == order.tolist()
        assert sample.scores[y, x] == pytest.approx(logits[order, y, x].numpy(), abs=1e-5)
    assert sample.emb_hwD == pytest.approx(emb, abs=1e-6)
    nearest_of_all = sims.max(3).argmax(2)
    assert (nearest_of_all != sample.nearest // 3).any(), "cosines alone would say something else here"
    deeds, _ = survey(model, data, [4])
    assert deeds is not None
    label = data.label(4)[2::4, 2::4].numpy()
    assert deeds.won_CK.ravel().tolist() == np.bincount(sample.nearest[label != 255], minlength=6).tolist()


def test_classes_without_prototypes_take_no_pixel() -> None:
    model = planted_model()
    assert model.prototypes is not None
    model.prototypes.initialized[1] = False
    (sample,) = read_samples(model, PlantedSet(), [4])
    assert set(sample.nearest.ravel().tolist()) <= {0, 1, 2}
    assert (sample.classes[..., 1] == 1).all()
    assert (sample.scores[..., 1] == -1).all()


@pytest.mark.parametrize("cell", [(0, 0), (5, 11), (2, 6)])
def test_crops_hold_their_pixel(cell: tuple[int, int]) -> None:
    image = torch.arange(24 * 48).view(1, 24, 48).expand(3, -1, -1) % 251
    won = np.zeros((6, 12), dtype=bool)
    won[cell] = True
    picture, matched = crop_around(image.to(torch.uint8), won, cell)
    assert picture.shape == (24, 24, 3)
    assert matched.shape == (24, 24)
    assert matched.sum() == 16
    y, x = np.argwhere(matched)[0]
    assert picture[y, x, 0] == image[0, cell[0] * 4, cell[1] * 4]


def test_spread_indices() -> None:
    assert spread_indices(10, 3) == [0, 3, 6]
    assert spread_indices(2, 5) == [0, 1]


@pytest.mark.parametrize("count", [1, 2, 4, 10, 20])
def test_shades_differ_even_for_black_and_white(count: int) -> None:
    made = shades(((0, 0, 0), (255, 255, 255), (230, 25, 75)), count)
    assert made.shape == (3, count, 3)
    for each in made:
        assert len({tuple(colour) for colour in each.tolist()}) >= max(1, count // 2)


def test_difference_map_and_outline() -> None:
    label = np.array([[0, 0, 1, 255]])
    first, second = np.array([[0, 1, 0, 0]]), np.array([[1, 0, 0, 1]])
    picture = difference_map(label, first, second, 255)
    assert [tuple(colour) for colour in picture[0, :2].tolist()] == [ONLY_FIRST, ONLY_SECOND]
    assert picture[0, 3].tolist() == [255, 255, 255]
    matched = np.zeros((4, 4), dtype=bool)
    matched[1:3, 1:3] = True
    large = outlined(np.full((4, 4, 3), 100, np.uint8), matched, 40)
    assert (large[10, 15:25] == 255).all(), "the edge of the matched pixels is white"
    assert (large[20, 20] == 100).all(), "inside, the picture stays"
    assert (large[2, 2] == 100).all()
    assert np.array_equal(resized(np.arange(12, dtype=np.uint8).reshape(2, 2, 3), (4, 6))[3, 5], [9, 10, 11])


def test_default_colours_stay_apart_for_red_green_blind_eyes() -> None:
    colours = np.array(default_palette(11), dtype=float)
    red_green = colours @ np.array([[0.2928, 0.2928, -0.0223], [0.7072, 0.7072, 0.0223], [0, 0, 1]])
    apart = np.linalg.norm(red_green[:, None] - red_green[None], axis=-1)[np.triu_indices(11, 1)]
    assert apart.min() > 25


def test_patches_figure_has_room_for_every_prototype() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    figure = patches_figure("class a", [("busy", [(picture, "0.9"), (picture, "0.8 is b")]), ("idle", [])])
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["class a", "busy", "0.9", "0.8 is b", "idle"]
    width, height = figure.get_size_inches()
    boxes = np.array([image.get_extent() for image in axes.images])  # left, right, bottom, top
    assert (boxes[:, 1] - boxes[:, 0]) == pytest.approx(boxes[:, 2] - boxes[:, 3]), "squares stay squares"
    assert boxes[0, 1] < boxes[1, 0], "no overlap"
    assert boxes[:, 1].max() <= width
    assert boxes[:, 2].max() < axes.texts[-1].get_position()[1] < height


TREE = label_tree({"all": {"ground": None, "things": ["b", "c"]}}, ["ground", "b", "c"])
COLOURS = ((9, 9, 9), (200, 0, 0), (0, 200, 0))


def test_a_label_at_an_inner_node_is_met_by_any_class_below() -> None:
    """Nodes: 3 all, 4 things."""
    label = np.array([[0, 0, 1, 4, 4, 3, 255]])
    prediction = np.array([[0, 1, 2, 2, 0, 1, 0]])
    image = np.zeros((1, 7, 3), np.uint8)
    shown = [axes.images[0].get_array() for axes in
             sample_figure(image, label, prediction, TREE.names[:3], COLOURS, 255, TREE).axes]  # fmt: skip
    assert [tuple(colour) for colour in shown[1][0]] == [
        *(COLOURS[c] for c in (0, 0, 1, 1, 1, 1)), (255, 255, 255)
    ]  # fmt: skip
    expected = [RIGHT, WRONG, WRONG, RIGHT, WRONG, RIGHT, (255, 255, 255)]
    assert [tuple(colour) for colour in shown[3][0]] == expected


def test_the_tree_is_drawn_with_its_prototypes() -> None:
    patch = Patch(0.9, 0, "x", 0, np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), bool))
    share = np.array([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]])
    seen = Survey(share, share, share, share.astype(int), [[patch], [patch], [patch], [], [patch], [patch]])
    (axes,) = tree_figure(TREE, COLOURS, seen).axes
    texts = {text.get_text(): text.get_position() for text in axes.texts}
    assert {*TREE.names} < texts.keys()
    assert texts["all"][0] < texts["things"][0] == texts["ground"][0] < texts["b"][0]
    assert texts["things"][1] == pytest.approx((texts["b"][1] + texts["c"][1]) / 2)
    assert len(axes.images) == 5, "one prototype wins nothing"
    ground = [text.get_text() for text in axes.texts if text.get_text() in ("25%", "75%")]
    assert ground == ["75%", "25%"], "the largest share first"


def test_figures_show_their_numbers() -> None:
    protos = np.eye(6, dtype=np.float32).reshape(3, 2, 6)
    matrix, _, _ = cosine_figure(protos, ["a", "b", "c"]).axes
    assert np.array_equal(matrix.images[0].get_array(), np.eye(6))
    share = np.array([[0.25, 0.75], [1.0, 0.0]])
    palette = ((200, 0, 0), (0, 0, 200))
    bars, effective = assignment_figure(share, ["a", "b"], palette).axes
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([75, 100, 25, 0])
    assert effective.lines[0].get_xdata() == pytest.approx([np.exp(0.5623), 1.0], abs=1e-3)
    pixels = np.array([[1, 0], [0.6, 0.8]], np.float32)
    places, boxes = distance_figure(
        np.tile(pixels, (2, 1)),
        np.array([0, 0, 2, 2]),  # a class without prototypes is left out
        np.eye(3, 2)[:, None],
        np.array([True, True, False]),
        ["a", "b", "c"],
        (*palette, (0, 0, 0)),
    ).axes
    expected = np.array([[1, 0], [0.6, 0.8]])  # the second pixel is nearer to the other class's prototype
    assert np.asarray(places.collections[0].get_offsets()) == pytest.approx(expected)
    assert [text.get_text() for text in boxes.get_yticklabels()] == ["a"]
    drawn = [np.asarray(line.get_xdata()) for line in boxes.lines]
    assert any(x == pytest.approx([0.4, 0.4]) for x in drawn), "the median of 1 − 0 and 0.6 − 0.8"
    health = {key: [1.0, None, 3.0] for key in Health._fields}
    axes = health_figure([{"step": s, "prototype_health": health} for s in (1, 2)]).axes
    assert axes[0].lines[0].get_ydata().tolist() == [2.0, 2.0]
    image, ids = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), int)
    figure = which_prototype_figure(
        [(image, ids, ids, np.ones((4, 4), int))], ["a"], ((9, 9, 9),), num_prototypes=2
    )
    assert [text.get_text() for text in figure.axes[3].texts] == ["2"], (
        "regions carry their prototype's number"
    )


def test_projection_keeps_pixels_and_prototypes_apart() -> None:
    rng = np.random.default_rng(0)
    emb = rng.normal(size=(40, 8)).astype(np.float32)
    emb[:20, 0] += 9  # two groups
    emb[20:, 1] += 9
    made = project(emb, emb[:3])
    for name in ("t-SNE", "PCA"):
        pixels, prototypes = made[name]
        assert pixels.shape == (40, 2)
        assert prototypes.shape == (3, 2)
    assert made["PCA"][1] == pytest.approx(made["PCA"][0][:3], abs=1e-4), "one projection for both"
    pixels, prototypes = made["t-SNE"]
    low, high = pixels[:20].min(0), pixels[:20].max(0)
    assert ((low <= prototypes) & (prototypes <= high)).all(), "prototypes stand among their nearest pixels"
    assert not ((low <= pixels[20:]) & (pixels[20:] <= high)).all(1).any(), "and the groups are apart"
    figure = embedding_figure(
        [("run", made, np.zeros(40, int), np.zeros(3, int), np.ones(3))], ["a"], ((9, 9, 9),)
    )
    assert [axes.get_title() for axes in figure.axes] == ["run, t-SNE", "run, PCA"]


def test_command_on_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two untrained models in bf16, the first as a run with two evaluations."""
    write_folder(tmp_path / "data")
    ours, linear = tmp_path / "ours", tmp_path / "linear"
    small = {"backbone": {"name": "timm:test_efficientnet"}, "train": {"precision": "bf16"}}
    model = write_checkpoint(ours / "last.pt", tiny_config(tmp_path / "data", **small))
    write_checkpoint(linear / "last.pt", tiny_config(tmp_path / "data", classifier="linear", **small))
    assert model.prototypes is not None
    line = {"kind": "eval", "mIoU": 0.5, "prototype_health": model.prototypes.health().to_plain()}
    lines = [{"step": 1, **line}, {"step": 2, **line, "mIoU": None}]  # labels that are all ignored
    (ours / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert command("vis_prototypes", [str(linear)]) == 2
    assert "linear has a learned classifier and no prototypes" in capsys.readouterr().err
    assert command("vis_prototypes", [str(ours), str(linear), "--format", "pdf", "--samples", "2"]) == 0
    out = ours / "prototypes"
    names = {
        "which_prototype",
        "similarity",
        "comparison",
        "embedding",
        "cosines",
        "assignments",
        "distance",
        "health",
    }
    made = {path.stem for path in out.glob("*.pdf")}
    assert made == names | {"patches_000_road", "patches_001_car", "patches_002_tree"}
    assert all(path.read_bytes().startswith(b"%PDF") for path in out.glob("*.pdf"))
    page = (out / "index.html").read_text()
    assert len(page) < 30e6
    assert "http://" not in page
    assert "https://" not in page
    assert "prediction of" in page
    assert page.count("data:image/png") >= len(names), "the figures are in the page, whatever the format"
    for path in (tmp_path / "data/labels/train").iterdir():
        Image.fromarray(np.full_like(Image.open(path), 255)).save(path)
    assert command("vis_prototypes", [str(ours)]) == 2
    assert "train: no labelled pixel in 3 images; choose another --split" in capsys.readouterr().err


def test_the_middle_of_a_large_image_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = planted_model(), PlantedSet()
    monkeypatch.setattr(survey_module, "WHOLE_PIXELS", 24 * 24)
    (sample,) = read_samples(model, data, [4])
    assert np.array_equal(sample.image, data.read(4)[0][:, 12:36, 12:36].permute(1, 2, 0))
    assert np.array_equal(sample.label, data.read(4)[1][12:36, 12:36])
    assert sample.nearest.shape == (6, 6)


def test_a_dollar_in_a_name_begins_no_formula(tmp_path: Path) -> None:
    image, ids = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), int)
    figure = sample_figure(image, ids, ids, ["$\\frac$"], ((9, 9, 9),), 255)
    save_figure(figure, tmp_path / "sample.png")
    lines = [{"kind": "train", "step": s, "loss": 10.0**s} for s in (1, 3)]
    curves = without_maths(curves_figure(lines))
    curves.draw_without_rendering()
    assert "100" in [text.get_text() for text in curves.axes[0].get_yticklabels()]


def test_curves_of_a_run_in_which_nothing_is_known_yet() -> None:
    health = {"effective_k": [None, None], "in_use": [None, None], "mean_intra_cosine": [None, None]}
    lines = [
        {"kind": "train", "step": 1, "loss": 1.0, "ce": 1.0},
        {"kind": "eval", "step": 1, "mIoU": float("nan"), "prototype_health": health},
    ]
    assert len(curves_figure(lines).axes) == 4
    assert len(curves_figure([]).axes) == 2
