"""Whole evaluations on a tiny model: every figure against a computation of its own."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tinylm
from veneer import data
from veneer.adapter import Adapter, Provenance
from veneer.cli.main import run
from veneer.engine import Engine
from veneer.errors import BaseMismatch, ConfigError, DataError
from veneer.evaluate import Settings, evaluate, questions
from veneer.evaluate.bootstrap import ratio
from veneer.inject import attached, create
from veneer.methods.lora import LoRA
from veneer.models.bank import Bank
from veneer.models.base import Base
from veneer.models.load import load_base

QUICK = Settings(generate=0, resamples=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinylm.folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(folder, dtype="float32")


def adapter(base: Base, seed: int, size: float = 0.3) -> Adapter:
    """A LoRA that changes the base, or with size 0 does not."""
    generator = torch.Generator().manual_seed(seed)
    fresh = create(base, LoRA(rank=2), generator)
    return fresh.map_tensors(lambda t: t + size * torch.randn(t.shape, generator=generator)) if size else fresh


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = data.from_records([talk(f"is {i} even?", "yes" if i % 2 == 0 else "no") for i in range(12)])
TEXTS = data.from_records([{"text": f"The number {i} is nice."} for i in range(9)])


def direct_nll(base: Base, ids: list[int], start: int) -> float:
    """Loss of ids[start:] in nats, from the logits of the whole text."""
    logits = base.logits(torch.tensor([ids]))[0].double()
    chosen = torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    return -float(chosen[start - 1 :].sum())


def test_losses_are_weighted_by_token_and_bytes(base: Base) -> None:
    found = evaluate(base, {}, ROWS, settings=QUICK).base
    tokenizer = base.require_tokenizer()
    nll, tokens, size = 0.0, 0, 0
    for row in ROWS:
        assert isinstance(row, data.Chat)
        prompt = tokenizer.encode(tokenizer.render(row.messages[:1], add_generation_prompt=True))
        answer = tokenizer.encode(str(row.messages[1]["content"]) + "<|im_end|>")
        nll += direct_nll(base, prompt + answer, len(prompt))
        tokens, size = tokens + len(answer), size + len(str(row.messages[1]["content"]))
    assert found["loss"].value == pytest.approx(nll / tokens, rel=1e-5)
    assert found["perplexity"].value == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert found["bits_per_byte"].value == pytest.approx(nll / math.log(2) / size, rel=1e-5)
    assert found["loss"].low < found["loss"].value < found["loss"].high


def test_an_adapter_that_changes_nothing_changes_no_figure(base: Base) -> None:
    report = evaluate(
        base, {"none": adapter(base, 0, 0.0), "some": adapter(base, 1)}, ROWS, general=TEXTS, settings=QUICK
    )
    for metric, moved in report.changes["none"].items():
        assert (moved.value, moved.low, moved.high) == (0, 0, 0), metric
        assert report.adapters["none"][metric] == report.base[metric]
    assert report.changes["some"]["loss"].value != 0 and report.changes["some"]["general_loss"].value != 0


def test_the_report_has_the_promised_shape(base: Base) -> None:
    report = evaluate(base, {"a": adapter(base, 1), "b": adapter(base, 2)}, ROWS, general=TEXTS, settings=QUICK)
    found = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert list(found["adapters"]) == ["a", "b"]
    for voice in (found["base"], *found["adapters"].values()):
        for metric in ("loss", "perplexity", "bits_per_byte", "general_loss", "accuracy", "accuracy_norm", "macro_f1"):
            assert voice[f"{metric}_low"] <= voice[metric] <= voice[f"{metric}_high"]
    assert found["adapters"]["a"]["loss_change"] == pytest.approx(
        found["adapters"]["a"]["loss"] - found["base"]["loss"]
    )
    settings = found["settings"]
    assert settings["data"]["sha256"] == ROWS.sha256 and settings["base_identity"] == base.identity
    assert (
        settings["adapters"]["a"] == adapter(base, 1).digest and settings["seed"] == 0 and settings["resamples"] == 100
    )
    columns, rows = report.table()
    assert columns == ["metric", "base", "a", "change (95 % interval)", "b", "change (95 % interval)"]
    assert all(len(row) == len(columns) for row in rows)
    assert evaluate(base, {}, ROWS, settings=QUICK).as_dict()["base"]["loss"] == found["base"]["loss"]


def test_labels_are_scored_by_their_likelihood(base: Base) -> None:
    bank = Bank()
    asked = questions.questions(ROWS)
    labels = questions.labels_of(asked)
    assert labels == ("no", "yes")
    scores = questions.label_scores(base, asked, labels, bank, -1)
    tokenizer = base.require_tokenizer()
    prompt = data.prompt_tokens(asked[3].row, tokenizer)
    for j, label in enumerate(labels):
        ids = prompt + tokenizer.encode(f"{label}<|im_end|>")
        assert scores[3, j] == pytest.approx(direct_nll(base, ids, len(prompt)), rel=1e-5)
    own = np.array([scores[i, labels.index(question.accepted[0])] for i, question in enumerate(asked)])
    np.testing.assert_allclose(questions.label_scores(base, asked, labels, bank, -1, own), scores, rtol=1e-5)


def test_label_figures() -> None:
    asked = questions.questions(
        data.from_records([talk("a", "x"), talk("b", "long"), talk("c", "x"), talk("d", "long")])
    )
    scores = np.array([[3.0, 1.0], [2.0, 1.0], [2.0, 1.5], [4.0, 3.0]])  # labels: "long", "x"
    found = questions.label_measures(scores, asked, ("long", "x"))
    assert found["accuracy"].value == 0.5, "x is always likelier"
    assert found["accuracy_norm"].value == 0.5, "and long is, by the byte"
    assert found["macro_f1"].value == pytest.approx((0 + 2 * 2 / (4 + 2)) / 2)


def test_every_accepted_answer_is_a_right_choice() -> None:
    rows = [{**talk("a", "x"), "accepted": ["long"]}, talk("b", "long"), talk("c", "x"), talk("d", "long")]
    asked = questions.questions(data.from_records(rows))
    scores = np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 1.0], [1.0, 3.0]])  # chosen: long, x, x, long
    found = questions.label_measures(scores, asked, ("long", "x"))
    assert found["accuracy"].value == 0.75
    assert found["macro_f1"].value == pytest.approx((2 * 2 / (2 + 3) + 2 * 1 / (2 + 1)) / 2)


@pytest.mark.parametrize("answers", [("", "", ""), ("", "", "abc")])
def test_empty_answers_have_a_loss_and_no_figure_by_the_byte(base: Base, answers: tuple[str, ...]) -> None:
    rows = data.from_records([talk("q", answer) for answer in answers])
    found = evaluate(base, {}, rows, settings=QUICK).base
    assert ("bits_per_byte" in found) == any(answers)
    assert all(np.isfinite([figure.value, figure.low, figure.high]).all() for figure in found.values())


def test_answers_that_are_no_labels() -> None:
    def labels(*answers: str) -> tuple[str, ...]:
        return questions.labels_of(questions.questions(data.from_records([talk("q", answer) for answer in answers])))

    assert labels("a", "b", "a", "b") == ("a", "b")
    assert not labels("a", "a", "a") and not labels("a", "b", "a")
    assert not labels(*[f"{i // 2}" for i in range(60)])


def test_what_a_row_asks() -> None:
    assert not questions.questions(TEXTS)
    pair = data.from_records([{"prompt": "q", "completion": "a"}])
    assert questions.questions(pair)[0].accepted == ("a",)
    assert questions.answered(pair[0], "b") == data.Raw(1, "q", "b")
    assert not questions.questions(data.from_records([{"prompt": "", "completion": "a"}]))
    turns = [*talk("q", "a")["messages"], *talk("r", "b")["messages"]]
    row = data.from_records([{"messages": turns, "accepted": ["c", "b"]}])
    (asked,) = questions.questions(row)
    assert asked.accepted == ("b", "c") and not questions.scores_alone(asked.row)
    other = questions.answered(asked.row, "z")
    assert isinstance(other, data.Chat) and other.messages[-1]["content"] == "z" and other.messages[1]["content"] == "a"
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}
    assert not questions.questions(data.from_records([{"messages": [turns[0], call]}]))


def greedy(base: Base, ids: list[int], count: int) -> str:
    """The likeliest token, again and again."""
    tokenizer, said = base.require_tokenizer(), list[int]()
    while len(said) < count:
        token = int(base.logits(torch.tensor([ids + said]))[0, -1].argmax())
        if token in tokenizer.eos_ids:
            break
        said.append(token)
    return tokenizer.decode(said)


def test_answers_are_generated_greedily_under_each_adapter(base: Base) -> None:
    some, tokenizer = adapter(base, 5), base.require_tokenizer()
    asked = questions.questions(data.from_records([talk("one", "yy"), talk("two", "y")]))
    engine = Engine(base)
    engine.add("some", some)
    said = questions.generate(engine, tokenizer, asked, [None, "some"])
    engine.close()
    prompts = [data.prompt_tokens(question.row, tokenizer) for question in asked]
    count = 2 + questions.SPARE_TOKENS
    assert said[None] == [greedy(base, prompt, count) for prompt in prompts]
    with attached(base, some):
        assert said["some"] == [greedy(base, prompt, count) for prompt in prompts] != said[None]


def test_exact_match_of_what_is_generated(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = data.from_records([{**talk("q", "ls"), "accepted": ["ls ."]}, talk("r", "pwd"), talk("s", "not asked")])
    monkeypatch.setattr(questions, "generate", lambda *_: {None: ["no", "pwd"], "some": ["ls .", "pwd"]})
    settings = Settings(generate=2, resamples=100)
    report = evaluate(base, {"some": adapter(base, 5)}, rows, settings=settings)
    assert (report.base["exact"].value, report.adapters["some"]["exact"].value) == (0.5, 1.0)
    assert report.changes["some"]["exact"].value == 0.5
    assert report.adapters["some"]["chrf"].value == pytest.approx(100)


def test_an_adapter_of_another_base_is_refused(base: Base, tmp_path: Path) -> None:
    other = load_base(tinylm.folder(tmp_path / "other", seed=1), dtype="float32")
    foreign = adapter(other, 0)
    foreign = replace(foreign, provenance=Provenance(base=other.identity))
    with pytest.raises(BaseMismatch):
        evaluate(base, {"foreign": foreign}, ROWS, settings=QUICK)
    assert evaluate(base, {"foreign": foreign}, ROWS, settings=QUICK, allow_base_mismatch="a test").adapters


def test_questions_without_room_for_an_answer_are_left_out_and_counted(base: Base) -> None:
    """The row's own answer is cut, and a cut label would be another one."""
    room, tokenizer = base.config.max_positions, base.require_tokenizer()
    taken = len(data.prompt_tokens(data.from_records([talk("", "no")])[0], tokenizer))
    tight = talk("z" * (room - taken - 1), "no")
    assert len(data.prompt_tokens(data.from_records([tight])[0], tokenizer)) == room - 1
    settings = Settings(on_too_long="truncate", generate=50, resamples=100)
    plain = [talk(f"is {i} even?", "yes" if i % 2 == 0 else "no") for i in range(12)]
    report = evaluate(base, {}, data.from_records([*plain, tight]), settings=settings)
    assert "1 questions of rows leave no room" in report.warnings[1] and "were cut" in report.warnings[0]
    without = evaluate(base, {}, ROWS, settings=settings)
    for metric in ("accuracy", "macro_f1", "exact"):
        assert report.base[metric] == without.base[metric]


def test_rows_above_the_limit(base: Base) -> None:
    long = data.from_records([talk("q" * 100, "a" * 100)])
    with pytest.raises(DataError, match="max_length is 150"):
        evaluate(base, {}, long, settings=Settings(max_length=150, generate=0, resamples=100))
    report = evaluate(
        base, {}, long, settings=Settings(max_length=200, on_too_long="truncate", generate=0, resamples=100)
    )
    assert report.warnings == ("1 rows of rows were cut to 200 tokens",)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ConfigError):
        Settings(on_too_long="drop")
    with pytest.raises(ConfigError):
        Settings(resamples=1)
    assert ratio(np.ones(3)).value == 1


def test_the_verb(folder: Path, base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(base, 1).save(tmp_path / "one")
    file = tinylm.chat_rows(tmp_path / "rows.jsonl", 5)
    command = ["eval", "--base", str(folder), "--dtype", "float32", "--data", str(file), "--generate", "2"]
    command += ["--adapter", f"first={tmp_path / 'one'}", "--resamples", "100"]
    assert run([*command, "--general", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["adapters"]["first"]) >= {
        "loss",
        "loss_low",
        "loss_high",
        "bits_per_byte",
        "general_loss",
        "exact",
    }
    assert run(command) == 0
    out = capsys.readouterr().out
    assert "first" in out and "bits_per_byte" in out and "change (95 % interval)" in out
    assert run([*command, "--on-too-long", "drop"]) == 2
    assert run(["eval", "--base", str(folder), "--data", str(tmp_path / "none.jsonl")]) == 1
    assert "no data file" in capsys.readouterr().err
