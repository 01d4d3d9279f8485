"""Machines made of Linux namespaces: each its own network, processes, mounts, hostname, home and sshd.

They are joined by a bridge in a network of their own, from which nothing outside can be reached. What they share is
this machine's kernel, cores and (read only) its disk. The environment with Python and Ray is where it is here, but the
package in it is what the machine was sent.
"""

import ipaddress
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
from conftest import lacking, wait_until

REPOSITORY = Path(__file__).resolve().parents[1]
NEEDED = ("unshare", "nsenter", "ip", "sshd", "ssh-keygen", "rsync", "mount")
OWN = ("tmp", "run", "root", "home", "mnt")  # folders of which each machine has its own
METADATA = "169.254.169.254"
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"

# As in a fresh image: sshd lets root in by key, and a shell finds Python.
BOOT = r"""
set -eu
root={disk}/rootfs
mkdir -p $root {disk}/venv
mount --make-rprivate /
mount --rbind / $root
for own in {own}; do mount --bind {disk}/$own $root/$own; done
mount -t tmpfs tmpfs $root/dev/shm
for file in {disk}/etc/*; do mount --bind $file $root/etc/$(basename $file); done
mount -t tmpfs tmpfs {disk}/venv
mkdir {disk}/venv/new {disk}/venv/work {disk}/venv/all
mount -t overlay overlay -o lowerdir={environment},upperdir={disk}/venv/new,workdir={disk}/venv/work {disk}/venv/all
checksum=$(cat {repository}/pyproject.toml {repository}/requirements.lock | cksum)
echo "{home}/ray_mnist $checksum" > {disk}/venv/all/.ready
echo {home}/ray_mnist > {disk}/venv/all/{editable}
[ -e $root{repository} ] && mount -t tmpfs tmpfs $root{repository}
mkdir -p $root{environment} $root{home}/ray_mnist/.venv $root/run/sshd
mount --bind {disk}/venv/all $root{environment}
mount --bind {disk}/venv/all $root{home}/ray_mnist/.venv
if [ ! -e $root{python}/bin ]; then mkdir -p $root{python}; mount --bind {python} $root{python}; fi
for folder in {shared}; do mkdir -p $root/mnt/shared; mount --bind $folder $root/mnt/shared; done
mount -t proc proc $root/proc
mount -o remount,bind,ro $root
hostname {name}
for attempt in $(seq 500); do ip link show eth0 >/dev/null 2>&1 && break; sleep 0.01; done
ip link set lo up
ip link set eth0 address {mac} up
ip address add {address}/15 dev eth0
ip route add default dev eth0
ip route add unreachable {metadata}  # or that of another machine would answer
exec chroot $root bash -c '/usr/sbin/sshd -D -f /run/sshd_config & wait'
"""
SSHD = """\
HostKey /run/host_key
PidFile /run/sshd.pid
PermitRootLogin yes
StrictModes no
UsePAM no
Subsystem sftp internal-sftp
"""
# What has to be replaced in a cluster file, so that Ray does not take a machine for dead that is only slow.
PATIENT = {"RAY_health_check_timeout_ms=2000": "RAY_health_check_timeout_ms=10000"}
HELD = """\
import functools
import pathlib
import time

import boto3

from ray_mnist.launch import pause
from ray_mnist.models import SimpleModel

s3 = functools.cache(lambda: boto3.client("s3"))  # which takes a core a second to make


class Held(SimpleModel):
    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        while self.current_epoch == 1 and not ({condition}):
            time.sleep(1)
"""


class Network:
    """The bridge that machines are plugged into, and what they have in common: a key to log in with, and a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shared = folder / "shared"
        self.shared.mkdir()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        make = "ip link set lo up && ip link add lan type bridge && ip link set lan up && echo ready"
        self.process = subprocess.Popen(
            ["unshare", "--net", "--kill-child", "--fork", "sh", "-c", f"{make} && exec sleep infinity"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PATH": PATH},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        self.machines: list[Machine] = []

    def machine(self, name: str, address: str, **options: object) -> "Machine":
        """A new one, switched on."""
        machine = Machine(self, name, address, **options)
        self.machines.append(machine)
        machine.on()
        return machine

    def plug_in(self, pid: int, address: str) -> None:
        """Gives the machine whose namespaces are the process's a network card."""
        card = f"lan{int(ipaddress.ip_address(address)) & 0xFFFFFF:x}"
        # The card of before a power cut goes only with the last of what ran there.
        subprocess.run(self.inside("ip", "link", "delete", card), capture_output=True, env=os.environ | {"PATH": PATH})
        self.run("ip", "link", "add", card, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self.run("ip", "link", "set", card, "master", "lan", "up")

    def inside(self, *command: str) -> list[str]:
        """The command, run in the network; all else is this machine's."""
        return ["nsenter", f"--net=/proc/{self.process.pid}/ns/net", *command]

    def run(self, *command: str) -> None:
        """Runs a command in the network."""
        subprocess.run(self.inside(*command), check=True, env=os.environ | {"PATH": PATH}, timeout=600)

    def close(self) -> None:
        """Switches everything off."""
        for machine in self.machines:
            machine.off()
        self.process.kill()
        self.process.wait(30)


class Machine:
    """One machine. Its disk, below `folder`, outlives a power cut; what was in memory does not."""

    def __init__(
        self, network: Network, name: str, address: str, home: str = "/root", user: str = "root", shared: bool = True
    ) -> None:
        self.network, self.name, self.address, self.home = network, name, address, home
        self.disk = network.folder / name
        etc = self.disk / "etc"
        for own in (*OWN, "etc"):
            (self.disk / own).mkdir(parents=True)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        (etc / "hostname").write_text(f"{name}\n")
        (etc / "resolv.conf").write_text("")  # a nameserver that does not answer costs 10 s for every look-up
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (etc / "passwd").write_text(
            f"{user}:x:0:0::{home}:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\nroot:x:0:0::{home}:/bin/bash\n"
        )
        self.home_on_disk = self.disk / home.lstrip("/")
        ssh = self.home_on_disk / ".ssh"
        ssh.mkdir(parents=True)
        shutil.copy(network.folder / "key.pub", ssh / "authorized_keys")
        (self.home_on_disk / ".bashrc").write_text(f"export PATH={sys.base_prefix}/bin:{os.environ['PATH']}\n")
        (self.home_on_disk / ".bash_profile").write_text(". ~/.bashrc\n")
        self.shared = shared
        self.process: subprocess.Popen[bytes] | None = None

    def on(self) -> None:
        """Boots; returns once it can be logged in to."""
        for memory in ("tmp", "run"):
            shutil.rmtree(self.disk / memory)
            (self.disk / memory).mkdir()
        run = self.disk / "run"
        (run / "sshd_config").write_text(SSHD)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", run / "host_key"], check=True)
        editable = next((REPOSITORY / ".venv").glob("lib/python*/site-packages/_editable_impl_ray_mnist.pth"))
        boot = BOOT.format(
            disk=self.disk,
            own=" ".join(OWN),
            environment=REPOSITORY / ".venv",
            repository=REPOSITORY,
            editable=editable.relative_to(REPOSITORY / ".venv"),
            home=self.home,
            python=sys.base_prefix,
            shared=self.network.shared if self.shared else "",
            name=self.name,
            address=self.address,
            metadata=METADATA,
            mac="02:00:" + ":".join(f"{part:02x}" for part in ipaddress.ip_address(self.address).packed),
        )
        namespaces = ["--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child=KILL", "--mount-proc"]
        with (self.disk / "boot.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["unshare", *namespaces, "bash", "-c", boot],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": PATH, "HOME": self.home, "LANG": "C.UTF-8"},
            )
        wait_until(lambda: bool(psutil.Process(self.process.pid).children()), 600, "the first process")
        self.network.plug_in(psutil.Process(self.process.pid).children()[0].pid, self.address)
        wait_until((run / "sshd.pid").exists, 600, f"{self.name} to boot (see {self.disk / 'boot.log'})")

    def off(self) -> None:
        """Cuts the power: every process of the machine is gone at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)
            self.process = None

    def run(self, command: str, timeout: float = 600, **options: object) -> "subprocess.CompletedProcess[str]":
        """Runs a command as a person who sits at the machine would."""
        return subprocess.run(
            [*self.inside(), "bash", "-lc", command],
            **{"capture_output": True, "text": True, "timeout": timeout, "env": self.environment()} | options,
        )

    def start(self, command: str, **options: object) -> "subprocess.Popen[str]":
        """The same, and does not wait for its end."""
        return subprocess.Popen([*self.inside(), "bash", "-lc", command], text=True, env=self.environment(), **options)

    def inside(self) -> list[str]:
        """What puts a command into the machine."""
        assert self.process is not None
        first = psutil.Process(self.process.pid).children()[0].pid
        # Not `unshare` itself: that is outside of the process namespace that it made.
        return ["nsenter", f"--target={first}", "--all", "--root", f"--wdns={self.home}"]

    def metadata(self, pages: dict[str, str]) -> "subprocess.Popen[str]":
        """A metadata server where clouds have it, with these pages by path; it ends as its stdin is closed."""
        namespace = self.inside()[:2]
        command = ["ip", "address", "add", f"{METADATA}/32", "dev", "lo"]
        subprocess.run([*namespace, "--net", *command], check=True, timeout=600, env=os.environ | {"PATH": PATH})
        server = [sys.executable, str(Path(__file__).with_name("metadata_server.py")), f"{METADATA}:80"]
        process = subprocess.Popen([*namespace, "--net", *server], stdin=subprocess.PIPE, text=True)
        assert process.stdin is not None
        print(json.dumps(pages), file=process.stdin, flush=True)
        return process

    def environment(self) -> dict[str, str]:
        """That of a fresh login."""
        return {"PATH": PATH, "HOME": self.home, "LANG": "C.UTF-8", "RAY_USAGE_STATS_ENABLED": "0"}


class Laptop(Machine):
    """The machine that the cluster is launched from: it has this checkout in `~/ray_mnist`, and the key."""

    def __init__(self, network: Network, address: str) -> None:
        super().__init__(network, "laptop", address, shared=False)
        network.machines.append(self)
        self.project = self.home_on_disk / "ray_mnist"
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        files = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
        for file in filter(None, files.split("\0")):
            if (REPOSITORY / file).is_file():  # and not deleted
                (self.project / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPOSITORY / file, self.project / file)
        shutil.copy(network.folder / "key", self.home_on_disk / ".ssh" / "id_ed25519")
        self.on()

    def edit(self, file: str, replacements: dict[str, str]) -> None:
        """Writes `file` with each of the replacements made, which all have to be found."""
        path = self.project / file
        text = path.read_text()
        for old, new in replacements.items():
            assert old in text, f"{old!r} is not in {file}"
            text = text.replace(old, new)
        path.write_text(text)

    def hold_second_epoch(self, until: str) -> str:
        """The name of a model, in the package here, that waits in its second epoch until an expression is true."""
        (self.project / "ray_mnist" / "held.py").write_text(HELD.format(condition=until))
        return "ray_mnist.held.Held"

    def do(self, command: str, timeout: float = 600) -> str:
        """What a command in the checkout, with its environment active, writes; fails the test if the command fails."""
        done = self.run(in_project(command), timeout)
        assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
        return done.stdout


def in_project(command: str) -> str:
    """The command, in the checkout, with its environment active."""
    return f"cd ~/ray_mnist && . .venv/bin/activate && {command}"


def skip_unless_machines_can_be_made() -> None:
    """Skips the test with the reason, or fails it, see `lacking`."""
    missing = [name for name in NEEDED if not shutil.which(name, path=PATH)]
    why = "only root can make machines of namespaces" if os.geteuid() else None
    if missing:
        why = f"making machines takes {', '.join(missing)}"
    elif why is None:
        probe = ["unshare", "--net", "--mount", "--pid", "--fork", "ip", "link", "add", "lan", "type", "bridge"]
        done = subprocess.run(probe, capture_output=True, text=True, env=os.environ | {"PATH": PATH})
        why = f"this root may not make machines: {done.stderr.strip()}" if done.returncode else None
    if why:
        lacking(why)
