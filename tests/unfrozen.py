"""A fork of paraclip.py: what if the image tower trains too?

    python tests/unfrozen.py --rows rows.jsonl --images images/ --model local-dir:base_clip \\
        --output runs/unfrozen --batch-size 500 --epochs 3 --lr 5e-5 --image-lr 5e-6

The same batches, losses and steps as paraclip.py with the same flags, in one process. Stored
image features are of no use now: each step decodes and encodes its images, without augmentation.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import paraclip
from paraclip import at_least, batches, cosine_lr, loss_terms

IMAGES_AT_ONCE = 100  # whose activations are in memory


class Data(paraclip.Data):
    """Batches of texts and of pixels [n, 3, H, W], where paraclip.py has image features."""

    def __init__(self, model, args):
        super().__init__(model, args)
        self.ids = [row[0] for row in paraclip.read_rows(args.rows)]
        self.model = model
        self.images = args.images

    def batch(self, indices):
        tokens, _ = super().batch(indices)
        pixels = []
        for row in self.usable[indices]:
            image = self.model.preprocess(paraclip.open_image(self.images, self.ids[row]))
            pixels.append(self.model.normalize(image / 255))
        return tokens, torch.stack(pixels)


def encode_images(clip, pixels):
    """[n, 3, H, W] -> [n, D], in chunks that backward encodes again, to bound memory.

    The tower is in eval mode, as load_model() has left it. In train mode BatchNorm would
    normalise an image by the others of its chunk and move its running means, so that neither
    chunks nor the evaluation would give the features that are trained here.
    """
    features = []
    for chunk in pixels.to(clip.logit_scale).split(IMAGES_AT_ONCE):
        features.append(checkpoint(clip.encode_image, chunk, True, use_reentrant=False))
    return torch.cat(features)


def total_loss(encoder, tokens, pixels, loss):
    """L_total of section 2.2, with a gradient for both towers."""
    image_features = encode_images(encoder.clip, pixels)
    return sum(loss_terms(encoder, tokens, image_features, loss).values())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__ + "\nThe other flags are paraclip.py's.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image-lr", type=at_least(0, float), required=True, metavar="RATE",
        help="learning rate of the image tower's first step")
    own, flags = parser.parse_known_args()
    args = paraclip.parse_args(flags)
    device = paraclip.set_up_ranks()
    model = paraclip.load_model(args.model, device)
    data = Data(model, args)
    encoder = paraclip.TextEncoder(model.clip, args.micro_batch, args.precision == "bf16")
    text_optimizer = paraclip.make_optimizer(encoder, args.lr, args.weight_decay)
    visual = model.clip.visual.requires_grad_(True)
    image_optimizer = paraclip.make_optimizer(visual, own.image_lr, args.weight_decay)

    order = list(batches(len(data.usable), args.batch_size, args.epochs, args.seed))
    loader = paraclip.load_in_workers(data.batch, order, args.workers)
    bar = paraclip.progress(loader, "training both towers", data.steps, unit="step")
    for step, (tokens, pixels) in enumerate(bar):
        for optimizer, lr in ((text_optimizer, args.lr), (image_optimizer, own.image_lr)):
            for group in optimizer.param_groups:
                group["lr"] = cosine_lr(lr, step, data.steps)
        loss = total_loss(encoder, tokens, pixels, args.loss)
        loss.backward()
        for optimizer in (text_optimizer, image_optimizer):
            optimizer.step()
            optimizer.zero_grad()
        model.clip.logit_scale.data.clamp_(0, math.log(100))
        bar.set_postfix({"loss": loss.item()}, refresh=False)
    paraclip.export(model, args.output)
    print(f"done: {args.output} is an open_clip model, local-dir:{args.output}")


if __name__ == "__main__":
    paraclip.run(main)
