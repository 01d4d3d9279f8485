"""Streams of Ray Data: executed once for all ranks, each of which learns where in the object store its rows are.

It imports no torch, which takes seconds.
"""

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from ray_mnist.checks.preflight import check_cpus_for_data
from ray_mnist.distributed.shard_rules import Shard, ShardBatches

if TYPE_CHECKING:
    from ray.data import Dataset

    from ray_mnist.ray_data_internals import Piece

At = tuple[int, int | None, int]  # a time through the data: its number, the seed of its shuffle, the first shard wanted
SHARDS_AT_ONCE = 4  # that a rank is told of
SHUFFLED = 8  # batches in each of the blocks that a shuffle mixes


@dataclass
class Source:
    """What a stream is made of: a data set, and how it is cut into batches."""

    dataset: "Dataset"
    batch_size: int
    drop_last: bool

    def pieces(self, seed: int | None) -> "Iterator[Piece]":
        """Where the rows are, shuffled with a seed or as they are.

        Raises:
            RequestError: the cluster has no CPUs left for that.
        """
        from ray_mnist import ray_data_internals

        dataset = self.dataset
        if seed is not None:
            # Ray shuffles block by block, and how many it reads depends on the cluster's CPUs: these do not.
            rows = SHUFFLED * self.batch_size
            dataset = dataset.repartition(target_num_rows_per_block=rows, strict=True).random_shuffle(seed=seed)
        return ray_data_internals.pieces(dataset, check_cpus_for_data())


class Rows:
    """Rows of a stream, one after the other: where each part of them is. They can be cut and added."""

    def __init__(self, pieces: "list[Piece]") -> None:
        self.pieces = pieces
        self.size = sum(stop - first for _, first, stop in pieces)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> "Rows":
        wanted, stop, _ = part.indices(self.size)
        found, begin = [], 0
        for block, first, last in self.pieces:
            start, end = max(wanted - begin, 0), min(stop - begin, last - first)
            if start < end:
                found.append((block, first + start, first + end))
            begin += last - first
        return Rows(found)

    def __add__(self, following: "Rows") -> "Rows":
        return Rows(self.pieces + following.pieces)


def neighbours(rows: Rows, rank: int, world_size: int) -> Rows:
    """A rank's share, as large as every `world_size`th row: rows that lie together are in the fewest blocks."""
    least, more = divmod(len(rows), world_size)
    first = rank * least + min(rank, more)
    return rows[first : first + least + (rank < more)]


def cut(pieces: "Iterator[Piece]", batch_size: int, drop_last: bool) -> Generator[Rows]:
    """The global batches."""
    held: list[Piece] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += piece[2] - piece[1]
        if size >= batch_size:
            rows = Rows(held)
            while len(rows) >= batch_size:
                yield rows[:batch_size]
                rows = rows[batch_size:]
            held, size = rows.pieces, len(rows)
    if held and not drop_last:
        yield Rows(held)


def whole(batches: Iterator[Rows]) -> Iterator[Shard]:
    """All of each batch."""
    return (Shard(batch, len(batch), 1.0) for batch in batches)


class Stream:
    """One time through the data: the shards of each rank, in `shards`, from the `start`th on.

    What a rank has not come to yet is kept for it; those before `start` are executed, and not fetched.
    """

    def __init__(self, source: Source, shard_batches: list[ShardBatches], seed: int | None, start: int = 0) -> None:
        self.batches = cut(source.pieces(seed), source.batch_size, source.drop_last)
        self.failure: Exception | None = None
        # Python's tee would hold on to dozens of batches that all have had.
        self.waiting: dict[int, deque[Rows]] = {rank: deque() for rank in range(len(shard_batches))}
        self.shards: list[Iterator[Shard]] = [
            islice(share(self._batches(rank)), start, None) for rank, share in enumerate(shard_batches)
        ]

    def _batches(self, rank: int) -> Iterator[Rows]:
        mine = self.waiting[rank]
        while mine or self._pull():
            yield mine.popleft()

    def _pull(self) -> bool:
        """Takes the next batch for all ranks; whether there is one. What fails for one rank fails for all."""
        if self.failure is not None:
            raise self.failure
        try:
            batch = next(self.batches, None)
        except Exception as failure:
            self.failure = failure
            raise
        for mine in self.waiting.values():
            if batch is not None:
                mine.append(batch)
        return batch is not None

    def leave(self, rank: int) -> bool:
        """Keeps nothing for the rank any more; whether there are others, without which the stream ends.

        Ray Data would end it once it is garbage, and ask Ray meanwhile: where there is none any more, that starts one.
        """
        self.shards[rank] = iter(())
        self.waiting.pop(rank, None)
        if not self.waiting:
            self.batches.close()
        return bool(self.waiting)

    def alone(self) -> Generator[Shard]:
        """The shards of the only rank, which leaves with the last or where it is closed."""
        try:
            yield from self.shards[0]
        finally:
            self.leave(0)


class Coordinator:
    """An actor that executes the streams of a loader for all ranks, and tells each where its shards are."""

    def __init__(self, source: Source, shard_batches: list[ShardBatches]) -> None:
        self.source, self.shard_batches = source, shard_batches
        self.streams: dict[int, Stream] = {}
        self.ranks = {*range(len(shard_batches))}

    def shards(self, rank: int, at: At) -> list[Shard]:
        """The next ones of a rank in a time through; none at the end."""
        number, seed, start = at
        if number not in self.streams:
            self.streams[number] = Stream(self.source, self.shard_batches, seed, start)
        return list(islice(self.streams[number].shards[rank], SHARDS_AT_ONCE))

    def leave(self, rank: int, number: int) -> None:
        """The rank takes no more of that time through, which ends with the last of them."""
        if number in self.streams and not self.streams[number].leave(rank):
            del self.streams[number]

    def end(self, rank: int) -> None:
        """The rank asks no more; the actor ends with the last of them."""
        import ray

        self.ranks.discard(rank)
        if not self.ranks:
            ray.actor.exit_actor()
