"""The loaders that Lightning trains with: shared out, begun where the run stands, and otherwise the user's own."""

import copy
import multiprocessing
import os
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.utilities import CombinedLoader
from ranks import on_ranks
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from ray_mnist import Trainer
from ray_mnist.distributed import samples as fetching
from ray_mnist.distributed.draws import SameDraws, compare_draws
from ray_mnist.distributed.inspection import watching_for_the_rank
from ray_mnist.distributed.loaders import ResumableLoader, ShardedLoader, resumable_loaders, samples_seen
from ray_mnist.distributed.shard_loader import shard_loader, training_position
from ray_mnist.distributed.shard_rules import interleave, shard_evaluation, shard_training
from ray_mnist.distributed.strategy import shard_loaders
from ray_mnist.distributed.weighting import LossWeighting
from ray_mnist.errors import RequestError, TrainingError

pytestmark = [
    # What Lightning and torch say of small machines and small data.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SIZE, BATCH = 47, 8
FORK = multiprocessing.get_context("fork")


def draws() -> tuple[float, float, float]:
    """What the next draw of each kind is."""
    return torch.rand(()).item(), np.random.rand(), random.random()


class Noisy(Dataset[Any]):
    """Each sample is its index and what it draws."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return index, *draws()


class Jittered(IterableDataset[Any]):
    """The same as a stream, which the processes of a loader have shared out among them."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return ((number, *draws()) for number in range(first, SIZE, step))


def collate(samples: list[Any]) -> tuple[list[Any], tuple[float, ...]]:
    """The samples as they are, and what the collating draws."""
    return list(samples), draws()


def weighted() -> WeightedRandomSampler:
    return WeightedRandomSampler([1.0] * 3 + [0.1] * 44, SIZE)


LOADERS: dict[str, Callable[..., DataLoader[Any]]] = {
    "map-style": lambda **more: DataLoader(Noisy(), BATCH, shuffle=True, **more),
    "a generator of the user's": lambda **more: DataLoader(
        Noisy(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(5), **more
    ),
    "weighted": lambda **more: DataLoader(Noisy(), BATCH, sampler=weighted(), **more),
    "a batch sampler": lambda **more: DataLoader(
        Noisy(), batch_sampler=BatchSampler(weighted(), BATCH, drop_last=True), **more
    ),
    "stream": lambda **more: DataLoader(Jittered(), BATCH, **more),
    "stream of full batches": lambda **more: DataLoader(Jittered(), BATCH, drop_last=True, **more),
}
FULL_BATCHES = ["a batch sampler", "stream of full batches"]
MAP_STYLE = ["map-style", "a generator of the user's", "weighted", "a batch sampler"]
PROCESSES: dict[str, dict[str, Any]] = {
    "in this process": {},
    "in two processes": {"num_workers": 2},
    "in persistent processes": {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 1},
}


class Position:
    """Where the training stands, as the test says."""

    def __init__(self, epoch: int = 0, batch: int = 0) -> None:
        self.epoch, self.batch = epoch, batch

    def __call__(self) -> tuple[int, int]:
        return self.epoch, self.batch


def share(
    loader: DataLoader[Any],
    rank: int = 0,
    world_size: int = 1,
    place: Callable[[], tuple[int, int]] | None = None,
    shard_batches: Any = shard_training,
    length: Any = int,
    seed: int = 0,
    number: int = 0,
) -> ShardedLoader:
    """One rank's share of a loader, as `shared` makes it for training."""
    shard_batches = partial(shard_batches, rank=rank, world_size=world_size)
    return ShardedLoader(
        loader, seed, place or Position(), shard_batches, length, number=number, training=True, weighing=True
    )


def samples_of(loader: ShardedLoader) -> list[list[Any]]:
    """What a rank has of each batch, without the samples that weigh nothing."""
    return [batch[0] if loader.weights[number] else [] for number, batch in enumerate(loader)]


def refusal(call: Callable[[], object]) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(RequestError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# The same at every world size


@pytest.mark.parametrize(
    ("processes", "world_size"),
    [*(("in this process", world_size) for world_size in range(1, 9)), ("in two processes", 3)],
)
@pytest.mark.parametrize("kind", LOADERS)
def test_the_ranks_together_have_the_batches_and_draws_of_one(kind: str, processes: str, world_size: int) -> None:
    options = PROCESSES[processes] | {"collate_fn": collate}
    ranks = []
    for rank in range(world_size):
        torch.manual_seed(rank)
        ranks.append(samples_of(share(LOADERS[kind](**options), rank, world_size, Position(epoch=3))))
    together = [sorted(chain(*shares)) for shares in zip(*ranks, strict=True)]
    # What a stream draws is a matter of the processes that it comes from.
    alone = options if kind not in MAP_STYLE else {"collate_fn": collate}
    assert together == [sorted(batch) for batch in samples_of(share(LOADERS[kind](**alone), place=Position(epoch=3)))]


# Going on where the run stands


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("kind", LOADERS)
def test_a_resumed_epoch_has_exactly_the_rest_of_the_undisturbed_one(kind: str, processes: str) -> None:
    options = PROCESSES[processes] | {"collate_fn": collate}
    place = Position()
    undisturbed = share(LOADERS[kind](**options), 1, 2, place)
    first = list(undisturbed)
    place.epoch = 1
    list(islice(undisturbed, 2))  # an epoch may be broken off
    place.epoch = 4  # and validation may leave out epochs
    whole = [(batch, draws()) for batch in undisturbed]
    weights = dict(undisturbed.weights)
    torch.manual_seed(99)
    np.random.seed(99)
    for start in (2, len(whole)):
        resumed = share(LOADERS[kind](**options), 1, 2, Position(4, start))
        assert [(batch, draws()) for batch in resumed] == whole[start:]
        assert resumed.weights == {number: weights[number] for number in range(start, len(whole))}
    assert whole[0][0] != first[0]
    # 3 of the last 7 samples are the second rank's.
    assert list(weights.values())[5:] == ([] if kind in FULL_BATCHES else [6 / 7])


@pytest.mark.parametrize("processes", ["in this process", "in two processes"])
@pytest.mark.parametrize(
    "loader",
    [
        lambda **more: DataLoader(Noisy(), BATCH, shuffle=True, **more),
        lambda **more: DataLoader(Noisy(), None, shuffle=True, **more),
        lambda **more: DataLoader(Jittered(), BATCH, **more),
    ],
    ids=["batches", "samples", "stream"],
)
def test_a_loader_that_is_left_as_it_is_goes_on_where_the_run_stands_too(loader: Any, processes: str) -> None:
    more = PROCESSES[processes] | {"collate_fn": lambda samples: (samples, draws())}
    whole = [(batch, draws()) for batch in ResumableLoader(loader(**more), 0, Position(2))]
    torch.manual_seed(99)
    random.seed(99)
    assert [(batch, draws()) for batch in ResumableLoader(loader(**more), 0, Position(2, 3))] == whole[3:]
    assert next(iter(ResumableLoader(loader(**more), 0, Position(3)))) != whole[0][0]


def test_a_loader_used_before_has_processes_of_its_own_for_the_training() -> None:
    loader = DataLoader(Noisy(), BATCH, **PROCESSES["in persistent processes"], collate_fn=collate)
    next(iter(loader))
    assert samples_of(share(loader)) == samples_of(share(DataLoader(Noisy(), BATCH, collate_fn=collate)))


class Handshake(Dataset[int]):
    """Its first sample can be had only once its last one was."""

    def __init__(self) -> None:
        self.last = FORK.Event()

    def __getitem__(self, index: int) -> int:
        if index:
            self.last.set()
        else:
            assert self.last.wait(240)
        return index

    def __len__(self) -> int:
        return 2


def test_batches_come_in_their_order_even_if_the_loader_would_take_any() -> None:
    options: dict[str, Any] = {"num_workers": 2, "in_order": False, "multiprocessing_context": FORK}
    assert [batch.item() for batch in share(DataLoader(Handshake(), **options))] == [0, 1]


def test_another_loader_of_the_same_model_draws_something_else() -> None:
    one, other = (samples_of(share(LOADERS["map-style"](collate_fn=collate), number=number)) for number in (0, 1))
    assert [index for index, *_ in one[0]] != [index for index, *_ in other[0]]
    streams = [samples_of(share(LOADERS["stream"](collate_fn=collate), number=number)) for number in (0, 1)]
    assert streams[0] != streams[1]


@pytest.mark.parametrize(
    ("batch_size", "seed", "complaint"),
    [
        (48, 0, "with batch_size 8, which batch_size 48 would cut up differently: resume with the same value."),
        (BATCH, 1, "with seed 0, which seed 1 would cut up differently: resume with the same value."),
    ],
)
def test_another_batch_size_or_seed_is_refused_inside_an_epoch_only(batch_size: int, seed: int, complaint: str) -> None:
    state = pickle.loads(pickle.dumps(share(DataLoader(Noisy(), BATCH)).state_dict()))
    for other in (
        share(DataLoader(Noisy(), batch_size), place=Position(3, 5), seed=seed),
        ResumableLoader(DataLoader(Noisy(), batch_size), seed, Position(3, 5)),
    ):
        assert refusal(lambda other=other: other.load_state_dict(state)) == (
            f"The checkpoint was taken inside an epoch {complaint}"
        )
    share(DataLoader(Noisy(), batch_size), place=Position(3, 0), seed=seed).load_state_dict(state)
    share(DataLoader(Noisy(), BATCH), place=Position(3, 5)).load_state_dict(state)
    share(DataLoader(Noisy(), BATCH), place=Position(3, 5)).load_state_dict({"of": "a loader of another make"})


# What is the user's own


class OwnLoader(DataLoader[Any]):
    """A loader with a class, attributes and a way to go through it of its own."""

    def __init__(self, *arguments: Any, flavour: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.flavour = flavour

    def __iter__(self) -> Any:
        return ((self.flavour, batch) for batch in super().__iter__())


def test_a_loader_of_the_users_own_class_keeps_what_is_its_own() -> None:
    loader = OwnLoader(Noisy(), BATCH, flavour="sweet", collate_fn=lambda samples: [index for index, *_ in samples])
    half = share(loader, 1, 2)
    assert list(half) == [("sweet", list(range(start + 1, min(start + 8, SIZE), 2))) for start in range(0, SIZE, 8)]
    assert (half.flavour, half.batch_size, half.dataset) == ("sweet", BATCH, loader.dataset)
    assert not hasattr(half, "no_such_thing")
    assert copy.copy(half).flavour == "sweet"
    # The user's loader is none the wiser.
    assert [len(batch) for _, batch in loader] == [8, 8, 8, 8, 8, 7]


@pytest.mark.parametrize(
    ("dataset", "collate_fn"),
    [(TensorDataset(torch.arange(SIZE)), None), (range(SIZE), lambda samples: [torch.tensor(samples)])],
)
def test_samples_are_collated_as_ever(dataset: Any, collate_fn: Any) -> None:
    batches = list(share(DataLoader(dataset, BATCH, collate_fn=collate_fn)))
    assert [part.tolist() for batch in batches for part in batch] == [
        list(range(start, min(start + 8, SIZE))) for start in range(0, SIZE, 8)
    ]


class Opened(Dataset[Any]):
    """Works only where a loader's process has been begun with the user's function."""

    offset: int

    def __getitem__(self, index: int) -> int:
        return self.offset + index

    def __len__(self) -> int:
        return 2


class OpenedStream(Opened, IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter([self.offset, self.offset + 1])


def open_it(worker_id: int) -> None:
    worker = get_worker_info()
    assert worker is not None
    worker.dataset.offset = 10 * (worker_id + 1)


@pytest.mark.parametrize(("dataset", "expected"), [(Opened(), [10, 21]), (OpenedStream(), [10, 20, 11, 21])])
def test_a_worker_init_fn_finds_the_users_data_set(dataset: Any, expected: list[int]) -> None:
    loader = DataLoader(dataset, num_workers=2, worker_init_fn=open_it)
    assert [batch.item() for batch in share(loader)] == expected == [batch.item() for batch in loader]


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_what_was_handed_out_is_counted_in_samples(kind: str, world_size: int) -> None:
    ranks = [share(LOADERS[kind](collate_fn=collate), rank, world_size) for rank in range(world_size)]
    for times in (1, 2):
        for rank in ranks:
            list(rank)
        counted = SIZE // BATCH * BATCH if kind in FULL_BATCHES else SIZE
        assert samples_seen(ranks) == times * counted
    assert resumable_loaders({"some": ranks, "other": [range(3)]}) == ranks


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("batch_size", [1, 3, 8, 50])
def test_evaluation_is_as_long_as_it_says(batch_size: int, world_size: int) -> None:
    length = None if world_size > 1 else int
    ranks = [
        share(
            DataLoader(Noisy(), batch_size, collate_fn=collate),
            rank,
            world_size,
            shard_batches=shard_evaluation,
            length=length,
        )
        for rank in range(world_size)
    ]
    batches = [list(rank) for rank in ranks]
    assert [len(rank) for rank in ranks] == [len(each) for each in batches]
    indices = [index for each in batches for samples, _ in each for index, *_ in samples]
    assert sorted(indices) == list(range(SIZE))


def test_asking_for_the_length_does_not_disturb() -> None:
    rank, other = (
        share(LOADERS["map-style"](collate_fn=collate), 1, 2, shard_batches=shard_evaluation, length=None) for _ in "ab"
    )
    whole = samples_of(other)
    found = []
    for samples, _ in rank:
        state = torch.get_rng_state(), random.getstate()
        assert len(rank) == len(whole)
        assert torch.equal(torch.get_rng_state(), state[0])
        assert random.getstate() == state[1]
        found.append(samples)
    assert found == whole
    assert rank.samples == SIZE // 2


def test_a_stream_or_sampler_without_end_has_no_length() -> None:
    batches = DataLoader(Noisy(), batch_sampler=(range(2) for _ in range(3)))
    for loader in (LOADERS["stream"](), batches):
        for length in (int, None):
            with pytest.raises(TypeError):
                len(share(loader, length=length))


@pytest.mark.parametrize("loader", [lambda: DataLoader(Noisy(), 1), lambda: [1, 2, 3]])
@pytest.mark.parametrize("task", ["validating", "testing", "predicting"])
def test_evaluating_keeps_no_weights(loader: Callable[[], Any], task: str) -> None:
    once = given(loader(), 0, 1, task)
    assert [sum(1 for _ in once) for _ in range(3)] == [len(once)] * 3
    assert not once.weights


# Rows of tensors


ROWS = TensorDataset(torch.arange(SIZE), torch.rand(SIZE, 2, 3), torch.zeros(SIZE, dtype=torch.uint8))
OF_TENSORS = {
    "all rows": ROWS,
    "a part": Subset(ROWS, range(5, SIZE)),
    "a part, counted from the end": Subset(ROWS, [-1, -SIZE, 3, 9, 4]),
    "a part of a part": Subset(Subset(ROWS, [*range(40)]), [*range(1, 30, 2)]),
    "one tensor": TensorDataset(torch.rand(SIZE, 4)),
}


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"collate_fn": list}], ids=str)
@pytest.mark.parametrize("data", OF_TENSORS.values(), ids=OF_TENSORS)
def test_rows_of_tensors_are_what_they_would_be_one_by_one(
    data: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so is what is drawn after them, in this process."""

    def seen() -> list[Any]:
        loader = share(DataLoader(data, 4, shuffle=True, **options), 1, 2)
        return [(batch, torch.rand(())) for batch in loader]

    fetched = seen()
    monkeypatch.setattr(fetching, "holds_tensors", lambda _: False)
    one_by_one = seen()
    torch.testing.assert_close(fetched, one_by_one, rtol=0, atol=0)
    assert {type(batch) for batch, _ in fetched} == {list}


def test_rows_of_tensors_are_not_seeded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[object] = []
    monkeypatch.setattr(fetching, "seed_generators", lambda *state: seeds.append(state))
    list(share(DataLoader(ROWS, 10)))
    assert len(seeds) == -(-SIZE // 10)


def test_what_may_be_more_than_rows_of_tensors_is_fetched_one_by_one() -> None:
    class Own(TensorDataset):
        """With a `__getitem__` that may draw."""

    class Part(Subset[Any]):
        """Likewise."""

    for data in (Own(torch.zeros(3)), Part(ROWS, [1, 2]), Subset(Own(torch.zeros(3)), [1]), Noisy()):
        assert not fetching.holds_tensors(data)
    sparse = TensorDataset(torch.eye(3).to_sparse())
    assert not fetching.collates_rows(DataLoader(sparse))
    assert not fetching.collates_rows(DataLoader(ROWS, collate_fn=list))
    with pytest.raises(IndexError):
        fetching.rows(ROWS, [SIZE])
    with pytest.raises(IndexError):
        fetching.rows(ROWS, [-SIZE - 1])


# The loss


@pytest.mark.parametrize("world_size", range(1, 9))
def test_the_mean_of_the_workers_gradients_is_that_of_the_global_batch(world_size: int) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(SIZE, 3, dtype=torch.float64), torch.randn(SIZE, 1, dtype=torch.float64))
    model = nn.Linear(3, 1, dtype=torch.float64)

    def gradients(world_size: int) -> list[list[Tensor]]:
        found = []
        for rank in range(world_size):
            loader, weighting = share(DataLoader(data, BATCH + 1, shuffle=True), rank, world_size), LossWeighting()
            trainer: Any = SimpleNamespace(train_dataloader={"only": loader})
            module: Any = model
            for number, (inputs, targets) in enumerate(loader):
                model.zero_grad()
                weighting.on_train_batch_start(trainer, module, None, number)
                loss = nn.functional.mse_loss(model(inputs), targets)
                weighting.on_before_backward(trainer, module, loss)
                loss.backward()
                weighting.on_after_backward(trainer, module)
                found.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
            assert not loader.weights
        batches = len(found) // world_size
        return [
            [torch.stack(parts).mean(0) for parts in zip(*found[number::batches], strict=True)]
            for number in range(batches)
        ]

    torch.testing.assert_close(gradients(world_size), gradients(1), rtol=1e-12, atol=1e-14)


def test_a_batch_that_is_fetched_ahead_or_left_out_does_not_shift_the_weights() -> None:
    loader = share(DataLoader(Noisy(), 10), 0, 3)  # of 10: 4, and of the last 7: 3
    weighting, module = LossWeighting(), None
    trainer: Any = SimpleNamespace(train_dataloader=loader)
    batches = iter(loader)
    weights = []
    next(batches)
    for number in range(5):
        next(batches, None)
        if number != 2:  # as where the batch is None, and Lightning calls no hook
            weighting.on_train_batch_start(trainer, module, None, number)  # type: ignore[arg-type]
            weights.append(weighting.weight)
    assert weights == [1.2, 1.2, 1.2, 9 / 7]


# What becomes of the loaders that a trainer is given


def stands(rank: int = 0, world_size: int = 1, task: str = "training", epoch: int = 0, batch: int = 0) -> Any:
    """As much of a trainer as tells where it stands."""
    return SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        training=task == "training",
        predicting=task == "predicting",
        current_epoch=epoch,
        global_step=0,
        strategy=None,
        fit_loop=SimpleNamespace(
            epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=epoch, ready=epoch + 1)),
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(processed=batch))),
        ),
    )


def given(loader: Any, *where: Any, presharded: bool = False, limit: int | float = 1.0, **more: Any) -> ResumableLoader:
    return shard_loader(stands(*where, **more), loader, 0, presharded, limit)


def test_the_place_is_the_batch_that_comes_next() -> None:
    trainer = stands(epoch=2, batch=5)
    assert training_position(trainer) == (2, 5)
    trainer.fit_loop.epoch_progress.current.ready = 2  # between epochs, with what is left of the one before
    assert training_position(trainer) == (2, 0)


@pytest.mark.parametrize("task", ["training", "validating", "testing"])
def test_the_ranks_of_a_trainer_have_every_sample_of_a_batch_once(task: str) -> None:
    ranks = [given(DataLoader(Noisy(), BATCH), rank, 3, task) for rank in range(3)]
    indices = [batch[0].tolist() for rank in ranks for batch in rank]
    assert sorted(chain(*indices)) == list(range(SIZE))
    assert {len(rank) for rank in ranks} == {6}
    assert len(indices) == 18


@pytest.mark.parametrize(("task", "lengths"), [("training", [2, 1]), ("validating", [2]), ("testing", [2])])
def test_training_keeps_to_its_batches_and_evaluation_joins_what_is_too_small(task: str, lengths: list[int]) -> None:
    for rank in (1, 2, 3):
        loader = given(DataLoader(range(9), 8), rank, 4, task)
        assert [len(batch) for batch in loader] == lengths
        assert loader.samples == 2


@pytest.mark.parametrize("kind", ["map-style", "stream"])
def test_training_begins_where_the_trainer_stands_and_evaluation_at_the_start(kind: str) -> None:
    whole = [batch for batch, _ in given(LOADERS[kind](collate_fn=collate), epoch=2)]
    assert [batch for batch, _ in given(LOADERS[kind](collate_fn=collate), epoch=2, batch=4)] == whole[4:]
    evaluated = [batch for batch, _ in given(LOADERS[kind](collate_fn=collate), 0, 1, "validating", epoch=2, batch=4)]
    assert evaluated == whole


@pytest.mark.parametrize("limit", [0, 1, 3, 5, 99, 0.5, 1.0])
@pytest.mark.parametrize("world_size", [1, 2, 4, 9])
@pytest.mark.parametrize(
    "loader",
    [lambda: DataLoader(range(SIZE), BATCH), lambda: DataLoader(range(6), None), lambda: [[1, 2], [3], [4], [5]]],
    ids=["batches", "samples", "list"],
)
def test_prediction_has_whole_batches_in_round_robin_up_to_the_limit(
    loader: Callable[[], Any], world_size: int, limit: int | float
) -> None:
    ranks = [given(loader(), rank, world_size, "predicting", limit=limit) for rank in range(world_size)]
    batches = [list(rank) for rank in ranks]
    count = len(loader())
    expected = list(loader())[: limit if isinstance(limit, int) else int(count * limit)]
    assert repr(interleave(batches)) == repr(expected)
    assert [len(rank) for rank in ranks] == [len(each) for each in batches]


FINISHED: dict[str, tuple[Callable[[], Any], str]] = {
    "batch_size=None": (lambda: DataLoader(range(3), batch_size=None), "A DataLoader with batch_size=None"),
    "own class": (
        lambda: OwnLoader(range(3), flavour="", batch_size=None),
        "A OwnLoader with batch_size=None",
    ),
    "list": (lambda: [0, 1, 2], "A list"),
    "range": (lambda: range(3), "A range"),
}


@pytest.mark.parametrize("task", ["training", "validating", "testing"])
@pytest.mark.parametrize(("loader", "name"), FINISHED.values(), ids=FINISHED)
def test_finished_batches_cannot_be_shared(loader: Callable[[], Any], name: str, task: str) -> None:
    assert refusal(lambda: given(loader(), 1, 2, task)) == (
        f"{name} hands out finished batches, which 2 workers cannot share: use a DataLoader with a batch_size, or "
        "share the data out yourself and give Trainer use_distributed_sampler=False."
    )
    for alone in (given(loader(), 0, 1, task), given(loader(), 1, 2, task, presharded=True)):
        assert [batch[1] if isinstance(batch, tuple) else batch for batch in alone] == [0, 1, 2]
        assert len(alone) == 3


@pytest.mark.parametrize("world_size", [9, 20])
def test_a_batch_smaller_than_the_world_is_refused_in_training_only(world_size: int) -> None:
    loader = DataLoader(Noisy(), BATCH)
    assert refusal(lambda: given(loader, 1, world_size)) == (
        f"batch_size=8 is the batch over all workers, and {world_size} workers cannot share it: use at least "
        f"{world_size}."
    )
    assert len(given(loader, 1, world_size, "testing")) == (3 if world_size == 9 else 2)
    assert len(given(loader, 1, 8)) == 6


@pytest.mark.parametrize("task", ["training", "validating", "predicting"])
@pytest.mark.parametrize(
    "loader",
    [
        lambda sampler: DataLoader(range(20), 5, sampler=sampler),
        lambda sampler: DataLoader(range(20), batch_sampler=BatchSampler(sampler, 5, drop_last=False)),
    ],
    ids=["sampler", "batch sampler"],
)
def test_what_the_user_has_shared_out_is_not_shared_again(loader: Any, task: str) -> None:
    sampler = DistributedSampler(range(20), num_replicas=2, rank=1, shuffle=False)
    found = [batch.tolist() for batch in given(loader(sampler), 1, 2, task)]
    assert found == [list(range(1, 10, 2)), list(range(11, 20, 2))]
    presharded = given(DataLoader(range(20), 5), 1, 2, task, presharded=True)
    assert [batch.tolist() for batch in presharded] == [list(range(start, start + 5)) for start in range(0, 20, 5)]


def test_a_limit_on_predictions_holds_for_what_is_left_untouched_too() -> None:
    alone = given(DataLoader(range(20), 5), 1, 2, "predicting", presharded=True, limit=3)
    assert [batch[0].item() for batch in alone] == [0, 5, 10]
    assert len(alone) == 3


def test_an_empty_batch_sampler_is_one_still() -> None:
    assert list(given(DataLoader(Noisy(), batch_sampler=[]), 1, 2)) == []


def test_a_loader_of_an_earlier_trainer_stands_where_the_new_one_stands() -> None:
    earlier = given(LOADERS["map-style"](collate_fn=collate), epoch=2, batch=4)
    again = given(earlier, epoch=1)
    assert list(again) == list(given(LOADERS["map-style"](collate_fn=collate), epoch=1))


# What the ranks draw


class Rows(IterableDataset[Tensor]):
    """Numbers in a row; only those of a rank where `ask` gives it."""

    def __init__(self, ask: Callable[[], Any] = lambda: None) -> None:
        self.ask = ask

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[Tensor]:
        rank = self.ask()
        return iter(torch.arange(20) if rank is None else torch.arange(int(rank), 20, 2))


ASKS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.distributed.get_rank(),
    "the environment": lambda: os.environ["RANK"],
    "the environment, with a default": lambda: os.environ.get("RANK", "0"),
    "Lightning": lambda: TorchElasticEnvironment().global_rank(),
}
TASKS = ("training", "validating", "predicting")


def numbers(stream: IterableDataset[Tensor], rank: int, task: str, **options: Any) -> list[int]:
    return sorted(chain(*[batch.tolist() for batch in given(DataLoader(stream, 4, **options), rank, 2, task)]))


@pytest.mark.parametrize("processes", ["in this process", "in one other", "in one other that persists"])
@pytest.mark.parametrize("ask", [*ASKS, None])
def test_a_stream_shares_itself_out_if_it_asks_for_its_rank(ask: str | None, processes: str) -> None:
    options = {
        "in this process": {},
        "in one other": {"num_workers": 1},
        "in one other that persists": {"num_workers": 1, "persistent_workers": True},
    }[processes]

    def work(rank: int) -> list[list[int]]:
        os.environ["RANK"] = str(rank)
        tracing = sys.gettrace()
        stream = Rows(ASKS[ask]) if ask else Rows()
        found = [numbers(stream, rank, task, **options) for task in TASKS]
        assert sys.gettrace() is tracing
        return found

    ranks = on_ranks(work)
    own = [list(range(rank, 20, 2)) for rank in range(2)]
    if ask:
        assert ranks == [[own[0]] * 3, [own[1]] * 3]
    else:
        assert ranks[0][:2] == [own[0]] * 2
        assert [sorted(found[0] + found[1]) for found in zip(*ranks, strict=True)] == [list(range(20))] * 3


def test_who_copies_the_environment_does_not_ask_for_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data does, in Ray Train's workers: each would take all of its stream for its own share."""
    monkeypatch.setenv("RANK", "0")
    with watching_for_the_rank() as asked:
        copies = [dict(os.environ), {**os.environ}, dict(os.environ.items()), os.environ.copy()]
    assert asked == []
    with watching_for_the_rank() as asked:
        copies += [dict(os.environ), {"RANK": os.environ["RANK"]}, dict(os.environ)]
    assert asked == ["RANK"]
    assert {copy["RANK"] for copy in copies} == {"0"}


class Shuffled(IterableDataset[Any]):
    """Numbers in an order that nobody seeds, or what a test makes of them."""

    def __init__(self, of: Callable[[int], Any] = int) -> None:
        self.of = of

    def __iter__(self) -> Iterator[Any]:
        return iter([self.of(number) for number in np.random.default_rng().permutation(1000)])


class Unseeded(Sampler[int]):
    """As its own generator has it."""

    def __init__(self) -> None:
        self.random = np.random.default_rng()

    def __iter__(self) -> Iterator[int]:
        return iter(self.random.permutation(1000).tolist())


class Slotted:
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError


def halves(number: int) -> Any:
    """A tensor that is a part of another, at an address of its own."""
    return {"number": torch.arange(100.0)[7:9], "more": [np.zeros(3), "text"]}


DIFFERENT = "give what shuffles it a seed, the same on all of them; where it shares the data out itself,"
DRAWS: dict[str, tuple[Callable[[], DataLoader[Any]], str]] = {
    "a stream without a seed": (
        lambda: DataLoader(Shuffled(), 4),
        f"The workers draw different samples from the stream Shuffled: {DIFFERENT} have it ask torch.distributed for "
        "its rank, or give Trainer use_distributed_sampler=False.",
    ),
    "a stream without a seed, from a process": (
        lambda: DataLoader(Shuffled(), 4, num_workers=1),
        f"The workers draw different samples from the stream Shuffled: {DIFFERENT} have it ask torch.distributed for "
        "its rank, or give Trainer use_distributed_sampler=False.",
    ),
    "a sampler without a seed": (
        lambda: DataLoader(range(1000), 4, sampler=Unseeded()),
        f"The workers draw different batches with a Unseeded: {DIFFERENT} give Trainer use_distributed_sampler=False.",
    ),
    "a generator without a seed": (
        lambda: DataLoader(range(1000), 4, shuffle=True, generator=generator_of_its_own()),
        f"The workers draw different batches with a RandomSampler: {DIFFERENT} give Trainer "
        "use_distributed_sampler=False.",
    ),
    "equal tensors at different addresses": (lambda: DataLoader(Shuffled(halves), 4), ""),
    "what cannot be pickled": (lambda: DataLoader(Shuffled(lambda _: Slotted()), 4, collate_fn=len), ""),
    "shuffled as Lightning seeds it": (lambda: DataLoader(range(1000), 4, shuffle=True), ""),
    "weighted": (lambda: DataLoader(Noisy(), 4, sampler=weighted()), ""),
    "shared out by a sampler": (
        lambda: DataLoader(range(1000), 4, sampler=DistributedSampler(range(1000), shuffle=False)),
        "",
    ),
}


def generator_of_its_own() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


@pytest.mark.parametrize("task", ["training", "validating"])
@pytest.mark.parametrize(("loader", "refused"), DRAWS.values(), ids=DRAWS)
def test_ranks_that_draw_different_batches_are_refused(
    loader: Callable[[], DataLoader[Any]], refused: str, task: str
) -> None:
    def work(rank: int) -> str:
        trainer = stands(rank, 2, task)
        torch.manual_seed(rank)
        mine = given(loader(), rank, 2, task)
        compare_draws(trainer, mine)  # before anything was drawn
        next(iter(mine))
        state = torch.get_rng_state()
        try:
            compare_draws(trainer, mine)
        except RequestError as error:
            return str(error)
        assert torch.equal(torch.get_rng_state(), state)
        return ""

    assert on_ranks(work) == [refused] * 2


def test_ranks_that_come_to_differ_in_mid_training_leave_the_run_as_it_is() -> None:
    def work(rank: int) -> None:
        mine = given(DataLoader(Shuffled(), 4), rank, 2)
        next(iter(mine))
        trainer = stands(rank, 2)
        trainer.global_step = 1
        compare_draws(trainer, mine)

    assert [type(error) for error in on_ranks(work)] == [TrainingError] * 2


def test_draws_are_compared_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Any] = []
    monkeypatch.setattr("ray_mnist.distributed.draws.compare_draws", lambda _, loaders: compared.append(loaders))
    trainer: Any = SimpleNamespace(train_dataloader="train", val_dataloaders="val", test_dataloaders="test")
    draws, module = SameDraws(), None
    draws.on_train_start(trainer, module)  # type: ignore[arg-type]
    for _ in range(2):
        draws.on_train_epoch_start(trainer, module)  # type: ignore[arg-type]
        for number in range(3):
            draws.on_train_batch_start(trainer, module, None, number)
    for number in range(3):
        draws.on_validation_batch_start(trainer, module, None, number)
        draws.on_test_batch_start(trainer, module, None, number, 0)
    assert compared == ["train", "train", "val", "test"]


# With Lightning


class Seen(pl.LightningModule):
    """Keeps what it trains on and what could be drawn for it, on the way to the device too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.steps: list[Any] = []
        self.validated: list[Any] = []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch, draws()

    def training_step(self, batch: Any) -> Tensor:
        self.steps.append(batch)
        return self.weight

    def validation_step(self, batch: Any) -> None:
        self.validated.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Checkpoints(pl.Callback):
    """One after each step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


class Loaders(pl.LightningDataModule):
    """Made anew whenever Lightning asks for them."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.train_dataloader = make


def fit(
    loaders: Callable[[], Any],
    folder: Path,
    start: int | None = None,
    val: Any = None,
    presharded: bool = False,
    **options: Any,
) -> Seen:
    """What a model has seen after two epochs, or after what is left of them at step `start`."""
    model = Seen()
    trainer = pl.Trainer(
        **{
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "callbacks": [LossWeighting(), *([] if start else [Checkpoints(folder)])],
        }
        | options
    )
    shard_loaders(trainer, 0, presharded)
    path = folder / f"{start}.ckpt" if start else None
    if val is None:
        trainer.fit(model, datamodule=Loaders(loaders), ckpt_path=path, weights_only=False)
    else:
        trainer.fit(model, loaders(), val, ckpt_path=path, weights_only=False)
    for loader in resumable_loaders(trainer.train_dataloader):
        assert len(loader.weights) <= 1  # of the batch that was fetched ahead
    return model


def several(*kinds: str, mode: Any = "max_size_cycle") -> CombinedLoader:
    """Two short loaders of 3 batches and a long one of 7."""
    map_style = [DataLoader(Noisy(size), 2, shuffle=True, collate_fn=collate) for size in (6, 6, 13)]
    return CombinedLoader([*([LOADERS["stream"](collate_fn=collate)] if "stream" in kinds else []), *map_style], mode)


TRAINING: dict[str, tuple[Callable[[], Any], int]] = {
    **{kind: (partial(LOADERS[kind], collate_fn=collate), 5 if kind in FULL_BATCHES else 6) for kind in LOADERS},
    "a stream, from persistent processes": (
        partial(LOADERS["stream"], collate_fn=collate, **PROCESSES["in persistent processes"]),
        6,
    ),
    "finished batches": (lambda: DataLoader(Noisy(), None, shuffle=True), SIZE),
    "several, cycled": (several, 7),
    "several, the longest": (partial(several, mode="max_size"), 7),
    "several, the shortest": (partial(several, mode="min_size"), 3),
    "several, with a stream": (partial(several, "stream"), 7),
}


@pytest.mark.parametrize("options", [{}, {"reload_dataloaders_every_n_epochs": 1}], ids=["once", "reloaded"])
@pytest.mark.parametrize(("loaders", "length"), TRAINING.values(), ids=TRAINING)
def test_lightning_goes_on_with_exactly_what_it_would_have_seen(
    loaders: Callable[[], Any], length: int, options: dict[str, Any], tmp_path: Path
) -> None:
    whole = fit(loaders, tmp_path, **options).steps
    assert len(whole) == 2 * length
    assert whole[0] != whole[length]
    for start in {1, length - 1, length + 1, 2 * length - 1}:
        assert fit(loaders, tmp_path, start, **options).steps == whole[start:]


def test_a_loader_shorter_than_another_is_gone_through_again_in_another_order(tmp_path: Path) -> None:
    steps = fit(several, tmp_path, max_epochs=1).steps
    of_short, of_other, of_long = zip(*[[samples for samples, _ in batches] for batches, _ in steps], strict=True)
    assert sorted(index for samples in of_long for index, *_ in samples) == list(range(13))
    passes = [list(chain(*of_short[start : start + 3])) for start in (0, 3)]
    assert [sorted(index for index, *_ in samples) for samples in passes] == [list(range(6))] * 2
    assert passes[0] != passes[1]
    assert of_short != of_other


def test_validation_is_the_same_every_time_in_an_epoch(tmp_path: Path) -> None:
    val = LOADERS["stream"](collate_fn=collate, **PROCESSES["in persistent processes"])
    model = fit(LOADERS["map-style"], tmp_path, val=val, val_check_interval=0.5)
    batches = [[batch for batch, _ in model.validated[start : start + 6]] for start in range(0, 24, 6)]
    assert batches[0] == batches[1] != batches[2] == batches[3]


@pytest.mark.parametrize("presharded", [False, True])
def test_the_processes_of_a_loader_end_with_the_training(presharded: bool, tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())
    kept: list[Any] = []
    loader = LOADERS["map-style"](**PROCESSES["in persistent processes"])
    keep = pl.callbacks.LambdaCallback(on_train_end=lambda *seen: kept.extend(seen))
    fit(lambda: loader, tmp_path, presharded=presharded, max_epochs=1, callbacks=[LossWeighting(), keep])
    assert kept[0].train_dataloader
    assert set(multiprocessing.active_children()) <= before  # of which some may be gone by chance
    assert len(list(loader)) == 6
    loader._iterator = None  # or its processes end as some later test collects garbage, which takes them 20 s


# What a loader says of its processes


def its_process(samples: list[Any]) -> Tensor:
    """In place of a batch, the process that it is collated in."""
    return torch.tensor([os.getpid()])


class Reads(pl.LightningModule):
    """Takes note of its loader and the loader's processes, on the rank that comes home."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.options: list[tuple[Any, ...]] = []
        self.processes: list[set[int]] = []

    def on_train_epoch_start(self) -> None:
        self.processes.append(set())

    def training_step(self, batch: Tensor) -> Tensor:
        self.processes[-1].add(int(batch))
        return self.weight

    def on_train_epoch_end(self) -> None:
        loader = self.trainer.train_dataloader.source
        self.options.append((loader.num_workers, loader.pin_memory, loader.persistent_workers, loader.prefetch_factor))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("dataset", [Noisy(24), Jittered()])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loaders_processes_are_as_the_user_wants_them_in_each_worker(
    num_workers: int, dataset: Any, persistent: bool, gloo: None, tmp_path: Path
) -> None:
    model = Reads()
    options: dict[str, Any] = {"num_workers": 2, "pin_memory": True, "prefetch_factor": 3, "collate_fn": its_process}
    loader = DataLoader(dataset, 4, persistent_workers=persistent, **options)
    Trainer(max_epochs=2, num_workers=num_workers, storage_path=str(tmp_path)).fit(model, loader)
    assert model.options == [(2, True, persistent, 3)] * 2
    first, second = model.processes
    assert len(first) == len(second) == 2
    assert os.getpid() not in first
    assert (first == second) is persistent
    assert persistent or not first & second
