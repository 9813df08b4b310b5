"""One file per objective, with all that is specific to it: examples -> batch -> loss, predictions, scores.

The registry is DATASETS in model/config/schema.py: a task `captioning` is the class Captioning of captioning.py here.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.tasks.base import Task


def task_class(name: str) -> "type[Task]":
    """The class of a task; imported here, so that a process imports the one that it runs."""
    found: type[Task] = getattr(import_module(f"model.tasks.{name}"), name.title().replace("_", ""))
    return found
