"""`PinRecTrainer`: transformers' Trainer with recall as its evaluation and checkpoints that are whole or absent."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pinrec_hf.data.windows import LengthGroupedSampler
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.training.arguments import PinRecTrainingArguments
from pinrec_hf.training.table_adam import TableAdamW, clip_gradients, make_large_tables_sparse

COMPLETE = "complete"
"""Name of the empty file that is written last into a checkpoint: without it, a kill came in between."""


def newest_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint below `output_dir`, or `None`.

    The Trainer itself resumes from a checkpoint without optimizer or random state, silently and to other weights.
    """
    complete = [path.parent for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[-1]))) if complete else None


class Deadline(TrainerCallback):
    """Ends training after so many minutes; the learning rate follows the clock there: warm-up, then a cosine.

    Machines differ, so that two runs of equal length end in different weights.

    Args:
        clock: gives seconds. PinRecTrainer takes the wall's, or where one thread of a CPU trains, the time which that
            got: what an otherwise idle core would need.
    """

    def __init__(self, minutes: float, warmup: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.warmup, self.clock, self.start = minutes * 60, warmup, clock, clock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or self.share >= 1

    @property
    def share(self) -> float:
        """Of the time, that is over."""
        return min(1.0, (self.clock() - self.start) / self.seconds)

    def learning_rate(self, step: int) -> float:
        """As a share of the peak."""
        return min(1.0, self.share / self.warmup) * (1 + math.cos(math.pi * self.share)) / 2


class EarlyStopping(EarlyStoppingCallback):
    """A run that had stopped when it was killed, before its model was saved, stops at its first step when it goes on.

    The Trainer forgets that it was to stop; the model is the best checkpoint's either way.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


class Epochs(TrainerCallback):
    """Tells rows and sampler the epoch.

    Of the two, accelerate tells one alone where it wraps the batch sampler: on several processes, or in a run that goes
    on within an epoch.
    """

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for part in self.parts:
            part.set_epoch(int(state.epoch or 0))


class PinRecTrainer(Trainer):
    """
    Args:
        validate (`Callable[[PinRecModel], dict[str, float]]`, *optional*): metrics of the model on validation
            requests, e.g. `{"recall@10": 0.1}`.
    """

    args: PinRecTrainingArguments

    def __init__(
        self, *args: Any, validate: Callable[[PinRecModel], dict[str, float]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.validate = validate
        self.deadline = None
        if self.args.max_minutes is not None and self.args.world_size > 1:
            raise ValueError("--max_minutes is for one process: several clocks would part; give --num_train_epochs")
        if self.args.max_minutes is not None:
            one_core = self.args.device.type == "cpu" and torch.get_num_threads() == 1
            clock = time.process_time if one_core else time.monotonic
            self.deadline = Deadline(self.args.max_minutes, warmup=0.05, clock=clock)
            self.add_callback(self.deadline)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        trained: Any = self.model if model is None else model
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
        # processes exchange whole gradients
        if kind is torch.optim.AdamW and self.args.world_size == 1 and make_large_tables_sparse(trained):
            if self.args.fp16:  # the fused kernel skips a step that overflowed by itself, the rows of tables would not
                options["fused"] = False
            self.optimizer_cls_and_kwargs = TableAdamW, options
        return super().create_optimizer(model)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:
            # validation encodes the catalogue: outside of `forward`, where nobody gathers the weights
            shared: Any = self.model
            register_fsdp_forward_method(shared, "get_item_features")
        return prepared

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        sparse = any(p.grad is not None and p.grad.is_sparse for p in model.parameters())
        return clip_gradients(model.parameters(), self.args.max_grad_norm) if sparse else super()._clip_grad_norm(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.deadline is None:
            return super().create_scheduler(num_training_steps, optimizer)
        chosen: Any = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, self.deadline.learning_rate)
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        # the batch of all processes and accumulated steps, so that how they share it does not change what is in it
        whole = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        sampler = LengthGroupedSampler(dataset.lengths, whole, self.args.seed)
        self.add_callback(Epochs(dataset, sampler))
        return sampler

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices of linear layers decay; embeddings, norms, biases and the temperature do not."""
        return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Recall on the validation requests, instead of the loss: what the model is for."""
        if self.validate is None:
            return {}
        start = time.time()
        model = self.accelerator.unwrap_model(self.model)
        with torch.random.fork_rng(devices=[]):
            # so that a run evaluated more often still ends in the same weights
            metrics = self.validate(model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.time() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def finished_model(self, make: Callable[[], nn.Module]) -> Any:
        """The trained model with all of its weights; `None` in other processes than the first.

        Every process has to call it: where they share the model (FSDP), each gives its part.

        Args:
            make: an untrained model of the same shape, for the weights of a shared one.
        """
        shared = self.is_fsdp_enabled
        weights = self.accelerator.get_state_dict(self.model) if shared else None
        if not self.is_world_process_zero():
            return None
        if weights is None:
            return self.accelerator.unwrap_model(self.model)
        model = make()
        model.load_state_dict(weights)
        return model

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Of labels that compete (`label_groups`) one counts."""
        counted = [
            {**batch, "labels": one_a_group(batch["labels"], batch["label_groups"])}
            if "label_groups" in batch
            else batch
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # old ones go when the new one is complete, and are incomplete before their first file is gone
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and folder.is_dir():
            (folder / COMPLETE).touch()
            self._rotate(folder)

    def _rotate(self, newest: Path) -> None:
        """Removes the oldest checkpoints, as transformers does, the newest and the best apart."""
        kept = {newest.name, Path(self.state.best_model_checkpoint or newest).name}
        others = [path for path in newest.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name not in kept]
        others.sort(key=lambda path: int(path.name.split("-")[-1]))
        room = max(0, self.args.save_total_limit - len(kept)) if self.args.save_total_limit else len(others)
        for path in others[: max(0, len(others) - room)]:
            (path / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(path)


def one_a_group(labels: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Labels `(batch, targets)`, -100 but for the first of each row's group."""
    places = torch.arange(labels.shape[1], device=labels.device).where(labels >= 0, labels.shape[1])
    first = torch.full_like(groups, labels.shape[1]).scatter_reduce(1, groups, places, "amin")
    return labels.masked_fill(first.gather(1, groups) != places, -100)
