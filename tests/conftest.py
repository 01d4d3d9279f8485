"""What several test files share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def mnist_files() -> Path:
    """The four published MNIST files, gzipped: the shared folder beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "mnist"
    if not folder.is_dir():
        pytest.skip("the shared folder with the published MNIST files is not beside the checkout")
    return folder
