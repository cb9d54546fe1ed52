"""Layers that are made to see the images of all processes give what they gave before."""

import copy

import pytest
import torch
from networks import classifier, moved_statistics, pixels, stage

from rtl_dist.model.batchnorm import learning_layers
from rtl_dist.model.divided import divide
from rtl_dist.model.freezing import freeze_for
from rtl_dist.model.sync_batchnorm import synchronize_batchnorm

# True: timm's BatchNormAct2d is among the layers, whose activation torch's converter drops.
FAMILIES = {
    "test_resnet": False,
    "basic_cnn": False,
    "torchvision:mobilenet_v3_small": False,
    "test_efficientnet": True,
    "test_byobnet": True,
    "mnasnet_small": True,
    "ese_vovnet19b_slim": True,
    "mobilenetv3_small_050": True,
    "regnety_002": True,
    "resnetv2_50": True,
}
MORE = {
    **dict.fromkeys(
        ("densenet121", "regnetz_005", "mobilenetv4_conv_small_035", "efficientnet_lite0",
         "tinynet_e", "fbnetv3_b", "ghostnet_050", "rexnetr_100", "cspresnet50", "vovnet39a",
         "skresnet18", "xception41p"),
        True,
    ),
    **dict.fromkeys(
        ("resnetblur18", "resnest14d", "seresnet18", "res2net50_14w_8s", "dla46_c", "repvgg_a0",
         "hrnet_w18_small", "mobileone_s0", "selecsls42", "starnet_s050", "inception_next_atto",
         "torchvision:shufflenet_v2_x0_5"),
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "has_activations"),
    [
        *FAMILIES.items(),
        *(pytest.param(*item, marks=pytest.mark.exhaustive) for item in MORE.items()),
    ],
)
def test_every_family_gives_the_same(name, has_activations):
    plain = moved_statistics(classifier(name))
    model, images = copy.deepcopy(plain), pixels(3, side=64)
    synchronize_batchnorm(model)
    assert learning_layers(model).keys() == learning_layers(plain).keys() != set()
    assert all(isinstance(m, torch.nn.SyncBatchNorm) for m in learning_layers(model).values())
    for is_training in (False, True):  # one process: in training too each sees its own alone
        scores = []
        for one in (plain, model):
            torch.manual_seed(0)
            scores.append(one.train(is_training)(images))
        assert torch.equal(*scores)
    state = plain.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    dropped = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    with torch.no_grad():
        assert torch.equal(dropped.eval()(images), plain.eval()(images)) is not has_activations


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
@pytest.mark.parametrize("trainable", ["head", "all"])
def test_a_stage_freezes_and_cuts_them_as_before(name, trainable):
    plain = moved_statistics(classifier(name))
    model, images = copy.deepcopy(plain), pixels(3)
    synchronize_batchnorm(model)
    first, scores = {"head": "head", "all": "stem"}[trainable], []
    for one in (plain, model):
        freeze_for(one, stage(trainable=trainable))
        divided = divide(one.eval(), first, dtype=None)
        inputs = images if divided.frozen is None else divided.frozen(images)
        scores.append(divided.trained(inputs))
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)  # folded into convolutions or not
    frozen = [
        {n for n, p in one.named_parameters() if not p.requires_grad} for one in (plain, model)
    ]
    assert frozen[0] == frozen[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "resnetv2_50"])
def test_on_a_gpu_too(name):
    plain = moved_statistics(classifier(name)).cuda().eval()
    model, images = copy.deepcopy(plain), pixels(3, side=64).cuda()
    synchronize_batchnorm(model)
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(images), rtol=1e-3, atol=1e-4)
