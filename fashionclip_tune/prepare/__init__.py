"""A shop's tables and photos become shards: ``pipeline`` tells the way, the other modules are its stations."""

from fashionclip_tune.prepare.options import PrepareOptions
from fashionclip_tune.prepare.pipeline import prepare
from fashionclip_tune.prepare.report import PrepareReport

__all__ = ["PrepareOptions", "PrepareReport", "prepare"]
