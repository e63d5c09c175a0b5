"""The README keeps its word."""

import re
from pathlib import Path

import torch
import yaml

from protoseg.config import config_from
from protoseg.data.datasets import dataset_spec
from protoseg.models.build import build_model


def test_drop_in_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "PrototypeHead" in block]
    assert len(code.strip().splitlines()) <= 35
    torch.manual_seed(0)
    names: dict = {}
    exec(code, names)
    assert names["head"].initialized.all()
    assert names["loss"].isfinite()
    assert names["prediction"].shape[0] == 4


def test_configs_are_valid() -> None:
    texts = [Path(name).read_text() for name in ("README.md", "docs/trees.md")]
    blocks = [block for text in texts for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert len(blocks) >= len(texts)
    for block in blocks:
        config = config_from(yaml.safe_load(block), "README.md")
        dataset_spec(config.data)
        build_model(config)


def test_named_files_exist() -> None:
    text = Path("README.md").read_text()
    for name in re.findall(r"(?:tools|configs)/[\w/.]+\.(?:py|yaml)", text):
        assert Path(name).exists(), name
