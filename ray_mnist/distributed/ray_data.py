"""A Ray Data set as a loader: a stream that may be larger than a machine, of which each rank fetches its share alone.

Ray Data executes the stream once, for all ranks. What goes around among them is where in the object store the rows of
each batch are; a rank fetches its own. Ray is imported once there is such a loader.
"""

import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import count
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import TYPE_CHECKING, Any

import torch

from ray_mnist.distributed.loaders import ResumableLoader
from ray_mnist.distributed.ray_data_streams import At, Coordinator, Source, Stream, whole
from ray_mnist.distributed.shard_rules import Shard, ShardBatches
from ray_mnist.errors import RequestError

if TYPE_CHECKING:
    from ray.data import Dataset

NAMESPACE = "ray_mnist"
SHARDS_AHEAD = 4  # that a rank has fetched before they are asked for
END = object()
Fetched = tuple[int, float, dict[str, Any]]  # samples and weight of a shard, and its columns as NumPy arrays


class RayDataLoader:
    """A `ray.data.Dataset` as a loader: batches of a stream, which may be larger than all memory.

    With workers, `batch_size` is the batch over all of them, as that of a DataLoader, and each fetches its own share.
    Without, and outside of this package's Trainer, it is an iterable over the batches. The data set is read in the
    order of its rows, or in a new one each time with `shuffle`, drawn from torch's seed.

    Args:
        dataset: the rows. Its options are set so that it keeps their order.
        batch_size: rows of a batch.
        shuffle: whether all rows are shuffled, which takes room for all of them in the object store or on its disk.
        drop_last: whether to leave out a last batch that is smaller.
        collate_fn: makes a batch of a dict of NumPy arrays, one for each column, as that of `iter_torch_batches` does;
            None makes a dict of tensors.

    Raises:
        RequestError: `dataset` is none, or `batch_size` is no number of rows.
    """

    def __init__(
        self,
        dataset: "Dataset",
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        collate_fn: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        from ray.data import Dataset

        if not isinstance(dataset, Dataset):
            raise RequestError(f"RayDataLoader takes a ray.data.Dataset, not a {type(dataset).__name__}.")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise RequestError(
                f"RayDataLoader's batch_size={batch_size!r} is not possible: give a whole number from 1."
            )
        self.dataset, self.batch_size, self.shuffle, self.drop_last = dataset, batch_size, shuffle, drop_last
        self.collate_fn, self.source = collate_fn, Source(dataset, batch_size, drop_last)

    def __iter__(self) -> Iterator[Any]:
        with closing(fetched(Stream(self.source, [whole], self.draw()).alone())) as batches:
            yield from (self.collate(columns) for _, _, columns in batches)

    def draw(self) -> int | None:
        """The seed of the next shuffle, from torch's generator, as its RandomSampler draws one; None for no shuffle."""
        return int(torch.randint(2**31, ())) if self.shuffle else None

    def collate(self, columns: dict[str, Any]) -> Any:
        """A batch of its columns. Raises RequestError where they cannot be tensors."""
        from ray_mnist import ray_data_internals

        if self.collate_fn is not None:
            return self.collate_fn(columns)
        try:
            return ray_data_internals.tensors(columns)
        except (RuntimeError, TypeError) as error:
            names = [name for name, column in columns.items() if column.dtype.kind not in "biufc"]
            raise RequestError(
                f"Column {', '.join(names)} of the Ray Data set cannot be a tensor: leave it out, or give the "
                "RayDataLoader a collate_fn that makes batches of the columns as NumPy arrays."
            ) from error


class ShardsOfRank:
    """This rank's shards of a loader's batches: from a coordinator that all ranks ask, or from here if it is alone.

    To be made, and ended, on all ranks together.

    Args:
        loader: the user's.
        shard_batches: of each rank.
        rank: of this process.
        broadcast: gives all ranks what rank 0 has.
    """

    def __init__(
        self,
        loader: RayDataLoader,
        shard_batches: list[ShardBatches],
        rank: int,
        broadcast: Callable[[Any], Any],
    ) -> None:
        self.loader, self.shard_batches, self.rank = loader, shard_batches, rank
        self.times = count()
        self.coordinator: Any = None
        self.stream: Stream | None = None  # the newest, of a rank that is alone
        if len(shard_batches) > 1:
            import ray

            # The actor ends with rank 0, too.
            made = start_coordinator(loader.source, shard_batches) if rank == 0 else (None, "")
            name = broadcast(made[1])
            self.coordinator = made[0] or ray.get_actor(name, NAMESPACE)

    def begin(self, start: int) -> Generator[Fetched]:
        """Goes through the data once more, from shard `start` on."""
        at = next(self.times), self.loader.draw(), start
        if self.coordinator is not None:
            return fetched(self._asked_for(at))
        self.stream = Stream(self.loader.source, self.shard_batches, *at[1:])
        return fetched(self.stream.alone())

    def _asked_for(self, at: At) -> Iterator[Shard]:
        try:
            while shards := answer(self.coordinator.shards.remote(self.rank, at)):
                yield from shards
        finally:
            self.coordinator.leave.remote(self.rank, at[0])

    def samples_before(self, start: int) -> int:
        """How many there are in the shards before that one: only the last batch may be smaller than others."""
        batches = iter([range(self.loader.batch_size)] * start)
        return sum(shard.samples for shard in self.shard_batches[self.rank](batches))

    def end(self) -> None:
        """Takes no more."""
        if self.coordinator is not None:
            self.coordinator.end.remote(self.rank)
        if self.stream is not None:
            self.stream.leave(0)


class ShardedRayData(ResumableLoader):
    """Hands out this rank's shard of each batch of a RayDataLoader.

    Args:
        shards: where they come from.
        **options: as for `ResumableLoader`.
    """

    def __init__(
        self,
        loader: RayDataLoader,
        seed: int,
        position: Callable[[], tuple[int, int]],
        shards: ShardsOfRank,
        **options: Any,
    ) -> None:
        super().__init__(loader, seed, position, **options)
        self.shards = shards

    def _begin(self) -> tuple[int, Iterator[tuple[int, float, Any]]]:
        shards = self.shards.begin(self.start)
        self.epoch_samples[-1] += self.shards.samples_before(self.start)
        return self.start, ((samples, weight, self.loader.collate(columns)) for samples, weight, columns in shards)

    def close(self) -> None:
        """Takes no more shards."""
        self.shards.end()


def start_coordinator(source: Source, shard_batches: list[ShardBatches]) -> tuple[Any, str]:
    """Starts one on this node; returns it, and its name."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    name = f"data-{uuid.uuid4().hex}"
    options = {"num_cpus": 0, "scheduling_strategy": here, "name": name, "namespace": NAMESPACE}
    actor: Any = ray.remote(Coordinator)
    return actor.options(**options).remote(source, shard_batches), name


def answer(reference: Any) -> Any:
    """What the coordinator answers. Raises its RequestError as one of this process."""
    import ray

    try:
        return ray.get(reference)
    except RequestError as error:  # of a class that Ray has made for it
        raise RequestError(*getattr(error, "cause", error).args) from None


def refuse_unbatched(error: TypeError) -> None:
    """Raises RequestError where Lightning refuses a data set of Ray as a loader."""
    if "`Dataset` objects" in (reason := str(error.__context__)) or "DataIterator" in reason:
        raise RequestError(
            "A data set of Ray Data has no batch size: give RayDataLoader(dataset, batch_size), of ray_mnist, in its "
            "place."
        ) from error


def fetched(shards: Iterator[Shard]) -> Generator[Fetched]:
    """What is in each shard, without the references, which would keep the blocks; some are fetched ahead."""

    def fetch() -> Generator[Fetched]:
        import ray

        from ray_mnist import ray_data_internals

        held: dict[Any, Any] = {}
        for shard in shards:
            pieces = shard.items.pieces
            blocks = [*dict.fromkeys(block for block, _, _ in pieces)]
            new = [block for block in blocks if block not in held]
            held |= dict(zip(new, ray.get(new), strict=True))
            held = {block: held[block] for block in blocks}
            columns = ray_data_internals.columns([(held[block], first, stop) for block, first, stop in pieces])
            yield shard.samples, shard.weight, columns

    return ahead(fetch(), SHARDS_AHEAD)


def ahead(items: Generator[Any], size: int) -> Generator[Any]:
    """The items, of which a thread has so many ready."""
    ready: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()
    room, ended = Semaphore(size), Event()

    def make() -> None:
        item = None
        with closing(items):
            while item is not END and room.acquire() and not ended.is_set():
                try:
                    ready.put((item := next(items, END), None))
                except Exception as error:  # for whoever waits
                    ready.put((item := END, error))

    Thread(target=make, daemon=True).start()
    try:
        while (found := ready.get())[0] is not END:
            room.release()
            yield found[0]
        if found[1] is not None:
            raise found[1]
    finally:
        ended.set()
        room.release()
