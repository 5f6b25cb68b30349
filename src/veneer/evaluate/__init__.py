"""Evaluation: losses, answers and labels of a base and its adapters on the same rows, with intervals.

>>> report = evaluate(base, {"tickets": adapter}, load("tickets.eval.jsonl"))      # doctest: +SKIP
>>> report.changes["tickets"]["loss"]                                              # doctest: +SKIP
Interval(value=-0.91, low=-0.98, high=-0.84)
"""

from veneer.evaluate.bootstrap import Interval
from veneer.evaluate.compare import LOWER_IS_BETTER, Report, Settings, evaluate
from veneer.evaluate.loss import RowLosses, row_losses

__all__ = ["LOWER_IS_BETTER", "Interval", "Report", "RowLosses", "Settings", "evaluate", "row_losses"]
