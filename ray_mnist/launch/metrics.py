"""What Prometheus collects of a run from Ray, which keeps it ready on each node of a cluster.

It imports neither torch nor Lightning, which takes seconds.
"""

from ray.util.metrics import Gauge

from ray_mnist.run.events import Event, Progress, WorkersFailed

# Of the training, and named as in `Progress`; to Prometheus each is ray_mnist_NAME, where Ray adds the first part.
METRICS = {
    "epoch": "The epoch, counted from 1",
    "step": "Optimizer steps so far",
    "loss": "The loss of rank 0's part of the last batch",
    "samples_per_second": "Samples a second of all workers, over the last ten seconds",
    "step_seconds": "Seconds from one batch to the next, likewise",
    "data_wait_seconds": "Those of them in which rank 0 waited for its data loader",
    "restarts": "How often workers have failed since the run was started or resumed",
}


class RunMetrics:
    """The metrics of one fit, tagged with `run`, its name; Ray drops each some twenty seconds after it was set last.

    All are gauges: a counter Ray exports only once it is not 0, and then for as long as the node lives.
    """

    def __init__(self, run: str) -> None:
        self.restarts = 0
        self.gauges = {
            name: Gauge(f"mnist_{name}", text, ("run",)).set_default_tags({"run": run})
            for name, text in METRICS.items()
        }

    def take(self, event: Event) -> None:
        """Takes what the event says of the run's metrics, if anything."""
        if isinstance(event, WorkersFailed):
            self.restarts += 1
            self.gauges["restarts"].set(self.restarts)
        elif isinstance(event, Progress) and event.phase == "training":
            for name, value in {**vars(event), "restarts": self.restarts}.items():
                if name in self.gauges and value is not None:
                    self.gauges[name].set(value)
