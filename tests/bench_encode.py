"""Features a second of evaluate.py and of paraclip.py's cache, against open_clip's own path.

    python tests/bench_encode.py                                     # ViT-B-32 on this CPU
    python tests/bench_encode.py --device cuda --count 8000          # on a GPU
    python tests/bench_encode.py --images FOLDER --captions FILE     # real ones

open_clip's path: preprocessed images through a DataLoader, encode_image; the texts through its
tokenizer and encode_text, 77 tokens each; in batches of --batch-size. All run in turn in one
process. Prints rates, their ratios, and how far the features are apart; asserts nothing.
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
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import paraclip


def draw_images(folder, count, random):
    """JPEGs of 640 x 480 pixels, as most of COCO's."""
    for i in range(count):
        pixels = random.integers(0, 256, (60, 80, 3), np.uint8)
        image = Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:06}.jpg", quality=90)


@torch.no_grad()
def plain_images(model, paths, flags, device):
    """open_clip's way."""
    preprocess_cfg = PreprocessCfg(**model.clip.visual.preprocess_cfg)
    preprocess = image_transform_v2(preprocess_cfg, is_train=False)

    def load(batch):
        return torch.stack([preprocess(Image.open(path)) for path in batch])

    loader = DataLoader(paths, flags.batch_size, collate_fn=load, num_workers=flags.workers)
    features = []
    for batch in loader:
        features.append(model.clip.encode_image(batch.to(device), normalize=True).float().cpu())
    return torch.cat(features)


@torch.no_grad()
def plain_texts(model, captions, flags, device):
    """open_clip's way."""
    features = []
    for start in range(0, len(captions), flags.batch_size):
        tokens = model.tokenizer(captions[start : start + flags.batch_size]).to(device)
        features.append(model.clip.encode_text(tokens, normalize=True).float().cpu())
    return torch.cat(features)


def cached(model, paths, flags):
    """paraclip.py's cache of image features, empty at first, written and read."""
    with tempfile.TemporaryDirectory() as output:
        words = ["--rows", "", "--output", output, "--images", str(paths[0].parent)]
        args = paraclip.parse_args([*words, "--workers", str(flags.workers)])
        features = paraclip.cache_image_features([path.name for path in paths], model, args)
        return torch.from_numpy(features.astype(np.float32))


@torch.no_grad()
def tower_alone(model, count, flags, device):
    size = model.clip.visual.image_size
    if not isinstance(size, tuple):
        size = (size, size)
    images = torch.randn(flags.batch_size, 3, *size, device=device)
    for done in range(0, count, flags.batch_size):
        features = model.clip.encode_image(images[: count - done], normalize=True)
        features = features.cpu()  # waits for the GPU
    return features


def compare(unit, count, ways):
    """Run the ways in turn, five times; a line each. The others are held against the first."""
    rates = {name: [] for name in ways}
    features = {}
    for _ in range(5):
        for name, way in ways.items():
            started = time.perf_counter()
            features[name] = way()
            rates[name].append(count / (time.perf_counter() - started))
    base = next(iter(ways))
    for name, rate in rates.items():
        ratios = sorted(one / other for one, other in zip(rate, rates[base]))
        apart = ""
        if features[name].shape == features[base].shape:
            apart = f"apart by {(features[name] - features[base]).abs().max():.1e}"
        print(f"{name:34} {statistics.median(rate):9.1f} {unit}/s  "
              f"{statistics.median(ratios):5.2f} x [{ratios[0]:.2f} .. {ratios[-1]:.2f}]  {apart}",
              flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--model", default="ViT-B-32:random")
    add("--count", type=int, default=256, help="images, and captions, a repeat (default: 256)")
    add("--batch-size", type=int, default=64, help="of open_clip's path")
    add("--workers", type=int, default=min(paraclip.cores(), 16))
    add("--images", default="", help="a folder of .jpg (default: drawn ones of COCO's size)")
    add("--captions", default="", help="a caption a line (default: random, of the web's lengths)")
    flags = parser.parse_args()
    if flags.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    device = paraclip.set_up_ranks()
    random = np.random.default_rng(0)
    model = paraclip.load_model(flags.model, device)
    if flags.captions:
        captions = Path(flags.captions).read_text().splitlines()
    else:
        captions = random_captions(flags.count, random)
    captions = list(dict.fromkeys(captions))[: flags.count]
    threads = torch.get_num_threads()
    print(f"{flags.model} on {device}, {flags.workers} workers, {threads} threads")

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(flags.images or folder)
        if not flags.images:
            draw_images(folder, flags.count, random)
        paths = sorted(folder.glob("*.jpg"))[: flags.count]
        words = [flags.model, "--data", str(folder), "--workers", str(flags.workers)]
        args = evaluate.parse_args(words)

        def evaluate_texts():
            return evaluate.Encoders(model, {}, args).texts(captions).float().cpu()

        def evaluate_images():
            return evaluate.Encoders(model, {}, args).images(paths).float().cpu()

        compare("texts", len(captions), {
            "open_clip, texts": lambda: plain_texts(model, captions, flags, device),
            "evaluate.py, texts": evaluate_texts,
        })
        compare("images", len(paths), {
            "open_clip, images": lambda: plain_images(model, paths, flags, device),
            "the tower alone": lambda: tower_alone(model, len(paths), flags, device),
            "paraclip.py, feature cache": lambda: cached(model, paths, flags),
            "evaluate.py, images": evaluate_images,
        })


if __name__ == "__main__":
    paraclip.run(main)
