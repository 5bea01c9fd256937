"""paraclip.py against the naive computation: open_clip at 77 tokens and a six-line InfoNCE."""

import argparse
import glob
import itertools
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
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
from conftest import ROOT
from flickr8k import TABLE_2
from safetensors.torch import load_file

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


def examples_of(world, tokenizer, count=24, dim=32):
    """Examples of the first rows, with random image features."""
    rows = paraclip.read_rows([str(world / "rows.jsonl")])
    rows.places = rows.places[:count]
    features = torch.randn(80, dim, generator=torch.Generator().manual_seed(1))
    slices = [F.normalize(features, dim=-1).half()]
    return paraclip.Examples(rows, ["T", "T1", "T2"], tokenizer, slices)


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


@pytest.fixture
def alone():
    """A process group of this process alone."""
    paraclip.set_up_ranks()
    yield
    dist.destroy_process_group()


def check_one_step(name, world, micro_batch, dtype=torch.float64, bound=1e-10):
    """Terms and all gradients on 24 examples equal the naive ones. Returns the tokens."""
    model = paraclip.load_model(name)
    naive = paraclip.load_model(name).clip.to(dtype)
    tokens, image_features = examples_of(world, model.tokenizer)[np.arange(24)]
    encoder = paraclip.TextEncoder(model.clip.to(dtype), micro_batch)
    terms = paraclip.loss_terms(encoder, tokens, image_features, PARACLIP)
    expected = naive_terms(naive, tokens, image_features, PARACLIP)
    sum(terms.values()).backward()
    sum(expected.values()).backward()
    assert values_of(terms) == pytest.approx(values_of(expected), rel=bound)
    assert "logit_scale" in gradients(naive)
    assert not any("visual" in name for name in gradients(naive))
    assert difference(gradients(model.clip), gradients(naive)) < bound
    return tokens


def worker(name, world, out):
    """One step on this rank's half of 24 examples in fp64, whole and in micro-batches."""
    paraclip.set_up_ranks()
    part = next(paraclip.batches(24, batch_size=24, epochs=1, seed=0))
    steps = []
    for micro_batch in (0, 7):
        model = paraclip.load_model(name)
        tokens, image_features = examples_of(Path(world), model.tokenizer)[part]
        encoder = paraclip.TextEncoder(model.clip.double(), micro_batch)
        encoder = torch.nn.parallel.DistributedDataParallel(encoder)
        terms = paraclip.loss_terms(encoder, tokens, image_features, PARACLIP)
        (dist.get_world_size() * sum(terms.values())).backward()
        shares = torch.stack(list(terms.values())).detach()
        dist.all_reduce(shares)
        steps.append((dict(zip(terms, shares.tolist())), gradients(model.clip)))
    if dist.get_rank() == 0:
        torch.save(steps, out)
    dist.destroy_process_group()


def torchrun(*arguments, options=()):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", *options, *map(str, arguments)]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# ------------------------------------------------------------------ one step


@pytest.mark.parametrize("micro_batch", [0, 7])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_one_step_equals_the_naive_one(world, alone, micro_batch, dtype, bound):
    check_one_step(f"local-dir:{world}/clip", world, micro_batch, dtype, bound)


def test_two_ranks_equal_the_naive_step(world, alone, tmp_path):
    name = f"local-dir:{world}/clip"
    process = torchrun(__file__, name, world, tmp_path / "step.pt")
    assert process.wait(120) == 0, process.stdout.read()
    model = paraclip.load_model(name)
    order = np.random.default_rng([0, 0]).permutation(24)
    tokens, image_features = examples_of(world, model.tokenizer)[order]
    expected = naive_terms(model.clip.double(), tokens, image_features, PARACLIP)
    sum(expected.values()).backward()
    for terms, found in torch.load(tmp_path / "step.pt"):
        assert terms == pytest.approx(values_of(expected), rel=1e-10)
        assert difference(found, gradients(model.clip)) < 1e-10


def test_info_nce_is_the_sum_of_its_shares():
    a = F.normalize(torch.randn(10, 8).double(), dim=-1).requires_grad_()
    b = F.normalize(torch.randn(10, 8).double(), dim=-1).requires_grad_()
    scale = torch.tensor(14.0).double().requires_grad_()
    expected = naive_info_nce(a, b, scale)
    shares = [paraclip.info_nce(a, b, scale, slice(start, start + 4)) for start in (0, 4, 8)]
    assert sum(shares).item() == pytest.approx(expected.item(), rel=1e-12)
    found = torch.autograd.grad(sum(shares), (a, b, scale))
    for one, other in zip(found, torch.autograd.grad(expected, (a, b, scale))):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-14)


def test_batches_are_the_same_for_any_number_of_ranks(monkeypatch):
    parts = {}
    for ranks in (1, 2, 3):
        monkeypatch.setattr(dist, "get_world_size", lambda ranks=ranks: ranks)
        for rank in range(ranks):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            parts[ranks, rank] = list(paraclip.batches(40, batch_size=12, epochs=2, seed=3))
    whole = [batch.tolist() for batch in parts[1, 0]]
    assert len(whole) == 6
    for ranks in (2, 3):
        for step in range(6):
            joined = [row for rank in range(ranks) for row in parts[ranks, rank][step].tolist()]
            assert joined == whole[step]
    for epoch in (whole[:3], whole[3:]):
        assert len({row for batch in epoch for row in batch}) == 36  # no row twice


def test_seeds_share_no_epoch(alone):
    """Once seed 0's second epoch was seed 1's first."""
    orders = set()
    for seed in range(3):
        for epoch in np.split(np.array(list(paraclip.batches(40, 10, 3, seed))), 3):
            orders.add(tuple(epoch.flatten()))
    assert len(orders) == 9


def test_three_steps_of_adamw_equal_a_naive_loop(world, alone, tmp_path):
    flags = "--rows x --batch-size 8 --lr 1e-3 --weight-decay 0.1 --workers 0 --save-every 2"
    args = paraclip.parse_args([*flags.split(), "--output", str(tmp_path)])
    model = paraclip.load_model(f"local-dir:{world}/clip")
    examples = examples_of(world, model.tokenizer)
    encoder = paraclip.TextEncoder(model.clip.double())
    optimizer = paraclip.make_optimizer(encoder, args.lr, args.weight_decay)
    paraclip.train(encoder, optimizer, examples, 3, 0, args)

    naive = paraclip.load_model(f"local-dir:{world}/clip").clip.double()
    trained = [p for name, p in naive.named_parameters() if not name.startswith("visual.")]
    matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1}
    others = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0}
    optimizer = torch.optim.AdamW([matrices, others], lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    order = np.random.default_rng([0, 0]).permutation(24)
    losses = []
    for step in range(3):
        tokens, image_features = examples[order[step * 8 : step * 8 + 8]]
        loss = sum(naive_terms(naive, tokens, image_features, PARACLIP).values())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    log = log_of(tmp_path)
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-9)
    assert [entry["lr"] for entry in log] == pytest.approx([1e-3, 0.75e-3, 0.25e-3])
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


# Processes that have imported torch already: a start takes no five seconds.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["open_clip", "torchvision", "safetensors.torch"])


def paraclip_process(arguments, code, environment, cwd, output):
    """What start() runs: paraclip.py after `code` has changed it, on one thread."""
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(cwd)
    os.environ.update(environment)
    torch.set_num_threads(1)
    exec(code, {"paraclip": paraclip})  # noqa: S102
    sys.argv = ["paraclip.py", *arguments]
    paraclip.run(paraclip.main)


def start(*arguments, code="", environment=None, cwd="."):
    """paraclip.py in its own process; its attribute `output` is the file with what it prints."""
    handle, output = tempfile.mkstemp()
    os.close(handle)
    values = (arguments, code, environment or {}, cwd, output)
    process = FORKSERVER.Process(target=paraclip_process, args=values)
    process.output = output
    process.start()
    return process


def end(process, seconds=120):
    """Wait for a process of start(). Returns its exit code and what it has printed."""
    process.join(seconds)
    assert process.exitcode is not None, f"it hangs: {Path(process.output).read_text()}"
    return process.exitcode, Path(process.output).read_text()


def start_two(one, other, code=""):
    """Two machines: a rank each, with arguments and a folder (their `cwd`) of its own.

    Returns both exit codes and what both printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank, (arguments, cwd) in enumerate((one, other)):
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(start(*arguments, code=code, environment=environment, cwd=cwd))
    results = [end(process) for process in processes]
    codes = [code for code, _ in results]
    return codes, [output for _, output in results]


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


def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    """A run of 40 steps that nothing stopped, in its own process."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    code, output = end(start(*flags(world, folder, epochs=4)))
    assert code == 0, output
    return folder, output


def test_a_run_learns_and_leaves_the_image_tower_alone(world, unbroken):
    folder, output = unbroken
    log = log_of(folder)
    before = load_file(world / "clip" / "open_clip_model.safetensors")
    after = weights_of(folder)
    assert [entry["step"] for entry in log] == list(range(40))
    losses = [entry["loss"] for entry in log]
    assert np.mean(losses[30:]) < np.mean(losses[:10])
    keys = "step loss terms lr logit_scale grad_norm examples_per_s eta_s"
    assert set(log[0]) == set(keys.split())
    assert log[0]["loss"] == pytest.approx(sum(log[0]["terms"].values()))
    assert list(log[0]["terms"]) == ["I:T2", "T:T1", "T1:T2"]
    assert log[0]["logit_scale"] == pytest.approx(1 / 0.07)  # before the step's update
    trained = 0
    for key in before:
        assert torch.equal(before[key], after[key]) == key.startswith("visual.")
        if not key.startswith("visual."):
            trained += after[key].numel()
    assert f"{trained:,} parameters trained" in output and "80 of 80, 80 images" in output
    assert "8 = 1 x 8" in output and "0 to 40, 4 epoch(s)" in output
    assert "'mean': [0.5, 0.5, 0.5]" in output
    assert "Warning" not in output and "Traceback" not in output


def same_in_open_clip(folder):
    """The run directory as open_clip loads it gives the text features that load_model gives."""
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red dog", "blue"])
    clip = open_clip.create_model(f"local-dir:{folder}").eval()
    model = paraclip.load_model(str(folder))
    assert torch.equal(clip.encode_text(tokens), model.clip.encode_text(tokens))
    assert len(set(tokens[0].tolist())) > 4


def test_the_run_directory_is_an_open_clip_model(world, unbroken):
    folder, _ = unbroken
    same_in_open_clip(folder)
    record = json.loads((folder / "config.json").read_text())
    base = paraclip.load_model(f"local-dir:{world}/clip")
    assert record["flags"]["batch_size"] == 8
    assert record["versions"]["torch"] in torch.__version__
    assert record["base_model"]["fingerprint"] == base.fingerprint
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 40
    assert paraclip.load_model(str(folder)).image_tower == base.image_tower


def test_the_file_alone_trains(world, unbroken, tmp_path):
    """Copied into an empty folder, it needs none of the project's other files, and no HTTP."""
    shutil.copy(ROOT / "paraclip.py", tmp_path)
    assert "requests" not in (ROOT / "paraclip.py").read_text()
    arguments = flags(world, tmp_path / "run", batch_size=40)
    command = [sys.executable, "paraclip.py", *arguments]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(log_of(tmp_path / "run")) == 2


def test_killed_and_started_again_is_bit_equal(world, unbroken, tmp_path):
    arguments = flags(world, tmp_path / "run", epochs=4, save_every=7)
    slices = f"{tmp_path}/run/features/*.safetensors"
    process = start(*arguments, code="paraclip.SLICE = 16")
    wait_for(lambda: len(glob.glob(slices)) >= 2, process.is_alive)
    process.kill()  # while the features are computed
    process.join()
    kept = {path: os.stat(path).st_mtime_ns for path in glob.glob(slices)}
    process = start(*arguments, code="paraclip.SLICE = 16")
    wait_for(lambda: len(log_of(tmp_path / "run")) > 24, process.is_alive)
    process.kill()  # in mid-run, past the state of step 21
    process.join()
    code, output = end(start(*arguments, code="paraclip.SLICE = 16"))
    assert code == 0 and "steps   2" in output, output
    for path, stamp in kept.items():
        assert os.stat(path).st_mtime_ns == stamp
    assert equal(weights_of(unbroken[0]), weights_of(tmp_path / "run"))
    for one, other in zip(log_of(tmp_path / "run"), log_of(unbroken[0]), strict=True):
        for key in ("step", "loss", "terms", "lr", "logit_scale", "grad_norm"):
            assert one[key] == other[key]


def kill_rank(folder, rank):
    """kill -9 the process of this rank whose command line names the folder."""
    for environ in glob.glob("/proc/[0-9]*/environ"):
        try:
            variables = Path(environ).read_bytes().split(b"\0")
            command = Path(environ).with_name("cmdline").read_bytes()
        except OSError:
            continue
        if f"RANK={rank}".encode() in variables and str(folder).encode() in command:
            os.kill(int(Path(environ).parent.name), signal.SIGKILL)


def test_torchrun_restarts_a_killed_rank(world, unbroken, tmp_path):
    """Rank 0: its death once left the next round waiting for keys of the last one."""
    arguments = flags(world, tmp_path / "run", epochs=4, save_every=5)
    process = torchrun(ROOT / "paraclip.py", *arguments, options=["--max-restarts", "2"])
    wait_for(lambda: len(log_of(tmp_path / "run")) > 11, lambda: process.poll() is None)
    kill_rank(tmp_path, 0)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and "8 = 2 x 4" in output, output
    assert "steps   0 to" not in output.rpartition("model ")[2], output
    log = log_of(tmp_path / "run")
    assert [entry["step"] for entry in log] == list(range(40))
    losses = [entry["loss"] for entry in log]
    assert losses == pytest.approx([entry["loss"] for entry in log_of(unbroken[0])], rel=1e-4)


@pytest.mark.parametrize("terms", TABLE_2)
def test_the_losses_of_table_2(world, tmp_path, terms):
    loss = terms.split()
    images = world / "images" if "I" in terms else None  # L2 + L3 needs none
    arguments = flags(world, tmp_path / "run", loss=loss, batch_size=40, images=images)
    assert train(*arguments) is None
    first = log_of(tmp_path / "run")[0]

    paraclip.set_up_ranks()
    model = paraclip.load_model(f"local-dir:{world}/clip")
    rows = paraclip.read_rows([str(world / "rows.jsonl")])
    kinds = [kind for kind in ("T", "T1", "T2") if kind in paraclip.kinds_of(loss)]
    features = None
    if images:
        args = paraclip.parse_args(arguments)
        features, _ = paraclip.cache_image_features(model, rows.image_ids, args)
    dist.destroy_process_group()
    order = np.random.default_rng([0, 0]).permutation(80)[:40]
    tokens, image_features = paraclip.Examples(rows, kinds, model.tokenizer, features)[order]
    expected = naive_terms(model.clip, tokens, image_features, loss)
    assert first["terms"] == pytest.approx(values_of(expected), rel=1e-5)


# ------------------------------------------------------------------ ranks that don't agree


def test_two_machines_with_their_own_copies_of_the_images(world, tmp_path):
    """And the shared folder under two paths. Once each rank waited for its own names for ever."""
    shutil.copytree(world / "images", tmp_path / "b" / "images")
    (tmp_path / "b" / "run").symlink_to(tmp_path / "run")
    (tmp_path / "run").mkdir()
    machine = flags(world, tmp_path / "run", batch_size=40)
    other = flags(world, "run", images="images", batch_size=40)
    machines = [(machine, tmp_path), (other, tmp_path / "b")]
    codes, outputs = start_two(*machines, code="paraclip.SLICE = 16")
    assert codes == [0, 0], outputs
    assert len(log_of(tmp_path / "run")) == 2


DISAGREEING = {
    "no images": ({"images": "none"}, "--images none: there is no such folder"),
    "unreadable images": ({"images": "."}, "more than --max-bad-images 0.01 lets pass; the first"),
    "other flags": (
        {"lr": 0.1, "seed": 5},
        "rank 1 and rank 0 differ in --lr (0.1 and 0.001), --seed (5 and 0)",
    ),
    "an output of its own": ({"output": "."}, "rank 1 and rank 0 differ in step in --output"),
}


@pytest.mark.parametrize("case", DISAGREEING)
def test_a_second_machine_that_disagrees_ends_both(world, unbroken, tmp_path, case):
    """With one line on each, and no step. Once it trained to "done", or hung."""
    change, message = DISAGREEING[case]
    folder = tmp_path / "run"
    if "output" in change:
        shutil.copytree(unbroken[0], folder)
    (tmp_path / "b").mkdir()
    arguments = flags(world, folder, epochs=4)
    others = flags(world, **{"output": folder, "epochs": 4, **change})
    machines = [(arguments, tmp_path), (others, tmp_path / "b")]
    codes, outputs = start_two(*machines, code="paraclip.SLICE = 16")
    assert codes == [2, 2], outputs
    for output in outputs:
        assert message in output and "Traceback" not in output, output
    assert len(log_of(folder)) in (0, 40)


def test_what_another_job_left_in_the_environment(world, tmp_path, monkeypatch, capfd):
    """WORLD_SIZE without RANK is one process (once a silent hang); RANK alone is one line."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    assert train(*flags(world, tmp_path / "run", batch_size=40)) is None
    assert "40 = 1 x 40" in capfd.readouterr().out
    monkeypatch.setenv("RANK", "0")
    assert train(*flags(world, tmp_path / "run", batch_size=40)) == 2
    assert "MASTER_ADDR" in capfd.readouterr().err


def test_the_ranks_must_divide_the_batch(world, tmp_path):
    machine = (flags(world, tmp_path / "run", batch_size=9), tmp_path)
    codes, outputs = start_two(machine, machine)
    assert codes == [2, 2], outputs
    for output in outputs:
        assert "paraclip.py: error: --batch-size 9 can't be divided among 2 ranks" in output


def test_a_rank_without_a_gpu(world, tmp_path, monkeypatch, capfd):
    """Eight ranks on a machine of two GPUs: the third says what is wrong."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(dist.HashStore(), 2, 8)]))
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert train(*flags(world, tmp_path / "run")) == 2
    assert "rank 2 has no GPU, this machine has 2; start" in capfd.readouterr().err


# ------------------------------------------------------------------ models


@pytest.mark.parametrize("micro_batch", [0, 7])
def test_roberta_equals_the_naive_step(world, alone, tmp_path, micro_batch):
    name = conftest.make_roberta(tmp_path)
    tokens = check_one_step(name, world, micro_batch)
    encoder = paraclip.TextEncoder(paraclip.load_model(name).clip)
    assert len(set(encoder.lengths(tokens["T"]).tolist())) > 3


def test_a_roberta_run_directory_loads_in_open_clip(world, tmp_path):
    name = conftest.make_roberta(tmp_path)
    assert train(*flags(world, tmp_path / "run", model=name, batch_size=40)) is None
    same_in_open_clip(tmp_path / "run")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A model of the name tiny in open_clip, and a checkpoint file tiny.pt of it, as LaCLIP's."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.json").write_text(json.dumps(conftest.TINY))
    open_clip.add_model_config("tiny.json")
    clip = open_clip.create_model("tiny")
    weights = {"module." + key: tensor for key, tensor in clip.state_dict().items()}
    content = {"state_dict": weights, "epoch": 32, "args": argparse.Namespace(lr=1e-3)}
    torch.save(content, "tiny.pt")
    return clip


def test_checkpoint_files_like_laclips(tiny, monkeypatch):
    monkeypatch.setitem(paraclip.BASELINES, "laclip", ("tiny", "tiny.pt"))
    for name in ("laclip", "tiny:tiny.pt"):
        assert equal(paraclip.load_model(name).clip.state_dict(), tiny.state_dict())
    torch.save({"state_dict": tiny.state_dict(), "args": os.system}, "evil.pt")
    with pytest.raises(InputError, match="evil.pt: can.t be read: UnpicklingError"):
        paraclip.load_model("tiny:evil.pt")
    with pytest.raises(InputError, match="can.t be read: "):
        paraclip.load_model("ViT-S-32-alt:tiny.pt")


def test_a_checkpoint_files_images_are_prepared_as_its_tags_agree(tiny, monkeypatch, capfd):
    """Once always with OpenAI's mean: silently wrong for 45 of open_clip's models."""
    def mean():
        return paraclip.load_model("tiny:tiny.pt").clip.visual.preprocess_cfg["mean"]

    default = open_clip.OPENAI_DATASET_MEAN
    assert mean() == default and "tiny: open_clip's tags don't say" in capfd.readouterr().err
    tag = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    tag["resize_mode"] = "squash"
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"a": tag, "b": dict(tag)})
    assert mean() == (0.5,) * 3 and not capfd.readouterr().err
    other = {**tag, "mean": default}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"a": tag, "b": other})
    assert mean() == default and "tiny: open_clip's tags don't say" in capfd.readouterr().err


def test_the_five_baselines(tmp_path, monkeypatch):
    """Their models and tags exist, and a folder of the same name doesn't take their place."""
    monkeypatch.chdir(tmp_path)
    Path("laion400m_laclip.pt").touch()
    conftest.make_clip(tmp_path / "openai")
    for name, pair in paraclip.BASELINES.items():
        assert paraclip.find_model(name) == pair
    assert paraclip.find_model("./openai") == ("local-dir:./openai", None)
    assert open_clip.get_model_config("ViT-B-32-quickgelu")["quick_gelu"]


def test_weights_that_cannot_be_downloaded(tmp_path):
    """One line, whatever the hub's client says."""
    code = "import paraclip; paraclip.run(lambda: paraclip.load_model('openai'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "model openai: can't be read" in done.stderr


def test_a_tower_that_is_not_causal_is_encoded_whole(world, alone, tmp_path):
    """Nothing is cut where any token may matter; a SigLIP is refused."""
    text_cfg = {**conftest.TINY["text_cfg"], "no_causal_mask": True, "pool_type": "last"}
    config = {**conftest.TINY, "custom_text": True, "text_cfg": text_cfg}
    check_one_step(conftest.make_clip(tmp_path / "clip", config), world, 7)
    config = {**conftest.TINY, "init_logit_bias": -10}
    with pytest.raises(InputError, match="no CLIP with two towers and a softmax loss"):
        paraclip.load_model(conftest.make_clip(tmp_path / "siglip", config))


def test_loading_leaves_no_trace(world, monkeypatch):
    """Neither in logging, nor in random states, nor in the filters of warnings."""
    monkeypatch.setattr(logging.root, "handlers", [])
    torch.manual_seed(7)
    state = torch.get_rng_state()
    filters = list(warnings.filters)
    paraclip.load_model("ViT-S-32-alt:random")
    with pytest.raises(InputError):
        paraclip.load_model(f"ViT-S-32-alt:{world}/rows.jsonl")
    assert logging.root.manager.disable == 0 and logging.root.handlers == []
    assert torch.equal(torch.get_rng_state(), state)
    assert warnings.filters == filters
    assert not any("PIL" in str(entry[3]) for entry in filters if entry[3])


# ------------------------------------------------------------------ the cache of image features


def cache(world, folder, ids=None, model=None, **more):
    """cache_image_features: {image_id: feature} and {image_id: why it can't be read}."""
    values = {"images": world / "images", "workers": 0, **more}
    args = paraclip.parse_args(flags(world, folder, **values))
    model = paraclip.load_model(model or f"local-dir:{world}/clip")
    ids = ids or [f"{i:04}" for i in range(80)]
    slices, unreadable = paraclip.cache_image_features(model, ids, args)
    return dict(zip(ids, torch.cat(slices))), unreadable


def test_cached_features_are_open_clips_to_fp16(world, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(paraclip, "SLICE", 32)
    found, unreadable = cache(world, tmp_path)
    clip, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{world}/clip")
    assert len(found) == 80 and not unreadable
    assert len(glob.glob(f"{tmp_path}/features/*.safetensors")) == 3
    for image_id, feature in found.items():
        image = preprocess(paraclip.Image.open(world / "images" / f"{image_id}.jpg"))[None]
        expected = clip.eval().encode_image(image, normalize=True)[0]
        assert feature.dtype == torch.float16
        assert (feature - expected).abs().max() < 2**-11


def test_the_cache_is_named_by_its_content(world, alone, tmp_path, monkeypatch):
    """The same tower, root and ids: nothing is encoded again. Another of any: other files."""
    encoded = []
    original = paraclip.encode_images

    def counting(model, items, *more):
        encoded.append(len(items))
        return original(model, items, *more)

    monkeypatch.setattr(paraclip, "encode_images", counting)
    first, _ = cache(world, tmp_path)
    again, _ = cache(world, tmp_path)
    assert encoded == [80, 0] and equal(first, again)
    (tmp_path / "elsewhere").symlink_to(world / "images")
    cache(world, tmp_path, images=tmp_path / "elsewhere")  # a link is the same root
    cache(world, tmp_path, ids=["0000", "0001"])
    (tmp_path / "others").mkdir()
    paraclip.Image.new("RGB", (40, 40)).save(tmp_path / "others" / "0000.jpg")
    black, _ = cache(world, tmp_path, ids=["0000"], images=tmp_path / "others")
    assert encoded[2:] == [0, 2, 1] and not torch.equal(black["0000"], first["0000"])
    model = conftest.make_clip(tmp_path / "clip", seed=1)
    other, _ = cache(world, tmp_path, ids=["0000", "0001"], model=model)
    assert encoded[5:] == [2] and not torch.equal(other["0000"], first["0000"])


TOWERS = {  # of equal weights, which only the configuration tells apart
    "plain": {},
    "pool_type": {"pool_type": "avg"},
    "head_width": {"head_width": 32},
    "eps": {"norm_kwargs": {"eps": 0.1}},
}


def test_towers_of_equal_weights_share_no_features(world, alone, tmp_path):
    """Once they did, silently: the loss of step 0 was another model's."""
    found = {}
    for name, change in TOWERS.items():
        vision_cfg = {**conftest.TINY["vision_cfg"], **change}
        model = conftest.make_clip(tmp_path / name, {**conftest.TINY, "vision_cfg": vision_cfg})
        shared, _ = cache(world, tmp_path / "run", model=model)
        own, _ = cache(world, tmp_path / f"run-{name}", model=model)
        assert equal(shared, own)
        found[name] = shared["0000"]
        weights = weights_of(tmp_path / name)
        assert equal(weights, weights_of(tmp_path / "plain"))
    for one, other in itertools.combinations(found, 2):
        assert not torch.equal(found[one], found[other])


def test_two_runs_fill_one_cache_at_once(world, unbroken, tmp_path):
    """Neither disturbs the other, and both end as one alone does."""
    processes = []
    for name in ("a", "b"):
        arguments = flags(world, tmp_path / name, features=tmp_path / "features", epochs=4)
        processes.append(start(*arguments, code="paraclip.SLICE = 4"))
    for process in processes:
        code, output = end(process)
        assert code == 0, output
    assert len(os.listdir(tmp_path / "features")) == 20
    for name in ("a", "b"):
        assert equal(weights_of(tmp_path / name), weights_of(unbroken[0]))


def test_tar_shards_files_and_other_extensions_give_the_same_features(world, alone, tmp_path):
    images = tmp_path / "images"
    (images / "00001").mkdir(parents=True)
    names = sorted(os.listdir(world / "images"))[:7]
    data = [(world / "images" / name).read_bytes() for name in names]
    members = {"0000.jpg": data[0], "0000.txt": b"text", "./0001.jpg": data[1]}
    members |= {"in/0002.jpg": data[2], "22.05.JPG": data[6], "22.05.txt": b"text"}
    (images / "00000.tar").write_bytes(conftest.tar(members))
    (images / "00001" / "b.tar").write_bytes(conftest.tar({"0003.jpg": data[3]}))
    paraclip.Image.open(world / "images" / names[4]).save(images / "00001" / "0004.png")
    (images / "whole.jpg").write_bytes(data[5])
    expected, _ = cache(world, tmp_path / "flat")
    sources = {
        "00000/0000": "0000",
        "00000/0001": "0001",
        "00000/in/0002": "0002",
        "00000/22.05": "0006",
        "00001/0004": "0004",
        "00001/b/0003": "0003",
        "whole.jpg": "0005",
    }
    found, unreadable = cache(
        world, tmp_path / "shards", ids=list(sources), images=images, workers=2
    )
    assert not unreadable
    for image_id, source in sources.items():
        assert (found[image_id] - expected[source]).abs().max() < 2**-11


def test_a_damaged_or_cut_shard_is_no_end(world, alone, tmp_path):
    """A bad header amid the members, and a cut that tarfile takes for the archive's end."""
    jpeg = (world / "images" / "0000.jpg").read_bytes()
    whole = conftest.tar({f"{i:02}.jpg": jpeg for i in range(20)})
    place = whole.index(b"10.jpg")
    damaged = whole[:place] + b"\xff" * 512 + whole[place + 512 :]
    for name, data in (("a", damaged), ("b", whole[:place])):
        (tmp_path / f"{name}.tar").write_bytes(data)
        with pytest.raises(InputError, match=f"{name}.tar is damaged or cut off at byte {place:,}"):
            cache(world, tmp_path / "run", ids=[f"{name}/00"], images=tmp_path)


def test_unreadable_images_are_left_out_with_their_rows(world, tmp_path, capfd):
    """CMYK, 16 bits and one pixel can be read; what a run once left out stays left out."""
    copy = tmp_path / "images"
    shutil.copytree(world / "images", copy)
    (copy / "0007.jpg").write_bytes((copy / "0007.jpg").read_bytes()[:300])
    (copy / "0011.jpg").write_bytes(b"")
    (copy / "0013.jpg").unlink()
    paraclip.Image.new("1", (15_000, 15_000)).save(copy / "0017.png")  # a decompression bomb
    (copy / "0017.jpg").unlink()
    paraclip.Image.new("CMYK", (9, 9)).save(copy / "0001.jpg")
    paraclip.Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(copy / "0002.png")
    (copy / "0002.jpg").unlink()
    paraclip.Image.new("RGB", (1, 1)).save(copy / "0003.jpg")
    arguments = flags(world, tmp_path / "run", images=copy, batch_size=70, epochs=2, save_every=1)
    assert train(*arguments) == 2
    message = "1 of the first 8 images can't be read, more than --max-bad-images 0.01 lets pass"
    assert message in capfd.readouterr().err
    assert train(*arguments, "--max-bad-images", "0.06") is None
    out = capfd.readouterr().out
    assert "76 of 80, 80 images" in out
    assert "again): 0007, 0011, 0013, 0017\n" in out

    before = log_of(tmp_path / "run")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    torch.save({**state, "step": 0}, tmp_path / "run" / "state.pt")
    for name in ("0007.jpg", "0013.jpg"):  # they can be read now
        shutil.copy(world / "images" / name, copy / name)
    new = ["--features", str(tmp_path / "new")]
    assert train(*arguments, "--max-bad-images", "0.06", *new) is None
    assert "76 of 80" in capfd.readouterr().out
    assert len(log_of(tmp_path / "run")) == len(before)


# ------------------------------------------------------------------ bad input: one line, code 2


def rows_with(world, tmp_path, change):
    """A copy of the rows whose third line is changed; its path."""
    lines = (world / "rows.jsonl").read_text().splitlines()
    if isinstance(change, dict):
        change = json.dumps({**json.loads(lines[2]), **change})
    lines[2] = change
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "bad.jsonl"


BAD_ROWS = {
    '{"image_id": "0': "bad.jsonl:3: it is no JSON, as generate.py's rows are (",
    "[1]": "bad.jsonl:3: TypeError",
    '{"image_id": "0001"}': 'bad.jsonl:3: "caption" is missing, blank or no text',
    '{"caption": "a"}': "bad.jsonl:3: the key 'image_id' is missing",
}
BAD_TEXTS = {
    "paraphrase_2": (" ", 'jsonl:3: "paraphrase_2" is missing, blank or no text'),
    "caption": (None, 'jsonl:3: "caption" is missing, blank or no text'),
    "image_id": ("a/../../x", "image_id 'a/../../x' must be a path below the folder of images"),
    "image_id ": ("/etc/passwd", "must be a path below the folder of images"),
    "image_id  ": ("a\ud83d", "the first is a?: there is no "),
}
BAD_FLAGS = [
    ({"rows": "none-*.jsonl"}, "none-*.jsonl: there is no such file"),
    ({"batch_size": 81}, "--rows: 80 rows to train on are fewer than --batch-size 81; give"),
    ({"images": "."}, "the first is 0000: there is no ./0000 with .jpg"),
    ({"images": "none"}, "--images none: there is no such folder"),
    ({"images": None}, "--images is needed: a term of --loss has I"),
    ({"model": "."}, "no folder with open_clip_model.safetensors"),
    ({"model": "clip"}, "model clip: it is none of openai, openclip-400m"),
    ({"model": "ViT-B-32:laion3b"}, "ViT-B-32:WEIGHTS with one of FILE, openai, laion400m_e31"),
    ({"epochs": 0}, "--epochs: 0 must be a number, 1 or more"),
    ({"lr": -1}, "--lr: -1 must be a number, 0 or more"),
    ({"weight_decay": "nan"}, "--weight-decay: nan must be a number, 0 or more"),
    ({"lr": "inf"}, "--lr: inf must be a number, 0 or more"),
    ({"loss": ["I:T3"]}, "--loss: invalid choice: 'I:T3'"),
    ({"loss": ["I:T", "I:T"]}, "--loss: the same term is there twice"),
    ({"loss": ["I:T", "T:I"]}, "--loss: the same term is there twice"),
    ({"lrate": 1}, "unrecognized arguments: --lrate 1"),
]


def check_refused(arguments, message, capfd):
    assert train(*arguments) == 2
    lines = []
    for line in capfd.readouterr().err.splitlines():
        if line and "image features" not in line:  # the progress bar
            lines.append(line)
    assert message in lines[-1] and lines[-1].startswith("paraclip.py: error: "), lines
    assert len(lines) == 1 or lines[0].startswith("usage: "), lines


@pytest.mark.parametrize("line", BAD_ROWS)
def test_bad_rows(world, tmp_path, capfd, line):
    rows = rows_with(world, tmp_path, line)
    check_refused(flags(world, tmp_path / "run", rows=rows), BAD_ROWS[line], capfd)


@pytest.mark.parametrize("key", BAD_TEXTS)
def test_bad_texts(world, tmp_path, capfd, key):
    text, message = BAD_TEXTS[key]
    rows = rows_with(world, tmp_path, {key.strip(): text})
    check_refused(flags(world, tmp_path / "run", rows=rows), message, capfd)


@pytest.mark.parametrize("change, message", BAD_FLAGS)
def test_bad_flags(world, tmp_path, monkeypatch, capfd, change, message):
    """A start that fails leaves no folder."""
    monkeypatch.chdir(tmp_path)
    check_refused(flags(world, tmp_path / "run", **change), message, capfd)
    assert not os.listdir(tmp_path)


def test_what_can_be_checked_is_checked_before_the_model_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr(paraclip, "load_model", lambda *_: pytest.fail("the model is loaded"))
    for change in ({"batch_size": 81}, {"images": None}, {"model": "none"}):
        assert train(*flags(world, tmp_path / "run", **change)) == 2


def test_rows_given_twice_count_once(world, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(world)
    rows = ["rows.jsonl", "row*.jsonl", str(world / "rows.jsonl")]
    assert train(*flags(world, tmp_path / "run", rows=rows, batch_size=80)) is None
    assert "rows    80 of 80, 80 images" in capfd.readouterr().out
    assert len(log_of(tmp_path / "run")) == 1


def test_other_flags_rows_or_model_on_resume_are_refused(world, tmp_path, capfd):
    arguments = flags(world, tmp_path / "run", batch_size=40)
    assert train(*arguments) is None
    before = (tmp_path / "run" / "state.pt").read_bytes()
    rows = str(rows_with(world, tmp_path, {"caption": "other"}))
    model = conftest.make_clip(tmp_path / "other", seed=2)
    cases = [
        (["--lr", "0.5", "--seed", "3"], "--lr (0.5 and 0.001), --seed (3 and 0)"),
        (["--rows", rows], "checksum of --rows"),
        (["--model", model], "fingerprint of --model"),
    ]
    for more, words in cases:
        assert train(*arguments, *more, "--features", str(tmp_path / more[0])) == 2
        err = capfd.readouterr().err
        place = f"this run and the one in --output {tmp_path}/run"
        assert f"{place} differ in {words}; give another --output" in err
    assert (tmp_path / "run" / "state.pt").read_bytes() == before
    shutil.copy(world / "rows.jsonl", tmp_path / "same.jsonl")  # these flags change no result
    more = ["--workers", "1", "--save-every", "3", "--rows", str(tmp_path / "same.jsonl")]
    assert train(*arguments, *more) is None


def test_damaged_files_and_foreign_models_are_one_line(world, tmp_path, capfd):
    arguments = flags(world, tmp_path / "run", batch_size=40, features=tmp_path / "features")
    assert train(*arguments) is None
    features, = (tmp_path / "features").iterdir()
    for path in (features, tmp_path / "run" / "state.pt", tmp_path / "run" / "config.json"):
        good = path.read_bytes()
        path.write_bytes(good[:100])
        assert train(*arguments) == 2
        last = capfd.readouterr().err.splitlines()[-1]
        assert last.startswith(f"paraclip.py: error: {path}: can't be read")
        path.write_bytes(good)
    base = tmp_path / "base"
    conftest.make_clip(base)
    before = (base / "open_clip_model.safetensors").read_bytes()
    assert train(*flags(world, base, model=base, batch_size=40)) == 2
    assert "holds a model, and no state.pt of a run to go" in capfd.readouterr().err
    assert (base / "open_clip_model.safetensors").read_bytes() == before
    assert len(list(base.iterdir())) == 2


def test_odd_but_good_rows(alone, tmp_path):
    """A BOM, blank lines, a number as an id, half an emoji."""
    row = {"image_id": 7, "caption": "a", "paraphrase_1": "b", "paraphrase_2": "c"}
    half = {**row, "image_id": "x", "caption": chr(0xD83D)}
    text = f"\ufeff{json.dumps(row)}\r\n\n{json.dumps(half)}\n\n"
    (tmp_path / "rows.jsonl").write_text(text)
    rows = paraclip.read_rows([str(tmp_path / "rows.jsonl")])
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    tokens, image_features = paraclip.Examples(rows, ["T"], tokenizer, None)[np.arange(2)]
    assert rows.image_ids == ["7", "x"] and image_features is None
    assert torch.equal(tokens["T"], tokenizer(["a", "?"]))


def test_without_git_and_beside_files_of_the_users(world, tmp_path, monkeypatch):
    """Slim containers have no git: the commit is null. What a user put there stays."""
    monkeypatch.setenv("PATH", "/nowhere")
    (tmp_path / "run" / "x.parts").mkdir(parents=True)
    (tmp_path / "run" / "notes.part").write_text("mine")
    assert train(*flags(world, tmp_path / "run", batch_size=40)) is None
    assert json.loads((tmp_path / "run" / "config.json").read_text())["git_commit"] is None
    assert (tmp_path / "run" / "notes.part").read_text() == "mine"


def test_a_loss_that_is_not_finite_stops_with_its_step(world, tmp_path, capfd):
    """Before a state is saved, the same folder may be used with other flags."""
    assert train(*flags(world, tmp_path / "run", lr="1e30")) == 2
    assert "step 1: the loss" in capfd.readouterr().err
    assert train(*flags(world, tmp_path / "run", lr="2e30", save_every=1)) == 2
    assert "step 1: the loss" in capfd.readouterr().err
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 1


def test_a_full_gpu_is_one_line(world, tmp_path, monkeypatch, capfd):
    """And a single process leaves its process group, or NCCL would print a warning after it."""

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n20 GiB")

    monkeypatch.setattr(paraclip, "loss_terms", fail)
    assert train(*flags(world, tmp_path / "run")) == 2
    error = capfd.readouterr().err
    assert re.search(r"a step; --micro-batch 256 .*: CUDA out of memory. Tried to", error)
    assert not dist.is_initialized()


def test_slow_steps_are_saved_by_the_clock(world, tmp_path, monkeypatch):
    """A short run of slow steps has a state before it comes to --save-every."""
    saved = []
    monkeypatch.setattr(paraclip, "SAVE_SECONDS", -1)
    monkeypatch.setattr(paraclip, "save_state", lambda *state: saved.append(state[2]))
    assert train(*flags(world, tmp_path / "run", batch_size=40, epochs=2)) is None
    assert saved == [1, 2, 3, 4]


def test_a_full_disk_keeps_the_old_state(world, tmp_path):
    """A limit on the size of files stands in for the disk, after the first state."""
    arguments = flags(world, tmp_path / "run", save_every=2)
    code = (
        "import resource\n"
        "original = paraclip.save_state\n"
        "def save(*state):\n"
        "    original(*state)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "paraclip.save_state = save"
    )
    code, output = end(start(*arguments, code=code))
    assert code == 2 and "Traceback" not in output, output
    assert re.search(r"state.pt: can't be written: File too large", output), output
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 2
    assert not glob.glob(f"{tmp_path}/run/*.part*")


@pytest.mark.parametrize("failure", [
    "os.kill(os.getpid(), signal.SIGBUS)",
    "raise RuntimeError('unable to allocate shared memory(shm) for file </torch_1>')",
])
def test_a_worker_without_shared_memory_is_one_line(world, tmp_path, failure):
    """What torch meets in a /dev/shm of 4 MB: a signal, or an error, by where it runs out."""
    code = (
        "import os, signal\n"
        "def fail(examples, batch):\n"
        f"    {failure}\n"
        "paraclip.Examples.__getitem__ = fail"
    )
    code, output = end(start(*flags(world, tmp_path / "run", workers=1), code=code))
    assert code == 2 and "Traceback" not in output, output
    assert "more room (docker run --ipc=host), or use --workers 0" in output


if __name__ == "__main__":
    worker(*sys.argv[1:])
