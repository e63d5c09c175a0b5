"""A planted set: a class made of three known looks (red, green, blue squares) on grey; no training needed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.core.losses import downsample_labels
from protoseg.core.prototypes import PrototypeHead
from protoseg.models.segmenter import Segmenter

LOOKS = torch.tensor([[225, 35, 35], [35, 225, 35], [35, 35, 225]], dtype=torch.uint8)  # of class 1
SIZE, SQUARE = 48, 16


class PlantedSet:
    """Image i holds one square of look i % 3 at a place that depends on i; its border is ignored."""

    classes = ("ground", "thing")
    palette: tuple[tuple[int, int, int], ...] = ((90, 90, 90), (220, 120, 30))
    ignore_index = 255

    def __len__(self) -> int:
        return 30

    def name(self, index: int) -> str:
        return f"image_{index:02d}_look{index % 3}"

    def corner(self, index: int) -> tuple[int, int]:
        """Top left of the square, a multiple of 4."""
        return 4 * (index * 5 % 8), 4 * (index * 3 % 8)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        grey = torch.randint(90, 160, (1, SIZE, SIZE), generator=generator)
        image = grey.expand(3, -1, -1).clone().to(torch.uint8)
        label = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
        top, left = self.corner(index)
        window = (slice(top, top + SQUARE), slice(left, left + SQUARE))
        noise = torch.randint(-20, 21, (3, SQUARE, SQUARE), generator=generator)
        image[(slice(None), *window)] = (
            (LOOKS[index % 3].int()[:, None, None] + noise).clamp(0, 255).to(torch.uint8)
        )
        label[window] = 1
        label[0] = 255
        return image, label

    def label(self, index: int) -> Tensor:
        return self.read(index)[1]


class Colours(nn.Module):
    """In place of a backbone: the normalised colours themselves."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def forward(self, image: Tensor) -> list[Tensor]:
        return [image]


class Blocks(nn.Module):
    """In place of a decode head: mean colour of 4 × 4 pixels, and a channel that grey points along."""

    dim, stride = 4, 4

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        mean = F.avg_pool2d(maps[0], 4)
        return torch.cat([mean, torch.full_like(mean[:, :1], 0.6)], 1), []


def planted_model(num_prototypes: int = 3) -> Segmenter:
    """Prototypes that were started and moved by the planted images, nothing else being learned."""
    torch.manual_seed(0)
    head = PrototypeHead(4, 2, num_prototypes, momentum=0.8)
    model = Segmenter(Colours(), Blocks(), head).eval()  # type: ignore[arg-type]
    data = PlantedSet()
    for step in range(12):
        samples = [data.read((step * 6 + i) % len(data)) for i in range(6)]
        images, labels = torch.stack([s[0] for s in samples]), torch.stack([s[1] for s in samples]).long()
        with torch.no_grad():
            embedding = model.embed(images)
            small = downsample_labels(labels, embedding.shape[-2:])
            if step == 0:
                head.prepare_(embedding, small)
            head.update_(head.training_step(embedding, small))
    return model
