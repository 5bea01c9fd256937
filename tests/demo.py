"""ParaCLIP whole, on a toy world: minutes on two CPU cores, no network, no key, no data to fetch.

    python tests/demo.py [--output demo]

Draws scenes of coloured shapes with captions as noisy as web alt-text, pre-trains a tiny CLIP on
them, serves an OpenAI-compatible paraphraser on loopback (rules and a list of synonyms, and its
share of bad answers), then runs generate.py, paraclip.py and evaluate.py as a user would, and
prints the table before and after. A third model is fine-tuned on the same images and captions
without the paraphrases (Table 2's L1, `--loss I:T`), so that the difference is the paraphrases'
own. It is the best case: the benchmarks have other scenes and other sentences than training, but
the paraphraser knows the very synonyms that they use; in the captions one word in ten is such a
synonym.
"""

import argparse
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import torch
from openai_server import Reply, Server
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ------------------------------------------ the world: two shapes on a ground, or one thing

SYNONYMS = {  # of each plain word
    "red": ["crimson", "scarlet"],
    "green": ["emerald", "olive"],
    "blue": ["azure", "navy"],
    "yellow": ["golden", "lemon"],
    "orange": ["amber", "tangerine"],
    "purple": ["violet", "lilac"],
    "pink": ["rose", "magenta"],
    "brown": ["chestnut", "tan"],
    "circle": ["disc", "ball"],
    "square": ["box", "block"],
    "triangle": ["pyramid", "wedge"],
    "cross": ["plus", "crucifix"],
    "ring": ["hoop", "loop"],
    "small": ["tiny", "little"],
    "large": ["big", "huge"],
    "left of": ["to the left of", "on the left side of"],
    "right of": ["to the right of", "on the right side of"],
    "above": ["over", "higher up than"],
    "below": ["under", "beneath"],
}
PLAIN = {}  # {any word: the plain word for the same}
for plain_word, synonyms in SYNONYMS.items():
    for any_word in (plain_word, *synonyms):
        PLAIN[any_word] = plain_word
COLOURS = {
    "red": "#d22",
    "green": "#2a2",
    "blue": "#24d",
    "yellow": "#fd0",
    "orange": "#f80",
    "purple": "#82b",
    "pink": "#f6b",
    "brown": "#842",
}
SHAPES = ["circle", "square", "triangle", "cross", "ring"]
SIZES = ["small", "large"]
RELATIONS = {  # where the first object lies, seen from the second: x, y
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
GROUNDS = ["#fff", "#bbb", "#222", "#cdf", "#dfc"]
PLACES = [(24, 24), (72, 24), (48, 48), (24, 72), (72, 72)]


def draw_shape(canvas, shape, colour, size, x, y):
    radius = 9 if size == "small" else 18
    third = radius // 3
    left, right = x - radius, x + radius
    top, bottom = y - radius, y + radius
    fill = COLOURS[colour]
    if shape == "circle":
        canvas.ellipse((left, top, right, bottom), fill)
    elif shape == "square":
        canvas.rectangle((left, top, right, bottom), fill)
    elif shape == "triangle":
        canvas.polygon([(x, top), (left, bottom), (right, bottom)], fill)
    elif shape == "ring":
        canvas.ellipse((left, top, right, bottom), outline=fill, width=third)
    else:  # a cross
        canvas.rectangle((left, y - third, right, y + third), fill)
        canvas.rectangle((x - third, top, x + third, bottom), fill)


def make_object(rng):
    """(size, colour, shape)"""
    return rng.choice(SIZES), rng.choice(list(COLOURS)), rng.choice(SHAPES)


def make_scene(rng):
    """Two objects of different kinds, how the first lies to the second, and the ground."""
    first = make_object(rng)
    second = make_object(rng)
    if first[1:] == second[1:]:
        return make_scene(rng)
    return first, second, rng.choice(list(RELATIONS)), rng.choice(GROUNDS)


def draw_scene(scene, rng, margin=0):
    """The scene on 96 x 96 pixels, and on each side a margin, which holds a third object."""
    first, second, relation, ground = scene
    side = 96 + 2 * margin
    image = Image.new("RGB", (side, side), ground)
    canvas = ImageDraw.Draw(image)
    dx, dy = RELATIONS[relation]
    for (size, colour, shape), sign in ((first, 1), (second, -1)):
        x = side // 2 + sign * 24 * dx + rng.randint(-4, 4)
        y = side // 2 + sign * 24 * dy + rng.randint(-4, 4)
        draw_shape(canvas, shape, colour, size, x, y)
    if margin:
        draw_shape(canvas, rng.choice(SHAPES), rng.choice(list(COLOURS)), "small", 12, 12)
    return image


def draw_thing(number, rng):
    """One of 1,000 things, each its own colour, shape, ground and place: the toy's ImageNet."""
    number, colour = divmod(number, 8)
    number, shape = divmod(number, 5)
    place, ground = divmod(number, 5)
    image = Image.new("RGB", (96, 96), GROUNDS[ground])
    x, y = PLACES[place]
    x += rng.randint(-3, 3)
    y += rng.randint(-3, 3)
    canvas = ImageDraw.Draw(image)
    draw_shape(canvas, SHAPES[shape], list(COLOURS)[colour], "large", x, y)
    return image


def an(name):
    """The name with its article."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def word(plain, rng, rare):
    """The plain word, or with probability `rare` another for the same."""
    return rng.choice(SYNONYMS[plain]) if rng.random() < rare else plain


def name(thing, rng, rare, sized=0.5):
    """The words for an object, with its size in a share `sized` of the cases."""
    size, colour, shape = thing
    size = word(size, rng, rare)
    words = [size] if rng.random() < sized else []
    words.append(word(colour, rng, rare))
    words.append(word(shape, rng, rare))
    return " ".join(words)


def alt_text(body, rng):
    """`body` as web pages caption images: codes, file extensions, shouting."""
    number = rng.randint(100, 99999)
    text = rng.choice([
        f"{body}",
        f"{body} | Stock Photo {number}",
        f"{body} #{number}",
        f"{body}_{number}.jpg",
        f"IMG_{number} {body}",
        f"{body} - Free Shipping!!",
        f"NEW {body} SKU{number}",
    ])
    return rng.choice([text, text.title(), text.upper(), text])


def web_caption(scene, rng):
    """A noisy caption that tells some of the scene, nearly always in plain words."""
    first, second, relation, _ = scene
    a = name(first, rng, 0.1)
    b = name(second, rng, 0.1)
    text = rng.choice([
        f"{a} {word(relation, rng, 0.1)} {b}",
        f"{a} {word(relation, rng, 0.1)} {b}",
        f"{a}, {b}",
    ])
    return alt_text(text, rng)


def query(scene, rng, rare, form):
    """What a user types, in one of three forms that neither captions nor paraphraser use."""
    first, second, relation, _ = scene
    a = name(first, rng, rare, 0.7)
    b = name(second, rng, rare, 0.7)
    forms = [
        f"there is {an(a)} {word(relation, rng, rare)} {an(b)}",
        f"I see one {a}, it is {word(relation, rng, rare)} the {b}",
        f"picture with the {a} {word(relation, rng, rare)} some {b}",
    ]
    return forms[form]


# ------------------------------------------ the paraphraser: stands in for an LLM


def any_of(plain_words):
    """A regular expression for every word that means one of `plain_words`, longest first."""
    words = [word for word in PLAIN if PLAIN[word] in plain_words]
    words.sort(key=len, reverse=True)
    return rf"\b(?:{'|'.join(words)})\b"


OBJECT = re.compile(rf"(?:{any_of(SIZES)} )?{any_of(COLOURS)} {any_of(SHAPES)}")
RELATION = re.compile(any_of(RELATIONS))
NOISE = re.compile(
    r"\b(?:sku|img)?\d+\b|\.jpg|#|\||stock photo|free shipping|\bnew\b|\bimg\b|[!-]+"
)


def other_word(word, rng):
    plain = PLAIN[word]
    return rng.choice([other for other in (plain, *SYNONYMS[plain]) if other != word])


def clean(text):
    text = NOISE.sub(" ", text.lower().replace("_", " "))
    return " ".join(text.split()).strip(" ,")


def paraphrase(request):
    """Step 1: without the noise, a plain sentence. Step 2: other words. Sees the text alone."""
    rng = random.Random(request.source)
    text = clean(request.source)
    objects = OBJECT.findall(text)
    relation = RELATION.search(text)
    relation = relation.group() if relation else ""
    if len(objects) != 2:
        if request.step == 1:
            return f"a picture of a {text}"
        return f"{text.removeprefix('a picture of ')} shown here"

    if request.step == 1:
        a, b = map(an, objects)
        return f"{a} {relation} {b}" if relation else f"{a} and {b}"
    others = []
    for words in objects:
        others.append(" ".join(other_word(word, rng) for word in words.split()))
    a, b = map(an, others)
    return f"{a} lies {other_word(relation, rng)} {b}" if relation else f"both {a} and {b}"


def answer(request):
    """paraphrase(), or, the first time step 1 is asked, now and then what LLMs and servers do."""
    good = paraphrase(request)
    if request.step == 2 or request.prompt in answer.asked:
        return Reply(good)
    answer.asked.add(request.prompt)
    faults = [
        Reply(status=500, body=b"the demo's server fails now and then, on purpose"),
        Reply("I'm sorry, but I can't help with that."),
        Reply(""),
        Reply(good[:9], "length"),
        Reply(f'"{good}"'),  # this one is no fault: quotes are taken off
    ]
    number = random.Random("fault " + request.prompt).randrange(100)
    if number < len(faults):
        return faults[number]
    return Reply(good)


answer.asked = set()

# ------------------------------------------ files: training data and benchmarks


def make_training_data(folder, scenes, rng):
    """images/train/NUMBER.jpg and captions.tsv. Returns the pairs (image, caption).

    A tenth of the pictures are of the 1,000 things.
    """
    (folder / "images/train").mkdir(parents=True)
    pairs = []
    with open(folder / "captions.tsv", "w") as file:
        file.write("filepath\ttitle\n")
        for i in range(scenes):
            if i % 10 == 0:
                number = rng.randrange(1000)
                image = draw_thing(number, rng)
                caption = alt_text(open_clip.IMAGENET_CLASSNAMES[number], rng)
            else:
                scene = make_scene(rng)
                image = draw_scene(scene, rng)
                caption = web_caption(scene, rng)
            image.save(folder / f"images/train/{i:05}.jpg", quality=95)
            file.write(f"train/{i:05}\t{caption}\n")
            pairs.append((image, caption))
    return pairs


def make_benchmarks(folder, rng):
    """Every file that evaluate.py reads, in the real formats, on scenes of their own."""
    make_coco(folder, rng)
    make_aro(folder / "aro", rng)
    make_sts(folder / "sts", rng)
    for number in range(1000):
        wnid = folder / f"imagenet/val/n{number:08}"
        wnid.mkdir(parents=True)
        draw_thing(number, rng).save(wnid / "0.JPEG", quality=95)


def make_coco(folder, rng):
    """COCO's layout, and the pairs of queries for its images."""
    (folder / "coco/val2017").mkdir(parents=True)
    (folder / "coco/annotations").mkdir()
    images = []
    annotations = []
    pairs = []
    for i in range(400):
        scene = make_scene(rng)
        file_name = f"{i:012}.jpg"
        draw_scene(scene, rng).save(folder / "coco/val2017" / file_name, quality=95)
        images.append({"id": i, "file_name": file_name})
        for k in range(5):
            caption = query(scene, rng, 0.5, k % 3)
            annotations.append({"id": 5 * i + k, "image_id": i, "caption": caption})
        pairs.append({
            "query": query(scene, rng, 0.3, i % 3),
            "paraphrase": query(scene, rng, 0.7, (i + 1) % 3),
            "image_id": i,
        })
    content = json.dumps({"images": images, "annotations": annotations})
    (folder / "coco/annotations/captions_val2017.json").write_text(content)
    lines = [json.dumps(pair) + "\n" for pair in pairs]
    (folder / "paraphrased_retrieval.jsonl").write_text("".join(lines))


def make_aro(folder, rng):
    """ARO's two files: relations swapped, and attributes swapped, in turn."""
    (folder / "images").mkdir(parents=True)
    relations = []
    attributions = []
    pairs_of_colours = [
        ("red", "blue"), ("green", "yellow"), ("orange", "purple"), ("pink", "brown"),
    ]  # fmt: skip
    for i in range(400):
        first, second, relation, ground = make_scene(rng)
        size = rng.choice(SIZES)
        if i % 2:  # one size, and the colours of a pair: 50 examples a pair
            colours = pairs_of_colours[i // 2 % 4]
            shapes = rng.sample(SHAPES, 2)
            first = size, colours[0], shapes[0]
            second = size, colours[1], shapes[1]
        image = draw_scene((first, second, relation, ground), rng, margin=32)
        image.save(folder / "images" / f"{i}.jpg", quality=95)

        box = {"bbox_x": 32, "bbox_y": 32, "bbox_w": 96, "bbox_h": 96}
        example = {"image_path": f"{i}.jpg", **box}
        _, colour_a, a = first
        _, colour_b, b = second
        if i % 2:
            example["attributes"] = list(colours)
            example["true_caption"] = f"the {colour_a} {a} and the {colour_b} {b}"
            example["false_caption"] = f"the {colour_b} {a} and the {colour_a} {b}"
            attributions.append(example)
        else:
            relation = SYNONYMS[relation][0]
            example["relation_name"] = relation
            example["true_caption"] = f"the {colour_a} {a} is {relation} the {colour_b} {b}"
            example["false_caption"] = f"the {colour_b} {b} is {relation} the {colour_a} {a}"
            relations.append(example)
    (folder / "visual_genome_relation.json").write_text(json.dumps(relations))
    (folder / "visual_genome_attribution.json").write_text(json.dumps(attributions))


def make_sentence_pair(form, rng):
    """(score, sentence, sentence): how much of their scenes is the same, from 0 to 5."""
    one = make_scene(rng)
    other = make_scene(rng)
    keep = rng.random()  # the share of `one` that `mixed` keeps

    def mix(a, b):
        return a if rng.random() < keep else b

    parts = []
    for parts_of_one, parts_of_other in zip(one[:2], other[:2]):
        parts += map(mix, parts_of_one, parts_of_other)
    mixed = (tuple(parts[:3]), tuple(parts[3:]), mix(one[2], other[2]), "")

    parts_of_one = [*one[0], *one[1], one[2]]
    parts_of_mixed = [*mixed[0], *mixed[1], mixed[2]]
    same = sum(a == b for a, b in zip(parts_of_one, parts_of_mixed))
    score = 5 * same / len(parts_of_one)
    return f"{score:.3f}", query(one, rng, 0.5, form), query(mixed, rng, 0.5, (form + 1) % 3)


def make_sts(folder, rng):
    """Pairs of sentences, laid out as the seven tasks lay them out."""
    from evaluate import STS

    for year, subsets in list(STS.items())[:5]:
        (folder / f"{year}-en-test").mkdir(parents=True)
        for subset in subsets.split():
            pairs = [make_sentence_pair(k % 3, rng) for k in range(50)]
            inputs = "".join(f"{a}\t{b}\n" for _, a, b in pairs)
            scores = "".join(f"{score}\n" for score, _, _ in pairs)
            (folder / f"{year}-en-test/STS.input.{subset}.txt").write_text(inputs)
            (folder / f"{year}-en-test/STS.gs.{subset}.txt").write_text(scores)

    pairs = [make_sentence_pair(k % 3, rng) for k in range(500)]
    lines = []
    for k, (score, a, b) in enumerate(pairs[:250]):
        lines.append(f"main-captions\ttoy\t2026\t{k:04}\t{score}\t{a}\t{b}\n")
    (folder / "STSBenchmark").mkdir()
    (folder / "STSBenchmark/sts-test.csv").write_text("".join(lines))
    lines = ["pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\r\n"]
    for k, (score, a, b) in enumerate(pairs[250:]):
        lines.append(f"{k}\t{a}\t{b}\t{score}\tNEUTRAL\r\n")
    (folder / "SICK").mkdir()
    (folder / "SICK/SICK_test_annotated.txt").write_text("".join(lines))


# ------------------------------------------ the tiny CLIP

CLIP = {
    "embed_dim": 96,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 96, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 3},
}


def pretrain(folder, pairs, steps, batch_size=128, lr=1e-3):
    """CLIP's own training, on images and noisy captions; writes an open_clip local-dir."""
    from paraclip import TextEncoder, info_nce

    torch.manual_seed(0)
    clip = open_clip.CLIP(**CLIP)
    config = {"model_cfg": CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    preprocess = open_clip.image_transform(32, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3)
    images = torch.stack([preprocess(image) for image, _ in pairs])
    tokens = open_clip.get_tokenizer("ViT-B-32")([caption for _, caption in pairs])
    encoder = TextEncoder(clip)
    optimizer = torch.optim.AdamW(clip.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    order = torch.empty(0, dtype=torch.long)
    bar = tqdm(range(steps), "pre-training a tiny CLIP", mininterval=3, unit="step")
    for _ in bar:
        if len(order) < batch_size:
            order = torch.randperm(len(pairs))
        batch = order[:batch_size]
        order = order[batch_size:]
        text_features, logit_scale = encoder(tokens[batch])
        image_features = clip.encode_image(images[batch], normalize=True)
        loss = info_nce(image_features, text_features, logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        clip.logit_scale.data.clamp_(0, math.log(100))
        bar.set_postfix({"loss": loss.item()}, refresh=False)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")


# ------------------------------------------ as a user would


def run(command, folder, codes=(0,), **environment):
    """Run one of the three scripts in `folder`, and show its command."""
    print(f"\n$ {command}", flush=True)
    words = shlex.split(command)
    words = [sys.executable, str(ROOT / words[1]), *words[2:]]
    code = subprocess.run(words, cwd=folder, check=False, env={**os.environ, **environment})
    if code.returncode not in codes:
        sys.exit(f"the demo ends here: the command has exit code {code.returncode}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="demo",
        help="folder for everything; made anew (default: demo)")
    parser.add_argument("--scenes", type=int, default=4000,
        help="training pictures (default: 4000)")
    parser.add_argument("--steps", type=int, default=400, help="of pre-training (default: 400)")
    flags = parser.parse_args()
    folder = Path(flags.output)
    started = time.time()
    rng = random.Random(0)
    if folder.exists() and not (folder / "captions.tsv").exists():
        sys.exit(f"{folder} is there and is no demo's; give another --output")
    shutil.rmtree(folder, ignore_errors=True)

    print(f"drawing {flags.scenes} training pictures and the benchmarks in {folder}", flush=True)
    pairs = make_training_data(folder, flags.scenes, rng)
    make_benchmarks(folder / "benchmarks", rng)
    print(f"the caption of a picture: {pairs[1][1]!r}", flush=True)
    pretrain(folder / "clip", pairs, flags.steps)

    print("\nNow as a user would. The demo's LLM is a server on this machine that gives a bad "
          "answer now and then,\non purpose: the first command ends with failed captions (exit "
          "code 1), and the second asks for them again.")
    generate = "python generate.py captions.tsv --output rows.jsonl --concurrency 1"
    with Server(answer) as server:  # one call at a time: the rows come in the same order every time
        environment = {"OPENAI_API_KEY": "not-needed", "OPENAI_BASE_URL": server.url}
        run(generate, folder, codes=(0, 1), **environment)
        run(generate, folder, **environment)
    train = ("python paraclip.py --rows rows.jsonl --images images --cache cache "
             "--model clip --batch-size 256 --epochs 4 --lr 2e-4")
    run(f"{train} --output runs/paraclip", folder)
    run(f"{train} --output runs/L1 --loss I:T", folder)
    run("python evaluate.py clip runs/paraclip runs/L1 --data benchmarks --json results.json "
        "--gallery figure3.html", folder)
    print(f"""
Figure 3, for a browser: {folder / 'figure3.html'}
This has shown, on drawn pictures and with one seed, that the three scripts work together, and how
training on paraphrases changes a CLIP that trained on noisy captions, beside training on the same
captions without them (L1); it has not shown how much a real CLIP gains from a real LLM.
{time.time() - started:.0f} seconds in all""")


if __name__ == "__main__":
    main()
