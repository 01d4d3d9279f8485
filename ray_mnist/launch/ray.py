"""Trains on Ray: a TorchTrainer whose workers run `worker.run`."""

import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from io import BytesIO
from typing import Any

import pytorch_lightning as pl
import ray
import ray.train
import torch
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from ray import cloudpickle
from ray.exceptions import RayError

from ray_mnist.checks.preflight import Bundle, Cluster
from ray_mnist.cli.lightning_arguments import FIND_UNUSED
from ray_mnist.config import RunConfig
from ray_mnist.distributed.strategy import FollowsFreezing, StaysOnDevice, WhollySharded, extend
from ray_mnist.errors import RequestError, Stopped, TrainingError
from ray_mnist.launch import pause
from ray_mnist.launch.ahead import RAY_TRAIN_SETTINGS, forked
from ray_mnist.launch.channel import over_ray
from ray_mnist.launch.connection import environment, go_to, this_folder
from ray_mnist.launch.exchange import LOOK_S, PLACE_S, Exchange
from ray_mnist.launch.failures import (
    Failures,
    cause_of,
    describe_all,
    describe_start,
    may_start_next_time,
    write_down,
)
from ray_mnist.launch.keeping import KEEPER
from ray_mnist.launch.output import root_logger, worker_output
from ray_mnist.launch.stalls import StallWatch
from ray_mnist.launch.termination import on_sigterm
from ray_mnist.launch.traces import TRACES, left_clean
from ray_mnist.lightning_package import call_with, package_in_use
from ray_mnist.ray_controller_internals import ProcessGroup, WatchedGroup
from ray_mnist.ray_train_internals import AbortableTorchTrainer, end_run, output_files
from ray_mnist.run.events import Tell, WorkersFailed
from ray_mnist.run.outcome import Evaluation, Outcome
from ray_mnist.run.records import read_failures
from ray_mnist.worker import Job, run_and_collect

STOP_S = 30  # for what Ctrl-C ends in a cluster that goes on


def process_group_backend(use_gpu: bool) -> str:
    """Gradients on GPUs go over NCCL, and objects over the CPU: NCCL would take each of them through the GPU."""
    return "cpu:gloo,cuda:nccl" if use_gpu else "gloo"


def bundle(config: RunConfig) -> Bundle:
    """What one worker needs of one node."""
    needs: Bundle = {"CPU": config.cpus_per_worker or 1}
    return needs | {"GPU": 1} if config.use_gpu else needs


def with_cpus(config: RunConfig, cluster: Cluster) -> RunConfig:
    """Gives workers with a GPU its share of the CPUs, for their data loader's processes, unless something else is said.

    Other workers have one CPU, and one thread, so that they round alike wherever they run.
    """
    if config.use_gpu and config.cpus_per_worker is None:
        return replace(config, cpus_per_worker=cluster.cpus_per_gpu())
    return config


class RayContext:
    """A `WorkerContext`: one of the worker processes of a TorchTrainer."""

    def __init__(self, job: Job, use_gpu: bool, tell: Tell) -> None:
        self.job, self.use_gpu, self.tell = job, use_gpu, tell
        self.context, self.stop = ray.train.get_context(), threading.Event()

    def trainer_arguments(self) -> dict[str, Any]:
        """The strategy, over the process group that Ray has made."""
        return {
            "accelerator": "gpu" if self.use_gpu else "cpu",
            "devices": 1,
            "num_nodes": self.context.get_world_size(),
            "strategy": make_strategy(self.job.lightning.get("strategy", "ddp")),
            "plugins": [*self.job.lightning.get("plugins", []), lightning_integration().RayLightningEnvironment()],
        }


def lightning_integration() -> Any:
    """The module `ray.train.lightning`, kept from importing the package `lightning` where nobody else has."""
    hidden = sys.modules.setdefault("lightning", None) is None  # type: ignore[arg-type]
    try:
        import ray.train.lightning
    finally:
        if hidden:
            del sys.modules["lightning"]
    return ray.train.lightning


def make_strategy(wanted: Any) -> Any:
    """Ray's strategy of this name; one of Ray's own, or Lightning's ModelParallelStrategy, is taken as it is."""
    if wanted == "fsdp":
        # One file, so that any number of workers and the driver can load it.
        return lightning_integration().RayFSDPStrategy(state_dict_type="full")
    if isinstance(wanted, str):
        unused = wanted == FIND_UNUSED
        wanted = lightning_integration().RayDDPStrategy(gradient_as_bucket_view=True, find_unused_parameters=unused)
    if isinstance(wanted, DDPStrategy):
        extend(wanted, StaysOnDevice)
        extend(wanted, FollowsFreezing)
    if isinstance(wanted, ModelParallelStrategy):
        extend(wanted, WhollySharded, ray_device=ray.train.torch.get_device())
    return wanted


def train_function(config: dict[str, Any]) -> bytes:
    """What each worker process runs, to its end or until others are to take its place.

    What comes of it is pickled, and passes through the controller without its importing what that is made of.
    """
    try:
        return cloudpickle.dumps(train(config))
    except Stopped:
        pause.wait_if_asked()
        raise
    finally:
        pause.HERE.clear()  # this process may train again


def train(config: dict[str, Any]) -> Outcome | Evaluation | None:
    """Does this rank's part of the job; only rank 0 brings the outcome home, which can be heavy."""
    go_to(config["folder"])
    torch.set_num_threads(config["threads"])  # as many as CPUs are reserved: workers don't fight over cores
    if not config["use_gpu"]:
        # An optimizer of torch's for CUDA looks for GPUs at each step, and where it finds no driver does so for long.
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    if config["keep"]:
        TRACES.begin()
    rank = ray.train.get_context().get_world_rank()
    with worker_output(config["send"], rank, output_files(), config["root_logger"]) as tell:
        try:
            # Here, since modules may print as they are imported.
            job: Job = cloudpickle.loads(config["job"].getvalue())
            if config["keep"]:
                TRACES.loaded()
            context = RayContext(job, config["use_gpu"], tell)
            pause.follow(context.stop)
            if rank == 0 and job.task == "fit":
                config["send"].call_on_stop(context.stop.set)
            outcome = run_and_collect(job, context)
            return outcome if rank == 0 else None
        except Exception as error:
            if "find_unused_parameters" in str(error):
                error = unused_parameters(job.model)
            error.add_note(traceback.format_exc())  # which would stay behind on this machine
            raise error


def unused_parameters(model: pl.LightningModule) -> RequestError:
    """Names the parameters that no gradient reached, which DDP waited for in vain."""
    unused = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    return RequestError(
        f"The loss does not depend on {', '.join(unused[:5]) or 'some parameters'}{' and others' * (len(unused) > 5)}, "
        f"which workers wait for: freeze them, or give Trainer strategy={FIND_UNUSED!r}."
    )


def launch(
    job: Job,
    config: RunConfig,
    tell: Tell,
    trainer_class: type[AbortableTorchTrainer] = AbortableTorchTrainer,
    keep: bool = False,
) -> Outcome | Evaluation:
    """Does the job on as many Ray workers as the configuration says, and tells of it; needs a `connection.connect`.

    The workers are those that the call before has left, if any; with `keep` they are left to the next one.
    Ray Train starts workers again that die in training. Where some die before that, or its controller does, all of it
    is started again here.

    Raises:
        RequestError: a worker found that the request cannot be met.
        TrainingError: training failed, more often than `config.max_failures` allows.
        Stopped: SIGTERM came.
    """
    with (
        environment(ray_train_settings(config)),
        over_ray(tell, job.name) as send,
        on_sigterm(send.mailbox.stop.remote) if job.task == "fit" else nullcontext(),
    ):
        settings = {
            "job": BytesIO(cloudpickle.dumps(job)),  # of plain bytes Ray's dashboard would have all, as text
            "use_gpu": config.use_gpu,
            "threads": config.cpus_per_worker or 1,
            "folder": this_folder(),
            "send": send,
            "keep": keep,
            "root_logger": root_logger(),
        }
        tries_left = config.max_failures
        while True:
            written = len(read_failures(job.folder))
            trainer = make_trainer(job, config, settings, tries_left, trainer_class)
            trainer.controller, trainer.clean = KEEPER.take_controller(), by_name(left_clean) if keep else None
            try:
                outcome: Outcome | Evaluation = cloudpickle.loads(in_thread(trainer.fit, trainer.abort).return_value)
                if keep:
                    KEEPER.keep_workers(trainer.controller, end_run)
                return outcome
            except ray.train.WorkerGroupError as error:
                raise describe_all(error.worker_failures) from None
            except (ray.train.TrainingFailedError, RayError) as error:
                trainer.abort()  # the controller may have died
                failure = cause_of(error)
                if isinstance(failure, RequestError | TrainingError | Stopped):
                    raise failure from None
                tries_left -= max(0, len(read_failures(job.folder)) - written)
                again = tries_left > 0 and may_start_next_time(failure)
                described = describe_start(error)
                send([WorkersFailed([], write_down(job.folder, [described.message], again, least(config)))])
                if not again:
                    raise described from None
                tries_left -= 1


def by_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as the controller can pass it on to workers without importing torch."""
    return partial(call_with, package_in_use(), f"{function.__module__}:{function.__name__}")


def make_trainer(
    job: Job, config: RunConfig, settings: dict[str, Any], max_failures: int, kind: type[AbortableTorchTrainer]
) -> AbortableTorchTrainer:
    """A TorchTrainer for one `fit`, whose workers are given `settings`."""
    stalls = [WatchedGroup(StallWatch(job.folder, config.stall_timeout))] if config.stall_timeout else []
    trainer = kind(
        by_name(train_function),
        train_loop_config=settings,
        torch_config=ProcessGroup(process_group_backend(config.use_gpu)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker=bundle(config),
            elastic_resize_monitor_interval_s=LOOK_S,
        ),
        run_config=ray.train.RunConfig(
            name=job.name,
            storage_path=job.folder.storage_path,
            failure_config=ray.train.FailureConfig(
                max_failures=max_failures,
                max_preemption_failures=-1,  # nobody's failure, and each has a notice of its own
                controller_failure_limit=0,  # Ray would tell nobody of them
            ),
            callbacks=[Failures(job.folder, max_failures, settings["send"], least(config)), *stalls],
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            worker_runtime_env=forked(config),
        ),
    )
    workers = config.min_workers, config.max_workers
    trainer.exchange = Exchange(job.folder, *workers, settings["send"], can_pause=job.task == "fit")
    return trainer


def least(config: RunConfig) -> int | None:
    """The fewest workers that a run goes on with, if it does so with fewer than it can have."""
    return config.min_workers if config.elastic else None


def ray_train_settings(config: RunConfig) -> dict[str, str]:
    """Environment variables that Ray Train reads when the run starts."""
    wait_less = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(PLACE_S)}  # how many have room may change at any time
    shown = {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}  # what Ray's dashboard is asked for at /api/train
    return RAY_TRAIN_SETTINGS | (wait_less if config.elastic else {}) | (shown if config.dashboard else {})


def in_thread(call: Callable[[], Any], stop: Callable[[], None]) -> Any:
    """What `call` returns or raises, while Ctrl-C stays with this thread: it has `stop` end the call.

    In the main thread Ray Train would take Ctrl-C for itself and answer it once its controller is free, which can
    take longer than people wait.
    """
    outcome: dict[str, Any] = {}
    ended = threading.Event()  # Python takes a thread for ended whose `join` was interrupted

    def run_call() -> None:
        try:
            outcome["returned"] = call()
        except BaseException as error:
            outcome["raised"] = error
        ended.set()

    threading.Thread(target=run_call, daemon=True).start()
    try:
        ended.wait()
    except (KeyboardInterrupt, SystemExit):  # Ray has SIGTERM raise the latter
        stop()
        ended.wait(STOP_S)
        raise
    if "raised" in outcome:
        raise outcome["raised"]
    return outcome["returned"]
