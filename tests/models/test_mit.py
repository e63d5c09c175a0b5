import pytest
import torch

from protoseg.models.mit import MIT, MixTransformer, ReducedAttention

PARAMETERS = {
    "mit_b0": 3_319_392,
    "mit_b1": 13_151_424,
    "mit_b2": 24_196_288,
    "mit_b3": 44_072_128,
    "mit_b4": 60_842_688,
    "mit_b5": 81_443_008,
}


@pytest.mark.parametrize("name", MIT)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = MixTransformer(*MIT[name])
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("heads", "reduction", "size"), [(1, 1, (3, 5)), (2, 2, (5, 4)), (4, 4, (9, 7)), (2, 8, (3, 9))]
)
def test_attention_equals_the_equation_written_out(heads: int, reduction: int, size: tuple[int, int]) -> None:
    torch.manual_seed(heads)
    attn = ReducedAttention(8, heads, reduction).double()
    x = torch.randn(2, *size, 8, dtype=torch.double)
    got = attn(x)
    source = x
    if reduction > 1:
        image = torch.zeros(2, 8, max(size[0], reduction), max(size[1], reduction), dtype=torch.double)
        image[:, :, : size[0], : size[1]] = x.permute(0, 3, 1, 2)
        source = attn.reduce_norm(attn.reduce(image).flatten(2).transpose(1, 2))
    d = 8 // heads
    q = attn.q(x).view(2, -1, 8)
    k, v = attn.kv(source).view(2, -1, 16).split(8, dim=-1)
    outs = []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) * d**-0.5, dim=-1)
        outs.append(weights @ v[..., part])
    torch.testing.assert_close(got, attn.proj(torch.cat(outs, dim=-1)).view_as(got))


def test_maps_are_channels_last_views_and_drop_path_grows_linearly() -> None:
    model = MixTransformer((8, 16, 40, 64), (1, 2, 1, 1), drop_path=0.2).eval()
    for m in model(torch.randn(2, 3, 65, 97)):
        assert m.is_contiguous(memory_format=torch.channels_last)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = MixTransformer(*MIT["mit_b0"])
    block = model.stages[3].blocks[0]
    assert block.ffn.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.ffn.fc1.weight.abs().max() <= 2.0  # timm and torch truncate at ±2 in absolute value
    assert block.ffn.depthwise.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert model.stages[1].embed.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name


def test_epsilon_travels_with_the_state_dict() -> None:
    source, target = (MixTransformer((8, 16, 40, 64), (1, 1, 1, 1)) for _ in range(2))
    assert source.stages[0].embed_norm.eps == source.stages[0].blocks[0].attn.reduce_norm.eps == 1e-5
    assert source.stages[0].blocks[0].norm1.eps == source.stages[0].norm.eps == 1e-6
    source.set_norm_eps(1e-3, 1e-2)
    target.load_state_dict(source.state_dict())
    assert target.norm_eps == (1e-3, 1e-2)
    image = torch.randn(1, 3, 32, 32)
    for a, b in zip(source(image), target(image)):
        assert torch.equal(a, b)
