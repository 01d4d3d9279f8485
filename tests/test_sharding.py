"""Which sample goes to which worker, and when: a function of the seed and the epoch_pass in the training alone."""

import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from ray_mnist import RequestError
from ray_mnist.distributed.orders import ORDERS, EpochOrder, draws_at_once
from ray_mnist.distributed.samples import SeededDataset, fetches_batches
from ray_mnist.distributed.shard_rules import Shard, interleave, round_robin, shard_evaluation, shard_training
from ray_mnist.distributed.sharding import (
    CollateShard,
    SeededIndices,
    ShardedBatchSampler,
    ShardedStream,
    seed_generators,
)

SIZE, BATCH = 53, 10  # the last batch has 3
WORLD_SIZES = range(1, 9)


def one_at_a_time(batches: Iterable[list[Any]]) -> Iterator[Shard]:
    """The whole batches, as one worker has them."""
    return shard_training(batches, 0, 1)


def shuffled(batch_size: int = BATCH, **options: Any) -> BatchSampler:
    return BatchSampler(RandomSampler(range(SIZE), **options), batch_size, drop_last=False)


class OwnBatches:
    """A batch sampler of the user's: batches of changing length, drawn with NumPy and Python, in any form."""

    def __init__(self, form: Callable[[list[int]], Any]) -> None:
        self.form = form

    def __iter__(self) -> Iterator[Any]:
        order = np.random.permutation(SIZE).tolist()
        while order:
            size = random.randint(1, BATCH)
            yield self.form(order[:size])
            order = order[size:]


class OwnEpochs(BatchSampler):
    """A batch sampler whose order is a matter of the epoch that it is told."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.RandomState(self.epoch).permutation(SIZE).tolist()
        return (order[start : start + BATCH] for start in range(0, SIZE, BATCH))


def orders_of(batches: Any) -> int:
    """How many orders it has in passes (0, 0), (1, 0), (1, 1) and (2, 0): what knows the epoch alone repeats itself."""
    inner = getattr(batches, "sampler", None)
    if isinstance(batches, OwnEpochs) or isinstance(inner, EpochOrder):
        return 3
    return 1 if isinstance(inner, SequentialSampler) else 4


SAMPLERS: dict[str, Callable[[], Any]] = {
    "shuffle": shuffled,
    "with replacement": partial(shuffled, replacement=True, num_samples=100),
    "a generator of the user's": lambda: shuffled(generator=torch.Generator().manual_seed(2**64 - 1)),
    "a generator, with replacement": lambda: shuffled(
        replacement=True, num_samples=100, generator=torch.Generator().manual_seed(7)
    ),
    "in order": lambda: BatchSampler(SequentialSampler(range(SIZE)), BATCH, drop_last=True),
    "an epoch's own": lambda: BatchSampler(EpochOrder(SIZE, 7), BATCH, drop_last=False),
    "twice and some": partial(shuffled, num_samples=2 * SIZE + 7),
    "twice": partial(shuffled, num_samples=2 * SIZE),
    "a part": lambda: BatchSampler(SubsetRandomSampler(range(5, SIZE)), BATCH, drop_last=False),
    "a part, with a generator": lambda: BatchSampler(
        SubsetRandomSampler([*range(5, SIZE)], torch.Generator().manual_seed(7)), BATCH, drop_last=True
    ),
    "weighted": lambda: BatchSampler(WeightedRandomSampler([1.0] * 3 + [0.1] * 50, 47), BATCH, drop_last=True),
    "batches of the user's": lambda: OwnBatches(list),
    "tuples": lambda: OwnBatches(tuple),
    "tensors": lambda: OwnBatches(torch.tensor),
    "NumPy arrays": lambda: OwnBatches(np.array),
    "told the epoch": lambda: OwnEpochs(SequentialSampler(range(SIZE)), BATCH, drop_last=False),
}


def sharded_sampler(
    sampler: Any,
    rank: int = 0,
    world_size: int = 1,
    epoch_pass: tuple[int, int] = (0, 0),
    start: int = 0,
    seed: object = 0,
) -> ShardedBatchSampler:
    shards = ShardedBatchSampler(sampler, partial(shard_training, rank=rank, world_size=world_size), seed)
    shards.begin(epoch_pass, start)
    return shards


def contents(shards: Iterable[SeededIndices]) -> list[Any]:
    return [(list(indices), indices.positions, indices.epoch_pass) for indices in shards]


def batches_of(sampler: Any, **options: Any) -> list[list[int]]:
    return [list(indices) for indices in sharded_sampler(sampler, **options)]


def draws() -> tuple[float, float, float]:
    """What the next draw of each kind is."""
    return torch.rand(()).item(), np.random.rand(), random.random()


def refusal(call: Callable[[], object]) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(RequestError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# Shares for training


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_global_batch_is_the_same_samples_at_every_world_size(sampler: Callable[[], Any], world_size: int) -> None:
    ranks = []
    for rank in range(world_size):
        torch.manual_seed(rank)  # ranks need not have their random numbers in common
        shards = sharded_sampler(sampler(), rank, world_size, epoch_pass=(5, 0))
        indices = list(shards)
        ranks.append([batch[: shard.samples] for batch, shard in zip(indices, shards.drawn, strict=True)])
    together = [sorted(chain(*shards)) for shards in zip(*ranks, strict=True)]
    assert together == [sorted(batch) for batch in batches_of(sampler(), epoch_pass=(5, 0))]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("length", range(1, 12))
def test_a_batch_is_shared_out_evenly_and_no_rank_goes_without(length: int, world_size: int) -> None:
    batch = list(range(length))
    shards = [next(shard_training([batch], rank, world_size)) for rank in range(world_size)]
    assert sorted(item for shard in shards for item in shard.items[: shard.samples]) == batch
    counts = [shard.samples for shard in shards]
    assert max(counts) - min(counts) <= 1
    assert [len(shard.items) for shard in shards] == [max(1, count) for count in counts]
    assert [shard.weight for shard in shards] == [count * world_size / length for count in counts]


def test_a_share_is_handed_out_before_the_next_batch_is_drawn() -> None:
    drawn: list[int] = []

    def batches() -> Iterator[list[int]]:
        for number in range(3):
            drawn.append(number)
            yield [number]

    next(shard_training(batches(), 0, 1))
    assert drawn == [0]


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_the_order_is_a_function_of_seed_and_place_and_of_nothing_else(sampler: Callable[[], Any]) -> None:
    used = sampler()
    seed_keys = [(0, 0), (1, 0), (1, 1), (2, 0)]
    orders = [batches_of(used, epoch_pass=epoch_pass) for epoch_pass in seed_keys]
    np.random.seed(99)
    torch.manual_seed(99)
    random.seed(99)
    assert [batches_of(sampler(), epoch_pass=epoch_pass) for epoch_pass in seed_keys] == orders
    firsts = {tuple(order[0]) for order in orders}
    assert len(firsts) == orders_of(used)


KNOWN = {name: make for name, make in SAMPLERS.items() if draws_at_once(make())}


@pytest.mark.parametrize("sampler", KNOWN.values(), ids=KNOWN)
def test_an_order_drawn_at_once_is_what_the_sampler_would_hand_out(sampler: Callable[[], Any]) -> None:
    at_once, one_by_one = sharded_sampler(sampler()), sharded_sampler(sampler())
    one_by_one.draws_at_once = False
    for epoch_pass in [(0, 0), (3, 0), (3, 1)]:
        at_once.begin(epoch_pass, 0)
        one_by_one.begin(epoch_pass, 0)
        assert contents(at_once) == contents(one_by_one)


@pytest.mark.parametrize("sampler", KNOWN.values(), ids=KNOWN)
def test_of_an_order_drawn_at_once_a_rank_looks_at_its_own_part_alone(
    sampler: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step costs would grow with the number of workers, whose batches together are the global batch."""

    def walk(_: Any) -> Iterator[int]:
        raise AssertionError("the whole global batch was gone through")

    for kind in ORDERS:
        monkeypatch.setattr(kind, "__iter__", walk)
    assert {len(batch) for batch in batches_of(sampler(), rank=1, world_size=BATCH)} == {1}


def test_a_sampler_that_may_draw_for_each_batch_is_asked_for_each() -> None:
    class Own(RandomSampler):
        """A subclass, which may have a way of its own."""

    samplers = [Own(range(SIZE)), range(SIZE), SubsetRandomSampler(torch.arange(SIZE))]  # type: ignore[arg-type]
    assert not any(draws_at_once(BatchSampler(each, BATCH, drop_last=False)) for each in samplers)
    assert not draws_at_once(OwnEpochs(SequentialSampler(range(SIZE)), BATCH, drop_last=False))
    assert set(KNOWN) == set(SAMPLERS) - {
        "batches of the user's",
        "tuples",
        "tensors",
        "NumPy arrays",
        "told the epoch",
    }


def test_another_seed_is_another_order() -> None:
    orders = [batches_of(shuffled(), seed=seed) for seed in [*range(5), (0, 1), (0, 2)]]
    assert len({tuple(order[0]) for order in orders}) == len(orders)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_drawing_indices_leaves_the_random_numbers_as_they_were(sampler: Callable[[], Any]) -> None:
    seed_generators("here")
    expected = draws()
    seed_generators("here")
    shards = iter(sharded_sampler(sampler()))
    for _ in range(3):
        next(shards)
    assert draws() == expected
    seed_generators("here")
    list(shards)
    assert draws() == expected


def test_a_generator_of_the_users_is_left_as_it_was() -> None:
    """Loaders may shard it, and the loader that it came with may be used again."""
    generator = torch.Generator().manual_seed(7)
    plain = list(shuffled(generator=torch.Generator().manual_seed(7)))
    one, other = (sharded_sampler(shuffled(generator=generator)) for _ in range(2))
    both = [(list(a), list(b)) for a, b in zip(one, other, strict=True)]
    assert both == [(batch, batch) for batch in plain]
    assert torch.rand(1, generator=generator) == torch.rand(1, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_an_index_is_a_plain_number_as_it_would_be_for_one_sample(sampler: Callable[[], Any]) -> None:
    assert {type(index) for batch in batches_of(sampler()) for index in batch} == {int}


@pytest.mark.parametrize("start", [0, 1, 3, 5, 6, 60])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_it_begins_at_any_batch_of_any_epoch(sampler: Callable[[], Any], start: int) -> None:
    whole = sharded_sampler(sampler(), epoch_pass=(4, 0))
    rest = sharded_sampler(sampler(), epoch_pass=(4, 0), start=start)
    assert contents(rest) == contents(whole)[start:]
    counts = [[(shard.samples, shard.weight) for shard in each.drawn] for each in (rest, whole)]
    assert counts[0] == counts[1][start:]


# Evaluation


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 8, 10, 16, 40, 53, 99])
def test_evaluation_has_every_sample_once_and_equally_many_shares_on_all_ranks(
    batch_size: int, world_size: int
) -> None:
    for size in (8, 9, 15, 16, 17, 40, 53):
        check_evaluation(size, batch_size, world_size)


def check_evaluation(size: int, batch_size: int, world_size: int) -> None:
    samples = list(range(size))
    batches = [samples[start : start + batch_size] for start in range(0, size, batch_size)]
    ranks = [list(shard_evaluation(batches, rank, world_size)) for rank in range(world_size)]
    assert sorted(item for rank in ranks for shard in rank for item in shard.items) == samples
    assert len({len(rank) for rank in ranks}) == 1
    assert all(shard.samples == len(shard.items) >= 1 for rank in ranks for shard in rank)
    # No larger than it must be: what one worker has at a time fits into its memory.
    assert max(shard.samples for rank in ranks for shard in rank) <= 2 + -(-batch_size // world_size)
    if world_size == 1:
        assert [shard.items for shard in ranks[0]] == batches


@pytest.mark.parametrize("batch_size", [1, 2, 10])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_fewer_evaluation_samples_than_workers_are_refused(size: int, batch_size: int) -> None:
    batches = [list(range(start, min(start + batch_size, size))) for start in range(0, size, batch_size)]
    for rank in range(size + 1):
        text = refusal(lambda rank=rank: list(shard_evaluation(batches, rank, size + 1)))
        assert text == f"{size} evaluation samples are fewer than the {size + 1} workers: use at most {size}."
    assert [shard.items for rank in range(size) for shard in shard_evaluation(batches, rank, size)] == [
        [index] for index in range(size)
    ]


def test_no_samples_at_all_are_no_shares() -> None:
    assert list(shard_evaluation([], 1, 4)) == list(shard_training([], 1, 4)) == []


# Prediction


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("limit", [None, 0, 1, 5, 99])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 16])
def test_batches_in_round_robin_come_back_in_their_order(count: int, limit: int | None, world_size: int) -> None:
    batches = [[number, -number] for number in range(count)]
    per_rank = [
        [shard.items for shard in round_robin(batches, (rank, limit, world_size)) if (shard.samples, shard.weight)]
        for rank in range(world_size)
    ]
    assert interleave(per_rank) == batches[:limit]
    assert all(shard.samples == 2 for shard in round_robin(batches, (0, limit, world_size)))


def test_what_comes_back_is_complete_where_a_later_rank_has_more() -> None:
    assert interleave([["a"], ["b", "d"], ["c", "e", "f"]]) == ["a", "b", "c", "d", "e", "f"]


# What a sample draws


class Noisy(Dataset[Any]):
    """Each sample is its index and what it draws."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return index, *draws()


class NoisyTogether(Noisy):
    """The same, with a way of its own to fetch many."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        assert type(indices) is list
        return [self[index] for index in indices]


def samples_of(
    dataset: Any, sampler: Callable[[], Any] = shuffled, world_size: int = 1, **options: Any
) -> dict[int, Any]:
    """What the ranks together have of each sample."""
    found = {}
    for rank in range(world_size):
        for indices in sharded_sampler(sampler(), rank, world_size, **options):
            found |= {sample[0]: sample for sample in SeededDataset(dataset, 0).__getitems__(indices)}
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(
    "dataset", [Noisy(), Subset(Noisy(), range(SIZE)), Subset(Subset(Noisy(), range(SIZE)), range(SIZE))]
)
def test_a_sample_draws_the_same_at_every_world_size(dataset: Any, world_size: int) -> None:
    torch.manual_seed(world_size)
    assert samples_of(dataset, world_size=world_size, epoch_pass=(2, 0)) == samples_of(Noisy(), epoch_pass=(2, 0))


def test_a_sample_draws_something_else_in_another_epoch_or_place() -> None:
    def in_order() -> BatchSampler:
        return BatchSampler(range(SIZE), BATCH, drop_last=False)

    drawn = [samples_of(Noisy(), in_order, epoch_pass=epoch_pass)[7] for epoch_pass in [(0, 0), (1, 0), (1, 1)]]
    assert len(set(drawn)) == 3


def test_a_sample_that_comes_twice_in_an_epoch_draws_something_else() -> None:
    def twice() -> BatchSampler:
        return BatchSampler([7] * 6, 4, drop_last=False)

    drawn = [
        sample for indices in sharded_sampler(twice()) for sample in SeededDataset(Noisy(), 0).__getitems__(indices)
    ]
    assert len(set(drawn)) == 6


def test_samples_and_their_order_do_not_draw_the_same() -> None:
    """As they would if both were a function of, say, seed, epoch and 0."""
    seed_generators(0, 0, 0, "indices", 0)
    first = draws()
    [indices] = [*sharded_sampler(BatchSampler([0], 1, drop_last=False))]
    assert SeededDataset(Noisy(), 0).__getitems__(indices)[0][1:] != first


def test_only_a_way_of_its_own_to_fetch_many_samples_is_used() -> None:
    class Half(Subset[Any]):
        def __getitem__(self, index: Any) -> Any:
            return super().__getitem__(index)

        def __getitems__(self, indices: list[int]) -> Any:
            return [self[index] for index in indices]

    together = [NoisyTogether(), Subset(NoisyTogether(), [1, 2]), Half(Noisy(), [1, 2]), StackDataset(Noisy())]
    assert [fetches_batches(dataset) for dataset in together] == [True] * 4
    assert not any(
        fetches_batches(dataset) for dataset in [Noisy(), Subset(Noisy(), [1]), TensorDataset(torch.zeros(2))]
    )


def test_what_samples_fetched_together_draw_is_a_function_of_their_places() -> None:
    for sampler in (shuffled, partial(shuffled, 1)):
        for indices in sharded_sampler(sampler(), epoch_pass=(3, 1)):
            found = SeededDataset(NoisyTogether(), (5, 0)).__getitems__(indices)
            first, last = indices.positions[0], indices.positions[-1]
            seed_generators((5, 0), 3, 1, "samples", first, last, len(indices))
            assert found == NoisyTogether().__getitems__(list(indices))


def test_samples_fetched_together_draw_the_same_again() -> None:
    found = samples_of(NoisyTogether(), epoch_pass=(3, 0))
    torch.manual_seed(99)
    assert samples_of(NoisyTogether(), epoch_pass=(3, 0)) == found != samples_of(NoisyTogether(), epoch_pass=(4, 0))


def test_a_position_is_sent_with_its_indices() -> None:
    indices: SeededIndices = next(iter(sharded_sampler(shuffled(), epoch_pass=(3, 1))))
    copy = pickle.loads(pickle.dumps(indices))
    assert (type(copy), contents([copy])) == (SeededIndices, contents([indices]))
    assert copy.epoch_pass == (3, 1)


# Streams


class Jittered(IterableDataset[Any]):
    """Each sample is its number and what it draws."""

    def __iter__(self) -> Iterator[Any]:
        return ((number, *draws()) for number in range(SIZE))


def stream(shard_batches: Any = one_at_a_time, **options: Any) -> ShardedStream:
    return ShardedStream(DataLoader(Jittered(), **{"batch_size": BATCH} | options), shard_batches, seed=0)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("shard_batches", [shard_training, shard_evaluation])
def test_a_stream_is_cut_and_drawn_the_same_at_every_world_size(shard_batches: Any, world_size: int) -> None:
    whole = [shard.items for shard in stream()]
    ranks = []
    for rank in range(world_size):
        torch.manual_seed(rank)
        shards = list(stream(partial(shard_batches, rank=rank, world_size=world_size)))
        ranks.append([shard.items[: shard.samples] for shard in shards])
    together = [sorted(chain(*shards)) for shards in zip(*ranks, strict=True)]
    if shard_batches is shard_training:
        assert together == whole
    assert sorted(chain(*together)) == list(chain(*whole))


def test_a_stream_draws_something_else_at_another_place() -> None:
    once = stream()
    found = []
    for epoch_pass in [(0, 0), (1, 0), (1, 1)]:
        once.begin(epoch_pass)
        found.append([shard.items for shard in once])
    assert len({samples[0][0] for samples in found}) == 3
    once.begin((1, 0))
    assert [shard.items for shard in once] == found[1]


def test_a_stream_keeps_to_the_place_where_it_was_begun() -> None:
    """Loader workers may still work on what was begun before."""
    once = stream()
    whole = [shard.items for shard in once]
    begun = iter(once)
    once.begin((1, 0))
    assert [shard.items for shard in begun] == whole


@pytest.mark.parametrize(("drop_last", "lengths"), [(False, [10, 10, 10, 10, 10, 3]), (True, [10] * 5)])
def test_a_streams_last_batch_is_left_out_if_the_loader_says_so(drop_last: bool, lengths: list[int]) -> None:
    assert [shard.samples for shard in stream(drop_last=drop_last)] == lengths


def test_a_share_is_collated_as_the_users_loader_does() -> None:
    collated = CollateShard(lambda samples: torch.tensor(samples).sum())
    assert collated(Shard([1, 2, 4], 3, 0.75)) == (3, 0.75, torch.tensor(7))
