#!/bin/bash
# One would guess: after model.lock_image_tower(), which is what open_clip_train's --lock-image ("lock full image tower") calls, no
# parameter of the image tower trains, so features of images that were stored before fine-tuning stay valid.
# What happens (open_clip_torch 3.3.0, timm 1.0.31, torch 2.14.1; seen 2026-11-28): that holds for open_clip's own ViTs and ResNets. For a
# tower from timm only the trunk is locked; the projection behind it goes on training in every published CLIP that has one: ConvNeXt,
# ViTamin, Swin. Nothing is printed. A few steps that mean to train the text tower alone turn the image features.
# Why it matters: whoever tunes the text tower of a ConvNeXt CLIP with the image tower "locked", and keeps an index of image features,
# searches with texts of the new model among images of the old one. So paraclip.py does not call it: it freezes all of model.visual.
# Source: open_clip's timm_model.py, TimmModel.lock(): only self.trunk's parameters; self.head holds the projection.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
if [ -z "${PYTHON:-}" ]; then
  python3 -m venv "$folder/v"; PYTHON="$folder/v/bin/python"
  "$PYTHON" -m pip install -q --no-cache-dir torch==2.14.1 torchvision==0.29.1 open_clip_torch==3.3.0 timm==1.0.31
fi
cd "$folder" && "$PYTHON" - 2>/dev/null <<'P'
import open_clip, timm, torch
import torch.nn.functional as F
print("open_clip", open_clip.__version__, "timm", timm.__version__, "torch", torch.__version__)
torch.manual_seed(0)
trains = {}
turned = {}
for name in ("ViT-B-32", "RN50", "convnext_tiny", "ViTamin-S"):
    clip = open_clip.create_model(name).eval()  # random weights: no download; eval: no dropout, no running statistics
    clip.lock_image_tower()
    trains[name] = [key for key, p in clip.visual.named_parameters() if p.requires_grad]
    images = torch.randn(4, 3, 224, 224)
    texts = open_clip.get_tokenizer(name)(["a red dog", "two cats", "a jacket for men", "the sea"])
    optimizer = torch.optim.AdamW([p for p in clip.parameters() if p.requires_grad], lr=5e-4)  # open_clip_train's own
    with torch.no_grad():
        before = clip.encode_image(images)
    for _ in range(5):
        image_features, text_features, scale = clip(images, texts)
        loss = open_clip.ClipLoss()(image_features, text_features, scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        turned[name] = F.cosine_similarity(before, clip.encode_image(images)).min().item()
    print(f"{name}: of the locked image tower {trains[name] or 'nothing'} trains; "
          f"cosine of its features before and after 5 steps: {turned[name]:.3f}")
assert not trains["ViT-B-32"] and not trains["RN50"], "the behaviour has changed"
assert turned["ViT-B-32"] > 0.9999 and turned["RN50"] > 0.9999, "the behaviour has changed"
assert trains["convnext_tiny"] == trains["ViTamin-S"] == ["head.proj.weight"], "the behaviour has changed"
assert max(turned["convnext_tiny"], turned["ViTamin-S"]) < 0.99, "the behaviour has changed"
P
