"""What is asked of Ray's autoscaler where Ray has no public call: the one place to look at with a new Ray.

`ray up` has no dry run, so that its first steps, which fill in defaults and validate, are taken here one by one.
`ray status` shows what the autoscaler waits for, but only as text.
"""

import copy
import io
import json
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import ray.autoscaler
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.sdk import get_cluster_status

from ray_mnist.errors import one_line

SCHEMA = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
FIRST_AUTOSCALER = "RAY_enable_autoscaler_v2=0"  # where `ray start --head` would take the second
UNEXPECTED_TERMINATION = 2  # of the DeathReason in ray.nodes()


def schema_errors(config: dict[str, Any]) -> Iterator[jsonschema.ValidationError]:
    """All that Ray's own schema finds; `validate_config` stops at the first."""
    written = json.loads(json.dumps(config, default=str))  # in JSON, whose schema it is, every key is text
    written.pop("min_workers", None)  # as Ray does first
    yield from jsonschema.Draft7Validator(SCHEMA).iter_errors(written)


def prepare(config: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The cluster file with Ray's defaults filled in, as far as Ray comes, and why it refuses the file, if it does."""
    whole, hidden = config, io.StringIO()
    try:
        with redirect_stdout(hidden), redirect_stderr(hidden):
            whole = prepare_config(copy.deepcopy(config))
            validate_config(whole)
    except Exception as error:  # of many kinds, KeyError and AssertionError among them
        return whole, f"Ray refuses the file, and says why: {type(error).__name__}: {one_line(error)}"
    return whole, None


def pending(address: str) -> Iterator[str]:
    """What the autoscaler of the cluster at `address` waits for, or failed to launch; nothing where there is none."""
    status = get_cluster_status(address)
    for node in status.pending_nodes:
        why = node.details or "no details"
        yield f"a node of type {node.ray_node_type_name} is still starting ({why}): wait, then look at `ray status`."
    for launch in (*status.pending_launches, *status.failed_launches):
        how = "failed" if launch.failed_ts_s else "is under way"
        what = f"the launch of {launch.count} nodes of type {launch.ray_node_type_name} {how}"
        yield f"{what} ({launch.details or 'no details'}): look at `ray status`, and at monitor.log on the head."
