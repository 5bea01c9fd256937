"""ParaCLIP, sections 2.2 and 3: fine-tune CLIP's text encoder, with its image encoder frozen.

    L_total = L1(X_I, X_T'') + L2(X_T, X_T') + L3(X_T', X_T'')        each an InfoNCE loss

On one CPU or GPU:
    python paraclip.py --rows rows.jsonl --images images/ --output runs/mine --batch-size 256
The paper's run, 5M rows on 8 GPUs:
    torchrun --standalone --nproc_per_node 8 paraclip.py --rows 'rows/*.jsonl' --images laion/ \\
        --model openai --output runs/openai --cache laion-cache
The same command resumes a stopped run. Its --output is an open_clip model: local-dir:runs/openai
"""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import glob
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import sys
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, PILToTensor
from tqdm import tqdm

PARACLIP = ["I:T2", "T:T1", "T1:T2"]  # L1'' + L2 + L3: the method itself
TERMS = [f"{a}:{b}" for a, b in itertools.permutations(("I", "T", "T1", "T2"), 2)]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", nargs="+", required=True, help="files of generate.py, or globs")
    add("--images", type=Path, help="folder of images, or of img2dataset's .tar shards")
    add("--model", default="openai",
        help="a baseline of section 3.1 (openai, openclip-400m, openclip-2b, openclip-roberta, "
        "laclip); open_clip's MODEL:TAG, MODEL:FILE, MODEL:random or hf-hub:NAME; a run "
        "directory, as DIR or local-dir:DIR (default: %(default)s)")
    add("--output", type=Path, required=True, help="run directory; a run in it is resumed")
    add("--loss", nargs="+", default=PARACLIP, choices=TERMS, metavar="A:B",
        help="terms of the loss, pairs of I, T, T1 and T2 (default: I:T2 T:T1 T1:T2)")
    add("--batch-size", type=at_least(1), default=3072,
        help="rows of a step, over all ranks; Appendix A (default: %(default)s)")
    add("--epochs", type=at_least(1), default=1,
        help="passes over the rows; Appendix A (default: %(default)s)")
    add("--lr", type=at_least(0, float), default=5e-7,
        help="learning rate of the first step; Appendix A (default: %(default)s)")
    add("--weight-decay", type=at_least(0, float), default=0.001,
        help="AdamW's; Appendix A (default: %(default)s)")
    add("--precision", choices=["bf16", "fp32"],
        default="bf16" if torch.cuda.is_available() else "fp32",
        help="of the text tower's products; not stated, ours (default: %(default)s)")
    add("--seed", type=at_least(0), default=0,
        help="decides the order of the rows; ours (default: %(default)s)")
    add("--micro-batch", type=at_least(0), default=0,
        help="texts encoded at once, to bound memory; 0 is all (default: %(default)s)")
    add("--cache", type=Path,
        help="folder for tokens and image features, which many runs may share; on several "
        "machines a local one of each (default: OUTPUT/cache)")
    add("--max-bad-images", type=at_least(0, float), default=0.01,
        help="share of the images that may be unreadable (default: %(default)s)")
    add("--save-every", type=at_least(1), default=500,
        help="steps between two saved states, which are never more than five minutes apart "
        "(default: %(default)s)")
    add("--workers", type=at_least(0), default=min(cores(), 16),
        help="processes a rank that decode images and tokenise texts (default: %(default)s)")
    args = parser.parse_args(argv)
    args.cache = args.cache or args.output / "cache"
    return args


# ------------------------------------------------------------------ the losses of section 2.2
#   paper             | here                              | shape and meaning
#   X_I               | features["I"]                     | [N, D], image tower, frozen
#   X_T, X_T', X_T''  | features["T"], ["T1"], ["T2"]     | [N, D], text tower, trained
#   N                 | --batch-size                      | rows of a step, over all ranks
#   1 / temperature   | logit_scale                       | the model's own, trained; our choice
#   L1'', L2, L3      | terms["I:T2"], ["T:T1"], ["T1:T2"] | scalars, see loss_terms
#   L1, L1' (Table 2) | terms["I:T"], ["I:T1"]            | scalars
#   L_total           | loss = sum(terms.values())        | scalar, in train()
TEXT_KEYS = {"T": "caption", "T1": "paraphrase_1", "T2": "paraphrase_2"}


def kinds_of(loss):
    """Which of I, T, T1, T2 the terms of a loss name, sorted."""
    return sorted({kind for term in loss for kind in term.split(":")})


def info_nce(a, b, logit_scale, local_rows=slice(None)):
    """The symmetric InfoNCE loss of N pairs (a_i, b_i); CLIP's form, the paper names none.

        -1/2N * sum over i of [log p(b_i | a_i) + log p(a_i | b_i)]
        where p(b_j | a_i) is the softmax over j of s * a_i . b_j, and p(a_j | b_i) likewise

    a, b: features [N, D], L2-normalised; logit_scale: the factor s. With `local_rows`, a slice,
    only its i are summed up: a rank's share of the loss.
    """
    targets = torch.arange(len(a), device=a.device)[local_rows]
    a_to_b = F.cross_entropy(logit_scale * a[local_rows] @ b.T, targets, reduction="sum")
    b_to_a = F.cross_entropy(logit_scale * b[local_rows] @ a.T, targets, reduction="sum")
    return (a_to_b + b_to_a) / (2 * len(a))


class Gather(torch.autograd.Function):
    """[n, D] on each rank -> [N, D] on every rank, in the order of the ranks.

    Each rank's features enter the loss of every rank. So backward adds up the gradients [N, D] of
    all ranks, and returns this rank's rows of the sum, [n, D].
    """

    @staticmethod
    def forward(ctx, features):
        ranks = dist.get_world_size()
        gathered = features.new_empty(ranks * len(features), features.shape[1])
        dist.all_gather(list(gathered.chunk(ranks)), features.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def loss_terms(encoder, tokens, image_features, loss):
    """This rank's share of each term of the loss, {"I:T2": scalar, ...}, see info_nce.

    tokens: {"T": [n, 77], ...}, each kind of text that `loss` names; image_features: [n, D], or
    None if it names no I. They are this rank's n of the N rows. The shares of all ranks add up
    to the loss over the N rows.
    """
    text_features, logit_scale = encoder(torch.cat(list(tokens.values())))
    n = len(text_features) // len(tokens)

    features = {}
    for kind, kind_features in zip(tokens, text_features.split(n)):
        features[kind] = Gather.apply(kind_features)
    if image_features is not None:
        features["I"] = Gather.apply(image_features.to(text_features, non_blocking=True))

    first = n * dist.get_rank()
    local_rows = slice(first, first + n)
    terms = {}
    for term in loss:
        a, b = term.split(":")
        # checkpoint: only one term's n x N matrices are in memory at a time, not those of all
        terms[term] = checkpoint(
            info_nce, features[a], features[b], logit_scale, local_rows, use_reentrant=False
        )
    return terms


class TextEncoder(torch.nn.Module):
    """CLIP's text tower and logit scale: all that trains, since load_model() freezes the rest.

    clip: an open_clip model. micro_batch: how many texts are encoded at once, 0 for all. With a
    micro_batch only the features of its texts are kept, and backward encodes them again. bf16:
    products in bfloat16, under autocast. DistributedDataParallel wraps this module.
    """

    def __init__(self, clip, micro_batch=0, bf16=False):
        super().__init__()
        self.clip = clip
        self.micro_batch = micro_batch
        self.bf16 = bf16
        self.is_plain = is_plain(self.tower)
        self.encode = self.encode_flat if self.is_plain else self.encode_parts
        if micro_batch:
            self.encode = functools.partial(checkpoint, self.encode, use_reentrant=False)

    @property
    def tower(self):
        """The text tower. A CLIP is its own; as an attribute it would be registered twice."""
        return getattr(self.clip, "text", self.clip)

    def forward(self, tokens):
        """Tokens [n, 77] on the CPU -> text features [n, D], L2-normalised, and logit_scale.

        The texts are sorted and encoded by length, so that nothing is computed for padding.
        """
        logit_scale = self.clip.logit_scale
        lengths, order = self.lengths(tokens).sort()
        size = self.micro_batch or len(tokens)
        features = []
        for chunk, chunk_lengths in zip(tokens[order].split(size), lengths.split(size)):
            with torch.autocast(logit_scale.device.type, torch.bfloat16, enabled=self.bf16):
                features.append(self.encode(cut(chunk, chunk_lengths)))
        features = torch.cat(features)[self.send(order.argsort())]  # in the order of `tokens`
        return F.normalize(features.to(logit_scale.dtype), dim=-1), logit_scale.exp()

    def lengths(self, tokens):
        """For each text [n, 77] the number of its first tokens that its feature depends on, [n]."""
        if self.is_plain:
            return tokens.argmax(1) + 1  # up to the end token, which has the highest token id
        if isinstance(self.tower, open_clip.hf_model.HFTextEncoder):
            # RoBERTa's attention mask leaves out the padding at the end.
            is_text = tokens != self.tower.config.pad_token_id
            return tokens.shape[1] - is_text.flip(1).int().argmax(1)
        return torch.full((len(tokens),), tokens.shape[1])

    def send(self, tensor):
        """A tensor on the CPU -> on the model's device. Pinned: else the copy waits for the GPU."""
        device = self.clip.logit_scale.device
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    def encode_parts(self, parts):
        """Parts [m, L] of n texts -> [n, D], part by part by open_clip's own forward."""
        return torch.cat([self.clip.encode_text(self.send(part)) for part in parts])

    def encode_flat(self, parts):
        """Parts [m, L] of n texts -> [n, D] by CLIP's causal transformer.

        All tokens are one list [tokens, width], and only attention goes part by part: a GPU takes
        less time for few large products than for many small ones.
        """
        tower = self.tower
        shapes = [part.shape for part in parts]
        tokens = torch.cat([part.flatten() for part in parts])
        positions = torch.cat([torch.arange(length).repeat(m) for m, length in shapes])
        ends = torch.where(positions.roll(-1) == 0)[0]  # the next token begins a text

        x = tower.token_embedding(self.send(tokens))
        x = x + F.embedding(self.send(positions), tower.positional_embedding)
        for block in tower.transformer.resblocks:
            x = x + block.ls_1(attention(block.attn, block.ln_1(x), shapes, tower.attn_mask))
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
        return tower.ln_final(x[self.send(ends)]) @ tower.text_projection


def cut(tokens, lengths):
    """Texts [n, 77], sorted by length -> parts [m, L], each the m texts of one length L."""
    part_lengths, counts = lengths.unique_consecutive(return_counts=True)
    parts = tokens.split(counts.tolist())
    return [part[:, :length] for part, length in zip(parts, part_lengths)]


def attention(attn, x, shapes, mask):
    """Causal self-attention within each text.

    x: [tokens, width], those of parts of the shapes [m, L]; mask: [77, 77].
    """
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    mask = mask.to(qkv.dtype)
    attended = []
    for (m, length), part in zip(shapes, qkv.split([shape.numel() for shape in shapes])):
        part = part.view(m, length, 3, attn.num_heads, attn.head_dim)
        q, k, v = part.permute(2, 0, 3, 1, 4)  # each [m, heads, L, width / heads]
        # is_causal=True would be flash attention, three times slower on short texts.
        out = F.scaled_dot_product_attention(q, k, v, mask[:length, :length])
        attended.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    return attn.out_proj(torch.cat(attended))


def is_plain(tower):
    """Is it CLIP's own transformer, as encode_flat() computes it?

    It is causal and pooled at the end token, so what comes after that changes nothing.
    """
    # A CLIP calls it text_pool_type, the tower of a CustomTextCLIP pool_type.
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", ""))
    if pool != "argmax" or tower.attn_mask is None or getattr(tower, "cls_emb", None) is not None:
        return False
    blocks = tower.transformer.resblocks
    plain = all(type(block) is open_clip.transformer.ResidualAttentionBlock for block in blocks)
    return plain and isinstance(tower.text_projection, torch.nn.Parameter)


def trainable(model):
    """{name: parameter} of the parameters that train."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(model, lr, weight_decay):
    """AdamW over all parameters of `model` that train.

    The paper gives neither betas nor eps: they are open_clip's. Only matrices decay, as there.
    """
    matrices = [p for p in trainable(model).values() if p.ndim >= 2]
    others = [p for p in trainable(model).values() if p.ndim < 2]  # gains, biases, logit scale
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others}]
    return torch.optim.AdamW(
        groups, lr=lr, weight_decay=0, betas=(0.9, 0.98), eps=1e-6, fused=matrices[0].is_cuda
    )


def cosine_lr(lr, step, steps):
    """Appendix A's cosine annealing, from lr to zero. No warm-up: the paper names none."""
    return lr * (1 + math.cos(math.pi * step / steps)) / 2


def batches(count, batch_size, epochs, seed):
    """Yield the indices [n] of this rank's rows in each step.

    The N = batch_size rows of a step are the same for any number of ranks. Each epoch is a
    permutation of the `count` rows; its last, short batch is left out.
    """
    n = batch_size // dist.get_world_size()
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        for batch in range(count // batch_size):
            first = batch * batch_size + dist.get_rank() * n
            yield order[first : first + n]


SAVE_SECONDS = 300  # after which a state is saved, however few steps there were
LOG_EVERY = 10  # steps; to read a figure from a GPU is to wait for it


def train(encoder, optimizer, data, first_step, settings, args, log):
    """The loop, from first_step to the last. log: the open log.jsonl on rank 0.

    Raises InputError if a loss or its gradient is infinite or nan.
    """
    world = dist.get_world_size()
    logit_scale = encoder.clip.logit_scale
    parameters = trainable(encoder).values()
    parallel = torch.nn.parallel.DistributedDataParallel(encoder, gradient_as_bucket_view=True)
    order = batches(len(data.usable), args.batch_size, args.epochs, args.seed)
    loader = load_in_workers(data.batch, list(order)[first_step:], min(args.workers, 4))
    bar = progress(loader, "training", data.steps, unit="step", initial=first_step)
    saved = time.monotonic()
    entries = []  # of the steps since figures were last read
    for step, (tokens, image_features) in enumerate(bar, first_step):
        lr = cosine_lr(args.lr, step, data.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        terms = loss_terms(parallel, tokens, image_features, args.loss)
        loss = sum(terms.values())  # L_total, this rank's share of it
        # The ranks' gradients have to be added up, as their shares are; DDP takes their mean.
        (world * loss).backward()

        values = torch.stack(list(terms.values())).detach()
        dist.all_reduce(values)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        scale = logit_scale.detach().exp().squeeze()
        entries.append((step, lr, torch.stack([*values, scale, grad_norm])))
        optimizer.step()
        optimizer.zero_grad()
        logit_scale.data.clamp_(0, math.log(100))  # as in CLIP

        due = (step + 1) % args.save_every == 0 or time.monotonic() > saved + SAVE_SECONDS
        save = due or step + 1 == data.steps
        if save or len(entries) == LOG_EVERY:
            bar.set_postfix(write_log(entries, args.loss, log), refresh=False)
            entries.clear()
        if save:
            save_state(encoder, optimizer, step + 1, settings, args.output)
            saved = time.monotonic()


def write_log(entries, loss, log):
    """Write a line to `log` for each of train()'s entries; on other ranks than 0 it is None.

    Returns the terms of the last one. Raises InputError if a loss or its gradient is not finite.
    """
    for step, lr, figures in entries:
        *values, logit_scale, grad_norm = figures.tolist()
        if not math.isfinite(sum(values) + grad_norm):
            raise InputError(f"step {step}: the loss {sum(values)} or its gradient {grad_norm} is "
                             "not finite; try a lower --lr or --precision fp32, in another "
                             "--output. state.pt, if there, is the last good state")
        terms = dict(zip(loss, values))
        line = {"step": step, "loss": sum(values), "terms": terms, "lr": lr,
                "logit_scale": logit_scale, "grad_norm": grad_norm}
        if log:
            log.write(json.dumps(line).encode() + b"\n")
            log.flush()
    return terms


# ------------------------------------------------------------------ two arrays, and the rows
#   CACHE/tokens-HASH.npy    [rows, 3, 77] uint16: T, T' and T'' of each row
#   CACHE/features-HASH.npy  [images, D] fp16: L2-normalised; nan, where an image can't be read
# They are computed once, before the first step. A step is then two look-ups.


class Data:
    """What the steps need of the rows.

    usable: the indices of the rows whose image can be read. tokens: [all rows, 3, 77]. features:
    [images, D]. image_of: [all rows], the index of their image. steps: of the whole run.
    Raises InputError if too many images can't be read, or the rows are too few for one step.
    """

    def __init__(self, model, args):
        rows = read_rows(args.rows)
        ids = sorted({row[0] for row in rows})
        index_of = dict(zip(ids, range(len(ids))))
        self.image_of = np.array([index_of[row[0]] for row in rows], int)
        self.checksum = sha256(rows)
        self.kinds = kinds_of(args.loss)
        self.tokens = cache_tokens(rows, self.checksum, model, args)
        self.usable = np.arange(len(rows))
        if "I" in self.kinds:
            self.features = cache_image_features(ids, model, args)
            self.usable = np.flatnonzero(~np.isnan(self.features[self.image_of, 0]))
        self.steps = args.epochs * (len(self.usable) // args.batch_size)
        if not self.steps:
            raise InputError(f"--rows: {len(self.usable):,} rows to train on are fewer than "
                             f"--batch-size {args.batch_size}; give a smaller one")

    def batch(self, indices):
        """Indices [n] in self.usable -> {kind: tokens [n, 77]}, image features [n, D] or None."""
        rows = self.usable[indices]
        texts = torch.from_numpy(self.tokens[rows].astype(np.int64)).unbind(1)
        tokens = {kind: text for kind, text in zip(TEXT_KEYS, texts) if kind in self.kinds}
        features = None
        if "I" in self.kinds:
            features = torch.from_numpy(self.features[self.image_of[rows]])
        return tokens, features


def read_rows(patterns):
    """[image_id, T, T', T''] of each row in files of generate.py. Raises InputError."""
    rows = []
    for path in find_files(patterns):
        rows += progress(read_jsonl(path, parse_row), f"reading {path}", leave=False)
    return rows


def parse_row(line):
    """[image_id, T, T', T''] of a line of JSON. Raises ValueError."""
    row = json.loads(line)
    values = [row.get(key) for key in ("image_id", *TEXT_KEYS.values())]
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"image_id, {', '.join(TEXT_KEYS.values())}: one is missing or blank")
    if values[0].startswith("/") or ".." in values[0].split("/"):
        raise ValueError(f"the image_id {values[0]} must be a path below the folder of images")
    return [value.encode("utf-8", "replace").decode() for value in values]  # half an emoji is "?"


def cache_tokens(rows, checksum, model, args):
    """The tokens [rows, 3, 77] of T, T' and T''."""

    def tokenize(rows):
        texts = [text for row in rows for text in row[1:]]
        return model.tokenizer(texts).unflatten(0, (-1, 3)).int()

    first = tokenize(rows[:1])
    # A tokenizer is known by its configuration, and by what it makes of the first row.
    name = "tokens-" + sha256([checksum, model.config["text_cfg"], first.tolist()])
    dtype = np.uint16 if model.clip.vocab_size <= 2**16 else np.int32
    return cached(name, rows, first.shape[1:], dtype, tokenize, args)


def cache_image_features(ids, model, args):
    """The features [images, D] of the images. Raises InputError if too many can't be read."""
    root = args.images.resolve()
    name = "features-" + sha256([model.image_tower, str(root), ids])
    load = functools.partial(load_pixels, model, functools.partial(open_image, root))
    encode = functools.partial(encode_pixels, model)
    # TF32 turns a feature by a cosine of 1 - 2e-7, and fp16, in which it is kept, by 1 - 1e-7.
    torch.set_float32_matmul_precision("high")
    features = cached(name, ids, [model.config["embed_dim"]], np.float16, load, args, encode)
    torch.set_float32_matmul_precision("highest")
    bad = [ids[index] for index in np.flatnonzero(np.isnan(features[:, 0]))]
    message = (f"--images {root}: {len(bad):,} of {len(ids):,} are missing or can't be read, "
               f"{bad[:5]}; to try the same files again, delete {args.cache / name}.npy")
    if len(bad) > args.max_bad_images * len(ids):
        raise InputError(f"{message}; to leave their rows out, give a higher --max-bad-images. Do "
                         "the image_ids begin in this folder?")
    if bad and dist.get_rank() == 0:
        print(message)
    return features


BLOCK = 64  # items that are computed together, and kept as soon as they are


def cached(name, items, shape, dtype, load, args, encode=torch.as_tensor):
    """The array [items, *shape] of encode(load(some items)), memory-mapped in a file of --cache.

    name: holds a hash of all that the values depend on, so a file of that name is never stale.
    load runs in --workers processes, encode in this one. The ranks of a machine share the work. A
    block counts as done when it is written: whenever they are killed, the same command goes on.
    """
    rank, ranks = place_on_machine()
    path = args.cache / f"{name}.npy"
    done_path = args.cache / f"{name}.done.npy"
    if rank == 0:
        lock = open_locked(args.cache / "lock", wait=True)
        if not path.exists():
            new_path = args.cache / f"{name}.new.npy"
            with naming(path):
                np.save(done_path, np.zeros(math.ceil(len(items) / BLOCK), bool))
                # Zeros are written, not left out: a disk that is too small shows now.
                np.save(new_path, np.broadcast_to(dtype(0), (len(items), *shape)))
                new_path.replace(path)
    barrier()
    array = np.load(path, mmap_mode="r+")
    done = np.load(done_path, mmap_mode="r+")
    todo = [block for block in range(rank, len(done), ranks) if not done[block]]
    parts = [slice(block * BLOCK, (block + 1) * BLOCK) for block in todo]
    loader = load_in_workers(load, [items[part] for part in parts], args.workers)
    bar = progress(loader, name.partition("-")[0], len(todo), unit_scale=BLOCK)
    for loaded, part, block in zip(bar, parts, todo):
        array[part] = encode(loaded)
        done[block] = True
    barrier()
    if rank == 0:
        lock.close()
    return array


# ------------------------------------------------------------------ images, and their features

Image.init()  # Pillow registers most of its formats only now
warnings.filterwarnings("ignore", module="PIL")  # about images that it reads all the same


def image_name(path):
    """What an image file is called: its path without the ending. "" if it is no image.

    Every ending that Pillow opens counts, in either case. macOS's ._x.jpg does not.
    """
    name, ending = os.path.splitext(path)
    can_be_read = Image.registered_extensions().get(ending.lower()) in Image.OPEN
    return name if can_be_read and "/._" not in f"/{path}" else ""


@functools.lru_cache(maxsize=16)
def images_in(place):
    """{name: what opens it} of the images in a folder, or in a tar shard.

    Names are with and without the ending. If two files have one name, nothing opens it.
    """
    found = {}
    if place.is_dir():
        for file in filter(Path.is_file, place.iterdir()):
            found[file.name] = functools.partial(open, file, "rb")
    elif place.is_file():
        tar = tarfile.open(place, "r:")  # noqa: SIM115, it stays open
        with contextlib.suppress(tarfile.ReadError):  # of a shard that is cut off, what is there
            for member in tar:
                found[member.name.removeprefix("./")] = functools.partial(tar.extractfile, member)
    for file in sorted(found):
        name = image_name(file)
        if name:
            found[name] = None if name in found else found[file]
    return found


def open_image(root, image_id):
    """The PIL image of a row. Raises ValueError or OSError.

    Of "00000/000000012" it is the file 00000/000000012.jpg below `root`, or 000000012.jpg in the
    shard 00000.tar.
    """
    path = root / image_id
    name = path.name
    images = images_in(path.parent)
    if name not in images:
        shard, _, name = image_id.partition("/")
        images = images_in(root / f"{shard}.tar")
    if images.get(name) is None:
        raise FileNotFoundError(f"there is no {path}.*, or two")
    return read_image(images[name]())


def read_image(file):
    """The PIL image in a file. Raises ValueError for one that preprocessing would spoil."""
    image = Image.open(file)
    if max(image.size) > 50 * min(image.size):
        raise ValueError("one side is more than 50 times as long as the other")
    if image.mode[0] in "IF":
        raise ValueError("it has more than 8 bits a channel, which RGB would cut off")
    return image


def load_pixels(model, open_item, items):
    """The pixels uint8 [n, 3, H, W] of n images, and which of them can be read, [n].

    open_item(item) returns a PIL image, or raises an error of any kind.
    """
    pixels = []
    readable = []
    for item in items:
        try:
            image = model.preprocess(open_item(item))
            readable.append(True)
        except Exception:  # noqa: BLE001, Pillow raises all kinds
            image = model.preprocess(Image.new("RGB", (1, 1)))
            readable.append(False)
        pixels.append(image)
    return torch.stack(pixels), torch.tensor(readable)


@torch.no_grad()
def encode_pixels(model, loaded):
    """What load_pixels() gave of n images -> features [n, D], L2-normalised; nan: unreadable."""
    pixels, readable = loaded
    pixels = pixels.to(model.clip.logit_scale, non_blocking=True) / 255
    # 16 at a time on a CPU, or large images' activations go out of its caches.
    parts = model.normalize(pixels).split(BLOCK if pixels.is_cuda else 16)
    features = torch.cat([model.clip.encode_image(part, normalize=True) for part in parts])
    return features.float().cpu().masked_fill(~readable[:, None], math.nan)


def load_in_workers(load, keys, workers):
    """Yield load(key) for each of `keys`, made ahead in `workers` processes, pinned for a GPU.

    Without a batch_size DataLoader hands each key to its collate_fn, in one of the processes.
    """
    return DataLoader(
        keys,
        batch_size=None,
        collate_fn=load,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


# ------------------------------------------------------------------ models

BASELINES = {  # section 3.1: the open_clip model and its weights, all ViT-B/32
    # The plain ViT-B-32 loads OpenAI's weights too, with the wrong activation.
    "openai": ("ViT-B-32-quickgelu", "openai"),
    # It was trained with QuickGELU, but GELU is what gives the paper's 60.2 on ImageNet.
    "openclip-400m": ("ViT-B-32", "laion400m_e32"),
    "openclip-2b": ("ViT-B-32", "laion2b_s34b_b79k"),
    "openclip-roberta": ("roberta-ViT-B-32", "laion2b_s12b_b32k"),
    # The weights are a file that the user gets from github.com/LijieFan/LaCLIP.
    "laclip": ("ViT-B-32", "laion400m_laclip.pt"),
}


@dataclasses.dataclass
class Model:
    """An open_clip model in fp32, and what belongs to it."""

    open_clip_name: str  # of the architecture, or local-dir:PATH, or hf-hub:NAME
    pretrained: str  # a tag, a file, "random", or None for a local-dir or hf-hub
    clip: torch.nn.Module  # in eval mode, its image tower frozen
    preprocess: object  # PIL image -> uint8 [3, H, W]
    normalize: object  # [n, 3, H, W] from 0 to 1 -> what the image tower takes
    tokenizer: object  # n texts -> tokens [n, 77]
    config: dict  # open_clip's
    image_tower: str  # hash of all that image features depend on
    fingerprint: str  # hash of the whole model


def find_model(name):
    """The (open_clip name, pretrained) of a model's name, see Model. Raises InputError."""
    if name in BASELINES:
        return BASELINES[name]
    if name.startswith("hf-hub:"):
        return name, None
    folder = name.removeprefix("local-dir:")
    if Path(folder, "open_clip_config.json").exists():
        return f"local-dir:{folder}", None
    open_clip_name, _, pretrained = name.partition(":")
    if open_clip_name not in open_clip.list_models():
        raise InputError(f"model {name}: it is none of {', '.join(BASELINES)}, no folder of a "
                         "model (with open_clip_config.json), and no MODEL:TAG or MODEL:FILE with "
                         "a MODEL of open_clip, such as ViT-B-32")
    return open_clip_name, pretrained


def load_model(name, device="cpu"):
    """The Model of a name, see --model. Raises InputError. Seeds torch's random numbers."""
    open_clip_name, pretrained = find_model(name)
    torch.manual_seed(0)  # for MODEL:random
    with naming(f"model {name} (without a network, give a file: {open_clip_name}:FILE)"):
        with warnings.catch_warnings():
            if name in BASELINES:  # their activations are as the paper's, see above
                warnings.filterwarnings("ignore", "QuickGELU mismatch")
            if pretrained == "random":
                clip = open_clip.create_model(open_clip_name)
            elif os.path.isfile(pretrained or ""):
                clip = open_clip.create_model(open_clip_name, pretrained_text=False)
                clip.load_state_dict(read_weights(pretrained))
            else:
                clip = open_clip.create_model(open_clip_name, pretrained, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(open_clip_name)
    if type(clip) not in (open_clip.CLIP, open_clip.CustomTextCLIP) or clip.logit_bias is not None:
        raise InputError(f"model {name}: it is no CLIP with two towers and a softmax loss")
    # The image tower is frozen. open_clip's lock_image_tower() would leave a timm tower's head.
    clip.visual.requires_grad_(False)
    clip.to(device).eval()  # eval: no dropout, so that a step is exact

    preprocess_cfg = clip.visual.preprocess_cfg
    transforms = image_transform_v2(PreprocessCfg(**preprocess_cfg), is_train=False).transforms
    config = open_clip.get_model_config(open_clip_name)
    return Model(
        open_clip_name=open_clip_name,
        pretrained=pretrained,
        clip=clip,
        preprocess=Compose([*transforms[:-2], PILToTensor()]),
        normalize=transforms[-1],
        tokenizer=tokenizer,
        config=config,
        image_tower=fingerprint(clip.visual, {**config, "text_cfg": None}, preprocess_cfg),
        fingerprint=fingerprint(clip, config, preprocess_cfg),
    )


# What a checkpoint may hold beside tensors: LaCLIP's arguments, a score as a number of numpy's.
SCALAR = np.float64(0).__reduce__()[0]
SAFE_GLOBALS = [
    argparse.Namespace,
    (SCALAR, "numpy.core.multiarray.scalar"),
    (SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"]},
]
# What old files have among their weights: TorchScript archives, and open_clip's with a RoBERTa.
NO_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask",
              "text.transformer.embeddings.position_ids"}


def read_weights(path):
    """{name: tensor} in a file: safetensors, a checkpoint of torch's, or a TorchScript archive."""
    if path.endswith(".safetensors"):
        content = safetensors.torch.load_file(path)
    else:
        warnings.simplefilter("ignore")  # TorchScript is deprecated; OpenAI's files are in it
        try:
            with torch.serialization.safe_globals(SAFE_GLOBALS):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except RuntimeError:
            content = torch.jit.load(path, map_location="cpu").state_dict()
    for wrapper in ("state_dict", "model"):
        content = content.get(wrapper, content)
    weights = {}
    for name, tensor in content.items():
        name = re.sub(r"^((module|_orig_mod|model)\.)+", "", name)  # of DDP, torch.compile, ...
        if name not in NO_WEIGHTS:
            weights[name] = tensor
    return weights


def fingerprint(module, *configs):
    """SHA-256 of a module's weights and buffers, and of the configurations that use them."""
    weights = (tensor.cpu().numpy().tobytes() for tensor in module.state_dict().values())
    return sha256(itertools.chain(configs, weights))


# ------------------------------------------------------------------ ranks


def place_on_machine():
    """This rank among those of its machine, and their number.

    Without RANK, what torchrun sets beside it is left over from another job and not looked at.
    """
    if "RANK" not in os.environ:
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cores():
    """How many CPU cores this process may use, as one of the ranks on its machine."""
    count = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        count = len(os.sched_getaffinity(0))
    return max(1, count // place_on_machine()[1])


def set_up_ranks():
    """Join torchrun's process group, or make one of this process alone. Returns the device."""
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        # A scheduler may show each rank its own GPU only: then all are the first one.
        device = torch.device("cuda", place_on_machine()[0] % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        # With a mask it may give NaN gradients on an H100: pytorch issue 196678.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cudnn.allow_tf32 = False  # fp32 convolutions would keep 10 bits of 23
    group = {"timeout": datetime.timedelta(hours=2)}  # others may have to encode images
    if "RANK" not in os.environ:
        group.update(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, **group)
    return device


def barrier():
    """Wait for all ranks, on their CPUs."""
    dist.all_reduce(torch.zeros(1))


# ------------------------------------------------------------------ the run directory


def open_locked(path, wait=False):
    """Open a file to append to, for this process alone.

    If another process has it: wait for its end, or raise InputError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+b")  # noqa: SIM115, for as long as the lock is wanted
    try:
        # Not flock(), whose locks the loader's processes inherit, and keep after a kill.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise InputError(f"another process writes to {path}; wait for its end") from None
        print(f"waiting for the process that has locked {path}; the machines of one run can't "
              "share it", flush=True)
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError:  # this disk has no locks
        pass
    return file


def save_state(encoder, optimizer, next_step, settings, output):
    """Replace OUTPUT/state.pt by the state before `next_step`. Rank 0 does it."""
    if dist.get_rank() > 0:
        return
    state = {
        "step": next_step,
        "settings": settings,
        "weights": {name: p.detach() for name, p in trainable(encoder).items()},
        "optimizer": optimizer.state_dict(),
    }
    content = io.BytesIO()  # torch.save() would hide what a full disk says
    torch.save(state, content)
    write_file(output / "state.pt", content.getbuffer())


def load_state(encoder, optimizer, settings, output, log):
    """Go on from rank 0's OUTPUT/state.pt, if it is there. Returns its step.

    log.jsonl, which rank 0 has open as `log`, is cut to the steps before it. Raises InputError if
    this rank's settings are not those of the state, or else of rank 0.
    """
    states = [{"step": 0, "settings": settings}]  # a list, which the broadcast fills
    path = output / "state.pt"
    if dist.get_rank() == 0 and path.exists():
        with naming(path):
            states = [torch.load(path, map_location="cpu", weights_only=True)]
    dist.broadcast_object_list(states)
    state = states[0]
    for key, value in settings.items():
        before = state.get("settings", {}).get(key)
        if before != value:
            raise InputError(f"{key}: {value} here, and {before} in the run in --output {output}; "
                             "give another --output, to all ranks alike")
    if state["step"]:
        encoder.load_state_dict(state["weights"], strict=False)  # without the frozen tower
        optimizer.load_state_dict(state["optimizer"])
    if log:
        log.seek(0)
        lines = itertools.islice(log, state["step"])
        log.truncate(sum(map(len, lines)))
    return state["step"]


def export(model, output):
    """Write the model so that open_clip's "local-dir:OUTPUT" loads it."""
    config = {"model_cfg": model.config, "preprocess_cfg": model.clip.visual.preprocess_cfg}
    write_json(output / "open_clip_config.json", config)
    if isinstance(model.tokenizer, open_clip.tokenizer.HFTokenizer):
        model.tokenizer.save_pretrained(output)
    weights = {}
    for name, tensor in model.clip.state_dict().items():
        weights[name] = tensor.contiguous().cpu()
    write_file(output / "open_clip_model.safetensors", safetensors.torch.save(weights))


# ------------------------------------------------------------------ files, messages, progress


class InputError(Exception):
    """What the user must mend: run() prints it as one line and exits with code 2."""


def run(main):
    """Call main() and exit: 2 with one line for what the user must mend, 130 after Ctrl-C."""
    # Otherwise Hugging Face's tokenizers warn about the processes that load data.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.disable(logging.ERROR)  # open_clip logs what it also raises
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # rank 0 says it first, and torchrun ends the others
        if isinstance(error, torch.OutOfMemoryError):
            error = f"{one_line(error)}; in paraclip.py a --micro-batch needs less"
        elif not isinstance(error, (InputError, OSError)):
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        # NCCL warns of a group that is left open. Of several ranks, others may still wait in it.
        if dist.is_initialized() and dist.get_world_size() == 1:
            dist.destroy_process_group()


def one_line(error):
    """An exception as one line. Of a list with many lines, such as torch's, it is the beginning."""
    lines = [line.strip()[:200] for line in f"{type(error).__name__}: {error}".splitlines()]
    return " ".join(lines)[:1000]


def at_least(least, kind=int):
    """An argparse type: a number of `kind` that is `least` or more."""

    def number(text):
        value = kind(text)
        if not least <= value < math.inf:  # nan is not
            raise argparse.ArgumentTypeError(f"{text} must be a number, {least} or more")
        return value

    return number


def sha256(values):
    """A hash of values that are bytes or that JSON can hold."""
    digest = hashlib.sha256()
    for value in values:
        if not isinstance(value, bytes):
            value = json.dumps(value, sort_keys=True).encode()
        digest.update(value)
    return digest.hexdigest()


@contextlib.contextmanager
def naming(place):
    """Turn any error of the block into one InputError that names `place`, a file say."""
    try:
        yield
    except Exception as error:  # noqa: BLE001, readers raise all kinds
        raise InputError(f"{place}: {one_line(error)}") from None


def read_jsonl(path, parse):
    """Yield parse(line) of each line that isn't blank. Raises InputError."""
    number = 0
    with open(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield parse(line)
        except Exception as error:  # noqa: BLE001, parsers raise all kinds
            raise InputError(f"{path}:{number}: {one_line(error)}; a line is one object in JSON, "
                             "such as generate.py writes") from None


def find_files(patterns):
    """The files that paths and globs name, each once. Raises InputError."""
    files = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise InputError(f"{pattern}: there is no such file")
        files += map(os.path.realpath, found)
    return dict.fromkeys(files)


def write_file(path, content):
    """Replace a file by `content`, bytes; if it can't be written, the old one stays."""
    part = Path(f"{path}.part")
    with naming(path):
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def write_json(path, content):
    """Replace a file by `content` as JSON."""
    write_file(path, json.dumps(content, indent=1, allow_nan=False, default=str).encode())


def progress(items, what, total=None, **options):
    """`items`, with a progress bar on rank 0, if they take longer than a second."""
    return tqdm(items, what, total, mininterval=2, delay=1, disable=dist.get_rank() > 0, **options)


# ------------------------------------------------------------------ main


def check_flags(args):
    """Raise InputError for what can be seen before the model is loaded."""
    find_files(args.rows)
    ranks = dist.get_world_size()
    if args.batch_size % ranks:
        raise InputError(f"--batch-size {args.batch_size} can't be divided among {ranks} ranks")
    if len(set(args.loss)) < len(args.loss):
        raise InputError("--loss: name each term once")
    if "I" in kinds_of(args.loss) and not (args.images and args.images.is_dir()):
        raise InputError(f"--images {args.images}: there is no such folder; a term of --loss has I")
    has_model = (args.output / "open_clip_config.json").exists()
    if has_model and not (args.output / "state.pt").exists():
        raise InputError(f"--output {args.output}: it holds a model, and no run to go on with; "
                         "give another --output")


def main():
    args = parse_args()
    device = set_up_ranks()
    check_flags(args)
    model = load_model(args.model, device)
    is_rank_0 = dist.get_rank() == 0
    log = open_locked(args.output / "log.jsonl") if is_rank_0 else None
    data = Data(model, args)
    settings = {
        "--rows": data.checksum,
        "--images": sha256([data.usable.tobytes()]),  # those that can be read
        "--model": model.fingerprint,
    }
    for flag in ("loss", "batch_size", "epochs", "lr", "weight_decay", "precision", "seed"):
        settings[f"--{flag.replace('_', '-')}"] = getattr(args, flag)

    encoder = TextEncoder(model.clip, args.micro_batch, args.precision == "bf16")
    optimizer = make_optimizer(encoder, args.lr, args.weight_decay)
    first_step = load_state(encoder, optimizer, settings, args.output, log)
    if is_rank_0:
        record = {
            "flags": vars(args),
            "settings": settings,
            "rows": {"count": len(data.tokens), "sha256": data.checksum},
            "base_model": {
                "open_clip": model.open_clip_name,
                "pretrained": model.pretrained,
                "fingerprint": model.fingerprint,
            },
            "versions": {"torch": torch.__version__, "open_clip": open_clip.__version__},
        }
        write_json(args.output / "config.json", record)
        print(f"{len(data.usable):,} of {len(data.tokens):,} rows, steps {first_step:,} to "
              f"{data.steps:,}", flush=True)
    train(encoder, optimizer, data, first_step, settings, args, log)
    if is_rank_0:
        export(model, args.output)
        print(f"done: {args.output} is an open_clip model, local-dir:{args.output}")
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
