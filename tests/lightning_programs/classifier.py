"""A classifier with a data module, several callbacks, a logger and a test, of scikit-learn's digits."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class DigitsDataModule(pl.LightningDataModule):
    def __init__(self, batch_size: int = 64):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str):
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target)
        self.train = TensorDataset(images[:1000], labels[:1000])
        self.val = TensorDataset(images[1000:1400], labels[1000:1400])
        self.test = TensorDataset(images[1400:], labels[1400:])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.hparams.batch_size)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.hparams.batch_size)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=self.hparams.batch_size)


class LitClassifier(pl.LightningModule):
    def __init__(self, hidden_dim: int = 64, learning_rate: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 10))
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.val_acc(logits, y)
        self.log("val_loss", F.cross_entropy(logits, y), prog_bar=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.test_acc(self(x), y)
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class SayWhereWeAre(Callback):
    def __init__(self):
        self.losses = []

    def on_validation_end(self, trainer, pl_module):
        self.losses.append(trainer.callback_metrics["val_loss"].item())
        rank_zero_info(f"epoch {trainer.current_epoch}: {self.losses[-1]:.4f}")


def main():
    pl.seed_everything(1234)
    model = LitClassifier()
    datamodule = DigitsDataModule()
    checkpoint = ModelCheckpoint(dirpath="checkpoints", monitor="val_acc", mode="max", filename="{epoch}-{val_acc:.3f}")
    follow = SayWhereWeAre()
    callbacks = [EarlyStopping("val_loss", patience=2), checkpoint, LearningRateMonitor("epoch"), follow]
    logger = CSVLogger("logs", name="digits")
    trainer = pl.Trainer(max_epochs=3, callbacks=callbacks, logger=logger, gradient_clip_val=1.0)
    trainer.fit(model, datamodule=datamodule)
    (tested,) = trainer.test(ckpt_path="best", datamodule=datamodule)

    best = LitClassifier.load_from_checkpoint(checkpoint.best_model_path)
    torch.save(best.state_dict() | tested | {"val_losses": follow.losses[-3:]}, "weights.pt")


if __name__ == "__main__":
    main()
