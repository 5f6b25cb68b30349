"""Bases that run natively: one parametric decoder, a row per family, and loading into mapped files."""
