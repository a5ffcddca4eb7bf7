"""Finetune a pretrained base for one surface, from its feed views: a LoRA adapter, or a whole model.

accelerate launch training/finetune.py --data data --model pinrec-base --surface search --lora \\
    --output_dir pinrec-base/adapters/search
accelerate launch training/finetune.py config.yaml
accelerate launch training/finetune.py ... --resume True      # after a kill: ends in the same weights
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import set_seed
from transformers.utils import logging

from pinrec_hf.data.collator import FinetuningCollator
from pinrec_hf.data.dataset_folder import default_budgets, read_metadata
from pinrec_hf.data.views import ViewDataset, encode_views
from pinrec_hf.evaluation.protocol import Requests, load_requests
from pinrec_hf.hub.adapters import ADAPTED, check_adapter_name, save_surface_adapter
from pinrec_hf.modeling.configuration_pinrec import check_budget
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.retrieval.encode import base_fingerprint
from pinrec_hf.retrieval.pretrained import find_folder, load_pretrained, named_revision
from pinrec_hf.training.arguments import (
    DataArguments,
    FinetuningArguments,
    FinetuningTrainingArguments,
    parse_arguments,
    read_json,
    run_main,
)
from pinrec_hf.training.pretrain import DAY, recall_on, save_model
from pinrec_hf.training.record import record_embedding_norm, write_training_record
from pinrec_hf.training.run_folder import RunFolder
from pinrec_hf.training.trainer import EarlyStopping, PinRecTrainer, newest_checkpoint
from pinrec_hf.training.warm_start import check_polarity

logger = logging.get_logger("pinrec_hf.finetune")
LEARNING_RATE = {True: 5e-4, False: 2e-4}
"""With and without LoRA, whose few weights bear more."""
EPOCHS = 3


@dataclass
class Finetuning:
    """All that a run needs, made from its arguments: the parts of `main`, for benchmarks to vary."""

    tokenizer: PinRecTokenizer
    model: PinRecModel | PeftModel
    dataset: ViewDataset
    collator: FinetuningCollator
    base: Path
    base_fingerprint: str
    outcome_budget: dict[str, float] | None


def prepare_finetuning(
    data_args: DataArguments, args: FinetuningArguments, training_args: FinetuningTrainingArguments
) -> Finetuning:
    """Base, rows and collator of a run.

    Raises:
        FileNotFoundError: there is no such base or data folder.
        ValueError: a surface that the base does not know or that has no target, a budget that divides nothing, an
            outcome of another polarity than the base's, LoRA without a surface or together with an unfrozen item
            encoder, or a base that is damaged.
    """
    if args.lora:
        if args.surface is None:
            raise ValueError("--lora writes an adapter of one surface: name it by --surface, or leave out --lora")
        check_adapter_name(args.surface)
    if args.lora and args.unfreeze_item_encoder:
        raise ValueError("--lora leaves the item encoder alone: leave out --unfreeze_item_encoder, or --lora")
    if args.lora and args.lora_rank < 1:
        raise ValueError(f"lora_rank={args.lora_rank} must be at least 1")
    if data_args.target != "next":
        raise ValueError(
            f"target={data_args.target!r}: finetuning predicts all targets of a feed view; leave --target out"
        )
    metadata = read_metadata(data_args.data)
    base = find_folder(args.model, args.revision)
    model, tokenizer = load_pretrained(base)
    check_polarity(tokenizer, metadata, args.model)
    where = "any surface" if args.surface is None else f"surface {args.surface!r}"
    if args.surface not in (None, *tokenizer.surfaces):
        raise ValueError(
            f"{args.model} does not know {where}, only {tokenizer.surfaces}: let model and tokenizer add_surfaces"
            f"([{args.surface!r}]), save both into one folder and finetune that"
        )
    dataset = ViewDataset(encode_views(data_args.data, tokenizer, args.surface))
    if not len(dataset):
        raise ValueError(
            f"{data_args.data} has no target on {where}: no positive event of an item that is new to its user"
        )
    if args.impression_negatives and not dataset.num_hard_negatives:
        logger.warning(
            f"{data_args.data} has no ignored impression beside a target on {where}: no impression negatives"
        )
    counts = dataset.target_counts(tokenizer.positive_mask, len(tokenizer.catalogue))
    first, last = dataset.time_range()
    half_life = data_args.recency_half_life_days
    collator = FinetuningCollator(
        tokenizer,
        frequencies=counts / counts.sum(),
        seed=training_args.seed,
        uniform_negatives=16 if data_args.uniform_negatives is None else data_args.uniform_negatives,
        drawn_from=model.config.num_items,
        full_softmax=model.config.softmax == "full",
        condition_dropout=data_args.condition_dropout,
        time_dropout=data_args.time_dropout,
        recency_half_life=None if half_life is None else half_life * DAY,
        first_time=first,
        last_time=last,
        impression_negatives=args.impression_negatives,
    )
    shares = default_budgets(metadata).get(args.surface, {}) if args.surface else {}
    budget = {o: share for o, share in shares.items() if o in tokenizer.outcomes} or None
    if args.outcome_budget is not None:
        budget = read_json("outcome_budget", args.outcome_budget)
    if budget is not None:
        check_budget(budget, model.config)
    fingerprint = base_fingerprint(model)
    set_seed(training_args.seed)
    adapted = adapt(model, args)
    if training_args.learning_rate is None:
        training_args.learning_rate = LEARNING_RATE[args.lora]
    training_args.fill_epochs(EPOCHS)
    return Finetuning(tokenizer, adapted, dataset, collator, base, fingerprint, budget)


def adapt(model: PinRecModel, args: FinetuningArguments) -> PinRecModel | PeftModel:
    """The base with what is trained unfrozen: LoRA of backbone and head, or all but the item encoder."""
    if not args.unfreeze_item_encoder:
        model.item_encoder.requires_grad_(False)
        # its embeddings are the index's: none is trained to be found without its id
        model.item_encoder.id_dropout = 0.0
    if not args.lora:
        return model
    lora = LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=ADAPTED, task_type="FEATURE_EXTRACTION"
    )
    return get_peft_model(model, lora)


def validation_requests(data_args: DataArguments, args: FinetuningArguments, tokenizer: PinRecTokenizer) -> Requests:
    """The surface's requests of the validation split."""
    users = data_args.validation_users
    return load_requests(
        data_args.data, "validation", tokenizer.catalogue, surface=args.surface, max_users=users, seed=0
    )


def train(
    run: Finetuning,
    requests: Requests | None,
    data_args: DataArguments,
    training_args: FinetuningTrainingArguments,
    resume_from: str | None = None,
) -> PinRecTrainer:
    """Trains `run.model`; returns the trainer with the best weights in `trainer.model`."""
    patience = training_args.early_stopping_patience
    validate = None
    if requests is not None:
        validate = recall_on(requests, run.tokenizer, hide_time=data_args.time_dropout >= 1)
    trainer = PinRecTrainer(
        model=run.model,
        args=training_args,
        train_dataset=run.dataset,
        eval_dataset=None if requests is None else requests.requests,
        data_collator=run.collator,
        validate=validate,
        callbacks=[EarlyStopping(patience)] if patience is not None else None,
    )
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


def main() -> None:
    data_args, args, training_args = parse_arguments(DataArguments, FinetuningArguments, FinetuningTrainingArguments)
    folder = RunFolder(training_args.output_dir, training_args.resume)
    training_args.output_dir = str(folder.checkpoints)
    run = prepare_finetuning(data_args, args, training_args)
    requests = None
    if training_args.eval_strategy != "no":
        requests = validation_requests(data_args, args, run.tokenizer)
    with folder.locked():
        checkpoint = newest_checkpoint(folder.checkpoints)
        trainer = train(run, requests, data_args, training_args, resume_from=checkpoint)
        model = trainer.finished_model(lambda: adapt(load_pretrained(run.base)[0], args))
        if model is not None:
            with folder.publish() as output:
                save(model, trainer, run, args, data_args.data, output)
                write_training_record(
                    output,
                    "training/finetune.py",
                    sys.argv[1:],
                    processes=training_args.world_size,
                    resumed=checkpoint is not None,
                )
            used = f"recommend --model {args.model} --adapter {args.surface}=" if args.lora else "index --model "
            print(f"wrote {folder.output}; next: pinrec {used}{folder.output}")


def save(
    model: Any, trainer: PinRecTrainer, run: Finetuning, args: FinetuningArguments, data: str | Path, output: Path
) -> None:
    """The adapter, or the whole model as `training/pretrain.py` leaves one; and the run's log."""
    if args.lora:
        name, revision = named_revision(args.model, args.revision)
        save_surface_adapter(
            model,
            output,
            surface=args.surface,
            outcome_budget=run.outcome_budget,
            base_model=name,
            revision=revision,
            fingerprint=run.base_fingerprint,
        )
    else:
        if args.surface is not None and run.outcome_budget:
            model.config.outcome_budgets = {**model.config.outcome_budgets, args.surface: run.outcome_budget}
        model.config.embedding_norm = None  # the base's; without validation it is not known
        if trainer.eval_dataset is not None:
            record_embedding_norm(model, run.tokenizer, cast(Sequence, trainer.eval_dataset))
        save_model(model, run.tokenizer, output)
        if (run.base / "items.parquet").is_file():
            shutil.copyfile(run.base / "items.parquet", output / "items.parquet")
    shutil.copyfile(Path(data) / "metadata.json", output / "data.json")
    trainer.state.save_to_json(str(output / "trainer_state.json"))


if __name__ == "__main__":
    run_main(main)
