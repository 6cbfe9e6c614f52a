"""The text encoders learn words before pictures."""

import torch

from ambergrade.family import sdxl
from ambergrade.store import find_file
from ambergrade.world.text import _known, teach


def test_a_tag_is_known_from_its_last_token_on():
    known = _known(["smile, blue hair"], {"blue hair": 0, "smile": 1}, {"blue hair": 2, "smile": 1}, tokens=7)
    # begin, smile, comma, blue, hair, end, padding
    assert known[0, :, 1].tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert known[0, :, 0].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_teaching_lowers_the_loss_and_binds_colours():
    networks = sdxl.from_config(find_file("builtin://sdxl_tiny"), seed=3)
    colours, things = ("blue", "red", "green"), ("hair", "eyes", "dress")
    captions = [[f"{colours[(i + k) % 3]} {thing}" for k, thing in enumerate(things)] for i in range(3)]
    first = teach(networks, captions, steps=1, batch=16)
    last = teach(networks, captions, steps=40, batch=16)
    assert last < 0.7 * first
    with torch.inference_mode():
        _, pooled = networks.encode_text(["blue hair, red eyes", "red hair, blue eyes"])
    assert not torch.allclose(pooled[0], pooled[1], atol=1e-3)
