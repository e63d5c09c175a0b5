"""What other programs call the tensors of our backbones: regular expressions → our names.

A replacement may hold these marks, resolved by `translate`:
  <3+1>, <3-1>  the number one higher or lower (stages counted from 1, modules that sit in the next stage)
  kv#1          part 1 of a tensor that we keep in one piece (rows in the order of the numbers)
  q+kv          one tensor that we keep in two: the first third of its rows, then the rest
  ~             mmsegmentation orders the last axis (channel, row, column), we (column, row, channel)
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from einops import rearrange
from torch import Tensor

Rules = tuple[tuple[str, str], ...]


class Format(NamedTuple):
    """One program's names for one architecture."""

    program: str
    rules: Rules  # the whole source name → the name inside Backbone (or Segmenter, for heads)
    norm_eps: tuple[float, float] | None = None  # MiT's LayerNorm: embeddings and reductions, elsewhere


# What a MiT block consists of here, and in the same order in each program.
MIT_PARTS = "norm1 norm2 attn.q attn.kv attn.proj attn.reduce attn.reduce_norm ffn.fc1 ffn.depthwise ffn.fc2"


def mit_rules(shift: str, embed: str, embed_norm: str, norm: str, block: str, parts: str) -> Rules:
    """Group 1 of each pattern is the stage, counted from 1 if `shift` is -1; group 2 of `block` the block.

    parts: the program's names of MIT_PARTS; those that it keeps in several tensors are joined by commas.
    """
    stage = rf"net.stages.<\1{shift}>" if shift else r"net.stages.\1"
    rules = [(rf"{embed}\.(\w+)", rf"{stage}.embed.\2"), (rf"{embed_norm}\.(\w+)", rf"{stage}.embed_norm.\2")]
    rules += [(rf"{norm}\.(\w+)", rf"{stage}.norm.\2")]
    for ours, theirs in zip(MIT_PARTS.split(), parts.split()):
        pieces = theirs.split(",")
        for i, piece in enumerate(pieces):
            part = "attn.q+kv" if "in_proj" in piece else ours + (f"#{i}" if len(pieces) > 1 else "")
            name = re.escape(piece)
            rules += [(rf"{block}\.{name}[._](weight|bias)", rf"{stage}.blocks.\2.{part}.\3")]
    return tuple(rules)


MIT_FORMATS = (
    Format(
        "the original release",
        mit_rules(
            "-1",
            r"patch_embed(\d)\.proj",
            r"patch_embed(\d)\.norm",
            r"norm(\d)",
            r"block(\d)\.(\d+)",
            "norm1 norm2 attn.q attn.kv attn.proj attn.sr attn.norm mlp.fc1 mlp.dwconv.dwconv mlp.fc2",
        ),
        (1e-5, 1e-6),
    ),
    Format(
        "Hugging Face",
        mit_rules(
            "",
            r"encoder\.patch_embeddings\.(\d)\.proj",
            r"encoder\.patch_embeddings\.(\d)\.layer_norm",
            r"encoder\.layer_norm\.(\d)",
            r"encoder\.block\.(\d)\.(\d+)",
            "layer_norm_1 layer_norm_2 attention.self.query attention.self.key,attention.self.value "
            "attention.output.dense attention.self.sr attention.self.layer_norm "
            "mlp.dense1 mlp.dwconv.dwconv mlp.dense2",
        ),
        (1e-5, 1e-5),
    ),
    Format(
        "Hugging Face, names in memory since transformers 5",
        mit_rules(
            "",
            r"stages\.(\d)\.patch_embeddings\.proj",
            r"stages\.(\d)\.patch_embeddings\.layer_norm",
            r"stages\.(\d)\.layer_norm",
            r"stages\.(\d)\.blocks\.(\d+)",
            "layernorm_before layernorm_after attention.q_proj attention.k_proj,attention.v_proj "
            "attention.o_proj attention.sequence_reduction.sequence_reduction "
            "attention.sequence_reduction.layer_norm mlp.fc1 mlp.dwconv.dwconv mlp.fc2",
        ),
        (1e-5, 1e-5),
    ),
    Format(
        "mmsegmentation",
        mit_rules(
            "",
            r"layers\.(\d)\.0\.projection",
            r"layers\.(\d)\.0\.norm",
            r"layers\.(\d)\.2",
            r"layers\.(\d)\.1\.(\d+)",
            "norm1 norm2 - attn.attn.in_proj attn.attn.out_proj attn.sr attn.norm "  # q and kv are one tensor
            "ffn.layers.0 ffn.layers.1 ffn.layers.4",
        ),
        (1e-6, 1e-6),
    ),
)
RESNET_FORMATS = (
    Format("torchvision, timm, mmsegmentation", ((r"((?:conv1|bn1|layer\d)\..+)", r"net.net.\1"),)),
    Format(
        "mmsegmentation, deep stem",
        (
            (r"stem\.([01346]\..+)", r"net.net.conv1.\1"),
            (r"stem\.7\.(.+)", r"net.net.bn1.\1"),
            (r"(layer\d\..+)", r"net.net.\1"),
        ),
    ),
    Format(
        "Hugging Face",
        tuple(
            (rf"{theirs}\.{kind}\.(.+)", f"net.net.{ours}")
            for kind, number, norm in (("convolution", "0", "conv"), ("normalization", "1", "bn"))
            for theirs, ours in (
                (r"embedder\.embedder", rf"{norm}1.\1"),
                (r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)", rf"layer<\1+1>.\2.{norm}<\3+1>.\4"),
                (
                    r"encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut",
                    rf"layer<\1+1>.\2.downsample.{number}.\3",
                ),
            )
        ),
    ),
)
# timm kept the original's names, and mmsegmentation too.
HRNET_FORMATS = (
    Format(
        "the original release, timm, mmsegmentation",
        ((r"((?:conv|bn)[12]\..+|(?:layer|transition|stage)\d\..+)", r"net.net.\1"),),
    ),
)
SWIN_SHARED: Rules = (
    (r"(patch_embed\.(?:proj|norm)\..+)", r"net.net.\1"),
    (r"(layers\.\d\.blocks\.\d+\.attn\.relative_position_bias_table)", r"net.net.\1"),
    (r"(layers\.\d\.blocks\.\d+\.(?:norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.\w+)", r"net.net.\1"),
)
SWIN_FORMATS = (
    Format("timm", (*SWIN_SHARED, (r"(layers\.\d\.downsample\..+)", r"net.net.\1"))),
    Format(
        "the original release",
        (
            *SWIN_SHARED,
            (r"layers\.(\d)\.downsample\.(.+)", r"net.net.layers.<\1+1>.downsample.\2"),
            (r"norm(\d)\.(.+)", r"net.norms.\1.\2"),
        ),
    ),
    Format(
        "mmsegmentation",
        (
            (r"patch_embed\.projection\.(.+)", r"net.net.patch_embed.proj.\1"),
            (r"(patch_embed\.norm\..+)", r"net.net.\1"),
            (r"stages\.(\d\.blocks\.\d+\.norm[12]\.\w+)", r"net.net.layers.\1"),
            (r"stages\.(\d\.blocks\.\d+\.attn)\.w_msa\.(.+)", r"net.net.layers.\1.\2"),
            (r"stages\.(\d\.blocks\.\d+)\.ffn\.layers\.0\.0\.(\w+)", r"net.net.layers.\1.mlp.fc1.\2"),
            (r"stages\.(\d\.blocks\.\d+)\.ffn\.layers\.1\.(\w+)", r"net.net.layers.\1.mlp.fc2.\2"),
            (r"stages\.(\d)\.downsample\.(\w+)\.(\w+)", r"net.net.layers.<\1+1>.downsample.\2.\3~"),
            (r"norm(\d)\.(.+)", r"net.norms.\1.\2"),
        ),
    ),
    Format(
        "Hugging Face",
        (
            (r"embeddings\.patch_embeddings\.projection\.(.+)", r"net.net.patch_embed.proj.\1"),
            (r"embeddings\.norm\.(.+)", r"net.net.patch_embed.norm.\1"),
            (r"encoder\.layers\.(\d)\.downsample\.(.+)", r"net.net.layers.<\1+1>.downsample.\2"),
            (r"hidden_states_norms\.stage(\d)\.(.+)", r"net.norms.<\1-1>.\2"),
            *(
                (rf"encoder\.layers\.(\d\.blocks\.\d+)\.{theirs}", rf"net.net.layers.\1.{ours}")
                for theirs, ours in (
                    (r"layernorm_before\.(.+)", r"norm1.\2"),
                    (r"layernorm_after\.(.+)", r"norm2.\2"),
                    (r"attention\.self\.query\.(.+)", r"attn.qkv#0.\2"),
                    (r"attention\.self\.key\.(.+)", r"attn.qkv#1.\2"),
                    (r"attention\.self\.value\.(.+)", r"attn.qkv#2.\2"),
                    (r"attention\.self\.(relative_position_bias_table)", r"attn.\2"),
                    (r"attention\.output\.dense\.(.+)", r"attn.proj.\2"),
                    (r"intermediate\.dense\.(.+)", r"mlp.fc1.\2"),
                    (r"output\.dense\.(.+)", r"mlp.fc2.\2"),
                )
            ),
        ),
    ),
)


def efficientnet_lite0_rules() -> Rules:
    """The package's names → timm's tf_efficientnet_lite0, which counts blocks by stage."""
    rules = [(r"_conv_(stem|head)\.(.+)", r"conv_\1.\2"), (r"_fc\.(.+)", r"classifier.\1")]
    rules += [(r"_bn0\.(.+)", r"bn1.\1"), (r"_bn1\.(.+)", r"bn2.\1")]
    places = [f"{stage}.{i}" for stage, repeats in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(repeats)]
    for number, place in enumerate(places):
        theirs, ours = "_depthwise_conv _bn1 _project_conv _bn2", "conv_dw bn1 conv_pw bn2"
        if number:  # all but the first block widen before they filter
            theirs, ours = f"_expand_conv _bn0 {theirs}", "conv_pw bn1 conv_dw bn2 conv_pwl bn3"
        pairs = zip(theirs.split(), ours.split())
        rules += [(rf"_blocks\.{number}\.{a}\.(.+)", rf"blocks.{place}.{b}.\1") for a, b in pairs]
    return tuple(rules)


# Why a tensor has no place here; the first pattern found in its name counts.
REASONS = (
    (r"relative_position_index|attn_mask$", "computed here, not stored"),
    (
        r"^(.*\.)?(auxlayer|auxiliary_head|decode_head|last_layer|ocr_\w+|aux_head|linear_pred)\.",
        "belongs to another decode head",
    ),
    (
        r"^(.*\.)?(head|fc|classifier|norm|layernorm|incre_modules|downsamp_modules|final_layer)\."
        r"|^(conv_head|bn2)\.",
        "part of the classification network, not of the maps",
    ),
)


def translate(rules: Rules, state: Mapping[str, Tensor]) -> dict[str, list[tuple[str, Tensor]]]:
    """Our name → the (source name, tensor)s it is made of, in order; unknown names are left out."""
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    found: dict[str, list[tuple[int, str, Tensor]]] = {}
    for source, tensor in state.items():
        for pattern, replacement in patterns:
            match = pattern.fullmatch(source)
            if match is None:
                continue
            name = re.sub(
                r"<(\d+)([+-])1>", lambda m: str(int(m[1]) + int(m[2] + "1")), match.expand(replacement)
            )
            part = 0
            if "#" in name:
                part = int(name[name.index("#") + 1])
                name = re.sub(r"#\d", "", name)
            if name.endswith("~"):
                name = name[:-1]
                tensor = rearrange(tensor, "... (c row column) -> ... (column row c)", row=2, column=2)
            if "q+kv" in name:
                third = len(tensor) // 3
                found.setdefault(name.replace("q+kv", "q"), []).append((0, source, tensor[:third]))
                found.setdefault(name.replace("q+kv", "kv"), []).append((0, source, tensor[third:]))
            else:
                found.setdefault(name, []).append((part, source, tensor))
            break
    return {name: [(s, t) for _, s, t in sorted(parts, key=lambda p: p[0])] for name, parts in found.items()}


def why_unused(source: str) -> str:
    for pattern, why in REASONS:
        if re.search(pattern, source):
            return why
    return "no tensor of this name here"
