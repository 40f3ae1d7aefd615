"""WebDataset shards: indexed, read by offset, put into batches."""
