"""Checks the node_config of AWS against EC2's own model of RunInstances, which comes with botocore: no network.

botocore's own ParamValidator knows no enums, so that any instance type would do, and shows values, which may be secret.
"""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from ray_mnist.checks.contents import mappings, section

TYPES: dict[str, Any] = {
    "string": str,
    "integer": int,
    "boolean": bool,
    "list": list,
    "structure": dict,
}
FILLED_IN_BY_RAY = {"MinCount", "MaxCount"}
RAYS_OWN = {"SubnetIds"}  # Ray takes one of them for each node


@cache
def run_instances() -> Any:
    """The shape of the request, as botocore has it; ImportError without botocore."""
    from botocore.session import Session  # type: ignore[import-untyped]

    return Session().get_service_model("ec2").operation_model("RunInstances").input_shape


def findings(node_configs: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """What EC2 would refuse, and what leaves a node less safe than it can be."""
    try:
        model = run_instances()
    except ImportError:
        yield "AWS's node_config was not checked, since boto3 is missing: pip install boto3, which `ray up` needs too."
        return
    for place, node_config in node_configs.items():
        yield from model_findings(model, {k: v for k, v in node_config.items() if k not in RAYS_OWN}, place)
        yield from safety_findings(node_config, place)


def model_findings(shape: Any, value: Any, place: str) -> Iterator[str]:
    """Unknown names, wrong types, and values that are not among those allowed, however deep."""
    wanted = TYPES.get(shape.type_name, object)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        yield f"{place} is not of type {shape.type_name}, as EC2 wants it: write one."
    elif shape.type_name == "structure":
        yield from structure_findings(shape, value, place)
    elif shape.type_name == "list":
        for index, item in enumerate(value):
            yield from model_findings(shape.member, item, f"{place}[{index}]")
    elif getattr(shape, "enum", None) and value not in shape.enum:
        close = get_close_matches(value, shape.enum, n=3) or shape.enum[:5]
        yield f"{place} is {value}, which EC2 does not have: write one such as {', '.join(close)}."


def structure_findings(shape: Any, value: dict[str, Any], place: str) -> Iterator[str]:
    """The names in a mapping, then what is in each."""
    for name in set(shape.required_members) - value.keys() - FILLED_IN_BY_RAY:
        yield f"{place} lacks {name}, which EC2 demands: add it."
    for name, inner in value.items():
        if name in shape.members:
            yield from model_findings(shape.members[name], inner, f"{place}.{name}")
        else:
            close = get_close_matches(str(name), shape.members, n=1)
            mend = f"did you mean {close[0]}?" if close else "leave it out."
            yield f"{place}.{name} is not known to EC2: {mend}"


def safety_findings(node_config: dict[str, Any], place: str) -> Iterator[str]:
    """Whoever reaches the metadata service has the node's rights, and whoever has the disk has what is on it."""
    if "LaunchTemplate" in node_config:  # which may say so
        return
    if section(node_config, "MetadataOptions").get("HttpTokens") != "required":
        yield (
            f"{place} gives the node's rights to whatever reaches its metadata service: "
            "write MetadataOptions: {HttpTokens: required}."
        )
    volumes = [section(disk, "Ebs") for disk in mappings(node_config, "BlockDeviceMappings") if "Ebs" in disk]
    if not volumes or not all(volume.get("Encrypted") is True for volume in volumes):
        yield (
            f"{place} has a volume that is not encrypted: "
            "write Ebs: {Encrypted: true} for each of BlockDeviceMappings, the root's too."
        )
