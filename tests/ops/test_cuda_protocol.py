"""A model of the synchronisation of csrc/rows_one_read.cuh; the tests try every order of events.

Each CTA has a thread that moves data and one that computes (the barriers among the computing warps are not modelled). Loads,
stores and messages may complete at any time after they were started. Every read must find the expected value, no thread may wait
for ever, and no message may arrive at a CTA that has ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

NUM_CTAS, NUM_ROWS = 2, 5  # five rows: every barrier's parity comes round again


@dataclass(frozen=True)
class Transfer:
    """An asynchronous operation: reads `source`, which must hold `expected`, writes `target`, then counts on `barrier`."""

    owner: int
    source: Any = None
    expected: str = ""
    target: Any = None
    value: str = ""
    barrier: Any = None


@dataclass(frozen=True)
class Barrier:
    """An mbarrier with one expected arrival; `pending` is announced minus completed transfers, and may be negative."""

    phase: int = 0
    arrived: bool = False
    pending: int = 0

    def after(self, *, arrived: bool = False, pending: int = 0) -> Barrier:
        new = Barrier(self.phase, self.arrived or arrived, self.pending + pending)
        assert not (arrived and self.arrived), "two arrivals in one phase"
        return Barrier(new.phase + 1) if new.arrived and new.pending == 0 else new


@dataclass(frozen=True)
class Design:
    """The kernel's safeguards; a test removes one at a time."""

    num_slots: int = 2  # generations of messages with separate memory
    store_is_awaited: bool = True  # before the slice is loaded again
    finish_is_awaited: bool = True  # before the slice is stored
    stays_for_messages: bool = True  # a CTA ends only after receiving its last messages


@dataclass(frozen=True)
class Instruction:
    """Waits, then performs all its actions at once. If the kernel reads for some time, the model reads at the start and at the
    end; if the kernel writes for some time, the model writes at the start."""

    wait: tuple[Any, int] | None = None  # barrier, number of the phase that must have ended
    drain: bool = False  # waits for the CTA's own transfers that read
    actions: tuple[tuple[Any, ...], ...] = ()


def mover(cta: int, design: Design) -> list[Instruction]:
    """ClusterWorker::move with `bring` and `take_away`."""
    out: list[Instruction] = []
    for n in range(NUM_ROWS + 2):  # row NUM_ROWS signals the end; the one after it stores the last gradient
        slice_, job, loaded = (("slice", cta, n % 2), ("job", cta, n % 2), ("loaded", cta, n % 2))
        if n >= 2:
            store = ("start", Transfer(cta, slice_, f"gradient {n - 2}"))
            wait = (("finished", cta, n % 2), (n - 2) // 2) if design.finish_is_awaited else None
            out.append(Instruction(wait, actions=(store, ("write", job, f"job {n}"))[: 2 if n <= NUM_ROWS else 1]))
            out.append(Instruction(drain=design.store_is_awaited))
        load = ("start", Transfer(cta, target=slice_, value=f"logits {n}", barrier=loaded))
        if n < NUM_ROWS:
            out.append(Instruction(actions=(load, ("write", job, f"job {n}"), ("arrive", loaded, 1))))
        elif n == NUM_ROWS:
            out.append(Instruction(actions=(("arrive", loaded, 0),)))
    return out


def computer(cta: int, design: Design) -> list[Instruction]:
    """ClusterWorker::compute with `finish`."""
    out: list[Instruction] = []
    for n in range(NUM_ROWS):
        stage, slot = n % 2, n % design.num_slots
        own, exchanged = ("slice", cta, stage), ("exchanged", cta, slot)
        held = (("read", ("job", cta, stage), f"job {n}"), ("read", own, f"logits {n}"))
        mail = tuple(("read", ("mail", cta, slot, peer), f"sums {n}") for peer in range(NUM_CTAS))
        sent = (
            Transfer(cta, target=("mail", peer, slot, cta), value=f"sums {n}", barrier=("exchanged", peer, slot))
            for peer in range(NUM_CTAS)
        )
        out.append(Instruction((("loaded", cta, stage), n // 2), actions=held))
        out.append(Instruction(actions=(("arrive", exchanged, NUM_CTAS), *(("start", message) for message in sent))))
        if design.stays_for_messages or n < NUM_ROWS - 1:
            out.append(Instruction((exchanged, n // design.num_slots), actions=mail))
            held = (*mail, *held)
        out.append(Instruction(actions=(*held, ("write", own, f"gradient {n}"))))
        out.append(Instruction(actions=(("arrive", ("finished", cta, stage), 0),)))
    end = ("read", ("job", cta, NUM_ROWS % 2), f"job {NUM_ROWS}")
    return [*out, Instruction((("loaded", cta, NUM_ROWS % 2), NUM_ROWS // 2), actions=(end,))]


@dataclass(frozen=True)
class State:
    counters: tuple[int, ...]
    barriers: frozenset[tuple[Any, Barrier]] = frozenset()
    memory: frozenset[tuple[Any, str]] = frozenset()
    flying: frozenset[Transfer] = field(default_factory=frozenset)

    def counted(self, name: Any, **change: Any) -> State:
        barriers = dict(self.barriers)
        barriers[name] = barriers.get(name, Barrier()).after(**change)
        return replace(self, barriers=frozenset(barriers.items()))

    def written(self, place: Any, value: str) -> State:
        return replace(self, memory=frozenset({**dict(self.memory), place: value}.items()))

    def checked(self, place: Any, expected: str) -> State:
        held = dict(self.memory).get(place)
        assert held == expected, f"{place} holds {held!r}, not {expected!r}"
        return self


def successors(state: State, programs: list[list[Instruction]]) -> list[State]:
    """All states that can follow."""
    out = []
    for i, program in enumerate(programs):
        if state.counters[i] == len(program):
            continue
        now = program[state.counters[i]]
        if now.wait is not None:  # by parity, as the hardware does
            phase = dict(state.barriers).get(now.wait[0], Barrier()).phase
            if phase % 2 == now.wait[1] % 2:
                continue
        if now.drain and any(transfer.owner == i // 2 and transfer.source for transfer in state.flying):
            continue
        new = replace(state, counters=(*state.counters[:i], state.counters[i] + 1, *state.counters[i + 1 :]))
        for name, *operands in now.actions:
            if name == "arrive":
                new = new.counted(operands[0], arrived=True, pending=operands[1])
            elif name == "start":
                new = replace(new, flying=new.flying | {operands[0]})
            elif name == "write":
                new = new.written(*operands)
            else:
                new = new.checked(*operands)
        out.append(new)
    for transfer in state.flying:
        new = replace(state, flying=state.flying - {transfer})
        if transfer.source:
            new = new.checked(transfer.source, transfer.expected)
        if transfer.target:
            cta = transfer.target[1]
            gone = all(state.counters[i] == len(programs[i]) for i in (2 * cta, 2 * cta + 1))
            assert not gone, f"{transfer.value} came to CTA {cta}, which had ended"
            new = new.written(transfer.target, transfer.value)
        if transfer.barrier:
            new = new.counted(transfer.barrier, pending=-1)
        out.append(new)
    return out


def explore(design: Design) -> int:
    """Number of reachable states. Raises AssertionError if one of them is wrong."""
    programs = [program(cta, design) for cta in range(NUM_CTAS) for program in (mover, computer)]
    start = State((0,) * len(programs))
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        following = successors(state, programs)
        done = all(counter == len(program) for counter, program in zip(state.counters, programs, strict=True))
        assert following or done, f"all wait for ever at {state.counters}"
        for new in following:
            if new not in seen:
                seen.add(new)
                todo.append(new)
    return len(seen)


def test_every_order_of_events_is_right() -> None:
    assert explore(Design()) > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_slots": 1}, r"two arrivals|holds"),
        ({"store_is_awaited": False}, r"slice.* holds 'logits"),
        ({"finish_is_awaited": False}, r"slice.* holds"),
        ({"stays_for_messages": False}, r"which had ended"),
    ],
    ids=str,
)
def test_each_part_is_needed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        explore(replace(Design(), **change))
