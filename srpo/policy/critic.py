"""PPO's critic: a value head on its own copy of the policy's backbone.

Letters: T packed rows, R labelled rows.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from srpo.core.batch import IGNORE, Batch
from srpo.policy.forward import hidden_states, make_deterministic


class Critic(nn.Module):
    """Value of every state in which a response token is sampled. The head starts at zero, so the first values are 0 everywhere.

    The head is a submodule of the transformers model, where sharding and checkpoints find it.
    """

    def __init__(self, model: PreTrainedModel, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        backbone = model.base_model  # without the language model's head
        assert isinstance(backbone, PreTrainedModel)
        self.model = backbone
        self.model.value_head = nn.Linear(model.config.get_text_config().hidden_size, 1)
        self._head().weight.data.zero_()
        self._head().bias.data.zero_()
        make_deterministic(self.model, activation_checkpointing=activation_checkpointing)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Values [R] fp32 of the rows of `batch.rows()`. A row's value depends on all tokens before the one it predicts."""
        hidden = hidden_states(self.model, batch)[batch.labels != IGNORE]
        return self._head()(hidden)[:, 0].float()

    def _head(self) -> nn.Linear:
        head = self.model.value_head
        assert isinstance(head, nn.Linear)
        return head
