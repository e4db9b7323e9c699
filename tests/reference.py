"""Per-example gradients by the definition: one example at a time, autograd, float64.

Nothing of the package is imported, so that a mistake there cannot hide here.

Axis letters: N examples, P parameters.
"""

from __future__ import annotations

import copy

import torch
from torch.nn import functional as F


def cross_entropy(outputs, targets):
    """Loss of each example, (N,)."""
    return F.cross_entropy(outputs, targets, reduction="none")


def log_odds(outputs, targets):
    """log((1 − p_y)/p_y): cross-entropy is an increasing function of it, and it never cancels.

    So its gradient is that of cross-entropy times a positive number, however small 1 − p_y is.
    """
    y = targets.unsqueeze(1)
    others = outputs.masked_fill(F.one_hot(targets, outputs.shape[1]).bool(), -torch.inf)
    return torch.logsumexp(others, 1) - outputs.gather(1, y).squeeze(1)


def per_example_gradients(model, loss, inputs, targets, names=None):
    """Return name -> (N, *shape), float64; 0 where a parameter has no use."""
    model = copy.deepcopy(model).double()
    loss = copy.deepcopy(loss).double() if isinstance(loss, torch.nn.Module) else loss
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if names is not None:
        parameters = {name: parameters[name] for name in names}
    rows = {name: [] for name in parameters}
    for i in range(len(targets)):
        outputs = _call(model, _example(inputs, i))
        value = loss(outputs, targets[i : i + 1]).sum()
        grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for (name, p), g in zip(parameters.items(), grads, strict=True):
            rows[name].append(torch.zeros_like(p) if g is None else g.to_dense())
    return {name: torch.stack(column) for name, column in rows.items()}


def flat(gradients):
    """Return all parameters side by side, g_NP."""
    return torch.cat([g.flatten(1) for g in gradients.values()], 1)


def unit(g_NP):
    """Return g/‖g‖; 0 where g is 0. Scaled first: the square of 1e-200 is 0."""
    peak = g_NP.abs().amax(1, keepdim=True)
    g_NP = g_NP / torch.where(peak > 0, peak, 1.0)
    length = g_NP.norm(dim=1, keepdim=True)
    return g_NP / torch.where(length > 0, length, 1.0)


def gram(g_NP):
    """g_i·g_j of all pairs."""
    return g_NP @ g_NP.T


def cosine(g_NP):
    """cos(g_i, g_j) of all pairs; 0 where a gradient is 0."""
    return gram(unit(g_NP))


def cosine_matrix(model, loss, inputs, targets, names=None):
    """cos(g_i, g_j) of a network's loss gradients."""
    return cosine(flat(per_example_gradients(model, loss, inputs, targets, names)))


def _example(inputs, i):
    if isinstance(inputs, dict):
        return {key: _example(value, i) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_example(value, i) for value in inputs)
    one = inputs[i : i + 1]
    return one.double() if one.is_floating_point() else one


def _call(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
