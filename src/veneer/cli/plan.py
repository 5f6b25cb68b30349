"""Show bytes by category and adapter sizes, before anything is loaded.

Ask about a size, a base, or a run file:

    veneer plan --params 7B --methods full,lora,qlora --rank 16
    veneer plan --base smollm2-135m --methods lora,dora,ia3 --tokens 4096
    veneer plan --config tickets.yaml

A method with a q before its name (qlora, qdora) trains on an NF4 base with double quantisation. Sizes are decimal: 1 GB is 1e9
bytes. Base, adapter, gradients and optimizer are exact; the rest follows what the decoder keeps for --tokens tokens a pass.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli._options import Json
from veneer.cli._output import bytes_text, count_text, say, say_json, say_table
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.methods import Method
    from veneer.models.config import DecoderConfig
    from veneer.plan import Estimate, Work
    from veneer.types import BaseShape


@dataclass(frozen=True)
class Question:
    """One row of the answer: a method on a base, run in a certain way."""

    name: str
    spec: Method
    work: Work


def command(
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="A base; its configuration is enough.")
    ] = None,
    params: Annotated[
        str | None, typer.Option("--params", metavar="SIZE", help="A size: 7B, 135M, llama-3-8b.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A run file.")] = None,
    methods: Annotated[str, typer.Option("--methods", help="Method kinds, with commas between.")] = "full,lora,qlora",
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of the methods that have one.")] = 16,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens in one pass.")] = 2048,
    label_share: Annotated[
        float, typer.Option("--label-share", min=0, max=1, help="Share of them with a label.")
    ] = 0.5,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16 or float32.")] = "bfloat16",
    as_json: Json = False,
) -> None:
    from veneer.plan import Work

    if sum(given is not None for given in (base, params, config)) != 1:
        raise ConfigError("say what to plan for, once", help="one of --base BASE, --params 7B or --config run.yaml")
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"--dtype is bfloat16 or float32, got '{dtype}'")
    work = Work(tokens=tokens, label_share=label_share, dtype=dtype)
    if config is not None:
        label, decoder, questions = _from_run_file(config, work)
    else:
        questions = [_question(kind, rank, work) for kind in methods.split(",")]
        label, decoder = _describe(base, params)
    _answer(label, decoder, questions, with_targets=config is not None, as_json=as_json)


def _question(kind: str, rank: int, work: Work) -> Question:
    from veneer.methods import METHODS, load_all, parse

    load_all()
    kind = kind.strip()
    plain = kind[1:] if kind not in METHODS and kind.startswith("q") and kind[1:] in METHODS else kind
    fields: dict[str, Any] = {"kind": plain}
    if "rank" in METHODS[plain].model_fields:
        fields["rank"] = rank
    return Question(kind, parse(fields), work if plain == kind else replace(work, quantize="nf4-dq"))


def _from_run_file(path: Path, work: Work) -> tuple[str, DecoderConfig, list[Question]]:
    """What the first run of a file would do at its largest; where memory is short, training takes smaller passes."""
    from veneer.train import read_runs
    from veneer.train.optimizers import load_all

    run = read_runs(path)[0].config
    label, decoder = _describe(run.base, None)
    tokens, optimizer = run.train.tokens_per_pass, load_all()[run.train.optimizer]
    work = replace(
        work,
        quantize=run.quantize,
        tokens=min(work.tokens, run.train.tokens_per_step) if tokens == "auto" else tokens,
        recompute=decoder.layers if run.train.recompute == "all" else 0,
        dtype=work.dtype if run.train.dtype == "auto" else run.train.dtype,
        state=optimizer.state,
        freezes=optimizer.freezes,
    )
    spec = run.spec()
    return label, decoder, [Question(spec.kind, spec, work)]


def _describe(base: str | None, params: str | None) -> tuple[str, DecoderConfig]:
    from veneer.models.families import decoder_config
    from veneer.models.sources import locate, open_source
    from veneer.plan import known_base

    if base is not None:
        return base, decoder_config(open_source(locate(base)).config)
    assert params is not None
    name, config = known_base(params)
    return f"a base with the shape of {name}", config


def _answer(label: str, config: DecoderConfig, questions: list[Question], *, with_targets: bool, as_json: bool) -> None:
    from veneer.models.families import layout
    from veneer.plan import estimate, sizes_of

    where = layout(config)
    shape, sizes = where.base_shape(config), sizes_of(config, where)
    found: list[tuple[Question, Estimate]] = []
    for question in questions:
        found.append((question, estimate(config, where, question.spec, _targets(shape, question.spec), question.work)))
    if as_json:
        rows = [_as_json(question, answer) for question, answer in found]
        say_json({"base": label, "parameters": sizes.parameters, "in_linear": sizes.in_linear, "methods": rows})
        return
    say(f"{label}: {count_text(sizes.parameters)} parameters, {count_text(sizes.in_linear)} of them in linear layers")
    if with_targets:
        _say_targets(shape, questions)
    _say_bytes(found)


def _targets(shape: BaseShape, spec: Method) -> tuple[str, ...]:
    from veneer.inject.targets import select

    places = spec.places(shape)
    return select(shape, spec).targets if places is None else places


def _say_targets(shape: BaseShape, questions: list[Question]) -> None:
    from veneer.inject.targets import select

    for question in questions:
        if question.spec.places(shape) is None:
            table = select(shape, question.spec).table
            rows = [(m.entry, str(len(m.targets)), count_text(m.parameters)) for m in table]
            say_table(("targets", "layers", "parameters"), rows)


def _say_bytes(found: list[tuple[Question, Estimate]]) -> None:
    work = found[0][0].work
    rows = [("trained numbers", *(count_text(answer.parameters) for _, answer in found))]
    for category in found[0][1].bytes:
        rows.append((category, *(bytes_text(answer.bytes[category]) for _, answer in found)))
    rows.append(("total", *(bytes_text(answer.total) for _, answer in found)))
    say_table(("", *(question.name for question, _ in found)), rows)
    say(
        f"{work.tokens} tokens a pass, {work.label_share:.0%} with a label, {work.dtype}; the adapter is trained in fp32"
    )


def _as_json(question: Question, answer: Estimate) -> dict[str, Any]:
    return {
        "method": question.name,
        "spec": {"kind": question.spec.kind} | question.spec.model_dump(mode="json"),
        "work": {name: value for name, value in asdict(question.work).items() if name != "state"},
        "trained": answer.parameters,
        "stored": answer.stored,
        "bytes": dict(answer.bytes) | {"total": answer.total},
    }
