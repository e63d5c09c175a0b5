"""Optimiser, parameter groups and learning-rate schedule."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from protoseg.config import OptimConfig
from protoseg.runtime.errors import UserError
from protoseg.training.objective import Objective


def parameter_groups(objective: Objective, config: OptimConfig) -> list[dict]:
    """Up to four groups: backbone or head (its own learning rate), with or without weight decay.

    Norm weights and all biases, that is everything with one axis, are not decayed.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith("model.backbone."), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.lr * (1.0 if in_backbone else config.head_lr_multiplier),
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (in_backbone, decayed), parameters in groups.items()
    ]


def build_optimizer(objective: Objective, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or SGD with momentum, as configured."""
    groups = parameter_groups(objective, config)
    if not groups:
        raise UserError(
            "decode_head.name and backbone.frozen: nothing in this model learns; use the command fit, or a"
            " decode head with weights"
        )
    if config.name == "adamw":
        return torch.optim.AdamW(groups, fused=True)  # one pass over memory in place of ten
    return torch.optim.SGD(groups, momentum=config.momentum)


def learning_rate_factor(step: int, iterations: int, warmup: int, power: float) -> float:
    """Linear warm-up over `warmup` steps, times the poly decay (1 − step/iterations)^power."""
    warm = min(1.0, (step + 1) / (warmup + 1))
    return warm * (1 - min(step, iterations) / iterations) ** power


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, iterations: int) -> LambdaLR:
    """One step of the schedule per optimiser step."""
    return LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, iterations, config.warmup_iterations, config.power),
    )
