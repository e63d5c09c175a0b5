"""Is it right on this device: the tests marked `gpu`, no host synchronisation, compilation without breaks."""

import os
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from gpu_checks.ceilings import milliseconds, setup
from gpu_checks.job import Failed, Job
from gpu_checks.training_cost import MODES, make_batch, make_run
from torch import nn

from protoseg.core.losses import downsample_labels, upsampled_cross_entropy
from protoseg.core.prototypes import PrototypeHead
from protoseg.training import step as training
from protoseg.training.objective import Labels


class _Recorder:
    """Puts every test's outcome into the entry as soon as it is known."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.outcomes: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        self.outcomes[report.outcome] += 1
        self.job.record(outcomes=dict(self.outcomes))
        if not report.passed:
            text = str(report.longrepr)[-1500:]
            self.job.row("not_passed", test=report.nodeid, outcome=report.outcome, text=text)


def tests(job: Job) -> None:
    """pytest -m gpu."""
    os.environ["PROTOSEG_TEST_DEVICE"] = job.device
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for the deterministic mode, before CUDA starts
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    recorder = _Recorder(job)
    options = ["-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider", "-o", "addopts=", "--durations=8"]
    where = "tests/gpu/test_head_on_gpu.py" if job.tiny else "tests/gpu"
    code = pytest.main([*options, where], plugins=[recorder])
    print(f"  tests: {dict(recorder.outcomes)}", flush=True)
    if code != 0 or not recorder.outcomes["passed"]:
        raise Failed(f"pytest ended with {int(code)}: {dict(recorder.outcomes)}")


def no_host_sync(job: Job) -> None:
    """Every step after the warm-up, but for the one read at its end, with synchronisation made an error."""
    device = setup(job)
    read = training.finite_values

    def allowed(*args: Any) -> dict[str, float]:
        _mode(job, "default")
        try:
            return read(*args)
        finally:
            _mode(job, "error")

    wrong = []
    for mode in MODES:
        run, batch = make_run(job, "mit_b0", mode, device), make_batch(job)
        batch = batch._replace(label=batch.label.masked_fill(batch.label == 0, 255))  # a class still to come
        for _ in range(1 if job.tiny else 3):
            training.train_step(run, batch)
        found = _warned(job, run, batch)
        training.finite_values = allowed  # type: ignore[assignment]
        problem = None
        try:
            _mode(job, "error")
            training.train_step(run, batch)
        except RuntimeError as error:
            problem = str(error)[:300]
            wrong.append(mode)
        finally:
            _mode(job, "default")
            training.finite_values = read
        job.row("steps", mode=mode, problem=problem, places=found)
    if wrong:
        raise Failed(f"host synchronisation in: {', '.join(wrong)}")


def _warned(job: Job, run: Any, batch: Any) -> dict[str, int]:
    """All places of one step that synchronise, the allowed read among them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _mode(job, "warn")
        try:
            training.train_step(run, batch)
        finally:
            _mode(job, "default")
    places = Counter(f"{w.filename.split('site-packages/')[-1]}:{w.lineno}" for w in caught)
    return dict(places.most_common(12))


def _mode(job: Job, mode: str) -> None:
    if job.device == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


class _Small(nn.Module):
    """A convolution, the head and all losses: what is compiled."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(16, dim, 1)
        self.head = PrototypeHead(dim, classes, 3, start="random")

    def forward(self, maps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        features = self.project(maps)
        out = self.head.training_step(features, downsample_labels(labels, features.shape[-2:]))
        loss = upsampled_cross_entropy(out.logits, labels, ignore_index=255)
        return loss + out.ppc + out.ppd  # at full weight, so that a lost gradient shows


def compiled(job: Job) -> None:
    """The head's loss, gradient and time, compiled and not; graph breaks and loss of a whole model."""
    device = setup(job)
    backend = "aot_eager" if job.tiny else "inductor"
    dim, classes, side = (8, 4, 8) if job.tiny else (256, 150, 128)
    small = _Small(dim, classes).to(device)
    maps = torch.randn(2, 16, side, side, device=device)
    full = torch.randint(0, classes, (2, 4 * side, 4 * side), device=device)
    losses: dict[str, float] = {}
    gradients: dict[str, torch.Tensor] = {}
    times: dict[str, float] = {}
    for name, module in (("eager", small), (backend, torch.compile(small, backend=backend))):
        small.zero_grad()
        loss = module(maps, full)
        loss.backward()
        losses[name] = loss.item()
        assert small.project.weight.grad is not None
        gradients[name] = small.project.weight.grad.clone()
        times[name] = milliseconds(lambda m=module: m(maps, full).backward(), device, 10)  # type: ignore
    difference = (gradients["eager"] - gradients[backend]).norm() / gradients["eager"].norm()
    job.row("head", **{f"{k}_ms": v for k, v in times.items()}, **{f"{k}_loss": v for k, v in losses.items()},
            gradient_difference=difference.item())  # fmt: skip

    run, batch = make_run(job, "mit_b0", "prototypes", device, precision="fp32"), make_batch(job)
    image, labels = batch.image.to(device), batch.label.to(device).long()
    both = Labels(labels, downsample_labels(labels, run.model.feature_size(labels)))
    index = torch.arange(len(image), device=device)
    step = torch.tensor(0, device=device)
    inputs = (image, both, run.objective.loss_scales([both]), index, step)
    run.objective.eval()  # dropout would make the losses differ
    torch._dynamo.reset()
    explained = torch._dynamo.explain(run.objective)(*inputs)
    reasons = [str(each.reason)[:300] for each in explained.break_reasons]
    job.record(graphs=explained.graph_count, graph_breaks=explained.graph_break_count, reasons=reasons)
    print(f"  model: {explained.graph_count} graphs, {explained.graph_break_count} breaks", flush=True)
    torch._dynamo.reset()
    plain = run.objective(*inputs).total.item()
    traced = torch.compile(run.objective, backend="aot_eager")(*inputs).total.item()
    job.row("model", loss=plain, compiled_loss=traced)

    for one, two in ((losses["eager"], losses[backend]), (plain, traced)):
        if not abs(one - two) < 1e-3 * abs(one):
            raise Failed(f"the compiled loss is {two}, not {one}")
    if not difference < 1e-2:
        raise Failed(f"the compiled gradient differs by {difference.item():.3g}")
    if explained.graph_break_count:
        raise Failed(f"{explained.graph_break_count} graph breaks: {'; '.join(reasons)[:400]}")
