"""A run's own evaluations: its shards under its protocol, and what is done when memory runs out in one."""

import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.dataset import RunShards, storage_of
from fashionclip_tune.data.index import BadSample
from fashionclip_tune.errors import OutOfMemoryError
from fashionclip_tune.evaluation.dataset import EvaluationSet, evaluation_set
from fashionclip_tune.evaluation.evaluate import Evaluation, Metrics, cached_zero_shot, evaluate
from fashionclip_tune.evaluation.examples import answer_sheet, thumbnail
from fashionclip_tune.evaluation.protocols import Retrieval
from fashionclip_tune.models.openclip import LoadedModel
from fashionclip_tune.models.precision import PrecisionPlan
from fashionclip_tune.progress import OnPhase
from fashionclip_tune.training.device import ran_out_of_memory

_THUMBNAIL = 80


class RunEvaluator:
    """Measures the weights that the network has at the moment.

    Attributes:
        retrieval: the queries' ranks of the last evaluation on the validation shards; None before the first.
        bad_samples: photos that could not be read in any evaluation.
    """

    def __init__(
        self,
        config: ProjectConfig,
        shards: RunShards,
        loaded: LoadedModel,
        plan: PrecisionPlan,
        free_memory: Callable[[], None],
        on_phase: OnPhase,
    ) -> None:
        self.retrieval: Retrieval | None = None
        self.bad_samples: dict[BadSample, None] = {}
        self._config = config
        self._shards = shards
        self._storage = storage_of(config)
        self._loaded = loaded
        self._plan = plan
        self._free_memory = free_memory
        self._on_phase = on_phase
        self._shown: tuple[EvaluationSet, list[list[int]]] | None = None
        self._thumbnails: dict[int, Image.Image] = {}
        if plan.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(plan.device)  # another run may have been here before

    def zero_shot(self) -> Metrics:
        """Of the zero-shot weights, from the cache where it has them."""
        return self._metrics(cached_zero_shot)

    def evaluate(self) -> Metrics:
        """Those of the evaluated part of the training set have the prefix ``train_``."""
        return self._metrics(evaluate)

    def answer_sheet(self) -> bytes | None:
        """A JPEG of what the last evaluation found for a few captions that are always the same: their photo, then the five."""
        if self._shown is None or not self._shown[1]:
            return None
        photos, answers = self._shown
        try:
            pictures = [[self._thumbnail(photos, photo) for photo in row] for row in answers]
        except (OSError, ValueError):  # gone since: the figures do not depend on this picture
            return None
        finally:
            photos.reader.close()
        captions = [photos.captions[int(photos.first_rows_N[row[0]])] for row in answers]
        return answer_sheet(captions, pictures, [[photo == row[0] for photo in row] for row in answers])

    def _thumbnail(self, photos: EvaluationSet, photo: int) -> Image.Image:
        if photo not in self._thumbnails:
            self._thumbnails[photo] = thumbnail(photos.reader.image(photo), _THUMBNAIL)
        return self._thumbnails[photo]

    def _metrics(self, measure: Callable[..., Evaluation]) -> Metrics:
        metrics: Metrics = {}
        protocol, speed = self._config.evaluation.protocol, None
        num_decoders = self._config.training.num_workers  # loader processes, which rest meanwhile
        for prefix, shards in (("train_", self._shards.train_eval), ("", self._shards.valid)):
            if shards:
                photos = evaluation_set(shards, self._loaded.preprocessing, self._storage, num_decoders=num_decoders)
                measured = self._within_memory(partial(measure, self._loaded, photos, protocol=protocol))
                metrics |= {prefix + name: value for name, value in measured.metrics.items()}
                self.bad_samples |= dict.fromkeys(measured.bad_samples)
                self.retrieval = measured.retrieval  # the validation set's is the last one
                self._shown = (photos, measured.answers)
                speed = measured.speed
        metrics |= speed._asdict() if speed is not None else {}
        return metrics

    def _within_memory(self, measure: Callable[..., Evaluation]) -> Evaluation:
        """The evaluation's batch is fixed, or metrics would depend on the card: what else there is to free is freed once."""
        batch_size, reason = self._config.evaluation.batch_size, ""
        settings: dict[str, Any] = {
            "batch_size": batch_size,
            "plan": self._plan,
            "max_bad_share": self._config.training.max_bad_share,
            "on_progress": partial(self._on_phase, "encoding photos"),
        }
        for _ in range(2):
            try:
                return measure(**settings)
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            self._free_memory()
        raise OutOfMemoryError(
            f"out of memory in the evaluation, with evaluation.batch_size = {batch_size} ({reason}): start the run with a "
            "smaller one, which is then kept, so that all metrics are computed alike"
        )


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that tensors have taken of a GPU in this run, or what this process takes of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if Path("/proc/self/statm").exists():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
