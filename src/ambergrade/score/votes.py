"""Judges blind votes: who is preferred to whom, with an exact interval, and how several rank among each other.

The unit is the prompt, as everywhere here: where several people (or one, on several seeds) voted on a prompt, their
majority is that prompt's answer, since votes on one prompt are no independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ambergrade.identity import random_seed
from ambergrade.nouns import Measurement
from ambergrade.score.statistics import FEWEST, Floats, percentile_interval, resampling_weights

STEPS, ENOUGH = 500, 1e-7
"""Iterations of the strengths' fit at most, and the change at which it has come to rest."""


@dataclass(frozen=True)
class Vote:
    """One person's answer to one pair of pictures."""

    prompt: str
    """Names prompt and sampler; equal names are pictures of the same prompt."""
    one: str
    other: str
    won: str
    """`one`, `other`, or empty for a tie."""


@dataclass(frozen=True)
class Preference:
    """How often one contestant's pictures were preferred to another's, prompt by prompt."""

    wins: int
    losses: int
    ties: int

    @property
    def share(self) -> Measurement:
        """Wins among decided prompts, with the exact 95 % interval of Clopper and Pearson (1934); ties are left out."""
        decided = self.wins + self.losses
        if not decided:
            return Measurement(math.nan, math.nan, math.nan, 0)
        limits = stats.binomtest(self.wins, decided).proportion_ci(0.95, method="exact")
        return Measurement(self.wins / decided, float(limits.low), float(limits.high), decided)

    @property
    def p(self) -> float:
        """Give the p of the exact two-sided sign test: how likely a coin gives decided prompts as uneven as these."""
        decided = self.wins + self.losses
        return float(stats.binomtest(self.wins, decided).pvalue) if decided else math.nan


def preference(votes: Iterable[Vote], one: str, other: str) -> Preference:
    """Count the prompts that `one` won against `other`, lost, and tied, each by the majority of its votes."""
    leads: dict[str, int] = {}
    for vote in votes:
        if {vote.one, vote.other} == {one, other}:
            leads[vote.prompt] = leads.get(vote.prompt, 0) + (vote.won == one) - (vote.won == other)
    signs = [np.sign(lead) for lead in leads.values()]
    return Preference(signs.count(1), signs.count(-1), signs.count(0))


def strengths(votes: Sequence[Vote], names: Sequence[str], *, seed: int = 0) -> dict[str, Measurement]:
    """Rank contestants by Bradley and Terry's model (1952): the chance of each to be preferred to an average rival.

    That is mean over j≠i of π_i/(π_i + π_j): 0.5 for equals. A tie is half a win for each. Each pair that met has one
    more tie beside the votes, which keeps π finite for who never lost, and pulls towards 0.5 by as much. The interval
    is a bootstrap over prompts; NaN for fewer than FEWEST.
    """
    prompts = list(dict.fromkeys(vote.prompt for vote in votes))
    place = {name: k for k, name in enumerate(names)}
    won = np.zeros((len(prompts), len(names), len(names)))
    for vote in votes:
        row, one, other = prompts.index(vote.prompt), place[vote.one], place[vote.other]
        won[row, one, other] += 1.0 if vote.won == vote.one else 0.0 if vote.won else 0.5
        won[row, other, one] += 1.0 if vote.won == vote.other else 0.0 if vote.won else 0.5
    total = won.sum(0)
    met = np.where(total + total.T > 0, 0.5, 0.0)
    value = _chances(_fitted((total + met)[None]))[0]
    moved = np.full((2, len(names)), np.nan)
    if len(prompts) >= FEWEST:
        weights = resampling_weights(len(prompts), seed=seed)
        moved = _chances(_fitted(np.tensordot(weights, won, 1) + met))
    limits = [percentile_interval(moved[:, k], len(prompts)) for k in range(len(names))]
    return {name: Measurement(float(value[k]), *limits[k], len(prompts)) for name, k in place.items()}


def _fitted(won: Floats) -> Floats:
    """(B, K): strengths π of wins (B, K, K), by Hunter's MM iteration (2004, equation 3).

    π_i = W_i / Σ_j N_ij/(π_i+π_j), scaled to a sum of 1. Where the contestants fall into groups that never
    met, the groups' levels mean nothing.
    """
    games = won + won.transpose(0, 2, 1)
    pi = np.full(won.shape[:2], 1 / won.shape[1])
    for _ in range(STEPS):
        before = pi
        pi = won.sum(2) / (games / (pi[:, :, None] + pi[:, None])).sum(2)
        pi /= pi.sum(1, keepdims=True)
        if np.abs(pi - before).max() < ENOUGH:
            break
    return np.asarray(pi)


def _chances(pi: Floats) -> Floats:
    """(B, K): the mean chance of each against the others."""
    k = pi.shape[1]
    against = pi[:, :, None] / (pi[:, :, None] + pi[:, None])
    return np.asarray((against.sum(2) - 0.5) / (k - 1))


# --- what is asked ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt and seed, as they are laid side by side."""

    prompt: int
    """Place among the prompts."""
    left: str
    right: str


def pairs_of(names: Sequence[str], prompts: int, *, most: int, seed: int) -> tuple[Pair, ...]:
    """Choose at most `most` pairs, as evenly over contestants and prompts as they go, in an order that tells nothing.

    Sides and order come from counters (`identity.random_seed`), so that the same question gives the same page.
    """

    def drawn(purpose: str, *item: object) -> int:
        return random_seed(seed, f"vote: {purpose}", *item)

    couples = [(one, other) for k, one in enumerate(names) for other in names[k + 1 :]]
    # every couple goes through the prompts in an order of its own, and the couples take turns
    turns = {couple: sorted(range(prompts), key=lambda at: drawn("prompt", *couple, at)) for couple in couples}
    chosen = [(couple, turns[couple][turn]) for turn in range(prompts) for couple in couples][:most]
    shown = sorted(chosen, key=lambda one: drawn("order", *one[0], one[1]))
    swapped = [drawn("side", *couple, prompt) % 2 for couple, prompt in shown]
    return tuple(
        Pair(at, *(couple[::-1] if swap else couple)) for (couple, at), swap in zip(shown, swapped, strict=True)
    )
