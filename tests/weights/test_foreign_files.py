"""Files hold more than tensors; nothing in them may run."""

from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from protoseg.runtime.errors import UserError
from protoseg.weights.foreign_files import read_state


class Runs:
    """Pickled as a call of `exec`."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (self.code,)


def test_other_objects_are_passed_over_and_nothing_runs(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    content = {
        "state_dict": {"module.a": torch.arange(3), "module.b": 3},
        "best": np.float64(0.5),
        "history": [SimpleNamespace(values=np.zeros(2))],
        "code": Runs(f"open({str(trace)!r}, 'w')"),
    }
    torch.save(content, tmp_path / "w.pth")
    state = read_state(tmp_path / "w.pth")
    assert list(state) == ["a"]
    assert torch.equal(state["a"], torch.arange(3))
    assert not trace.exists()


def test_file_of_an_older_pytorch(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_state(tmp_path / "old.pth")["a"], torch.arange(3))


def test_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"more than tensors \(torch.* and no state_dict: save that alone"):
        read_state(tmp_path / "w.pth")


def test_what_the_safe_loader_cannot_pass_over_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "files": [Path("x")]}, tmp_path / "path.pth")
    assert list(read_state(tmp_path / "path.pth")) == ["a"]
    torch.save({"state_dict": {"a": torch.zeros(1)}, "q": deque([1])}, tmp_path / "deque.pth")
    with pytest.raises(UserError, match=r"deque\.pth holds more than tensors and is not opened"):
        read_state(tmp_path / "deque.pth")


@pytest.mark.parametrize("content", [b"hello\n", b"", b"PK\x03\x04"])
def test_no_weights_at_all(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"w\.pth (cannot be read|holds more than tensors)[^\n]*$"):
        read_state(tmp_path / "w.pth")
