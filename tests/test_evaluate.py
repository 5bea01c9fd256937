"""evaluate.py: metrics by hand, readers on the traps of the real formats, runs as a user's."""

import base64
import io
import json
import math
import os
import re
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from conftest import NAMES, ROOT, TINY, WORDS, make_clip, write
from PIL import Image

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


def any_features(items):
    """Features [n, 8] of texts or images, random but the same for the same item."""
    rows = []
    for item in items:
        seed = zlib.crc32(str(item).encode())
        rows.append(np.random.default_rng(seed).standard_normal(8))
    return evaluate.fixed_point(torch.tensor(np.array(rows)))


ANY = SimpleNamespace(texts=any_features, images=any_features)


def test_sts_traps(data, tmp_path):
    """Each trap of the files: what is read, and Spearman's rho computed plainly."""
    pairs = {}
    for task in evaluate.STS:
        pairs[task] = list(zip(*evaluate.read_sts(data / "sts", task)))
    sizes = {task: len(rows) for task, rows in pairs.items()}
    assert sizes == {"STS12": 35, "STS13": 21, "STS14": 42, "STS15": 25, "STS16": 25, "STS-B": 7,
                     "SICK-R": 8}
    assert pairs["STS16"][4] == ("answer-answer", 'a "big dog', "\u2028 dog\x85 here", 5)
    assert pairs["STS-B"][2] == ("main-news", '"a dog said', 'he said "yes"', 2.5)
    assert pairs["SICK-R"][7][3] == 4.5

    result = evaluate.sts(data, ANY)
    for task, rows in pairs.items():
        cosines = [(any_features([a]) * any_features([b])).sum().item() for _, a, b, _ in rows]
        golds = [gold for _, _, _, gold in rows]
        rho = result.sub_scores[task]
        assert rho["all"] == pytest.approx(evaluate.spearman(cosines, golds))
    assert list(result.sub_scores["STS13"]) == ["all", "FNWN", "headlines", "OnWN"]
    assert result.sub_scores["SICK-R"]["test"] == pytest.approx(evaluate.spearman(cosines, golds))
    mean = sum(rho["all"] for rho in result.sub_scores.values()) / 7
    assert result.figures == {"STS": pytest.approx(mean)}
    assert result.counts == sizes

    with pytest.raises(evaluate.NotThere):
        evaluate.sts(tmp_path, ANY)
    (tmp_path / "sts").mkdir()
    result = evaluate.sts(tmp_path, ANY)
    assert result.figures == {}
    assert len(result.not_run) == 7


def test_aro_crop_groups_and_macro_by_hand(data):
    """Four relations, one symmetric; "on" right once in three, "under" right, "holding" a tie."""
    seen = []

    def images(items):
        seen.extend(items)
        return torch.tensor([[1.0, 0.0]] * len(items))

    right = (1.0, 0.0)
    wrong = (0.0, 1.0)
    tie = (0.5, 0.5)
    content = json.loads((data / "aro/visual_genome_relation.json").read_text())
    true_captions = [example["true_caption"] for example in content]
    feature_of = dict(zip(true_captions, (right, wrong, tie, right, right, tie)))

    def texts(texts):
        return torch.tensor([feature_of.get(text, tie) for text in texts])

    result = evaluate.vg_relation(data, SimpleNamespace(texts=texts, images=images))
    by_group = {"holding": 0, "on": 100 / 3, "under": 100}
    assert result.sub_scores["by_group"] == pytest.approx(by_group)
    assert result.figures["VG-R"] == pytest.approx((0 + 100 / 3 + 100) / 3)
    assert result.sub_scores["micro"] == pytest.approx(100 * 2 / 5)
    assert result.counts == {"pairs": 6, "pairs_counted": 5, "groups": 3}
    with Image.open(data / "aro/images/1.png") as whole:
        assert evaluate.open_item(seen[1]).tobytes() == whole.crop((1, 1, 22, 21)).tobytes()

    same = SimpleNamespace(texts=lambda texts: torch.ones(len(texts), 2), images=images)
    result = evaluate.vg_attribution(data, same)
    assert result.sub_scores["by_group"] == {"old_big": 0, "red_wet": 0}  # wet_red has only 24
    assert result.counts == {"pairs": 75, "pairs_counted": 51, "groups": 2}
    assert len(evaluate.SYMMETRIC) == 157
    assert {"adjusting", "by", "sitting in front of", "wrapped in"} <= evaluate.SYMMETRIC


def test_coco_first_five_sorted(data):
    """Images by name, captions in the file's order, the sixth left out; several positives."""
    seen = []

    def texts(captions):
        seen.extend(captions)
        return evaluate.fixed_point(torch.eye(14).repeat_interleave(5, 0))

    def images(paths):
        assert [path.name for path in paths] == NAMES
        return evaluate.fixed_point(torch.eye(14))

    result = evaluate.coco(data, SimpleNamespace(texts=texts, images=images))
    assert len(seen) == 70
    assert not any("sixth" in text for text in seen)
    assert seen[50] == "A dog.\n"
    assert result.figures == {"T R@5": 100, "I R@5": 100}
    assert result.sub_scores["I R@1"] == 100
    assert result.counts == {"images": 14, "captions": 70}


def test_imagenet_order_and_damage(tmp_path):
    """Sorted wnids are the classes; anything but 1,000 wnids with images is refused."""
    for i in range(1000):
        write(tmp_path / f"imagenet/val/n{2 * i:08}/a.JPEG", b"")
    write(tmp_path / "imagenet/val/LOC_val_solution.csv", b"")

    def texts(prompts):  # class c is one-hot in c, in each of its 80 prompts
        assert len(prompts) == 80_000 and prompts[80] == "a bad photo of a goldfish."
        return torch.eye(1000).repeat_interleave(80, 0)

    def images(paths):  # right but for every fourth image
        classes = [int(path.parent.name[1:]) // 2 for path in paths]
        return evaluate.fixed_point(torch.eye(1000)[[c if c % 4 else 999 for c in classes]])

    encoders = SimpleNamespace(texts=texts, images=images)
    result = evaluate.imagenet(tmp_path, encoders)
    assert result.figures == {"Clsf": 75}
    assert result.counts == {"images": 1000, "classes": 1000}
    (tmp_path / "imagenet/val/n00000002/a.JPEG").unlink()
    evaluate.find_images.cache_clear()
    with pytest.raises(InputError, match="999 folders"):
        evaluate.imagenet(tmp_path, encoders)


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
    """Empty, cut off, not UTF-8: one line that names the file, or its task. Missing: not run.

    A byte order mark, which an editor of Windows leaves, changes nothing.
    """
    good = (data / file).read_bytes()
    whole = BENCHMARKS[file](data, ANY)
    restored(file, b"\xef\xbb\xbf" + good)
    assert BENCHMARKS[file](data, ANY) == whole

    half = 2 * len(good) // 3
    if b"\t" in good:
        half = good.rindex(b"\t", 0, good.rindex(b"\t"))
    for bad in (b"", good[:half], good[:3], good[:40] + b"\xe9\xff" + good[40:]):
        restored(file, bad)
        with pytest.raises(InputError) as error:
            BENCHMARKS[file](data, ANY)
        assert not isinstance(error.value, evaluate.NotThere)
        assert str(data / file.split("/")[0]) in str(error.value) and "\n" not in str(error.value)

    (data / file).unlink()
    if BENCHMARKS[file] is not evaluate.sts:
        with pytest.raises(evaluate.NotThere, match=re.escape(f"{data / file} is not there")):
            BENCHMARKS[file](data, ANY)
        return
    result = evaluate.sts(data, ANY)  # a task without all its files is left out, and said
    assert len(result.sub_scores) == 6
    folder = str((data / file).parent)
    assert [folder in reason for reason in result.not_run.values()] == [True]


@pytest.mark.parametrize(("file", "old", "new", "error"), [
    ("paraphrased_retrieval.jsonl", '"query"', '"text"', "jsonl:1: KeyError: 'caption'"),
    ("paraphrased_retrieval.jsonl", "139", '"140"', 'jsonl:1: ValueError: image_id "140" is no'),
    ("coco/annotations/captions_val2017.json", '"image_id": 139', '"image_id": 7', "KeyError: 7"),
    ("coco/annotations/captions_val2017.json", NAMES[0], "1.jpg",
     "coco/val2017: KeyError: '1'"),
    ("sts/STS12-en-test/STS.gs.MSRvid.txt", "\n5\n", "\nfive\n", "sts, STS12: ValueError"),
    ("sts/STS12-en-test/STS.gs.MSRvid.txt", "\n5\n", "\n", "STS.gs.MSRvid.txt: ValueError"),
])
def test_bad_values(data, restored, file, old, new, error):
    good = (data / file).read_text()
    assert old in good
    restored(file, good.replace(old, new, 1))
    with pytest.raises(InputError, match=re.escape(error)):
        BENCHMARKS.get(file, evaluate.sts)(data, ANY)


# ---------------------------------------------------------------- encoding


def encoders_of(model, *flags):
    args = evaluate.parse_args(["model", "--data", "/", "--workers", "0", *flags])
    return evaluate.Encoders(model, {}, args)


def test_features_are_open_clips(data, models, monkeypatch):
    """Text and image features against open_clip's own, one by one; equal texts are encoded once."""
    encoders = encoders_of(paraclip.load_model(models[0]))
    clip, preprocess = open_clip.create_model_from_pretrained(models[0])
    tokenizer = open_clip.get_tokenizer(models[0])
    texts = [" ".join(WORDS[i : i + n]) for i in range(8) for n in (2, 5, 11)] + ["word " * 90]
    photo = data / "aro/images/1.png"
    box = (3, 4, 40, 30)
    images = [data / "coco/val2017" / name for name in NAMES]
    pictures = [Image.open(photo).convert("RGB").crop(box), *map(Image.open, images)]
    with torch.no_grad():
        for feature, text in zip(encoders.texts(texts), texts):
            expected = clip.eval().encode_text(tokenizer([text]), normalize=True)[0]
            assert torch.allclose(feature.float(), expected, atol=2e-6)
        for feature, picture in zip(encoders.images([(photo, box), *images]), pictures):
            expected = clip.encode_image(preprocess(picture)[None], normalize=True)[0]
            assert torch.allclose(feature.float(), expected, atol=2e-6)

    encoded = []
    forward = paraclip.TextEncoder.forward

    def counted(self, tokens):
        encoded.extend(tokens)
        return forward(self, tokens)

    monkeypatch.setattr(paraclip.TextEncoder, "forward", counted)
    first, second = encoders.texts(["a new dog", "a new dog"])
    assert torch.equal(first, second)  # so that VG's equal captions tie
    encoders.texts([texts[0], "a new dog"])
    assert len(encoded) == 1


def test_an_image_that_cannot_be_read_is_named_with_the_reason(data, models, tmp_path):
    encoders = encoders_of(paraclip.load_model(models[0]))
    good = data / "coco/val2017" / NAMES[0]
    write(tmp_path / "zero.jpg", b"")
    write(tmp_path / "cut.jpg", good.read_bytes()[:300])
    Image.new("RGB", (1, 99)).save(tmp_path / "thin.png")
    for name, reason in (("zero.jpg", "cannot identify"), ("cut.jpg", "[Tt]runcated"),
                         ("thin.png", "50 times"), ("none.jpg", "No such file")):
        with pytest.raises(InputError, match=rf"{name}.* can't be read .*{reason}") as error:
            encoders.images([good, tmp_path / name])
        assert "\n" not in str(error.value)
    Image.new("CMYK", (9, 9)).save(tmp_path / "cmyk.jpg")
    assert encoders.images([tmp_path / "cmyk.jpg"]).isfinite().all()


def test_precision_and_damaged_weights(data, models):
    model = paraclip.load_model(models[0])
    features = []
    for precision in ("fp32", "bf16"):
        encoders = encoders_of(model, "--precision", precision)
        images = encoders.images([data / "aro/images/1.png"])
        features.append(torch.cat([encoders.texts(["a dog"]), images]))
    differences = (features[0] - features[1]).abs().amax(1)
    assert differences.min() > 0 and differences.max() < 0.02
    model.clip.text_projection.data[0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        encoders_of(model).texts(["a dog"])


def test_zero_shot_weights_are_open_clips(models, monkeypatch):
    """With fewer classes and templates."""
    classes = open_clip.IMAGENET_CLASSNAMES[:7]
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES[:9]
    monkeypatch.setattr(open_clip, "IMAGENET_CLASSNAMES", classes)
    monkeypatch.setattr(open_clip, "OPENAI_IMAGENET_TEMPLATES", templates)
    model = paraclip.load_model(models[0])
    with torch.no_grad():
        expected = open_clip.build_zero_shot_classifier(
            model.clip, model.tokenizer, classes, templates
        )
    found = evaluate.zero_shot_weights(encoders_of(model)).float()
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
    command += ["--json", tmp_path / "results.json", "--gallery", tmp_path / "figure3.html"]
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
    assert out.count(f"\nnot run: imagenet: {data}/imagenet/val is not there") == 1
    paper = " ".join(cells(out, "paper: openai + I:T").values())
    assert paper == "68.9 59.9 58.0 62.4 68.7 63.7 75.8 58.0"

    report = json.loads((tmp_path / "results.json").read_text())
    assert set(report) == {"flags", "device", "versions", "models"}
    assert report["flags"]["models"] == models
    first, second = report["models"]
    assert set(first) == {"name", "fingerprint", "image_tower", "paper", "tasks"}
    before, after = figures_in(tmp_path / "results.json")
    assert before != after
    for column in before:
        assert base[column] == f"{before[column]:.1f}*"  # the star: not the paper's data
        assert trained[column] == f"{after[column]:.1f}*"
        # the difference of the figures as they are shown
        assert gains[column] == f"{round(after[column], 1) - round(before[column], 1):+.1f}"
    assert first["image_tower"] == second["image_tower"]
    assert first["fingerprint"] != second["fingerprint"]
    assert first["paper"] is None
    assert second["paper"]["row"] == "openai + I:T"
    for task in first["tasks"].values():
        assert set(task) == {"figures", "counts", "sub_scores", "not_run"}
    paraphrase = first["tasks"]["paraphrase"]
    assert paraphrase["counts"] == {"pairs": 6, "images": 14, "pairs_with_gold": 5}
    for name in ("AO", "JS"):
        assert {f"{name}@{k}" for k in range(1, 11)} < set(paraphrase["sub_scores"])
    recalls = {f"{side} R@{k}" for side in "TI" for k in (1, 5, 10)}
    assert set(first["tasks"]["coco"]["sub_scores"]) == recalls
    assert list(first["tasks"]["imagenet"]["not_run"]) == ["imagenet"]
    assert (tmp_path / "figure3.html").read_text().count("<img") == 3 * 2 * 2 * 5


def test_the_papers_data_has_no_star(data):
    """Only what is of other sizes than the paper's, or lacks a task of STS, has one."""
    task = {"figures": {"STS": 65.14}, "counts": dict(evaluate.TASKS["sts"].counts), "not_run": {}}
    model = {"name": "one", "paper": None, "tasks": {"sts": task}}
    out = evaluate.table([model])
    assert cells(out, "one")["STS"] == "65.1"
    assert "not the paper's" not in out
    del task["counts"]["STS13"]
    task["not_run"] = {"STS13": "FILE is not there"}
    out = evaluate.table([model, model])
    assert cells(out, "one")["STS"] == "65.1*"
    assert out.count("\n*sts: not the paper's data") == 1
    assert out.count("\nnot run: STS13: FILE is not there") == 1


def test_errors_before_the_work(data, models, tmp_path, monkeypatch):
    """A wrong folder, an unknown second model, a file that can't be written: no model is loaded."""
    monkeypatch.setattr(paraclip, "load_model", None)
    for folder in (data / "coco", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"--data {folder}: nothing to evaluate, none of"):
            main(monkeypatch, models[0], "--data", folder)
    with pytest.raises(InputError, match="none of these is there: imagenet/val$"):
        main(monkeypatch, models[0], "--data", data, "--tasks", "imagenet")
    with pytest.raises(InputError, match="no-such-model: "):
        main(monkeypatch, models[0], "no-such-model", "--data", data)
    for flag in ("--json", "--gallery"):
        for path in (tmp_path, tmp_path / "no/file"):
            with pytest.raises(OSError, match=f"'{path}'"):
                main(monkeypatch, models[0], "--data", data, flag, path)


def test_a_finished_task_is_in_the_json_at_once(data, models, tmp_path, monkeypatch, restored):
    """One truncated image of COCO, and the minutes of STS are not lost."""
    name = f"coco/val2017/{NAMES[3]}"
    restored(name, (data / name).read_bytes()[:300])
    results = tmp_path / "results.json"
    with pytest.raises(InputError, match=f"{NAMES[3]} can't be read "):
        main(monkeypatch, models[0], "--data", data, "--json", results, "--workers", 0,
             "--tasks", "sts", "coco")
    assert list(figures_in(results)[0]) == ["STS"]


def test_images_once_for_a_shared_tower(data, models, tmp_path, monkeypatch):
    """Two models of one tower: each image and box is encoded once. Another tower: once more.

    Pooling is not in the weights: with equal weights it is another tower, with other figures.
    """
    encoded = []
    original = paraclip.load_pixels

    def counted(model, open_item, items):
        encoded.extend(items)
        return original(model, open_item, items)

    monkeypatch.setattr(paraclip, "load_pixels", counted)
    config = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "pool_type": "avg"}}
    other = make_clip(tmp_path / "other", config)
    flags = ("--data", data, "--tasks", "paraphrase", "coco", "vg-r", "--workers", 0)
    main(monkeypatch, *models, *flags)
    assert len(encoded) == len(set(encoded)) == 14 + 5  # photos, and crops that count
    main(monkeypatch, models[0], other, *flags, "--json", tmp_path / "together.json")
    assert len(encoded) == 3 * 19
    main(monkeypatch, other, *flags, "--json", tmp_path / "alone.json")
    first, second = figures_in(tmp_path / "together.json")
    assert [second] == figures_in(tmp_path / "alone.json")
    assert first != second


def test_figures_do_not_depend_on_blocks_or_workers(data, models, tmp_path, monkeypatch):
    """Texts in blocks of 50 and images five at a time give the figures of large blocks."""
    def tasks(workers):
        main(monkeypatch, models[1], "--data", data, "--workers", workers,
             "--tasks", "paraphrase", "vg-r", "vg-a", "coco", "sts", "--json", tmp_path / "r.json")
        return json.loads((tmp_path / "r.json").read_text())["models"][0]["tasks"]

    whole = tasks(1)
    monkeypatch.setattr(evaluate, "TEXTS_AT_ONCE", 50)
    monkeypatch.setattr(evaluate, "IMAGES_AT_ONCE", 5)
    assert tasks(0) == whole


# ---------------------------------------------------------------- one's own photos

ENDINGS = [".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG", ".webp", ".jfif", ".bmp", ".tiff"]


@pytest.fixture
def own(tmp_path, data):
    """A user's own folder: photos at the top and, of the same names, in a subfolder; and pairs."""
    for i, name in enumerate(NAMES):
        folder = "images/trip" if i % 2 else "images"
        path = tmp_path / "mine" / folder / f"photo.{i // 2}{ENDINGS[i % len(ENDINGS)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(data / "coco/val2017" / name).save(path)
    for other in ("._photo.1.jpg", "trip/._photo.1.jpg", "notes.txt"):
        write(tmp_path / "mine/images" / other, b"of macOS, or no image")
    rows = [
        {"query": "a red dog", "paraphrase": "a dog which is red", "image_id": "photo.1"},
        {"query": "a red dog", "paraphrase": "a crimson hound"},
        {"image_id": "trip/photo.1.JPEG", "caption": "a cat", "paraphrase_1": "one cat",
         "paraphrase_2": "a feline"},
        {"image_id": "trip/photo.6", "caption": "a car", "paraphrase_1": "a vehicle",
         "paraphrase_2": "an auto"},
    ]
    write(tmp_path / "mine/paraphrased_retrieval.jsonl", "\n".join(map(json.dumps, rows)))
    return tmp_path / "mine"


def test_own_photos_in_subfolders(own, models, tmp_path, monkeypatch, capsys):
    """All are found, under the names by which training opens them, and each gold is the right."""
    main(monkeypatch, models[0], "--data", own, "--json", tmp_path / "r.json", "--workers", 0)
    out = capsys.readouterr().out
    assert f"{own}/images: 14 images; 3 other files are passed over\n" in out
    task = json.loads((tmp_path / "r.json").read_text())["models"][0]["tasks"]["paraphrase"]
    assert task["counts"] == {"pairs": 4, "images": 14, "pairs_with_gold": 3}
    assert f"paraphrase R@10 {task['sub_scores']['paraphrase R@10']:.1f}" in out

    images, queries, golds = evaluate.read_paraphrases(own)
    assert golds == (own / "images/photo.1.jpeg", None, own / "images/trip/photo.1.JPEG",
                     own / "images/trip/photo.6.JPEG")
    assert queries[0][2] == "a cat" and queries[1][2] == "one cat"
    for path, name in zip(images, evaluate.find_images(own / "images")):
        with paraclip.open_image(own / "images", name) as image:
            assert image.tobytes() == Image.open(path).tobytes()

    pairs = (own / "paraphrased_retrieval.jsonl").read_text()
    write(own / "paraphrased_retrieval.jsonl", pairs.replace('"trip/photo.6"', '"photo.8"'))
    with pytest.raises(InputError, match='jsonl:4: .* image_id "photo.8" is no image of'):
        evaluate.read_paraphrases(own)
    write(own / "images/trip/photo.1.png", b"")
    evaluate.find_images.cache_clear()
    with pytest.raises(InputError, match=r"trip/photo\.1\.png and photo\.1\.JPEG: two images"):
        evaluate.read_paraphrases(own)


def test_gold_recall_by_hand(own):
    """The gold image is first for the queries; for the paraphrases it is the sixth."""
    images, (_, paraphrases), golds = evaluate.read_paraphrases(own)

    def texts(texts):
        features = torch.zeros(len(texts), 14)
        for row, gold in enumerate(golds):
            features[row, images.index(gold or images[0])] = 1
            if texts == paraphrases:
                features[row, [i for i in range(14) if images[i] != gold][:5]] = 2
        return evaluate.fixed_point(features)

    encoders = SimpleNamespace(
        texts=texts, images=lambda paths: evaluate.fixed_point(torch.eye(14))
    )
    scores = evaluate.paraphrased_retrieval(own, encoders).sub_scores
    assert [scores[f"query R@{k}"] for k in (1, 5, 10)] == [100, 100, 100]
    assert [scores[f"paraphrase R@{k}"] for k in (1, 5, 10)] == [0, 0, 100]


def test_cocos_ids(data):
    """Without zeros, as text, as a file, without its ending, below a folder; and a pair without."""
    _, _, golds = evaluate.read_paraphrases(data)
    assert [gold and gold.name for gold in golds] == [*NAMES[:4], None, NAMES[1]]


def test_the_page_of_figure_3(own, models, tmp_path, monkeypatch):
    """One file: texts as they are, gold framed, photos turned as their EXIF says. One model."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees
    photo = Image.new("RGB", (80, 40), "red")
    photo.paste("blue", (0, 0, 40, 40))  # blue on the left; above, when it is turned
    for path in list((own / "images").glob("photo.*")):
        path.unlink()
        photo.save(own / f"images/{path.stem}.jpg", exif=exif)
    rows = [{"query": 'é – 犬 <b> "x" & y', "paraphrase": "a dog " * 90, "image_id": "photo.1"},
            {"query": "two\nlines", "paraphrase": "Wörter"}]
    write(own / "paraphrased_retrieval.jsonl", "\n".join(map(json.dumps, rows)))
    page = tmp_path / "figure3.html"
    main(monkeypatch, models[0], "--data", own, "--workers", 0, "--gallery", page)
    text = page.read_bytes().decode("utf-8")
    assert '<meta charset="utf-8">' in text and "gold frame" in text and "http" not in text
    assert "A: é – 犬 &lt;b&gt; &quot;x&quot; &amp; y</h2>" in text and "B: Wörter</h2>" in text
    assert len(re.findall(r"AO@10 of A and B: \d+\.\d<", text)) == 2
    shown = re.findall(r'<img class="(\w+)" title="(.*)" src="data:image/jpeg;base64,(.*?)">',
                       text.replace("<img", "\n<img"))
    assert len(shown) == 2 * 2 * 5
    for frame, name, content in shown[10:]:
        assert frame == "grey"  # the second pair has no gold
    for frame, name, content in shown[:10]:
        assert (frame == "gold") == (name == "photo.1.jpg")
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            assert image.size == (208, 208)
            if name.endswith(".jpg"):
                assert image.getpixel((104, 190))[0] > 200 > image.getpixel((104, 10))[0]


def test_a_gallery_without_pairs(data, models, tmp_path, monkeypatch, capsys):
    """The table comes first, so nothing is lost."""
    (tmp_path / "coco").symlink_to(data / "coco")
    with pytest.raises(InputError, match=r"paraphrased_retrieval\.jsonl is not there"):
        main(monkeypatch, models[0], "--data", tmp_path, "--workers", 0, "--tasks", "coco",
             "--gallery", tmp_path / "figure3.html")
    assert cells(capsys.readouterr().out, models[0])["T R@5"] != "not run"


def test_paper_rows(tmp_path):
    """Baselines by name; runs by base model and losses in any order; else nothing."""
    def row_of_run(model, *loss):
        write(tmp_path / "config.json", json.dumps({"flags": {"model": model, "loss": loss}}))
        found = evaluate.paper_row(str(tmp_path))
        assert evaluate.paper_row(f"local-dir:{tmp_path}") == found
        return found and found["figures"]["STS"]

    for baseline in paraclip.BASELINES:
        assert evaluate.paper_row(baseline)["row"] == baseline
    assert evaluate.paper_row("openclip-2b")["figures"]["VG-R"] == 45.0
    assert evaluate.paper_row("ViT-B-32:openai") is None  # the wrong activation
    assert row_of_run("openai", "T1:T2", "I:T2", "T:T1") == 72.2
    assert row_of_run("openai", "I:T1", "I:T", "I:T2") == 68.8
    assert row_of_run("laclip", "I:T2", "T:T1", "T1:T2") == 71.4
    assert row_of_run("openclip-400m", "I:T") is None
    assert row_of_run("runs/first", "I:T2", "T:T1", "T1:T2") is None
    write(tmp_path / "config.json", '{"model_type": "clip"}')
    assert evaluate.paper_row(str(tmp_path)) is None
    assert len(evaluate.PAPER) == 17
    assert all(len(figures) == 8 for figures in evaluate.PAPER.values())
