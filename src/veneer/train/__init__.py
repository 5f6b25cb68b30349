"""Training: `train` for one call from data to adapter, `run_task` for the events behind it."""

from veneer.train.api import read_task, train
from veneer.train.config import RunConfig, TrainConfig, read_config
from veneer.train.events import Evaluation, Event, Finished, Preflight, Saved, Step
from veneer.train.run import Task, run_task

__all__ = [
    "Evaluation",
    "Event",
    "Finished",
    "Preflight",
    "RunConfig",
    "Saved",
    "Step",
    "Task",
    "TrainConfig",
    "read_config",
    "read_task",
    "run_task",
    "train",
]
