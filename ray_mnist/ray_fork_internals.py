"""Of Ray beyond its public API: what a process that others are forked from imports before Ray's libraries.

Ray seeds what it draws ids from at the first one, which is that of the first actor class that is imported. All that is
forked after it would draw the same ids, and those of a cluster would take each other's tasks, objects and messages.
"""

import os

import ray.actor
from ray._raylet import ActorClassID


class DrawnByTheSystem:
    """Takes the place of Ray's class where Ray draws the id of an actor class."""

    @staticmethod
    def from_random() -> ActorClassID:
        """An id that no other process has."""
        return ActorClassID(os.urandom(ActorClassID.size()))


ray.actor.ActorClassID = DrawnByTheSystem  # type: ignore[attr-defined, assignment]
