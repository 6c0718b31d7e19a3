"""Models by their names."""

import pytest
import torch

from methods import build
from methods.backbones.load import WeightSource, load_backbone
from methods.build import build_model
from methods.model import Setting
from methods.registry import MethodError, parse

LITE = "tf_efficientnet_lite0"


@pytest.mark.parametrize("protocol", ["published", "equal"])
def test_is_the_model_that_a_run_builds(protocol):
    tasks = {"semseg": 4, "depth": 1}
    torch.manual_seed(3)
    model = build_model("ours[r=2]", LITE, tasks, (64, 96), "random", protocol)
    torch.manual_seed(3)
    (configured,) = parse("ours[r=2]")
    backbone = load_backbone("tf_efficientnet_lite0.in1k", (64, 96), WeightSource("random"))
    expected = configured.build(backbone, tasks, Setting(protocol))
    image = torch.rand(2, 3, 64, 96)
    for task, out in expected.eval()(image).items():
        torch.testing.assert_close(model.eval()(image)[task], out, rtol=0, atol=0)


def test_memory_and_decoder_are_as_asked_for():
    kept = {}
    for memory in ("default", "low"):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            build_model("decoder_only", LITE, {"depth": 1}, (64, 64), "random", memory=memory)(torch.rand(2, 3, 64, 64))
        kept[memory] = sum(sizes)
    assert kept["low"] < kept["default"]
    (mote, hrnet) = (build_model("ours", LITE, {"depth": 1}, (64, 64), "random", decoder=d) for d in (None, "hrnet"))
    assert mote.ledger().decoder != hrnet.ledger().decoder


def test_random_weights_are_never_silent(monkeypatch):
    monkeypatch.setattr("methods.backbones.load.pretrained_reachable", lambda name: False)
    with pytest.warns(UserWarning, match="random weights for tf_efficientnet_lite0.in1k") as caught:
        build_model("decoder_only", LITE, {"depth": 1}, (64, 64))
    assert caught[0].filename == __file__  # the caller's line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ours[r=2|4]", LITE, {"depth": 1}), "is 2 methods; build_model makes one"),
        (("oars", LITE, {"depth": 1}), "unknown method 'oars'.*did you mean"),
        (("ours", "swin_tinny", {"depth": 1}), "unknown backbone 'swin_tinny'.*did you mean"),
        (("mtlora", LITE, {"depth": 1}), "cannot run on tf_efficientnet_lite0"),
        (("ours", LITE, {}), "tasks map names"),
        (("ours", LITE, {"a.b": 1}), "tasks map names"),
        (("ours", LITE, {"keys": 1}), "tasks map names"),
        (("ours", LITE, {"depth": 0}), "tasks map names"),
        (("mtlora", "swin_tiny", {"norm1": 1}), "a part of the model is called 'norm1'"),
        (
            ("ours", LITE, {"depth": 1}, (64, 64), "random", "Equal"),
            "'Equal' is none of .*did you mean 'equal'",
        ),
        (
            ("ours", LITE, {"depth": 1}, (64, 64), "random", "equal", "foo"),
            "'foo' is none of segformer, hrnet",
        ),
        (("ours", LITE, {"depth": 1}, (64, 64), "random", "equal", None, "lo"), "'lo' is none of default"),
        (("ours", LITE, {"depth": 1}, 64), "image_size is .height, width., not 64"),
    ],
)
def test_what_cannot_be_built(arguments, message):
    with pytest.raises(MethodError, match=message):
        build.build_model(*(arguments if len(arguments) > 3 else (*arguments, (64, 64), "random")))


def test_a_compiled_model_is_made_once(build):
    # Graphs of other models in this process count as well: the cache belongs to the code of `forward`, which all share.
    torch._dynamo.reset()
    model = build("ours").eval()
    compiled, image = torch.compile(model, backend="eager"), torch.rand(1, 3, 64, 64)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            found = compiled(image)
        for task, out in model(image).items():
            torch.testing.assert_close(found[task], out)
    assert model.passes(image) == 1 == model.passes(image)
