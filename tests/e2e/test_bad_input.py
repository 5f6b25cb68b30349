"""What users get wrong, through the command line: a message with the next step, an exit code, and nothing lost.

Every case aims at the folder of a finished run, so "nothing lost" is compared over base, data and that run, byte for byte.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import tinylm
from tests.e2e.world import contents, make, veneer
from tests.unprivileged import obeying_permissions
from veneer.models import convert, mapped
from veneer.train.run import locked

OK, FAILED, USAGE = 0, 1, 2
ROW = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a finished run in `run/`."""
    from veneer.cli.main import run

    folder = make(tmp_path_factory.mktemp("bad"))
    assert run(["train", str(folder / "run.yaml"), "--set", "train.max_steps=2", "--json"]) == OK
    data = {
        "empty": b"",
        "blank": b"\n \n\n",
        "binary": bytes(range(256)) * 8,
        "half": (ROW * 3 + ROW[:30]).encode(),
        "huge": (ROW + json.dumps({"text": "x" * 10_000_000}) + "\n").encode(),
        "keys": b'{"question": "a", "answer": "b"}\n' * 2,
        "mixed": (ROW + '{"text": "a"}\n').encode(),
        "latin": '{"text": "caf\u00e9"}\n'.encode("latin-1"),
        "silent": json.dumps({"messages": [{"role": "user", "content": "a"}]}).encode() + b"\n",
    }
    for name, content in data.items():
        (folder / f"{name}.jsonl").write_bytes(content)
    for name, template in TEMPLATES.items():
        with_template(folder, name, template)
    shutil.copytree(folder / "base", folder / "torn-base")
    whole = (folder / "base/model.safetensors").read_bytes()
    (folder / "torn-base/model.safetensors").write_bytes(whole[: len(whole) // 2])
    return folder


TEMPLATES = {
    "refusing": "{{ raise_exception('roles must alternate') }}",
    "typo": "{% for m in messages %}{{ m.contnt.text }}{% endfor %}",
    "broken": "{% for m in messages %}{{ m.content }}",
    "wordless": None,
}


def with_template(folder: Path, name: str, template: str | None) -> None:
    shutil.copytree(folder / "base", folder / name)
    file = folder / name / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"chat_template": template}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture(autouse=True)
def _nothing_is_lost(world: Path) -> Iterator[None]:
    before = contents(world)
    yield
    assert contents(world) == before


class Case(NamedTuple):
    """`--set` of a run file that is right otherwise, the exit code, and what message and next step must hold."""

    settings: str
    code: int
    message: str
    help: str


CASES = {
    "data missing": Case("data.train={w}/trian.jsonl", FAILED, r"no data file at .*/trian\.jsonl", r"train\.jsonl\?"),
    "held-out data missing": Case("data.eval={w}/absent.dat", FAILED, r"no data file at .*/absent\.dat", "paths"),
    "data is a folder": Case("data.train={w}/base", FAILED, "is a folder, expected a file", "name one file"),
    "data empty": Case("data.train={w}/empty.jsonl", FAILED, r"empty\.jsonl is empty \(0 bytes\)", "at least one row"),
    "data blank": Case("data.train={w}/blank.jsonl", FAILED, r"blank\.jsonl has no rows", "at least one row"),
    "data binary": Case("data.train={w}/binary.jsonl", FAILED, "is binary, not text", r"\.jsonl"),
    "data half-written": Case("data.train={w}/half.jsonl", FAILED, r"half\.jsonl:4: .* ends inside", "half-written"),
    "a line of 10 MB": Case("data.train={w}/huge.jsonl", FAILED, r"huge\.jsonl:2: 10\.0 MB in one row", "split"),
    "wrong keys": Case(
        "data.train={w}/keys.jsonl", FAILED, r"keys\.jsonl:1: found the keys question, answer \(and 1 more", "jq -c"
    ),
    "two formats": Case(
        "data.train={w}/mixed.jsonl", FAILED, r"mixed\.jsonl:2: .*'text'.*'messages'", "split the file"
    ),
    "not UTF-8": Case("data.train={w}/latin.jsonl", FAILED, r"latin\.jsonl:1: byte 0xe9", "UTF-8"),
    "no answer": Case(
        "data.train={w}/silent.jsonl", FAILED, r"silent\.jsonl:1: no message is from the assistant", "repair these rows"
    ),
    "rows too long": Case(
        "train.max_length=12", FAILED, r"train\.jsonl:1: 37 tokens, but max_length is 12", "truncate"
    ),
    "labels cut off": Case(
        "train.max_length=12 train.on_too_long=truncate", FAILED, "leaves nothing to learn", "raise max_length"
    ),
    "every row dropped": Case(
        "train.max_length=12 train.on_too_long=drop", FAILED, "every row is longer", "raise max_length"
    ),
    "unknown key": Case("train.learning_rte=1", USAGE, r"train\.learning_rte: unknown key", "every key"),
    "mistyped key": Case("method.rnak=4", USAGE, r"method\.rnak: unknown key; did you mean 'rank'", "every key"),
    "unknown section": Case("trian.lr=1", USAGE, "trian: unknown key; did you mean 'train'", "every key"),
    "all at once": Case(
        "train.lr=fast train.epochs=[1] method.rank=x", USAGE, r"(?s)epochs.*lr.*method\.rank", "every key"
    ),
    "a value for a section": Case("data=5", USAGE, "data: expected keys and values, got 5", "every key"),
    "a list for a name": Case("method.kind=[lora]", USAGE, r"method\.kind: no method", "every key"),
    "unknown method": Case("method.kind=loar", USAGE, "did you mean 'lora'", "every key"),
    "unknown optimizer": Case("train.optimizer=adamx", USAGE, "no optimizer is called 'adamx'", "adamw"),
    "broken --set": Case("train.lr=[", USAGE, "the value is not YAML", "brackets"),
    "--set without a value": Case("train.lr", USAGE, r"expected a\.b=value", "--set"),
    "--set into a value": Case("base.x=1", USAGE, "'base' is a value, not a section", "every key"),
    "targets match nothing": Case("method.targets=[q_porj]", FAILED, "'q_porj' matches nothing", "veneer plan"),
    "nothing is left": Case("method.exclude=all-linear", FAILED, "leave no layer", "veneer plan"),
    "no such block": Case("method.layers=[9]", FAILED, "no block 9; the blocks are 0 to 2", "veneer plan"),
    "rank 0": Case("method.rank=0", USAGE, r"method\.rank: .* a number of at least 1, got 0", "every key"),
    "rank above the layer": Case(
        "method.rank=33", FAILED, r"rank 33 at \S+ is above the layer's 16 \(32 in, 16", "plan"
    ),
    "template refuses": Case("base={w}/refusing", FAILED, r"train\.jsonl:1: .* roles must alternate", "chat_template"),
    "template fails": Case("base={w}/typo", FAILED, r"train\.jsonl:1: .*'contnt'", "chat_template"),
    "template broken": Case("base={w}/broken", FAILED, "chat template is not valid: line 1", "repair"),
    "no template": Case("base={w}/wordless", FAILED, "has no chat template", "prompt/completion"),
    "base half-written": Case("base={w}/torn-base", FAILED, r"torn-base/model\.safetensors is damaged", "again"),
    "base unknown": Case("base=smollm2-135", FAILED, "no base is called", r"smollm2-135m"),
    "no network": Case("base=someone/model", FAILED, "not on this machine and could not be fetched", "network"),
    "no room for the run": Case("train.memory=1000", FAILED, r"needs .* the budget is .*1,000 bytes", r"train\.memory"),
    "another run's checkpoint": Case("train.lr=0.5", FAILED + 1, "belongs to another run", "without --resume"),
}


@pytest.mark.parametrize("name", CASES)
def test_training_refuses(world: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    case = CASES[name]
    settings = [part for word in case.settings.format(w=world).split() for part in ("--set", word)]
    answer = veneer(capsys, "train", world / "run.yaml", "--resume", *settings)
    assert answer.code == case.code, answer.err
    assert re.search(case.message, answer.err), answer.err
    assert re.search(case.help, answer.help), answer.err
    assert "Traceback" not in answer.err and "defect" not in answer.err and answer.out == ""


@pytest.mark.parametrize(
    ("text", "message", "help"),
    [
        ("base: [\n", r":2 is not YAML: expected", "brackets"),
        ("base: a\nbase: b\n", r":2: 'base' is given twice", "keep one"),
        ("- a\n", "is no run file: it holds a list, expected keys", "every key"),
        ("", "holds nothing", "every key"),
        ("base: a\n", r"(?s)data: missing.*out: missing", "every key"),
        ("runs: 3\n", "runs must be a list", "runs: "),
        ("base: a\ndata: {train: x}\nout: b\nmethod: lora\n", "method: expected keys and values", "every key"),
        (b"\xff\xfe\x00", "is not UTF-8", "YAML"),
        ("base: a\ndata: {train: x}\nout: ''\n", "out: .*a run needs a folder of its own", "every key"),
        ("base: a\ndata: {train: x}\nout: .\n", "out: .*a run needs a folder of its own", "every key"),
        ('base: a\ndata: {train: "x\\0y"}\nout: b\n', "data.train is 'x.x00y', which holds a NUL", "no file"),
    ],
)
def test_run_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | bytes, message: str, help: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    answer = veneer(capsys, "train", file)
    assert answer.code == USAGE, answer.err
    assert re.search(message, answer.err) and re.search(help, answer.help), answer.err
    assert list(tmp_path.iterdir()) == [file]


def test_the_help_shows_every_key_of_a_run_file(capsys: pytest.CaptureFixture[str]) -> None:
    from veneer.methods.lora import LoRA
    from veneer.train import RunConfig, TrainConfig
    from veneer.train.config import DataConfig

    shown = veneer(capsys, "train", "--help").out
    keys = {*RunConfig.model_fields, *TrainConfig.model_fields, *DataConfig.model_fields}
    assert [key for key in keys if not re.search(rf"^ +{key}:", shown, re.M)] == []
    for key, field in TrainConfig.model_fields.items():
        value = re.search(rf"^ +{key}: +(\S+)", shown, re.M)
        expected = "null" if field.default is None else str(field.default).lower()
        assert value is not None and (value[1] == expected or float(value[1]) == float(expected)), key
    assert "rank: 16" in shown and LoRA().rank == 16 and LoRA().alpha == 32


@pytest.mark.parametrize("name", ["rank above the layer", "targets match nothing", "no room for the run", "no answer"])
@pytest.mark.parametrize("place", ["new/er/run", "there"])
def test_a_refused_run_leaves_nothing_behind(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, place: str
) -> None:
    (tmp_path / "there").mkdir()
    settings = [part for word in CASES[name].settings.format(w=world).split() for part in ("--set", word)]
    answer = veneer(capsys, "train", world / "run.yaml", "--out", tmp_path / place, *settings)
    assert answer.code == CASES[name].code and re.search(CASES[name].message, answer.err), answer.err
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["there"]


def test_a_template_that_fails_is_said_once_for_all_rows(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = veneer(capsys, "train", world / "run.yaml", "--resume", "--set", f"base={world}/typo")
    assert "has 30 problems" in answer.err and answer.err.count("contnt") == 1, answer.err
    assert "train.jsonl:1: " in answer.err and "(and at 29 more: 2, 3, 4, " in answer.err


def test_a_failed_command_answers_in_json_too(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = veneer(capsys, "train", world / "run.yaml", "--set", f"data.train={world}/empty.jsonl", "--json")
    error = json.loads(answer.out)["error"]
    assert answer.code == FAILED and error["type"] == "DataError" and error["message"] and error["help"]


def forbidden(*_: Any) -> Any:
    raise AssertionError("weights were read")


@pytest.mark.parametrize("is_new", [True, False])
def test_a_base_without_room_in_memory_is_refused_before_it_is_read(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    base = tinylm.folder(tmp_path / "new", seed=5) if is_new else world / "base"
    monkeypatch.setattr(convert, "available_bytes", lambda: 1000)
    monkeypatch.setattr(mapped, "read", forbidden)
    monkeypatch.setattr(mapped, "write", forbidden)
    answer = veneer(capsys, "train", world / "run.yaml", "--resume", "--set", f"base={base}")
    assert answer.code == FAILED and re.search(r"needs \S+ GB of memory, \S+ GB are free", answer.err), answer.err
    assert "smaller" in answer.help


def test_a_full_disk_while_a_base_is_converted(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    base = tinylm.folder(tmp_path / "new", seed=6)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        answer = veneer(capsys, "doctor", "--base", base)
    assert answer.code == FAILED and "cache" in answer.err and "is full" in answer.err, answer.err
    assert "VENEER_CACHE" in answer.help
    assert not [name for name in contents(tmp_path / "cache") if "weights" in name]
    assert veneer(capsys, "doctor", "--base", base).code == OK


def test_a_cache_that_cannot_be_written(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "file" / "cache"))
    answer = veneer(capsys, "doctor", "--base", world / "base")
    assert answer.code == FAILED and "cannot write to the cache folder" in answer.err and "VENEER_CACHE" in answer.help


def refused_for_writing(world: Path, capsys: pytest.CaptureFixture[str], out: Path) -> None:
    answer = veneer(capsys, "train", world / "run.yaml", "--out", out)
    assert answer.code == FAILED and re.search(rf"{out} cannot be used for a run: \w+", answer.err), answer.err
    assert "--out" in answer.help


def test_a_run_folder_that_is_a_file(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused_for_writing(world, capsys, world / "train.jsonl")
    refused_for_writing(world, capsys, world / "train.jsonl" / "run")


def test_a_read_only_folder(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o555)
    try:
        with obeying_permissions():
            refused_for_writing(world, capsys, tmp_path / "run")
    finally:
        tmp_path.chmod(0o755)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_disk(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    mkdir: Callable[..., None] = Path.mkdir

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        if path.is_relative_to(tmp_path):
            raise OSError(code, os.strerror(code), str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    refused_for_writing(world, capsys, tmp_path / "run")


def test_two_runs_in_one_folder(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(world / "run"):
        answer = veneer(capsys, "train", world / "run.yaml", "--resume")
    assert answer.code == FAILED and re.search(r"another run is working in .*/run", answer.err), answer.err
    assert "--out" in answer.help


def test_a_folder_that_holds_a_run(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = veneer(capsys, "train", world / "run.yaml")
    assert answer.code == FAILED and re.search(r"/run already holds a run", answer.err), answer.err
    assert "--resume" in answer.help


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(world / "run", tmp_path / "run"))
    options = ("--resume", "--set", "train.max_steps=2", "--out", out)
    answer = veneer(capsys, "train", world / "run.yaml", *options)
    assert answer.code == OK and "done" in answer.out, answer.err
    for name in ("adapter", "last", "checkpoint"):
        assert contents(out / name) == contents(world / "run" / name)
    assert (out / "metrics.jsonl").read_bytes() == (world / "run/metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message", "help"),
    [
        ("eval --base {w}/base --data {w}/absent.dat", "no data file", "paths"),
        ("eval --base {w}/base --data {w}/eval.jsonl --adapter {w}/rnu", "there is no folder", "NAME=PATH"),
        ("inspect {w}/rnu", "there is no adapter folder at", "did you mean .*/run"),
        ("inspect {w}/base", r"has no adapter_model\.safetensors", "another folder"),
        ("generate hi --base {w}/base --adapter {t}", "damaged|cut", "again"),
        ("merge --base {w}/base --adapter {w}/run --out {w}/base", "base", "new folder|another"),
    ],
)
def test_other_verbs_refuse(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str, help: str
) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(world / "run/adapter", torn)
    file = torn / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    answer = veneer(capsys, *arguments.format(w=world, t=torn).split())
    assert answer.code in (FAILED, USAGE), answer.err
    assert re.search(message, answer.err) and re.search(help, answer.help), answer.err
    assert "Traceback" not in answer.err and "defect" not in answer.err
