"""tools/gpu_check.py at tiny sizes on the CPU: its checks run, one that fails stops none, time is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CHECKS = """about tests no_host_sync head clustering cross_entropy steps two_processes profiles hrnet
loader_wait camvid"""


def run(out: Path, *options: str, camvid: Path) -> tuple[subprocess.CompletedProcess, dict]:
    """The command, and the gpu.json that it wrote."""
    command = [sys.executable, "tools/gpu_check.py", "--device", "cpu", "--out", str(out), *options]
    env = {**os.environ, "PROTOSEG_CAMVID": str(camvid), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    return done, json.loads((out / "gpu.json").read_text())


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """Three pictures for each split, in CamVid's form."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind, shape, count in (("images", (64, 64, 3), 255), ("labels", (8, 8), 11)):
            folder = tmp_path / "camvid" / kind / split
            folder.mkdir(parents=True)
            for i in range(3):
                values = rng.integers(0, count, shape).astype(np.uint8)
                Image.fromarray(values).resize((64, 64), 0).save(folder / f"{i}.png")
    return tmp_path / "camvid"


def test_every_check_runs(tmp_path: Path, camvid: Path) -> None:
    done, found = run(tmp_path / "out", "--minutes", "30", "--only", *CHECKS.split(), camvid=camvid)
    states = {name: entry["status"] for name, entry in found["checks"].items()}
    assert states == dict.fromkeys(CHECKS.split(), "ok"), done.stdout + done.stderr
    assert done.returncode == 0
    assert found["checks"]["tests"]["outcomes"].keys() == {"passed"}
    assert found["checks"]["two_processes"]["differ_between_ranks"] == []
    for name in CHECKS.split():
        assert f"\n{name}: ok" in "\n" + done.stdout
    text = (tmp_path / "out/gpu.md").read_text()
    assert text in done.stdout
    for title in (
        "The head",
        "Clustering",
        "Cross-entropy",
        "Training step",
        "Targets",
        "CamVid from scratch",
    ):
        assert f"## {title}" in text
    assert "aten::" in (tmp_path / "out/profiles.txt").read_text()


def test_a_failed_check_stops_no_other_and_the_rest_is_skipped(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    names = ("clustering", "loader_wait", "camvid")
    done, found = run(tmp_path / "out", "--only", *names, camvid=nowhere)
    checks = found["checks"]
    assert done.returncode == 1
    assert checks["clustering"]["status"] == "ok"
    if not Path("data/camvid").is_dir():
        assert checks["camvid"]["error"] == (
            "Failed: CamVid is not here: put it into data/camvid, or name its folder in PROTOSEG_CAMVID"
        )
    done, found = run(tmp_path / "late", "--minutes", "0.01", "--only", *names, camvid=nowhere)
    assert {entry["status"] for entry in found["checks"].values()} == {"skipped"}
    assert "clustering: skipped, 0 s the time is up" in done.stdout
