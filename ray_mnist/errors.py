"""The errors that users are meant to read: `str()` is one sentence."""


class RequestError(Exception):
    """What was asked for is wrong or cannot be met here; command lines end with exit status 2."""


class TrainingError(Exception):
    """Training started and failed; command lines end with exit status 1.

    Args:
        message: the one sentence.
        details: where it went wrong, such as a worker's traceback.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message, details)
        self.message, self.details = message, details

    def __str__(self) -> str:
        return self.message


class Stalled(Exception):
    """A worker does not go on, and is to be started again.

    Args:
        how: the rest of a sentence that begins with the worker.
        details: what it was doing, if it could tell.
    """

    def __init__(self, how: str, details: str = "") -> None:
        super().__init__(how, details)
        self.how, self.details = how, details

    def __str__(self) -> str:
        return self.how


class Stopped(Exception):
    """The training ends here because it was told to, and can go on from its newest checkpoint."""


def out_of_memory(error: BaseException) -> str:
    """What a GPU's torch.OutOfMemoryError says, without its advice to who knows torch's allocator, and the way out."""
    said = one_line(error).partition(" Of the allocated memory")[0].rstrip(".")[:200]
    return f"{said}: use a smaller --batch-size, or --precision bf16-mixed, or more workers with a GPU each."


def one_line(error: BaseException) -> str:
    """The error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
