"""What weights predict, read from every place where files say so."""

import json

import pytest

from ambergrade.errors import BadInput
from ambergrade.family.digests import weights_sha256
from ambergrade.family.files import write_tensors
from ambergrade.family.load import family
from ambergrade.family.prediction import lacking_marks, prediction_type, read_scheduler

SPEC = "modelspec.prediction_type"


@pytest.mark.parametrize(
    ("keys", "metadata", "scheduler", "expected"),
    [
        ([], {}, {}, None),
        (["v_pred"], {}, {}, "v"),
        (["v_pred"], {SPEC: "epsilon"}, {"prediction_type": "epsilon"}, "v"),  # the mark is what loaders look at
        ([], {SPEC: "v"}, {}, "v"),
        ([], {SPEC: "epsilon"}, {}, "epsilon"),
        ([], {}, {"prediction_type": "v_prediction"}, "v"),
        ([], {}, {"prediction_type": "epsilon"}, "epsilon"),
        ([], {}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow"),
        ([], {}, {"prediction_type": "flow_prediction"}, "flow"),
        ([], {}, {"prediction_type": "sample"}, "sample"),
        (["edm_mean", "edm_std"], {}, {}, "edm"),
        (["edm_vpred.sigma_max"], {}, {}, "edm v"),
    ],
)
def test_every_place_is_read(keys, metadata, scheduler, expected):
    assert prediction_type(keys, metadata, scheduler) == expected


def test_marks_that_a_single_file_lacks():
    assert lacking_marks([], {}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}) == [
        "v_pred",
        "ztsnr",
    ]
    assert lacking_marks(["v_pred"], {}, {"prediction_type": "v_prediction"}) == []
    assert lacking_marks([], {SPEC: "v"}, {}) == ["v_pred"]
    assert lacking_marks([], {SPEC: "epsilon"}, {}) == []


def test_a_headers_word_reaches_the_networks(tiny_config, tmp_path):
    """Such a file said epsilon to the loader and drew noise."""
    tiny = family("sdxl_tiny")
    weights = tiny.networks.from_config(tiny_config, seed=1).tensors()
    write_tensors(tmp_path / "v.safetensors", weights, {SPEC: "v"})
    assert tiny.read_checkpoint(tmp_path / "v.safetensors").keys() - weights.keys() == {"v_pred"}
    assert weights_sha256(tmp_path / "v.safetensors") == tiny.weights_digest(tmp_path / "v.safetensors")
    assert (
        tiny.networks.load(tmp_path / "v.safetensors", tiny_config).scheduler_config["prediction_type"]
        == "v_prediction"
    )
    write_tensors(tmp_path / "flow.safetensors", weights, {SPEC: "flow"})
    with pytest.raises(BadInput, match=r"flow\.safetensors predicts 'flow'"):
        tiny.networks.load(tmp_path / "flow.safetensors", tiny_config)


def test_a_scheduler_that_is_no_json_is_told(tmp_path):
    (tmp_path / "scheduler").mkdir()
    for text in ("[", "[1]", json.dumps("x")):
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(text)
        with pytest.raises(BadInput, match="no JSON object"):
            read_scheduler(tmp_path)
