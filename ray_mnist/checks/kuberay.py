"""Checks KubeRay's documents: what Kubernetes accepts, and then no cluster comes of it."""

from collections.abc import Iterator
from typing import Any

from ray_mnist.checks import Check, versions
from ray_mnist.checks.contents import mappings, nearest, number, section

CLUSTER_IN = {"RayCluster": "", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}  # below spec


def is_rays(document: Any) -> bool:
    """Whether the document is for KubeRay, whatever its kind."""
    return isinstance(document, dict) and str(document.get("apiVersion", "")).startswith("ray.io/")


def checks(documents: list[dict[str, Any]]) -> Iterator[Check]:
    """Checks those documents that are KubeRay's."""
    for document in filter(is_rays, documents):
        kind = str(document.get("kind"))
        name = f"{kind} {section(document, 'metadata').get('name', 'without a name')}"
        if kind not in CLUSTER_IN:
            yield name, [f"kind {kind} is not known to KubeRay: {nearest(kind, CLUSTER_IN)}"]
            continue
        spec = section(document, "spec")
        cluster = section(spec, CLUSTER_IN[kind]) if CLUSTER_IN[kind] else spec
        if "clusterSelector" not in spec:  # a job for a cluster that is there already
            yield name, [f"{name}: {finding}" for finding in cluster_findings(cluster)]
    yield "versions against requirements.lock", [*versions.findings(*documents)]


def cluster_findings(cluster: dict[str, Any]) -> Iterator[str]:
    """The Ray version, the images, the replicas and the GPUs of one cluster."""
    version, locked = str(cluster.get("rayVersion")), versions.locked()["ray"]
    if version not in locked:
        yield f"rayVersion {version} is not the Ray of requirements.lock: write {' or '.join(locked)}."
    workers = mappings(cluster, "workerGroupSpecs")
    groups = {"the head": section(cluster, "headGroupSpec")}
    groups |= {f"worker group {group.get('groupName')}": group for group in workers}
    images = {name: container(group).get("image") for name, group in groups.items()}
    for name, image in images.items():
        if not image:
            yield f"{name} has no image: write the one of the head."
        elif image != images["the head"]:
            yield f"{name} has image {image} and the head {images['the head']}: write the same, for the same versions."
    for name, group in groups.items():
        yield from replica_findings(name, group)
        yield from gpu_findings(name, group)


def container(group: dict[str, Any]) -> dict[str, Any]:
    """The container that Ray runs in: the first."""
    containers = mappings(section(section(group, "template"), "spec"), "containers")
    return containers[0] if containers else {}


def replica_findings(name: str, group: dict[str, Any]) -> Iterator[str]:
    """`replicas` outside of the bounds that the autoscaler keeps to."""
    least = number(group, "minReplicas", 0)
    replicas = number(group, "replicas", least)
    most = number(group, "maxReplicas", max(least, replicas))
    if not least <= replicas <= most:
        yield f"{name} has {replicas} replicas, and minReplicas {least}, maxReplicas {most}: write a number in between."


def gpu_findings(name: str, group: dict[str, Any]) -> Iterator[str]:
    """GPUs that Ray is told of, but Kubernetes does not give."""
    promised = str(section(group, "rayStartParams").get("num-gpus"))
    limits = section(section(container(group), "resources"), "limits")
    given = next((str(amount) for resource, amount in limits.items() if str(resource).endswith("/gpu")), "0")
    if promised.isdigit() and given.isdigit() and int(promised) > int(given):
        yield (
            f"{name} promises Ray num-gpus {promised}, and its container has a limit of {given}: "
            f"write nvidia.com/gpu: {promised} under resources.limits."
        )
