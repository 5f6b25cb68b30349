"""Write files that other tools load: .gguf models and adapters, Ollama, PEFT, vLLM. What they can't carry is refused.

    veneer export --format gguf --base smollm2-135m --adapter runs/tickets/adapter --type q8_0 --out tickets.gguf
    veneer export --format gguf-adapter --base smollm2-135m --adapter runs/tickets/adapter --out tickets-lora.gguf
    veneer export --format ollama --base smollm2-135m --adapter runs/tickets/adapter --out ollama/
    veneer export --format vllm --adapter runs/tickets/adapter --out served/
    veneer export --for vllm --adapter runs/tickets/adapter

gguf merges the adapter into the model in fp32 and rounds once. gguf-adapter keeps it apart, for llama.cpp's --lora. vllm writes
a PEFT folder with one rank and every scale folded in, which SGLang reads too; --for only says whether that would work. A model
card with what is known of base, data, figures, lineage and licence goes along: README.md in a folder, NAME.README.md by a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli._card import Licence, story_of
from veneer.cli._options import Json, load_adapters
from veneer.cli._output import bytes_text, say, say_json
from veneer.errors import ConfigError, Conflict, Unsupported
from veneer.registry import did_you_mean

if TYPE_CHECKING:
    from veneer.adapter import Adapter
    from veneer.formats.card import Form, Story
    from veneer.models.base import Base


@dataclass(frozen=True)
class Order:
    """What was asked for, and what its model card can say."""

    out: Path
    base: str | None
    adapter: Adapter | None
    filetype: Any
    apart: bool
    untie: bool
    allow_base_mismatch: str | None
    story: Story

    def model(self) -> Base:
        from veneer.models.load import load_base

        if self.base is None:
            raise ConfigError("--base is missing: this format needs the model")
        return load_base(self.base)

    def checked(self, base: Base) -> dict[str, str]:
        """How base and adapter were found to belong together, for the card; `BaseMismatch` where they don't."""
        from veneer.base.identity import compare

        if self.adapter is None:
            return {}
        return {"base check": compare(self.adapter, base, allow=self.allow_base_mismatch).detail}

    def merged(self, base: Base) -> Any:
        """The model to write: the base, or the base with the adapter in it."""
        from veneer.merge import Merged, store_of

        if self.adapter is None or self.apart:
            return store_of(base)
        return Merged(base, self.adapter, untie=self.untie, allow_base_mismatch=self.allow_base_mismatch)

    def required(self) -> Adapter:
        if self.adapter is None:
            raise ConfigError("--adapter is missing: this format is for an adapter")
        return self.adapter

    def write_card(self, place: Path, form: Form, base: Base | None, facts: Mapping[str, str]) -> None:
        """The model card of what was written, where there is an adapter to tell of."""
        from veneer.formats.card import card

        if self.adapter is None:
            return
        told = replace(self.story, facts={**self.story.facts, **facts})
        place.write_text(card(self.adapter, told, form, None if base is None else base.name), "utf-8")


def command(
    out: Annotated[Path | None, typer.Option("--out", help="File or folder to write.")] = None,
    form: Annotated[str, typer.Option("--format", help="gguf, gguf-adapter, ollama, peft or vllm.")] = "",
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="A catalogue name, a folder, a .gguf file or a hub id.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", metavar="PATH[@SCALE]", help="The adapter folder to export.")
    ] = None,
    filetype: Annotated[str, typer.Option("--type", help="Of a .gguf file: f32, f16, bf16 or q8_0.")] = "f16",
    apart: Annotated[bool, typer.Option("--apart", help="ollama: keep the adapter in a file of its own.")] = False,
    untie: Annotated[bool, typer.Option("--untie", help="Give a tied head a tensor of its own.")] = False,
    allow_base_mismatch: Annotated[
        str | None, typer.Option(metavar="REASON", help="Take an adapter of another base; the card says why.")
    ] = None,
    licence: Licence = None,
    target: Annotated[
        str | None, typer.Option("--for", help="Only say what this tool (vllm, sglang) could not carry.")
    ] = None,
    as_json: Json = False,
) -> None:
    found = None if adapter is None else next(iter(load_adapters([adapter]).values()))
    if target is not None:
        _check(target, found, as_json)
        return
    if form not in FORMATS:
        raise ConfigError(f"--format '{form}' is not known", help=did_you_mean(form, list(FORMATS)))
    if filetype not in ("f32", "f16", "bf16", "q8_0"):
        raise ConfigError(f"--type '{filetype}' is not known", help="f32, f16, bf16 or q8_0")
    if out is None:
        raise ConfigError("--out is missing: where should the files go?")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise Conflict(f"{out} is already there", help="choose a new name, or remove it")
    if not out.is_dir() and card_beside(out).exists():
        raise Conflict(f"{card_beside(out)} is already there", help="the model card goes there; choose a new name")
    order = Order(out, base, found, filetype, apart, untie, allow_base_mismatch, _story(adapter, licence, base))
    facts = FORMATS[form](order)
    files = sorted(out.iterdir() if out.is_dir() else [p for p in (out, card_beside(out)) if p.exists()])
    written = {str(p): p.stat().st_size for p in files}
    if as_json:
        say_json({"format": form, "files": written, **facts})
        return
    for path, size in written.items():
        say(f"{path}: {bytes_text(size)}")
    for line in facts.values():
        say(str(line))


def _story(adapter: str | None, licence: str | None, base: str | None) -> Story:
    from veneer.formats.card import Story

    return Story(licence=licence) if adapter is None else story_of(adapter, licence, base)


def card_beside(file: Path) -> Path:
    """Where the model card of a single file goes."""
    return file.with_name(f"{file.stem}.README.md")


def _check(target: str, adapter: Adapter | None, as_json: bool) -> None:
    from veneer.formats.vllm import limits

    if target not in ("vllm", "sglang"):
        raise ConfigError(f"--for '{target}' is not known", help="known: vllm, sglang")
    if adapter is None:
        raise ConfigError("--adapter is missing: which one should be served?")
    problems = limits(adapter, "vllm" if target == "vllm" else "sglang")
    if as_json:
        say_json({"for": target, "problems": problems})
    else:
        for problem in problems:
            say(f"can't be carried: {problem}")
        say("it can be served; export it with --format vllm" if not problems else "merge it, or serve it with veneer")
    if problems:
        raise typer.Exit(1)


def _gguf(order: Order) -> dict[str, str]:
    from veneer.formats.gguf_export import export_model
    from veneer.formats.gguf_words import tokenizer_fields

    base = order.model()
    facts = order.checked(base)
    model = order.merged(base)
    order.out.parent.mkdir(parents=True, exist_ok=True)
    words = tokenizer_fields(base.tokenizer, base.config.vocab)
    export_model(model, order.out, words, filetype=order.filetype, name=base.name)
    order.write_card(card_beside(order.out), "gguf", base, {"type": order.filetype, **facts})
    return {}


def _gguf_adapter(order: Order) -> dict[str, str]:
    from veneer.formats.gguf_export import export_adapter

    adapter, base = order.required(), order.model()
    facts = order.checked(base)
    order.out.parent.mkdir(parents=True, exist_ok=True)
    export_adapter(adapter, base.hf_config, order.out, filetype=order.filetype, name=order.out.stem)
    order.write_card(card_beside(order.out), "gguf-adapter", base, {"type": order.filetype, **facts})
    return {}


def _ollama(order: Order) -> dict[str, str]:
    from veneer.formats.folder import replace_folder
    from veneer.formats.gguf_export import export_adapter, export_model
    from veneer.formats.gguf_words import tokenizer_fields
    from veneer.formats.ollama import modelfile

    base = order.model()
    facts = order.checked(base)
    tokenizer = base.require_tokenizer()
    apart = order.required() if order.apart else None
    text = modelfile(tokenizer, "model.gguf", None if apart is None else "adapter.gguf")
    model = order.merged(base)
    words = tokenizer_fields(tokenizer, base.config.vocab)

    def write(folder: Path) -> None:
        export_model(model, folder / "model.gguf", words, filetype=order.filetype, name=base.name)
        if apart is not None:
            export_adapter(apart, base.hf_config, folder / "adapter.gguf", filetype="f32")
        (folder / "Modelfile").write_text(text, "utf-8")
        order.write_card(folder / "README.md", "ollama", base, {"type": order.filetype, **facts})

    replace_folder(order.out, frozenset(), write)
    return {"next": f"ollama create {base.name} -f {order.out / 'Modelfile'}"}


def _peft(order: Order) -> dict[str, str]:
    from veneer.formats.peft import expressible
    from veneer.methods import folded

    adapter = order.required()
    if not expressible(folded(adapter)):
        raise Unsupported(
            f"PEFT's format can't say this adapter ({adapter.spec.kind})",
            help="`veneer merge` bakes it into a model; `adapter.save` keeps it for veneer",
        )
    adapter.save(order.out)
    order.write_card(order.out / "README.md", "adapter", None, {})
    return {}


def _vllm(order: Order) -> dict[str, str]:
    from veneer.formats.vllm import servable

    adapter, rank = servable(order.required())
    adapter.save(order.out)
    story = replace(order.story, parents={order.required().digest: order.story.name})
    told = {"written": "one rank for all targets, every scale folded into B"}
    replace(order, adapter=adapter, story=story).write_card(order.out / "README.md", "adapter", None, told)
    return {"next": f"vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules {order.out.name}={order.out}"}


FORMATS: dict[str, Callable[[Order], dict[str, str]]] = {
    "gguf": _gguf,
    "gguf-adapter": _gguf_adapter,
    "ollama": _ollama,
    "peft": _peft,
    "vllm": _vllm,
}
