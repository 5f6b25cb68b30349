"""Kernels in C for what plain torch cannot do well on a CPU. Optional: see `build.py`."""
