"""Search spaces that a sweep knows by name; files to read and to copy (docs/spaces.md)."""
