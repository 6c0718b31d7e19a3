"""Decoders against the plain reading of their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from methods.decoder import LinearFuse, hrnet, segformer
from methods.model import Features

CHANNELS = (8, 12, 20, 28)
SIZES = ((13, 9), (7, 5), (4, 3), (2, 2))


def maps(widths=CHANNELS, sizes=SIZES, batch=2):
    return [torch.randn(batch, w, *size, requires_grad=True) for w, size in zip(widths, sizes, strict=True)]


def concatenated(xs):
    size = xs[0].shape[-2:]
    return torch.cat([F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in xs], 1)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_fuse_is_upsample_concatenate_linear(bias):
    torch.manual_seed(0)
    fuse = LinearFuse(CHANNELS, 5, bias)
    xs = maps()
    ours = fuse([x.permute(0, 2, 3, 1) for x in xs])
    theirs = F.conv2d(concatenated(xs), fuse.linear.weight[:, :, None, None], fuse.linear.bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    inputs, weight = [*xs, *fuse.parameters()], torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((theirs * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * weight.numel() ** 0.5)


@pytest.mark.parametrize("norms", ["per_task", "shared"])
def test_segformer_by_definition(norms):
    torch.manual_seed(0)
    decoder = segformer({"semseg": 5, "depth": 1}, CHANNELS, norms=norms, width=16).eval()
    xs = {"semseg": maps(), "depth": maps()}
    logits = decoder(Features(xs))
    for task, out in (("semseg", 5), ("depth", 1)):
        head, necks = decoder.heads[task], decoder.necks[task]
        projected = []
        for i, x in enumerate(xs[task]):
            norm, linear = necks[i] if norms == "per_task" else (decoder.shared_norms[i], necks[i])
            projected.append(linear(norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2))
        fused = F.conv2d(concatenated(projected), head.fuse.linear.weight[:, :, None, None])
        expected = head.predict(head.norm(fused).relu())
        assert logits[task].shape == (2, out, *SIZES[0])
        torch.testing.assert_close(logits[task], expected, rtol=1e-5, atol=1e-5)


def test_hrnet_by_definition():
    torch.manual_seed(0)
    decoder = hrnet({"semseg": 5, "normals": 3}, CHANNELS, widths=(2, 3, 4, 5)).eval()
    xs = {"semseg": maps(), "normals": maps()}
    logits = decoder(Features(xs))
    for task, out in (("semseg", 5), ("normals", 3)):
        head, necks = decoder.heads[task], decoder.necks[task]
        projected = [F.conv2d(x, neck.weight[:, :, None, None]) for x, neck in zip(xs[task], necks, strict=True)]
        expected = head.predict(head.norm(head.expand(concatenated(projected))).relu())
        assert head.expand.weight.shape == (4 * 14, 14, 1, 1)
        assert logits[task].shape == (2, out, *SIZES[0])
        torch.testing.assert_close(logits[task], expected, rtol=1e-5, atol=1e-5)
