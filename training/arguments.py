"""What `training/pretrain.py` can be told, on the command line or in one YAML file."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class DataArguments:
    """Where the rows come from and what becomes a target."""

    data: str = field(metadata={"help": "Folder that `pinrec prepare` wrote."})
    uniform_negatives: int = field(default=16, metadata={"help": "Uniform negatives that each row adds to the pool."})
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


@dataclass
class ModelArguments:
    """The model's size and its config fields; see `PinRecConfig`."""

    architecture: str = field(default="pinrec", metadata={"help": "pinrec, or a baseline: two_tower, sasrec."})
    preset: str = field(default="small", metadata={"help": "tiny, small or base."})
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
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows a step and device."})
    num_train_epochs: float = field(default=5, metadata={"help": "Passes over the training rows."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When recall on validation is measured."})
    save_strategy: str = field(default="epoch", metadata={"help": "When a checkpoint is written."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept besides the best."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best checkpoint by the metric."})
    metric_for_best_model: str | None = field(default="eval_recall@10", metadata={"help": "What best means."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether more of it is better."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without a better metric after which training ends."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the newest complete checkpoint."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept off: the collator needs every column."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Trackers, e.g. wandb, tensorboard."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two logged losses."})
    seed: int = field(default=0, metadata={"help": "Of weights, order, masks and negatives."})
