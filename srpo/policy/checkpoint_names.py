"""Parameters under the names of a Hugging Face checkpoint: what every other engine's loader reads.

Transformers keeps the experts of a layer in one parameter; in checkpoints each expert has tensors of its own. The conversion is
transformers' own, the one of `save_pretrained`, applied to one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from srpo.policy.parallel import iter_full_params, unwrap


@torch.no_grad()
def iter_checkpoint_params(policy: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, whole tensor) of every parameter, one parameter gathered at a time; tied parameters once.

    Collective for a sharded model: every rank must iterate to the end. Tensors may be views of the parameters' own memory: copy
    what must outlive the next update.
    """
    model = unwrap(policy)
    for name, tensor in iter_full_params(policy):
        yield from revert_weight_conversion(model, {name: tensor}).items()
