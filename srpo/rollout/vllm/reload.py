"""Loads new weights into a running vLLM model and proves that its kernels use them. Runs in the engine's process.

On a CPU `direct_load` makes the kernels from the arrived weights; a model that it cannot lay out goes through vLLM's layerwise
reload (`initialize_layerwise_reload`, `load_weights`, `finalize_layerwise_reload`). That reload has two gaps on the CPU backend:
experts come back without the repacking that their kernel expects, and a head tied to the embedding keeps the old weights that
it had packed. `Reloader` closes both, and tests for further gaps at every start (`prove`) and at every sync (`sums`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from srpo.rollout.vllm.direct_load import DirectLoader, UnknownLayoutError
from srpo.rollout.weights.buckets import add_sums, bit_sum, bit_sums, place_sum

STALE = " (packed)"  # suffix of the name under which a kernel's outdated weight is listed
_HELD = "_srpo_held"  # attribute of a layer: (bit sum, place sum or None) of the weight that its CPU kernel was made from


class KernelWatch:
    """Records the sums of the weight that each linear CPU kernel is made from: the kernel packs a copy, and vLLM may then discard
    the weight itself.

    Create it before the model is loaded. `places`: record place sums as well.
    """

    def __init__(self) -> None:
        from vllm.model_executor.layers import utils

        self.places = True
        dispatch: Callable[..., None] = utils.dispatch_cpu_unquantized_gemm

        def recording(layer: nn.Module, remove_weight: bool) -> None:
            weight = layer.weight
            if isinstance(weight, torch.Tensor) and not weight.is_meta:
                setattr(layer, _HELD, (bit_sum(weight), place_sum(weight) if self.places else None))
            dispatch(layer, remove_weight)

        utils.dispatch_cpu_unquantized_gemm = recording
        self._dispatch = recording

    def dispatch_again(self, layer: nn.Module) -> None:
        """Make the layer's kernel again, from its current weight."""
        self._dispatch(layer, remove_weight=False)


class Reloader:
    """Loads weights into the model of a vLLM worker in this process."""

    def __init__(self, worker: Any, watch: KernelWatch) -> None:
        self._worker = worker
        self._watch = watch
        self.model: nn.Module = worker.model_runner.get_model()
        self._repacked: set[int] = set()  # ids of the fused experts that vLLM's reload has repacked itself
        self._undo: list[Callable[[], None]] = []
        self._direct: DirectLoader | None = None  # used in place of vLLM's reload, if set
        self._names: set[str] = set()  # of the checkpoint's tensors, since `prove`

    @contextmanager
    def _vllm_config(self) -> Iterator[None]:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self._worker.vllm_config):
            yield

    def begin(self, *, native: bool = False) -> None:
        """Begin a weight update. native: vLLM's weight transfer engine has already initialized the reload."""
        if self._direct is not None:
            self._direct.begin()
            return
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._repacked.clear()
        for _, fused in self._fused_experts():
            self._record_repacking(fused)
        if not native:
            with self._vllm_config():
                initialize_layerwise_reload(self.model)

    def load(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load some tensors, by checkpoint name."""
        with self._vllm_config():
            if self._direct is not None:
                self._direct.load(named)
            else:
                self.model.load_weights(named)  # pyright: ignore[reportCallIssue]

    @torch.no_grad()
    def finish(self, *, native: bool = False) -> None:
        """End the weight update: every kernel uses the loaded weights afterwards. native: as in `begin`."""
        with self._vllm_config():
            if self._direct is not None:
                self._direct.finish()
                written = self._direct.written
                stale = [layer for layer, _ in self._kernels() if id(layer.weight) in written]
            else:
                self._finish_reload(native)
                stale = [layer for layer, held in self._kernels() if layer.weight.numel() and bit_sum(layer.weight) != held[0]]
            for layer in stale:
                self._watch.dispatch_again(layer)

    def _finish_reload(self, native: bool) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if not native:
            finalize_layerwise_reload(self.model, self._worker.model_config)
        for layer, fused in self._fused_experts():
            if id(fused) not in self._repacked:
                fused.process_weights_after_loading(layer)
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _fused_experts(self) -> Iterator[tuple[nn.Module, Any]]:
        """(layer of experts, its kernel) on the CPU backend; none elsewhere."""
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():  # vLLM 0.26 has no such module there
            return
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

        for layer in self.model.modules():
            kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
            fused = getattr(kernel, "fused_experts", None)
            if isinstance(fused, CPUUnquantizedExperts):
                yield layer, fused

    def _record_repacking(self, fused: Any) -> None:
        process = fused.process_weights_after_loading

        def recording(layer: nn.Module) -> None:
            self._repacked.add(id(fused))
            process(layer)

        fused.process_weights_after_loading = recording
        self._undo.append(lambda: delattr(fused, "process_weights_after_loading"))

    def _kernels(self) -> Iterator[tuple[Any, tuple[int, int | None]]]:
        """(layer, sums of the weight its kernel was made from), for linear layers and heads on the CPU backend."""
        for layer in self.model.modules():
            held = getattr(layer, _HELD, None)
            if held is not None:
                yield layer, held

    def sums(self) -> dict[str, int]:
        """Bit sum of each group of the weights that the kernels use."""
        by_parameter = self.parameter_sums()
        sums = {name: value for name, value in by_parameter.items() if name.endswith(STALE)}
        add_sums(sums, [item for item in by_parameter.items() if item[0] not in sums])
        return sums

    def parameter_sums(self) -> dict[str, int]:
        """Bit sum of each of `_stored`. A kernel made from other values adds its sum, under the name plus STALE."""
        sums: dict[str, int] = {}
        discarded: dict[int, int] = {}  # id of a parameter -> sum of its discarded weight
        kept: dict[int, set[int]] = {}  # id of a parameter that still exists -> sums that its kernels were made from
        for layer, (held, _) in self._kernels():
            if layer.weight.numel():
                kept.setdefault(id(layer.weight), set()).add(held)
            else:
                discarded[id(layer.weight)] = held
        parameters = dict(self._stored())
        in_use = [parameter for parameter in parameters.values() if id(parameter) not in discarded]
        values = discarded | dict(zip(map(id, in_use), bit_sums(in_use), strict=True))
        for name, parameter in parameters.items():
            value = sums[name] = values[id(parameter)]
            for held in kept.get(id(parameter), set()) - {value}:
                sums[name + STALE] = held  # an outdated kernel: the trainer has no group of that name
        return sums

    def of_other_dtype(self, dtype: torch.dtype) -> list[str]:
        """Names of the floating-point parameters that this vLLM keeps in another dtype than `dtype`, each with its dtype."""
        named = [(name, p.dtype) for name, p in self._stored() if p.is_floating_point()]
        return [f"{name} ({str(own).removeprefix('torch.')})" for name, own in named if own != dtype]

    def places(self) -> dict[str, int | None]:
        """Place sum of each parameter, or of the discarded weight its kernel was made from. Only valid inside `prove` and right
        after it."""
        discarded = {id(layer.weight): held[1] for layer, held in self._kernels() if not layer.weight.numel()}
        named = self._stored()
        return {name: discarded[id(p)] if id(p) in discarded else place_sum(p) for name, p in named}

    def _stored(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every parameter of vLLM's model, and of every buffer that the checkpoint has under the same name."""
        yield from self.model.named_parameters()
        yield from ((name, buffer) for name, buffer in self.model.named_buffers() if name in self._names)

    def _layout(self) -> dict[str, int | None]:
        """Place sum of every parameter that a kernel reads, and of the weight that every packed kernel was made from."""
        layout: dict[str, int | None] = {name: place_sum(p) for name, p in self.model.named_parameters() if p.numel()}
        names = {id(module): name for name, module in self.model.named_modules()}
        return layout | {names[id(layer)] + STALE: held[1] for layer, held in self._kernels()}

    def prove(self, checkpoint: Callable[[], Iterable[tuple[str, torch.Tensor]]], *, direct: bool) -> str:
        """Load the model's own checkpoint a second time and check that every kernel's memory is as before.

        direct: try `DirectLoader` first. Returns "direct" if that restores every weight, else the reason for vLLM's own reload.
        Raises RuntimeError if vLLM's reload lays weights out differently from the first load: every sync would be wrong.
        """
        self._watch.places = True
        before = self._layout()
        why = self._prove_direct(checkpoint, before) if direct else "this device uses vLLM's own reload"
        if why != "direct":
            wrong = self._load_again(checkpoint(), before)
            if wrong:
                raise RuntimeError(
                    f"this vLLM does not restore {len(wrong)} of {len(before)} weights when they are loaded again, first "
                    f"{wrong[0]}: its samples would be wrong after the first weight sync. Set rollout.engine to 'local', or "
                    "install another version of vLLM"
                )
        self._watch.places = False
        return why

    def _prove_direct(self, checkpoint: Callable[[], Iterable[tuple[str, torch.Tensor]]], before: dict[str, int | None]) -> str:
        """Select `DirectLoader` and return "direct" if it restores every weight; otherwise return the reason."""
        from vllm.platforms import current_platform

        if current_platform.is_zen_cpu():
            return "zentorch's kernels may read weights where they arrive"
        try:
            shapes = {name: tensor.shape for name, tensor in checkpoint()}
            self._direct = DirectLoader(self.model, shapes, self._fused_experts())
        except UnknownLayoutError as error:
            return str(error)
        wrong = self._load_again(checkpoint(), before)
        if wrong:
            self._direct = None
            return f"loaded directly, {len(wrong)} of {len(before)} weights differ from those that vLLM loads, first {wrong[0]}"
        self._drop_unused_kernels()
        return "direct"

    def _load_again(self, checkpoint: Iterable[tuple[str, torch.Tensor]], before: dict[str, int | None]) -> list[str]:
        """Load the checkpoint; returns the sorted names of weights whose place sums differ from `before`."""
        self.begin()
        self.load(self._noted(checkpoint))
        self.finish()
        after = self._layout()
        return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))

    def _noted(self, checkpoint: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in checkpoint:
            self._names.add(name)
            yield name, tensor

    def _drop_unused_kernels(self) -> None:
        """Drop the packed kernels of embeddings that are not also a head: only a head computes that matrix product, and making
        these kernels at every sync would be wasted."""
        names: dict[int, int] = {}
        for _, module in self.model.named_modules(remove_duplicate=False):
            names[id(module)] = names.get(id(module), 0) + 1
        for layer, _ in list(self._kernels()):
            if type(layer).__name__ == "VocabParallelEmbedding" and names[id(layer)] == 1 and layer.weight.numel():
                del layer.cpu_linear  # a call would raise, instead of using outdated weights
                delattr(layer, _HELD)
