"""Where the time of a training step goes, by kind of kernel.

Both drivers use it, each in an environment of its own: it needs torch only.
"""

import re
import time

KINDS = (
    ("loss", r"log_softmax|nll_loss|cross_entropy"),
    ("attention", r"attention|aten::_?softmax"),
    ("dequantise", r"bitsandbytes|dequantise"),
    ("GEMM", r"aten::_?(mm|addmm_?|bmm|baddbmm_?|linear|int_mm)$|mkldnn|veneer::product"),
    ("allocation", r"aten::(empty|zeros|ones|full|zero_|fill_|resize_|new_)"),
    ("copies", r"aten::(copy_|_to_copy|to|contiguous|clone|cat|index|index_select|embedding)"),
    ("norm, rope, activation", r"."),
)
"""Kind -> what the names of its operators look like; the first that matches."""
OUTSIDE = "optimiser", "Python and the rest"


def kind_of(name):
    """The kind of an operator of the profiler.

    >>> kind_of("aten::addmm_"), kind_of("aten::_log_softmax"), kind_of("aten::mul")
    ('GEMM', 'loss', 'norm, rope, activation')
    """
    return next(kind for kind, pattern in KINDS if re.search(pattern, name))


def breakdown(passes, update, trace=None):
    """Seconds by kind of one step: `passes()` runs forward and backward, `update()` the optimiser.

    Writes a Chrome trace to the path `trace`, where one is given.
    Self times of operators on the calling thread. What the profiler itself costs falls to "Python and the rest".
    """
    from torch.profiler import ProfilerActivity, profile

    begin = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        passes()
        middle = time.perf_counter()
    found = dict.fromkeys([kind for kind, _ in KINDS], 0.0)
    for row in profiler.key_averages():
        found[kind_of(row.key)] += row.self_cpu_time_total / 1e6
    before = time.perf_counter()
    update()
    found["optimiser"] = time.perf_counter() - before
    inside = sum(seconds for kind, seconds in found.items() if kind != "optimiser")
    found["Python and the rest"] = max(0.0, middle - begin - inside)
    if trace:
        profiler.export_chrome_trace(trace)
    return {kind: round(seconds, 4) for kind, seconds in found.items()}
