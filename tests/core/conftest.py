"""What the tests of several files need."""

import pytest
import torch


@pytest.fixture(params=[False, True], ids=["cpu", "as on a gpu"])
def as_on_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the branches for a GPU, here on the CPU."""
    if request.param:
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
