"""Training against transformers + peft, against the machine's FLOP floor and against itself at other sizes.

    python benchmarks/train.py [--rounds 5] [--cases bf16-fixed,bf16-real,...] [--parts peers,kernels,scaling]

peers     each round runs veneer and peft, one after the other, each in a process of its own, so peak memory is the operating
          system's figure for the whole process; the ratio of a round is taken within the round
kernels   one profiled step of each: where the time goes
scaling   veneer alone: rows of 128 to 4,096 tokens, steps of 1 k to 64 k tokens

Results go to `results/train.json`, `results/train.md` and `results/train.png`. A part that is not run keeps what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from _report import BLUE, GREY, HERE, ORANGE, PEER_PYTHON, RESULTS, bars, drive, markdown, publish, say, write_folder

CASES: dict[str, tuple[list[str], float, float]] = {
    "bf16-fixed": (["--dtype", "bf16", "--steps", "3"], 3.0, 0.40),
    "bf16-real": (["--dtype", "bf16", "--lengths", "real", "--batch", "8", "--steps", "5"], 6.0, 0.35),
    "fp32-fixed": (["--dtype", "fp32"], 1.8, 0.45),
    "dora": (["--dtype", "bf16", "--dora"], 3.0, 0.35),
    "nf4-dq": (["--dtype", "bf16", "--nf4"], 2.5, 0.40),
}
"""Case -> (arguments of both drivers, the ratio of speeds to reach, the ratio of memory to stay under)."""

STEP_SHAPES = ((2, 1), (4, 1), (8, 1), (32, 1), (32, 4))
SIZES = (
    *((f"rows of {seq}", "row", seq, 4096 // seq, 1) for seq in (128, 512, 1024, 2048, 4096)),
    *((f"steps of {512 * batch * passes}", "step", 512, batch, passes) for batch, passes in STEP_SHAPES),
)
"""Name, what varies, tokens a row, rows a pass, passes a step."""
PARTS = ("peers", "kernels", "scaling")
OURS, STEPS = HERE / "train_veneer.py", ["--steps", "1"]
"""One timed step a round after one that warms up; more where the case says so: rows of real lengths differ from step to step."""
MODEL = "smollm2-135m"


def run_case(name: str, rounds: int, peer_python: str, folder: str) -> dict[str, Any]:
    """Both drivers in turn, `rounds` times."""
    arguments, speed_bar, memory_bar = CASES[name]
    ours, theirs = [], []
    for number in range(rounds):
        ours.append(drive(sys.executable, OURS, MODEL, *STEPS, *arguments))
        theirs.append(drive(peer_python, HERE / "peers" / "train_peft.py", folder, *STEPS, *arguments))
        speed = ours[-1]["useful_tokens_per_s"] / theirs[-1]["useful_tokens_per_s"]
        say(f"{name} round {number + 1}/{rounds}: {speed:.2f}x")

    def median(rows: list[dict[str, Any]], key: str) -> float:
        return statistics.median(row[key] for row in rows)

    pairs = [a["useful_tokens_per_s"] / b["useful_tokens_per_s"] for a, b in zip(ours, theirs, strict=True)]
    return {
        "case": name,
        "rounds": rounds,
        "speed_ratio": round(statistics.median(pairs), 2),
        "speed_ratio_range": [round(min(pairs), 2), round(max(pairs), 2)],
        "speed_bar": speed_bar,
        "memory_ratio": round(median(ours, "peak_bytes") / median(theirs, "peak_bytes"), 3),
        "memory_bar": memory_bar,
        "fraction_of_floor": round(median(ours, "fraction_of_floor"), 3),
        "veneer": {
            k: median(ours, k) for k in ("useful_tokens_per_s", "peak_bytes", "gemm_flops_per_s", "page_faults")
        },
        "peft": {k: median(theirs, k) for k in ("useful_tokens_per_s", "peak_bytes")},
    }


def kernels(case: str, peer_python: str, folder: str, traces: Path) -> dict[str, dict[str, float]]:
    """Seconds by kind of kernel of one step, of both; their Chrome traces go to a folder."""
    found = {}
    drivers = {
        "veneer": (sys.executable, OURS, MODEL),
        "peft": (peer_python, HERE / "peers" / "train_peft.py", folder),
    }
    for who, (python, driver, model) in drivers.items():
        trace = ["--steps", "1", "--profile", str(traces / f"{case}-{who}.json")]
        found[who] = drive(python, driver, model, *CASES[case][0], *trace)["breakdown_seconds"]
    say(f"{case}: kernels")
    return found


def scaling() -> list[dict[str, Any]]:
    """Time a token and bytes at other sizes, with what the floor and the plan say of each."""
    found = []
    for name, varies, seq, batch, passes in SIZES:
        steps = "1" if batch * passes > 8 else "3"
        line = drive(
            sys.executable,
            OURS,
            MODEL,
            "--seq",
            str(seq),
            "--batch",
            str(batch),
            "--passes",
            str(passes),
            "--steps",
            steps,
        )
        say(f"{name}: {line['useful_tokens_per_s']:.0f} tokens/s")
        keys = (
            "useful_tokens_per_s",
            "fraction_of_floor",
            "floor_tokens_per_s",
            "gemm_flops_per_s",
            "peak_bytes",
            "resting_bytes",
        )
        activations = line["predicted_bytes"]["activations"]
        found.append(
            {"name": name, "varies": varies, "row": seq, "tokens_a_pass": line["tokens_a_pass"], "passes": passes}
            | {key: line[key] for key in keys}
            | {"predicted_activation_bytes": activations}
        )
    return found


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    head = [
        "case",
        "speed vs peft",
        "bar",
        "peak memory vs peft",
        "bar",
        "of the FLOP floor",
        "tokens/s, veneer / peft",
    ]
    text = markdown(head, [_line(result) for result in results.get("cases", [])])
    for case, both in results.get("kernels", {}).items():
        kinds = list(both["veneer"])
        rows = [
            [who, *(f"{seconds[kind]:.3f}" for kind in kinds), f"{sum(seconds.values()):.2f}"]
            for who, seconds in both.items()
        ]
        text += f"\nSeconds of one step by kind of kernel, {case}:\n\n" + markdown(["", *kinds, "sum"], rows)
    if sizes := results.get("scaling"):
        first = {line["varies"]: line for line in reversed(sizes)}
        head = [
            "size",
            "tokens/s",
            "time a token",
            "the floor's",
            "of the FLOP floor",
            "peak - resting",
            "predicted activations",
        ]
        text += "\nveneer at other sizes (bf16, rank 8, half labelled); time and floor a token against the first of a kind:\n\n"
        text += markdown(head, [_size_line(line, first[line["varies"]]) for line in sizes])
    return text


def _size_line(line: dict[str, Any], first: dict[str, Any]) -> list[str]:
    work = line["gemm_flops_per_s"] / line["floor_tokens_per_s"]
    first_work = first["gemm_flops_per_s"] / first["floor_tokens_per_s"]
    return [
        line["name"],
        f"{line['useful_tokens_per_s']:.0f}",
        f"{first['useful_tokens_per_s'] / line['useful_tokens_per_s']:.2f}",
        f"{work / first_work:.2f}",
        f"{line['fraction_of_floor']:.2f}",
        f"{(line['peak_bytes'] - line['resting_bytes']) / 1e9:.2f} GB",
        f"{line['predicted_activation_bytes'] / 1e9:.2f} GB",
    ]


def _line(r: dict[str, Any]) -> list[str]:
    low, high = r["speed_ratio_range"]
    return [
        r["case"],
        f"{r['speed_ratio']:.2f}x ({low:.2f}-{high:.2f})",
        f"{r['speed_bar']}x",
        f"{r['memory_ratio']:.2f}x",
        f"{r['memory_bar']}x",
        f"{r['fraction_of_floor']:.2f}",
        f"{r['veneer']['useful_tokens_per_s']:.0f} / {r['peft']['useful_tokens_per_s']:.0f}",
    ]


def plot(results: dict[str, Any], path: Path) -> None:
    """Speed and memory ratios by case with the bars to reach as ticks; under them where the time goes and how it scales."""
    from matplotlib.figure import Figure

    whole = bool(results.get("kernels") and results.get("scaling"))
    figure = Figure(figsize=(10, 6.4 if whole else 3.2), layout="constrained")
    left, right, *more = figure.subplots(2 if whole else 1, 2).flat
    cases = results.get("cases", [])
    names = [r["case"] for r in cases]
    for axes, key, bar, title in (
        (left, "speed_ratio", "speed_bar", "speed, veneer / peft"),
        (right, "memory_ratio", "memory_bar", "peak memory, veneer / peft"),
    ):
        bars(axes, names, [r[key] for r in cases], [r[bar] for r in cases], title)
    if whole:
        _plot_kernels(more[0], results["kernels"])
        _plot_scaling(more[1], results["scaling"])
    figure.savefig(path, dpi=120)


def _plot_scaling(last: Any, sizes_of_all: list[dict[str, Any]]) -> None:
    """Milliseconds a token at other sizes, and the floor's."""
    for varies, colour in (("row", BLUE), ("step", ORANGE)):
        sizes = [s for s in sizes_of_all if s["varies"] == varies]
        tokens = [s["row"] if varies == "row" else s["tokens_a_pass"] * s["passes"] for s in sizes]
        last.plot(
            tokens, [1e3 / s["useful_tokens_per_s"] for s in sizes], "o-", color=colour, label=f"tokens a {varies}"
        )
        floors = [1e3 / s["floor_tokens_per_s"] for s in sizes]
        last.plot(tokens, floors, "--", color=colour, linewidth=1, label=f"its floor ({varies})")
    last.set_xscale("log", base=2)
    last.set_ylim(bottom=0)
    last.set_title("milliseconds a token", loc="left", fontsize=10)
    last.legend(fontsize=7, frameon=False)
    last.spines[["top", "right"]].set_visible(False)


def _plot_kernels(axes: Any, found: dict[str, dict[str, dict[str, float]]]) -> None:
    """One stacked bar a step: seconds by kind."""
    bars_of = [(f"{case}, {who}", seconds) for case, both in found.items() for who, seconds in both.items()]
    colours = [BLUE, ORANGE, "#3f8f5b", "#8d5fb0", "#b04a5a", "#5aa6b8", "#c2a83e", GREY, "#444b52"]
    place = [0.0] * len(bars_of)
    for number, kind in enumerate(next(iter(bars_of), ("", {}))[1]):
        values = [seconds[kind] for _, seconds in bars_of]
        axes.barh(
            [name for name, _ in bars_of],
            values,
            left=place,
            color=colours[number % len(colours)],
            label=kind,
            height=0.6,
        )
        place = [a + b for a, b in zip(place, values, strict=True)]
    axes.set_title("seconds of one step by kind of kernel", loc="left", fontsize=10)
    axes.legend(fontsize=6, frameon=False, ncol=2)
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--peer-python", default=str(PEER_PYTHON))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="keep the Chrome traces of the kernels part there")
    args = parser.parse_args()
    parts, names = args.parts.split(","), args.cases.split(",")
    if unknown := (set(parts) - set(PARTS)) | (set(names) - set(CASES)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")

    before = args.out / "train.json"
    results: dict[str, Any] = json.loads(before.read_text())["results"] if before.exists() else {}
    results = results if isinstance(results, dict) else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_folder(Path(scratch), "float32")
        if "peers" in parts:
            kept = {r["case"]: r for r in results.get("cases", [])}
            kept |= {name: run_case(name, args.rounds, args.peer_python, folder) for name in names}
            results["cases"] = [kept[name] for name in CASES if name in kept]
        if "kernels" in parts:
            traces = args.profile or Path(scratch)
            traces.mkdir(parents=True, exist_ok=True)
            results["kernels"] = {
                name: kernels(name, args.peer_python, folder, traces) for name in ("bf16-fixed", "fp32-fixed")
            }
    if "scaling" in parts:
        results["scaling"] = scaling()
    plot(results, publish("train", results, table(results), args.out))


if __name__ == "__main__":
    main()
