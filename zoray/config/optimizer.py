"""The section `optimizer`: what the coordinator makes of a step's projected gradients."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from typing_extensions import Self

from zoray.config.sections import Section, fault, key


class OptimizerConfig(Section):
    """From projected gradients to an update. All of it happens in the coordinator, before the commit."""

    shaping: Literal["none", "centered", "sign", "zscore", "rank", "guided"] = key(
        "none",
        "What a projected gradient counts for: itself (`none`), itself less the step's mean (`centered`, which rids "
        "one-sided probes of their bias), its sign, its z-score or its centred rank among the "
        "step's (evolution strategies), or, with `guided`, only the best and the worst quarter of the directions do.",
        mathematics=True,
    )
    normalize: Literal["none", "loss_deviation", "second_moment", "curvature"] = key(
        "curvature",
        "What projected gradients are divided by, so that one learning rate serves losses of any scale: the curvature "
        "of the loss, which one evaluation more per step measures (`curvature`; the learning rate is then a number "
        "below 1, for any model, and with two rows a direction or more adapts to the noise of the batches; wants an "
        "`epsilon` of 1e-3 or more), their standard deviation in the step "
        "(`loss_deviation`, as in FZOO), or the root of a running mean of their squares (`second_moment`, as in "
        "MEAZO). With `none`, as in MeZO, the learning rate is that of plain SGD: try 1e-6.",
        mathematics=True,
    )
    beta2: float = key(0.9, "Decay of the running means.", mathematics=True, ge=0, lt=1)
    momentum: float = key(
        0.0,
        "Heavy-ball momentum, as in `torch.optim.SGD`: commits then have the directions of earlier steps as well. "
        "Steps add up: multiply the learning rate by 1 - momentum.",
        mathematics=True,
        ge=0,
        lt=1,
    )
    nesterov: bool = key(False, "Nesterov's momentum.", mathematics=True)
    momentum_window: int | None = key(
        None,
        "Steps the momentum reaches back. Without it, those that weigh at least 5 % of the newest.",
        mathematics=True,
        ge=1,
    )
    max_directions: int | None = key(
        None,
        "With it the number of directions is adaptive: from `directions` to this, doubled where the microbatches of a "
        "direction, or the halves of its one batch, disagree and halved where they agree.",
        mathematics=True,
        ge=1,
    )

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.nesterov and not self.momentum:
            raise fault("optimizer.nesterov", "Nesterov's momentum has no momentum.", "Give optimizer.momentum.")
        if self.momentum_window is not None and not self.momentum:
            raise fault("optimizer.momentum_window", "A window without momentum.", "Give optimizer.momentum.")
        if self.normalize != "none" and self.shaping not in ("none", "centered", "guided"):
            raise fault(
                "optimizer.normalize",
                f"The weights of shaping {self.shaping} have no scale that could be normalised.",
                "Set optimizer.normalize to none, or leave optimizer.shaping out.",
            )
        return self
