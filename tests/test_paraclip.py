"""paraclip.py against the naive computation: open_clip's own towers at 77 tokens and a six-line InfoNCE."""

import argparse
import glob
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import paraclip  # noqa: E402
from generate import InputError, read_rows, run  # noqa: E402

PARACLIP = [("I", "T2"), ("T", "T1"), ("T1", "T2")]


# ---------------------------------------------------------------- the naive computation


def naive_info_nce(a, b, scale):
    logits = scale * a @ b.T
    targets = torch.arange(len(a))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def naive_terms(clip, tokens, image_features, pairs):
    """The terms of the loss with open_clip's encode_text at 77 tokens, the whole batch on one process."""
    features = {kind: F.normalize(clip.encode_text(tokens[kind]), dim=-1) for kind in tokens}
    features["I"] = image_features.to(clip.logit_scale.dtype)
    return {f"{a}:{b}": naive_info_nce(features[a], features[b], clip.logit_scale.exp()) for a, b in pairs}


def examples_of(world, pairs, tokenizer, count=24, dim=32):
    """Examples on the first rows with random stored image features."""
    kinds = [kind for kind in paraclip.TEXT_KEYS if any(kind in pair for pair in pairs)]
    examples = paraclip.Examples(itertools.islice(read_rows(world / "rows.jsonl"), count), kinds, tokenizer)
    features = F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(1)), dim=-1).half().numpy()
    examples.use_features([features[:10], features[10:]], {image_id: i for i, image_id in enumerate(examples.image_ids)})
    return examples


def gradients(clip):
    return {name: p.grad.clone() for name, p in clip.named_parameters() if p.grad is not None}


def difference(one, other):
    """Largest difference over all tensors, each relative to its largest element."""
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max() / other[key].abs().max()) for key in one)


@pytest.fixture
def alone():
    """A process group of this process alone."""
    paraclip.set_up_ranks()
    yield
    dist.destroy_process_group()


def naive_step(model, world, pairs, dtype, count=24):
    clip, _, tokenizer = paraclip.load_model(model)
    clip.to(dtype)
    tokens, image_features = examples_of(world, pairs, tokenizer, count)[np.arange(count)]
    terms = naive_terms(clip, tokens, image_features, pairs)
    sum(terms.values()).backward()
    return {name: value.item() for name, value in terms.items()}, gradients(clip)


def worker(model, world, out, micro_batch):
    """One step of paraclip.py on this rank's half of 24 examples in fp64; rank 0 saves terms and gradients."""
    paraclip.set_up_ranks()
    clip, _, tokenizer = paraclip.load_model(model)
    clip.double()
    config = argparse.Namespace(batch_size=24, epochs=1, seed=0)
    part = next(paraclip.batches(24, config, 0))
    tokens, image_features = examples_of(Path(world), PARACLIP, tokenizer)[part]
    encoder = torch.nn.parallel.DistributedDataParallel(paraclip.TextEncoder(clip, int(micro_batch)))
    terms = paraclip.loss_terms(encoder, tokens, image_features, PARACLIP)
    (dist.get_world_size() * sum(terms.values())).backward()
    shares = torch.stack(list(terms.values())).detach()
    dist.all_reduce(shares)
    if dist.get_rank() == 0:
        torch.save({"terms": dict(zip(terms, shares.tolist())), "gradients": gradients(clip)}, out)
    dist.destroy_process_group()


def torchrun(*arguments, options=(), **kwargs):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *map(str, arguments)], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, **kwargs)


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("micro_batch", [0, 7])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_one_step_equals_the_naive_one(world, alone, micro_batch, dtype, bound):
    model = f"local-dir:{world}/clip"
    expected, expected_gradients = naive_step(model, world, PARACLIP, dtype)
    clip, _, tokenizer = paraclip.load_model(model)
    tokens, image_features = examples_of(world, PARACLIP, tokenizer)[np.arange(24)]
    terms = paraclip.loss_terms(paraclip.TextEncoder(clip.to(dtype), micro_batch), tokens, image_features, PARACLIP)
    sum(terms.values()).backward()
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected, rel=bound)
    assert "logit_scale" in expected_gradients and not any("visual" in name for name in expected_gradients)
    assert difference(gradients(clip), expected_gradients) < bound


@pytest.mark.parametrize("micro_batch", [0, 7])
def test_two_ranks_equal_the_naive_step(world, tmp_path, micro_batch):
    model, out = f"local-dir:{world}/clip", tmp_path / "step.pt"
    process = torchrun(__file__, model, world, out, micro_batch)
    assert process.wait(120) == 0, process.stdout.read()
    step = torch.load(out)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).numpy()
    clip, _, tokenizer = paraclip.load_model(model)
    tokens, image_features = examples_of(world, PARACLIP, tokenizer)[order]
    expected = naive_terms(clip.double(), tokens, image_features, PARACLIP)
    sum(expected.values()).backward()
    assert step["terms"] == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-10)
    assert difference(step["gradients"], gradients(clip)) < 1e-10


def test_info_nce_in_row_blocks_and_shares(monkeypatch):
    a, b = F.normalize(torch.randn(2, 10, 8, dtype=torch.float64), dim=-1).requires_grad_()
    a, b, scale = a.detach().requires_grad_(), b.detach().requires_grad_(), torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(naive_info_nce(a, b, scale), (a, b, scale))
    monkeypatch.setattr(paraclip, "BLOCK", 3)
    shares = [paraclip.info_nce(a, b, scale, slice(start, start + 5)) for start in (0, 5)]
    assert sum(shares).item() == pytest.approx(naive_info_nce(a, b, scale).item(), rel=1e-12)
    for one, other in zip(torch.autograd.grad(sum(shares), (a, b, scale)), expected):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-14)


def test_batches_are_the_same_for_any_number_of_ranks(monkeypatch):
    config = argparse.Namespace(batch_size=12, epochs=2, seed=3)
    parts = {}
    for world_size in (1, 2, 3):
        monkeypatch.setattr(dist, "get_world_size", lambda w=world_size: w)
        for rank in range(world_size):
            monkeypatch.setattr(dist, "get_rank", lambda r=rank: r)
            parts[world_size, rank] = list(paraclip.batches(40, config, 1))
    for step in range(5):
        whole = parts[1, 0][step].tolist()
        for world_size in (2, 3):
            assert whole == [i for rank in range(world_size) for i in parts[world_size, rank][step].tolist()]
    first, second = ([i for step in steps for i in parts[1, 0][step].tolist()] for steps in ((0, 1), (2, 3, 4)))
    assert len(set(first)) == 24 and len(set(second)) == 36  # an epoch repeats no row


def test_three_steps_of_adamw_equal_a_naive_loop(world, alone, tmp_path):
    model = f"local-dir:{world}/clip"
    config = paraclip.Config(batch_size=8, lr=1e-3, weight_decay=0.1, workers=0, output=str(tmp_path), save_every=2)
    clip, _, tokenizer = paraclip.load_model(model)
    examples = examples_of(world, PARACLIP, tokenizer)
    encoder = paraclip.TextEncoder(clip.double())
    paraclip.train(encoder, paraclip.make_optimizer(encoder, config), examples, PARACLIP, 3, 0, config)

    naive, _, _ = paraclip.load_model(model)
    naive.double()
    decay = [p for n, p in naive.named_parameters() if not n.startswith("visual.") and p.ndim > 1]
    plain = [p for n, p in naive.named_parameters() if not n.startswith("visual.") and p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0}],
                                  lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).numpy()
    losses = []
    for step in range(3):
        loss = sum(naive_terms(naive, *examples[order[step * 8 : step * 8 + 8]], PARACLIP).values())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    log = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-9)
    assert [entry["lr"] for entry in log] == pytest.approx([1e-3, 0.75e-3, 0.25e-3])
    assert difference(dict(clip.state_dict()), dict(naive.state_dict())) < 1e-8


if __name__ == "__main__":
    worker(*sys.argv[1:])
