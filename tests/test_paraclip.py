"""paraclip.py against the naive computation: open_clip at 77 tokens and a six-line InfoNCE."""

import argparse
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import conftest
import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import unfrozen
from conftest import ROOT
from flickr8k import TABLE_2
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import paraclip
from paraclip import PARACLIP, InputError

# ------------------------------------------------------------------ the naive computation


def naive_info_nce(a, b, scale):
    logits = scale * a @ b.T
    targets = torch.arange(len(a))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def naive_terms(clip, tokens, image_features, loss):
    """The terms with open_clip's encode_text at 77 tokens, the whole batch on one process."""
    features = {}
    for kind in tokens:
        features[kind] = F.normalize(clip.encode_text(tokens[kind]), dim=-1)
    if image_features is not None:
        features["I"] = image_features.to(clip.logit_scale.dtype)
    terms = {}
    for term in loss:
        a, b = term.split(":")
        terms[term] = naive_info_nce(features[a], features[b], clip.logit_scale.exp())
    return terms


def gradients(clip):
    found = {}
    for name, parameter in clip.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return found


def difference(one, other):
    """The largest difference of two dicts of tensors, relative to each tensor's largest element.

    A gradient that is zero but for noise, as that of a key's bias, has a floor.
    """
    assert one.keys() == other.keys()
    floor = 1e-6 * max(float(tensor.abs().max()) for tensor in other.values())
    differences = []
    for key in one:
        scale = max(float(other[key].abs().max()), floor)
        differences.append(float((one[key] - other[key]).abs().max()) / scale)
    return max(differences)


def values_of(terms):
    return {name: value.item() for name, value in terms.items()}


def data_of(model, world, **more):
    """The paraclip.Data of a small run, whose keywords are flags."""
    return paraclip.Data(model, paraclip.parse_args(flags(world, world / "run", **more)))


@pytest.fixture
def alone():
    """A process group of this process alone."""
    paraclip.set_up_ranks()
    yield
    dist.destroy_process_group()


def check_one_step(name, world, micro_batch=0, dtype=torch.float64, bound=1e-10, loss=PARACLIP,
                   images="images"):
    """Terms and all gradients of 24 rows equal the naive ones, on any number of ranks."""
    model = paraclip.load_model(name)
    data = data_of(model, world, loss=loss, images=images and world / images)
    naive = paraclip.load_model(name).clip.to(dtype)
    batch = np.random.default_rng([0, 0]).permutation(80)[:24]
    expected = naive_terms(naive, *data.batch(batch), loss)
    sum(expected.values()).backward()

    encoder = paraclip.TextEncoder(model.clip.to(dtype), micro_batch)
    parallel = torch.nn.parallel.DistributedDataParallel(encoder)
    part = next(paraclip.batches(80, batch_size=24, epochs=1, seed=0))
    terms = paraclip.loss_terms(parallel, *data.batch(part), loss)
    (dist.get_world_size() * sum(terms.values())).backward()
    for share in terms.values():
        dist.all_reduce(share.detach())  # to the sum of the shares, in place
    assert values_of(terms) == pytest.approx(values_of(expected), rel=bound)
    assert "logit_scale" in gradients(naive)
    assert not any("visual" in name for name in gradients(naive))
    assert difference(gradients(model.clip), gradients(naive)) < bound
    return encoder


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


# ------------------------------------------------------------------ one step


@pytest.mark.parametrize("micro_batch", [0, 7])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_one_step_equals_the_naive_one(world, alone, micro_batch, dtype, bound):
    check_one_step(f"local-dir:{world}/clip", world, micro_batch, dtype, bound)


@pytest.mark.parametrize("loss", TABLE_2)
def test_the_losses_of_table_2_equal_the_naive_ones(world, alone, loss):
    images = "images" if "I" in loss else None  # L2 + L3 needs none
    check_one_step(f"local-dir:{world}/clip", world, loss=loss.split(), images=images)


TEXT_TOWERS = {  # what text_cfg changes, and whether the tower is CLIP's causal one
    "custom_text": ({}, True),
    "not causal": ({"no_causal_mask": True, "pool_type": "last"}, False),
    "custom blocks": ({"scale_attn": True}, False),
    "a class token": ({"embed_cls": True}, False),
    "a linear projection": ({"proj_bias": True}, False),
}


@pytest.mark.parametrize("tower", TEXT_TOWERS)
def test_other_towers_equal_the_naive_step(world, alone, tmp_path, tower):
    """Nothing is cut where a later token may matter."""
    change, causal = TEXT_TOWERS[tower]
    text_cfg = {**conftest.TINY["text_cfg"], **change}
    config = {**conftest.TINY, "custom_text": True, "text_cfg": text_cfg}
    encoder = check_one_step(conftest.make_clip(tmp_path / "clip", config), world, 7)
    assert encoder.is_plain == causal


@pytest.mark.parametrize("micro_batch", [0, 7])
def test_roberta_equals_the_naive_step(world, alone, tmp_path, micro_batch):
    encoder = check_one_step(conftest.make_roberta(tmp_path), world, micro_batch)
    tokens = torch.tensor([[0, 5, 2, 1, 1], [0, 5, 6, 2, 1], [0, 1, 6, 2, 1]])  # 1 is "<pad>"
    assert encoder.lengths(tokens).tolist() == [3, 4, 4]


@pytest.mark.parametrize("count, lengths", [(1, [5]), (40, [3]), (700, [3, 4, 9, 30, 64, 77])])
def test_features_are_in_the_order_of_the_texts(world, count, lengths):
    """Of one text, of many of one length, and of short ones beside all 77 tokens."""
    clip = paraclip.load_model(f"local-dir:{world}/clip").clip.double()
    random = np.random.default_rng(0)
    tokens = torch.zeros(count, 77, dtype=torch.int64)
    for text in tokens:
        length = random.choice(lengths)
        text[:length] = torch.from_numpy(random.integers(1, 49406, length))
        text[length - 1] = 49407
    features, _ = paraclip.TextEncoder(clip)(tokens)
    expected = F.normalize(clip.encode_text(tokens), dim=-1)
    assert (features - expected).abs().max() < 1e-12


def test_batches_are_the_same_for_any_number_of_ranks(monkeypatch):
    steps = []
    for ranks in (1, 2, 3):
        monkeypatch.setattr(dist, "get_world_size", lambda ranks=ranks: ranks)
        parts = []
        for rank in range(ranks):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            parts.append(list(paraclip.batches(40, batch_size=12, epochs=2, seed=3)))
        steps.append(np.concatenate(parts, axis=1).tolist())
    assert steps[0] == steps[1] == steps[2]


def test_two_ranks_equal_the_naive_step(world):
    process = torchrun(__file__, world)
    assert process.wait(120) == 0, process.stdout.read()


def test_two_epochs_of_adamw_equal_a_naive_loop(world, alone, tmp_path):
    """Each is another permutation of the 80 rows, and its last 8 are left out."""
    more = {"batch_size": 24, "epochs": 2, "weight_decay": 0.1, "save_every": 2}
    args = paraclip.parse_args(flags(world, tmp_path, **more))
    model = paraclip.load_model(f"local-dir:{world}/clip")
    data = paraclip.Data(model, args)
    encoder = paraclip.TextEncoder(model.clip.double())
    optimizer = paraclip.make_optimizer(encoder, args.lr, args.weight_decay)
    with open(tmp_path / "log.jsonl", "wb") as log:
        paraclip.train(encoder, optimizer, data, 0, {}, args, log)

    naive = paraclip.load_model(f"local-dir:{world}/clip").clip.double()
    trained = [p for name, p in naive.named_parameters() if not name.startswith("visual.")]
    matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1}
    others = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0}
    optimizer = torch.optim.AdamW([matrices, others], lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    orders = [np.random.default_rng([0, epoch]).permutation(80)[:72] for epoch in range(2)]
    log = log_of(tmp_path)
    for entry, batch in zip(log, np.split(np.concatenate(orders), 6), strict=True):
        terms = naive_terms(naive, *data.batch(batch), PARACLIP)
        assert entry["terms"] == pytest.approx(values_of(terms), rel=1e-9)
        assert entry["lr"] == pytest.approx(schedule.get_last_lr()[0])
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        schedule.step()
    assert difference(dict(model.clip.state_dict()), dict(naive.state_dict())) < 1e-8


# ------------------------------------------------------------------ runs, as a user starts them


def flags(world, output, **more):
    """The arguments of a small run; a keyword is a flag, None leaves it out."""
    values = {
        "rows": world / "rows.jsonl",
        "images": world / "images",
        "model": f"local-dir:{world}/clip",
        "output": output,
        "batch_size": 8,
        "lr": 1e-3,
        "workers": 0,
        **more,
    }
    arguments = []
    for key, value in values.items():
        if value is not None:
            arguments.append("--" + key.replace("_", "-"))
            arguments.extend(value if isinstance(value, list) else [value])
    return list(map(str, arguments))


def train(*arguments):
    """paraclip.py in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["paraclip.py", *arguments])
        try:
            paraclip.run(paraclip.main)
        except SystemExit as stop:
            return stop.code


def check_refused(capfd, message, *arguments):
    """They end with code 2 and one line, which holds the message."""
    assert train(*arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    lines = [line for line in lines if line and "%" not in line]  # no bars
    assert message in lines[-1] and lines[-1].startswith("paraclip.py: error: "), lines
    assert len(lines) == 1 or lines[0].startswith("usage: "), lines


def start(*arguments, **environment):
    """paraclip.py in a fork of this process, with what is patched here, on one thread."""
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115, end() reads it

    def run():
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout = sys.stderr = output
        os.environ.update(environment)
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # of its own: who is killed may hold it
        sys.exit(train(*arguments))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.output = output
    process.start()
    return process


def end(process):
    """Wait for a process of start(). Returns its exit code and what it has printed."""
    process.join(120)
    process.output.seek(0)
    output = process.output.read()
    assert process.exitcode is not None, f"it hangs: {output}"
    return process.exitcode, output


def wait_for(condition, is_running, seconds=90):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline and is_running()
        time.sleep(0.01)


def log_of(folder):
    """The steps of log.jsonl. A line that is being written counts once its end is there."""
    path = folder / "log.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def weights_of(folder):
    return load_file(folder / "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    """A run of 40 steps that nothing stopped, in its own process."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paraclip, "BLOCK", 4)
        code, output = end(start(*flags(world, folder, epochs=4)))
    assert code == 0, output
    return folder, output


def same_in_open_clip(folder):
    """The run directory as open_clip loads it gives the text features that load_model gives."""
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red dog", "blue"])
    clip = open_clip.create_model(f"local-dir:{folder}").eval()
    model = paraclip.load_model(str(folder))
    assert torch.equal(clip.encode_text(tokens), model.clip.encode_text(tokens))
    assert len(set(tokens[0].tolist())) > 4


def test_a_run_learns_and_its_directory_is_an_open_clip_model(world, unbroken):
    """Whose image tower is the base model's."""
    folder, output = unbroken
    assert "80 of 80 rows, steps 0 to 40" in output
    log = log_of(folder)
    losses = [entry["loss"] for entry in log]
    assert np.mean(losses[30:]) < np.mean(losses[:10])
    assert [entry["step"] for entry in log] == list(range(40))
    assert list(log[0]) == ["step", "loss", "terms", "lr", "logit_scale", "grad_norm"]
    assert log[0]["loss"] == pytest.approx(sum(log[0]["terms"].values()))
    assert list(log[0]["terms"]) == ["I:T2", "T:T1", "T1:T2"]
    assert log[0]["logit_scale"] == pytest.approx(1 / 0.07)  # before the step's update
    before = weights_of(world / "clip")
    after = weights_of(folder)
    for key in before:
        assert torch.equal(before[key], after[key]) == key.startswith("visual.")

    same_in_open_clip(folder)
    record = json.loads((folder / "config.json").read_text())
    base = paraclip.load_model(f"local-dir:{world}/clip")
    assert record["flags"]["batch_size"] == 8 and record["rows"]["count"] == 80
    assert record["flags"]["output"] == str(folder)
    assert record["versions"]["torch"] in torch.__version__
    assert record["base_model"]["fingerprint"] == base.fingerprint
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 40
    assert paraclip.load_model(str(folder)).image_tower == base.image_tower


def test_the_file_alone_trains(world, tmp_path):
    """Copied into an empty folder, it needs none of the project's other files, and no HTTP.

    And it prints no warning, such as Pillow's of a palette with transparent colours.
    """
    shutil.copy(ROOT / "paraclip.py", tmp_path)
    assert "requests" not in (ROOT / "paraclip.py").read_text()
    shutil.copytree(world / "images", tmp_path / "images")
    (tmp_path / "images/0000.jpg").unlink()
    palette = Image.linear_gradient("L").convert("P")
    palette.save(tmp_path / "images/0000.png", transparency=bytes(range(256)))
    arguments = flags(world, tmp_path / "run", images="images", batch_size=40, workers=2)
    command = [sys.executable, "paraclip.py", *arguments]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(log_of(tmp_path / "run")) == 2
    assert "Warning" not in done.stderr


@pytest.fixture
def slow(monkeypatch):
    """Blocks of 4 image features, each of which takes a tenth of a second and is said."""
    encode = paraclip.encode_pixels

    def encode_slowly(*arguments):
        print("a block is encoded", flush=True)
        time.sleep(0.1)
        return encode(*arguments)

    monkeypatch.setattr(paraclip, "BLOCK", 4)
    monkeypatch.setattr(paraclip, "encode_pixels", encode_slowly)


def blocks_done(folder):
    """The blocks of image features that are done."""
    return sum(np.load(path).sum() for path in folder.glob("features-*.done.npy"))


def test_killed_and_started_again_is_bit_equal(world, unbroken, slow, tmp_path):
    """Killed while features are computed, of which none is computed twice; then in mid-run."""
    arguments = flags(world, tmp_path / "run", epochs=4, save_every=7)
    process = start(*arguments)
    wait_for(lambda: blocks_done(tmp_path / "run" / "cache") >= 5, process.is_alive)
    process.kill()
    process.join()
    done = blocks_done(tmp_path / "run" / "cache")
    assert done < 20
    process = start(*arguments)
    wait_for(lambda: len(log_of(tmp_path / "run")) > 24, process.is_alive)
    process.kill()  # past the state of step 21
    _, output = end(process)
    assert output.count("a block is encoded") == 20 - done
    code, output = end(start(*arguments))
    assert code == 0 and "steps 2" in output and "a block" not in output, output
    assert difference(weights_of(tmp_path / "run"), weights_of(unbroken[0])) == 0
    assert log_of(tmp_path / "run") == log_of(unbroken[0])


def test_torchrun_is_killed_and_goes_on(world, unbroken, tmp_path):
    """Two ranks, which share the cache; one is killed, torchrun ends the other."""
    arguments = flags(world, tmp_path / "run", epochs=4, save_every=5)
    process = torchrun(ROOT / "paraclip.py", *arguments)
    wait_for(lambda: len(log_of(tmp_path / "run")) > 11, lambda: process.poll() is None)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    assert process.wait(60) != 0
    process = torchrun(ROOT / "paraclip.py", *arguments)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and "steps 0 to" not in output, output
    losses = [entry["loss"] for entry in log_of(tmp_path / "run")]
    assert losses == pytest.approx([entry["loss"] for entry in log_of(unbroken[0])], rel=1e-4)


# ------------------------------------------------------------------ several processes


def end_two(*both):
    """Two ranks, each with arguments and on a machine of its own: their codes and outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank, arguments in enumerate(both):
        processes.append(start(*arguments, RANK=str(rank), **place))
    return zip(*map(end, processes))


def test_two_machines_share_no_disk(world, unbroken, tmp_path):
    """Each has a cache of its own, and only rank 0's output counts, at a second start too."""
    one = flags(world, tmp_path / "run", cache=tmp_path / "a", epochs=4)
    other = flags(world, tmp_path / "none", cache=tmp_path / "b", epochs=4)
    for first_step in (0, 40):
        codes, outputs = end_two(one, other)
        assert codes == (0, 0) and f"steps {first_step} to 40" in outputs[0], outputs
    losses = [entry["loss"] for entry in log_of(tmp_path / "run")]
    assert losses == pytest.approx([entry["loss"] for entry in log_of(unbroken[0])], rel=1e-4)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("change, message", [
    ({"lr": 0.1}, "--lr: 0.1 here, and 0.001 in the run"),
    ({"images": "fewer"}, "--images: "),
    ({"batch_size": 9}, "--batch-size 9 can't be divided among 2 ranks"),
])
def test_ranks_that_disagree_end_with_a_line(world, tmp_path, monkeypatch, change, message):
    shutil.copytree(world / "images", tmp_path / "fewer")
    (tmp_path / "fewer" / "0007.jpg").unlink()
    one = flags(world, tmp_path / "run", cache=tmp_path / "a", max_bad_images=0.1)
    other = flags(world, tmp_path / "run", cache=tmp_path / "b", max_bad_images=0.1, **change)
    monkeypatch.chdir(tmp_path)
    codes, outputs = end_two(one, other)
    assert codes[1] == 2 and codes[0] != 0, outputs
    assert f"paraclip.py: error: {message}" in outputs[1] and "Traceback" not in outputs[1]
    assert not log_of(tmp_path / "run")


def test_no_locks_and_what_another_job_left_in_the_environment(world, tmp_path, monkeypatch):
    """WORLD_SIZE without RANK is one process (once a hang); a disk without locks is no error."""

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(paraclip.fcntl, "lockf", no_locks)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    assert train(*flags(world, tmp_path / "run", batch_size=40)) is None
    assert len(log_of(tmp_path / "run")) == 2


@pytest.mark.parametrize("visible, expected", [("1", "cuda:0"), ("2", "cuda:1")])
def test_a_scheduler_may_show_each_rank_one_gpu(monkeypatch, visible, expected):
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(visible))
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert str(paraclip.set_up_ranks()) == expected == str(devices[0])


def test_two_runs_at_once(world, unbroken, slow, tmp_path, capfd):
    """Over one cache the second waits, and finds it done. In one output it ends with a line.

    Once, by srun without torchrun, both ended well in one output, with the weights of one of them.
    """
    processes = []
    for name in ("a", "b"):
        arguments = flags(world, tmp_path / name, cache=tmp_path / "cache", epochs=4)
        processes.append(start(*arguments))
        wait_for(lambda: blocks_done(tmp_path / "cache") >= 1, processes[-1].is_alive)
    message = f"another process writes to {tmp_path}/a/log.jsonl"
    check_refused(capfd, message, *flags(world, tmp_path / "a", lr=1))
    results = [end(process) for process in processes]
    for name, (code, output) in zip("ab", results):
        assert code == 0, output
        assert difference(weights_of(tmp_path / name), weights_of(unbroken[0])) == 0
    outputs = [output for _, output in results]
    assert f"waiting for the process that has locked {tmp_path}/cache/lock" in outputs[1]
    assert "a block" in outputs[0] and "a block" not in outputs[1]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["flags"]["lr"] == 1e-3


# ------------------------------------------------------------------ models


def test_a_roberta_run_without_images_loads_in_open_clip(world, tmp_path):
    name = conftest.make_roberta(tmp_path)
    loss = ["T:T1", "T1:T2"]
    arguments = flags(world, tmp_path / "run", model=name, batch_size=40, images=None, loss=loss)
    assert train(*arguments) is None
    same_in_open_clip(tmp_path / "run")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A model of the name tiny in open_clip."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.json").write_text(json.dumps(conftest.TINY))
    open_clip.add_model_config("tiny.json")
    return open_clip.create_model("tiny")


def test_checkpoint_files(tiny, monkeypatch):
    """LaCLIP's, one of a trainer with a score, of torch.compile, safetensors, and OpenAI's."""
    weights = tiny.state_dict()
    prefixed = {"module." + name: tensor for name, tensor in weights.items()}
    torch.save({"state_dict": prefixed, "args": argparse.Namespace(lr=1e-3)}, "laclip.pt")
    compiled = {"_orig_mod.module." + name: tensor for name, tensor in weights.items()}
    torch.save({"model": compiled, "best": np.float64(0.5), "n": np.int64(3)}, "score.pth")
    save_file(weights, "plain.safetensors")
    tiny.register_buffer("input_resolution", torch.tensor(32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        traced = torch.jit.trace(tiny, (torch.zeros(1, 3, 32, 32), torch.ones(1, 77).long()))
        torch.jit.save(traced.half(), "openai.pt")
    monkeypatch.setitem(paraclip.BASELINES, "laclip", ("tiny", "laclip.pt"))
    for name in ("laclip", "tiny:score.pth", "tiny:plain.safetensors", "tiny:openai.pt"):
        found = paraclip.load_model(name).clip.state_dict()
        expected = weights
        if "openai" in name:
            expected = {key: tensor.half().float() for key, tensor in weights.items()}
        assert difference(found, expected) == 0, name


def test_files_of_another_model_are_one_line(tiny):
    """Once a file of another context length was resized without a word."""
    weights = tiny.state_dict()
    torch.save({**weights, "positional_embedding": torch.zeros(16, 64)}, "short.pt")
    with pytest.raises(InputError, match=r"size mismatch for positional_embedding: .*\[16, 64\]"):
        paraclip.load_model("tiny:short.pt")
    others = {"a" + name: tensor for name, tensor in weights.items()}
    torch.save(others, "others.pt")
    with pytest.raises(InputError) as error:
        paraclip.load_model("tiny:others.pt")
    said = str(error.value)
    assert re.search('Missing key.* "positional_embedding", .*Unexpected.* "avisual', said)
    assert "\n" not in said
    torch.save({"state_dict": weights, "args": os.system}, "evil.pt")
    with pytest.raises(InputError, match="FILE.: UnpicklingError"):
        paraclip.load_model("tiny:evil.pt")


def test_the_five_baselines_and_folders(world, tmp_path, monkeypatch):
    """Their models and tags exist, and a folder of the same name doesn't take their place."""
    monkeypatch.chdir(tmp_path)
    conftest.make_clip(tmp_path / "openai")
    for name, (open_clip_name, tag) in paraclip.BASELINES.items():
        assert paraclip.find_model(name) == (open_clip_name, tag)
        if name != "laclip":
            assert open_clip.get_pretrained_cfg(open_clip_name, tag)
    assert open_clip.get_model_config("ViT-B-32-quickgelu")["quick_gelu"]
    assert paraclip.find_model("hf-hub:some/clip") == ("hf-hub:some/clip", None)
    weights = weights_of(tmp_path / "openai")
    torch.save(weights, "openai/open_clip_pytorch_model.bin")
    os.remove("openai/open_clip_model.safetensors")
    assert difference(paraclip.load_model("./openai").clip.state_dict(), weights) == 0
    config = {**conftest.TINY, "init_logit_bias": -10}
    with pytest.raises(InputError, match="no CLIP with two towers and a softmax loss"):
        paraclip.load_model(conftest.make_clip(tmp_path / "siglip", config))


def test_weights_that_cannot_be_downloaded(tmp_path):
    """One line, whatever the hub's client says: it names the file, and what to pass instead."""
    code = "import paraclip; paraclip.run(lambda: paraclip.load_model('openai'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "model openai (without a network, give a file: ViT-B-32-quickgelu:FILE)" in done.stderr
    assert "vit_base_patch32_clip_224.openai" in done.stderr


# ------------------------------------------------------------------ the two arrays


def test_the_two_arrays_are_open_clips(world, alone, tmp_path, monkeypatch):
    """And each row's own, in whatever order the rows are."""
    monkeypatch.setattr(paraclip, "BLOCK", 32)
    lines = (world / "rows.jsonl").read_text().splitlines()[::-1]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    model = paraclip.load_model(f"local-dir:{world}/clip")
    data = data_of(model, world, rows=tmp_path / "rows.jsonl", cache=tmp_path, workers=2)
    tokens, features = data.batch(np.arange(80))
    clip, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{world}/clip")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{world}/clip")
    assert features.dtype == torch.float16 and data.tokens.dtype == np.uint16
    for i, row in enumerate(map(json.loads, lines)):
        image = preprocess(Image.open(world / "images" / f"{row['image_id']}.jpg"))[None]
        expected = clip.eval().encode_image(image, normalize=True)[0]
        assert (features[i] - expected).abs().max() < 2**-11
        for kind, key in {"T": "caption", "T1": "paraphrase_1", "T2": "paraphrase_2"}.items():
            assert tokens[kind][i].tolist() == tokenizer([row[key]])[0].tolist()


def test_a_large_vocabulary(world, alone):
    model = paraclip.load_model(f"local-dir:{world}/clip")
    model.clip.vocab_size = 250_000
    model.tokenizer = lambda texts: torch.tensor([[1, 249_999]] * len(texts))
    tokens, _ = data_of(model, world).batch(np.arange(2))
    assert tokens["T2"].tolist() == [[1, 249_999]] * 2


CACHES = {  # what changes, and which of its features must be computed again
    "nothing": ({}, False),
    "the root, by a link to it": ({"images": "link"}, False),
    "the root": ({"images": "copy"}, True),
    "the weights": ({"seed": 1}, True),
    # Once these shared one file, silently, as their weights are equal.
    "pool_type": ({"pool_type": "avg"}, True),
    "head_width": ({"head_width": 32}, True),
    "eps": ({"norm_kwargs": {"eps": 0.1}}, True),
}


def test_the_cache_is_named_by_all_it_depends_on(world, alone, tmp_path):
    (tmp_path / "link").symlink_to(world / "images")
    shutil.copytree(world / "images", tmp_path / "copy")
    for number, (what, (change, again)) in enumerate(CACHES.items()):
        root = tmp_path / change.pop("images", "link")
        seed = change.pop("seed", 0)
        config = {**conftest.TINY, "vision_cfg": {**conftest.TINY["vision_cfg"], **change}}
        model = paraclip.load_model(conftest.make_clip(tmp_path / f"clip{number}", config, seed))
        before = len(list(tmp_path.glob("features-*.done.npy")))
        data_of(model, world, images=root, cache=tmp_path)
        after = len(list(tmp_path.glob("features-*.done.npy")))
        assert after == before + (again or number == 0), what


def test_files_below_a_folder_and_members_of_shards(world, tmp_path):
    jpeg = (world / "images" / "0000.jpg").read_bytes()
    whole = conftest.tar({"./0.jpg": jpeg, "0.txt": b"text", "22.05.JPG": jpeg, "9.jpg": jpeg,
                         "b/c/7.jpg": jpeg})
    (tmp_path / "00000.tar").write_bytes(whole)
    (tmp_path / "00001.tar").write_bytes(whole[: whole.index(b"9.jpg")])
    (tmp_path / "in/c").mkdir(parents=True)  # a folder beside an image of its name
    for name in ("in/a.b.jpeg", "in/c.JPG", "in/two.jpg", "in/two.png", "in/._d.jpg", "whole.jfif"):
        (tmp_path / name).write_bytes(jpeg)
    for name in ("in/e.gif", "in/f.Bmp", "in/g.webp", "in/h.avif", "in/i.tiff"):
        Image.open(io.BytesIO(jpeg)).save(tmp_path / name.lower())
        (tmp_path / name.lower()).rename(tmp_path / name)
    good = ["00000/0", "00000/22.05", "00000/9.jpg", "00000/b/c/7", "00001/0", "in/two.png",
            "in/a.b", "in/c", "in/e", "in/f", "in/g", "in/h", "in/i", "whole", "whole.jfif"]
    for image_id in good:
        assert paraclip.open_image(tmp_path, image_id).size == (40, 40), image_id
    for image_id in ("00001/9", "in/two", "in/d", "in/none", "none/0", "00000/0.txt"):
        with pytest.raises(OSError):
            paraclip.open_image(tmp_path, image_id)
    (tmp_path / "00000").mkdir()
    with pytest.raises(OSError):  # a tar beside the root is outside of it
        paraclip.open_image(tmp_path / "00000", "0")


def test_unreadable_images_are_left_out_with_their_rows(world, tmp_path, capfd):
    """CMYK and one pixel can be read. What would be seen as another image can't."""
    copy = tmp_path / "images"
    shutil.copytree(world / "images", copy)
    (copy / "0007.jpg").write_bytes((copy / "0007.jpg").read_bytes()[:300])
    for name in ("0013.jpg", "0017.jpg", "0019.jpg", "0023.jpg"):
        (copy / name).unlink()
    Image.new("1", (15_000, 15_000)).save(copy / "0017.png")  # a decompression bomb
    Image.new("1", (1, 60_000)).save(copy / "0019.png")  # 224 x 13,440,000, resized
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(copy / "0023.png")
    Image.new("CMYK", (9, 9)).save(copy / "0001.jpg")
    Image.new("RGB", (1, 1)).save(copy / "0003.jpg")
    arguments = flags(world, tmp_path / "run", images=copy, batch_size=70, workers=1)
    words = (f"--images {copy}: 5 of 80 are missing or can't be read, "
             "['0007', '0013', '0017', '0019', '0023']")
    check_refused(capfd, words, *arguments)
    assert train(*arguments, "--max-bad-images", "0.07") is None
    out = capfd.readouterr().out
    assert words in out and "75 of 80 rows, steps 0 to 1" in out
    name = re.search(r"delete (\S+)", out)[1]
    for key in ("0007", "0013"):  # they can be read now, and counted as such if one wishes
        shutil.copy(world / "images" / f"{key}.jpg", copy)
    os.remove(name)
    check_refused(capfd, "--images: ", *arguments, "--max-bad-images", "0.07")
    again = flags(world, tmp_path / "b", images=copy, batch_size=70, cache=tmp_path)
    assert train(*again, "--max-bad-images", "0.07") is None
    assert "77 of 80 rows" in capfd.readouterr().out


# ------------------------------------------------------------------ bad input: one line, code 2


def rows_with(world, tmp_path, change):
    """A copy of the rows whose third line is changed; its path."""
    lines = (world / "rows.jsonl").read_text().splitlines()
    if isinstance(change, dict):
        change = json.dumps({**json.loads(lines[2]), **change})
    lines[2] = change
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "bad.jsonl"


BAD_ROWS = [
    ('{"image_id": "0', "bad.jsonl:3: JSONDecodeError"),
    ('{"image_id": "0001"}', "bad.jsonl:3: ValueError: image_id, caption, paraphrase_1, para"),
    ({"paraphrase_2": " "}, "one is missing or blank"),
    ({"image_id": "a/../../x"}, "the image_id a/../../x must be a path below the folder"),
    ({"image_id": "/etc/passwd"}, "must be a path below the folder of images"),
]
BAD_FLAGS = [
    ({"rows": "none-*.jsonl"}, "none-*.jsonl: there is no such file"),
    ({"batch_size": 81}, "--rows: 80 rows to train on are fewer than --batch-size 81; give"),
    ({"epochs": 0}, "--epochs: 0 must be a number, 1 or more"),
    ({"lr": -1}, "--lr: -1 must be a number, 0 or more"),
    ({"weight_decay": "nan"}, "--weight-decay: nan must be a number, 0 or more"),
    ({"images": None}, "--images None: there is no such folder; a term of --loss has I"),
    ({"model": "clip"}, "model clip: it is none of openai, openclip-400m"),
    ({"model": "ViT-B-32:laion3b"}, "'laion3b' is not a known tag or"),
    ({"loss": ["I:T3"]}, "--loss: invalid choice: 'I:T3'"),
    ({"loss": ["I:T2", "T:T1", "I:T2"]}, "--loss: name each term once"),
    ({"rows": os.devnull, "batch_size": 40}, "--rows: 0 rows to train on are fewer"),
]


@pytest.mark.parametrize("change, message", BAD_ROWS)
def test_bad_rows(world, tmp_path, capfd, change, message):
    rows = rows_with(world, tmp_path, change)
    check_refused(capfd, message, *flags(world, tmp_path / "run", rows=rows))


@pytest.mark.parametrize("change, message", BAD_FLAGS)
def test_bad_flags(world, tmp_path, monkeypatch, capfd, change, message):
    monkeypatch.chdir(tmp_path)
    check_refused(capfd, message, *flags(world, tmp_path / "run", **change))
    if "batch_size" not in change:
        assert not os.listdir(tmp_path)  # a start that fails leaves no folder


def test_odd_but_good_rows(alone, tmp_path):
    """A BOM, blank lines, half an emoji; and a file that two patterns name is read once."""
    row = {"image_id": "x", "caption": chr(0xD83D), "paraphrase_1": "b", "paraphrase_2": "c"}
    (tmp_path / "rows.jsonl").write_text(f"\ufeff{json.dumps(row)}\r\n\n{json.dumps(row)}\n\n")
    rows = paraclip.read_rows([f"{tmp_path}/rows.jsonl", f"{tmp_path}/row*.jsonl"])
    assert rows == 2 * [["x", "?", "b", "c"]]


def test_other_flags_rows_or_model_on_resume_are_refused(world, tmp_path, capfd):
    arguments = flags(world, tmp_path / "run", batch_size=40, cache=tmp_path / "cache")
    assert train(*arguments) is None
    before = (tmp_path / "run" / "state.pt").read_bytes()
    rows = str(rows_with(world, tmp_path, {"caption": "other"}))
    model = conftest.make_clip(tmp_path / "other", seed=2)
    cases = {"--lr": "0.5", "--seed": "3", "--rows": rows, "--model": model, "--loss": "I:T"}
    for flag, value in cases.items():
        check_refused(capfd, f"error: {flag}: ", *arguments, flag, value)
    assert (tmp_path / "run" / "state.pt").read_bytes() == before
    shutil.copy(world / "rows.jsonl", tmp_path / "same.jsonl")  # these flags change no result
    more = ["--workers", "1", "--save-every", "3", "--rows", str(tmp_path / "same.jsonl")]
    assert train(*arguments, *more) is None


def test_damaged_files_and_foreign_models_are_one_line(world, tmp_path, capfd):
    arguments = flags(world, tmp_path / "run", batch_size=40)
    assert train(*arguments) is None
    path = tmp_path / "run" / "state.pt"
    path.write_bytes(path.read_bytes()[:100])
    check_refused(capfd, f"paraclip.py: error: {path}: ", *arguments)
    base = tmp_path / "base"
    conftest.make_clip(base)
    before = (base / "open_clip_model.safetensors").read_bytes()
    words = "it holds a model, and no run to go on with"
    check_refused(capfd, words, *flags(world, base, model=base, batch_size=40))
    assert (base / "open_clip_model.safetensors").read_bytes() == before
    assert len(list(base.iterdir())) == 2


def test_a_loss_that_is_not_finite_stops_with_its_step(world, tmp_path, capfd):
    """No state is saved before the losses that led to it are known to be finite."""
    check_refused(capfd, "step 1: the loss", *flags(world, tmp_path / "run", lr="1e30"))
    assert len(log_of(tmp_path / "run")) == 1
    arguments = flags(world, tmp_path / "run", lr="2e30", save_every=1)
    check_refused(capfd, "step 1: the loss", *arguments)
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 1


def test_a_full_gpu_is_one_line(world, tmp_path, monkeypatch, capfd):
    """And a single process leaves its process group, or NCCL would print a warning after it."""

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n20 GiB")

    monkeypatch.setattr(paraclip, "loss_terms", fail)
    words = "out of memory. Tried to allocate 20 GiB; in paraclip.py a --micro-batch needs less"
    check_refused(capfd, words, *flags(world, tmp_path / "run"))
    assert not dist.is_initialized()


def test_slow_steps_are_saved_by_the_clock(world, tmp_path, monkeypatch):
    """A short run of slow steps has a state before it comes to --save-every."""
    saved = []
    monkeypatch.setattr(paraclip, "SAVE_SECONDS", -1)
    monkeypatch.setattr(paraclip, "save_state", lambda *state: saved.append(state[2]))
    assert train(*flags(world, tmp_path / "run", batch_size=40, epochs=2)) is None
    assert saved == [1, 2, 3, 4]


def test_a_full_disk_keeps_the_old_state(world, tmp_path, monkeypatch):
    """A limit on the size of files stands in for the disk: after the first state, or before it."""
    save_state = paraclip.save_state

    def limit(*state):
        if state:
            save_state(*state)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    monkeypatch.setattr(paraclip, "save_state", limit)
    code, output = end(start(*flags(world, tmp_path / "run", save_every=2)))
    assert code == 2 and "Traceback" not in output, output
    assert re.search(r"state.pt: OSError: .*File too large", output), output
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 2
    assert not list((tmp_path / "run").glob("*.part"))
    arguments = flags(world, tmp_path / "b")
    monkeypatch.setattr(paraclip, "check_flags", lambda _: limit())
    code, output = end(start(*arguments))
    assert code == 2 and "Traceback" not in output, output
    assert re.search(r"tokens-\w+.npy: OSError: .*to file", output), output
    monkeypatch.undo()
    assert train(*arguments, "--batch-size", "40") is None


# ------------------------------------------------------------------ unfrozen.py, the fork


def test_one_step_has_the_naive_gradients_in_both_towers(world, alone, monkeypatch):
    """In chunks of images, which backward encodes again, and of texts cut to their length."""
    monkeypatch.setattr(unfrozen, "IMAGES_AT_ONCE", 5)
    clips = []
    for _ in range(2):
        model = paraclip.load_model(f"local-dir:{world}/clip")
        model.clip.visual.requires_grad_(True)
        clips.append(model.clip.double())
    clip, naive = clips
    data = unfrozen.Data(model, paraclip.parse_args(flags(world, world / "run")))
    tokens, pixels = data.batch(np.arange(12))
    loss = unfrozen.total_loss(paraclip.TextEncoder(clip), tokens, pixels, PARACLIP)
    loss.backward()
    image_features = naive.encode_image(pixels.double(), normalize=True)
    expected = sum(naive_terms(naive, tokens, image_features, PARACLIP).values())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert any("visual" in name for name in gradients(naive))
    assert difference(gradients(clip), gradients(naive)) < 1e-5


def test_a_run_moves_both_towers(world, tmp_path):
    """Its output is a model that open_clip and evaluate.py read."""
    arguments = flags(world, tmp_path / "run", batch_size=40, image_lr=1e-3)
    command = [sys.executable, ROOT / "tests" / "unfrozen.py", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before = weights_of(world / "clip")
    after = weights_of(tmp_path / "run")
    for key, tensor in before.items():
        assert not torch.equal(tensor, after[key])
    assert paraclip.load_model(f"{tmp_path}/run")


if __name__ == "__main__":  # a rank of test_two_ranks_equal_the_naive_step
    folder = Path(sys.argv[1])
    paraclip.set_up_ranks()
    for size in (0, 7):
        check_one_step(f"local-dir:{folder}/clip", folder, micro_batch=size)
    dist.destroy_process_group()
