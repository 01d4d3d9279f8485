"""Where the tests' processes come from: one that has everything imported, and is forked for each of them."""

from multiprocessing import get_context

processes = get_context("forkserver")
# This list and the process are those of all contexts: another `set_forkserver_preload` would undo this one. The last
# modules are what an optimizer, a strategy and what the tests define import.
processes.set_forkserver_preload(
    [
        "ray_mnist.ray_fork_internals",
        "ray_mnist.launch.ray",
        "ray_mnist.trainer",
        "torch._dynamo",
        "ray.tune",
        "pytest",
    ]
)
