"""ParaCLIP, section 3.2: every figure of Tables 1 and 2, and Figure 3, for any number of models.

    python evaluate.py openai runs/openai --data benchmarks/ --json results.json
    python evaluate.py openai --data benchmarks/ --tasks paraphrase coco
    python evaluate.py openai runs/openai --data benchmarks/ --tasks paraphrase --gallery figure3.png

A row a model, with the paper's figure under ours and the difference to the first model. A benchmark whose files are not
below --data says `not run`, and which file it wants. Figures are exact functions of the features: see fixed_point.
"""

import collections
import dataclasses
import functools
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import open_clip
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from generate import (
    BAR_SECONDS,
    InputError,
    atomic_write,
    flag,
    json_lines,
    parse_flags,
    run,
    text_lines,
)
from paraclip import (
    BASELINES,
    CORES,
    Images,
    TextEncoder,
    encode_images,
    fingerprint,
    load_model,
    resolve,
)

COLUMNS = {"paraphrase": ("AO@10", "JS@10"), "vg-r": ("VG-R",), "vg-a": ("VG-A",), "sts": ("STS",),
           "imagenet": ("Clsf",), "coco": ("T R@5", "I R@5")}  # Table 1's, in its order, by the task that fills them
ALL = [column for task in COLUMNS.values() for column in task]


@dataclass
class Config:
    models: Sequence[str] = flag([], "as paraclip.py's --model: openai, ... (section 3.1), MODEL:TAG, MODEL:FILE, "
                            "local-dir:DIR or a run directory; each a row, compared with the first",
                        positional=True, metavar="MODEL")
    data: str = flag("", "folder of the benchmarks; the table names each file it does not find there", required=True,
                     metavar="DIR")
    tasks: Sequence[str] = flag(list(COLUMNS), "which columns of Table 1 to fill", choices=list(COLUMNS), metavar="TASK")
    coco: str = flag("val2017", "captions of the COCO columns: 5,000 images, first five captions each; the paper does "
                     "not say which, its figures fit val2017", choices=["val2017", "karpathy"])
    json: str = flag("", "write figures, counts, sub-scores, fingerprints and versions here", metavar="FILE")
    gallery: str = flag("", "draw Figure 3 here: the three pairs of queries for which AO@10 of the first two models "
                            "differs most, either way", metavar="FILE.png")
    queries: Sequence[str] = flag([], "draw these two in --gallery instead", nargs=2, metavar=("A", "B"))
    precision: str = flag("fp32", "of the encoders; bf16 is faster and moves figures by about 0.1; not stated; ours",
                          choices=["fp32", "bf16"])
    workers: int = flag(min(CORES, 16), "processes that decode images; ours", metavar="N")

    def __post_init__(self):
        if self.workers < 0:
            raise InputError(f"--workers {self.workers}: too few")
        if self.queries and not self.gallery:
            raise InputError("--queries: name the picture to draw with --gallery FILE.png")
        if not os.path.isdir(self.data):
            raise InputError(f"--data {self.data}: no such folder")
        for path in filter(None, (self.json, self.gallery)):
            if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
                raise InputError(f"{path}: can't be written: a folder, or in no folder that there is")


# ---------------------------------------------------------------- encoding

TEXTS_AT_ONCE = 4096  # that TextEncoder sorts by length and encodes in chunks


def fixed_point(features):
    """[n, D] of any dtype -> float64, L2-normalised, rounded to multiples of 2^-26.

    A product of two is then a multiple of 2^-52, and float64 holds every partial sum of a cosine exactly. So a score
    does not depend on block sizes, threads or the device, and equal features tie to the last bit.
    """
    return (F.normalize(features.double(), dim=-1) * 2**26).round() / 2**26


@functools.cache
def digest(path):
    """SHA-256 of a file. Raises InputError."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).digest()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; the benchmark names this image: copy it there") from None


def open_crop(item):
    """The PIL image of (path, box), cropped before any preprocessing; box: (left, upper, right, lower), or None."""
    path, box = item
    return Image.open(path).convert("RGB").crop(box) if box else Image.open(path)


def look_up(cache, keys, items, encode):
    """[n, D] features (fixed_point) of n items, those whose key `cache` lacks encoded first, each once."""
    missing = {key: item for key, item in zip(keys, items) if key not in cache}
    if missing:
        cache.update(zip(missing, encode(list(missing.values())), strict=True))
    return fixed_point(torch.stack([cache[key] for key in keys]))


def encoders(clip, preprocess, tokenizer, image_cache, config):
    """A model as two functions: text(n texts) and image(n pairs (path, box)), each -> [n, D] of fixed_point.

    Texts equal in their tokens are encoded once, and so are equal boxes of equal files: these score the same and tie.
    Both raise InputError.
    """
    device, bf16 = clip.logit_scale.device, config.precision == "bf16"
    text_encoder, text_cache = TextEncoder(clip, bf16=bf16), {}

    @torch.no_grad()
    def encode_tokens(tokens):
        with tqdm(total=len(tokens), desc="text features", unit="text", leave=False, delay=3, mininterval=BAR_SECONDS) as bar:
            for block in torch.stack(tokens).split(TEXTS_AT_ONCE):
                yield from text_encoder(block)[0].float().cpu()
                bar.update(len(block))

    def encode_crops(items):
        images = Images(items, open_crop, preprocess)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            features = list(encode_images(clip, images, config.workers))
        for (path, _), feature in zip(items, features):
            if isinstance(feature, Exception):
                raise InputError(f"{path}: can't be read as an image ({feature}); get the benchmark's file again")
        return features

    def text(texts):
        tokens = tokenizer(list(texts))
        return checked(look_up(text_cache, [row.tobytes() for row in tokens.numpy()], tokens, encode_tokens))

    def image(items):
        return checked(look_up(image_cache, [(digest(path), box) for path, box in items], items, encode_crops))

    def checked(features):
        if not features.isfinite().all():
            raise InputError("the model's features are not finite: its weights are damaged")
        return features.to(device)

    return text, image


# ---------------------------------------------------------------- metrics


def rank(queries, gallery, k=10):
    """Indices [n, min(k, m)] of the best of m items for each of n queries, by (-cosine, index): ties by lower index.

    queries [n, D], gallery [m, D], both fixed_point. The n x m scores are never held whole.
    """
    ranked = [torch.sort(block @ gallery.T, descending=True, stable=True).indices[:, :k].contiguous()
              for block in queries.split(256)]
    return torch.cat(ranked).cpu()


def common(a, b):
    """|a[:d] & b[:d]| for d = 1..k: [n, k] of two rankings [n, k], in each of which no item is twice (see rank)."""
    return (a[:, :, None] == b[:, None, :]).cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2)


def average_overlap(a, b):
    """Column AO@10, equation 1: AO@k(a, b) = 1/k * sum over d=1..k of |a[:d] & b[:d]| / d. Returns AO@1..k, [n, k]."""
    d = torch.arange(1, a.shape[1] + 1).double()
    return (common(a, b) / d).cumsum(1) / d


def jaccard(a, b):
    """Column JS@10, equation 2: JS@k(a, b) = |a[:k] & b[:k]| / |a[:k] | b[:k]|. Returns JS@1..k, [n, k]."""
    both = common(a, b).double()
    return both / (2 * torch.arange(1, a.shape[1] + 1) - both)


def recall(ranked, found, wanted, k):
    """Columns T R@5, I R@5, and Clsf (k = 1): is one of the first k of each query's ranking a positive? [n] bools.

    ranked [n, >= k] indices of items; found [m], wanted [n]: the labels of items and queries. Every item with the
    query's label is a positive; one is enough.
    """
    return (found[ranked[:, :k]] == wanted[:, None]).any(1)


def prefers_true(true, false):
    """Columns VG-R and VG-A: is cos(image, true caption) > cos(image, false caption)? A tie is wrong."""
    return true > false


def spearman(scores, golds):
    """Column STS: 100 x Spearman's rho, ties at their average rank; None where all scores or all golds are equal."""
    if len(set(scores)) < 2 or len(set(golds)) < 2:
        return None
    return 100 * float(scipy.stats.spearmanr(scores, golds).statistic)


def percent(values):
    """100 x the mean of a list or vector; of right and wrong answers, the micro accuracy."""
    return (100 * torch.as_tensor(values).double()).mean().item()


def by_group(correct, groups):
    """{group: accuracy in percent}, sorted by group. The unweighted mean of its values is the macro accuracy."""
    answers = collections.defaultdict(list)
    for answer, group in zip(correct.tolist(), groups):
        answers[group].append(answer)
    return {group: percent(answers[group]) for group in sorted(answers)}


# ---------------------------------------------------------------- benchmarks: files, and what is wrong with them

SOURCES = {  # by the first folder or file below --data
    "coco": "from cocodataset.org: val2017.zip, annotations_trainval2017.zip; --coco karpathy: val2014.zip and Karpathy's "
            "caption_datasets.zip",
    "paraphrased_retrieval.jsonl": 'holds lines of {"query", "paraphrase"[, "image_id"]}: the 4,155 pairs of Cheng et al. '
                                   "2024, arXiv 2405.03190; no public download is known",
    "aro": "from github.com/mertyg/vision-language-models-are-bows",
    "sts": "from SentEval's downstream data: github.com/facebookresearch/SentEval",
    "imagenet": "from image-net.org: the ILSVRC 2012 validation images, in a folder for each wnid",
}


class NotThere(Exception):
    """A benchmark's file is missing: the cell says `not run`."""


def want(config, path):
    """The path of a benchmark's file or folder, given below --data with /. Raises NotThere."""
    if not os.path.exists(os.path.join(config.data, path)):
        raise NotThere(f"{os.path.join(config.data, path)} is not there ({SOURCES[path.split('/')[0]]})")
    return os.path.join(config.data, path)


def fields(entry, place, **kinds):
    """The values of a JSON object's keys, each of the type that `kinds` gives. Raises InputError, naming `place`."""
    for key, kind in kinds.items():
        value = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(value, kind) or value == [] or isinstance(value, str) and not value.strip():
            raise InputError(f'{place}: "{key}" is missing, empty or of the wrong type; get the file again')
    return [entry[key] for key in kinds]


def read_json(path):
    """The content of a JSON file. Raises InputError at file:line."""
    try:
        return json.loads("\n".join(line for _, line in text_lines(path)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON, or cut off ({error}); get it again") from None


# ---------------------------------------------------------------- paraphrased retrieval: AO@10, JS@10


def gallery_images(config):
    """The paths of the images to retrieve from, sorted by name."""
    images = sorted(glob.glob(os.path.join(glob.escape(want(config, "coco/val2017")), "*.jpg")))
    if len(images) < 10:
        raise InputError(f"{config.data}/coco/val2017: {len(images)} .jpg images, and AO@10 takes 10 at least")
    return images


def read_paraphrases(config, images):
    """(query, paraphrase, index of the gold image or -1) of each line; images: gallery_images()."""
    path = want(config, "paraphrased_retrieval.jsonl")
    places = {os.path.basename(image).removesuffix(".jpg"): index for index, image in enumerate(images)}
    pairs = []
    for number, entry in json_lines(path):
        query, paraphrase = fields(entry, f"{path}:{number}", query=str, paraphrase=str)
        gold = str(entry.get("image_id", "")).removesuffix(".jpg")
        gold = gold if gold in places else gold.zfill(12)  # COCO's ids are file names without leading zeros
        if "image_id" in entry and gold not in places:
            raise InputError(f"{path}:{number}: image_id {entry['image_id']} is none of {config.data}/coco/val2017")
        pairs.append((query, paraphrase, places.get(gold, -1)))
    if not pairs:
        raise InputError(f"{path}: empty")
    return pairs


def rank_pairs(images, pairs, text, image):
    """The ten best images for query A and for query B of each pair: two [n, 10]."""
    gallery = image([(path, None) for path in images])
    return [rank(text(queries), gallery) for queries in list(zip(*pairs))[:2]]


def paraphrased_retrieval(config, text, image):
    """AO@10 and JS@10 of the image rankings for a query and for its paraphrase, means over pairs (section 3.2)."""
    images = gallery_images(config)
    pairs = read_paraphrases(config, images)
    a, b = rank_pairs(images, pairs, text, image)
    overlap, similarity = ([percent(column) for column in metric(a, b).T] for metric in (average_overlap, jaccard))
    return {"figures": {"AO@10": overlap[-1], "JS@10": similarity[-1]},
            "counts": {"pairs": len(pairs), "images": len(images)},
            "sub_scores": {f"{name}@{k}": value for name, values in (("AO", overlap), ("JS", similarity))
                           for k, value in enumerate(values, 1)}}


# ---------------------------------------------------------------- Visual Genome relation, attribution (ARO): VG-R, VG-A

SYMMETRIC = frozenset("""
    adjusting, around, attached to, beside, between, bigger than, biting, boarding, brushing, by, chewing, cleaning,
    climbing, close to, coming from, coming out of, contain, crossing, dragging, draped over, drinking, drinking
    from, driving, driving down, driving on, eating from, eating in, enclosing, exiting, facing, filled with,
    floating in, floating on, flying, flying above, flying in, flying over, flying through, full of, going down,
    going into, going through, grazing in, growing in, growing on, guiding, hanging from, hanging in, hanging off,
    hanging over, higher than, holding onto, hugging, in between, jumping off, jumping on, jumping over, kept in,
    larger than, leading, leaning over, leaving, licking, longer than, looking in, looking into, looking out,
    looking over, looking through, lying next to, lying on top of, making, mixed with, mounted on, moving, near,
    next to, of, on the back of, on the edge of, on the front of, on the other side of, on the side of, opening,
    painted on, parked at, parked beside, parked by, parked in, parked in front of, parked near, parked next to,
    perched on, petting, piled on, playing, playing in, playing on, playing with, pouring, reaching for, reading,
    reflected on, riding on, running in, running on, running through, seen through, sitting behind, sitting beside,
    sitting by, sitting in front of, sitting near, sitting next to, sitting under, skiing down, skiing on, sleeping
    in, sleeping on, smiling at, sniffing, splashing, sprinkled on, stacked on, standing against, standing around,
    standing behind, standing beside, standing in front of, standing near, standing next to, staring at, stuck in,
    surrounding, swimming in, swinging, talking to, topped with, touching, traveling down, traveling on, tying,
    typing on, underneath, wading in, waiting for, walking across, walking by, walking down, walking next to,
    walking through, with, working in, working on, worn on, wrapped around, wrapped in
""".replace("\n    ", " ").strip().split(", "))  # relations that hold both ways: VG-R's two captions are then both true
MIN_EXAMPLES = 25  # of an attribute pair, for VG-A


def read_aro(config, file, group_of, **kinds):
    """(group, (image path, box), true caption, false caption) of each example; group: group_of(its fields `kinds`)."""
    path, folder = want(config, f"aro/{file}"), want(config, "aro/images")
    content, examples = read_json(path), []
    if not isinstance(content, list) or not content:
        raise InputError(f"{path}: no list of examples; get the file again")
    for number, entry in enumerate(content):
        place = f"{path}: example {number}"
        name, true, false = fields(entry, place, image_path=str, true_caption=str, false_caption=str)
        x, y, w, h = fields(entry, place, **dict.fromkeys(("bbox_x", "bbox_y", "bbox_w", "bbox_h"), (int, float)))
        if not (w > 0 and h > 0):
            raise InputError(f"{place}: a box of {w} x {h} pixels")
        group = group_of(*fields(entry, place, **kinds))
        examples.append((group, (os.path.join(folder, name), (x, y, x + w, y + h)), true, false))
    return examples


def aro_figures(column, examples, groups, text, image):
    """Macro accuracy in percent over the examples of `groups`: of each group, then the unweighted mean."""
    used = [example for example in examples if example[0] in groups]
    if not used:
        raise InputError(f"{column}: no group of its {len(examples)} examples counts (VG-R drops symmetric relations, "
                         f"VG-A attribute pairs with fewer than {MIN_EXAMPLES} examples)")
    names, crops, true, false = zip(*used)
    image_features = image(crops)
    correct = prefers_true(*((image_features * text(captions)).sum(1) for captions in (true, false)))
    accuracy = by_group(correct, names)
    return {"figures": {column: fmean(accuracy.values())},
            "counts": {"pairs": len(examples), "pairs_counted": len(used), "groups": len(accuracy)},
            "sub_scores": {"macro": fmean(accuracy.values()), "micro": percent(correct), "by_group": accuracy}}


def vg_relation(config, text, image):
    """VG-R: does the crop prefer "X relation Y" to "Y relation X"? Mean over relations without the symmetric ones."""
    examples = read_aro(config, "visual_genome_relation.json", str, relation_name=str)
    return aro_figures("VG-R", examples, {group for group, *_ in examples} - SYMMETRIC, text, image)


def vg_attribution(config, text, image):
    """VG-A: does the crop prefer its two attributes as they are to the two swapped? Mean over ordered pairs of them."""
    examples = read_aro(config, "visual_genome_attribution.json", lambda two: "_".join(map(str, two)), attributes=list)
    sizes = collections.Counter(group for group, *_ in examples)
    return aro_figures("VG-A", examples, {group for group, size in sizes.items() if size >= MIN_EXAMPLES}, text, image)


# ---------------------------------------------------------------- semantic textual similarity: STS

SUBSETS = {  # of the SemEval years; a file of another name does not count (STS13's SMT has golds alone)
    "STS12": "MSRpar MSRvid SMTeuroparl surprise.OnWN surprise.SMTnews",
    "STS13": "FNWN headlines OnWN",
    "STS14": "deft-forum deft-news headlines images OnWN tweet-news",
    "STS15": "answers-forums answers-students belief headlines images",
    "STS16": "answer-answer headlines plagiarism postediting question-question",
}


def columns(path, at_least):
    """Yield (file:line, fields) of a file of tab-separated lines; quotes are text. Raises InputError.

    A blank line counts where one field is enough: it is a pair without a gold score.
    """
    if not os.path.getsize(path):
        raise InputError(f"{path}: empty; get the file again")
    for number, line in text_lines(path):
        if at_least > 1 and not line.strip():
            continue
        row = line.split("\t")
        if len(row) < at_least:
            raise InputError(f"{path}:{number}: {len(row)} tab-separated fields, where {at_least} belong; get it again")
        yield f"{path}:{number}", row


def score(word, place):
    """A gold score. Raises InputError."""
    if not re.fullmatch(r"\s*[0-5](\.\d*)?\s*", word) or float(word) > 5:
        raise InputError(f'{place}: "{word}" is no score from 0 to 5')
    return float(word)


def read_year(config, year):
    """Yield (sub-set, sentence 1, sentence 2, gold) of STS12 ... STS16; pairs with an empty gold are not scored."""
    for subset in SUBSETS[year].split():
        paths = []
        for kind in ("input", "gs"):
            names = [f"sts/{year}-en-test/{prefix}.{kind}.{subset}.txt" for prefix in ("STS", f"STS20{year[3:]}")]
            there = [name for name in names if os.path.exists(os.path.join(config.data, name))]
            paths.append(want(config, (there or names)[0]))
        sentences, golds = list(columns(paths[0], 2)), list(columns(paths[1], 1))
        if len(sentences) != len(golds):
            raise InputError(f"{paths[0]} has {len(sentences)} lines, {paths[1]} has {len(golds)}: one is cut off")
        yield from ((subset, *row[:2], score(gold, place)) for (_, row), (place, [gold, *_]) in zip(sentences, golds)
                    if gold.strip())


def read_sts_b(config, _):
    """Yield the pairs of the STS benchmark's test split: genre, file, year, id, gold, two sentences[, two sources]."""
    for place, row in columns(want(config, "sts/STSBenchmark/sts-test.csv"), 7):
        yield row[0], *row[5:7], score(row[4], place)


def read_sick(config, _):
    """Yield the pairs of SICK's test split, its columns found by its header."""
    path = want(config, "sts/SICK/SICK_test_annotated.txt")
    rows = columns(path, 5)
    _, header = next(rows, ("", []))
    wanted = ("sentence_A", "sentence_B", "relatedness_score")
    if not set(wanted) <= set(header):
        raise InputError(f"{path}:1: a header with {', '.join(wanted)} is wanted; get the file again")
    for place, row in rows:
        *sentences, gold = (row[header.index(name)] for name in wanted)
        yield "test", *sentences, score(gold, place)


STS = {**dict.fromkeys(SUBSETS, read_year), "STS-B": read_sts_b, "SICK-R": read_sick}


def sts(config, text, _):
    """STS: Spearman's rho of cosines and golds, mean over the tasks; a year's sub-sets are one list ('all' setting)."""
    want(config, "sts")
    result = {"figures": {}, "counts": {}, "sub_scores": {}, "not_run": {}}
    for task, read in STS.items():
        try:
            pairs = list(read(config, task))
        except NotThere as missing:
            result["not_run"][task] = str(missing)
            continue
        if not pairs:
            raise InputError(f"{config.data}/sts: {task} has no scored pair; get it again")
        subsets, first, second, golds = zip(*pairs)
        features = text(first + second)
        # rounded, so that pairs of equal sentences tie: their cosines are 1, but for the last bits
        scores = (features[: len(pairs)] * features[len(pairs) :]).sum(1).round(decimals=6).tolist()
        rho = {"all": spearman(scores, golds)}
        if rho["all"] is None:
            raise InputError(f"{task}: Spearman's rho is undefined, all golds or all cosines are equal: the file or "
                             "the model is damaged")
        for subset in dict.fromkeys(subsets):
            rho[subset] = spearman(*zip(*((s, g) for s, g, name in zip(scores, golds, subsets) if name == subset)))
        result["counts"][task], result["sub_scores"][task] = len(pairs), rho
    if result["counts"]:
        result["figures"]["STS"] = fmean(rho["all"] for rho in result["sub_scores"].values())
    return result


# ---------------------------------------------------------------- ImageNet-1K zero-shot top-1: Clsf


def zero_shot_weights(text):
    """[1000, D]: of each class, the normalised mean of the normalised features of its name in 80 templates."""
    classes, templates = open_clip.IMAGENET_CLASSNAMES, open_clip.OPENAI_IMAGENET_TEMPLATES
    prompts = text([template(name) for name in classes for template in templates])
    return fixed_point(prompts.unflatten(0, (len(classes), len(templates))).mean(1))


def imagenet(config, text, image):
    """Clsf: top-1 accuracy in percent on the validation images; sorted wnids are in open_clip's order of classes."""
    folder, classes = want(config, "imagenet/val"), len(open_clip.IMAGENET_CLASSNAMES)
    wnids = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if len(wnids) != classes or not all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids):
        raise InputError(f"{folder}: {len(wnids)} folders, where the {classes} wnids (n01440764, ...) are wanted: "
                         "their order gives the classes their names")
    paths = [sorted(glob.glob(os.path.join(glob.escape(folder), wnid, "*.JPEG"))) for wnid in wnids]
    for wnid, found in zip(wnids, paths):
        if not found:
            raise InputError(f"{folder}/{wnid}: no image (*.JPEG); get the validation images again")
    labels = torch.arange(classes).repeat_interleave(torch.tensor([len(found) for found in paths]))
    ranked = rank(image([(path, None) for found in paths for path in found]), zero_shot_weights(text), 5)
    top1, top5 = (percent(recall(ranked, torch.arange(classes), labels, k)) for k in (1, 5))
    return {"figures": {"Clsf": top1}, "counts": {"images": len(labels), "classes": classes},
            "sub_scores": {"top-1": top1, "top-5": top5}}


# ---------------------------------------------------------------- COCO: T R@5, I R@5


def read_val2017(config):
    """{image path: all its captions, in the file's order} of the 5,000 images of COCO val2017."""
    path, folder = want(config, "coco/annotations/captions_val2017.json"), want(config, "coco/val2017")
    images, annotations = fields(read_json(path), path, images=list, annotations=list)
    names = dict(fields(entry, f"{path}: image {i}", id=(int, str), file_name=str) for i, entry in enumerate(images))
    captions = {name: [] for name in names.values()}
    for i, entry in enumerate(annotations):
        image_id, caption = fields(entry, f"{path}: annotation {i}", image_id=(int, str), caption=str)
        if image_id not in names:
            raise InputError(f"{path}: annotation {i}: image_id {image_id} is none of its images; get the file again")
        captions[names[image_id]].append(caption)
    return {os.path.join(folder, name): texts for name, texts in captions.items()}


def read_karpathy(config):
    """The same of the 5,000 images of Karpathy's test split."""
    path, captions = want(config, "coco/karpathy/dataset_coco.json"), {}
    for i, entry in enumerate(fields(read_json(path), path, images=list)[0]):
        place = f"{path}: image {i}"
        folder, name, split, sentences = fields(entry, place, filepath=str, filename=str, split=str, sentences=list)
        if split == "test":
            texts = [fields(sentence, place, raw=str)[0] for sentence in sentences]
            captions[os.path.join(want(config, f"coco/{folder}"), name)] = texts
    return captions


def coco(config, text, image):
    """T R@5: percent of the images that find one of their five captions. I R@5: of the captions that find their image.

    A caption of another image is no positive, even if it has the same words.
    """
    captions = {"val2017": read_val2017, "karpathy": read_karpathy}[config.coco](config)
    paths = sorted(captions)
    for path in paths or [config.coco]:
        if not captions.get(path):
            raise InputError(f"{path}: no caption in the file of captions; get it again")
    texts = [(caption, index) for index, path in enumerate(paths) for caption in captions[path][:5]]
    image_of_text, image_of_image = torch.tensor([index for _, index in texts]), torch.arange(len(paths))
    image_features, text_features = image([(path, None) for path in paths]), text([caption for caption, _ in texts])
    to_text, to_image = rank(image_features, text_features), rank(text_features, image_features)
    scores = {f"T R@{k}": percent(recall(to_text, image_of_text, image_of_image, k)) for k in (1, 5, 10)}
    scores |= {f"I R@{k}": percent(recall(to_image, image_of_image, image_of_text, k)) for k in (1, 5, 10)}
    return {"figures": {name: scores[name] for name in COLUMNS["coco"]},
            "counts": {"images": len(paths), "captions": len(texts)}, "sub_scores": scores}


TASKS = {  # the benchmark, and the counts of the paper's files
    "paraphrase": (paraphrased_retrieval, {"pairs": 4155, "images": 5000}),
    "vg-r": (vg_relation, {"pairs": 23937}),
    "vg-a": (vg_attribution, {"pairs": 28748}),
    "sts": (sts, {"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS16": 1186, "STS-B": 1379,
                  "SICK-R": 4927}),
    "imagenet": (imagenet, {"images": 50000}),
    "coco": (coco, {"images": 5000, "captions": 25000}),
}


# ---------------------------------------------------------------- Figure 3

WIDTH, FRAME, GOLD = 1200, 7, "#f0a800"  # pixels, pixels, colour of the gold image's frame


def gallery_pairs(config):
    """Images and pairs to draw: the file's, or what --queries gives, its gold image if a line of the file has one of them."""
    images, pairs = gallery_images(config), []
    try:
        pairs = read_paraphrases(config, images)
    except NotThere:
        if not config.queries:
            raise
    if config.queries:
        gold = [gold for *texts, gold in pairs if set(texts) & set(config.queries)]
        pairs = [(*config.queries, (gold or [-1])[0])]
    return images, pairs


def text_strip(text, width, size):
    """A picture `width` pixels wide with the text, broken into lines."""
    font, lines = ImageFont.load_default(size), []
    while text := text.strip():
        end = len(text)
        while end > 1 and font.getlength(text[:end]) > width - 2 * FRAME:
            end -= 1
        if end < len(text) and " " in text[:end]:
            end = text.rindex(" ", 0, end)
        lines.append(text[:end])
        text = text[end:]
    strip = Image.new("RGB", (width, round(1.3 * size) * len(lines) + 6), "white")
    ImageDraw.Draw(strip).multiline_text((FRAME, 2), "\n".join(lines), "black", font, spacing=0.3 * size)
    return strip


def join(pictures, axis):
    """The pictures side by side (axis 0) or one below the other (axis 1), on white."""
    sizes = [sum(p.size[0] for p in pictures), sum(p.size[1] for p in pictures)]
    sizes[1 - axis] = max(p.size[1 - axis] for p in pictures)
    canvas, at = Image.new("RGB", sizes, "white"), [0, 0]
    for picture in pictures:
        canvas.paste(picture, tuple(at))
        at[axis] += picture.size[axis]
    return canvas


def draw_gallery(config, rankings):
    """Figure 3: for queries A and B of three pairs, the five best images of the first two models, the gold one framed.

    The pairs are those whose AO@10 differs most, either way; with one model, the first. rankings: of each model,
    rank_pairs() of gallery_pairs().
    """
    (images, pairs), rankings = gallery_pairs(config), rankings[:2]
    overlaps = [average_overlap(a, b)[:, -1] for a, b in rankings]
    chosen = (overlaps[-1] - overlaps[0]).abs().argsort(descending=True, stable=True)[:3].tolist()
    width = WIDTH // len(rankings)
    side = (width - 2 * FRAME) // 5 - 2 * FRAME
    gap = Image.new("RGB", (width - 5 * (side + 2 * FRAME), 1), "white")  # right of each model's tiles
    strips = [join([text_strip(name, width, 24) for name in config.models[:2]], 0)]
    for pair in chosen:
        strips.append(Image.new("RGB", (WIDTH, 2), "black"))
        for letter, texts, lists in zip("AB", pairs[pair], zip(*rankings)):
            strips.append(text_strip(f"{letter}: {texts}", WIDTH, 20))
            tiles = []
            for top in lists:
                for index in top[pair, :5].tolist():
                    tile = ImageOps.fit(Image.open(images[index]).convert("RGB"), (side - 2, side - 2))
                    tile = ImageOps.expand(tile, 1, "gray")
                    tiles.append(ImageOps.expand(tile, FRAME, GOLD if index == pairs[pair][2] else "white"))
                tiles.append(gap)
            strips.append(join(tiles, 0))
        strips.append(join([text_strip(f"AO@10 of A and B: {100 * ao[pair]:.1f}", width, 16) for ao in overlaps], 0))
    if any(pairs[pair][2] >= 0 for pair in chosen):
        strips.append(text_strip("Framed: the gold image of the pair", WIDTH, 16))
    with atomic_write(config.gallery, "wb") as file:
        join(strips, 1).save(file, "PNG")


# ---------------------------------------------------------------- the table, beside the paper's

PARACLIP = "I:T2 T:T1 T1:T2"  # L1'' + L2 + L3
PAPER = {  # (baseline, losses it was fine-tuned with): AO@10, JS@10, VG-R, VG-A, STS, Clsf, T R@5, I R@5
    ("openai", ""): (67.2, 57.7, 59.7, 63.2, 65.1, 63.4, 75.0, 54.8),  # Table 1
    ("openai", PARACLIP): (72.2, 63.3, 60.7, 64.3, 72.2, 63.5, 77.0, 58.8),  # in Table 2, VG-R is 60.4 and VG-A 64.2
    ("openclip-400m", ""): (67.6, 58.9, 46.4, 57.8, 67.2, 60.2, 76.5, 59.4),
    ("openclip-400m", PARACLIP): (71.3, 62.9, 55.4, 61.7, 70.1, 60.8, 76.1, 59.4),
    ("openclip-2b", ""): (70.6, 62.1, 45.0, 61.8, 69.6, 66.5, 80.2, 64.8),
    ("openclip-2b", PARACLIP): (73.2, 65.1, 58.8, 65.4, 71.6, 65.5, 80.4, 63.3),
    ("openclip-roberta", ""): (72.5, 64.0, 35.6, 64.5, 71.0, 61.8, 78.8, 62.6),
    ("openclip-roberta", PARACLIP): (74.5, 66.2, 43.2, 66.5, 72.5, 61.4, 79.4, 62.0),
    ("laclip", ""): (69.9, 62.1, 50.6, 63.6, 58.8, 64.5, 68.1, 55.5),
    ("laclip", PARACLIP): (73.5, 65.8, 60.6, 64.6, 71.4, 64.5, 73.6, 58.0),
    # Table 2, the rows that are not in Table 1
    ("openai", "I:T"): (68.9, 59.9, 58.0, 62.4, 68.7, 63.7, 75.8, 58.0),
    ("openai", "T:T1 T1:T2"): (70.5, 61.2, 61.5, 65.1, 74.5, 56.7, 74.6, 51.8),
    ("openai", "I:T I:T1"): (70.4, 61.7, 58.2, 63.0, 69.1, 64.0, 76.3, 58.7),
    ("openai", "I:T I:T1 I:T2"): (71.3, 62.8, 58.9, 63.4, 68.8, 64.1, 76.4, 58.8),
    ("openai", "I:T T:T1"): (69.1, 60.0, 59.1, 63.3, 71.8, 63.5, 76.1, 58.2),
    ("openai", "I:T1 T:T1"): (70.8, 62.0, 60.4, 64.0, 71.6, 63.7, 76.4, 58.6),
    ("openai", "I:T T:T1 T1:T2"): (69.6, 60.5, 59.2, 63.4, 72.4, 63.1, 76.4, 58.1),
}


def paper_row(name):
    """The paper's row for a model: {"row": "openai + I:T", "figures": {column: figure}}; None if it has none.

    A run directory's baseline and losses are those of its config.json.
    """
    model, weights = resolve(name)
    loss = []
    if weights is None:
        try:
            with open(os.path.join(model.removeprefix("local-dir:"), "config.json"), encoding="utf-8") as file:
                record = json.load(file)
            model, weights = (record["base_model"][key] for key in ("open_clip", "pretrained"))
            loss = record["flags"]["loss"]
        except (OSError, ValueError, LookupError, TypeError):  # no run of paraclip.py
            return None
    trained = (model, os.path.basename(weights or "")), {frozenset(term.split(":")) for term in loss}
    for (baseline, losses), figures in PAPER.items():
        if trained == (BASELINES[baseline], {frozenset(term.split(":")) for term in losses.split()}):
            return {"row": " + ".join([baseline, *losses.split()]), "figures": dict(zip(ALL, figures))}


def table(models):
    """The results of `models` as Markdown in Table 1's columns, and below it what was not run or has other counts."""
    rows, notes = [["", *ALL]], []
    for model in models:
        figures, marks = {}, {}
        for task, result in model["tasks"].items():
            figures.update(result["figures"])
            marks.update(dict.fromkeys(result["figures"], "*" if result["not_run"] else ""))
            notes += [f"not run: {part}: {why}" for part, why in result["not_run"].items()]
            notes += [f"* {column}: the mean of {' '.join(result['counts'])} alone, not comparable with the paper's"
                      for column in result["figures"] if result["not_run"]]
            other = [f"{part} {result['counts'][part]:,}, not {count:,}" for part, count in TASKS[task][1].items()
                     if result["counts"].get(part, count) != count]
            if other:
                notes.append(f"{task}: not the paper's data ({'; '.join(other)}), not comparable with its figures")
        rows.append([model["name"], *(f"{figures[c]:.1f}{marks[c]}" if c in figures else "not run" for c in ALL)])
        if model["paper"]:
            rows.append([f"  paper: {model['paper']['row']}", *(f"{model['paper']['figures'][c]:.1f}" for c in ALL)])
        if model is models[0]:
            first = figures
        else:
            gains = (f"{round(figures[c], 1) - round(first[c], 1):+.1f}" if c in figures.keys() & first else "" for c in ALL)
            rows.append([f"  minus {models[0]['name']}", *gains])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in aligned), "", *dict.fromkeys(notes)]).strip()


# ---------------------------------------------------------------- the run


def evaluate(name, image_caches, config, device):
    """One model's results on every task, and its rank_pairs() for the gallery. Prints a line a task.

    image_caches: {fingerprint of an image tower: its features}; what it lacks is encoded and added.
    """
    clip, preprocess, tokenizer = load_model(name, device)
    tower = fingerprint(clip.visual, clip.visual.preprocess_cfg)
    text, image = encoders(clip, preprocess, tokenizer, image_caches.setdefault(tower, {}), config)
    tasks = {}
    for task in (task for task in TASKS if task in config.tasks):
        started = time.monotonic()
        try:
            result = TASKS[task][0](config, text, image)
        except NotThere as missing:
            result = {"figures": {}, "counts": {}, "sub_scores": {}, "not_run": {task: str(missing)}}
        tasks[task] = {"not_run": {}, **result}
        said = ", ".join(f"{column} {value:.1f}" for column, value in result["figures"].items()) or "not run"
        print(f"{name}: {task}: {said} ({time.monotonic() - started:.1f} s)", flush=True)
    rankings = rank_pairs(*gallery_pairs(config), text, image) if config.gallery else None
    return {"name": name, "fingerprint": fingerprint(clip), "image_tower": tower, "paper": paper_row(name),
            "tasks": tasks}, rankings


def main():
    config = parse_flags(Config, __doc__)
    for name in config.models:
        resolve(name)
    if config.gallery:
        try:
            gallery_pairs(config)
        except NotThere as missing:
            print(f"--gallery: not run: {missing}")
            config.gallery = ""
    torch.backends.cudnn.allow_tf32 = False  # else "fp32" convolutions keep 10 bits of 23
    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "scipy", "pillow")}
    report = {"flags": dataclasses.asdict(config), "device": device, "models": [],
              "versions": {"python": platform.python_version(), **versions}}
    image_caches, rankings = {}, []
    for name in config.models:
        result, ranking = evaluate(name, image_caches, config, device)
        report["models"].append(result)
        rankings.append(ranking)
        if config.json:
            with atomic_write(config.json) as file:
                json.dump(report, file, indent=1, allow_nan=False)
    print(f"\n{table(report['models'])}")
    if config.gallery:
        draw_gallery(config, rankings)
    for path in filter(None, (config.json, config.gallery)):
        print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
