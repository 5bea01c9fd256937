"""ParaCLIP, sections 2.2 and 3: fine-tune a CLIP text encoder on two-step paraphrases, the image encoder frozen.

    L_total = L1(X_I, X_T'') + L2(X_T, X_T') + L3(X_T', X_T'')        each an InfoNCE loss over the global batch

One process, on a CPU or a GPU:
    python paraclip.py --rows rows.jsonl --images images/ --model openai --output runs/openai --batch-size 256
The paper's run, 5M rows on 8 GPUs:
    torchrun --standalone --nproc_per_node 8 paraclip.py --rows 'rows/*.jsonl' --images laion/ --output runs/openai
The same command resumes a stopped run. The output directory is an open_clip model, local-dir:runs/openai.
Of the flags, "Appendix A" gives the paper's value; "ours" marks a choice where the paper is silent.
"""

import argparse
import array
import contextlib
import dataclasses
import datetime
import errno
import fcntl
import functools
import glob
import hashlib
import importlib.metadata
import io
import itertools
import json
import logging
import math
import os
import pickle
import platform
import subprocess
import tarfile
import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm import tqdm

from generate import (
    BAR_SECONDS,
    ROW_KEYS,
    InputError,
    atomic_write,
    flag,
    is_safe,
    parse_flags,
    read_rows,
    run,
)

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CORES = max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # this rank's
# On an H100, cuDNN's attention with a mask can give NaN gradients (pytorch#196678), and builds a plan for each new shape.
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass
class Config:
    rows: Sequence[str] = flag([], "JSONL files of generate.py, paths or globs", required=True)
    images: str = flag("", "folder of images or of img2dataset .tar shards; image_id is the path below it")
    model: str = flag("openai", "openai, openclip-400m, openclip-2b, openclip-roberta, laclip (section 3.1); "
                                "MODEL:TAG, MODEL:FILE or MODEL:random of open_clip; local-dir:DIR or a run directory")
    output: str = flag("", "run directory; a run that is there is resumed", required=True)
    loss: Sequence[str] = flag(["I:T2", "T:T1", "T1:T2"], "InfoNCE terms, pairs of I T T1 T2: section 2.2 and Table 2")
    batch_size: int = flag(3072, "examples a step over all ranks: Appendix A")
    epochs: int = flag(1, "passes over the rows: Appendix A")
    lr: float = flag(5e-7, "peak learning rate, annealed to zero by a cosine: Appendix A")
    weight_decay: float = flag(0.001, "of AdamW, on weight matrices: Appendix A")
    precision: str = flag("auto", "bf16 (autocast; weights and losses stay fp32) or fp32; auto is bf16 on a GPU: "
                                  "ours", choices=["auto", "bf16", "fp32"])
    seed: int = flag(0, "of the order of the rows: ours")
    micro_batch: int = flag(0, "texts encoded at a time with exact cached gradients, to bound memory; 0 is all at once")
    features: str = flag("", "cache of image features, shared by all runs on one image tower (default: OUTPUT/features)")
    max_bad_images: float = flag(0.01, "stop if a larger share of the images can't be read")
    save_every: int = flag(500, "steps between two saved states")
    workers: int = flag(min(CORES, 16), "processes a rank that decode images and tokenise")

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 1 if name in ("batch_size", "epochs", "save_every") else 0
            if name != "seed" and isinstance(value, (int, float)) and not least <= value < math.inf:
                raise InputError(f"--{name.replace('_', '-')} {value}: must be a number from {least} on")


BETAS, EPS = (0.9, 0.98), 1e-6  # not stated in the paper; open_clip's for ViT
MAX_LOGIT_SCALE = math.log(100)  # CLIP's
# What may differ when a run is resumed, since it does not change the result:
FREE_FLAGS = {"rows", "images", "output", "features", "max_bad_images", "micro_batch", "save_every", "workers"}

# ---------------------------------------------------------------- the ranks: torchrun's, or one plain process

PATIENCE = datetime.timedelta(hours=12)  # of one rank waiting for another, which may have more images to encode


def set_up_ranks():
    """Join torchrun's process group, or make one of a single process: the code below has one case. Returns the device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store, rank, world, bound = dist.HashStore(), 0, 1, {"device_id": device} if cuda else {}
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):  # on several machines the counts of restarts differ
            # torchrun keeps its store when it restarts: without a name space of its own a rank may read a dead one's address.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("nccl" if cuda else "gloo", world_size=world, rank=rank, store=store, **bound)
    return device


def write_text(path, pieces):
    with atomic_write(path) as file:
        file.writelines(pieces)


@contextlib.contextmanager
def reading(path):
    """Raise InputError for whatever the reader of a damaged file raises."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - safetensors, pickle and json each have their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path}: damaged, or another program's ({reason}); delete it") from None


def open_log(config):
    """Open OUTPUT/log.jsonl, locked against a second run. The lock is this process's, not that of its forked workers.

    Raises InputError also for a folder that has a model but no log: it is no run's, and would be overwritten.
    """
    path = os.path.join(config.output, "log.jsonl")
    if os.path.exists(os.path.join(config.output, "open_clip_model.safetensors")) and not os.path.exists(path):
        raise InputError(f"--output {config.output}: holds a model that is no run's; give another --output")
    log = open(path, "a+")  # noqa: SIM115 - for the whole run
    try:
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # else the file system knows no locks
            raise InputError(f"--output {config.output}: another paraclip.py is training there") from None
    return log


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
    if name.startswith("local-dir:") or os.path.isdir(name) and name not in BASELINES:
        for file in ("open_clip_config.json", "open_clip_model.safetensors"):
            if not os.path.isfile(os.path.join(path, file)):
                raise InputError(f"--model {name}: there is no {path}/{file}; has the run finished?")
        return f"local-dir:{path}", None
    model, _, weights = (":".join(BASELINES[name]) if name in BASELINES else name).partition(":")
    if model not in open_clip.list_models():
        raise InputError(f"--model {name}: none of {', '.join(BASELINES)}, no open_clip model and no run directory")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights not in tags and weights != "random" and not os.path.isfile(weights):
        hint = f"the tags of {model}: {', '.join(tags)}"
        if name == "laclip":
            hint = "download it from github.com/LijieFan/LaCLIP"
        raise InputError(f'--model {name}: "{weights}" is neither a tag nor a file ({hint}; "random" for fresh weights)')
    return model, weights


def load_model(name, device="cpu"):
    """An open_clip model in fp32 and eval mode, its image tower frozen, with its evaluation preprocessing and tokenizer.

    Eval mode also while training: no dropout (RoBERTa has some) and no moving batch statistics, so that a step is a
    function of weights and batch alone. Raises InputError.
    """
    model, weights = resolve(name)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are the parallelism
    torch.manual_seed(0)
    logging.disable(logging.ERROR)  # what open_clip logs of a failure, the InputError says
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):  # LaCLIP's file holds one
            if name in BASELINES:  # the activations of BASELINES are on purpose
                warnings.filterwarnings("ignore", "QuickGELU mismatch")
            clip = open_clip.create_model(model, None if weights == "random" else weights)
            tokenizer = open_clip.get_tokenizer(model)
    except pickle.UnpicklingError:
        raise InputError(f"--model {name}: {weights} pickles more than weights; refused") from None
    except Exception as error:  # noqa: BLE001 - open_clip raises whatever its parts raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"--model {name}: can't be loaded: {reason}") from None
    finally:
        logging.disable(logging.NOTSET)
    tower = text_tower(clip)
    causal = getattr(clip, "text_pool_type", getattr(tower, "pool_type", "")) == "argmax" and tower.attn_mask is not None
    if not is_huggingface(tower) and (not causal or getattr(tower, "cls_emb", None) is not None):
        raise InputError(f"--model {name}: its text tower is neither causal, pooled at the end token, nor Hugging Face's")
    clip.visual.requires_grad_(False)  # lock_image_tower() leaves the head of a timm tower free
    preprocess = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)
    return clip.to(device).eval(), preprocess, tokenizer


def text_tower(clip):
    """CustomTextCLIP keeps the text tower in `text`, CLIP its parts at the root."""
    return getattr(clip, "text", clip)


def is_huggingface(tower):
    return isinstance(tower, open_clip.hf_model.HFTextEncoder)


def fingerprint(module, *more):
    """SHA-256 of a module's weights and buffers, of the kinds of its layers (GELU or QuickGELU, say), and of `more`."""
    kinds = [(name, type(layer).__name__) for name, layer in module.named_modules()]
    digest = hashlib.sha256(json.dumps([kinds, *more]).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------- text side


class TextEncoder(torch.nn.Module):
    """CLIP's text tower and logit scale: all that trains, and what DistributedDataParallel wraps."""

    def __init__(self, clip, micro_batch=0, bf16=False):
        super().__init__()
        self.clip, self.micro_batch, self.bf16 = clip, micro_batch, bf16

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
        """Tokens of each text that can reach its feature: up to the end token (causal), or all but padding (RoBERTa)."""
        tower = text_tower(self.clip)
        if is_huggingface(tower):
            return (tokens != tower.config.pad_token_id).sum(1)
        return tokens.argmax(1) + 1

    def encode(self, tokens):
        """tokens [n, L], L <= 77 -> [n, D]: open_clip's own forward with positions and causal mask cut to L."""
        tower, length = text_tower(self.clip), tokens.shape[1]
        cut = {}
        if not is_huggingface(tower):
            prefix = "" if tower is self.clip else "text."
            cut[prefix + "positional_embedding"] = tower.positional_embedding[:length]
            cut[prefix + "attn_mask"] = tower.attn_mask[:length, :length]
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            _, text_features, *_ = functional_call(self.clip, cut, kwargs={"text": tokens}, tie_weights=False)
        return F.normalize(text_features.to(self.clip.logit_scale), dim=-1)  # once more: bf16 has normalised coarsely


# ---------------------------------------------------------------- image side: features of a frozen tower, computed once

SHARD = 8192  # images a file of the cache
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG", "")


@functools.lru_cache(maxsize=2)
def tar_members(path):
    """{member name: (offset, size)} of a tar file. Raises InputError for a member that points out of it."""
    members = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if not is_safe(member.name) or member.issym() or member.islnk():
                raise InputError(f'{path}: member "{member.name}" points out of the archive: no img2dataset shard')
            members[member.name.removeprefix("./")] = (member.offset_data, member.size)
    return members


def open_image(root, image_id):
    """The PIL image of a row: a file below `root`, or a member of the tar shard that its folder names.

    Raises FileNotFoundError, InputError, or what Pillow raises.
    """
    for extension in EXTENSIONS:
        path = os.path.join(root, image_id + extension)
        if os.path.isfile(path):
            return Image.open(path)
    folder, name = os.path.split(image_id)
    shard = os.path.join(root, folder) + ".tar"
    if folder and os.path.isfile(shard):
        members = tar_members(shard)
        for extension in EXTENSIONS:
            if name + extension in members:
                offset, size = members[name + extension]
                with open(shard, "rb") as file:
                    file.seek(offset)
                    return Image.open(io.BytesIO(file.read(size)))
    raise FileNotFoundError(f"no {os.path.join(root, image_id)}.jpg (.jpeg, .png, .webp)"
                            + (f", and not in {shard}" if folder else ""))


class Images(Dataset):
    """Preprocessed images [3, H, W]; `open_item(item)` gives a PIL image. Where that fails, the item is the exception."""

    def __init__(self, items, open_item, preprocess):
        self.items, self.open_item, self.preprocess = items, open_item, preprocess

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
                return self.preprocess(self.open_item(self.items[i]))
        except InputError as error:
            return error
        except Exception as error:  # noqa: BLE001 - Pillow raises OSError, SyntaxError, ValueError and others
            return OSError(" ".join(f"{type(error).__name__}: {error}".split()))  # one that crosses to another process


@torch.no_grad()
def encode_images(clip, images, workers, show=True):
    """Yield for each of `images` (like Images), in order, its L2-normalised feature [D] on the CPU or its exception."""
    device = clip.logit_scale.device
    cuda = device.type == "cuda"
    loader = DataLoader(images, 64 if cuda else 16, num_workers=workers, collate_fn=stack_good,
                        pin_memory=cuda, multiprocessing_context="fork" if workers else None)
    with tqdm(total=len(images), unit="image", desc="image features", mininterval=BAR_SECONDS,
              disable=not show or not len(images)) as bar:
        for good, errors in loader:
            good = good.to(device, clip.logit_scale.dtype, non_blocking=True)
            features = iter(clip.encode_image(good, normalize=True).float().cpu() if len(good) else ())
            bar.update(len(errors))
            yield from (error or next(features) for error in errors)


def stack_good(items):
    """The tensors among `items`, stacked, and for each item its exception or None."""
    good = [item for item in items if isinstance(item, torch.Tensor)]
    errors = [None if isinstance(item, torch.Tensor) else item for item in items]
    return torch.stack(good) if good else torch.empty(0), errors


def read_cache(files, mark, root=""):
    """(memory-mapped [n, D] arrays, {image_id: place in their concatenation}) of cache files.

    Raises InputError for a file with another fingerprint than `mark`, or made from another image root than `root`.
    """
    arrays, places, total = [], {}, 0
    for path in files:
        with reading(path), safe_open(path, "pt") as file:
            header = file.metadata()
            if header["fingerprint"] != mark:
                raise InputError(f"{path}: stale: features of another image tower or preprocessing; name another "
                                 "--features or delete this one")
            if root and header["images"] != os.path.realpath(root):
                raise InputError(f"{path}: features of the images in {header['images']}, not in --images {root}: name "
                                 "another --features, or leave out --images if the folder has only moved")
            arrays.append(file.get_tensor("features").numpy())
            places.update(zip(json.loads(header["image_ids"]), itertools.count(total)))
        total += len(arrays[-1])
    return arrays, places


def cache_image_features(clip, preprocess, image_ids, config):
    """Encode the images that the cache lacks, each rank its share, and return read_cache() of the whole.

    A cache file holds up to SHARD fp16 features with their ids and the fingerprint of tower and preprocessing; it is
    named by its ids and appears whole or not at all. Images that can't be read are named in OUTPUT/unreadable.txt, and
    tried again by the next run. Raises InputError if they are too many, and for a stale cache.
    """
    listed = os.path.join(config.output, "unreadable.txt")

    def check(unreadable):
        if unreadable or os.path.exists(listed):
            write_text(listed, unreadable)
        if len(unreadable) > config.max_bad_images * len(image_ids):
            raise InputError(f"more than {config.max_bad_images:.2%} of the images can't be read (--max-bad-images): see "
                             f"{listed}; the first: " + unreadable[0].strip().replace("\t", ": "))

    directory = config.features or os.path.join(config.output, "features")
    rank, world, patient = dist.get_rank(), dist.get_world_size(), dist.new_group(timeout=PATIENCE)
    os.makedirs(directory, exist_ok=True)
    files = [sorted(glob.glob(os.path.join(glob.escape(directory), "*.safetensors")))]
    dist.broadcast_object_list(files)  # rank 0's list: another run may be adding to the folder
    files, mark = files[0], fingerprint(clip.visual, clip.visual.preprocess_cfg)
    cached = read_cache(files, mark, config.images)[1]
    missing = sorted(image_id for image_id in image_ids if image_id not in cached)  # a tar's members together
    del cached  # at 5M images a gigabyte
    if missing and not os.path.isdir(config.images):
        raise InputError(f"--images {config.images or 'is not given'}: no such folder, and {len(missing):,} images have no "
                         "feature yet, which the loss needs")
    shards = [missing[start : start + SHARD] for start in range(0, len(missing), SHARD)][rank::world]
    images = Images(list(itertools.chain(*shards)), functools.partial(open_image, config.images), preprocess)
    if clip.logit_scale.is_cuda:
        torch.set_float32_matmul_precision("high")  # TF32: about 1e-3, as the cache's fp16
    unreadable, written = [], []
    with contextlib.closing(encode_images(clip, images, config.workers, show=rank == 0)) as features:
        for shard in shards:
            found = {}
            for image_id, feature in zip(shard, features):
                if isinstance(feature, InputError):
                    raise feature
                if isinstance(feature, Exception):
                    unreadable.append(f"{image_id}\t{feature}\n")
                else:
                    found[image_id] = feature.half()
            check(unreadable)
            if found:
                name = hashlib.sha256("\n".join(found).encode()).hexdigest()[:16] + ".safetensors"
                written.append(os.path.join(directory, name))
                header = {"fingerprint": mark, "images": os.path.realpath(config.images)}
                header["image_ids"] = json.dumps(list(found))
                with atomic_write(written[-1], "wb") as file:
                    file.write(save({"features": torch.stack(list(found.values()))}, header))
    torch.set_float32_matmul_precision("highest")
    everyones = [None] * world
    dist.all_gather_object(everyones, (unreadable, written), group=patient)
    if rank == 0:
        check(list(itertools.chain(*(lines for lines, _ in everyones))))
    dist.barrier()
    return read_cache(files + sorted({path for _, paths in everyones for path in paths} - set(files)), mark)


# ---------------------------------------------------------------- losses
#
#   paper           | here                  | shape
#   X_I             | features["I"]         | [N, D], the image tower's, frozen
#   X_T, X_T', X_T''| features["T" "T1" "T2"]| [N, D], the text tower's
#   N               | --batch-size          | examples over all ranks
#   1 / temperature | logit_scale           | scalar, the model's own, trains (not stated; ours)

TEXT_KEYS = dict(zip(("T", "T1", "T2"), ROW_KEYS[1:]))
BLOCK = 1024  # rows of an N x N similarity matrix held at a time, in backward too


def parse_loss(terms):
    """["I:T2", ...] -> [("I", "T2"), ...]. Raises InputError for anything but distinct pairs of two of I, T, T1, T2."""
    pairs = [tuple(term.split(":")) for term in terms]
    for term, pair in zip(terms, pairs):
        if len(pair) != 2 or not set(pair) <= {"I", *TEXT_KEYS} or pair[0] == pair[1]:
            raise InputError(f'--loss {term}: a term is a pair of I, T, T1, T2, such as "I:T2"')
    if len(set(map(frozenset, pairs))) < len(pairs):
        raise InputError(f"--loss {' '.join(terms)}: a term stands there twice")
    return pairs


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
        dist.all_gather_into_tensor(everyones, features.contiguous())
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


# ---------------------------------------------------------------- data


class Examples(Dataset):
    """The rows' texts in one block of bytes (5M rows: 1 GB, and few Python objects), and where their image features are."""

    def __init__(self, rows, kinds, tokenizer):
        """Read `rows` (read_rows): the texts of `kinds`, and image_ids, each once, in the order of the rows."""
        self.kinds, self.tokenizer, self.features = kinds, tokenizer, None
        self.text, ends, ids, image_of_row, self.crc32 = bytearray(), array.array("q", [0]), {}, array.array("q"), 0
        for row in rows:
            image_of_row.append(ids.setdefault(row["image_id"], len(ids)))
            self.crc32 = zlib.crc32("\n".join(row[key] for key in ROW_KEYS).encode("utf-8", "replace"), self.crc32)
            for kind in kinds:
                self.text += row[TEXT_KEYS[kind]].encode("utf-8", "replace")  # half an emoji, which JSON can hold
                ends.append(len(self.text))
        self.ends, self.image_of_row, self.image_ids = np.array(ends), np.array(image_of_row), list(ids)
        self.used = np.arange(len(image_of_row))  # rows: all but the ones whose image can't be read

    def use_features(self, arrays, places):
        """Take image features (read_cache), and only the rows that have one."""
        self.features = ConcatDataset(arrays)
        self.feature_of_row = np.array([places.get(image_id, -1) for image_id in self.image_ids])[self.image_of_row]
        self.used = np.flatnonzero(self.feature_of_row >= 0)

    def __len__(self):
        return len(self.used)

    def __getitem__(self, batch):
        """batch: [n] indices into the rows used -> ({kind: tokens [n, 77]}, image features [n, D] in fp16)."""
        rows = self.used[batch]
        tokens = {}
        for offset, kind in enumerate(self.kinds):
            texts = rows * len(self.kinds) + offset
            tokens[kind] = self.tokenizer([self.text[self.ends[i] : self.ends[i + 1]].decode() for i in texts])
        if self.features is None:  # no term names I
            return tokens, torch.empty(len(rows), 0)
        return tokens, torch.from_numpy(np.stack([self.features[i] for i in self.feature_of_row[rows]]))


def batches(count, config, first_step):
    """This rank's part of each global batch from `first_step` on: [n] indices into the rows used.

    Global batch b of an epoch is the b-th slice of one seeded permutation, cut into as many parts as there are ranks: the
    batches don't depend on the number of ranks. The last, short one is dropped.
    """
    rank, n = dist.get_rank(), config.batch_size // dist.get_world_size()
    for step in range(first_step, config.epochs * (count // config.batch_size)):
        epoch, b = divmod(step, count // config.batch_size)
        if b == 0 or step == first_step:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed + epoch)).numpy()
        yield order[b * config.batch_size :][rank * n : (rank + 1) * n]


# ---------------------------------------------------------------- optimizer and state


def make_optimizer(encoder, config):
    """AdamW over all that trains; weight decay on matrices alone (no gains, no biases, not the logit scale: ours)."""
    trained = [p for p in encoder.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, eps=EPS, fused=trained[0].is_cuda)


def cosine(step, steps):
    """Cosine annealing from 1 at step 0 towards 0 (Appendix A; no warm-up: ours)."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def save_state(encoder, optimizer, step, config):
    """Replace OUTPUT/state.pt by the state before `step`: what trains, the optimizer and the step, as plain types."""
    weights = {name: p.detach() for name, p in encoder.named_parameters() if p.requires_grad}
    state = io.BytesIO()  # torch.save straight to a full disk ends in an error of its own
    torch.save({"step": step, "seed": config.seed, "weights": weights, "optimizer": optimizer.state_dict()}, state)
    with atomic_write(os.path.join(config.output, "state.pt"), "wb") as file:
        file.write(state.getbuffer())


def load_state(encoder, optimizer, log, config):
    """Load OUTPUT/state.pt if there is one, cut the log to the steps before it, and return the step to resume at."""
    path = os.path.join(config.output, "state.pt")
    steps = [0] * dist.get_world_size()
    step = 0
    if os.path.exists(path):
        with reading(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            encoder.load_state_dict(state["weights"], strict=False)
            optimizer.load_state_dict(state["optimizer"])
            step = state["step"]
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise InputError(f"--output {config.output}: not the same folder on all machines (states of steps {steps})")
    if dist.get_rank() == 0:
        for part in glob.glob(glob.escape(config.output) + "/*.part*"):  # of a save that was killed
            os.remove(part)
        log.seek(0)
        for _ in range(step):
            log.readline()
        log.truncate(log.tell())
    return step


def check_same_run(record, path):
    """Raise InputError if the run that wrote config.json at `path` had other flags, rows or base model than `record`."""
    if not os.path.exists(path):
        return
    with reading(path), open(path) as file:
        before = json.load(file)
        before = {key: before[key] for key in ("flags", "rows", "base_model")}
    differ = [f"--{key.replace('_', '-')} (was {before['flags'].get(key)!r}, is {value!r})"
              for key, value in record["flags"].items() if key not in FREE_FLAGS and before["flags"].get(key) != value]
    differ += [f"{key} (was {before[key]}, is {record[key]})"
               for key in ("rows", "base_model") if before[key] != record[key]]
    if differ:
        raise InputError(f"{os.path.dirname(path)} is a run that began otherwise: {', '.join(differ)}; give what it had, "
                         "or another --output")


def describe(config, examples, base_model):
    """What config.json keeps: every flag, the rows, the base model, versions and git commit."""
    git = subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"],
                         check=False, capture_output=True, text=True)
    packages = {name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "numpy", "pillow")}
    return {"flags": dataclasses.asdict(config),
            "rows": {"count": len(examples), "crc32": examples.crc32},
            "base_model": dict(zip(("open_clip", "pretrained", "fingerprint"), (*resolve(config.model), base_model))),
            "versions": {"python": platform.python_version(), **packages},
            "git_commit": git.stdout.strip() or None}


def export(clip, tokenizer, config):
    """Write the model so that open_clip's "local-dir:OUTPUT" loads it; a Hugging Face tokenizer goes with it."""
    model_cfg = open_clip.get_model_config(resolve(config.model)[0])
    preprocess_cfg = {key: clip.visual.preprocess_cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    write_text(os.path.join(config.output, "open_clip_config.json"),
               json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}, indent=1))
    if isinstance(tokenizer, open_clip.tokenizer.HFTokenizer):
        tokenizer.save_pretrained(config.output)
    with atomic_write(os.path.join(config.output, "open_clip_model.safetensors"), "wb") as file:
        file.write(save({name: tensor.contiguous().cpu() for name, tensor in clip.state_dict().items()}))


# ---------------------------------------------------------------- the run


def print_plan(config, clip, examples, steps, first_step, device):
    """What is about to run, before step 0."""
    trained = sum(p.numel() for p in clip.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in clip.parameters()) - trained
    world = dist.get_world_size()
    print(f"model       {config.model} ({':'.join(filter(None, resolve(config.model)))})\n"
          f"loss        {' + '.join(config.loss)}\n"
          f"rows        {len(examples):,} used of {len(examples.image_of_row):,}, {len(examples.image_ids):,} images\n"
          f"batch       {config.batch_size:,} = {world} x {config.batch_size // world:,}, {world} {device.type} rank(s)\n"
          f"steps       {steps:,} ({config.epochs} epoch(s), last short batch dropped)"
          f"{f', from step {first_step:,}' if first_step else ''}\n"
          f"optimizer   AdamW, lr {config.lr:g} annealed to 0, betas {BETAS}, eps {EPS:g}, "
          f"weight decay {config.weight_decay:g}\n"
          f"parameters  {trained:,} trained, {frozen:,} frozen, {config.precision}", flush=True)


def train(encoder, optimizer, examples, pairs, steps, first_step, log, config):
    """Steps first_step ... steps - 1 on every rank. Raises InputError at a loss that is not finite."""
    world, started, spoken = dist.get_world_size(), time.time(), 0.0
    logit_scale = encoder.clip.logit_scale
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parallel = DistributedDataParallel(encoder, gradient_as_bucket_view=True)
    loader = DataLoader(examples, batch_size=None, sampler=list(batches(len(examples), config, first_step)),
                        num_workers=config.workers, multiprocessing_context="fork" if config.workers else None)
    for step, (tokens, image_features) in enumerate(loader, first_step):
        lr = config.lr * cosine(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        terms = loss_terms(parallel, tokens, image_features, pairs)
        (world * sum(terms.values())).backward()  # DDP takes the mean of the ranks' gradients; their shares want the sum

        values = torch.stack(list(terms.values())).detach()
        dist.all_reduce(values)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        entry = {"step": step, "loss": values.sum().item(), "terms": dict(zip(terms, values.tolist())), "lr": lr,
                 "logit_scale": logit_scale.exp().item(), "grad_norm": grad_norm.item()}  # before the update
        if not math.isfinite(entry["loss"] + entry["grad_norm"]):
            raise InputError(f"step {step}: loss {entry['loss']:.4g} with gradient norm {entry['grad_norm']:.4g} is not "
                             f"finite; {config.output}/state.pt, if there, is the last good state; a lower --lr may help")
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            logit_scale.clamp_(0, MAX_LOGIT_SCALE)

        if dist.get_rank() == 0:
            done, now = step + 1 - first_step, time.time()
            entry["examples_per_s"] = done * config.batch_size / (now - started)
            entry["eta_s"] = (steps - step - 1) * (now - started) / done
            log.write(json.dumps(entry) + "\n")
            log.flush()
            if now - spoken > 10 or step + 1 == steps:
                spoken = now
                shown = "  ".join(f"{name} {value:.4f}" for name, value in entry["terms"].items())
                left = datetime.timedelta(seconds=round(entry["eta_s"]))
                print(f"step {step:,} of {steps:,}  loss {entry['loss']:.4f}  ({shown})  "
                      f"{entry['examples_per_s']:,.0f} examples/s  {left} left", flush=True)
            if (step + 1) % config.save_every == 0 or step + 1 == steps:
                save_state(encoder, optimizer, step + 1, config)


def main():
    config = parse_flags(Config, __doc__)
    pairs = parse_loss(config.loss)
    device = set_up_ranks()
    world = dist.get_world_size()
    if config.batch_size % world:
        raise InputError(f"--batch-size {config.batch_size} can't be divided among {world} ranks")
    if config.precision == "auto":
        config.precision = "bf16" if device.type == "cuda" else "fp32"
    os.makedirs(config.output, exist_ok=True)
    log = open_log(config) if dist.get_rank() == 0 else None

    clip, preprocess, tokenizer = load_model(config.model, device)
    base_model = fingerprint(clip)
    kinds = [kind for kind in TEXT_KEYS if any(kind in pair for pair in pairs)]
    examples = Examples(read_rows(config.rows), kinds, tokenizer)
    if any("I" in pair for pair in pairs) and len(examples) >= config.batch_size:
        examples.use_features(*cache_image_features(clip, preprocess, examples.image_ids, config))
    steps = config.epochs * (len(examples) // config.batch_size)
    if not steps:
        raise InputError(f"--rows: {len(examples)} rows to train on are fewer than --batch-size {config.batch_size}")

    record, record_path = describe(config, examples, base_model), os.path.join(config.output, "config.json")
    check_same_run(record, record_path)
    encoder = TextEncoder(clip, config.micro_batch, config.precision == "bf16")
    optimizer = make_optimizer(encoder, config)
    first_step = load_state(encoder, optimizer, log, config)
    if dist.get_rank() == 0:
        write_text(record_path, json.dumps(record, indent=1))
        print_plan(config, clip, examples, steps, first_step, device)
    train(encoder, optimizer, examples, pairs, steps, first_step, log, config)
    if dist.get_rank() == 0:
        export(clip, tokenizer, config)
        print(f"done: {config.output} is an open_clip model, local-dir:{config.output}")
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
