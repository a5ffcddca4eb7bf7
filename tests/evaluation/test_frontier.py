"""The frontier: a knob turned towards diversity gives diversity, and every setting is measured and drawn."""

import numpy as np
import pytest

from pinrec_hf.evaluation.frontier import MMRRanker, measure_frontier
from pinrec_hf.evaluation.plots import plot_frontier
from pinrec_hf.evaluation.protocol import load_requests
from pinrec_hf.evaluation.ranker import ModelRanker


@pytest.fixture(scope="module")
def ranker(model, tokenizer):
    return ModelRanker(model, tokenizer, hide_time=True)


def test_mmr_gives_up_recall_for_diversity_only_as_told(ranker, tiny_data):
    catalogue = ranker.tokenizer.catalogue
    requests = load_requests(tiny_data, "test", catalogue, max_users=25)
    options = {"k": 5, "resamples": 50, "progress": False}
    points = measure_frontier(
        {
            "MMR": (lambda trade_off: MMRRanker(ranker, trade_off, candidates=30), (1.0, 0.5, 0.1)),
            "plain": (lambda _: ranker, (0,)),
        },
        requests,
        catalogue,
        **options,
    )
    assert [(p.system, p.knob) for p in points] == [("MMR", 1.0), ("MMR", 0.5), ("MMR", 0.1), ("plain", 0.0)]
    diversity = [point.diversity.value for point in points]
    assert diversity[0] < diversity[1] < diversity[2]
    assert (points[0].recall, points[0].diversity) == (points[3].recall, points[3].diversity)
    assert points[0].to_dict()["recall"]["value"] == points[0].recall.value
    figure = plot_frontier(points)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.1", "0"]  # the last of each line
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["MMR: 1, 0.5, 0.1", "plain: 0"]
    with pytest.raises(ValueError, match="at least one setting"):
        measure_frontier({"MMR": (lambda _: ranker, ())}, requests, catalogue)


def test_mmr_picks_from_what_the_model_ranks(ranker, tiny_data):
    requests = load_requests(tiny_data, "test", ranker.tokenizer.catalogue).requests[:9]
    lists = MMRRanker(ranker, 0.3, candidates=8).rank(requests, 5)
    best = ranker.rank(requests, 8)
    assert all(set(found) <= set(allowed) for found, allowed in zip(lists.tolist(), best.tolist(), strict=True))
    assert (lists[:, 0] == best[:, 0]).all()
    assert any(found != allowed[:5] for found, allowed in zip(lists.tolist(), best.tolist(), strict=True))
    everything = MMRRanker(ranker, 0.3, candidates=5).rank(requests, len(ranker.items) + 3)
    assert (np.sort(everything, axis=1)[:, -10:] >= 0).all()
    assert (everything[:, -1] == -1).all()
