"""The configuration of a run: its keys and what must hold between them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator, model_validator
from typing_extensions import Self

from zoray import schedule
from zoray.commits import MOST_RUNS
from zoray.config.estimator import DIFFERENTIATING, EstimatorName, check_estimator
from zoray.config.objective import OBJECTIVE, check_objective
from zoray.config.optimizer import OptimizerConfig
from zoray.config.sections import (
    DirectionConfig,
    MemoryConfig,
    ReplicaRange,
    ResidentMemory,
    Section,
    Zero3Memory,
    fault,
    key,
)
from zoray.config.tasks import TaskConfig
from zoray.config.trainable import Trainable, TrainableBlocks, TrainableLora, TrainablePrefix, checked
from zoray.config.worded import GenerationTask, WordedTask
from zoray.optim import Optimizer, Width
from zoray.schedule import POLYNOMIAL_END
from zoray.stores import has_keys, shown

EXACT_SUM_LIMIT = 2**24
"""Sums of integers below this are exact in float32, whatever the order of summation."""


TrackerName = Literal["tensorboard", "mlflow", "wandb"]
"""An experiment tracker, by the name it has in Hugging Face's `report_to`."""


def _report_tag(value: Any) -> str:
    return "list" if isinstance(value, list) else "name"


def _replicas_tag(value: Any) -> str:
    return "mapping" if isinstance(value, dict | BaseModel) else "number"


class RunConfig(Section):
    """One run."""

    model: str = key(
        ...,
        "Model to start from: a folder, a name on the Hugging Face hub, or a folder of an object store "
        "(`s3://bucket/folder`, `gs://...`), which each machine downloads once into its cache (`ZORAY_CACHE`).",
        mathematics="content",
        min_length=1,
    )
    dtype: Literal["float32", "bfloat16", "float16"] = key(
        "float32",
        "Data type of the weights. The two short ones are updated with stochastic rounding.",
        mathematics=True,
    )
    trust_remote_code: bool = key(False, "Run Python code that comes with the model.", mathematics=False)
    attn_implementation: str | None = key(
        None, "Attention of `transformers`: `eager`, `sdpa`, .... Without it, its own choice.", mathematics=True
    )
    trainable: Trainable = key(
        "full",
        "What is trained: `full`; a regular expression searched for in the names of the parameters; `bias_and_norm`, "
        "all biases and norms (BitFit), and a new classification head; or a mapping, one of `{lora: {r: 8, ...}}`, "
        "`{prefix: {num_virtual_tokens: 5}}`, `{sparse: {sparsity: 0.75}}` and `{blocks: {count: 4, steps: 1}}`.",
        mathematics=True,
    )
    task: TaskConfig = key(..., "What is learnt, and from which data.", mathematics=True)
    objective: str = key(
        "loss",
        "What the probes minimise: the task's `loss`; 1 - `accuracy`, or 1 - `f1` of generated text; or the negative "
        "of `package.module:function`, a Python function that every machine can import (see docs/mezo.md).",
        mathematics=True,
        pattern=OBJECTIVE,
    )
    seed: int = key(
        0,
        "Run seed: fixes the directions, the order of the data and new weights.",
        mathematics=True,
        ge=0,
        le=2**63 - 1,
    )
    max_steps: int = key(
        ..., "Steps of the run. They cannot be changed later where the learning-rate schedule depends on them, as "
        "`linear` does.",
        mathematics=True, ge=1,
    )  # fmt: skip
    directions: int = key(16, "Directions probed per step, whatever the number of replicas.", mathematics=True, ge=1)
    microbatches: int = key(1, "Batches each direction is probed on.", mathematics=True, ge=1, le=2**31 - 1)
    directions_per_batch: int = key(
        1,
        "Neighbouring directions of a step that are probed on the same batch, one after another; 1: each has its own.",
        mathematics=True,
        ge=1,
    )
    per_direction_batch_size: int = key(4, "Examples in the batch of one probe.", mathematics=True, ge=1)
    learning_rate: float = key(
        0.1,
        "Learning rate, before the schedule; what it means is said by `optimizer.normalize`.",
        mathematics=True,
        ge=0,
    )
    lr_scheduler_type: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
    ] = key(
        "linear", "Learning-rate schedule, as in `transformers`: `linear` falls to 0 at `max_steps`.", mathematics=True
    )
    warmup_steps: int = key(0, "Steps of linear warm-up.", mathematics=True, ge=0)
    warmup_ratio: float = key(0.0, "The same as a share of `max_steps`.", mathematics=True, ge=0, le=1)
    weight_decay: float = key(
        0.0,
        "Decoupled weight decay: a step multiplies the weights by 1 - learning rate * this. With the default "
        "learning rate of 0.1, 1e-4 takes 1 % in 1,000 steps.",
        mathematics=True,
        ge=0,
    )
    max_projected_gradient: float | None = key(
        None, "Projected gradients are clipped to ± this.", mathematics=True, gt=0
    )
    optimizer: OptimizerConfig = key(
        OptimizerConfig(), "What is made of a step's projected gradients.", mathematics=True
    )
    estimator: EstimatorName = key(
        "spsa",
        "How a probe finds the slope along its direction. `spsa`: from the losses on both sides of the weights. "
        "`one_sided`: from the loss on one side and that at the weights, which the directions on one batch share "
        "(`directions_per_batch`, d): K + K/d forwards in place of 2 K. `forward_gradient`: exactly, by forward-mode "
        "differentiation. `backprop`: exactly, from the gradient, for replicas with memory to spare.",
        mathematics=True,
    )
    epsilon: float = key(
        1e-3,
        "Distance of the evaluations of a probe from the weights; estimators that differentiate have none. In half "
        "precision 1e-3 leaves the rounding of the forward in what is estimated; try 3e-3, with `zoray tune`.",
        mathematics=True, gt=0,
    )  # fmt: skip
    direction: DirectionConfig = key(DirectionConfig(), "How directions are drawn.", mathematics=True)
    signs: Literal["auto", "batched", "sequential"] = key(
        "auto",
        "Both signs of a probe in one forward (`batched`) or in two (`sequential`). `auto` is batched where the proof "
        "at the start of the run holds.",
        mathematics=True,
    )
    split_signs: bool = key(
        False,
        "The two forwards of a probe are handed out one by one, so that two replicas can share it: twice as many "
        "pieces of half the length, for steps of few probes. Needs `signs: sequential`, whose result it gives.",
        mathematics=False,
    )
    head: Literal["auto", "chunked", "full"] = key(
        "auto",
        "Language-model head and cross entropy in pieces that stay in cache (`chunked`) or at once (`full`). `auto` is "
        "chunked where the model allows.",
        mathematics=True,
    )
    replicas: Annotated[
        Annotated[int, Tag("number"), Field(ge=1)] | Annotated[ReplicaRange, Tag("mapping")],
        Discriminator(_replicas_tag),
    ] = key(
        2,
        "Copies of the model that work on the run: a number, or `{min: 1, max: 64}` for as many as the cluster offers. "
        "`zoray scale` changes it while the run goes on.",
        mathematics=False,
    )
    threads_per_replica: int = key(
        1,
        "Processor threads of a replica. Another number changes the last bits of the losses, as another machine would.",
        mathematics=False,
        ge=1,
    )
    gpus_per_replica: float = key(0.0, "Accelerators of a replica; 0 means processors only.", mathematics=False, ge=0)
    memory: MemoryConfig = key(ResidentMemory(), "Where a replica keeps its weights.", mathematics=False)
    eval_steps: int | None = key(
        None, "Evaluate every so many steps. Without it, at the start and the end.", mathematics=False, ge=1
    )
    eval_on_start: bool = key(True, "Evaluate before the first step, where there are held-out data.", mathematics=False)
    per_device_eval_batch_size: int = key(32, "Examples in one batch of an evaluation.", mathematics=False, ge=1)
    max_eval_samples: int | None = key(
        None, "Evaluate on the first so many held-out examples. Without it, on all.", mathematics=False, ge=1
    )
    save_steps: int | None = key(
        None,
        "Save a snapshot every so many steps. Without it, when replaying the commits since the last one would take "
        "seconds: new replicas start from the newest.",
        mathematics=False,
        ge=1,
    )
    save_total_limit: int | None = key(
        None,
        "Keep the newest so many snapshots. Without it, all where `save_steps` is given, else two.",
        mathematics=False,
        ge=1,
    )
    snapshot_dir: str | None = key(
        None,
        "Folder, or `s3://bucket/folder` or `gs://...` on an object store, that the run's snapshots are kept in under "
        "the run's name; a relative one is taken from `output_dir`. Without it, they are in the run's folder.",
        mathematics=False,
        min_length=1,
    )
    digest_every: int | None = key(
        None,
        "Compare the replicas' weights every so many steps. Without it, as often as costs at most 1 % of the time.",
        mathematics=False,
        ge=1,
    )
    start_timeout: float = key(
        120.0,
        "Seconds to wait for machines with room for the first replicas, on a cluster that may grow.",
        mathematics=False,
        ge=0,
    )
    max_skipped_steps: int = key(5, "Stop after so many steps in a row without a finite loss.", mathematics=False, ge=1)
    output_dir: str = key("runs", "Folder in which the run's folder is made.", mathematics=False, min_length=1)
    run_name: str | None = key(
        None,
        "Name of the run and of its folder. Without it, one is made from the name of the file.",
        mathematics=False,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
    )
    metrics_port: int = key(
        0, "Port of `/metrics` and `/health`; 0 is any free one.", mathematics=False, ge=0, le=65535
    )
    logging_steps: int = key(
        10,
        "Print a line every so many steps where there is no terminal, and tell the trackers of `report_to`.",
        mathematics=False,
        ge=1,
    )
    report_to: Annotated[
        Annotated[Literal["none", "all", "tensorboard", "mlflow", "wandb"], Tag("name")]
        | Annotated[list[TrackerName], Tag("list")],
        Discriminator(_report_tag),
    ] = key(
        "none",
        "Experiment trackers that are told losses, speed and faults: one, or a list of them; `all` means all that are "
        "installed, `none` none. TensorBoard's files are in `tensorboard/` of the run's folder.",
        mathematics=False,
    )

    @property
    def proved_signs(self) -> Literal["auto", "batched", "sequential"]:
        """What is to be proved of `signs`: only two-sided probes have two, which one forward may have."""
        return "sequential" if self.estimator != "spsa" or self.signs_apart else self.signs

    @property
    def replica_limits(self) -> tuple[int, int | None, int]:
        """Fewest replicas, most (None: no limit), and how many to begin with."""
        if isinstance(self.replicas, ReplicaRange):
            return self.replicas.min, self.replicas.max, self.replicas.max
        return 1, None, self.replicas

    @property
    def shards(self) -> int:
        """Processes that hold one replica together."""
        return self.memory.shards if isinstance(self.memory, Zero3Memory) else 1

    @property
    def needs(self) -> dict[str, float]:
        """Processors and accelerators of one replica, all of its processes together."""
        return {"CPU": float(self.threads_per_replica * self.shards), "GPU": self.gpus_per_replica * self.shards}

    @property
    def most_directions(self) -> int:
        """Directions of a step, at most."""
        return self.optimizer.max_directions or self.directions

    def batches_of(self, directions: int) -> int:
        """How many batches so many directions of a step are probed on, for each of its microbatches."""
        return -(-directions // self.directions_per_batch)

    @property
    def update_rule(self) -> Optimizer:
        """The optimizer that `optimizer` describes."""
        most, section = self.optimizer.max_directions, self.optimizer
        return Optimizer(
            shaping=section.shaping,
            normalize=section.normalize,
            beta2=section.beta2,
            momentum=section.momentum,
            nesterov=section.nesterov,
            momentum_window=section.momentum_window,
            width=None if most is None else Width(self.directions, most),
        )

    def rate_at(self, step: int, learning_rate: float | None = None) -> float:
        """Learning rate of a step, with another `learning_rate` than the run's if one is given."""
        return schedule.learning_rate(
            step,
            learning_rate=self.learning_rate if learning_rate is None else learning_rate,
            max_steps=self.max_steps,
            lr_scheduler_type=self.lr_scheduler_type,
            warmup_steps=self.warmup_steps,
            warmup_ratio=self.warmup_ratio,
        )

    @property
    def snapshots_kept(self) -> int | None:
        """How many snapshots are kept; None: all."""
        return self.save_total_limit if self.save_total_limit or self.save_steps else 2

    @property
    def differentiable(self) -> bool:
        """Whether what the probes minimise has a gradient that backpropagation could find."""
        return self.objective == "loss"

    @property
    def signs_apart(self) -> bool:
        """Whether the objective takes the two signs of a probe in two forwards, whatever the model allows."""
        return not self.differentiable and (":" in self.objective or isinstance(self.task, GenerationTask))

    @property
    def evaluated_in_run(self) -> bool:
        """Whether there are held-out data for the evaluations of the run itself."""
        return self.task.eval is not None or (isinstance(self.task, WordedTask) and self.task.dev_samples is not None)

    @field_validator("trainable")
    @classmethod
    def _trainable_is_known(cls, value: Trainable) -> Trainable:
        return checked(value, "trainable") if isinstance(value, str) else value

    @model_validator(mode="after")
    def _what_begins_as_activations_is_whole(self) -> Self:
        if isinstance(self.trainable, TrainablePrefix) and isinstance(self.memory, Zero3Memory):
            raise fault(
                "trainable.prefix",
                "Prefixes begin as what the model makes of real tokens, which a sharded one cannot while it is loaded.",
                "Set memory.kind to resident or streamed, or train with lora.",
            )
        lora = self.trainable.lora if isinstance(self.trainable, TrainableLora) else None
        if lora and lora.init_lora_weights == "activations" and isinstance(self.memory, Zero3Memory):
            raise fault(
                "trainable.lora.init_lora_weights",
                "Adapters begin as inputs of the model, which a sharded one cannot find while it is loaded.",
                "Set memory.kind to resident or streamed, or leave init_lora_weights out.",
            )
        return self

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.warmup_steps and self.warmup_ratio:
            raise fault(
                "warmup_ratio",
                f"warmup_steps ({self.warmup_steps}) and warmup_ratio ({self.warmup_ratio}) are both given.",
                "Give one of them.",
            )
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise fault(
                "warmup_steps" if self.warmup_steps else "warmup_ratio",
                "The constant schedule has no warm-up.",
                "Set lr_scheduler_type to constant_with_warmup, or leave the warm-up out.",
            )
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise fault(
                "learning_rate",
                f"The polynomial schedule ends at {POLYNOMIAL_END}, which is not below {self.learning_rate}.",
                "Set lr_scheduler_type to linear, which ends at 0.",
            )
        decay = 1 - self.learning_rate * self.weight_decay
        if decay <= 0:
            raise fault(
                "weight_decay",
                f"1 - learning_rate * weight_decay is {decay:g}, which is not positive.",
                "Lower weight_decay or learning_rate.",
            )
        if self.split_signs and self.signs != "sequential":
            raise fault(
                "split_signs",
                f"Signs can be split between replicas only if they take two forwards, and signs is {self.signs}.",
                "Set signs to sequential, or leave split_signs out.",
            )
        if self.eval_steps is not None and not self.evaluated_in_run:
            raise fault("eval_steps", "eval_steps is given, but task.eval is not.", "Name held-out data in task.eval.")
        return self

    @model_validator(mode="after")
    def _estimator_has_what_it_needs(self) -> Self:
        check_estimator(self)
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> Self:
        shards = self.shards > 1
        generates = self.evaluated_in_run or not self.differentiable
        check_objective(self.objective, self.task, signs=self.signs, head=self.head, sharded=shards and generates)
        return self

    @model_validator(mode="after")
    def _each_shard_has_a_device(self) -> Self:
        if self.shards > 1 and self.gpus_per_replica not in (0, 1):
            raise fault(
                "gpus_per_replica",
                f"Each of the {self.shards} processes of a sharded replica computes on one accelerator, and "
                f"gpus_per_replica is {self.gpus_per_replica:g}.",
                "Set gpus_per_replica to 1, or to 0 to compute on processors.",
            )
        return self

    @model_validator(mode="after")
    def _addresses_have_no_keys(self) -> Self:
        places = {"model": self.model, "task.train": self.task.train, "task.eval": self.task.eval,
                  "snapshot_dir": self.snapshot_dir}  # fmt: skip
        for name, place in places.items():
            if place is not None and has_keys(place):
                raise fault(
                    name,
                    f"The address {shown(place)} has credentials in it, which config.yaml and logs would show.",
                    "Leave them out: they come from the environment (AWS_ACCESS_KEY_ID, ...), ~/.aws or a role.",
                )
        return self

    @model_validator(mode="after")
    def _optimizer_has_what_it_needs(self) -> Self:
        most = self.optimizer.max_directions
        if most is not None and most < self.directions:
            raise fault(
                "optimizer.max_directions",
                f"From {self.directions} to {most} directions.",
                "Set optimizer.max_directions to directions or more.",
            )
        halved = self.per_direction_batch_size > 1 and self.estimator not in DIFFERENTIATING
        if most is not None and self.microbatches == 1 and not halved:
            raise fault(
                "optimizer.max_directions",
                "The number of directions follows from how much the microbatches of a direction disagree, or the "
                f"halves of its one batch, and there is one of {self.per_direction_batch_size} rows, with estimator "
                f"{self.estimator}.",
                "Set microbatches to 2 or more.",
            )
        if self.optimizer.normalize == "curvature" and not self.differentiable:
            raise fault(
                "optimizer.normalize",
                f"The curvature is measured of the loss alone, and the objective is {self.objective}.",
                "Set optimizer.normalize to second_moment, loss_deviation or none, and learning_rate to suit it.",
            )
        if self.optimizer.normalize == "curvature" and isinstance(self.trainable, TrainableBlocks):
            raise fault(
                "optimizer.normalize",
                "Blocks that take turns have a curvature each, and one running mean is kept.",
                "Set optimizer.normalize to second_moment or none, and learning_rate to suit it; or "
                "train without turns.",
            )
        if self.optimizer.normalize == "curvature" and self.estimator not in ("spsa", "one_sided"):
            raise fault(
                "optimizer.normalize",
                f"The curvature is found from losses beside the weights, and estimator {self.estimator} has none.",
                "Set estimator to spsa or one_sided; or optimizer.normalize to second_moment or none, and "
                "learning_rate to suit it.",
            )
        compared = self.optimizer.normalize == "loss_deviation" or self.optimizer.shaping in (
            "centered",
            "zscore",
            "rank",
            "guided",
        )
        if compared and self.directions < 2:
            raise fault(
                "directions",
                "This optimizer compares the directions of a step with each other, and there is one.",
                "Set directions to 2 or more, or take optimizer: {normalize: second_moment}.",
            )
        if self.optimizer.normalize != "curvature" and "learning_rate" not in self.model_fields_set:
            raise fault(
                "learning_rate",
                f"With optimizer.normalize {self.optimizer.normalize} the best learning rate depends on the model, and "
                "none is given.",
                "Give one; `zoray tune` finds one. MeZO's for plain SGD are 1e-7 to 1e-6, constant.",
            )
        return self

    @model_validator(mode="after")
    def _updates_are_exact(self) -> Self:
        window = self.update_rule.window
        terms = self.most_directions * window
        most = 127 * terms * self.direction.rank
        if self.direction.kind != "gaussian" and most >= EXACT_SUM_LIMIT:
            steps = f" of {window} steps" if window > 1 else ""
            raise fault(
                "directions",
                f"127 * {terms} directions{steps} * rank {self.direction.rank} = {most} is not below 2**24, so the "
                "update would not be exact in float32.",
                f"Use at most {(EXACT_SUM_LIMIT - 1) // (127 * self.direction.rank * window)} directions, or more "
                "microbatches.",
            )
        if window > MOST_RUNS:
            raise fault(
                "optimizer.momentum",
                f"The momentum reaches back {window} steps, and a commit has room for {MOST_RUNS}.",
                f"Set optimizer.momentum_window to {MOST_RUNS} or less.",
            )
        return self
