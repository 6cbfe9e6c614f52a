"""LoRA files as differences of weights: LoRA, LoCon, LoHa, LoKr, each also as DoRA, GLoRA, IA3, OFT, BOFT, whole
differences and those of norms and biases; kohya's, LyCORIS', diffusers' and peft's key names.

The products are made by lycoris-lora, an optional library, in float64: those of fp16 and bf16 files are exact there but
for the widest ranges, so the sum does not depend on the order in which a processor adds. OFT and BOFT rotate in fp32,
as the library does. Names are resolved by the model's family, so that a file in either naming fits either layout.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambergrade.errors import BadInput, BadSetting, nearest
from ambergrade.family.detect import detect
from ambergrade.family.digests import model_digests
from ambergrade.family.files import read_metadata, read_tensors
from ambergrade.family.layouts import Component, Shape, Source, listed
from ambergrade.identity import digest
from ambergrade.store import Digests

if TYPE_CHECKING:
    from torch import Tensor

LEAVES = {
    "lora_up.weight": "up",
    "lora_down.weight": "down",
    "lora_mid.weight": "mid",
    "lora.up.weight": "up",  # diffusers before peft
    "lora.down.weight": "down",
    "lora_linear_layer.up.weight": "up",  # the same, of text encoders
    "lora_linear_layer.down.weight": "down",
    "lora_B.weight": "up",
    "lora_A.weight": "down",
    "lora_B.default.weight": "up",
    "lora_A.default.weight": "down",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
    **{leaf: leaf for leaf in ("alpha", "dora_scale", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{leaf: leaf for leaf in ("hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2")},
    **{leaf: leaf for leaf in ("lokr_w2_a", "lokr_w2_b", "lokr_t2", "diff", "diff_b", "w_norm", "b_norm")},
    **{leaf: leaf for leaf in ("oft_blocks", "rescale", "weight", "on_input")},
    **{f"{leaf}.weight": leaf for leaf in ("a1", "a2", "b1", "b2", "bm")},
}
"""How a key ends, to what it holds. `up` is peft's B, `down` its A; `a1` to `bm` are GLoRA's, `weight` IA3's."""
NEEDED = {
    "up": ("down",),
    "down": ("up",),
    "hada_w1_a": ("hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "a1": ("a2", "b1", "b2"),
    "weight": ("on_input",),
}
FIRST = {"up", "down", "hada_w1_a", "diff", "w_norm", "oft_blocks", "a1", "weight"}
"""One of these makes a difference of a weight; LoKr's are looked at apart."""
OF_BIAS = {"diff_b", "b_norm"}
OF_VECTORS = {"diff", "w_norm", *OF_BIAS}
"""Leaves that norms may have, whose weights are no matrices."""
PREFIXES = {
    "unet": ("lora_unet_", "unet.", "base_model.model.", "diffusion_model.", "lycoris_"),
    "text_encoder": ("lora_te1_", "lora_te_", "text_encoder."),
    "text_encoder_2": ("lora_te2_", "text_encoder_2."),
}
"""What stands before a module's name: kohya's, in which underscores stand for dots, and diffusers' and ComfyUI's."""
_KEY = re.compile(r"(.+?)(?:\.|_(?=lora\.))(" + "|".join(map(re.escape, sorted(LEAVES, key=len, reverse=True))) + ")")
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MOST_CONFIG = 1 << 20
"""Bytes of an adapter's config."""


def lora_file(path: Path) -> Path:
    """The file of a LoRA, which may be a folder that peft saved."""
    return path / PEFT_FILE if path.is_dir() else path


def _config_beside(file: Path) -> Path | None:
    beside = file.with_name(PEFT_CONFIG)
    return beside if file.name == PEFT_FILE and beside.is_file() and beside.stat().st_size <= MOST_CONFIG else None


def with_config(path: Path, sha256: str, known: Digests) -> str:
    """The digest of a LoRA whose tensors have `sha256`: with peft's config beside them, since that holds its strength.

    Without such a config, and for any other file, `sha256` itself.
    """
    beside = _config_beside(lora_file(path))
    return sha256 if beside is None else digest({PEFT_FILE: sha256, PEFT_CONFIG: known.of_file(beside)})


def lora_weights(path: Path, known: Digests) -> str:
    """The digest of a LoRA's weights, of a file or a folder that peft saved. Raises as `model_digests`."""
    return with_config(path, model_digests(lora_file(path), known).weights, known)


def read_lora(path: Path) -> dict[str, Tensor]:
    """A LoRA's tensors, and the alphas that only its header or peft's config beside it tell. Raises as `alphas`."""
    import torch

    file = lora_file(path)
    tensors = read_tensors(file)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return tensors | {key: torch.tensor(alpha) for key, alpha in alphas(file, shapes, read_metadata(file)).items()}


def alphas(file: Path, shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> dict[str, float]:
    """The alpha of each module that has none among its tensors, by key, from where peft and diffusers keep it.

    That is `adapter_config.json` beside peft's file, or `lora_adapter_metadata` in diffusers' header. An alpha counts
    over the rank, here too for adapters that are scaled by its root (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).
    Raises BadInput for a config that is none, or that asks for what these files' tensors do not tell.
    """
    beside = _config_beside(file)
    text = beside.read_text(errors="replace") if beside else metadata.get("lora_adapter_metadata")
    try:
        config = json.loads(text or "{}")
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise BadInput(f"What says how strong the LoRA {file.name} is, peft's config, is no JSON object.")
    found: dict[str, float] = {}
    parts: dict[str, dict[str, Any]] = defaultdict(dict)  # diffusers: `unet.r`; peft: `r`
    for key, value in config.items():
        part, _, setting = key.rpartition(".")
        parts[part][setting] = value
    for part, settings in parts.items():
        _refuse_settings(settings)
        for key, shape in shapes.items():
            module, leaf = _parsed(key)
            if leaf != "down" or not shape or f"{module}.alpha" in shapes:
                continue
            path = module.removeprefix("base_model.model.")
            if part and not path.startswith(f"{part}."):
                continue
            alpha = _by_pattern(settings.get("alpha_pattern"), path, settings.get("lora_alpha", settings.get("r")))
            if alpha is not None:
                found[f"{module}.alpha"] = alpha * (math.sqrt(shape[0]) if settings.get("use_rslora") else 1.0)
    return found


def _refuse_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what peft can do and these tensors do not tell."""
    kind, start = settings.get("peft_type", "LORA"), str(settings.get("init_lora_weights", ""))
    odd = {"peft_type": kind} if kind != "LORA" else {}
    unread = ("fan_in_fan_out", "layer_replication", "modules_to_save")
    odd |= {key: settings[key] for key in unread if settings.get(key)}
    if start.startswith(("pissa", "olora", "corda")):
        odd["init_lora_weights"] = start  # the base's weights are not those that it was trained with
    if odd:
        told = ", ".join(f"{key} = {value}" for key, value in odd.items())
        raise BadInput(f"The LoRA's config asks for {told}, which is not known.\nConvert the file to kohya's keys.")


def _by_pattern(patterns: Any, path: str, default: Any) -> float | None:
    """The value for a module: of the pattern that its name ends with, as in peft, else the default."""
    value = default
    for pattern, other in (patterns if isinstance(patterns, dict) else {}).items():
        if re.search(r"[^\w.]", pattern):
            raise BadInput(f"The LoRA's config has the pattern '{pattern[:80]}'; only names of modules are known.")
        if path == pattern or path.endswith(f".{pattern}"):
            value = other
            break
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)):
        return value
    raise BadInput(f"The LoRA's config says that alpha is {str(value)[:40]!r}, which is no number.")


def targets(
    entries: Mapping[str, Shape], weights: Mapping[str, Shape], left_out: list[str] | None = None
) -> dict[str, tuple[str, ...]]:
    """For each weight that a LoRA changes, the LoRA's tensors that it needs; from headers alone.

    `entries` are names and shapes of the LoRA file, and of `alphas`, `weights` those of the model in its single-file
    layout. Raises BadInput naming every key that nothing uses, modules that lack a part, and weights that two modules
    change; where `left_out` is given, the complaints are put there and those modules are left out.
    """
    names = _module_names(weights)
    complaints: list[str] = []
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    for key in sorted(entries):
        module, leaf = _parsed(key)
        if not module:
            complaints.append(f"{key}: not a key of a known kind of LoRA")
        elif module not in names:
            near = nearest(module, names, 1) if len(complaints) < 3 else []  # a search of seconds
            complaints.append(f"{key}: the model has no such module" + (f"; the nearest is {near[0]}" if near else ""))
        else:
            modules[module][leaf] = key
    found: dict[str, list[str]] = defaultdict(list)
    taken: dict[tuple[str, int], str] = {}
    for module, leaves in modules.items():
        weight = names[module]
        bias = _bias_of(weight)
        wrong = [f"{module}: lacks {part}" for part in _lacking(leaves)]
        kinds = sorted(leaves.keys() & (FIRST - {"down"})) + ["lokr"] * any(leaf.startswith("lokr_") for leaf in leaves)
        if len(kinds) > 1:
            wrong.append(f"{module}: is of several kinds: {', '.join(kinds)}")
        if len(weight.shape(weights)) < 2 and not leaves.keys() <= {*OF_VECTORS, "alpha"}:
            wrong.append(f"{module}: a norm, which {', '.join(sorted(leaves.keys() - OF_VECTORS))} cannot change")
        if leaves.keys() & OF_BIAS and bias.keys[0] not in weights:
            wrong.append(f"{module}: changes a bias that the model does not have")
        changes = [(source, keys) for source, keys in _split(leaves, weight, bias).items() if keys]
        for source, _ in changes:
            place = (source.keys[0], source.part)
            if place in taken:
                wrong.append(f"{module}: changes the same weight as {taken[place]}")
            taken[place] = module
        complaints += wrong
        for source, keys in changes if not wrong else ():
            found[source.keys[0]] += keys
    if complaints and left_out is None:
        raise BadInput(
            f"The LoRA does not fit the model; {len(complaints)} complaints:\n{listed(complaints, 12)}\n"
            "Check that it was made for this family, or leave these modules out with policies.lora: fitting."
        )
    if left_out is not None:
        left_out += complaints
    return {name: tuple(sorted(keys)) for name, keys in sorted(found.items())}


def _bias_of(weight: Source) -> Source:
    """Where the bias of a weight lies."""
    name = re.sub(r"(\.|in_proj_)weight$", r"\1bias", weight.keys[0])
    return Source((name,), "third" if weight.form == "third" else "as is", weight.part)


def _split(leaves: Mapping[str, str], weight: Source, bias: Source) -> dict[Source, list[str]]:
    """The keys of one module that change its weight, and those that change its bias."""
    mine = {leaf: key for leaf, key in leaves.items() if leaf not in OF_BIAS}
    return {
        weight: list(mine.values()) if mine.keys() - {"alpha"} else [],
        bias: [key for leaf, key in leaves.items() if leaf in OF_BIAS],
    }


def check_shapes(
    targets: Mapping[str, tuple[str, ...]], entries: Mapping[str, Shape], weights: Mapping[str, Shape]
) -> None:
    """Work out every product without values. Raises BadInput, as `difference`, where shapes do not fit."""
    import torch

    for name, keys in targets.items():
        shapes = {key: torch.empty(entries.get(key, ()), device="meta") for key in keys}
        difference(name, shapes, torch.empty(weights[name], device="meta"))


def difference(name: str, tensors: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """What the LoRA adds at strength 1 to the weight `name` (single-file layout) whose values are `base`; fp32.

    `tensors` are those that `targets` named. Raises BadInput where their shapes do not fit or a value is not finite,
    BadSetting where lycoris-lora is not installed.
    """
    import torch

    found = torch.zeros(base.shape, dtype=torch.float32, device="meta" if base.is_meta else "cpu")
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        module, leaf = _parsed(key)
        if not base.is_meta and not bool(tensor.float().isfinite().all()):
            raise BadInput(f"'{key}' of the LoRA holds NaN or infinity. Mend or replace that file.")
        modules[module][leaf] = tensor.double().to(found.device)
    for module, leaves in sorted(modules.items()):
        weight, target = (_as_multiplied(name, module, tensor) for tensor in (base.double().to(found.device), found))
        try:
            made = _merged_difference(leaves, weight)
            target.copy_(made.reshape(target.shape))
        except (RuntimeError, ValueError, IndexError) as error:
            shapes = ", ".join(f"{leaf} {tuple(tensor.shape)}" for leaf, tensor in leaves.items() if leaf != "alpha")
            told = (str(error).splitlines() or [""])[0][:120]
            raise BadInput(f"{module} does not fit '{name}' {tuple(base.shape)}: {shapes} ({told}).") from error
    return found.to(base.device)


def _merged_difference(leaves: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    delta = _fitted(_product(leaves, weight), weight)
    scale = leaves.get("dora_scale", leaves.get("magnitude"))
    if scale is None:
        return delta
    # Liu et al. 2024, DoRA, arXiv:2402.09353, equation 5. peft's magnitudes are of rows, LyCORIS' of rows (out, 1) or,
    # before version 3, of columns (1, in).
    rows = "magnitude" in leaves or scale.shape[0] == weight.shape[0]
    axis = 0 if rows else 1
    scale = scale.reshape([length if index == axis else 1 for index, length in enumerate(weight.shape)])
    merged: Tensor = _lycoris("general").weight_decompose(weight + delta, scale, 1, rows, backend="torch")
    return merged - weight


def _fitted(made: Tensor, weight: Tensor) -> Tensor:
    """`made` in the weight's shape: a kernel may be given as a matrix, or with axes of length 1; nothing else."""
    flat = (weight.shape[0], math.prod(weight.shape[1:])) if weight.ndim > 1 else tuple(weight.shape)
    ones = (*weight.shape, *[1] * (made.ndim - weight.ndim))
    if tuple(made.shape) not in (tuple(weight.shape), flat, ones):
        raise ValueError(f"they make {tuple(made.shape)}")
    return made.reshape(weight.shape)


def _product(leaves: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """The difference; a product is scaled by alpha / rank; without an alpha, or with 0, by 1, as in the library."""

    def scale(rank: int) -> float:
        known = "alpha" in leaves and not weight.is_meta
        alpha = float(leaves["alpha"]) if known else 0.0
        return alpha / rank if alpha else 1.0

    get = leaves.get
    for leaf in ("diff", "w_norm", "diff_b", "b_norm"):
        if leaf in leaves:
            return leaves[leaf]
    if "oft_blocks" in leaves:
        return _rotated(leaves, weight)
    if "a1" in leaves:  # Chavan et al. 2023, GLoRA, arXiv:2306.07967, of which LyCORIS has A and B
        strength = scale(leaves["a2"].shape[0])
        a1, a2 = (leaves[leaf].flatten(1) for leaf in ("a1", "a2"))
        added = _lycoris("locon").diff_weight(get("b2"), get("b1"), get("bm"), gamma=1.0, backend="torch")
        import torch

        return strength * (_fitted(added, weight) + torch.einsum("oi...,ij->oj...", weight, a1 @ a2))
    if "weight" in leaves:  # Liu et al. 2022, IA3, arXiv:2205.05638
        factor, axis = leaves["weight"].reshape(-1), 0 if weight.is_meta else int(bool(leaves["on_input"]))
        if weight.is_meta and len(factor) == weight.shape[1]:
            return weight  # of the input: the flag has no value in a header
        if len(factor) != weight.shape[axis]:
            raise ValueError(f"{len(factor)} factors")
        return weight * factor.reshape([-1 if place == axis else 1 for place in range(weight.ndim)])
    if "up" in leaves:  # Hu et al. 2021, arXiv:2106.09685
        down, up = leaves["down"], leaves["up"]
        return _lycoris("locon").diff_weight(down, up, get("mid"), gamma=scale(len(down)), backend="torch")  # type: ignore[no-any-return]
    if "hada_w1_a" in leaves:  # Hyeon-Woo et al. 2021, FedPara, arXiv:2108.06098
        import torch

        parts = [get(f"hada_{part}") for part in ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")]
        gamma = torch.tensor(scale(len(leaves["hada_w1_b"])), dtype=torch.float64)
        return _lycoris("loha").diff_weight(*parts, gamma=gamma, backend="torch")  # type: ignore[no-any-return]
    # Yeh et al. 2023, LyCORIS, arXiv:2309.14859, section 3. Two whole factors have no rank, and so no scale.
    inner = get("lokr_w1_b", get("lokr_w2_b") if "lokr_t2" not in leaves else leaves["lokr_t2"])
    parts = [get(f"lokr_{part}") for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
    strength = 1.0 if inner is None else scale(len(inner))
    return _lycoris("lokr").kron_weight(*parts, scale=strength, backend="torch")  # type: ignore[no-any-return]


def _rotated(leaves: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """Qiu et al. 2023, OFT, arXiv:2306.07280, and Liu et al. 2024, BOFT, arXiv:2311.06243: rotations of the rows."""
    blocks, rescale = leaves["oft_blocks"].float(), leaves.get("rescale")
    if blocks.ndim not in (3, 4) or math.prod(blocks.shape[-3:-1]) != len(weight):
        raise ValueError(f"blocks {tuple(blocks.shape)} for {len(weight)} rows")
    if weight.is_meta:
        return weight
    given = (blocks, None if rescale is None else rescale.float())
    constraint = float(leaves.get("alpha", 0.0)) * len(weight)  # the file's alpha is OFT's bound, not a strength
    library = _lycoris("diag_oft" if blocks.ndim == 3 else "boft")
    return library.diff_weight(weight.float(), *given, constraint=constraint, backend="torch").double()  # type: ignore[no-any-return]


def _as_multiplied(name: str, module: str, tensor: Tensor) -> Tensor:
    """The part of a single-file tensor that the module multiplies with: one of stacked three, or a transpose."""
    if name.endswith((".in_proj_weight", ".in_proj_bias")):
        return tensor.chunk(3)["qkv".index(re.sub(r".*([qkv])_proj$", r"\1", module))]
    return tensor.T if name.endswith(".text_projection") else tensor


def _module_names(weights: Mapping[str, Shape]) -> dict[str, Source]:
    """Every name that a module of the model has in LoRA files, to where its weight lies."""
    family = detect(weights).family
    found: dict[str, Source] = {}
    for part, component in family.components.items():
        for key, source in family.to_diffusers(part, weights).items():
            if key.endswith(".weight"):
                for path in _paths(key, source, component):
                    for prefix in PREFIXES.get(part, ()):
                        found[prefix + (path.replace(".", "_") if prefix.endswith("_") else path)] = source
    return found


def _paths(key: str, source: Source, component: Component) -> Iterator[str]:
    """A module's diffusers name, with and without `text_model`, and its single-file one where that is a module too."""
    path = key.removesuffix(".weight")
    yield path
    yield path.removeprefix("text_model.")
    if path.endswith(".to_out.0"):  # diffusers before peft: `attn1.processor.to_out_lora`
        yield path.removesuffix(".0")
    single = source.keys[0].removeprefix(component.prefix)
    if source.form == "as is" and single.endswith(".weight"):
        yield single.removesuffix(".weight")


def _parsed(key: str) -> tuple[str, str]:
    """Module and what the key holds; two empty strings for a key of no known kind."""
    match = _KEY.fullmatch(key)
    if not match:
        return "", ""
    return match[1].replace(".processor.", "."), LEAVES[match[2]]


def _lacking(leaves: Mapping[str, str]) -> list[str]:
    lacking = [part for leaf in leaves for part in NEEDED.get(leaf, ()) if part not in leaves]
    if any(leaf.startswith("lokr_") for leaf in leaves):
        for factor in ("lokr_w1", "lokr_w2"):
            if factor not in leaves:
                lacking += [part for part in (f"{factor}_a", f"{factor}_b") if part not in leaves]
    elif not (FIRST | OF_BIAS) & leaves.keys():
        lacking.append("a low-rank product")
    return lacking


def _lycoris(module: str) -> Any:
    try:
        return importlib.import_module(f"lycoris.functional.{module}")
    except ModuleNotFoundError as error:
        raise BadSetting(
            "LoRA files are read with the library lycoris-lora, which is not installed.\n"
            "Install it: pip install 'ambergrade[lora]'"
        ) from error
