"""`import_weights`: make a checkpoint of ours from another program's."""

from collections.abc import Sequence
from pathlib import Path

from protoseg.commands.parser import parser_of
from protoseg.config import load_config
from protoseg.data.datasets import dataset_spec
from protoseg.models.build import build_model
from protoseg.models.checkpoint import save_segmenter
from protoseg.models.hrnet import HRNet
from protoseg.runtime.errors import UserError
from protoseg.weights.foreign_segmenter import load_segmenter_weights, require_complete, take_bgr_


def main(arguments: Sequence[str]) -> None:
    """Make a checkpoint of ours from another program's."""
    parser = parser_of(
        "import_weights",
        "Make a checkpoint from a whole segmenter of Hugging Face, mmsegmentation, or the"
        " releases of SegFormer and ProtoSeg.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="describes the same architecture")
    parser.add_argument("weights", metavar="CHECKPOINT", help=".pth, .safetensors or a Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.pt")
    parser.add_argument(
        "--bgr",
        action="store_true",
        help="the network was trained on BGR images, as OpenSeg and ProtoSeg do (HRNet only)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="such as data.classes=[a,b]")
    args = parser.parse_intermixed_args(arguments)
    config = load_config(args.config, args.overrides)
    spec = dataset_spec(config.data)
    model = build_model(config)
    if args.bgr and not isinstance(model.backbone.net, HRNet):
        raise UserError(f"--bgr: is for HRNet, not for {config.backbone.name}; leave the option out")
    report = load_segmenter_weights(model, config.backbone.name, args.weights)
    print(report)
    require_complete(report)
    if args.bgr:
        take_bgr_(model.backbone.net)
    elif config.decode_head.name == "official":
        print("note: ProtoSeg's published code trains on BGR images; add --bgr if this file is from it")
    save_segmenter(args.out, model, config, spec.classes, spec.colours)
    print(f"{args.out}: {len(spec.classes)} classes, {model.num_parameters:,} learnable parameters")
