"""Retrieval figures of a model on shards."""
