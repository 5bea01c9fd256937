"""How far the ten best images depend on the preprocessing, and on an approximate index.

    python tests/preprocessing.py DATA --model openai [--count 500] [--size 224]

DATA is as evaluate.py's --data, with pairs that name their images. The photos are encoded as
open_clip does it (Pillow, bicubic), then in other ways, with the same model. Of each way it prints
AO@10 of a query's ten best images with those of open_clip's way, the mean over all queries and
paraphrases, and by how much R@5 moves. Photos that are no larger than the model's input are not
resized by any way: then give a smaller --size, which convolutional towers take.
Wants opencv-python-headless, and hnswlib for the last two lines.
"""

import argparse
import functools
import sys
from importlib import metadata
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import Compose, PILToTensor, functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import paraclip
from paraclip import InputError


def cut_middle(pixels, size):
    """The middle [3, size, size] of an image [3, H, W]."""
    return functional.center_crop(pixels, [size, size])


def opencv(cv2, filter_name, size, image):
    """As many data loaders do it: OpenCV's resize, which does not blur before it takes pixels."""
    array = np.asarray(image.convert("RGB"))
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    array = cv2.resize(array, (width, height), interpolation=getattr(cv2, filter_name))
    return cut_middle(torch.from_numpy(array).permute(2, 0, 1), size)


def draft(preprocess, size, image):
    """A JPEG decoded to a fraction of its size, then as open_clip does it."""
    image.draft("RGB", (size, size))
    return preprocess(image)


def tensor_resize(size, image):
    """torchvision's resize of a tensor, with antialiasing."""
    pixels = functional.pil_to_tensor(image.convert("RGB"))
    bicubic = functional.InterpolationMode.BICUBIC
    return cut_middle(functional.resize(pixels, size, bicubic, antialias=True), size)


def encode(model, paths, preprocess, bf16=False):
    """Features [n, D] of the images; preprocess: PIL image -> uint8 [3, H, W]."""
    features = []
    for start in range(0, len(paths), 64):
        block = paths[start : start + 64]
        pixels = torch.stack([preprocess(Image.open(path)) for path in block])
        with torch.autocast(evaluate.DEVICE, torch.bfloat16, enabled=bf16):
            loaded = pixels, torch.ones(len(block), dtype=torch.bool)
            features.append(paraclip.encode_pixels(model, loaded))
    return torch.cat(features).to(evaluate.DEVICE)


def approximate(hnswlib, queries, gallery):
    """The ten images that hnswlib finds with its defaults for each query."""
    index = hnswlib.Index(space="ip", dim=gallery.shape[1])
    index.init_index(max_elements=len(gallery))
    index.add_items(gallery.numpy(), num_threads=1)
    return index.knn_query(queries.numpy(), k=10, num_threads=1)[0].tolist()


def optional(name, package):
    """An optional module. Raises InputError."""
    try:
        return __import__(name)
    except ImportError:
        raise InputError(f"{package} is not installed: pip install {package}") from None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", type=Path)
    add("--model", default="openai", help="as paraclip.py's (default: %(default)s)")
    add("--count", type=int, default=500, help="photos (default: %(default)s)")
    add("--size", type=int, help="the model's input in pixels (default: its own)")
    flags = parser.parse_args()
    cv2 = optional("cv2", "opencv-python-headless")
    hnswlib = optional("hnswlib", "hnswlib")

    model = paraclip.load_model(flags.model, evaluate.DEVICE)
    config = PreprocessCfg(**model.clip.visual.preprocess_cfg)
    config.size = size = flags.size or min(np.atleast_1d(config.size))
    steps = image_transform_v2(config, is_train=False).transforms
    pillow = Compose([*steps[:-2], PILToTensor()])  # uint8; encode_pixels() normalises

    gallery, (queries, paraphrases), golds = evaluate.read_paraphrases(flags.data)
    paths = gallery[: flags.count]
    small = sum(min(Image.open(path).size) <= size for path in paths)
    if small:
        print(f"{small:,} of {len(paths):,} photos are no larger than {size} pixels")
    asked = [i for i, gold in enumerate(golds) if gold in set(paths)]
    texts = [queries[i] for i in asked] + [paraphrases[i] for i in asked]
    labels = 2 * [golds[i] for i in asked]
    words = [flags.model, "--data", str(flags.data)]
    encoders = evaluate.Encoders(model, {}, evaluate.parse_args(words))
    text_features = encoders.texts(texts)

    stored = encode(model, paths, pillow)
    exact = evaluate.rank_gallery(text_features, evaluate.fixed_point(stored))
    base = evaluate.recall(exact, paths, labels, 5)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in (
        "torch", "torchvision", "pillow", "opencv-python-headless", "hnswlib"))
    print(f"{flags.model} at {size} pixels, {len(paths):,} photos, {len(texts):,} queries; "
          f"{versions}; {torch.get_num_threads()} threads\n")
    print("| images | AO@10 with open_clip's own | R@5 |\n|---|---|---|")
    print(f"| Pillow, bicubic (open_clip's own) | 100 | {base:.1f} |")
    ways = {
        "OpenCV, INTER_CUBIC": functools.partial(opencv, cv2, "INTER_CUBIC", size),
        "OpenCV, INTER_AREA": functools.partial(opencv, cv2, "INTER_AREA", size),
        "Pillow, draft before bicubic": functools.partial(draft, pillow, size),
        "torchvision, tensor, antialias": functools.partial(tensor_resize, size),
        "image tower in bf16": None,
        "features stored as fp16": None,
    }
    for name, preprocess in ways.items():
        if name.startswith("features"):
            features = stored.half().float()
        else:
            features = encode(model, paths, preprocess or pillow, bf16=preprocess is None)
        found = evaluate.rank_gallery(text_features, evaluate.fixed_point(features))
        agreement = 100 * fmean(map(evaluate.average_overlap, exact, found))
        recall = evaluate.recall(found, paths, labels, 5)
        print(f"| {name} | {agreement:.2f} | {recall:.1f} ({recall - base:+.1f}) |", flush=True)

    features = evaluate.fixed_point(stored).cpu()
    for name, asking in (("text", text_features.cpu()), ("image", features)):
        found = approximate(hnswlib, asking, features)
        kept = map(len, map(set.intersection, map(set, found), map(
            set, evaluate.rank_gallery(asking, features))))
        print(f"hnswlib's defaults lose {100 - 10 * fmean(kept):.2f}% of the exact ten for "
              f"{len(asking):,} {name} queries")


if __name__ == "__main__":
    paraclip.run(main)
