"""Checkpoints with the names that other programs use, listed independently of the rules under test."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from protoseg.models.backbones import Backbone
from protoseg.models.mit import MixTransformer

DIMS = (8, 16, 40, 64)


def tiny_mit(depths: tuple[int, ...] = (1, 2, 1, 1)) -> Backbone:
    return Backbone(MixTransformer(DIMS, depths))


def randomise(module: nn.Module) -> dict[str, Tensor]:
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.1, 1.0)
    return module.state_dict()


def both(prefix: str, theirs: str, ours: str) -> dict[str, str]:
    return {f"{prefix}{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}


def mit_names(style: str, depths: tuple[int, ...] = (1, 2, 1, 1)) -> dict[str, str]:
    """Every name in a checkpoint of tiny_mit → ours; brackets mark tensors that are split or joined."""
    names: dict[str, str] = {}
    for i, depth in enumerate(depths):
        embed, norm, block = {
            "original": (f"patch_embed{i + 1}", f"norm{i + 1}", f"block{i + 1}"),
            "hf": (f"encoder.patch_embeddings.{i}", f"encoder.layer_norm.{i}", f"encoder.block.{i}"),
            "mmseg": (f"layers.{i}.0", f"layers.{i}.2", f"layers.{i}.1"),
        }[style]
        conv = {"original": "proj", "hf": "proj", "mmseg": "projection"}[style]
        names |= both("", f"{embed}.{conv}", f"net.stages.{i}.embed")
        embed_norm = "layer_norm" if style == "hf" else "norm"
        names |= both("", f"{embed}.{embed_norm}", f"net.stages.{i}.embed_norm")
        names |= both("", norm, f"net.stages.{i}.norm")
        for j in range(depth):
            ours = f"net.stages.{i}.blocks.{j}"
            pairs = {
                "original": {
                    "norm1": "norm1",
                    "norm2": "norm2",
                    "attn.q": "attn.q",
                    "attn.kv": "attn.kv",
                    "attn.proj": "attn.proj",
                    "mlp.fc1": "ffn.fc1",
                    "mlp.dwconv.dwconv": "ffn.depthwise",
                    "mlp.fc2": "ffn.fc2",
                    "attn.sr": "attn.reduce",
                    "attn.norm": "attn.reduce_norm",
                },
                "hf": {
                    "layer_norm_1": "norm1",
                    "layer_norm_2": "norm2",
                    "attention.self.query": "attn.q",
                    "attention.self.key": "attn.kv[k]",
                    "attention.self.value": "attn.kv[v]",
                    "attention.output.dense": "attn.proj",
                    "mlp.dense1": "ffn.fc1",
                    "mlp.dwconv.dwconv": "ffn.depthwise",
                    "mlp.dense2": "ffn.fc2",
                    "attention.self.sr": "attn.reduce",
                    "attention.self.layer_norm": "attn.reduce_norm",
                },
                "mmseg": {
                    "norm1": "norm1",
                    "norm2": "norm2",
                    "attn.attn.in_proj": "attn.[in]",
                    "attn.attn.out_proj": "attn.proj",
                    "ffn.layers.0": "ffn.fc1",
                    "ffn.layers.1": "ffn.depthwise",
                    "ffn.layers.4": "ffn.fc2",
                    "attn.sr": "attn.reduce",
                    "attn.norm": "attn.reduce_norm",
                },
            }[style]
            for theirs, mine in pairs.items():
                if i == 3 and "reduce" in mine:
                    continue  # the last stage reduces nothing
                names |= both(f"{block}.{j}.", theirs, f"{ours}.{mine}")
    return {k.replace("in_proj.", "in_proj_"): v for k, v in names.items()}


def mit_checkpoint(
    style: str, state: dict[str, Tensor], depths: tuple[int, ...] = (1, 2, 1, 1)
) -> dict[str, Tensor]:
    file = {}
    for theirs, ours in mit_names(style, depths).items():
        if "[in]" in ours:
            file[theirs] = torch.cat([state[ours.replace("[in]", "q")], state[ours.replace("[in]", "kv")]])
        elif "[k]" in ours:
            file[theirs] = state[ours.replace("[k]", "")].chunk(2)[0].clone()
        elif "[v]" in ours:
            file[theirs] = state[ours.replace("[v]", "")].chunk(2)[1].clone()
        else:
            file[theirs] = state[ours]
        if style == "mmseg" and (".ffn.layers.0.w" in theirs or ".ffn.layers.4.w" in theirs):
            file[theirs] = file[theirs][:, :, None, None]
    return file


def assert_all_loaded(module: nn.Module, expected: dict[str, Tensor], report: Any, extra: set[str]) -> None:
    for key, value in module.state_dict().items():
        if not key.endswith(("_extra_state", "num_batches_tracked")):
            assert torch.equal(value, expected[key]), key
            assert key in report.matched, key
    assert report.missing == []
    assert set(report.unexpected) == extra, report.unexpected


def hf_config(**options: Any) -> Any:
    options |= {"hidden_sizes": list(DIMS), "depths": [1, 2, 1, 1], "num_attention_heads": [1, 2, 5, 8]}
    return transformers.SegformerConfig(decoder_hidden_size=24, num_labels=5, **options)


def conv_bn(theirs: str, ours: str) -> dict[str, str]:
    names = {f"{theirs}.conv.weight": f"{ours}.0.weight"}
    return names | {
        f"{theirs}.bn.{kind}": f"{ours}.1.{kind}"
        for kind in ("weight", "bias", "running_mean", "running_var")
    }


def head_names(head: str) -> dict[str, str]:
    """mmsegmentation's names of a decode head, or the original SegFormer's → ours."""
    auxiliary = conv_bn("auxiliary_head.convs.0", "decode_head.auxiliary.conv")
    auxiliary |= both("", "auxiliary_head.conv_seg", "decode_head.auxiliary.classifier")
    last = both("", "decode_head.conv_seg", "classifier")
    if head == "mlp":
        names = {"decode_head.linear_fuse.conv.weight": "decode_head.fuse.0.weight"}
        for kind in ("weight", "bias", "running_mean", "running_var"):
            names[f"decode_head.linear_fuse.bn.{kind}"] = f"decode_head.fuse.1.{kind}"
        for i in range(4):
            names |= both("", f"decode_head.linear_c{i + 1}.proj", f"decode_head.linears.{i}")
        return names | both("", "decode_head.linear_pred", "classifier")
    if head == "mlp_branch":
        branches = [conv_bn(f"decode_head.convs.{i}", f"decode_head.branches.{i}") for i in range(4)]
        names = conv_bn("decode_head.fusion_conv", "decode_head.fuse")
        return names | {k: v for branch in branches for k, v in branch.items()} | last
    if head == "fcn":
        convs = conv_bn("decode_head.convs.0", "decode_head.convs.0")
        convs |= conv_bn("decode_head.convs.1", "decode_head.convs.1")
        return convs | conv_bn("decode_head.conv_cat", "decode_head.fuse") | auxiliary | last
    if head == "hrnet":
        return conv_bn("decode_head.convs.0", "decode_head.fuse") | last
    if head == "aspp":
        names = conv_bn("decode_head.image_pool.1", "decode_head.image_mean")
        for i in range(4):
            names |= conv_bn(f"decode_head.aspp_modules.{i}", f"decode_head.branches.{i}")
        return names | conv_bn("decode_head.bottleneck", "decode_head.fuse") | auxiliary | last
    block = "decode_head.1.object_context_block"
    names = conv_bn("decode_head.0.convs.0", "decode_head.coarse.conv")
    names |= both("", "decode_head.0.conv_seg", "decode_head.coarse.classifier")
    names |= conv_bn("decode_head.1.bottleneck", "decode_head.pixels")
    for i in range(2):
        names |= conv_bn(f"{block}.query_project.{i}", f"decode_head.query.{i}")
        names |= conv_bn(f"{block}.key_project.{i}", f"decode_head.key.{i}")
    names |= conv_bn(f"{block}.value_project", "decode_head.value")
    names |= conv_bn(f"{block}.out_project", "decode_head.context")
    names |= conv_bn(f"{block}.bottleneck", "decode_head.fuse")
    return names | both("", "decode_head.1.conv_seg", "classifier")
