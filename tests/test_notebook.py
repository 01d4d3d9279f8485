"""A notebook that defines its classes in cells, and trains them on two Ray workers."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

CELLS = [
    """
    import pytorch_lightning as pl
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from ray_mnist import Trainer
    """,
    """
    class Line(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = scale * nn.functional.mse_loss(self.layer(x), y)
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

        def predict_step(self, batch, batch_idx):
            return self.layer(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.2)


    scale = 1.0  # which the class reads from the notebook, not from a module
    """,
    """
    class Points(pl.LightningDataModule):
        def setup(self, stage):
            x = torch.linspace(-1, 1, 101)[:, None]
            self.points = TensorDataset(x, 3 * x + 1)

        def train_dataloader(self):
            return DataLoader(self.points, batch_size=10, shuffle=True)

        def predict_dataloader(self):
            return DataLoader(self.points, batch_size=10)
    """,
    """
    model, points = Line(), Points()
    trainer = Trainer(max_epochs=8, num_workers=2, storage_path="runs", name="line")
    trainer.fit(model, points)
    """,
    """
    predicted = torch.cat(trainer.predict(model, points)).flatten()
    x = torch.linspace(-1, 1, 101)
    print("slope", round(model.layer.weight.item(), 2), "offset", round(model.layer.bias.item(), 2))
    print("error", (predicted - (3 * x + 1)).abs().max().item() < 0.05)
    """,
]


def test_a_notebook_trains_its_own_classes_on_two_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    cells = [nbformat.v4.new_code_cell("\n".join(line[4:] for line in cell.strip("\n").split("\n"))) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute(env=os.environ | {"JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter")})
    told = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert told == "slope 3.0 offset 1.0\nerror True\n"
    trained = "".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in notebook.cells[3].outputs
    )
    assert "Points · Line (2 parameters) · 2 workers on CPU" in trained
    assert "epoch 8/8" in trained
    progress = [output for output in notebook.cells[3].outputs if output.get("data") == {"text/plain": ""}]
    assert len(progress) == 1  # one, in whose place others came, and which is cleared now
    assert (tmp_path / "runs" / "line" / "result.json").is_file()
