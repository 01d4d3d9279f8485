"""Trains on Ray: a TorchTrainer whose workers run `worker.run`."""

import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import RayError
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer

from ray_mnist import preflight
from ray_mnist.config import RunConfig
from ray_mnist.errors import RequestError, TrainingError
from ray_mnist.results import FAILURES, Outcome, Row, RunFolder, one_line
from ray_mnist.worker import Job, run

START_TIMEOUT_S = 120

# Ray Train reads these when a run starts. A value that is set already is somebody's wish and stays.
RAY_TRAIN_SETTINGS = {
    # Relative paths in the user's code mean the same as in the script.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_TIMEOUT_S),
    # How often Ray looks whether the workers are done or dead: 2 s would be added to every run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


def bundle(config: RunConfig) -> dict[str, float]:
    """What one worker needs of one node."""
    return {"CPU": 1, "GPU": 1} if config.use_gpu else {"CPU": 1}


@contextmanager
def connection(config: RunConfig) -> Iterator[None]:
    """A Ray cluster to train on: the one that this process already has, one to join, or a new local one.

    Whatever was started or joined here is left again; a connection that was there stays as it was.
    """
    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)  # Ray's import has set its loggers up anew
    # What `ray start` does, and `ray.init` for a cluster it finds itself: show the token if this user has one.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    address = config.address or os.environ.get("RAY_ADDRESS") or preflight.this_machines_cluster()
    if address:
        preflight.check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            # More workers than cores run in turns: slower, and good enough to try a run out.
            cpus = max(os.cpu_count() or 1, config.num_workers)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address} cannot be joined" if address else "Ray cannot be started here"
        raise RequestError(f"{where}: {one_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


class RayWorker:
    """A `Place`: one of the worker processes of a TorchTrainer."""

    def __init__(self, job: Job, use_gpu: bool) -> None:
        self.job, self.use_gpu = job, use_gpu
        self.context = ray.train.get_context()

    def lightning(self) -> dict[str, Any]:
        """DDP over the process group that Ray has made."""
        RayDDPStrategy, RayLightningEnvironment = lightning_integration()
        return {
            "accelerator": "gpu" if self.use_gpu else "cpu",
            "devices": 1,
            "num_nodes": self.context.get_world_size(),
            "strategy": RayDDPStrategy(gradient_as_bucket_view=True),
            "plugins": [RayLightningEnvironment()],
        }

    def report(self, metrics: Row, name: str, checkpoint: Path | None) -> None:
        """Attaches rank 0's checkpoint; a barrier for all ranks."""

        def upload(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
            folder = self.job.folder
            return ray.train.Checkpoint(folder.add_checkpoint(checkpoint.path, name), folder.fs)

        attached = None if checkpoint is None else ray.train.Checkpoint.from_directory(checkpoint)
        ray.train.report(metrics, attached, checkpoint_dir_name=name, checkpoint_upload_fn=upload)

    def agree(self, value: str | None) -> str | None:
        """Rank 0's value, on every rank."""
        agreed: str | None = broadcast_from_rank_zero(value)
        return agreed


def lightning_integration() -> tuple[Any, Any]:
    """Ray's DDP strategy and cluster environment, as classes of `pytorch_lightning`.

    `ray.train.lightning` prefers the package `lightning` where both are installed, and its classes would then be
    foreign to `pytorch_lightning`'s Trainer: it is kept from seeing that package.
    """
    seen = sys.modules.get("lightning")
    sys.modules["lightning"] = None  # type: ignore[assignment]
    try:
        from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment
    finally:
        del sys.modules["lightning"]
        if seen is not None:
            sys.modules["lightning"] = seen
    return RayDDPStrategy, RayLightningEnvironment


def train_function(config: dict[str, Any]) -> Outcome:
    """What each worker process runs."""
    worker = RayWorker(config["job"], config["use_gpu"])
    # One thread for the one CPU that is reserved: workers don't fight over cores, and round alike wherever they run.
    torch.set_num_threads(1)
    try:
        return run(config["job"], worker)
    except Exception as error:
        error.add_note(traceback.format_exc())  # which would stay behind on this machine
        raise


class Failures(ray.train.UserCallback):
    """Runs in Ray Train's controller: writes down each failure, and ends the run where trying again is no use."""

    def __init__(self, folder: RunFolder) -> None:
        self.storage_path, self.name = folder.storage_path, folder.name

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Adds a line to the run folder's list of failures."""
        folder = RunFolder(self.storage_path, self.name)
        failures = [describe(rank, error) for rank, error in sorted(worker_exceptions.items())]
        before = folder.read(FAILURES).decode() if folder.has(FAILURES) else ""
        folder.write(FAILURES, before + json.dumps({"workers": [failure.message for failure in failures]}) + "\n")
        for error in worker_exceptions.values():
            if is_bug(error):
                raise error if isinstance(error, RequestError) else describe_all(worker_exceptions)


def raised_by_training(error: Exception) -> bool:
    """Whether it came out of `train_function`, which adds a note; a worker that died could not add one."""
    return bool(getattr(error, "__notes__", None))


def is_bug(error: Exception) -> bool:
    """Whether the error would come back on the next try.

    A worker that loses its peers raises one of Ray's errors, or the RuntimeError or OSError of a torch collective.
    """
    return raised_by_training(error) and not isinstance(error, RayError | RuntimeError | OSError)


def describe(rank: int, error: Exception) -> TrainingError:
    """The failure of one worker."""
    if not raised_by_training(error):
        return TrainingError(f"worker {rank} died: killed, out of memory, or its machine is gone", str(error))
    message = f"worker {rank}: {type(error).__name__}: {one_line(error)[:300]}"
    return TrainingError(message, "\n".join(error.__notes__))


def describe_all(worker_exceptions: dict[int, Exception]) -> TrainingError:
    """The failure of a group: a bug says most, then a death; what the others raised is often for want of a peer."""

    def rank_of(item: tuple[int, Exception]) -> tuple[bool, bool, int]:
        rank, error = item
        return not is_bug(error), raised_by_training(error), rank

    return describe(*min(worker_exceptions.items(), key=rank_of))


def launch(job: Job, config: RunConfig) -> Outcome:
    """Fits and tests on `config.num_workers` Ray workers; needs a `connection`.

    Raises:
        RequestError: a worker found that the request cannot be met.
        TrainingError: training failed, more often than `config.max_failures` allows.
    """
    with environment(RAY_TRAIN_SETTINGS):
        trainer = TorchTrainer(
            train_function,
            train_loop_config={"job": job, "use_gpu": config.use_gpu},
            torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.num_workers, use_gpu=config.use_gpu, resources_per_worker=bundle(config)
            ),
            run_config=ray.train.RunConfig(
                name=job.name,
                storage_path=job.folder.storage_path,
                failure_config=ray.train.FailureConfig(
                    max_failures=config.max_failures,
                    max_preemption_failures=config.max_failures,
                    controller_failure_limit=1,
                ),
                callbacks=[Failures(job.folder)],
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )
        forget_snapshot(job.folder)
        try:
            outcome: Outcome = in_thread(trainer.fit).return_value
        except ray.train.ControllerError as error:
            failure = error.controller_failure
            known = isinstance(failure, RequestError | TrainingError)
            raise failure if known else TrainingError(one_line(failure)) from None
        except ray.train.WorkerGroupError as error:
            raise describe_all(error.worker_failures) from None
        except (ray.train.TrainingFailedError, RayError) as error:
            raise TrainingError(one_line(error)[:300], str(error)) from None
        return outcome


@contextmanager
def environment(defaults: dict[str, str]) -> Iterator[None]:
    """Sets the variables that are not set, for the time of the `with`."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def forget_snapshot(folder: RunFolder) -> None:
    """Removes what Ray Train remembers of an earlier launch under this name.

    The run resumes from the newest checkpoint that is whole. Ray's own list may have been cut off by the kill that
    the run is to recover from, and then Ray refuses to start.
    """
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME as SNAPSHOT

    if folder.has(SNAPSHOT):
        folder.fs.delete_file(folder.at(SNAPSHOT))


def in_thread(call: Callable[[], Any]) -> Any:
    """What `call` returns or raises, while Ctrl-C stays with this thread.

    In the main thread Ray Train would take Ctrl-C for itself and answer it once its controller is free, which can
    take longer than people wait; ended by `connection`, everything goes at once.
    """
    outcome: dict[str, Any] = {}

    def run_call() -> None:
        try:
            outcome["returned"] = call()
        except BaseException as error:
            outcome["raised"] = error

    thread = threading.Thread(target=run_call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if "raised" in outcome:
        raise outcome["raised"]
    return outcome["returned"]
