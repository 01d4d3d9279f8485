"""What the README and docs/ say is so: the options, the messages that are explained, the model of one's own."""

import ast
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "cluster" / "README.md"]
COMMAND = re.compile(r"(?:python -m ray_mnist\.|ray-mnist )(\w+)([^`\n']*)")


def commands() -> dict[str, set[str]]:
    """The options with which the pages have each command."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        for name, arguments in COMMAND.findall(page.read_text()):
            found.setdefault(name, set()).update(re.findall(r"--[\w.-]+", arguments.partition("#")[0]))
    return found


@pytest.mark.parametrize("name", sorted(commands()))
@pytest.mark.filterwarnings("ignore:.* found in sys.modules after import of package:RuntimeWarning")
def test_the_pages_name_options_that_there_are(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"ray_mnist.{name}", run_name="__main__")
    assert end.value.code in (None, 0)
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out)) | {"--help", "--version", "--model", "--data"}
    assert {option.partition(".")[0] for option in commands()[name]} <= known


def texts(path: Path) -> Iterator[str]:
    """The strings of a module, with `…` for what is put in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_messages_that_are_explained_are_those_that_there_are() -> None:
    said = {text for path in (ROOT / "ray_mnist").rglob("*.py") for text in texts(path)}
    rows = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs" / "messages.md").read_text(), re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        parts = [re.escape(part.strip()) for part in row.split("…") if part.strip()]
        assert any(re.search(".*".join(parts), text, re.DOTALL) for text in said), row


PICTURES = "FakeData(48, (3, 32, 32), 10, transforms.ToTensor())"


@pytest.mark.slow
def test_the_model_of_ones_own_trains_on_two_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gloo: None
) -> None:
    """On made-up pictures: CIFAR-10 would have to be downloaded."""
    page = (ROOT / "docs" / "your-own-model.md").read_text()
    program, script = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for written, here in (
        ("CIFAR10(self.root, download=True)", "pass"),
        ("CIFAR10(self.root, train, transforms.Compose([*change, transforms.ToTensor()]))", PICTURES),
        ("import CIFAR10", "import FakeData"),
        ("batch_size: int = 256", "batch_size: int = 16"),
    ):
        assert written in program
        program = program.replace(written, here)
    (tmp_path / "cifar.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    exec(script.replace("max_epochs=10", "max_epochs=1"), {})
    (result,) = (json.loads(file.read_text()) for file in tmp_path.glob("runs/*/result.json"))
    assert (result["num_workers"], result["steps"], result["test_samples"]) == (2, 3, 48)
