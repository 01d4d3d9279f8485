"""Ray runs this in place of `python`: its processes are forked from one that has imported what they run.

    python -P -S forked_python.py PACKAGE THREADS [SCRIPT [ARGUMENT...]]

To import that takes each process five seconds. This one asks a server (`fork_server.py`) for a process that runs the
script with all that this one has, and ends. Where it gets none, it becomes `python`, which has imported nothing. It
imports little itself: each start of a worker waits for it.

There are two kinds of servers, and the first that needs one starts it. One has torch and Lightning; without a script it
is started for workers of the parent process's, before they and Ray are. The other is forked from it and has Ray, too,
which reads its environment as it is imported, and there which job of which cluster it is for.
"""

import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

WAIT_S = 50  # for a process, of which most is the server's import; Ray waits 60 s for a worker
OF_RAY = "RAY_"  # begins the names of the variables that are read as Ray is imported
OF_RAY_TRAIN = "RAY_TRAIN_"  # and of those that are read later: the processes of a run have different ones
BY_SHELLS = ("PWD", "OLDPWD", "SHLVL", "_")  # set by each shell, and Ray starts a process through two


def main(package: str, threads: str, *script: str) -> None:
    """Has the script run in a process of the server's, or else in this one."""
    if not script:
        start_without_ray(package, threads, os.getppid())
        return
    try:
        forked = fork(package, threads, script)
    except OSError:  # such as no memory for a server, or a very large environment
        forked = False
    if not forked:
        os.execv(sys.executable, [sys.executable, *script])


def fork(package: str, threads: str, script: Sequence[str]) -> bool:
    """Whether a process that runs the script was forked from one that has imported all.

    Raises:
        OSError: a server could not be started or asked.
    """
    address = address_of(package, threads)
    listener = listen(address)
    if listener:
        with listener:
            raylet = int(os.environ["RAY_RAYLET_PID"])
            base = start_without_ray(package, threads, raylet)
            server = server_command(raylet, package, "ray_mnist.ray_fork_internals", "ray_mnist.launch.ray")
            if not ask(base, server, os.environ | {"OMP_NUM_THREADS": threads}, [listener.fileno(), 1, 2]):
                return False
    return ask(address, script, os.environ, [0, 1, 2])


def start_without_ray(package: str, threads: str, owner: int) -> str:
    """Starts the server that has not imported Ray, if there is none, and returns its address."""
    address = address_of(package, threads, OF_RAY)
    listener = listen(address)
    if listener:
        with listener:
            command = [sys.executable, "-P", *server_command(owner, package, "torch._dynamo")]
            environment = os.environ | {"OMP_NUM_THREADS": threads}
            subprocess.Popen(command, stdin=listener.fileno(), env=environment, process_group=0)
    return address


def server_command(owner: int, *modules: str) -> list[str]:
    """The arguments of a `python` that is a server with these modules, and ends with the process `owner`."""
    return ["-m", "ray_mnist.launch.fork_server", str(owner), *modules]


def address_of(package: str, threads: str, *but: str) -> str:
    """The address of a server: the same where all is that libraries read as they are imported, `but` what begins so."""
    unread = (OF_RAY_TRAIN, *but)
    environment = sorted(
        (name, value) for name, value in os.environ.items() if not name.startswith(unread) and name not in BY_SHELLS
    )
    machine = os.stat("/proc/self/ns/mnt").st_ino  # containers that share a network share addresses
    about = json.dumps([os.getuid(), machine, sys.executable, package, threads, environment])
    return f"\0ray_mnist-{hashlib.sha256(about.encode()).hexdigest()}"


def listen(address: str) -> socket.socket | None:
    """Listens there; None if somebody does. An address that begins with a 0 is free again once nobody listens."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(address)
    except OSError:
        listener.close()
        return None
    listener.listen(128)
    return listener


def ask(address: str, script: Sequence[str], environment: Mapping[str, str], files: Sequence[int]) -> bool:
    """Whether the server there has forked a process that runs the script, with these as its standard files.

    Raises:
        OSError: nobody listens there, or nobody answers.
    """
    request = json.dumps([script, {**environment}, os.getcwd()]).encode()
    for _ in range(100):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
            server.settimeout(WAIT_S)
            try:
                server.connect(address)
            except ConnectionRefusedError:  # who has begun to listen has not gone on yet
                time.sleep(0.01)
                continue
            if user_of(server) != os.getuid():
                return False
            socket.send_fds(server, [request], files)
            return bool(server.recv(1))
    return False


def user_of(connection: socket.socket) -> int:
    """Whose process is at the other end."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


if __name__ == "__main__":
    main(*sys.argv[1:])
