import copy

import pytest
import torch

from protoseg.backbones import BACKBONES, build_backbone
from protoseg.config import UserError

# The cheapest member of each family runs for real, the others on the meta device, where only shapes exist.
SMALL = ("resnet18", "resnet50c", "mit_b0")


def loss_of(maps: list[torch.Tensor]) -> torch.Tensor:
    return sum((m.float() ** 2).mean() for m in maps)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_keeps_the_contract(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name).eval()
        assert len(backbone.channels) == len(backbone.strides) == 4
        assert backbone.strides == [4, 8, 16, 32]
        for rows, columns in ((224, 224), (65, 97), (64, 64)):
            maps = backbone(torch.empty(2, 3, rows, columns))
            expected = [
                (2, c, -(-rows // s), -(-columns // s)) for c, s in zip(backbone.channels, backbone.strides)
            ]
            assert [tuple(m.shape) for m in maps] == expected


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", [n for n in BACKBONES if n.startswith("resnet")])
def test_output_stride_dilates_the_last_stages(name: str, output_stride: int) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name, output_stride=output_stride)
        maps = backbone(torch.empty(1, 3, 65, 97))
    assert backbone.strides == [min(s, output_stride) for s in (4, 8, 16, 32)]
    assert [tuple(m.shape[2:]) for m in maps] == [(-(-65 // s), -(-97 // s)) for s in backbone.strides]


@pytest.mark.parametrize("name", SMALL)
def test_eval_is_deterministic_and_layout_does_not_matter(name: str) -> None:
    torch.manual_seed(0)
    backbone, image = build_backbone(name).eval(), torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        once, twice = backbone(image), backbone(image)
        last = backbone.to(memory_format=torch.channels_last)(
            image.contiguous(memory_format=torch.channels_last)
        )
    for a, b, c in zip(once, twice, last):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_changes_neither_loss_nor_gradients_nor_running_statistics(name: str) -> None:
    torch.manual_seed(0)
    plain = build_backbone(name).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing(True)
    for _ in range(2):
        image = torch.randn(2, 3, 64, 64)
        losses = [loss_of(backbone(image)) for backbone in (plain, saving)]
        for loss in losses:
            loss.backward()
        assert losses[0].item() == losses[1].item()
    for (key, p), q in zip(plain.named_parameters(), saving.parameters()):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda m, key=key: f"gradient of {key}: {m}")
    for (key, p), q in zip(plain.named_buffers(), saving.buffers()):
        assert key.endswith("num_batches_tracked") or torch.equal(p, q), key
    saving.set_grad_checkpointing(False)
    momenta = [[getattr(m, "momentum", None) for m in backbone.modules()] for backbone in (plain, saving)]
    assert momenta[0] == momenta[1]


def test_checkpointing_saves_memory() -> None:
    def saved_bytes(checkpointing: bool) -> int:
        torch.manual_seed(0)
        backbone = build_backbone("mit_b0").train()
        backbone.set_grad_checkpointing(checkpointing)
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            backbone(torch.randn(1, 3, 64, 64))
        return total

    assert saved_bytes(True) < 0.5 * saved_bytes(False)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_backbone_gives_the_same_maps_and_statistics(name: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    eager = build_backbone(name).train()
    compiled = copy.deepcopy(eager)
    compiled.set_grad_checkpointing(checkpointing)
    image = torch.randn(2, 3, 33, 49)
    expected = eager(image)
    maps = torch.compile(compiled, backend="aot_eager", fullgraph=True)(image)
    for a, b in zip(maps, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    loss_of(maps).backward()
    for (key, p), q in zip(eager.named_buffers(), compiled.buffers()):
        torch.testing.assert_close(q, p, msg=lambda m, key=key: f"{key}: {m}")


def test_unknown_names_and_strides_are_user_errors() -> None:
    with pytest.raises(UserError, match=r"backbone\.name 'resnet19' is unknown"):
        build_backbone("resnet19")
    with pytest.raises(UserError, match=r"output_stride 8 needs a ResNet"):
        build_backbone("mit_b0", output_stride=8)
    with pytest.raises(UserError, match=r"output_stride 4 is not possible"):
        build_backbone("resnet18", output_stride=4)
