"""Low-rank adapters (LoRA) by peft: `policy.lora`. Layers of a loaded model get factors A and B, which train; its weights do not.

A weight W then computes as W + alpha / rank * B A. Everything that leaves the trainer has this sum under the names of a model
without adapter (`iter_merged_params`): engines and checkpoints of models see no difference. Training state has A and B alone.
The reference of Eq. 6 is the same model as the run started (`as_started`): without the adapter, or with a frozen copy of the one
that it started from, which has the peft name START. So an adapter is always relative to the base that `policy.path` names.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from srpo.core.config.train import LoraConfig, PolicyConfig
from srpo.core.digests import digest_of_model
from srpo.core.errors import UserError, naming
from srpo.core.files import whole_folder
from srpo.core.jsonl import json_file
from srpo.policy.parallel import current_rank, decoder_layers, iter_full_params, named_stored, unwrap, whole

NAME, START = "default", "start"  # peft's names of the adapter that trains, and of a frozen copy of the one that it started from
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of the names in peft's files
_ROUTERS = ("gate", "router", "shared_expert_gate")
# peft takes these names for those of the experts if the model has experts in stacked parameters.
_DENSE = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
# Fields of an adapter_config.json that may differ from peft's defaults. Dropout is one of them and stays off.
_KNOWN = ("r", "lora_alpha", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern", "use_rslora")
_KNOWN += ("layers_to_transform", "layers_pattern", "exclude_modules")
_FREE = ("lora_dropout", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version")
# Fields of a config.json that do not tell one base from another.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")


def add_adapter(model: PreTrainedModel, policy: PolicyConfig, seed: int) -> PreTrainedModel:
    """The model itself, with the adapter of `policy.lora` if that is on: its weights are frozen, A and B train. B begins as zero,
    so the model computes as before, or both begin as in `policy.lora.start`.

    model: from `load_to_shard`, not yet sharded; without weights A and B have none either. seed: of the random values of A.
    Raises UserError for targets that the model does not have, and for a starting adapter that does not fit it.
    """
    lora = policy.lora
    if not lora.on:
        if lora.alpha or lora.targets:
            raise UserError("policy.lora.rank is 0, so no adapter trains, but policy.lora has other settings: set rank, or none")
        return model
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model  # takes a quarter of a second to import

    fields = _read_config(Path(lora.start), policy) if lora.start else _new_config(model, lora)
    names = (NAME, START) if lora.start else (NAME,)
    base = str(Path(policy.path).resolve())
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # that of NAME: START is the second
        torch.manual_seed(seed)
        for name in names:
            config = PeftConfig(**fields, task_type="CAUSAL_LM", base_model_name_or_path=base)
            try:
                inject_adapter_in_model(config, model, name)
            except ValueError as error:  # peft's word for targets that it cannot adapt, or does not find
                where = f"{Path(lora.start) / CONFIG} does not fit {policy.path}" if lora.start else "policy.lora.targets"
                raise UserError(f"{where}: {_line(error)}") from error
    linear, experts = _eligible(model)
    if strays := sorted(_adapted(model).keys() - {*(f"{name}.weight" for name in linear), *experts}):
        raise UserError(
            f"policy.lora would adapt {strays[0]}, which is no linear layer of a decoder layer: name targets by more of their "
            "path, such as self_attn.q_proj"
        )
    for layer in _adapted(model).values():
        layer.set_adapter(NAME)  # this one trains
    if lora.start:
        _load(model, Path(lora.start), names)
    return model


def has_adapter(policy: nn.Module) -> bool:
    """Whether `add_adapter` has given the model one."""
    return hasattr(unwrap(policy), "peft_config")


@contextmanager
def as_started(policy: nn.Module) -> Iterator[None]:
    """Within it the model computes as the run started: without its adapter, or with the one of `policy.lora.start`.

    It does not touch `requires_grad`, so it may lie between a forward and its backward.
    """
    layers = list(_adapted(unwrap(policy)).values())
    try:
        for layer in layers:
            layer._active_adapter = [START]  # peft's own setters also change which parameters train
        yield
    finally:
        for layer in layers:
            layer._active_adapter = [NAME]


@torch.no_grad()
def iter_merged_params(policy: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """`iter_full_params` of the model without adapter that computes the same: (transformers' name, W + alpha / rank * B A).

    Collective for a sharded model: every rank must iterate to the end.
    """
    if not has_adapter(policy):
        yield from iter_full_params(policy)
        return
    model = unwrap(policy)
    layers = _adapted(model)
    for name, stored in named_stored(model):
        if ".lora_" in name:
            continue
        name, tensor = _plain(name), whole(stored)
        if name in layers:
            tensor = tensor + _product(layers[name], tensor)
        yield name, tensor


@torch.no_grad()
def merged_into(policy: nn.Module, plain: PreTrainedModel) -> PreTrainedModel:
    """`plain`, the base of a policy with an adapter, with the merged weights."""
    own = dict(named_stored(plain))
    for name, tensor in iter_merged_params(policy):
        own[name].copy_(tensor)
    return plain


def adapter_folder(policy: str | Path) -> Path:
    """Folder of the adapter that a policy's folder has merged: `adapter` beside `policy`, `adapter-best` beside `policy-best`."""
    path = Path(policy)
    name = path.name.replace("policy", "adapter", 1) if path.name.startswith("policy") else f"{path.name}-adapter"
    return path.with_name(name)


def save_adapter(policy: nn.Module, path: Path) -> None:
    """Write the adapter into the folder `path`, in peft's format. It appears when it is whole. Collective: rank 0 writes."""
    main = current_rank() == 0
    model: Any = unwrap(policy)
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if f".{NAME}." in name and ".lora_" in name:
            tensor = whole(parameter)
            if main:
                state[_stored(name)] = tensor.cpu().clone().contiguous()
    if main:
        fields = model.peft_config[NAME].to_dict() | {"inference_mode": True}
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
        with whole_folder(path) as folder:
            (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
            save_file(state, folder / WEIGHTS, {"format": "pt"})


# ---- where adapters go ---------------------------------------------------------------------------------------------------------


def _new_config(model: PreTrainedModel, lora: LoraConfig) -> dict[str, Any]:
    """Fields of peft's config for the targets of `policy.lora`."""
    linear, experts = _eligible(model)

    def is_named(name: str, target: str) -> bool:
        return f".{name}".endswith(f".{target}")

    modules = {target for target in lora.targets if any(is_named(name, target) for name in linear)}
    stacked = [name for name in experts if not lora.targets or any(is_named(name, target) for target in lora.targets)]
    if not lora.targets:
        modules = {name.rpartition(".")[2] for name in linear} - {*_ROUTERS, *(_DENSE if experts else ())}
    for target in lora.targets:
        if not any(is_named(name, target) for name in (*linear, *experts)):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in (*linear, *experts)}))
            raise UserError(f"policy.lora.targets names {target!r}, which the model does not have: name some of {known}")
    if not modules and not stacked:
        raise UserError(f"policy.lora.rank is {lora.rank}, and {type(model).__name__} has no linear layers to adapt: set it to 0")
    alpha = lora.alpha or 2 * lora.rank
    return {
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # readers of peft's format expect an integer
        "target_modules": sorted(modules),
        "target_parameters": sorted({".".join(name.split(".")[-2:]) for name in stacked}),  # experts.down_proj
    }


def _eligible(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """(transformers' names of the linear layers inside the decoder layers, and of the parameters that stack experts there)."""
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    linear, experts = [], []
    for name, module in model.named_modules():
        if id(module) not in inside or ".lora_" in name:
            continue
        if isinstance(module, nn.Linear):
            linear.append(_plain(name))
        elif hasattr(module, "is_transposed"):  # experts of transformers' interface
            experts += [f"{_plain(name)}.{key}" for key, p in module.named_parameters(recurse=False) if p.ndim == 3]
    return linear, experts


def _adapted(model: PreTrainedModel) -> dict[str, Any]:
    """Transformers' name of each weight that has an adapter, with peft's layer around it."""
    layers = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            layers[f"{_plain(name)}.{getattr(module, 'parameter_name', 'weight')}"] = module
    return layers


def _plain(name: str) -> str:
    """The name that a module or a parameter has in the model without adapter."""
    return name.replace(".base_layer", "")


def _stored(name: str) -> str:
    """The name of a factor in peft's files."""
    return _PREFIX + name.replace(f".{NAME}.", ".")


def _product(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """alpha / rank * B A in the shape and dtype of the weight; peft stacks the factors of experts along the rank. Collective."""
    a, b = (whole(getattr(layer, factor)[NAME].weight) for factor in ("lora_A", "lora_B"))
    if weight.ndim == 2:
        product = b @ a
    else:
        a, b = a.view(len(weight), -1, a.shape[-1]), b.view(len(b), -1, len(weight))
        axes = "eio" if layer.get_base_layer().is_transposed else "eoi"
        product = torch.einsum(f"ore,eri->{axes}", b, a)
    return (layer.scaling[NAME] * product).to(weight.dtype)


# ---- the adapter that a run starts from ----------------------------------------------------------------------------------------


def _read_config(folder: Path, policy: PolicyConfig) -> dict[str, Any]:
    """Fields of peft's config from the folder of an adapter. Raises UserError if it is none that srpo computes right, contradicts
    `policy.lora`, or names a base with another config."""
    from peft import LoraConfig as PeftConfig

    file, lora = folder / CONFIG, policy.lora
    if not file.is_file():
        raise UserError(f"no {CONFIG} in {str(folder)!r}: policy.lora.start must be the folder of an adapter in peft's format")
    fields = json_file(file, "the file of the adapter")
    if fields.get("peft_type") != "LORA":
        raise UserError(
            f"{file} is of peft_type {fields.get('peft_type')!r}, and srpo trains LORA: give another policy.lora.start"
        )
    defaults = PeftConfig().to_dict() | {"peft_type": "LORA"}
    for key, value in fields.items():
        if key not in _KNOWN + _FREE and value and value != defaults.get(key):
            raise UserError(f"{file} sets {key} to {value!r}, which srpo does not support: give another policy.lora.start")
    own = {"rank": fields.get("r"), "alpha": fields.get("lora_alpha")}
    for name, value in own.items():
        if (wanted := getattr(lora, name)) and wanted != value:
            raise UserError(f"policy.lora.{name} is {wanted} and that of {folder} is {value}: leave it at 0, then it is the same")
    if lora.targets:
        raise UserError(f"policy.lora.targets is set, and {folder} has its own: leave targets empty")
    _check_base(file, fields.get("base_model_name_or_path"), policy.path)
    return {key: fields[key] for key in _KNOWN if fields.get(key) is not None}


def _check_base(file: Path, named: Any, path: str) -> None:
    """Raise UserError if the base that the adapter names is on this disk, and its config is another than that of `path`."""
    theirs, ours = Path(str(named)) / "config.json", Path(path) / "config.json"
    if not named or not theirs.is_file():
        return
    mine, other = (json_file(each, "the file of the checkpoint") for each in (ours, theirs))
    for key in sorted((mine.keys() | other.keys()) - set(_VOLATILE)):
        if mine.get(key) != other.get(key):
            raise UserError(
                f"{file} is an adapter of {named}, whose {key} is {other.get(key)!r}, and that of {path} is {mine.get(key)!r}: "
                "set policy.path to the base of the adapter"
            )
    if theirs.resolve() != ours.resolve() and digest_of_model(theirs.parent) != digest_of_model(ours.parent):
        raise UserError(
            f"{file} is an adapter of {named}, and {path} has other weights: set policy.path to the base of the adapter"
        )


@torch.no_grad()
def _load(model: PreTrainedModel, folder: Path, names: Sequence[str]) -> None:
    """Copy the values of the adapter in `folder` into the model's adapters `names`."""
    file = folder / WEIGHTS
    try:
        with naming(file):
            stored = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} cannot be loaded ({_line(error)}): restore it") from error
    own = {_stored(name): (name, p) for name, p in model.named_parameters() if f".{NAME}." in name and ".lora_" in name}
    advice = "set policy.path to the base of the adapter"
    for name in (*own, *stored):
        have, want = (
            tuple(each[name].shape) if name in each else "absent" for each in (stored, {k: p for k, (_, p) in own.items()})
        )
        if have != want:
            raise UserError(f"{file} does not fit the model: {name} is {have} there and {want} in the model: {advice}")
        if not bool(stored[name].isfinite().all()):
            raise UserError(f"{file}: {name} is not all finite: give an earlier adapter")
    parameters = dict(model.named_parameters())
    for key, (name, _) in own.items():
        for each in names:
            parameters[name.replace(f".{NAME}.", f".{each}.")].copy_(stored[key])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
