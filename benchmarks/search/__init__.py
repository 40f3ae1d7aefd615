"""How soon a search finds what is worth finding, replayed over recorded learning curves."""
