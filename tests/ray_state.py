"""What is there in the Ray cluster that this process is connected to, asked through Ray's own state."""

from typing import Any

import psutil
import ray
import ray._private.state


def placement_groups() -> list[dict[str, Any]]:
    """Those that are not removed."""
    return [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


def actors() -> set[str]:
    """The classes of those that are alive, but for Ray's own that stay as long as the cluster."""
    alive = [actor for actor in ray._private.state.actors().values() if actor["State"] != "DEAD"]
    return {actor["ActorClassName"] for actor in alive} - {"TrainStateActor", "_AutoscalingCoordinatorActor"}


def process_of(actor_class: str) -> int:
    """The process of the first actor of this class that is alive or about to be; 0 if there is none."""
    found = [actor for actor in ray._private.state.actors().values() if actor["ActorClassName"] == actor_class]
    return next((actor["Pid"] for actor in found if actor["State"] in ("PENDING_CREATION", "ALIVE")), 0)


def processes_on(node_id: str) -> list[psutil.Process]:
    """Those of the actors on the node of this machine, which are no children of its own."""
    found = [actor for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"]
    return [psutil.Process(actor["Pid"]) for actor in found if actor["Address"]["NodeID"] == node_id]
