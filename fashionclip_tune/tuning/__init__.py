"""Sweeps: the only place that imports Ray."""
