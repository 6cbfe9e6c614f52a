"""Runs one rank of a training: `python -m ambergrade.train.worker JOB.json`, started as often as there are processes.

A job file holds everything, so no rank composes a configuration again. `launch` starts the ranks, and they end when it
does, however it ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ambergrade.errors import AmbergradeError, BadSetting
from ambergrade.store import write_json


@dataclass(frozen=True)
class TrainingJob:
    """Holds what a rank needs; paths as text."""

    checkpoint: str
    """Weights to begin with: a single file or a diffusers folder."""
    family: str
    config: str
    """The family's config folder."""
    captions: str
    latents: str
    """Folder of the latent store."""
    vae: str
    """Digest of the weights that made the latents."""
    settings: Mapping[str, object]
    """The values of TrainSettings, as JSON carries them to a worker process."""
    out: str
    """Folder of the states, of `trained.safetensors` and `report.json` at the end, whose `lora` names the adapters'
    file there or is null; for `gradients` of `gradients.safetensors` alone."""
    validation: str | None = None
    """Captions of a held-out set."""
    threads: int = 1
    gradients: bool = False
    """Write the first step's gradient instead, in double precision, so that only real mistakes remain."""
    kill_at: int | None = None
    """Images after which the whole run is killed (SIGKILL), for proving that it resumes."""


WITH_PARENT = "--with-parent"


def launch(job: TrainingJob, processes: int, *, cpu: bool = True) -> int:
    """Run a job on `processes` ranks of this machine; returns the exit status, negative for a signal.

    The ranks hold the reading end of a pipe whose other end only this process has: it closes when this process ends,
    even by SIGKILL, and then they end too. Raises BadSetting, with the ranks' last words, if the job failed by itself.
    """
    folder = Path(job.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "job.json", asdict(job))
    rank = ["-m", "ambergrade.train.worker", str(folder / "job.json"), WITH_PARENT]
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
    environment |= {"ACCELERATE_USE_CPU": "true"} if cpu else {}
    command = [sys.executable, *(many if processes > 1 else []), *rank]
    log = folder / "ranks.log"
    options: dict[str, Any] = {"env": environment, "stdin": subprocess.PIPE, "start_new_session": True}
    with log.open("a") as words, subprocess.Popen(command, stdout=words, stderr=words, **options) as ranks:
        status = ranks.wait()
    if status and job.kill_at is None:
        end = "\n".join(log.read_text().splitlines()[-6:])
        raise BadSetting(f"A training process ended with status {status}; the end of {log}:\n{end}")
    return status


def end_with_parent() -> None:
    """Kill this process once its standard input, a pipe from the process that started it, is closed."""

    def wait() -> None:
        while os.read(0, 1):  # not `sys.stdin`, whose lock a waiting thread would hold when Python ends
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def run(job: TrainingJob) -> None:
    """Train as the job says; the first rank writes."""
    import torch

    from ambergrade.family.files import write_tensors
    from ambergrade.family.load import family
    from ambergrade.nouns import CaptionSet
    from ambergrade.train.latent_store import LatentStore
    from ambergrade.train.settings import TrainSettings
    from ambergrade.train.trainer import HALF, LogRow, fine_tune

    torch.set_num_threads(job.threads)
    first = int(os.environ.get("RANK", "0")) == 0
    settings = TrainSettings.read(job.settings)
    dtype = torch.float64 if job.gradients else torch.bfloat16 if settings.precision in HALF else torch.float32
    chosen = family(job.family)
    networks = chosen.networks.load(Path(job.checkpoint), Path(job.config), dtype=dict.fromkeys(chosen.trained, dtype))
    out = Path(job.out)

    def tell(row: LogRow) -> None:
        used = f", MFU {row.mfu:.1%}" if row.mfu is not None else ""
        told = f"{row.seen} images, loss {row.loss:.6f}, gradient {row.grad_norm:.4f}"
        print(f"{told}, {row.images_per_second:.2f} images/s{used}", flush=True)
        if job.kill_at is not None and row.seen >= job.kill_at:
            os.killpg(0, signal.SIGKILL)

    def keep(gradients: Mapping[str, torch.Tensor]) -> None:
        if job.gradients and first:
            write_tensors(out / "gradients.safetensors", gradients, {})

    store, captions = LatentStore(Path(job.latents), job.vae), CaptionSet.read(Path(job.captions))
    held = CaptionSet.read(Path(job.validation)) if job.validation else None
    report = fine_tune(
        networks,
        captions,
        store.open(captions),
        settings,
        scratch=out,
        on_log=tell,
        on_gradient=keep,
        validation=(held, store.open(held)) if held else None,
    )
    if first and not job.gradients:
        write_tensors(out / "trained.safetensors", networks.tensors(), {})
        ends = {"before": report.before, "after": report.after}
        losses: dict[str, Any] = {when: loss and asdict(loss) for when, loss in ends.items()}
        losses["between"] = {str(seen): asdict(loss) for seen, loss in report.between.items()}
        losses["lora"] = report.lora and report.lora.name  # beside the report
        write_json(out / "report.json", {"seen": report.seen, "rows": [asdict(r) for r in report.rows], **losses})


def main() -> None:
    if WITH_PARENT in sys.argv:
        end_with_parent()
    values = json.loads(Path(sys.argv[1]).read_text())
    try:
        run(TrainingJob(**values))
    except AmbergradeError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
