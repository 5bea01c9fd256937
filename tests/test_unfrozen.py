"""tests/unfrozen.py, the fork that trains the image tower too."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import unfrozen
from conftest import ROOT
from safetensors.torch import load_file
from test_paraclip import difference, gradients, naive_terms

import paraclip
from paraclip import PARACLIP


def test_one_step_has_the_naive_gradients_in_both_towers(world, tmp_path, monkeypatch):
    """In chunks of images, which backward encodes again, and of texts cut to their length."""
    paraclip.set_up_ranks()
    monkeypatch.setattr(unfrozen, "IMAGES_AT_ONCE", 5)
    args = f"--rows {world}/rows.jsonl --images {world}/images --output {tmp_path} --workers 0 --batch-size 12"
    clips = []
    for _ in range(2):
        model = paraclip.load_model(f"local-dir:{world}/clip")
        model.clip.visual.requires_grad_(True)
        clips.append(model.clip.double())
    clip, naive = clips
    data = unfrozen.Data(model, paraclip.parse_args(args.split()))
    tokens, pixels = data.batch(np.arange(12))

    loss = unfrozen.total_loss(paraclip.TextEncoder(clip), tokens, pixels, PARACLIP)
    loss.backward()
    dist.destroy_process_group()
    image_features = naive.encode_image(pixels.double(), normalize=True)
    expected = sum(naive_terms(naive, tokens, image_features, PARACLIP).values())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert any("visual" in name for name in gradients(naive))
    assert difference(gradients(clip), gradients(naive)) < 1e-5


def test_a_run_moves_both_towers(world, tmp_path):
    """Its output is a model that open_clip and evaluate.py read."""
    flags = f"--rows {world}/rows.jsonl --images {world}/images --model {world}/clip --lr 1e-3"
    flags += f" --image-lr 1e-3 --batch-size 40 --workers 0 --output {tmp_path}/run"
    command = [sys.executable, ROOT / "tests" / "unfrozen.py", *flags.split()]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before = load_file(world / "clip" / "open_clip_model.safetensors")
    after = load_file(tmp_path / "run" / "open_clip_model.safetensors")
    for key, tensor in before.items():
        assert not torch.equal(tensor, after[key])
    assert paraclip.load_model(f"{tmp_path}/run")
