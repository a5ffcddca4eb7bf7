"""Item biases begin where a count would put them.

From zero they move by at most a learning rate a step, so that a short training is spent on what a count knows, and what
is mostly saved is hardly told from what is mostly clicked (a classifier's bias begins at its log prior: Lin et al.,
arXiv 1708.02002, section 4.1).
"""

import numpy as np
import torch

from pinrec_hf.data.windows import SequenceDataset
from pinrec_hf.modeling.configuration_pinrec import FIRST_ITEM
from pinrec_hf.modeling.modeling_pinrec import PinRecModel

PSEUDO_TARGETS = 20
"""An item with this many targets believes its own surfaces and outcomes half, and everybody's half."""


def log_priors(counts: np.ndarray) -> np.ndarray:
    """What an item's biases would be if nothing but counts were known.

    Args:
        counts: int64 `(1 + conditions, items)`, how often each item is a target, whoever asks and under each condition.

    Returns:
        float32 `(items, 1 + conditions)`: the log of an item's count over the mean, one target added to each; then how
        much more likely it is under each surface or outcome, shrunk by `PSEUDO_TARGETS`.
    """
    total, *conditions = counts
    columns = [np.log((total + 1) / (total.mean() + 1))]
    for under in conditions:
        expected = under.sum() / max(1, total.sum())
        share = (under + PSEUDO_TARGETS * expected) / (total + PSEUDO_TARGETS)
        columns.append(np.log(share / expected) if expected else np.zeros(len(total)))
    return np.stack(columns, 1).astype(np.float32)


@torch.no_grad()
def begin_at_priors(model: PinRecModel, dataset: SequenceDataset, positive_mask: int) -> None:
    """Adds `log_priors` to the biases in the id table; a model without table or biases stays as it is.

    An item that no row knows keeps bias 0: that of an item with the mean count.
    """
    config, table = model.config, model.item_encoder.full_ids
    if table is None or not config.bias_size:
        return
    signals = config.signals or []
    counts = dataset.condition_counts(
        positive_mask,
        config.num_items,
        len(config.surfaces or []) if "surface" in signals else 0,
        len(config.outcomes or []) if "outcome" in signals else 0,
    )  # in the order of ConditionBias
    priors = torch.from_numpy(log_priors(counts[:, FIRST_ITEM:]))[:, : config.bias_size]
    biases = table.weight[FIRST_ITEM:, config.hidden_size :][:, : priors.shape[1]]
    biases += priors.to(biases)
