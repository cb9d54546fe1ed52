"""Whether a checkpoint may be continued: what differs, and what an earlier version did not know."""

import copy

import pytest

from rtl_dist.config import parse_config
from rtl_dist.config.convert import to_dict
from rtl_dist.core.errors import UserError
from rtl_dist.records.identity import refuse_other_identity

CONFIG = parse_config(
    {
        "data": {"path": "x"},
        "augment": {"rotation": 3},
        "stages": [
            {
                "name": "head",
                "epochs": 1,
                "lr": 1,
                "augment": {"hflip": 0},
                "early_stop": {},
                "optim": {"name": "sgd"},
            }
        ],
    }
)


def identity() -> dict:
    return {
        "config": copy.deepcopy(to_dict(CONFIG)),
        "dataset_fingerprint": "a" * 64,
        "classes": ["ant", "bee"],
    }


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (("augment",), "erasing"),
        (("stages", 0), "views"),
        (("stages", 0, "augment"), "erasing"),
        (("stages", 0, "early_stop"), "patience"),
        (("stages", 0), "schedule"),
        (("stages", 0, "optim"), "min_lr"),
        (("optim",), "skip_limit"),
        (("optim",), "step_size"),
        (("model",), "small_stem"),
        ((), "tf32"),
        ((), "optim"),  # a whole section
    ],
)
def test_a_key_that_an_earlier_version_did_not_know_counts_as_its_default(tmp_path, section, key):
    then = identity()
    place = then["config"]
    for name in section:
        place = place[name]
    del place[key]
    refuse_other_identity(tmp_path, then, identity())
    place[key] = "another"
    with pytest.raises(UserError, match=f"{'.'.join([*map(str, section), key])} was 'another'"):
        refuse_other_identity(tmp_path, then, identity())
