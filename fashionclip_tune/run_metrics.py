"""A run's own evaluations: its shards under its protocol, and what is done when memory runs out in one."""

from collections.abc import Callable
from functools import partial

from fashionclip_tune.config import ProjectConfig
from fashionclip_tune.dataset import RunShards, storage_of
from fashionclip_tune.errors import OutOfMemoryError
from fashionclip_tune.evaluate import Evaluation, Metrics, cached_zero_shot, evaluate
from fashionclip_tune.evaluation_set import evaluation_set
from fashionclip_tune.index import BadSample
from fashionclip_tune.model import LoadedModel
from fashionclip_tune.oom import ran_out_of_memory
from fashionclip_tune.precision import PrecisionPlan
from fashionclip_tune.protocols import Retrieval


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
    ) -> None:
        self.retrieval: Retrieval | None = None
        self.bad_samples: dict[BadSample, None] = {}
        self._config = config
        self._shards = shards
        self._storage = storage_of(config)
        self._loaded = loaded
        self._plan = plan
        self._free_memory = free_memory

    def zero_shot(self) -> Metrics:
        """Of the untouched weights, from the cache where it has them."""
        return self._metrics(cached_zero_shot)

    def evaluate(self) -> Metrics:
        """Those of the evaluated part of the training set have the prefix ``train_``."""
        return self._metrics(evaluate)

    def _metrics(self, measure: Callable[..., Evaluation]) -> Metrics:
        metrics: Metrics = {}
        protocol = self._config.evaluation.protocol
        for prefix, shards in (("train_", self._shards.train_eval), ("", self._shards.valid)):
            if shards:
                photos = evaluation_set(shards, self._loaded.preprocessing, self._storage)
                measured = self._within_memory(partial(measure, self._loaded, photos, protocol=protocol))
                metrics |= {prefix + name: value for name, value in measured.metrics.items()}
                self.bad_samples |= dict.fromkeys(measured.bad_samples)
                self.retrieval = measured.retrieval  # the validation set's is the last one
        return metrics

    def _within_memory(self, measure: Callable[..., Evaluation]) -> Evaluation:
        """The evaluation's batch is fixed, or metrics would depend on the card: what else there is to free is freed once."""
        batch_size, reason = self._config.evaluation.batch_size, ""
        for _ in range(2):
            try:
                return measure(batch_size=batch_size, plan=self._plan, max_bad_share=self._config.training.max_bad_share)
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            self._free_memory()
        raise OutOfMemoryError(
            f"out of memory in the evaluation, with evaluation.batch_size = {batch_size} ({reason}): start the run with a "
            "smaller one, which is then kept, so that all metrics are computed alike"
        )
