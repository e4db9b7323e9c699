"""Which kind of machine Ray's autoscaler starts: spot first, on demand where spot was refused.

`gpu.yaml` and `gpu-gcp.yaml` copy this file to the head, where Ray loads it by the name in
RAY_AUTOSCALER_UTILIZATION_SCORER. It runs there alone, so it imports nothing but Ray.
"""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer


def score(
    node_resources: dict[str, float],
    resources: list[dict[str, float]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> tuple[Any, ...] | None:
    """Score a node type for what is asked; Ray starts the one with the highest score.

    Ray's own score does not look at refusals: a cloud without spot machines would be asked for
    them for ever. A refusal counts for half an hour
    (AUTOSCALER_NODE_AVAILABILITY_MAX_STALENESS_S); then spot is tried again.

    Args:
        node_resources: what a node of this type offers.
        resources: what is asked for.
        node_type: its name in the cluster's file; spot types have "spot" in it.
        node_availability_summary: Ray's record of launches, by node type.
    """
    usual = _default_utilization_scorer(
        node_resources,
        resources,
        node_type,
        node_availability_summary=node_availability_summary,
    )
    if usual is None:
        return None
    record = node_availability_summary.node_availabilities.get(node_type)
    refused = record is not None and not record.is_available
    return (not refused, *usual, "spot" in node_type)
