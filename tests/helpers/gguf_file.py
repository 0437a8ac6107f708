"""A tiny GGUF file with random weights, and what it stands for."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = ["red shoes size 42 for 1999 men", "Ünïcode ½ title, 128GB\n\nit's new", "usb c cable 2 m 60w"] * 3
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADS, KV_HEADS, WIDTH, LAYERS, INNER = 4, 2, 64, 2, 96
HEAD = {"llama": 16, "qwen2": 16, "qwen3": 32}  # width of an attention head


def bpe(pre: str) -> Tokenizer:
    """A byte-level tokenizer with the pre-tokenizer that the original models have."""
    tokenizer = Tokenizer(models.BPE())
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    # All merges of digits exist: only the pre-tokenizer keeps them apart.
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.train_from_iterator(TEXTS, trainer)
    tokenizer.model = plain.model
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def weights(num_tokens: int, architecture: str, tied: bool) -> dict[str, np.ndarray]:
    """Random tensors by transformers' names."""
    rng, head = np.random.default_rng(random.randrange(1 << 30)), HEAD[architecture]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (num_tokens, WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (num_tokens, WIDTH)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
        for name, rows in (("q", HEADS * head), ("k", KV_HEADS * head), ("v", KV_HEADS * head)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, WIDTH)
            if architecture == "qwen2":
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (rows,)
        if architecture == "qwen3":
            shapes |= {f"{at}.self_attn.{name}_norm.weight": (head,) for name in ("q", "k")}
        shapes[f"{at}.self_attn.o_proj.weight"] = (WIDTH, HEADS * head)
        shapes |= {f"{at}.mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (WIDTH, INNER)
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection as llama.cpp stores them for architecture llama: the halves of each rotary head in turn."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, architecture: str = "llama", pre: str = "smollm", tied: bool = True, **extra: Any
) -> tuple[dict[str, torch.Tensor], Tokenizer]:
    """A tiny GGUF file; returns the weights that it stands for, dequantized by the package gguf, and its tokenizer.

    extra: keys of the metadata below the architecture (`_` for `.`), `tensor` (name of a tensor too many), `drop` (of one that is
    left out) and `rotated` (width of a head's rotated part).
    """
    drop, tensor, rotated = extra.pop("drop", ""), extra.pop("tensor", ""), extra.pop("rotated", 0)
    tokenizer, writer = bpe(pre), gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    if architecture == "llama":
        writer.add_rope_dimension_count(rotated or HEAD[architecture])
    if architecture != "qwen2":
        writer.add_key_length(HEAD[architecture])
    for key, value in extra.items():
        writer.add_string(f"{architecture}.{key.replace('_', '.')}", value)
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in vocab])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), LAYERS)
    kinds, wanted = [Kind.Q8_0, Kind.Q4_1, Kind.F16], {}
    for name, weight in weights(len(vocab), architecture, tied).items():
        stem, _, suffix = name.rpartition(".")
        kind = Kind.F32 if weight.ndim == 1 else random.choice(kinds)
        wanted[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(weight, kind), kind).copy())
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            weight = interleaved(weight, HEADS if stem.endswith("q_proj") else KV_HEADS)
        if name != drop:
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", gguf.quantize(weight, kind), raw_dtype=kind)
    if tensor:
        writer.add_tensor(tensor, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted, tokenizer
