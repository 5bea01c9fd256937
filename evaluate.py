"""ParaCLIP, section 3.2: every figure of Tables 1 and 2, and Figure 3, for any number of models.

    python evaluate.py openai runs/openai --data benchmarks/ --json results.json
    python evaluate.py openai runs/openai --data benchmarks/ --tasks paraphrase --gallery figure3.png

A row a model, with the paper's figure under ours and the difference to the first model. A benchmark whose files are not
below --data says `not run`, and which file it wants.
"""

import collections
import functools
import glob
import hashlib
import json
import os
import re
import textwrap
import time
from argparse import ArgumentParser, RawTextHelpFormatter
from statistics import fmean

import open_clip
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from generate import BAR_SECONDS, InputError, at_least, atomic_write, json_object, parsed_lines, reading, run
from paraclip import BASELINES, CORES, TextEncoder, encode_images, fingerprint, load_model, resolve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXTS_AT_ONCE = 4096  # that TextEncoder sorts by length and encodes in chunks

# ---------------------------------------------------------------- metrics


def average_overlap(a, b):
    """Column AO@10, equation 1: AO@k(a, b) = 1/k * sum over d=1..k of |a[:d] & b[:d]| / d. Returns AO@1..k, [n, k]."""
    d = torch.arange(1, a.shape[1] + 1).double()
    return (common(a, b) / d).cumsum(1) / d


def jaccard(a, b):
    """Column JS@10, equation 2: JS@k(a, b) = |a[:k] & b[:k]| / |a[:k] | b[:k]|. Returns JS@1..k, [n, k]."""
    both = common(a, b).double()
    return both / (2 * torch.arange(1, a.shape[1] + 1) - both)


def common(a, b):
    """|a[:d] & b[:d]| for d = 1..k: [n, k] of two rankings [n, k], in each of which no item is twice (see rank)."""
    return (a[:, :, None] == b[:, None, :]).cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2)


def fixed_point(features):
    """[n, D] of any dtype -> float64, L2-normalised, rounded to multiples of 2^-26.

    A product of two is then a multiple of 2^-52, and float64 holds every partial sum of a cosine exactly. So a score
    does not depend on block sizes, threads or the device, and equal features tie to the last bit.
    """
    return (F.normalize(features.double(), dim=-1) * 2**26).round() / 2**26


def rank(queries, gallery, k=10):
    """Indices [n, min(k, m)] of the best of m items for each of n queries, by (-cosine, index): ties by lower index.

    queries [n, D], gallery [m, D], both fixed_point. The n x m scores are never held whole.
    """
    ranked = [torch.sort(block @ gallery.T, descending=True, stable=True).indices[:, :k].contiguous()
              for block in queries.split(256)]
    return torch.cat(ranked).cpu()


def recall(ranked, found, wanted, k):
    """Columns T R@5, I R@5, Clsf (k = 1): has one of the first k of a ranking [n, >= k] its query's label? [n] bools.

    found [m], wanted [n]: the labels of items and queries. Every item with the query's label is a positive.
    """
    return (found[ranked[:, :k]] == wanted[:, None]).any(1)


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


# ---------------------------------------------------------------- benchmarks: read, encode, figures


def read_paraphrases(data):
    """The images' paths, by name, and of each line (query, paraphrase, index of the gold image or -1)."""
    path = want(data, "paraphrased_retrieval.jsonl")
    images = sorted(glob.glob(os.path.join(glob.escape(want(data, "coco/val2017")), "*.jpg")))
    places = {os.path.basename(image).removesuffix(".jpg"): index for index, image in enumerate(images)}

    def pair_of(line):  # of this format, or of generate.py
        row = json_object(line)
        keys = ("query", "paraphrase") if "query" in row else ("caption", "paraphrase_1")
        gold = os.path.basename(row.get("image_id", "")).removesuffix(".jpg")
        gold = places.get(gold, places.get(gold.zfill(12), -1))  # COCO's ids are file names without leading zeros
        if not all(row[key].strip() for key in keys) or "image_id" in row and gold < 0:
            raise ValueError("a blank text, or an image_id that is none of coco/val2017")
        return *(row[key] for key in keys), gold

    pairs = [pair for _, _, pair in parsed_lines(path, pair_of)]
    if not pairs or len(images) < 10:
        raise InputError(f"{path}: {len(pairs)} pairs, {len(images)} images in coco/val2017; AO@10 takes 10 at least")
    return images, pairs


def rank_pairs(images, pairs, text, image):
    """The ten best images for queries A and for queries B: two [n, 10]."""
    gallery = image([(path, None) for path in images])
    return [rank(text(queries), gallery) for queries in list(zip(*pairs))[:2]]


def paraphrased_retrieval(data, text, image):
    """AO@10 and JS@10 of the image rankings for a query and for its paraphrase, means over pairs (section 3.2)."""
    images, pairs = read_paraphrases(data)
    a, b = rank_pairs(images, pairs, text, image)
    overlap, similarity = ([percent(column) for column in metric(a, b).T] for metric in (average_overlap, jaccard))
    return {"figures": {"AO@10": overlap[-1], "JS@10": similarity[-1]},
            "counts": {"pairs": len(pairs), "images": len(images)},
            "sub_scores": {f"{name}@{k}": value for name, values in (("AO", overlap), ("JS", similarity))
                           for k, value in enumerate(values, 1)}}


SYMMETRIC = frozenset("""
    adjusting, around, attached to, beside, between, bigger than, biting, boarding, brushing, by, chewing, cleaning,
    climbing, close to, coming from, coming out of, contain, crossing, dragging, draped over, drinking, drinking from,
    driving, driving down, driving on, eating from, eating in, enclosing, exiting, facing, filled with, floating in,
    floating on, flying, flying above, flying in, flying over, flying through, full of, going down, going into, going
    through, grazing in, growing in, growing on, guiding, hanging from, hanging in, hanging off, hanging over, higher
    than, holding onto, hugging, in between, jumping off, jumping on, jumping over, kept in, larger than, leading,
    leaning over, leaving, licking, longer than, looking in, looking into, looking out, looking over, looking through,
    lying next to, lying on top of, making, mixed with, mounted on, moving, near, next to, of, on the back of, on the
    edge of, on the front of, on the other side of, on the side of, opening, painted on, parked at, parked beside,
    parked by, parked in, parked in front of, parked near, parked next to, perched on, petting, piled on, playing,
    playing in, playing on, playing with, pouring, reaching for, reading, reflected on, riding on, running in, running
    on, running through, seen through, sitting behind, sitting beside, sitting by, sitting in front of, sitting near,
    sitting next to, sitting under, skiing down, skiing on, sleeping in, sleeping on, smiling at, sniffing, splashing,
    sprinkled on, stacked on, standing against, standing around, standing behind, standing beside, standing in front
    of, standing near, standing next to, staring at, stuck in, surrounding, swimming in, swinging, talking to, topped
    with, touching, traveling down, traveling on, tying, typing on, underneath, wading in, waiting for, walking
    across, walking by, walking down, walking next to, walking through, with, working in, working on, worn on, wrapped
    around, wrapped in
""".replace("\n    ", " ").strip().split(", "))  # relations that ARO leaves out as symmetric: both captions may be true


def read_aro(data, file, group_of):
    """(group_of(example), (image path, box), true caption, false caption) of each example."""
    path, folder = want(data, f"aro/{file}"), want(data, "aro/images")
    with reading(path), open(path, encoding="utf-8") as content:
        boxes = [(entry, *(entry[f"bbox_{side}"] for side in "xywh")) for entry in json.load(content)]
        return [(group_of(entry), (os.path.join(folder, entry["image_path"]), (x, y, x + w, y + h)),
                 entry["true_caption"], entry["false_caption"]) for entry, x, y, w, h in boxes]


def aro_figures(column, examples, groups, text, image):
    """Macro accuracy over the examples of `groups`: is cos(crop, true caption) > cos(crop, false)? A tie is wrong."""
    used = [example for example in examples if example[0] in groups]
    if not used:
        raise InputError(f"{column}: none of its {len(examples)} examples is of a group that counts")
    names, crops, true, false = zip(*used)
    image_features = image(crops)
    cosines = [(image_features * text(captions)).sum(1) for captions in (true, false)]
    correct = cosines[0] > cosines[1]
    accuracy = by_group(correct, names)
    return {"figures": {column: fmean(accuracy.values())},
            "counts": {"pairs": len(examples), "pairs_counted": len(used), "groups": len(accuracy)},
            "sub_scores": {"macro": fmean(accuracy.values()), "micro": percent(correct), "by_group": accuracy}}


def vg_relation(data, text, image):
    """VG-R: does the crop prefer "X relation Y" to "Y relation X"? Mean over relations without the symmetric ones."""
    examples = read_aro(data, "visual_genome_relation.json", lambda entry: entry["relation_name"])
    return aro_figures("VG-R", examples, {group for group, *_ in examples} - SYMMETRIC, text, image)


def vg_attribution(data, text, image):
    """VG-A: does the crop prefer its two attributes as they are to the two swapped? Mean over ordered pairs of them."""
    examples = read_aro(data, "visual_genome_attribution.json", lambda entry: "_".join(entry["attributes"]))
    sizes = collections.Counter(group for group, *_ in examples)
    return aro_figures("VG-A", examples, {group for group, size in sizes.items() if size >= 25}, text, image)


STS = {  # the seven tasks, and the years' sub-sets; a file of another name does not count (STS13's SMT has golds alone)
    "STS12": "MSRpar MSRvid SMTeuroparl surprise.OnWN surprise.SMTnews",
    "STS13": "FNWN headlines OnWN",
    "STS14": "deft-forum deft-news headlines images OnWN tweet-news",
    "STS15": "answers-forums answers-students belief headlines images",
    "STS16": "answer-answer headlines plagiarism postediting question-question",
    "STS-B": "",
    "SICK-R": "",
}


def read_table(path):
    """The lines of a file as lists of tab-separated fields. Quotes are text, and U+2028 ends no line."""
    with reading(path), open(path, encoding="utf-8-sig", newline="\n") as lines:
        return [line.rstrip("\r\n").split("\t") for line in lines]


def read_sts(data, task):
    """(sub-set, sentence 1, sentence 2, gold) of a task's pairs; an empty gold is not scored."""
    if task == "STS-B":  # genre, file, year, id, gold, two sentences[, two sources]
        rows = read_table(want(data, "sts/STSBenchmark/sts-test.csv"))
        return [(row[0], *row[5:7], row[4]) for row in rows if row != [""]]
    if task == "SICK-R":
        header, *rows = read_table(want(data, "sts/SICK/SICK_test_annotated.txt"))
        columns = [header.index(name) for name in ("sentence_A", "sentence_B", "relatedness_score")]
        return [("test", *(row[column] for column in columns)) for row in rows if row != [""]]
    pairs = []
    for subset in STS[task].split():
        names = [f"sts/{task}-en-test/{prefix}.{{}}.{subset}.txt" for prefix in ("STS", f"STS20{task[3:]}")]
        name = names[os.path.exists(os.path.join(data, names[1].format("gs")))]
        sentences, golds = (read_table(want(data, name.format(kind))) for kind in ("input", "gs"))
        if len(sentences) != len(golds):
            raise InputError(f"{data}/{name.format('gs')}: {len(golds)} lines, for {len(sentences)} pairs of sentences")
        pairs += [(subset, *row[:2], gold) for row, (gold, *_) in zip(sentences, golds) if gold.strip()]
    return pairs


def sts(data, text, _):
    """STS: Spearman's rho of cosines and golds, mean over the tasks; a year's sub-sets are one list ('all' setting)."""
    want(data, "sts")
    result = {"figures": {}, "counts": {}, "sub_scores": {}, "not_run": {}}
    for task in STS:
        try:
            with reading(f"{data}/sts, {task}"):
                subsets, first, second, golds = zip(*read_sts(data, task))
                golds = [float(gold) for gold in golds]
                if not all(0 <= gold <= 5 for gold in golds):  # nor nan
                    raise ValueError("a gold score that is not from 0 to 5")
        except NotThere as missing:
            result["not_run"][task] = str(missing)
            continue
        features = text(first + second)
        # rounded, so that pairs of equal sentences tie: their cosines are 1, but for the last bits
        scores = (features[: len(golds)] * features[len(golds) :]).sum(1).round(decimals=6).tolist()
        rho = {"all": spearman(scores, golds)}
        if rho["all"] is None:
            raise InputError(f"{task}: Spearman's rho is undefined, all golds or all cosines are equal")
        for subset in dict.fromkeys(subsets):
            rho[subset] = spearman(*zip(*((s, g) for s, g, name in zip(scores, golds, subsets) if name == subset)))
        result["counts"][task], result["sub_scores"][task] = len(golds), rho
    if result["counts"]:
        result["figures"]["STS"] = fmean(rho["all"] for rho in result["sub_scores"].values())
    return result


def zero_shot_weights(text):
    """[1000, D]: of each class, the normalised mean of the normalised features of its name in 80 templates."""
    classes, templates = open_clip.IMAGENET_CLASSNAMES, open_clip.OPENAI_IMAGENET_TEMPLATES
    prompts = text([template(name) for name in classes for template in templates])
    return fixed_point(prompts.unflatten(0, (len(classes), len(templates))).mean(1))


def imagenet(data, text, image):
    """Clsf: top-1 accuracy in percent on the validation images; sorted wnids are in open_clip's order of classes."""
    folder, classes = want(data, "imagenet/val"), len(open_clip.IMAGENET_CLASSNAMES)
    wnids = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    paths = [sorted(glob.glob(os.path.join(glob.escape(folder), wnid, "*.JPEG"))) for wnid in wnids]
    if len(wnids) != classes or not all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids) or not all(paths):
        raise InputError(f"{folder}: {len(wnids)} folders, {paths.count([])} without a .JPEG; the {classes} wnids "
                         "(n01440764, ...) are wanted, whose order gives the classes their names")
    labels = torch.arange(classes).repeat_interleave(torch.tensor([len(found) for found in paths]))
    ranked = rank(image([(path, None) for found in paths for path in found]), zero_shot_weights(text), 5)
    top1, top5 = (percent(recall(ranked, torch.arange(classes), labels, k)) for k in (1, 5))
    return {"figures": {"Clsf": top1}, "counts": {"images": len(labels), "classes": classes},
            "sub_scores": {"top-1": top1, "top-5": top5}}


def coco(data, text, image):
    """T R@5: of the images of val2017, how many find one of their first five captions. I R@5: of these, which find it.

    In percent. A caption of another image is no positive, even if it has the same words.
    """
    path, folder = want(data, "coco/annotations/captions_val2017.json"), want(data, "coco/val2017")
    with reading(path), open(path, encoding="utf-8") as file:
        content = json.load(file)
        names = {entry["id"]: os.path.join(folder, entry["file_name"]) for entry in content["images"]}
        captions = {name: [] for name in sorted(names.values())}
        for entry in content["annotations"]:
            captions[names[entry["image_id"]]].append(entry["caption"])
        if not (captions and all(captions.values())):
            raise InputError(f"{path}: an image without a caption")
    texts = [(caption, index) for index, found in enumerate(captions.values()) for caption in found[:5]]
    image_of_text, image_of_image = torch.tensor([index for _, index in texts]), torch.arange(len(captions))
    image_features, text_features = image([(path, None) for path in captions]), text([caption for caption, _ in texts])
    to_text, to_image = rank(image_features, text_features), rank(text_features, image_features)
    scores = {f"T R@{k}": percent(recall(to_text, image_of_text, image_of_image, k)) for k in (1, 5, 10)}
    scores |= {f"I R@{k}": percent(recall(to_image, image_of_image, image_of_text, k)) for k in (1, 5, 10)}
    return {"figures": {name: scores[name] for name in ("T R@5", "I R@5")},
            "counts": {"images": len(captions), "captions": len(texts)}, "sub_scores": scores}


# ---------------------------------------------------------------- the tasks, and the paper's tables

TASKS = {  # in Table 1's order: the benchmark, its columns, the counts of the paper's files
    "paraphrase": (paraphrased_retrieval, ["AO@10", "JS@10"], {"pairs": 4155, "images": 5000}),
    "vg-r": (vg_relation, ["VG-R"], {"pairs": 23937}),
    "vg-a": (vg_attribution, ["VG-A"], {"pairs": 28748}),
    "sts": (sts, ["STS"], {"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS16": 1186, "STS-B": 1379,
                           "SICK-R": 4927}),
    "imagenet": (imagenet, ["Clsf"], {"images": 50000}),
    "coco": (coco, ["T R@5", "I R@5"], {"images": 5000, "captions": 25000}),
}
COLUMNS = [column for _, columns, _ in TASKS.values() for column in columns]
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
    """The paper's row for a model, by a run's config.json: {"row": "openai + I:T", "figures": {...}}, or None."""
    (model, weights), loss = resolve(name), []
    if weights is None:
        try:
            with open(os.path.join(model.removeprefix("local-dir:"), "config.json"), encoding="utf-8") as file:
                record = json.load(file)
            model, weights, loss = *map(record["base_model"].get, ("open_clip", "pretrained")), record["flags"]["loss"]
        except (OSError, ValueError, LookupError, TypeError):  # no run of paraclip.py
            return None
    trained = (model, os.path.basename(weights or "")), {frozenset(term.split(":")) for term in loss}
    for (baseline, losses), figures in PAPER.items():
        if trained == (BASELINES[baseline], {frozenset(term.split(":")) for term in losses.split()}):
            return {"row": " + ".join([baseline, *losses.split()]), "figures": dict(zip(COLUMNS, figures))}


SOURCES = {  # by the first folder or file below --data
    "coco": "from cocodataset.org: val2017.zip, annotations_trainval2017.zip",
    "paraphrased_retrieval.jsonl": 'lines of {"query", "paraphrase"[, "image_id"]}, or rows of generate.py; no public '
                                   "download is known of the 4,155 pairs of Cheng et al. 2024, arXiv 2405.03190",
    "aro": "from github.com/mertyg/vision-language-models-are-bows",
    "sts": "from SentEval's downstream data: github.com/facebookresearch/SentEval",
    "imagenet": "from image-net.org: the ILSVRC 2012 validation images, in a folder for each wnid",
}


class NotThere(InputError):
    """A benchmark's file is missing: the cell says `not run`."""


def want(data, path):
    """The path of a benchmark's file or folder, given below --data with /. Raises NotThere."""
    if not os.path.exists(os.path.join(data, path)):
        raise NotThere(f"{os.path.join(data, path)} is not there ({SOURCES[path.split('/')[0]]})")
    return os.path.join(data, path)


@functools.cache
def digest(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).digest()


def open_crop(item):
    """The PIL image of (path, box), cropped before any preprocessing; box: (left, upper, right, lower), or None."""
    path, box = item
    return Image.open(path).convert("RGB").crop(box) if box else Image.open(path)


def look_up(cache, keys, items, encode):
    """[n, D] of fixed_point of n items, each key encoded once: equal texts and equal images tie. Raises InputError."""
    missing = {key: item for key, item in zip(keys, items) if key not in cache}
    if missing:
        encoded = encode(list(missing.values()))
        cache.update(zip(missing, tqdm(encoded, "features", len(missing), False, delay=3, mininterval=BAR_SECONDS)))
    features = torch.stack([cache[key] for key in keys])
    if not features.isfinite().all():
        raise InputError("the model's features are not finite: its weights are damaged")
    return fixed_point(features).to(DEVICE)


def encoders(clip, preprocess, tokenizer, image_cache, args):
    """A model as two functions, text(n texts) and image(n pairs (path, box)), each -> [n, D] of fixed_point."""
    text_encoder, text_cache = TextEncoder(clip, bf16=args.precision == "bf16"), {}

    @torch.no_grad()
    def encode_tokens(tokens):
        for block in torch.stack(tokens).split(TEXTS_AT_ONCE):
            yield from text_encoder(block)[0].float().cpu()

    def encode_crops(items):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=text_encoder.bf16):
            for (path, _), (found, why) in zip(items, encode_images(clip, preprocess, items, open_crop, args.workers)):
                if why:
                    raise InputError(f"{path}: can't be read as an image ({why}); get the benchmark's file again")
                yield found

    def text(texts):
        tokens = tokenizer(list(texts))
        return look_up(text_cache, [row.tobytes() for row in tokens.numpy()], tokens, encode_tokens)

    def image(items):
        return look_up(image_cache, [(digest(path), box) for path, box in items], items, encode_crops)

    return text, image


def draw_gallery(args, rankings):
    """Figure 3: for queries A and B of three pairs, the five best images of the first two models, the gold one framed.

    The pairs are those whose AO@10 differs most; with one model, the first. rankings: rank_pairs() of each model.
    """
    (images, pairs), rankings, side, line = read_paraphrases(args.data), rankings[:2], 112, 20  # pixels
    overlaps = [average_overlap(a, b)[:, -1] for a, b in rankings]
    rows = [(f"{' | '.join(args.models[:2])}; framed: the gold image", None, ())]  # text, gold, a ranking a model
    for pair in (overlaps[-1] - overlaps[0]).abs().argsort(descending=True, stable=True)[:3].tolist():
        scores = " and ".join(f"{100 * overlap[pair]:.1f}" for overlap in overlaps)
        for letter, query, tops in zip("AB", pairs[pair], zip(*rankings)):
            rows.append((f"{letter}: {query}", pairs[pair][2], [top[pair, :5].tolist() for top in tops]))
        rows.append((f"AO@10 of A and B: {scores}", None, ()))
    texts = [textwrap.wrap(text, 70 * len(rankings)) for text, *_ in rows]
    height = sum(line * len(lines) + side * bool(tops) + 8 for lines, (*_, tops) in zip(texts, rows))
    canvas = Image.new("RGB", (len(rankings) * (5 * side + 20), height), "white")
    draw, y = ImageDraw.Draw(canvas), 4
    for lines, (_, gold, tops) in zip(texts, rows):
        draw.multiline_text((6, y), "\n".join(lines), "black", ImageFont.load_default(15), spacing=line - 15)
        y += line * len(lines) + 8
        for model, top in enumerate(tops):
            for place, index in enumerate(top):
                tile = ImageOps.fit(Image.open(images[index]).convert("RGB"), (side - 12, side - 12))
                at = (model * (5 * side + 20) + place * side, y - 4)
                canvas.paste(ImageOps.expand(tile, 6, "#f0a800" if index == gold else "white"), at)
        y += side * bool(tops)
    with atomic_write(args.gallery, "wb") as file:
        canvas.save(file, "PNG")


def table(models):
    """The results of `models` as Markdown in Table 1's columns, and below it what was not run or has other counts."""
    rows, notes, first = [["", *COLUMNS]], [], None
    for model in models:
        figures, shown = {}, dict.fromkeys(COLUMNS, "not run")
        for task, result in model["tasks"].items():
            figures |= result["figures"]
            star = "*" if result["not_run"] else ""
            shown |= {column: f"{value:.1f}{star}" for column, value in result["figures"].items()}
            notes += [f"not run: {part}: {why}" for part, why in result["not_run"].items()]
            notes += [f"* {column}: the mean of {' '.join(result['counts'])} alone, not comparable with the paper's"
                      for column in result["figures"] if result["not_run"]]
            other = [f"{part} {result['counts'][part]:,}, not {count:,}" for part, count in TASKS[task][2].items()
                     if result["counts"].get(part, count) != count]
            if other:
                notes.append(f"{task}: not the paper's data ({'; '.join(other)}), not comparable with its figures")
        rows.append([model["name"], *shown.values()])
        if paper := model["paper"]:
            rows.append([f"  paper: {paper['row']}", *(f"{value:.1f}" for value in paper["figures"].values())])
        first = figures if model is models[0] else first
        if model is not models[0]:
            gains = {c: f"{round(figures[c], 1) - round(first[c], 1):+.1f}" for c in figures.keys() & first.keys()}
            rows.append([f"  minus {models[0]['name']}", *(gains.get(column, "") for column in COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in aligned), "", *dict.fromkeys(notes)]).strip()


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter, allow_abbrev=False)
    add, default = parser.add_argument, " (default: %(default)s)"
    add("models", nargs="+", metavar="MODEL", help="as paraclip.py's --model: each a row, compared with the first")
    add("--data", required=True, metavar="DIR", help="folder of the benchmarks; what is not there is named")
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK", help="columns of Table 1" + default)
    add("--json", metavar="FILE", help="write figures, counts, sub-scores and fingerprints here (default: no)")
    add("--gallery", metavar="FILE.png", help="draw Figure 3 here: the three pairs of queries for which AO@10 of the\n"
        "first two models differs most, either way (default: no)")
    add("--precision", default="fp32", choices=["fp32", "bf16"], help="of the encoders: not stated; ours" + default)
    add("--workers", type=at_least(0), default=min(CORES, 16), help="processes that decode images: ours" + default)
    args = parser.parse_args(argv)
    for path, ending in ((args.json or "x.json", ".json"), (args.gallery or "x.png", ".png")):
        below = os.path.realpath(path).startswith(os.path.realpath(args.data) + os.sep)
        if below or not path.endswith(ending) or not os.path.isdir(os.path.dirname(path) or "."):
            parser.error(f"{path}: must end in {ending}, in a folder that is there, and not below --data")
    if not os.path.isdir(args.data):
        parser.error(f"--data {args.data}: no such folder")
    return args


def evaluate(name, image_caches, args):
    """One model's results on every task, and its rank_pairs(). image_caches: features by their tower's fingerprint."""
    clip, preprocess, tokenizer = load_model(name, DEVICE)
    tower = fingerprint(clip.visual, clip.visual.preprocess_cfg)
    text, image = encoders(clip, preprocess, tokenizer, image_caches.setdefault(tower, {}), args)
    tasks = {}
    for task in [task for task in TASKS if task in args.tasks]:
        started = time.monotonic()
        try:
            result = TASKS[task][0](args.data, text, image)
        except NotThere as missing:
            result = {"figures": {}, "counts": {}, "sub_scores": {}, "not_run": {task: str(missing)}}
        tasks[task] = {"not_run": {}, **result}
        said = ", ".join(f"{column} {value:.1f}" for column, value in result["figures"].items()) or "not run"
        print(f"{name}: {task}: {said} ({time.monotonic() - started:.1f} s)", flush=True)
    rankings = rank_pairs(*read_paraphrases(args.data), text, image) if args.gallery else None
    return {"name": name, "fingerprint": fingerprint(clip), "image_tower": tower, "paper": paper_row(name),
            "tasks": tasks}, rankings


def main():
    args = parse_args()
    for name in args.models:
        resolve(name)
    try:
        args.gallery and read_paraphrases(args.data)
    except NotThere as missing:
        print(f"--gallery: not run: {missing}")
        args.gallery = None
    torch.backends.cudnn.allow_tf32 = False  # else "fp32" convolutions keep 10 bits of 23
    versions = {package.__name__: package.__version__ for package in (torch, open_clip, scipy)}
    report, image_caches, rankings = {"flags": vars(args), "device": DEVICE, "models": [], "versions": versions}, {}, []
    for name in args.models:
        result, ranking = evaluate(name, image_caches, args)
        report["models"].append(result)
        rankings.append(ranking)
        if args.json:
            with atomic_write(args.json) as file:
                json.dump(report, file, indent=1, allow_nan=False)
    print(f"\n{table(report['models'])}")
    if args.gallery:
        draw_gallery(args, rankings)


if __name__ == "__main__":
    run(main)
