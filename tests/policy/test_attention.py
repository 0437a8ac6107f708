from __future__ import annotations

from typing import Any

import policy_lab as lab
import pytest
import torch

from srpo.core.errors import UserError
from srpo.policy.attention import PadLayout, varlen_attention
from srpo.policy.varlen_kernels import NAMES, check_kernel, kernel_of

SHAPES = [[5], [1, 1, 1], [4, 4, 4], [1, 7, 3, 12], [9, 2]]


@pytest.mark.parametrize("lengths", SHAPES)
def test_pad_puts_every_row_in_its_sequence_and_unpad_brings_it_back(lengths: list[int]) -> None:
    x = torch.randn(sum(lengths), 3, 2)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    layout = PadLayout.of(cu_seqlens, max(lengths))
    padded = layout.pad(x)
    assert padded.shape == (len(lengths), 3, max(lengths), 2)
    for i, rows in enumerate(x.split(lengths)):
        assert torch.equal(padded[i, :, : lengths[i]].transpose(0, 1), rows)
        assert not padded[i, :, lengths[i] :].any()
    assert torch.equal(layout.unpad(padded), x)


@pytest.mark.parametrize("lengths", SHAPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_attention_by_the_book_on_each_sequence(lengths: list[int], kv_heads: int) -> None:
    num_rows, heads, dim, scale = sum(lengths), 4, 6, 0.37
    query = torch.randn(1, heads, num_rows, dim, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, kv_heads, num_rows, dim, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    out, _ = varlen_attention(torch.nn.Identity(), query, key, value, None, scale, cu_seqlens, max(lengths))

    want = []
    for q, k, v in zip(*(x[0].split(lengths, 1) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(heads // kv_heads, 0) for x in (k, v))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(torch.ones(q.shape[1], q.shape[1]).triu(1).bool(), -torch.inf)
        want.append((scores.softmax(-1) @ v).transpose(0, 1))
    expected = torch.cat(want)[None]
    assert torch.allclose(out, expected, atol=1e-12)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (query, key, value), upstream, retain_graph=True)
    theirs = torch.autograd.grad(expected, (query, key, value), upstream)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


def test_says_what_to_call_where_the_input_is_not_packed() -> None:
    with pytest.raises(ValueError, match="hidden_states"):
        lab.tiny()(input_ids=torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize("window", [1, 3, 9, 50])
@pytest.mark.parametrize("lengths", SHAPES)
def test_a_sliding_window_ends_within_the_sequence(lengths: list[int], window: int) -> None:
    query, key, value = (torch.randn(1, heads, sum(lengths), 4, dtype=torch.float64) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    out, _ = varlen_attention(torch.nn.Identity(), query, key, value, None, 0.5, cu_seqlens, max(lengths), sliding_window=window)
    want = []
    for q, k, v in zip(*(x[0].split(lengths, 1) for x in (query, key, value)), strict=True):
        behind = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        scores = q @ k.repeat_interleave(2, 0).transpose(1, 2) * 0.5
        scores = scores.masked_fill((behind < 0) | (behind >= window), -torch.inf)
        want.append((scores.softmax(-1) @ v.repeat_interleave(2, 0)).transpose(0, 1))
    assert torch.allclose(out, torch.cat(want)[None], atol=1e-12)


@pytest.mark.parametrize("name", ["s_aux", "softcap", "position_bias"])
def test_arguments_that_are_not_computed_are_refused(name: str) -> None:
    x = torch.randn(1, 2, 5, 4)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    arguments: dict[str, Any] = {name: torch.ones(2)}
    with pytest.raises(UserError, match="its attention needs"):
        varlen_attention(torch.nn.Identity(), x, x, x, None, 1.0, cu_seqlens, 5, **arguments)
    arguments[name] = None
    varlen_attention(torch.nn.Identity(), x, x, x, None, 1.0, cu_seqlens, 5, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", SHAPES)
def test_kernel_on_a_gpu_equals_padding_on_the_cpu(lengths: list[int], name: str) -> None:
    try:
        check_kernel(name, torch.device("cuda"), torch.bfloat16)
    except UserError as error:  # not installed, or not for this GPU
        pytest.skip(str(error))
    query, key, value = (torch.randn(1, heads, sum(lengths), 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    outputs = []
    for device, dtype, kernel in (("cpu", torch.float32, None), ("cuda", torch.bfloat16, kernel_of(name))):
        q, k, v = (x.to(device, dtype) for x in (query, key, value))
        bounds = cu_seqlens.to(device)
        out, _ = varlen_attention(torch.nn.Identity(), q, k, v, None, 0.125, bounds, max(lengths), kernel=kernel)
        outputs.append(out.cpu().float())
    assert torch.allclose(outputs[0], outputs[1], atol=2e-2, rtol=2e-2)
