"""The library's verbs: what they promise, and that a refusal changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.library.shelf import BASE, FakeBase, files_under, folder, make, refs
from veneer.errors import BaseMismatch, ConfigError, Conflict, FormatError, NotFound
from veneer.library import Demand, Library, Loralib, parse_reference, route
from veneer.library.records import Alias


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library")


def test_add_numbers_versions_and_gives_every_byte_back(library: Library, tmp_path: Path) -> None:
    source = folder(tmp_path / "a")
    first = library.add(source, "tickets")
    second = library.add(make(1), "tickets")
    assert (first.version.ref, second.version.ref, first.new) == ("tickets@1", "tickets@2", True)
    assert first.version.digest == make().digest
    assert (first.version.method, first.version.rank, first.version.targets) == ("lora", 4, 4)
    out = library.checkout("tickets@1", tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {p.name for p in source.iterdir()}
    assert all((out / p.name).read_bytes() == p.read_bytes() for p in source.iterdir())
    loaded = library.load(first.version)
    assert loaded.digest == make().digest
    assert torch.equal(loaded.parts[0].tensors["A"], make().parts[0].tensors["A"])


def test_the_same_adapter_is_the_same_version_and_shares_its_bytes(library: Library, tmp_path: Path) -> None:
    source = folder(tmp_path / "a")
    library.add(source, "tickets")
    before = files_under(tmp_path / "library")
    again = library.add(source, "tickets")
    assert (again.new, again.version.ref) == (False, "tickets@1")
    assert "already" in again.notes[0]
    assert files_under(tmp_path / "library") == before
    other = library.add(source, "letters")
    assert other.version.digest == again.version.digest
    assert {f for f in files_under(tmp_path / "library") if f.startswith("blobs")} == {
        f for f in before if f.startswith("blobs")
    }


def test_what_is_given_with_an_adapter_that_is_there_is_kept_or_named(library: Library, tmp_path: Path) -> None:
    source = folder(tmp_path / "a")
    library.add(make(1), "other")
    library.add(source, "tickets", metrics={"loss": 2.0}, note="first")
    library.record("tickets", {"loss": 1.5})
    (source / "README.md").write_text("a card")
    again = library.add(source, "tickets", metrics={"f1": 0.5}, note="second", parents=["other@1"])
    assert again.version.ref == "tickets@1"
    assert library.show("tickets").metrics == {"f1": 0.5, "loss": 1.5}
    dropped, recorded = again.notes[1:]
    assert "not kept" in dropped and make(1).digest[:12] in dropped and "the note" in dropped and "README.md" in dropped
    assert recorded == "recorded for it: f1"
    library.add(source, "tickets", metrics={"loss": 1.0})
    assert library.show("tickets").metrics == {"f1": 0.5, "loss": 1.0}
    assert len(library.add(source, "tickets", metrics={"loss": 1.0}, note="first").notes) == 2  # README.md, as before


def test_another_chat_template_is_another_version(library: Library, tmp_path: Path) -> None:
    """The digest is the same, but a served chat is not."""
    source = folder(tmp_path / "a")
    template = source / "chat_template.jinja"
    for text in ("{{ 'one' }}", "{{ 'two' }}"):
        template.write_text(text)
        assert library.add(source, "tickets").new
    assert refs(library.list()) == ["tickets@1", "tickets@2"]
    assert library.load("tickets@1").provenance.chat_template == "{{ 'one' }}"
    assert library.show("tickets@2").provenance["chat_template"] == "{{ 'two' }}"
    template.write_text("{{ 'one' }}")
    assert library.add(source, "tickets").version.ref == "tickets@1"
    template.unlink()
    assert library.add(source, "tickets").version.ref == "tickets@3"
    assert library.verify().is_clean


def test_a_resaved_copy_is_recognised_by_its_digest(library: Library, tmp_path: Path) -> None:
    source = folder(tmp_path / "a")
    library.add(source, "tickets")
    (source / "README.md").write_text("a card")
    assert library.add(source, "tickets").new is False


@pytest.mark.parametrize("with_sidecar", [True, False])
def test_the_digest_it_loads_with_is_the_one_of_its_numbers(
    library: Library, tmp_path: Path, with_sidecar: bool
) -> None:
    """Loading takes the digest from the catalogue, as the bytes are proved to be those that were added."""
    source = folder(tmp_path / "a", 5)
    if not with_sidecar:
        (source / "veneer.json").unlink()
    version = library.add(source, "a").version
    loaded = library.load("a")
    again = replace(loaded)  # knows nothing yet
    assert loaded.digest == again.digest == version.digest


def test_a_name_means_production_or_else_the_newest(library: Library) -> None:
    library.add(make(0), "tickets")
    library.add(make(1), "tickets")
    assert library.resolve("tickets").version == 2
    library.alias("tickets@1", "production")
    assert library.resolve("tickets").version == 1
    assert library.resolve("tickets@production").version == 1
    assert library.resolve("tickets@2").version == 2


@pytest.mark.parametrize(
    "ref",
    [
        "../tickets", "a/b", "/etc/passwd", "tickets@../1", "Tickets", "a..b", "", "@1", "tickets@", "tickets@0",
        "tickets@1@2", "tickets@-1", "tickets\x00", "tickets\n", ".hidden", "a" * 65, "tickets@" + "9" * 10, "tickets@1.0",
    ],
)  # fmt: skip
def test_a_reference_is_never_a_path(library: Library, ref: str) -> None:
    library.add(make(), "tickets")
    with pytest.raises(ConfigError):
        library.resolve(ref)


def test_not_found_says_what_there_is(library: Library) -> None:
    with pytest.raises(NotFound, match="no library"):
        library.list()
    library.add(make(), "tickets")
    with pytest.raises(NotFound) as wrong_name:
        library.resolve("tikets")
    assert "tickets" in (wrong_name.value.help or "")
    with pytest.raises(NotFound) as wrong_version:
        library.resolve("tickets@9")
    assert "tickets@1" in (wrong_version.value.help or "")
    library.alias("tickets@1", "canary")
    with pytest.raises(NotFound) as wrong_alias:
        library.resolve("tickets@canari")
    assert "canary" in (wrong_alias.value.help or "")


def test_looking_makes_nothing(tmp_path: Path) -> None:
    library = Library(tmp_path / "nowhere")
    for ask in (library.list, library.revision, library.verify, library.gc, library.rebuild):
        with pytest.raises(NotFound):
            ask()
    assert not (tmp_path / "nowhere").exists()


def test_stock_counts_each_content_once(library: Library) -> None:
    same = make(0)
    versions = [library.add(adapter, name).version for adapter, name in ((same, "a"), (same, "b"), (make(1), "a"))]
    assert library.stock() == (2, versions[0].bytes + versions[2].bytes)


def test_list_filters(library: Library) -> None:
    library.add(make(0), "tickets")
    library.add(make(1), "tickets")
    library.add(make(2, base="cd" * 32, base_name="other"), "letters_x")
    library.add(make(3), "letters-y")
    library.alias("tickets@1", "production")
    assert refs(library.list()) == ["letters-y@1", "letters_x@1", "tickets@1", "tickets@2"]
    assert refs(library.list("letters*")) == ["letters-y@1", "letters_x@1"]
    assert refs(library.list("letters_x")) == ["letters_x@1"]  # `_` is itself, not SQL's wildcard
    assert refs(library.list(base="other")) == ["letters_x@1"]
    assert refs(library.list(base="cdcd")) == ["letters_x@1"]
    assert refs(library.list(alias="production")) == ["tickets@1"]
    assert refs(library.list(current=True)) == ["letters-y@1", "letters_x@1", "tickets@1"]
    assert refs(library.list(newest=True)) == ["letters-y@1", "letters_x@1", "tickets@2"]
    assert refs(library.list(method="dora")) == []
    assert refs(library.list(limit=1)) == ["letters-y@1"]
    with pytest.raises(ConfigError):
        library.list(limit=0)


def test_an_alias_moves_and_rolls_back_as_a_stack(library: Library) -> None:
    for seed in range(3):
        library.add(make(seed), "tickets")
    for version in (1, 2, 3):
        library.alias(f"tickets@{version}", "production")
    assert library.rollback("tickets").version == 2
    assert library.rollback("tickets").version == 1
    with pytest.raises(Conflict, match="no earlier version"):
        library.rollback("tickets")
    library.alias("tickets@3", "production")
    assert library.rollback("tickets").version == 1
    assert [move.version for move in library.history("tickets")] == [1, 2, 3, 2, 1, 3, 1]


def test_a_dropped_alias_comes_back_with_its_weight(library: Library) -> None:
    library.add(make(), "tickets")
    library.alias("tickets@1", "canary", weight=0.25)
    library.unalias("tickets", "canary")
    assert library.aliases() == ()
    with pytest.raises(NotFound):
        library.unalias("tickets", "canary")
    assert library.rollback("tickets", "canary").weight == 0.25


def test_a_rollback_takes_no_more_traffic_than_there_is(library: Library) -> None:
    for seed in range(3):
        library.add(make(seed), "tickets")
    library.alias("tickets@1", "production")
    library.alias("tickets@2", "canary", weight=0.9)
    library.unalias("tickets", "canary")
    library.alias("tickets@3", "beta", weight=0.9)
    before = library.aliases("tickets")
    with pytest.raises(ConfigError, match=r"got 0\.9 for canary, others have 0\.9") as refused:
        library.rollback("tickets", "canary")
    assert "the others leave 0.1" in (refused.value.help or "") and "--weight" in (refused.value.help or "")
    assert library.aliases("tickets") == before
    library.alias("tickets@3", "beta", weight=0.1)
    assert library.rollback("tickets", "canary").weight == 0.9


def test_moving_to_where_it_is_adds_no_history(library: Library) -> None:
    library.add(make(), "tickets")
    first = library.alias("tickets@1", "canary", weight=0.1)
    assert library.alias("tickets@canary", "canary") == first
    assert len(library.history("tickets")) == 1


@pytest.mark.parametrize(
    ("alias", "weight"),
    [("production", 0.5), ("canary", 1.5), ("canary", -0.1), ("canary", float("nan")), ("other", 0.8)],
)
def test_weights_are_shares(library: Library, alias: str, weight: float) -> None:
    library.add(make(), "tickets")
    library.alias("tickets@1", "beta", weight=0.3)
    with pytest.raises(ConfigError):
        library.alias("tickets@1", alias, weight=weight)
    assert [a.alias for a in library.aliases("tickets")] == ["beta"]


def test_route_splits_by_weight() -> None:
    at = "2026-01-01"
    aliases = [Alias("t", "production", 1, 1.0, at), Alias("t", "canary", 2, 0.25, at), Alias("t", "old", 3, 0.0, at)]
    draws = [i / 1000 for i in range(1000)]
    chosen = [route(aliases, draw).version for draw in draws]  # type: ignore[union-attr]
    assert (chosen.count(1), chosen.count(2), chosen.count(3)) == (750, 250, 0)
    assert route(aliases[1:], 0.0) is None


def test_no_adapter_takes_the_name_of_the_base(library: Library) -> None:
    with pytest.raises(ConfigError, match="another name"):
        library.add(make(), "base")
    library.add(make(), "bases")


def test_a_bare_name_is_no_version_to_promote(library: Library) -> None:
    library.add(make(), "tickets")
    with pytest.raises(ConfigError, match="which version"):
        library.alias("tickets", "production")


def test_the_gate_refuses_says_why_and_changes_nothing(library: Library) -> None:
    library.add(make(0), "tickets", metrics={"accuracy": 0.80, "general_loss": 2.00})
    library.add(make(1), "tickets", metrics={"accuracy": 0.90, "general_loss": 2.10})
    library.add(make(2), "tickets", metrics={"accuracy": 0.79})
    demands = [Demand.parse("accuracy=0.02"), Demand.parse("general_loss=0.05")]
    library.alias("tickets@1", "production", demands=demands)
    history, revision = library.history("tickets"), library.revision()
    with pytest.raises(Conflict) as worse:
        library.alias("tickets@2", "production")
    assert "general_loss is 2.1, worse than 2 of tickets@1 by 0.1 where 0.05 is allowed" in worse.value.message
    assert "accuracy" not in worse.value.message
    with pytest.raises(Conflict, match="general_loss was never recorded for it"):
        library.alias("tickets@3", "production")
    assert (library.history("tickets"), library.revision()) == (history, revision)
    library.record("tickets@3", {"general_loss": 2.04})
    assert library.alias("tickets@3", "production").version == 3
    assert library.alias("tickets@2", "production", force="the customer asked").version == 2
    assert "forced: the customer asked; general_loss" in library.history("tickets")[-1].reason


def test_new_demands_fail_together_with_the_move(library: Library) -> None:
    library.add(make(0), "tickets")
    library.add(make(1), "tickets", metrics={"loss": 1.0})
    library.alias("tickets@1", "production")
    with pytest.raises(Conflict, match="nothing to compare with"):
        library.alias("tickets@2", "production", demands=[Demand("loss", "lower")])
    assert library.demands("tickets", "production") == ()
    library.record("tickets@1", {"loss": 0.9})
    with pytest.raises(Conflict, match="worse"):
        library.alias("tickets@2", "production", demands=[Demand("loss", "lower")])
    assert library.alias("tickets@2", "production", demands=[Demand("loss", "higher")]).version == 2


def test_a_margin_is_the_decimals_that_were_written(library: Library) -> None:
    library.add(make(0), "tickets", metrics={"general_loss": 2.29})
    library.add(make(1), "tickets", metrics={"general_loss": 2.31})  # 2.31 - 2.29 > 0.02 in binary
    library.add(make(2), "tickets", metrics={"general_loss": 2.3301})
    library.alias("tickets@1", "production", demands=[Demand.parse("general_loss=0.02")])
    assert library.alias("tickets@2", "production").version == 2
    with pytest.raises(Conflict, match="worse than"):
        library.alias("tickets@3", "production")


@pytest.mark.parametrize("text", ["novelty=0.1", "loss:sideways", "loss=abc", "loss=-1", "loss=inf", "=1", "a b=1"])
def test_bad_demands(text: str) -> None:
    with pytest.raises(ConfigError):
        Demand.parse(text)


def test_metrics_are_finite_and_survive_in_show(library: Library) -> None:
    with pytest.raises(ConfigError, match="finite"):
        library.add(make(), "tickets", metrics={"loss": float("nan")})
    library.add(make(), "tickets", metrics={"loss": 1.5})
    assert library.record("tickets", {"loss": 1.25, "f1": 0.5}) == {"f1": 0.5, "loss": 1.25}
    assert library.show("tickets").metrics == {"f1": 0.5, "loss": 1.25}


def test_lineage(library: Library) -> None:
    library.add(make(0), "tickets")
    library.add(make(1, parents=(make(0).digest, "ef" * 32)), "better")
    library.add(make(2), "best", parents=["better@1"])
    assert library.show("better").parents == {make(0).digest: "tickets@1", "ef" * 32: None}
    assert library.show("better").children == ("best@1",)
    with pytest.raises(NotFound):
        library.add(make(3), "best", parents=["nothing@1"])
    with pytest.raises(FormatError, match="not a digest"):
        library.add(make(3, parents=("../../x",)), "best")


def test_remove_is_refused_while_needed(library: Library) -> None:
    library.add(make(0), "tickets")
    library.add(make(1, parents=(make(0).digest,)), "better")
    library.alias("tickets@1", "production")
    with pytest.raises(Conflict) as needed:
        library.remove("tickets@1")
    assert "tickets@production" in needed.value.message and "better@1 was made from it" in needed.value.message
    with pytest.raises(ConfigError, match="is an alias"):
        library.remove("tickets@production")
    removed = library.remove("tickets@1", force=True)
    assert (removed.versions, removed.aliases) == (("tickets@1",), ("tickets@production",))
    with pytest.raises(NotFound):
        library.resolve("tickets@1")
    assert library.gc().blobs > 0
    assert library.verify().is_clean and library.verify().orphans == 0
    assert library.add(make(5), "tickets").version.version == 2  # a number is never used again


def test_a_copy_under_another_name_frees_the_parent(library: Library) -> None:
    library.add(make(0), "tickets")
    library.add(make(0), "copy")
    library.add(make(1, parents=(make(0).digest,)), "better")
    assert library.remove("tickets@1").versions == ("tickets@1",)
    library.gc()
    assert library.load("copy@1").digest == make(0).digest


def test_remove_of_a_name_takes_all_its_versions(library: Library) -> None:
    library.add(make(0), "tickets")
    library.add(make(1, parents=(make(0).digest,)), "tickets")
    assert library.remove("tickets").versions == ("tickets@1", "tickets@2")


def test_rollback_to_a_removed_version_says_so(library: Library) -> None:
    library.add(make(0), "tickets")
    library.add(make(1), "tickets")
    library.alias("tickets@1", "production")
    library.alias("tickets@2", "production")
    library.remove("tickets@1")
    with pytest.raises(NotFound, match="has been removed"):
        library.rollback("tickets")
    assert library.resolve("tickets").version == 2


def test_the_base_decides(library: Library) -> None:
    added = library.add(make(0), "tickets", base=FakeBase())
    assert (added.version.belongs, added.version.base) == ("equal", BASE)
    with pytest.raises(BaseMismatch) as wrong:
        library.add(make(1), "tickets", base=FakeBase(identity="cd" * 32, name="other"))
    assert "abababababab" in wrong.value.message and "cdcdcdcdcdcd" in wrong.value.message
    assert "--allow-base-mismatch" in (wrong.value.help or "")
    with pytest.raises(BaseMismatch, match=r"B is \[16, 4\]"):
        library.add(make(1), "tickets", base=FakeBase(width=8))
    with pytest.raises(ConfigError, match="needs a reason"):
        library.add(make(1), "tickets", base=FakeBase(), allow_base_mismatch="  ")
    assert refs(library.list()) == ["tickets@1"]
    other = FakeBase(identity="cd" * 32, name="other")
    allowed = library.add(make(1), "tickets", base=other, allow_base_mismatch="merged before").version
    assert (allowed.belongs, allowed.base_name) == ("allowed", "other")
    assert "merged before" in library.show(allowed.ref).provenance["belonging"]["detail"]


def test_the_same_weights_in_another_precision_and_no_identity(library: Library) -> None:
    target = "model.layers.0.self_attn.q_proj"
    samples = {target: (0.1, -0.2, 0.3)}
    rounded = FakeBase(identity="cd" * 32, values={target: (0.1001, -0.2, 0.2998)})
    assert library.add(make(0, base_samples=samples), "a", base=rounded).version.belongs == "other precision"
    foreign = replace(make(1), provenance=replace(make(1).provenance, base=None, base_name=None))
    version = library.add(foreign, "b", base=FakeBase()).version
    assert (version.belongs, version.base) == ("unverified", BASE)
    assert library.add(make(2), "c").version.belongs == "unchecked"


def test_a_run_directory_brings_its_losses_and_its_origin(library: Library, tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder(run / "adapter")
    (run / "config.yaml").write_text("base: tiny\n")
    (run / "provenance.json").write_text(json.dumps({"data": "aa", "seconds": 3}))
    rows = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.5, "eval_loss": 2.0, "general_loss": 3.1},
        {"step": 4, "loss": 2.0, "eval_loss": 1.5, "general_loss": 3.2},
        {"step": 6, "loss": 1.0, "eval_loss": 1.9, "general_loss": 3.9},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    version = library.add(run, "tickets").version
    record = library.show(version.ref)
    assert record.metrics == {"eval_loss": 1.5, "general_loss": 3.2}
    assert record.provenance["run"] == {"data": "aa", "seconds": 3}
    assert [f.path for f in record.files] == [
        "adapter_config.json", "adapter_model.safetensors", "run/config.yaml", "run/provenance.json", "veneer.json"
    ]  # fmt: skip
    assert library.load(version).digest == make().digest


def test_a_loralib_file(library: Library, tmp_path: Path) -> None:
    a, b = torch.randn(4, 6), torch.randn(8, 4)
    save_file({"h.0.fc.lora_A": a, "h.0.fc.lora_B": b}, tmp_path / "lora.safetensors")
    version = library.add(tmp_path / "lora.safetensors", "old", loralib=Loralib(alpha=32)).version
    assert (version.source, version.rank) == ("loralib file", 4)
    assert torch.allclose(library.load(version).delta("h.0.fc"), 8 * b @ a)
    with pytest.raises(FormatError, match="8 was given"):
        library.add(tmp_path / "lora.safetensors", "old", loralib=Loralib(alpha=32, rank=8))


def test_revision_moves_with_every_change_and_only_then(library: Library) -> None:
    library.add(make(0), "tickets")
    seen = [library.revision()]
    library.list(), library.show("tickets"), library.verify(), library.resolve("tickets")
    assert library.revision() == seen[0]
    changes = (
        lambda: library.add(make(1), "tickets"),
        lambda: library.alias("tickets@1", "production"),
        lambda: library.record("tickets@1", {"loss": 1.0}),
        lambda: library.remove("tickets@2"),
    )
    for change in changes:
        change()
        seen.append(library.revision())
    assert seen == sorted(set(seen))


def test_checkout_does_not_overwrite(library: Library, tmp_path: Path) -> None:
    library.add(make(), "tickets")
    (tmp_path / "out").mkdir()
    with pytest.raises(Conflict):
        library.checkout("tickets", tmp_path / "out")


def test_parse_reference() -> None:
    assert parse_reference("a.b-c_1@production").alias == "production"
    assert parse_reference("a@12").version == 12
