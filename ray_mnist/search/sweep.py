"""The sweep: many trials over learning rate, batch size and more; the best is tested once and handed over."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import ray
import ray.tune
import yaml
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from ray_mnist.checks import preflight
from ray_mnist.cli import console
from ray_mnist.cli.lightning_arguments import for_lightning
from ray_mnist.config import OPTIONS, RunConfig, SweepConfig, global_seed
from ray_mnist.data import MNISTDataModule
from ray_mnist.errors import RequestError, Stopped, one_line
from ray_mnist.launch.channel import over_ray
from ray_mnist.launch.connection import connect, environment, this_folder
from ray_mnist.launch.ray import bundle, in_thread, with_cpus
from ray_mnist.launch.termination import on_sigterm
from ray_mnist.run import lock, report, trackers
from ray_mnist.run.folder import RunFolder, checkpoint_name
from ray_mnist.run.records import read_metrics, to_json
from ray_mnist.search import space
from ray_mnist.search.results import STOPPED_EARLY, SweepResult, TrialRow, as_table, reason, trials_csv, winner_of
from ray_mnist.search.table import Table, follow, on_terminal
from ray_mnist.search.trial import Build, Interrupted, Plan, Trial, bundles, test_winner
from ray_mnist.worker import Job

TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run folders have it all
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # its own tables, which nothing else turns off
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
}


def tune(
    model_class: type[pl.LightningModule],
    datamodule_class: type[pl.LightningDataModule],
    search_space: Mapping[str, Any],
    *,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> SweepResult:
    """Searches `search_space` for the best arguments of a model and a data module.

    Args:
        model_class: makes the model.
        datamodule_class: makes the data module.
        search_space: Ray Tune's domains, such as `tune.loguniform(1e-4, 1e-1)`, or lists of choices, by dotted names
            such as `model.lr`, `data.batch_size` and `trainer.gradient_clip_val`.
        model: the model's other arguments.
        data: the data module's other arguments.
        **arguments: those of `SweepConfig`, `RunConfig` and Lightning's Trainer.

    Raises:
        RequestError: the sweep cannot start; nothing was written.
        TrainingError: no trial succeeded.
        SystemExit: SIGTERM came; the exit status is 143, and `resume=True` goes on from each trial's last checkpoint.
    """
    own = {name: arguments.pop(name) for name in SweepConfig.__dataclass_fields__ if name in arguments}
    fixed = {"model": dict(model or {}), "data": dict(data or {})}

    def build(parameters: dict[str, Any]) -> tuple[pl.LightningModule, pl.LightningDataModule]:
        given = {part: dict(fixed[part]) for part in fixed}
        for name, value in parameters.items():
            part, _, argument = name.partition(".")
            if part not in (*given, "trainer") or not argument:
                raise RequestError(f"{name} is neither model.…, data.… nor trainer.…, which a sweep searches.")
            if part in given:
                given[part][argument] = value
        return model_class(**given["model"]), datamodule_class(**given["data"])

    domains = {name: ray.tune.choice(list(v)) if isinstance(v, list | tuple) else v for name, v in search_space.items()}
    return Sweep(build, domains, SweepConfig(**own), **arguments).run()


class Sweep:
    """One sweep over `domains`, of models and data that `build` makes from a trial's parameters.

    Args:
        build: makes model and data module.
        domains: Ray Tune's, by dotted names.
        sweep: how to search.
        whole_config: makes what `best_config.yaml` is to have from the winner's parameters (default: from what model
            and data module saved of their arguments).
        asked_for: what `config.yaml` is to have (default: the options).
        **arguments: the options of `RunConfig` and the arguments of Lightning's Trainer.
    """

    def __init__(
        self,
        build: Build,
        domains: dict[str, Any],
        sweep: SweepConfig,
        whole_config: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        asked_for: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        arguments.setdefault("seed", global_seed())
        self.config = RunConfig(**{name: value for name, value in arguments.items() if name in OPTIONS})
        if self.config.tpu_cores:
            raise RequestError("--tpu-cores: trials train on CPUs or GPUs, drop it.")
        if self.config.elastic:
            raise RequestError("--num-workers: a trial keeps as many workers as it starts with, give one number.")
        theirs = {name: value for name, value in arguments.items() if name not in set(OPTIONS) - {"max_epochs"}}
        self.theirs = theirs | {"logger": arguments.get("logger", False)}
        self.lightning = for_lightning(self.theirs, self.config)
        trackers.refuse_one_run_for_all(self.lightning["logger"])
        self.placed = self.config  # with the CPUs that a worker gets on the cluster, once there is one
        self.build, self.domains, self.sweep = build, domains, sweep
        self.whole_config = whole_config or self._saved_arguments
        self.asked_for = asked_for or {**vars(self.config), **vars(sweep)}

    def _saved_arguments(self, parameters: dict[str, Any]) -> dict[str, Any]:
        model, datamodule = self.build(parameters)
        return report.whole_config(self.config, model, {"datamodule": datamodule})

    def run(self) -> SweepResult:
        """Runs the trials, tests the best, and writes the sweep folder.

        Raises:
            RequestError: the sweep cannot start; nothing was written.
            TrainingError: no trial succeeded.
        """
        started = time.time()
        with console.quiet():
            model, datamodule = self._try_out()
            self.model_name = type(model).__name__
            self.dataset = report.dataset_name({"datamodule": datamodule}, model)
            stamp = time.strftime("%Y%m%d-%H%M%S")
            name = self.config.name or f"sweep-{self.dataset}-{self.model_name}-{stamp}"
            folder = RunFolder(self.config.storage_path, name)
            with lock.entered(folder, self.config.resume, "sweep"):
                preflight.check_storage(folder, preflight.PROBE_BYTES)
                return self._search(folder, model, datamodule, started)

    def _search(self, folder: RunFolder, model: Any, datamodule: Any, started: float) -> SweepResult:
        data, name = {"datamodule": datamodule}, folder.name
        job = Job("fit", model, data, folder.storage_path, name, 0, lightning=self.lightning)
        workers = max(1, self.config.max_workers)
        cpus = workers * (self.config.cpus_per_worker or 1)
        at_once = self.sweep.max_concurrent or max(1, (os.cpu_count() or 1) // cpus)
        # The trial itself may take one more.
        with environment(TUNE_SETTINGS), connect(self.config, job, at_once * (cpus + (workers > 1))):
            self.placed = with_cpus(self.config, preflight.Cluster.current())
            worker = bundle(self.placed)
            cluster = preflight.check_resources(workers, worker, preflight.WAIT_FOR_NODES_S, console.say)
            preflight.check_shared_storage(folder, cluster)
            console.say(f"sweep over {', '.join(self.domains)} of {report.describe_model(model)} on {self.dataset}")
            console.say(f"{workers} worker{'s' * (workers > 1)} a trial, Ray {cluster}; sweep folder {folder}")
            Interrupted.told.clear()
            try:
                with on_sigterm(Interrupted.told.set), on_terminal(), over_ray(follow) as send:
                    tuner = self._tuner(replace(self._plan(folder), send=send), folder, bundles(workers, worker))
                    grid = in_thread(tuner.fit, Interrupted.told.set)
            except (KeyboardInterrupt, Stopped) as end:
                raise console.ended(end, f"go on with --resume --name {name}") from None
            begun = [result for result in grid if result.error or result.config]  # before the time was up
            return self._hand_over(folder, [self._row(folder, result) for result in begun], started)

    def _try_out(self) -> tuple[pl.LightningModule, pl.LightningDataModule]:
        """Makes model and data at every end of the space, so that what cannot be made is found before any trial."""
        for name in self.domains:
            if not space.points(self.domains[name]):
                raise RequestError(f"{name} has nothing to choose from.")
        made = []
        for parameters in space.extremes(self.domains):
            self._check_trainer(space.of_trainer(parameters))
            try:
                model, datamodule = self.build(parameters)
            except (TypeError, ValueError) as error:
                raise RequestError(f"{parameters} cannot be tried: {one_line(error)}.") from error
            made.append((model, datamodule))
        own = [datamodule for _, datamodule in made if isinstance(datamodule, MNISTDataModule)]
        world_size = max(1, self.config.max_workers)
        sizes: dict[Any, dict[str, int]] = {}  # of the data sets that were loaded
        for datamodule in own:  # before any data is loaded
            datamodule.check_batch_size(world_size)
        for datamodule in own:
            files = (datamodule.dataset, datamodule.data_dir, datamodule.mirror)
            sizes[files] = datamodule.check(world_size, sizes.get(files))
        return made[0]

    def _check_trainer(self, parameters: dict[str, Any]) -> None:
        """Raises RequestError unless Lightning's Trainer takes them, and takes them as they are."""
        if parameters and for_lightning(self.theirs | parameters, self.config) != self.lightning | parameters:
            names = ", ".join(f"trainer.{name}" for name in parameters)
            raise RequestError(f"{names} cannot differ from trial to trial: give it to the sweep as a whole.")

    def _tuner(self, plan: Plan, folder: RunFolder, needs: list[dict[str, float]]) -> ray.tune.Tuner:
        reserved = ray.tune.PlacementGroupFactory(needs)
        trainable = ray.tune.with_resources(ray.tune.with_parameters(Trial, plan=plan), reserved)
        place = f"{folder.storage_path}/{folder.name}"
        if self.config.resume and ray.tune.Tuner.can_restore(f"{place}/tune"):
            return ray.tune.Tuner.restore(f"{place}/tune", trainable, resume_unfinished=True, resume_errored=False)
        report.write_config(folder, self.asked_for)
        random, grid = self.sweep.search == "random", self.sweep.search == "grid"
        return ray.tune.Tuner(
            trainable,
            param_space=space.as_grid(self.domains) if grid else self.domains,
            tune_config=ray.tune.TuneConfig(
                metric=self.sweep.metric,
                mode=self.sweep.mode,
                num_samples=1 if grid else self.sweep.num_samples,
                search_alg=None if random or grid else optuna(self.config.seed),
                scheduler=self._scheduler(),
                max_concurrent_trials=self.sweep.max_concurrent,
                time_budget_s=self.sweep.time_budget,
                reuse_actors=self.config.max_workers <= 1,
            ),
            run_config=ray.tune.RunConfig(
                name="tune",
                storage_path=place,
                verbose=0,
                callbacks=[Table(self.sweep.metric, self.config.max_epochs), Interrupted()],
                failure_config=ray.tune.FailureConfig(max_failures=0),
            ),
        )

    def _scheduler(self) -> Any:
        if self.sweep.scheduler == "fifo":
            return FIFOScheduler()
        # With a first look after one epoch, a trial goes on only in the better half; metric and mode are the tuner's.
        return ASHAScheduler(time_attr="epoch", max_t=self.config.max_epochs, grace_period=1, reduction_factor=2)

    def _row(self, folder: RunFolder, result: Any) -> TrialRow:
        metrics = result.metrics or {}
        name = metrics.get("trial_id", "")
        history = read_metrics(trial_folder(folder, name)) if name else []
        status = "done" if history and history[-1]["epoch"] >= self.config.max_epochs else STOPPED_EARLY
        if result.error:
            status = f"failed: {reason(result.error)}"
        return TrialRow(name, dict(result.config or {}), history, status, metrics.get("time_total_s", 0.0))

    def _hand_over(self, folder: RunFolder, rows: list[TrialRow], started: float) -> SweepResult:
        from ray_mnist.search import page, plots  # slow to import

        table = as_table(rows, self.sweep.metric, self.sweep.mode)
        folder.write("trials.csv", trials_csv(table))
        winner, best = winner_of(rows, self.sweep.metric, self.sweep.mode)
        with trial_folder(folder, winner.name).local_checkpoint(checkpoint_name(int(best["step"]))) as path:
            assert path is not None, "a run folder keeps its best checkpoint"
            folder.add_checkpoint(os.path.dirname(path), "best")
        tested = self._test(folder, winner.parameters)
        whole = self.whole_config(winner.parameters)
        folder.write("best_config.yaml", yaml.safe_dump({**whole, "name": None, "resume": False}, sort_keys=False))
        values = {
            "name": folder.name,
            "dataset": self.dataset,
            "model": self.model_name,
            "parameters": winner.parameters,
            "trial": winner.name,
            "trials": len(rows),
            "failed": sum(row.failed for row in rows),
            "stopped_early": sum(row.status == STOPPED_EARLY for row in rows),
            "num_workers": self.config.num_workers,
            "seed": self.config.seed,
            "epochs": len(winner.history),
            **{key: best.get(key) for key in ("val_loss", "val_accuracy")},
            **{key: tested.get(key) for key in ("test_loss", "test_accuracy")},
            "best_checkpoint": "best",
            "seconds": time.time() - started,
            "versions": report.versions(),
        }
        folder.write("result.json", to_json(values))
        drawn = plots.draw(folder, rows, self.sweep.metric, self.sweep.mode)
        page.write(folder, values, table, self.sweep.metric, drawn, started)
        for row in rows:  # the winner's weights are in the sweep folder
            trial_folder(folder, row.name).keep_only()
        return SweepResult(str(folder), values, rows)

    def _plan(self, folder: RunFolder) -> Plan:
        return Plan(
            build=self.build,
            config=self.placed,
            lightning=self.lightning,
            metric=self.sweep.metric,
            mode=self.sweep.mode,
            storage_path=trials_in(folder),
            folder=this_folder(),
        )

    def _test(self, folder: RunFolder, parameters: dict[str, Any]) -> dict[str, float]:
        """The winner's metrics on the test set."""
        needs = bundle(self.placed)
        task = ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_retries=1)(test_winner)
        tested: list[dict[str, float]] = ray.get(task.remote(self._plan(folder), parameters, folder.location("best")))
        return {name: value for metrics in tested for name, value in metrics.items()}


def trials_in(sweep: RunFolder) -> str:
    """The storage path of the trials' run folders."""
    return f"{sweep.storage_path}/{sweep.name}/trials"


def trial_folder(sweep: RunFolder, trial: str) -> RunFolder:
    """The run folder of one trial."""
    return RunFolder(trials_in(sweep), trial)


def optuna(seed: int) -> Any:
    """Optuna's search, for Ray Tune.

    Raises:
        RequestError: it is not installed.
    """
    try:
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(seed=seed)
    except (ImportError, AssertionError) as error:
        raise RequestError("--search optuna needs the package optuna: pip install optuna.") from error
