"""Forks a process for each that asks for one (`forked_python.py`), with everything imported that workers run.

    python -P -m ray_mnist.launch.fork_server OWNER MODULE...

As Python's own forkserver does for `multiprocessing`. It listens at its standard input, and ends with the process
OWNER, or once nobody has asked for a while and none of those that it has forked lives. Where an import fails, or opens
a GPU, which no fork could use, it ends at once, and who has asked does without it.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from ray_mnist.launch.forked_python import BY_SHELLS, OF_RAY, user_of
from ray_mnist.lightning_package import import_heavy

LISTENER = 0  # the file descriptor
REQUEST_BYTES = 1 << 20  # at most
REQUEST_S = 10  # in which who has connected asks
IDLE_S = 30


def serve(owner: str, *modules: str) -> None:
    """Returns in each process that it has forked, with the script and its arguments in `sys.argv`."""
    atexit.register(leave)  # before all others, which run before it
    owners_end = os.pidfd_open(int(owner))
    import_heavy(*modules)
    if has_opened_a_gpu():
        sys.exit("ray_mnist: an import has opened a GPU: workers are not forked, and start slower.")
    gc.collect()
    gc.freeze()  # what no fork is to write to
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # none becomes a zombie
    listener = socket.socket(fileno=LISTENER)
    while True:
        ready, _, _ = select.select([LISTENER, owners_end], [], [], IDLE_S)
        if owners_end in ready or not (ready or has_children()):
            os._exit(0)
        if not ready:
            continue
        connection, _ = listener.accept()
        if user_of(connection) == os.getuid() and is_fork():
            break
        connection.close()
    listener.detach()  # `become` has another file there
    os.close(owners_end)
    with connection:
        become(connection)


def has_opened_a_gpu() -> bool:
    """Whether this process has one of NVIDIA's or AMD's device files open."""
    opened = []
    for file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the folder's own
            opened.append(os.readlink(file))
    return any(path.startswith(("/dev/nvidia", "/dev/kfd", "/dev/dri")) for path in opened)


def has_children() -> bool:
    """Whether one of the forked processes lives."""
    try:
        return os.waitpid(-1, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


def is_fork() -> bool:
    """Forks; whether this is the new process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads: there is one, of jemalloc, which copes with forks
        try:
            return os.fork() == 0
        except OSError:  # no memory: who asks sees that there is no answer
            return False


def become(connection: socket.socket) -> None:
    """Makes this process, which was just forked, the one that was asked for, and says so."""
    os.setpgid(0, 0)  # Ray ends a worker's process group with it
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.settimeout(REQUEST_S)
    request, files, _, _ = socket.recv_fds(connection, REQUEST_BYTES, 3)
    script, environment, folder = json.loads(request)
    for standard, file in enumerate(files):
        os.dup2(file, standard)
        os.close(file)
    # The others are the same, or imports have set them, such as Lightning's for torch.
    for name in [*os.environ]:
        if name.startswith(OF_RAY) or name in (*BY_SHELLS, "OMP_NUM_THREADS"):
            del os.environ[name]
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv[:] = script
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # Python's own `random` is seeded anew by itself
    connection.send(b"\n")


def run() -> None:
    """Runs what `sys.argv` says, as `python` does."""
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


def leave() -> None:
    """Ends without Python's own end, which takes a second to free what was imported; nobody asks for the status."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    serve(*sys.argv[1:])
    run()
