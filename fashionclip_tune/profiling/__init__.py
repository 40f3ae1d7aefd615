"""Memory and speed of a training step, estimated or measured."""
