"""Makes one package of the two that Lightning comes as: `lightning` has the code of `pytorch_lightning` once more.

A class of the one is foreign to the other. In a process that has imported `ray_mnist`, the package that is imported
first is therefore the only one: what is imported later by the other's names are the same modules. So our classes,
which name `pytorch_lightning`, derive from those of the program, whichever it uses; what was pickled with the one is
found where the other is; and neither is imported before somebody asks for it.
"""

import gc
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

TWINS = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
TWINS |= {twin: name for name, twin in TWINS.items()}


def is_loaded(name: str) -> bool:
    """Whether the package of this name was imported itself, and not its twin by this name."""
    return getattr(sys.modules.get(name), "__name__", None) == name


class TwinFinder(MetaPathFinder, Loader):
    """Finds a module in the twin of its package, where that is loaded already and the package is not."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """Called for every import of a module that is not there yet."""
        for name, twin in TWINS.items():
            if f"{fullname}.".startswith(f"{name}.") and is_loaded(twin) and not is_loaded(name):
                return ModuleSpec(fullname, self, loader_state=twin + fullname.removeprefix(name))
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The twin's module, and not a new one."""
        module = import_module(spec.loader_state)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Gives the module, which is complete, the spec back that it had until it was imported once more."""
        assert module.__spec__
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.insert(0, TwinFinder())


def package_in_use() -> str:
    """The package that our classes derive from, `lightning.pytorch` or `pytorch_lightning`."""
    alone = is_loaded("lightning.pytorch") and not is_loaded("pytorch_lightning")
    return "lightning.pytorch" if alone else "pytorch_lightning"


def is_foreign(item: Any) -> bool:
    """Whether it is of the package that is not in use: both were imported before `ray_mnist`."""
    unused = TWINS[package_in_use()]
    return any(f"{base.__module__}.".startswith(f"{unused}.") for base in type(item).__mro__)


def import_heavy(*modules: str) -> None:
    """Imports what takes seconds, with no search for garbage meanwhile: there is none, and it takes a fifth of them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import_torchmetrics()
        for module in modules:
            import_module(module)
    finally:
        if was_enabled:
            gc.enable()


def import_torchmetrics() -> None:
    """Imports it, as Lightning does, but not scipy.signal, another fifth: it puts a `hamming` in if there is none.

    Source: https://github.com/Lightning-AI/torchmetrics/issues/3457.
    """
    name = "scipy.signal"
    if name in sys.modules:
        return
    stand_in = ModuleType(name)
    stand_in.hamming = None  # type: ignore[attr-defined]
    sys.modules[name] = stand_in
    try:
        import_module("torchmetrics")
    finally:
        del sys.modules[name]


def call_with(package: str, function: str, *arguments: Any) -> Any:
    """Calls the `function`, written as `module:name`, in a process that has not imported anything of ours.

    It is the one place where a process is told which of the two packages is to be the first.
    """
    import_heavy(package)
    return resolve_name(function)(*arguments)
