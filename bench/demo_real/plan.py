"""The stages of `make demo-real`, in chains: the stages of a chain build on one another, chains are independent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

Kind = Literal["as_it_is", "data", "sft", "grpo", "srpo"]


@dataclass(frozen=True)
class Sizes:
    """How much is trained and scored."""

    splits: int = 4  # seeds 0, 1, ... of the split by query
    shares: tuple[float, ...] = (0.25, 0.5)  # further points of the learning curve, as shares of the training queries
    curve_splits: int = 1  # splits that the learning curve is drawn from
    all_splits: int = 1  # splits on which all weights are trained, too, in place of an adapter
    num_eval: int = 400  # held-out pairs that are scored, spread over the queries; 0: all
    num_as_it_is: int = 100  # of them for the model as it is, whose responses are long
    max_new_tokens: int = 128  # longest response
    sft_steps: int = 360  # of all training queries; a share of the queries gets the same share of the steps
    sft_batch: int = 8
    sft_lr: float = 1e-3
    all_lr: float = 3e-4  # of SFT of all weights
    verdict_weight: float = 5.0  # weight of the verdict's tokens in SFT, relative to the other steps'
    rl_steps: int = 8
    num_prompts: int = 8
    group_size: int = 8
    rl_share: float = 1 / 15  # learning rate of reinforcement, relative to that of SFT
    lora_rank: int = 16
    num_world: int = 0  # pairs of the catalogue world that are added to the training pairs, with the labels of their steps


TINY = replace(
    Sizes(), splits=2, shares=(0.5,), curve_splits=1, num_eval=12, num_as_it_is=4, sft_steps=2, sft_batch=4, rl_steps=1,
    num_prompts=2, group_size=3, lora_rank=4, max_new_tokens=48,
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A split of a file of judged pairs, and the form of its training."""

    data: str  # file of judged pairs
    seed: int
    share: float = 1.0  # of the training queries
    all_weights: bool = False  # train all weights in place of an adapter

    @property
    def name(self) -> str:
        """Folder of its results."""
        ends = [f"-{self.share:g}"] if self.share < 1 else []
        return "".join([name_of(self.data), f"-{self.seed}", *ends, *(["-all"] if self.all_weights else [])])

    def sft_steps(self, sizes: Sizes) -> int:
        """Optimizer steps of SFT: as many passes over the pairs for every share of the queries."""
        return max(1, round(self.share * sizes.sft_steps))


@dataclass(frozen=True)
class Stage:
    """One stage of a part."""

    part: Part
    kind: Kind

    def cost(self, sizes: Sizes) -> int:
        """Its work, in training tokens of about one response, for the time that is left."""
        scored = (sizes.num_eval or 800) * 3 // 4
        if self.kind == "data":
            return 50
        if self.kind == "as_it_is":
            return 2 * sizes.num_as_it_is
        if self.kind == "sft":
            return self.part.sft_steps(sizes) * sizes.sft_batch + scored
        return 2 * sizes.rl_steps * sizes.num_prompts * sizes.group_size + scored

    def is_done(self, runs: Path) -> bool:
        """Whether its result is in the folder of its part."""
        return (runs / self.part.name / f"{'baselines' if self.kind == 'data' else self.kind}.json").is_file()


def name_of(data: str) -> str:
    """Short name of a file of pairs: its own, or that of its folder if it is called pairs."""
    path = Path(data)
    stem = path.name.split(".")[0]
    return path.resolve().parent.name if stem == "pairs" else stem


def chains(files: Sequence[str], sizes: Sizes) -> list[list[Stage]]:
    """All chains: for each file and split SFT, GRPO and SRPO, in the order of the splits; then all weights and the curve."""
    found: list[list[Stage]] = []

    def add(part: Part, *kinds: Kind) -> None:
        found.append([Stage(part, kind) for kind in kinds])

    for seed in range(sizes.splits):
        for data in files:
            as_it_is: tuple[Kind, ...] = () if seed else ("as_it_is",)
            add(Part(data, seed), "data", *as_it_is, "sft", "grpo", "srpo")
    for seed in range(sizes.all_splits):
        for data in files:
            add(Part(data, seed, all_weights=True), "data", "sft", "srpo")
    for share in sizes.shares:
        for seed in range(sizes.curve_splits):
            for data in files:
                add(Part(data, seed, share), "data", "sft")
    return found


def options(sizes: Sizes) -> list[tuple[str, Any]]:
    """(name, default) of each size that the command line may change."""
    return [(field.name, getattr(sizes, field.name)) for field in fields(sizes) if field.name != "shares"]
