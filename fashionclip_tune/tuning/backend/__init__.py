"""Runs a sweep's trials on Ray."""
