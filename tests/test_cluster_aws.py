"""The shipped cluster/gpu.yaml, taken through Ray's launcher on a stand-in for AWS.

moto plays AWS; each instance that it starts is a machine made of namespaces at the instance's private address. Replaced
in the file are how it is reached (as from a VPN) and how much of this machine each may take. Ray believes that the GPU
machines have a GPU, by their instance type; there is none, so the training is one on CPUs, of which there are enough
only on those machines.
"""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from conftest import wait_until
from machines import PATIENT, Laptop, Machine, Network, in_project, skip_unless_machines_can_be_made
from metadata_server import SPOT, spot

from ray_mnist import MNISTDataModule, SimpleModel, Trainer

FILE = "cluster/gpu.yaml"
BUCKET = "ray-mnist-123456789012"
AWS = "198.18.255.1"
CREDENTIALS = {
    "AWS_ENDPOINT_URL": f"http://{AWS}:5000",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-west-2",
}


class Cloud:
    """The machines that AWS has started, by their instance ids."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.laptop: Laptop | None = None
        self.machines: dict[str, Machine] = {}
        network.run("ip", "address", "add", f"{AWS}/15", "dev", "lan")
        self.process = subprocess.Popen(
            network.inside(sys.executable, str(Path(__file__).with_name("fake_aws.py")), AWS),
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | CREDENTIALS | {"MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "{}\n"
        threading.Thread(target=self._follow, args=(self.process.stdout,), daemon=True).start()

    def _follow(self, lines: Iterator[str]) -> None:
        for line in lines:
            running = json.loads(line)
            for instance in self.machines.keys() - running.keys():
                self.machines[instance].off()
                del self.machines[instance]
            for instance in running.keys() - self.machines.keys():
                self.machines[instance] = self._boot(instance, running[instance])

    def _boot(self, instance: str, address: str) -> Machine:
        machine = Machine(self.network, instance, address, home="/home/ubuntu", user="ubuntu", shared=False)
        assert self.laptop is not None
        key = next((self.laptop.home_on_disk / ".ssh").glob("ray-autoscaler*.pem"))
        public = subprocess.run(["ssh-keygen", "-y", "-f", key], capture_output=True, check=True).stdout
        (machine.home_on_disk / ".ssh" / "authorized_keys").write_bytes(public)
        with (machine.home_on_disk / ".bashrc").open("a") as file:  # where a real one asks its metadata server
            file.writelines(f"export {name}={value}\n" for name, value in CREDENTIALS.items())
        self.network.machines.append(machine)
        machine.on()
        return machine

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    skip_unless_machines_can_be_made()
    folder = Path(tempfile.mkdtemp(prefix="machines-"))
    network = Network(folder)
    cloud = Cloud(network)
    try:
        yield cloud
    finally:
        cloud.close()
        network.close()
        shutil.rmtree(folder)


@pytest.mark.slow
def test_up_train_leave_a_spot_machine_on_its_notice_and_down(cloud: Cloud, gloo: None, tmp_path: Path) -> None:
    laptop = cloud.laptop = Laptop(cloud.network, "198.18.0.1")
    with (laptop.home_on_disk / ".bashrc").open("a") as file:
        file.writelines(f"export {name}={value}\n" for name, value in CREDENTIALS.items())
    caps = {"ray start": "ray start --object-store-memory=100000000", "    resources: {}": "    resources: {CPU: 1}"}
    laptop.edit(FILE, {"type: aws": "type: aws\n  use_internal_ips: true", **caps, **PATIENT})

    laptop.hold_second_epoch(
        until=f'pause.HERE[0].stop.is_set() or s3().list_objects_v2(Bucket="{BUCKET}", Prefix="go")["KeyCount"]'
    )
    (laptop.project / "mine").mkdir()  # a folder that `ray up` does not copy
    (laptop.project / "ray_mnist/held.py").rename(laptop.project / "mine/held.py")

    def aws(call: str) -> Any:
        ask = f"import boto3, json, sys; json.dump(boto3.{call}, sys.stdout, default=str)"
        return json.loads(laptop.do(f"python -c '{ask}'"))

    def wait_for(file: str) -> None:
        patience = "WaiterConfig=dict(Delay=1, MaxAttempts=500)"
        aws(f'client("s3").get_waiter("object_exists").wait(Bucket="{BUCKET}", Key="runs/run/{file}", {patience})')

    def read(file: str) -> str:
        return aws(f'client("s3").get_object(Bucket="{BUCKET}", Key="runs/run/{file}")["Body"].read().decode()')

    template = 'TemplateBody=open("cluster/aws-account.yaml").read(), Capabilities=["CAPABILITY_NAMED_IAM"]'
    aws(f'client("cloudformation").create_stack(StackName="ray-mnist", {template})')
    laptop.do("ray get-auth-token --generate")
    laptop.do(f"ray up -y {FILE}")
    assert len(cloud.machines) == 1
    # On the head alone, as people's own code is: the machines that are yet to come get it from there.
    laptop.do(f"ray rsync-up {FILE} mine/ mine")

    train = "python -m ray_mnist.train --dataset digits --num-workers 3 --max-epochs 3 --name run --model held.Held"
    command = in_project(f"ray exec {FILE} 'cd mine && {train} --max-failures 0'")
    run = laptop.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for("metrics.csv")
        described = aws('client("ec2").describe_instances()')["Reservations"]
        instances = [instance for page in described for instance in page["Instances"]]
        workers = [instance for instance in instances if instance["InstanceType"] == "g6.xlarge"]
        assert [worker.get("InstanceLifecycle") for worker in workers] == ["spot", "spot"]
        assert {instance["MetadataOptions"]["HttpTokens"] for instance in instances} == {"required"}
        lost = workers[0]["InstanceId"]
        with cloud.machines[lost].metadata({SPOT: spot(900)}):
            wait_for("workers.jsonl")
        aws(f'client("ec2").terminate_instances(InstanceIds=["{lost}"])')
        wait_until(lambda: lost not in cloud.machines, 600, "the machine to go")
        aws(f'client("s3").put_object(Bucket="{BUCKET}", Key="go")')
        said, _ = run.communicate(timeout=600)
    finally:
        run.kill()
    assert run.returncode == 0, said
    assert f"run folder s3://{BUCKET}/runs/run" in said
    why = f"{lost} will be taken away"
    assert f"workers: 3 start: {why}" in said
    assert [json.loads(line) for line in read("workers.jsonl").splitlines()] == [{"before": 3, "after": 3, "why": why}]
    assert json.loads(read("result.json"))["restarts"] == 0
    pl.seed_everything(0, verbose=False)
    whole = Trainer(num_workers=3, max_epochs=3, storage_path=str(tmp_path))
    whole.fit(SimpleModel(), MNISTDataModule("digits"))
    losses = "step", "train_loss", "val_loss"
    rows = [*csv.DictReader(io.StringIO(read("metrics.csv")))]
    assert [[float(row[name]) for name in losses] for row in rows] == [
        [row[name] for name in losses] for row in whole.result.history
    ]
    # Ray's autoscaler may ask for all workers' room anew before that of the lost group is free: up to the file's most.
    assert 3 <= len(cloud.machines) <= 5
    assert lost not in cloud.machines
    laptop.do(f"ray down -y {FILE}")
    wait_until(lambda: not cloud.machines, 30, "every instance to be terminated")
