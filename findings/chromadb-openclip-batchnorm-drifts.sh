#!/bin/bash
# One would guess: chromadb's OpenCLIPEmbeddingFunction, which embeds one image at a time under torch.no_grad(), gives the same vector for
# the same image whenever it is asked, and the one that open_clip gives.
# What happens (chromadb 1.5.9, open_clip_torch 3.3.0, torch 2.14.1; seen 2026-11-28): it leaves the model in training mode, as open_clip
# creates it. In a tower with BatchNorm (CLIP's own RN50 family, timm's EfficientNets and others) each image is then normalised by its own
# pixels alone, so vectors are far from open_clip's; and each image that is embedded moves the running statistics, no_grad or not: an
# .eval() that comes after the first images no longer gives the right vectors either. ViTs, the default among them, show nothing.
# Why it matters: a fine-tuned text tower is put before an index of image features. If those were made this way the figures of the
# fine-tuning can't be seen in the search, and nothing says why. Call function._model.eval() before the first image.
# lancedb 0.40.0's "open-clip" function does the same (seen beside this).
# Source: chromadb's open_clip_embedding_function.py: create_model_and_transforms() without eval().
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
if [ -z "${PYTHON:-}" ]; then
  python3 -m venv "$folder/v"; PYTHON="$folder/v/bin/python"
  "$PYTHON" -m pip install -q --no-cache-dir torch==2.14.1 torchvision==0.29.1 open_clip_torch==3.3.0 chromadb==1.5.9
fi
cd "$folder" && "$PYTHON" -W ignore - 2>/dev/null <<'P'
import chromadb, numpy as np, open_clip, torch
from chromadb.utils.embedding_functions import OpenCLIPEmbeddingFunction
from PIL import Image
torch.manual_seed(0)
clip, _, preprocess = open_clip.create_model_and_transforms("RN50")  # random weights: no download
random = np.random.default_rng(0)
images = [np.kron(random.integers(0, 256, (8, 8, 3), np.uint8), np.ones((28, 28, 1), np.uint8)) for _ in range(64)]
with torch.no_grad():
    pixels = torch.stack([preprocess(Image.fromarray(image)) for image in images])
    for _ in range(2):  # as training does: running statistics that fit the images
        for batch in pixels.split(8):
            clip.encode_image(batch)
    torch.save(clip.state_dict(), "rn50.pt")
    images, pixels = images[:4], pixels[:4]
    clip.eval()
    expected = clip.encode_image(pixels, normalize=True).numpy()


def cosine(vectors):
    vectors = np.asarray(vectors)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * expected).sum(1).round(3)


plain = OpenCLIPEmbeddingFunction(model_name="RN50", checkpoint="rn50.pt")
as_it_is = cosine(plain(images))
plain._model.eval()
too_late = cosine(plain(images))
mended = OpenCLIPEmbeddingFunction(model_name="RN50", checkpoint="rn50.pt")
mended._model.eval()
right = cosine(mended(images))
print("chromadb", chromadb.__version__, "open_clip", open_clip.__version__, "torch", torch.__version__)
print("cosines to open_clip's vectors, as it is:", as_it_is)
print("after .eval(), called after these four images:", too_late)
print("after .eval(), called before the first one:", right)
assert right.min() > 0.999 and as_it_is.max() < 0.99, "the behaviour has changed"
P
