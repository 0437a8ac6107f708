"""Small configs of a model's family: two layers, every kind of layer, narrow; what the family does differently stays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedConfig

# Errors of the classes of transformers for a combination of sizes that they do not expect, in their own code or in torch.
FAILURES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
FAILURES += (StrictDataclassError,)

SMALL = 128  # hidden size up to which a model is probed as wide as it is
_MAX_WEIGHTS = 3e8  # of a copy
_NOT_OF_THE_MODEL = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "transformers_version",
    "quantization_config",
    "output_attentions",
)
# Bounds on lengths and values that the probe has to pass, so that it sees what happens there.
_BOUNDS: dict[str, float] = {
    "original_max_position_embeddings": 16,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_window_size": 8,
    "attention_chunk_size": 16,
    "swiglu_limit": 0.5,
    "clip_qkv": 0.5,
}
_LENGTHS: dict[str, int] = dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len"), 64)
_COUNTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "moe_layer_freq"), 1),
}
_WIDTHS = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "lru_width"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim", "global_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("expert_hidden_size", "dense_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "state_size", "index_topk"), 8),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "num_heads"), 4),
    "qk_head_dim": 32,
}
_SHARED = "num_kv_shared_layers"  # the last so many layers use the keys and values of an earlier layer of their type
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_global_key_value_heads")
_VOCABULARIES = dict.fromkeys(("vocab_size", "padded_vocab_size", "vocab_size_per_layer_input"), 64)


def small_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Configs to try in this order, because a family may not take the first. A small model's own sizes come first, a large
    model's last; none has more than `_MAX_WEIGHTS` parameters.
    """
    narrow = {**_LENGTHS, **_COUNTS, **_WIDTHS, **_VOCABULARIES}
    reductions = [narrow, {**_LENGTHS, **_COUNTS, **_VOCABULARIES}, {**_LENGTHS, **_VOCABULARIES}]
    if 0 < _int(config, "hidden_size") <= SMALL and _int(config, "vocab_size") <= 1 << 14:
        reductions.insert(0, _LENGTHS)
    for sizes in reductions:
        try:
            small = _smaller(config, sizes)
            num_weights = 0 if sizes is _LENGTHS else _num_weights(small)
        except FAILURES:
            continue
        if num_weights <= _MAX_WEIGHTS:
            yield small


def _num_weights(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict()), trust_remote_code=False)
    return sum(param.numel() for param in model.parameters())


def _smaller(config: PreTrainedConfig, sizes: dict[str, int]) -> PreTrainedConfig:
    fields = _of_the_model(config.to_dict())
    _cut_layers(fields, config)
    wide, query_heads = dict(fields), _int(config, "num_attention_heads")
    for key, value in fields.items():
        if key in _KV_HEADS and sizes.get("hidden_size") and isinstance(value, int):  # as many as query heads, one, or between
            fields[key] = sizes["num_attention_heads"] if value == query_heads else min(value, 2)
        elif key.endswith("_token_id") and value is not None:
            fields[key] = 2
        elif key in sizes and _is_number(value) and value > sizes[key]:
            fields[key] = sizes[key]
        elif key in _BOUNDS and _is_number(value) and value > _BOUNDS[key]:
            fields[key] = _BOUNDS[key]
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(fields.get(key), dict):
            fields[key] = _cut_rope(fields[key], _head_dim(fields, config) / _head_dim(wide, config))
    return type(config)(**fields)


def _of_the_model(fields: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in fields.items() if key not in _NOT_OF_THE_MODEL}
    return {key: _of_the_model(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _cut_layers(fields: dict[str, Any], config: PreTrainedConfig) -> None:
    """Keep one layer of each kind that the config lists layer by layer, at least two; layers that use the keys of earlier ones
    are kinds of their own."""
    count = _int(config, "num_hidden_layers")
    lists = {key: value for key, value in fields.items() if isinstance(value, list) and len(value) == count}
    named = [value for value in lists.values() if len(set(map(repr, value))) <= 4]
    num_own = count - _int(config, _SHARED)
    kinds = [(layer >= num_own, *(repr(value[layer]) for value in named)) for layer in range(count)]
    kept = sorted({kinds.index(kind) for kind in kinds})
    if len(kept) < 2:
        kept = list(range(min(2, count)))
    for key, value in lists.items():
        fields[key] = [value[layer] for layer in kept]
    if isinstance(by_layer := fields.get("per_layer_config"), dict):
        fields["per_layer_config"] = {kept.index(int(layer)): by_layer[layer] for layer in by_layer if int(layer) in kept}
    if _SHARED in fields:
        fields[_SHARED] = sum(layer >= num_own for layer in kept)
    fields[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)


def _cut_rope(rope: dict[str, Any], shrunk: float) -> dict[str, Any]:
    """Rotary settings with their bound within the probe, and their factors for heads `shrunk` times as wide."""
    cut: dict[str, Any] = {}
    for key, value in rope.items():
        if isinstance(value, dict):
            cut[key] = _cut_rope(value, shrunk)
        elif isinstance(value, list) and key.endswith("_factor"):
            size = max(1, round(len(value) * shrunk))
            cut[key] = [value[i * len(value) // size] for i in range(size)]
        elif _is_number(value) and key in _BOUNDS:
            cut[key] = min(value, _BOUNDS[key])
        else:
            cut[key] = value
    return cut


def _head_dim(fields: dict[str, Any], config: PreTrainedConfig) -> float:
    names = [config.attribute_map.get(name, name) for name in ("hidden_size", "num_attention_heads")]
    width, heads = (fields.get(name) or 1 for name in names)
    return fields.get("qk_rope_head_dim") or fields.get("head_dim") or width / heads


def _int(config: PreTrainedConfig, name: str) -> int:
    """A number of the config under transformers' common name; 0 if it has none."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
