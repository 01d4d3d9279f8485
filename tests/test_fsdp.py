"""exp"""
from pathlib import Path
import pytest, torch
import pytorch_lightning as pl
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset
from ray_mnist import Trainer
from ray_mnist.run.records import read_metrics
from ray_mnist.run.folder import RunFolder
pytestmark = pytest.mark.timeout(200)

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 33), nn.ReLU(), nn.Linear(33, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))
    def configure_model(self):
        if self.device_mesh is None or isinstance(self.net, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)
    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)
    def training_step(self, batch, i):
        l = self.loss(batch); self.log("train_loss", l, on_epoch=True, on_step=False); return l
    def validation_step(self, batch, i):
        self.log("val_loss", self.loss(batch))
    def test_step(self, batch, i):
        self.log("test_loss", self.loss(batch))
    def predict_step(self, batch, i):
        return self.net(batch[0])
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

def loader(n=50, b=8, shuffle=True):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 8, generator=g)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=b, shuffle=shuffle)

def fit(path, workers, name, **more):
    t = Trainer(num_workers=workers, storage_path=str(path), name=name, logger=False, **({"max_epochs": 2, "gradient_clip_val": 1.0}|more))
    m = Net()
    t.fit(m, loader(), loader(shuffle=False))
    return t, m

@pytest.mark.parametrize("workers", [2])
def test_x(gloo, tmp_path, workers):
    a, ma = fit(tmp_path, workers, "ddp")
    b, mb = fit(tmp_path, workers, "full", strategy=ModelParallelStrategy(save_distributed_checkpoint=False), checkpoint_every_n_steps=3)
    for n in ("ddp", "full"):
        print(n, [(r["train_loss"], r["val_loss"]) for r in read_metrics(RunFolder(str(tmp_path), n))])
    for (k, v), w in zip(ma.state_dict().items(), mb.state_dict().values()):
        print(k, (v - w).abs().max())
    print(b.test(mb, loader(shuffle=False)))
    print(b.predict(mb, loader(32, shuffle=False))[0][:2])
    assert 0

class Plain(Net):
    configure_model = pl.LightningModule.configure_model

@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_ray(gloo, tmp_path, kind):
    from ray.train.lightning import RayFSDPStrategy
    t = Trainer(num_workers=2, storage_path=str(tmp_path), name="a", logger=False, max_epochs=2, checkpoint_every_n_steps=3, strategy=RayFSDPStrategy(state_dict_type=kind))
    m = Plain()
    t.fit(m, loader(), loader(shuffle=False))
    import subprocess
    print(subprocess.run(["find", str(tmp_path)], capture_output=True, text=True).stdout)
    print([(r["train_loss"], r["val_loss"]) for r in read_metrics(RunFolder(str(tmp_path), "a"))])
    assert 0
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_sharded(gloo, tmp_path, kind):
    b, mb = fit(tmp_path, 2, "full", strategy=ModelParallelStrategy(), checkpoint_every_n_steps=3)
    assert 0
