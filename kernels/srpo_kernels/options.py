"""The settings of Eq. 6 as one value, which the callers, the torch operators and all backends share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

KlEstimator = Literal["k1", "k2", "k3", "full"]
ClipForm = Literal["ppo", "cispo"]
RatioOver = Literal["token", "step", "sequence"]


@dataclass(frozen=True)
class LossOptions:
    """Settings of `srpo_kernels.policy_loss`. Raises ValueError for a value out of range.

    clip_eps_low, clip_eps_high: the ratio is clipped to 1 - clip_eps_low and 1 + clip_eps_high (epsilon of Eq. 6).
    kl_coef: factor of the KL (beta of Eq. 6); with 0 the KL is only measured.
    kl_estimator, with d = logprobs - ref_logprobs: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d; "full" is the exact KL over all
        candidates and needs the reference's logits. The gradient of k1 is the score function, whose expectation on-policy is
        zero: as a loss term k1 measures the KL but does not hold the policy back.
        Paper: Eq. 6 writes D_KL[pi || pi_ref] and names no estimator; k3.
    temperature: probabilities are softmax(logits / temperature); old_logprobs and ref_logprobs must use the same temperature.
    dual_clip: c > 1 bounds the ratio by c where A < 0, i.e. max(surrogate, c A) there; None: off.
    clip_form: "ppo" is Eq. 6. "cispo" (arXiv 2506.13585) bounds the importance weight instead of the update: the term is
        -stop_gradient(clip(ratio)) A log pi, so that a clipped row keeps a gradient. It has no dual clip.
    ratio_over: "sequence" takes one ratio for all tokens of a sequence, the geometric mean of the token ratios (GSPO in its token
        form, so that advantages may differ by step); "step" takes one ratio for each reasoning step. Both read the logits once
        more. The KL stays per token.

    A new option is a field here and arithmetic in reference.py, csrc/rows.h and triton_tokens.py; native.py and
    triton_rows.numbers pass it on. Construct the options outside of functions that torch.compile traces: it cannot trace the
    packing.
    """

    clip_eps_low: float
    clip_eps_high: float
    kl_coef: float
    kl_estimator: KlEstimator
    temperature: float
    dual_clip: float | None = None
    clip_form: ClipForm = "ppo"
    ratio_over: RatioOver = "token"

    # The fields as JSON, for torch operators, which take plain types only. No annotation: it is not a field.
    packed = ""

    def __post_init__(self) -> None:
        if not (self.clip_eps_low >= 0 and self.clip_eps_high >= 0):  # NaN fails, too
            raise ValueError(f"clip_eps_low {self.clip_eps_low} and clip_eps_high {self.clip_eps_high} must not be negative")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip is {self.dual_clip}: give a bound above 1, or None to switch it off")
        for name, choice in (("clip_form", ClipForm), ("ratio_over", RatioOver), ("kl_estimator", KlEstimator)):
            if getattr(self, name) not in get_args(choice):
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown: give one of {', '.join(get_args(choice))}")
        if self.clip_form != "ppo" and self.dual_clip is not None:
            raise ValueError(f"dual_clip bounds the surrogate of clip_form ppo, not {self.clip_form}: leave it at None")
        check_temperature(self.temperature)
        object.__setattr__(self, "packed", json.dumps(vars(self)))

    @staticmethod
    @cache
    def unpack(packed: str) -> LossOptions:
        """The options of a `packed` string."""
        return LossOptions(**json.loads(packed))


@cache
def without_loss(temperature: float) -> LossOptions:
    """Options of computations that have no loss and use only the temperature."""
    return LossOptions(clip_eps_low=0.0, clip_eps_high=0.0, kl_coef=0.0, kl_estimator="k3", temperature=temperature)


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless the temperature is above 0."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0")
