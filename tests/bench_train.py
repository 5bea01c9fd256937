"""Training speed against open_clip's way, side by side in one run: the same rows, model, machine. Prints; asserts nothing.

    python tests/bench_train.py --batch-size 96 --seconds 60                          # ViT-B-32 on this CPU
    python tests/bench_train.py --device cuda --batch-size 3072 --micro-batch 1024     # on a GPU
    python tests/bench_train.py --startup-rows 5000000                                 # what resuming the paper's run costs

Four ways, in turn, five times over: (a) open_clip's: encode_text at 77 tokens for each text, ClipLoss, the image tower in
the loop; (b) the same with stored image features; (c) paraclip.py's step; (d) the same with --micro-batch.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import paraclip
from generate import read_rows

PAIRS = [("I", "T2"), ("T", "T1"), ("T1", "T2")]


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


def peak_memory(device):
    """Bytes at the peak since reset_peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def ways(clip, tokens, images, image_features, micro_batch):
    """{name: a function that does one step's loss and gradients and returns the loss}."""
    clip_loss = open_clip.ClipLoss()
    device = clip.logit_scale.device

    def naive(encode_image):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = {kind: clip.encode_text(t.to(device), normalize=True) for kind, t in tokens.items()}
            features["I"] = encode_image()
            scale = clip.logit_scale.exp()
            return sum(clip_loss(features[a].to(features["T"]), features[b], scale) for a, b in PAIRS)

    def ours(size):
        encoder = paraclip.TextEncoder(clip, size, bf16=device.type == "cuda")
        return lambda: sum(paraclip.loss_terms(encoder, tokens, image_features, PAIRS).values())

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
    clip, _, tokenizer = paraclip.load_model(flags.model, device)
    rng, n = np.random.default_rng(0), flags.batch_size
    captions = random_captions(3 * n, rng)
    if flags.captions:
        captions = Path(flags.captions).read_text().splitlines()
        captions = [captions[i] for i in rng.permutation(len(captions))[: 3 * n]]
    tokens = {kind: tokenizer(captions[i * n : (i + 1) * n]) for i, kind in enumerate(("T", "T1", "T2"))}
    lengths = np.concatenate([paraclip.TextEncoder(clip).lengths(t).numpy() for t in tokens.values()])
    print(f"{flags.model} on {device}, batch {n}, {torch.get_num_threads()} threads; tokens a text: mean {lengths.mean():.1f}, "
          f"p90 {np.percentile(lengths, 90):.0f}, p99 {np.percentile(lengths, 99):.0f}, longest {lengths.max()}")
    size = clip.visual.image_size if isinstance(clip.visual.image_size, tuple) else (clip.visual.image_size,) * 2
    images = torch.randn(n, 3, *size, device=device)
    with torch.no_grad():
        image_features = torch.cat([clip.encode_image(part, normalize=True) for part in images.split(256)])

    steps, rates, peaks, losses = ways(clip, tokens, images, image_features, flags.micro_batch), {}, {}, {}
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


def bench_startup(count):
    """Rows and a feature cache on disk, then what a rank does before its first step."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        captions, names = random_captions(10_000, rng), [f"{i // 10_000:05}/{i:09}" for i in range(count)]
        with open(f"{folder}/rows.jsonl", "w") as file:
            for i, name in enumerate(names):
                texts = {key: captions[(i * 7 + k * 13) % 10_000] for k, key in enumerate(("caption", "paraphrase_1", "paraphrase_2"))}
                file.write(json.dumps({"image_id": name, **texts}) + "\n")
        os.mkdir(f"{folder}/features")
        for start in range(0, count, paraclip.SHARD):
            part = names[start : start + paraclip.SHARD]
            save_file({"features": torch.zeros(len(part), 8, dtype=torch.half)}, f"{folder}/features/{start:09}.safetensors",
                      {"fingerprint": "x", "images": "", "image_ids": json.dumps(part)})
        del names, captions
        started = time.perf_counter()
        examples = paraclip.Examples(read_rows(f"{folder}/rows.jsonl"), ["T", "T1", "T2"], open_clip.get_tokenizer("ViT-B-32"))
        print(f"{count:,} rows: read and checked in {time.perf_counter() - started:.1f} s", end="")
        started = time.perf_counter()
        examples.use_features(*paraclip.read_cache(sorted(map(str, Path(folder, "features").iterdir())), "x"))
        print(f", features found in {time.perf_counter() - started:.1f} s", end="")
        started = time.perf_counter()
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).numpy()
        print(f", shuffled in {time.perf_counter() - started:.1f} s; peak {peak_memory(torch.device('cpu')) / 2**30:.2f} GiB")
        started = time.perf_counter()
        examples[order[:3072]]
        print(f"a batch of 3,072 tokenised and its features gathered in {time.perf_counter() - started:.2f} s by one worker")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="ViT-B-32:random")
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--micro-batch", type=int, default=36)
    parser.add_argument("--seconds", type=float, default=60, help="in all, at least; every way does one step a repeat")
    parser.add_argument("--ways", default="abcd", help="which of the four to time (default: abcd)")
    parser.add_argument("--captions", default="", help="a caption a line (default: random ones of the web's lengths)")
    parser.add_argument("--startup-rows", type=int, default=0, help="measure this instead, on so many synthetic rows")
    flags = parser.parse_args()
    if flags.startup_rows:
        bench_startup(flags.startup_rows)
    else:
        bench_step(flags)


if __name__ == "__main__":
    main()
