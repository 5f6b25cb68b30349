"""Adapter algebra: several adapters of one base become one, by a rule whose result is exact or whose error is told.

A rule is one decorated function in a file of this folder (`linear.py`, `sparse.py`); it sees effective updates, never factors.
"""

from veneer.algebra._combine import Combination, Report, TargetReport, combination, combine
from veneer.algebra._rule import RULES, Product, Updates, load_all, options, rule, schema
from veneer.algebra.interference import Interference, Pair, interference
from veneer.algebra.recipe import Recipe, read_recipe, run_recipe

__all__ = [
    "RULES",
    "Combination",
    "Interference",
    "Pair",
    "Product",
    "Recipe",
    "Report",
    "TargetReport",
    "Updates",
    "combination",
    "combine",
    "interference",
    "load_all",
    "options",
    "read_recipe",
    "rule",
    "run_recipe",
    "schema",
]
