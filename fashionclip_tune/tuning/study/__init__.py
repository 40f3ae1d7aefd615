"""The sweep's one memory, an Optuna study in a journal, and what decides from it."""
