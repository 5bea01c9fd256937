"""Training speed against open_clip's way, side by side in one run. Prints; asserts nothing.

    python tests/bench_train.py                                        # ViT-B-32 on this CPU
    python tests/bench_train.py --profile                              # where a step's time goes
    python tests/bench_train.py --device cuda --batch-size 512 --micro-batch 256       # on a GPU
    python tests/bench_train.py --device cuda --batch-size 3072 --micro-batch 1024 --ways cd

Four ways to compute one step's loss and gradients, in turn, five times over:
(a) open_clip's: encode_text at 77 tokens for each text, ClipLoss, the image tower in the loop;
(b) the same with stored image features;
(c) paraclip.py's step;
(d) the same with --micro-batch.
The ratios are to the second of --ways.
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

WORDS = [
    "red", "green", "blue", "dog", "cat", "car", "tree", "house", "river", "old", "new", "man",
    "woman", "photo", "street", "black", "white", "small",
]  # fmt: skip


def random_captions(count, random):
    """Captions as long as the web's.

    With CLIP's two end tokens: mean 14.2 tokens, p90 22, p99 36, as CC3M's validation set.
    """
    lengths = np.exp(random.normal(np.log(10.9), 0.48, count)).round().clip(2, 70).astype(int)
    return [" ".join(random.choice(WORDS, length)) for length in lengths]


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
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def text_flops(clip, tokens):
    """Floating-point operations of the text tower's forward over texts [n, 77], without padding."""
    encoder = paraclip.TextEncoder(clip)
    lengths = encoder.lengths(tokens).double()
    layers = len(encoder.tower.transformer.resblocks)
    width = encoder.tower.positional_embedding.shape[-1]
    a_layer = 24 * width**2 * lengths + 4 * width * lengths**2
    return layers * a_layer.sum().item()


def print_profile(step, device):
    """The kinds of operations that take most of one step, and the share of matrix products."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    step().backward()
    with torch.profiler.profile(activities=activities) as profile:
        step().backward()
    times = {}
    for operation in profile.key_averages():
        times[operation.key] = operation.self_cpu_time_total
        if device.type == "cuda":
            times[operation.key] = operation.self_device_time_total
    total = sum(times.values())
    products = 0
    for name, spent in times.items():
        if re.search(r"mm$|gemm|nvjet|attention|flash|fmha", name):
            products += spent
    for name, spent in sorted(times.items(), key=lambda item: -item[1])[:12]:
        print(f"{spent / total:6.1%}  {spent / 1e3:10.1f} ms  {name}")
    print(f"{products / total:6.1%}  {products / 1e3:10.1f} ms  of {total / 1e3:.1f}: "
          "matrix products and attention")


def make_ways(clip, tokens, images, image_features, micro_batch):
    """{name: a function that computes one step's loss, for backward}."""
    clip_loss = open_clip.ClipLoss()
    device = clip.logit_scale.device
    bf16 = device.type == "cuda"

    def naive(encode_image):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            features = {"I": encode_image()}
            for kind, texts in tokens.items():
                features[kind] = clip.encode_text(texts.to(device), normalize=True)
            logit_scale = clip.logit_scale.exp()
            loss = 0
            for term in PARACLIP:
                a, b = term.split(":")
                loss = loss + clip_loss(features[a].to(features["T"]), features[b], logit_scale)
            return loss

    def encode_image():
        with torch.no_grad():
            return clip.encode_image(images, normalize=True)

    def ours(size):
        encoder = paraclip.TextEncoder(clip, size, bf16)
        terms = paraclip.loss_terms(encoder, tokens, image_features, PARACLIP)
        return sum(terms.values())

    return {
        "(a) open_clip, image tower in the loop": lambda: naive(encode_image),
        "(b) open_clip, stored image features": lambda: naive(lambda: image_features),
        "(c) paraclip.py": lambda: ours(0),
        f"(d) paraclip.py --micro-batch {micro_batch}": lambda: ours(micro_batch),
    }


def measure(ways, clip, flags):
    """Run the ways in turn, five times. Prints rates, ratios, memory and losses."""
    device = clip.logit_scale.device
    rates = {name: [] for name in ways}
    peaks = {}
    losses = {}
    for repeat in range(5):  # the medians leave out a first one that is slow
        for name, way in ways.items():
            before = reset_peak(device)
            steps = 0
            started = time.perf_counter()
            while steps == 0 or time.perf_counter() - started < flags.seconds / 20:
                loss = way()
                loss.backward()
                losses[name] = loss.item()  # waits for the GPU
                clip.zero_grad()
                steps += 1
            seconds = time.perf_counter() - started
            rates[name].append(steps * flags.batch_size / seconds)
            peaks[name] = peak_memory(device) - before
        last = [f"{name[:3]} {rate[-1]:.2f}/s" for name, rate in rates.items()]
        print(f"repeat {repeat + 1} of 5: {', '.join(last)}", flush=True)

    base = list(rates)[min(1, len(rates) - 1)]
    for name, rate in rates.items():
        ratios = sorted(one / other for one, other in zip(rate, rates[base]))
        print(f"{name:42} {statistics.median(rate):10.1f} examples/s  "
              f"{statistics.median(ratios):5.2f} x {base[:3]} [{ratios[0]:.2f} .. {ratios[-1]:.2f}]"
              f"  a step takes {peaks[name] / 2**30:6.2f} GiB  loss {losses[name]:.6f}")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--model", default="ViT-B-32:random")
    add("--batch-size", type=int, default=96)
    add("--micro-batch", type=int, default=36)
    add("--seconds", type=float, default=60,
        help="in all, at least; every way does one step a repeat")
    add("--ways", default="abcd", help="which of the four to time (default: abcd)")
    add("--captions", help="a caption a line (default: random ones of the web's lengths)")
    add("--profile", action="store_true", help="profile one step of (c) instead")
    return parser.parse_args()


def main():
    flags = parse_args()
    if flags.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = paraclip.set_up_ranks()
    model = paraclip.load_model(flags.model, device)
    clip = model.clip
    random = np.random.default_rng(0)
    count = flags.batch_size
    captions = random_captions(3 * count, random)
    if flags.captions:
        lines = Path(flags.captions).read_text().splitlines()
        captions = [lines[i] for i in random.permutation(len(lines))[: 3 * count]]

    tokens = {}
    lengths = []
    for i, kind in enumerate(("T", "T1", "T2")):
        tokens[kind] = model.tokenizer(captions[i * count : (i + 1) * count])
        lengths.extend(paraclip.TextEncoder(clip).lengths(tokens[kind]).tolist())
    print(f"{flags.model} on {device}, batch {count}, {torch.get_num_threads()} threads; "
          f"tokens a text: mean {np.mean(lengths):.1f}, p90 {np.percentile(lengths, 90):.0f}, "
          f"p99 {np.percentile(lengths, 99):.0f}, longest {max(lengths)}")

    size = clip.visual.image_size
    if not isinstance(size, tuple):
        size = (size, size)
    images = torch.randn(count, 3, *size, device=device)
    parts = []
    with torch.no_grad():
        for part in images.split(256):
            parts.append(clip.encode_image(part, normalize=True))
    image_features = torch.cat(parts)

    ways = make_ways(clip, tokens, images, image_features, flags.micro_batch)
    if flags.profile:
        print_profile(ways["(c) paraclip.py"], device)
        return
    measure({name: way for name, way in ways.items() if name[1] in flags.ways}, clip, flags)


if __name__ == "__main__":
    paraclip.run(main)
