"""Imported before all of Ray in the process that is forked for others: without it they would draw the same ids.

Ray seeds what it draws ids from at the first one, which is that of the first actor class that is imported. Two forks
that join the same cluster with the same ids take each other's objects and messages.
"""

import os

import ray.actor
from ray._raylet import ActorClassID


class DrawnByTheSystem:
    @staticmethod
    def from_random() -> ActorClassID:
        return ActorClassID(os.urandom(ActorClassID.size()))


ray.actor.ActorClassID = DrawnByTheSystem
