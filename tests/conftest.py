"""A tiny CLIP, rows and images in the real formats, for tests that run in seconds without a network."""

import json
import os
import sys

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
WORDS = ["red", "green", "blue", "small", "large", "round", "square", "dog", "cat", "car", "tree", "house", "river", "above", "below", "near", "old", "new"]


def make_clip(folder, model_cfg=TINY, seed=0):
    """Write a random open_clip model as a local-dir and return its --model name."""
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    save_file(open_clip.create_model(f"local-dir:{folder}", pretrained_text=False).state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def make_rows(folder, count, seed=0):
    """Write rows.jsonl and images/*.jpg of `count` examples; texts of 2 to 60 words, so of all lengths a CLIP takes."""
    random = np.random.default_rng(seed)

    def text():
        return " ".join(random.choice(WORDS, random.choice([2, 4, 8, 60], p=[0.3, 0.4, 0.25, 0.05])))

    (folder / "images").mkdir()
    with open(folder / "rows.jsonl", "w") as file:
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / "images" / f"{i:04}.jpg")
            row = {"image_id": f"{i:04}", "caption": text(), "paraphrase_1": text(), "paraphrase_2": text(), "index": i}
            file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with rows.jsonl, images/ and the model in clip/."""
    folder = tmp_path_factory.mktemp("world")
    make_rows(folder, 80)
    make_clip(folder / "clip")
    return folder
