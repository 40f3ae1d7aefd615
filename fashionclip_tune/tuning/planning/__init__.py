"""A sweep worked out and checked before anything starts."""
