"""Tiny models, rows, images and benchmarks in the real formats: no network is needed."""

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same on every machine: two ranks need no two GPUs

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
WORDS = [
    "red", "green", "blue", "small", "large", "round", "square", "dog", "cat", "car", "tree",
    "house", "river", "above", "below", "near", "old", "new",
]  # fmt: skip


def pytest_configure(config):
    # Python 3.12 and later warn of a fork, which DataLoader makes for each worker.
    config.addinivalue_line("filterwarnings", "ignore:.*multi-threaded, use of fork")


def make_clip(folder, model_cfg=TINY, seed=0):
    """Write a random open_clip model as a local-dir and return its --model name."""
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    clip = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def make_rows(folder, count, seed=0):
    """Write rows.jsonl and images/*.jpg of `count` examples, with texts of 2 to 80 words."""
    random = np.random.default_rng(seed)

    def text():
        length = random.choice([2, 4, 8, 80], p=[0.3, 0.4, 0.25, 0.05])
        return " ".join(random.choice(WORDS, length))

    (folder / "images").mkdir()
    with open(folder / "rows.jsonl", "w") as file:
        for i in range(count):
            pixels = random.integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{i:04}.jpg")
            row = {
                "image_id": f"{i:04}",
                "caption": text(),
                "paraphrase_1": text(),
                "paraphrase_2": text(),
                "index": i,
            }
            file.write(json.dumps(row) + "\n")


def tar(members):
    """The bytes of a tar file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def make_roberta(folder):
    """A small RoBERTa's config and tokenizer, as transformers would fetch them; a CLIP with it."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    (folder / "hf").mkdir()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = special + [*"abcdefghijklmnopqrstuvwxyz", "\u0120"]
    vocabulary = {word: i for i, word in enumerate(words)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
    config = transformers.RobertaConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=130,
    )
    config.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    (folder / "clip").mkdir()
    tokenizer.save_pretrained(folder / "clip")
    text_cfg = {
        "hf_model_name": str(folder / "hf"),
        "hf_tokenizer_name": str(folder / "hf"),
        "hf_pooler_type": "mean_pooler",
        "hf_model_pretrained": False,
        "context_length": 77,
        "hf_proj_type": "linear",
    }
    return make_clip(folder / "clip", {**TINY, "text_cfg": text_cfg})


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with rows.jsonl, images/ and the model in clip/."""
    folder = tmp_path_factory.mktemp("world")
    make_rows(folder, 80)
    make_clip(folder / "clip")
    return folder


# ---------------------------------------------------------------- benchmarks

NAMES = [f"{139 + 7 * i:012}.jpg" for i in range(14)]


def sentence(random):
    return " ".join(random.choice(WORDS, random.integers(3, 9)))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def make_sts(folder, random):
    """SentEval's layout with its traps.

    Both prefixes, 4 columns, empty golds, 9 columns, quotes, CRLF, U+2028.
    """
    from evaluate import STS

    for year, subsets in list(STS.items())[:5]:
        for subset in subsets.split():
            pairs = [(sentence(random), sentence(random)) for _ in range(6)]
            pairs.append(('a "big dog', "\u2028 dog\x85 here"))
            golds = [f"{gold:.3f}" for gold in random.uniform(0, 5, 6)] + ["5"]
            if year in ("STS15", "STS16"):
                golds[2] = golds[4] = ""
            prefix = "STS2016" if year == "STS16" else "STS"
            more = "\thttp://a\thttp://b" if year == "STS16" else ""
            place = folder / f"{year}-en-test"
            lines = [f"{a}\t{b}{more}\n" for a, b in pairs]
            write(place / f"{prefix}.input.{subset}.txt", "".join(lines))
            write(place / f"{prefix}.gs.{subset}.txt", "".join(f"{gold}\n" for gold in golds))
    write(folder / "STS13-en-test" / "STS.gs.SMT.txt", "1\n2\n")

    lines = []
    for i in range(7):
        texts = f"{sentence(random)}\t{sentence(random)}"
        lines.append(f"main-captions\tMSRvid\t2012test\t{i:04}\t{i % 6}.000\t{texts}")
    lines[1] += "\tsource one\tsource two"
    lines[2] = 'main-news\tfile\t2013\t1\t2.5\t"a dog said\the said "yes"'
    write(folder / "STSBenchmark" / "sts-test.csv", "\n".join(lines) + "\n")

    lines = ["pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment"]
    for i in range(8):
        lines.append(f"{i}\t{sentence(random)}\t{sentence(random)}\t{1 + i / 2}\tNEUTRAL")
    write(folder / "SICK" / "SICK_test_annotated.txt", "\r\n".join(lines) + "\r\n")


def aro_example(name, box, true, false, **more):
    box = dict(zip(("bbox_x", "bbox_y", "bbox_w", "bbox_h"), box))
    captions = {"true_caption": true, "false_caption": false}
    return {"image_path": name, **box, **captions, "image_id": 1, **more}


def make_coco(folder, random):
    for name in NAMES:
        blocks = random.integers(0, 256, (6, 8, 3), np.uint8)
        pixels = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
        write(folder / "val2017" / name, b"")
        Image.fromarray(pixels).save(folder / "val2017" / name)
    same = (folder / "val2017" / NAMES[2]).read_bytes()
    write(folder / "val2017" / NAMES[9], same)  # two that tie
    images = [{"id": int(name[:-4]), "file_name": name} for name in reversed(NAMES)]
    annotations = []
    for i, image in enumerate(images * 6):
        caption = sentence(random)
        if i // len(NAMES) == 5:
            caption += " sixth"
        annotations.append({"image_id": image["id"], "id": i, "caption": caption})
    annotations[3]["caption"] = annotations[20]["caption"] = "A dog.\n"
    content = json.dumps({"images": images, "annotations": annotations})
    write(folder / "annotations/captions_val2017.json", content)


def make_pairs(path, random):
    """Queries and paraphrases, and one of generate.py's rows; no newline at the end."""
    pairs = []
    for image_id in (139, "146", NAMES[2], NAMES[3][:-4]):
        pairs.append({"query": sentence(random), "paraphrase": sentence(random)})
        pairs[-1]["image_id"] = image_id
    pairs.append({"query": "the same", "paraphrase": "The  SAME"})
    row = {"image_id": "val2017/000000000146", "caption": "a dog"}
    pairs.append({**row, "paraphrase_1": "a hound", "paraphrase_2": "x"})
    write(path, "\n".join(map(json.dumps, pairs)))


def make_aro(folder, random):
    image = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (40, 60, 3), np.uint8)).save(image, "png")
    write(folder / "images/1.png", image.getvalue())
    examples = []
    for i, name in enumerate(["on", "on", "on", "under", "next to", "holding"]):
        box = (i, i, 20 + i, 20)
        texts = sentence(random), sentence(random)
        examples.append(aro_example("1.png", box, *texts, relation_name=name))
    write(folder / "visual_genome_relation.json", json.dumps(examples))
    examples = []
    attributes = [["red", "wet"]] * 25 + [["wet", "red"]] * 24 + [["old", "big"]] * 26
    for i, both in enumerate(attributes):
        texts = sentence(random), sentence(random)
        examples.append(aro_example("1.png", (i % 9, 0, 30, 30), *texts, attributes=both))
    write(folder / "visual_genome_attribution.json", json.dumps(examples))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Every benchmark but ImageNet, small."""
    folder = tmp_path_factory.mktemp("benchmarks")
    random = np.random.default_rng(0)
    make_coco(folder / "coco", random)
    make_pairs(folder / "paraphrased_retrieval.jsonl", random)
    make_aro(folder / "aro", random)
    make_sts(folder / "sts", random)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random base model, and a run directory with other text weights, as if of openai, I:T."""
    folder = tmp_path_factory.mktemp("models")
    make_clip(folder / "base")
    make_clip(folder / "run")
    weights = load_file(folder / "run/open_clip_model.safetensors")
    for name, weight in weights.items():
        if "visual." not in name:
            weights[name] = weight + 0.02 * torch.randn(weight.shape)
    save_file(weights, folder / "run/open_clip_model.safetensors")
    record = {"flags": {"model": "openai", "loss": ["I:T"]}}
    (folder / "run/config.json").write_text(json.dumps(record))
    return [f"local-dir:{folder / 'base'}", str(folder / "run")]
