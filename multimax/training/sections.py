"""Sections of the configuration of a run: every setting with its type, its range and a sentence."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from multimax.options import Count, NotNegative, Positive, Rate, Section, Whole
from multimax.training.schedules import SCHEDULES

FolderName = Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]
NAME = Field(description="which one; its own settings stand beside it")


class LoggerSection(Section):
    """Where a run reports to beside its own files."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        description="Weights & Biases; auto is online if you are logged in, else offline"
    )


class TaskSection(Section):
    """What is trained."""

    name: str = NAME


class ScaleSection(Section):
    """How large everything is."""

    name: FolderName = Field(description="small: embedded data, a CPU; paper: the paper's recipes")
    topk: Count = Field(description="keys that top-k attention keeps")


class TrainerSection(Section):
    """Length, batches and precision of the training."""

    epochs: Count | None = Field(
        description="length in passes over the data; null: see updates. On the command line, one "
        "of the two is enough, and replaces the other"
    )
    updates: Count | None = Field(description="length in optimizer updates; null: see epochs")
    batch_size: Count = Field(
        description="of one update, over all processes and accumulated batches, in images, blocks "
        "of text, tokens of translation, or drawn examples"
    )
    eval_batch_size: Count = Field(description="of one process in evaluation, in the same unit")
    accumulation: Count = Field(description="batches of a process that make one update")
    precision: Literal["no", "bf16", "fp16"] = Field(
        description='mixed precision; "no" (quoted in YAML) is fp32, fp16 needs a GPU'
    )
    compile: bool = Field(description="torch.compile the model")
    dry_run: bool = Field(
        False,
        description="true: two updates and an evaluation batch with random data of the same shapes "
        "say how long the run takes and how much memory; nothing is written, no data is read",
    )
    clip_norm: Positive | None = Field(
        description="largest gradient norm of weights, and of normalizers; null does not clip"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        description="of averaged weights, which are evaluated too; null keeps no average"
    )
    evaluate_every: Count = Field(
        description="evaluate and save, in epochs, or in updates where these are the length"
    )
    log_every: Count = Field(description="updates between two lines of metrics.jsonl")
    report: Literal["last", "best"] = Field(description="which weights the result is of")
    shard: bool = Field(
        False,
        description="true: FSDP2, each process holds a part of weights, gradients and the state of "
        "the optimizer, for models that outgrow a GPU",
    )
    channels_last: bool = Field(
        False,
        description="true: weights of convolutions in the order that tensor cores read",
    )
    keep: Count | None = Field(
        None,
        description="weights of so many last evaluations stay as update-<update>.pt, for "
        "multimax.training.average; null: none",
    )

    @model_validator(mode="after")
    def _check_layout(self) -> "TrainerSection":
        if self.channels_last and self.shard:
            raise ValueError(
                "trainer.shard=true takes weights in their own order only: "
                "leave trainer.channels_last=false"
            )
        return self


class OptimizerSection(Section):
    """The optimizer of timm with this name, and its options; null is the optimizer's default."""

    name: str = Field(description="as timm.optim.list_optimizers() has it")
    lr: Positive = Field(description="peak learning rate")
    weight_decay: NotNegative = Field(description="decoupled, of parameters of two dimensions")
    eps: Positive | None = Field(None, description="added to the denominator of Adam")
    betas: Annotated[list[Rate], Field(min_length=2, max_length=2)] | None = Field(
        None, description="of the running means of Adam"
    )
    momentum: Rate | None = Field(None, description="of SGD and its like")
    fused: bool | None = Field(
        None,
        description="one kernel for a whole step of adamw, adam or sgd; null: as torch chooses",
    )
    filter_bias_and_bn: bool = Field(
        True, description="false: weight decay on parameters of one dimension too"
    )
    decay_scalars: bool | None = Field(
        None,
        description="weight decay on the normalizers' learned scalars; null: as on other "
        "parameters of one dimension",
    )
    scalars_lr_scale: Positive | None = Field(
        None,
        description="learning rate of the normalizers' learned scalars, by that of the other "
        "parameters; null: the same",
    )


class ScheduleSection(Section):
    """The learning rate over the updates; each schedule needs some of these, and leaves others."""

    name: Literal["cosine", "inverse_sqrt", "cosine_restarts"] = Field(description="of a formula")
    warmup: Whole = Field(
        description="linear rise, in epochs if these are the length of a cosine, else in updates"
    )
    warmup_lr: NotNegative | None = Field(None, description="where the rise begins")
    min_lr: NotNegative | None = Field(None, description="where cosine and cosine_restarts end")
    per_epoch: bool | None = Field(None, description="of cosine: one rate for each epoch")
    period: Count | None = Field(None, description="of cosine_restarts: first period, in updates")
    period_growth: Annotated[float, Field(ge=1)] | None = Field(
        None, description="of cosine_restarts: length of a period by that of the one before"
    )
    shrink: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="of cosine_restarts: rates of a period by those of the one before"
    )

    @model_validator(mode="after")
    def _check_needed(self) -> "ScheduleSection":
        missing = [name for name in SCHEDULES[self.name] if getattr(self, name) is None]
        if missing:
            needed = ", ".join(f"schedule.{name}" for name in missing)
            raise ValueError(f"schedule.name={self.name} needs a value for {needed}")
        return self
