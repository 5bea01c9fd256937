"""ParaCLIP, sections 2.2 and 3: fine-tune a CLIP text encoder on two-step paraphrases, the image encoder frozen.

    L_total = L1(X_I, X_T'') + L2(X_T, X_T') + L3(X_T', X_T'')        each an InfoNCE loss over the global batch

One process, on a CPU or a GPU:
    python paraclip.py --rows rows.jsonl --images images/ --model openai --output runs/openai --batch-size 256
The paper's run, 5M rows on 8 GPUs:
    torchrun --standalone --nproc_per_node 8 paraclip.py --rows 'rows/*.jsonl' --images laion/ --output runs/openai
The same command resumes a stopped run. The output directory is an open_clip model, local-dir:runs/openai.
"Appendix A" marks the paper's own values, "ours" a choice where it is silent.
"""

import argparse
import datetime
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import subprocess
import tarfile
import time
import warnings

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

from generate import BAR_SECONDS, InputError, at_least, atomic_write, json_object, read_rows, reading, run, tar_files

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CORES = max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # this rank's
TERMS = [f"{a}:{b}" for a, b in itertools.permutations(("I", "T", "T1", "T2"), 2)]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--rows", nargs="+", required=True, metavar="JSONL", help="files of generate.py, paths or globs")
    add("--images", default="", metavar="DIR", help="images or img2dataset's .tar shards; image_id is the path below it")
    add("--model", default="openai", help="openai, openclip-400m, openclip-2b, openclip-roberta, laclip (section 3.1); "
        "MODEL:TAG, MODEL:FILE or MODEL:random of open_clip; local-dir:DIR or a run directory" + default)
    add("--output", required=True, metavar="DIR", help="run directory; a run that is there is resumed")
    add("--loss", nargs="+", default=["I:T2", "T:T1", "T1:T2"], choices=TERMS, metavar="A:B",
        help="InfoNCE terms, pairs of I T T1 T2: section 2.2 and Table 2" + default)
    add("--batch-size", type=at_least(1), default=3072, help="examples a step, over all ranks: Appendix A" + default)
    add("--epochs", type=at_least(1), default=1, help="passes over the rows: Appendix A" + default)
    add("--lr", type=at_least(0, float), default=5e-7, help="annealed to zero by a cosine: Appendix A" + default)
    add("--weight-decay", type=at_least(0, float), default=0.001, help="AdamW's, on matrices: Appendix A" + default)
    add("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 autocast on a GPU (ours)")
    add("--seed", type=int, default=0, help="of the order of the rows: ours" + default)
    add("--micro-batch", type=at_least(0), default=0, help="texts encoded at once, to bound memory; 0: all" + default)
    add("--features", default="", metavar="DIR", help="cache of image features for all runs (default: OUTPUT/features)")
    add("--max-bad-images", type=at_least(0, float), default=0.01, help="share that may be unreadable" + default)
    add("--save-every", type=at_least(1), default=500, help="steps between two saved states" + default)
    add("--workers", type=at_least(0), default=min(CORES, 16), help="that decode and tokenise, a rank" + default)
    return parser.parse_args(argv)


# ---------------------------------------------------------------- losses, section 2.2
#
#   paper             | here                     | shape
#   X_I               | features["I"]            | [N, D], the image tower's, frozen
#   X_T, X_T', X_T''  | features["T" "T1" "T2"]  | [N, D], the text tower's
#   N                 | --batch-size             | examples over all ranks
#   1 / temperature   | logit_scale              | scalar, the model's own, trains (not stated; ours)

TEXT_KEYS = {"T": "caption", "T1": "paraphrase_1", "T2": "paraphrase_2"}
BLOCK = 1024  # rows of an N x N similarity matrix held at a time, in backward too


def info_nce(a, b, logit_scale, rows=slice(None)):
    """The symmetric InfoNCE loss of N pairs; all else in the batch are negatives (section 2.2; CLIP's form is ours).

        1/2N * sum over i of [-log softmax_j(s * a_i.b_j)[i] - log softmax_j(s * b_i.a_j)[i]]

    a, b: features [N, D], L2-normalised; logit_scale: the factor s. With `rows`, the share of those i's in the sum: the
    shares of disjoint rows that make up the batch add up to the loss.
    """
    targets = torch.arange(len(a), device=a.device)[rows]
    a_to_b = F.cross_entropy(logit_scale * a[rows] @ b.T, targets, reduction="sum")
    b_to_a = F.cross_entropy(logit_scale * b[rows] @ a.T, targets, reduction="sum")
    return (a_to_b + b_to_a) / (2 * len(a))


class Gather(torch.autograd.Function):
    """[n, D] of each rank -> [N, D] on every rank, in rank order. Backward: each rank's rows get all ranks' gradients."""

    @staticmethod
    def forward(ctx, features):
        everyones = features.new_empty(dist.get_world_size() * len(features), features.shape[1])
        dist.all_gather(list(everyones.chunk(dist.get_world_size())), features.contiguous())
        return everyones

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # not ours to change in place
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def loss_terms(encoder, tokens, image_features, pairs):
    """L_total of section 2.2 as its terms, {"I:T2": scalar, ...}: this rank's share of each, over the global batch.

    tokens: {"T": [n, 77], ...} for each text kind that `pairs` names, image_features [n, D]: this rank's n of N examples.
    """
    text_features, logit_scale = encoder(torch.cat(list(tokens.values())))  # every kind in one call
    features = dict(zip(tokens, text_features.chunk(len(tokens))))
    features["I"] = image_features.to(text_features)
    features = {kind: Gather.apply(features[kind]) for kind in dict.fromkeys(itertools.chain(*pairs))}
    first = dist.get_rank() * len(image_features)
    end = first + len(image_features)
    blocks = [slice(start, min(start + BLOCK, end)) for start in range(first, end, BLOCK)]
    terms = {}
    for a, b in pairs:
        shares = (checkpoint(info_nce, features[a], features[b], logit_scale, rows, use_reentrant=False) for rows in blocks)
        terms[f"{a}:{b}"] = sum(shares)
    return terms


class TextEncoder(torch.nn.Module):
    """CLIP's text tower and logit scale: all that trains, and what DistributedDataParallel wraps."""

    def __init__(self, clip, micro_batch=0, bf16=False):
        super().__init__()
        self.clip, self.micro_batch, self.bf16 = clip, micro_batch, bf16

    @property
    def tower(self):
        """CustomTextCLIP keeps the text tower in `text`, CLIP its parts at the root."""
        return getattr(self.clip, "text", self.clip)

    def forward(self, tokens):
        """tokens [n, 77] on the CPU -> text features [n, D], L2-normalised, and the logit scale (a factor, not its log).

        Sorted by length, encoded in chunks, each cut to its longest text: the shorter half, half of the rest, ... (few
        chunks, little padding). With micro_batch=N the chunks have N texts and keep their features alone; backward
        encodes them again, one at a time (GradCache's trick: gradients are exact).
        """
        lengths, order = self.lengths(tokens).sort()
        n, device = len(tokens), self.clip.logit_scale.device
        ends = [n - (n >> i) for i in range(1, 6)]
        if self.micro_batch:
            ends = list(range(self.micro_batch, n, self.micro_batch))
        chunks = zip(tokens[order].to(device).tensor_split(ends), lengths.tensor_split(ends))
        encode = functools.partial(checkpoint, self.encode, use_reentrant=False) if self.micro_batch else self.encode
        text_features = torch.cat([encode(chunk[:, : longest[-1]]) for chunk, longest in chunks if len(chunk)])
        return text_features[order.argsort().to(device)], self.clip.logit_scale.exp()

    def lengths(self, tokens):
        """How many tokens of each text [n, 77] can reach its feature: [n]. Those after them may be cut off."""
        tower = self.tower
        if isinstance(tower, HFTextEncoder):  # RoBERTa's attention mask leaves out padding
            return (tokens != tower.config.pad_token_id).sum(1)
        pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", ""))
        if pool == "argmax" and tower.attn_mask is not None:  # CLIP's tower is causal and pooled at the end token
            return tokens.argmax(1) + 1
        return torch.full((len(tokens),), tokens.shape[1])

    def encode(self, tokens):
        """tokens [n, L], L <= 77 -> [n, D]: open_clip's own forward with positions and causal mask cut to L."""
        tower, length, cut = self.tower, tokens.shape[1], {}
        if not isinstance(tower, HFTextEncoder) and length < len(tower.positional_embedding):
            prefix = "" if tower is self.clip else "text."
            cut = {prefix + "positional_embedding": tower.positional_embedding[:length],
                   prefix + "attn_mask": tower.attn_mask[:length, :length]}
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            _, features, *_ = torch.func.functional_call(self.clip, cut, kwargs={"text": tokens}, tie_weights=False)
        return features.float() if self.bf16 else features


MAX_LOGIT_SCALE = math.log(100)  # CLIP's
BETAS, EPS = (0.9, 0.98), 1e-6  # not stated in the paper; open_clip's for ViT


def make_optimizer(encoder, args):
    """AdamW over all that trains; weight decay on matrices alone (no gains, no biases, not the logit scale: ours)."""
    trained = [p for p in encoder.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=BETAS, eps=EPS, fused=trained[0].is_cuda)


def batches(count, args, first_step):
    """This rank's part of each global batch from `first_step` on: [n] indices into the `count` rows used.

    Global batch b of an epoch is the b-th slice of one seeded permutation (the last, short one dropped), for any ranks.
    """
    rank, n = dist.get_rank(), args.batch_size // dist.get_world_size()
    for step in range(first_step, args.epochs * (count // args.batch_size)):
        epoch, b = divmod(step, count // args.batch_size)
        if b == 0 or step == first_step:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed + epoch)).numpy()
        yield order[b * args.batch_size :][rank * n : (rank + 1) * n]


def train(encoder, optimizer, examples, steps, first_step, args):
    """Steps first_step ... steps - 1 on every rank. Raises InputError at a loss that is not finite."""
    world, started, spoken = dist.get_world_size(), time.monotonic(), -math.inf
    pairs, logit_scale = [term.split(":") for term in args.loss], encoder.clip.logit_scale
    parallel = torch.nn.parallel.DistributedDataParallel(encoder, gradient_as_bucket_view=True)
    loader = DataLoader(examples, batch_size=None, sampler=list(batches(len(examples.rows), args, first_step)),
                        num_workers=args.workers, multiprocessing_context="fork" if args.workers else None)
    for step, (tokens, image_features) in enumerate(loader, first_step):
        lr = args.lr * (1 + math.cos(math.pi * step / steps)) / 2  # Appendix A's cosine; no warm-up: ours
        for group in optimizer.param_groups:
            group["lr"] = lr

        terms = loss_terms(parallel, tokens, image_features, pairs)
        # DDP sends gradients while backward still runs, and takes the mean over the ranks: their shares want the sum.
        (world * sum(terms.values())).backward()

        values = torch.stack(list(terms.values())).detach()
        dist.all_reduce(values)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for group in optimizer.param_groups for p in group["params"]])
        entry = {"step": step, "loss": values.sum().item(), "terms": dict(zip(terms, values.tolist())), "lr": lr,
                 "logit_scale": logit_scale.exp().item(), "grad_norm": grad_norm.item()}  # before the update
        if not math.isfinite(entry["loss"] + entry["grad_norm"]):
            raise InputError(f"step {step}: loss {entry['loss']:.4g} with gradient norm {entry['grad_norm']:.4g} is not "
                             f"finite; {args.output}/state.pt, if there, is the last good state; a lower --lr may help")
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            logit_scale.clamp_(0, MAX_LOGIT_SCALE)

        if dist.get_rank() == 0:
            done, now = step + 1 - first_step, time.monotonic()
            entry["examples_per_s"] = done * args.batch_size / (now - started)
            entry["eta_s"] = (steps - step - 1) * (now - started) / done
            with open(os.path.join(args.output, "log.jsonl"), "a") as log:
                log.write(json.dumps(entry) + "\n")
            if now - spoken > 10 or step + 1 == steps:
                spoken = now
                shown = "  ".join(f"{name} {value:.4f}" for name, value in entry["terms"].items())
                print(f"step {step:,} of {steps:,}  loss {entry['loss']:.4f}  ({shown})  {entry['examples_per_s']:,.0f} "
                      f"examples/s  {tqdm.format_interval(entry['eta_s'])} left", flush=True)
            if (step + 1) % args.save_every == 0 or step + 1 == steps:
                save_state(encoder, optimizer, step + 1, args)


class Examples:
    """The rows that training uses: of each its file, its byte offset and the place of its image in `image_ids`."""

    def __init__(self, patterns, kinds, tokenizer):
        self.kinds, self.tokenizer, self.features = kinds, tokenizer, None
        files, ids, rows, texts = {}, {}, [], hashlib.sha256()
        for path, offset, row in tqdm(read_rows(patterns), "reading rows", leave=False, delay=3, disable=dist.get_rank()):
            rows.append((files.setdefault(path, len(files)), offset, ids.setdefault(row["image_id"], len(ids))))
            texts.update("\n".join(row[key] for key in ("image_id", *TEXT_KEYS.values())).encode())
        self.files, self.image_ids, self.rows, self.checksum = list(files), sorted(ids), np.array(rows), texts.hexdigest()
        self.rows[:, 2] = np.argsort([ids[image_id] for image_id in self.image_ids])[self.rows[:, 2]]

    def __getitem__(self, batch):
        """batch: [n] indices -> ({kind: tokens [n, 77]}, image features [n, D]; D is 0 where no term names I)."""
        rows, features = [], torch.empty(len(batch), 0)
        for file, offset, _ in self.rows[batch]:
            with open(self.files[file], "rb") as lines:
                lines.seek(offset)
                rows.append(json_object(lines.readline()))
        if self.features:
            features = torch.stack([self.features[place // SLICE][place % SLICE] for place in self.rows[batch, 2]])
        return {kind: self.tokenizer([row[TEXT_KEYS[kind]] for row in rows]) for kind in self.kinds}, features


# ---------------------------------------------------------------- image features: computed once, for all runs

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG", "")
SLICE = 8192  # images a file of the cache
warnings.filterwarnings("ignore", module="PIL")  # remarks on odd but readable images


@functools.lru_cache(maxsize=2)
def open_shard(path):
    """An open tar file and its members by name."""
    tar = tarfile.open(path, "r:")  # noqa: SIM115 - stays open
    return tar, {member.name.removeprefix("./"): member for member in tar_files(tar)}


def open_image(root, image_id):
    """The PIL image of a row: a file below `root`, or a member of the tar shard that the id begins with."""
    folders = image_id.split("/")
    for extension in EXTENSIONS:
        if os.path.isfile(path := os.path.join(root, image_id + extension)):
            return Image.open(path)
    for depth in range(1, len(folders)):
        if os.path.isfile(path := os.path.join(root, *folders[:depth]) + ".tar"):
            tar, members = open_shard(path)
            for extension in EXTENSIONS:
                if member := members.get("/".join(folders[depth:]) + extension):
                    return Image.open(tar.extractfile(member))
    raise FileNotFoundError(f"no {os.path.join(root, image_id)}.jpg (.jpeg, .png, .webp), and it is in no .tar")


@torch.no_grad()
def encode_images(clip, preprocess, items, open_item, workers, show=True):
    """Yield for each item, in order, its L2-normalised feature [D] on the CPU and "", or NaN and why it can't be read.

    open_item(item) is a PIL image.
    """
    def load(batch):  # in a worker
        images, reasons = [], []
        for item in batch:
            try:
                images.append(preprocess(open_item(item)))
                reasons.append("")
            except Exception as error:  # noqa: BLE001 - Pillow raises OSError, SyntaxError, ValueError and others
                images.append(preprocess(Image.new("RGB", (8, 8))) * math.nan)
                reasons.append(" ".join(f"{type(error).__name__}: {error}".split()))
        return torch.stack(images), reasons

    weight, size = clip.logit_scale, 64 if clip.logit_scale.is_cuda else 16
    loader = DataLoader(items, size, collate_fn=load, num_workers=workers, pin_memory=weight.is_cuda,
                        multiprocessing_context="fork" if workers else None)
    with tqdm(total=len(items), desc="image features", unit="image", mininterval=BAR_SECONDS,
              disable=not show or not items) as bar:
        for pixels, reasons in loader:
            features = clip.encode_image(pixels.to(weight, non_blocking=True), normalize=True)  # to its device and dtype
            bar.update(len(reasons))
            yield from zip(features.float().cpu(), reasons)


def cache_image_features(clip, preprocess, image_ids, args):
    """Memory-mapped slices [SLICE, D] of the features of `image_ids`, in fp16, and {image_id: why it can't be read}.

    A slice is a file named by the SHA-256 of image tower, preprocessing, image root and ids: what is there is right by its
    name, whoever wrote it, and appears whole or not at all. Each rank encodes its share of those that are missing.
    """
    folder, everyone = args.features or os.path.join(args.output, "features"), dist.new_group(timeout=PATIENCE)
    os.makedirs(folder, exist_ok=True)
    tower, slices = fingerprint(clip.visual, clip.visual.preprocess_cfg, os.path.realpath(args.images)), {}
    for start in range(0, len(image_ids), SLICE):
        ids = image_ids[start : start + SLICE]
        slices[os.path.join(folder, hashlib.sha256("\n".join([tower, *ids]).encode()).hexdigest() + ".safetensors")] = ids
    missing = [path for path in list(slices)[dist.get_rank() :: dist.get_world_size()] if not os.path.exists(path)]
    if missing and not os.path.isdir(args.images):
        raise InputError(f"--images {args.images or 'is not given'}: no such folder, and the loss needs image features")
    encoded = encode_images(clip, preprocess, [image_id for path in missing for image_id in slices[path]],
                            functools.partial(open_image, args.images), args.workers, show=dist.get_rank() == 0)
    for path in missing:
        features, reasons = zip(*itertools.islice(encoded, len(slices[path])))
        bad = {image_id: reason for image_id, reason in zip(slices[path], reasons) if reason}
        if len(bad) > args.max_bad_images * len(features):
            encoded.close()
            raise InputError(f"{len(bad):,} of {len(features):,} images can't be read, and --max-bad-images is "
                             f"{args.max_bad_images:.2%}; the first: {': '.join(next(iter(bad.items())))}")
        with atomic_write(path, "wb") as file:
            file.write(save({"features": torch.stack(features).half()}, bad))
    dist.barrier(everyone)
    arrays, unreadable = [], {}
    for path in slices:
        with reading(path), safe_open(path, "pt") as file:
            arrays.append(file.get_tensor("features"))
            unreadable.update(file.metadata() or {})
    return arrays, unreadable


# ---------------------------------------------------------------- models: the five baselines of section 3.1, and any other

BASELINES = {  # name: (open_clip model, weights), all ViT-B/32
    "openai": ("ViT-B-32-quickgelu", "openai"),  # plain ViT-B-32 loads too and is silently wrong
    "openclip-400m": ("ViT-B-32", "laion400m_e32"),  # trained with QuickGELU; plain GELU is what gives the paper's 60.2
    "openclip-2b": ("ViT-B-32", "laion2b_s34b_b79k"),
    "openclip-roberta": ("roberta-ViT-B-32", "laion2b_s12b_b32k"),
    "laclip": ("ViT-B-32", "laion400m_laclip.pt"),  # a file from github.com/LijieFan/LaCLIP
}


def resolve(name):
    """The (open_clip model, weights) that a --model names; weights: a tag, a file, "random", or None for a local-dir."""
    path = name.removeprefix("local-dir:")
    if os.path.isfile(os.path.join(path, "open_clip_model.safetensors")):
        return f"local-dir:{path}", None
    model, _, weights = (":".join(BASELINES[name]) if name in BASELINES else name).partition(":")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if model in open_clip.list_models() and (weights in ("random", *tags) or os.path.isfile(weights)):
        return model, weights
    raise InputError(f"--model {name}: none of {', '.join(BASELINES)} (laclip's file is from github.com/LijieFan/LaCLIP), no "
                     "folder with an open_clip_model.safetensors (has the run finished?), no MODEL:FILE, MODEL:random or "
                     f"MODEL:TAG of open_clip (tags of {model}: {', '.join(tags) or 'none'})")


def load_model(name, device="cpu"):
    """An open_clip model in fp32 and eval mode, its image tower frozen, with its evaluation preprocessing and tokenizer.

    Eval mode in training too: no dropout (RoBERTa has some), so that a step is a function of weights and batch alone.
    """
    model, weights = resolve(name)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are the parallelism
    torch.manual_seed(0)
    logging.disable(logging.ERROR)  # what open_clip logs of a failure, the InputError says
    with reading(f"--model {name}"), warnings.catch_warnings():
        if name in BASELINES:  # the activations of BASELINES are on purpose
            warnings.filterwarnings("ignore", "QuickGELU mismatch")
        with torch.serialization.safe_globals([argparse.Namespace]):  # LaCLIP's file holds one
            clip = open_clip.create_model(model, None if weights == "random" else weights)
        tokenizer = open_clip.get_tokenizer(model)
        if not isinstance(clip, (open_clip.CLIP, open_clip.CustomTextCLIP)) or clip.logit_bias is not None:
            raise InputError(f"--model {name}: no CLIP with two towers and a softmax loss")
    clip.visual.requires_grad_(False)  # lock_image_tower() leaves the head of a timm tower free
    preprocess = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)
    return clip.to(device).eval(), preprocess, tokenizer


def fingerprint(module, *more):
    """SHA-256 of a module's weights and buffers, of the kinds of its layers (GELU or QuickGELU, say), and of `more`."""
    kinds = [(name, type(layer).__name__) for name, layer in module.named_modules()]
    digest = hashlib.sha256(json.dumps([kinds, *more]).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------- the run and its directory

PATIENCE = datetime.timedelta(hours=12)  # of one rank for another that has more images to encode
# On an H100, cuDNN's attention with a mask can give NaN gradients (pytorch#196678), and builds a plan for each new shape.
torch.backends.cuda.enable_cudnn_sdp(False)


def set_up_ranks():
    """Join torchrun's process group, or make one of this process alone: the code has one case. Returns the device."""
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://")) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):  # one machine: on several, the counts of restarts differ
        # torchrun may keep its store when it restarts, and a rank must not find a dead one's address in it
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world,
                            device_id=device if cuda else None)
    return device


def save_state(encoder, optimizer, step, args):
    """Replace OUTPUT/state.pt by the state before `step`: what trains, the optimizer and the step, as plain types."""
    weights = {name: p.detach() for name, p in encoder.named_parameters() if p.requires_grad}
    state = io.BytesIO()  # torch.save straight to a full disk ends in an error of its own
    torch.save({"step": step, "seed": args.seed, "weights": weights, "optimizer": optimizer.state_dict()}, state)
    with atomic_write(os.path.join(args.output, "state.pt"), "wb") as file:
        file.write(state.getbuffer())


def load_state(encoder, optimizer, args):
    """Load OUTPUT/state.pt if there is one, cut the log to the steps before it, and return the step to resume at."""
    path, step = os.path.join(args.output, "state.pt"), 0
    if os.path.exists(path):
        with reading(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            encoder.load_state_dict(state["weights"], strict=False)
            optimizer.load_state_dict(state["optimizer"])
            step = state["step"]
    if dist.get_rank() == 0:
        with open(os.path.join(args.output, "log.jsonl"), "a+") as log:
            log.seek(0)
            log.truncate(sum(len(line) for line in itertools.islice(log, step)))
    return step


RESULT_FLAGS = ("loss", "batch_size", "epochs", "lr", "weight_decay", "precision", "seed")  # a result depends on them


def describe(args, examples, base_model):
    """What config.json keeps. Raises InputError if the run that is in OUTPUT began otherwise."""
    commit = subprocess.run("git rev-parse HEAD", shell=True, cwd=os.path.dirname(os.path.abspath(__file__)), check=False,
                            capture_output=True, text=True).stdout.strip()  # empty where there is no git
    record = {"flags": vars(args), "rows": {"count": len(examples.rows), "sha256": examples.checksum},
              "base_model": dict(zip(("open_clip", "pretrained", "fingerprint"), (*resolve(args.model), base_model))),
              "versions": {package.__name__: package.__version__ for package in (torch, open_clip, np)},
              "git_commit": commit or None}
    path = os.path.join(args.output, "config.json")
    if os.path.exists(path):
        with reading(path), open(path) as file:
            before = json.load(file)
            was, now = {**before, **before["flags"]}, {**record, **vars(args)}
            differ = [f"{key} (was {was[key]}, is {now[key]})" for key in (*RESULT_FLAGS, "rows", "base_model")
                      if was[key] != now[key]]
            record["unreadable"] = before["unreadable"]  # its batches depend on them, whatever can be read by now
        if differ:
            raise InputError(f"{args.output} is a run that began otherwise: {', '.join(differ)}; give another --output")
    return record


def export(clip, tokenizer, args):
    """Write the model so that open_clip's "local-dir:OUTPUT" loads it; a Hugging Face tokenizer goes with it."""
    preprocess_cfg = {key: clip.visual.preprocess_cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    config = {"model_cfg": open_clip.get_model_config(resolve(args.model)[0]), "preprocess_cfg": preprocess_cfg}
    with atomic_write(os.path.join(args.output, "open_clip_config.json")) as file:
        json.dump(config, file, indent=1)
    if isinstance(tokenizer, open_clip.tokenizer.HFTokenizer):
        tokenizer.save_pretrained(args.output)
    with atomic_write(os.path.join(args.output, "open_clip_model.safetensors"), "wb") as file:
        file.write(save({name: tensor.contiguous().cpu() for name, tensor in clip.state_dict().items()}))


def main():
    args, device = parse_args(), set_up_ranks()
    rank, world = dist.get_rank(), dist.get_world_size()
    if args.batch_size % world:
        raise InputError(f"--batch-size {args.batch_size} can't be divided among {world} ranks")
    if args.precision == "auto":
        args.precision = "bf16" if device.type == "cuda" else "fp32"
    os.makedirs(args.output, exist_ok=True)
    if "open_clip_model.safetensors" in os.listdir(args.output) and "log.jsonl" not in os.listdir(args.output):
        raise InputError(f"--output {args.output}: holds a model that is no run's; give another --output")

    clip, preprocess, tokenizer = load_model(args.model, device)
    kinds = {kind for term in args.loss for kind in term.split(":")}
    examples = Examples(args.rows, sorted(kinds - {"I"}), tokenizer)
    record, unreadable = describe(args, examples, fingerprint(clip)), {}
    if "I" in kinds and len(examples.rows) >= args.batch_size:
        examples.features, unreadable = cache_image_features(clip, preprocess, examples.image_ids, args)
    unreadable = record.setdefault("unreadable", unreadable)
    good = np.array([image_id not in unreadable for image_id in examples.image_ids], bool)
    examples.rows = examples.rows[good[examples.rows[:, 2]]]
    steps = args.epochs * (len(examples.rows) // args.batch_size)
    if not steps:
        raise InputError(f"--rows: {len(examples.rows)} rows to train on are fewer than --batch-size {args.batch_size}")

    encoder = TextEncoder(clip, args.micro_batch, args.precision == "bf16")
    optimizer = make_optimizer(encoder, args)
    first_step = load_state(encoder, optimizer, args)
    if rank == 0:
        with atomic_write(os.path.join(args.output, "config.json")) as file:
            json.dump(record, file, indent=1)
        trained, frozen = (sum(p.numel() for p in clip.parameters() if p.requires_grad == x) for x in (True, False))
        print(f"model   {args.model}: {trained:,} parameters trained, {frozen:,} frozen, {args.precision}\n"
              f"loss    {' + '.join(args.loss)}; AdamW, lr {args.lr:g}, weight decay {args.weight_decay:g}\n"
              f"rows    {len(examples.rows):,} used of {record['rows']['count']:,}; images that can't be read: "
              f"{len(unreadable):,} of {len(good):,} {', '.join(list(unreadable)[:5])}\n"
              f"batch   {args.batch_size:,} = {world} x {args.batch_size // world:,}, {world} {device.type} rank(s)\n"
              f"steps   {first_step:,} to {steps:,}, {args.epochs} epoch(s), last short batch dropped", flush=True)
    train(encoder, optimizer, examples, steps, first_step, args)
    if rank == 0:
        export(clip, tokenizer, args)
        print(f"done: {args.output} is an open_clip model, local-dir:{args.output}")
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
