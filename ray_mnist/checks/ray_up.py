"""Checks a cluster file for `ray up`, beyond Ray's schema, which lets any provider key and any node_config through."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray_mnist.checks import Check, aws, versions
from ray_mnist.checks.contents import nearest, number, section, strings
from ray_mnist.ray_internals import FIRST_AUTOSCALER, prepare_cluster_file, schema_errors

# What Ray's source reads of `provider`, for each.
ANY_PROVIDER = {
    "type",
    "use_internal_ips",
    "use_external_head_ip",
    "disable_node_updaters",
    "disable_launch_config_check",
    "foreground_node_launch",
    "worker_liveness_check",
}
PROVIDERS = {
    "aws": {
        "region",
        "availability_zone",
        "cache_stopped_nodes",
        "key_pair",
        "security_group",
        "aws_credentials",
        "cloudwatch",
    },
    "gcp": {"region", "availability_zone", "project_id", "cache_stopped_nodes", "gcp_credentials"},
    "local": {"head_ip", "worker_ips", "external_head_ip", "coordinator_address"},
}


def checks(config: dict[str, Any]) -> Iterator[Check]:
    """Checks the contents of the file, whatever they are: what one check trips over, the others still look past."""
    errors = [sentence for error in schema_errors(config) for sentence in schema_findings(error)]
    whole, refusal = (config, None) if errors else prepare_cluster_file(config)
    provider, counts = section(config, "provider"), [*count_findings(whole)]
    kind = str(provider.get("type"))
    # Of counts Ray says less.
    yield "Ray's schema", [*errors, *([refusal] if refusal and not counts else [])]
    yield "counts of nodes", counts
    if kind in PROVIDERS:
        yield f"keys of provider {kind}", [*provider_findings(provider)]
    if kind == "aws":
        yield "node_config against EC2's own model", [*aws.findings(node_configs(whole))]
    if kind == "local" and "coordinator_address" not in provider:
        yield "addresses", [*address_findings(provider, whole)]
    yield "file_mounts on this machine", [*mount_findings(section(config, "file_mounts"))]
    yield "versions against requirements.lock", [*versions.findings(whole)]


def node_configs(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each node type's node_config, by its place in the file."""
    types = section(config, "available_node_types")
    return {f"available_node_types.{name}.node_config": section(types[name], "node_config") for name in types}


def schema_findings(error: Any) -> Iterator[str]:
    """What is wrong, and how to mend it; never the value, which may be a secret."""
    place = ".".join(str(step) for step in error.absolute_path) or "the file"
    match error.validator:
        case "additionalProperties":
            known = [*error.schema.get("properties", {})]
            for key in error.instance.keys() - set(known):
                yield f"{place} has {key}, which Ray does not know: {nearest(str(key), known)}"
        case "required":
            for key in set(error.validator_value) - error.instance.keys():
                yield f"{place} lacks {key}: add it."
        case "type":
            yield f"{place} is not of type {error.validator_value}: write one."
        case _:
            yield f"{place} does not fit Ray's schema ({error.validator}: {error.validator_value}): write what does."


def provider_findings(provider: dict[str, Any]) -> Iterator[str]:
    """Keys that Ray would ignore, so that what they were to say does not hold."""
    known = PROVIDERS[provider["type"]] | ANY_PROVIDER
    for key in provider:
        if key not in known:
            yield f"provider.{key} is not known to Ray for {provider['type']}: {nearest(str(key), known)}"


def count_findings(config: dict[str, Any]) -> Iterator[str]:
    """Numbers of nodes that cannot hold together."""
    types, head = section(config, "available_node_types"), str(config.get("head_node_type"))
    most_of_all = number(config, "max_workers", sys.maxsize)
    if types and head not in types:
        yield f"head_node_type {head} is not one of available_node_types: write one of {', '.join(map(str, types))}."
    least_of_all = 0
    for name in types:
        least = number(section(types, name), "min_workers", 0)
        most = number(section(types, name), "max_workers", 0 if name == head else most_of_all)
        least_of_all += least
        if least > most:
            yield f"{name} has min_workers {least}, more than its max_workers {most}: raise that or lower this."
    if types and least_of_all > most_of_all:
        yield f"min_workers are {least_of_all} in all, more than max_workers {most_of_all}: raise the latter."


def address_findings(provider: dict[str, Any], whole: dict[str, Any]) -> Iterator[str]:
    """Machines of one's own: each once, and all of them brought up."""
    head, workers = provider.get("head_ip"), provider.get("worker_ips")
    for key in {"head_ip", "worker_ips"} - provider.keys():
        yield f"provider lacks {key}: add it."
    workers = workers if isinstance(workers, list) else []
    for address, times in Counter(map(str, workers)).items():
        if times > 1:
            yield f"provider.worker_ips has {address} {times} times: leave one."
    if head in workers:
        yield f"provider.worker_ips has {head}, which is the head_ip: leave it out, the head trains too."
    if number(whole, "max_workers", len(workers)) < len(workers):
        yield f"max_workers is {whole['max_workers']}, fewer than the {len(workers)} worker_ips: leave max_workers out."
    if not any(FIRST_AUTOSCALER in text for _, text in strings(whole.get("head_start_ray_commands"))):
        yield (
            "head_start_ray_commands start Ray's second autoscaler, which brings up one machine of one's own too few, "
            f"and none again that was lost: write `export {FIRST_AUTOSCALER};` before `ray start`."
        )


def mount_findings(mounts: dict[str, Any]) -> Iterator[str]:
    """What is to be copied to the nodes and is not here."""
    for remote, local in mounts.items():
        if not Path(str(local)).expanduser().exists():
            token = Path(str(remote)).name == "auth_token"
            mend = "make it with `ray get-auth-token --generate`" if token else "start from the folder that has it"
            yield f"file_mounts.{remote}: there is no {local} here: {mend}."
