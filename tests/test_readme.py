"""The README's first code block, run as a person would run it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_one_changed_line_trains_on_four_workers(tmp_path: Path) -> None:
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert block
    # The machine that tests may have no GPU, and the published MNIST would have to be downloaded.
    script = block[1]
    for written, here in ((", use_gpu=True", ""), ("MNISTDataModule(", 'MNISTDataModule("digits", ')):
        assert written in script
        script = script.replace(written, here)
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (result,) = (json.loads(file.read_text()) for file in tmp_path.glob("runs/*/result.json"))
    assert (result["num_workers"], result["epochs"], result["test_samples"]) == (4, 10, 359)
    assert result["test_accuracy"] > 0.94
