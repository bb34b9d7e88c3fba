"""The resources that work on a Ray cluster waits for."""

import logging

log = logging.getLogger(__name__)

SECONDS_TO_ANSWER = 10  # of the cluster


def unmet_demand() -> str:
    """Return the resources that tasks and actors of the cluster wait for, such as `2 x (1 CPU, 1 GPU)`.

    The text is empty if they wait for nothing, and if the cluster does not say.
    """
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    if not ray.is_initialized():
        return ""
    try:
        address = ray.get_runtime_context().gcs_address
        demands = get_cluster_status(address, timeout=SECONDS_TO_ANSWER).resource_demands
    except Exception as error:  # of any kind: nothing but a line of the log depends on it
        log.debug("the demand of the cluster is unknown: %s: %s", type(error).__name__, error)
        return ""
    bundles = [
        (bundle.count, sorted(bundle.bundle.items()))
        for demand in (*demands.ray_task_actor_demand, *demands.placement_group_demand)
        for bundle in demand.bundles_by_count
    ]
    return ", ".join(
        sorted(
            f"{count} x ({', '.join(f'{amount:g} {name}' for name, amount in resources)})"
            for count, resources in bundles
        )
    )
