"""What the head and its clustering cost, against the straightforward loop, bare products, and the floor."""

import torch
from benchmarks.head import measure
from gpu_checks.ceilings import floor_ms, milliseconds, peak_mb, rates, setup
from gpu_checks.job import Job
from torch import Tensor

from protoseg.core.clustering import assign, cluster_counts, cluster_sums, sinkhorn
from protoseg.core.losses import upsampled_cross_entropy
from protoseg.core.prototypes import PrototypeHead
from protoseg.core.similarity import own_similarities

CASES = ((32768, 256, 150, 10), (32768, 256, 19, 10), (131072, 256, 150, 10), (32768, 256, 847, 10))
TINY_CASES = ((256, 8, 5, 3),)


def head(job: Job) -> None:
    """Forward, backward, clustering and update of one step, without upsampling."""
    device = setup(job)
    measured = rates(job, device)
    job.record(rates=measured)
    print("  rates: " + ", ".join(f"{name} {value}" for name, value in measured.items()), flush=True)
    cases = TINY_CASES if job.tiny else CASES
    for dtype, product in ((torch.float32, "tf32"), (torch.bfloat16, "bf16")):
        for n, d, c, k in cases:
            if job.left() < 3:
                job.record(left_out=f"N {n}, C {c}, {product} and what follows: no time left")
                return
            found = measure(n, d, c, k, device, 3 if job.tiny else 20, dtype, plain_repeats=2)
            parts = _parts(n, d, c, k, dtype, device)
            size = torch.finfo(dtype).bits // 8
            floor = floor_ms(6 * n * d * c * k, n * (2 * d * size + 8 * c), product, measured)
            job.row(
                "head", N=n, D=d, C=c, K=k, dtype=product,
                ours_ms=found["ours_ms"], forward_ms=parts["forward"], update_ms=parts["update"],
                loop_ms=found["plain_ms"], times_faster=found["plain_ms"] / found["ours_ms"],
                three_products_ms=1.5 * found["two_ms"], floor_ms=floor, over_floor=found["ours_ms"] / floor,
                ours_mb=found["ours_mb"], loop_mb=found["plain_mb"], loss_difference=found["loss_difference"],
            )  # fmt: skip
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _parts(n: int, d: int, c: int, k: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Milliseconds of `training_step` and of `update_` alone."""
    score_dtype = "float32" if dtype == torch.float32 else "bfloat16"
    module = PrototypeHead(d, c, k, start="random", ignore_index=65535, score_dtype=score_dtype).to(device)
    features = torch.randn(2, d, n // 32, 16, device=device).to(dtype).requires_grad_()
    labels = torch.randint(0, c, (2, n // 32, 16), device=device)
    out = module.training_step(features, labels)
    return {
        "forward": milliseconds(lambda: module.training_step(features, labels), device, 10),
        "update": milliseconds(lambda: module.update_(out), device, 10),
    }


def clustering(job: Job) -> None:
    """All classes at once: 10,000 pixels per class, ten prototypes; and the loop over classes beside it."""
    device = setup(job)
    per_class, k, d = (50, 3, 8) if job.tiny else (10_000, 10, 256)
    measured = rates(job, device)
    for c in (5,) if job.tiny else (19, 150):
        n = c * per_class
        labels = torch.randint(0, c, (n,), device=device)
        emb = torch.nn.functional.normalize(torch.randn(n, d, device=device), dim=1)
        protos = torch.nn.functional.normalize(torch.randn(c, k, d, device=device), dim=2)
        own = own_similarities(emb, protos, labels)

        def cluster(own: Tensor = own, labels: Tensor = labels, c: int = c) -> Tensor:
            return assign(sinkhorn(own, labels, c), labels)

        def loop(own: Tensor = own, labels: Tensor = labels, c: int = c) -> None:
            for each in range(c):
                plan = ((own[labels == each] - 1) / 0.05).exp()
                for _ in range(3):
                    plan = plan / plan.sum(0, keepdim=True)
                    plan = plan / plan.sum(1, keepdim=True)
                plan.argmax(1)

        assignment = cluster()

        def sums(
            emb: Tensor = emb, labels: Tensor = labels, assignment: Tensor = assignment, c: int = c
        ) -> None:
            cluster_sums(emb, labels, assignment, c, k)
            cluster_counts(labels, assignment, c, k, emb.dtype)

        repeats = 3 if job.tiny else 20
        job.row(
            "clustering", C=c, pixels_per_class=per_class, K=k,
            sinkhorn_and_assign_ms=milliseconds(cluster, device, repeats),
            loop_ms=milliseconds(loop, device, 3, 1),
            # The similarities read once per iteration, labels read and assignment written once.
            floor_ms=(12 * n * k + 16 * n) / measured["copy_gb_per_s"] / 1e6,
            own_similarities_ms=milliseconds(
                lambda e=emb, p=protos, y=labels: own_similarities(e, p, y), device, repeats  # type: ignore
            ),
            sums_ms=milliseconds(sums, device, repeats),
            sums_floor_ms=4 * n * d / measured["copy_gb_per_s"] / 1e6,
            memory_mb=peak_mb(cluster, device),
        )  # fmt: skip


def cross_entropy(job: Job) -> None:
    """Cross-entropy at label resolution, forward and backward, against upsampling first."""
    device = setup(job)
    batch, stride, size = (1, 4, 32) if job.tiny else (8, 4, 512)
    for c in (5,) if job.tiny else (19, 150):
        logits = torch.randn(batch, c, size // stride, size // stride, device=device, requires_grad=True)
        labels = torch.randint(0, c, (batch, size, size), device=device)

        def ours(logits: Tensor = logits, labels: Tensor = labels) -> None:
            logits.grad = None
            upsampled_cross_entropy(logits, labels, ignore_index=255).backward()

        def plain(logits: Tensor = logits, labels: Tensor = labels) -> None:
            logits.grad = None
            full = torch.nn.functional.interpolate(logits, labels.shape[1:], mode="bilinear")
            torch.nn.functional.cross_entropy(full, labels, ignore_index=255).backward()

        job.row(
            "cross_entropy", B=batch, C=c, size=size,
            ours_ms=milliseconds(ours, device, 10), plain_ms=milliseconds(plain, device, 10),
            ours_mb=peak_mb(ours, device), plain_mb=peak_mb(plain, device),
        )  # fmt: skip
