"""Every kernel of attention that srpo calls, with a fake of its package: arguments, result and gradient; and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_attention as fakes
import policy_lab as lab
import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, Gemma4TextConfig, GPTNeoXConfig, LlamaConfig

from srpo.core.config.train import PolicyConfig
from srpo.core.errors import MissingPackage, UserError
from srpo.policy import attention, experts
from srpo.policy.attention import head_widths, registered_attention, varlen_attention
from srpo.policy.loading import load_to_shard
from srpo.policy.model import Policy, load_policy, save_policy
from srpo.policy.varlen_kernels import Kernel, check_kernel, check_widths, kernel_of, of_flash_2, of_flash_4, of_torch
from srpo.training.checks import check_device

GPU = torch.device("cuda")
LENGTHS = [[5], [1, 1, 1], [1, 7, 3, 12]]
KERNELS: dict[str, Kernel] = {
    "torch 2.11": of_torch(fakes.varlen_attn_2_11),
    "torch 2.12": of_torch(fakes.varlen_attn_2_12),
    "flash 2": of_flash_2(fakes.flash_2),
    "flash 4": of_flash_4(fakes.flash_4),
}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that installs fakes: `both(flash_2=function or None, flash_4=function or None)`."""

    def install(flash_2: Any = None, flash_4: Any = None) -> None:
        package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
        if flash_2 is not None:
            monkeypatch.setattr(package, "flash_attn_varlen_func", flash_2, raising=False)
        monkeypatch.setattr(cute, "flash_attn_varlen_func", flash_4, raising=False)
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        monkeypatch.setitem(sys.modules, "flash_attn.cute", cute if flash_4 is not None else None)

    kernel_of.cache_clear()
    yield install
    kernel_of.cache_clear()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that pretends a GPU of this major compute capability."""
    return lambda major: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 4, 50])
def test_result_and_gradient_are_those_of_padding(name: str, lengths: list[int], kv_heads: int, window: int | None) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    sizes = [(1, heads, sum(lengths), 16) for heads in (4, kv_heads, kv_heads)]
    inputs: Any = [torch.randn(size).bfloat16().requires_grad_() for size in sizes]
    exact: Any = [x.detach().float().requires_grad_() for x in inputs]
    more: Any = {"scaling": 0.3, "cu_seq_lens_q": bounds, "max_length_q": max(lengths), "sliding_window": window}
    out, _ = varlen_attention(torch.nn.Identity(), *inputs, attention_mask=None, **more, kernel=KERNELS[name])
    want, _ = varlen_attention(torch.nn.Identity(), *exact, attention_mask=None, **more)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), want, atol=1e-2, rtol=1e-2)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, inputs, upstream)
    theirs = torch.autograd.grad(want, exact, upstream.float())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("width", "values"), [(24, 16), (8, 24), (12, 12)])
def test_values_may_have_another_width_than_keys(name: str, width: int, values: int) -> None:
    """MLA. Kernels of one width get zeros; FlashAttention 4 has two widths, and refuses 12 at the load (`check_widths`)."""
    if name == "flash 4" and width == 12:
        return
    bounds = torch.tensor([0, 3, 9], dtype=torch.int32)
    query, key, value = (torch.randn(1, 2, 9, size).bfloat16() for size in (width, width, values))
    more = {"cu_seq_lens_q": bounds, "max_length_q": 6}
    out, _ = varlen_attention(torch.nn.Identity(), query, key, value, None, **more, kernel=KERNELS[name])
    want, _ = varlen_attention(torch.nn.Identity(), query.float(), key.float(), value.float(), None, **more)
    assert out.shape == (1, 9, 2, values)
    torch.testing.assert_close(out.float(), want, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("attention", "function"), [("flash_attention_2", "flash_2"), ("flash_attention_4", "flash_4")])
def test_a_model_runs_on_the_named_package_and_looks_it_up_once(
    attention: str, function: str, packages: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0].shape)
        return getattr(fakes, function)(*args, **kwargs)

    counted.__wrapped__ = getattr(fakes, function)  # pyright: ignore[reportFunctionMemberAccess]
    packages(**{function: counted})
    save_policy(lab.tiny(), lab.tokenizer(), tmp_path / "model")
    model = load_policy(tmp_path / "model", attention=attention, dtype=torch.bfloat16)
    plain = load_policy(tmp_path / "model", dtype=torch.bfloat16)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, None)  # a forward must not import it
    (batch,) = lab.batches(3)
    logits = Policy(model)(batch)
    assert len(calls) == lab.CONFIG.num_layers
    torch.testing.assert_close(logits.float(), Policy(plain)(batch).float(), atol=0.1, rtol=0.1)
    assert len(calls) == lab.CONFIG.num_layers


def test_a_package_that_is_there_and_not_asked_for_is_not_used(packages: Callable[..., None], tmp_path: Path) -> None:
    packages(flash_2=lambda *_: pytest.fail("called"), flash_4=lambda *_: pytest.fail("called"))
    save_policy(lab.tiny(), lab.tokenizer(), tmp_path / "model")
    (batch,) = lab.batches(2)
    assert Policy(load_policy(tmp_path / "model"))(batch).isfinite().all()


@pytest.mark.parametrize(
    ("attention", "fix"),
    [("flash_attention_2", "pip install flash-attn --no-build-isolation"), ("flash_attention_4", "pip install flash-attn-4")],
)
def test_a_missing_package_is_said_with_its_command(
    attention: str, fix: str, packages: Callable[..., None], on_gpu: Callable[[int], None], tmp_path: Path
) -> None:
    packages()
    on_gpu(9)
    save_policy(lab.tiny(), lab.tokenizer(), tmp_path / "model")
    policy = PolicyConfig(path=str(tmp_path / "model"), attention=attention, dtype="bfloat16")  # pyright: ignore[reportArgumentType]
    gpu = replace(lab.one_process(), device=GPU)
    for ask in (
        lambda: registered_attention(attention),
        lambda: load_policy(tmp_path / "model", attention=attention),
        lambda: check_device(policy, gpu),
    ):
        with pytest.raises(MissingPackage, match=fix):
            ask()
    with pytest.raises(UserError, match=fix):  # on every rank with the text of the first that refuses
        load_to_shard(tmp_path / "model", gpu, policy)
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        check_device(policy, lab.one_process())


def test_flash_2_is_missing_where_only_flash_4_is_installed(
    packages: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flash-attn-4 installs flash_attn/cute alone: `flash_attn` is then a namespace package that imports, and is empty."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text(
        "from fake_attention import flash_4 as flash_attn_varlen_func\n"
    )
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with pytest.raises(MissingPackage, match="pip install flash-attn --no-build-isolation"):
            kernel_of("flash_attention_2")
        assert callable(kernel_of("flash_attention_4"))
    finally:
        for name in ("flash_attn", "flash_attn.cute"):
            sys.modules.pop(name, None)


def test_the_early_flash_4_inside_flash_2_is_refused(packages: Callable[..., None]) -> None:
    packages(fakes.flash_2, fakes.flash_4_early)
    assert callable(kernel_of("flash_attention_2"))
    with pytest.raises(MissingPackage, match=r"early copy .*: pip install flash-attn-4"):
        kernel_of("flash_attention_4")


@pytest.mark.parametrize(
    ("attention", "device", "dtype", "major", "words"),
    [
        ("flash_attention_2", "cpu", torch.bfloat16, 9, "needs an NVIDIA GPU"),
        ("flash_attention_4", "cuda", torch.float32, 9, "policy.dtype to 'bfloat16'"),
        ("flash_attention_2", "cuda", torch.bfloat16, 7, "compute capability 8.0"),
        ("flash_attention_4", "cuda", torch.bfloat16, 8, "compute capability 9.0"),
        ("fast", "cuda", torch.bfloat16, 9, "torch, flash_attention_2, flash_attention_4"),
    ],
)
def test_what_a_kernel_cannot_run_on_is_refused_before_the_load(
    attention: str, device: str, dtype: torch.dtype, major: int, words: str, packages: Any, on_gpu: Callable[[int], None]
) -> None:
    packages(fakes.flash_2, fakes.flash_4)
    on_gpu(major)
    with pytest.raises(UserError, match=words):
        check_kernel(attention, torch.device(device), dtype)


@pytest.mark.parametrize("attention", ["torch", "flash_attention_2", "flash_attention_4"])
def test_what_they_can_run_on_is_not(attention: str, packages: Callable[..., None], on_gpu: Callable[[int], None]) -> None:
    packages(fakes.flash_2, fakes.flash_4)
    on_gpu(9)
    check_kernel(attention, GPU, torch.bfloat16)
    check_kernel("torch", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("attention", "major", "right", "wrong"),
    [
        ("flash_attention_2", 8, [(64, 64), (12, 12), (256, 256), (192, 128)], [(264, 264), (128, 512)]),
        ("flash_attention_4", 9, [(8, 8), (256, 128)], [(12, 12), (264, 264)]),
        ("flash_attention_4", 10, [(128, 128), (192, 128), (256, 256)], [(192, 192), (136, 136), (64, 12)]),
        ("flash_attention_4", 12, [(128, 64)], [(256, 256), (192, 128)]),
        ("torch", 9, [(512, 512), (12, 12)], []),  # wider heads than its kernel has are padded sequences
    ],
)
def test_heads_that_a_kernel_does_not_have_are_refused(
    attention: str, major: int, right: list[Any], wrong: list[Any], on_gpu: Callable[[int], None]
) -> None:
    on_gpu(major)
    check_widths(attention, right, GPU)
    for pair in wrong:
        with pytest.raises(UserError, match=f"has {pair[0]} for queries and keys and {pair[1]} for values"):
            check_widths(attention, [right[0], pair], GPU)


@pytest.mark.parametrize(
    ("config", "widths"),
    [
        (LlamaConfig(hidden_size=96, num_attention_heads=4), [(24, 24)]),
        (GPTNeoXConfig(hidden_size=96, num_attention_heads=4), [(24, 24)]),
        (DeepseekV3Config(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128), [(192, 128)]),
        (Gemma4TextConfig(), [(256, 256), (512, 512)]),  # the last layer's heads are wider
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_head_widths_of_models(config: Any, widths: list[Any]) -> None:
    with torch.device("meta"):
        assert head_widths(AutoModelForCausalLM.from_config(config)) == widths


def test_torch_s_kernel_in_16_bits_needs_compute_capability_8(on_gpu: Callable[[int], None]) -> None:
    on_gpu(7)
    with pytest.raises(
        UserError, match=r"bfloat16 needs compute capability 8.0, and this GPU has 7.0: set policy.dtype to 'float32'"
    ):
        check_kernel("torch", GPU, torch.bfloat16)
    check_kernel("torch", GPU, torch.float32)
    on_gpu(8)
    check_kernel("torch", GPU, torch.bfloat16)


@pytest.mark.parametrize(("width", "calls"), [(256, 1), (264, 0)])
def test_heads_wider_than_torch_s_kernel_has_are_padded_sequences(
    monkeypatch: pytest.MonkeyPatch, width: int, calls: int
) -> None:
    """As on a GPU in bf16, where padding is not needed for the dtype."""
    taken: list[int] = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
        taken.append(query.shape[2])
        return torch.zeros(query.shape[0], query.shape[1], value.shape[2])

    monkeypatch.setattr(attention, "needs_padding", lambda device, dtype: False)
    monkeypatch.setattr(attention, "kernel_of", lambda name: kernel)
    query, key, value = (torch.randn(1, 2, 7, width) for _ in range(3))
    bounds = torch.tensor([0, 4, 7], dtype=torch.int32)
    out, _ = attention.varlen_attention(torch.nn.Identity(), query, key, value, None, cu_seq_lens_q=bounds, max_length_q=4)
    assert len(taken) == calls and bool(out.any()) == (calls == 0)


@pytest.mark.parametrize(("major", "unwritten"), [(9, False), (10, True), (12, True)])
def test_on_which_gpus_gradients_of_unused_experts_are_unwritten(
    on_gpu: Callable[[int], None], major: int, unwritten: bool
) -> None:
    on_gpu(major)
    experts._leaves_unwritten.cache_clear()
    assert experts._leaves_unwritten(GPU) == unwritten
    experts._leaves_unwritten.cache_clear()
