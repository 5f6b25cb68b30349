"""Score a base and adapters on held-out rows: the task, and what it costs elsewhere.

Prints one column per adapter beside the base, and each change with its 95 % interval (paired, over rows). Loss always; exact
match, F1 and chrF of greedy answers where the rows ask something; accuracy where the answers are labels.

    veneer eval --base smollm2-135m --adapter runs/tickets --data tickets.eval.jsonl --general general.jsonl
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from veneer.cli._options import AdapterPaths, BaseName, Json, load_adapters
from veneer.cli._output import note, say, say_json, say_table


def command(
    base: BaseName,
    data: Annotated[Path, typer.Option("--data", help="Held-out rows of the task.")],
    adapter: AdapterPaths = [],  # noqa: B006
    general: Annotated[
        Path | None, typer.Option("--general", help="Text that no adapter is about: forgetting.")
    ] = None,
    format: Annotated[str, typer.Option("--format", help="Of --data; auto finds it by the keys.")] = "auto",
    generate: Annotated[int, typer.Option("--generate", min=0, help="Rows answered by generation; 0 for none.")] = 100,
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Score answers that are labels.")] = True,
    max_length: Annotated[int | None, typer.Option("--max-length", min=2, help="Of a row, in tokens.")] = None,
    on_too_long: Annotated[
        Literal["error", "truncate"], typer.Option("--on-too-long", help="A row above that.")
    ] = "error",
    train_on: Annotated[
        Literal["assistant", "last", "all"], typer.Option("--train-on", help="What counts.")
    ] = "assistant",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")] = "auto",
    quantize: Annotated[str | None, typer.Option("--quantize", help="nf4, nf4-dq, int8, bf12, ...")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the resampling.")] = 0,
    resamples: Annotated[int, typer.Option("--resamples", min=100, help="Draws behind each interval.")] = 1000,
    allow_base_mismatch: Annotated[
        str | None,
        typer.Option("--allow-base-mismatch", metavar="REASON", help="Score an adapter of another base; say why."),
    ] = None,
    as_json: Json = False,
) -> None:
    from veneer.data import load
    from veneer.evaluate import Settings, evaluate
    from veneer.models.load import load_base

    settings = Settings(
        max_length=max_length,
        on_too_long=on_too_long,
        train_on=train_on,
        generate=generate,
        labels=labels,
        resamples=resamples,
        seed=seed,
    )
    rows, held_out = load(data, format), None if general is None else load(general)
    if rows.ignored:
        note(f"keys of {data} that the format '{rows.format}' has no use for: {', '.join(rows.ignored)}")
    report = evaluate(
        load_base(base, dtype=dtype, quantize=quantize),
        load_adapters(adapter),
        rows,
        general=held_out,
        settings=settings,
        allow_base_mismatch=allow_base_mismatch,
        progress=note,
    )
    for warning in report.warnings:
        note(f"warning: {warning}")
    if as_json:
        say_json(report.as_dict())
    else:
        say_table(*report.table())
        say(f"{len(rows)} rows of {data}; intervals over rows, {resamples} draws; --json has every figure's own")
