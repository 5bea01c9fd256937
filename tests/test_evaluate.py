"""evaluate.py: metrics by hand, readers on the traps of the real formats, runs as a user's."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from conftest import NAMES, ROOT, WORDS, make_clip, write
from PIL import Image

import evaluate
import paraclip
from paraclip import InputError

torch.set_num_threads(1)  # threads cost more than they give on models this small


def test_overlap_and_jaccard_by_hand():
    ten = list(range(10))
    others = list(range(10, 20))
    two_of_ten = [0, 11, 1, 13, 14, 15, 16, 17, 18, 19]
    by_hand = (1 + 1 / 2 + sum(2 / d for d in range(3, 11))) / 10
    for a, b, overlap, jaccard in (
        (ten, ten, 1, 1), (ten, others, 0, 0), (ten, ten[::-1], 0.354365, 1),
        (ten, two_of_ten, by_hand, 2 / 18), ([3, 1], [1, 2], (0 / 1 + 1 / 2) / 2, 1 / 3),
    ):
        assert evaluate.average_overlap(a, b) == pytest.approx(overlap, abs=1e-6)
        assert evaluate.jaccard(a, b) == pytest.approx(jaccard)


def test_ranking_against_exact_integers():
    """Ties, and a query's ranking is the same in any company."""
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
    assert evaluate.rank_gallery(queries, gallery) == naive
    assert [evaluate.rank_gallery(query[None], gallery)[0] for query in queries] == naive


def test_recall_and_spearman_by_hand():
    # two items of one label; a query whose item comes second; a query without a label
    rankings = [[0, 1, 2], [2, 1, 0], [1, 0, 2]]
    for k, percent in ((1, 0), (2, 50), (3, 100)):
        assert evaluate.recall(rankings, "abb", ["b", "a", None], k) == percent
    # the ranks are 1 2.5 2.5 4 and 1 3 2 4
    assert evaluate.spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(94.86833)
    assert evaluate.spearman([1, 1, 1], [1, 2, 3]) is None
    assert evaluate.spearman([1, 2, 3], [2, 2, 2]) is None


# ---------------------------------------------------------------- readers


def any_features(items):
    """Features [n, 8] of texts or images, random but the same for the same item."""
    seeds = [zlib.crc32(str(item).encode()) for item in items]
    rows = [np.random.default_rng(seed).standard_normal(8) for seed in seeds]
    return evaluate.fixed_point(torch.tensor(np.array(rows)))


ANY = SimpleNamespace(texts=any_features, images=any_features)


def test_sts_traps(data, tmp_path):
    """Each trap of the files: what is read, and Spearman's rho computed plainly."""
    pairs = {task: evaluate.read_sts(data / "sts", task) for task in evaluate.STS}
    sizes = {task: len(rows) for task, rows in pairs.items()}
    assert sizes == {"STS12": 35, "STS13": 21, "STS14": 42, "STS15": 25, "STS16": 25, "STS-B": 7,
                     "SICK-R": 8}
    assert pairs["STS16"][4] == ["answer-answer", 'a "big dog', "\u2028 dog\x85 here", 5]
    assert pairs["STS-B"][2] == ["main-news", '"a dog said', 'he said "yes"', 2.5]
    assert pairs["SICK-R"][7][3] == 4.5

    result = evaluate.sts(data, ANY)
    rhos = []
    for task, rows in pairs.items():
        cosines = [(any_features([a]) * any_features([b])).sum().item() for _, a, b, _ in rows]
        rhos.append(evaluate.spearman(cosines, [row[3] for row in rows]))
        assert result.sub_scores[task]["all"] == pytest.approx(rhos[-1])
    assert list(result.sub_scores["STS13"]) == ["all", "FNWN", "headlines", "OnWN"]
    assert result.sub_scores["SICK-R"] == pytest.approx({"all": rhos[6], "test": rhos[6]})
    assert result.figures == {"STS": pytest.approx(sum(rhos) / 7)}
    assert result.counts == sizes

    (tmp_path / "sts").mkdir()
    result = evaluate.sts(tmp_path, ANY)
    assert result.figures == {} and len(result.not_run) == 7


def test_equal_sentences_tie(data, monkeypatch):
    """A text's cosine with itself is 1 only up to 2^-26: none may rank above another's."""
    pairs = [("all", f"text {i}", f"text {i}", i % 4) for i in range(12)] + [("all", "a", "b", 0)]
    monkeypatch.setattr(evaluate, "read_sts", lambda *_: pairs)
    expected = evaluate.spearman([1] * 12 + [0], [gold for *_, gold in pairs])
    assert evaluate.sts(data, ANY).figures == {"STS": pytest.approx(expected)}
    del pairs[-1]  # as of a model that has collapsed
    with pytest.raises(InputError, match="sts, STS12: all cosines, or all gold scores, are equal"):
        evaluate.sts(data, ANY)


def test_aro_crop_groups_and_macro_by_hand(data):
    """Four relations, one symmetric; "on" right once in three, "under" right, "holding" a tie."""
    right, wrong, tie = (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)
    examples = evaluate.read_aro(data, "visual_genome_relation.json")
    true_captions = [example[2] for example in examples]
    feature_of = dict(zip(true_captions, (right, wrong, tie, right, right, tie)))
    encoders = SimpleNamespace(
        texts=lambda texts: torch.tensor([feature_of.get(text, tie) for text in texts]),
        images=lambda crops: torch.tensor([right] * len(crops)),
    )
    result = evaluate.vg_relation(data, encoders)
    by_group = {"holding": 0, "on": 100 / 3, "under": 100}
    assert result.sub_scores["by_group"] == pytest.approx(by_group)
    assert result.figures["VG-R"] == pytest.approx((0 + 100 / 3 + 100) / 3)
    assert result.sub_scores["micro"] == pytest.approx(100 * 2 / 5)
    assert result.counts == {"pairs": 6, "pairs_counted": 5, "groups": 3}
    with Image.open(data / "aro/images/1.png") as whole:
        crop = whole.crop((1, 1, 22, 21))
    assert evaluate.open_item(examples[1][1]).tobytes() == crop.tobytes()

    result = evaluate.vg_attribution(data, encoders)
    assert result.sub_scores["by_group"] == {"old_big": 0, "red_wet": 0}  # wet_red has only 24
    assert result.counts == {"pairs": 75, "pairs_counted": 51, "groups": 2}
    assert len(evaluate.SYMMETRIC) == 157
    assert {"adjusting", "by", "sitting in front of", "wrapped in"} <= evaluate.SYMMETRIC


def one_hot(texts_each, classes):
    """Encoders whose image i is one-hot in classes[i], and its texts, some for each, in i."""
    eye = evaluate.fixed_point(torch.eye(len(classes)))
    texts = eye.repeat_interleave(texts_each, 0)
    return SimpleNamespace(texts=lambda _: texts, images=lambda _: eye[classes])


def test_coco_first_five_sorted(data):
    """Images by name, captions in the file's order, the sixth left out; several positives."""
    images, captions = zip(*evaluate.read_coco(data))
    assert [path.name for path in images[::5]] == NAMES
    assert len(captions) == 70 and captions[50] == "A dog.\n"
    assert not any("sixth" in text for text in captions)
    result = evaluate.coco(data, one_hot(5, range(14)))
    assert result.figures == {"T R@5": 100, "I R@5": 100}
    assert result.sub_scores["I R@1"] == 100
    assert result.counts == {"images": 14, "captions": 70}


def test_imagenet_order_and_damage(tmp_path):
    """Sorted wnids are the classes; anything but 1,000 wnids with images is refused."""
    for i in range(1000):
        write(tmp_path / f"imagenet/val/n{2 * i:08}/a.JPEG", b"")
    write(tmp_path / "imagenet/val/LOC_val_solution.csv", b"")
    encoders = one_hot(80, [c if c % 4 else 999 for c in range(1000)])  # every fourth is wrong
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
def copy(data, tmp_path):
    """The benchmarks once more, to be damaged."""
    return shutil.copytree(data, tmp_path / "copy")


@pytest.mark.parametrize("file", BENCHMARKS)
def test_damaged_and_missing_files(copy, file):
    """Empty, cut off, not UTF-8: one line that names the file, or its task. Missing: not run.

    A byte order mark, which an editor of Windows leaves, changes nothing.
    """
    benchmark = BENCHMARKS[file]
    path = copy / file
    good = path.read_bytes()
    whole = benchmark(copy, ANY)
    path.write_bytes(b"\xef\xbb\xbf" + good)
    assert benchmark(copy, ANY) == whole

    half = 2 * len(good) // 3
    if b"\t" in good:
        half = good.rindex(b"\t", 0, good.rindex(b"\t"))
    for bad in (b"", good[:half], good[:3], good[:40] + b"\xe9\xff" + good[40:]):
        path.write_bytes(bad)
        with pytest.raises(InputError) as error:
            benchmark(copy, ANY)
        assert not isinstance(error.value, evaluate.NotThere)
        assert re.match(rf"{copy}/{file.split('/')[0]}.*\Z", str(error.value))  # one line

    path.unlink()
    if benchmark is not evaluate.sts:
        with pytest.raises(evaluate.NotThere, match=re.escape(f"{path} is not there")):
            benchmark(copy, ANY)
        return
    result = evaluate.sts(copy, ANY)  # a task without all its files is left out, and said
    assert len(result.sub_scores) == 6
    assert [str(path.parent) in reason for reason in result.not_run.values()] == [True]


@pytest.mark.parametrize(("file", "old", "new", "error"), [
    ("paraphrased_retrieval.jsonl", '"query"', '"text"', "jsonl:1: KeyError: 'caption'"),
    ("paraphrased_retrieval.jsonl", '"query": ', '"query": 5, "was": ', "jsonl:1: AttributeError"),
    ("paraphrased_retrieval.jsonl", "139", '"140"', 'jsonl:1: ValueError: image_id "140" is no'),
    ("coco/annotations/captions_val2017.json", '"image_id": 139', '"image_id": 7', "KeyError: 7"),
    ("coco/annotations/captions_val2017.json", NAMES[0], "1.jpg", "coco/val2017: KeyError: '1'"),
    ("sts/STS12-en-test/STS.gs.MSRvid.txt", "\n5\n", "\nfive\n", "sts, STS12: ValueError"),
    ("sts/STS12-en-test/STS.gs.MSRvid.txt", "\n5\n", "\n", "STS.gs.MSRvid.txt: ValueError"),
])
def test_bad_values(copy, file, old, new, error):
    good = (copy / file).read_text()
    assert old in good
    write(copy / file, good.replace(old, new, 1))
    with pytest.raises(InputError, match=re.escape(error)):
        BENCHMARKS.get(file, evaluate.sts)(copy, ANY)


def encoders_of(model, *flags):
    args = evaluate.parse_args(["model", "--data", "/", "--workers", "0", *flags])
    return evaluate.Encoders(model, {}, args)


def test_features_are_open_clips(data, models, monkeypatch):
    """Texts, images, crops and classes against open_clip's own; each text is encoded once."""
    model = paraclip.load_model(models[0])
    encoders = encoders_of(model)
    clip, preprocess = open_clip.create_model_from_pretrained(models[0])
    tokenizer = open_clip.get_tokenizer(models[0])
    encoded = []
    model.tokenizer = lambda texts: encoded.extend(texts) or tokenizer(texts)
    texts = [" ".join(WORDS[i : i + n]) for i in range(8) for n in (2, 5, 11)] + ["word " * 90]
    crop = data / "aro/images/1.png", (3, 4, 40, 30)
    images = [data / "coco/val2017" / name for name in NAMES]
    pictures = [Image.open(crop[0]).convert("RGB").crop(crop[1]), *map(Image.open, images)]
    classes = open_clip.IMAGENET_CLASSNAMES[:7]
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES[:9]
    monkeypatch.setattr(open_clip, "IMAGENET_CLASSNAMES", classes)
    monkeypatch.setattr(open_clip, "OPENAI_IMAGENET_TEMPLATES", templates)
    with torch.no_grad():
        for feature, text in zip(encoders.texts(texts), texts):
            expected = clip.eval().encode_text(tokenizer([text]), normalize=True)[0]
            assert torch.allclose(feature.float(), expected, atol=2e-6)
        for feature, picture in zip(encoders.images([crop, *images]), pictures):
            expected = clip.encode_image(preprocess(picture)[None], normalize=True)[0]
            assert torch.allclose(feature.float(), expected, atol=2e-6)
        expected = open_clip.build_zero_shot_classifier(clip, tokenizer, classes, templates)
        assert torch.allclose(evaluate.zero_shot_weights(encoders).float(), expected.T, atol=2e-6)

        expected = clip.encode_text(tokenizer(["a new dog"]), normalize=True)[0]
    first, second, _ = encoders.texts(["a new dog", "a new dog", texts[0]])
    assert torch.allclose(first.float(), expected, atol=2e-6)  # encoded alone
    assert torch.equal(first, second)  # so that VG's equal captions tie
    assert len(encoded) == len(set(encoded)) == len(texts) + 7 * 9 + 1


def test_precision_and_damaged_weights(data, models):
    model = paraclip.load_model(models[0])
    features = []
    for precision in ("fp32", "bf16"):
        encoders = encoders_of(model, "--precision", precision)
        images = encoders.images([data / "aro/images/1.png"])
        features.append(torch.cat([encoders.texts(["a dog"]), images]))
    differences = (features[0] - features[1]).abs().amax(1)
    assert differences.min() > 0 and differences.max() < 0.02
    model.clip.text_projection.data[0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        encoders_of(model).texts(["a dog"])


# ---------------------------------------------------------------- as a user


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(flags) is evaluate.main() in this process; it returns the models of its --json."""

    def run(*flags):
        path = tmp_path / "run.json"
        command = ["evaluate.py", "--json", path, "--workers", 0, *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        evaluate.main()
        return json.loads(path.read_text())["models"]

    return run


def cells(out, label):
    """{column: cell} of the table's row that begins with `label`."""
    lines = [line for line in out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    row = next(row for row in rows if row[0].startswith(label))
    return dict(zip(rows[0][1:], row[1:]))


def figures_of(model):
    """{column: figure} of a model in the JSON file."""
    results = model["tasks"].values()
    return {column: figure for each in results for column, figure in each["figures"].items()}


def test_two_models_as_a_user(data, models, tmp_path):
    """The docstring's command: table, paper's row, differences, what is not run, JSON, Figure 3."""
    command = [sys.executable, ROOT / "evaluate.py", *models, "--data", data, "--workers", "1"]
    command += ["--json", tmp_path / "results.json", "--gallery", tmp_path / "figure3.html"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    out = done.stdout
    assert "Warning" not in done.stderr
    base, trained, gains = (cells(out, row) for row in (*models, f"minus {models[0]}"))
    assert list(base) == ["AO@10", "JS@10", "VG-R", "VG-A", "STS", "Clsf", "T R@5", "I R@5"]
    assert (base["Clsf"], trained["Clsf"], gains["Clsf"]) == ("not run", "not run", "")
    assert out.count(f"\nnot run: imagenet: {data}/imagenet/val is not there") == 1
    paper = " ".join(cells(out, "paper: openai + I:T").values())
    assert paper == "68.9 59.9 58.0 62.4 68.7 63.7 75.8 58.0"

    report = json.loads((tmp_path / "results.json").read_text())
    assert set(report) == {"flags", "device", "versions", "models"}
    first, second = report["models"]
    before, after = map(figures_of, report["models"])
    assert before != after
    for column in before:
        assert base[column] == f"{before[column]:.1f}*"  # the star: not the paper's data
        assert trained[column] == f"{after[column]:.1f}*"
        # the difference of the figures as they are shown
        assert gains[column] == f"{round(after[column], 1) - round(before[column], 1):+.1f}"
    assert set(first) == {"name", "fingerprint", "image_tower", "paper", "tasks"}
    assert first["image_tower"] == second["image_tower"]
    assert first["fingerprint"] != second["fingerprint"]
    assert first["paper"] is None and second["paper"]["row"] == "openai + I:T"
    for task in first["tasks"].values():
        assert set(task) == {"figures", "counts", "sub_scores", "not_run"}
    overlaps = {f"{name}@{k}" for name in ("AO", "JS") for k in range(1, 11)}
    assert overlaps < set(first["tasks"]["paraphrase"]["sub_scores"])
    recalls = {f"{side} R@{k}" for side in "TI" for k in (1, 5, 10)}
    assert set(first["tasks"]["coco"]["sub_scores"]) == recalls
    assert list(first["tasks"]["imagenet"]["not_run"]) == ["imagenet"]
    assert (tmp_path / "figure3.html").read_text().count("<img") == 3 * 2 * 2 * 5


def test_the_papers_data_has_no_star():
    """Only what is of other sizes than the paper's, or lacks a task of STS, has one."""
    task = {"figures": {"STS": 65.14}, "counts": dict(evaluate.TASKS["sts"].counts), "not_run": {}}
    model = {"name": "one", "paper": None, "tasks": {"sts": task}}
    out = evaluate.table([model])
    assert cells(out, "one")["STS"] == "65.1" and "not the paper's" not in out
    del task["counts"]["STS13"]
    task["not_run"] = {"STS13": "FILE is not there"}
    out = evaluate.table([model, model])
    assert cells(out, "one")["STS"] == "65.1*"
    assert out.count("\n*sts: not the paper's data") == 1
    assert out.count("\nnot run: STS13: FILE is not there") == 1


def test_errors_before_the_work(data, models, tmp_path, monkeypatch, run):
    """A wrong folder, an unknown second model: no model is loaded."""
    monkeypatch.setattr(paraclip, "load_model", None)
    for flags, error in (
        ([models[0], "--data", tmp_path], f"--data {tmp_path}: nothing to evaluate, none of"),
        ([models[0], "--data", data, "--gallery", "no/page.html"],
         "no/page.html: its folder is not"),
        ([models[0], "--data", data, "--tasks", "imagenet"], "is there: imagenet/val$"),
        ([models[0], "no-such-model", "--data", data], "no-such-model: "),
    ):
        with pytest.raises(InputError, match=error):
            run(*flags)


def test_nothing_is_lost_by_a_later_error(copy, models, tmp_path, run, capsys):
    """A task that is done is in the JSON at once; the table comes before the gallery."""
    (copy / "paraphrased_retrieval.jsonl").unlink()
    with pytest.raises(InputError, match=r"paraphrased_retrieval\.jsonl is not there"):
        run(models[0], "--data", copy, "--tasks", "coco", "--gallery", tmp_path / "3.html")
    assert cells(capsys.readouterr().out, models[0])["T R@5"] != "not run"

    write(copy / "coco/val2017" / NAMES[3], b"")
    with pytest.raises(InputError, match=rf"{NAMES[3]} can't be read .*cannot identify.*\Z"):
        run(models[0], "--data", copy, "--tasks", "sts", "coco")
    (model,) = json.loads((tmp_path / "run.json").read_text())["models"]
    assert list(figures_of(model)) == ["STS"]


def test_images_once_for_a_shared_tower(data, models, tmp_path, monkeypatch, run):
    """Each image and box, in blocks of any size. Another tower: once more."""
    encoded = []
    original = evaluate.open_item
    monkeypatch.setattr(evaluate, "open_item", lambda x: encoded.append(x) or original(x))
    other = make_clip(tmp_path / "other", seed=1)
    flags = ("--data", data, "--tasks", "paraphrase", "coco", "vg-r", "sts")
    run(*models, *flags)
    assert len(encoded) == len(set(encoded)) == 14 + 5  # photos, and crops that count
    first, second = run(models[0], other, *flags)
    assert len(encoded) == 3 * 19
    assert figures_of(first) != figures_of(second)
    monkeypatch.setattr(evaluate, "TEXTS_AT_ONCE", 50)
    monkeypatch.setattr(evaluate, "IMAGES_AT_ONCE", 5)
    assert run(other, *flags, "--workers", 1) == [second]


# ---------------------------------------------------------------- one's own photos


@pytest.fixture
def own(tmp_path, data):
    """A user's own folder: photos at the top and, of the same names, in a subfolder; and pairs."""
    endings = ["jpg", "JPG", "jpeg", "JPEG", "png", "PNG", "webp", "jfif", "bmp", "tiff"]
    for i, name in enumerate(NAMES):
        folder = "images/trip" if i % 2 else "images"
        path = tmp_path / "mine" / folder / f"photo.{i // 2}.{endings[i % len(endings)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(data / "coco/val2017" / name).save(path)
    for other in ("._photo.1.jpg", "trip/._photo.1.jpg", "notes.txt"):
        write(tmp_path / "mine/images" / other, b"of macOS, or no image")
    (tmp_path / "mine/images/trip/all").symlink_to(tmp_path / "mine/images")
    write_pairs(
        tmp_path / "mine",
        {"query": "a red dog", "paraphrase": "a dog which is red", "image_id": "photo.1"},
        {"query": "a red dog", "paraphrase": "a crimson hound"},
        {"image_id": "trip/photo.1.JPEG", "caption": "a cat", "paraphrase_1": "one cat"},
        {"image_id": "trip/photo.6", "caption": "a car", "paraphrase_1": "a vehicle"},
    )
    return tmp_path / "mine"


def write_pairs(folder, *pairs):
    write(folder / "paraphrased_retrieval.jsonl", "\n".join(map(json.dumps, pairs)))


def test_own_photos_in_subfolders(own, models, run, capsys):
    """All are found, under the names by which training opens them, and each gold is the right."""
    (model,) = run(models[0], "--data", own)
    out = capsys.readouterr().out
    assert f"{own}/images: 14 images; 3 other files are passed over\n" in out
    task = model["tasks"]["paraphrase"]
    assert task["counts"] == {"pairs": 4, "images": 14, "pairs_with_gold": 3}
    assert f"paraphrase R@10 {task['sub_scores']['paraphrase R@10']:.1f}" in out

    images, queries, golds = evaluate.read_paraphrases(own)
    assert golds == (own / "images/photo.1.jpeg", None, own / "images/trip/photo.1.JPEG",
                     own / "images/trip/photo.6.JPEG")
    assert queries[0][2] == "a cat" and queries[1][2] == "one cat"
    for path, name in zip(images, evaluate.find_images(own / "images")):
        with paraclip.open_image(own / "images", name) as image:
            assert image.tobytes() == Image.open(path).tobytes()

    write_pairs(own, {"query": "a", "paraphrase": "b", "image_id": "photo.8"})
    with pytest.raises(InputError, match='jsonl:1: .* image_id "photo.8" is no image of'):
        evaluate.read_paraphrases(own)
    write(own / "images/trip/photo.1.png", b"")
    evaluate.find_images.cache_clear()
    with pytest.raises(InputError, match=r"trip/photo\.1\.png and .*trip/photo\.1\.JPEG: two"):
        evaluate.read_paraphrases(own)


def test_golds_and_their_recall(data, monkeypatch):
    """COCO's ids without zeros, as text, a file, without its ending, below a folder; or none.

    The gold image is first for the queries; for the paraphrases it is the sixth.
    """
    (data / "images").mkdir()  # not looked at, as coco/val2017 is there
    images, _, golds = evaluate.read_paraphrases(data)
    assert [gold and gold.name for gold in golds] == [*NAMES[:4], None, NAMES[1]]
    firsts = [images.index(gold or images[0]) for gold in golds]
    rankings = [[(first + i) % 14 for i in range(10)] for first in firsts]
    later = [[(first + 9 + i) % 14 for i in range(10)] for first in firsts]
    monkeypatch.setattr(evaluate, "rank_paraphrases", lambda *_: (rankings, later))
    scores = evaluate.paraphrased_retrieval(data, ANY).sub_scores
    assert [scores[f"query R@{k}"] for k in (1, 5, 10)] == [100, 100, 100]
    assert [scores[f"paraphrase R@{k}"] for k in (1, 5, 10)] == [0, 0, 100]


def test_the_page_of_figure_3(own, models, run):
    """One file: texts as they are, gold framed, photos turned as their EXIF says. One model."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees
    photo = Image.new("RGB", (80, 40), "red")
    photo.paste("blue", (0, 0, 40, 40))  # blue on the left; above, when it is turned
    for path in list((own / "images").rglob("photo.*")):
        path.unlink()
        photo.save(path.with_suffix(".jpg"), exif=exif)
    write_pairs(
        own,
        {"query": 'é – 犬 <b> "x" & y', "paraphrase": "a dog " * 90, "image_id": "photo.1"},
        {"query": "two\nlines", "paraphrase": "Wörter"},
    )
    page = own / "figure3.html"
    run(models[0], "--data", own, "--gallery", page)
    text = page.read_bytes().decode("utf-8")
    assert '<meta charset="utf-8">' in text and "gold frame" in text and "http" not in text
    assert "A: é – 犬 &lt;b&gt; &quot;x&quot; &amp; y</h2>" in text and "B: Wörter</h2>" in text
    assert len(re.findall(r"AO@10 of A and B: \d+\.\d<", text)) == 2
    picture = r'<img( class="gold")? title="(.*)" src="data:image/jpeg;base64,(.*?)">'
    shown = re.findall(picture, text)
    assert len(shown) == 2 * 2 * 5
    for i, (frame, title, content) in enumerate(shown):  # the second pair has no gold
        assert bool(frame) == (title == "photo.1.jpg" and i < 10)
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            assert image.size == (208, 208)
            assert image.getpixel((104, 190))[0] > 200 > image.getpixel((104, 10))[0]


def test_paper_rows(tmp_path):
    """Baselines by name; runs by base model and losses in any order; else nothing."""
    assert [evaluate.paper_row(name)["row"] for name in paraclip.BASELINES] == [*paraclip.BASELINES]
    assert evaluate.paper_row("openclip-2b")["figures"]["VG-R"] == 45.0
    assert evaluate.paper_row("ViT-B-32:openai") is None  # the wrong activation
    for model, loss, figure in (
        ("openai", "T1:T2 T:T1 I:T2", 72.2), ("openai", "I:T1 I:T I:T2", 68.8),
        ("laclip", "I:T2 T:T1 T1:T2", 71.4), ("openclip-400m", "I:T", None),
        ("runs/first", "I:T2 T:T1 T1:T2", None),
    ):
        flags = {"model": model, "loss": loss.split()}
        write(tmp_path / "config.json", json.dumps({"flags": flags}))
        found = evaluate.paper_row(str(tmp_path))
        assert evaluate.paper_row(f"local-dir:{tmp_path}") == found
        assert (found and found["figures"]["STS"]) == figure
    write(tmp_path / "config.json", '{"model_type": "clip"}')
    assert evaluate.paper_row(str(tmp_path)) is None
    assert [len(figures) for figures in evaluate.PAPER.values()] == [8] * 17
