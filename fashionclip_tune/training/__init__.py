"""One run: a model fine-tuned in stages, each evaluated, saved and reported."""
