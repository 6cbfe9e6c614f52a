"""Keeps what changes while a run trains: weights, their average, the optimizer's state, and how far it is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ambergrade.errors import BadSetting
from ambergrade.identity import canonical_json
from ambergrade.train.state import read_state, write_state
from ambergrade.train.validation import ValidationLoss

QUARTERS = ("0-249", "250-499", "500-749", "750-999")
"""The steps of a schedule of a thousand by which a row tells the loss; of other schedules the same shares."""


@dataclass(frozen=True)
class LogRow:
    """Tells how training went, averaged over the images since the row before."""

    seen: int
    """Images seen so far."""
    loss: float
    grad_norm: float
    """Before clipping."""
    lr: dict[str, float]
    """The last step's, by part."""
    by_timestep: dict[str, float] = field(default_factory=dict)
    """The loss by quarter of the schedule (`0-249`: little noise), of the quarters that were drawn."""
    images_per_second: float = field(default=0.0, compare=False)
    """Over all processes, samples and states included; the two differ from run to run, so rows equal without them."""
    mfu: float | None = field(default=None, compare=False)
    """FLOP that the model needs over what the GPUs could do in the time; None where the peak is not known."""


def by_quarter(losses: Tensor, quarters: Tensor) -> Tensor:
    """Sum and count images' losses (B,) by the quarter of the schedule (B,) that each was of: (2, 4) float64."""
    found = torch.zeros(2, len(QUARTERS), dtype=torch.float64, device=losses.device)
    found[0].index_add_(0, quarters, losses.detach().double())
    found[1] += torch.bincount(quarters, minlength=len(QUARTERS))
    return found


class TrainingRun:
    """Holds what changes while training, and writes and reads its file."""

    def __init__(
        self, denoiser: nn.Module, optimizer: torch.optim.Optimizer, ema: float, identity: Mapping[str, Any]
    ) -> None:
        """`identity` holds what decides the run's result; states of a run with another are refused."""
        self.names = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        self.optimizer = optimizer
        self.decay = ema
        self.identity: dict[str, Any] = json.loads(canonical_json(identity))
        self.ema = {name: p.detach().float().clone() for name, p in self.names.items()} if ema else {}
        self.seen = 0
        self.steps = 0
        self.rows: list[LogRow] = []
        self.pending: list[tuple[float, float]] = []
        """(loss, gradient norm) of steps since the last row."""
        self.parts = torch.zeros(2, len(QUARTERS), dtype=torch.float64)
        """Sums and counts of images' losses by quarter of the schedule, since the last row."""
        self.before: ValidationLoss | None = None
        self.between: dict[int, ValidationLoss] = {}
        self.since = (time.monotonic(), self.seen)
        """When the last row was logged, or this process began, and the images seen then."""
        self.flop = 0.0
        """Needed since then."""

    @torch.no_grad()
    def advance(self, images: int, loss: float, norm: float, parts: Tensor) -> None:
        """Count a finished optimizer step and move the average; `parts` as `self.parts`."""
        self.parts += parts.cpu()
        self.seen += images
        self.steps += 1
        self.pending.append((loss, norm))
        if self.ema:
            # A short memory at first, so that the start is forgotten.
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
            for name, average in self.ema.items():
                average.lerp_(self.names[name].detach().float(), 1 - decay)

    def log(self, lr: dict[str, float], peak: float | None = None) -> LogRow:
        """Add a row over the steps since the last; `peak` is FLOP/s of all GPUs together."""
        losses, norms = zip(*self.pending, strict=True)
        seconds = max(time.monotonic() - self.since[0], 1e-9)
        rate, mfu = (self.seen - self.since[1]) / seconds, self.flop / seconds / peak if peak else None
        sums, counts = self.parts.tolist()
        parts = {name: value / count for name, value, count in zip(QUARTERS, sums, counts, strict=True) if count}
        row = LogRow(self.seen, sum(losses) / len(losses), sum(norms) / len(norms), lr, parts, rate, mfu)
        self.since, self.flop = (time.monotonic(), self.seen), 0.0
        self.parts = torch.zeros_like(self.parts)
        self.rows.append(row)
        self.pending = []
        return row

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the live modules, while it lasts."""
        raw = {name: self.names[name].data for name in self.ema}
        for name, average in self.ema.items():
            self.names[name].data = average.to(raw[name].dtype)
        try:
            yield
        finally:
            for name, value in raw.items():
                self.names[name].data = value

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the average, if there is one, as the weights."""
        for name, average in self.ema.items():
            self.names[name].copy_(average)

    def save(self, folder: Path) -> None:
        """Write the whole state. Raises MissingObject if it cannot be written."""
        tensors: dict[str, Tensor] = {f"weights.{name}": p for name, p in self.names.items()}
        tensors |= {f"ema.{name}": average for name, average in self.ema.items()}
        for name, p in self.names.items():
            values = self.optimizer.state[p].items()
            tensors |= {f"optimizer.{name}/{key}": torch.as_tensor(value) for key, value in values}
        progress = {
            "identity": self.identity,
            "seen": self.seen,
            "steps": self.steps,
            "rows": [asdict(row) for row in self.rows],
            "pending": self.pending,
            "parts": self.parts.tolist(),
            "before": asdict(self.before) if self.before else None,
            "between": {str(seen): asdict(found) for seen, found in self.between.items()},
        }
        write_state(folder, tensors, progress)

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Go on from the newest whole state in `folder`, if there is one."""
        found = read_state(folder)
        if found is None:
            return
        tensors, progress = found
        other = {key for key, value in self.identity.items() if progress["identity"].get(key) != value}
        if other:
            raise BadSetting(
                f"{folder} holds states of a run with other settings: {', '.join(sorted(other))}.\n"
                "Give this run its own scratch folder, or remove that one."
            )
        for name, p in self.names.items():
            p.copy_(tensors[f"weights.{name}"])
        for name, average in self.ema.items():
            average.copy_(tensors[f"ema.{name}"])
        self._restore_optimizer({key: value for key, value in tensors.items() if key.startswith("optimizer.")})
        self.seen, self.steps = progress["seen"], progress["steps"]
        self.since = (time.monotonic(), self.seen)
        self.rows = [LogRow(**row) for row in progress["rows"]]
        self.pending = [(loss, norm) for loss, norm in progress["pending"]]
        self.parts = torch.tensor(progress["parts"], dtype=torch.float64)
        self.before = _validation(progress["before"]) if progress["before"] else None
        self.between |= {int(seen): _validation(found) for seen, found in progress.get("between", {}).items()}

    def _restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill the optimizer's state directly: loading would cast the fp32 moments of bf16 weights to bf16."""
        for key, value in tensors.items():
            name, field_name = key.removeprefix("optimizer.").split("/")
            parameter = self.names[name]
            value = value.clone().to(parameter.device)
            if value.shape == parameter.shape:  # laid out as the weight is, which fused steps rely on
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            self.optimizer.state[parameter][field_name] = value


def _validation(values: Mapping[str, Any]) -> ValidationLoss:
    """Read a loss back from JSON, whose keys are text."""
    by_timestep = {int(timestep): value for timestep, value in values["by_timestep"].items()}
    return ValidationLoss(**{**values, "by_timestep": by_timestep})
