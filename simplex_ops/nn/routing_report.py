"""Losses, schedules and statistics of the routed layers inside any model, from the last forward pass of each."""

import math

import torch
from torch import Tensor, nn

from simplex_ops.nn.routed_layer import Reports, RoutedLayer
from simplex_ops.nn.routing import SurpriseGate


def routing_reports(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What each layer reported in its last forward pass, by the layer's name, in the order of the model.

    ``mask`` [batch, length] says which tokens were routed; ``gate`` [batch, length] is the weight of their updates (with a
    student, its probability); ``d_st``, ``ce``, ``cu`` are those of `surprise_gate`; ``load`` [batch, length] is what should
    have the capacity as its mean: the gate, or a student's probability; then the losses below, one number each.
    """
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, Reports))
    return {name: layer.report for name, layer in layers if layer.report}


def routing_loss(model: nn.Module, prior: float = 0.05, router: float = 0.01, capacity: float = 0.0) -> Tensor | float:
    """What the last forward pass adds to the training loss, summed over the layers::

        prior    * mean squared error of the forecast (PriorFFN, TransitionNetwork); its target is constant
        router   * cross-entropy of the student's logits against the teacher's top-k mask
        capacity * (mean load - capacity)^2

    0.0 for a model without routed layers.
    """
    weights = {"prior_loss": prior, "router_loss": router}
    total: Tensor | float = 0.0
    for layer in (m for m in model.modules() if isinstance(m, Reports)):
        total = total + sum(weights[key] * x for key, x in layer.report.items() if weights.get(key))
        if capacity and isinstance(layer, RoutedLayer) and "load" in layer.report:
            total = total + capacity * (layer.report["load"].mean() - layer.capacity).square()
    return total


def anneal_gates(model: nn.Module, progress: float, start: float = 0.1, end: float = 100.0) -> None:
    """Sets beta of the scheduled gates (STT) to ``start * (end / start) ** progress``: soft choices first, hard ones last."""
    if math.isnan(progress):
        raise ValueError(f"anneal_gates: expected progress to be a number, got {progress}")
    for module in model.modules():
        if isinstance(module, SurpriseGate) and module.scheduled:
            module.beta.fill_(start * (end / start) ** min(max(progress, 0.0), 1.0))


@torch.no_grad()
def routing_statistics(model: nn.Module) -> dict[str, dict[str, float]]:
    """Per layer, as plain numbers for a log: losses, accuracy, the share that was routed (``capacity``), mean and standard
    deviation of the gate, means of d_st, ce and cu, and of S_CE = sigmoid(beta_ce ce) and S_CU = sigmoid(beta_cu cu)."""
    modules, statistics = dict(model.named_modules()), {}
    for name, report in routing_reports(model).items():
        row = {key: x.float().mean().item() for key, x in report.items() if key != "mask"}
        if "mask" in report:
            row["capacity"] = report["mask"].float().mean().item()
        if "gate" in report:
            row["gate_std"] = report["gate"].float().std(correction=0).item()
        if "ce" in report:
            beta_ce, beta_cu, _, _ = modules[name].gate.values(report["ce"].dtype)
            row["s_ce"] = torch.sigmoid(beta_ce * report["ce"]).mean().item()
            row["s_cu"] = torch.sigmoid(beta_cu * report["cu"]).mean().item()
        statistics[name] = row
    return statistics


def route_map(model: nn.Module) -> tuple[list[str], Tensor]:
    """Names of the routed layers, and which tokens each routed in the last pass: [layers, batch, length] bool."""
    masks = {name: report["mask"] for name, report in routing_reports(model).items() if "mask" in report}
    return list(masks), torch.stack(list(masks.values())) if masks else torch.zeros(0, 0, 0, dtype=torch.bool)
