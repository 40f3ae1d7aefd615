"""Each metric by its name in an evaluation, and by the queries behind it."""

import numpy as np
import pytest

from fashionclip_tune.config.choices import RetrievalProtocol as Protocol
from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluation.evaluate import describe
from fashionclip_tune.evaluation.metric import DEFAULT_METRIC, METRICS, Metric, metric_named, metric_of
from fashionclip_tune.evaluation.protocols import compare, retrieve
from tests.support.pools import pool


def test_the_metrics_are_the_recalls_that_evaluations_have() -> None:
    metrics, _ = describe(pool(), Protocol.INSTANCE)
    recalls = {name for name in metrics if name.startswith("recall_at_") and not name.endswith(("_low", "_high"))}
    assert set(METRICS) == recalls
    assert len({metric.short for metric in METRICS.values()}) == len({metric.label for metric in METRICS.values()}) == 9


@pytest.mark.parametrize("protocol", list(Protocol))
@pytest.mark.parametrize("name", METRICS)
def test_the_queries_of_a_metric_average_to_its_value(name: str, protocol: Protocol) -> None:
    metrics, retrieval = describe(pool(300), protocol)
    means = [float(direction.values_Q.mean()) for direction in METRICS[name].hits(retrieval)]
    assert np.mean(means) == pytest.approx(metrics[name], abs=1e-6)


def test_its_interval_is_that_of_an_evaluation() -> None:
    metrics, retrieval = describe(pool(), Protocol.PRODUCT)
    assert DEFAULT_METRIC.interval(DEFAULT_METRIC.computed_interval(retrieval)) == DEFAULT_METRIC.interval(metrics)
    assert METRICS["recall_at_1"].interval(metrics) is None


@pytest.mark.parametrize("name", METRICS)
def test_the_paired_test_is_of_the_metric(name: str) -> None:
    metric = METRICS[name]
    (first, one), (second, other) = (describe(pool(seed=0, dim=dim), Protocol.INSTANCE) for dim in (12, 6))
    test = compare(one, other, metric.k, metric.directions)
    assert test is not None
    assert test.difference == pytest.approx(first[name] - second[name], abs=1e-6)


def test_rows_are_read_by_name() -> None:
    metric = METRICS["recall_at_1_image_to_text"]
    assert metric == Metric(1, ("image_to_text",))
    assert (metric.short, metric.label) == ("R@1 i2t", "Recall@1 image to text")
    row = {"recall_at_10": 0.9, "recall_at_1_image_to_text": 0.2, "untouched_recall_at_1_image_to_text": 0.0}
    assert (metric.of(row), metric.score(row), metric.zero_shot(row), metric.interval(row)) == (0.2, 0.2, 0.0, None)
    assert (metric.of({}), metric.score({}), metric.zero_shot({"untouched_recall_at_10": 0.5})) == (None, 0.0, None)


@pytest.mark.parametrize("name", ["recall@10", "recall_at_3", "text_to_image", "product", "loss", ""])
def test_another_name_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(UserError, match=r"is not allowed: recall_at_1, .*recall_at_10_image_to_text; the protocol") as refused:
        metric_named(name)
    assert all(each in str(refused.value) for each in METRICS)


def test_a_sweep_says_what_it_maximises() -> None:
    assert metric_of({}) is metric_of({"metric": "recall_at_10"}) is METRICS["recall_at_10"], "older ones say nothing"
    assert metric_of({"metric": "recall_at_5"}).name == "recall_at_5"
    with pytest.raises(UserError, match="sweep new maximises recall_at_20, which this version does not know"):
        metric_of({"name": "new", "metric": "recall_at_20"})


def test_retrieval_of_one_direction_is_of_its_queries_alone() -> None:
    found = retrieve(pool(), Protocol.ALL_CAPTIONS)
    (texts,), (images,) = found.hits(1, ("text_to_image",)), found.hits(1, ("image_to_text",))
    assert len(texts.values_Q) > len(images.values_Q) == 90
