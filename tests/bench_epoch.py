"""The paper's run as a user starts it: paraclip.py itself on rows and image features from disk. Prints; asserts nothing.

    python tests/bench_epoch.py --rows 5000000 --steps 2   # what starting the paper's run, or going on with it, costs
    python tests/bench_epoch.py --rows 5000000 --batch-size 3072 --steps 200 --peak-tflops 989  # the paper's epoch on an H100
    python tests/bench_epoch.py --ranks 2                  # under torchrun

Rows and features are synthetic, captions as long as the web's. The run is killed after --steps. Flags that are not this
script's go to paraclip.py.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_train import peak_memory, random_captions, text_flops
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import paraclip

PAPER_ROWS = 5_000_000


def write_job(folder, count, captions, model):
    """Rows, and the cache of their images' features, written by paraclip.py as if it had encoded images."""
    ids = [f"{i // 10_000:05}/{i:09}" for i in range(count)]
    with open(folder / "rows.jsonl", "w") as rows:
        for i, image_id in enumerate(tqdm(ids, "writing", leave=False)):
            texts = {key: captions[(7 * i + 13 * k) % len(captions)] for k, key in enumerate(paraclip.TEXT_KEYS.values())}
            rows.write(json.dumps({"image_id": image_id, **texts}) + "\n")
    features = torch.randn(paraclip.SLICE, model.clip.text_projection.shape[-1])
    features = torch.nn.functional.normalize(features, dim=-1)

    def encode_images(model, items, *_):
        for i in range(len(items)):
            yield features[i % paraclip.SLICE], ""

    paraclip.encode_images = encode_images
    paraclip.set_up_ranks()
    flags = ["--rows", "", "--output", "", "--images", str(folder), "--features", str(folder / "features")]
    paraclip.cache_image_features(model, ids, paraclip.parse_args(flags))


def follow(process, folder, steps):
    """Print what starting took. Returns the moments at which log.jsonl got each of its first `steps` lines."""
    moments, started = [], time.perf_counter()
    while len(moments) < steps:
        if process.poll() is not None:
            sys.exit(f"paraclip.py ended with exit code {process.returncode} after {len(moments)} steps")
        time.sleep(0.02)
        if started and (folder / "run" / "config.json").exists():  # written just before the first step
            print(f"ready for the first step after {time.perf_counter() - started:.1f} s, {largest(folder):.2f} GiB", flush=True)
            started = 0
        log = folder / "run" / "log.jsonl"
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
        moments += [time.perf_counter()] * (lines - len(moments))
    return moments


def processes(folder):
    """The pids of those whose command line names the folder: torchrun, its ranks, their loaders."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found += [int(path.parent.name)] * (os.fsencode(folder) in path.read_bytes())
    return found


def largest(folder):
    """GiB at the peak of the largest of processes()."""
    return max(peak_memory(torch.device("cpu"), pid) for pid in processes(folder)) / 2**30


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--ranks", type=int, default=1, help="processes of torchrun (default: 1, without it)")
    parser.add_argument("--model", default="ViT-B-32:random")
    parser.add_argument("--peak-tflops", type=float, help="of one device in dense bf16: says how much of it is used (default: no)")
    flags, more = parser.parse_known_args()
    captions = random_captions(10_000, np.random.default_rng(0))
    model = paraclip.load_model(flags.model)
    started = time.perf_counter()
    tokens = model.tokenizer(captions)
    print(f"tokenizer: {len(captions) / (time.perf_counter() - started):,.0f} captions/s a worker")
    flops = 9 * text_flops(model.clip, tokens) / len(captions)  # of an example: three texts, backward twice a forward
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_job(folder, flags.rows, captions, model)
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={flags.ranks}"] if flags.ranks > 1 else []
        command += [ROOT / "paraclip.py", "--rows", folder / "rows.jsonl", "--images", folder, "--model", flags.model]
        command += ["--features", folder / "features", "--output", folder / "run", "--batch-size", str(flags.batch_size), "--save-every", "1000000", *more]
        process = subprocess.Popen([sys.executable, *command])
        try:
            moments = follow(process, folder, flags.steps)
            print(f"{flags.rows:,} rows: after {flags.steps} steps the largest process has {largest(folder):.2f} GiB")
        finally:
            for pid in processes(folder):
                os.kill(pid, signal.SIGKILL)
            process.wait()
    warm = len(moments) // 10
    if len(moments) > warm + 1:
        rate = (len(moments) - 1 - warm) * flags.batch_size / (moments[-1] - moments[warm])
        print(f"steps {warm + 1} to {len(moments) - 1}: {rate:,.1f} examples/s in all, {rate / flags.ranks:,.1f} a rank; "
              f"{PAPER_ROWS:,} examples in {PAPER_ROWS / rate / 60:,.1f} min; {rate * flops / flags.ranks / 1e12:.2f} TFLOP/s a rank"
              + (f", {rate * flops / flags.ranks / 1e12 / flags.peak_tflops:.1%} of the peak" if flags.peak_tflops else ""))


if __name__ == "__main__":
    main()
