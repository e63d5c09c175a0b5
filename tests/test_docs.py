"""The documentation builds with every link and every name that it refers to."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


def test_site_builds_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(
            r"""<(?:script|img|link)[^>]+(?:src|href)=["']?(https?:[^"' >]+)""", page.read_text()
        )
        assert not fetched, f"{page.name} loads {fetched}"
    assert "PrototypeHead" in (tmp_path / "site/reference/index.html").read_text()


def test_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read("docs/examples/start.ipynb", as_version=4)
    (given,) = [cell for cell in notebook.cells if "steps = 300" in cell.source]
    given.source = given.source.replace("steps = 300", "steps = 4").replace("images = 100", "images = 4")
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert (tmp_path / "overlay.png").exists()
    shown = [out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", [])]
    assert sum("image/png" in data for data in shown) >= 3, "overlay, prototypes, patches"
