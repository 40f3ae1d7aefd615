"""Bytes that must survive: URLs, durable folders, journal pieces, checkpoints."""
