"""The device of the tests marked `gpu`: CUDA, or what PROTOSEG_TEST_DEVICE names."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    name = os.environ.get("PROTOSEG_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU with CUDA; PROTOSEG_TEST_DEVICE=cpu runs it on the CPU")
    return torch.device(name)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Single precision as it is; tests that want TF32 switch it on."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32
