"""An effective batch on the training device, with all that is random about it drawn before it is cut."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fashionclip_tune.config.choices import PositivePairs
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.batches import TrainBatch
from fashionclip_tune.data.preprocessing import Preprocessing
from fashionclip_tune.losses import positive_pairs
from fashionclip_tune.models.sequences import CausalText
from fashionclip_tune.seeds import Stream, torch_seed
from fashionclip_tune.training.augment import AugmentationDraws, augment, draw_augmentation
from fashionclip_tune.training.device import onto


class Transfer:
    """Copies on a stream of their own: the CPU, a step ahead of the GPU, has the next batch copied while it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """On a CPU the tensors themselves."""
        if self._stream is None:
            return [onto(self._device, tensor) for tensor in tensors]
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copies = [onto(self._device, tensor) for tensor in tensors]  # what the loader has pinned stays as it is
        computing.wait_stream(self._stream)
        for copy in copies:  # freed for the copying stream only when the computing one is done with it
            copy.record_stream(computing)
        return copies


@dataclass(frozen=True)
class BatchInputs:
    """B photos on their canvas, their captions, and which of them belong together."""

    canvases_BCHW: Tensor  # uint8
    tokens_BL: Tensor
    positives_BB: Tensor | None
    _augmentation: AugmentationDraws | None
    _preprocessing: Preprocessing

    def images(self, rows: slice) -> Tensor:
        """The model's input of some rows, augmented as drawn."""
        canvases_BCHW, preprocessing = self.canvases_BCHW[rows], self._preprocessing
        if self._augmentation is None:
            return preprocessing.normalise(preprocessing.resize_canvas(canvases_BCHW).float() / 255)
        return preprocessing.normalise(augment(canvases_BCHW, self._augmentation[rows], preprocessing.size))


def prepare_inputs(
    batch: TrainBatch,
    config: ProjectConfig,
    preprocessing: Preprocessing,
    step: int,
    transfer: Transfer,
    causal_text: CausalText | None = None,
) -> BatchInputs:
    """Brings a batch to the device; what is drawn depends on (seed, step) only.

    Args:
        causal_text: by which captions are cut, all to one length: whatever part of the batch is encoded at a time.
    """
    on_cpu = [batch.images_BCHW, batch.tokens_BL if causal_text is None else causal_text.cut(batch.tokens_BL)]
    if config.loss.positives is not PositivePairs.PAIR:
        on_cpu.append(positive_pairs(batch.products_B, batch.tokens_BL))
    canvases_BCHW, tokens_BL, *positives = transfer(on_cpu)
    wanted, draws = config.augmentation, None
    if wanted.image_strength > 0:
        draws = draw_augmentation(
            len(canvases_BCHW),
            wanted.image_strength,
            torch.Generator().manual_seed(torch_seed(config.training.seed, Stream.AUGMENTATION, step)),
            rand_augment=wanted.rand_augment,
            erasing=wanted.erasing,
        )
    return BatchInputs(canvases_BCHW, tokens_BL, positives[0] if positives else None, draws, preprocessing)
