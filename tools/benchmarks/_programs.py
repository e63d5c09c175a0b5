"""SegFormer in four programs, built alike and without weights: what the benchmarks compare.

A program is a function that imports what it needs (ImportError if it is not installed) and returns a builder.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any, Literal

import torch
from benchmarks._measure import memory_now_gb
from torch import Tensor, nn

from protoseg.config import config_from
from protoseg.data.loader import Batch
from protoseg.evaluation.inference import segment_together
from protoseg.models.mit import MIT, NUM_HEADS
from protoseg.runtime.memory import peak_memory_gb
from protoseg.training.step import Run, build_run, train_step

Work = Callable[[], object]
MODELS = tuple(name.replace("mit", "segformer") for name in MIT)
IGNORE = 65535
DROP_PATH, LR = 0.1, 6e-5


@dataclass(frozen=True)
class Case:
    """What is trained or predicted."""

    model: str  # of MODELS
    classes: int = 150
    size: tuple[int, int] = (256, 256)
    batch: int = 2
    precision: str = "fp32"  # or bf16
    prototypes: int = 10
    device: str = "cpu"

    @property
    def backbone(self) -> str:
        return self.model.replace("segformer", "mit")

    @property
    def dim(self) -> int:
        """Width of the decode head, as published."""
        return 256 if self.model in ("segformer_b0", "segformer_b1") else 768


@dataclass(frozen=True)
class Program:
    """A model of one program: its training step, and its prediction as published."""

    step: Work
    predict: Callable[[Tensor], Tensor]  # (B, 3, H, W) uint8 → class ids (B, H, W)
    run: Run | None = None  # ours


def make_batch(case: Case) -> Batch:
    """Random images, labels in blocks of 16 pixels in which every class occurs that has room.

    On the host, as from a loader: pinned for a GPU.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (case.batch, 3, *case.size), dtype=torch.uint8, generator=generator)
    down, along = (max(side // 16, 1) for side in case.size)
    blocks = torch.randint(0, case.classes, (case.batch, down, along), generator=generator)
    blocks.view(-1)[: case.classes] = torch.arange(case.classes)[: blocks.numel()]
    label = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, : case.size[0], : case.size[1]]
    parts = (image, label.to(torch.int32), torch.arange(case.batch))
    return Batch(*(part.pin_memory() if case.device == "cuda" else part for part in parts))


def ours(classifier: str, score_dtype: str = "float32") -> Callable[[Case], Program]:
    """This package's trainer, with one of its two classifiers."""

    def build(case: Case) -> Program:
        names = [f"class{i}" for i in range(case.classes)]
        config = config_from(
            {
                "data": {"classes": names, "ignore_index": IGNORE, "batch_size": case.batch},
                "classifier": classifier,
                "backbone": {"name": case.backbone, "drop_path": DROP_PATH},
                "decode_head": {"dim": case.dim},
                "prototypes": {"num_per_class": case.prototypes, "score_dtype": score_dtype},
                "optim": {"lr": LR},
                "train": {"precision": case.precision},
            },
            "benchmark",
        )
        palette = tuple((i % 256, i // 256, 0) for i in range(case.classes))
        run = build_run(config, tuple(names), palette, 2000, torch.device(case.device))
        batch = make_batch(case)

        def predict(images: Tensor) -> Tensor:
            run.model.eval()
            if run.model.prototypes is not None:
                run.model.prototypes.initialized.fill_(True)
            return torch.stack([found.classes for found in segment_together(run.model, images)])

        return Program(lambda: train_step(run, batch), predict, run)

    return build


def theirs(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], logits: Any, case: Case) -> Program:
    """A plain step around another program's model: its loss, AdamW, the loss read as ours reads its terms."""
    model = model.to(case.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    batch = make_batch(case)

    def prepared(images: Tensor) -> Tensor:
        return images.float() / 255

    def step() -> float:
        image, label, _ = (part.to(case.device, non_blocking=True) for part in batch)
        with torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16"):
            value = loss(prepared(image), label.long())
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    def predict(images: Tensor) -> Tensor:
        model.eval()
        with torch.inference_mode():
            full = nn.functional.interpolate(
                logits(prepared(images)), images.shape[2:], mode="bilinear", align_corners=False
            )
            return full.argmax(1)

    return Program(step, predict)


def hugging_face() -> Callable[[Case], Program]:
    from transformers.models.segformer import SegformerConfig, SegformerForSemanticSegmentation

    def build(case: Case) -> Program:
        dims, depths = MIT[case.backbone]
        options: dict[str, Any] = {"num_labels": case.classes, "semantic_loss_ignore_index": IGNORE}
        config = SegformerConfig(
            hidden_sizes=list(dims),
            depths=list(depths),
            num_attention_heads=list(NUM_HEADS),
            decoder_hidden_size=case.dim,
            drop_path_rate=DROP_PATH,
            **options,
        )
        model: Any = SegformerForSemanticSegmentation(config)
        return theirs(model, lambda x, y: model(x, labels=y).loss, lambda x: model(x).logits, case)

    return build


def segmentation_models_pytorch() -> Callable[[Case], Program]:
    from segmentation_models_pytorch import Segformer

    def build(case: Case) -> Program:
        model = Segformer(
            case.backbone, encoder_weights=None, decoder_segmentation_channels=case.dim, classes=case.classes
        )
        cross_entropy = nn.CrossEntropyLoss(ignore_index=IGNORE)
        return theirs(model, lambda x, y: cross_entropy(model(x), y), model, case)

    return build


def mmsegmentation() -> Callable[[Case], Program]:
    from mmseg.models.backbones import MixVisionTransformer
    from mmseg.models.decode_heads import SegformerHead

    def build(case: Case) -> Program:
        dims, depths = MIT[case.backbone]
        backbone = MixVisionTransformer(
            embed_dims=dims[0],
            num_layers=list(depths),
            num_heads=list(NUM_HEADS),
            qkv_bias=True,
            drop_path_rate=DROP_PATH,
        )
        head = SegformerHead(
            in_channels=list(dims),
            in_index=[0, 1, 2, 3],
            channels=case.dim,
            num_classes=case.classes,
            dropout_ratio=0.1,
            norm_cfg={"type": "BN"},
            align_corners=False,
            ignore_index=IGNORE,
        )
        model = nn.Sequential(backbone, head)

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            samples = [SimpleNamespace(gt_sem_seg=SimpleNamespace(data=label[None])) for label in labels]
            return head.loss_by_feat(model(images), samples)["loss_ce"]

        return theirs(model, loss, model, case)

    return build


PEERS: dict[str, Callable[[], Callable[[Case], Program]]] = {
    "hf": hugging_face,
    "smp": segmentation_models_pytorch,
    "mmseg": mmsegmentation,
}
PROGRAMS = {
    **PEERS,
    "linear": lambda: ours("linear"),
    "prototypes": lambda: ours("prototypes"),
    "bf16_scores": lambda: ours("prototypes", "bfloat16"),
}


def installed(names: list[str]) -> dict[str, Callable[[Case], Program]]:
    """The builders of those that can be imported; a line about each of the others."""
    found = {}
    for name in names:
        try:
            found[name] = PROGRAMS[name]()
        except ImportError as error:
            print(f"without {name}: {error}")
    return found


def peaks(names: list[str], case: Case, what: Literal["step", "predict"]) -> dict[str, float]:
    """Peak memory of two steps or predictions, beyond the imports, in GB: each program in a fresh process."""
    found = {}
    for name in names:
        with ProcessPoolExecutor(1, get_context("spawn")) as one:
            found[name] = one.submit(_peak_gb, name, case, what, torch.get_num_threads()).result()
    return found


def _peak_gb(name: str, case: Case, what: str, threads: int) -> float:
    torch.set_num_threads(threads)
    build = PROGRAMS[name]()
    before = memory_now_gb(torch.device(case.device))
    program = build(case)
    images = make_batch(case).image.to(case.device)
    for _ in range(2):
        if what == "step":
            program.step()
        else:
            program.predict(images)
    return peak_memory_gb(torch.device(case.device)) - before
