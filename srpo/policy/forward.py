"""The forward over a packed `Batch` that policy, critic and scalar reward model share: no randomness, no neighbour.

Letters: T packed rows, H hidden.
"""

from __future__ import annotations

import re
from functools import cache, partial

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from srpo.core.batch import Batch
from srpo.core.errors import UserError
from srpo.policy.attention import PadLayout
from srpo.policy.routing import Routing

_RANDOM = re.compile("drop|jitter|noise")  # attributes of modules that say how much randomness training adds
_BY_LENGTH = ("longrope", "dynamic")  # rotary embeddings whose frequencies depend on the longest sequence of a forward


def hidden_states(model: PreTrainedModel, batch: Batch, routing: Routing | None = None) -> torch.Tensor:
    """Last hidden states [T, H] (after the final norm) of the packed sequences; no sequence attends to another.

    routing: only for a model whose `Routers` are open. Raises UserError for a sequence that is longer than `context_of`.
    """
    max_length = batch.max_seqlen
    limit = context_of(model.config)
    if max_length > limit:
        raise UserError(f"a sequence has {max_length} tokens, more than the context of {limit} of the model: shorten it")
    return model.base_model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=max_length,
        max_length_k=max_length,
        pad_layout=cache(partial(PadLayout.of, batch.cu_seqlens, max_length)),
        use_cache=False,
        **({} if routing is None else {"routing": routing}),
    ).last_hidden_state[0]


def context_of(config: PreTrainedConfig) -> int:
    """Longest prompt plus response that srpo computes right, in tokens: the model's limit, and the length up to which a position
    means the same whatever else is in the batch.

    Longer ones change the rotary frequencies of their neighbours (`longrope`, `dynamic`) or attend in chunks (Llama 4). Raises
    UserError for a model without a limit, which is one whose positions srpo does not know.
    """
    limits = [getattr(config, "max_position_embeddings", None)]
    if not isinstance(limits[0], int):
        raise UserError(f"models of type {config.model_type!r} have no max_position_embeddings, the context that srpo goes by")
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # of one kind of layer, or of each
        if parameters.get("rope_type") in _BY_LENGTH:
            limits.append(parameters.get("original_max_position_embeddings"))
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        limits.append(getattr(config, "attention_chunk_size", None))
    return min(int(limit) for limit in limits if limit)


def logit_scale(config: PreTrainedConfig) -> float:
    """The factor of a model's logits after the head: `logit_scale` (Cohere), or 1 / `logits_scaling` (Granite)."""
    return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)


def for_head(config: PreTrainedConfig, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states [..., H] scaled so that the head alone gives the logits, for a head without bias."""
    scale = logit_scale(config)
    return hidden if scale == 1.0 else hidden * scale


def make_deterministic(model: PreTrainedModel, *, activation_checkpointing: bool = False) -> None:
    """Turn off everything random in the forward: ratios, KL and rewards compare forwards of one batch with each other.

    Transformers recomputes activations only in modules in training mode. These modules, and not their parts, stay in it, and
    lose their own probabilities. Raises UserError for a model that cannot recompute.
    """
    model.eval()
    if not activation_checkpointing:
        return
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"policy.activation_checkpointing is on, and transformers cannot recompute {type(model).__name__}: set it to false"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name, value in vars(module).items():
                if isinstance(value, float) and _RANDOM.search(name):
                    setattr(module, name, 0.0)
