"""The figures of the pages, made by the code itself: python docs/make_figures.py (some seconds)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from protoseg.config import DataConfig
from protoseg.core.clustering import assign, cluster_means, momentum_update, sinkhorn
from protoseg.core.similarity import unit
from protoseg.data.classes.palette import overlay
from protoseg.data.digits import Digits
from protoseg.data.transforms import TrainTransform

OUT = Path(__file__).parent / "figures"
COLOURS = np.array(["#1b9e77", "#d95f02", "#7570b3"])


def main() -> None:
    modes_of_a_class()
    images_and_labels()


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
