"""Mix Transformer (MiT-B0 … B5), the encoder of SegFormer (arXiv 2105.15203), written from its description.

Legend: B batch, H W rows and columns of the map at hand, C channels, N = H·W queries, M keys after reduction,
h heads, d channels per head. Feature maps travel as BHWC: linear layers and LayerNorm see the last axis, and
the NCHW view that a convolution needs has channels-last strides, so only the reduction copies a map.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn

from protoseg.models.maps import checkpointed

NUM_HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)
STRIDES = (4, 8, 16, 32)
DIMS_SMALL, DIMS = (32, 64, 160, 256), (64, 128, 320, 512)
MIT = {
    "mit_b0": (DIMS_SMALL, (2, 2, 2, 2)),
    "mit_b1": (DIMS, (2, 2, 2, 2)),
    "mit_b2": (DIMS, (3, 4, 6, 3)),
    "mit_b3": (DIMS, (3, 4, 18, 3)),
    "mit_b4": (DIMS, (3, 8, 27, 3)),
    "mit_b5": (DIMS, (3, 6, 40, 3)),
}


def conv_BHWC(conv: nn.Conv2d, x_BHWC: Tensor) -> Tensor:
    return conv(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def patch_conv_BHWC(conv: nn.Conv2d, x_BHWC: Tensor) -> Tensor:
    """A convolution whose stride is its kernel: one matrix product over whole patches, faster than conv."""
    if torch.compiler.is_exporting():  # whose graph would hold for some sizes only: views of cropped maps
        return conv_BHWC(conv, x_BHWC)
    r = conv.stride[0]
    rows, columns = x_BHWC.shape[1] // r, x_BHWC.shape[2] // r
    whole_BHWC = x_BHWC[:, : rows * r, : columns * r]
    patches = rearrange(whole_BHWC, "b (h i) (w j) c -> b h w (i j c)", i=r, j=r)
    return F.linear(patches, rearrange(conv.weight, "d c i j -> d (i j c)"), conv.bias)


class ReducedAttention(nn.Module):
    """Self-attention; keys and values come from a map reduced `reduction` times in each direction (Eq. 2)."""

    def __init__(self, dim: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.reduction = reduction
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if reduction > 1:
            self.reduce = nn.Conv2d(dim, dim, reduction, reduction)
            self.reduce_norm = nn.LayerNorm(dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        rows, columns = x_BHWC.shape[1:3]
        source = x_BHWC
        if self.reduction > 1:
            # A map smaller than one reduction window would leave no key at all: fill the window with zeros.
            pad_rows, pad_columns = max(self.reduction - rows, 0), max(self.reduction - columns, 0)
            if pad_rows or pad_columns:
                source = F.pad(source, (0, 0, 0, pad_columns, 0, pad_rows))
            source = self.reduce_norm(patch_conv_BHWC(self.reduce, source))
        q_BhNd = rearrange(self.q(x_BHWC), "b r c (h d) -> b h (r c) d", h=self.heads)
        k_BhMd, v_BhMd = rearrange(self.kv(source), "b r c (two h d) -> two b h (r c) d", two=2, h=self.heads)
        out_BhNd = F.scaled_dot_product_attention(q_BhNd, k_BhMd, v_BhMd)
        return self.proj(rearrange(out_BhNd, "b h (r c) d -> b r c (h d)", r=rows, c=columns))


class MixFeedForward(nn.Module):
    """Linear, depthwise 3×3 convolution (which tells positions apart), GELU, linear (Eq. 3)."""

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.depthwise = nn.Conv2d(ratio * dim, ratio * dim, 3, padding=1, groups=ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.fc2(F.gelu(conv_BHWC(self.depthwise, self.fc1(x_BHWC))))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ReducedAttention(dim, heads, reduction)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = MixFeedForward(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC = x_BHWC + self.drop_path(self.attn(self.norm1(x_BHWC)))
        return x_BHWC + self.drop_path(self.ffn(self.norm2(x_BHWC)))


class Stage(nn.Module):
    """Overlapping patch embedding, blocks, LayerNorm."""

    def __init__(
        self, in_dim: int, dim: int, first: bool, heads: int, reduction: int, rates: list[float]
    ) -> None:
        super().__init__()
        kernel, stride = (7, 4) if first else (3, 2)
        self.embed = nn.Conv2d(in_dim, dim, kernel, stride, kernel // 2)
        self.embed_norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, reduction, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_BHWC: Tensor, grad_checkpointing: bool) -> Tensor:
        x_BHWC = self.embed_norm(conv_BHWC(self.embed, x_BHWC))
        for block in self.blocks:
            x_BHWC = checkpointed(block, x_BHWC, grad_checkpointing=grad_checkpointing)
        return self.norm(x_BHWC)


class MixTransformer(nn.Module):
    """Four maps at strides 4, 8, 16, 32 from a normalised float image (B, 3, H, W) of any size.

    The maps are (B, C, ceil(H / stride), ceil(W / stride)) with channels-last strides. `drop_path` grows
    linearly from 0 at the first block to its full value at the last (0.1 in the paper).
    """

    def __init__(self, dims: tuple[int, ...], depths: tuple[int, ...], drop_path: float = 0.0) -> None:
        super().__init__()
        self.channels, self.strides = list(dims), list(STRIDES)
        self.grad_checkpointing = False
        last = max(sum(depths) - 1, 1)
        rates = iter([drop_path * j / last for j in range(sum(depths))])
        in_dims = (3, *dims[:-1])
        self.stages = nn.ModuleList(
            Stage(
                in_dims[i],
                dims[i],
                i == 0,
                NUM_HEADS[i],
                REDUCTIONS[i],
                [next(rates) for _ in range(depths[i])],
            )
            for i in range(4)
        )
        self.apply(init_weights)
        self.set_norm_eps(1e-5, 1e-6)

    def forward(self, image: Tensor) -> list[Tensor]:
        # Channels-last from the first convolution on: its output is then BHWC without a copy.
        x_BHWC = image.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        checkpointing = self.grad_checkpointing and self.training
        maps = []
        for stage in self.stages:
            x_BHWC = stage(x_BHWC, checkpointing)
            maps.append(x_BHWC.permute(0, 3, 1, 2))
        return maps

    def set_norm_eps(self, embed: float, block: float) -> None:
        """Set LayerNorm's epsilon: `embed` for patch embeddings and reductions, `block` elsewhere.

        The public weights were trained with three different pairs, which their files do not record.
        """
        self.norm_eps = (embed, block)
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = embed if name.endswith(("embed_norm", "reduce_norm")) else block

    # Epsilon is part of the function, so a checkpoint carries it; a tensor, to keep state dicts plain.
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.norm_eps, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.set_norm_eps(*state.tolist())


def init_weights(module: nn.Module) -> None:
    """Linear: truncated normal 0.02; convolution: normal with variance 2 / fan-out; biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0.0, (2.0 / fan_out) ** 0.5)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
