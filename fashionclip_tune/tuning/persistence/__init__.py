"""A sweep's files: where they lie, how they survive a machine, what is kept of ended trials."""
