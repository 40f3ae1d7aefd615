"""Sweeps that are killed, and machines that are lost."""
