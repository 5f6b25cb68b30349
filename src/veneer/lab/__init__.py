"""Experiments that compare: which method, at which rate, for what it costs."""
