"""Reads the folder of a Hugging Face checkpoint: exactly the tensors that its config.json asks for, each with its shape, a
floating dtype and finite values. Code in the folder never runs, and nobody is asked whether to run it; no pickle is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from srpo.core.errors import UserError, naming
from srpo.core.files import check_not_adapter
from srpo.core.jsonl import json_file
from srpo.policy.stored_names import check_uses, unfit_names

_FLOATS = {"F64", "F32", "F16", "BF16"}  # names in a safetensors header
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# Settings of a config that choose some of a number of things, and those that say how many there are.
_CHOICES = (
    (
        ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k"),
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    ),
    (("topk_group",), ("n_group",)),
)
# Transformers says that a folder is wrong with any of these, and passes on what the libraries below it raise.
_LIBRARY_ERRORS = (AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
_LIBRARY_ERRORS += (SafetensorError, StrictDataclassError)


def check_folder(path: str | Path) -> None:
    """Raise UserError if the folder has no config.json."""
    check_not_adapter(path)
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"no model in {str(path)!r}: policy.path must be a folder with config.json and safetensors files")


def read_config(path: str | Path) -> PreTrainedConfig:
    """The config.json of the folder. Raises UserError if it is not that of a language model of the installed transformers."""
    check_folder(path)
    file = Path(path) / "config.json"
    fields = json_file(file, "the file of the checkpoint")
    if fields.get("quantization_config"):
        raise UserError(f"{file} says that the weights are quantized, which srpo cannot train: give them in bf16 or fp32")
    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except _LIBRARY_ERRORS as error:
        raise UserError(f"{file} is not the config of a model that transformers knows ({_line(error)}): correct it") from error
    if config.get_text_config() is not config:
        raise UserError(
            f"{str(path)!r} holds a model of type {config.model_type!r}, which is a language model and more: save its language "
            "model alone, and name that folder"
        )
    if named := getattr(config, "transformers_weights", None):
        raise UserError(f"{file}: transformers_weights names the file {named!r} for the weights: remove it and use {_SINGLE}")
    for chosen, total in _CHOICES:
        _check_choice(file, config, chosen, total)
    return config


def read_model(
    path: str | Path, config: PreTrainedConfig, *, attention: str, experts: str, dtype: torch.dtype
) -> PreTrainedModel:
    """The causal LM of the folder on the CPU, its parameters in `dtype`. Raises UserError that names the first wrong tensor."""
    files = _weight_files(Path(path))
    stored = [name for file in files for name in _names(file)]
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(path),
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                experts_implementation=experts,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are in `info`
                output_loading_info=True,
            )
    except _LIBRARY_ERRORS as error:
        raise UserError(f"the model in {str(path)!r} cannot be loaded ({_line(error)}): give another checkpoint") from error
    model, info = loaded
    _check_tensors(path, model, info, stored)
    _check_dtypes(files, model)
    _restore_embedding(files, model)
    _check_finite(path, model.state_dict().items())
    return model


def check_stored(path: str | Path) -> None:
    """Raise UserError for names of the folder's tensors that do not fit its config.json, and for a tensor that is stored as no
    number with a fraction, or is not finite.

    For a checkpoint that another program loads, vLLM, which itself refuses shapes that do not fit. One tensor is in memory at a
    time.
    """
    config, files = read_config(path), _weight_files(Path(path))
    _check_others(Path(path), files)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    stored_names = [name for file in files for name in _names(file)]
    _check_names(path, *unfit_names(model, stored_names))
    check_uses(_unfit(path), model, stored_names)
    try:
        _check_dtypes(files, model)
        for file in files:
            with naming(file), safe_open(file, framework="pt") as stored:
                _check_finite(path, ((name, stored.get_tensor(name)) for name in list(stored.keys())))
    except SafetensorError as error:
        raise UserError(f"the model in {str(path)!r} cannot be loaded ({_line(error)}): give another checkpoint") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings; what they say of a model that is loaded is an error here."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _check_choice(file: Path, config: PreTrainedConfig, chosen: Iterable[str], total: Iterable[str]) -> None:
    """Raise UserError if one of the settings `chosen` is more than the setting of `total` that the config has."""
    sizes = {name: value for name in total if type(value := getattr(config, name, None)) is int and value > 0}
    for name in chosen if sizes else ():
        value = getattr(config, name, None)
        if type(value) is int and not 0 <= value <= min(sizes.values()):
            of, size = min(sizes.items(), key=lambda item: item[1])
            raise UserError(f"{file}: {name} is {value}, and {of} is {size}: set {name} to the model's own, at most {size}")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the folder. UserError unless each tensor is in one of them, in the one that the index names."""
    single = (folder / _SINGLE).is_file()
    if not (folder / _INDEX).is_file():
        if single:
            return [folder / _SINGLE]
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        other = f"; {pickles[0]} is a pickle, which could run code, so it is not read" if pickles else ""
        raise UserError(f"no weights in {str(folder)!r}: it needs {_SINGLE}, or {_INDEX} and the files it names{other}")
    index = json_file(folder / _INDEX, "the file of the checkpoint").get("weight_map")
    if not isinstance(index, dict) or not index:
        raise UserError(f"{folder / _INDEX} has no weight_map: restore it")
    files = [folder / str(name) for name in sorted(set(map(str, index.values())))]
    if single and files != [folder / _SINGLE]:
        raise UserError(
            f"{folder / _SINGLE}: {_INDEX} beside it names other files, such as {files[0].name}: remove {_SINGLE}, or the index "
            "and its files, whichever is not the checkpoint's"
        )
    for file in files:
        if file.parent != folder:
            raise UserError(f"{folder / _INDEX} names {file}, which is not in its folder: restore it")
        if not file.is_file():
            raise UserError(f"{file} is missing, and {_INDEX} names it: restore it")
    _check_index(folder, index, files)
    return files


def _check_index(folder: Path, index: dict[str, Any], files: Iterable[Path]) -> None:
    """Raise UserError unless the files hold the tensors of the index, each in its own file alone."""
    holder: dict[str, Path] = {}
    for file in files:
        for name in _names(file):
            if name in holder:
                raise UserError(f"{file}: tensor {name} is also in {holder[name].name}: restore the checkpoint")
            holder[name] = file
    for name, file in holder.items():
        if name not in index:
            raise UserError(f"{file}: tensor {name} is not in {_INDEX}: restore the checkpoint")
        if str(index[name]) != file.name:
            raise UserError(f"{file}: tensor {name} belongs in {index[name]}, says {_INDEX}: restore the checkpoint")
    if missing := sorted(index.keys() - holder.keys()):
        raise UserError(f"{folder / index[missing[0]]}: tensor {missing[0]} is missing, and {_INDEX} names it: restore it")


def _check_others(folder: Path, files: list[Path]) -> None:
    """Raise UserError for more safetensors files than the checkpoint's in a folder without an index: vLLM loads them all."""
    others = sorted(set(folder.glob("*.safetensors")) - set(files))
    if others and not (folder / _INDEX).is_file():
        raise UserError(f"{others[0]}: vLLM would load it beside {_SINGLE}: move it out of the folder")


def _names(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file. UserError if it is damaged."""
    try:
        with naming(file), safe_open(file, framework="pt") as stored:
            return list(stored.keys())
    except SafetensorError as error:
        raise UserError(f"{file} cannot be loaded ({_line(error)}): give another checkpoint, or restore it") from error


def _unfit(path: str | Path) -> str:
    return f"the weights in {str(path)!r} do not fit their config.json"


def _check_names(path: str | Path, missing: list[str], unexpected: list[str]) -> None:
    """Raise UserError for the first tensor that is missing or has no place in the model."""
    if missing:
        raise UserError(f"{_unfit(path)}: {len(missing)} tensors are missing, first {missing[0]}. Restore the checkpoint")
    if unexpected:
        raise UserError(
            f"{_unfit(path)}: {len(unexpected)} tensors have no place in the model, first {unexpected[0]}: remove them"
        )


def _check_tensors(path: str | Path, model: PreTrainedModel, info: dict[str, Any], stored: Iterable[str]) -> None:
    """Raise UserError unless the stored tensors are exactly those of the config.json; tied tensors need to be there once."""
    _check_names(path, sorted(info["missing_keys"]), [])
    check_uses(_unfit(path), model, stored)
    if mismatched := sorted(info["mismatched_keys"]):
        name, shape, wanted = mismatched[0]
        raise UserError(
            f"{_unfit(path)}: {len(mismatched)} tensors have another shape, first {name}, {tuple(shape)} in place of "
            f"{tuple(wanted)}. Restore the checkpoint"
        )
    _check_names(path, [], sorted(info["unexpected_keys"]))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and isinstance(head, nn.Linear) and head.weight is not embedding.weight:
        raise UserError(
            f"{_unfit(path)}: they differ in 1 parameters or buffers, first lm_head.weight. Correct config.json "
            "(tie_word_embeddings: whether the head shares the embedding's weight)"
        )


def _check_dtypes(files: list[Path], model: PreTrainedModel) -> None:
    """Raise UserError for a stored tensor that is no number with a fraction, unless the model's own is none, or is not stored."""
    own = {name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for file in files:
        with naming(file), safe_open(file, framework="pt") as stored:
            dtypes = {name: stored.get_slice(name).get_dtype() for name in list(stored.keys())}
        for name, dtype in dtypes.items():
            known = dtype in _FLOATS or any(f".{whole}".endswith(f".{name}") for whole in own)
            if not known and not any(pattern.search(name) for pattern in ignored):
                raise UserError(
                    f"{file}: tensor {name} is stored as {dtype}, and the model needs one of {', '.join(sorted(_FLOATS))}: give "
                    "the checkpoint as it was before it was quantized, or restore it"
                )


@torch.no_grad()
def _restore_embedding(files: list[Path], model: PreTrainedModel) -> None:
    """Copy the embedding from its file once more: transformers zeroes its padding row after loading it, in families whose
    initialization does not ask whether a weight is new (Youtu)."""
    embedding: Any = model.get_input_embeddings().weight
    names = {name for name, param in model.named_parameters(remove_duplicate=False) if param is embedding}
    for file in files:
        with naming(file), safe_open(file, framework="pt") as stored:
            for name in names & set(stored.keys()):
                embedding.copy_(stored.get_tensor(name))


def _check_finite(path: str | Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise UserError for a tensor with a value that is not finite."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and not bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
            raise UserError(f"the weights in {str(path)!r} are not all finite, first {name}: give an earlier checkpoint")


def _line(error: Exception) -> str:
    """One line of a library's error."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
