"""What a run leaves behind in its worker's process, in which another run may follow.

What Lightning and this package set is set back. All else that a run changed, and that the next one could notice, makes
the process one that is not used again: a new one takes its place.
"""

import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import distributed

ENDING_S = 2  # for threads and processes that are about to end
# What Ray and Lightning set in each run anew, or what is of no use to the next.
ENVIRONMENT = (
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "WORLD_SIZE"),
    *("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG"),
)
IGNORED = ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK")  # scikit-learn's, which sets them as it is imported
PATCHED = {("multiprocessing.synchronize", "SemLock._make_name")}  # by joblib, which scikit-learn imports
Functions = dict[tuple[str, str], Any]


def switches() -> dict[str, Any]:
    """Those of torch that Lightning's Trainer sets; and the filters of warnings, which libraries add to."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "filters": [*warnings.filters],
    }


def settings() -> dict[str, Any]:
    """All else that the whole process has in common and code changes."""
    return {name: value for name, value in os.environ.items() if name not in (*ENVIRONMENT, *IGNORED)} | {
        "path": [*sys.path],
        "folder": os.getcwd(),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "warnings": warnings.showwarning,
        "output": (sys.stdout, sys.stderr),
        "dtype": torch.get_default_dtype(),
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32),
        "classes": {*torch.serialization.get_safe_globals()},
    }


def handlers() -> Iterator[tuple[str, logging.Handler]]:
    """Those of logs, but for what is set in each run anew: with the name of the logger."""
    for name, logger in [*logging.root.manager.loggerDict.items()]:
        if isinstance(logger, logging.Logger) and name != "ray.train":
            yield from ((name, handler) for handler in logger.handlers)


def functions() -> Iterator[tuple[tuple[str, str], Any]]:
    """Each function and class of all modules, and each function of the classes, by name."""
    for module_name, module in [*sys.modules.items()]:
        if not isinstance(module, ModuleType):
            continue
        for name, value in [*vars(module).items()]:
            kind = type(value)  # torch has values that warn where they are asked for their class
            if issubclass(kind, type):
                yield (module_name, name), value
                if value.__module__ == module_name:
                    for attribute, method in [*vars(value).items()]:
                        if issubclass(type(method), (FunctionType, classmethod, staticmethod, property)):
                            yield (module_name, f"{name}.{attribute}"), method
            elif issubclass(kind, (FunctionType, BuiltinFunctionType)):
                yield (module_name, name), value


def package(module: str) -> str:
    """The one that the module is in."""
    return module.partition(".")[0]


class Traces:
    """What is to be compared: before a run's code is loaded, after that, and once the run has ended."""

    def __init__(self) -> None:
        self.functions: Functions = {}  # as each was when it was seen first
        self.excepthook = sys.excepthook
        self.imports_changed = False

    def begin(self) -> None:
        """Takes note, before the run's code is loaded."""
        if not self.functions:
            self.functions, self.excepthook = dict(functions()), sys.excepthook
        self.environment = {name: os.environ.get(name) for name in ENVIRONMENT}
        self.switches, self.settings, self.handlers = switches(), settings(), {*handlers()}
        self.packages = {package(name) for name in sys.modules}
        self.threads = {*threading.enumerate()}

    def loaded(self) -> None:
        """Takes note of what loading the run's code did by itself: it would not happen again in this process."""
        self.switches["filters"] = [*warnings.filters]
        self.imports_changed = (self.switches, self.environment) != (switches(), self._environment())

    def _environment(self) -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in ENVIRONMENT}

    def left(self) -> list[str]:
        """What the run has left behind that cannot be set back, in a word each; sets back the rest."""
        if distributed.is_initialized():  # Ray leaves that of a single worker
            distributed.destroy_process_group()
        torch.use_deterministic_algorithms(self.switches["deterministic"], warn_only=self.switches["warn_only"])
        torch.backends.cudnn.benchmark = self.switches["benchmark"]
        warnings.resetwarnings()  # and so each is shown again
        filters: Any = warnings.filters
        filters.extend(self.switches["filters"])
        for name, value in self.environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        sys.excepthook = self.excepthook  # torch puts another one before it with each process group
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        now = settings()
        changed = [name for name in now | self.settings if now.get(name) != self.settings.get(name)]
        imported = {package(name) for name in sys.modules} - self.packages  # which bring handlers along, once
        changed += [f"log {name}" for name, _ in {*handlers()} ^ self.handlers if package(name) not in imported]
        patched = [".".join(name) for name, value in functions() if self._is_foreign(name, value)]
        return changed + ["imports"] * self.imports_changed + patched + [*self._still_running()]

    def _is_foreign(self, name: tuple[str, str], value: Any) -> bool:
        """Whether somebody has put it there; packages replace their own, as torch does each optimizer's `step`."""
        if self.functions.setdefault(name, value) is value or name in PATCHED:
            return False
        return not isinstance(value, FunctionType) or package(value.__globals__["__name__"]) != package(name[0])

    def _still_running(self) -> Iterator[str]:
        deadline = time.monotonic() + ENDING_S
        for thread in {*threading.enumerate()} - self.threads - {threading.current_thread()}:
            if type(thread).__name__ == "_DummyThread":  # not Python's, and cannot be waited for
                continue
            thread.join(max(0, deadline - time.monotonic()))
            if thread.is_alive():
                yield thread.name
        for process in multiprocessing.active_children():
            process.join(max(0, deadline - time.monotonic()))
            if process.is_alive():
                yield process.name


TRACES = Traces()  # in this process


def left_clean() -> bool:
    """Whether another run may follow in this worker process, which is as it was before the last."""
    return not TRACES.left()
