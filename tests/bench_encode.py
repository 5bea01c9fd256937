"""Features a second of evaluate.py and of paraclip.py's cache against open_clip's own path, side by side in one run.

    python tests/bench_encode.py                                     # ViT-B-32 on this CPU
    python tests/bench_encode.py --device cuda --count 20000         # on a GPU
    python tests/bench_encode.py --images FOLDER --captions FILE     # real ones

open_clip's path: preprocessed images through a DataLoader, encode_image; the texts through its tokenizer and encode_text,
77 tokens each; in batches of --batch-size. Prints rates, their ratios, and how far the features are apart; asserts nothing.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_train import random_captions
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import paraclip


def draw_images(folder, count, rng):
    """JPEGs of 640 x 480 pixels, as most of COCO's."""
    for i in range(count):
        blobs = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
        blobs.save(folder / f"{i:06}.jpg", quality=90)


def plain_images(clip, preprocess, paths, flags, device):
    """open_clip's way."""
    def load(batch):
        return torch.stack([preprocess(Image.open(path)) for path in batch])

    with torch.no_grad():
        return torch.cat([clip.encode_image(batch.to(device), normalize=True).float().cpu()
                          for batch in DataLoader(paths, flags.batch_size, collate_fn=load, num_workers=flags.workers)])


def plain_texts(clip, tokenizer, captions, flags, device):
    """open_clip's way."""
    parts = [captions[i : i + flags.batch_size] for i in range(0, len(captions), flags.batch_size)]
    with torch.no_grad():
        return torch.cat([clip.encode_text(tokenizer(part).to(device), normalize=True).float().cpu() for part in parts])


def cached(clip, preprocess, paths, flags):
    """paraclip.py's feature cache, empty at first, written and read."""
    with tempfile.TemporaryDirectory() as output:
        args = paraclip.parse_args(["--rows", "", "--output", output, "--images", str(paths[0].parent), "--workers", str(flags.workers)])
        return torch.cat(paraclip.cache_image_features(clip, preprocess, [path.name for path in paths], args)[0]).float()


def tower_alone(clip, count, flags, device):
    size = clip.visual.image_size
    images = torch.randn(flags.batch_size, 3, *(size if isinstance(size, tuple) else (size, size)), device=device)
    with torch.no_grad():
        for done in range(0, count, flags.batch_size):
            features = clip.encode_image(images[: count - done], normalize=True).cpu()  # waits for the GPU
    return features


def compare(unit, count, ways):
    """Run the ways in turn, five times over; a line each. The first is what the others are held against."""
    rates, features = {}, {}
    for _ in range(5):
        for name, way in ways.items():
            started = time.perf_counter()
            features[name] = way()
            rates.setdefault(name, []).append(count / (time.perf_counter() - started))
    (base, naive), *_ = features.items()
    for name, rate in rates.items():
        ratios = sorted(one / other for one, other in zip(rate, rates[base]))
        apart = f"apart by {(features[name] - naive).abs().max():.1e}" if features[name].shape == naive.shape else ""
        print(f"{name:34} {statistics.median(rate):9.1f} {unit}/s  {statistics.median(ratios):5.2f} x "
              f"[{ratios[0]:.2f} .. {ratios[-1]:.2f}]  {apart}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="ViT-B-32:random")
    parser.add_argument("--count", type=int, default=256, help="images, and captions, a repeat (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="of open_clip's path")
    parser.add_argument("--workers", type=int, default=min(paraclip.CORES, 16))
    parser.add_argument("--images", default="", help="a folder of .jpg (default: drawn ones of COCO's size)")
    parser.add_argument("--captions", default="", help="a caption a line (default: random ones of the web's lengths)")
    flags = parser.parse_args()
    if flags.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device, rng = paraclip.set_up_ranks(), np.random.default_rng(0)
    clip, preprocess, tokenizer = paraclip.load_model(flags.model, device)
    captions = Path(flags.captions).read_text().splitlines() if flags.captions else random_captions(flags.count, rng)
    captions = list(dict.fromkeys(captions))[: flags.count]
    print(f"{flags.model} on {device}, {flags.workers} workers, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(flags.images or folder)
        if not flags.images:
            draw_images(folder, flags.count, rng)
        paths = sorted(folder.glob("*.jpg"))[: flags.count]

        def encoders():
            args = evaluate.parse_args([flags.model, "--data", str(folder), "--workers", str(flags.workers)])
            return evaluate.encoders(clip, preprocess, tokenizer, {}, args)

        compare("texts", len(captions), {
            "open_clip, texts": lambda: plain_texts(clip, tokenizer, captions, flags, device),
            "evaluate.py, texts": lambda: encoders()[0](captions).float().cpu()})
        compare("images", len(paths), {
            "open_clip, images": lambda: plain_images(clip, preprocess, paths, flags, device),
            "the tower alone": lambda: tower_alone(clip, len(paths), flags, device),
            "paraclip.py, feature cache": lambda: cached(clip, preprocess, paths, flags),
            "evaluate.py, images": lambda: encoders()[1]([(str(path), None) for path in paths]).float().cpu()})


if __name__ == "__main__":
    main()
