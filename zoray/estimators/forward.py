"""The directional derivative <grad L, z>, exactly, by forward-mode differentiation (ZO-Bench's "forward gradient").

One forward carries every tensor's derivative along z beside its value (Baydin et al. 2022, "Gradients without
backpropagation"; Zhang et al. 2024, ZO-Bench, arXiv 2402.11592). There is no epsilon, and nothing is kept for a way
back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoray.aggregate import ProbeResult
from zoray.commits import float32
from zoray.errors import ModelError
from zoray.estimators.base import Estimator
from zoray.estimators.tangents import tangents
from zoray.loss import Batch
from zoray.perturb import Active, Signs

_ADVICE = "use estimator: spsa, which takes any loss"
_unpack: Any = forward_ad.unpack_dual


class ForwardGradient(Estimator):
    """<grad L, z> from one forward of values and their derivatives."""

    differentiates = True

    def probe(self, step: int, direction: int, batch: Batch, epsilon: float, microbatch: int = 0) -> ProbeResult:
        """The probe; its loss is L(theta), and epsilon has no part in it.

        Raises:
            ModelError: the model has an operation without a derivative of this mode, or the loss has no derivative.
        """
        engine = self.prober.engine
        active = Active(self.prober.directions, step, direction, 1.0, Signs.PLUS, len(batch["labels"]))
        # The other kernels of attention have no rule for this mode.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            try:
                with tangents(engine, active):
                    loss, slope = _unpack(self.prober.mean_loss(batch))
            except RuntimeError as error:
                if not any(words in str(error) for words in ("forward AD", "forward mode AD")):
                    raise
                what = f"The model cannot be differentiated forwards: {str(error).splitlines()[0]}"
                raise ModelError(what, where="estimator", advice=_ADVICE) from error
            if slope is None and not self.prober.directions.coverage.groups:
                raise ModelError("The loss has no derivative by the weights.", where="estimator", advice=_ADVICE)
            # A group may well have nothing that this loss depends on.
            slope = 0.0 if slope is None else float(slope)
            return ProbeResult(step, direction, microbatch, float32(slope), float32(float(loss)))
