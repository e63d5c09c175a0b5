"""The figures of the pages, made by the code itself: python docs/make_figures.py

All but those of `your_images` take some seconds; these come from a training of some minutes.
"""

import io
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw
from rich.console import Console
from scipy import ndimage
from scipy.spatial import ConvexHull
from torch import Tensor

from protoseg.commands.cli import execute
from protoseg.config import DataConfig, load_config
from protoseg.core.clustering import assign, cluster_means, sinkhorn
from protoseg.core.similarity import unit
from protoseg.core.update import momentum_update
from protoseg.data.classes.palette import overlay
from protoseg.data.digits import Digits
from protoseg.data.doctor.check import check_dataset
from protoseg.data.doctor.report import print_report
from protoseg.data.transforms import TrainTransform

OUT = Path(__file__).parent / "figures"
COLOURS = np.array(["#1b9e77", "#d95f02", "#7570b3"])


def main() -> None:
    modes_of_a_class()
    images_and_labels()
    your_images()


def modes_of_a_class() -> None:
    """Three modes of 150, 60 and 30 pixels on the unit circle; three prototypes that start side by side."""
    generator = torch.Generator().manual_seed(0)
    degrees = torch.tensor([20.0] * 150 + [110.0] * 60 + [200.0] * 30)
    emb_ND = on_circle(degrees + 12 * torch.randn(len(degrees), generator=generator))
    labels_N = torch.zeros(len(emb_ND), dtype=torch.long)
    start_CKD = on_circle(torch.tensor([30.0, 75.0, 120.0]))[None]
    protos_CKD = start_CKD
    for _ in range(30):
        means, counts = cluster_means(emb_ND, labels_N, clustered(emb_ND, protos_CKD), 1, 3)
        protos_CKD = momentum_update(protos_CKD, means, counts, 0.9)
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.6))
    for plot, protos, title in zip(
        axes, (start_CKD, protos_CKD), ("at the start", "after 30 updates, μ = 0.9")
    ):
        radius = 1 + 0.05 * torch.randn(len(emb_ND), 1, generator=generator)
        chosen = clustered(emb_ND, protos).numpy()
        plot.scatter(*(emb_ND * radius).T, c=COLOURS[chosen], s=8)
        plot.scatter(*(0.8 * protos[0]).T, c=COLOURS, marker="*", s=220, edgecolors="black")
        plot.set(title=title, xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal", xticks=[], yticks=[])
    save(figure, "clustering")
    figure, plot = plt.subplots(figsize=(5, 2.4))
    nearest = (emb_ND @ start_CKD[0].T).argmax(1)
    for i, chosen in enumerate((nearest, clustered(emb_ND, start_CKD))):
        share = torch.bincount(chosen, minlength=3) / len(chosen)
        left = 0.0
        for k, part in enumerate(share.tolist()):
            plot.barh(i, part, left=left, color=COLOURS[k])
            plot.text(left + part / 2, i, f"{part:.0%}", ha="center", va="center", color="white")
            left += part
    plot.set(yticks=[0, 1], yticklabels=["nearest", "clustering"], xticks=[], xlim=(0, 1))
    save(figure, "balance")


def on_circle(degrees: Tensor) -> Tensor:
    angle = degrees.deg2rad()
    return unit(torch.stack((angle.cos(), angle.sin()), dim=-1))


def clustered(emb_ND: Tensor, protos_CKD: Tensor) -> Tensor:
    labels_N = torch.zeros(len(emb_ND), dtype=torch.long)
    return assign(sinkhorn(emb_ND @ protos_CKD[0].T, labels_N, 1), labels_N)


def images_and_labels() -> None:
    data = Digits("train", size=(160, 240))
    image, label = data.read(1)
    pixels = image.permute(1, 2, 0).numpy()
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(data.palette)] = data.palette
    laid = overlay(pixels, label.numpy(), data.palette)
    show([pixels, colours[label.numpy()], laid], "images_and_labels")
    torch.manual_seed(0)
    settings = DataConfig(name="digits", crop=(120, 160))
    draw = TrainTransform(settings, data.ignore_index)
    show([draw(image, label)[0].permute(1, 2, 0).numpy() for _ in range(4)], "augmented")


def your_images() -> None:
    """The commands of the page in a folder of 300 scenes, whose ids begin with 1."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for split, count in (("train", 300), ("val", 40)):
            for kind in ("images", "labels"):
                Path("data/mine", kind, split).mkdir(parents=True)
            scenes = Digits(split, size=(96, 144))
            for i in range(count):
                image, label = scenes.read(i)
                ids = np.where(label == 255, 0, label.numpy() + 1).astype(np.uint8)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"data/mine/images/{split}/{i:03d}.png")
                Image.fromarray(ids).save(f"data/mine/labels/{split}/{i:03d}.png")
        values = load_config("digits_resnet18_k4").model_dump(mode="json")
        values["data"] |= {"name": "folder", "root": "data/mine", "classes": list(scenes.classes)}
        values["data"] |= {"palette": [list(colour) for colour in scenes.palette], "batch_size": 8}
        values["data"]["crop"] = [96, 96]
        values["train"] |= {"iterations": 400}
        values["eval"]["interval"] = 100
        console = Console(record=True, width=100, emoji=False, highlight=False)
        for label_map in (None, {0: "ignore", **{i + 1: i for i in range(11)}}):
            values["data"]["label_map"] = label_map
            Path("mine.yaml").write_text(yaml.safe_dump(values))
            text = io.StringIO()
            print_report(check_dataset(load_config("mine.yaml").data), Console(file=text, width=100))
            for line in text.getvalue().splitlines():  # once more, to wrap the long ones
                console.print(line, style="red" if line.startswith("error") else "", markup=False)
            if label_map is None:
                svg = console.export_svg(title="protoseg check_data mine.yaml")
                # The page fetches no fonts.
                (OUT / "check_data.svg").write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL))
        execute("train", ["mine.yaml"])
        execute("evaluate", ["runs/mine", "--out", "scores"])
        execute("predict", ["runs/mine", "data/mine/images/val/000.png", "--out", "out", "--confidence"])
        shutil.copy("runs/mine/curves.png", OUT / "curves.png")
        shutil.copy(max(Path("runs/mine/samples").glob("*.png")), OUT / "sample.png")
        shutil.copy("scores/confusion.png", OUT / "confusion.png")
        folders = ("data/mine/images/val/000.png", "out/labels/000.png", "out/overlays/000.jpg")
        show([np.asarray(Image.open(each).convert("RGB")) for each in folders], "predicted")
        converted_labels()
        os.chdir(before)


def converted_labels() -> None:
    """labelme's polygons, drawn here around three digits, and the label that they become."""
    scenes = Digits("train", size=(96, 144))
    image = scenes.read(4)[0].permute(1, 2, 0).numpy()
    Path("drawn").mkdir()
    Image.fromarray(image).save("drawn/0.png")
    label = scenes.read(4)[1].numpy()
    shapes = []
    for c in np.unique(label[label < 10]).tolist()[:3]:
        part = ndimage.label(label == c)[0] == 1
        y, x = np.nonzero(part)
        corners = ConvexHull(np.stack([x, y], 1))
        points = np.stack([x, y], 1)[corners.vertices].tolist()
        shapes.append({"label": f"digit {c}", "points": points, "shape_type": "polygon"})
    about = {"imagePath": "0.png", "imageHeight": 96, "imageWidth": 144, "shapes": shapes}
    Path("drawn/0.json").write_text(json.dumps(about))
    execute("convert_labels", ["labelme", "drawn", "--out", "data/drawn"])
    outlined = Image.fromarray(image)
    for shape in shapes:
        corners = [tuple(point) for point in shape["points"]]
        ImageDraw.Draw(outlined).polygon(corners, outline="white")
    classes = np.asarray(Image.open("data/drawn/labels/train/0.png"))
    palette = yaml.safe_load(Path("data/drawn/data.yaml").read_text())["data"]["palette"]
    show([image, np.asarray(outlined), np.array(palette, np.uint8)[classes]], "converted")


def show(pictures: list[np.ndarray], name: str) -> None:
    figure, axes = plt.subplots(1, len(pictures), figsize=(2.4 * len(pictures), 1.8))
    for plot, picture in zip(axes, pictures):
        plot.imshow(picture)
        plot.axis("off")
    save(figure, name)


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(OUT / f"{name}.png", dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    main()
