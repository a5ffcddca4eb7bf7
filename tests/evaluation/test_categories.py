"""Categories come from a column or a feature, and reach the report as entropy."""

import numpy as np
import pytest

from pinrec_hf.data.dataset_folder import build_catalogue
from pinrec_hf.evaluation.categories import item_categories
from pinrec_hf.evaluation.evaluate import evaluate
from pinrec_hf.evaluation.metrics import category_entropy
from pinrec_hf.evaluation.popularity import DecayedPopularity
from pinrec_hf.evaluation.protocol import load_requests


def partition(codes):
    """Which pairs of items are alike."""
    return (np.asarray(codes)[:, None] == np.asarray(codes)[None]).tolist()


def test_a_column_or_the_first_feature_of_a_prefix(tiny_data):
    catalogue = build_catalogue(tiny_data)
    markets = item_categories(tiny_data, catalogue, "market")
    number = np.arange(len(catalogue))
    assert partition(markets) == partition(number % 2)
    topics = item_categories(tiny_data, catalogue, "topic")
    assert (topics[number % 9 == 0] == -1).all()  # items without features
    told = number % 9 > 0
    assert partition(topics[told]) == partition((number % 5)[told])


def test_without_a_column_there_is_none_and_an_unknown_name_is_refused(tiny_data):
    catalogue = build_catalogue(tiny_data)
    assert item_categories(tiny_data, catalogue) is None
    for name in ("genre", "embedding", "top"):
        with pytest.raises(ValueError, match=f"category column '{name}'"):
            item_categories(tiny_data, catalogue, name)


def test_entropy_is_measured_per_list(tiny_data):
    catalogue = build_catalogue(tiny_data)
    requests = load_requests(tiny_data, "test", catalogue)
    categories = item_categories(tiny_data, catalogue, "topic")
    ranker = DecayedPopularity.fit(tiny_data, catalogue)
    options = {"ks": (3, 5), "resamples": 50, "progress": False}
    found = evaluate(ranker, requests, catalogue, categories=categories, **options)
    lists = ranker.rank(list(requests.requests), 3)
    figure = found.metrics["category_entropy@3"]
    assert figure.value == pytest.approx(np.nanmean(category_entropy(lists, categories)))
    assert figure.low < figure.value < figure.high
    assert "category_entropy@3" in found.to_dict()["metrics"]
    assert "category_entropy@3" not in evaluate(ranker, requests, catalogue, **options).metrics
    with pytest.raises(ValueError, match="one code for each"):
        evaluate(ranker, requests, catalogue, categories=categories[:5], **options)
