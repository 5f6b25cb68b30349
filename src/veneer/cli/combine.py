"""Make one adapter of several: by a recipe, or by a rule and weights on the command line.

    veneer combine --rule ties legal=0.7 tone=0.3 --density 0.3 --out both
    veneer combine --rule svd --rank 16 runs/a/adapter=1 runs/b/adapter=-0.5 --out difference
    veneer combine recipe.yaml --out both

Each argument is FOLDER=WEIGHT. What the adapters do to each other where they are combined is printed, and the relative
error where a result had to be projected to a rank. Beside a recipe stand only --out, --json, and what it leaves open of
--base and --allow-base-mismatch. `veneer combine --rules` lists the rules and their options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from veneer.cli._options import Json
from veneer.cli._output import count_text, note, say, say_json, say_table
from veneer.errors import ConfigError, Conflict, listed

if TYPE_CHECKING:
    from veneer.adapter import HostSource
    from veneer.algebra import Combination, Interference, Recipe


def command(
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE.yaml | FOLDER=WEIGHT ...", help="What to combine.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the combined adapter.")] = None,
    rule: Annotated[str | None, typer.Option("--rule", help="Combination rule; linear if not given.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the rule, as density=0.3.")
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="The rule's density: --set density=... in short.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Largest rank of the result.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the random rules; 0 if not given.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="For adapters that depend on it (DoRA, IA3).")
    ] = None,
    others: Annotated[
        str | None, typer.Option("--others", help="Parts that are no weight update: refuse (if not given), keep, drop.")
    ] = None,
    allow_base_mismatch: Annotated[
        str | None, typer.Option(metavar="REASON", help="Combine adapters of different bases; recorded.")
    ] = None,
    rules: Annotated[bool, typer.Option("--rules", help="List the rules and stop.")] = False,
    as_json: Json = False,
) -> None:
    from veneer.adapter import Adapter
    from veneer.algebra import interference, read_recipe, run_recipe
    from veneer.algebra.recipe import recipe_of

    if rules:
        _list_rules(as_json)
        return
    if not sources:
        raise ConfigError("nothing to combine", help="veneer combine --rule ties a=0.7 b=0.3 --out DIR")
    if out is None:
        raise ConfigError("--out is missing: where should the combined adapter go?")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Conflict(f"{out} is already there", help="choose a new folder, or remove this one")
    if len(sources) == 1 and sources[0].endswith((".yaml", ".yml")):
        recipe = read_recipe(Path(sources[0]))
        told = {
            "--rule": rule, "--set": options or None, "--density": density, "--rank": rank, "--seed": seed,
            "--others": others, "--base": recipe.base and base,
            "--allow-base-mismatch": recipe.allow_base_mismatch and allow_base_mismatch,
        }  # fmt: skip
        if named := [option for option, given in told.items() if given is not None]:
            raise ConfigError(
                f"{sources[0]} says how to combine; {', '.join(named)} would have no effect",
                help="write it into the recipe",
            )
        missing = {"base": base, "allow_base_mismatch": allow_base_mismatch}
        recipe = recipe.model_copy(update={key: value for key, value in missing.items() if value is not None})
    else:
        fields: dict[str, Any] = {
            "rule": rule,
            "options": _options(options or [], density),
            "adapters": _entries(sources),
            "base": base,
            "rank": rank,
            "seed": seed,
            "others": others,
            "allow_base_mismatch": allow_base_mismatch,
        }
        given = {key: value for key, value in fields.items() if value is not None}
        recipe = recipe_of(given, "these adapters can't be combined")
    loaded = {name: Adapter.load(entry.path) for name, entry in recipe.adapters.items()}
    host = _base(recipe)
    made = run_recipe(recipe, {e.path: loaded[n] for n, e in recipe.adapters.items()}.__getitem__, host)
    before = interference(loaded, host, {t.target for t in made.report.targets}) if len(loaded) > 1 else None
    made.adapter.save(out)
    if as_json:
        say_json(_as_json(made, before, out))
    else:
        _tell(made, before, out)


def _base(recipe: Recipe) -> HostSource | None:
    if recipe.base is None:
        return None
    from veneer.models.load import load_base

    return load_base(recipe.base)


def _entries(sources: Sequence[str]) -> dict[str, dict[str, Any]]:
    """FOLDER=WEIGHT arguments as recipe entries. A folder's own name is the adapter's; if two agree, the whole path is."""
    pairs: list[tuple[str, float]] = []
    problems = []
    for text in sources:
        path, _, weight = text.rpartition("=")
        try:
            pairs.append((path, float(weight)))
        except ValueError:
            problems.append(f"'{text}' is not FOLDER=WEIGHT")
    paths = [path for path, _ in pairs]
    problems += [f"there is no folder '{path}'" for path in paths if not Path(path).is_dir()]
    problems += [f"'{path}' is given twice" for path in sorted({p for p in paths if paths.count(p) > 1})]
    if problems:
        raise ConfigError(
            f"these arguments are wrong:\n{listed(problems)}", help="write adapters as FOLDER=WEIGHT: legal=0.7"
        )
    names = [Path(path).name for path in paths]
    unique = names if len(set(names)) == len(names) else paths
    return {name: {"path": path, "weight": weight} for name, (path, weight) in zip(unique, pairs, strict=True)}


def _options(texts: Sequence[str], density: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {} if density is None else {"density": density}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--set {text}: expected KEY=VALUE")
        if key in found:
            raise ConfigError(f"--set {text}: {key} is given twice", help="say it once")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text}: the value is not YAML: {error}", help="as --set density=0.3") from error
    return found


def _list_rules(as_json: bool) -> None:
    from veneer.algebra import load_all, schema

    found = {
        name: ((rule.__doc__ or "").strip(), {k: f.default for k, f in schema(name).model_fields.items()})
        for name, rule in sorted(load_all().items())
    }
    if as_json:
        say_json({name: {"does": text, "options": given} for name, (text, given) in found.items()})
        return
    rows = [[name, ", ".join(f"{k}={v}" for k, v in given.items()), text] for name, (text, given) in found.items()]
    say_table(["rule", "options", "does"], rows)


def _as_json(made: Combination, before: Interference | None, out: Path) -> dict[str, Any]:
    report = asdict(made.report) | {"error": made.report.error}
    pairs = None if before is None else [asdict(p) for p in before.overall]
    return {"out": str(out), "digest": made.adapter.digest, "report": report, "interference": pairs}


def _tell(made: Combination, before: Interference | None, out: Path) -> None:
    if before is not None:
        say_table(
            ["pair", "cosine", "signs differ", "input overlap", "output overlap", "norm ratio"],
            [
                [
                    f"{p.first}, {p.second}",
                    f"{p.cosine:.3f}",
                    f"{p.sign_conflict:.1%}",
                    f"{p.input_overlap:.1%}",
                    f"{p.output_overlap:.1%}",
                    f"{p.norm_ratio:.2f}",
                ]
                for p in before.overall
            ],
            title="before combining",
        )
        for line in before.warnings():
            note(f"warning: {line}")
    report = made.report
    say(
        f"{out}: {report.rule} over {len(report.targets)} targets, {count_text(made.adapter.num_parameters)} parameters"
    )
    if report.error > 0:
        say(
            f"relative error of the projection {report.error:.2%}, worst {report.worst.target}: {report.worst.error:.2%}"
        )
    else:
        say("nothing was projected: the result is exact for its rule")
    for line in report.dropped:
        note(f"left out: {line}")
