"""OpenCLIP models: found, loaded, described, handed on."""
