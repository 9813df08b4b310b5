"""One file per objective, which contains everything specific to it: batches, loss, predictions, scores.

The registry is TASK_DATASETS in model/config/schema.py. The task `captioning` is the class Captioning in captioning.py.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.tasks.base import Task


def task_class(name: str) -> "type[Task]":
    """The class of a task. It is imported here, so that a process only imports the task that it runs."""
    return getattr(import_module(f"model.tasks.{name}"), name.title().replace("_", ""))
