"""The README keeps its word."""

import re
from pathlib import Path

import torch


def test_drop_in_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 35
    torch.manual_seed(0)
    names: dict = {}
    exec(code, names)
    assert names["head"].initialized.all()
    assert names["loss"].isfinite()
    assert names["prediction"].shape[0] == 4


def test_named_files_exist() -> None:
    text = Path("README.md").read_text()
    for name in re.findall(r"(?:tools|configs)/[\w/.]+\.(?:py|yaml)", text):
        assert Path(name).exists(), name
