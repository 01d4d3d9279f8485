"""Answers over HTTP what pictures show: `python -m ray_mnist.serve RUN_FOLDER`, with `--help` for its options."""

import logging
import signal
import socket
import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ray_mnist.cli import console
from ray_mnist.cli.parser import make_command
from ray_mnist.cli.saved_run import RUN_FOLDER, build, load, open_run
from ray_mnist.config import RunConfig
from ray_mnist.errors import RequestError, one_line

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from ray_mnist.classifier import Classifier


def serve() -> None:
    """Parses the command line and serves the model until Ctrl-C or SIGTERM.

    Raises:
        RequestError: there is no such run, or nobody can serve here.
    """
    parser = make_command("serve", "Serve a page to draw on, and an endpoint that says what a picture shows.")
    parser.add_argument("run_folder", help=RUN_FOLDER)
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others in")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument("--num-replicas", type=int, default=1, help="processes with the model that answer")
    options, run = open_run(parser)
    if options.num_replicas < 1:
        raise RequestError(f"--num-replicas {options.num_replicas} answer nothing: give at least 1.")
    if find_spec("fastapi") is None:
        raise RequestError("ray_mnist.serve needs Ray Serve: pip install 'ray-mnist[serve]'.")
    check_port(options.host, options.port)
    from ray_mnist.classifier import Classifier

    model, data = build(parser, run)
    load(run, model)
    with console.quiet():
        serve_until_told(Classifier(model, data), options)


def check_port(host: str, port: int) -> None:
    """Raises RequestError unless one can listen there."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise RequestError(f"--host {host} --port {port} cannot be listened on: {one_line(error)}") from error


def serve_until_told(classifier: "Classifier", options: "Namespace") -> None:
    """Ends with Ctrl-C or SIGTERM, and Ray, which is started for it, with it."""
    import ray
    from ray import serve

    from ray_mnist.launch.ahead import start_ray
    from ray_mnist.serving.service import Service

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # which importing it has set up anew
    deployment: Any = Service  # as Ray's decorators leave it
    start_ray(RunConfig(), options.num_replicas)
    try:
        serve.start(http_options={"host": options.host, "port": options.port})
        serve.run(deployment.options(num_replicas=options.num_replicas).bind(classifier))
        console.say(f"http://{options.host}:{options.port} has a page to draw on; Ctrl-C ends it")
        told = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: told.set())
        told.wait()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    console.run(serve)
