#!/bin/bash
# One would guess: open_clip loads a checkpoint file with strict=True, so a file that was trained with another context length or image
# size than the architecture that is named for it ends with an error of torch's: a size mismatch.
# What happens (open_clip_torch 3.3.0, torch 2.14.1; seen 2026-11-28): nothing is raised and nothing is printed. Before the strict load
# the text's positional embedding is interpolated to the new number of positions, as is the image's grid. For the text this moves every
# position: of one and the same sentence the feature is another one, far from the model's own, although all of its tokens fit both.
# Why it matters: CLIP's with short contexts are common (16 or 32 tokens for speed, 248 for long captions). Whoever names the wrong
# architecture for a file fine-tunes and evaluates a damaged text tower, and only a drop in the figures tells. So paraclip.py loads files
# itself, and resizes nothing.
# Source: open_clip's factory.py, load_checkpoint(): resize_pos_embed and resize_text_pos_embed come before load_state_dict.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
if [ -z "${PYTHON:-}" ]; then
  python3 -m venv "$folder/v"; PYTHON="$folder/v/bin/python"
  "$PYTHON" -m pip install -q --no-cache-dir torch==2.14.1 torchvision==0.29.1 open_clip_torch==3.3.0
fi
cd "$folder" && "$PYTHON" - <<'P'
import copy, json, open_clip, torch
import torch.nn.functional as F
torch.manual_seed(0)
config = open_clip.get_model_config("ViT-B-32")
config["text_cfg"]["layers"] = config["vision_cfg"]["layers"] = 4
config["text_cfg"]["context_length"] = 32
short = open_clip.CLIP(**copy.deepcopy(config)).eval()
torch.nn.init.normal_(short.positional_embedding, std=0.02)  # as large as the tokens' embeddings
torch.save(short.state_dict(), "short.pt")
config["text_cfg"]["context_length"] = 77
json.dump(config, open("long.json", "w"))
open_clip.add_model_config("long.json")
loaded = open_clip.create_model("long", pretrained="short.pt").eval()
sentences = ["a red dog", "two dogs are running in the snow", "a reversible jacket for men"]
with torch.no_grad():
    own = short.encode_text(open_clip.SimpleTokenizer(context_length=32)(sentences))
    other = loaded.encode_text(open_clip.SimpleTokenizer(context_length=77)(sentences))
cosines = F.cosine_similarity(own, other).tolist()
print("open_clip", open_clip.__version__, "torch", torch.__version__, "- no error, no warning")
print("cosine of each sentence's feature to the model's own:", [round(c, 3) for c in cosines])
assert max(cosines) < 0.99, "the behaviour has changed"
P
