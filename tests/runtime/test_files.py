"""Files are written whole or not at all."""

from pathlib import Path
from typing import Any

import pytest
import torch

from protoseg.models.checkpoint import save_checkpoint
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import LONGEST_NAME, make_folder, safe_name, whole_file, write_json, write_text


def test_a_file_in_the_folders_place_is_one_line(tmp_path: Path) -> None:
    make_folder(tmp_path / "a/b")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: no folder can be made there \(File exists\); choose another"):
        make_folder(tmp_path / "file")


def test_a_full_disk_leaves_the_old_checkpoint_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})

    def full(content: Any, file: Any) -> None:
        file.write(b"half")
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 4 vs 0")  # as torch says it  # noqa: B904

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"last\.pt: cannot write \(No space left on device\)"):
            save_checkpoint(path, {"step": 2})

    def broken(content: Any, file: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", broken)
        with pytest.raises(RuntimeError, match="device-side assert"):
            save_checkpoint(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / ("n" * 251 + ".txt")  # as long as a name may be
    write_text(path, "first: größe 日本")
    with pytest.raises(ZeroDivisionError), whole_file(path) as part:
        part.write_text(f"half {1 // 0}")
    assert path.read_text(encoding="utf-8") == "first: größe 日本"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(UserError, match=r"txt/x.json: cannot write \(File exists\); make room or choose"):
        write_json(path / "x.json", {})


@pytest.mark.parametrize("name", ["a", "größe 日本.v2", "12:30", "x" * LONGEST_NAME, ".."])
def test_names_that_fit_stay(name: str) -> None:
    assert safe_name(name) == name


def test_names_that_do_not_fit_are_made_to_and_stay_different(tmp_path: Path) -> None:
    given = [
        "a/b",
        "a_b/",
        "a\0b",
        "line\nline",
        "stra\udcdfe",
        "stra\udce0e",
        "图" * 82,
        "图" * 83,
        "x" * 231,
    ]
    made = [safe_name(name) for name in given]
    assert len(set(made)) == len(given)
    for name in made:
        assert len(name.encode("utf-8")) <= LONGEST_NAME
        (tmp_path / f"{name}_12345678.png").touch()


def test_two_processes_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with whole_file(tmp_path / "a") as mine:
        mine.write_text("mine")
        monkeypatch.setattr("os.getpid", lambda: 7)
        with whole_file(tmp_path / "a") as other:
            other.write_text("other")
        assert (tmp_path / "a").read_text() == "other"
    assert (tmp_path / "a").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
