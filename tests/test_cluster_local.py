"""The shipped cluster/local.yaml, taken through Ray's own launcher on four machines made of namespaces.

Replaced in it are the addresses, the user, and how much of this machine each may take. All else is as people run it:
SSH, rsync, set-up (of an environment that is already there), tokens, Ray's autoscaler.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import wait_until
from machines import PATIENT, Laptop, Machine, Network, in_project, skip_unless_machines_can_be_made

pytestmark = pytest.mark.slow
FILE = "cluster/local.yaml"
ADDRESSES = {"head": "198.18.0.10", "one": "198.18.0.11", "two": "198.18.0.12"}
WORKERS = ("one", "two")
WAITS = "for nodes that the autoscaler is starting"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    skip_unless_machines_can_be_made()
    folder = Path(tempfile.mkdtemp(prefix="machines-"))
    network = Network(folder)
    try:
        yield network
    finally:
        network.close()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def machines(network: Network) -> dict[str, Machine]:
    return {name: network.machine(name, address) for name, address in ADDRESSES.items()}


@pytest.fixture(scope="module")
def head_only(network: Network, machines: dict[str, Machine]) -> Laptop:
    """After `ray up`, when the other machines cannot be logged in to yet."""
    for name in WORKERS:
        with (machines[name].home_on_disk / ".bashrc").open("a") as file:  # where Ray misses its head for a minute
            file.write("export RAY_gcs_rpc_server_reconnect_timeout_s=15\n")
        machines[name].run("kill -STOP $(cat /run/sshd.pid)")
    laptop = Laptop(network, "198.18.0.1")
    caps = "ray start --num-cpus=1 --object-store-memory=100000000"
    laptop.edit(FILE, {"192.0.2.1": "198.18.0.1", "ssh_user: ubuntu": "ssh_user: root", "ray start": caps, **PATIENT})
    laptop.hold_second_epoch(until='pathlib.Path("/mnt/shared/go").exists()')
    laptop.do("ray get-auth-token --generate")
    laptop.do(f"ray up -y {FILE}")
    return laptop


@pytest.fixture(scope="module")
def laptop(head_only: Laptop, machines: dict[str, Machine]) -> Laptop:
    """Once the other machines have joined."""
    let_in(machines)
    for name in WORKERS:
        wait_until(lambda machine=machines[name]: ray_on(machine), 600, f"{name} to join")
    return head_only


def let_in(machines: dict[str, Machine]) -> None:
    for name in WORKERS:
        machines[name].run("kill -CONT $(cat /run/sshd.pid)")


def ray_on(machine: Machine) -> str:
    """Ray's processes, a line each."""
    return machine.run("ps -eo args | grep -E '[r]aylet|[g]cs_server|[r]ay::'").stdout


def result_of(network: Network, name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((network.shared / "runs" / name / "result.json").read_text())
    return result


def test_two_workers_on_two_machines_train(
    head_only: Laptop, network: Network, machines: dict[str, Machine], mnist_files: Path
) -> None:
    shutil.copytree(mnist_files, network.shared / "data")
    train = "python -m ray_mnist.train --num-workers 2 --max-epochs 1 --name run --data.data_dir /mnt/shared/data"
    with (network.folder / "said").open("w+") as file:
        run = head_only.start(in_project(f"ray exec {FILE} '{train}'"), stdout=file, stderr=subprocess.STDOUT)
        said = Path(file.name).read_text
        try:
            wait_until(lambda: WAITS in said() or run.poll() is not None, 600, "the run to wait for nodes")
            let_in(machines)
            assert run.wait(timeout=300) == 0, said()
        finally:
            run.kill()
    assert WAITS in said()
    assert "nodes, " in said()  # one CPU each: two workers are on two of them
    assert "run folder /mnt/shared/runs/run" in said()
    assert result_of(network, "run")["test_accuracy"] > 0.9
    assert result_of(network, "run")["test_samples"] == 10_000
    head_only.do(f"ray rsync-down {FILE} /mnt/shared/runs/run .")
    assert (head_only.project / "run" / "result.json").is_file()


def test_the_doctor_finds_the_cluster_well(laptop: Laptop) -> None:
    assert "the cluster is well" in laptop.do(f"ray exec {FILE} 'python -m ray_mnist.doctor'")


def test_a_sweep_runs_on_the_machines(laptop: Laptop, network: Network) -> None:
    sweep = "--num-samples 2 --num-workers 2 --max-epochs 2 --data.dataset digits --name sweep"
    said = laptop.do(f"ray exec {FILE} 'python -m ray_mnist.tune {sweep}'")
    assert "best: model.lr" in said
    assert result_of(network, "sweep")["trials"] == 2


def test_a_script_is_submitted_as_a_job_that_goes_on_when_a_machine_is_powered_off_and_on_again(
    laptop: Laptop, network: Network, machines: dict[str, Machine]
) -> None:
    job = laptop.project / "job"
    job.mkdir()
    (job / "nets.py").write_text("from ray_mnist.held import Held\n\nclass Net(Held):\n    pass\n")
    (job / "script.py").write_text(
        "from nets import Net\nfrom ray_mnist import MNISTDataModule, Trainer\n"
        "trainer = Trainer(max_epochs=3, num_workers=3, name='job')\n"
        "trainer.fit(Net(), MNISTDataModule(dataset='digits'))\n"
    )
    piped: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    forward = laptop.start(in_project(f"exec ray dashboard {FILE}"), **piped)
    try:
        laptop.do("for i in $(seq 60); do (: </dev/tcp/localhost/8265) 2>/dev/null && break; sleep 1; done")
        submit = "RAY_AUTH_MODE=token ray job submit --address http://localhost:8265 --working-dir job"
        run = laptop.start(in_project(f"{submit} -- python script.py"), **piped)
        try:
            metrics = network.shared / "runs" / "job" / "metrics.csv"
            wait_until(lambda: metrics.exists() or run.poll() is not None, 600, "the first epoch")
            machines["two"].off()
            (network.shared / "go").touch()
            machines["two"].on()
            said, _ = run.communicate(timeout=600)
        finally:
            run.kill()
    finally:
        for process in [*psutil.Process(forward.pid).children(recursive=True), forward]:
            with suppress(psutil.NoSuchProcess):  # it went with its parent
                process.kill()
        forward.communicate()
    assert run.returncode == 0, said
    assert "run folder /mnt/shared/runs/job" in said
    assert "epoch 3/3" in said
    result = result_of(network, "job")
    assert (result["model"], result["restarts"], result["epochs"]) == ("Net", 1, 3)


def test_down_leaves_nothing_running(laptop: Laptop, machines: dict[str, Machine]) -> None:
    assert all(ray_on(machine) for machine in machines.values())
    laptop.do(f"ray down -y {FILE}")
    assert not ray_on(machines["head"])
    for name in WORKERS:  # which end once they have missed their head for a while
        wait_until(lambda machine=machines[name]: not ray_on(machine), 600, f"Ray to end on {name}")
