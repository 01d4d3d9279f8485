"""The loaders that Lightning trains and evaluates with: the user's, shared out among the workers."""

import copy
import io
import pickle
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.data import sized_len
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback
from pytorch_lightning.utilities import CombinedLoader
from pytorch_lightning.utilities.data import extract_batch_size
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from ray_mnist.errors import RequestError
from ray_mnist.sharing import (
    Collated,
    Deal,
    Drawn,
    IndexShares,
    Place,
    Stream,
    WorkerStart,
    deal_out,
    draw_from,
    split,
    split_all,
)

Turns = tuple[int, int | None, int]


class Loader:
    """A loader whose place in the training is Lightning's: it begins where the run stands, in a resumed epoch too.

    What is drawn on the way to a batch is a function of the seed and the batch's place in the training. Attributes
    that are not its own are those of the user's `loader`.

    Args:
        loader: any iterable over batches.
        seed: of all that is drawn.
        position: gives the epoch, counted from 0, and the batch to begin with.
        number: tells several loaders of a model apart, which then do not draw the same.
        training: whether it is trained on. Lightning then goes through it again within an epoch where another loader
            is longer, and `weights` are kept.
        turns: which of the batches are handed out, as (first, stop, step).
    """

    def __init__(
        self,
        loader: Any,
        seed: int,
        position: Callable[[], tuple[int, int]],
        number: int = 0,
        training: bool = False,
        turns: Turns = (0, None, 1),
    ) -> None:
        self.loader, self.seed, self.position, self.turns = loader, seed, position, turns
        self.training, self.draws = training, (seed, number)
        self.source = loader  # what is iterated over
        self.place: Place = (0, 0)
        self.start = 0  # the batch that the next time through begins with
        self.ended = False
        self.samples = 0  # handed out so far; of an evaluation, those of this one
        self.batch = 0  # the next one's number in the epoch
        self.weights: dict[int, float] = {}  # of the epoch's batches not yet trained on, by their numbers

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # which a copy in the making does not have yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    @property
    def _iterator(self) -> Any:
        """The persistent loader workers, which Lightning ends when it is done with them."""
        return getattr(self.source, "_iterator", None)

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        if isinstance(self.source, DataLoader):
            self.source._iterator = iterator

    def __len__(self) -> int:
        return length_of(self.turns, len(self.loader))

    def __iter__(self) -> Iterator[Any]:
        epoch, batch = self.position()
        if not self.training:
            self.samples = 0
        if not (self.training and self.ended and epoch == self.place[0]):
            self.place, self.start, self.batch = (epoch, 0), batch, batch
        self.ended = False
        draw_from(self.draws, *self.place)
        first, batches = self._begin()
        for number in count(first):
            draw_from(self.draws, *self.place, number)
            found = next(batches, None)
            if found is None:
                break
            if number < self.start:
                continue
            samples, weight, batch = found
            self.samples += samples
            if self.training:
                self.weights[self.batch] = weight
            self.batch += 1
            yield batch
        self._end()

    def _begin(self) -> tuple[int, Iterator[tuple[int, float, Any]]]:
        """The batches, with the number of the first of them; those before `start` do not count."""
        return 0, ((size_of(batch), 1.0, batch) for batch in islice(self.source, *self.turns))

    def _end(self) -> None:
        """Gets ready for another time through in this epoch, of which a resumed run has some behind it."""
        size = sized_len(self) if self.start else None
        behind, self.start = divmod(self.start - size, size) if size and self.start > size else (0, 0)
        self.place, self.ended = (self.place[0], self.place[1] + 1 + behind), True

    def state_dict(self) -> dict[str, Any]:
        """What cuts an epoch up into batches. Where in the epoch the run stands is for Lightning to keep."""
        return {"batch_size": getattr(self.loader, "batch_size", None), "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compares.

        Raises:
            RequestError: the run resumes inside an epoch that it would now cut up differently.
        """
        for name, now in self.state_dict().items():
            if now != state.get(name, now) and self.position()[1]:
                raise RequestError(
                    f"The checkpoint was taken inside an epoch with {name} {state[name]}, which {name} {now} would "
                    "cut up differently: resume with the same value."
                )


class SharedLoader(Loader):
    """Hands out this rank's share of each batch of a DataLoader.

    Args:
        deal: which part of the batches is this rank's.
        length: how many shares there are where the user's loader has so many batches; None has them counted.
        **place: as for `Loader`.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        seed: int,
        position: Callable[[], tuple[int, int]],
        deal: Deal,
        length: Callable[[int], int] | None,
        **place: Any,
    ) -> None:
        super().__init__(loader, seed, position, **place)
        self.length = length
        # A copy has the user's class and arguments; what guards its attributes is meant for a loader in use.
        self.source = copy.copy(loader)
        self.source.worker_init_fn = WorkerStart(loader.worker_init_fn)
        # Shares and batches go in step, and the copy has loader workers of its own.
        vars(self.source).update(in_order=True, _iterator=None)
        self.shares: IndexShares | Stream
        if isinstance(loader.dataset, IterableDataset):
            self.shares = Stream(loader, deal, self.draws)
            vars(self.source).update(dataset=self.shares, batch_size=None, batch_sampler=None)
            self.source.collate_fn = Collated(loader.collate_fn)
        else:
            own: Any = loader.batch_sampler
            self.shares = IndexShares(own, deal, self.draws)
            # Lightning's sampler for prediction tells writers which samples a batch is made of.
            sampler = type(own)(self.shares) if hasattr(own, "seen_batch_indices") else self.shares
            vars(self.source).update(dataset=Drawn(loader.dataset, self.draws), batch_sampler=sampler)
            self.batch_sampler = sampler

    def __len__(self) -> int:
        size = len(self.loader)  # a TypeError for one that is without end
        if self.length:
            return self.length(size)
        assert isinstance(self.shares, IndexShares)
        return sum(1 for _ in self.shares.shares())

    def _begin(self) -> tuple[int, Iterator[tuple[int, float, Any]]]:
        if isinstance(self.shares, Stream):
            self.shares.begin(self.place)
            return 0, iter(self.source)
        self.shares.begin(self.place, self.start)
        drawn = self.shares.drawn
        # zip would take a batch's share before the batch, when it may not have been drawn.
        batches = ((share.samples, share.weight, batch) for batch in iter(self.source) for share in [drawn.popleft()])
        return self.start, batches


def length_of(turns: Turns, batches: int) -> int:
    """How many of so many batches are handed out."""
    return len(range(*slice(*turns).indices(batches)))


def size_of(batch: Any) -> int:
    """How many samples are in a batch; 0 where Lightning cannot tell."""
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:
        return 0


def share_out(trainer: pl.Trainer, seed: int, untouched: bool) -> None:
    """Has each of the trainer's loaders shared out among its workers, or left `untouched` but for where it begins."""
    strategy: Any = trainer.strategy
    process, limit = strategy.process_dataloader, trainer.limit_predict_batches
    trainer.limit_predict_batches = 1.0  # the limit is for all workers together, and kept here
    seen: Counter[Any] = Counter()

    def process_shared(loader: Any) -> Any:
        where = trainer.state.stage, trainer.current_epoch  # so that reloaded loaders have the numbers they had
        seen[where] += 1
        return process(shared(trainer, loader, seed, untouched, limit, seen[where] - 1))

    strategy.process_dataloader = process_shared


def shared(trainer: pl.Trainer, loader: Any, seed: int, untouched: bool, limit: int | float, number: int = 0) -> Loader:
    """What this rank has of `loader`, the `number`th of its kind.

    Raises:
        RequestError: it cannot be shared out.
    """
    rank, world_size, training = trainer.global_rank, trainer.world_size, trainer.training
    loader = loader.loader if isinstance(loader, Loader) else loader  # of an earlier trainer, in a CombinedLoader

    def position() -> tuple[int, int]:
        return place_in_training(trainer) if training else (trainer.current_epoch, 0)

    place: dict[str, Any] = {"seed": seed, "position": position, "number": number, "training": training}
    turns: Turns = (0, None, 1)
    if trainer.predicting:
        turns = (0, limit if isinstance(limit, int) else share_of(limit, loader), 1)
    batched = isinstance(loader, DataLoader) and (loader.batch_sampler is not None or loader.batch_size is not None)
    stream = batched and isinstance(loader.dataset, IterableDataset)
    if untouched or is_distributed(loader) or (stream and not same_on_all_ranks(loader.dataset, world_size, seed)):
        return Loader(loader, turns=turns, **place)  # the user's own code has shared it out
    if trainer.predicting:
        turns = (rank, turns[1], world_size)
        if stream or not batched:
            return Loader(loader, turns=turns, **place)
        deal: Deal = partial(deal_out, turns=turns)
        return SharedLoader(loader, deal=deal, length=partial(length_of, turns), **place)
    if not batched:
        if world_size == 1:
            return Loader(loader, **place)
        raise RequestError(
            f"{describe(loader)} hands out finished batches, which {world_size} workers cannot share: use a DataLoader "
            "with a batch_size, or share the data out yourself and give Trainer use_distributed_sampler=False."
        )
    if training and loader.batch_size and loader.batch_size < world_size:
        raise RequestError(
            f"batch_size={loader.batch_size} is the batch over all workers, and {world_size} workers cannot share it: "
            f"use at least {world_size}."
        )
    deal = partial(split if training else split_all, rank=rank, world_size=world_size)
    return SharedLoader(loader, deal=deal, length=int if training or stream or world_size == 1 else None, **place)


def is_distributed(loader: Any) -> bool:
    """Whether the user's own sampler gives each rank a share."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return any(isinstance(getattr(each, "sampler", None), DistributedSampler) for each in (loader, batch_sampler))


def share_of(limit: float, loader: Any) -> int | None:
    """So many batches are the part `limit` of the loader's; None where that is all of them."""
    return None if limit == 1.0 else int(len(loader) * limit)


def describe(loader: Any) -> str:
    """Such as `A DataLoader with batch_size=None`."""
    return f"A {type(loader).__name__}{' with batch_size=None' if isinstance(loader, DataLoader) else ''}"


def same_on_all_ranks(stream: IterableDataset[Any], world_size: int, seed: int) -> bool:
    """Whether all ranks get the same samples from the stream, which then has not been shared out yet."""
    if world_size == 1:
        return True
    with isolate_rng(include_cuda=False):
        draw_from(seed)
        first = io.BytesIO()
        ByValue(first).dump(list(islice(stream, 2 * world_size)))
    found: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(found, zlib.crc32(first.getvalue()))
    return len(set(found)) == 1


class ByValue(pickle.Pickler):
    """Pickles equal tensors to equal bytes: pickle's own have addresses in them, and what they are only a part of."""

    def reducer_override(self, obj: Any) -> Any:
        """A tensor's values, wherever in a sample it is."""
        return (torch.tensor, (obj.tolist(),)) if isinstance(obj, torch.Tensor) else NotImplemented


def place_in_training(trainer: pl.Trainer) -> tuple[int, int]:
    """The epoch, counted from 0, and the batch that the run stands at."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return epoch.processed, batch.processed if epoch.ready > epoch.processed else 0


def own_loaders(loaders: Any) -> list[Loader]:
    """Those in one of the trainer's `train_dataloader`, `val_dataloaders` and so on."""
    return [loader for loader in CombinedLoader(loaders).flattened if isinstance(loader, Loader)]


def handed_out(loaders: Any) -> int:
    """How many samples this rank has had of them: in the training so far, or in this evaluation."""
    return sum(loader.samples for loader in own_loaders(loaders))


class Balance(Callback):
    """Weighs this rank's loss by its share of the global batch, where shares are not equal.

    The mean of the workers' gradients, each of a mean over a share, is then the gradient of the mean over the batch.
    """

    weight = 1.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Looks up the batch's weight."""
        found = [loader.weights.pop(batch_idx, None) for loader in own_loaders(trainer.train_dataloader)]
        weights = [weight for weight in found if weight is not None]
        self.weight = sum(weights) / len(weights) if weights else 1.0

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Has the gradient weighed as it sets out from the loss."""
        if self.weight != 1.0:
            loss.register_hook(lambda gradient: gradient * self.weight)
