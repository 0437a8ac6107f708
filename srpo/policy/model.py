"""The policy's model: a causal LM of transformers, a tiny mixture of experts for laptops, and the forward over a packed `Batch`.

Letters: T packed rows, R rows that have a label, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

from srpo.core.batch import IGNORE, Batch
from srpo.core.config.demo import TinyConfig
from srpo.core.errors import UserError
from srpo.core.files import whole_folder, write_texts
from srpo.policy.adapters import adapter_folder, as_started, has_adapter, iter_merged_params, save_adapter
from srpo.policy.attention import ATTENTION, registered_attention
from srpo.policy.experts import registered_name
from srpo.policy.folder import read_config, read_model
from srpo.policy.forward import context_of, for_head, hidden_states, make_deterministic
from srpo.policy.parallel import current_rank, unwrap
from srpo.policy.probe import check_family, logit_operations
from srpo.policy.routing import Routers

logging.disable_progress_bar()  # of transformers' reading and writing of weights; the programs show their own progress


def make_tiny(
    tokenizer: PreTrainedTokenizerBase, config: TinyConfig, seed: int, *, experts: str = "grouped_mm"
) -> Qwen3MoeForCausalLM:
    """A new Qwen3-MoE in fp32 for this tokenizer.

    The same seed gives the same parameters; the global random generators keep their state.
    """
    hf_config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.expert_size * config.experts_per_token,
        moe_intermediate_size=config.expert_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,  # pyright: ignore[reportCallIssue]
        num_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
        norm_topk_prob=True,
        output_router_logits=False,
        router_aux_loss_coef=0.0,
        initializer_range=config.initializer_range,
        max_position_embeddings=config.max_context,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=ATTENTION,  # pyright: ignore[reportCallIssue]
        experts_implementation=registered_name(experts),  # pyright: ignore[reportCallIssue]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3MoeForCausalLM(hf_config)


def load_policy(
    path: str | Path, *, experts: str = "grouped_mm", attention: str = "torch", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The causal LM in the Hugging Face folder `path`, on the CPU, with srpo's attention and experts, its parameters in `dtype`.

    experts, attention: as in `policy.experts` and `policy.attention`. Raises UserError if the folder holds no model, if its
    tensors are not those of its config.json (`srpo.policy.folder`), and for a kind of model that srpo does not compute right
    (`srpo.policy.probe`).
    """
    implementations = {"experts": registered_name(experts), "attention": registered_attention(attention)}
    config = read_config(path)
    try:
        check_family(config, experts=experts)
    except UserError as error:
        raise UserError(f"{str(path)!r}: {error}") from error
    return read_model(path, config, **implementations, dtype=dtype)


def check_head(model: PreTrainedModel, inputs: str) -> None:
    """Raise UserError if the loss cannot reproduce how the model turns hidden states into logits: no operation may follow the
    head, and with inputs "hidden" the head must be a single matrix."""
    name, after = type(model).__name__, logit_operations(model.config.get_text_config())
    if after:
        raise UserError(
            f"{name} changes its logits after the head ({', '.join(after)}), which srpo does not support: "
            "set policy.path to another model"
        )
    plain = type(model.lm_head) is nn.Linear and model.lm_head.bias is None
    if inputs == "hidden" and not plain:
        kind = "has a bias" if isinstance(model.lm_head, nn.Linear) else f"is a {type(model.lm_head).__name__}"
        raise UserError(
            f"inputs of the loss are 'hidden', which needs a head that is a single matrix, but the head of {name} {kind}: "
            "set inputs to 'logits'"
        )


class Policy(nn.Module):
    """A causal LM whose forward takes a `Batch`: embedding, layers and head run in one forward, under the hooks of FSDP2.

    model: with or without an adapter (`srpo.policy.adapters`).
    replay_routing: route tokens to `batch.routed_experts` if the batch has them; without it they are ignored. Raises UserError
    if it is set for a model without experts.
    """

    def __init__(self, model: PreTrainedModel, *, activation_checkpointing: bool = False, replay_routing: bool = False) -> None:
        super().__init__()
        self.model = model
        self.routers = Routers(model).open() if replay_routing else None
        self._flips: torch.Tensor | None = None
        self._started = False  # within `as_started`
        self._asking = False  # while `through` runs
        make_deterministic(model, activation_checkpointing=activation_checkpointing)

    @property
    def max_context(self) -> int:
        """Longest prompt plus response that the model supports, in tokens."""
        return context_of(self.model.config)

    def forward(self, batch: Batch, *, through: Callable[[torch.Tensor, torch.Tensor], Any] | None = None) -> Any:
        """Logits [R, V] of the rows of `batch.rows()`, in the dtype of the forward. With `through`, the result of
        `through(hidden states [R, H], head weight [V, H])` instead, for a model that passes `check_head`.

        `through` is called inside the forward because FSDP2 gathers the whole weight only there: copy the weight to keep it.
        It returns a tensor or a tuple of tensors, where FSDP2 finds them; gradient flows from these to both arguments.
        """
        routing = None
        if self.routers is not None and batch.routed_experts is not None and not self._started:
            routing = self.routers.replay(batch.routed_experts)
        hidden = for_head(self.model.config, hidden_states(self.model, batch, routing)[batch.labels != IGNORE])
        if routing is not None and routing.flips is not None:
            self._flips = routing.flips if self._flips is None else self._flips + routing.flips
        if through is None:
            return self.model.lm_head(hidden)
        before, self._asking = self._asking, True
        try:
            return through(hidden, self.model.lm_head.weight)
        finally:
            self._asking = before

    @contextmanager
    def as_started(self) -> Iterator[None]:
        """Within it the policy computes as the run started (without its adapter, or with that of `policy.lora.start`), and routes
        by itself."""
        assert has_adapter(self), "all weights train: the start is another model"
        self._started = True
        try:
            with as_started(self):
                yield
        finally:
            self._started = False

    def take_flips(self) -> torch.Tensor:
        """[2] float64, over all forwards since the last call: the number of (token, layer) pairs whose router would have chosen
        another set of experts than the replayed one, and the number of pairs with replayed experts."""
        flips, self._flips = self._flips, None
        return torch.zeros(2, dtype=torch.float64) if flips is None else flips


class Start:
    """The reference of Eq. 6 that needs no second model: a policy with an adapter, as the run started. Called like the policy,
    also inside its forward (by `through`)."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @torch.no_grad()
    def __call__(self, batch: Batch, *, through: Callable[[torch.Tensor, torch.Tensor], Any] | None = None) -> Any:
        policy = self._policy
        # FSDP2's hooks around a forward inside a forward would free the head's weight, which the outer one still needs.
        forward = policy.forward if policy._asking else policy
        with policy.as_started():
            return forward(batch, through=through)


def save_policy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: str | Path, files: Mapping[str, str] | None = None
) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load; sharded parameters are gathered, an adapter is merged
    into the weights. The adapter itself goes into `adapter_folder`, in peft's format.

    The folder appears, or replaces another one, when it is whole, with the digests of its files in COMPLETE. files: further ones,
    {name: text}.
    Collective: every rank must call it; rank 0 writes.
    """
    main = current_rank() == 0
    if has_adapter(model):
        save_adapter(model, adapter_folder(path))
    state = {name: tensor.cpu().clone() for name, tensor in iter_merged_params(model) if main}
    if main:
        with whole_folder(Path(path)) as folder:
            unwrap(model).save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)
            write_texts(folder, files or {})
