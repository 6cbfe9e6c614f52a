"""Downloaded folders that try to run code, to fetch, or to hide what scores: refused, or loaded without it."""

from __future__ import annotations

import json
import pickle
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Tokens
from tokenizers import models, pre_tokenizers, processors

from ambergrade.errors import BadInput, BadSetting, MissingObject
from ambergrade.family import sdxl
from ambergrade.score.clip import open_clip_folder
from ambergrade.score.features import feature_source
from ambergrade.score.folders import load_timm
from ambergrade.score.metrics.tagger_agreement import TaggerAgreement
from ambergrade.score.tagger import Tagger

MAKE = runpy.run_path(str(Path(__file__).with_name("tiny_scorers.py")))
EVIL = {"AutoTokenizer": [None, "evil_tokens.Evil"]}
FAMILY = runpy.run_path(str(Path(__file__).parents[1] / "family" / "conftest.py"))


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there as soon as a folder's code has run."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


def plant(folder: Path, ran: Path) -> None:
    """Code beside the weights, as `auto_map` names it, and a pickle that runs it too."""
    base = "from transformers import {0}\nopen({1!r}, 'w').write('x')\nclass Evil({0}):\n    model_type = 'evil'\n"
    for name, parent in (("evil_tokens", "PreTrainedTokenizerFast"), ("evil_config", "PretrainedConfig")):
        (folder / f"{name}.py").write_text(base.format(parent, str(ran)))

    class Opens:
        def __reduce__(self) -> Any:
            return open, (str(ran), "w")

    for name in ("pytorch_model.bin", "open_clip_pytorch_model.bin", "a.pth"):
        (folder / name).write_bytes(pickle.dumps({"weight": Opens()}))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def words_clip(folder: Path, **text: Any) -> Path:
    """A CLIP with a tokenizer.json of its own words, as SigLIP's folders have one."""
    MAKE["make_clip"](folder)
    words = ["<pad>", "<end>", "<unk>", "1girl", "red", "hair", "moon", ","]
    tokens = Tokens(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    tokens.save(str(folder / "tokenizer.json"))
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "someone/words", "context_length": 12, **text}
    edit(folder / "open_clip_config.json", model_cfg=config["model_cfg"])
    state = load_file(folder / "open_clip_model.safetensors")
    state["positional_embedding"] = state["positional_embedding"][:12].contiguous()
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def test_a_clip_folder_that_asks_for_its_code_is_refused(ran: Path, tmp_path: Path) -> None:
    folder = words_clip(tmp_path / "clip", tokenizer_kwargs={"trust_remote_code": True})
    plant(folder, ran)
    edit(folder / "tokenizer_config.json", auto_map=EVIL, tokenizer_class="Evil")
    with pytest.raises(BadInput, match="tokenizer_kwargs sets trust_remote_code"):
        open_clip_folder(str(folder))
    assert not ran.exists()


def test_a_clip_folders_tokenizer_file_is_read_as_open_clip_reads_it_and_no_class(ran: Path, tmp_path: Path) -> None:
    """`auto_map` alone asks the terminal for leave and ends there; here the file is all that is read."""
    folder = words_clip(tmp_path / "clip", pool_type="last")
    theirs = HFTokenizer(str(folder), context_length=12)
    plant(folder, ran)
    edit(folder / "tokenizer_config.json", auto_map=EVIL, tokenizer_class="Evil")
    clip = open_clip_folder(str(folder))
    for text in ("1girl, red hair", "", "moon " * 30):
        assert torch.equal(clip.tokenizer([text]), theirs([text])), text
    assert not ran.exists()
    edit(folder / "tokenizer_config.json", pad_token="<none>")
    with pytest.raises(BadInput, match=r"pad_token '<none>' is not in tokenizer\.json"):
        open_clip_folder(str(folder), "squash")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(MissingObject, match=r"lacks tokenizer\.json"):
        open_clip_folder(str(folder), "squash")


@pytest.mark.parametrize(
    ("part", "setting", "told"),
    [
        ("text_cfg", {"hf_model_name": "someone/evil"}, "someone/evil"),
        ("text_cfg", {"tokenizer_kwargs": {"bpe_path": "/etc/passwd"}}, "bpe_path"),
        ("vision_cfg", {"timm_model_name": "hf-hub:someone/evil"}, "hf-hub:someone/evil"),
        ("vision_cfg", {"timm_model_name": "local-dir:/tmp"}, "local-dir:/tmp"),
    ],
)
def test_a_clip_config_names_no_network_of_another_place(
    part: str, setting: dict[str, Any], told: str, tmp_path: Path
) -> None:
    folder = MAKE["make_clip"](tmp_path / "clip")
    model = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    model[part] |= setting
    edit(folder / "open_clip_config.json", model_cfg=model)
    with pytest.raises(BadInput, match=told):
        open_clip_folder(str(folder))


def test_of_two_weight_files_open_clips_own_is_taken(ran: Path, tmp_path: Path) -> None:
    """LAION's folders hold transformers' model.safetensors too; a pickle is never a choice."""
    folder = MAKE["make_clip"](tmp_path / "clip")
    expected = open_clip_folder(str(folder)).text("1girl")
    plant(folder, ran)
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors")
    torch.testing.assert_close(open_clip_folder(str(folder), "squash").text("1girl"), expected)
    (folder / "open_clip_model.safetensors").rename(folder / "mine.safetensors")
    with pytest.raises(BadInput, match=r"mine\.safetensors, model\.safetensors"):
        open_clip_folder(str(folder), "shortest")
    for name in ("mine", "model"):
        (folder / f"{name}.safetensors").unlink()
    with pytest.raises(BadInput, match="Found: none"):
        open_clip_folder(str(folder), "shortest")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architecture": "hf-hub:someone/evil"}, "hf-hub:someone/evil"),
        ({"architecture": "local-dir:/tmp"}, "local-dir:/tmp"),
        ({"model_args": {"pretrained_cfg_overlay": {"source": "", "file": "a.pth"}}}, "pretrained_cfg_overlay"),
        ({"model_args": {"checkpoint_path": "a.pth"}}, "checkpoint_path"),
        ({"model_args": {"channels": "wide"}}, "timm cannot load"),
        ({"model_args": [1]}, "model_args must be an object"),
    ],
)
def test_a_timm_config_names_no_weights_of_another_place(
    changes: dict[str, Any], told: str, ran: Path, tmp_path: Path
) -> None:
    folder = MAKE["make_timm"](tmp_path / "net", 2)
    plant(folder, ran)
    edit(folder / "config.json", **changes)
    for load in (load_timm, feature_source):
        with pytest.raises(BadInput, match=told):
            load(str(folder))
    assert not ran.exists()


def test_a_timm_folder_with_code_and_pickles_beside_its_weights_loads_without_them(ran: Path, tmp_path: Path) -> None:
    folder = MAKE["make_timm"](tmp_path / "net", 2)
    expected = load_timm(str(folder)).network.state_dict()
    plant(folder, ran)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {
        "file": str(folder / "a.pth"),
        "source": "file",
        "custom_load": True,
        "url": "http://x",
    }
    edit(folder / "config.json", pretrained_cfg=config["pretrained_cfg"], auto_map={"AutoModel": "evil_config.Evil"})
    found = load_timm(str(folder)).network.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert not ran.exists()


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "\ufeff\x00"])
@pytest.mark.parametrize("name", ["open_clip_config.json", "config.json", "thresholds.json"])
def test_a_config_that_is_no_object_is_told(name: str, text: str, tmp_path: Path) -> None:
    made = {"open_clip_config.json": "make_clip", "config.json": "make_timm", "thresholds.json": "make_tagger"}[name]
    folder = MAKE[made](tmp_path / "x", **({"classes": 2} if name == "config.json" else {}))
    (folder / name).write_text(text)
    load: Any = {"make_clip": open_clip_folder, "make_timm": load_timm, "make_tagger": Tagger}[made]
    with pytest.raises(BadInput, match=name):
        load(str(folder))


def test_a_family_folder_that_names_code_runs_none(ran: Path, tmp_path: Path) -> None:
    """The networks' and tokenizers' classes are the family's; what a config says of classes is passed over."""
    folder = FAMILY["write_tiny_config"](tmp_path / "family")
    for part in [folder, *folder.iterdir()]:
        if part.is_dir():
            plant(part, ran)
    for name, file in (("text_encoder", "config.json"), ("text_encoder_2", "config.json"), ("unet", "config.json")):
        edit(folder / name / file, auto_map={"AutoConfig": "evil_config.Evil", "AutoModel": "evil_config.Evil"})
    for name in ("tokenizer", "tokenizer_2"):
        file = folder / name / "tokenizer_config.json"
        edit(file, auto_map=EVIL, trust_remote_code=True)
    edit(folder / "model_index.json", _class_name=["evil_config", "Evil"], unet=["evil_config", "Evil"])
    networks = sdxl.from_config(folder, seed=0)
    assert sdxl.tokenize(networks, ["red hair"])[0].shape == (1, 77)
    assert not ran.exists()


def test_what_an_onnx_graph_reads_from_other_files_is_in_its_fingerprint(tmp_path: Path) -> None:
    import onnx

    folder = MAKE["make_onnx_tagger"](tmp_path / "onnx", onnx)
    inside = Tagger(str(folder)).fingerprint["weights"]
    model = onnx.load(str(folder / "model.onnx"))
    onnx.save_model(model, str(folder / "model.onnx"), save_as_external_data=True, location="README", size_threshold=0)
    pixels = [np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)]
    before = Tagger(str(folder))
    answers = before.probabilities(pixels)
    outside = np.frombuffer((folder / "README").read_bytes(), dtype=np.uint8).copy()
    outside[: len(outside) // 2 : 4] ^= 0x80
    (folder / "README").write_bytes(outside.tobytes())
    after = Tagger(str(folder))
    assert not np.allclose(answers, after.probabilities(pixels))
    assert len({inside, before.fingerprint["weights"], after.fingerprint["weights"]}) == 3
    (folder / "rates.csv").write_text("tag,tpr,fpr,pictures\n1girl,0.9,0.1,50\n")  # it has a digest of its own
    assert Tagger(str(folder)).fingerprint["weights"] == after.fingerprint["weights"]


@pytest.mark.parametrize("value", ["NaN", "7", "-0.1", "0", "true", '"0.4"', "null", "Infinity"])
def test_a_threshold_is_a_number_between_0_and_1(value: str, folders: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(folders.tagger, tmp_path / "tagger")
    (folder / "thresholds.json").write_text(f'{{"general": 0.4, "character": {value}}}')
    with pytest.raises(BadSetting, match=r"thresholds\.json: the threshold of 'character'"):
        Tagger(str(folder))


def test_missing_thresholds_are_advised_with_their_whole_key(folders: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(folders.tagger, tmp_path / "tagger")
    (folder / "thresholds.json").unlink()
    with pytest.raises(MissingObject, match=r"suite\.metrics\.tag_adherence\.thresholds=\{character: 0\.35, general"):
        Tagger(str(folder))
    with pytest.raises(MissingObject, match=r"suite\.metrics\.tagger_agreement\.second_thresholds="):
        TaggerAgreement(str(folders.tagger), str(folder))
    save_file({k: v + 1 for k, v in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors")
    given = {"general": 0.3, "character": 0.7}
    assert TaggerAgreement(str(folders.tagger), str(folder), second_thresholds=given)._taggers[1].thresholds == given


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("selected_tags.csv", "tag_id,name,category,count\n0,general\n", "in every row"),
        ("selected_tags.csv", "tag_id,name,category,count\n0,general,9,many\n", "whole number"),
        ("rates.csv", "tag,tpr,fpr,pictures\n1girl,NaN,0.1,50\n", "no rate"),
        ("rates.csv", "tag,tpr,fpr,pictures\n1girl,0.9,lots,50\n", "no rate"),
    ],
)
def test_damaged_tables_of_a_tagger_are_told(name: str, text: str, told: str, folders: Any, tmp_path: Path) -> None:
    from ambergrade.score.metrics.tag_adherence import TagAdherence

    folder = shutil.copytree(folders.tagger, tmp_path / "tagger")
    (folder / name).write_text(text)
    with pytest.raises(BadInput, match=told):
        TagAdherence(str(folder))
