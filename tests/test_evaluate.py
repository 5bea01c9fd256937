"""evaluate.py: metrics by hand, readers on the traps of the real formats, runs as a user's."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import NAMES, ROOT, TINY, WORDS, make_clip, write
from PIL import Image
from safetensors.torch import load_file

import evaluate
import paraclip
from paraclip import InputError

torch.set_num_threads(1)  # threads cost more than they give on models this small


# ---------------------------------------------------------------- metrics


def test_overlap_and_jaccard_by_hand():
    ten = list(range(10))
    others = list(range(10, 20))
    assert evaluate.average_overlap(ten, ten) == 1
    assert evaluate.average_overlap(ten, others) == 0
    assert evaluate.average_overlap(ten, ten[::-1]) == pytest.approx(0.354365, abs=1e-6)
    two_of_ten = [0, 11, 1, 13, 14, 15, 16, 17, 18, 19]
    by_hand = (1 + 1 / 2 + sum(2 / d for d in range(3, 11))) / 10
    assert evaluate.average_overlap(ten, two_of_ten) == pytest.approx(by_hand)
    assert evaluate.average_overlap([3, 1], [1, 2]) == (0 / 1 + 1 / 2) / 2

    assert evaluate.jaccard(ten, ten) == evaluate.jaccard(ten, ten[::-1]) == 1
    assert evaluate.jaccard(ten, others) == 0
    assert evaluate.jaccard(ten, two_of_ten) == 2 / 18


def test_ranking_and_recall_against_exact_integers():
    """Ties, several positives, and a query's ranking is the same in any company."""
    random = torch.Generator().manual_seed(0)
    distinct = torch.randn(12, 40, generator=random)
    items = torch.randint(12, (50,), generator=random)  # each of the 12 some four times
    gallery = evaluate.fixed_point(distinct[items])
    queries = evaluate.fixed_point(torch.randn(300, 40, generator=random))
    naive = []
    integer_gallery = (gallery * 2**26).long().tolist()
    for query in (queries * 2**26).long().tolist():
        cosines = [sum(x * y for x, y in zip(query, item)) for item in integer_gallery]
        naive.append(sorted(range(50), key=lambda i, cosines=cosines: (-cosines[i], i))[:10])
    rankings = evaluate.rank_gallery(queries, gallery)
    assert rankings == naive
    assert [evaluate.rank_gallery(query[None], gallery)[0] for query in queries] == naive
    assert len(evaluate.rank_gallery(queries, gallery[:3])[0]) == 3

    item_labels = torch.randint(20, (50,), generator=random).tolist()
    query_labels = torch.randint(20, (300,), generator=random).tolist()
    for k in (1, 5, 10):
        hits = 0
        for ranking, label in zip(naive, query_labels):
            hits += any(item_labels[item] == label for item in ranking[:k])
        assert 0 < hits < 300
        found = evaluate.recall(rankings, item_labels, query_labels, k)
        assert found == pytest.approx(100 * hits / 300)
    assert evaluate.recall([[0], [1], [1]], range(2), [0, None, 0], 1) == 50  # None is not counted


def test_spearman():
    # the ranks are 1 2.5 2.5 4 and 1 3 2 4
    assert evaluate.spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(94.86833)
    assert evaluate.spearman([1, 1, 1], [1, 2, 3]) is None
    assert evaluate.spearman([1, 2, 3], [2, 2, 2]) is None


# ---------------------------------------------------------------- readers


def words(texts):
    """Counts of lower-cased words as features.

    With them sts() gives, on SemEval's own files, 41.65 49.52 53.73 65.09 55.69 49.37 53.63.
    """
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    vocabulary = sorted(set().union(*counts))
    rows = [[count[word] for word in vocabulary] for count in counts]
    return evaluate.fixed_point(torch.tensor(rows))


def any_features(items):
    """Features [n, 8] of texts or images, random but the same for the same item."""
    rows = []
    for item in items:
        seed = zlib.crc32(str(item).encode())
        rows.append(np.random.default_rng(seed).standard_normal(8))
    return evaluate.fixed_point(torch.tensor(np.array(rows)))


def test_sts_traps(data, tmp_path):
    """Each trap of the files: what is read, and Spearman of word counts computed plainly."""
    pairs = {task: evaluate.read_sts(data, task) for task in evaluate.STS}
    sizes = {task: len(rows) for task, rows in pairs.items()}
    assert sizes == {"STS12": 35, "STS13": 21, "STS14": 42, "STS15": 25, "STS16": 25, "STS-B": 7,
                     "SICK-R": 8}
    assert pairs["STS16"][4] == ("answer-answer", 'a "big dog', "\u2028 dog\x85 here", 5)
    assert pairs["STS-B"][2] == ("main-news", '"a dog said', 'he said "yes"', 2.5)
    assert pairs["SICK-R"][7][3] == 4.5

    result = evaluate.sts(data, words, None)
    for task, rows in pairs.items():
        cosines = [float(F.cosine_similarity(*words([a, b]), dim=0)) for _, a, b, _ in rows]
        golds = [gold for _, _, _, gold in rows]
        expected = evaluate.spearman([round(cosine, 6) for cosine in cosines], golds)
        assert result["sub_scores"][task]["all"] == pytest.approx(expected, abs=1e-9)
    assert list(result["sub_scores"]["STS13"]) == ["all", "FNWN", "headlines", "OnWN"]
    headlines = evaluate.read_subset(data, "STS13", "headlines")
    one_subset = evaluate.spearman(
        [float(F.cosine_similarity(*words([a, b]), dim=0)) for _, a, b, _ in headlines],
        [gold for _, _, _, gold in headlines],
    )
    assert result["sub_scores"]["STS13"]["headlines"] == pytest.approx(one_subset)
    mean = sum(scores["all"] for scores in result["sub_scores"].values()) / 7
    assert result["figures"]["STS"] == pytest.approx(mean)

    with pytest.raises(InputError, match="STS12: Spearman's rho is undefined"):
        evaluate.sts(data, lambda texts: torch.ones(len(texts), 2), None)
    with pytest.raises(evaluate.NotThere):
        evaluate.sts(tmp_path, words, None)
    (tmp_path / "sts").mkdir()
    result = evaluate.sts(tmp_path, words, None)
    assert result["figures"] == {}
    assert len(result["not_run"]) == 7


def test_aro_crop_groups_and_macro_by_hand(data):
    """Four relations, one symmetric; "on" right once in three, "under" right, "holding" a tie."""
    seen = []

    def encode_images(items):
        seen.extend(items)
        return torch.tensor([[1.0, 0.0]] * len(items))

    right = (1.0, 0.0)
    wrong = (0.0, 1.0)
    tie = (0.5, 0.5)
    content = json.loads((data / "aro/visual_genome_relation.json").read_text())
    true_captions = [example["true_caption"] for example in content]
    feature_of = dict(zip(true_captions, (right, wrong, tie, right, right, tie)))

    def encode_texts(texts):
        return torch.tensor([feature_of.get(text, tie) for text in texts])

    result = evaluate.vg_relation(data, encode_texts, encode_images)
    by_group = {"holding": 0, "on": 100 / 3, "under": 100}
    assert result["sub_scores"]["by_group"] == pytest.approx(by_group)
    assert result["figures"]["VG-R"] == pytest.approx((0 + 100 / 3 + 100) / 3)
    assert result["sub_scores"]["micro"] == pytest.approx(100 * 2 / 5)
    assert result["counts"] == {"pairs": 6, "pairs_counted": 5, "groups": 3}
    with Image.open(data / "aro/images/1.png") as whole:
        assert evaluate.open_crop(seen[1]).tobytes() == whole.crop((1, 1, 22, 21)).tobytes()

    result = evaluate.vg_attribution(data, lambda texts: torch.ones(len(texts), 2), encode_images)
    assert result["sub_scores"]["by_group"] == {"old_big": 0, "red_wet": 0}  # wet_red has only 24
    assert result["counts"] == {"pairs": 75, "pairs_counted": 51, "groups": 2}
    assert len(evaluate.SYMMETRIC) == 157
    assert {"adjusting", "by", "sitting in front of", "wrapped in"} <= evaluate.SYMMETRIC


def test_coco_first_five_sorted(data):
    """Images by name, captions in the file's order, the sixth left out; several positives."""
    texts = []
    paths = []

    def encode_texts(captions):
        texts.extend(captions)
        return evaluate.fixed_point(torch.eye(len(captions) // 5).repeat_interleave(5, 0))

    def encode_images(items):
        paths.extend(path.name for path, _ in items)
        return evaluate.fixed_point(torch.eye(len(items)))

    result = evaluate.coco(data, encode_texts, encode_images)
    assert paths == NAMES
    assert len(texts) == 70
    assert not any("sixth" in text for text in texts)
    assert texts[50] == "A dog.\n"
    assert result["figures"] == {"T R@5": 100, "I R@5": 100}
    assert result["sub_scores"]["I R@1"] == 100
    assert result["counts"] == {"images": 14, "captions": 70}


def test_imagenet_order_and_damage(tmp_path):
    """Sorted wnids are the classes; anything but 1,000 wnids with images is refused."""
    for i in range(1000):
        write(tmp_path / f"imagenet/val/n{2 * i:08}/a.JPEG", b"")
    write(tmp_path / "imagenet/val/LOC_val_solution.csv", b"")

    def encode_texts(prompts):  # class c is one-hot in c, in each of its 80 prompts
        return torch.eye(1000).repeat_interleave(80, 0)

    def encode_images(items):  # right but for every fourth image
        classes = [int(path.parent.name[1:]) // 2 for path, _ in items]
        return evaluate.fixed_point(torch.eye(1000)[[c if c % 4 else 999 for c in classes]])

    result = evaluate.imagenet(tmp_path, encode_texts, encode_images)
    assert result["figures"] == {"Clsf": 75}
    assert result["counts"] == {"images": 1000, "classes": 1000}
    (tmp_path / "imagenet/val/n00000002/a.JPEG").unlink()
    assert evaluate.imagenet(tmp_path, encode_texts, encode_images)["counts"]["images"] == 999
    (tmp_path / "imagenet/val/n00000002").rmdir()
    with pytest.raises(InputError, match="999 images in 999 folders"):
        evaluate.imagenet(tmp_path, encode_texts, encode_images)


BENCHMARKS = {
    "paraphrased_retrieval.jsonl": evaluate.paraphrased_retrieval,
    "coco/annotations/captions_val2017.json": evaluate.coco,
    "aro/visual_genome_relation.json": evaluate.vg_relation,
    "aro/visual_genome_attribution.json": evaluate.vg_attribution,
    "sts/STS12-en-test/STS.input.MSRvid.txt": evaluate.sts,
    "sts/STS16-en-test/STS2016.gs.plagiarism.txt": evaluate.sts,
    "sts/STSBenchmark/sts-test.csv": evaluate.sts,
    "sts/SICK/SICK_test_annotated.txt": evaluate.sts,
}


@pytest.fixture
def restored(data):
    """change(file, content) for one test: afterwards the file is as before."""
    before = {}

    def change(file, content):
        before.setdefault(data / file, (data / file).read_bytes())
        write(data / file, content)

    yield change
    for path, content in before.items():
        path.write_bytes(content)


@pytest.mark.parametrize("file", BENCHMARKS)
def test_damaged_and_missing_files(data, restored, file):
    """Empty, cut off, not UTF-8: one line that names the file, or its task. Missing: not run."""
    good = (data / file).read_bytes()
    half = 2 * len(good) // 3
    if b"\t" in good:
        half = good.rindex(b"\t", 0, good.rindex(b"\t"))
    for bad in (b"", good[:half], good[:3], good[:40] + b"\xe9\xff" + good[40:]):
        restored(file, bad)
        with pytest.raises(InputError) as error:
            BENCHMARKS[file](data, any_features, any_features)
        assert not isinstance(error.value, evaluate.NotThere)
        assert str(data / file.split("/")[0]) in str(error.value)
        assert "\n" not in str(error.value)

    (data / file).unlink()
    if BENCHMARKS[file] is not evaluate.sts:
        with pytest.raises(evaluate.NotThere, match=re.escape(f"{data / file} is not there (")):
            BENCHMARKS[file](data, any_features, any_features)
        return
    result = evaluate.sts(data, words, None)  # a task without all its files is left out, and said
    assert len(result["sub_scores"]) == 6
    folder = str((data / file).parent)
    assert [folder in reason for reason in result["not_run"].values()] == [True]
    mean = np.mean([scores["all"] for scores in result["sub_scores"].values()])
    assert result["figures"]["STS"] == pytest.approx(mean)


@pytest.mark.parametrize(("file", "old", "new", "error"), [
    ("paraphrased_retrieval.jsonl", '"query"', '"text"', "jsonl:1: the key 'caption' is missing"),
    ("paraphrased_retrieval.jsonl", "139", '"140"', 'jsonl:1: image_id "140" is no'),
    ("paraphrased_retrieval.jsonl", '"the same"', '" "', "jsonl:5: a text is blank"),
    ("coco/annotations/captions_val2017.json", '"image_id": 139', '"image_id": 7',
     "captions_val2017.json: can't be read: the key 7 is missing"),
    ("coco/annotations/captions_val2017.json", NAMES[0], "1.jpg", "of its 14 images only 13 have"),
    ("sts/STS12-en-test/STS.gs.MSRvid.txt", "\n5\n", "\nnan\n", ": the gold score nan"),
    ("sts/STS12-en-test/STS.gs.MSRvid.txt", "\n5\n", "\n", "gs.MSRvid.txt: 6 lines, for 7 pairs"),
    ("sts/STS12-en-test/STS.input.MSRvid.txt", "\t", " ", "STS12-en-test, MSRvid: can't be read"),
])
def test_bad_values(data, restored, file, old, new, error):
    good = (data / file).read_text()
    assert old in good
    restored(file, good.replace(old, new, 1))
    task = BENCHMARKS.get(file, evaluate.sts)
    with pytest.raises(InputError, match=re.escape(error)):
        task(data, any_features, any_features)


# ---------------------------------------------------------------- encoding


def args_of(data, *flags):
    return evaluate.parse_args(["model", "--data", str(data), "--workers", "0", *flags])


def test_features_are_open_clips(data, models, tmp_path, monkeypatch):
    """Text and image features against open_clip's own calls, one by one."""
    model = paraclip.load_model(models[0])
    clip = model.clip
    image_features = {}
    encode_texts, encode_images = evaluate.make_encoders(model, image_features, args_of(data))
    texts = [" ".join(WORDS[i : i + n]) for i in range(8) for n in (2, 5, 11)] + ["word " * 90]
    photo = data / "aro/images/1.png"
    items = [(photo, None), (photo, (3, 4, 40, 30))]
    items += [(data / "coco/val2017" / name, None) for name in NAMES]
    with torch.no_grad():
        for feature, text in zip(encode_texts(texts), texts):
            expected = clip.encode_text(model.tokenizer([text]), normalize=True)[0]
            assert torch.allclose(feature.float(), expected, atol=2e-6)
        for feature, (path, box) in zip(encode_images(items), items):
            image = Image.open(path).convert("RGB")
            image = image.crop(box or (0, 0, *image.size))
            expected = clip.encode_image(model.preprocess(image)[None], normalize=True)[0]
            assert torch.allclose(feature.float(), expected, atol=2e-6)
    assert len(image_features) == len(items)

    encoded = []
    forward = paraclip.TextEncoder.forward

    def counted(self, tokens):
        encoded.extend(tokens)
        return forward(self, tokens)

    monkeypatch.setattr(paraclip.TextEncoder, "forward", counted)
    first, second = encode_texts(["a new dog", "a new dog"])
    assert torch.equal(first, second)  # so that VG's equal captions tie
    encode_texts([texts[0], "a new dog"])
    assert len(encoded) == 1

    cut = (data / "coco/val2017" / NAMES[0]).read_bytes()[:300]
    for name, content in (("zero.jpg", b""), ("cut.jpg", cut)):
        write(tmp_path / name, content)
        with pytest.raises(InputError, match=f"{name}: can't be read as an image"):
            encode_images([(tmp_path / name, None)])
    sixteen_bits = np.full((9, 9), 40_000, np.uint16)
    Image.new("CMYK", (9, 9)).save(tmp_path / "cmyk.jpg")
    Image.new("RGB", (1, 1)).save(tmp_path / "1.png")
    Image.fromarray(sixteen_bits).save(tmp_path / "16.png")
    odd = [(tmp_path / name, None) for name in ("cmyk.jpg", "1.png", "16.png")]
    assert encode_images(odd).isfinite().all()


def test_precision_and_damaged_weights(models):
    model = paraclip.load_model(models[0])
    features = []
    for precision in ("fp32", "bf16"):
        encode_texts, _ = evaluate.make_encoders(model, {}, args_of("/", "--precision", precision))
        features.append(encode_texts(["a dog"]))
    assert 0 < (features[0] - features[1]).abs().max() < 0.02
    model.clip.text_projection.data[0] = math.nan
    encode_texts, _ = evaluate.make_encoders(model, {}, args_of("/"))
    with pytest.raises(InputError, match="not finite"):
        encode_texts(["a dog"])


def test_zero_shot_weights_are_open_clips(models, monkeypatch):
    """Against open_clip's own, with fewer classes and templates; else 1,000 x 80 prompts."""
    prompts = []

    def encode_texts(texts):
        prompts.extend(texts)
        return torch.ones(len(texts), 2)

    evaluate.zero_shot_weights(encode_texts)
    assert len(prompts) == 80000
    assert prompts[80] == "a bad photo of a goldfish."

    classes = open_clip.IMAGENET_CLASSNAMES[:7]
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES[:9]
    monkeypatch.setattr(open_clip, "IMAGENET_CLASSNAMES", classes)
    monkeypatch.setattr(open_clip, "OPENAI_IMAGENET_TEMPLATES", templates)
    model = paraclip.load_model(models[0])
    encode_texts, _ = evaluate.make_encoders(model, {}, args_of("/"))
    with torch.no_grad():
        expected = open_clip.build_zero_shot_classifier(
            model.clip, model.tokenizer, classes, templates
        )
    found = evaluate.zero_shot_weights(encode_texts).float()
    assert torch.allclose(found, expected.T, atol=2e-6)


# ---------------------------------------------------------------- as a user


def main(monkeypatch, *args):
    """evaluate.main() in this process: what imports cost is paid once."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
    evaluate.main()


def cells(out, label):
    """{column: cell} of the table's row that begins with `label`."""
    rows = []
    for line in out.splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    columns = rows[0][1:]
    row = next(row for row in rows if row[0].startswith(label))
    return dict(zip(columns, row[1:]))


def figures_in(path):
    """[{column: figure} of each model] in a JSON file of evaluate.py."""
    found = []
    for model in json.loads(path.read_text())["models"]:
        figures = {}
        for result in model["tasks"].values():
            figures.update(result["figures"])
        found.append(figures)
    return found


def test_two_models_as_a_user(data, models, tmp_path):
    """The docstring's command: table, paper's row, differences, what is not run, JSON, Figure 3."""
    command = [sys.executable, ROOT / "evaluate.py", *models, "--data", data, "--workers", "1"]
    command += ["--json", tmp_path / "results.json", "--gallery", tmp_path / "figure3.png"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    out = done.stdout
    assert "Warning" not in done.stderr
    base = cells(out, models[0])
    trained = cells(out, models[1])
    gains = cells(out, f"minus {models[0]}")
    assert list(base) == ["AO@10", "JS@10", "VG-R", "VG-A", "STS", "Clsf", "T R@5", "I R@5"]
    assert base["Clsf"] == trained["Clsf"] == "not run"
    assert gains["Clsf"] == ""
    assert f"not run: imagenet: {data}/imagenet/val is not there (from image-net.org" in out
    assert "\ncoco: not the paper's data (images 14, not 5,000; captions 70, not 25,000)" in out
    assert "\nsts: not the paper's data (STS12 35, not 3,108; " in out
    paper = " ".join(cells(out, "paper: openai + I:T").values())
    assert paper == "68.9 59.9 58.0 62.4 68.7 63.7 75.8 58.0"

    report = json.loads((tmp_path / "results.json").read_text())
    first, second = report["models"]
    before, after = figures_in(tmp_path / "results.json")
    assert before != after
    for column in before:
        assert base[column] == f"{before[column]:.1f}"
        assert trained[column] == f"{after[column]:.1f}"
        # the difference of the figures as they are shown
        assert gains[column] == f"{round(after[column], 1) - round(before[column], 1):+.1f}"
    assert first["image_tower"] == second["image_tower"]
    assert first["fingerprint"] != second["fingerprint"]
    assert first["paper"] is None
    assert second["paper"]["row"] == "openai + I:T"
    paraphrase = first["tasks"]["paraphrase"]
    assert paraphrase["counts"] == {"pairs": 6, "images": 14, "pairs_with_gold": 5}
    for name in ("AO", "JS"):
        assert {f"{name}@{k}" for k in range(1, 11)} < set(paraphrase["sub_scores"])
    recalls = {f"{side} R@{k}" for side in "TI" for k in (1, 5, 10)}
    assert set(first["tasks"]["coco"]["sub_scores"]) == recalls
    assert list(first["tasks"]["imagenet"]["not_run"]) == ["imagenet"]
    assert set(report["versions"]) == {"torch", "open_clip", "scipy"}
    assert report["flags"]["models"] == models
    assert report["device"] == evaluate.DEVICE

    figure = Image.open(tmp_path / "figure3.png")
    assert figure.width == 1160
    assert figure.height > 600
    colours = {colour for _, colour in figure.getcolors(1 << 24)}
    assert (0xF0, 0xA8, 0) in colours  # a gold frame; and the picture was looked at


def test_a_missing_task_of_sts_is_said(data, models, tmp_path, monkeypatch, capsys):
    """The mean of the others has a star, and a note says of what it is the mean."""
    (tmp_path / "sts").mkdir()
    for folder in (data / "sts").iterdir():
        if folder.name != "STS13-en-test":
            (tmp_path / "sts" / folder.name).symlink_to(folder)
    main(monkeypatch, models[0], "--data", tmp_path, "--tasks", "sts")
    out = capsys.readouterr().out
    assert re.fullmatch(r"-?\d+\.\d\*", cells(out, models[0])["STS"])
    assert "\n*sts: not the paper's data (STS12 35, not 3,108; STS13 0, not 1,500; " in out
    assert f"\nnot run: STS13: {tmp_path}/sts/STS13-en-test/STS.input.FNWN.txt is not there" in out


def test_errors_before_the_work(data, models, tmp_path, capsys):
    for flags, message in (
        (["--json", tmp_path / "no/r.json"], "no/r.json: must be a file in a folder that is"),
        (["--gallery", tmp_path], f"{tmp_path}: must be a file"),
        (["--gallery", data / "coco/val2017/figure3.png"], "must not be in a folder of --data"),
        (["--workers", -1], "--workers"),
        (["--tasks", "clsf"], "--tasks"),
    ):
        with pytest.raises(SystemExit, match="2"):
            evaluate.parse_args([models[0], "--data", str(data), *map(str, flags)])
        assert message in capsys.readouterr().err


def test_an_unknown_model(data, models, monkeypatch):
    """It is found before the first model is loaded; evaluate.py has no flag --model to name."""
    monkeypatch.setattr(paraclip, "load_model", None)
    with pytest.raises(InputError, match="no-such-model: ") as error:
        main(monkeypatch, models[0], "no-such-model", "--data", data)
    assert "--model" not in str(error.value)


def test_a_wrong_folder_of_data(data, models, tmp_path, monkeypatch):
    """One line before a model is loaded, not a table of "not run"."""
    monkeypatch.setattr(paraclip, "load_model", None)
    for folder in (data / "coco", tmp_path):
        with pytest.raises(InputError, match=f"--data {folder}: nothing to evaluate, none of"):
            main(monkeypatch, models[0], "--data", folder)
    with pytest.raises(InputError, match="--data nowhere: there is no such folder"):
        main(monkeypatch, models[0], "--data", "nowhere")
    with pytest.raises(InputError, match="none of these is there: imagenet/val$"):
        main(monkeypatch, models[0], "--data", data, "--tasks", "imagenet")


def test_nothing_that_could_be_evaluated_is_an_error(data, models, tmp_path, monkeypatch, capsys):
    """The pairs are there, the images are not."""
    shutil.copy(data / "paraphrased_retrieval.jsonl", tmp_path)
    with pytest.raises(InputError, match=f"--data {tmp_path}: nothing was evaluated"):
        main(monkeypatch, models[0], "--data", tmp_path)
    assert f"not run: paraphrase: {tmp_path}/images is not there" in capsys.readouterr().out


def test_results_in_the_folder_of_data(data, models, monkeypatch):
    monkeypatch.chdir(data)
    flags = ("--tasks", "vg-r", "--workers", 0)
    main(monkeypatch, models[0], "--data", ".", "--json", "results.json", *flags)
    assert "VG-R" in figures_in(data / "results.json")[0]
    (data / "results.json").unlink()


def test_a_finished_task_is_in_the_json_at_once(data, models, tmp_path, monkeypatch, restored):
    """One truncated image of COCO, and the minutes of STS are not lost."""
    name = f"coco/val2017/{NAMES[3]}"
    restored(name, (data / name).read_bytes()[:300])
    results = tmp_path / "results.json"
    with pytest.raises(InputError, match=f"{NAMES[3]}: can't be read as an image"):
        main(monkeypatch, models[0], "--data", data, "--json", results, "--workers", 0,
             "--tasks", "coco", "sts")
    assert list(figures_in(results)[0]) == ["STS"]


def test_a_byte_order_mark(data, restored):
    """Files that an editor of Windows saved again."""
    for file, benchmark in BENCHMARKS.items():
        without = benchmark(data, any_features, any_features)
        restored(file, b"\xef\xbb\xbf" + (data / file).read_bytes())
        assert benchmark(data, any_features, any_features) == without


def test_images_once_for_a_shared_tower(data, models, tmp_path, monkeypatch):
    """Two models of one tower: each image and box is encoded once. Another tower: once more."""
    encoded = []
    original = paraclip.encode_images

    def counted(model, items, *more):
        encoded.extend(items)
        return original(model, items, *more)

    monkeypatch.setattr(paraclip, "encode_images", counted)
    other = make_clip(tmp_path / "other", seed=1)
    flags = ("--data", data, "--tasks", "paraphrase", "coco", "vg-r", "--workers", 0)
    main(monkeypatch, *models, *flags)
    assert len(encoded) == len(set(encoded)) == 14 + 5  # photos, and crops that count
    main(monkeypatch, models[0], other, *flags)
    assert len(encoded) == 3 * 19


def test_equal_weights_in_other_towers(data, tmp_path, monkeypatch):
    """Pooling and head width are not in the weights: three models, three towers, three figures."""
    names = []
    for change in ({}, {"pool_type": "avg"}, {"head_width": 32}):
        config = {**TINY, "vision_cfg": {**TINY["vision_cfg"], **change}}
        names.append(make_clip(tmp_path / f"model{len(names)}", config))
    weights = [load_file(Path(name.removeprefix("local-dir:"), "open_clip_model.safetensors"))
               for name in names]
    for key, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][key])
        assert torch.equal(tensor, weights[2][key])
    flags = ("--data", data, "--tasks", "paraphrase", "coco", "--workers", 0)
    together = tmp_path / "together.json"
    main(monkeypatch, *names, *flags, "--json", together)
    alone = []
    for name in names:
        main(monkeypatch, name, *flags, "--json", tmp_path / "alone.json")
        alone += figures_in(tmp_path / "alone.json")
    assert figures_in(together) == alone
    assert alone[0] != alone[1] != alone[2] != alone[0]


def test_figures_do_not_depend_on_batches_or_workers(data, models, tmp_path, monkeypatch):
    """Texts in blocks of 50 and images five at a time give the figures of large batches."""
    original = paraclip.encode_images

    def by_five(model, items, *more):
        for start in range(0, len(items), 5):
            yield from original(model, items[start : start + 5], *more)

    def tasks(workers):
        main(monkeypatch, models[1], "--data", data, "--workers", workers,
             "--tasks", "paraphrase", "vg-r", "vg-a", "coco", "sts", "--json", tmp_path / "r.json")
        return json.loads((tmp_path / "r.json").read_text())["models"][0]["tasks"]

    whole = tasks(1)
    monkeypatch.setattr(evaluate, "TEXTS_AT_ONCE", 50)
    monkeypatch.setattr(paraclip, "encode_images", by_five)
    assert tasks(0) == whole


@pytest.fixture
def own(tmp_path, data):
    """A user's own folder: images/ with all endings, and pairs, two of them generate.py's rows."""
    endings = [".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG", ".webp", ".WEBP"]
    (tmp_path / "mine/images").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        ending = endings[i % len(endings)]
        Image.open(data / "coco/val2017" / name).save(tmp_path / f"mine/images/photo.{i}{ending}")
    write(tmp_path / "mine/images/._photo.1.jpg", b"of macOS")
    write(tmp_path / "mine/images/notes.txt", b"")
    rows = [
        {"query": "a red dog", "paraphrase": "a dog which is red", "image_id": "photo.1"},
        {"query": "a red dog", "paraphrase": "a crimson hound"},
        {"image_id": "x/photo.9.JPG", "caption": "a cat", "paraphrase_1": "one cat",
         "paraphrase_2": "a feline"},
        {"image_id": "photo.12", "caption": "a car", "paraphrase_1": "a vehicle",
         "paraphrase_2": "an auto"},
    ]
    write(tmp_path / "mine/paraphrased_retrieval.jsonl", "\n".join(map(json.dumps, rows)))
    return tmp_path / "mine"


def test_own_photos(own, models, tmp_path, monkeypatch, capsys):
    main(monkeypatch, models[0], "--data", own, "--json", tmp_path / "r.json", "--workers", 0,
         "--gallery", tmp_path / "figure3.png")
    out = capsys.readouterr().out
    task = json.loads((tmp_path / "r.json").read_text())["models"][0]["tasks"]["paraphrase"]
    assert task["counts"] == {"pairs": 4, "images": 14, "pairs_with_gold": 3}
    for side in ("query", "paraphrase"):
        for k in (1, 5, 10):
            value = task["sub_scores"][f"{side} R@{k}"]
            assert f"{side} R@{k} {value:.1f}" in out
    assert (tmp_path / "figure3.png").exists()

    images, pairs = evaluate.read_paraphrases(own)
    assert [images[gold].name for _, _, gold in pairs if gold is not None] == [
        "photo.1.JPG", "photo.9.JPG", "photo.12.png"]
    assert pairs[2][:2] == ("a cat", "one cat")
    write(own / "images/photo.1.png", b"")
    with pytest.raises(InputError, match=r"photo\.1\.png: photo\.1\.JPG has the same name but"):
        evaluate.read_paraphrases(own)


def test_gold_recall_by_hand(own):
    """The gold image is first for the queries; for the paraphrases it is the sixth."""
    def encode_images(items):
        return evaluate.fixed_point(torch.eye(14))

    def encode_texts(texts):
        golds = {"a red dog": "photo.1.JPG", "a dog which is red": "photo.1.JPG",
                 "a cat": "photo.9.JPG", "one cat": "photo.9.JPG",
                 "a car": "photo.12.png", "a vehicle": "photo.12.png"}
        features = torch.zeros(len(texts), 14)
        for row, text in enumerate(texts):
            if text in golds:
                features[row, names.index(golds[text])] = 1
            if text in ("a dog which is red", "one cat", "a vehicle"):
                better = [i for i in range(14) if names[i] != golds[text]][:5]
                features[row, better] = 2
        return evaluate.fixed_point(features)

    names = [path.name for path in evaluate.read_paraphrases(own)[0]]
    scores = evaluate.paraphrased_retrieval(own, encode_texts, encode_images)["sub_scores"]
    assert [scores[f"query R@{k}"] for k in (1, 5, 10)] == [100, 100, 100]
    assert [scores[f"paraphrase R@{k}"] for k in (1, 5, 10)] == [0, 0, 100]


def test_other_endings_in_coco(data, models, tmp_path, monkeypatch):
    """COCO's images as .JPG and .png give the figures of the same pixels as .jpg."""
    other = tmp_path / "other"
    (other / "coco/val2017").mkdir(parents=True)
    (other / "coco/annotations").symlink_to(data / "coco/annotations")
    (other / "paraphrased_retrieval.jsonl").symlink_to(data / "paraphrased_retrieval.jsonl")
    for i, name in enumerate(NAMES):
        photo = data / "coco/val2017" / name
        if i % 2:
            write(other / "coco/val2017" / name.replace(".jpg", ".JPG"), photo.read_bytes())
        else:
            Image.open(photo).save(other / "coco/val2017" / name.replace(".jpg", ".png"))
    found = []
    for folder in (data, other):
        main(monkeypatch, models[0], "--data", folder, "--tasks", "paraphrase", "coco",
             "--workers", 0, "--json", tmp_path / "r.json")
        found += figures_in(tmp_path / "r.json")
    assert found[0] == found[1]


def test_a_gallery_of_one_model_and_odd_queries(data, models, tmp_path, monkeypatch, capsys):
    """All of a text is drawn, within the picture. No pairs: the gallery is not run."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "coco").symlink_to(data / "coco")
    figure = tmp_path / "figure3.png"
    flags = (models[0], "--data", folder, "--workers", 0, "--gallery", figure)
    main(monkeypatch, *flags, "--tasks", "coco")
    assert "--gallery: not run: " in capsys.readouterr().out
    assert not figure.exists()

    pairs = [("two\nlines of text", "a dog " * 90), ("W" * 300, "a cat"), ("é 犬 😀", "a bird")]
    rows = [{"query": a, "paraphrase": b, "image_id": 139} for a, b in pairs]
    write(folder / "paraphrased_retrieval.jsonl", "\n".join(map(json.dumps, rows)))
    main(monkeypatch, *flags, "--tasks", "paraphrase")
    pixels = np.asarray(Image.open(figure))
    assert pixels.shape[1] == 580
    below_title = pixels[30:]
    lines = (below_title == 0).all(axis=(1, 2))  # they go from edge to edge
    assert lines.sum() == 3 * 2
    assert (below_title[~lines][:, -8:] == 255).all()


def test_paper_rows(tmp_path):
    """Baselines by name or weights; runs by base model and losses in any order; else nothing."""
    def row(open_clip_name, pretrained):
        model = paraclip.Model(open_clip_name, pretrained, *[None] * 6)
        return evaluate.paper_row(model)

    def row_of_run(open_clip_name, pretrained, *loss):
        base = {"open_clip": open_clip_name, "pretrained": pretrained}
        record = {"flags": {"loss": loss}, "base_model": base}
        write(tmp_path / "run/config.json", json.dumps(record))
        found = row(f"local-dir:{tmp_path / 'run'}", None)
        return found and found["figures"]["STS"]

    for baseline, names in paraclip.BASELINES.items():
        assert row(*names)["row"] == baseline
    assert row("ViT-B-32", "laion2b_s34b_b79k")["figures"]["VG-R"] == 45.0
    assert row("ViT-B-32", "somewhere/laion400m_laclip.pt")["row"] == "laclip"
    assert row("ViT-B-32", "random") is None
    assert row("ViT-B-32", "openai") is None  # the wrong activation

    openai = ("ViT-B-32-quickgelu", "openai")
    assert row_of_run(*openai, "T1:T2", "T2:I", "T:T1") == 72.2
    assert row_of_run(*openai, "I:T1", "I:T", "I:T2") == 68.8
    assert row_of_run("ViT-B-32", "weights/laion400m_laclip.pt", "I:T2", "T:T1", "T1:T2") == 71.4
    assert row_of_run("ViT-B-32", "laion400m_e32", "I:T") is None
    assert row_of_run("local-dir:runs/first", None, "I:T2", "T:T1", "T1:T2") is None
    write(tmp_path / "run/config.json", '{"model_type": "clip"}')
    assert row(f"local-dir:{tmp_path / 'run'}", None) is None
    assert len(evaluate.PAPER) == 17
    assert all(len(figures) == 8 for figures in evaluate.PAPER.values())
