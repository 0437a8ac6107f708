"""The kernels of the loss from hidden states with exponentials compile for every architecture, and the machine code is as
intended: tensor cores, loads of 16 bytes into shared memory, no spilled registers. Needs no GPU."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from machine_code import TARGETS, amd_use, compiled, disassemble
from srpo_kernels import linear_exponentials

NVIDIA = [arch for arch in TARGETS if arch.startswith("sm")]
LAYOUT = {"hidden", "weight", "exponentials", "hidden_stride", "weight_stride", "exponentials_stride", "vocab", "size"}
INTEGERS = ("hidden_stride", "weight_stride", "exponentials_stride", "num_rows", "vocab", "size")
COUNTS = ("exponentials_stride", "num_tiles", "num_rows", "vocab", "num_sequences", "num_steps", "first_row")
NUMBERS = ("c_error", "inverse_temperature", "clip_low", "clip_high", "dual_clip", "kl_coef")
TENSOR_CORES = {"sm80": "HMMA", "sm90": "HGMMA", "sm100": "UTCHMMA"}
SHARED = {"sm80": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "gfx942": 64 * 1024}  # that of sm80 is what sm86 has
REGISTERS = {"sm80": 200, "sm90": 248, "sm100": 255, "gfx942": 208}  # the sums of the tile take 128 of these, on sm80 64
FINISH_REGISTERS = 64


@pytest.fixture(scope="module")
def kernels(kernels: ModuleType) -> ModuleType:
    """The kernels of `linear_exponentials`."""
    return linear_exponentials.kernels()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def product(kernels: ModuleType, arch: str, aligned: set[str], **fixed: Any) -> Any:
    """`exponentials_kernel` as it is launched."""
    types = dict.fromkeys(("hidden", "weight", "exponentials"), "*bf16") | {"labels": "*i64", "c": "fp32"}
    types |= dict.fromkeys(INTEGERS, "i32")
    tiles, stages = linear_exponentials.tiling(None if arch.startswith("gfx") else int(arch[2:]) // 10)
    fixed = {**tiles, "WHOLE": True, **fixed}
    options = {"num_warps": linear_exponentials.WARPS, "num_stages": stages}
    return compiled(kernels.exponentials_kernel, arch, types, fixed, aligned, **options)


def finish(kernels: ModuleType, arch: str, **fixed: Any) -> Any:
    """`finish_kernel` as it is launched."""
    types = {"exponentials": "*bf16", "labels": "*i64", "step_ends": "*i32", "cu_seqlens": "*i32", "c": "fp32"}
    types |= dict.fromkeys(COUNTS, "i32") | dict.fromkeys(NUMBERS, "fp64")
    fixed = {"CLIP_FORM": "ppo", "KL_ESTIMATOR": "k3", "BLOCK": linear_exponentials.BLOCK, **fixed}
    return compiled(kernels.finish_kernel, arch, types, fixed, LAYOUT, num_warps=4)


@pytest.mark.parametrize("wanted", ["with_gradient", "without"])
@pytest.mark.parametrize("arch", NVIDIA)
def test_nvidia(kernels: ModuleType, arch: str, wanted: str, tmp_path: Path) -> None:
    code = product(kernels, arch, LAYOUT, **({} if wanted == "with_gradient" else {"exponentials": None}))
    use, sass = disassemble(code.asm["cubin"], tmp_path)
    print(use, code.metadata.shared)
    assert use["STACK"] == use["LOCAL"] == 0 and not re.search(r"\b(LDL|STL)\b", sass), "spilled registers"
    assert use["REG"] <= REGISTERS[arch] and code.metadata.shared <= SHARED[arch]
    assert re.search(rf"\b{TENSOR_CORES[arch]}\b", sass)
    copies = re.findall(r"\bLDGSTS([.\w]*)", sass)
    assert len(copies) >= 24 and all(".128" in copy for copy in copies), "factors go to shared memory 16 bytes at a time"
    stores = re.findall(r"\bSTG\.E([.\w]*)", sass)
    wide = sum(".128" in store for store in stores)
    tiles, _ = linear_exponentials.tiling(int(arch[2:]) // 10)
    stores_of_tile = tiles["BLOCK_M"] * tiles["BLOCK_N"] * 2 // 16 // (32 * linear_exponentials.WARPS)
    assert wide == (stores_of_tile if wanted == "with_gradient" else 0), "exponentials leave it likewise"
    assert len(stores) - wide <= 4, "two sums per row and the label's logit"


@pytest.mark.parametrize("wanted", ["with_gradient", "without"])
def test_amd(kernels: ModuleType, wanted: str) -> None:
    code = product(kernels, "gfx942", LAYOUT, **({} if wanted == "with_gradient" else {"exponentials": None}))
    use, text = amd_use(code.asm["amdgcn"]), code.asm["amdgcn"]
    print(use, code.metadata.shared)
    assert use["vgpr_spill_count"] == use["sgpr_spill_count"] == 0 and use["vgpr_count"] <= REGISTERS["gfx942"]
    assert code.metadata.shared <= SHARED["gfx942"] and re.search(r"\bv_mfma_f32\w*bf16", text)
    assert len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text)) >= 8
    assert wanted == "without" or len(re.findall(r"\b(?:global|buffer)_store_dwordx[24]\b", text)) >= 8


@pytest.mark.parametrize("fixed", [{}, {"CLIP_FORM": "cispo", "KL_ESTIMATOR": None}, {"exponentials": None}], ids=str)
@pytest.mark.parametrize("arch", TARGETS)
def test_finish(kernels: ModuleType, arch: str, fixed: dict[str, Any], tmp_path: Path) -> None:
    absent = dict.fromkeys(("old_logprobs", "ref_logprobs")) if fixed.get("CLIP_FORM") == "cispo" else {}
    code = finish(kernels, arch, **fixed, **absent)
    if arch == "gfx942":
        use = amd_use(code.asm["amdgcn"])
        assert use["vgpr_spill_count"] == use["sgpr_spill_count"] == 0
    else:
        use, sass = disassemble(code.asm["cubin"], tmp_path)
        assert use["STACK"] == use["LOCAL"] == 0 and not re.search(r"\b(LDL|STL)\b", sass), "spilled registers"
    print(use)
    assert use["vgpr_count" if arch == "gfx942" else "REG"] <= FINISH_REGISTERS


@pytest.mark.parametrize("arch", TARGETS)
def test_sizes_that_are_not_aligned_compile(kernels: ModuleType, arch: str) -> None:
    assert product(kernels, arch, set(), WHOLE=False).asm


def test_nothing_but_the_layout_of_a_row_is_compiled_for(kernels: ModuleType) -> None:
    """Neither a number of rows, sequences or steps, nor where a slice of a table starts, nor any scalar makes a new kernel."""
    for kernel in (kernels.exponentials_kernel, kernels.finish_kernel):
        specialized = set()
        for param in kernel.params:
            if param.annotation_type:
                assert param.annotation_type in ("fp32", "fp64")
            elif not param.is_constexpr and not param.do_not_specialize:
                specialized.add(param.name)
        assert specialized == LAYOUT & {param.name for param in kernel.params}
