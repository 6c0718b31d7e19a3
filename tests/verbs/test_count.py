"""`bench count` against counts worked out by hand."""

from __future__ import annotations

import pandas as pd
import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.errors import BenchError
from bench.verbs import count
from methods.registry import MethodError


def invoke(*arguments):
    return CliRunner().invoke(app, ["count", *arguments])


def test_both_protocols_passes_and_the_printed_figure():
    rows = count.counts("ours,adapter,mtlora", "swin_tiny", "scenes", None, (224, 224)).set_index("method")
    assert rows["published"].tolist() == [2.362108, 11.237024, 8.344634]
    decoder = 2.549024
    # Without MTLoRA's extras and HRNet heads; ours with the common decoder in place of its own.
    assert rows.loc["mtlora", "equal"] == pytest.approx(4.798464 + decoder)
    assert rows.loc["adapter", "equal"] == rows.loc["adapter", "published"]
    assert rows["printed"].tolist() == [2.36, 11.24, 8.34]
    assert rows["passes"].tolist() == [1, 4, 1]


def test_fewer_tasks_count_less():
    four, two = (count.counts("adapter", "swin_tiny", "scenes", t, (224, 224)) for t in (None, "semseg,normals"))
    assert two["passes"].tolist() == [2] and four["passes"].tolist() == [4]
    # Half the adapters; a decoder without its heads for human parts (7) and saliency (1).
    head = 256 * (96 + 192 + 384 + 768 + 4) + 1024 * 256 + 512 + 2 * 1440
    lost = 2 * (2_156_544 + 3.5 * 4_416) + 2 * head + 257 * (7 + 1)
    assert four["published"][0] - two["published"][0] == pytest.approx(lost / 1e6)


def test_all_leaves_out_what_cannot_run():
    heard = []
    rows = count.counts("all", "pvt_v2_b0", "scenes", None, (64, 64), heard.append)
    assert "adapter" in set(rows["method"]) and "mtlora" not in set(rows["method"])
    assert any("mtlora" in line and "pvt_v2_b0" in line for line in heard)
    assert rows["printed"].isna().all()
    with pytest.raises(MethodError, match="mtlora needs a Swin Transformer or a plain ViT"):
        count.counts("mtlora", "pvt_v2_b0", "scenes", None, (64, 64))


def test_a_named_method_that_one_backbone_cannot_serve_is_left_out_there():
    heard = []
    rows = count.counts("mtlora,bitfit", "swin_tiny,pvt_v2_b0", "scenes", None, (64, 64), heard.append)
    assert len(rows) == 3 and len(heard) == 1 and heard[0].startswith("left out: mtlora needs")
    with pytest.raises(MethodError, match="mtlora needs"):
        count.counts("mtlora,bitfit", "resnet18,pvt_v2_b0", "scenes", None, (64, 64))


def test_a_fault_in_a_methods_forward_is_one_line(monkeypatch):
    def passes(model, image):
        raise AttributeError("no attribute 'scael'\nand more")

    monkeypatch.setattr("methods.model.MultiTaskModel.passes", passes)
    shown = invoke("--methods", "bitfit", "--backbone", "resnet18", "--image-size", "64")
    assert shown.exit_code == 2
    (line,) = shown.stderr.strip().splitlines()
    assert "bitfit cannot run: AttributeError: no attribute 'scael'" in line


@pytest.mark.parametrize("text", ["all", "ours, all", "all, -mtlora", " all"])
def test_all_is_all_wherever_it_stands(text):
    assert "adapter" in set(count.counts(text, "pvt_v2_b0", "scenes", None, (64, 64))["method"])


def test_a_backbone_that_cannot_take_the_size_costs_all_no_other_backbone():
    shown = invoke("--methods", "all,-ditask", "--backbone", "resnet18,dinov2_small", "--image-size", "256")
    assert shown.exit_code == 0 and "bitfit" in shown.stdout
    assert "left out: " in shown.stderr and "256" in shown.stderr and "vit_small" in shown.stderr
    refused = invoke("--methods", "bitfit", "--backbone", "resnet18,dinov2_small", "--image-size", "256")
    assert refused.exit_code == 2 and "256" in refused.stderr


def test_markdown():
    table = pd.DataFrame({"backbone": ["b", "b"], "method": ["x", "y[r=2]"], "published": [1.234, float("nan")]})
    assert count.markdown(table).splitlines() == [
        "| method | published |",
        "| --- | ---: |",
        "| x | 1.23 |",
        "| y[r=2] | – |",
    ]


def test_the_verb(monkeypatch):
    done = invoke("--methods", "decoder_only,relative_bias", "--image-size", "64", "--markdown")
    assert done.exit_code == 0
    assert "| decoder_only | 1 | 2.55 | 2.55 | 2.55 |" in done.output
    assert "| relative_bias | 4 | 2.64 | 2.64 | 2.64 |" in done.output
    table = invoke("--methods", "decoder_only", "--image-size", "64")
    assert "Trainable parameters in millions" in table.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "decoder_onli"), "unknown method 'decoder_onli' (did you mean 'decoder_only'?)"),
        (("--methods", "ours", "--image-size", "big"), "neither a number nor HEIGHTxWIDTH"),
        (("--methods", "ours", "--tasks", "semsec"), "no task 'semsec'"),
        (("--methods", "ours", "--backbone", "swin_tinny"), "unknown backbone 'swin_tinny'"),
    ],
)
def test_errors_are_one_line(arguments, message):
    done = invoke(*arguments)
    assert done.exit_code == 2 and "Traceback" not in done.output
    assert message in done.output


def test_nothing_to_count():
    with pytest.raises((BenchError, MethodError)):
        count.counts("", "swin_tiny", "scenes", None, (64, 64))


def test_a_decoder_in_place_of_the_protocols_choice():
    """`hrnet` is MTLoRA's own, `segformer` that of the protocol `equal`: each protocol's count with the other's."""
    asked = ("mtlora", "swin_tiny", "scenes", "semseg,normals", (64, 64))
    (own,) = count.counts(*asked).to_dict("records")
    (segformer,) = count.counts(*asked, decoder="segformer").to_dict("records")
    (hrnet,) = count.counts(*asked, decoder="hrnet").to_dict("records")
    assert segformer["equal"] == own["equal"] and hrnet["published"] == own["published"] != segformer["published"]
    printed = [
        count.counts("mtlora", "swin_tiny", "scenes", None, (64, 64), decoder=d)["printed"] for d in (None, "hrnet")
    ]
    assert printed[0].notna().all() and printed[1].isna().all()


def test_an_unknown_decoder_is_one_line():
    done = CliRunner().invoke(app, ["count", "--decoder", "hrnte"])
    assert done.exit_code == 2 and "unknown decoder 'hrnte' (did you mean 'hrnet'?)" in " ".join(done.output.split())
