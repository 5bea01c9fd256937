"""ParaCLIP, section 3.2: every figure of Tables 1 and 2, and Figure 3, for any number of models.

All that there is of the benchmarks below --data:
    python evaluate.py openai runs/openai --data benchmarks/ --json results.json
Your own photos in mine/images, your own pairs in mine/paraphrased_retrieval.jsonl:
    python evaluate.py openai runs/openai --data mine/ --tasks paraphrase --gallery figure3.png

The table has a row for each model, with the paper's figures for it and the differences to the
first model below. A benchmark that is not below --data says `not run`, and which file it wants.
"""

import argparse
import collections
import dataclasses
import io
import json
import os
import re
import sys
import textwrap
import time
from pathlib import Path, PurePosixPath
from statistics import fmean

import numpy as np
import open_clip
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import paraclip
from paraclip import InputError, reading

# ------------------------------------------------------------------ metrics: appendix B


def average_overlap(a, b):
    """Equation 1: AO@k of two ranked lists of k items. It is 1 if they are equal, 0 if disjoint.

        AO@k(a, b) = 1/k * sum over d = 1..k of |a[1:d] & b[1:d]| / d
    """
    k = len(a)
    return sum(len(set(a[:d]) & set(b[:d])) / d for d in range(1, k + 1)) / k


def jaccard(a, b):
    """Equation 2: JS@k of two ranked lists of k items.

        JS@k(a, b) = |a[1:k] & b[1:k]| / |a[1:k] | b[1:k]|
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
            first_labels = [item_labels[item] for item in ranking[:k]]
            hits.append(label in first_labels)
    return 100 * fmean(hits)


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
        rankings.extend(order[:, :k].tolist())
    return rankings


# ------------------------------------------------------------------ the benchmarks of section 3.2
# Each benchmark reads its files, encodes them, and returns
#   figures     {column of Table 1: percent}
#   counts      {what: how many}
#   sub_scores  {name: percent}; of STS and VG, dicts of them too
# It is given encode_texts(n texts) and encode_images(n pairs (path, box or None)), which return
# features [n, D], fixed_point; see make_encoders.


def paraphrased_retrieval(data, encode_texts, encode_images):
    """Columns AO@10 and JS@10: are the ten best images for a query those for its paraphrase?

    Both are means over the pairs, in percent. Where pairs name their gold image, its recall is
    among the sub-scores.
    """
    images, pairs = read_paraphrases(data)
    for_queries, for_paraphrases = rank_paraphrases(images, pairs, encode_texts, encode_images)
    sub_scores = {}
    for k in range(1, 11):
        overlaps = []
        similarities = []
        for a, b in zip(for_queries, for_paraphrases):
            overlaps.append(average_overlap(a[:k], b[:k]))
            similarities.append(jaccard(a[:k], b[:k]))
        sub_scores[f"AO@{k}"] = 100 * fmean(overlaps)
        sub_scores[f"JS@{k}"] = 100 * fmean(similarities)

    golds = [gold for _, _, gold in pairs]
    with_gold = len(golds) - golds.count(None)
    if with_gold:
        image_labels = range(len(images))
        for k in (1, 5, 10):
            sub_scores[f"query R@{k}"] = recall(for_queries, image_labels, golds, k)
            sub_scores[f"paraphrase R@{k}"] = recall(for_paraphrases, image_labels, golds, k)
    return {
        "figures": {"AO@10": sub_scores["AO@10"], "JS@10": sub_scores["JS@10"]},
        "counts": {"pairs": len(pairs), "images": len(images), "pairs_with_gold": with_gold},
        "sub_scores": sub_scores,
    }


def rank_paraphrases(images, pairs, encode_texts, encode_images):
    """The ten best images for each query, and for each paraphrase: two lists of rankings."""
    queries, paraphrases, _ = zip(*pairs)
    gallery = encode_images([(path, None) for path in images])
    for_queries = rank_gallery(encode_texts(queries), gallery)
    for_paraphrases = rank_gallery(encode_texts(paraphrases), gallery)
    return for_queries, for_paraphrases


def read_paraphrases(data):
    """The paths of the gallery's images, and (query, paraphrase, gold) of each pair.

    gold: the index of the pair's image in the gallery, or None. The gallery is COCO val2017, or
    else the user's own photos.
    """
    path = find(data, "paraphrased_retrieval.jsonl")
    folder = Path(data, "coco/val2017")
    if not folder.exists():
        folder = find(data, "images")
    images = find_images(folder)
    index_of = {name: index for index, name in enumerate(images)}

    def parse_pair(line):
        row = json.loads(line)
        if "query" not in row:  # a row of generate.py
            row["query"] = row["caption"]
            row["paraphrase"] = row["paraphrase_1"]
        if not row["query"].strip() or not row["paraphrase"].strip():
            raise ValueError("a text is blank")
        gold = None
        if row.get("image_id") is not None:
            image_id = str(row["image_id"])
            gold = index_of.get(image_name(image_id))
            if gold is None and image_id.isdigit():
                gold = index_of.get(image_id.zfill(12))  # COCO's ids lack its names' zeros
            if gold is None:
                raise ValueError(f'image_id "{image_id}" is no image of {folder}; leave '
                                 "image_id out where a pair has no gold image")
        return row["query"], row["paraphrase"], gold

    pairs = [pair for _, pair in paraclip.read_jsonl(path, parse_pair)]
    if not pairs or len(images) < 10:
        raise InputError(f"{path}: {len(pairs)} pairs, and {len(images)} images in {folder}; "
                         "AO@10 takes one pair and ten images at least")
    return list(images.values()), pairs


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


def vg_relation(data, encode_texts, encode_images):
    """Column VG-R: does the crop fit "X relation Y" better than "Y relation X"?

    The mean of the accuracies of all relations but the symmetric ones, in percent.
    """
    examples = read_aro(data, "visual_genome_relation.json", "relation_name")
    relations = {relation for relation, *_ in examples}
    return aro_accuracy("VG-R", examples, relations - SYMMETRIC, encode_texts, encode_images)


def vg_attribution(data, encode_texts, encode_images):
    """Column VG-A: does the crop fit its caption better than with the two attributes swapped?

    The mean of the accuracies of all pairs of attributes with 25 examples or more, in percent.
    """
    examples = read_aro(data, "visual_genome_attribution.json", "attributes")
    sizes = collections.Counter(attributes for attributes, *_ in examples)
    frequent = {attributes for attributes, size in sizes.items() if size >= 25}
    return aro_accuracy("VG-A", examples, frequent, encode_texts, encode_images)


def aro_accuracy(column, examples, counted, encode_texts, encode_images):
    """The mean accuracy of the groups in `counted`, in percent; other groups are left out.

    An answer is right if cos(crop, true caption) > cos(crop, false caption): a tie is wrong.
    """
    used = [(group, *example) for group, *example in examples if group in counted]
    if not used:
        raise InputError(f"{column}: none of {len(examples)} examples is in a group that counts")
    groups, crops, true_captions, false_captions = zip(*used)
    image_features = encode_images(crops)
    true_cosines = (image_features * encode_texts(true_captions)).sum(1)
    false_cosines = (image_features * encode_texts(false_captions)).sum(1)
    right = (true_cosines > false_cosines).tolist()

    answers = collections.defaultdict(list)
    for group, answer in zip(groups, right):
        answers[group].append(answer)
    accuracy = {group: 100 * fmean(answers[group]) for group in sorted(answers)}
    macro = fmean(accuracy.values())
    return {
        "figures": {column: macro},
        "counts": {"pairs": len(examples), "pairs_counted": len(used), "groups": len(accuracy)},
        "sub_scores": {"macro": macro, "micro": 100 * fmean(right), "by_group": accuracy},
    }


def read_aro(data, file_name, group_key):
    """The examples of one of ARO's two files: (group, crop, true caption, false caption).

    group: the relation, or the two attributes in their order. crop: (path, box in pixels).
    """
    path = find(data, f"aro/{file_name}")
    folder = find(data, "aro/images")
    examples = []
    with reading(path):
        for entry in json.loads(path.read_bytes()):
            group = entry[group_key]
            if group_key == "attributes":
                group = "_".join(group)
            x = entry["bbox_x"]
            y = entry["bbox_y"]
            box = (x, y, x + entry["bbox_w"], y + entry["bbox_h"])
            crop = (folder / entry["image_path"], box)
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


def sts(data, encode_texts, _):
    """Column STS: Spearman's rho of cosines and gold scores in percent, mean over the tasks.

    Only pairs with a gold score are scored. All sub-sets of a year are one list, the 'all'
    setting. A task without its files is left out of the mean, and is in not_run.
    """
    find(data, "sts")
    result = {"figures": {}, "counts": {}, "sub_scores": {}, "not_run": {}}
    for task in STS:
        try:
            pairs = read_sts(data, task)
        except NotThere as missing:
            result["not_run"][task] = str(missing)
            continue
        subsets, first, second, golds = zip(*pairs)
        first_features, second_features = encode_texts(first + second).chunk(2)
        # Rounded to 6 decimals: a text's cosine with itself is 1 only up to 2^-26, and must tie.
        cosines = (first_features * second_features).sum(1).round(decimals=6).tolist()
        rho = {"all": spearman(cosines, golds)}
        if rho["all"] is None:
            raise InputError(f"{task}: Spearman's rho is undefined, all cosines or all gold scores "
                             "are equal")
        for subset in dict.fromkeys(subsets):
            members = [index for index, name in enumerate(subsets) if name == subset]
            rho[subset] = spearman(np.take(cosines, members), np.take(golds, members))
        result["counts"][task] = len(pairs)
        result["sub_scores"][task] = rho
    if result["counts"]:
        result["figures"]["STS"] = fmean(rho["all"] for rho in result["sub_scores"].values())
    return result


def read_sts(data, task):
    """The scored pairs of a task: (sub-set, sentence 1, sentence 2, gold score from 0 to 5)."""
    pairs = []
    if task == "STS-B":  # no header: genre, file, year, id, score, sentence 1, sentence 2, sources
        path = find(data, "sts/STSBenchmark/sts-test.csv")
        with reading(path):
            for genre, _, _, _, gold, first, second, *_ in read_table(path):
                pairs.append((genre, first, second, gold_score(gold)))
    elif task == "SICK-R":
        path = find(data, "sts/SICK/SICK_test_annotated.txt")
        with reading(path):
            header, *rows = read_table(path)
            for row in rows:
                cells = dict(zip(header, row))
                gold = gold_score(cells["relatedness_score"])
                pairs.append(("test", cells["sentence_A"], cells["sentence_B"], gold))
    else:
        for subset in STS[task].split():
            pairs += read_subset(data, task, subset)
    if not pairs:
        raise InputError(f"{data}/sts: {task} has no pair of sentences with a gold score")
    return pairs


def read_subset(data, task, subset):
    """The scored pairs of a year's sub-set. A pair whose gold score is empty is not scored."""
    folder = f"sts/{task}-en-test"
    prefix = "STS"
    if Path(data, folder, f"STS20{task[3:]}.gs.{subset}.txt").exists():
        prefix = f"STS20{task[3:]}"
    sentences_path = find(data, f"{folder}/{prefix}.input.{subset}.txt")
    golds_path = find(data, f"{folder}/{prefix}.gs.{subset}.txt")
    pairs = []
    with reading(f"{data}/{folder}, {subset}"):
        sentences = read_table(sentences_path)
        golds = read_table(golds_path)
        if len(sentences) != len(golds):
            raise InputError(f"{golds_path}: {len(golds)} lines, for {len(sentences)} pairs")
        for (first, second, *_), (gold, *_) in zip(sentences, golds):
            if gold.strip():
                pairs.append((subset, first, second, gold_score(gold)))
    return pairs


def imagenet(data, encode_texts, encode_images):
    """Column Clsf: top-1 accuracy in percent on the validation images of ImageNet-1K.

    The sorted folders, a wnid each, are the classes in open_clip's order.
    """
    folder = find(data, "imagenet/val")
    classes = len(open_clip.IMAGENET_CLASSNAMES)
    wnids = sorted(folder.glob("n" + 8 * "[0-9]"))
    paths = []
    labels = []
    for label, wnid in enumerate(wnids):
        for path in find_images(wnid).values():
            paths.append(path)
            labels.append(label)
    if len(wnids) != classes or not paths:
        raise InputError(f"{folder}: {len(paths)} images in {len(wnids)} folders n01440764, ...; "
                         f"all {classes} are wanted, as their order names the classes")
    image_features = encode_images([(path, None) for path in paths])
    rankings = rank_gallery(image_features, zero_shot_weights(encode_texts))
    top_1 = recall(rankings, range(classes), labels, 1)
    top_5 = recall(rankings, range(classes), labels, 5)
    return {
        "figures": {"Clsf": top_1},
        "counts": {"images": len(paths), "classes": classes},
        "sub_scores": {"top-1": top_1, "top-5": top_5},
    }


def zero_shot_weights(encode_texts):
    """[1000, D]: for each class, the normalised mean feature of its name in CLIP's 80 templates."""
    prompts = []
    for name in open_clip.IMAGENET_CLASSNAMES:
        for template in open_clip.OPENAI_IMAGENET_TEMPLATES:
            prompts.append(template(name))
    features = encode_texts(prompts)
    return fixed_point(features.unflatten(0, (len(open_clip.IMAGENET_CLASSNAMES), -1)).mean(1))


def coco(data, encode_texts, encode_images):
    """Columns T R@5 and I R@5, in percent, on COCO val2017 with the first five captions an image.

    T R@5: for how many images is one of their captions among the five best of all captions?
    I R@5: for how many captions is their image among the five best of all images?
    """
    paths, captions, image_of_caption = read_coco(data)
    image_features = encode_images([(path, None) for path in paths])
    caption_features = encode_texts(captions)
    captions_for_images = rank_gallery(image_features, caption_features)
    images_for_captions = rank_gallery(caption_features, image_features)
    images = range(len(paths))
    scores = {}
    for k in (1, 5, 10):
        scores[f"T R@{k}"] = recall(captions_for_images, image_of_caption, images, k)
        scores[f"I R@{k}"] = recall(images_for_captions, images, image_of_caption, k)
    return {
        "figures": {"T R@5": scores["T R@5"], "I R@5": scores["I R@5"]},
        "counts": {"images": len(paths), "captions": len(captions)},
        "sub_scores": scores,
    }


def read_coco(data):
    """The paths of the images, all captions, and of each caption the index of its image."""
    path = find(data, "coco/annotations/captions_val2017.json")
    folder = find(data, "coco/val2017")
    with reading(path):
        content = json.loads(path.read_bytes())
        name_of = {entry["id"]: image_name(entry["file_name"]) for entry in content["images"]}
        captions_of = collections.defaultdict(list)
        for annotation in content["annotations"]:
            captions_of[name_of[annotation["image_id"]]].append(annotation["caption"])
    paths = []
    captions = []
    image_of_caption = []
    for name, image in find_images(folder).items():
        if name in captions_of:
            for caption in captions_of[name][:5]:
                captions.append(caption)
                image_of_caption.append(len(paths))
            paths.append(image)
    if len(paths) < max(1, len(name_of)):
        raise InputError(f"{path}: of its {len(name_of)} images only {len(paths)} have a caption "
                         f"and are in {folder}")
    return paths, captions, image_of_caption


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
        coco,
        "coco/annotations/captions_val2017.json",
        {"images": 5000, "captions": 25000},
    ),
}
COLUMNS = ["AO@10", "JS@10", "VG-R", "VG-A", "STS", "Clsf", "T R@5", "I R@5"]

PARACLIP = " ".join(paraclip.PARACLIP)  # L1'' + L2 + L3
PAPER = {  # (baseline, terms of the loss that it was fine-tuned with): Table 1's columns
    ("openai", ""): (67.2, 57.7, 59.7, 63.2, 65.1, 63.4, 75.0, 54.8),
    # in Table 2, the VG-R of this model is 60.4 and its VG-A 64.2
    ("openai", PARACLIP): (72.2, 63.3, 60.7, 64.3, 72.2, 63.5, 77.0, 58.8),
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


def paper_row(model):
    """The paper's row for a model, {"row": "openai + I:T", "figures": {column: ...}}, or None.

    It is that of a baseline, or of a run of paraclip.py: its base model and losses.
    """
    base = (model.open_clip_name, model.pretrained)
    loss = []
    if model.pretrained is None:
        folder = model.open_clip_name.removeprefix("local-dir:")
        try:
            record = json.loads(Path(folder, "config.json").read_bytes())
            base = (record["base_model"]["open_clip"], record["base_model"]["pretrained"])
            loss = record["flags"]["loss"]
        except (OSError, ValueError, LookupError, TypeError):  # it is no run of paraclip.py
            return None
    base = (base[0], os.path.basename(base[1] or ""))
    for (baseline, paper_loss), figures in PAPER.items():
        terms = paper_loss.split()
        if base == paraclip.BASELINES[baseline] and unordered(loss) == unordered(terms):
            return {"row": " + ".join([baseline, *terms]), "figures": dict(zip(COLUMNS, figures))}
    return None


def unordered(loss):
    """The terms of a loss; I:T is T:I."""
    return {frozenset(term.split(":")) for term in loss}


# ------------------------------------------------------------------ files below --data

SOURCES = {  # where what is missing can be had, by the first part of its path
    "coco": "from cocodataset.org: val2017.zip, annotations_trainval2017.zip",
    "images": "your own photos; or get coco/val2017 from cocodataset.org",
    "paraphrased_retrieval.jsonl": 'a line for each pair, {"query", "paraphrase"[, "image_id"]}, '
    "or rows of generate.py; the pairs of Cheng et al. 2024, arXiv 2405.03190, have no public "
    "download that we know of",
    "aro": "from github.com/mertyg/vision-language-models-are-bows",
    "sts": "from SentEval's downstream data: github.com/facebookresearch/SentEval",
    "imagenet": "from image-net.org: the ILSVRC 2012 validation images, in a folder for each wnid",
}
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")  # in either case


class NotThere(InputError):
    """A benchmark's file is missing: it is not run."""


def find(data, path):
    """The Path of a benchmark's file or folder, given below --data. Raises NotThere."""
    place = Path(data, path)
    if not place.exists():
        raise NotThere(f"{place} is not there ({SOURCES[path.split('/')[0]]})")
    return place


def find_images(folder):
    """The images in a folder, {name without its ending: path}, sorted by file name."""
    images = {}
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".")  # macOS puts a ._x.jpg beside x.jpg
        if path.suffix.lower() in IMAGE_ENDINGS and not hidden:
            if path.stem in images:
                raise InputError(f"{path}: {images[path.stem].name} has the same name but for its "
                                 "ending; rename or remove one of the two")
            images[path.stem] = path
    return images


def image_name(image_id):
    """An image_id, which is a number or a path with or without an ending, as find_images' name."""
    path = PurePosixPath(str(image_id))
    if path.suffix.lower() in IMAGE_ENDINGS:
        return path.stem
    return path.name


def read_table(path):
    """The tab-separated fields of each line of a file. Quotes are text, as is U+2028."""
    with open(path, encoding="utf-8-sig", newline="\n") as lines:
        return [line.rstrip("\r\n").split("\t") for line in lines]


def gold_score(text):
    """A gold score of STS as a number. Raises ValueError."""
    score = float(text)
    if not 0 <= score <= 5:  # nan is not
        raise ValueError(f"the gold score {text} is not from 0 to 5")
    return score


# ------------------------------------------------------------------ encoding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXTS_AT_ONCE = 4096  # which TextEncoder sorts by length and encodes in chunks


def make_encoders(model, image_features, args):
    """encode_texts and encode_images of a paraclip.Model, as the benchmarks use them.

    Each text and each image is encoded once. image_features {(path, box): [D]} is filled, and
    may be shared by the models of one image tower.
    """
    encoder = paraclip.TextEncoder(model.clip, bf16=args.precision == "bf16")
    text_features = {}

    @torch.no_grad()
    def encode_texts(texts):
        new = [text for text in dict.fromkeys(texts) if text not in text_features]
        for start in progress(range(0, len(new), TEXTS_AT_ONCE), f"{len(new):,} texts"):
            block = new[start : start + TEXTS_AT_ONCE]
            features, _ = encoder(model.tokenizer(block))
            text_features.update(zip(block, features.cpu()))
        features = torch.stack([text_features[text] for text in texts])
        return fixed_point(features.to(DEVICE))

    def encode_images(items):
        new = [item for item in dict.fromkeys(items) if item not in image_features]
        encoded = paraclip.encode_images(model, new, open_crop, args.workers)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=encoder.bf16):
            for item, (feature, problem) in zip(progress(new, "images"), encoded):
                if problem:
                    path, _ = item
                    raise InputError(f"{path}: can't be read as an image ({problem}); mend it, or "
                                     "remove it and what belongs to it")
                image_features[item] = feature
        features = torch.stack([image_features[item] for item in items])
        return fixed_point(features.to(DEVICE))

    return encode_texts, encode_images


def open_crop(item):
    """The PIL image of (path, box), cropped before any preprocessing; box: pixels, or None."""
    path, box = item
    image = Image.open(path)
    if box is None:
        return image
    return image.convert("RGB").crop(box)


def progress(items, what):
    """`items` with a progress bar, if they take longer than 3 seconds; calm in a log file."""
    seconds = 0.3 if sys.stderr.isatty() else 30
    return tqdm(items, what, delay=3, leave=False, mininterval=seconds)


# ------------------------------------------------------------------ Figure 3

FONT = ImageFont.load_default(15)
LINE = 20  # pixels from a line of text to the next
TILE = 112  # pixels of an image with its frame
MARGIN = 10
GOLD = "#f0a800"


def draw_gallery(path, names, images, pairs, rankings):
    """Figure 3: for queries A and B of three pairs, each model's five best images.

    The pairs are those whose AO@10 differs most between the models; with one model, the first.
    names: of one or two models. images, pairs: see read_paraphrases. rankings: rank_paraphrases
    of each model.
    """
    overlaps = []  # [model][pair]
    for for_queries, for_paraphrases in rankings:
        overlaps.append(list(map(average_overlap, for_queries, for_paraphrases)))
    differences = np.abs(np.subtract(overlaps[-1], overlaps[0]))

    width = len(names) * (5 * TILE + 2 * MARGIN)
    strips = [text_strip(names, width, "lightgrey")]
    for pair in np.argsort(-differences, kind="stable")[:3]:
        query, paraphrase, gold = pairs[pair]
        best_for_query = [for_queries[pair] for for_queries, _ in rankings]
        best_for_paraphrase = [for_paraphrases[pair] for _, for_paraphrases in rankings]
        scores = [f"AO@10 of A and B: {100 * overlap[pair]:.1f}" for overlap in overlaps]
        strips.append(text_strip([f"A: {query}"], width))
        strips.append(image_strip(best_for_query, images, gold, width))
        strips.append(text_strip([f"B: {paraphrase}"], width))
        strips.append(image_strip(best_for_paraphrase, images, gold, width))
        strips.append(text_strip(scores, width))
        strips.append(Image.new("RGB", (width, 2), "black"))
    strips.append(text_strip(["Gold frame: the image that A and B are about"], width))
    content = io.BytesIO()
    Image.fromarray(np.vstack(strips)).save(content, "PNG")
    paraclip.atomic_write(path, content.getvalue())


def text_strip(texts, width, background="white"):
    """A picture of texts side by side, each wrapped in its share of the width."""
    share = width // len(texts)
    wrapped = [wrap(text, share - 2 * MARGIN) for text in texts]
    height = LINE * max(map(len, wrapped)) + MARGIN
    strip = Image.new("RGB", (width, height), background)
    draw = ImageDraw.Draw(strip)
    for column, lines in enumerate(wrapped):
        for number, line in enumerate(lines):
            draw.text((column * share + MARGIN, number * LINE + MARGIN // 2), line, "black", FONT)
    return strip


def wrap(text, width):
    """The lines of a text, each at most `width` pixels wide."""
    characters = width // 5
    lines = textwrap.wrap(text, characters)
    while max(map(FONT.getlength, lines)) > width:
        characters -= 1
        lines = textwrap.wrap(text, characters)
    return lines


def image_strip(rankings, images, gold, width):
    """A picture of the five best images of each ranking in a row, the gold one in gold."""
    share = width // len(rankings)
    strip = Image.new("RGB", (width, TILE), "white")
    for column, ranking in enumerate(rankings):
        for place, index in enumerate(ranking[:5]):
            photo = Image.open(images[index]).convert("RGB")
            tile = ImageOps.fit(photo, (TILE - 16, TILE - 16))
            tile = ImageOps.expand(tile, 4, GOLD if index == gold else "lightgrey")
            strip.paste(tile, (column * share + MARGIN + place * TILE, 4))
    return strip


# ------------------------------------------------------------------ the table on the screen


def table(models):
    """The results as a Markdown table in Table 1's columns, and notes on what is missing."""
    rows = [("", dict(zip(COLUMNS, COLUMNS))), ("---", dict.fromkeys(COLUMNS, "------:"))]
    notes = []
    first_figures = {}
    for model in models:
        figures = {}
        cells = dict.fromkeys(COLUMNS, "not run")
        for task, result in model["tasks"].items():
            star = ""  # a mean in which a task of STS is missing has one
            for part, reason in result["not_run"].items():
                star = "*"
                notes.append(f"not run: {part}: {reason}")
            other_counts = counts_unlike_the_papers(task, result["counts"])
            if result["figures"] and other_counts:
                notes.append(f"{star}{task}: not the paper's data ({'; '.join(other_counts)}), "
                             "not comparable with its figures")
            for column, value in result["figures"].items():
                figures[column] = round(value, 1)
                cells[column] = f"{value:.1f}{star}"
        rows.append((model["name"], cells))

        paper = model["paper"]
        if paper:
            rows.append((f"  paper: {paper['row']}", paper["figures"]))
        if model is models[0]:
            first_figures = figures
        else:
            gains = {}
            for column in figures.keys() & first_figures.keys():
                gains[column] = f"{figures[column] - first_figures[column]:+.1f}"
            rows.append((f"  minus {models[0]['name']}", gains))

    width = max(len(label) for label, _ in rows)
    lines = []
    for label, cells in rows:
        aligned = [f"{cells.get(column, ''):>7}" for column in COLUMNS]
        lines.append(f"| {label:{width}} | {' | '.join(aligned)} |")
    return "\n".join([*lines, "", *dict.fromkeys(notes)]).strip()


def counts_unlike_the_papers(task, counts):
    """What of a task's counts is not as in the paper, in words."""
    other = []
    for part, paper_count in TASKS[task].counts.items():
        count = counts.get(part, 0)
        if count != paper_count:
            other.append(f"{part} {count:,}, not {paper_count:,}")
    return other


# ------------------------------------------------------------------ main


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL",
        help="as paraclip.py's --model; each is a row, compared with the first")
    add("--data", required=True, metavar="DIR",
        help="folder of the benchmarks; what is not there is said")
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK",
        help=f"of {', '.join(TASKS)} (default: all)")
    add("--json", metavar="FILE",
        help="write figures, counts, sub-scores and fingerprints here (default: no)")
    add("--gallery", metavar="FILE.png",
        help="draw Figure 3 here, of the first two models: the three pairs whose AO@10 differs "
        "most between them (default: no)")
    add("--precision", default="fp32", choices=["fp32", "bf16"],
        help="of the encoders; not stated, ours (default: %(default)s)")
    add("--workers", type=paraclip.at_least(0), default=min(paraclip.cores(), 16), metavar="N",
        help="processes that decode images (default: %(default)s)")
    args = parser.parse_args(argv)

    for path in (args.json, args.gallery):
        if path is not None:
            folder = Path(path).resolve().parent
            if os.path.isdir(path) or not os.access(folder, os.W_OK):
                parser.error(f"{path}: must be a file in a folder that is there, to write to")
            if Path(args.data).resolve() in folder.parents:  # --data itself is none of them
                parser.error(f"{path}: must not be in a folder of --data, among the benchmarks")
    return args


def require_data(args):
    """Raise InputError if nothing of what --tasks asks for is below --data."""
    if not Path(args.data).is_dir():
        raise InputError(f"--data {args.data}: there is no such folder")
    files = [TASKS[task].file for task in args.tasks]
    if not any(Path(args.data, file).exists() for file in files):
        raise InputError(f"--data {args.data}: nothing to evaluate, none of these is there: "
                         f"{', '.join(files)}")


def run_task(task, args, encode_texts, encode_images):
    """A benchmark's result, with what was not run."""
    try:
        result = TASKS[task].benchmark(args.data, encode_texts, encode_images)
    except NotThere as missing:
        return {"figures": {}, "counts": {}, "sub_scores": {}, "not_run": {task: str(missing)}}
    return {"not_run": {}, **result}


def describe(result):
    """A task's figures and recalls in words."""
    scores = {**result["figures"], **result["sub_scores"]}
    shown = [name for name in scores if name in COLUMNS or "R@" in name]
    return ", ".join(f"{name} {scores[name]:.1f}" for name in shown) or "not run"


def main():
    args = parse_args()
    require_data(args)
    for name in args.models:
        paraclip.find_model(name)
    images = None
    if args.gallery:
        try:
            images, pairs = read_paraphrases(args.data)
        except NotThere as missing:
            print(f"--gallery: not run: {missing}")
    torch.backends.cudnn.allow_tf32 = False  # else "fp32" convolutions keep 10 bits of 23

    versions = {package.__name__: package.__version__ for package in (torch, open_clip, scipy)}
    report = {"flags": vars(args), "device": DEVICE, "versions": versions, "models": []}
    image_features = collections.defaultdict(dict)  # of each image tower
    rankings = []
    for name in args.models:
        model = paraclip.load_model(name, DEVICE)
        tower_features = image_features[model.image_tower]
        encode_texts, encode_images = make_encoders(model, tower_features, args)
        results = {
            "name": name,
            "fingerprint": model.fingerprint,
            "image_tower": model.image_tower,
            "paper": paper_row(model),
            "tasks": {},
        }
        report["models"].append(results)
        for task in TASKS:
            if task in args.tasks:
                started = time.monotonic()
                result = run_task(task, args, encode_texts, encode_images)
                results["tasks"][task] = result
                seconds = time.monotonic() - started
                print(f"{name}: {task}: {describe(result)} ({seconds:.1f} s)", flush=True)
                if args.json:
                    paraclip.write_json(args.json, report)
        if images and len(rankings) < 2:
            rankings.append(rank_paraphrases(images, pairs, encode_texts, encode_images))
    print(f"\n{table(report['models'])}")
    if images:
        draw_gallery(args.gallery, args.models[:2], images, pairs, rankings)
    tasks = report["models"][0]["tasks"]
    if not any(result["figures"] for result in tasks.values()):
        raise InputError(f"--data {args.data}: nothing was evaluated, see above what is missing")


if __name__ == "__main__":
    paraclip.run(main)
