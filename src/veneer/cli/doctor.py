"""Say what is wrong with an adapter, a base, or the two together: each finding with its cause and what to do.

    veneer doctor runs/tickets/adapter
    veneer doctor --base smollm2-135m runs/tickets/adapter
    veneer doctor --base ./my-model

Looks for unmatched targets, dead or non-finite tensors, updates that are zero, a wrong base, trouble with the chat template or
the end-of-text token, scales that surprise, and an adapter that says something else than when it was saved. The exit code is 1
where an error was found.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli._options import Json
from veneer.cli._output import say, say_json
from veneer.errors import ConfigError


def command(
    adapter: Annotated[Path | None, typer.Argument(help="An adapter folder.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="A catalogue name, a folder, a .gguf file or a hub id.")
    ] = None,
    as_json: Json = False,
) -> None:
    from veneer.diagnose import (
        Finding,
        adapter_findings,
        base_findings,
        file_findings,
        pair_findings,
        probe_findings,
        worst,
    )
    from veneer.models.load import load_base

    if adapter is None and base is None:
        raise ConfigError("nothing to look at", help="give an adapter folder, --base BASE, or both")
    findings: list[Finding] = []
    loaded = None
    if adapter is not None:
        loaded, findings = file_findings(adapter)
        if loaded is not None:
            findings += adapter_findings(loaded)
    if base is not None:
        model = load_base(base)
        findings += base_findings(model.tokenizer, model.config.vocab)
        if loaded is not None:
            together = pair_findings(loaded, model, model.tokenizer.template if model.tokenizer else None)
            findings += together if worst(together) == "error" else [*together, *probe_findings(loaded, model)]
    level = worst(findings)
    if as_json:
        say_json({"worst": level, "findings": [asdict(f) for f in findings]})
    else:
        for finding in findings:
            say(f"{finding.level}: {finding.where}: {finding.what}\n  cause: {finding.cause}\n  fix:   {finding.fix}")
        say("nothing is wrong" if level in (None, "note") else f"{sum(f.level == level for f in findings)} {level}(s)")
    if level == "error":
        raise typer.Exit(1)
