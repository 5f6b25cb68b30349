"""Compile the C files of this folder on first use, once for each machine, compiler and version of the source.

A kernel is an optional extra: without a compiler, without the instructions, or with VENEER_NATIVE=0, `library()` is None and
every operation takes its plain torch form, which computes the same. Nothing is fetched; the system's own `cc` is asked.

The surprise: OpenMP. The library asks for `libgomp.so.1` and gets the copy that torch has already loaded, so both share one set
of threads and never stand in each other's way.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from veneer.files import cache_folder

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=gnu11")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where the plain forms are to be used. Decided once a process."""
    reason = _obstacle()
    if reason is not None:
        log.info("native kernels: off (%s)", reason)
        return None
    try:
        return _typed(ctypes.CDLL(str(_compiled())))
    except (OSError, subprocess.SubprocessError) as problem:
        detail = getattr(problem, "stderr", None) or problem
        log.warning(
            "native kernels: off, as they could not be built; the plain forms are slower. %s", str(detail)[:500]
        )
        return None


_KINDS = {"p": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int, "f": ctypes.c_float}
_SIGNATURES = {
    "few_rows": "plplllplii",
    "some_rows": "plplllpli",
    "few_scores": "plplllpli",
    "decode_attention": "pppllllplllllfpi",
    "attend_in_place": "ppplllppllllllfpli",
    "store_runs": "ppllppllli",
    "few_stored_rows": "plpilllpli",
    "plain_rows": "pllpi",
    "largest": "pllppi",
    "sketch_rows": "pllppppi",
    "draw_room": "li",
    "draw_rows": "pllppi",
    "likeliest_room": "lli",
    "likeliest": "plpplllpppi",
    "low_rank_rows": "ppllpli",
    "cast_all": "pl",
    "dequantise_int8": "ppllpi",
    "merge_low_rank": "plpplllpppi",
    "merge_low_rank_file": "ililpplllpp",
    "decode_blocks": "plpppplpi",
    "rms_forward": "plllpfppi",
    "rotary": "plllllppfpi",
    "gated_forward": "pllffpi",
}
"""Arguments of the kernels that decoding calls hundreds of times a step: p pointer, l long, i int, f float. So ctypes takes plain
numbers, which costs half of wrapping each by hand."""


def _typed(kernels: ctypes.CDLL) -> ctypes.CDLL:
    for name, letters in _SIGNATURES.items():
        getattr(kernels, name).argtypes = [_KINDS[letter] for letter in letters]
    return kernels


def _obstacle() -> str | None:
    if os.environ.get("VENEER_NATIVE", "1") == "0":
        return "VENEER_NATIVE=0"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"{platform.system()} on {platform.machine()}"
    if not torch.cpu._is_avx512_bf16_supported():
        return "the CPU has no AVX512-BF16"
    return None if _compiler() else "no C compiler"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc"))


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + repr(FLAGS).encode() + _cpu().encode())
    for source in sorted((*HERE.glob("*.c"), *HERE.glob("*.h"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _cpu() -> str:
    """What `-march=native` sees: the model and its flags."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    lines = text.split("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.split("\t")[0] in ("model name", "flags", "cpu family", "model"))


def _compiled() -> Path:
    compiler = _compiler()
    assert compiler is not None
    target = cache_folder() / "native" / f"{_key(compiler)}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    sources = [str(path) for path in sorted(HERE.glob("*.c"))]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        fresh = Path(folder) / "kernels.so"
        command = [compiler, *FLAGS, *sources, "-o", str(fresh), "-lm"]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        fresh.replace(target)
    return target
