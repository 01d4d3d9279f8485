"""Lightning in 15 minutes: the autoencoder, of scikit-learn's digits."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn, optim, utils

L.seed_everything(42)

# define any number of nn.Modules (or use your current ones)
encoder = nn.Sequential(nn.Linear(8 * 8, 64), nn.ReLU(), nn.Linear(64, 3))
decoder = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 8 * 8))


# define the LightningModule
class LitAutoEncoder(L.LightningModule):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def training_step(self, batch, batch_idx):
        # training_step defines the train loop. It is independent of forward
        x, _ = batch
        x = x.view(x.size(0), -1)
        z = self.encoder(x)
        x_hat = self.decoder(z)
        loss = nn.functional.mse_loss(x_hat, x)
        # Logging to TensorBoard (if installed) by default
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return optim.Adam(self.parameters(), lr=1e-3)


# init the autoencoder
autoencoder = LitAutoEncoder(encoder, decoder)

# setup data
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32) / 16
dataset = utils.data.TensorDataset(images, torch.tensor(digits.target))
train_loader = utils.data.DataLoader(dataset, batch_size=25)

# train the model (hint: here are some helpful Trainer arguments for rapid idea iteration)
trainer = L.Trainer(limit_train_batches=20, max_epochs=1)
trainer.fit(model=autoencoder, train_dataloaders=train_loader)

torch.save(autoencoder.state_dict(), "weights.pt")
