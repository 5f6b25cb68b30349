"""`veneer library`: what users type, exit codes, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.library.shelf import FakeBase, folder
from veneer.cli.main import run


class Shell:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, line: str, *, code: int = 0) -> str:
        found = run(["library", *line.split()])
        out, self.errors = self._capsys.readouterr()
        assert found == code, self.errors
        return out

    def json(self, line: str, *, code: int = 0) -> Any:
        return json.loads(self(f"{line} --json", code=code))


@pytest.fixture
def veneer(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "a", 0)
    folder(tmp_path / "b", 1)
    return Shell(capsys)


def test_the_whole_life_of_an_adapter(veneer: Shell, tmp_path: Path) -> None:
    added = veneer.json("add a --name tickets --alias production --metric general_loss=2.0")
    assert (added["ref"], added["new"], added["alias"]["alias"]) == ("tickets@1", True, "production")
    assert veneer.json("add a --name tickets")["new"] is False
    assert "added tickets@2" in veneer("add b --name tickets --parent tickets@1 --metric general_loss=2.5")
    assert veneer.json("alias tickets@2 canary --weight 0.1")["weight"] == 0.1
    refused = veneer.json("alias tickets@2 production --demand general_loss=0.1", code=1)
    assert refused["error"]["type"] == "Conflict" and "worse than" in refused["error"]["message"]
    assert veneer.json("record tickets@2 --metric general_loss=2.05") == {"general_loss": 2.05}
    assert "tickets@production is tickets@2" in veneer("alias tickets@2 production --demand general_loss=0.1")
    listed = veneer.json("list")
    assert [(v["ref"], v["aliases"]) for v in listed] == [("tickets@1", []), ("tickets@2", ["canary", "production"])]
    assert "canary (10%), production" in veneer("list")
    shown = veneer.json("show tickets")
    assert shown["ref"] == "tickets@2" and list(shown["parents"].values()) == ["tickets@1"]
    assert [move["version"] for move in shown["history"] if move["alias"] == "production"] == [1, 2]
    text = veneer("show tickets")
    assert "general_loss 2.05" in text and "tickets@1" in text
    assert veneer.json("diff tickets@1 tickets@2")["same"] is False
    assert "overlap" in veneer("diff tickets@1 tickets@2")
    assert "same adapter" in veneer("diff tickets@1 tickets@1")
    assert veneer.json("rollback tickets")["version"] == 1
    assert "is gone" in veneer("alias tickets canary --drop")
    assert veneer.json("rollback tickets@canary")["version"] == 2
    veneer("remove tickets@2", code=1)
    assert "tickets@canary" in veneer.errors and "help:" in veneer.errors
    assert veneer.json("remove tickets@2 --force")["aliases"] == ["tickets@canary"]
    assert veneer.json("gc --dry-run")["blobs"] == 2
    assert "freed" in veneer("gc")
    assert veneer.json("verify")["clean"] is True
    assert (tmp_path / "out").exists() is False
    veneer("get tickets --out out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in (tmp_path / "a").iterdir())


def test_refusals_have_codes_and_a_way_out(veneer: Shell) -> None:
    veneer("list", code=1)
    assert "no library" in veneer.errors and "help:" in veneer.errors
    veneer("add a --name ../x", code=2)
    veneer("add missing --name x", code=1)
    veneer("add a --name x --metric loss=high", code=2)
    veneer("add a --name x --rank 4", code=2)
    veneer("add a", code=2)
    veneer("add a --name x")
    veneer("alias x production", code=2)
    veneer("alias x@1 production --demand novelty", code=2)
    veneer("alias x@1 9lives", code=2)
    veneer("show x@7", code=1)
    veneer("record x", code=2)


def test_a_bad_alias_is_refused_before_anything_is_added(veneer: Shell) -> None:
    veneer("add a --name other")
    assert run(["library", "add", "b", "--name", "tickets", "--alias", "Bad Alias"]) == 2
    assert veneer.json("list tickets") == []


def test_what_a_refusal_advises_is_a_command(veneer: Shell) -> None:
    veneer("add a --name tickets")
    veneer("alias tickets@1 production --demand general_loss=0.1", code=1)
    advised = veneer.errors.split("`veneer library ")[1].split("`")[0]
    veneer(advised.replace("NAME=VALUE", "general_loss=2.5"))
    veneer("alias tickets@1 production --demand general_loss=0.1")


def test_an_add_whose_alias_is_refused_says_what_was_added(veneer: Shell) -> None:
    veneer("add a --name tickets --metric loss=2.0")
    veneer("alias tickets@1 production --demand loss=0.1")
    veneer("add b --name tickets --alias production", code=1)
    assert "tickets@2 is in the library, but not 'production': " in veneer.errors
    assert veneer.json("show tickets")["ref"] == "tickets@1"


def test_an_adapter_that_is_there_takes_new_metrics(veneer: Shell) -> None:
    veneer("add a --name tickets")
    veneer("add a --name tickets --metric f1=0.5 --note late")
    assert "tickets@1 already" in veneer.errors and "the note" in veneer.errors
    assert veneer.json("show tickets")["metrics"] == {"f1": 0.5}


def test_what_rebuild_left_out_is_collected_only_when_asked(veneer: Shell, tmp_path: Path) -> None:
    library = tmp_path / "library"
    veneer("add a --name tickets")
    files = {file["path"]: file["blob"] for file in veneer.json("show tickets")["files"]}
    lost = files["adapter_config.json"]
    (library / "blobs" / lost[:2] / lost).unlink()
    for file in library.glob("catalogue.sqlite*"):
        file.unlink()
    assert "gc --unknown" in veneer.json("rebuild")["left_out"][0]
    assert "tickets@1 (--unknown deletes" in veneer("gc")
    assert "tickets@1 is not in the catalogue" in veneer("verify", code=1)
    found = veneer.json("gc --unknown")
    assert (found["blobs"], found["manifests"], found["kept"]) == (2, 1, [])
    veneer("verify")


def test_verify_fails_with_code_1_and_rebuild_repairs(veneer: Shell, tmp_path: Path) -> None:
    veneer("add a --name tickets")
    manifest = tmp_path / "library" / "manifests" / "tickets" / "1.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content[:-9])
    assert "problem: tickets@1" in veneer("verify", code=1)
    assert veneer.json("verify", code=1)["clean"] is False
    manifest.write_bytes(content)
    for file in (tmp_path / "library").glob("catalogue.sqlite*"):
        file.unlink()
    veneer("list", code=1)
    assert "veneer library rebuild" in veneer.errors
    assert "rebuilt: 1 versions" in veneer("rebuild")
    assert veneer.json("list")[0]["ref"] == "tickets@1"


def test_the_library_can_be_named(veneer: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    veneer("add a --name tickets --library elsewhere")
    assert (tmp_path / "elsewhere").is_dir() and not (tmp_path / "library").exists()
    monkeypatch.setenv("VENEER_LIBRARY", "elsewhere")
    assert veneer.json("list")[0]["ref"] == "tickets@1"


def test_the_base_is_checked(veneer: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    bases = {"right": FakeBase(name="right"), "wrong": FakeBase(name="wrong", identity="cd" * 32)}
    monkeypatch.setattr("veneer.models.load.load_base", lambda name: bases[name])
    veneer("add a --name tickets --base wrong", code=1)
    assert "--allow-base-mismatch" in veneer.errors
    assert veneer.json("add a --name tickets --base right")["belongs"] == "equal"
    forced = veneer.json("add b --name tickets --base wrong --allow-base-mismatch tested")
    assert forced["belongs"] == "allowed"
    assert "tested" in veneer("show tickets@2")
    assert [v["ref"] for v in veneer.json("list --base wrong")] == ["tickets@2"]


def test_metrics_come_from_an_evaluation(veneer: Shell, tmp_path: Path) -> None:
    figures = {"loss": 1.5, "loss_low": 1.4, "general_loss": 2.5, "note": "text", "done": True}
    (tmp_path / "eval.json").write_text(json.dumps({"base": {"loss": 3.0}, "adapters": {"tickets": figures}}))
    veneer("add a --name tickets --metrics eval.json")
    assert veneer.json("show tickets")["metrics"] == {"general_loss": 2.5, "loss": 1.5, "loss_low": 1.4}
    (tmp_path / "two.json").write_text(json.dumps({"adapters": {"x": {"loss": 1}, "y": {"loss": 2}}}))
    veneer("record tickets --metrics two.json", code=2)
    (tmp_path / "bad.json").write_text("{")
    veneer("record tickets --metrics bad.json", code=2)


def test_a_versions_card_knows_what_the_library_knows(veneer: Shell) -> None:
    veneer("add a --name tickets --metric loss=1.5")
    veneer("add b --name tickets --parent tickets@1")
    veneer("record tickets@2 --metric general_loss=2.25")
    text = veneer("card tickets@2 --license MIT")
    assert "license: mit" in text and "| general_loss | 2.25 |" in text
    assert "tickets@1 (" in text and veneer.json("show tickets@1")["digest"] in text
    assert "tickets@2, added " in text and "unchecked" in text
    assert "license: unknown" in veneer("card tickets@1")


@pytest.mark.parametrize(
    "verb",
    ["add", "list", "show", "diff", "alias", "rollback", "record", "get", "card", "remove", "gc", "verify", "rebuild"],
)
def test_every_verb_has_help_with_an_example(veneer: Shell, verb: str) -> None:
    assert f"veneer library {verb}" in veneer(f"{verb} --help").split("Usage:")[1].split("\n", 1)[1]
