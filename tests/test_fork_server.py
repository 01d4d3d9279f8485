"""Processes that are forked from one that has imported what they run: as if `python` had been started, but at once.

That Ray's are such is tested in test_ray.py.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import wait_until

from ray_mnist.launch import fork_server, forked_python

SCRIPT = """
import json, os, random, signal, sys
from concurrent.futures import ThreadPoolExecutor
about = {
    "imported": [name for name in ("torch._dynamo", "pytorch_lightning", "ray.train") if name in sys.modules],
    "argv": sys.argv, "name": __name__, "path": sys.path[0], "folder": os.getcwd(), "stdin": sys.stdin.read(),
    "environment": dict(os.environ), "process": os.getpid(), "parent": os.getppid(), "group": os.getpgrp(),
    "files": sorted(os.listdir("/proc/self/fd")), "sigchld": signal.getsignal(signal.SIGCHLD),
}
import numpy, torch
about |= {"draws": [random.random(), numpy.random.rand()], "threads": torch.get_num_threads()}
if "ray" in sys.modules:
    import ray

    def ids(): return [ray.ObjectRef.from_random().hex() for _ in range(3)]
    about["draws"] += [*ids(), *ThreadPoolExecutor(1).submit(ids).result()]
print(json.dumps(about))
print("the end", file=sys.stderr)
"""
WAITS = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(1000)"


class Raylet:
    """Stands in for Ray's: a process whose end is that of the servers, and what it starts."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(["sleep", "1000"])
        self.folder, self.script = folder, folder / "script.py"
        self.script.write_text(SCRIPT)
        self.environment = os.environ | {"RAY_RAYLET_PID": str(self.process.pid), "RAY_JOB_ID": "01000000"}

    def start(self, *arguments: str, package: str = "pytorch_lightning", **more: str) -> dict[str, Any]:
        """What a process says that it starts in place of `python SCRIPT ARGUMENT...`, and that says nothing else."""
        command = [sys.executable, "-P", "-S", forked_python.__file__, package, "2", str(self.script), *arguments]
        out, err = self.folder / "out", self.folder / "err"  # no pipes: the servers have them, too
        with out.open("w") as stdout, err.open("w") as stderr:
            environment = self.environment | more
            folder = self.folder
            asks = subprocess.Popen(
                command, env=environment, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr
            )
            asks.communicate("typed", timeout=300)
        assert asks.returncode == 0, err.read_text()
        wait_until(lambda: err.read_text().endswith("the end\n"), 60, "the script's end")
        about: dict[str, Any] = json.loads(out.read_text())
        return about

    def end(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def raylet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Raylet]:
    raylet = Raylet(tmp_path_factory.mktemp("raylet"))
    yield raylet
    raylet.end()


def test_two_processes_are_forked_from_one_and_end_up_as_if_they_were_not(raylet: Raylet) -> None:
    first = raylet.start("a", "b c", RAY_TRAIN_THAT="1", PWD="/there")
    second = raylet.start(RAY_TRAIN_THAT="2")
    assert first["imported"] == ["torch._dynamo", "pytorch_lightning", "ray.train"]
    assert first["parent"] == second["parent"] != os.getpid()
    assert first["process"] != second["process"]
    assert first["group"] == first["process"]  # which Ray ends with it
    assert first["argv"] == [str(raylet.script), "a", "b c"]
    assert (first["name"], first["path"], first["stdin"]) == ("__main__", str(raylet.folder), "typed")
    assert first["folder"] == str(raylet.folder)
    expected = raylet.environment | {"RAY_TRAIN_THAT": "1", "PWD": "/there"}
    assert {name: first["environment"].get(name) for name in expected} == expected
    added = first["environment"].keys() - expected
    assert added <= {"PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR"}  # by imports
    assert first["files"] == ["0", "1", "2", "3"]  # the last is the list's own
    assert first["sigchld"] == signal.SIG_DFL
    assert first["threads"] == min(2, os.cpu_count() or 1)  # whereas the environment says 1
    assert {*first["draws"]}.isdisjoint(second["draws"])


def test_another_job_is_forked_from_what_has_imported_ray_in_its_environment(raylet: Raylet) -> None:
    one, other = raylet.start(), raylet.start(RAY_JOB_ID="02000000")
    assert one["parent"] != other["parent"]
    assert psutil.Process(one["parent"]).ppid() == psutil.Process(other["parent"]).ppid()  # what has imported torch
    assert other["environment"]["RAY_JOB_ID"] == "02000000"


def test_what_libraries_read_as_they_are_imported_is_the_same_in_all_that_is_forked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def address(package: str = "pytorch_lightning", threads: str = "1") -> str:
        return forked_python.address_of(package, threads)

    first = address()
    assert address("lightning.pytorch") != first
    assert address(threads="2") != first
    # Ray Train's, and what shells say of where and in which they are.
    for name in ("RAY_TRAIN_THAT", "PWD", "SHLVL"):
        monkeypatch.setenv(name, "1")
    assert address() == first
    monkeypatch.setenv("KMP_BLOCKTIME", "1")
    assert address() != first


def test_where_an_import_fails_python_is_started_as_ever(raylet: Raylet) -> None:
    about = raylet.start("a", package="no_such_package")
    assert (about["imported"], about["parent"]) == ([], os.getpid())
    assert about["argv"] == [str(raylet.script), "a"]
    assert about["environment"] == raylet.environment


def test_the_servers_end_with_ray(raylet: Raylet) -> None:
    with_ray = psutil.Process(raylet.start()["parent"])
    without = with_ray.parent()
    assert without is not None
    raylet.end()
    assert psutil.wait_procs([with_ray, without], timeout=30)[1] == []


class Server:
    """One that has imported nothing, and ends once nobody has asked for 0.3 s and nothing that it has forked lives."""

    def __init__(self, address: str) -> None:
        self.address = address
        start = "from ray_mnist.launch import fork_server as it; it.IDLE_S = 0.3; {}; it.serve(str({})); it.run()"
        listener = forked_python.listen(address)
        assert listener is not None
        assert forked_python.listen(address) is None
        with listener:
            command = [sys.executable, "-c", start.format("it.import_heavy = print", os.getpid())]
            self.process = subprocess.Popen(command, stdin=listener.fileno())

    def fork(self, folder: Path) -> psutil.Process:
        """A process of its that waits for its end."""
        (folder / "script.py").write_text(WAITS)
        script = [str(folder / "script.py"), str(folder / "begun")]
        assert forked_python.ask(self.address, script, os.environ, [0, 1, 2])
        wait_until(lambda: (folder / "begun").exists() and bool((folder / "begun").read_text()), 60, "the script")
        return psutil.Process(int((folder / "begun").read_text()))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(f"\0{tmp_path}")
    yield server
    server.process.kill()
    server.process.wait()


def test_a_server_ends_once_it_is_of_no_use(server: Server, tmp_path: Path) -> None:
    forked = server.fork(tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        server.process.wait(1.5)
    forked.kill()
    forked.wait(30)  # which no zombie lets end
    assert server.process.wait(30) == 0


def test_who_breaks_off_harms_nobody(server: Server, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(server.address)
    server.fork(tmp_path).kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_other_users_are_neither_served_nor_trusted(server: Server) -> None:
    asks = f"""
import os, socket
from ray_mnist.launch import forked_python
os.setuid(65534)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
    client.settimeout(60)
    client.connect({server.address!r})
    try:
        socket.send_fds(client, [b'[["/nowhere"], {{}}, "/"]'], [0, 1, 2])
        print(client.recv(1))
    except (BrokenPipeError, ConnectionResetError):
        print(b"")
forked_python.socket.send_fds = None
print(forked_python.ask({server.address!r}, [], {{}}, []))
"""
    said = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, check=True, timeout=60).stdout
    assert said == "b''\nFalse\n"


def test_a_process_that_has_opened_a_gpu_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: a link stands in for that of the open file."""
    assert not fork_server.has_opened_a_gpu()
    monkeypatch.setattr(fork_server.os, "readlink", lambda _: "/dev/nvidiactl")
    assert fork_server.has_opened_a_gpu()
