"""The evaluation gate: what an alias demands before it moves.

A demand names a metric, which way is better, and by how much a candidate may be worse than the version that the alias points to
now. The first version only has to show the metric. Nothing moves when a demand fails, and the refusal lists every failure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

from veneer.errors import ConfigError

Better: TypeAlias = Literal["lower", "higher"]

METRIC = re.compile(r"[A-Za-z][A-Za-z0-9_.@/-]{0,63}")
ROUNDING = 1e-9
"""What the difference of two metrics may be off by because decimals are not exact in binary."""

DIRECTIONS: Mapping[str, Better] = {
    "loss": "lower",
    "eval_loss": "lower",
    "general_loss": "lower",
    "perplexity": "lower",
    "bits_per_byte": "lower",
    "forgetting": "lower",
    "accuracy": "higher",
    "exact_match": "higher",
    "f1": "higher",
    "rouge_l": "higher",
    "bleu": "higher",
    "json_valid": "higher",
}


@dataclass(frozen=True, slots=True)
class Demand:
    """`metric` must be there and not worse than the current version's by more than `margin` (absolute)."""

    metric: str
    better: Better
    margin: float = 0.0

    def __post_init__(self) -> None:
        check_metric(self.metric)
        if self.better not in ("lower", "higher"):
            raise ConfigError(f"'{self.better}' is not a direction", help="write lower or higher")
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise ConfigError(f"the margin of {self.metric} must be zero or more, got {self.margin}")

    @classmethod
    def parse(cls, text: str) -> Demand:
        """`metric[:lower|higher][=margin]`.

        >>> Demand.parse("general_loss=0.02")
        Demand(metric='general_loss', better='lower', margin=0.02)
        """
        head, _, margin = text.partition("=")
        metric, _, better = head.partition(":")
        better = better or DIRECTIONS.get(metric, "")
        if better not in ("lower", "higher"):
            raise ConfigError(
                f"the demand '{text}' does not say which way {metric or 'the metric'} is better",
                help=f"write {metric or 'metric'}:higher=0.01 or {metric or 'metric'}:lower=0.01",
            )
        try:
            allowed = float(margin or 0.0)
        except ValueError as error:
            raise ConfigError(f"the margin '{margin}' of {metric} is not a number") from error
        return cls(metric, cast(Better, better), allowed)


def check_metric(metric: str) -> str:
    """`metric` if it can be the name of one, else ConfigError."""
    if METRIC.fullmatch(metric) is None:
        raise ConfigError(f"{metric[:80]!r} is not the name of a metric: letters, digits and _ . @ / -, at most 64")
    return metric


def check_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics as finite floats, or one ConfigError with every one that isn't."""
    problems = [f"{metric} is {value}" for metric, value in metrics.items() if not math.isfinite(value)]
    if problems:
        raise ConfigError(f"a metric must be a finite number: {', '.join(problems)}")
    return {check_metric(metric): float(value) for metric, value in metrics.items()}


def failures(
    demands: Iterable[Demand], candidate: Mapping[str, float], current: Mapping[str, float] | None, current_ref: str
) -> Sequence[str]:
    """Why the candidate may not take the alias; empty if it may. `current` is None where the alias is new."""
    problems: list[str] = []
    for demand in demands:
        metric = demand.metric
        if metric not in candidate:
            problems.append(f"{metric} was never recorded for it")
        elif current is not None and metric not in current:
            problems.append(f"{metric} was never recorded for {current_ref}, so there is nothing to compare with")
        elif current is not None:
            worse = candidate[metric] - current[metric]
            worse = worse if demand.better == "lower" else -worse
            if worse > demand.margin + ROUNDING * max(1.0, abs(candidate[metric]), abs(current[metric])):
                problems.append(
                    f"{metric} is {candidate[metric]:.6g}, worse than {current[metric]:.6g} of {current_ref} "
                    f"by {worse:.3g} where {demand.margin:.3g} is allowed"
                )
    return problems
