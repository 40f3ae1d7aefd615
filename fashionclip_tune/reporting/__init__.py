"""A sweep's files read back: rankings, tables, figures, the page."""
