"""A language model in shards: a transformer that learns to write like Python's own manual, byte by byte.

It is plain Lightning but for one line. On two workers of this machine: python examples/transformer.py --num-workers 2
"""

import argparse
from pydoc_data.topics import topics
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, Dataset

from ray_mnist import Trainer  # the one line: Lightning's own is pl.Trainer


class Windows(Dataset[Tensor]):
    """Pieces of a text, of `length` bytes and the one that follows."""

    def __init__(self, text: bytes, length: int) -> None:
        self.bytes, self.length = torch.frombuffer(bytearray(text), dtype=torch.uint8), length

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.length

    def __getitem__(self, index: int) -> Tensor:
        return self.bytes[index * self.length : (index + 1) * self.length + 1].long()


class Manual(pl.LightningDataModule):
    """The texts that Python's help() shows: 0.5 MB, a tenth of them for validation."""

    def __init__(self, length: int = 256, batch_size: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        text = "\n".join(topics.values()).encode()
        cut = len(text) * 9 // 10
        self.train, self.validation = Windows(text[:cut], length), Windows(text[cut:], length)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.train, self.hparams["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.validation, self.hparams["batch_size"])


class Decoder(nn.Module):
    """The logits (N, L, 256) of what follows each byte of a text (N, L)."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        heads = max(1, width // 64)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device)
        found = self.embedding(text) + self.position(places)
        later = nn.Transformer.generate_square_subsequent_mask(text.shape[1], device=text.device)
        for block in self.blocks:
            found = block(found, src_mask=later, is_causal=True)
        logits: Tensor = self.head(found)
        return logits


class Transformer(pl.LightningModule):
    """10.9 million weights as it is, and 85 million with `width=768, layers=12`."""

    def __init__(self, width: int = 384, layers: int = 6, length: int = 256, lr: float = 3e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Decoder(width, layers, length)

    def configure_model(self) -> None:
        """Shards each block, then the rest. Lightning calls it for each task, and in one process there is no mesh."""
        if self.device_mesh is None or isinstance(self.net, FSDPModule):
            return
        for part in (*self.net.blocks, self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def loss(self, windows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net(windows[:, :-1]).transpose(1, 2), windows[:, 1:])

    def training_step(self, windows: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(windows)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, windows: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(windows))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), self.hparams["lr"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a language model in shards.")
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--use-gpu", action="store_true")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=256, help="bytes that are seen at once")
    parser.add_argument("--batch-size", type=int, default=16, help="of all workers together")
    parser.add_argument("--max-epochs", type=int, default=5)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--storage-path", default="runs", help="a folder or URI")
    options = parser.parse_args()
    trainer = Trainer(
        num_workers=options.num_workers,
        use_gpu=options.use_gpu,
        strategy=ModelParallelStrategy(),
        max_epochs=options.max_epochs,
        max_steps=options.max_steps,
        storage_path=options.storage_path,
    )
    trainer.fit(Transformer(options.width, options.layers, options.length), Manual(options.length, options.batch_size))


if __name__ == "__main__":
    main()
