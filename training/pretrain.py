"""Pretrain PinRec on the activity of all surfaces.

accelerate launch training/pretrain.py --data data --preset small --output_dir pinrec-base
accelerate launch training/pretrain.py --data today --model yesterday --output_dir pinrec-today     # warm start
accelerate launch training/pretrain.py config.yaml
accelerate launch training/pretrain.py ... --resume True      # after a kill: ends in the same weights
"""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import set_seed

from pinrec_hf.data.collator import PretrainingCollator
from pinrec_hf.data.dataset_folder import build_tokenizer, default_budgets, read_metadata
from pinrec_hf.data.windows import SequenceDataset, encode_split
from pinrec_hf.evaluation.baselines import ARCHITECTURES
from pinrec_hf.evaluation.evaluate import evaluate
from pinrec_hf.evaluation.protocol import Requests, load_requests
from pinrec_hf.evaluation.ranker import ModelRanker
from pinrec_hf.modeling.configuration_pinrec import DAY, PinRecConfig
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.retrieval.item_table import write_item_table
from pinrec_hf.training.arguments import (
    DataArguments,
    ModelArguments,
    PinRecTrainingArguments,
    parse_arguments,
    read_json,
    run_main,
)
from pinrec_hf.training.defaults import choose_batches, default_config, has_queries
from pinrec_hf.training.priors import begin_at_priors
from pinrec_hf.training.record import record_embedding_norm, write_training_record
from pinrec_hf.training.run_folder import RunFolder
from pinrec_hf.training.trainer import EarlyStopping, PinRecTrainer, newest_checkpoint
from pinrec_hf.training.warm_start import WarmStart, warm_start

OF_THE_DATA = {
    "preset", "surfaces", "outcomes", "negative_outcomes", "num_items", "content_size", "query_size",
    "catalogue_fingerprint",
}  # fmt: skip
"""Config fields that are not given as overrides."""


@dataclass
class Pretraining:
    """All that a run needs, made from its arguments: the parts of `main`, for benchmarks to vary."""

    tokenizer: PinRecTokenizer
    config: PinRecConfig
    model_class: type[PinRecModel]
    dataset: SequenceDataset
    collator: PretrainingCollator
    validation: Requests
    warm: WarmStart | None = None


def prepare_pretraining(
    data_args: DataArguments, model_args: ModelArguments, training_args: PinRecTrainingArguments
) -> Pretraining:
    """Tokenizer, config, rows and collator of a run.

    Raises:
        FileNotFoundError, ValueError: the data folder is none, or holds no target.
    """
    metadata = read_metadata(data_args.data)
    if model_args.architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {model_args.architecture!r} does not exist; choose one of {sorted(ARCHITECTURES)}"
        )
    config_class, model_class, fixed = ARCHITECTURES[model_args.architecture]
    if model_args.model is not None and (model_args.preset or model_args.config_overrides):
        raise ValueError("--model brings its own config: leave out --preset and --config_overrides, or --model")
    if model_args.model is None and model_args.revision is not None:
        raise ValueError(f"--revision {model_args.revision} is of a --model, which is missing: name it, or leave both")
    if model_args.recent_days is None and model_args.replay:
        raise ValueError(f"--replay {model_args.replay} is a share of what --recent_days leaves out: give that too")
    if model_args.recent_days is not None and model_args.recent_days <= 0:
        raise ValueError(f"--recent_days {model_args.recent_days} must be above 0; 1 is the last day of train")
    if not 0 <= model_args.replay <= 1:
        raise ValueError(f"--replay {model_args.replay} is a share and must lie between 0 and 1")
    given = read_json("config_overrides", model_args.config_overrides or "{}")
    if stray := sorted(set(given) & OF_THE_DATA):
        raise ValueError(f"--config_overrides names {stray}, which the data or --preset decide: leave it out")
    overrides: dict[str, Any] = {**given, **fixed}
    preset, warm = model_args.preset or "small", None
    if model_args.model is not None:
        warm = warm_start(model_args.model, data_args.data, model_class, revision=model_args.revision)
        tokenizer, given = warm.tokenizer, {name: getattr(warm.model.config, name) for name in fixed}
    else:
        # of a wrong type or name they are refused here, before anything is read
        draft = config_class.from_preset(preset, **{k: v for k, v in overrides.items() if k != "outcome_budgets"})
        tokenizer = build_tokenizer(
            data_args.data,
            model_max_length=draft.max_position_embeddings,
            request_features=draft.request_feature_buckets > 0,
            contexts="context" in (draft.signals or []),
        )
    if odd := sorted(name for name in fixed if given.get(name, fixed[name]) != fixed[name]):
        where = f"--model {model_args.model} has another" if warm is not None else "--config_overrides gives another"
        raise ValueError(f"--architecture {model_args.architecture} is a model of fixed {odd}, of which {where}")
    dataset = SequenceDataset(encode_split(data_args.data, "train", tokenizer), window=tokenizer.model_max_length - 1)
    if warm is not None:
        config = warm.model.config
    else:
        config = config_class.from_preset(
            preset,
            **{
                "surfaces": tokenizer.surfaces,
                "outcomes": tokenizer.outcomes,
                "negative_outcomes": tokenizer.negative_outcomes,
                "outcome_budgets": default_budgets(metadata),
                "num_items": len(tokenizer.catalogue),
                "content_size": tokenizer.catalogue.content_size,
                "query_size": tokenizer.query_size,
                "catalogue_fingerprint": tokenizer.catalogue.fingerprint,
                **default_config(dataset, tokenizer, overrides.get("item_id_embedding") == "hashed"),
                **overrides,
            },
        )
    if config.time_offsets and data_args.target != "window":
        raise ValueError(
            f"time_offsets={config.time_offsets} are learned from targets further ahead: give --target window, or "
            "leave them out"
        )
    if warm is not None and has_queries(dataset) and config.hash_table_size == 1 and not config.query_size:
        raise ValueError(
            f"{data_args.data} has search queries; {model_args.model} was trained on a log without, and would take all "
            "of them for one: train a new model, or prepare without the column `query`"
        )
    if model_args.recent_days is not None:
        last = dataset.time_range()[1]
        if not last:
            raise ValueError(f"{data_args.data} knows no times, hence no last days: leave out --recent_days")
        since = last - int(model_args.recent_days * DAY)
        share, seed = model_args.replay, training_args.seed
        dataset.keep_recent(tokenizer.positive_mask, config.num_items, since=since, replay=share, seed=seed)
    ahead = data_args.target_window if data_args.target == "window" else 1
    counts = dataset.target_counts(tokenizer.positive_mask, config.num_items, ahead)
    if not counts.sum():
        raise ValueError(f"{data_args.data} has no training target: no event of a known item has a positive outcome")
    uniform_negatives = choose_batches(dataset, data_args, training_args)
    first, last = dataset.time_range()
    half_life = data_args.recency_half_life_days
    collator = PretrainingCollator(
        tokenizer,
        frequencies=counts / counts.sum(),
        seed=training_args.seed,
        uniform_negatives=uniform_negatives,
        full_softmax=config.softmax == "full",
        condition_dropout=data_args.condition_dropout,
        time_dropout=data_args.time_dropout,
        target=data_args.target,
        target_window=data_args.target_window,
        recency_half_life=None if half_life is None else half_life * DAY,
        first_time=first,
        last_time=last,
    )
    requests = load_requests(
        data_args.data, "validation", tokenizer.catalogue, max_users=data_args.validation_users, seed=0
    )
    return Pretraining(tokenizer, config, model_class, dataset, collator, requests, warm)


def train(
    run: Pretraining,
    data_args: DataArguments,
    training_args: PinRecTrainingArguments,
    resume_from: str | None = None,
) -> PinRecTrainer:
    """Trains a model of `run`; returns the trainer with the best weights in `trainer.model`."""
    set_seed(training_args.seed)
    if run.warm is None:
        model = run.model_class(run.config)
        begin_at_priors(model, run.dataset, run.tokenizer.positive_mask)
    else:
        model = run.warm.model
    requests = run.validation
    patience = training_args.early_stopping_patience
    trainer = PinRecTrainer(
        model=model,
        args=training_args,
        train_dataset=run.dataset,
        eval_dataset=requests.requests,
        data_collator=run.collator,
        validate=recall_on(requests, run.tokenizer, hide_time=data_args.time_dropout >= 1),
        callbacks=[EarlyStopping(patience)] if patience is not None else None,
    )
    start = time.process_time()
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.state.log_history[-1]["train_cpu_seconds"] = time.process_time() - start  # beside the clock's train_runtime
    return trainer


def recall_on(
    requests: Requests, tokenizer: PinRecTokenizer, hide_time: bool
) -> Callable[[PinRecModel], dict[str, float]]:
    """What a `PinRecTrainer` validates by: recall, NDCG and coverage on those requests."""

    def validate(model: PinRecModel) -> dict[str, float]:
        ranker = ModelRanker(model, tokenizer, hide_time=hide_time)
        result = evaluate(ranker, requests, tokenizer.catalogue, resamples=100, progress=False)
        return {
            **{name: result.metrics[name].value for name in ("recall@10", "recall@50", "ndcg@10")},
            **result.coverage,
        }

    return validate


def main() -> None:
    data_args, model_args, training_args = parse_arguments(DataArguments, ModelArguments, PinRecTrainingArguments)
    folder = RunFolder(training_args.output_dir, training_args.resume)
    training_args.output_dir = str(folder.checkpoints)
    run = prepare_pretraining(data_args, model_args, training_args)
    with folder.locked():
        checkpoint = newest_checkpoint(folder.checkpoints)
        trainer = train(run, data_args, training_args, resume_from=checkpoint)
        model = trainer.finished_model(lambda: run.model_class(run.config))
        if model is not None:
            with folder.publish() as output:
                save(model, trainer, run, data_args.data, output)
                write_training_record(
                    output,
                    "training/pretrain.py",
                    sys.argv[1:],
                    processes=training_args.world_size,
                    resumed=checkpoint is not None,
                )
            print(f"wrote {folder.output}; next: pinrec index --model {folder.output}")


def save(model: PinRecModel, trainer: PinRecTrainer, run: Pretraining, data: str | Path, output: Path) -> None:
    """Model, tokenizer with catalogue and item columns, the code for `trust_remote_code`, the run's log, and the
    data's metadata."""
    record_embedding_norm(model, run.tokenizer, cast(Sequence, trainer.eval_dataset))
    save_model(model, run.tokenizer, output)
    before = None if run.warm is None else run.warm.folder / "items.parquet"
    write_item_table(Path(data) / "items.parquet", output / "items.parquet", run.tokenizer.catalogue, before)
    shutil.copyfile(Path(data) / "metadata.json", output / "data.json")
    trainer.state.save_to_json(str(output / "trainer_state.json"))


def save_model(model: PinRecModel, tokenizer: PinRecTokenizer, output: Path) -> None:
    """Model and tokenizer, and the code for `trust_remote_code`."""
    PinRecConfig.register_for_auto_class()
    PinRecModel.register_for_auto_class("AutoModel")
    PinRecTokenizer.register_for_auto_class("AutoTokenizer")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    run_main(main)
