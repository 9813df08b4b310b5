"""One file per objective: examples -> batch, batch -> loss, batch -> predictions. The training loop knows none."""

from model.config.schema import RunConfig
from model.errors import ConfigError
from model.tasks.base import Task
from model.tasks.captioning import Captioning
from model.tasks.classification import Classification
from model.tasks.language_modeling import LanguageModeling
from model.tasks.matching import Matching
from model.tasks.pretraining import Pretraining
from model.tasks.retrieval import Retrieval

TASKS: dict[str, type[Task]] = {
    "language_modeling": LanguageModeling,
    "pretraining": Pretraining,
    "classification": Classification,
    "retrieval": Retrieval,
    "matching": Matching,
    "captioning": Captioning,
}


def build_task(config: RunConfig) -> Task:
    """The task of a configuration, with its networks built or loaded."""
    try:
        return TASKS[config.task](config)
    except ValueError as error:  # transformers refuses a shape: the configuration is wrong, not the program
        raise ConfigError(f"model cannot be built: {' '.join(str(error).split())}") from error


__all__ = ["TASKS", "Task", "build_task"]
