"""ParaCLIP, section 3.2: every figure of Tables 1 and 2 for any number of models, and Figure 3.

All that there is of the benchmarks below --data:
    python evaluate.py openai runs/openai --data benchmarks/ --json results.json
Your own photos in mine/images, your own pairs in mine/paraphrased_retrieval.jsonl:
    python evaluate.py openai runs/openai --data mine/ --tasks paraphrase --gallery figure3.html

The table has a row for each model, and below it the paper's figures for it and the differences
from the first model. A benchmark that is not below --data says `not run`, and which file it wants.
"""

import argparse
import base64
import collections
import contextlib
import dataclasses
import functools
import html
import io
import itertools
import json
import os
import re
from pathlib import Path
from statistics import fmean

import numpy as np
import open_clip
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import ImageOps
from tqdm import tqdm

import paraclip
from paraclip import InputError, image_name, naming

# ------------------------------------------------------------------ metrics: appendix B


def average_overlap(a, b):
    """Equation 1: AO@k of two ranked lists of k items. It is 1 if they are equal, 0 if disjoint.

        AO@k(a, b) = 1/k * sum over d = 1..k of |a[1:d] & b[1:d]| / d
    """
    k = len(a)
    return sum(len(set(a[:d]) & set(b[:d])) / d for d in range(1, k + 1)) / k


def jaccard(a, b):
    """Equation 2: JS@k of two ranked lists of k items.

        JS@k(a, b) = |a[1:k] ∩ b[1:k]| / |a[1:k] ∪ b[1:k]|
    """
    return len(set(a) & set(b)) / len(set(a) | set(b))


def recall(rankings, item_labels, query_labels, k):
    """Recall@k in percent: the share of queries with an item of their label among their first k.

    rankings: of each query its best items, best first, as indices in item_labels. A query whose
    label is None is not counted. Columns T R@5 and I R@5; with k = 1 it is accuracy, Clsf.
    """
    hits = []
    for ranking, label in zip(rankings, query_labels):
        if label is not None:
            hits.append(label in [item_labels[item] for item in ranking[:k]])
    return 100 * fmean(hits)


def recalls(name, rankings, item_labels, query_labels):
    """{"T R@1": percent, "T R@5": ..., "T R@10": ...} for the name "T"."""
    return {f"{name} R@{k}": recall(rankings, item_labels, query_labels, k) for k in (1, 5, 10)}


def spearman(cosines, golds):
    """Column STS: Spearman's rho in percent, where ties have their average rank.

    It is undefined, None, if all cosines or all golds are equal.
    """
    if len(set(cosines)) < 2 or len(set(golds)) < 2:
        return None
    return 100 * float(scipy.stats.spearmanr(cosines, golds).statistic)


def fixed_point(features):
    """[n, D] of any dtype -> float64, L2-normalised, rounded to multiples of 2^-26.

    A product of two such numbers is a multiple of 2^-52, so float64 holds every partial sum of a
    cosine exactly. Cosines don't depend on block size, threads or device, then, and equal
    features have equal cosines. Raises InputError if a feature is not finite.
    """
    if not features.isfinite().all():
        raise InputError("the model's features are not finite: its weights are damaged")
    return (F.normalize(features.double(), dim=-1) * 2**26).round() / 2**26


def rank_gallery(queries, gallery, k=10):
    """The indices of the k items with the highest cosine for each of n queries: n lists.

    queries [n, D], gallery [m, D]: fixed_point. The best comes first, and of equal cosines the
    item with the lower index.
    """
    rankings = []
    for block in queries.split(256):  # the n x m cosines need not fit in memory
        cosines = block @ gallery.T
        order = cosines.sort(descending=True, stable=True).indices
        rankings += order[:, :k].tolist()
    return rankings


# ------------------------------------------------------------------ the benchmarks of section 3.2
# Each benchmark is given the folder --data and the Encoders of a model, and returns its Result.
# They raise NotThere for a missing file, and InputError for one that can't be used.


@dataclasses.dataclass
class Result:
    """What a benchmark found; in the JSON file as it stands here."""

    figures: dict  # {column of Table 1: percent}
    counts: dict  # {what: how many}
    sub_scores: dict  # {name: percent}; of STS and VG, dicts of them too
    not_run: dict = dataclasses.field(default_factory=dict)  # {what: why}


def paraphrased_retrieval(data, encoders):
    """Columns AO@10 and JS@10: are the ten best images for a query those for its paraphrase?

    Both are means over the pairs, in percent. Where pairs name their gold image, its recall is
    among the sub-scores.
    """
    images, queries, golds = read_paraphrases(data)
    for_queries, for_paraphrases = rank_paraphrases(images, queries, encoders)
    scores = {}
    for k in range(1, 11):
        lists = [(a[:k], b[:k]) for a, b in zip(for_queries, for_paraphrases)]
        scores[f"AO@{k}"] = 100 * fmean(itertools.starmap(average_overlap, lists))
        scores[f"JS@{k}"] = 100 * fmean(itertools.starmap(jaccard, lists))
    figures = {"AO@10": scores["AO@10"], "JS@10": scores["JS@10"]}

    with_gold = len(golds) - golds.count(None)
    if with_gold:
        scores.update(recalls("query", for_queries, images, golds))
        scores.update(recalls("paraphrase", for_paraphrases, images, golds))
    counts = {"pairs": len(golds), "images": len(images), "pairs_with_gold": with_gold}
    return Result(figures, counts, scores)


def rank_paraphrases(images, queries, encoders):
    """The ten best images for each query, and for each paraphrase: two lists of rankings."""
    gallery = encoders.images(images)
    return [rank_gallery(encoders.texts(texts), gallery) for texts in queries]


def read_paraphrases(data):
    """The paths of the gallery's images, [queries, paraphrases], and their golds.

    A gold is the path of the image that a pair is about, or None. The gallery is COCO val2017, or
    else the user's own photos.
    """
    path = find(data, "paraphrased_retrieval.jsonl")
    folder = find(data, "coco/val2017", "images")
    images = find_images(folder)

    def parse_pair(line):
        row = json.loads(line)
        query = row.get("query") or row["caption"]  # or else it is a row of generate.py
        paraphrase = row.get("paraphrase") or row["paraphrase_1"]
        return query.strip(), paraphrase.strip(), find_gold(row.get("image_id"), folder)

    pairs = list(paraclip.read_jsonl(path, parse_pair))
    if not pairs or len(images) < 10:
        raise InputError(f"{path}: AO@10 wants a pair here, and ten images in {folder}")
    *queries, golds = zip(*pairs)
    return list(images.values()), queries, golds


def find_gold(image_id, folder):
    """The path of the image that a pair names, or None if it names none. Raises ValueError."""
    if image_id is None:
        return None
    name = str(image_id)
    if folder.name == "val2017":  # flat, while the id may have folders before the name
        name = os.path.basename(name)
    images = find_images(folder)
    for candidate in (name, image_name(name), name.zfill(12)):  # COCO's ids may lack zeros
        if candidate in images:
            return images[candidate]
    raise ValueError(f'image_id "{image_id}" is no image of {folder}; leave image_id out where a '
                     "pair has no gold image")


# Relations that ARO leaves out as symmetric: "X next to Y" and "Y next to X" may both be true.
SYMMETRIC_TEXT = """
    adjusting, around, attached to, beside, between, bigger than, biting, boarding, brushing, by,
    chewing, cleaning, climbing, close to, coming from, coming out of, contain, crossing, dragging,
    draped over, drinking, drinking from, driving, driving down, driving on, eating from,
    eating in, enclosing, exiting, facing, filled with, floating in, floating on, flying,
    flying above, flying in, flying over, flying through, full of, going down, going into,
    going through, grazing in, growing in, growing on, guiding, hanging from, hanging in,
    hanging off, hanging over, higher than, holding onto, hugging, in between, jumping off,
    jumping on, jumping over, kept in, larger than, leading, leaning over, leaving, licking,
    longer than, looking in, looking into, looking out, looking over, looking through,
    lying next to, lying on top of, making, mixed with, mounted on, moving, near, next to, of,
    on the back of, on the edge of, on the front of, on the other side of, on the side of, opening,
    painted on, parked at, parked beside, parked by, parked in, parked in front of, parked near,
    parked next to, perched on, petting, piled on, playing, playing in, playing on, playing with,
    pouring, reaching for, reading, reflected on, riding on, running in, running on,
    running through, seen through, sitting behind, sitting beside, sitting by, sitting in front of,
    sitting near, sitting next to, sitting under, skiing down, skiing on, sleeping in, sleeping on,
    smiling at, sniffing, splashing, sprinkled on, stacked on, standing against, standing around,
    standing behind, standing beside, standing in front of, standing near, standing next to,
    staring at, stuck in, surrounding, swimming in, swinging, talking to, topped with, touching,
    traveling down, traveling on, tying, typing on, underneath, wading in, waiting for,
    walking across, walking by, walking down, walking next to, walking through, with, working in,
    working on, worn on, wrapped around, wrapped in
"""
SYMMETRIC = frozenset(re.split(r",\s+", SYMMETRIC_TEXT.strip()))


def vg_relation(data, encoders):
    """Column VG-R: does the crop fit "X relation Y" better than "Y relation X"?

    The mean of the accuracies of all relations but the symmetric ones, in percent.
    """
    examples = read_aro(data, "visual_genome_relation.json")
    counted = [example for example in examples if example[0] not in SYMMETRIC]
    return aro_accuracy("VG-R", examples, counted, encoders)


def vg_attribution(data, encoders):
    """Column VG-A: does the crop fit its caption better than with the two attributes swapped?

    The mean of the accuracies of all pairs of attributes with 25 examples or more, in percent.
    """
    examples = read_aro(data, "visual_genome_attribution.json")
    sizes = collections.Counter(example[0] for example in examples)
    counted = [example for example in examples if sizes[example[0]] >= 25]
    return aro_accuracy("VG-A", examples, counted, encoders)


def aro_accuracy(column, examples, counted, encoders):
    """The mean over the groups of their accuracy on the examples in `counted`, in percent.

    An answer is right if cos(crop, true caption) > cos(crop, false caption): a tie is wrong.
    """
    if not counted:
        raise InputError(f"{column}: none of its {len(examples)} examples counts")
    groups, crops, true_captions, false_captions = zip(*counted)
    image_features = encoders.images(crops)
    true_cosines = (image_features * encoders.texts(true_captions)).sum(1)
    false_cosines = (image_features * encoders.texts(false_captions)).sum(1)
    right = (true_cosines > false_cosines).tolist()
    answers = collections.defaultdict(list)
    for group, answer in zip(groups, right):
        answers[group].append(answer)
    accuracy = {group: 100 * fmean(answers[group]) for group in answers}
    macro = fmean(accuracy.values())
    sub_scores = {"macro": macro, "micro": 100 * fmean(right), "by_group": accuracy}
    counts = {"pairs": len(examples), "pairs_counted": len(right), "groups": len(accuracy)}
    return Result({column: macro}, counts, sub_scores)


def read_aro(data, file_name):
    """One of ARO's two files, a list of (group, crop, true caption, false caption).

    group: the relation, or the two attributes in their order. crop: (path, box in pixels).
    """
    path = find(data, f"aro/{file_name}")
    folder = find(data, "aro/images")
    examples = []
    with naming(path):
        for entry in json.loads(path.read_bytes()):
            group = entry.get("relation_name") or "_".join(entry["attributes"])
            x, y, width, height = (entry[f"bbox_{key}"] for key in "xywh")
            crop = folder / entry["image_path"], (x, y, x + width, y + height)
            examples.append((group, crop, entry["true_caption"], entry["false_caption"]))
    return examples


# The seven tasks, and the sub-sets of each year. Files of other sub-sets are not read: STS13's
# SMT has gold scores without sentences.
STS = {
    "STS12": "MSRpar MSRvid SMTeuroparl surprise.OnWN surprise.SMTnews",
    "STS13": "FNWN headlines OnWN",
    "STS14": "deft-forum deft-news headlines images OnWN tweet-news",
    "STS15": "answers-forums answers-students belief headlines images",
    "STS16": "answer-answer headlines plagiarism postediting question-question",
    "STS-B": "",
    "SICK-R": "",
}


def sts(data, encoders):
    """Column STS: Spearman's rho of cosines and gold scores in percent, mean over the tasks.

    Only pairs with a gold score are scored. All sub-sets of a year are one list, the 'all'
    setting. A task without all its files is left out of the mean, and is in not_run.
    """
    folder = find(data, "sts")
    result = Result({}, {}, {})
    for task in STS:
        try:
            pairs = read_sts(folder, task)
        except NotThere as missing:
            result.not_run[task] = str(missing)
            continue
        subsets, first, second, golds = zip(*pairs)
        cosines = (encoders.texts(first) * encoders.texts(second)).sum(1)
        # Rounded to 6 decimals: a text's cosine with itself is 1 only up to 2^-26, and must tie.
        cosines = cosines.round(decimals=6).tolist()
        scored = collections.defaultdict(list)
        for subset, *scores in zip(subsets, cosines, golds):
            scored["all"].append(scores)
            scored[subset].append(scores)
        result.sub_scores[task] = {name: spearman(*zip(*scored[name])) for name in scored}
        if result.sub_scores[task]["all"] is None:
            raise InputError(f"sts, {task}: all cosines, or all gold scores, are equal")
        result.counts[task] = len(golds)
    if result.counts:
        result.figures["STS"] = fmean(rho["all"] for rho in result.sub_scores.values())
    return result


def read_sts(folder, task):
    """The scored pairs of a task: [sub-set, first sentence, second sentence, gold score]."""
    rows = []
    if task == "STS-B":  # no header: genre, file, year, id, score, sentence 1, sentence 2, ...
        rows = read_table([0, 5, 6, 4], find(folder, "STSBenchmark/sts-test.csv"))
    if task == "SICK-R":  # a header: pair_ID, sentence_A, sentence_B, relatedness_score, ...
        for row in read_table([1, 2, 3], find(folder, "SICK/SICK_test_annotated.txt"))[1:]:
            rows.append(["test", *row])
    for subset in STS[task].split():  # the files are named STS.* or STS20xx.*
        golds = find(folder, f"{task}-en-test/STS*.gs.{subset}.txt")
        sentences = find(folder, f"{task}-en-test/STS*.input.{subset}.txt")
        for row in read_table([1, 2, 0], golds, sentences):
            rows.append([subset, *row])
    with naming(f"{folder}, {task}"):
        return [[*row, float(gold)] for *row, gold in rows if gold.strip()]


def read_table(columns, *paths):
    """The cells of some columns of tab-separated files, laid side by side. Quotes are text."""
    with naming(paths[0]):
        texts = [path.read_text("utf-8-sig").removesuffix("\n") for path in paths]
        tables = [text.split("\n") for text in texts]  # not splitlines(): U+2028 is text
        rows = ["\t".join(lines).split("\t") for lines in zip(*tables, strict=True)]
        return [[row[column] for column in columns] for row in rows]


def imagenet(data, encoders):
    """Column Clsf: top-1 accuracy in percent on the validation images of ImageNet-1K.

    The sorted folders, a wnid each, are the classes in open_clip's order.
    """
    folder = find(data, "imagenet/val")
    images = find_images(folder)
    labels = [name.split("/")[0] for name in images]
    wnids = sorted(set(labels))
    if len(wnids) != 1000:
        raise InputError(f"{folder}: {len(wnids)} folders n01440764, ... with images; all 1,000 "
                         "are wanted, as their order names the classes")
    image_features = encoders.images(images.values())
    rankings = rank_gallery(image_features, zero_shot_weights(encoders))
    scores = {f"top-{k}": recall(rankings, wnids, labels, k) for k in (1, 5)}
    counts = {"images": len(images), "classes": len(wnids)}
    return Result({"Clsf": scores["top-1"]}, counts, scores)


def zero_shot_weights(encoders):
    """[1000, D]: for each class, the normalised mean feature of its name in CLIP's 80 templates."""
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    names = open_clip.IMAGENET_CLASSNAMES
    prompts = [template(name) for name in names for template in templates]
    return fixed_point(encoders.texts(prompts).unflatten(0, (-1, len(templates))).mean(1))


def coco(data, encoders):
    """Columns T R@5 and I R@5, in percent, on COCO val2017 with the first five captions an image.

    T R@5: for how many images is one of their captions among the five best of all captions?
    I R@5: for how many captions is their image among the five best of all images?
    """
    image_of_caption, captions = zip(*read_coco(data))
    images = list(dict.fromkeys(image_of_caption))
    image_features = encoders.images(images)
    caption_features = encoders.texts(captions)
    captions_for_images = rank_gallery(image_features, caption_features)
    images_for_captions = rank_gallery(caption_features, image_features)
    scores = {
        **recalls("T", captions_for_images, image_of_caption, images),
        **recalls("I", images_for_captions, images, image_of_caption),
    }
    figures = {"T R@5": scores["T R@5"], "I R@5": scores["I R@5"]}
    return Result(figures, {"images": len(images), "captions": len(captions)}, scores)


def read_coco(data):
    """[(image's path, caption)]: the first five captions of each image, sorted by image."""
    path = find(data, "coco/annotations/captions_val2017.json")
    folder = find(data, "coco/val2017")
    images = find_images(folder)
    captions_of = collections.defaultdict(list)
    with naming(f"{path}, whose images are in {folder}"):
        content = json.loads(path.read_bytes())
        name_of = {entry["id"]: image_name(entry["file_name"]) for entry in content["images"]}
        for annotation in content["annotations"]:
            image = images[name_of[annotation["image_id"]]]
            captions_of[image].append(annotation["caption"])
    return [(image, text) for image in sorted(captions_of) for text in captions_of[image][:5]]


# ------------------------------------------------------------------ Table 1 and Table 2


@dataclasses.dataclass
class Task:
    benchmark: object  # one of the functions above
    file: str  # below --data, without which it is not run
    counts: dict  # of the paper's data


TASKS = {  # in Table 1's order
    "paraphrase": Task(
        paraphrased_retrieval, "paraphrased_retrieval.jsonl", {"pairs": 4155, "images": 5000}
    ),
    "vg-r": Task(vg_relation, "aro/visual_genome_relation.json", {"pairs": 23937}),
    "vg-a": Task(vg_attribution, "aro/visual_genome_attribution.json", {"pairs": 28748}),
    "sts": Task(
        sts,
        "sts",
        {"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS16": 1186,
         "STS-B": 1379, "SICK-R": 4927},
    ),
    "imagenet": Task(imagenet, "imagenet/val", {"images": 50000}),
    "coco": Task(
        coco, "coco/annotations/captions_val2017.json", {"images": 5000, "captions": 25000}
    ),
}
COLUMNS = ["AO@10", "JS@10", "VG-R", "VG-A", "STS", "Clsf", "T R@5", "I R@5"]
PARACLIP = " ".join(paraclip.PARACLIP)  # L1'' + L2 + L3
# Table 1, and the rows of Table 2 that are not in it: the baseline, the losses that it was
# fine-tuned with, and the columns. In Table 2, ParaCLIP's VG-R is 60.4 and its VG-A 64.2.
PAPER_TEXT = """
openai           |                  | 67.2 57.7 59.7 63.2 65.1 63.4 75.0 54.8
openai           | I:T2 T:T1 T1:T2  | 72.2 63.3 60.7 64.3 72.2 63.5 77.0 58.8
openclip-400m    |                  | 67.6 58.9 46.4 57.8 67.2 60.2 76.5 59.4
openclip-400m    | I:T2 T:T1 T1:T2  | 71.3 62.9 55.4 61.7 70.1 60.8 76.1 59.4
openclip-2b      |                  | 70.6 62.1 45.0 61.8 69.6 66.5 80.2 64.8
openclip-2b      | I:T2 T:T1 T1:T2  | 73.2 65.1 58.8 65.4 71.6 65.5 80.4 63.3
openclip-roberta |                  | 72.5 64.0 35.6 64.5 71.0 61.8 78.8 62.6
openclip-roberta | I:T2 T:T1 T1:T2  | 74.5 66.2 43.2 66.5 72.5 61.4 79.4 62.0
laclip           |                  | 69.9 62.1 50.6 63.6 58.8 64.5 68.1 55.5
laclip           | I:T2 T:T1 T1:T2  | 73.5 65.8 60.6 64.6 71.4 64.5 73.6 58.0
openai           | I:T              | 68.9 59.9 58.0 62.4 68.7 63.7 75.8 58.0
openai           | T:T1 T1:T2       | 70.5 61.2 61.5 65.1 74.5 56.7 74.6 51.8
openai           | I:T I:T1         | 70.4 61.7 58.2 63.0 69.1 64.0 76.3 58.7
openai           | I:T I:T1 I:T2    | 71.3 62.8 58.9 63.4 68.8 64.1 76.4 58.8
openai           | I:T T:T1         | 69.1 60.0 59.1 63.3 71.8 63.5 76.1 58.2
openai           | I:T1 T:T1        | 70.8 62.0 60.4 64.0 71.6 63.7 76.4 58.6
openai           | I:T T:T1 T1:T2   | 69.6 60.5 59.2 63.4 72.4 63.1 76.4 58.1
"""
PAPER = {}
for line in PAPER_TEXT.strip().splitlines():
    baseline, losses, figures = line.split("|")
    PAPER[baseline.strip(), losses.strip()] = tuple(map(float, figures.split()))


def paper_row(name):
    """The paper's row for a model, {"row": "openai + I:T", "figures": {column: ...}}, or None.

    It is that of a baseline, or of a run of paraclip.py: its --model and --loss.
    """
    baseline = name
    losses = []
    if name not in paraclip.BASELINES:
        config = Path(name.removeprefix("local-dir:"), "config.json")
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # it is no run
            flags = json.loads(config.read_bytes())["flags"]
            losses = sorted(flags["loss"], key=paraclip.TERMS.index)
            baseline = flags["model"]
    figures = PAPER.get((baseline, " ".join(losses)))
    if figures is None:
        return None
    return {"row": " + ".join([baseline, *losses]), "figures": dict(zip(COLUMNS, figures))}


# ------------------------------------------------------------------ files below --data


class NotThere(InputError):
    """A benchmark's file is missing: it is not run."""


def find(folder, *patterns):
    """The first path in a folder that one of the patterns names. Raises NotThere."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            return path
    raise NotThere(f"{folder}/{pattern} is not there")


@functools.cache
def find_images(folder):
    """The images below a folder, {name: path}, sorted by path. Says how many files are none.

    A name is the path below the folder without the ending. Raises InputError if two have one.
    """
    images = {}
    others = 0
    for path in sorted(files_below(folder)):
        name = image_name(str(path.relative_to(folder)))
        if name in images:
            raise InputError(f"{path} and {images[name]}: two images have one name but for the "
                             "ending; rename or remove one of them")
        if name:
            images[name] = path
        else:
            others += 1
    print(f"{folder}: {len(images):,} images; {others:,} other files are passed over", flush=True)
    return images


def files_below(folder):
    """Yield the paths of the files in a folder and in its subfolders, linked ones too."""
    for path in folder.iterdir():
        if not path.is_dir():
            yield path
        elif not folder.resolve().is_relative_to(path.resolve()):  # no link to a folder above
            yield from files_below(path)


# ------------------------------------------------------------------ encoding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXTS_AT_ONCE = 4096  # which TextEncoder sorts by length
IMAGES_AT_ONCE = 64


class Encoders:
    """The two towers of a paraclip.Model, as the benchmarks use them.

    Each text and each image is encoded once. image_features {path or crop: [D]} is filled, and
    may be shared by the models of one image tower.
    """

    def __init__(self, model, image_features, args):
        self.model = model
        self.text_encoder = paraclip.TextEncoder(model.clip, bf16=args.precision == "bf16")
        self.workers = args.workers
        self.text_features = {}
        self.image_features = image_features

    @torch.no_grad()
    def texts(self, texts):
        """n texts -> features [n, D], fixed_point."""
        for block in progress(new_blocks(texts, self.text_features, TEXTS_AT_ONCE), "texts"):
            features, _ = self.text_encoder(self.model.tokenizer(block))
            self.text_features.update(zip(block, features.cpu()))
        return look_up(texts, self.text_features)

    def images(self, items):
        """n paths, or crops (path, box in pixels) -> features [n, D], fixed_point."""
        blocks = new_blocks(items, self.image_features, IMAGES_AT_ONCE)
        load = functools.partial(paraclip.load_pixels, self.model, open_item)
        loader = paraclip.load_in_workers(load, blocks, min(self.workers, len(blocks)))
        for loaded, block in zip(progress(loader, "images"), blocks):
            _, readable = loaded
            for item in itertools.compress(block, ~readable):  # again, to learn the reason
                with naming(f"{item} can't be read (mend or remove it)"):
                    self.model.preprocess(open_item(item))
            with torch.autocast(DEVICE, torch.bfloat16, enabled=self.text_encoder.bf16):
                features = paraclip.encode_pixels(self.model, loaded)
            self.image_features.update(zip(block, features))
        return look_up(items, self.image_features)


def new_blocks(items, features, size):
    """The items that have no features yet, each once, in lists of `size`."""
    new = [item for item in dict.fromkeys(items) if item not in features]
    return [new[start : start + size] for start in range(0, len(new), size)]


def look_up(items, features):
    """The features [n, D] of n items, fixed_point."""
    return fixed_point(torch.stack([features[item] for item in items]).to(DEVICE))


def open_item(item):
    """The PIL image of a path, or of a crop (path, box), cropped before any preprocessing."""
    if isinstance(item, Path):
        return paraclip.read_image(item)
    path, box = item
    return paraclip.read_image(path).convert("RGB").crop(box)


# A bar for what takes longer than 3 seconds.
progress = functools.partial(tqdm, delay=3, leave=False, mininterval=5)


# ------------------------------------------------------------------ Figure 3

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>ParaCLIP, Figure 3</title>
<style>
body { font: 15px sans-serif; }
main { display: grid; grid-template-columns: max-content max-content; gap: 6px 20px; }
div { display: flex; }
p { margin: 0; }
div + p { grid-column: 1; }
.caption { margin-bottom: 16px; }
h2 { grid-column: 1 / -1; margin: 12px 0 0; font-size: 17px; }
img { width: 104px; height: 104px; border: 4px solid lightgrey; }
img.gold { border-color: #f0a800; }
</style>
<p class="caption"><b>Figure 3</b> Queries A and B that mean the same, and each model's five best
images. The image that the queries are about has a gold frame.</p>
<main>"""


def write_gallery(path, data, names, encoders):
    """Figure 3 as a page of HTML: for queries A and B of three pairs, each model's best images.

    The pairs are those whose AO@10 differs most between the models; with one model, the first.
    names, encoders: of one or two models.
    """
    images, queries, golds = read_paraphrases(data)
    rankings = [rank_paraphrases(images, queries, each) for each in encoders]
    overlaps = np.array([list(map(average_overlap, *each)) for each in rankings])  # [model, pair]
    order = np.argsort(-abs(overlaps[-1] - overlaps[0]), kind="stable")

    lines = [PAGE]
    lines += [f"<b>{html.escape(name)}</b>" for name in names]
    for pair in order[:3]:
        for letter, texts, *rankings_of_models in zip("AB", queries, *rankings):
            lines.append(f"<h2>{letter}: {html.escape(texts[pair])}</h2>")
            for each in rankings_of_models:
                best = [show_image(images[item], golds[pair]) for item in each[pair][:5]]
                lines += ["<div>", *best, "</div>"]
        lines += [f"<p>AO@10 of A and B: {100 * overlap:.1f}</p>" for overlap in overlaps[:, pair]]
    paraclip.write_file(path, "\n".join(lines).encode("utf-8", "replace"))


def show_image(path, gold):
    """An image as HTML that holds it: a square, turned as its EXIF says."""
    image = ImageOps.exif_transpose(paraclip.read_image(path)).convert("RGB")
    content = io.BytesIO()
    ImageOps.fit(image, (208, 208)).save(content, "JPEG")
    source = base64.b64encode(content.getvalue()).decode()
    frame = ' class="gold"' if path == gold else ""
    return (f'<img{frame} title="{html.escape(path.name)}" '
            f'src="data:image/jpeg;base64,{source}">')


# ------------------------------------------------------------------ the table on the screen


def table(models):
    """The results as a Markdown table in Table 1's columns, and notes on what is missing."""
    rows = [("", dict(zip(COLUMNS, COLUMNS))), ("---", dict.fromkeys(COLUMNS, "------:"))]
    notes = {}  # as a set that keeps its order
    first = {}
    for model in models:
        figures = {}
        cells = dict.fromkeys(COLUMNS, "not run")
        for task, result in model["tasks"].items():
            for part, reason in result["not_run"].items():
                notes[f"not run: {part}: {reason}; tests/README.md has where it is from"] = None
            star = ""
            if result["figures"] and not TASKS[task].counts.items() <= result["counts"].items():
                star = "*"
                notes[f"*{task}: not the paper's data, not comparable with its figures: "
                      f"{result['counts']}, not {TASKS[task].counts}"] = None
            for column, figure in result["figures"].items():
                figures[column] = round(figure, 1)
                cells[column] = f"{figure:.1f}{star}"
        rows.append((model["name"], cells))
        if model["paper"]:
            rows.append((f"  paper: {model['paper']['row']}", model["paper"]["figures"]))
        if first:
            gains = {column: f"{figures[column] - first[column]:+.1f}" for column in first}
            rows.append((f"  minus {models[0]['name']}", gains))
        first = first or figures

    width = max(len(label) for label, _ in rows)
    lines = []
    for label, cells in rows:
        aligned = [f"{cells.get(column, ''):>7}" for column in COLUMNS]
        lines.append(f"| {label:{width}} | {' | '.join(aligned)} |")
    return "\n".join([*lines, "", *notes])


# ------------------------------------------------------------------ main


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL",
        help="as paraclip.py's --model; each is a row, compared with the first")
    add("--data", type=Path, required=True,
        help="folder of the benchmarks; what is not there is said")
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK",
        help=f"of {', '.join(TASKS)} (default: all)")
    add("--json", type=Path,
        help="write figures, counts, sub-scores and fingerprints here (default: no)")
    add("--gallery", type=Path,
        help="write Figure 3 here, a page of HTML, for the first two models: the three pairs whose "
        "AO@10 differs most between them (default: no)")
    add("--precision", default="fp32", choices=["fp32", "bf16"],
        help="of the encoders; not stated, ours (default: %(default)s)")
    add("--workers", type=paraclip.at_least(0), default=min(paraclip.cores(), 16),
        help="processes that decode images (default: %(default)s)")
    return parser.parse_args(argv)


def check_flags(args):
    """Raise InputError for what can be seen before a model is loaded."""
    for name in args.models:
        paraclip.find_model(name)
    for path in (args.json, args.gallery):
        if path and not path.parent.is_dir():
            raise InputError(f"{path}: its folder is not there")
    files = [TASKS[task].file for task in args.tasks]
    if not any((args.data / file).exists() for file in files):
        raise InputError(f"--data {args.data}: nothing to evaluate, none of these is there: "
                         f"{', '.join(files)}")


def main():
    args = parse_args()
    check_flags(args)
    torch.backends.cudnn.allow_tf32 = False  # else "fp32" convolutions keep 10 bits of 23
    versions = {package.__name__: package.__version__ for package in (torch, open_clip, scipy)}
    report = {"flags": vars(args), "device": DEVICE, "versions": versions, "models": []}
    image_features = collections.defaultdict(dict)  # of each image tower
    in_gallery = []
    for name in args.models:
        model = paraclip.load_model(name, DEVICE)
        encoders = Encoders(model, image_features[model.image_tower], args)
        tasks = {}
        report["models"].append({
            "name": name,
            "fingerprint": model.fingerprint,
            "image_tower": model.image_tower,
            "paper": paper_row(name),
            "tasks": tasks,
        })
        for task in args.tasks:
            try:
                result = TASKS[task].benchmark(args.data, encoders)
            except NotThere as missing:
                result = Result({}, {}, {}, {task: str(missing)})
            tasks[task] = vars(result)
            scores = {**result.figures, **result.sub_scores}
            shown = [f"{key} {scores[key]:.1f}" for key in scores if key in COLUMNS or "R@" in key]
            print(f"{name}: {task}: {', '.join(shown) or 'not run'}", flush=True)
            if args.json:
                paraclip.write_json(args.json, report)
        in_gallery = [*in_gallery, encoders][:2]
    print(f"\n{table(report['models'])}")
    if args.gallery:
        write_gallery(args.gallery, args.data, args.models[:2], in_gallery)


if __name__ == "__main__":
    paraclip.run(main)
