"""Training: `train` for one call from data to adapter, `run_task` for the events behind it."""

from veneer.train.api import read_task, train
from veneer.train.config import RunConfig, TrainConfig
from veneer.train.events import Evaluation, Event, Finished, Preflight, Saved, Step
from veneer.train.many import Failed, read_runs, run_many
from veneer.train.run import Task, run_task

__all__ = [
    "Evaluation",
    "Event",
    "Failed",
    "Finished",
    "Preflight",
    "RunConfig",
    "Saved",
    "Step",
    "Task",
    "TrainConfig",
    "read_runs",
    "read_task",
    "run_many",
    "run_task",
    "train",
]
