"""Token-by-token forward of a transformers causal LM that takes its attention from the `AttentionInterface`.

A prompt is computed once and shared by all rows of its group: decoding attends over the prompt keys of a *chunk* (rows with the
same prompt) and over the row's own response keys, under one softmax. Prompt keys are neither copied nor read again for each row.

Letters: C chunks, G rows of a chunk, S = C * G slots, K kv heads, R query heads per kv head, H = K * R, P prompt tokens,
T response tokens, D head dimension of queries and keys, E of values, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from srpo.policy.attention import band, check_arguments
from srpo.policy.forward import context_of, for_head
from srpo.policy.routing import Routers, Routing

ATTENTION = "srpo_decode"


class KeyValues:
    """Keys of one wave of prompts per layer: `[C, K, P, D]` of the prompts, `[C, K, G, T, D]` of the responses. Values have E."""

    def __init__(self, prompt_lengths: torch.Tensor, group_size: int, capacity: int):
        self.prompt_lengths = prompt_lengths  # [C]
        self.group_size = group_size
        self.capacity = capacity  # maximum number of response tokens
        self.num_response = 0  # tokens stored so far of each response
        self.prompt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> keys, values
        self.response: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.prefilling = True
        self.bias: torch.Tensor | None = None  # [C, 1, P] -inf at padding; None if all prompts have the same length

    def attend_prompt(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Causal attention of right-padded prompts, [C, H, P, E]; padding follows the tokens, so the causal mask hides it.

        window: number of keys that a token attends to, its own included; None: all before it.
        """
        self.prompt[layer] = key.contiguous(), value.contiguous()
        repeats, length = query.shape[1] // key.shape[1], query.shape[2]
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        mask = band(length, window, query.device) if window is not None and window < length else None
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scale)

    def attend_response(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Attention of one new token per slot over its chunk's prompt and its own response: query [S, H, 1, D] -> [S, H, E]."""
        prompt_keys, prompt_values = self.prompt[layer]  # [C, K, P, D], [C, K, P, E]
        num_chunks, kv_heads, num_prompt, dim = prompt_keys.shape
        value_dim = prompt_values.shape[-1]
        rows, end = self.group_size, self.num_response + 1
        first = 0 if window is None else max(0, end - window)  # first response token within the window
        repeats = query.shape[1] // kv_heads
        if layer not in self.response:
            shape = (num_chunks, kv_heads, rows, self.capacity)
            self.response[layer] = prompt_keys.new_empty(*shape, dim), prompt_keys.new_empty(*shape, value_dim)
        keys, values = self.response[layer]
        keys[:, :, :, end - 1] = key.view(num_chunks, rows, kv_heads, dim).transpose(1, 2)
        values[:, :, :, end - 1] = value.view(num_chunks, rows, kv_heads, value_dim).transpose(1, 2)
        own_keys = keys.view(-1, self.capacity, dim)[:, first:end]
        own_values = values.view(-1, self.capacity, value_dim)[:, first:end]
        num_own = end - first

        query = (query * scale).view(num_chunks, rows, kv_heads, repeats * dim).transpose(1, 2).contiguous()  # [C, K, G, R*D]
        shared = query.view(num_chunks * kv_heads, rows * repeats, dim) @ prompt_keys.flatten(0, 1).transpose(1, 2)
        own = query.view(num_chunks * kv_heads * rows, repeats, dim) @ own_keys.transpose(1, 2)
        bias = self._prompt_bias(num_prompt, window)
        if bias is not None:
            shared.view(num_chunks, -1, num_prompt).add_(bias)
        scores = torch.cat((shared, own.view(num_chunks * kv_heads, rows * repeats, num_own)), -1)
        probs = scores.softmax(-1, dtype=torch.float32).to(value.dtype)  # [C*K, G*R, P+T]
        out = torch.bmm(probs[..., :num_prompt], prompt_values.flatten(0, 1))
        own_probs = probs[..., num_prompt:].reshape(num_chunks * kv_heads * rows, repeats, num_own)
        out = torch.baddbmm(out.view(-1, repeats, value_dim), own_probs, own_values)
        out = out.view(num_chunks, kv_heads, rows, repeats * value_dim).transpose(1, 2)
        return out.reshape(num_chunks * rows, kv_heads * repeats, value_dim)

    def _prompt_bias(self, num_prompt: int, window: int | None) -> torch.Tensor | None:
        """[C, 1, P] -inf at padding and at prompt tokens that the window has left behind; None if there are none of either."""
        if window is None or num_prompt + self.num_response < window:
            return self.bias
        device = self.prompt_lengths.device
        behind = (self.prompt_lengths + self.num_response)[:, None] - torch.arange(num_prompt, device=device)
        outside = torch.zeros(behind.shape, device=device).masked_fill_(behind >= window, -torch.inf)[:, None]
        return outside if self.bias is None else self.bias + outside

    def select(self, chunks: torch.Tensor, slots: torch.Tensor) -> None:
        """Keep only the slots [C', G'] (old slot numbers); row c of `slots` holds slots of the old chunk `chunks[c]`."""
        chunk, row = slots // self.group_size, slots % self.group_size
        num_chunks, self.group_size = slots.shape
        end = self.num_response
        self.prompt_lengths = self.prompt_lengths[chunks]
        self.bias = None if self.bias is None else self.bias[chunks]
        for layer, (keys, values) in self.prompt.items():
            self.prompt[layer] = keys[chunks], values[chunks]
        for layer, pair in self.response.items():
            kept = []
            for old in pair:
                new = old.new_empty(num_chunks, old.shape[1], self.group_size, self.capacity, old.shape[-1])
                new[:, :, :, :end] = old[:, :, :, :end][chunk, :, row].transpose(1, 2)
                kept.append(new)
            self.response[layer] = kept[0], kept[1]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    key_values: KeyValues | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    assert key_values is not None
    check_arguments(kwargs)
    layer = int(module.layer_idx)  # pyright: ignore[reportArgumentType]
    if key_values.prefilling:
        return key_values.attend_prompt(layer, query, key, value, scaling, sliding_window).transpose(1, 2), None
    return key_values.attend_response(layer, query, key, value, scaling, sliding_window)[:, None], None


AttentionInterface.register(ATTENTION, _attention)


class Decoder:
    """Prefill and single-token forward. The decoder owns the model: it replaces the model's attention function.

    Which models it computes right, `srpo.policy.probe` finds out.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval().requires_grad_(False)
        model.set_attn_implementation(ATTENTION)
        self.head: nn.Module = model.lm_head
        self.device = next(model.parameters()).device
        self._routers: Routers | None = None

    def open_routers(self) -> Routers:
        """The model's routers; from now on forwards take a `Routing`. Raises UserError for a model without experts."""
        if self._routers is None:
            self._routers = Routers(self.model).open()
        return self._routers

    @property
    def max_context(self) -> int:
        """Longest sequence that the model supports, in tokens."""
        return context_of(self.model.config)

    def _forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, key_values: KeyValues, routing: Routing | None
    ) -> torch.Tensor:
        more = {} if routing is None else {"routing": routing}
        return self.model.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, key_values=key_values, **more
        ).last_hidden_state

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(for_head(self.model.config, hidden)).float()

    def prefill(
        self, prompts: Sequence[Sequence[int]], group_size: int, capacity: int, routing: Routing | None = None
    ) -> tuple[torch.Tensor, KeyValues]:
        """(logits [len(prompts) * group_size, V] fp32 of the first response tokens, store with room for `capacity` tokens).

        routing: only after `open_routers`; it covers all prompt tokens [len(prompts) * P], padding included.
        """
        lengths = torch.tensor([len(p) for p in prompts])
        longest = int(lengths.max())
        ids = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts]).to(self.device)
        key_values = KeyValues(lengths.to(self.device), group_size, capacity)
        positions = torch.arange(longest, device=self.device)
        hidden = self._forward(ids, positions[None], key_values, routing)
        logits = self._logits(hidden[torch.arange(len(prompts), device=self.device), key_values.prompt_lengths - 1])
        if int(lengths.min()) < longest:
            padding = positions[None] >= key_values.prompt_lengths[:, None]
            bias = torch.zeros(padding.shape, dtype=hidden.dtype, device=self.device)
            key_values.bias = bias.masked_fill_(padding, -torch.inf)[:, None]
        key_values.prefilling = False
        return logits.repeat_interleave(group_size, 0), key_values

    def step(self, tokens: torch.Tensor, key_values: KeyValues, routing: Routing | None = None) -> torch.Tensor:
        """Logits [S, V] fp32 of the next token, after appending `tokens` [S], one to each response."""
        positions = (key_values.prompt_lengths + key_values.num_response).repeat_interleave(key_values.group_size)
        hidden = self._forward(tokens[:, None], positions[:, None], key_values, routing)
        key_values.num_response += 1
        return self._logits(hidden[:, 0])
