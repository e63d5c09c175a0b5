"""The road to the hub and back, with a stand-in for the hub's HTTP client: nothing leaves this machine."""

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from safetensors.torch import save_file
from tiny import tiny_config, write_checkpoint, write_folder

import protoseg
from protoseg.evaluation.predictor import Predictor
from protoseg.models.backbones import build_backbone
from protoseg.runtime.errors import UserError
from protoseg.weights.foreign_backbone import load_backbone_weights
from protoseg.weights.pretrained import download

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class MiniHub:
    """Enough of the hub's HTTP interface to create, commit, list and fetch."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}  # repository → path → content
        self.asked: list[str] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        self.asked.append(f"{request.method} {path}")
        if path == "/api/repos/create":
            asked = json.loads(request.content)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.files.setdefault(name, {})
            return httpx2.Response(200, json={"url": f"https://huggingface.co/{name}"})
        if path == "/api/validate-yaml":
            return httpx2.Response(200, json={"warnings": [], "errors": []})
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name = "/".join(parts[:2])
        if name not in self.files:
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            return httpx2.Response(404, headers=headers)
        files = self.files[name]
        if "preupload" in parts:
            asked = [each["path"] for each in json.loads(request.content)["files"]]
            modes = [{"path": each, "uploadMode": "regular", "shouldIgnore": False} for each in asked]
            return httpx2.Response(200, json={"files": modes})
        if "commit" in parts:
            for line in map(json.loads, request.content.decode().splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"https://huggingface.co/{name}/commit/{COMMIT}"
            return httpx2.Response(200, json={"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
        if "resolve" in parts:
            content = files["/".join(parts[4:])]
            etag = hashlib.sha1(content).hexdigest()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Content-Length": str(len(content))}
            return httpx2.Response(200, headers=headers, content=b"" if request.method == "HEAD" else content)
        if "tree" in parts:
            rows = [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()]
            return httpx2.Response(200, json=rows)
        siblings = [{"rfilename": each} for each in files]
        return httpx2.Response(200, json={"id": name, "sha": COMMIT, "siblings": siblings})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[MiniHub]:
    hub = MiniHub()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(hub)))
    yield hub
    set_client_factory(default_client_factory)


def test_push_and_load_by_name(hub: MiniHub, tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    write_checkpoint(tmp_path / "last.pt", tiny_config(tmp_path / "data"))
    seg = protoseg.load(tmp_path, device="cpu")
    url = seg.push_to_hub("me/roads", token="a-token")
    assert COMMIT in url
    assert set(hub.files["me/roads"]) >= {"model.safetensors", "config.json", "README.md"}
    assert b"library_name: protoseg" in hub.files["me/roads"]["README.md"]
    image = tmp_path / "data/images/val/0.png"
    again = protoseg.load("me/roads", device="cpu")
    assert np.array_equal(again.predict(image).labels, seg.predict(image).labels)
    assert np.array_equal(
        Predictor.from_pretrained("me/roads").predict(image).labels, seg.predict(image).labels
    )


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_backbone_weights_from_the_hub(
    hub: MiniHub, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    net = build_backbone("mit_b0")
    file = tmp_path / "weights"
    state = net.state_dict()
    save_file(state, file) if kind.endswith("safetensors") else torch.save(state, file)
    card = b"---\nlicense: other\nlicense_name: research-only\n---\nA model."
    hub.files["lab/mit-b0"] = {kind: file.read_bytes(), "README.md": card, "tf_model.h5": b"not wanted"}
    other = build_backbone("mit_b0")
    report = load_backbone_weights(other, "mit_b0", "hf:lab/mit-b0")
    assert report is not None
    assert report.missing == []
    assert all(torch.equal(a, b) for a, b in zip(state.values(), other.state_dict().values()))
    assert "lab/mit-b0: licence research-only" in capsys.readouterr().err
    assert not any("tf_model" in line for line in hub.asked)
    asked = len([line for line in hub.asked if line.startswith("GET") and "resolve" in line])
    download("lab/mit-b0")
    again = len([line for line in hub.asked if line.startswith("GET") and "resolve" in line])
    assert again == asked, "what was fetched once is kept"


def test_what_is_not_there_is_said(hub: MiniHub) -> None:
    message = (
        r"^me/nothing: looked for model\*\.safetensors or pytorch_model\*\.bin of the model"
        r" huggingface\.co/me/nothing: .*; check the name and the connection"
    )
    with pytest.raises(UserError, match=message):
        protoseg.load("me/nothing")
    hub.files["me/text"] = {"README.md": b"no weights", "config.json": b"{}"}
    with pytest.raises(UserError, match=r"^me/text: the hub has no model\*\.safetensors"):
        protoseg.load("me/text")
    with pytest.raises(UserError, match=r"^not/a/name: looked for .* check the name"):
        load_backbone_weights(build_backbone("mit_b0"), "mit_b0", "hf:not/a/name")
