"""What the training scripts can be told, on the command line or in one YAML file."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, TrainingArguments

from pinrec_hf.data.collator import TARGETS

ENDLESS = 1_000_000


@dataclass
class DataArguments:
    """Where the rows come from and what becomes a target."""

    data: str = field(metadata={"help": "Folder that `pinrec prepare` wrote."})
    uniform_negatives: int | None = field(
        default=None,
        metadata={
            "help": "Uniform negatives that each row adds to the pool; none: 1,024 a step, in finetuning 16 a row."
        },
    )
    condition_dropout: float = field(default=0.15, metadata={"help": "Share of targets without a wanted outcome."})
    time_dropout: float = field(default=0.1, metadata={"help": "Share of targets whose request time is hidden."})
    target: str = field(
        default="next", metadata={"help": "next, window or session: which positive events an event predicts."}
    )
    target_window: int = field(default=8, metadata={"help": "Positive events that a window or session looks ahead."})
    recency_half_life_days: float | None = field(
        default=None, metadata={"help": "Age at which a target counts half in the loss; none: all count the same."}
    )
    validation_users: int = field(default=2_000, metadata={"help": "Users on whom recall is measured in training."})

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"--target {self.target!r} is none of {', '.join(TARGETS)}")
        if self.target_window < 1:
            raise ValueError(f"--target_window {self.target_window}: an event predicts at least 1 positive event")
        for name in ("condition_dropout", "time_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)} is a share and must lie between 0 and 1")
        if self.uniform_negatives is not None and self.uniform_negatives < 0:
            raise ValueError(f"--uniform_negatives {self.uniform_negatives} must be 0 or more")
        if self.recency_half_life_days is not None and not self.recency_half_life_days > 0:
            raise ValueError(f"--recency_half_life_days {self.recency_half_life_days} must be above 0; or leave it out")
        if self.validation_users < 1:
            raise ValueError(f"--validation_users {self.validation_users} must be at least 1")


@dataclass
class ModelArguments:
    """The model's size and its config fields, see `PinRecConfig`; or a finished model to go on from."""

    architecture: str = field(default="pinrec", metadata={"help": "pinrec, or a baseline: two_tower, sasrec."})
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub repo of a finished model to start from, instead of a preset."}
    )
    revision: str | None = field(default=None, metadata={"help": "Of that model's repo."})
    recent_days: float | None = field(
        default=None, metadata={"help": "Train on windows with a target in the last days of train; none: on all."}
    )
    replay: float = field(default=0.0, metadata={"help": "With recent_days: share of the older windows kept too."})
    preset: str | None = field(default=None, metadata={"help": "tiny, small or base; none: small."})
    config_overrides: str | None = field(
        default=None, metadata={"help": 'JSON of config fields, e.g. \'{"dropout": 0.2, "softmax": "full"}\'.'}
    )


@dataclass
class PinRecTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the defaults that trained best here."""

    output_dir: str = field(default="pinrec-base", metadata={"help": "Folder of the finished model; must not exist."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or share of steps, of warm-up."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of matrices, not of embeddings, norms and biases."})
    per_device_train_batch_size: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Rows a step and device; none: about 512 events a step."}
    )
    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Passes over the training rows; none: 2,000 steps, but 5 to 20 passes."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When recall on validation is measured."})
    save_strategy: str = field(default="epoch", metadata={"help": "When a checkpoint is written."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept besides the best."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best checkpoint by the metric."})
    metric_for_best_model: str | None = field(default="eval_recall@10", metadata={"help": "What best means."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether more of it is better."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without a better metric after which training ends."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Kept on: a resumed run counts its patience on."}
    )
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Training ends after so many minutes (one thread: of CPU time), its learning rate decayed; however "
            "many epochs that are, unless they are given."
        },
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the newest complete checkpoint."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept off: the collator needs every column."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Trackers, e.g. wandb, tensorboard."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two logged losses."})
    seed: int = field(default=0, metadata={"help": "Of weights, order, masks and negatives."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataloader_persistent_workers:
            raise ValueError(
                "--dataloader_persistent_workers: such workers go on drawing the first epoch's masks and negatives; "
                "leave it out"
            )
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"--max_minutes {self.max_minutes} must be above 0; or leave it out")
        if self.n_gpu > 1:
            raise ValueError(f"{self.n_gpu} GPUs in one process: start with `accelerate launch`, a process each")

    def fill_epochs(self, default: float) -> None:
        """Passes over the rows where nobody said how many: as many as the clock allows, or the default."""
        if self.num_train_epochs is None:
            self.num_train_epochs = default if self.max_minutes is None else ENDLESS


@dataclass
class FinetuningArguments:
    """Which model is finetuned for which surface, and how."""

    model: str = field(default="pinrec-base", metadata={"help": "Folder or Hub repo of the pretrained base."})
    revision: str | None = field(default=None, metadata={"help": "Of the base's repo."})
    surface: str | None = field(default=None, metadata={"help": "Whose feed views are learned; none: all surfaces'."})
    lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of a whole model."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapter's matrices."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter's output is scaled by alpha / rank."})
    unfreeze_item_encoder: bool = field(
        default=False, metadata={"help": "Train the item encoder too: the model then needs an index of its own."}
    )
    impression_negatives: bool = field(
        default=True,
        metadata={
            "help": "Whether what was ignored in a feed view is a hard negative of its targets; under a full softmax "
            "it is a negative like every other item."
        },
    )
    outcome_budget: str | None = field(
        default=None,
        metadata={
            "help": 'JSON of the surface\'s default budget, e.g. \'{"save": 0.7, "click": 0.3}\'; none: its shares.'
        },
    )


@dataclass
class FinetuningTrainingArguments(PinRecTrainingArguments):
    """`PinRecTrainingArguments`, more careful."""

    output_dir: str = field(default="pinrec-finetuned", metadata={"help": "Folder of the result; must not exist."})
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Peak learning rate; none: 5e-4 with --lora, else 2e-4."}
    )
    per_device_train_batch_size: int | None = field(default=32, metadata={"help": "Rows a step and device."})
    num_train_epochs: float | None = field(default=None, metadata={"help": "Passes over the training rows; none: 3."})


def parse_arguments(*classes: type) -> tuple[Any, ...]:
    """The command line, or the one YAML file that it names, as instances of `classes`."""
    parser = HfArgumentParser(classes)  # type: ignore[arg-type]  # a NewType that no class is of
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


def read_json(name: str, text: str) -> dict[str, Any]:
    """An argument that is a JSON object.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            return found
        problem = f"a {type(found).__name__}"
    except json.JSONDecodeError as error:
        problem = str(error)
    raise ValueError(f"--{name} {text!r} is no JSON object ({problem}); quote it for the shell: '{{\"key\": 0.5}}'")


REFUSING = ("pinrec_hf.", "__main__", "transformers.hf_argparser", "huggingface_hub.dataclasses")
"""Modules whose errors tell the user what to change; of others a traceback is due."""


def run_main(main: Callable[[], None]) -> None:
    """A script's `main`; what this package or the argument parser refuses is told in one line, with exit code 2."""
    try:
        main()
    except (ValueError, OSError, StrictDataclassError) as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        raised_in = trace.tb_frame.f_globals["__name__"] if trace is not None else ""
        if not raised_in.startswith(REFUSING):
            raise
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
