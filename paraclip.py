"""ParaCLIP, sections 2.2 and 3: fine-tune CLIP's text encoder, with its image encoder frozen.

    L_total = L1(X_I, X_T'') + L2(X_T, X_T') + L3(X_T', X_T'')        each an InfoNCE loss

On one CPU or GPU:
    python paraclip.py --rows rows.jsonl --images images/ --output runs/mine --batch-size 256
The paper's run, 5M rows on 8 GPUs:
    torchrun --standalone --nproc_per_node 8 paraclip.py --rows 'rows/*.jsonl' --images laion/ \\
        --model openai --output runs/openai
The same command resumes a stopped run. Its --output is an open_clip model: local-dir:runs/openai
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import glob
import hashlib
import io
import itertools
import json
import logging
import math
import os
import subprocess
import sys
import tarfile
import time
import uuid
import warnings

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

PAPER_TERMS = {"L1": "I:T", "L1'": "I:T1", "L1''": "I:T2", "L2": "T:T1", "L3": "T1:T2"}  # Table 2
PARACLIP = ["I:T2", "T:T1", "T1:T2"]  # L1'' + L2 + L3: the method itself


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    paper_terms = ", ".join(f"{name} is {term}" for name, term in PAPER_TERMS.items())
    possible_terms = [f"{a}:{b}" for a, b in itertools.permutations(("I", *TEXT_KEYS), 2)]
    add("--rows", nargs="+", required=True, metavar="JSONL", help="files of generate.py, or globs")
    add("--images", metavar="DIR", help="folder of images, or of img2dataset's .tar shards")
    add("--model", default="openai",
        help=f"a baseline of section 3.1: {', '.join(BASELINES)}; open_clip's MODEL:TAG, "
        "MODEL:FILE or MODEL:random; a run directory; a local-dir:DIR (default: %(default)s)")
    add("--output", required=True, metavar="DIR", help="run directory; a run in it is resumed")
    add("--loss", nargs="+", default=PARACLIP, choices=possible_terms, metavar="A:B",
        help=f"terms of the loss; the paper's {paper_terms} (default: I:T2 T:T1 T1:T2)")
    add("--batch-size", type=at_least(1), default=3072, metavar="ROWS",
        help="rows of a step, over all ranks; Appendix A (default: %(default)s)")
    add("--epochs", type=at_least(1), default=1, metavar="N",
        help="passes over the rows; Appendix A (default: %(default)s)")
    add("--lr", type=at_least(0, float), default=5e-7, metavar="RATE",
        help="learning rate of the first step; Appendix A (default: %(default)s)")
    add("--weight-decay", type=at_least(0, float), default=0.001, metavar="RATE",
        help="AdamW's; Appendix A (default: %(default)s)")
    add("--precision", choices=["bf16", "fp32"],
        default="bf16" if torch.cuda.is_available() else "fp32",
        help="of the text tower's products; not stated, ours (default: %(default)s)")
    add("--seed", type=at_least(0), default=0, metavar="N",
        help="decides the order of the rows; ours (default: %(default)s)")
    add("--micro-batch", type=at_least(0), default=0, metavar="TEXTS",
        help="texts encoded at once, to bound memory; 0 is all (default: %(default)s)")
    add("--features", metavar="DIR",
        help="cache of image features, which many runs may share (default: OUTPUT/features)")
    add("--max-bad-images", type=at_least(0, float), default=0.01, metavar="SHARE",
        help="share of the images that may be unreadable (default: %(default)s)")
    add("--save-every", type=at_least(1), default=500, metavar="STEPS",
        help="steps between two saved states, which are never more than five minutes apart "
        "(default: %(default)s)")
    add("--workers", type=at_least(0), default=min(cores(), 16), metavar="N",
        help="processes a rank that decode images and tokenise texts (default: %(default)s)")

    args = parser.parse_args(argv)
    if len({frozenset(term.split(":")) for term in args.loss}) < len(args.loss):
        parser.error("argument --loss: the same term is there twice; name each term once")
    args.features = args.features or os.path.join(args.output, "features")
    return args


# ------------------------------------------------------------------ the losses of section 2.2
#   paper             | here                              | shape and meaning
#   X_I               | features["I"]                     | [N, D], image tower, frozen
#   X_T, X_T', X_T''  | features["T"], ["T1"], ["T2"]     | [N, D], text tower, trained
#   N                 | --batch-size                      | rows of a step, over all ranks
#   1 / temperature   | logit_scale                       | the model's own, trained; our choice
#   L1'', L2, L3      | terms["I:T2"], ["T:T1"], ["T1:T2"] | scalars, see loss_terms
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
        features["I"] = Gather.apply(image_features.to(text_features))

    first = n * dist.get_rank()
    local_rows = slice(first, first + n)
    terms = {}
    for term in loss:
        a, b = term.split(":")
        # checkpoint: one n x N matrix of similarities is in memory at a time, not all of them
        terms[term] = checkpoint(
            info_nce, features[a], features[b], logit_scale, local_rows, use_reentrant=False
        )
    return terms


class TextEncoder(torch.nn.Module):
    """CLIP's text tower and logit scale: all that trains, since load_model() freezes the rest.

    clip: an open_clip model. micro_batch: texts encoded at once, 0 for all. bf16: products in
    bfloat16, under autocast. DistributedDataParallel wraps this module.
    """

    def __init__(self, clip, micro_batch=0, bf16=False):
        super().__init__()
        self.clip = clip
        self.micro_batch = micro_batch
        self.bf16 = bf16
        self.tower = getattr(clip, "text", clip)  # a CLIP is its own text tower
        self.huggingface = isinstance(self.tower, open_clip.hf_model.HFTextEncoder)

    def forward(self, tokens):
        """Tokens [n, 77] on the CPU -> text features [n, D], L2-normalised, and logit_scale.

        The texts are sorted by length and encoded in chunks, each cut to its longest text. With
        a micro_batch only a chunk's features are kept, and backward encodes it again.
        """
        device = self.clip.logit_scale.device
        lengths, order = self.lengths(tokens).sort()
        tokens = tokens[order].to(device)
        smallest = 512 if device.type == "cuda" else 32
        size = self.micro_batch or max(smallest, len(tokens) // 16)

        features = []
        for chunk, chunk_lengths in zip(tokens.split(size), lengths.split(size)):
            chunk = chunk[:, : chunk_lengths[-1]]
            if self.micro_batch:
                features.append(checkpoint(self.encode, chunk, use_reentrant=False))
            else:
                features.append(self.encode(chunk))
        in_their_order = order.argsort().to(device)
        return torch.cat(features)[in_their_order], self.clip.logit_scale.exp()

    def lengths(self, tokens):
        """For each text [n, 77] the number of its first tokens that its feature depends on, [n]."""
        if self.huggingface:  # RoBERTa's attention mask leaves padding out
            return (tokens != self.tower.config.pad_token_id).sum(1)
        pool = getattr(self.tower, "text_pool_type", getattr(self.tower, "pool_type", ""))
        if pool == "argmax" and self.tower.attn_mask is not None:
            return tokens.argmax(1) + 1  # CLIP's is causal, and pooled at the end token
        return torch.full((len(tokens),), tokens.shape[1])

    def encode(self, tokens):
        """Tokens [n, L], L <= 77 -> [n, D] by open_clip's own forward.

        CLIP's positions and causal mask are cut to L, RoBERTa cuts its own.
        """
        length = tokens.shape[1]
        overrides = {}
        if not self.huggingface and length < self.tower.context_length:
            prefix = "" if self.tower is self.clip else "text."
            overrides[prefix + "positional_embedding"] = self.tower.positional_embedding[:length]
            overrides[prefix + "attn_mask"] = self.tower.attn_mask[:length, :length]
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            _, features, *_ = torch.func.functional_call(
                self.clip, overrides, kwargs={"text": tokens}, tie_weights=False
            )
        # open_clip has normalised them already, but in bf16 that is coarse.
        return F.normalize(features.to(self.clip.logit_scale), dim=-1)


def make_optimizer(model, lr, weight_decay):
    """AdamW over all parameters of `model` that train.

    The paper gives neither betas nor eps: they are open_clip's. Only matrices decay, as there.
    """
    matrices = []
    gains_and_biases = []  # and the logit scale
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim >= 2:
            matrices.append(parameter)
        elif parameter.requires_grad:
            gains_and_biases.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": gains_and_biases, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=matrices[0].is_cuda)


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


def train(encoder, optimizer, examples, steps, first_step, args):
    """The loop, from first_step to the last of `steps`.

    Raises InputError if a loss or its gradient is infinite or nan.
    """
    rank = dist.get_rank()
    world = dist.get_world_size()
    logit_scale = encoder.clip.logit_scale
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    parallel = torch.nn.parallel.DistributedDataParallel(encoder, gradient_as_bucket_view=True)
    row_batches = batches(len(examples), args.batch_size, args.epochs, args.seed)
    row_batches = itertools.islice(row_batches, first_step, None)
    loader = load_in_workers(examples, args.workers, batch_size=None, sampler=row_batches)
    bar = progress(loader, "training", steps, unit="step", initial=first_step)
    started = time.monotonic()
    saved = started

    for step, (tokens, image_features) in enumerate(bar, first_step):
        lr = cosine_lr(args.lr, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        terms = loss_terms(parallel, tokens, image_features, args.loss)
        loss = sum(terms.values())  # L_total, this rank's share of it
        # The ranks' gradients have to be added up, as their shares are; DDP takes their mean.
        (world * loss).backward()

        values = torch.stack(list(terms.values())).detach()
        dist.all_reduce(values)
        grad_norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])
        entry = {
            "step": step,
            "loss": values.sum().item(),
            "terms": dict(zip(terms, values.tolist())),
            "lr": lr,
            "logit_scale": logit_scale.exp().item(),
            "grad_norm": grad_norm.item(),
        }
        if not math.isfinite(entry["loss"] + entry["grad_norm"]):
            bar.close()
            raise InputError(
                f"step {step}: the loss {entry['loss']:.4g} or its gradient "
                f"{entry['grad_norm']:.4g} is not finite; try a lower --lr or --precision fp32, in "
                "another --output. state.pt, if there, is the last good state"
            )
        optimizer.step()
        optimizer.zero_grad()
        logit_scale.data.clamp_(0, math.log(100))  # as in CLIP

        if rank == 0:
            seconds_a_step = (time.monotonic() - started) / (step + 1 - first_step)
            entry["examples_per_s"] = args.batch_size / seconds_a_step
            entry["eta_s"] = (steps - step - 1) * seconds_a_step
            with open(os.path.join(args.output, "log.jsonl"), "a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
            bar.set_postfix({"loss": entry["loss"], **entry["terms"]}, refresh=False)
            due = (step + 1) % args.save_every == 0 or step + 1 == steps
            if due or time.monotonic() > saved + SAVE_SECONDS:
                save_state(encoder, optimizer, step + 1, args.output)
                saved = time.monotonic()


# ------------------------------------------------------------------ the rows of generate.py


@dataclasses.dataclass
class Rows:
    """The rows' places in their files. Their texts stay there until a step needs them."""

    files: list  # paths
    places: np.ndarray  # [rows, 3]: index in files, byte offset in the file, index in image_ids
    image_ids: list  # each once, sorted
    checksum: str  # SHA-256 of all texts, in the order of the rows


def read_rows(patterns):
    """Find the rows in files, each file read once. Raises InputError at file:line."""
    files = find_files(patterns)
    file_indices = []
    offsets = []
    image_ids = []
    digest = hashlib.sha256()
    for file_index, path in enumerate(files):
        rows = progress(read_jsonl(path, parse_row), f"reading {path}", delay=3, leave=False)
        for offset, row in rows:
            file_indices.append(file_index)
            offsets.append(offset)
            image_ids.append(row["image_id"])
            texts = [row["image_id"], row["caption"], row["paraphrase_1"], row["paraphrase_2"]]
            digest.update("\0".join([*texts, ""]).encode())
    distinct_ids = sorted(set(image_ids))
    index_of = {image_id: index for index, image_id in enumerate(distinct_ids)}
    image_indices = [index_of[image_id] for image_id in image_ids]
    places = np.array([file_indices, offsets, image_indices], np.int64).T
    return Rows(files, places, distinct_ids, digest.hexdigest())


def parse_row(line):
    """A row of generate.py from a line of JSON. Raises ValueError."""
    row = json.loads(line)
    if type(row["image_id"]) is int:
        row["image_id"] = str(row["image_id"])
    for key in ("image_id", "caption", "paraphrase_1", "paraphrase_2"):
        text = row.get(key)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'"{key}" is missing, blank or no text')
        row[key] = text.encode("utf-8", "replace").decode()  # half an emoji becomes "?"
    folders = row["image_id"].split("/")
    if folders[0] == "" or ".." in folders or "\\" in row["image_id"] or "\0" in row["image_id"]:
        raise ValueError(f"image_id {row['image_id']!r} must be a path below the folder of images, "
                         "with / between folders")
    return row


class Examples(torch.utils.data.Dataset):
    """What a step needs of the rows. kinds: the texts that the loss names, of T, T1 and T2.

    image_features: the slices of cache_image_features(), or None if the loss names no I.
    """

    def __init__(self, rows, kinds, tokenizer, image_features):
        self.rows = rows
        self.kinds = kinds
        self.tokenizer = tokenizer
        self.image_features = image_features

    def __len__(self):
        return len(self.rows.places)

    def __getitem__(self, batch):
        """Indices [n] -> {kind: tokens [n, 77]} and image features [n, D] or None."""
        texts = {kind: [] for kind in self.kinds}
        features = []
        for file_index, offset, image_index in self.rows.places[batch]:
            with open(self.rows.files[file_index], "rb") as file:
                file.seek(offset)
                row = parse_row(file.readline())
            for kind in self.kinds:
                texts[kind].append(row[TEXT_KEYS[kind]])
            if self.image_features:
                slice_index, index = divmod(image_index, len(self.image_features[0]))
                features.append(self.image_features[slice_index][index])
        tokens = {kind: self.tokenizer(texts[kind]) for kind in self.kinds}
        return tokens, torch.stack(features) if features else None


# ------------------------------------------------------------------ images, and their features

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG", ".WEBP", "")
SLICE = 8192  # images whose features are in one file of the cache, at most


def open_image(root, image_id):
    """The PIL image of a row: a member of an img2dataset shard, or a file below `root`.

    Both are the id and one of EXTENSIONS; of "00000/000000012.jpg" the shard is 00000.tar.
    """
    folders = image_id.split("/")
    for depth in range(1, len(folders)):
        shard = os.path.join(root, *folders[:depth]) + ".tar"
        if os.path.isfile(shard):
            tar, members = open_shard(shard)
            for extension in EXTENSIONS:
                member = members.get("/".join(folders[depth:]) + extension)
                if member:
                    return Image.open(tar.extractfile(member))
    for extension in EXTENSIONS:
        path = os.path.join(root, image_id + extension)
        if os.path.isfile(path):
            return Image.open(path)
    raise FileNotFoundError(f"there is no {os.path.join(root, image_id)} with .jpg, .jpeg, .png "
                            "or .webp, and no .tar shard that holds it")


@functools.lru_cache(maxsize=2)
def open_shard(path):
    """A tar file and its members, {name: member}. Raises InputError if it is damaged."""
    tar = tarfile.open(path, "r:")  # noqa: SIM115, it stays open
    members = {}
    member = tar.next()
    while member is not None:
        if member.isfile():
            members[member.name.removeprefix("./")] = member
        member = tar.next()
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(512) != bytes(512):  # tarfile takes damage for the end
        raise InputError(f"{path} is damaged or cut off at byte {tar.offset:,}; get it again")
    return tar, members


@torch.no_grad()
def encode_images(model, items, open_item, workers):
    """For each item yield (its image's feature [D], L2-normalised, "").

    If the image can't be read, the feature is nan and the text says why. open_item(item) returns
    a PIL image; it runs in `workers` processes.
    """
    clip = model.clip

    def load(item):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, on odd images that it can read
                return model.preprocess(open_item(item)), ""
        except Exception as error:  # noqa: BLE001, Pillow raises all kinds
            blank = model.preprocess(Image.new("RGB", (8, 8)))
            return torch.full_like(blank, math.nan), one_line(error)

    def load_batch(batch):
        return default_collate([load(item) for item in batch])

    cuda = clip.logit_scale.is_cuda
    batch_size = 64 if cuda else 16
    loader = load_in_workers(
        items, workers, batch_size=batch_size, collate_fn=load_batch, pin_memory=cuda
    )
    for pixels, problems in loader:
        pixels = pixels.to(clip.logit_scale, non_blocking=True)
        features = clip.encode_image(pixels, normalize=True)
        yield from zip(features.float().cpu(), problems)


def cache_image_features(model, image_ids, args):
    """The features of `image_ids`, each computed once for all runs that share args.features.

    Returns the slices, memory-mapped features [n, D] in fp16, n the same for all but the last;
    and {image_id: reason} of the images that can't be read. Each rank encodes its share of the
    slices that are missing.
    """
    slices = name_slices(model, image_ids, args)
    missing = [name for name in slices if not os.path.exists(os.path.join(args.features, name))]
    missing = from_rank_0(missing)
    my_slices = missing[dist.get_rank() :: dist.get_world_size()]
    my_ids = [image_id for name in my_slices for image_id in slices[name]]
    open_item = functools.partial(open_image, args.images)
    encoded = encode_images(model, my_ids, open_item, args.workers)
    encoded = iter(progress(encoded, "image features", len(my_ids), unit="image"))
    with contextlib.closing(encoded):
        for turn in range(math.ceil(len(missing) / dist.get_world_size())):
            with together():
                if turn < len(my_slices):
                    name = my_slices[turn]
                    encode_slice(name, slices[name], encoded, args)
        next(encoded, None)  # Nothing is left, but asking for it has the bar count the last image.
    with together():
        return load_slices(slices, args.features)


def name_slices(model, image_ids, args):
    """{name of a file of the cache: the image ids whose features it holds}.

    The name is a hash of all that the features depend on, so a file that exists is right.
    The slices are nearly equal in size, since --max-bad-images holds for each of them.
    """
    size = math.ceil(len(image_ids) / math.ceil(len(image_ids) / SLICE))
    parts = [image_ids[start : start + size] for start in range(0, len(image_ids), size)]
    root = os.path.realpath(args.images)
    names = []
    for ids in parts:
        content = json.dumps([model.image_tower, root, ids])
        names.append(hashlib.sha256(content.encode()).hexdigest() + ".safetensors")
    names = from_rank_0(names)  # another machine may have the images under another path
    return dict(zip(names, parts))


def encode_slice(name, image_ids, encoded, args):
    """Write the next features of `encoded`, those of `image_ids`, to the file `name`."""
    features = []
    unreadable = {}
    for image_id, (feature, problem) in zip(image_ids, encoded):
        features.append(feature.half())
        if problem:
            unreadable[image_id] = problem
        if len(unreadable) > args.max_bad_images * len(image_ids):
            image_id, problem = next(iter(unreadable.items()))
            raise InputError(
                f"--images {args.images}: {len(unreadable)} of the first {len(features)} images "
                f"can't be read, more than --max-bad-images {args.max_bad_images:g} lets pass; the "
                f"first is {image_id}: {problem}"
            )
    content = safetensors.torch.save({"features": torch.stack(features)}, unreadable)
    atomic_write(os.path.join(args.features, name), content)


def load_slices(names, folder):
    """The memory-mapped features [n, D] in each file, and {image_id: why it can't be read}."""
    features = []
    unreadable = {}
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            raise InputError(f"{path} is not there: all ranks must share one --features folder")
        with reading(path), safetensors.safe_open(path, "pt") as file:
            features.append(file.get_tensor("features"))
            unreadable.update(file.metadata() or {})
    return features, unreadable


# ------------------------------------------------------------------ models

BASELINES = {  # section 3.1: the open_clip model and its weights, all ViT-B/32
    # The plain ViT-B-32 loads OpenAI's weights too, and is silently wrong.
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

    open_clip_name: str  # of the architecture, or local-dir:PATH
    pretrained: str  # a tag, a file, "random", or None for a local-dir
    clip: torch.nn.Module  # in eval mode, its image tower frozen
    preprocess: object  # PIL image -> pixels [3, H, W]
    tokenizer: object  # texts -> tokens [n, 77]
    config: dict  # open_clip's
    image_tower: str  # fingerprint of all that image features depend on
    fingerprint: str  # of the whole model


def find_model(name):
    """The (open_clip name, pretrained) of a model's name, see Model. Raises InputError."""
    if name in BASELINES:
        open_clip_name, pretrained = BASELINES[name]
    else:
        folder = name.removeprefix("local-dir:")
        if os.path.isfile(os.path.join(folder, "open_clip_model.safetensors")):
            return f"local-dir:{folder}", None
        open_clip_name, _, pretrained = name.partition(":")
    if open_clip_name not in open_clip.list_models():
        raise InputError(
            f"model {name}: it is none of {', '.join(BASELINES)} (a file in this folder, from "
            "github.com/LijieFan/LaCLIP), no folder with open_clip_model.safetensors in it, and no "
            "MODEL:TAG or MODEL:FILE with a model of open_clip, such as ViT-B-32"
        )
    tags = open_clip.list_pretrained_tags_by_model(open_clip_name)
    if pretrained not in ("random", *tags) and not os.path.isfile(pretrained):
        raise InputError(f"model {name}: name the weights of {open_clip_name} too, as "
                         f"{open_clip_name}:WEIGHTS with one of {', '.join(['FILE', *tags])}")
    return open_clip_name, pretrained


def load_model(name, device="cpu"):
    """The Model of a name, see --model. Raises InputError. Changes nothing else in the process."""
    open_clip_name, pretrained = find_model(name)
    weights = None if pretrained == "random" else pretrained
    preprocessing = {}
    if name not in BASELINES and weights and os.path.isfile(weights):
        preprocessing = agreed_preprocessing(open_clip_name)
    with reading(f"model {name}"), without_a_trace():
        if name in BASELINES:  # their activations are as the paper's, see above
            warnings.filterwarnings("ignore", "QuickGELU mismatch")
        clip, _, preprocess = open_clip.create_model_and_transforms(
            open_clip_name, weights, **preprocessing
        )
        tokenizer = open_clip.get_tokenizer(open_clip_name)
    two_towers = isinstance(clip, (open_clip.CLIP, open_clip.CustomTextCLIP))
    if not two_towers or clip.logit_bias is not None:
        raise InputError(f"model {name}: it is no CLIP with two towers and a softmax loss")
    # The image tower is frozen. open_clip's lock_image_tower() would leave a timm tower's head.
    clip.visual.requires_grad_(False)
    clip.to(device).eval()  # eval: no dropout, so that a step is exact

    config = open_clip.get_model_config(open_clip_name)
    whole_config = {**config, "preprocess_cfg": clip.visual.preprocess_cfg}
    image_config = {**whole_config, "text_cfg": None}
    return Model(
        open_clip_name=open_clip_name,
        pretrained=pretrained,
        clip=clip,
        preprocess=preprocess,
        tokenizer=tokenizer,
        config=config,
        image_tower=fingerprint(clip.visual, image_config),
        fingerprint=fingerprint(clip, whole_config),
    )


def agreed_preprocessing(open_clip_name):
    """How the images for a checkpoint file are prepared, as arguments for open_clip.

    It is how all tags of the architecture have it. If they differ, or if there are none, it is
    open_clip's default, and a line on stderr says so.
    """
    settings = []
    for tag in open_clip.list_pretrained_tags_by_model(open_clip_name):
        cfg = open_clip.get_pretrained_cfg(open_clip_name, tag)
        keys = ("mean", "std", "interpolation", "resize_mode")
        settings.append({f"image_{key}": cfg.get(key) for key in keys})
    if settings and all(setting == settings[0] for setting in settings):
        return settings[0]
    print(f"{open_clip_name}: open_clip's tags don't say how to prepare images for a file of "
          "weights; its default is taken", file=sys.stderr)
    return {}


@contextlib.contextmanager
def without_a_trace():
    """Around open_clip's loading: it logs failures that it also raises, and draws weights.

    Logging, the random state and the filters of warnings are afterwards as before. LaCLIP's
    file holds an argparse.Namespace: no other class is allowed beside torch's own.
    """
    disabled = logging.root.manager.disable
    handler = logging.NullHandler()  # without one, the first message would install another
    logging.root.addHandler(handler)
    logging.disable(logging.ERROR)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
            torch.serialization.safe_globals([argparse.Namespace]),
        ):
            torch.default_generator.manual_seed(0)
            yield
    finally:
        logging.disable(disabled)
        logging.root.removeHandler(handler)


def fingerprint(module, config):
    """SHA-256 of a module's weights and buffers, and of the configuration that uses them."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------ ranks


def cores():
    """How many CPU cores this process may use, as one of the ranks on its machine."""
    count = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        count = len(os.sched_getaffinity(0))
    if "RANK" in os.environ:
        count = count // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, count)


def set_up_ranks():
    """Join torchrun's process group, or make one of this process alone. Returns the device.

    Without RANK, what torchrun sets beside it is left over from another job and not looked at.
    """
    rank = 0
    world = 1
    store = dist.HashStore()
    local_rank = "0"
    if "RANK" in os.environ:
        try:
            store, rank, world = next(dist.rendezvous("env://"))
        except ValueError as error:
            raise InputError(f"RANK is in the environment, but {error}; start with torchrun, "
                             "or unset RANK for a single process") from None
        local_rank = os.environ.get("LOCAL_RANK", "0")
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            # After a restart the store still holds what the ranks wrote that have ended. This is
            # for one machine only: on several machines the counts of restarts differ.
            restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(restarts, store)

    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if int(local_rank) >= gpus:
            raise InputError(f"rank {rank} has no GPU, this machine has {gpus}; start torchrun "
                             f"with --nproc_per_node {gpus}")
        device = torch.device(f"cuda:{local_rank}")
        backend = "cpu:gloo,cuda:nccl"  # gloo for objects: it notices at once that a rank ended
        torch.cuda.set_device(device)
        # With a mask it may give NaN gradients on an H100: pytorch issue 196678.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cudnn.allow_tf32 = False  # fp32 convolutions would keep 10 bits of 23
    longest_wait = datetime.timedelta(hours=2)  # a rank may have a slice of images to encode
    dist.init_process_group(
        backend, timeout=longest_wait, store=store, rank=rank, world_size=world
    )
    return device


def gather_objects(value):
    """[the value on rank 0, the value on rank 1, ...] on every rank."""
    values = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:
        raise InputError(f"another rank has ended: see its message; {one_line(error)}") from None
    return values


def from_rank_0(value):
    """Rank 0's value, on every rank."""
    return gather_objects(value)[0]


@contextlib.contextmanager
def together():
    """Around work that each rank does alone: if one rank fails, all end with its message.

    It is used up to the first step. In train() it is torchrun that ends the other ranks.
    """
    local_problem = ""
    try:
        yield
    except (InputError, OSError) as error:
        local_problem = one_line(error)
    for problem in gather_objects(local_problem):
        if problem:
            raise InputError(problem)


# ------------------------------------------------------------------ the run directory


def save_state(encoder, optimizer, next_step, output):
    """Replace OUTPUT/state.pt by the state before `next_step`, as plain types."""
    weights = {}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            weights[name] = parameter.detach()
    state = {
        "step": next_step,
        "weights": weights,
        "optimizer": optimizer.state_dict(),
    }
    content = io.BytesIO()
    torch.save(state, content)
    atomic_write(os.path.join(output, "state.pt"), content.getbuffer())


def read_state(output):
    """The state in OUTPUT/state.pt, or one whose step is 0."""
    path = os.path.join(output, "state.pt")
    if not os.path.exists(path):
        return {"step": 0}
    with reading(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {key: state[key] for key in ("step", "weights", "optimizer")}


def load_state(encoder, optimizer, state, output):
    """Go on from a state of read_state(): the log is cut to the steps before it."""
    if state["step"]:
        encoder.load_state_dict(state["weights"], strict=False)  # the frozen tower is not in it
        optimizer.load_state_dict(state["optimizer"])
    path = os.path.join(output, "log.jsonl")
    if dist.get_rank() == 0 and os.path.exists(path):
        with open(path, "r+b") as log:
            log.truncate(sum(len(line) for line in itertools.islice(log, state["step"])))


def make_record(args, rows, model):
    """What config.json keeps of a run. Equal "settings" mean equal weights at the end."""
    settings = {}
    for flag in ("loss", "batch_size", "epochs", "lr", "weight_decay", "precision", "seed"):
        settings[f"--{flag.replace('_', '-')}"] = getattr(args, flag)
    settings["checksum of --rows"] = rows.checksum
    settings["fingerprint of --model"] = model.fingerprint
    return {
        "flags": vars(args),
        "settings": settings,
        "rows": {"count": len(rows.places), "sha256": rows.checksum},
        "base_model": {
            "open_clip": model.open_clip_name,
            "pretrained": model.pretrained,
            "fingerprint": model.fingerprint,
        },
        "versions": {package.__name__: package.__version__ for package in (torch, open_clip, np)},
        "git_commit": git_commit(),
    }


def git_commit():
    """The commit of the folder that this file is in, or None."""
    folder = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    except OSError:  # there is no git
        return None
    return git.stdout.strip() or None


def check_resumed_run(record, output):
    """If OUTPUT holds a run that has a state, require that its settings are those of `record`.

    Its list of unreadable images is taken over, since its batches depend on it.
    """
    if os.path.exists(os.path.join(output, "state.pt")):
        path = os.path.join(output, "config.json")
        with reading(path), open(path, encoding="utf-8") as file:
            before = json.load(file)
            settings = before["settings"]
            record["unreadable"] = before["unreadable"]
        differing = differences(record["settings"], settings)
        if differing:
            raise InputError(f"this run and the one in --output {output} differ in {differing}; "
                             "give another --output")
    elif os.path.exists(os.path.join(output, "open_clip_model.safetensors")):
        raise InputError(f"--output {output}: it holds a model, and no state.pt of a run to go on "
                         "with; give another --output")


def differences(settings, others):
    """What differs between two dicts of settings, in words; "" if nothing does."""
    differing = []
    for key, value in settings.items():
        if others[key] != value and key.startswith("--"):
            differing.append(f"{key} ({value} and {others[key]})")
        elif others[key] != value:  # a checksum says nothing to a reader
            differing.append(key)
    return ", ".join(differing)


def export(model, output):
    """Write the model so that open_clip's "local-dir:OUTPUT" loads it."""
    config = {"model_cfg": model.config, "preprocess_cfg": model.clip.visual.preprocess_cfg}
    write_json(os.path.join(output, "open_clip_config.json"), config)
    if isinstance(model.tokenizer, open_clip.tokenizer.HFTokenizer):
        model.tokenizer.save_pretrained(output)
    weights = {}
    for name, tensor in model.clip.state_dict().items():
        weights[name] = tensor.contiguous().cpu()
    content = safetensors.torch.save(weights)
    atomic_write(os.path.join(output, "open_clip_model.safetensors"), content)


# ------------------------------------------------------------------ files, messages, progress


class InputError(Exception):
    """What the user must mend: run() prints it as one line and exits with code 2."""


def run(main):
    """Call main() and exit: 2 with one line for what the user must mend, 130 after Ctrl-C."""
    # Otherwise Hugging Face's tokenizers warn about the processes that load data.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        sys.exit(main())
    except (InputError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # rank 0 says it first, and torchrun ends the others
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        # NCCL warns of a group that is left open. Of several ranks, others may still wait in it.
        if dist.is_initialized() and dist.get_world_size() == 1:
            dist.destroy_process_group()


def one_line(error):
    """An exception as one line."""
    words = " ".join(str(error).split())[:400]
    if isinstance(error, KeyError):
        return f"the key {words} is missing"
    if isinstance(error, (InputError, OSError)) or type(error) is ValueError:
        return words
    return f"{type(error).__name__}: {words}"


def at_least(least, kind=int):
    """An argparse type: a number of `kind` that is `least` or more."""

    def number(text):
        value = kind(text)
        if not least <= value < math.inf:  # nan is not
            raise argparse.ArgumentTypeError(f"{text} must be a number, {least} or more")
        return value

    return number


@contextlib.contextmanager
def reading(place):
    """Turn any error while a file is read into one InputError that names `place`."""
    try:
        yield
    except (InputError, FileNotFoundError):
        raise
    except Exception as error:  # noqa: BLE001, readers raise all kinds
        raise InputError(f"{place}: can't be read: {one_line(error)}") from None


def read_jsonl(path, parse):
    """Yield (byte offset, parse(line)) of each line that isn't blank. Raises InputError."""
    offset = 0
    number = 0
    with open(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield offset, parse(line)
                offset += len(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: it is no JSON, as generate.py's rows are ({error})"
                             ) from None
        except Exception as error:  # noqa: BLE001, parsers raise all kinds
            raise InputError(f"{path}:{number}: {one_line(error)}") from None


def find_files(patterns):
    """The files that paths and globs name, each once."""
    found = {}
    for pattern in patterns:
        paths = [pattern]
        if not os.path.exists(pattern):
            paths = sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise InputError(f"{pattern}: there is no such file")
        for path in paths:
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def atomic_write(path, content):
    """Replace the file `path` by `content` (bytes), or leave it as it is. Makes its folder."""
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f"{path}.{uuid.uuid4().hex}.part"
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: can't be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)


def write_json(path, content):
    """Replace the file `path` by `content` as JSON."""
    text = json.dumps(content, indent=1, allow_nan=False)
    atomic_write(path, text.encode())


def load_in_workers(dataset, workers, **options):
    """Yield the batches of a DataLoader with `workers` processes."""
    context = "fork" if workers else None
    loader = DataLoader(dataset, num_workers=workers, multiprocessing_context=context, **options)
    try:
        yield from loader
    except RuntimeError as error:
        has_died = "DataLoader worker (pid" in str(error)
        if not has_died and "shared memory" not in str(error):
            raise  # it is an error of the data
        raise InputError("a process of --workers has died or found no shared memory; give /dev/shm "
                         "more room (docker run --ipc=host), or use --workers 0") from None


def progress(items, what, total=None, **options):
    """`items`, with a progress bar on rank 0: often on a terminal, now and then in a log file."""
    seconds = 0.3 if sys.stderr.isatty() else 30
    silent = dist.get_rank() > 0 or total == 0
    return tqdm(items, what, total, mininterval=seconds, disable=silent, **options)


# ------------------------------------------------------------------ main


def prepare(args, device):
    """Check and load what a run needs, the cheap things first: rows, model, state and record."""
    world = dist.get_world_size()
    if args.batch_size % world:
        raise InputError(f"--batch-size {args.batch_size} can't be divided among {world} ranks")
    find_model(args.model)
    if "I" in kinds_of(args.loss):
        if args.images is None:
            raise InputError("--images is needed: a term of --loss has I")
        if not os.path.isdir(args.images):
            raise InputError(f"--images {args.images}: there is no such folder")
    rows = read_rows(args.rows)
    require_a_batch(rows, args)
    model = load_model(args.model, device)
    record = make_record(args, rows, model)
    check_resumed_run(record, args.output)
    return rows, model, read_state(args.output), record


def require_a_batch(rows, args):
    """Raise InputError if the rows are too few for one step."""
    if len(rows.places) < args.batch_size:
        raise InputError(f"--rows: {len(rows.places)} rows to train on are fewer than "
                         f"--batch-size {args.batch_size}; give a smaller one")


def leave_out_unreadable(rows, unreadable):
    """Keep the rows whose images can be read."""
    bad = [index for index, image_id in enumerate(rows.image_ids) if image_id in unreadable]
    rows.places = rows.places[~np.isin(rows.places[:, 2], bad)]


def print_header(args, model, rows, record, first_step, steps):
    """Say what is trained on what, before the first step."""
    parameters = list(model.clip.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in parameters) - trained
    unreadable = record["unreadable"]
    ranks = dist.get_world_size()
    share = args.batch_size // ranks
    print(f"model   {args.model}: {trained:,} parameters trained, {frozen:,} frozen, "
          f"{args.precision}")
    print(f"pixels  {model.clip.visual.preprocess_cfg}")
    print(f"loss    {' + '.join(args.loss)}; AdamW, lr {args.lr:g}, weight decay "
          f"{args.weight_decay:g}")
    print(f"rows    {len(rows.places):,} of {record['rows']['count']:,}, "
          f"{len(rows.image_ids):,} images")
    if unreadable:
        print(f"images  {len(unreadable):,} can't be read (delete {args.features} to try them "
              f"again): {', '.join(sorted(unreadable)[:5])}")
    print(f"steps   {first_step:,} to {steps:,}, {args.epochs} epoch(s), each step "
          f"{args.batch_size:,} = {ranks} x {share:,} rows", flush=True)


def main():
    args = parse_args()
    device = set_up_ranks()
    with together():
        rows, model, state, record = prepare(args, device)
    settings = {**record["settings"], "step in --output": state["step"]}
    settings_of_rank_0 = from_rank_0(settings)
    with together():
        differing = differences(settings, settings_of_rank_0)
        if differing:
            raise InputError(f"rank {dist.get_rank()} and rank 0 differ in {differing}")

    kinds = kinds_of(args.loss)
    image_features = None
    unreadable = {}
    if "I" in kinds:
        kinds.remove("I")
        image_features, unreadable = cache_image_features(model, rows.image_ids, args)
    if "unreadable" not in record:  # a resumed run keeps what it has left out from the start
        record["unreadable"] = from_rank_0(unreadable)
    lost = unreadable.keys() - record["unreadable"].keys()
    if lost:
        raise InputError(f"--images: {len(lost)} images can't be read any more that the run in "
                         f"{args.output} began with, the first is {min(lost)}")
    leave_out_unreadable(rows, record["unreadable"])
    require_a_batch(rows, args)
    steps = args.epochs * (len(rows.places) // args.batch_size)

    examples = Examples(rows, kinds, model.tokenizer, image_features)
    encoder = TextEncoder(model.clip, args.micro_batch, args.precision == "bf16")
    optimizer = make_optimizer(encoder, args.lr, args.weight_decay)
    with together():
        load_state(encoder, optimizer, state, args.output)
        if dist.get_rank() == 0:
            write_json(os.path.join(args.output, "config.json"), record)
            print_header(args, model, rows, record, state["step"], steps)
    try:
        train(encoder, optimizer, examples, steps, state["step"], args)
    except torch.OutOfMemoryError as error:
        raise InputError("the GPU's memory does not hold a step; --micro-batch 256 (or less) needs "
                         f"less of it and gives the same gradients: {one_line(error)}") from None
    if dist.get_rank() == 0:
        export(model, args.output)
        print(f"done: {args.output} is an open_clip model, local-dir:{args.output}")
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
