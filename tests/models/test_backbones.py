import copy
from typing import Any

import pytest
import timm
import torch
from timm.models.hrnet import HighResolutionModule
from timm.models.resnet import BasicBlock
from timm.models.swin_transformer import SwinTransformerBlock

from protoseg.models.backbones import BACKBONES, build_backbone
from protoseg.models.hrnet import HRNet, exchange
from protoseg.models.mit import MixTransformer
from protoseg.models.swin import SWINS, Swin, shift_mask, window_attention
from protoseg.runtime.errors import UserError

# The cheapest member of each family runs for real, the others on the meta device, where only shapes exist.
SMALL = (
    "resnet18",
    "resnet50c",
    "mit_b0",
    "hrnet_w18",
    "swin_t",
    "timm:convnext_atto",
    "timm:vit_tiny_patch16_224",
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()  # every case compiles the same forward for another network


def loss_of(maps: list[torch.Tensor]) -> torch.Tensor:
    return sum((m.float() ** 2).mean() for m in maps)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_keeps_the_contract(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name).eval()
        assert len(backbone.channels) == len(backbone.strides) == 4
        assert backbone.strides == [4, 8, 16, 32]
        for rows, columns in ((65, 97), (64, 64)):
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
        torch.testing.assert_close(c, a, rtol=0, atol=1e-4 * a.abs().max().item())


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


@pytest.mark.parametrize("name", ["resnet18", "mit_b0", "hrnet_w18", "swin_t"])
def test_compiled_backbone_gives_the_same_maps_and_statistics(name: str) -> None:
    torch.manual_seed(0)
    eager = build_backbone(name).train()
    keep_one_of_each_kind(eager.net)
    compiled = copy.deepcopy(eager)
    compiled.set_grad_checkpointing(True)
    image = torch.randn(2, 3, 33, 49)
    expected = eager(image)
    maps = torch.compile(compiled, backend="aot_eager", fullgraph=True)(image)
    for a, b in zip(maps, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    loss_of(maps).backward()
    for (key, p), q in zip(eager.named_buffers(), compiled.buffers()):
        torch.testing.assert_close(q, p, msg=lambda m, key=key: f"{key}: {m}")


def keep_one_of_each_kind(net: Any) -> None:
    """Fewer repetitions of the same block, for the compiler's sake."""
    if isinstance(net, Swin):
        del net.net.layers[2].blocks[2:]
    elif isinstance(net, HRNet):
        del net.net.layer1[2:]
        for stage in (net.net.stage2, net.net.stage3, net.net.stage4):
            del stage[1:]
            for branch in stage[0].branches:
                del branch[1:]
    elif isinstance(net, MixTransformer):
        for stage in net.stages:
            del stage.blocks[1:]


def plain_window_attention(block: Any, x: torch.Tensor) -> torch.Tensor:
    """Swin's definition, token by token: padded to whole windows, a token sees those of its (shifted) window.

    The windows of the shifted grid are cut off at the border; the cyclic roll and its mask are only a way to
    compute that.
    """
    w, s = block.window_size[0], block.shift_size[0]
    rows, columns = x.shape[1:3]
    x = torch.nn.functional.pad(x, (0, 0, 0, -columns % w, 0, -rows % w))
    heads, attn = block.attn.num_heads, block.attn
    q, k, v = attn.qkv(x).unflatten(-1, (3, heads, -1)).unbind(-3)
    grid = [(i, j) for i in range(x.shape[1]) for j in range(x.shape[2])]
    out = torch.zeros_like(q)
    for i, j in grid:
        seen = [(a, b) for a, b in grid if ((a - s) // w, (b - s) // w) == ((i - s) // w, (j - s) // w)]
        for h in range(heads):
            table = attn.relative_position_bias_table[:, h]
            scores = torch.stack(
                [
                    (q[0, i, j, h] @ k[0, a, b, h]) * attn.scale
                    + table[(i - a + w - 1) * (2 * w - 1) + (j - b + w - 1)]
                    for a, b in seen
                ]
            )
            values = torch.stack([v[0, a, b, h] for a, b in seen])
            out[0, i, j, h] = scores.softmax(0) @ values
    return attn.proj(out.flatten(-2))[:, :rows, :columns]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("size", [(6, 6), (5, 7), (2, 4)])
def test_swin_pads_before_it_rolls(shift: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block = SwinTransformerBlock(
        8, (6, 6), 2, window_size=3, shift_size=shift, always_partition=True
    ).double()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(1, *size, 8, dtype=torch.double)
    mask = shift_mask(x, block.window_size, block.shift_size)
    with torch.no_grad():
        torch.testing.assert_close(window_attention(block, x, mask), plain_window_attention(block, x))


def test_swin_shifts_in_every_stage() -> None:
    with torch.device("meta"):
        for name in SWINS:
            window = 12 if "12" in name else 7
            for layer in build_backbone(name).net.net.layers:
                shifts = [block.shift_size for block in layer.blocks]
                assert shifts == [(0, 0), (window // 2, window // 2)] * (len(shifts) // 2)


def test_swin_equals_timm_where_every_map_is_whole_windows() -> None:
    torch.manual_seed(0)
    ours = build_backbone("swin_t").eval()
    options = {"feature_cls": "getter", "strict_img_size": False, "always_partition": True}
    theirs = timm.create_model(SWINS["swin_t"], features_only=True, **options).eval()
    theirs.model.load_state_dict(ours.net.net.state_dict(), strict=False)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for a, b, norm in zip(ours(image), theirs(image), ours.net.norms):
            torch.testing.assert_close(a, norm(b.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_hrnet_equals_timm_with_bilinear_upsampling() -> None:
    torch.manual_seed(0)
    ours = build_backbone("hrnet_w18").eval()
    theirs = copy.deepcopy(ours.net.net)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Upsample):
            module.mode, module.align_corners = "bilinear", False
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(ours(image), theirs(image)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("align_corners", [False, True])
def test_hrnet_exchange_at_odd_sizes(align_corners: bool) -> None:
    torch.manual_seed(0)
    module = HighResolutionModule(3, BasicBlock, [1, 1, 1], [4, 8, 16], [4, 8, 16], "SUM").double().eval()
    maps = [
        torch.randn(1, c, *size, dtype=torch.double) for c, size in ((4, (9, 13)), (8, (5, 7)), (16, (3, 4)))
    ]
    outs = [branch(x) for branch, x in zip(module.branches, maps)]

    def up(layer: torch.nn.Sequential, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(
            layer[:2](x), size=like.shape[2:], mode="bilinear", align_corners=align_corners
        )

    f = module.fuse_layers
    expected = [
        outs[0] + up(f[0][1], outs[1], outs[0]) + up(f[0][2], outs[2], outs[0]),
        f[1][0](outs[0]) + outs[1] + up(f[1][2], outs[2], outs[1]),
        f[2][0](outs[0]) + f[2][1](outs[1]) + outs[2],
    ]
    for got, want in zip(exchange(module, *maps, align_corners=align_corners), expected):
        torch.testing.assert_close(got, want.relu())


@pytest.mark.parametrize(
    "name",
    ["timm:convnext_atto", "timm:vit_tiny_patch16_224", "timm:efficientnet_lite0", "timm:halonet26t"],
)
def test_timm_backbones_keep_the_contract(name: str) -> None:
    backbone = build_backbone(name).train()
    assert backbone.strides == [4, 8, 16, 32]
    for rows, columns in ((65, 97), (64, 64)):
        maps = backbone(torch.randn(2, 3, rows, columns))
        expected = [
            (2, c, -(-rows // s), -(-columns // s)) for c, s in zip(backbone.channels, backbone.strides)
        ]
        assert [tuple(m.shape) for m in maps] == expected
    loss_of(maps).backward()
    assert [key for key, p in backbone.named_parameters() if p.grad is None] == []  # DDP would wait for them


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, r"backbone\.name 'resnet19' is unknown"),
        ("timm:convnext_atoo", {}, r"timm has no model 'convnext_atoo'; did you mean timm:convnext_atto\?"),
        ("timm:beit_base_patch16_224", {}, r"does not take images of any size"),
        ("timm:inception_v3", {}, r"does not take images of any size \(.*\); choose another"),
        ("timm:vgg11", {"drop_path": 0.1}, r"does not take \{'drop_path_rate': 0\.1\}"),
        ("mit_b0", {"output_stride": 8}, r"output_stride 8 needs a ResNet"),
        ("resnet18", {"output_stride": 4}, r"output_stride 4 is not possible"),
        ("hrnet_w18", {"drop_path": 0.1}, r"hrnet_w18 has no stochastic depth"),
    ],
)
def test_what_a_backbone_cannot_do_is_a_user_error(name: str, options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=message):
        build_backbone(name, **options)


def test_network_that_takes_smaller_images_only_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"mvitv2_tiny does not take images of any size \(.+\); choose"):
        build_backbone("timm:mvitv2_tiny")


def test_frozen_plain_vit_is_a_user_error() -> None:
    with torch.device("meta"), pytest.raises(UserError, match=r"frozen: the maps of a plain ViT .* train it"):
        build_backbone("timm:vit_tiny_patch16_224", frozen=True)


def test_frozen_and_without_the_finest_maps() -> None:
    torch.manual_seed(0)
    whole = build_backbone("resnet18").eval()
    part = build_backbone("resnet18", finest_stride=8, frozen=True)
    part.load_state_dict(whole.state_dict())
    assert (part.channels, part.strides) == (whole.channels[1:], [8, 16, 32])
    before = copy.deepcopy(part.state_dict())
    image = torch.randn(2, 3, 33, 49, requires_grad=True)
    part.train()
    for got, want in zip(part(image), whole(image)[1:], strict=True):
        assert torch.equal(got, want)  # BatchNorm as in evaluation
        assert not got.requires_grad
    assert not any(p.requires_grad for p in part.parameters())
    for name, value in part.state_dict().items():
        assert torch.equal(value, before[name]), name
