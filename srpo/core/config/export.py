"""Settings of `srpo.export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True)
class ExportConfig:
    """`python -m srpo.export runs/demo --step best`"""

    run_dir: Positional[str] = ""  # folder of a run of srpo.train, srpo.sft or srpo.dpo, or of a stage of srpo.train_judge
    step: str = "last"  # optimizer step of a checkpoint that the run has; last: the newest; best: by train.best
    out: str = ""  # folder for the model; empty: export/step_NNNNNN in the run folder
    dtype: Literal["float32", "bfloat16"] = "float32"  # number format of the weights; float32 is that of the training state
    policy: str = ""  # the checkpoint that the run started from, if it has moved; empty: policy.path of the run
