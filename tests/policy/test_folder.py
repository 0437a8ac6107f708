"""The files of a checkpoint are checked: one sentence names the folder and the first wrong tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import policy_lab as lab
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import YoutuConfig, YoutuForCausalLM

from srpo.core.errors import UserError
from srpo.policy.critic import Critic
from srpo.policy.folder import check_stored
from srpo.policy.loading import load_to_shard
from srpo.policy.model import load_policy, make_tiny
from srpo.policy.scalar import load_scalar

Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.1.mlp.experts.1."
INDEX = "model.safetensors.index.json"


def saved(folder: Path) -> Path:
    make_tiny(lab.tokenizer(), lab.CONFIG, 0).save_pretrained(folder)
    lab.tokenizer().save_pretrained(folder)
    return folder


def rewritten(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    """The folder, with other tensors in its file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reconfigured(folder: Path, **fields: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def renamed(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[f"other.{name}"] = tensors.pop(name)


def moved(old: str, new: str) -> Callable[[Tensors], None]:
    """Rename every tensor whose name begins with `old`."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def copied(old: str, new: str) -> Callable[[Tensors], None]:
    """Store every tensor whose name begins with `old` once more, with other values."""
    return lambda tensors: tensors.update(
        {name.replace(old, new): tensor + 1 for name, tensor in tensors.items() if name.startswith(old)}
    )


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1, 2] = value
        return tensor

    return change


TENSORS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "head": (lambda tensors: tensors.pop("lm_head.weight"), r"1 tensors are missing, first lm_head\.weight"),
    "inner": (lambda tensors: tensors.pop(LAYER), f"missing, first {re.escape(LAYER)}"),
    "all": (renamed, r"tensors are missing, first lm_head\.weight"),
    "more": (lambda tensors: tensors.update(extra=torch.ones(2)), "no place in the model, first extra"),
    "size": (put("lm_head.weight", lambda t: t[:40]), r"another shape, first lm_head\.weight, \(40, 32\) in place of \(50, 32\)"),
    "int8": (put(LAYER, lambda t: t.to(torch.int8)), f"{re.escape(LAYER)} is stored as I8"),
    "bool": (put(LAYER, lambda t: t.bool()), f"{re.escape(LAYER)} is stored as BOOL"),
    "float8": (put("model.norm.weight", lambda t: t.to(torch.float8_e4m3fn)), r"model\.norm\.weight is stored as F8_E4M3"),
    "expert_moved": (
        moved(EXPERT, "model.layers.1.mlp.experts.7."),
        r"experts\.2\..* where number 1 belongs",
    ),
    "projection_moved": (
        moved(f"{EXPERT}up_proj", "model.layers.1.mlp.experts.9.up_proj"),
        r"experts\.2\.up_proj\.weight stands where number 1 belongs in model\.layers\.1\.mlp\.experts\.gate_up_proj",
    ),
    "first_expert_moved": (moved("model.layers.0.mlp.experts.0.", "model.layers.0.mlp.experts.4."), "where number 0 belongs"),
    "expert_copied": (copied(EXPERT, EXPERT.removeprefix("model.")), r"layers\.1\..* and model\.layers\.1\..* both become"),
    "expert_elsewhere": (moved(EXPERT, "layers.1.mlp.experts.1."), r"number 0 belongs"),
    "twice": (
        copied("model.layers.0.self_attn", "layers.0.self_attn"),
        r"layers\.0\.self_attn\.k_norm\.weight and model\.layers\.0\.self_attn\.k_norm\.weight both become model\.layers\.0",
    ),
    "nan": (put("lm_head.weight", with_value(float("nan"))), r"not all finite, first lm_head\.weight"),
    "inf": (put("model.embed_tokens.weight", with_value(float("-inf"))), r"not all finite, first model\.embed_tokens\.weight"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_wrong_tensor_is_named(name: str, tmp_path: Path) -> None:
    change, message = TENSORS[name]
    folder = rewritten(saved(tmp_path), change)
    for load in (load_policy, load_scalar, lambda path: Critic(load_to_shard(path, lab.one_process()))):
        with pytest.raises(UserError, match=message) as refused:
            load(folder)
        assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [*(name for name in TENSORS if name != "size"), "cut"])
def test_what_vllm_would_not_refuse_is_refused_before_it_loads(name: str, tmp_path: Path) -> None:
    check_stored(folder := saved(tmp_path))
    if name == "cut":
        message = "cannot be loaded"
        cut(folder / "model.safetensors")
    else:
        change, message = TENSORS[name]
        rewritten(folder, change)
    with pytest.raises(UserError, match=message) as refused:
        check_stored(folder)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 3}, r"tensors are missing, first model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"no place in the model, first model\.layers\.1\."),
        ({"vocab_size": 60}, r"another shape, first lm_head\.weight, \(50, 32\) in place of \(60, 32\)"),
        ({"hidden_size": "wide"}, "config.json is not the config of a model"),
        ({"model_type": "unheard_of"}, "config.json is not the config of a model that transformers knows"),
        ({"model_type": "bert"}, "'bert'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weights are quantized"),
        ({"num_experts_per_tok": 9}, r"config\.json: num_experts_per_tok is 9, and num_experts is 4: set num_experts_per_tok to"),
        ({"transformers_weights": "other.safetensors"}, r"config\.json: transformers_weights names the file 'other.safetensors'"),
        ({"tie_word_embeddings": True}, r"first lm_head\.weight.*tie_word_embeddings"),
        ({"model_type": "gemma3", "text_config": {}, "vision_config": {}}, "'gemma3', which is a language model and more"),
    ],
)
def test_a_config_that_does_not_fit_is_named(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_policy(reconfigured(saved(tmp_path), **fields))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def pickled(file: Path) -> None:
    file.rename(file.with_name("pytorch_model.bin"))


def sharded(file: Path) -> None:
    file.with_name("model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model-1-of-2.safetensors"}}')
    file.unlink()


def in_shards(file: Path, *, twice: str = "", unnamed: str = "", other: str = "", absent: str = "", keep: bool = False) -> None:
    """Two shards and their index, with one fault."""
    tensors = load_file(file)
    names = ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
    shards: list[Tensors] = [{}, {}]
    index: dict[str, str] = {}
    for i, name in enumerate(sorted(tensors)):
        shards[i % 2][name] = tensors[name]
        index[name] = names[i % 2]
        if name == twice:
            shards[1 - i % 2][name] = tensors[name] + 1
        if name == other:
            index[name] = names[1 - i % 2]
    if absent:
        index[absent] = names[0]
    index.pop(unnamed, None)
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, file.with_name(name), metadata={"format": "pt"})
    file.with_name(INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if not keep:
        file.unlink()


def test_shards_are_the_same_checkpoint(tmp_path: Path) -> None:
    whole = dict(load_policy(saved(tmp_path)).named_parameters())
    in_shards(tmp_path / "model.safetensors")
    assert lab.same_bits(dict(load_policy(tmp_path).named_parameters()), whole)
    check_stored(tmp_path)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"twice": LAYER}, f"model-2-of-2.safetensors: tensor {LAYER} is also in model-1-of-2.safetensors: restore"),
        ({"unnamed": LAYER}, f"tensor {LAYER} is not in {INDEX}"),
        ({"other": LAYER}, f"tensor {LAYER} belongs in model-.-of-2.safetensors, says {INDEX}"),
        ({"absent": "model.extra"}, f"tensor model.extra is missing, and {INDEX} names it"),
        ({"keep": True}, f"model.safetensors: {INDEX} beside it names other files, such as model-1-of-2.safetensors: remove"),
    ],
)
def test_each_tensor_is_where_the_index_says(fault: dict[str, Any], message: str, tmp_path: Path) -> None:
    in_shards(saved(tmp_path) / "model.safetensors", **fault)
    for check in (load_policy, check_stored):
        with pytest.raises(UserError, match=message) as refused:
            check(tmp_path)
        assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_vllm_would_load_every_file_of_a_folder_without_an_index(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.ones(2)}, saved(tmp_path) / "older.safetensors")
    with pytest.raises(UserError, match=r"older\.safetensors: vLLM would load it beside model\.safetensors: move it out"):
        check_stored(tmp_path)


def outside(file: Path) -> None:
    file.with_name("model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "../model.safetensors"}}')
    file.unlink()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", cut, "cannot be loaded .SafetensorError"),
        ("model.safetensors", lambda file: file.write_bytes(b""), "cannot be loaded .SafetensorError"),
        ("model.safetensors", Path.unlink, "no weights in"),
        ("model.safetensors", pickled, r"pytorch_model\.bin is a pickle"),
        ("model.safetensors", sharded, r"model-1-of-2\.safetensors is missing"),
        ("model.safetensors", outside, "which is not in its folder"),
        ("config.json", cut, r"config\.json: not JSON"),
        (
            "config.json",
            lambda file: file.write_text("[]"),
            r"config\.json: a JSON list, not an object: write the file of the checkpoint",
        ),
        ("config.json", lambda file: file.write_bytes(b"\xff\xfe{"), r"config\.json: not UTF-8"),
        ("config.json", Path.unlink, r"no model in .*config\.json"),
    ],
)
def test_a_damaged_file_is_one_sentence(name: str, damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    damage(saved(tmp_path) / name)
    with pytest.raises(UserError, match=message) as refused:
        load_policy(tmp_path)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_code_in_the_folder_neither_runs_nor_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    ran = tmp_path / "ran"
    for name in ("own_config", "own_model"):
        (saved(tmp_path) / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')\n")
    code = {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    load_policy(reconfigured(tmp_path, auto_map=code))  # transformers' own class of this type
    with pytest.raises(UserError, match="not the config of a model that transformers knows"):
        load_policy(reconfigured(tmp_path, auto_map=code, model_type="own"))
    assert not asked and not ran.exists()


def test_every_row_of_the_embedding_is_that_of_the_file(tmp_path: Path) -> None:
    """Transformers' own loading of this family zeroes the row of the padding token."""
    sizes: dict[str, Any] = {
        "num_key_value_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    lora: dict[str, Any] = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = YoutuConfig(vocab_size=lab.VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes, **lora)
    model: Any = YoutuForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path)
    assert lab.same_bits(dict(load_policy(tmp_path).named_parameters()), dict(model.named_parameters()))
