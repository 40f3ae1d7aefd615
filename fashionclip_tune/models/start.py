"""What a model starts from: a network as it is described, and where its weights are."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fashionclip_tune.config.start_names import HUB_PREFIX
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.hub import cached_file, cached_tag_file, hub_file, tag_file
from fashionclip_tune.models.weights import NAMES_IN_A_FOLDER
from fashionclip_tune.storage.checkpoint import RECORD_NAME, file_hash


@dataclass(frozen=True)
class Start:
    """A model before it is trained. At most one of ``tag``, ``file`` and ``repository`` says where its weights are."""

    openclip_name: str
    """By which OpenCLIP builds it and finds its tokenizer."""
    model_config: dict[str, Any] = field(compare=False)
    preprocessing: dict[str, Any] = field(compare=False)
    """What of OpenCLIP's ``preprocess_cfg`` has to be said."""
    tag: str | None = None
    file: Path | None = None
    file_hash: str | None = None
    """As its record lists it; None: nothing says what is to be in the file."""
    is_of_transformers: bool = False
    """The file has the names of transformers."""
    tokenizer_folder: Path | None = None
    """Where its tokenizer is, if neither with the description nor where OpenCLIP has it."""
    repository: str | None = None
    is_on_the_hub: bool = False
    """Its description is, and so is a tokenizer that it names; a folder of somebody's decides nothing that is fetched."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What is taken for granted, for people to read."""
    stamps: tuple[object, ...] = ()
    """Of all files that say something about it: by the next time, others may have taken their place."""

    @property
    def has_weights(self) -> bool:
        """Else they are random."""
        return (self.tag or self.file or self.repository) is not None

    def fetch(self, cache_dir: Path) -> Path:
        """The weights file, fetched if need be.

        Raises:
            UnavailableError: it is not here and cannot be fetched.
            UserError: it is not what its record says.
        """
        if self.tag is not None:
            return tag_file(self.openclip_name, self.tag, NAMES_IN_A_FOLDER, cache_dir)
        if self.repository is not None:
            return hub_file(self.repository, f"{HUB_PREFIX}{self.repository}: the weights", NAMES_IN_A_FOLDER, None)
        assert self.file is not None
        if self.file_hash is not None and file_hash(self.file) != self.file_hash:
            raise UserError(f"{self.file.parent} is damaged: {self.file.name} is not what {RECORD_NAME} says")
        return self.file

    def at_hand(self, cache_dir: Path) -> Path | None:
        """The weights file where it is on this machine already."""
        if self.tag is not None:
            return cached_tag_file(self.openclip_name, self.tag, NAMES_IN_A_FOLDER, cache_dir)
        return cached_file(self.repository, NAMES_IN_A_FOLDER, None) if self.repository is not None else self.file
