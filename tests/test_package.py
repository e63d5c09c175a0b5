"""The wheel: what is in it, and that it works where there is no clone."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from protoseg.config import load_config
from protoseg.runtime.errors import UserError
from protoseg.runtime.shipped import find_config, shipped_configs

# No PYTHONPATH: what is imported must be what was installed.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(command: Sequence[str | Path], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made as `python -m build` makes it, by way of a source archive, with the setuptools that is there."""
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source")
    tracked = run(["git", "ls-files", "-co", "--exclude-standard"], Path.cwd()).splitlines()
    for name in tracked:
        if name.startswith(("protoseg/", "configs/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(Path(name).read_bytes())
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source], source)
    run([sys.executable, "-m", "twine", "check", "--strict", *out.iterdir()], out)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_every_module_every_config_and_the_page(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {path.as_posix() for path in Path("protoseg").rglob("*.py")}
    expected |= {f"protoseg/{path.as_posix()}" for path in Path("configs").rglob("*.yaml")}
    expected |= {path.as_posix() for path in Path("protoseg").rglob("*.yaml")}
    expected |= {f"protoseg/{name}" for name in ("figures/page.html", "py.typed")}
    assert inside == expected, "a new package is added to tool.setuptools.packages in pyproject.toml"


def test_wheel_trains_outside_any_clone(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    # Its dependencies are those of this environment: nothing is downloaded.
    run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel],
        tmp_path,
    )
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work = tmp_path / "work"
    work.mkdir()
    command = tmp_path / "venv/bin/protoseg"
    where = run([python, "-c", "import protoseg; print(protoseg.__file__)"], work)
    assert where.startswith(str(site)), "the installed package is what is tested"
    assert run([command, "--version"], work).startswith("protoseg ")
    assert run([python, "-m", "protoseg", "--version"], work) == run([command, "--version"], work)
    listed = run([command, "configs"], work)
    assert {line.split()[0] for line in listed.splitlines()} == set(shipped_configs())
    small = ["train.iterations=2", "data.batch_size=2", "data.workers=0", "eval.interval=2", "eval.samples=0"]
    run([command, "train", "digits_resnet18_k4", *small, "--out", "runs/mine"], work)
    assert (work / "runs/mine/results.json").is_file()


def test_a_shipped_config_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config("digits_resnet18_k4") == load_config("configs/digits_resnet18_k4.yaml")
    assert find_config("sweeps/k").samefile("configs/sweeps/k.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits_resnet18_k4").write_text("train: {iterations: 7}")
    assert load_config("digits_resnet18_k4").train.iterations == 7, "a file that is there goes first"


def test_an_unknown_config_is_named_with_the_nearest() -> None:
    message = (
        "^digits_resnet18_k5: no such file, and no shipped config of this name;"
        r" did you mean digits_resnet18_k4\?$"
    )
    with pytest.raises(UserError, match=message):
        load_config("digits_resnet18_k5")
    with pytest.raises(UserError, match=r"^zzz: .*`protoseg configs` lists those$"):
        load_config("zzz")
    with pytest.raises(UserError, match=r"^mine\.yaml: cannot read this YAML file"):
        load_config("mine.yaml")


def test_what_the_package_imports_is_declared() -> None:
    """pip would install nothing else. Extras are imported inside functions, which say what is missing."""
    project = pytest.importorskip("tomllib").loads(Path("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared, optional = (
        {re.split(r"[>\[]", each)[0].lower().replace("_", "-") for each in lines}
        for lines in (
            project["dependencies"],
            [each for name in ("convert", "export", "video", "slurm") for each in extras[name]],
        )
    )
    homes = packages_distributions()
    for path in Path("protoseg").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"protoseg"}:
                allowed = declared if node.col_offset == 0 else declared | optional
                given = {each.lower().replace("_", "-") for each in homes.get(top, [top])}
                assert given & allowed, f"{path} imports {top}: add it to pyproject.toml"
