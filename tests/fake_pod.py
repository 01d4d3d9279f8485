"""Runs `ray_mnist.train` on a TPU slice of two hosts that are nodes of a Ray cluster on this machine.

As in fake_tpu.py, the real torch_xla computes on the CPU. Each host has one process, where a real one has one a chip.
"""

import os
import runpy
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import fake_tpu
import ray
from ray.cluster_utils import Cluster

from ray_mnist.launch import pod

HOSTS, CHIPS = 2, 4  # of a v4-16


def add_host(cluster: Cluster, worker: int) -> None:
    labels = {"tpu-slice-name": "pod", "tpu-worker-id": str(worker), "tpu-topology": "2x2x2", "tpu-pod-type": "v4-16"}
    cluster.add_node(
        num_cpus=1,
        resources={"TPU": CHIPS, "pod": 1} | ({"TPU-v4-16-head": 1} if worker == 0 else {}),
        labels={f"ray.io/{key}": value for key, value in labels.items()},
        env_vars={"TPU_NAME": "pod", "TPU_WORKER_ID": str(worker), "TPU_ACCELERATOR_TYPE": "v4-16"},
    )


def train_on_host(*arguments: Any) -> Any:
    import torch_xla.distributed.xla_multiprocessing as xmp

    def spawn(function: Any, args: Any, start_method: str) -> None:
        with ProcessPoolExecutor(1, get_context(start_method)) as process:
            process.submit(fake_tpu.on_chip, int(os.environ["TPU_WORKER_ID"]), HOSTS, function, args).result()

    fake_tpu.pretend(CHIPS)
    xmp.spawn = spawn
    return pod.train_on_host(*arguments)


if __name__ == "__main__":
    import fake_pod  # by its name, for the hosts to import it

    pod.train_on_host = fake_pod.train_on_host  # in this process, not on the hosts
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for worker in range(HOSTS):
        add_host(cluster, worker)
    cluster.wait_for_nodes()
    fake_tpu.pretend(0)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    runpy.run_module("ray_mnist.train", run_name="__main__", alter_sys=True)
