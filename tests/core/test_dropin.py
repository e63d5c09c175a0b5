"""PrototypeHead on a model that this project does not know, with the user's own loop."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from protoseg.core.losses import downsample_labels
from protoseg.core.prototypes import PrototypeHead


class Mine(nn.Module):
    """Torchvision's backbone and a projection; its classifier is gone."""

    def __init__(self, num_classes, all_reduce=None):
        super().__init__()
        self.backbone = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None).backbone
        self.project = nn.Conv2d(960, 32, 1)
        self.head = PrototypeHead(32, num_classes, 4, all_reduce=all_reduce)

    def embed(self, images):
        return self.project(self.backbone(images)["high"])

    def forward(self, images, labels=None):
        features = self.embed(images)
        if labels is None:
            return self.head(features)
        return self.head.training_step(features, downsample_labels(labels, features.shape[-2:]))


def scene(seed, n):
    """Images whose label is which half is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(n, 64, 64, dtype=torch.int64)
    labels[:, :, 32:] = 1
    labels[:, :8] = 255
    images = 0.2 * torch.randn(n, 3, 64, 64, generator=generator)
    return images + labels.clamp(max=1)[:, None], labels


def fit(model, parallel, images, labels, steps):
    optimizer = torch.optim.AdamW(parallel.parameters(), 1e-3)
    with torch.no_grad():
        features = model.embed(images)
        model.head.prepare_(features, downsample_labels(labels, features.shape[-2:]))
    losses = []
    for _ in range(steps):
        out = parallel(images, labels)
        logits = F.interpolate(out.logits, size=labels.shape[1:], mode="bilinear")
        loss = F.cross_entropy(logits, labels, ignore_index=255) + 0.01 * out.ppc + 0.01 * out.ppd
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.head.update_(out)
        losses.append(loss.item())
    return losses


def test_trains_on_a_torchvision_model():
    torch.manual_seed(0)
    model = Mine(2)
    images, labels = scene(0, 4)
    losses = fit(model, model, images, labels, 8)
    assert losses[-1] < 0.7 * losses[0]
    assert model.head.prototypes.grad_fn is None
    assert model(images).shape[:2] == (4, 2)


def all_reduce(tensor, op):
    dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return tensor


def work(rank, file, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Mine(2, all_reduce)
    images, labels = scene(0, 4)
    part = slice(0, 1) if rank == 0 else slice(1, 4)  # unequal on purpose
    losses = fit(model, DistributedDataParallel(model), images[part], labels[part], 6)
    torch.save({"losses": losses, "prototypes": model.head.prototypes}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_trains_under_ddp(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first["prototypes"], second["prototypes"])
    for losses in (first["losses"], second["losses"]):
        assert losses[-1] < losses[0]
