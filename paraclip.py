"""ParaCLIP, sections 2.2 and 3: fine-tune a CLIP text encoder on two-step paraphrases, the image encoder frozen.

    L_total = L1(X_I, X_T'') + L2(X_T, X_T') + L3(X_T', X_T'')        each an InfoNCE loss over the global batch

One process, on a CPU or a GPU:
    python paraclip.py --rows rows.jsonl --images images/ --model openai --output runs/openai --batch-size 256
The paper's run, 5M rows on 8 GPUs:
    torchrun --standalone --nproc_per_node 8 paraclip.py --rows 'rows/*.jsonl' --images laion/ --output runs/openai
The same command resumes a stopped run; its --output is an open_clip model, local-dir:runs/openai.
"""

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
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter

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

from generate import BAR_SECONDS, InputError, at_least, atomic_write, json_object, read_rows, reading, run, tar_files

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CORES = max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # this rank's
DTYPE = "bf16" if torch.cuda.is_available() else "fp32"
TERMS = [f"{a}:{b}" for a, b in itertools.permutations(("I", "T", "T1", "T2"), 2)]


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter, allow_abbrev=False)
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--rows", nargs="+", required=True, metavar="JSONL", help="files of generate.py, paths or globs")
    add("--images", default="", metavar="DIR", help="images or img2dataset's .tar shards; image_id: path below it")
    add("--model", default="openai", help="openai, openclip-400m, openclip-2b, openclip-roberta, laclip (section 3.1); "
        "MODEL:TAG, MODEL:FILE or MODEL:random of open_clip; local-dir:DIR or a run directory" + default)
    add("--output", required=True, metavar="DIR", help="run directory; a run that is there is resumed")
    add("--loss", nargs="+", default=["I:T2", "T:T1", "T1:T2"], choices=TERMS, metavar="A:B",
        help="terms; Table 2's are L1 I:T, L1' I:T1, L1'' I:T2, L2 T:T1, L3 T1:T2" + default)
    add("--batch-size", type=at_least(1), default=3072, help="examples a step, over all ranks: Appendix A" + default)
    add("--epochs", type=at_least(1), default=1, help="passes over the rows: Appendix A" + default)
    add("--lr", type=at_least(0, float), default=5e-7, help="annealed to zero by a cosine: Appendix A" + default)
    add("--weight-decay", type=at_least(0, float), default=0.001, help="AdamW's, on matrices: Appendix A" + default)
    add("--precision", default=DTYPE, choices=["bf16", "fp32"], help="of the text tower's products: ours" + default)
    add("--seed", type=int, default=0, help="of the order of the rows: ours" + default)
    add("--micro-batch", type=at_least(0), default=0, help="texts encoded at once, to bound memory; 0: all" + default)
    add("--features", default="", metavar="DIR", help="cache of image features for all runs (default: OUTPUT/features)")
    add("--max-bad-images", type=at_least(0, float), default=0.01, help="share that may be unreadable" + default)
    add("--save-every", type=at_least(1), default=500, help="steps between two saved states" + default)
    add("--workers", type=at_least(0), default=min(CORES, 16), help="that decode and tokenise, a rank" + default)
    return parser.parse_args(argv)


# ---------------------------------------------------------------- losses, section 2.2
#   paper             | here                     | shape
#   X_I               | features["I"]            | [N, D], the image tower's, frozen
#   X_T, X_T', X_T''  | features["T" "T1" "T2"]  | [N, D], the text tower's
#   N                 | --batch-size             | examples over all ranks
#   1 / temperature   | logit_scale              | scalar, the model's own, trains (not stated; ours)
TEXT_KEYS = {"T": "caption", "T1": "paraphrase_1", "T2": "paraphrase_2"}


def info_nce(a, b, logit_scale, own=slice(None)):
    """The symmetric InfoNCE loss of N pairs; all else in the batch are negatives (section 2.2; CLIP's form is ours).

        1/2N * sum over i of [-log softmax_j(s * a_i.b_j)[i] - log softmax_j(s * b_i.a_j)[i]]

    a, b: features [N, D], L2-normalised; logit_scale: the factor s. With `own`, the share of those i's in the sum.
    """
    targets = torch.arange(len(a), device=a.device)[own]
    a_to_b = F.cross_entropy(logit_scale * a[own] @ b.T, targets, reduction="sum")
    b_to_a = F.cross_entropy(logit_scale * b[own] @ a.T, targets, reduction="sum")
    return (a_to_b + b_to_a) / (2 * len(a))


class Gather(torch.autograd.Function):
    """[n, D] of each rank -> [N, D] on every rank, in rank order. Backward: a rank's rows get all ranks' gradients."""
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

    tokens: {"T": [n, 77], ...} for each text kind in `pairs`, image_features [n, D]: this rank's n of the N examples.
    """
    text_features, logit_scale = encoder(torch.cat(list(tokens.values())))  # every kind in one call
    features = dict(zip(tokens, text_features.chunk(len(tokens))))
    features["I"] = image_features.to(text_features)
    features = {kind: Gather.apply(features[kind]) for kind in dict.fromkeys(itertools.chain(*pairs))}
    own = slice(dist.get_rank() * len(image_features), (dist.get_rank() + 1) * len(image_features))
    return {f"{a}:{b}": checkpoint(info_nce, features[a], features[b], logit_scale, own, use_reentrant=False)
            for a, b in pairs}  # checkpoint: the n x N matrices of one term are held at a time, in backward too


class TextEncoder(torch.nn.Module):
    """CLIP's text tower and logit scale: all that trains, and what DistributedDataParallel wraps."""
    def __init__(self, clip, micro_batch=0, bf16=False):
        super().__init__()
        self.clip, self.micro_batch, self.bf16 = clip, micro_batch, bf16
        self.tower = getattr(clip, "text", clip)  # CustomTextCLIP's is apart, CLIP's is the model itself
        self.huggingface = isinstance(self.tower, open_clip.hf_model.HFTextEncoder)

    def forward(self, tokens):
        """tokens [n, 77] on the CPU -> text features [n, D], L2-normalised, and the logit scale (a factor, not a log).

        Sorted by length and encoded in chunks, each cut to its longest text: the shorter half, half of the rest, ...
        With micro_batch=N, chunks of N texts keep only their features; backward encodes them again (GradCache): exact.
        """
        lengths, order = self.lengths(tokens).sort()
        n, device = len(tokens), self.clip.logit_scale.device
        ends = range(self.micro_batch, n, self.micro_batch) if self.micro_batch else [n - (n >> i) for i in range(1, 6)]
        chunks = zip(tokens[order].to(device).tensor_split(list(ends)), lengths.tensor_split(list(ends)))
        encode = functools.partial(checkpoint, self.encode, use_reentrant=False) if self.micro_batch else self.encode
        text_features = torch.cat([encode(chunk[:, : longest[-1]]) for chunk, longest in chunks if len(chunk)])
        return text_features[order.argsort().to(device)], self.clip.logit_scale.exp()

    def lengths(self, tokens):
        """How many tokens of each text [n, 77] can reach its feature: [n]. Those after them may be cut off."""
        if self.huggingface:  # RoBERTa's attention mask leaves out padding
            return (tokens != self.tower.config.pad_token_id).sum(1)
        pool = getattr(self.tower, "text_pool_type", getattr(self.tower, "pool_type", ""))
        if pool == "argmax" and self.tower.attn_mask is not None:  # CLIP's is causal, and pooled at the end token
            return tokens.argmax(1) + 1
        return torch.full((len(tokens),), tokens.shape[1])

    def encode(self, tokens):
        """tokens [n, L], L <= 77 -> [n, D]: open_clip's own forward with positions and causal mask cut to L."""
        length, cut = tokens.shape[1], {}
        if not self.huggingface and length < len(self.tower.positional_embedding):
            at = "" if self.tower is self.clip else "text."
            cut = {at + "positional_embedding": self.tower.positional_embedding[:length],
                   at + "attn_mask": self.tower.attn_mask[:length, :length]}
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            _, features, *_ = torch.func.functional_call(self.clip, cut, kwargs={"text": tokens}, tie_weights=False)
        return F.normalize(features.to(self.clip.logit_scale), dim=-1)  # once more: bf16 has normalised coarsely


def make_optimizer(encoder, args):
    """AdamW over all that trains; not stated and ours: open_clip's betas and eps, no decay on gains and biases."""
    trained = [p for p in encoder.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]  # the logit scale too
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=trained[0].is_cuda)


def batches(count, args, first_step):
    """This rank's [n] rows of each global batch, a slice of one seeded permutation an epoch: the same for any ranks."""
    rank, n = dist.get_rank(), args.batch_size // dist.get_world_size()
    for step in range(first_step, args.epochs * (count // args.batch_size)):
        epoch, b = divmod(step, count // args.batch_size)
        if b == 0 or step == first_step:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed + epoch)).numpy()
        yield order[b * args.batch_size :][rank * n : (rank + 1) * n]


def train(encoder, optimizer, examples, steps, first_step, args):
    """Steps first_step ... steps - 1 on every rank. Raises InputError at a loss that is not finite."""
    rank, world, started = dist.get_rank(), dist.get_world_size(), time.monotonic()
    pairs, logit_scale = [term.split(":") for term in args.loss], encoder.clip.logit_scale
    parallel = torch.nn.parallel.DistributedDataParallel(encoder, gradient_as_bucket_view=True)
    loader = DataLoader(examples, batch_size=None, sampler=list(batches(len(examples.rows), args, first_step)),
                        num_workers=args.workers, multiprocessing_context="fork" if args.workers else None)
    bar = tqdm(loader, "training", steps, unit="step", initial=first_step, mininterval=BAR_SECONDS, disable=rank > 0)
    for step, (tokens, image_features) in enumerate(bar, first_step):
        lr = args.lr * (1 + math.cos(math.pi * step / steps)) / 2  # Appendix A's cosine; no warm-up: ours
        for group in optimizer.param_groups:
            group["lr"] = lr

        terms = loss_terms(parallel, tokens, image_features, pairs)
        (world * sum(terms.values())).backward()  # DDP sends while it runs, and takes the mean: shares want the sum

        values = torch.stack(list(terms.values())).detach()
        dist.all_reduce(values)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for group in optimizer.param_groups for p in group["params"]])
        entry = {"step": step, "loss": values.sum().item(), "terms": dict(zip(terms, values.tolist())), "lr": lr,
                 "logit_scale": logit_scale.exp().item(), "grad_norm": grad_norm.item()}  # before the update
        if not math.isfinite(entry["loss"] + entry["grad_norm"]):
            raise InputError(f"step {step}: loss {entry['loss']:.4g}, gradient {entry['grad_norm']:.4g}: not finite; "
                             f"{args.output}/state.pt, if there, is the last good state")
        optimizer.step()
        optimizer.zero_grad()
        logit_scale.data.clamp_(0, math.log(100))  # as CLIP's
        if rank == 0:
            seconds = (time.monotonic() - started) / (step + 1 - first_step)  # a step
            entry.update(examples_per_s=args.batch_size / seconds, eta_s=(steps - step - 1) * seconds)
            with open(os.path.join(args.output, "log.jsonl"), "a") as log:
                log.write(json.dumps(entry) + "\n")
            bar.set_postfix({"loss": entry["loss"], **entry["terms"]}, refresh=False)
            if (step + 1) % args.save_every == 0 or step + 1 == steps:
                save_state(encoder, optimizer, step + 1, args)


class Examples:
    """The rows that training uses: of each its file, its byte offset and the place of its image in `image_ids`."""
    def __init__(self, patterns, kinds, tokenizer):
        self.kinds, self.tokenizer, self.features = kinds, tokenizer, None
        files, ids, rows, texts = {}, {}, [], hashlib.sha256()
        for path, _, start, row in tqdm(read_rows(patterns), delay=3, mininterval=BAR_SECONDS, disable=dist.get_rank()):
            rows.append((files.setdefault(path, len(files)), start, ids.setdefault(row["image_id"], len(ids))))
            texts.update("\n".join(row[key] for key in ("image_id", *TEXT_KEYS.values())).encode())
        self.files, self.image_ids, self.checksum = list(files), sorted(ids), texts.hexdigest()
        self.rows = np.array(rows, np.int64).reshape(-1, 3)
        self.rows[:, 2] = np.argsort([ids[image_id] for image_id in self.image_ids])[self.rows[:, 2]]

    def __getitem__(self, batch):
        """batch: [n] indices -> ({kind: tokens [n, 77]}, image features [n, D]; D is 0 where no term names I)."""
        rows, features = [], torch.empty(len(batch), 0)
        for file, offset, _ in self.rows[batch]:
            with open(self.files[file], "rb") as lines:
                lines.seek(offset)
                rows.append(json_object(lines.readline()))
        if self.features:
            slices, places = np.divmod(self.rows[batch, 2], len(self.features[0]))
            features = torch.stack([self.features[i][j] for i, j in zip(slices, places)])
        return {kind: self.tokenizer([row[TEXT_KEYS[kind]] for row in rows]) for kind in self.kinds}, features


EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG", "")
SLICE = 8192  # images a file of the cache, at most
warnings.filterwarnings("ignore", module="PIL")  # remarks on odd but readable images


@functools.lru_cache(maxsize=2)
def open_shard(path):
    """{member name: a function that opens the member} of a tar file."""
    tar = tarfile.open(path, "r:")  # noqa: SIM115 - stays open
    return {member.name.removeprefix("./"): functools.partial(tar.extractfile, member) for member in tar_files(tar)}


def open_image(root, image_id):
    """The PIL image of a row: a file below `root`, or a member of the tar shard that the id begins with."""
    for name in [image_id + extension for extension in EXTENSIONS]:
        if os.path.isfile(path := os.path.join(root, name)):
            return Image.open(path)
        for i in [i for i, letter in enumerate(name) if letter == "/"]:
            if os.path.isfile(path := os.path.join(root, name[:i] + ".tar")) and name[i + 1 :] in open_shard(path):
                return Image.open(open_shard(path)[name[i + 1 :]]())
    raise FileNotFoundError(f"no {os.path.join(root, image_id)}.jpg (.jpeg, .png, .webp), and it is in no .tar")


@torch.no_grad()
def encode_images(clip, preprocess, items, open_item, workers):
    """Yield of each PIL image open_item(item), in order, its L2-normalised feature [D] and "", or NaN and a reason."""
    def load(item):
        try:
            return preprocess(open_item(item)), ""
        except Exception as error:  # noqa: BLE001 - Pillow raises OSError, SyntaxError, ValueError and others
            return preprocess(Image.new("RGB", (8, 8))) * math.nan, " ".join(f"{type(error).__name__}: {error}".split())

    cuda, collate = clip.logit_scale.is_cuda, lambda batch: default_collate([load(item) for item in batch])
    loader = DataLoader(items, 64 if cuda else 16, collate_fn=collate, num_workers=workers, pin_memory=cuda,
                        multiprocessing_context="fork" if workers else None)
    for pixels, reasons in loader:
        features = clip.encode_image(pixels.to(clip.logit_scale, non_blocking=True), normalize=True)
        yield from zip(features.float().cpu(), reasons)


def cache_image_features(clip, preprocess, image_ids, args):
    """Memory-mapped slices [n, D] of the features of `image_ids`, in fp16, and {image_id: why it can't be read}.

    A slice is a file named by the SHA-256 of tower, preprocessing, image root and ids: what is there is right by name,
    and whole. Each rank encodes its share of those that are missing. All slices but the last have the same length.
    """
    rank, folder = dist.get_rank(), args.features or os.path.join(args.output, "features")
    os.makedirs(folder, exist_ok=True)
    tower, slices = fingerprint(clip.visual, clip.visual.preprocess_cfg, os.path.realpath(args.images)), {}
    size = math.ceil(len(image_ids) / math.ceil(len(image_ids) / SLICE))  # near to equal: a share of each may be bad
    for ids in [image_ids[start : start + size] for start in range(0, len(image_ids), size)]:
        name = hashlib.sha256(json.dumps([tower, ids]).encode()).hexdigest()
        slices[os.path.join(folder, f"{name}.safetensors")] = ids
    missing = [path for path in list(slices)[rank :: dist.get_world_size()] if not os.path.exists(path)]
    todo = [image_id for path in missing for image_id in slices[path]]
    encoded = encode_images(clip, preprocess, todo, functools.partial(open_image, args.images), args.workers)
    encoded = iter(tqdm(encoded, "image features", len(todo), mininterval=BAR_SECONDS, disable=rank > 0 or not todo))
    for path in missing:
        features, unreadable = [], {}
        for image_id, (feature, reason) in zip(slices[path], encoded):
            features.append(feature.half())
            unreadable |= {image_id: reason} if reason else {}
            if len(unreadable) > args.max_bad_images * len(slices[path]):
                encoded.close()
                raise InputError(f"--images {args.images or 'is not given'}: more than --max-bad-images can't be read, "
                                 f"the first: {': '.join(next(iter(unreadable.items())))}")
        with atomic_write(path, "wb") as file:
            file.write(safetensors.torch.save({"features": torch.stack(features)}, unreadable))
    next(encoded, None)  # and the bar ends
    arrays, unreadable = [], {}
    for path in slices:
        while not os.path.exists(path):  # another rank is at it
            time.sleep(1)
        with reading(path), safetensors.safe_open(path, "pt") as file:
            arrays.append(file.get_tensor("features"))
            unreadable.update(file.metadata() or {})
    return arrays, unreadable


BASELINES = {  # name: (open_clip model, weights), all ViT-B/32
    "openai": ("ViT-B-32-quickgelu", "openai"),  # plain ViT-B-32 loads too and is silently wrong
    "openclip-400m": ("ViT-B-32", "laion400m_e32"),  # trained with QuickGELU; plain GELU is what gives the paper's 60.2
    "openclip-2b": ("ViT-B-32", "laion2b_s34b_b79k"),
    "openclip-roberta": ("roberta-ViT-B-32", "laion2b_s12b_b32k"),
    "laclip": ("ViT-B-32", "laion400m_laclip.pt"),  # a file from github.com/LijieFan/LaCLIP
}


def resolve(name):
    """The (open_clip model, weights) that a --model names; weights: a tag, a file, "random", None for a local-dir."""
    path = name.removeprefix("local-dir:")
    if os.path.isfile(os.path.join(path, "open_clip_model.safetensors")):
        return f"local-dir:{path}", None
    model, _, weights = (":".join(BASELINES[name]) if name in BASELINES else name).partition(":")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if model in open_clip.list_models() and (weights in ("random", *tags) or os.path.isfile(weights)):
        return model, weights
    raise InputError(f"--model {name}: none of {', '.join(BASELINES)} (of github.com/LijieFan/LaCLIP), no folder with "
                     f"open_clip_model.safetensors, no MODEL:FILE or MODEL:TAG of open_clip ({', '.join(tags)})")


def load_model(name, device="cpu"):
    """An open_clip model in fp32, its image tower frozen, with preprocessing and tokenizer. Raises InputError."""
    model, weights = resolve(name)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are the parallelism
    torch.manual_seed(0)
    logging.disable(logging.ERROR)  # what open_clip logs of a failure, the InputError says
    with reading(f"--model {name}"), warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
        if name in BASELINES:  # their activations are on purpose; LaCLIP's file holds a Namespace
            warnings.filterwarnings("ignore", "QuickGELU mismatch")
        clip, _, preprocess = open_clip.create_model_and_transforms(model, None if weights == "random" else weights)
        tokenizer = open_clip.get_tokenizer(model)
        if not isinstance(clip, (open_clip.CLIP, open_clip.CustomTextCLIP)) or clip.logit_bias is not None:
            raise InputError(f"--model {name}: no CLIP with two towers and a softmax loss")
    clip.visual.requires_grad_(False)  # lock_image_tower() leaves the head of a timm tower free
    return clip.to(device).eval(), preprocess, tokenizer  # eval: no dropout, a step is exact


def fingerprint(module, *more):
    """SHA-256 of a module's weights and buffers, of the kinds of its layers (GELU or QuickGELU, say), and of `more`."""
    kinds = [(name, type(layer).__name__) for name, layer in module.named_modules()]
    digest = hashlib.sha256(json.dumps([kinds, *more]).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def set_up_ranks():
    """Join torchrun's process group, or make one of this process alone: the code has one case. Returns the device."""
    cuda, world = torch.cuda.is_available(), os.environ.get("WORLD_SIZE", "1")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu")
    store, rank, _ = next(dist.rendezvous("env://")) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    if os.environ.get("LOCAL_WORLD_SIZE") == world:  # one machine: elsewhere the counts of restarts differ
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # else dead ranks' keys show
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # with a mask it may give NaN gradients on an H100: pytorch#196678
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=int(world),
                            device_id=device if cuda else None)
    return device


def save_state(encoder, optimizer, step, args):
    """Replace OUTPUT/state.pt by the state before `step`: what trains, the optimizer and the step, as plain types."""
    weights, state = {name: p.detach() for name, p in encoder.named_parameters() if p.requires_grad}, io.BytesIO()
    torch.save({"step": step, "seed": args.seed, "weights": weights, "optimizer": optimizer.state_dict()}, state)
    with atomic_write(os.path.join(args.output, "state.pt"), "wb") as file:
        file.write(state.getbuffer())


def load_state(encoder, optimizer, args):
    """Load OUTPUT/state.pt if there is one, cut the log to the steps before it, and return the step to resume at."""
    path, state = os.path.join(args.output, "state.pt"), {"step": 0}
    if os.path.exists(path):
        with reading(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            encoder.load_state_dict(state["weights"], strict=False)
            optimizer.load_state_dict(state["optimizer"])
    if dist.get_rank() == 0:
        with open(os.path.join(args.output, "log.jsonl"), "a+") as log:
            log.seek(0)
            log.truncate(sum(len(line) for line in itertools.islice(log, state["step"])))
    return state["step"]


def describe(args, examples, base_model):
    """What config.json keeps. Raises InputError if the run that is in OUTPUT began otherwise."""
    record = {"flags": vars(args), "rows": {"count": len(examples.rows), "sha256": examples.checksum},
              "base_model": dict(zip(("open_clip", "pretrained", "fingerprint"), (*resolve(args.model), base_model))),
              "versions": {package.__name__: package.__version__ for package in (torch, open_clip, np)},
              "git_commit": subprocess.run("git rev-parse HEAD", shell=True, cwd=os.path.dirname(__file__) or ".",
                                           check=False, capture_output=True, text=True).stdout.strip() or None}
    path = os.path.join(args.output, "config.json")
    if os.path.exists(path):
        with reading(path), open(path) as file:
            before = json.load(file)
            was, now = ({**each["flags"], **each} for each in (before, record))  # "rows": their checksum, not the flag
            depends = ("loss", "batch_size", "epochs", "lr", "weight_decay", "precision", "seed", "rows", "base_model")
            differ = [f"{key} (was {was[key]}, is {now[key]})" for key in depends if was[key] != now[key]]
            record["unreadable"] = before["unreadable"]  # its batches depend on them, whatever can be read by now
        if differ:
            raise InputError(f"{args.output} is a run that began otherwise: {', '.join(differ)}; give another --output")
    return record


def export(clip, tokenizer, args):
    """Write the model so that open_clip's "local-dir:OUTPUT" loads it; a Hugging Face tokenizer goes with it."""
    model_cfg = open_clip.get_model_config(resolve(args.model)[0])
    with atomic_write(os.path.join(args.output, "open_clip_config.json")) as file:
        json.dump({"model_cfg": model_cfg, "preprocess_cfg": clip.visual.preprocess_cfg}, file, indent=1)
    if isinstance(tokenizer, open_clip.tokenizer.HFTokenizer):
        tokenizer.save_pretrained(args.output)
    with atomic_write(os.path.join(args.output, "open_clip_model.safetensors"), "wb") as file:
        file.write(safetensors.torch.save({key: value.contiguous().cpu() for key, value in clip.state_dict().items()}))


def main():
    args, device = parse_args(), set_up_ranks()
    rank, world = dist.get_rank(), dist.get_world_size()
    if args.batch_size % world:
        raise InputError(f"--batch-size {args.batch_size} can't be divided among {world} ranks")
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
        print(f"model  {args.model}: {trained:,} parameters trained, {frozen:,} frozen, {args.precision}\n"
              f"loss   {' + '.join(args.loss)}; AdamW, lr {args.lr:g}, weight decay {args.weight_decay:g}\n"
              f"rows   {len(examples.rows):,} of {record['rows']['count']:,}; {len(unreadable):,} images can't be read "
              f"{sorted(unreadable)[:5]}\nsteps  {first_step:,} to {steps:,}, {args.epochs} epoch(s), each step "
              f"{args.batch_size:,} = {world} x {args.batch_size // world:,} rows", flush=True)
    train(encoder, optimizer, examples, steps, first_step, args)
    if rank == 0:
        export(clip, tokenizer, args)
        print(f"done: {args.output} is an open_clip model, local-dir:{args.output}")
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
