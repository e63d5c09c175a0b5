"""The whole configuration as typed models.

A YAML file holds only what differs from the defaults below. `preset` fills in the values of a published or
chosen variant first; the file's own keys and the command line's `key.sub=value` come on top, in that order.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from protoseg.core.settings import ContrastSettings, PrototypeSettings
from protoseg.runtime.config_keys import check_keys, known_keys, merge
from protoseg.runtime.errors import UserError
from protoseg.runtime.shipped import find_config
from protoseg.runtime.strict_yaml import parse_yaml

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


AnySection = TypeVar("AnySection", bound=Section)


class DataConfig(Section):
    """Which images, and how they are augmented and batched."""

    name: str = "folder"
    root: Path | None = None  # default: data/<name>
    train_split: str = "train"  # splits may be joined: train+val
    val_split: str = "val"
    classes: list[str] | None = None  # the next four: for `folder`; other datasets bring their own
    palette: list[tuple[int, int, int]] | None = None
    ignore_index: Annotated[int, Field(ge=0)] | None = None
    label_map: dict[int, int | str] | None = None  # raw id → class id, class name or "ignore"
    tree: Any = None  # nested classes, or shipped: the dataset's own; see docs/trees.md
    exclude: Path | None = None  # text file of images or labels to leave out, one per line
    exif: Literal["apply", "ignore"] = "apply"  # turn images as their orientation tag says, as viewers do
    value_range: Literal["auto"] | tuple[float, float] = "auto"  # what becomes 0 and 255; auto: see README
    bands: tuple[Positive, Positive, Positive] | None = None  # of files with more than three, from 1
    page: Positive | None = None  # of files with more than one, from 1
    crop: tuple[Positive, Positive] = (512, 512)  # height, width
    scale: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: Probability = 0.75  # no class may fill more of a crop; 1 switches the rule off
    flip: Probability = 0.5
    photometric: bool = True
    batch_size: Positive = 16  # over all ranks, per optimiser step
    workers: Annotated[int, Field(ge=0)] = 2  # per rank
    on_error: Literal["raise", "skip"] = "raise"
    # The frozen backbone's maps of whole images on disk: true is runs/features, or a folder's name.
    cache_features: bool | Path = False
    cache_gb: Annotated[float, Field(gt=0)] = 20
    cache_mb: Annotated[float, Field(ge=0)] = (
        0  # keep decoded images in memory, per rank, if they fit in this
    )
    rare_class_temperature: Annotated[float, Field(gt=0)] | None = None  # 0.01: rare classes more often

    @field_validator("classes", "label_map", mode="before")
    @classmethod
    def _names_are_text(cls, value: Any) -> Any:
        """YAML 1.1 reads no, on and null as something else than words, and 1.0 as a number."""
        ids = isinstance(value, dict)
        for each in value.values() if isinstance(value, dict) else value or ():
            if not isinstance(each, str) and (not ids or isinstance(each, bool) or not isinstance(each, int)):
                raise ValueError(f"a name was read as {each!r}; put the word in quotes, as in 'no'")
        if ids and any(isinstance(key, bool) for key in value):
            raise ValueError("the ids of the files stand on the left and must be whole numbers")
        return value

    @model_validator(mode="after")
    def _ranges_ascend(self) -> "DataConfig":
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be [low, high] with 0 < low ≤ high, not {list(self.scale)}")
        if self.value_range != "auto" and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range must be [low, high] with low < high, not {list(self.value_range)}")
        return self


class BackboneConfig(Section):
    """The feature extractor."""

    name: str = "resnet18"
    weights: str = "none"  # none | timm | package (extra `pretrained`) | hf:owner/model | path
    drop_path: Probability = 0.0
    output_stride: Literal[8, 16, 32] = 32  # ResNets only: 8 and 16 by dilation
    grad_checkpointing: bool = False
    frozen: bool = False  # nothing in it is learned, BatchNorm keeps its statistics


class DecodeHeadConfig(Section):
    """What turns the backbone's maps into one embedding map."""

    name: str = "mlp"
    dim: Positive | None = None  # None: the architecture's own width
    stride: Positive | None = None  # finer maps are left out; 8 instead of 4 is about four times as fast
    dropout: Probability = 0.1
    projection: bool = False  # an MLP of 1×1 convolutions behind it, for either classifier


class LossConfig(Section):
    """Weights: the total is CE + ppc·PPC + ppd·PPD + auxiliary·(auxiliary CE) + contrast·(pixel contrast)
    + tree·(tree-min cross-entropy) + tree_triplet·(tree-triplet loss).
    """

    ppc: NonNegative = 0.01
    ppc_pixels: Annotated[float, Field(gt=0, le=1)] = 0.125  # share of the pixels that PPC is computed of
    ppd: NonNegative = 0.01
    auxiliary: NonNegative = 0.4
    contrast: NonNegative = 1.0  # λ of the pixel contrast, where contrast.mode switches it on
    tree: NonNegative = 0.0  # the last two: with data.tree
    tree_triplet: NonNegative = 0.0
    tree_pixels: Annotated[float, Field(gt=0, le=1)] = 0.125  # share of the pixels that both are computed of
    class_weights: list[NonNegative] | None = None

    @property
    def by_term(self) -> dict[str, float]:
        """The weight of every term of the total."""
        return {"ce": 1.0, **self.model_dump(exclude={"ppc_pixels", "tree_pixels", "class_weights"})}


class OptimConfig(Section):
    """Optimiser and schedule: linear warm-up, then lr · (1 − t)^power."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 6e-5
    weight_decay: NonNegative = 0.01  # never on norms and biases
    momentum: Probability = 0.9  # sgd only
    head_lr_multiplier: Annotated[float, Field(gt=0)] = 1.0
    warmup_iterations: Annotated[int, Field(ge=0)] = 0
    power: NonNegative = 1.0


class TrainConfig(Section):
    """The loop."""

    iterations: Positive = 160_000
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulation: Positive = 1  # micro-batches per optimiser step
    grad_clip: Annotated[float, Field(gt=0)] | None = None  # largest norm of the gradient
    compile: bool = False
    channels_last: bool = False
    log_interval: Positive = 50
    track: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]  # beside metrics.jsonl


class EvalConfig(Section):
    """Evaluation during training."""

    interval: Positive = 5000
    window: tuple[Positive, Positive] | None = None  # height, width; None: by size, as in prediction
    samples: Annotated[int, Field(ge=0)] = 4  # pictures written at each evaluation


class CheckpointConfig(Section):
    """How often `last.pt` is written."""

    interval: Positive = 1000


class Config(Section):
    """One training run."""

    preset: Literal["default", "paper", "official"] = "default"
    classifier: Literal["prototypes", "linear", "cosine"] = "prototypes"  # the others are learned
    data: DataConfig = DataConfig()
    backbone: BackboneConfig = BackboneConfig()
    decode_head: DecodeHeadConfig = DecodeHeadConfig()
    prototypes: PrototypeSettings = PrototypeSettings()  # the classifier; method: ProtoSeg, CVPR 2022
    loss: LossConfig = LossConfig()
    contrast: ContrastSettings = ContrastSettings()  # beside either classifier (ICCV 2021)
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _cached_features_can_be_used(self) -> "Config":
        if not self.data.cache_features:
            return self
        if not self.backbone.frozen:
            raise ValueError("data.cache_features needs backbone.frozen: true")
        if self.data.cache_mb:
            raise ValueError(
                "data.cache_mb: with data.cache_features no image is read; leave one of them out"
            )
        if self.eval.window is not None:
            raise ValueError(
                "eval.window: with data.cache_features images are evaluated whole; leave one out"
            )
        d = self.data
        if (d.scale, d.flip, d.photometric, d.on_error) != ((1, 1), 0, False, "raise"):
            raise ValueError(
                "data.cache_features keeps whole images as they are: set data.scale: [1, 1], flip: 0,"
                " photometric: false, on_error: raise; or cache_features: false"
            )
        return self

    @model_validator(mode="after")
    def _tree_terms_have_a_tree(self) -> "Config":
        for name in ("tree", "tree_triplet"):
            if getattr(self.loss, name) and self.data.tree is None:
                raise ValueError(f"loss.{name} needs a label tree: give data.tree, or set loss.{name}: 0")
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> "Config":
        if self.data.batch_size % self.train.accumulation:
            raise ValueError(
                f"data.batch_size ({self.data.batch_size}) must be a multiple of train.accumulation"
                f" ({self.train.accumulation})"
            )
        return self


# What a preset changes against the defaults above. `official` also wraps the head (see build.py).
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "prototypes": {
            "momentum": 0.999,
            "logit_scale": 1.0,
            "prior": "none",
            "update_pixels": "all",
            "start": "random",
            "revive_after": 0,
        },
        "loss": {"ppc": 0.01, "ppc_pixels": 1.0, "ppd": 0.01},
    },
    "official": {
        "prototypes": {
            "momentum": 0.999,
            "temperature": 1.0,
            "score_norm": "layer_norm",
            "prior": "none",
            "update_pixels": "correct",
            "start": "random",
            "revive_after": 0,
        },
        "loss": {"ppc": 0.01, "ppc_pixels": 1.0, "ppd": 0.001},
    },
}
# What a stored configuration means that lacks these keys: it is from before they came.
BEFORE: dict[str, Any] = {
    "prototypes": {"prior": "none", "momentum": 0.999, "update_pixels": "all"},
    "loss": {"ppc_pixels": 1.0},
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, or a shipped one by name, and apply `key.sub=value` overrides (values are YAML).

    The config.yaml of a run means what it meant there. A preset among the overrides is stronger than the
    file, and weaker than the other overrides.
    Errors: UserError naming the file or override, the key, and the nearest valid key or the allowed values.
    """
    path = find_config(path)
    values = read_yaml(path)
    if path.name == "config.yaml" and (path.parent / "last.pt").is_file():  # a run's own
        values = merge(BEFORE, known_keys(Config, values))
    check_keys(Config, values, str(path))
    changes = [parse_override(override) for override in overrides]
    presets = [PRESETS.get(str(change.get("preset")), {}) for change in changes]
    for change in presets + changes:
        values = merge(values, change)
    return config_from(values, " with ".join([str(path), *overrides]))


def read_yaml(path: Path) -> dict[str, Any]:
    """The `key: value` lines of a YAML file. Errors: UserError naming the file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read this YAML file ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no text file; give a YAML file") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: expected `key: value` lines at the top level, found {values!r:.60}")
    return values or {}


def merge_into_trained(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration of a trained model with overrides, which may change data and precision only.

    Errors: UserError naming the override.
    """
    for override in overrides:
        if not override.startswith(("data.", "train.precision=")):
            raise UserError(
                f"override {override!r}: the model is trained already; only data.* and train.precision"
                " can be changed"
            )
        config = config_from(merge(to_plain(config), parse_override(override)), f"override {override!r}")
    return config


def config_from(values: dict[str, Any], where: str) -> Config:
    """Build a Config from a plain dict, `where` being what error messages call its source."""
    preset = PRESETS.get(str(values.get("preset", "default")), {})
    return validated(Config, merge(preset, values), where)


def validated(model: type[AnySection], values: dict[str, Any], where: str) -> AnySection:
    """A section from plain values. Errors: UserError naming `where`, the first key that is wrong, and why."""
    check_keys(model, values, where)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part != "function-after")
        message = first["msg"].removeprefix("Value error, ")
        given = "" if isinstance(first["input"], BaseModel | dict) else f", got {first['input']!r:.60}"
        raise UserError(f"{where}: {key + ': ' if key else ''}{message}{given}") from None


def stored_config(values: dict[str, Any], where: str) -> Config:
    """The configuration of a checkpoint, of this version or an older one: keys that have left are dropped."""
    return config_from(merge(BEFORE, known_keys(Config, values)), where)


def to_plain(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain data, fit for YAML, JSON and checkpoints."""
    return config.model_dump(mode="json")


def parse_override(text: str) -> dict[str, Any]:
    """`key.sub=value` as a nested dict of known keys; errors: UserError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override {text!r}: expected key.sub=value, for example train.iterations=1000")
    nested: Any = parse_yaml(value, f"override {text!r}")
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    check_keys(Config, nested, f"override {text!r}")
    return nested
