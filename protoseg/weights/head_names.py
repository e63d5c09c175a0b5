"""What other programs call the tensors of whole segmenters' heads; see names.py for the notation."""

import re
from collections.abc import Mapping

from protoseg.weights.names import Format, Rules


def mmseg_format(convs: Mapping[str, str], others: Rules = (), auxiliary: bool = False) -> Format:
    """Names of ConvModule: `.conv` and `.bn` are the first and second entry of our conv_norm."""
    rules = [*others, (r"decode_head\.(?:1\.)?conv_seg\.(.+)", r"classifier.\1")]
    if auxiliary:
        convs = {**convs, r"auxiliary_head\.convs\.0": "decode_head.auxiliary.conv"}
        rules += [(r"auxiliary_head\.conv_seg\.(.+)", r"decode_head.auxiliary.classifier.\1")]
    for theirs, ours in convs.items():
        last = re.compile(theirs).groups + 1  # the number of the group that follows
        rules += [(rf"{theirs}\.conv\.(\w+)", rf"{ours}.0.\g<{last}>")]
        rules += [(rf"{theirs}\.bn\.(\w+)", rf"{ours}.1.\g<{last}>")]
    return Format("mmsegmentation", tuple(rules))


OCR_BLOCK = r"decode_head\.1\.object_context_block"
HEAD_FORMATS: dict[str, tuple[Format, ...]] = {
    "MLPHead": (
        Format(
            "Hugging Face",
            (
                (r"decode_head\.linear_(?:c|projections)\.(\d)\.proj\.(.+)", r"decode_head.linears.\1.\2"),
                (r"decode_head\.linear_fuse\.weight", r"decode_head.fuse.0.weight"),
                (r"decode_head\.batch_norm\.(.+)", r"decode_head.fuse.1.\1"),
                (r"decode_head\.classifier\.(.+)", r"classifier.\1"),
            ),
        ),
        Format(
            "the original release",
            (
                (r"decode_head\.linear_c(\d)\.proj\.(.+)", r"decode_head.linears.<\1-1>.\2"),
                (r"decode_head\.linear_fuse\.conv\.(.+)", r"decode_head.fuse.0.\1"),
                (r"decode_head\.linear_fuse\.bn\.(.+)", r"decode_head.fuse.1.\1"),
                (r"decode_head\.linear_pred\.(.+)", r"classifier.\1"),
            ),
        ),
    ),
    "BranchMLPHead": (
        mmseg_format(
            {
                r"decode_head\.convs\.(\d)": r"decode_head.branches.\1",
                r"decode_head\.fusion_conv": "decode_head.fuse",
            }
        ),
    ),
    "FCNHead": (
        mmseg_format(
            {
                r"decode_head\.convs\.(\d)": r"decode_head.convs.\1",
                r"decode_head\.conv_cat": "decode_head.fuse",
            },
            auxiliary=True,
        ),
    ),
    "HRNetHead": (mmseg_format({r"decode_head\.convs\.0": "decode_head.fuse"}),),
    "ASPPHead": (
        mmseg_format(
            {
                r"decode_head\.image_pool\.1": "decode_head.image_mean",
                r"decode_head\.aspp_modules\.(\d)": r"decode_head.branches.\1",
                r"decode_head\.bottleneck": "decode_head.fuse",
            },
            auxiliary=True,
        ),
    ),
    "OCRHead": (
        mmseg_format(
            {
                r"decode_head\.0\.convs\.0": "decode_head.coarse.conv",
                r"decode_head\.1\.bottleneck": "decode_head.pixels",
                rf"{OCR_BLOCK}\.query_project\.(\d)": r"decode_head.query.\1",
                rf"{OCR_BLOCK}\.key_project\.(\d)": r"decode_head.key.\1",
                rf"{OCR_BLOCK}\.value_project": "decode_head.value",
                rf"{OCR_BLOCK}\.out_project": "decode_head.context",
                rf"{OCR_BLOCK}\.bottleneck": "decode_head.fuse",
            },
            ((r"decode_head\.0\.conv_seg\.(.+)", r"decode_head.coarse.classifier.\1"),),
        ),
    ),
    # The released HRNet-W48, without its `module.` prefix; its classifier is the `official` preset's.
    "OfficialDecodeHead": (
        Format(
            "ProtoSeg",
            (
                (r"cls_head\.0\.(\w+)", r"decode_head.conv.\1"),
                (r"cls_head\.1\.(?:0\.)?(\w+)", r"decode_head.norm.\1"),
                (r"proj_head\.proj\.([02]\.\w+)", r"classifier.projection.\1"),
                (r"feat_norm\.(\w+)", r"classifier.feature_norm.\1"),
                (r"mask_norm\.(\w+)", r"classifier.norm_\1"),
                (r"prototypes", r"classifier.prototypes"),
            ),
        ),
    ),
}
