"""Training speed against open_clip's way, side by side in one run: the same rows, model, machine. Prints; asserts nothing.

    python tests/bench_train.py --batch-size 96 --seconds 60                          # ViT-B-32 on this CPU
    python tests/bench_train.py --device cuda --batch-size 3072 --micro-batch 1024     # on a GPU
    python tests/bench_train.py --profile                                              # where a step's time goes

Four ways, in turn, five times over: (a) open_clip's: encode_text at 77 tokens for each text, ClipLoss, the image tower in
the loop; (b) the same with stored image features; (c) paraclip.py's step; (d) the same with --micro-batch.
"""

import argparse
import ctypes
import os
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import paraclip
from paraclip import PARACLIP


def random_captions(count, rng):
    """Captions as long as the web's: with CLIP's two end tokens mean 14.2 tokens, p90 22, p99 36 (CC3M's validation set)."""
    words = ["red", "green", "blue", "dog", "cat", "car", "tree", "house", "river", "old", "new", "man", "woman", "photo", "street", "black", "white", "small"]
    lengths = np.exp(rng.normal(np.log(10.9), 0.48, count)).round().clip(2, 70).astype(int)
    return [" ".join(rng.choice(words, length)) for length in lengths]


def reset_peak(device):
    """Free what can be freed, forget the peak, and return the bytes that are left."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


def peak_memory(device, process="self"):
    """Bytes at the peak since reset_peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def text_flops(clip, tokens):
    """Floating-point operations of the text tower's forward over texts [n, 77], padding left out."""
    encoder = paraclip.TextEncoder(clip)
    lengths, tower = encoder.lengths(tokens).double(), encoder.tower
    layers, width = len(tower.transformer.resblocks), tower.positional_embedding.shape[-1]
    return layers * (24 * width**2 * lengths + 4 * width * lengths**2).sum().item()


def print_profile(step, device):
    """The kinds of operations that take most of one step, and how much of it is matrix products."""
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    step().backward()
    with torch.profiler.profile(activities=activities) as profile:
        step().backward()
    times = {op.key: op.self_device_time_total if cuda else op.self_cpu_time_total for op in profile.key_averages()}
    total = sum(times.values())
    for name, spent in sorted(times.items(), key=lambda item: -item[1])[:12]:
        print(f"{spent / total:6.1%}  {spent / 1e3:10.1f} ms  {name}")
    matmul = sum(spent for name, spent in times.items() if re.search(r"mm$|gemm|nvjet|attention|flash|fmha", name))
    print(f"{matmul / total:6.1%}  {matmul / 1e3:10.1f} ms  of {total / 1e3:.1f}: matrix products and attention")


def ways(clip, tokens, images, image_features, micro_batch):
    """{name: a function that does one step's loss and gradients and returns the loss}."""
    clip_loss = open_clip.ClipLoss()
    device = clip.logit_scale.device

    def naive(encode_image):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = {kind: clip.encode_text(t.to(device), normalize=True) for kind, t in tokens.items()}
            features["I"] = encode_image()
            scale = clip.logit_scale.exp()
            loss = 0
            for term in PARACLIP:
                a, b = term.split(":")
                loss = loss + clip_loss(features[a].to(features["T"]), features[b], scale)
            return loss

    def ours(size):
        encoder = paraclip.TextEncoder(clip, size, bf16=device.type == "cuda")
        return lambda: sum(paraclip.loss_terms(encoder, tokens, image_features, PARACLIP).values())

    def in_the_loop():
        with torch.no_grad():
            return clip.encode_image(images, normalize=True)

    return {"(a) open_clip, image tower in the loop": lambda: naive(in_the_loop),
            "(b) open_clip, stored image features": lambda: naive(lambda: image_features),
            "(c) paraclip.py": ours(0), f"(d) paraclip.py --micro-batch {micro_batch}": ours(micro_batch)}


def bench_step(flags):
    device = paraclip.set_up_ranks() if flags.device == "cuda" else torch.device("cpu")
    if flags.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        paraclip.set_up_ranks()
    model = paraclip.load_model(flags.model, device)
    clip = model.clip
    rng, n = np.random.default_rng(0), flags.batch_size
    captions = random_captions(3 * n, rng)
    if flags.captions:
        captions = Path(flags.captions).read_text().splitlines()
        captions = [captions[i] for i in rng.permutation(len(captions))[: 3 * n]]
    tokens = {kind: model.tokenizer(captions[i * n : (i + 1) * n]) for i, kind in enumerate(("T", "T1", "T2"))}
    lengths = np.concatenate([paraclip.TextEncoder(clip).lengths(t).numpy() for t in tokens.values()])
    print(f"{flags.model} on {device}, batch {n}, {torch.get_num_threads()} threads; tokens a text: mean {lengths.mean():.1f}, "
          f"p90 {np.percentile(lengths, 90):.0f}, p99 {np.percentile(lengths, 99):.0f}, longest {lengths.max()}")
    size = clip.visual.image_size if isinstance(clip.visual.image_size, tuple) else (clip.visual.image_size,) * 2
    images = torch.randn(n, 3, *size, device=device)
    with torch.no_grad():
        image_features = torch.cat([clip.encode_image(part, normalize=True) for part in images.split(256)])

    steps, rates, peaks, losses = ways(clip, tokens, images, image_features, flags.micro_batch), {}, {}, {}
    if flags.profile:
        return print_profile(steps["(c) paraclip.py"], device)
    steps = {name: step for name, step in steps.items() if name[1] in flags.ways}
    for repeat in range(5):  # the medians leave out a first one that is slow
        for name, step in steps.items():
            before, done, started = reset_peak(device), 0, time.perf_counter()
            while not done or time.perf_counter() - started < flags.seconds / 20:
                loss = step()
                loss.backward()
                losses[name] = loss.item()  # waits for the GPU
                clip.zero_grad()
                done += 1
            rates.setdefault(name, []).append(done * n / (time.perf_counter() - started))
            peaks[name] = peak_memory(device) - before
        print(f"repeat {repeat + 1} of 5: " + ", ".join(f"{name[:3]} {rate[-1]:.2f}/s" for name, rate in rates.items()), flush=True)
    base = list(rates)[min(1, len(rates) - 1)]
    for name, rate in rates.items():
        ratios = sorted(one / other for one, other in zip(rate, rates[base]))
        print(f"{name:42} {statistics.median(rate):10.1f} examples/s  {statistics.median(ratios):5.2f} x {base[:3]} "
              f"[{ratios[0]:.2f} .. {ratios[-1]:.2f}]  a step takes {peaks[name] / 2**30:6.2f} GiB  loss {losses[name]:.6f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="ViT-B-32:random")
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--micro-batch", type=int, default=36)
    parser.add_argument("--seconds", type=float, default=60, help="in all, at least; every way does one step a repeat")
    parser.add_argument("--ways", default="abcd", help="which of the four to time (default: abcd)")
    parser.add_argument("--captions", default="", help="a caption a line (default: random ones of the web's lengths)")
    parser.add_argument("--profile", action="store_true", help="profile one step of (c) instead")
    bench_step(parser.parse_args())


if __name__ == "__main__":
    main()
