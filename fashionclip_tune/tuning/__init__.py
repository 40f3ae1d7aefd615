"""Sweeps, from a plan to a winner; only its room ``backend`` imports Ray."""
