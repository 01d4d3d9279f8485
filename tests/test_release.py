"""What is handed out: a wheel and an sdist that hold all they need, and commands that say which version they are."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_mnist.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
VERSIONS = re.compile(r"\d+\.\d+\.\d+ \(Ray \d[\w.+]*, Lightning \d[\w.+]*, torch \d[\w.+]*\)")


def test_the_console_script_has_every_command() -> None:
    files = [file for file in (ROOT / "ray_mnist").glob("*.py") if 'if __name__ == "__main__":' in file.read_text()]
    assert {file.stem for file in files} == {*COMMANDS, "__main__", "notices"}  # cluster files start the last


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_versions_are_told_without_waiting_for_torch(command: str) -> None:
    program = (
        "import runpy, sys\n"
        f"try: runpy.run_module('ray_mnist{command and '.' + command}', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: print(end.code)\n"
        "print([name for name in ('torch', 'pytorch_lightning', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, "--version"], capture_output=True, text=True, timeout=600)
    told, status, imported = done.stdout.splitlines()
    assert VERSIONS.search(told)
    assert (status, imported) == ("0", "[]")


@pytest.mark.parametrize(("argument", "why"), [([], "required: command"), (["nope"], "invalid choice: 'nope'")])
def test_a_command_that_is_none_is_refused(argument: list[str], why: str) -> None:
    done = subprocess.run([sys.executable, "-m", "ray_mnist", *argument], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: [^\n]*{why}[^\n]*\(see ray-mnist --help\)\n", done.stderr)


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("ray-mnist tr", ["train "]),
        ("ray-mnist train --m", ["--max-epochs", "--max-failures", "--model", "--model.ARG", "--model.help"]),
        ("ray-mnist tune --sear", ["--search "]),
        ("ray-mnist nope --n", []),
    ],
)
def test_a_shell_completes_commands_and_options(line: str, completed: list[str]) -> None:
    program = (
        'eval "$(register-python-argcomplete ray-mnist)"\n'
        "COMP_POINT=${#COMP_LINE} COMP_TYPE=9 COMP_WORDBREAKS=$' \\t\\n\"\\'><=;|&(:'\n"
        "_python_argcomplete ray-mnist\n"
        "printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COMP_LINE": line}
    done = subprocess.run(["bash", "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout.splitlines() if completed else done.stdout.split()) == completed


@pytest.mark.slow
def test_the_wheel_of_the_sdist_is_complete_and_runs_where_there_is_no_checkout(tmp_path: Path) -> None:
    def build(what: str, of: Path) -> Path:
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", what, "-d", tmp_path / what], cwd=of, check=True
        )
        (file,) = (tmp_path / what).iterdir()
        return file

    with tarfile.open(build("sdist", ROOT)) as sdist:
        sdist.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert [file for file in tracked if not (source / file).is_file()] == []
    wheel = build("wheel", source)
    ours = {file for file in tracked if file.startswith("ray_mnist/")}
    assert "ray_mnist/py.typed" in ours
    assert {file for file in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in file} == ours

    installed = tmp_path / "installed"
    install = ["-m", "uv", "pip", "install", "--python", sys.executable, "--offline", "--no-deps", "--no-cache"]
    subprocess.run([sys.executable, *install, "--target", installed, wheel], check=True)
    run = runner(tmp_path, installed)
    where = run(sys.executable, "-P", "-c", "import ray_mnist; print(ray_mnist.__file__)")
    assert where == f"{installed / 'ray_mnist' / '__init__.py'}\n"
    printed = run(sys.executable, "-P", "-m", "ray_mnist.train", "--print_config")
    assert "class_path: ray_mnist.SimpleModel" in printed
    script = str(installed / "bin" / "ray-mnist")
    assert run(script, "train", "--print_config") == printed
    assert VERSIONS.search(run(script, "--version"))
    assert "test accuracy" in run(script, "train", "--dataset", "digits", "--max-epochs", "1")


def runner(folder: Path, installed: Path) -> Callable[..., str]:
    """Runs a program in `folder` with what is `installed`, and gives what it printed."""

    def run(*arguments: str) -> str:
        return subprocess.run(
            arguments,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
        ).stdout

    return run
