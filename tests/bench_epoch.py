"""The paper's run as a user starts it: paraclip.py itself on rows and features from disk.

    python tests/bench_epoch.py --rows 5000000 --steps 2   # what it costs to start, and once more
    python tests/bench_epoch.py --rows 500000 --batch-size 3072 --steps 100 --peak-tflops 989
    python tests/bench_epoch.py --ranks 2                  # under torchrun

Rows and image features are synthetic, captions as long as the web's. The run is killed after
--steps, and started again with the tokens that are in its cache by then. The second line gives the
paper's epoch on an H100. Flags that are not this script's go to paraclip.py. Prints; asserts
nothing.
"""

import argparse
import contextlib
import json
import os
import shutil
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
    """Rows, and the cache of their images' features, by paraclip.py as if it encoded images."""
    ids = [f"{i // 10_000:05}/{i:09}" for i in range(count)]
    with open(folder / "rows.jsonl", "w") as file:
        for i, image_id in enumerate(tqdm(ids, "writing", leave=False)):
            row = {"image_id": image_id}
            for k, key in enumerate(paraclip.TEXT_KEYS.values()):
                row[key] = captions[(7 * i + 13 * k) % len(captions)]
            file.write(json.dumps(row) + "\n")
    features = torch.randn(paraclip.BLOCK, model.config["embed_dim"])
    features = torch.nn.functional.normalize(features, dim=-1)
    paraclip.load_pixels = lambda model, open_item, items: len(items)
    paraclip.encode_pixels = lambda model, count: features[:count]
    paraclip.set_up_ranks()
    words = ["--rows", "", "--output", folder, "--images", folder, "--workers", "0"]
    args = paraclip.parse_args(list(map(str, words)))
    paraclip.cache_image_features(ids, model, args)


def follow(process, folder, steps):
    """Print what starting took. Returns when log.jsonl got each of its first `steps` lines."""
    moments = []
    ready = False
    started = time.perf_counter()
    while len(moments) < steps:
        ended = process.poll() is not None
        time.sleep(0.02)
        if not ready and (folder / "run" / "config.json").exists():  # comes before the first step
            ready = True
            seconds = time.perf_counter() - started
            print(f"ready for the first step after {seconds:.1f} s, {largest(folder):.2f} GiB",
                  flush=True)
        log = folder / "run" / "log.jsonl"
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
        moments += [time.perf_counter()] * (lines - len(moments))
        if ended and len(moments) < steps:
            raise paraclip.InputError(f"paraclip.py ended with exit code {process.returncode} "
                                      f"after {len(moments)} steps")
    return moments


def processes(folder):
    """The pids of those whose command line names the folder: torchrun, ranks, their loaders."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.fsencode(folder) in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def largest(folder):
    """GiB at the peak of the largest of processes()."""
    peaks = [peak_memory(torch.device("cpu"), pid) for pid in processes(folder)]
    return max(peaks) / 2**30


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int, default=10_000)
    add("--steps", type=int, default=20)
    add("--batch-size", type=int, default=96)
    add("--ranks", type=int, default=1, help="processes of torchrun (default: 1, without it)")
    add("--model", default="ViT-B-32:random")
    add("--peak-tflops", type=float,
        help="of one device in dense bf16: says how much of it is used (default: no)")
    return parser.parse_known_args()


def main():
    flags, flags_of_paraclip = parse_args()
    captions = random_captions(10_000, np.random.default_rng(0))
    model = paraclip.load_model(flags.model)
    started = time.perf_counter()
    tokens = model.tokenizer(captions)
    rate = len(captions) / (time.perf_counter() - started)
    print(f"tokenizer: {rate:,.0f} captions/s a worker")
    # An example is three texts, and backward costs twice a forward.
    flops = 9 * text_flops(model.clip, tokens) / len(captions)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_job(folder, flags.rows, captions, model)
        command = [sys.executable]
        if flags.ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={flags.ranks}"]
        command += [
            ROOT / "paraclip.py",
            "--rows", folder / "rows.jsonl",
            "--images", folder,
            "--cache", folder / "cache",
            "--model", flags.model,
            "--output", folder / "run",
            "--batch-size", flags.batch_size,
            "--save-every", 1_000_000,
            *flags_of_paraclip,
        ]  # fmt: skip
        for start in ("first", "second"):
            print(f"the {start} start")
            process = subprocess.Popen(list(map(str, command)))
            try:
                moments = follow(process, folder, flags.steps)
                print(f"{flags.rows:,} rows: after {flags.steps} steps the largest process has "
                      f"{largest(folder):.2f} GiB")
            finally:
                for pid in processes(folder):
                    os.kill(pid, signal.SIGKILL)
                process.wait()
            shutil.rmtree(folder / "run")

    warm = moments[len(moments) // 10]
    steps = sum(moment > warm for moment in moments)  # paraclip.py writes ten lines at a time
    if steps:
        rate = steps * flags.batch_size / (moments[-1] - warm)
        tflops = rate * flops / flags.ranks / 1e12
        print(f"the last {steps} steps: {rate:,.1f} examples/s in all, "
              f"{rate / flags.ranks:,.1f} a rank; {PAPER_ROWS:,} examples in "
              f"{PAPER_ROWS / rate / 60:,.1f} min; {tflops:.2f} TFLOP/s a rank")
        if flags.peak_tflops:
            print(f"{tflops / flags.peak_tflops:.1%} of the peak")


if __name__ == "__main__":
    paraclip.run(main)
