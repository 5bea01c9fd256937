"""evaluate.py: metrics by hand and against naive loops, readers on the traps of the real formats, runs as a user's."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import NAMES, ROOT, TINY, WORDS, make_clip, write
from PIL import Image

import evaluate
from generate import InputError
from paraclip import load_model

torch.set_num_threads(1)  # threads cost more than they give on models this small

# ---------------------------------------------------------------- metrics
def test_overlap_and_jaccard_by_hand():
    ten = list(range(10))
    a, b = torch.tensor([ten] * 4), torch.tensor([ten, [*range(10, 20)], ten[::-1], [0, 11, 1, 13, 14, 15, 16, 17, 18, 19]])
    overlap, jaccard = evaluate.average_overlap(a, b), evaluate.jaccard(a, b)
    last = (1 + 1 / 2 + sum(2 / d for d in range(3, 11))) / 10
    assert overlap[:, -1].tolist() == pytest.approx([1, 0, 0.354365, last], abs=1e-6)
    assert jaccard[:, -1].tolist() == pytest.approx([1, 0, 1, 2 / 18])
    random = np.random.default_rng(0)
    a, b = (np.stack([random.permutation(14)[:10] for _ in range(20)]) for _ in "ab")
    for k in range(1, 11):  # the formulas, with sets
        naive = [[sum(len({*x[:d]} & {*y[:d]}) / d for d in range(1, k + 1)) / k,
                  len({*x[:k]} & {*y[:k]}) / len({*x[:k]} | {*y[:k]})] for x, y in zip(a.tolist(), b.tolist())]
        ours = [evaluate.average_overlap(torch.tensor(a), torch.tensor(b))[:, k - 1],
                evaluate.jaccard(torch.tensor(a), torch.tensor(b))[:, k - 1]]
        assert torch.allclose(torch.stack(ours, 1), torch.tensor(naive).double(), atol=1e-12)

def test_rank_and_recall_against_exact_integers():
    """Ties and several positives, against Python's integers; the rank of a query is the same in any company."""
    random = torch.Generator().manual_seed(0)
    distinct = torch.randn(12, 40, generator=random)
    gallery = evaluate.fixed_point(distinct[torch.randint(12, (50,), generator=random)])  # each some four times
    queries = evaluate.fixed_point(torch.randn(300, 40, generator=random))
    integers = [[[int(x * 2**26) for x in row] for row in rows.tolist()] for rows in (queries, gallery)]
    naive = []
    for q in integers[0]:
        scores = [sum(x * y for x, y in zip(q, g)) for g in integers[1]]
        naive.append(sorted(range(50), key=lambda i: (-scores[i], i))[:10])
    assert (ranked := evaluate.rank(queries, gallery)).tolist() == naive
    assert torch.cat([evaluate.rank(query[None], gallery) for query in queries]).tolist() == naive
    assert evaluate.rank(queries, gallery[:3]).shape == (300, 3)
    found, wanted = torch.randint(20, (50,), generator=random), torch.randint(20, (300,), generator=random)
    for k in (1, 5, 10):
        brute = [any(found[i] == label for i in row[:k]) for row, label in zip(naive, wanted)]
        assert evaluate.recall(ranked, found, wanted, k).tolist() == brute
        assert 0 < sum(brute) < 300

def test_spearman_accuracy_and_means():
    assert evaluate.spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(94.86833)  # ranks 1 2.5 2.5 4 and 1 3 2 4
    assert evaluate.spearman([1, 1, 1], [1, 2, 3]) is None is evaluate.spearman([1, 2, 3], [2, 2, 2])
    assert evaluate.percent(torch.tensor([True, False, True, True])) == 75
    assert evaluate.by_group(torch.tensor([True, False, True]), ["on", "on", "in"]) == {"in": 100, "on": 50}

def args_of(data, **flags):
    return evaluate.parse_args(["model", "--data", str(data), "--workers", "0", *(w for k, v in flags.items() for w in (f"--{k}", v))])

# ---------------------------------------------------------------- readers
def words(texts):
    """Counts of lower-cased words as features: with them sts() gives, on SemEval's own files, 41.65 49.52 53.73 65.09
    55.69 49.37 53.63, mean 52.67."""
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    vocabulary = sorted(set().union(*counts))
    return evaluate.fixed_point(torch.tensor([[count[word] for word in vocabulary] for count in counts]))

def test_sts_traps(data, tmp_path):
    """Each trap of the files: what is read, and Spearman of word counts against a plain computation."""
    pairs = {task: [(*row[:3], float(row[3])) for row in evaluate.read_sts(str(data), task)] for task in evaluate.STS}
    assert {task: len(rows) for task, rows in pairs.items()} == {
        "STS12": 35, "STS13": 21, "STS14": 42, "STS15": 25, "STS16": 25, "STS-B": 7, "SICK-R": 8}
    assert pairs["STS16"][4] == ("answer-answer", 'a "big dog', "\u2028 dog\x85 here", 5)
    assert pairs["STS-B"][2] == ("main-news", '"a dog said', 'he said "yes"', 2.5)
    assert pairs["SICK-R"][7][3] == 4.5
    result = evaluate.sts(str(data), words, None)
    for task, rows in pairs.items():
        cosines = [float(F.cosine_similarity(*words([a, b]), dim=0)) for _, a, b, _ in rows]
        expected = evaluate.spearman([round(c, 6) for c in cosines], [row[3] for row in rows])
        assert result["sub_scores"][task]["all"] == pytest.approx(expected, abs=1e-9)
    assert list(result["sub_scores"]["STS13"]) == ["all", "FNWN", "headlines", "OnWN"]
    assert result["figures"]["STS"] == pytest.approx(sum(s["all"] for s in result["sub_scores"].values()) / 7)
    with pytest.raises(InputError, match="STS12: Spearman's rho is undefined"):
        evaluate.sts(str(data), lambda texts: torch.ones(len(texts), 2), None)
    with pytest.raises(evaluate.NotThere):
        evaluate.sts(str(tmp_path), words, None)
    (tmp_path / "sts").mkdir()
    result = evaluate.sts(str(tmp_path), words, None)
    assert result["figures"] == {} and len(result["not_run"]) == 7

def test_aro_crop_groups_and_macro_by_hand(data):
    """Four relations, one symmetric; "on" right once in three, "under" right, "holding" a tie."""
    seen = []
    def image(items):
        seen.extend(items)
        return torch.tensor([[1.0, 0.0]] * len(items))
    right, wrong, tie = (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)
    content = json.loads((data / "aro/visual_genome_relation.json").read_text())
    wanted = dict(zip((example["true_caption"] for example in content), (right, wrong, tie, right, right, tie)))
    result = evaluate.vg_relation(str(data), lambda texts: torch.tensor([wanted.get(t, tie) for t in texts]), image)
    assert result["sub_scores"]["by_group"] == pytest.approx({"holding": 0, "on": 100 / 3, "under": 100})
    assert result["figures"]["VG-R"] == pytest.approx((0 + 100 / 3 + 100) / 3)
    assert result["sub_scores"]["micro"] == pytest.approx(100 * 2 / 5)
    assert result["counts"] == {"pairs": 6, "pairs_counted": 5, "groups": 3}
    with Image.open(data / "aro/images/1.png") as whole:
        assert evaluate.open_crop(seen[1]).tobytes() == whole.crop((1, 1, 22, 21)).tobytes()
    result = evaluate.vg_attribution(str(data), lambda texts: torch.ones(len(texts), 2), image)
    assert result["sub_scores"]["by_group"] == {"old_big": 0, "red_wet": 0}  # wet_red has 24 examples
    assert result["counts"] == {"pairs": 75, "pairs_counted": 51, "groups": 2}
    assert len(evaluate.SYMMETRIC) == 157 and {"next to", "by", "driving on", "sitting in front of", "wrapped in"} <= evaluate.SYMMETRIC

def test_coco_first_five_sorted(data):
    """Images by name, captions in the file's order, the sixth left out; several positives."""
    texts, paths = [], []
    def text(captions):
        texts.extend(captions)
        return evaluate.fixed_point(torch.eye(len(captions) // 5).repeat_interleave(5, 0))
    def image(items):
        paths.extend(path for path, _ in items)
        return evaluate.fixed_point(torch.eye(len(items)))
    result = evaluate.coco(str(data), text, image)
    assert [os.path.basename(path) for path in paths] == NAMES
    assert len(texts) == 70 and not any("sixth" in text for text in texts) and texts[50] == "A dog.\n"
    assert result["figures"] == {"T R@5": 100, "I R@5": 100}

BENCHMARKS = {
    "paraphrased_retrieval.jsonl": evaluate.paraphrased_retrieval, "coco/annotations/captions_val2017.json": evaluate.coco,
    "aro/visual_genome_relation.json": evaluate.vg_relation, "aro/visual_genome_attribution.json": evaluate.vg_attribution,
    **dict.fromkeys(("sts/STS12-en-test/STS.input.MSRvid.txt", "sts/STS16-en-test/STS2016.gs.plagiarism.txt",
                     "sts/STSBenchmark/sts-test.csv", "sts/SICK/SICK_test_annotated.txt"), evaluate.sts),
}

@pytest.mark.parametrize("file", BENCHMARKS)
def test_damaged_and_missing_files(data, file):
    """Empty, truncated, not UTF-8: an InputError of one line that names the file, or the task of several. Missing: not run."""
    path, task = data / file, BENCHMARKS[file]
    good, features = path.read_bytes(), lambda items: words(map(str, items))
    try:
        cut = good.rindex(b"\t", 0, good.rindex(b"\t")) if b"\t" in good else 2 * len(good) // 3
        for bad in (b"", good[:cut], good[:3], good[:40] + b"\xe9\xff" + good[40:]):
            path.write_bytes(bad)
            with pytest.raises(InputError) as error:
                task(str(data), features, features)
            assert not isinstance(error.value, evaluate.NotThere)
            assert str(data / file.split("/")[0]) in str(error.value) and "\n" not in str(error.value)
        path.unlink()
        if task is evaluate.sts:  # a missing sub-set is said, and no mean counts its task
            result = task(str(data), features, features)
            assert path.name.replace("2016", "").replace("gs", "input").split(".input.")[0] in next(iter(result["not_run"].values()))
            assert result["figures"]["STS"] == pytest.approx(np.mean([s["all"] for s in result["sub_scores"].values()]))
            assert len(result["sub_scores"]) == 6
        else:
            with pytest.raises(evaluate.NotThere, match=re.escape(f"{path} is not there (")):
                task(str(data), features, features)
    finally:
        path.write_bytes(good)

@pytest.mark.parametrize(("file", "old", "new", "words_of_error"), [
    ("paraphrased_retrieval.jsonl", '"query"', '"text"', "jsonl:1: can't be read: KeyError: 'caption'"),
    ("paraphrased_retrieval.jsonl", "139", '"140"', "jsonl:1: can't be read: ValueError: a blank text, or an image_id"),
    ("aro/visual_genome_relation.json", "1.png", "2.png", "aro/images/2.png"),
    ("coco/annotations/captions_val2017.json", '"image_id": 139', '"image_id": 7', "captions_val2017.json: can't be read: KeyError: 7"),
    ("sts/STS12-en-test/STS.gs.MSRvid.txt", "\n5\n", "\nnan\n", "STS12: can't be read: ValueError: a gold score"),
    ("sts/STS12-en-test/STS.gs.MSRvid.txt", "\n5\n", "\n", "MSRvid.txt: 6 lines, for 7 pairs"),
    ("sts/STS12-en-test/STS.input.MSRvid.txt", "\t", " ", "STS12: can't be read: ValueError"),
])
def test_bad_values(data, file, old, new, words_of_error):
    task, good = BENCHMARKS.get(file, evaluate.sts), (data / file).read_text()
    assert old in good
    try:
        (data / file).write_text(good.replace(old, new, 1))
        with pytest.raises((InputError, FileNotFoundError), match=re.escape(words_of_error)):
            task(str(data), words, lambda items: [evaluate.digest(path) for path, _ in items])
    finally:
        (data / file).write_text(good)

# ---------------------------------------------------------------- encoding
def test_features_are_open_clips(data, models, tmp_path, monkeypatch):
    """Text and image features against open_clip's own calls, one by one: any batch, any order, equal ones once."""
    (clip, preprocess, tokenizer), cache = load_model(models[0]), {}
    text, image = evaluate.encoders(clip, preprocess, tokenizer, cache, args_of(data))
    texts = [" ".join(WORDS[i : i + n]) for i in range(8) for n in (2, 5, 11)] + ["word " * 90]
    path = str(data / "aro/images/1.png")
    items = [(path, None), (path, (3, 4, 40, 30)), *((str(data / "coco/val2017" / name), None) for name in NAMES)]
    with torch.no_grad():
        for got, item in zip(text(texts), texts):
            assert torch.allclose(got.float(), clip.encode_text(tokenizer([item]), normalize=True)[0], atol=2e-6)
        for got, (path, box) in zip(image(items), items):
            pixels = preprocess(Image.open(path).convert("RGB").crop(box or (0, 0, *Image.open(path).size)))[None]
            assert torch.allclose(got.float(), clip.encode_image(pixels, normalize=True)[0], atol=2e-6)
    assert len(cache) == len(items) - 1  # two COCO files are equal
    assert torch.equal(image(items)[4], image(items)[11])
    encoded, forward = [], evaluate.TextEncoder.forward
    counted = lambda self, tokens: encoded.extend(tokens) or forward(self, tokens)
    monkeypatch.setattr(evaluate.TextEncoder, "forward", counted)
    assert torch.equal(*text(["A dog .", "a  DOG ."])) and len(encoded) == 1  # equal in their tokens
    for name, content in (("zero.jpg", b""), ("cut.jpg", (data / "coco/val2017" / NAMES[0]).read_bytes()[:300])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: can't be read as an image"):
            image([(str(tmp_path / name), None)])
    for name, odd in (("cmyk.jpg", Image.new("CMYK", (9, 9))), ("1.png", Image.new("RGB", (1, 1))),
                      ("16.png", Image.fromarray(np.full((9, 9), 40_000, np.uint16)))):
        odd.save(tmp_path / name)
        assert image([(str(tmp_path / name), None)]).isfinite().all()

def test_precision_and_damaged_weights(models):
    clip, preprocess, tokenizer = load_model(models[0])
    fp32, bf16 = (evaluate.encoders(clip, preprocess, tokenizer, {}, args_of("/", precision=precision))[0](["a dog"])
                  for precision in ("fp32", "bf16"))
    assert 0 < (fp32 - bf16).abs().max() < 0.02
    clip.text_projection.data[0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        evaluate.encoders(clip, preprocess, tokenizer, {}, args_of("/"))[0](["a dog"])

def test_zero_shot_weights_are_open_clips(models, monkeypatch):
    """Against open_clip's build_zero_shot_classifier, with fewer classes and templates; else 1,000 x 80 prompts."""
    prompts = []
    with pytest.raises(RuntimeError):
        evaluate.zero_shot_weights(lambda texts: prompts.extend(texts) or torch.empty(0))
    assert len(prompts) == 80000 and prompts[80] == "a bad photo of a goldfish."
    monkeypatch.setattr(open_clip, "IMAGENET_CLASSNAMES", open_clip.IMAGENET_CLASSNAMES[:7])
    monkeypatch.setattr(open_clip, "OPENAI_IMAGENET_TEMPLATES", open_clip.OPENAI_IMAGENET_TEMPLATES[:9])
    clip, preprocess, tokenizer = load_model(models[0])
    text, _ = evaluate.encoders(clip, preprocess, tokenizer, {}, args_of("/"))
    with torch.no_grad():
        expected = open_clip.build_zero_shot_classifier(
            clip, tokenizer, open_clip.IMAGENET_CLASSNAMES, open_clip.OPENAI_IMAGENET_TEMPLATES)
    assert torch.allclose(evaluate.zero_shot_weights(text).float(), expected.T, atol=2e-6)

def test_imagenet_order_and_damage(tmp_path):
    """Sorted wnids are the classes; anything but 1,000 wnids with images is refused."""
    for i in range(1000):
        write(tmp_path / f"imagenet/val/n{2 * i:08}/a.JPEG", b"")
    write(tmp_path / "imagenet/val/LOC_val_solution.csv", b"")
    def text(prompts):  # class c is one-hot in c, in each of its 80 prompts
        return torch.eye(1000).repeat_interleave(80, 0)
    def image(items):  # right but for every fourth image
        classes = [int(Path(path).parent.name[1:]) // 2 for path, _ in items]
        return evaluate.fixed_point(torch.eye(1000)[[c if c % 4 else 999 for c in classes]])
    result = evaluate.imagenet(str(tmp_path), text, image)
    assert result["figures"] == {"Clsf": 75} and result["counts"] == {"images": 1000, "classes": 1000}
    (tmp_path / "imagenet/val/n00000002/a.JPEG").unlink()
    with pytest.raises(InputError, match="1000 folders, 1 without a .JPEG"):
        evaluate.imagenet(str(tmp_path), text, image)
    (tmp_path / "imagenet/val/n00000002").rmdir()
    with pytest.raises(InputError, match="999 folders"):
        evaluate.imagenet(str(tmp_path), text, image)

# ---------------------------------------------------------------- as a user
def cells(out, label):
    """{column: cell} of the table's row that begins with `label`."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    return next(dict(zip(rows[0][1:], row[1:])) for row in rows if row[0].startswith(label))

def test_two_models_as_a_user(data, models, tmp_path):
    """The command of the docstring: table, paper's row, differences, what was not run, JSON, Figure 3."""
    command = [sys.executable, ROOT / "evaluate.py", *models, "--data", data, "--json", tmp_path / "results.json",
               "--gallery", tmp_path / "figure3.png", "--workers", "1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    out = done.stdout
    assert "Warning" not in done.stderr
    base, trained, gains = (cells(out, label) for label in (models[0], models[1], f"minus {models[0]}"))
    assert list(base) == ["AO@10", "JS@10", "VG-R", "VG-A", "STS", "Clsf", "T R@5", "I R@5"]
    assert base["Clsf"] == trained["Clsf"] == "not run" and gains["Clsf"] == ""
    assert f"not run: imagenet: {data}/imagenet/val is not there (from image-net.org" in out
    assert "coco: not the paper's data (images 14, not 5,000; captions 70, not 25,000), not comparable" in out
    assert "sts: not the paper's data (STS12 35, not 3,108; " in out
    assert " ".join(cells(out, "paper: openai + I:T").values()) == "68.9 59.9 58.0 62.4 68.7 63.7 75.8 58.0"
    report = json.loads((tmp_path / "results.json").read_text())
    first, second = report["models"]
    for task, column in (("paraphrase", "AO@10"), ("vg-r", "VG-R"), ("sts", "STS"), ("coco", "I R@5")):
        values = [model["tasks"][task]["figures"][column] for model in (first, second)]
        assert [base[column], trained[column]] == [f"{value:.1f}" for value in values]
        assert gains[column] == f"{round(values[1], 1) - round(values[0], 1):+.1f}"  # of the figures shown
    assert any(model["tasks"]["sts"]["figures"] != first["tasks"]["sts"]["figures"] for model in report["models"])
    assert first["image_tower"] == second["image_tower"] and first["fingerprint"] != second["fingerprint"]
    assert set(first["tasks"]["paraphrase"]["sub_scores"]) == {f"{m}@{k}" for m in ("AO", "JS") for k in range(1, 11)}
    assert first["tasks"]["paraphrase"]["counts"] == {"pairs": 6, "images": 14}
    assert set(first["tasks"]["coco"]["sub_scores"]) == {f"{side} R@{k}" for side in "TI" for k in (1, 5, 10)}
    assert set(report["versions"]) == {"torch", "open_clip", "scipy"}
    figure = Image.open(tmp_path / "figure3.png")
    assert figure.width == 1160 and figure.height > 600
    gold = sum(count for count, colour in figure.getcolors(1 << 24) if colour == (0xF0, 0xA8, 0))
    assert gold  # and it was looked at

def main(monkeypatch, *args):
    """evaluate.main() in this process: what imports cost is paid once."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
    evaluate.main()

def test_errors_before_the_work(data, models, tmp_path, monkeypatch, capsys):
    for flags, message in (
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--json", tmp_path / "no/r.json"], "no/r.json: must end in .json, in a folder that is there"),
        (["--gallery", tmp_path], "must end in .png"),
        (["--json", data / "coco/annotations/captions_val2017.json"], "not below --data"),
        (["--workers", -1], "--workers"), (["--tasks", "clsf"], "--tasks"),
    ):
        with pytest.raises(SystemExit, match="2"):
            evaluate.parse_args([models[0], "--data", str(data), *map(str, flags)])
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="--model no-such-model: none of"):
        main(monkeypatch, models[0], "no-such-model", "--data", data)

def test_images_once_for_a_shared_tower(data, models, tmp_path, monkeypatch):
    """Two models of one tower: each distinct image and box is encoded once. A third, of another tower: once more."""
    encoded, original = [], evaluate.encode_images
    def counted(clip, preprocess, items, *more):
        encoded.extend(items)
        return original(clip, preprocess, items, *more)
    monkeypatch.setattr(evaluate, "encode_images", counted)
    other = make_clip(tmp_path / "other", seed=1)
    flags = ("--data", data, "--tasks", "paraphrase", "coco", "vg-r", "--workers", 0)
    main(monkeypatch, *models, *flags)
    assert len(encoded) == len(set(encoded)) == 13 + 5  # 14 photos, two alike, and five crops that count
    main(monkeypatch, models[0], other, *flags)
    assert len(encoded) == 3 * 18

def test_figures_do_not_depend_on_batches_or_workers(data, models, tmp_path, monkeypatch, capsys):
    """Texts in blocks of 50 and images five at a time give the figures of large batches, and so do workers."""
    def figures(workers):
        main(monkeypatch, models[1], "--data", data, "--tasks", "paraphrase", "vg-r", "vg-a", "coco", "sts",
             "--workers", workers, "--json", tmp_path / "r.json")
        assert cells(capsys.readouterr().out, models[1])["Clsf"] == "not run"  # a task that was not asked for
        return json.loads((tmp_path / "r.json").read_text())["models"][0]["tasks"]
    def by_five(clip, preprocess, items, *more):
        for start in range(0, len(items), 5):
            yield from original(clip, preprocess, items[start : start + 5], *more)
    whole, original = figures(1), evaluate.encode_images
    monkeypatch.setattr(evaluate, "TEXTS_AT_ONCE", 50)
    monkeypatch.setattr(evaluate, "encode_images", by_five)
    assert figures(0) == whole

def test_a_gallery_of_one_model_and_odd_queries(data, models, tmp_path, monkeypatch, capsys):
    """Line ends, more than 77 tokens, one long word: all of it is drawn, within the picture. No pairs: not run."""
    (tmp_path / "coco").symlink_to(data / "coco")
    flags = (models[0], "--data", tmp_path, "--tasks", "paraphrase", "--workers", 0, "--gallery", tmp_path.parent / "f.png")
    main(monkeypatch, *flags)
    assert "--gallery: not run: " in capsys.readouterr().out and not (tmp_path.parent / "f.png").exists()
    pairs = [("two\nlines of text", "a dog " * 90), ("x" * 300, "a cat"), ("é 犬 😀", "a bird")]
    rows = [{"query": a, "paraphrase": b, "image_id": 139} for a, b in pairs]
    write(tmp_path / "paraphrased_retrieval.jsonl", "\n".join(map(json.dumps, rows)))
    main(monkeypatch, *flags)
    figure = np.asarray(Image.open(tmp_path.parent / "f.png"))
    assert figure.shape[1] == 580 and (figure[:, -4:] == 255).all()

def test_paper_rows(tmp_path):
    """The five baselines by name or by weights; runs by base model and losses, in any order; nothing for others."""
    assert evaluate.paper_row("openclip-2b")["figures"]["VG-R"] == 45.0
    assert evaluate.paper_row("ViT-B-32-quickgelu:openai")["figures"]["AO@10"] == 67.2
    make_clip(tmp_path / "run", TINY)
    def row(model, pretrained, *loss):
        record = {"flags": {"loss": loss}, "base_model": {"open_clip": model, "pretrained": pretrained}}
        (tmp_path / "run/config.json").write_text(json.dumps(record))
        return (evaluate.paper_row(str(tmp_path / "run")) or {"figures": {"STS": None}})["figures"]["STS"]
    assert row("ViT-B-32-quickgelu", "openai", "T1:T2", "T2:I", "T:T1") == 72.2
    assert row("ViT-B-32", "weights/laion400m_laclip.pt", "I:T2", "T:T1", "T1:T2") == 71.4
    assert row("ViT-B-32-quickgelu", "openai", "I:T1", "I:T", "I:T2") == 68.8
    assert row("ViT-B-32", "laion400m_e32", "I:T") is None is row("ViT-B-32", "random", "I:T2", "T:T1", "T1:T2")
    (tmp_path / "run/config.json").write_text('{"model_type": "clip"}')
    assert evaluate.paper_row(f"local-dir:{tmp_path / 'run'}") is None
    assert len(evaluate.PAPER) == 17 and all(len(row) == 8 for row in evaluate.PAPER.values())
