"""What happens in one run of the simulated world of `joinsim`: knobs of the network and a list of steps, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple


class Step(NamedTuple):
    """`gap` seconds after the step before it, `kind` happens; `a` and `b` choose what exactly."""

    gap: float
    kind: str
    a: int = 0
    b: int = 0


@dataclass(frozen=True)
class Scenario:
    """Knobs and steps. Probabilities are per message or request; times are in seconds."""

    seed: int
    steps: tuple[Step, ...]
    devices: int = 2
    history: int = 8
    loss: float = 0.0
    duplicate: float = 0.0
    disorder: float = 0.0
    failure: float = 0.0
    race_seconds: float = 0.0
    lag_seconds: float = 0.0
    latency_seconds: float = 0.01
    slow_answers: float = 0.0
    no_snapshot: float = 0.0
    projection_lag_seconds: float = 0.5
    page: int = 3
    parked_limit: int = 4
    room: int = 256
    drain_seconds: float = 0.001


@dataclass
class Knobs:
    """The knobs as they stand now."""

    loss: float
    duplicate: float
    disorder: float
    failure: float
    slow_answers: float
    no_snapshot: float
    latency_seconds: float
    page: int
    room: int
    drain_seconds: float

    @classmethod
    def of(cls, scenario: Scenario) -> Knobs:
        return cls(**{name: getattr(scenario, name) for name in cls.__dataclass_fields__})

    def heal(self) -> None:
        """No trouble any more."""
        self.loss = self.duplicate = self.disorder = self.failure = self.slow_answers = self.no_snapshot = 0.0
        self.latency_seconds, self.page, self.room, self.drain_seconds = 0.01, 256, 256, 0.001


GAPS = (0.0, 0.003, 0.02, 0.1, 0.4, 1.5, 6.0, 70.0)


@dataclass(frozen=True)
class Profile:
    """What kind of scenarios to draw: the steps with their weights, and which values the knobs may take."""

    kinds: Mapping[str, int]
    gaps: tuple[float, ...] = (8, 8, 8, 6, 5, 3, 1, 0.3)
    knobs: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    whole: float = 0.5
    """Share of the kinds that a scenario has: what it leaves out does not drown the rest."""


TROUBLE = Profile(
    kinds={
        "publish": 30, "others": 8, "connect": 10, "disconnect": 6, "cut": 4, "erase": 4, "trim": 4, "recreate": 1,
        "back": 1, "stall": 4, "lag": 3, "leaderless": 2, "apply": 1, "pong": 5, "forget": 1, "rejoin": 8, "wait": 2,
    },
    knobs={
        "loss": (0.0, 0.1, 0.4, 1.0),
        "duplicate": (0.0, 0.1, 0.3),
        "disorder": (0.0, 0.1, 0.3),
        "failure": (0.0, 0.0, 0.1, 0.3),
        "race_seconds": (0.0, 0.05, 0.3),
        "lag_seconds": (0.0, 0.05, 0.3, 3.0),
        "latency_seconds": (0.002, 0.01, 0.03),
        "slow_answers": (0.0, 0.0, 0.2),
        "no_snapshot": (0.0, 0.0, 0.3),
        "projection_lag_seconds": (0.0, 0.1, 2.0),
        "page": (1, 2, 3, 256),
        "parked_limit": (1, 2, 4, 256),
        "room": (1, 2, 8, 256),
        "drain_seconds": (0.001, 0.001, 0.05, 0.3),
    },
)  # fmt: skip
LOSSLESS = Profile(
    kinds={
        "publish": 30, "others": 8, "connect": 10, "disconnect": 6, "erase": 4, "trim": 4, "recreate": 1, "lag": 3,
        "pong": 5, "forget": 1, "rejoin": 12,
    },
    knobs={
        "race_seconds": (0.05, 0.3),
        "lag_seconds": (0.0, 0.05, 0.3, 3.0),
        "latency_seconds": (0.002, 0.01, 0.03),
        "no_snapshot": (0.0, 0.3),
        "projection_lag_seconds": (0.0, 0.1, 2.0),
        "page": (4, 256),
        "parked_limit": (1, 2, 256),
    },
)  # fmt: skip
PROMPT = Profile(
    kinds={"publish": 20, "others": 8, "disconnect": 3, "erase": 4, "pong": 5, "rejoin": 30},
    gaps=(4, 4, 4, 8, 8, 3, 0, 0),
    knobs={
        "lag_seconds": (0.0, 0.05),
        "latency_seconds": (0.005, 0.01),
        "page": (4, 256),
        "parked_limit": (1, 2, 256),
    },
    whole=0.9,
)
READING = Profile(
    kinds={"publish": 10, "others": 10, "connect": 10, "disconnect": 10, "trim": 30, "stall": 4, "forget": 4},
    gaps=(1, 1, 4, 8, 8, 8, 8, 1),
    knobs={
        "history": (8, 20),
        "lag_seconds": (0.0, 0.05),
        "latency_seconds": (0.01, 0.3),
        "slow_answers": (0.0, 0.3),
        "page": (1, 2, 3),
        "room": (1, 2, 256),
        "drain_seconds": (0.05, 0.3, 1.0),
    },
    whole=0.9,
)
ANEW = Profile(
    kinds={"publish": 30, "others": 8, "connect": 10, "forget": 20, "disconnect": 4, "recreate": 12, "back": 2},
    gaps=(4, 8, 8, 8, 8, 4, 1, 0),
    knobs={
        "duplicate": (0.1,),
        "latency_seconds": (0.01, 0.1, 0.3),
        "slow_answers": (0.0, 0.3),
        "no_snapshot": (0.0, 0.3),
        "projection_lag_seconds": (0.0, 0.1),
        "page": (1, 3, 256),
        "parked_limit": (4, 256),
    },
    whole=0.9,
)
"""The log is made anew while devices join: what was heard of the former one must not pass for the new one's."""
PROFILES = (TROUBLE, LOSSLESS, TROUBLE, PROMPT, TROUBLE, READING)
LOSSLESS_KINDS = frozenset(LOSSLESS.kinds)


def scenario(seed: int, profile: Profile | None = None) -> Scenario:
    """The scenario number `seed`; the profiles take turns unless one is given."""
    rng = Random(seed)
    profile = profile or PROFILES[seed % len(PROFILES)]
    kinds = {"publish": profile.kinds["publish"]}
    for kind, weight in profile.kinds.items():
        if rng.random() < profile.whole:
            kinds[kind] = weight * rng.choice((1, 1, 1, 6))
    names, weights = list(kinds), list(kinds.values())
    steps = tuple(
        Step(rng.choices(GAPS, profile.gaps)[0], rng.choices(names, weights)[0], rng.randrange(64), rng.randrange(64))
        for _ in range(rng.randrange(10, 60))
    )
    drawn: dict[str, Any] = {"devices": rng.randrange(1, 4), "history": rng.randrange(12)}
    drawn |= {name: rng.choice(values) for name, values in profile.knobs.items()}
    return Scenario(seed=seed, steps=(Step(0.0, "connect", 0, rng.randrange(64)), *steps), **drawn)
