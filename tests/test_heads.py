import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.config import UserError
from protoseg.heads import MLPHead, build_decode_head


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
    return F.relu(head.norm(head.fuse(torch.cat(upsampled[::-1], dim=1))))


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
    for p in head.parameters():
        torch.nn.init.normal_(p)  # biases and norms too, so that each of them matters
    maps = pyramid(channels, sizes, torch.double)
    inputs = [*maps, *head.parameters()]
    embedding, auxiliary = head(maps)
    expected = plain_mlp(head, maps)
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
    with pytest.raises(UserError, match=r"head\.name 'mpl' is unknown"):
        build_decode_head("mpl", [4], [4], 3)
