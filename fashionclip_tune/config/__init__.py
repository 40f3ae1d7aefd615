"""The one configuration object of a run."""
