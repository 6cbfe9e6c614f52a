"""What becomes of every tensor, decided from names, dtypes and shapes alone, strictly, and told as an audit."""

from __future__ import annotations

import fnmatch
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

from ambergrade.errors import BadInput, BadSetting, UnknownName, nearest
from ambergrade.family import dtypes
from ambergrade.family.detect import naming_hint
from ambergrade.family.dtypes import FLOATS, ITEM
from ambergrade.family.load import Family, families
from ambergrade.family.prediction import prediction_type
from ambergrade.merge.blocks import component
from ambergrade.merge.formula import Formula
from ambergrade.merge.mixture import Applied, Mixture, mixer
from ambergrade.merge.nodes import SCOPES, Call, nodes

POLICIES: Mapping[str, str] = {
    "vae": "base",
    "cosmetic": "refuse",
    "missing": "refuse",
    "nonfinite": "refuse",
    "ema": "drop",
    "lora": "refuse",
}
"""The defaults, strict: see CHOICES for what else there is."""
CHOICES: Mapping[str, tuple[str, ...]] = {
    "vae": ("base", "merge"),  # or a model's alias: that one's VAE, byte for byte
    "cosmetic": ("refuse", "base"),  # where temperatures or prediction markers differ: refuse, or take the base's
    "missing": ("refuse", "base", "zero_delta"),  # the base's tensor in its place, or the whole tensor from the base
    "nonfinite": ("refuse",),
    "ema": ("drop", "base"),  # moving averages (model_ema.): left out, or copied from the base
    "lora": ("refuse", "fitting"),  # modules of a LoRA that cannot be applied: refuse, or leave them out and say which
}
DTYPES = {dtype.short: word for word, dtype in dtypes.DTYPES.items() if dtype.short}
IDS = "position_ids"
TEMPERATURE = "logit_scale"
MARKERS = ("v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
"""Keys by which a file says how it predicts; names that ComfyUI and others look for."""
EMA = "model_ema."
_QUANTISED = re.compile(
    r"(?:^|\.)(?:scale_weight|weight_scale(?:_2)?|scale_input|input_scale|scaled_fp8|comfy_quant"  # ComfyUI, NVIDIA
    r"|weight\.(?:absmax|quant_map|nested_absmax|quant_state\..+)|SCB|qweight|qzeros)$"  # bitsandbytes, GPTQ and AWQ
)
"""Tensors without which the numbers of others are not weights."""

Described = Mapping[str, tuple[str, tuple[int, ...]]]
"""Single-file name to dtype (as safetensors spells it) and shape."""


@dataclass(frozen=True)
class Task:
    """What becomes of one tensor."""

    name: str
    dtype: str
    """The output's dtype."""
    shape: tuple[int, ...]
    mixture: Mixture
    """A copy is the one model with weight 1."""
    kind: Literal["copy", "ids", "merge"]
    compared: tuple[str, ...] = ()
    """Models whose tensor is read only to be compared: cosmetic ones must agree."""
    schedule: bool = False
    """A noise schedule kept among the weights: copied whatever it holds, infinity too."""

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.mixture.models, *self.compared)))

    @property
    def size(self) -> int:
        return math.prod(self.shape) * ITEM[self.dtype]


@dataclass
class Plan:
    """Every task, in the base's order, and what is to be told."""

    formula: Formula
    coefficients: Mapping[str, float]
    base: str
    tasks: dict[str, Task]
    audit: list[str] = field(default_factory=list)

    def groups(self) -> dict[str, Counter[str]]:
        """Resolved formula to the components (blocks of the UNet) it holds for, with their numbers of tensors."""
        found: dict[str, Counter[str]] = {}
        for task in self.tasks.values():
            text = "copied from " + task.mixture.models[0] if task.kind != "merge" else str(task.mixture)
            found.setdefault(text, Counter())[_place(task.name)] += 1
        return found


def operands(task: Task, base: str) -> tuple[str, ...]:
    """The models whose tensor is read: those with a weight, those compared, and the base where a LoRA may need it."""
    needs_base = not task.mixture.linear
    return tuple(dict.fromkeys((*task.models, *((base,) if needs_base else ()))))


def check_policies(policies: Mapping[str, str], models: tuple[str, ...]) -> dict[str, str]:
    """All policies, defaults filled in. Raises UnknownName for an unknown one, BadSetting for an unknown value."""
    for name, value in policies.items():
        if name not in POLICIES:
            raise UnknownName("merge policy", name, POLICIES)
        known = tuple(dict.fromkeys((*CHOICES[name], *(models if name == "vae" else ()))))
        if value not in known:
            raise BadSetting(f"Merge policy {name}={value} is not known. Choose one of: {', '.join(known)}.")
    return {**POLICIES, **policies}


def input_names(formula: Formula, policies: Mapping[str, str]) -> tuple[str, ...]:
    """The inputs that a merge needs: the formula's models, its LoRAs, and the model whose VAE is copied."""
    vae = policies.get("vae", POLICIES["vae"])
    return (*formula.models, *formula.loras, *(() if vae in (*CHOICES["vae"], *formula.models) else (vae,)))


def make_plan(
    formula: Formula,
    coefficients: Mapping[str, float],
    described: Mapping[str, Described],
    *,
    dtype: str | None = None,
    policies: Mapping[str, str] | None = None,
    loras: Mapping[str, tuple[str, ...]] | None = None,
    predictions: Mapping[str, str | None] | None = None,
    family: Family | None = None,
) -> Plan:
    """Decide every tensor.

    `described` holds every model of `input_names`; `dtype` is one of DTYPES, None for the base's
    own; `loras` gives for each LoRA alias the weights it changes; `predictions` what each model predicts, where more
    than its tensors tell it; `family` is the base's. Raises BadInput with the list of what is missing, superfluous or
    misshapen, and BadSetting for parts of the formula that have no effect.
    """
    for alias in formula.models:
        if alias not in described:
            raise UnknownName("model", alias, described, f"The formula {formula.text} needs it.")
    if dtype is not None and dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    chosen = check_policies(policies or {}, (*formula.models, *described))
    _refuse_idle_vae(formula, chosen)
    said = {alias: (predictions or {}).get(alias) or prediction_type(described[alias]) for alias in described}
    maker = _Maker(formula, mixer(formula, coefficients), described, dtype, chosen, loras or {}, said, family)
    return Plan(formula, dict(coefficients), formula.models[0], maker.tasks(), maker.audit)


def _calls(formula: Formula) -> list[Call]:
    expressions = [formula.expression, *(node for _, node in formula.lines)]
    return [part for node in expressions for part in nodes(node) if isinstance(part, Call)]


def _refuse_idle_vae(formula: Formula, policies: Mapping[str, str]) -> None:
    if any(call.function == "vae" for call in _calls(formula)) and policies["vae"] != "merge":
        raise BadSetting(f"vae() has no effect while policies.vae is '{policies['vae']}': set policies.vae to 'merge'.")


def _refuse_idle(call: Call, names: list[str], base: str, family: Family | None) -> None:
    """Refuse a part of the formula that reaches none of the merged tensors, `names`."""
    if call.function == "at":
        glob = str(call.option("glob"))
        if not any(fnmatch.fnmatchcase(name, glob) for name in names):
            near = nearest(glob.replace("*", ""), names[:4000], 1) or names[:1] or ["none"]
            raise BadSetting(
                f'at("{glob}") matches none of the {len(names)} merged tensors of {base}.\n'
                f"They have the names of the single file, such as {near[0]}."
            )
    if call.function in (*SCOPES, "mbw"):
        part = "unet" if call.function == "mbw" else call.function
        if not any(component(name) == part for name in names):
            of = f"of family {family.name}" if family else "of no known family"
            raise BadSetting(f"{call.function}() has no effect: {base}, {of}, has no tensor of the {part} to merge.")
    if call.function == "mbw" and family:
        count = str(call.option("values")).count(",") + 1
        if count not in (known := (len(family.block_names) + 1, len(family.block_names) + 2)):
            raise BadSetting(
                f"{count} block weights do not fit {base}, of family {family.name}: that takes {known[0]}."
            )


@functools.cache
def _schedules() -> frozenset[str]:
    """Names of what no network reads, in any family."""
    return frozenset(name for family in families() for name in family.passive)


@dataclass
class _Maker:
    formula: Formula
    mix: Callable[[str], Mixture]
    described: Mapping[str, Described]
    dtype: str | None
    policies: Mapping[str, str]
    loras: Mapping[str, tuple[str, ...]]
    predictions: Mapping[str, str | None]
    family: Family | None
    audit: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    relaxed: Counter[str] = field(default_factory=Counter)

    @property
    def base(self) -> str:
        return self.formula.models[0]

    def tasks(self) -> dict[str, Task]:
        for alias in dict.fromkeys((*self.involved, self.vae)):
            self.refuse_quantised(alias)
        made: dict[str, Task] = {}
        for name in self.described[self.base]:
            task = self.task(name)
            if task is not None:
                made[name] = task
        for name, (dtype, shape) in self.described[self.vae].items():
            if component(name) == "vae" and name not in made and self.policies["vae"] != "merge":
                made[name] = Task(name, dtype, shape, _copy(self.vae), "copy")
        if self.vae != self.base and not any(component(name) == "vae" for name in self.described[self.vae]):
            raise BadSetting(f"policies.vae={self.vae} has no effect: {self.vae} holds no VAE.")
        merged = [name for name, task in made.items() if task.kind == "merge"]
        for call in _calls(self.formula):
            _refuse_idle(call, merged, self.base, self.family)
        self.superfluous()
        self.refuse_other_predictions()
        if self.complaints:
            shown = "\n  ".join(self.complaints[:12]) + ("\n  …" if len(self.complaints) > 12 else "")
            raise BadInput(
                f"{self.formula.text}\n"
                f"The models do not hold the same tensors; {len(self.complaints)} differ:\n  {shown}\n{self.hint()}"
            )
        self.tell(made)
        return made

    def hint(self) -> str:
        """What to do where tensors differ."""
        for alias in self.involved:
            if told := naming_hint(self.described[alias]):
                return f"{alias}: {told}"
        base = {component(name) for name in self.described[self.base]}
        for alias in self.involved:
            there = {component(name) for name in self.described[alias]}
            if "unet" in there and (lacking := sorted(base - there - {"", "vae"})):
                return (
                    f"{alias} holds no {' and no '.join(lacking)}: write unet(…) around what it has a part in, or take "
                    "the base's with policies.missing: base."
                )
        return "Merge models of one family and of one prediction type, or relax policies.missing: base | zero_delta."

    @property
    def vae(self) -> str:
        """The model whose VAE is copied."""
        return self.base if self.policies["vae"] in CHOICES["vae"] else self.policies["vae"]

    def refuse_quantised(self, alias: str) -> None:
        """Refuse numbers that are no weights: scaled fp8, whole numbers with scales beside them."""
        for name, (dtype, _) in self.described[alias].items():
            whole = dtype not in FLOATS and dtype != "BOOL" and component(name) and name.endswith(".weight")
            if _QUANTISED.search(name) or whole:
                raise BadInput(
                    f"{alias} is quantised: '{name}' ({dtype}) says that its numbers are not yet the weights.\n"
                    "Merge the fp16, bf16 or fp32 file that it was made from."
                )

    def refuse_other_predictions(self) -> None:
        """Refuse models of which it is known that they predict different things."""
        known = {alias: said for alias in self.involved if (said := self.predictions[alias])}
        if self.policies["cosmetic"] != "refuse" or len(set(known.values())) < 2:
            return
        told = ", ".join(f"{alias} {said}" for alias, said in known.items())
        raise BadInput(
            f"The models predict different things: {told}.\n"
            "Merge models of one prediction type, or take the base's with policies.cosmetic: base."
        )

    def task(self, name: str) -> Task | None:
        base = self.base
        dtype, shape = self.described[base][name]
        if name.startswith(EMA):
            if self.policies["ema"] == "drop":
                self.relaxed["moving averages (model_ema) left out"] += 1
                return None
            return Task(name, dtype, shape, _copy(base), "copy")
        if name.endswith(IDS):
            return Task(name, "I64", shape, _copy(base), "ids" if dtype in FLOATS else "copy")
        if name.endswith(TEMPERATURE) or name in MARKERS:
            others = tuple(alias for alias in self.involved if alias != base)
            return Task(name, dtype, shape, _copy(base), "copy", tuple(a for a in others if name in self.described[a]))
        if component(name) == "vae" and self.policies["vae"] != "merge":
            if name not in self.described[self.vae]:
                self.complaints.append(f"'{name}' is missing in {self.vae}")
                return None
            return Task(name, *self.described[self.vae][name], _copy(self.vae), "copy")
        if name in _schedules():
            return Task(name, dtype, shape, _copy(base), "copy", schedule=True)
        if dtype not in FLOATS:
            return Task(name, dtype, shape, _copy(base), "copy")
        mixture = self.without_idle_loras(self.mix(name), name)
        mixture = self.with_what_is_there(mixture, name, shape)
        out = dtype if self.dtype is None else DTYPES[self.dtype]
        return Task(name, out, shape, mixture, "merge")

    @functools.cached_property
    def involved(self) -> tuple[str, ...]:
        """The base and the models that have a weight somewhere."""
        floats = [name for name, (dtype, _) in self.described[self.base].items() if dtype in FLOATS]
        found = {self.base} | {alias for name in floats for alias in self.mix(name).models}
        return tuple(alias for alias in self.formula.models if alias in found)

    def without_idle_loras(self, mixture: Mixture, name: str) -> Mixture:
        """The mixture without LoRAs that do not change the tensor, in arguments of methods as well."""
        if mixture.linear:
            return mixture  # the shared one knows its weights
        kept: list[tuple[str | Applied, Fraction]] = []
        for atom, weight in mixture.terms:
            if isinstance(atom, Applied) and atom.function != "lora":
                arguments = tuple(self.without_idle_loras(argument, name) for argument in atom.arguments)
                atom = replace(atom, arguments=arguments)
                if not any(argument.terms for argument in arguments):
                    continue  # what is made of a difference that is nothing is nothing
            elif isinstance(atom, Applied) and name not in self.loras[_file(atom)]:
                continue
            kept.append((atom, weight))
        return Mixture(tuple(kept))

    def with_what_is_there(self, mixture: Mixture, name: str, shape: tuple[int, ...]) -> Mixture:
        """The mixture, once the models that lack the tensor are dealt with as policies.missing says."""
        wrong = []
        for alias in mixture.models:
            found = self.described[alias].get(name)
            if found is None:
                wrong.append((alias, f"'{name}' is missing in {alias}"))
            elif found[1] != shape:
                wrong.append((alias, f"'{name}' is {found[1]} in {alias}, {shape} in {self.base}"))
        if not wrong:
            return mixture
        if self.policies["missing"] == "refuse":
            self.complaints += [complaint for _, complaint in wrong]
            return mixture
        for alias, _ in wrong:
            self.relaxed[f"missing or misshapen in {alias}: {self.policies['missing']}"] += 1
        if self.policies["missing"] == "zero_delta" or not mixture.linear:
            return _copy(self.base)
        lacking = {alias for alias, _ in wrong}
        total: dict[str, Fraction] = {self.base: Fraction(0)}
        for atom, weight in mixture.terms:
            assert isinstance(atom, str)
            key = self.base if atom in lacking else atom
            total[key] = total.get(key, Fraction(0)) + weight
        return Mixture(tuple((alias, weight) for alias, weight in total.items() if weight))

    def superfluous(self) -> None:
        """Tensors of other models that the base lacks."""
        base = self.described[self.base]
        for alias in self.involved:
            extra = sorted(
                name
                for name in self.described[alias].keys() - base.keys()
                if not name.startswith(EMA) and not name.endswith(IDS)
            )
            marked = [name for name in extra if name in MARKERS]
            if marked and self.policies["cosmetic"] == "refuse":
                raise BadInput(
                    f"{alias} is marked {', '.join(marked)} and {self.base} is not: they predict different things.\n"
                    "Merge models of one prediction type, or take the base's marks with policies.cosmetic: base."
                )
            vae_copied = self.policies["vae"] != "merge"
            extra = [
                name
                for name in extra
                if name not in MARKERS and not name.endswith(TEMPERATURE) and name not in _schedules()
                if not (vae_copied and component(name) == "vae")
            ]
            if self.policies["missing"] == "refuse":
                self.complaints += [f"'{name}' of {alias} is missing in {self.base}" for name in extra]
            elif extra:
                self.relaxed[f"of {alias}, not in {self.base}, left out"] += len(extra)
        lacking = {
            mark: [alias for alias in self.involved if mark not in self.described[alias]]
            for mark in MARKERS
            if mark in base
        }
        for mark, aliases in lacking.items():
            if aliases and self.policies["cosmetic"] == "refuse":
                raise BadInput(
                    f"{self.base} is marked {mark} and {', '.join(aliases)} not: they predict different things.\n"
                    "Merge models of one prediction type, or take the base's marks with policies.cosmetic: base."
                )

    def tell(self, tasks: Mapping[str, Task]) -> None:
        kinds = Counter(task.kind for task in tasks.values())
        self.audit.append(f"{kinds['merge']} tensors merged, {kinds['copy']} copied from {self.base} or as told")
        vae = [task for task in tasks.values() if component(task.name) == "vae"]
        if vae and self.policies["vae"] != "merge":
            self.audit.append(f"VAE: {len(vae)} tensors of {vae[0].mixture.models[0]}, byte for byte")
        if kinds["ids"]:
            self.audit.append(f"position_ids: stored as {self.base}'s floats, written as int64")
        self.audit += [f"{text} ({count})" for text, count in sorted(self.relaxed.items())]
        if self.formula.unused:
            self.audit.append(f"lines that the result does not need: {', '.join(self.formula.unused)}")


@functools.cache
def _copy(alias: str) -> Mixture:
    return Mixture(((alias, Fraction(1)),))


def _file(atom: Applied) -> str:
    return str(dict(atom.options)["file"])


def _place(name: str) -> str:
    part = component(name)
    if part != "unet":
        return part or "others"
    words = name.removeprefix("model.diffusion_model.").split(".")
    return f"unet {words[0]}.{words[1]}" if words[0].endswith("blocks") else f"unet {words[0]}"
