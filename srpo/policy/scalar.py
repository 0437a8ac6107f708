"""The scalar reward model (Appendix A), the alternative to the generative judge: a causal LM whose linear head scores steps.

The score of step j is read from the hidden state of its last token, so one forward over a response grades all its steps.

Paper: it says only "Scalar Reward Model". We give one score per step, so that the model fits Eq. 5, and use one head for all
steps, because the text before a score shows which step it belongs to.
Letters: N sequences, J reasoning steps, T packed rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srpo.core.batch import Batch, Rollout, pack
from srpo.core.errors import UserError, naming
from srpo.core.files import whole_folder, write_texts
from srpo.policy.adapters import iter_merged_params
from srpo.policy.forward import context_of, hidden_states, make_deterministic
from srpo.policy.model import load_policy
from srpo.policy.parallel import current_rank, unwrap

HEAD_FILE = "scalar_head.safetensors"
SCALAR_HEAD = "scalar_head"  # name of the layer in the model, so that checkpoints and sharding see it


class ScalarModel(nn.Module):
    """A causal LM with a scalar head; its forward takes a `Batch` and runs under the hooks of FSDP2."""

    def __init__(self, model: PreTrainedModel, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
        if not hasattr(model, SCALAR_HEAD):  # zeros, so that an untrained model gives every step the probability 0.5
            head = nn.Linear(int(model.config.hidden_size), 1, device=model.device)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            model.add_module(SCALAR_HEAD, head)
        make_deterministic(model, activation_checkpointing=activation_checkpointing)

    @property
    def max_context(self) -> int:
        """Longest prompt plus response that the model supports, in tokens."""
        return context_of(self.model.config)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [N, J] fp32 that each step is correct, read at the row of its last token.

        `scored_batches` appends one token to each response, so that the last response token has a row, too.
        """
        starts, lengths = batch.cu_seqlens[:-1, None].long(), batch.cu_seqlens.diff()[:, None]
        rows = starts + torch.minimum(batch.step_ends, lengths - 1)  # the minimum matters for an empty batch only
        hidden = hidden_states(self.model, batch)[rows]
        return getattr(self.model, SCALAR_HEAD)(hidden).squeeze(-1).float()


def scored_batches(
    cases: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]], targets: torch.Tensor, eos: int, max_tokens: int
) -> list[Batch]:
    """Micro-batches of the cases (prompt ids, response ids, step ends) for `ScalarModel`, in the given order.

    targets [N, J] are stored as `step_advantages`: the weight of each step's verdict in the loss, negative for the verdict
    "incorrect", 0 without a verdict. Raises UserError for a case of more than `max_tokens` tokens.
    """
    rollouts = [Rollout.from_tokens(prompt, (*response, eos), ends) for prompt, response, ends in cases]
    return pack(rollouts, targets, torch.zeros(len(rollouts)), max_tokens)


def scalar_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy [] of logits [N, J] against the signed weights of `scored_batches`: sum of |w| * -log p(verdict)."""
    return (targets.abs() * nn.functional.softplus(-targets.sign() * logits)).sum()


@torch.no_grad()
def probabilities(model: ScalarModel, batches: Sequence[Batch]) -> torch.Tensor:
    """[N, J] float64 on the CPU: the probability that each step is correct, sequences in the order of the batches."""
    device = next(model.parameters()).device
    return torch.cat([model(batch.to(device)).double().sigmoid().cpu() for batch in batches])


def load_scalar(path: str | Path, *, experts: str = "grouped_mm") -> ScalarModel:
    """The scalar reward model in a folder that `save_scalar` wrote, on the CPU.

    Raises UserError if the folder holds no model, or a model without a scalar head, such as a generative judge, and for a head
    that is not the two finite floating tensors of the layer.
    """
    model = ScalarModel(load_policy(path, experts=experts))
    file = Path(path) / HEAD_FILE
    if not file.is_file():
        raise UserError(
            f"no {HEAD_FILE} in {path}: name a folder of `srpo.train_judge --kind scalar`, or set reward.judge to 'generative'"
        )
    head: nn.Module = getattr(model.model, SCALAR_HEAD)
    try:
        with naming(file):
            tensors = load_file(file)
    except SafetensorError as error:
        raise _misfit(file, " ".join(str(error).split())) from error
    _check_head(file, tensors, head.state_dict())
    head.load_state_dict(tensors)
    return model


def _check_head(file: Path, tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Raise UserError unless the tensors have the names and shapes of the wanted ones, a floating dtype and finite values."""
    if tensors.keys() != wanted.keys():
        raise _misfit(file, f"it has the tensors {', '.join(sorted(tensors))}, and not {', '.join(sorted(wanted))}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise _misfit(file, f"{name} is {tuple(tensor.shape)} in place of {tuple(wanted[name].shape)}")
        if not tensor.is_floating_point():
            raise _misfit(file, f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}")
        if not bool(tensor.float().isfinite().all()):
            raise _misfit(file, f"{name} is not all finite")


def _misfit(file: Path, reason: str) -> UserError:
    return UserError(f"{file} does not fit the model in its folder ({reason}): train the judge again")


def save_scalar(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: str | Path, files: Mapping[str, str] | None = None
) -> None:
    """Write a Hugging Face folder with the backbone, and the head in a file of its own. Collective: every rank must call it.

    files: as in `save_policy`.
    """
    main = current_rank() == 0
    state = {name: tensor.cpu().clone() for name, tensor in iter_merged_params(model) if main}
    if main:
        prefix = f"{SCALAR_HEAD}."
        head = {name.removeprefix(prefix): state.pop(name) for name in [name for name in state if name.startswith(prefix)]}
        with whole_folder(Path(path)) as folder:
            unwrap(model).save_pretrained(folder, state_dict=state)
            save_file(head, folder / HEAD_FILE)
            tokenizer.save_pretrained(folder)
            write_texts(folder, files or {})
