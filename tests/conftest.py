"""What several test files share."""

import atexit
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import NoReturn

import psutil
import pytest

# Ray reads these at import, and whatever the tests start inherits them. The last two save clusters a process for each
# logical CPU, which nothing uses, and 31 for each time that Ray Data reads Parquet files.
os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
os.environ |= {"RAY_prestart_worker_first_driver": "0", "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1"}
# Workers import what the tests define, and with that this file.
paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
if str(Path(__file__).parent) not in paths:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *paths])
for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
    os.environ.pop(name, None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure() -> None:
    """Gives the tests a temporary folder of their own: who is killed leaves things there, and so does Ray always."""
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # `tmp_path` outlives the tests
    # Who starts this in the background has it, and what it starts, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not inside that of the process that started this one: below are sockets, whose paths have 107 characters at most.
    folder = tempfile.mkdtemp(prefix="t-", dir=os.environ["PYTEST_DEBUG_TEMPROOT"])
    os.chmod(folder, 0o755)  # some tests read there as another user
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    # After multiprocessing, which comes later, has removed what it has there.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: give --slow"))
    # Files with tests that take long begin first, so that those who share the files out end at about the same time.
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Starts what is forked for others, which keeps the environment: it is yet as before all tests."""
    if "processes" in sys.modules:
        from multiprocessing import forkserver  # not before `pytest_configure`, see there

        forkserver.ensure_running()
        start_base_of_workers()


def start_base_of_workers() -> None:
    """Has all Rays that tests start, in whatever process, fork theirs from what has imported torch and Lightning once.

    But for those whose environment another test has changed.
    """
    from ray_mnist.config import RunConfig
    from ray_mnist.launch import ahead, forked_python  # once the environment above is set

    if not ahead.forked(RunConfig(), begin=True):  # not this system
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPT_NOENV", "1")  # as Ray and `forked` have it
        address = forked_python.address_of("pytorch_lightning", "1", forked_python.OF_RAY)
    # It ends where it has had nothing to do for half a minute.
    busy = [Path(__file__).with_name("busy.py").as_posix()]
    end, _ = os.pipe()  # closed as this process ends
    Thread(target=forked_python.ask, args=[address, busy, os.environ, [end, 1, 2]], daemon=True).start()


def forget_test() -> None:
    """Has no test an environment of its own, for which nothing would be shared.

    pytest notes the test's name there, and a process that has joined a Ray, or imported MLflow, something of its own.
    """
    for name in ("PYTEST_CURRENT_TEST", "PYTHONBREAKPOINT", "_MLFLOW_TELEMETRY_SESSION_ID"):
        os.environ.pop(name, None)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    forget_test()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call() -> None:
    forget_test()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Has each test, with the fixtures that it is the first to use, draw the same, whatever was drawn before it."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session")
def mnist_files() -> Path:
    """The four published MNIST files, gzipped: the shared folder beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "mnist"
    if not folder.is_dir():
        pytest.skip("the shared folder with the published MNIST files is not beside the checkout")
    return folder


@pytest.fixture(autouse=True)
def without_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the runs of this process draw no plots, which takes longer than all else, but where a test asks for them."""
    if "plots" not in request.keywords:
        monkeypatch.setattr("ray_mnist.run.plots.draw", lambda *_: {})


@pytest.fixture(autouse=True)
def unseeded() -> Iterator[None]:
    """Nobody has called `seed_everything`, which writes into the environment, and no later test learns who does."""
    forget_seeds()
    yield
    forget_seeds()


def forget_seeds() -> None:
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m ray_mnist.<module> <arguments>` as a person would, in a folder of its own."""

    def run(*arguments: str, module: str = "train", **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", f"ray_mnist.{module}", *arguments],
            **{"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 600} | options,
        )

    return run


@contextmanager
def ray_head(*options: str) -> Iterator[str]:
    """The address of a Ray cluster on this machine, for the time of the `with`."""
    forget_test()  # pytest tells this file of no fixture of the session
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        # In a folder of its own, nobody finds it who was not given its address.
        ports = ["--port", str(free_port()), "--temp-dir", folder]
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *ports, *options, "--block"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        address_file = Path(folder, "ray_current_cluster")
        try:
            wait_until(lambda: address_file.exists() or head.poll() is not None, 600, "the Ray head to start")
            assert head.poll() is None, f"the Ray head ended with status {head.returncode}"
            yield address_file.read_text().strip()
        finally:
            processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
            for process in processes:
                with suppress(psutil.NoSuchProcess):  # it went with its parent
                    process.kill()
            psutil.wait_procs(processes, timeout=30)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The address of a Ray cluster on this machine with eight logical CPUs, more than there are cores."""
    without = ["--include-dashboard=false", "--include-log-monitor=false"]
    with ray_head("--num-cpus=8", "--num-gpus=0", *without) as address:
        yield address


@pytest.fixture(scope="module")
def cluster(ray_cluster: str) -> Iterator[None]:
    """This process, connected to the tests' cluster as a run is: whatever trains uses the connection and leaves it."""
    import ray  # once the environment above is set

    from ray_mnist.config import RunConfig
    from ray_mnist.launch import ahead

    ahead.init(address=ray_cluster, runtime_env=ahead.forked(RunConfig()))
    yield
    assert ray.is_initialized(), "a connection was closed by one whose own it was not"
    ray.shutdown()


@pytest.fixture
def gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a run with workers start them itself, without Ray: for what is about the work, not about its launch."""
    import gloo_workers  # once the environment above is set

    monkeypatch.setattr(gloo_workers.select, "on_ray", gloo_workers.on_gloo)


def use_s3_at(address: str, patch: pytest.MonkeyPatch) -> str:
    """The storage path of a new bucket in the S3 at an address, which this process and what it starts then use."""
    import boto3  # few tests need it

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_ENDPOINT_URL", address)
    patch.setenv("no_proxy", "127.0.0.1")
    boto3.client("s3").create_bucket(Bucket="bucket")
    return "s3://bucket"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An object store, with a bucket in it: moto's S3."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    urllib.request.urlopen(f"{address}/moto-api/reset", data=b"")  # what it has is the process's
    with pytest.MonkeyPatch.context() as patch:
        yield use_s3_at(address, patch)
    server.stop()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 64 KiB."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root can mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this root may not mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def lacking(what: str) -> NoReturn:
    """Skips the test with the reason; fails it where `REQUIRE_MACHINES=1` says that all has to be had."""
    (pytest.fail if os.environ.get("REQUIRE_MACHINES") == "1" else pytest.skip)(what)


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Returns once `condition()` holds; fails, naming `what` was waited for, if that takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def altered(content: bytes) -> bytes:
    """64 bytes flipped inside."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 64]) + content[middle + 64 :]


# What can become of a checkpoint's file, and what is said of it then.
every_damage = pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda content: b"", "is not complete"),
        (lambda content: content[:-100], "is not complete"),
        (altered, "has changed since it was written: its checksum is another"),
    ],
    ids=["empty", "cut off", "altered"],
)
