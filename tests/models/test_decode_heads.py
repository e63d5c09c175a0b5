import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.models.decode_heads import HEADS, BranchMLPHead, HRNetHead, MLPHead, OCRHead, build_decode_head
from protoseg.runtime.errors import UserError


def pyramid(
    channels: list[int], sizes: list[tuple[int, int]], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    return [torch.randn(2, c, *size, dtype=dtype, requires_grad=True) for c, size in zip(channels, sizes)]


def plain_mlp(head: MLPHead, maps: list[Tensor]) -> Tensor:
    """SegFormer's head as written in the paper: linear, upsample, concatenate c4 … c1, fuse, norm, ReLU."""
    upsampled = []
    for linear, x in zip(head.linears, maps):
        y = linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        upsampled.append(F.interpolate(y, size=maps[0].shape[2:], mode="bilinear", align_corners=False))
    return head.fuse(torch.cat(upsampled[::-1], dim=1))


@pytest.mark.parametrize(
    ("channels", "sizes"),
    [
        ([3, 5, 8, 6], [(8, 12), (4, 6), (2, 3), (1, 2)]),
        ([4, 4, 7, 2], [(17, 25), (9, 13), (5, 7), (3, 4)]),
        ([5, 6], [(5, 4), (5, 4)]),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_mlp_head_equals_the_plain_form(
    channels: list[int], sizes: list[tuple[int, int]], training: bool
) -> None:
    torch.manual_seed(0)
    head = build_decode_head("mlp", channels, [4, 8, 16, 32], 3, dim=9, dropout=0.0).double().train(training)
    compare_with_plain_form(head, pyramid(channels, sizes, torch.double), plain_mlp)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["hrnet", "mlp_branch"])
def test_heads_that_fuse_by_a_1x1_convolution_equal_the_plain_form(name: str, training: bool) -> None:
    def plain(head: HRNetHead | BranchMLPHead, maps: list[Tensor]) -> Tensor:
        if isinstance(head, BranchMLPHead):
            maps = [branch(x) for branch, x in zip(head.branches, maps)]
        size = maps[0].shape[2:]
        upsampled = [F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in maps]
        return head.fuse(torch.cat(upsampled, dim=1))

    torch.manual_seed(1)
    maps = pyramid([2, 4, 8], [(9, 13), (5, 7), (3, 4)], torch.double)
    head = build_decode_head(name, [2, 4, 8], [4, 8, 16], 3, dropout=0.0).double().train(training)
    assert head.dim == {"hrnet": 14, "mlp_branch": 256}[name]
    compare_with_plain_form(head, maps, plain)


def test_official_head_equals_its_layers_applied_one_by_one() -> None:
    torch.manual_seed(0)
    channels = [2, 4, 8]
    head: Any = build_decode_head("official", channels, [4, 8, 16], 3).double()
    assert {k: tuple(v.shape) for k, v in head.named_parameters()} == {
        "conv.weight": (14, 14, 3, 3),
        "conv.bias": (14,),
        "norm.weight": (14,),
        "norm.bias": (14,),
    }
    maps = pyramid(channels, [(9, 13), (5, 7), (3, 4)], torch.double)
    head(maps)  # moves the running statistics away from their start
    x = torch.cat([F.interpolate(m, size=(9, 13), mode="bilinear", align_corners=True) for m in maps], dim=1)
    x = F.conv2d(x, head.conv.weight, head.conv.bias, padding=1)
    mean, std = (v[:, None, None] for v in (head.norm.running_mean, (head.norm.running_var + 1e-5).sqrt()))
    torch.testing.assert_close(head.eval()(maps)[0], ((x - mean) / std).clamp(min=0))


def compare_with_plain_form(
    head: torch.nn.Module, maps: list[Tensor], plain: Callable[[Any, list[Tensor]], Tensor]
) -> None:
    for p in head.parameters():
        torch.nn.init.normal_(p)  # biases and norms too, so that each of them matters
    inputs = [*maps, *head.parameters()]
    embedding, auxiliary = head(maps)
    expected = plain(head, maps)
    assert auxiliary == []
    torch.testing.assert_close(embedding, expected)
    seed = torch.randn_like(expected)
    for i, (a, b) in enumerate(
        zip(torch.autograd.grad(embedding, inputs, seed), torch.autograd.grad(expected, inputs, seed))
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7, msg=lambda m, i=i: f"gradient {i}: {m}")


def test_dropout_belongs_to_the_embedding() -> None:
    torch.manual_seed(0)
    head = build_decode_head("mlp", [4, 4], [4, 8], 3, dim=64, dropout=0.5)
    maps = pyramid([4, 4], [(4, 4), (2, 2)])
    dropped = (head(maps)[0].flatten(2).abs().sum(2) == 0).sum(1)
    assert (dropped > 16).all()
    assert torch.equal(head.eval()(maps)[0], head(maps)[0])


def test_unknown_head_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"decode_head\.name 'mpl' is unknown"):
        build_decode_head("mpl", [4], [4], 3)


def test_projection_is_an_mlp_on_each_pixel() -> None:
    torch.manual_seed(0)
    head = build_decode_head("fcn", [4, 6], [4, 8], 3, dim=5, projection=True).double().eval()
    maps = pyramid([4, 6], [(6, 8), (3, 4)], torch.double)
    got = head(maps)[0]
    assert (head.dim, head.stride, head.every_map) == (5, 8, False)
    first, norm, _, last = head.projection
    x_N5 = head.head(maps)[0].permute(0, 2, 3, 1).flatten(0, 2)
    hidden_N5 = (x_N5 @ first.weight[:, :, 0, 0].T / (1 + norm.eps) ** 0.5).relu()
    expected_N5 = hidden_N5 @ last.weight[:, :, 0, 0].T + last.bias
    torch.testing.assert_close(got.permute(0, 2, 3, 1).flatten(0, 2), expected_N5)
    assert (got < 0).any()
    with pytest.raises(UserError, match=r"decode_head\.projection: nothing is learned behind whiten"):
        build_decode_head("whiten", [4], [4], 3, projection=True)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("strides", [[4, 8, 16, 32], [4, 8, 8, 8]])
def test_every_head_keeps_the_contract(name: str, strides: list[int]) -> None:
    torch.manual_seed(0)
    channels = [4, 6, 8, 10]
    maps = pyramid(channels, [(-(-65 // s), -(-97 // s)) for s in strides])
    dim = sum(channels) if name == "whiten" else 12
    head = build_decode_head(name, channels, strides, 5, dim=dim, dropout=0.1)
    embedding, auxiliary = head(maps)
    assert embedding.shape == (2, dim, -(-65 // head.stride), -(-97 // head.stride))
    assert [x.shape[:2] for x in auxiliary] == [(2, 5)] * (name in ("fcn", "aspp", "ocr"))
    (embedding.mean() + sum(x.mean() for x in auxiliary)).backward()
    assert [k for k, p in head.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        once, nothing = head.eval()(maps)
        assert nothing == []
        compiled = torch.compile(head, backend="eager", fullgraph=True)(maps)[0]
        last = head([x.contiguous(memory_format=torch.channels_last) for x in maps])[0]
    if name in ("mlp", "mlp_branch", "hrnet", "whiten"):  # a pixel's channels side by side
        assert once.is_contiguous(memory_format=torch.channels_last)
    if name in ("mlp", "mlp_branch", "hrnet", "whiten"):  # a pixel's channels side by side
        assert once.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(compiled, once)
    torch.testing.assert_close(last, once, rtol=1e-4, atol=1e-5)


def test_ocr_equals_the_equations_written_out() -> None:
    torch.manual_seed(0)
    channels = [3, 4, 6, 8]
    head: OCRHead = build_decode_head("ocr", channels, [4, 8, 8, 8], 3, dim=8, dropout=0.0).double()
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.5)
    maps = pyramid(channels, [(5, 7), (3, 4), (3, 4), (3, 4)], torch.double)
    head(maps)  # moves the running statistics away from their start
    got = head.eval()(maps)[0]
    coarse, x = head.coarse(maps[2]), head.pixels(maps[3])
    expected = torch.empty_like(got)
    for b in range(2):
        pixels = x[b].flatten(1)  # (D, N)
        regions = []
        for c in range(3):  # Eq. 8: mean of all pixels, weighted by a softmax over pixels
            weight = coarse[b, c].flatten().exp()
            regions.append((pixels * weight).sum(1) / weight.sum())
        region_map = torch.stack(regions, dim=1)[None, :, :, None]
        query, key, value = head.query(x[b : b + 1]), head.key(region_map), head.value(region_map)
        mixed = torch.zeros_like(query)
        for i in range(3):
            for j in range(4):  # Eq. 9 and 10: softmax over regions, scaled by sqrt(d)
                relation = torch.stack([query[0, :, i, j] @ key[0, :, c, 0] for c in range(3)]) / 4**0.5
                relation = relation.exp() / relation.exp().sum()
                mixed[0, :, i, j] = sum(relation[c] * value[0, :, c, 0] for c in range(3))
        both = torch.cat([head.context(mixed), x[b : b + 1]], dim=1)
        expected[b] = head.fuse(both)[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("stride", "rates"), [(8, [12, 24, 36]), (16, [6, 12, 18])])
def test_aspp_rates_follow_the_stride(stride: int, rates: list[int]) -> None:
    head = build_decode_head("aspp", [4, 4], [stride, stride], 3, dim=4)
    assert [branch[0].dilation[0] for branch in list(head.branches)[1:]] == rates


def test_aspp_says_why_one_image_is_not_enough() -> None:
    maps = pyramid([4, 4], [(3, 5), (3, 5)])
    head = build_decode_head("aspp", [4, 4], [8, 8], 3, dim=4)
    assert head(maps)[0].shape == (2, 4, 3, 5)
    one = [x[:1] for x in maps]
    with pytest.raises(UserError, match=r"aspp cannot train on one image at a time.*larger data\.batch_size"):
        head(one)
    assert head.eval()(one)[0].shape == (1, 4, 3, 5)
    # With statistics from all ranks the message stays away: on one rank PyTorch itself has the last word.
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(head).train()(one)


LINEAR = {
    "FCN R101": 68_590_732,
    "HRNetV2-W48": 65_953_110,
    "Swin-B": 90_698_830,
    "SegFormer-B4": 64_108_374,
    "OCR HRNetV2-W48": 70_533_100,
    "OCR HRNetV2-W48, 19 classes": 70_371_446,
    "OCR R101": 55_617_164,
    "DeepLabV3 R101": 87_206_028,
    "SegFormer-B0": 3_752_694,
    "SegFormer-B1": 13_715_798,
    "SegFormer-B2": 27_461_974,
    "SegFormer-B3": 47_337_814,
    "SegFormer-B5": 84_708_694,
}
PROTOTYPES = {
    "FCN R101": 68_513_782,
    "HRNetV2-W48": 65_844_960,
    "Swin-B": 90_583_480,
    "SegFormer-B4": 63_993_024,
}


def test_parameter_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    params = importlib.import_module("benchmarks.params")
    assert {row.label for row in params.ROWS} == set(LINEAR)
    compared = 0
    for row in params.ROWS:
        linear, prototypes = params.count(row)
        assert linear == LINEAR[row.label], row.label
        assert prototypes == PROTOTYPES.get(row.label, prototypes), row.label
        for ours, paper in zip((linear, prototypes), row.paper):
            if paper is not None:
                compared += 1
                assert abs(ours / 1e6 - paper) <= 0.1, (row.label, ours, paper)
    assert compared == 9  # the prototype paper's eight, and OCR's
    monkeypatch.setattr(params, "ROWS", params.ROWS[-5:-3])
    params.main([])
    assert "3,752,694" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mlp", "hrnet", "official"])
def test_parameters_of_plain_heads_do_not_depend_on_classes(name: str) -> None:
    counts = set()
    for classes in (19, 150, 847):
        head = build_decode_head(name, [4, 8], [4, 8], classes, dim=8)
        counts.add(sum(p.numel() for p in head.parameters()))
    assert len(counts) == 1
