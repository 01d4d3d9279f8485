"""Of Ray beyond its public API: stands in for the script that starts a process of Ray's, which imports Ray to do so.

    python ray_setup_worker.py SCRIPT [ARGUMENT...] --language=PYTHON --serialized-runtime-env-context=JSON

What is to be forked (`forked_python.py`) is asked for without that, a third of a second sooner; all else is left
to Ray's own. Ray knows the script by the end of its name.
"""

import argparse
import json
import os
import runpy
import shlex
import sys


def main() -> None:
    """Becomes the process that the arguments ask for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--language")
    parser.add_argument("--serialized-runtime-env-context", default="{}")
    given, script = parser.parse_known_args()
    context = {name: value for name, value in json.loads(given.serialized_runtime_env_context).items() if value}
    variables, python = context.pop("env_vars", {}), context.pop("py_executable", "")
    if given.language == "PYTHON" and "forked_python.py" in python and "$" not in str(variables) and not context:
        os.environ.update(variables)
        os.execvp("bash", ["bash", "-c", f"exec {python} {shlex.join(script)}"])
    if not sys.flags.safe_path:
        del sys.path[0]  # this folder, which has another `ray`
    runpy.run_module("ray._private.workers.setup_worker", run_name="__main__")


if __name__ == "__main__":
    main()
