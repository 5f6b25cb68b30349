"""Write a base with an adapter in it as a plain checkpoint that transformers loads.

    veneer merge --base smollm2-135m --adapter runs/tickets/adapter --out merged
    veneer merge --base ./my-model --adapter a@0.5 --out merged --unmergeable
    veneer merge --base ./my-model --adapter a --out merged-4bit --quantize nf4-dq
    veneer merge --undo merged --out base-again

The sum is formed in fp32 and rounded once. How much of the update survived the rounding is printed, and so is how far the merged
model is from base and adapter on probe prompts. The folder gets a model card (README.md): what is known of base, data, figures,
lineage and licence. The base is only read.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli._card import Licence, story_of
from veneer.cli._options import Json, load_adapters
from veneer.cli._output import note, say, say_json, say_table
from veneer.errors import ConfigError, Unsupported

if TYPE_CHECKING:
    from veneer.adapter import Adapter
    from veneer.formats.card import Story
    from veneer.merge import Agreement, MergeReport
    from veneer.models.base import Base


def command(
    out: Annotated[Path, typer.Option("--out", help="A new folder for the checkpoint.")],
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="A catalogue name, a folder, a .gguf file or a hub id.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", metavar="PATH[@SCALE]", help="The adapter folder to merge.")
    ] = None,
    untie: Annotated[bool, typer.Option("--untie", help="Give a tied head a tensor of its own.")] = False,
    stochastic: Annotated[
        int | None, typer.Option("--stochastic", metavar="SEED", help="Round at random, without bias, from this seed.")
    ] = None,
    unmergeable: Annotated[
        bool, typer.Option("--unmergeable", help="Keep a record for a way back that is exact to the bit.")
    ] = False,
    quantize: Annotated[
        str | None, typer.Option("--quantize", help="Write the projections in 4 bits: nf4, nf4-dq, fp4, fp4-dq.")
    ] = None,
    route: Annotated[
        str, typer.Option("--route", help="To 4 bits: from the original weights, or stochastic on the 4-bit grid.")
    ] = "original",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Load the base in auto, float32 or bfloat16; a folder is written in its own.")
    ] = "auto",
    undo: Annotated[Path | None, typer.Option("--undo", metavar="DIR", help="A merged folder to take apart.")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare on probe prompts afterwards.")] = True,
    allow_base_mismatch: Annotated[
        str | None, typer.Option(metavar="REASON", help="Merge into another base; the reason is recorded.")
    ] = None,
    licence: Licence = None,
    as_json: Json = False,
) -> None:
    from veneer.merge import agreement, merge, unmerge

    if undo is not None:
        unmerge(undo, out)
        say_json({"out": str(out)}) if as_json else say(f"{out} is the base again, every restored tensor checked")
        return
    if base is None or adapter is None:
        raise ConfigError("merge needs --base and --adapter", help="or --undo DIR to take a merged folder apart")
    found, story = next(iter(load_adapters([adapter]).values())), story_of(adapter, licence, base)
    if quantize is not None:
        if unmergeable:
            raise ConfigError("--unmergeable and --quantize exclude each other", help="keep the base to go back to")
        _four_bit(base, found, out, quantize, route, stochastic or 0, untie, allow_base_mismatch, story, as_json)
        return
    loaded = _loaded(base, dtype) if check or dtype != "auto" else None
    report = merge(
        base if loaded is None else loaded,
        found,
        out,
        untie=untie,
        stochastic=stochastic,
        unmergeable=unmergeable,
        allow_base_mismatch=allow_base_mismatch,
        story=story,
    )
    same = None if loaded is None or not check else agreement(loaded, found, out)
    if as_json:
        say_json(_as_json(report, same))
    else:
        _tell(report, same)


def _four_bit(
    base: str,
    adapter: Adapter,
    out: Path,
    quantize: str,
    route: str,
    seed: int,
    untie: bool,
    allow: str | None,
    story: Story,
    as_json: bool,
) -> None:
    from veneer.merge import merge_four_bit

    levels, dash, double = quantize.partition("-")
    if levels not in ("nf4", "fp4") or (dash and double != "dq"):
        raise ConfigError(
            f"--quantize '{quantize}' is not known", help="nf4 or fp4, nf4-dq or fp4-dq (scales quantised too)"
        )
    if route not in ("original", "stochastic"):
        raise ConfigError(f"--route '{route}' is not known", help="original or stochastic")
    report = merge_four_bit(
        base,
        adapter,
        out,
        route="original" if route == "original" else "stochastic",
        levels="nf4" if levels == "nf4" else "fp4",
        double=bool(double),
        seed=seed,
        untie=untie,
        allow_base_mismatch=allow,
        story=story,
    )
    if as_json:
        say_json(asdict(report) | {"out": str(out)})
        return
    say(f"{out}: {len(report.gains)} projections in {quantize}, route {report.route}")
    say(f"gain {report.gain:.3f}: 1 keeps the update, 0 has lost it (lowest {min(report.gains.values()):.3f})")
    say(f"base: {report.base_check.outcome} ({report.base_check.detail})")


def _loaded(base: str, dtype: str) -> Base | None:
    """The base with its decoder, or None for a family outside the table, which merges file to file all the same."""
    from veneer.models.load import load_base

    try:
        return load_base(base, dtype=dtype)
    except Unsupported as error:
        note(f"merging without the check on probe prompts: {error.message}")
        return None


def _as_json(report: MergeReport, same: Agreement | None) -> dict[str, Any]:
    fields = asdict(report) | {"out": str(report.out), "survived": 1 - report.lost, "warnings": report.warnings()}
    return fields | {"check": None if same is None else asdict(same)}


def _tell(report: MergeReport, same: Agreement | None) -> None:
    worst = sorted(report.tensors, key=lambda t: -t.lost)[:5]
    rows = [[t.tensor, f"{t.relative:.2e}", f"{t.lost:.2%}"] for t in worst]
    say_table(["tensor (worst first)", "update / weight", "lost to rounding"], rows)
    say(f"{report.out}: {len(report.tensors)} tensors changed, {1 - report.lost:.2%} of the update survived rounding")
    say(f"base: {report.base_check.outcome} ({report.base_check.detail})")
    if report.untied:
        say("the head is a tensor of its own now, and config.json says so")
    if report.unmerge is not None:
        say(f"the way back takes {report.unmerge:.2f} bits a weight: veneer merge --undo {report.out} --out DIR")
    if same is not None:
        say(
            f"merged against base + adapter on {same.tokens} tokens: KL {same.kl:.2e} nats a token "
            f"(worst {same.worst_kl:.2e}), same first choice on {same.top1:.1%}"
        )
    for line in report.warnings():
        note(f"warning: {line}")
