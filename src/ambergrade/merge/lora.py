"""LoRA files as differences of weights: LoRA, LoCon, LoHa, LoKr, each also as DoRA; kohya's and peft's key names.

The products are made by lycoris-lora, an optional library, in float64: those of fp16 and bf16 files are exact there but
for the widest ranges, so the sum does not depend on the order in which a processor adds. Names are resolved by the
model's family, so that a file in either naming fits a checkpoint in either layout.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ambergrade.errors import BadInput, BadSetting, nearest
from ambergrade.family.detect import detect
from ambergrade.family.layouts import Component, Shape, Source, listed

if TYPE_CHECKING:
    from torch import Tensor

LEAVES = {
    "lora_up.weight": "up",
    "lora_down.weight": "down",
    "lora_mid.weight": "mid",
    "lora.up.weight": "up",  # diffusers before peft
    "lora.down.weight": "down",
    "lora_B.weight": "up",
    "lora_A.weight": "down",
    "lora_B.default.weight": "up",
    "lora_A.default.weight": "down",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
    **{leaf: leaf for leaf in ("alpha", "dora_scale", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{leaf: leaf for leaf in ("hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2")},
    **{leaf: leaf for leaf in ("lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}
"""How a key ends, to what it holds. `up` is peft's B, `down` its A."""
NEEDED = {"up": ("down",), "down": ("up",), "hada_w1_a": ("hada_w1_b", "hada_w2_a", "hada_w2_b")}
PREFIXES = {
    "unet": ("lora_unet_", "unet.", "base_model.model.", "diffusion_model."),
    "text_encoder": ("lora_te1_", "lora_te_", "text_encoder."),
    "text_encoder_2": ("lora_te2_", "text_encoder_2."),
}
"""What stands before a module's name: kohya's, in which underscores stand for dots, and diffusers' and ComfyUI's."""
_KEY = re.compile(r"(.+?)(?:\.|_(?=lora\.))(" + "|".join(map(re.escape, sorted(LEAVES, key=len, reverse=True))) + ")")


def targets(
    entries: Mapping[str, Shape], weights: Mapping[str, Shape], metadata: Mapping[str, str] | None = None
) -> dict[str, tuple[str, ...]]:
    """For each weight that a LoRA changes, the LoRA's tensors that it needs; from headers alone.

    `entries` are names and shapes of the LoRA file, `weights` those of the model in its single-file layout, `metadata`
    the LoRA file's own. Raises BadInput naming every key that nothing uses, modules that lack a part, weights that two
    modules change, and scales that only the metadata tell.
    """
    _refuse_scales_in(metadata or {})
    names = _module_names(weights)
    complaints: list[str] = []
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    for key in sorted(entries):
        module, leaf = _parsed(key)
        if not module:
            complaints.append(f"{key}: not a key of LoRA, LoCon, LoHa, LoKr or DoRA")
        elif module not in names:
            near = nearest(module, names, 1) if len(complaints) < 3 else []  # a search of seconds
            complaints.append(f"{key}: the model has no such module" + (f"; the nearest is {near[0]}" if near else ""))
        else:
            modules[module][leaf] = key
    found: dict[str, list[str]] = defaultdict(list)
    taken: dict[tuple[str, int], str] = {}
    for module, leaves in modules.items():
        source = names[module]
        place = (source.keys[0], source.part)
        complaints += [f"{module}: lacks {part}" for part in _lacking(leaves)]
        if place in taken:
            complaints.append(f"{module}: changes the same weight as {taken[place]}")
        taken[place] = module
        found[source.keys[0]] += leaves.values()
    if complaints:
        raise BadInput(
            f"The LoRA does not fit the model; {len(complaints)} complaints:\n{listed(complaints, 12)}\n"
            "Check that it was made for this family, and that it is one of these kinds."
        )
    return {name: tuple(sorted(keys)) for name, keys in sorted(found.items())}


def difference(name: str, tensors: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """What the LoRA adds at strength 1 to the weight `name` (single-file layout) whose values are `base`; fp32.

    `tensors` are those that `targets` named. Raises BadInput where their shapes do not fit, BadSetting where
    lycoris-lora is not installed.
    """
    import torch

    found = torch.zeros(base.shape, dtype=torch.float32)
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        module, leaf = _parsed(key)
        modules[module][leaf] = tensor.double().cpu()
    for module, leaves in sorted(modules.items()):
        weight, target = (_as_multiplied(name, module, tensor) for tensor in (base.double().cpu(), found))
        try:
            made = _merged_difference(leaves, weight)
            target.copy_(made.reshape(target.shape))
        except RuntimeError as error:
            shapes = ", ".join(f"{leaf} {tuple(tensor.shape)}" for leaf, tensor in leaves.items())
            raise BadInput(f"{module} does not fit '{name}' {tuple(base.shape)}: {shapes} ({error}).") from error
    return found.to(base.device)


def _merged_difference(leaves: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    delta = _product(leaves).reshape(weight.shape)
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


def _product(leaves: Mapping[str, Tensor]) -> Tensor:
    """The low-rank product, scaled by alpha / rank; without an alpha, or with 0, by 1, as in the library."""

    def scale(rank: int) -> float:
        alpha = float(leaves["alpha"]) if "alpha" in leaves else 0.0
        return alpha / rank if alpha else 1.0

    get = leaves.get
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
    factor = 1.0 if inner is None else scale(len(inner))
    return _lycoris("lokr").kron_weight(*parts, scale=factor, backend="torch")  # type: ignore[no-any-return]


def _as_multiplied(name: str, module: str, tensor: Tensor) -> Tensor:
    """The part of a single-file tensor that the module multiplies with: one of stacked three, or a transpose."""
    if name.endswith(".in_proj_weight"):
        return tensor.chunk(3)["qkv".index(re.sub(r".*([qkv])_proj$", r"\1", module))]
    return tensor.T if name.endswith(".text_projection") else tensor


def _module_names(weights: Mapping[str, Shape]) -> dict[str, Source]:
    """Every name that a module of the model has in LoRA files, to where its weight lies."""
    family = detect(weights).family
    found: dict[str, Source] = {}
    for part, component in family.components.items():
        for key, source in family.to_diffusers(part, weights).items():
            if key.endswith(".weight") and len(source.shape(weights)) > 1:
                for path in _paths(key, source, component):
                    for prefix in PREFIXES.get(part, ()):
                        found[prefix + (path.replace(".", "_") if prefix.endswith("_") else path)] = source
    return found


def _paths(key: str, source: Source, component: Component) -> Iterator[str]:
    """A module's diffusers name, with and without `text_model`, and its single-file one where that is a module too."""
    path = key.removesuffix(".weight")
    yield path
    yield path.removeprefix("text_model.")
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
    elif not {"up", "down", "hada_w1_a"} & leaves.keys():
        lacking.append("a low-rank product")
    return lacking


def _refuse_scales_in(metadata: Mapping[str, str]) -> None:
    """peft files may keep alphas in their header; a scale that is not read would be a wrong strength."""
    try:
        adapter: dict[str, Any] = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except json.JSONDecodeError as error:
        raise BadInput(f"The LoRA's lora_adapter_metadata is no JSON: {error}.") from error
    for key, value in adapter.items():
        part, _, setting = key.rpartition(".")
        rank = adapter.get(f"{part}.r" if part else "r")
        if (setting == "lora_alpha" and value != rank) or (setting in {"alpha_pattern", "use_rslora"} and value):
            raise BadInput(
                f"The LoRA's header scales it ({key} = {value}, rank {rank}), which is not read.\n"
                "Convert the file to kohya's keys, which hold alpha beside each module."
            )


def _lycoris(module: str) -> Any:
    try:
        return importlib.import_module(f"lycoris.functional.{module}")
    except ModuleNotFoundError as error:
        raise BadSetting(
            "LoRA files are read with the library lycoris-lora, which is not installed.\n"
            "Install it: pip install 'ambergrade[lora]'"
        ) from error
