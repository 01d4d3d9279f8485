"""Watches a cloud's machine for the notice that it will be taken away, and drains its Ray node: cluster files start it.

`python -m ray_mnist.notices aws` or `gcp`, beside `ray start`. A run then goes on elsewhere while there is time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

LOOK_S = 5  # both clouds advise that
ANSWER_S = 2
TOKEN_S = 21600  # that a token of AWS's is good for, at most
PREEMPTION_S = 30  # what Google gives a spot machine
MAINTENANCE_S = 3600  # and one that it cannot move, such as any with a GPU


@dataclass(frozen=True)
class Notice:
    """The machine will be taken away in so many seconds, and why."""

    seconds: int
    why: str


def get(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """What the metadata server answers; None if there is no such thing.

    Raises:
        OSError: it does not answer, or with an error.
        HTTPException: what it answers is cut off.
    """
    opener = build_opener(ProxyHandler({}))  # it is on the machine, or none
    try:
        with opener.open(Request(url, headers=headers, method=method), timeout=ANSWER_S) as response:
            content: bytes = response.read()
            return content.decode()
    except HTTPError as error:
        if error.code == 404:
            return None
        raise


def seconds_until(when: datetime) -> int:
    """At least 0."""
    return max(0, int(when.timestamp() - time.time()))


class AWS:
    """Asks with a session's token, IMDSv2, without which the cluster files' machines answer nothing."""

    def __init__(self) -> None:
        self.url = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
        self.token: str | None = None

    def __call__(self) -> Notice | None:
        """Two minutes before a spot machine goes, and days before maintenance."""
        if spot := self._get("spot/instance-action"):
            action = json.loads(spot)
            when = datetime.fromisoformat(action["time"])
            return Notice(seconds_until(when), f"spot {action['action']}")
        for event in json.loads(self._get("events/maintenance/scheduled") or "[]"):
            # Hours ahead, others would take the place of workers that have still got time.
            left = seconds_until(parsedate_to_datetime(event["NotBefore"]))
            if event.get("State") == "active" and left <= MAINTENANCE_S:
                return Notice(left, event["Code"])
        return None

    def _get(self, path: str) -> str | None:
        if self.token is None:
            seconds = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}
            self.token = get(f"{self.url}/latest/api/token", seconds, "PUT")
        try:
            return get(f"{self.url}/latest/meta-data/{path}", {"X-aws-ec2-metadata-token": self.token or ""})
        except HTTPError:
            self.token = None  # it is old: the next time with a new one
            raise


def gcp() -> Notice | None:
    """Half a minute before a spot machine goes, and an hour before maintenance of one that cannot be moved."""
    url = f"http://{os.environ.get('GCE_METADATA_HOST', 'metadata.google.internal')}/computeMetadata/v1/instance"
    if get(f"{url}/preempted", {"Metadata-Flavor": "Google"}) == "TRUE":
        return Notice(PREEMPTION_S, "preempted")
    if get(f"{url}/maintenance-event", {"Metadata-Flavor": "Google"}) == "TERMINATE_ON_HOST_MAINTENANCE":
        return Notice(MAINTENANCE_S, "maintenance")
    return None


def watch(ask: Callable[[], Notice | None]) -> Notice:
    """The notice, once there is one; a metadata server that fails for a while is asked again."""
    last = ""
    while True:
        try:
            if notice := ask():
                return notice
        except (OSError, HTTPException, ValueError, KeyError) as error:
            if (said := f"the metadata server: {type(error).__name__}: {error}") != last:
                print(said, file=sys.stderr, flush=True)
            last = said
        time.sleep(LOOK_S)


def drain(notice: Notice, node_id: str | None) -> bool:
    """Has Ray place nothing more on this machine, and tell who asks how long it is there; whether Ray took the notice.

    Where Ray's head does not answer, it is tried again as long as there is time.
    """
    ray = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    about = ["--reason-message", notice.why, "--deadline-remaining-seconds", str(notice.seconds)]
    deadline = time.monotonic() + notice.seconds
    while subprocess.run([*ray, *about, *(["--node-id", node_id] if node_id else [])]).returncode:
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def main() -> None:
    """Watches until the notice comes, and drains."""
    parser = argparse.ArgumentParser(prog="python -m ray_mnist.notices", description=__doc__.splitlines()[0])
    parser.add_argument("cloud", choices=["aws", "gcp"])
    parser.add_argument("--node-id", help="of the node to drain (default: this machine's)")
    arguments = parser.parse_args()
    notice = watch(AWS() if arguments.cloud == "aws" else gcp)
    print(f"taken away in {notice.seconds} s: {notice.why}", flush=True)
    sys.exit(not drain(notice, arguments.node_id))


if __name__ == "__main__":
    main()
