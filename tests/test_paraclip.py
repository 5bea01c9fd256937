"""paraclip.py against the naive computation: open_clip's own towers at 77 tokens and a six-line InfoNCE."""

import argparse
import glob
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest
import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file

import paraclip
from generate import InputError, run

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
    examples = paraclip.Examples([str(world / "rows.jsonl")], kinds, tokenizer)
    examples.rows = examples.rows[:count]
    examples.features = [F.normalize(torch.randn(80, dim, generator=torch.Generator().manual_seed(1)), dim=-1).half()]
    return examples

def gradients(clip):
    return {name: p.grad.clone() for name, p in clip.named_parameters() if p.grad is not None}

def difference(one, other):
    """Largest difference over all tensors, each relative to its largest element (a key's bias has gradient 0: noise)."""
    assert one.keys() == other.keys()
    floor = 1e-6 * max(float(tensor.abs().max()) for tensor in other.values())
    return max(float((one[key] - other[key]).abs().max()) / max(float(other[key].abs().max()), floor) for key in one)

@pytest.fixture
def alone():
    """A process group of this process alone."""
    paraclip.set_up_ranks()
    yield
    dist.destroy_process_group()

def check_one_step(model, world, micro_batch, dtype=torch.float64, bound=1e-10):
    """paraclip.py's terms and all gradients on 24 examples equal the naive ones. Returns the tokens."""
    clip, _, tokenizer = paraclip.load_model(model)
    naive, _, _ = paraclip.load_model(model)
    tokens, image_features = examples_of(world, PARACLIP, tokenizer)[np.arange(24)]
    terms = paraclip.loss_terms(paraclip.TextEncoder(clip.to(dtype), micro_batch), tokens, image_features, PARACLIP)
    expected = naive_terms(naive.to(dtype), tokens, image_features, PARACLIP)
    for each in (terms, expected):
        sum(each.values()).backward()
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=bound)
    assert "logit_scale" in gradients(naive) and not any("visual" in name for name in gradients(naive))
    assert difference(gradients(clip), gradients(naive)) < bound
    return tokens

def worker(model, world, out):
    """One step of paraclip.py on this rank's half of 24 examples in fp64, whole and in micro-batches; rank 0 saves both."""
    paraclip.set_up_ranks()
    part, steps = next(paraclip.batches(24, argparse.Namespace(batch_size=24, epochs=1, seed=0), 0)), []
    for micro_batch in (0, 7):
        clip, _, tokenizer = paraclip.load_model(model)
        tokens, image_features = examples_of(Path(world), PARACLIP, tokenizer)[part]
        encoder = torch.nn.parallel.DistributedDataParallel(paraclip.TextEncoder(clip.double(), micro_batch))
        terms = paraclip.loss_terms(encoder, tokens, image_features, PARACLIP)
        (dist.get_world_size() * sum(terms.values())).backward()
        shares = torch.stack(list(terms.values())).detach()
        dist.all_reduce(shares)
        steps.append((dict(zip(terms, shares.tolist())), gradients(clip)))
    if dist.get_rank() == 0:
        torch.save(steps, out)
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
    check_one_step(f"local-dir:{world}/clip", world, micro_batch, dtype, bound)

def test_two_ranks_equal_the_naive_step(world, alone, tmp_path):
    model, out = f"local-dir:{world}/clip", tmp_path / "step.pt"
    process = torchrun(__file__, model, world, out)
    assert process.wait(120) == 0, process.stdout.read()
    clip, _, tokenizer = paraclip.load_model(model)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).numpy()
    tokens, image_features = examples_of(world, PARACLIP, tokenizer)[order]
    expected = naive_terms(clip.double(), tokens, image_features, PARACLIP)
    sum(expected.values()).backward()
    for terms, found in torch.load(out):
        assert terms == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-10)
        assert difference(found, gradients(clip)) < 1e-10

def test_info_nce_is_the_sum_of_its_shares():
    a, b = (F.normalize(torch.randn(10, 8).double(), dim=-1).requires_grad_() for _ in "ab")
    scale = torch.tensor(14.0).double().requires_grad_()
    expected = torch.autograd.grad(naive_info_nce(a, b, scale), (a, b, scale))
    shares = [paraclip.info_nce(a, b, scale, slice(start, start + 4)) for start in (0, 4, 8)]
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
    args = paraclip.parse_args(["--rows", "", "--batch-size", "8", "--lr", "1e-3", "--weight-decay", "0.1", "--workers", "0",
                                "--output", str(tmp_path), "--save-every", "2"])
    clip, _, tokenizer = paraclip.load_model(model)
    examples = examples_of(world, PARACLIP, tokenizer)
    encoder = paraclip.TextEncoder(clip.double())
    paraclip.train(encoder, paraclip.make_optimizer(encoder, args), examples, 3, 0, args)
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
    log = log_of(tmp_path)
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-9)
    assert [entry["lr"] for entry in log] == pytest.approx([1e-3, 0.75e-3, 0.25e-3])
    assert difference(dict(clip.state_dict()), dict(naive.state_dict())) < 1e-8

# ---------------------------------------------------------------- runs, as a user starts them
def flags(world, output, **more):
    values = {"rows": world / "rows.jsonl", "images": world / "images", "model": f"local-dir:{world}/clip",
              "output": output, "batch_size": 8, "lr": 1e-3, "workers": 0, **more}
    return [str(part) for key, value in values.items() if value is not None
            for part in ("--" + key.replace("_", "-"), *(value if isinstance(value, list) else [value]))]

def train(*arguments):
    """paraclip.py in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["paraclip.py", *arguments])
        try:
            run(paraclip.main)
        except SystemExit as stop:
            return stop.code
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

def start(*arguments, code="pass", **kwargs):
    """paraclip.py in its own process, after `code` has changed it."""
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import paraclip; {code}; paraclip.run(paraclip.main)"
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)

def wait_for(condition, process, seconds=90):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end and process.poll() is None, process.stdout.read()
        time.sleep(0.01)

def log_of(folder):
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

def weights_of(folder):
    return load_file(folder / "open_clip_model.safetensors")

@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    """A run of 40 steps that nothing stopped, in its own process."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    process = start(*flags(world, folder, epochs=4))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    return folder, output

def test_a_run_learns_and_leaves_the_image_tower_alone(world, unbroken):
    folder, output = unbroken
    log, before, after = log_of(folder), load_file(world / "clip" / "open_clip_model.safetensors"), weights_of(folder)
    assert [entry["step"] for entry in log] == list(range(40))
    assert np.mean([e["loss"] for e in log[30:]]) < np.mean([e["loss"] for e in log[:10]])
    assert set(log[0]) == {"step", "loss", "terms", "lr", "logit_scale", "grad_norm", "examples_per_s", "eta_s"}
    assert log[0]["loss"] == pytest.approx(sum(log[0]["terms"].values()))
    assert list(log[0]["terms"]) == ["I:T2", "T:T1", "T1:T2"]
    assert log[0]["logit_scale"] == pytest.approx(1 / 0.07)  # before the step's update
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("visual."))
    assert all(not torch.equal(before[key], after[key]) for key in before if not key.startswith("visual."))
    trained = sum(t.numel() for key, t in after.items() if not key.startswith("visual."))
    assert f"{trained:,} parameters trained" in output and "8 = 1 x 8" in output and "0 to 40, 4 epoch(s)" in output
    assert "Warning" not in output and "Traceback" not in output

def same_in_open_clip(folder):
    """The run directory as open_clip loads it gives the text features that load_model gives."""
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red dog", "blue"])
    model, (again, _, _) = open_clip.create_model(f"local-dir:{folder}").eval(), paraclip.load_model(str(folder))
    assert torch.equal(model.encode_text(tokens), again.encode_text(tokens)) and len(set(tokens[0].tolist())) > 4

def test_the_run_directory_is_an_open_clip_model(world, unbroken):
    folder, _ = unbroken
    same_in_open_clip(folder)
    record = json.loads((folder / "config.json").read_text())
    assert record["flags"]["batch_size"] == 8 and record["versions"]["torch"] in torch.__version__
    assert record["base_model"]["fingerprint"] == paraclip.fingerprint(paraclip.load_model(f"local-dir:{world}/clip")[0])
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 40

def test_killed_and_started_again_is_bit_equal(world, unbroken, tmp_path):
    arguments = flags(world, tmp_path / "run", epochs=4, save_every=7)
    process = start(*arguments, code="paraclip.SLICE = 16")
    wait_for(lambda: len(glob.glob(f"{tmp_path}/run/features/*.safetensors")) >= 2, process)
    process.kill()  # while the features are computed
    process.wait()
    kept = {path: os.stat(path).st_mtime_ns for path in glob.glob(f"{tmp_path}/run/features/*.safetensors")}
    process = start(*arguments, code="paraclip.SLICE = 16")
    wait_for(lambda: len(log_of(tmp_path / "run")) > 24, process)
    process.kill()  # in mid-run, past the state of step 21
    process.wait()
    process = start(*arguments, code="paraclip.SLICE = 16")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "steps  2" in output, output
    assert all(os.stat(path).st_mtime_ns == stamp for path, stamp in kept.items())
    one, other = weights_of(unbroken[0]), weights_of(tmp_path / "run")
    assert all(torch.equal(one[key], other[key]) for key in one)
    fixed = ("step", "loss", "terms", "lr", "logit_scale", "grad_norm")
    assert [[e[k] for k in fixed] for e in log_of(tmp_path / "run")] == [[e[k] for k in fixed] for e in log_of(unbroken[0])]

def test_torchrun_restarts_a_killed_rank(world, unbroken, tmp_path):
    def start_two(folder):
        return torchrun(ROOT / "paraclip.py", *flags(world, folder, epochs=4, save_every=5), options=["--max-restarts", "2"])
    process = start_two(tmp_path / "whole")
    text = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and "8 = 2 x 4" in text, text
    process = start_two(tmp_path / "run")
    wait_for(lambda: len(log_of(tmp_path / "run")) > 11, process)
    for environ in glob.glob("/proc/[0-9]*/environ"):
        try:
            variables, command = Path(environ).read_bytes(), Path(environ).with_name("cmdline").read_bytes()
        except OSError:
            continue
        if b"\0RANK=1\0" in variables and str(tmp_path).encode() in command:
            os.kill(int(Path(environ).parent.name), signal.SIGKILL)
    text = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and "steps  0 to" not in text.rpartition("model  ")[2], text
    log = log_of(tmp_path / "run")
    assert [entry["step"] for entry in log] == list(range(40))
    assert difference(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole")) < 1e-6
    assert [e["loss"] for e in log[:5]] == pytest.approx([e["loss"] for e in log_of(unbroken[0])[:5]], rel=1e-5)

TABLE_2 = ["I:T", "T:T1 T1:T2", "I:T I:T1", "I:T I:T1 I:T2", "I:T T:T1", "I:T1 T:T1", "I:T T:T1 T1:T2", "I:T2 T:T1 T1:T2"]

@pytest.mark.parametrize("loss", TABLE_2)
def test_the_losses_of_table_2(world, tmp_path, loss):
    pairs = [tuple(term.split(":")) for term in loss.split()]
    images = world / "images" if "I" in loss else None  # L2 + L3 needs none
    arguments = flags(world, tmp_path / "run", loss=loss.split(), batch_size=40, images=images)
    assert train(*arguments) is None
    first = log_of(tmp_path / "run")[0]
    paraclip.set_up_ranks()
    clip, preprocess, tokenizer = paraclip.load_model(f"local-dir:{world}/clip")
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0)).numpy()[:40]
    kinds = [kind for kind in paraclip.TEXT_KEYS if any(kind in pair for pair in pairs)]
    examples = paraclip.Examples([str(world / "rows.jsonl")], kinds, tokenizer)
    if images:
        args = paraclip.parse_args(arguments)
        examples.features, _ = paraclip.cache_image_features(clip, preprocess, examples.image_ids, args)
    dist.destroy_process_group()
    expected = naive_terms(clip, *examples[order], pairs)
    assert first["terms"] == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)

# ---------------------------------------------------------------- models
@pytest.mark.parametrize("micro_batch", [0, 7])
def test_roberta_equals_the_naive_step(world, alone, tmp_path, micro_batch):
    model = conftest.make_roberta(tmp_path)
    tokens = check_one_step(model, world, micro_batch)
    assert len(set(paraclip.TextEncoder(paraclip.load_model(model)[0]).lengths(tokens["T"]).tolist())) > 3

def test_a_roberta_run_directory_loads_in_open_clip(world, tmp_path):
    assert train(*flags(world, tmp_path / "run", model=conftest.make_roberta(tmp_path), batch_size=40)) is None
    same_in_open_clip(tmp_path / "run")

def test_checkpoint_files_like_laclips(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.json").write_text(json.dumps(conftest.TINY))
    open_clip.add_model_config("tiny.json")
    monkeypatch.setitem(paraclip.BASELINES, "laclip", ("tiny", "laion400m_laclip.pt"))
    clip = open_clip.create_model("tiny")
    weights = {"module." + key: tensor for key, tensor in clip.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 32, "args": argparse.Namespace(lr=1e-3)}, "laion400m_laclip.pt")
    for name in ("laclip", "tiny:laion400m_laclip.pt"):
        loaded, _, _ = paraclip.load_model(name)
        assert all(torch.equal(tensor, clip.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    torch.save({"state_dict": weights, "args": os.system}, "evil.pt")
    for name, error in (("tiny:evil.pt", "evil.pt: can.t be read: UnpicklingError"), ("ViT-S-32-alt:laion400m_laclip.pt", "can.t be read: ")):
        with pytest.raises(InputError, match=error):
            paraclip.load_model(name)

def test_the_five_baselines_name_models_and_tags_that_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("laion400m_laclip.pt").touch()
    assert all(paraclip.resolve(name) == pair for name, pair in paraclip.BASELINES.items())
    assert open_clip.get_model_config("ViT-B-32-quickgelu")["quick_gelu"]

def test_a_tower_that_is_not_causal_is_encoded_whole(world, alone, tmp_path):
    """Nothing is cut where any token may matter; a SigLIP is refused."""
    text_cfg = {**conftest.TINY["text_cfg"], "no_causal_mask": True, "pool_type": "last"}
    (tmp_path / "clip").mkdir()
    model = conftest.make_clip(tmp_path / "clip", {**conftest.TINY, "custom_text": True, "text_cfg": text_cfg})
    check_one_step(model, world, 7)
    with pytest.raises(InputError, match="no CLIP with two towers and a softmax loss"):
        paraclip.load_model(conftest.make_clip(tmp_path / "siglip", {**conftest.TINY, "init_logit_bias": -10}))

# ---------------------------------------------------------------- the feature cache
def cache(world, folder, ids=None, **more):
    """cache_image_features of the images of `world`: {image_id: feature} of all that can be read, and the others."""
    values = {"images": world / "images", "workers": 0, **more}
    args = paraclip.parse_args(flags(world, folder, **values))
    clip, preprocess, _ = paraclip.load_model(f"local-dir:{world}/clip")
    ids = ids or [f"{i:04}" for i in range(80)]
    slices, unreadable = paraclip.cache_image_features(clip, preprocess, ids, args)
    return dict(zip(ids, torch.cat(slices))), unreadable

def test_cached_features_are_open_clips_to_fp16(world, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(paraclip, "SLICE", 32)
    found, unreadable = cache(world, tmp_path)
    clip, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{world}/clip")
    assert len(found) == 80 and not unreadable and len(glob.glob(f"{tmp_path}/features/*.safetensors")) == 3
    for image_id, feature in found.items():
        image = preprocess(paraclip.Image.open(world / "images" / f"{image_id}.jpg"))[None]
        expected = clip.eval().encode_image(image, normalize=True)[0]
        assert feature.dtype == torch.float16 and (feature - expected).abs().max() < 2**-11

def test_the_cache_is_named_by_its_content(world, alone, tmp_path, monkeypatch):
    """The same tower, root and ids: nothing is encoded again. Another of any: other files. All in one folder."""
    encoded = []
    original = paraclip.encode_images
    monkeypatch.setattr(paraclip, "encode_images", lambda c, p, items, *more: encoded.append(len(items)) or original(c, p, items, *more))
    first, _ = cache(world, tmp_path)
    again, _ = cache(world, tmp_path)
    assert encoded == [80, 0] and all(torch.equal(first[key], again[key]) for key in first)
    (tmp_path / "elsewhere").symlink_to(world / "images")
    cache(world, tmp_path, images=tmp_path / "elsewhere")  # a link is the same root
    cache(world, tmp_path, ids=["0000", "0001"])
    (tmp_path / "others").mkdir()
    paraclip.Image.new("RGB", (40, 40)).save(tmp_path / "others" / "0000.jpg")
    black, _ = cache(world, tmp_path, ids=["0000"], images=tmp_path / "others")
    assert encoded[2:] == [0, 2, 1] and not torch.equal(black["0000"], first["0000"])
    args = paraclip.parse_args(flags(world, tmp_path))
    clip, preprocess, _ = paraclip.load_model(conftest.make_clip(tmp_path / "clip", seed=1))
    other, _ = paraclip.cache_image_features(clip, preprocess, ["0000", "0001"], args)
    assert encoded[5:] == [2] and not torch.equal(other[0][0], first["0000"])

def test_two_runs_fill_one_cache_at_once(world, tmp_path):
    """Neither disturbs the other, and both end as one alone does."""
    arguments = [flags(world, tmp_path / name, features=tmp_path / "features") for name in ("one", "two", "alone")]
    processes = [start(*each, code="paraclip.SLICE = 4") for each in arguments[:2]]
    for process in processes:
        assert process.wait(120) == 0, process.stdout.read()
    process = start(*arguments[2], code="paraclip.SLICE = 4")
    assert process.wait(120) == 0
    one, two, alone = (weights_of(tmp_path / name) for name in ("one", "two", "alone"))
    assert len(os.listdir(tmp_path / "features")) == 20
    assert all(torch.equal(one[key], alone[key]) and torch.equal(two[key], alone[key]) for key in one)

def test_tar_shards_files_and_other_extensions_give_the_same_features(world, alone, tmp_path):
    images, names = tmp_path / "images", sorted(os.listdir(world / "images"))[:6]
    (images / "00001").mkdir(parents=True)
    data = [(world / "images" / name).read_bytes() for name in names]
    (images / "00000.tar").write_bytes(conftest.tar({names[0]: data[0], "0000.txt": b"text", f"./{names[1]}": data[1], f"in/{names[2]}": data[2]}))
    (images / "00001" / "b.tar").write_bytes(conftest.tar({names[3]: data[3]}))
    paraclip.Image.open(world / "images" / names[4]).save(images / "00001" / "0004.png")
    (images / "whole.jpg").write_bytes(data[5])
    ids = ["00000/0000", "00000/0001", "00000/in/0002", "00001/0004", "00001/b/0003", "whole.jpg"]
    expected, _ = cache(world, tmp_path / "flat")
    found, unreadable = cache(world, tmp_path / "shards", ids=ids, images=images, workers=2)
    assert not unreadable
    for image_id, feature in found.items():
        key = {"whole.jpg": "0005"}.get(image_id, image_id.rpartition("/")[2])
        assert (feature - expected[key]).abs().max() < 2**-11

def test_a_damaged_or_cut_shard_is_no_end(world, alone, tmp_path):
    """A bad header amid the members, and a cut between two of them, which tarfile takes for the archive's end."""
    jpeg = (world / "images" / "0000.jpg").read_bytes()
    (tmp_path / "a.tar").write_bytes(conftest.tar({f"{i:02}.jpg": jpeg for i in range(20)}))
    whole = (tmp_path / "a.tar").read_bytes()
    at = whole.index(b"10.jpg")
    for i, damaged in enumerate((whole[:at] + b"\xff" * 512 + whole[at + 512 :], whole[:at])):
        (tmp_path / f"{i}.tar").write_bytes(damaged)
        with pytest.raises(InputError, match=f"{i}.tar is damaged or cut off at byte {at:,}"):
            cache(world, tmp_path / "run", ids=[f"{i}/00"], images=tmp_path)

def test_unreadable_images_are_left_out_with_their_rows(world, tmp_path, capfd):
    """Also of the kinds that people have: CMYK, 16 bits, one pixel, none, a bomb. A run that began keeps what it left out."""
    copy = tmp_path / "images"
    copy.mkdir()
    for name in os.listdir(world / "images"):
        data = (world / "images" / name).read_bytes()
        (copy / name).write_bytes(data[:300] if name == "0007.jpg" else b"" if name == "0011.jpg" else data)
    (copy / "0013.jpg").unlink()
    paraclip.Image.new("1", (15_000, 15_000)).save(copy / "0017.png")  # and no JPEG: a decompression bomb
    (copy / "0017.jpg").unlink()
    paraclip.Image.new("CMYK", (9, 9)).save(copy / "0001.jpg")
    paraclip.Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(copy / "0002.png")
    (copy / "0002.jpg").unlink()
    paraclip.Image.new("RGB", (1, 1)).save(copy / "0003.jpg")
    arguments = flags(world, tmp_path / "run", images=copy, batch_size=70, epochs=2, save_every=1)
    assert train(*arguments) == 2
    assert "more than --max-bad-images can't be read, the first: 0007: " in capfd.readouterr().err
    assert train(*arguments, "--max-bad-images", "0.06") is None
    assert "76 of 80; 4 images can't be read ['0007', '0011', '0013', '0017']" in capfd.readouterr().out
    before = log_of(tmp_path / "run")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    torch.save({**state, "step": 0}, tmp_path / "run" / "state.pt")
    for name in ("0007.jpg", "0013.jpg"):  # they can be read now, and another --features does not know that they could not
        (copy / name).write_bytes((world / "images" / name).read_bytes())
    assert train(*arguments, "--max-bad-images", "0.06", "--features", str(tmp_path / "new")) is None
    assert "76 of 80" in capfd.readouterr().out and len(log_of(tmp_path / "run")) == len(before)

# ---------------------------------------------------------------- bad input: one line, exit code 2
def rows_with(world, tmp_path, change):
    """A copy of the rows whose third line is changed; its path."""
    lines = (world / "rows.jsonl").read_text().splitlines()
    lines[2] = change if isinstance(change, str) else json.dumps({**json.loads(lines[2]), **change})
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "bad.jsonl"

BAD = {
    "no JSON": (lambda w, t: {"rows": rows_with(w, t, '{"image_id": "0')}, "bad.jsonl:3: can't be read: JSONDecodeError"),
    "no dict": (lambda w, t: {"rows": rows_with(w, t, "[1]")}, "bad.jsonl:3: can't be read: "),
    "no key": (lambda w, t: {"rows": rows_with(w, t, '{"image_id": "0001"}')}, "bad.jsonl:3: can't be read: KeyError: 'caption'"),
    "blank": (lambda w, t: {"rows": rows_with(w, t, {"paraphrase_2": " "})}, "bad.jsonl:3: can't be read: ValueError: a blank text"),
    "way out": (lambda w, t: {"rows": rows_with(w, t, {"image_id": "../clip/x"})}, "points out of the image root"),
    "absolute": (lambda w, t: {"rows": rows_with(w, t, {"image_id": "/etc/passwd"})}, "points out of the image root"),
    "half an emoji": (lambda w, t: {"rows": rows_with(w, t, {"image_id": "a\ud83d"})}, "the first: a?: FileNotFoundError"),
    "no rows": (lambda w, t: {"rows": t / "none-*.jsonl"}, "none-*.jsonl'"),
    "few rows": (lambda w, t: {"batch_size": 81}, "80 rows to train on are fewer than --batch-size 81"),
    "no images": (lambda w, t: {"images": t}, "the first: 0000: FileNotFoundError: no "),
    "images not given": (lambda w, t: {"images": None}, "--images is not given"),
    "unfinished": (lambda w, t: {"model": w / "images"}, "no folder with open_clip_model.safetensors"),
    "model": (lambda w, t: {"model": "clip"}, "--model clip: none of openai, openclip-400m"),
    "tag": (lambda w, t: {"model": "ViT-B-32:laion3b"}, "MODEL:TAG of open_clip (openai, laion400m_e31"),
    **{flag: (lambda w, t, flag=flag, value=value: {flag: value}, f"--{flag}") for flag, value in
       (("epochs", 0), ("lr", -1), ("weight-decay", "nan"), ("loss", ["I:T3"]), ("lrate", 1))},
}

@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(world, tmp_path, capfd, case):
    change, message = BAD[case]
    assert train(*flags(world, tmp_path / "run", **change(world, tmp_path))) == 2
    err = [line for line in capfd.readouterr().err.splitlines() if line and "image features" not in line]
    assert (len(err) == 1 or err[0].startswith("usage: ")) and message in err[-1] and err[-1].startswith("paraclip.py: error: "), err

def test_other_flags_rows_or_model_on_resume_are_refused(world, tmp_path, capfd):
    arguments = flags(world, tmp_path / "run", batch_size=40)
    assert train(*arguments) is None
    before = (tmp_path / "run" / "state.pt").read_bytes()
    for more, words in ((["--lr", "0.5", "--seed", "3"], ("lr (was 0.001, is 0.5)", "seed (was 0, is 3)")),
                        (["--rows", str(rows_with(world, tmp_path, {"caption": "other"}))], ("rows (was",)),
                        (["--model", conftest.make_clip(tmp_path / "other", seed=2)], ("base_model (was",))):
        assert train(*arguments, *more, "--features", str(tmp_path / ("f" + more[0]))) == 2
        err = capfd.readouterr().err
        assert all(word in err for word in words), err
    assert (tmp_path / "run" / "state.pt").read_bytes() == before
    (tmp_path / "same.jsonl").write_bytes((world / "rows.jsonl").read_bytes())  # these change no result
    assert train(*arguments, "--workers", "1", "--save-every", "3", "--rows", str(tmp_path / "same.jsonl")) is None
    rows_with(world, tmp_path, {"caption": "other"}).rename(tmp_path / "same.jsonl")
    assert train(*arguments, "--rows", str(tmp_path / "same.jsonl")) == 2
    assert "rows (was" in capfd.readouterr().err

def test_damaged_files_and_foreign_models_are_one_line(world, tmp_path, capfd):
    arguments = flags(world, tmp_path / "run", batch_size=40, features=tmp_path / "features")
    assert train(*arguments) is None
    features, = (tmp_path / "features").iterdir()
    for path in (features, tmp_path / "run" / "state.pt", tmp_path / "run" / "config.json"):
        good = path.read_bytes()
        path.write_bytes(good[:100])
        assert train(*arguments) == 2
        assert capfd.readouterr().err.splitlines()[-1].startswith(f"paraclip.py: error: {path}: can't be read")
        path.write_bytes(good)
    conftest.make_clip(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text("{}")  # as the Hub's folders have
    before = (tmp_path / "base" / "open_clip_model.safetensors").read_bytes()
    assert train(*flags(world, tmp_path / "base", model=tmp_path / "base", batch_size=40)) == 2
    assert "holds a model that is no run's" in capfd.readouterr().err
    assert (tmp_path / "base" / "open_clip_model.safetensors").read_bytes() == before
    assert len(list((tmp_path / "base").iterdir())) == 3

def test_rows_with_a_bom_blank_lines_numbers_as_ids_and_half_an_emoji(alone, tmp_path):
    row = {"image_id": 7, "caption": "a", "paraphrase_1": "b", "paraphrase_2": "c"}
    (tmp_path / "rows.jsonl").write_text(f"\ufeff{json.dumps(row)}\r\n\n{json.dumps({**row, 'image_id': 'x', 'caption': chr(0xD83D)})}\n\n")
    examples = paraclip.Examples([str(tmp_path / "rows.jsonl")], ["T"], open_clip.get_tokenizer("ViT-B-32"))
    assert examples.image_ids == ["7", "x"]
    assert torch.equal(examples[np.arange(2)][0]["T"], open_clip.get_tokenizer("ViT-B-32")(["a", "?"]))

def test_without_git_and_beside_files_of_the_users(world, tmp_path, monkeypatch):
    """Slim containers have no git: the commit is null. What others call part of something is nobody's to delete."""
    monkeypatch.setenv("PATH", "/nowhere")
    (tmp_path / "run" / "x.parts").mkdir(parents=True)
    (tmp_path / "run" / "notes.partial.md").write_text("mine")
    assert train(*flags(world, tmp_path / "run", batch_size=40)) is None
    assert json.loads((tmp_path / "run" / "config.json").read_text())["git_commit"] is None
    assert (tmp_path / "run" / "notes.partial.md").read_text() == "mine" and (tmp_path / "run" / "x.parts").is_dir()

def test_a_loss_that_is_not_finite_stops_with_its_step(world, tmp_path, capfd):
    assert train(*flags(world, tmp_path / "run", lr="1e30", save_every=1)) == 2
    assert "step 1: loss" in capfd.readouterr().err
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 1

def test_a_full_disk_keeps_the_old_state(world, tmp_path):
    arguments = flags(world, tmp_path / "run", save_every=2)
    code = ("import resource; old = paraclip.save_state\n"
            "def save(encoder, optimizer, step, config):\n"
            "    old(encoder, optimizer, step, config)\n"
            "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"  # as if the disk were full from now on
            "paraclip.save_state = save")
    process = start(*arguments, code=code)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2 and "state.pt'" in output and "Traceback" not in output, output
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 2
    assert not glob.glob(f"{tmp_path}/run/*.part*")

def test_the_ranks_must_divide_the_batch(world, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 3)
    assert train(*flags(world, tmp_path / "run")) == 2
    assert "paraclip.py: error: --batch-size 8 can't be divided among 3 ranks" in capfd.readouterr().err

if __name__ == "__main__":
    worker(*sys.argv[1:])
