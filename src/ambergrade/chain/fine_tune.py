"""Fine-tunes a base alone: captions, latents, training; or plans it, or proves that it can be trusted here."""

from __future__ import annotations

from ambergrade.chain.context import Context, open_journal, record_command, use_threads
from ambergrade.chain.dataset import dataset, draw_world, read_sets
from ambergrade.chain.latents import prove_latents
from ambergrade.chain.point import open_checkpoint, read_prompts
from ambergrade.chain.settings import Invocation, TrainPipelineSettings
from ambergrade.chain.training import Subject, prove, train
from ambergrade.identity import digest
from ambergrade.store import copy_file, find_file


def run(settings: TrainPipelineSettings, invocation: Invocation) -> None:
    """Train, or prove what `verify` asks for."""
    source = settings.models[settings.base]
    assert source is not None, settings.base
    path = find_file(source)  # before anything slow
    use_threads(settings.compute)
    journal = open_journal(settings.root, settings.name, settings, invocation)
    key = digest(settings.what("out", "processes", "plan", "gpu", "pictures"))
    title = settings.trained
    params = {"base": settings.base, "trained": title}
    with journal.run(title, key=key, kind="chain", params=params) as parent:
        record_command(parent, settings, invocation)
        draw_world(settings.data, settings.compute)
        context = Context(settings.root, journal, parent, settings.compute)
        captions, validation = read_sets(dataset(context, settings.data, settings.captions, settings.family))
        parent.datasets({"captions": captions.digest, "held out": validation.digest})
        sampled = settings.trainer.sample_every and not settings.verify
        subject = Subject(
            name=title,
            base=open_checkpoint(path, settings.family.name),
            base_name=settings.base,
            family=settings.family,
            data=settings.data,
            captions=captions,
            validation=validation,
            trainer=settings.trainer,
            sampler=settings.sampler,
            samples=read_prompts(settings.prompts, "sweep").first(8) if sampled else None,
            processes=settings.processes,
        )
        if settings.verify == "latents":
            prove_latents(
                context, settings.data, settings.family, subject.base, captions, validation, settings.compared
            )
            return
        if settings.verify:
            prove(context, subject, settings.verify, steps=settings.steps, kills=settings.kills)
            return
        trained = train(context, subject)
    if settings.out:
        copy_file(trained.path, settings.out)
    print(f"{title}  {settings.out or trained.path}\n  weights {trained.digest}")
    context.close()
