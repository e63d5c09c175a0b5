"""Configuration: every mistake gets one line that names the key and what to do."""

from pathlib import Path

import pytest
import yaml

from protoseg.config import config_from, load_config, merge_into_trained, stored_config, to_plain
from protoseg.runtime.config_keys import differing_keys, merge
from protoseg.runtime.errors import UserError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train: {iteratons: 3}", [], "unknown key train.iteratons; did you mean train.iterations?"),
        ("iterations: 3", [], "unknown key iterations; did you mean train.iterations?"),
        ("trian: {seed: 3}", [], "unknown key trian; did you mean train?"),
        ("zzz: 1", [], "unknown key zzz; valid here: preset, classifier, data"),
        ("train: {iterations: 0}", [], "train.iterations: Input should be greater than 0, got 0"),
        ("train: 3", [], "train is a section, got 3"),
        ("- a", [], "expected `key: value` lines"),
        ("a: [", [], "mend the YAML"),
        ("preset: x", [], "preset: Input should be 'default', 'paper' or 'official', got 'x'"),
        ("data: {scale: [2, 1]}", [], "scale must be [low, high]"),
        (
            "data: {batch_size: 3}\ntrain: {accumulation: 2}",
            [],
            "must be a multiple of train.accumulation (2)",
        ),
        ("", ["train.iterations=abc"], "train.iterations: Input should be a valid integer"),
        ("", ["train.iterations"], "expected key.sub=value"),
        ("", ["prototypes.momentm=1"], "did you mean prototypes.momentum?"),
        ("optim: {lr: .inf}", [], "optim.lr: Input should be a finite number"),
    ],
)
def test_mistake_is_named(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, text), overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot read this YAML file"):
        load_config(tmp_path / "none.yaml")


def test_yaml_cannot_execute(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mend the YAML"):
        load_config(write(tmp_path, "data: !!python/object/apply:os.system ['true']"))


def test_later_values_win(tmp_path: Path) -> None:
    path = write(tmp_path, "preset: paper\nprototypes: {momentum: 0.9}\noptim: {lr: 1e-3}")
    config = load_config(path, ["prototypes.num_per_class=7", "data.crop=[32, 64]"])
    assert config.prototypes.momentum == 0.9  # the file over the preset
    assert config.prototypes.start == "random"  # the preset over the default
    assert config.prototypes.num_per_class == 7  # the command line over the file
    assert config.optim.lr == 1e-3
    assert config.data.crop == (32, 64)


def test_preset_on_the_command_line_is_stronger_than_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "prototypes: {logit_scale: 30, num_per_class: 4}\nloss: {ppd: 0.3}")
    config = load_config(path, ["loss.ppc=0.5", "preset=paper"])
    assert (config.prototypes.logit_scale, config.loss.ppd, config.prototypes.prior) == (1, 0.01, "none")
    assert config.prototypes.num_per_class == 4  # not the preset's to say
    assert config.loss.ppc == 0.5  # the other overrides over the preset


def test_stored_configuration_means_what_it_meant(tmp_path: Path) -> None:
    """Keys that came later have the value of before, those that have left are dropped."""
    stored = to_plain(config_from({"prototypes": {"start": "random"}}, "c"))
    for section, key in (("prototypes", "prior"), ("prototypes", "momentum"), ("loss", "ppc_pixels")):
        del stored[section][key]
    stored["prototypes"]["update_pixels"] = "correct"
    stored["prototypes"]["left"] = 1
    config = stored_config(stored, "last.pt")
    assert (config.prototypes.prior, config.prototypes.momentum, config.loss.ppc_pixels) == ("none", 0.999, 1)
    assert (config.prototypes.update_pixels, config.prototypes.start) == ("correct", "random")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(stored))
    with pytest.raises(UserError, match=r"unknown key prototypes\.left"):
        load_config(path)
    (tmp_path / "last.pt").touch()
    assert load_config(path) == config
    del stored["prototypes"]["update_pixels"]
    assert stored_config(stored, "last.pt").prototypes.update_pixels == "all"


def test_resolved_config_loads_to_itself(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "preset: official\ndata: {label_map: {0: ignore, 1: 0}}"))
    assert config_from(to_plain(config), "copy") == config


def test_differing_keys_are_dotted() -> None:
    assert differing_keys({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}}) == ["a.c", "d"]


def test_label_map_is_replaced_not_merged() -> None:
    base = {"data": {"label_map": {1: 0}, "crop": [1, 1]}}
    assert merge(base, {"data": {"label_map": {2: 0}}}) == {"data": {"label_map": {2: 0}, "crop": [1, 1]}}


def test_a_checkpoint_is_no_config(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(UserError, match=r"last\.pt: is no text file; give a YAML file"):
        load_config(path)


def test_a_trained_model_takes_data_overrides_only() -> None:
    config = config_from({}, "test")
    changed = merge_into_trained(config, ["data.batch_size=4", "train.precision=bf16"])
    assert (changed.data.batch_size, changed.train.precision) == (4, "bf16")
    with pytest.raises(UserError, match=r"'prototypes\.logit_scale=1': the model is trained already"):
        merge_into_trained(config, ["prototypes.logit_scale=1"])
