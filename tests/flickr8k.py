"""Table 2 on real photographs: the paper's eight losses, with seeds, on Flickr8k.

    python tests/flickr8k.py FLICKR8K --model openai --output flickr8k-runs

FLICKR8K is the folder as people download it: Images/*.jpg and captions.txt (image,caption; five
an image). Of a photo, caption 1 made as noisy as the web's is T; other people's captions 2 and 3
are T' and T'', or with --paraphrases an LLM's. The --test photos whose names have the smallest
MD5 are the benchmark, the others train. What is finished is not done again. Prints Table 2.
"""

import argparse
import csv
import hashlib
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

from demo import alt_text
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import paraclip
from paraclip import InputError, at_least, naming, read_jsonl, run, write_json

TABLE_2 = [
    "I:T",
    "T:T1 T1:T2",
    "I:T I:T1",
    "I:T I:T1 I:T2",
    "I:T T:T1",
    "I:T1 T:T1",
    "I:T T:T1 T1:T2",
    "I:T2 T:T1 T1:T2",
]


def read_flickr8k(folder, test):
    """{photo's file name: its captions} in two parts: the first `test` by MD5, and the others."""
    captions = {}
    path = folder / "captions.txt"
    with naming(path), open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"])
    usable = []
    for name, texts in captions.items():
        if len(texts) > 2 and (folder / "Images" / name).is_file():
            usable.append(name)
    if len(usable) <= test:
        raise InputError(f"{folder}/Images: {len(usable)} of the {len(captions)} photos in "
                         f"captions.txt are there, --test takes {test}")
    usable.sort(key=lambda name: hashlib.md5(name.encode()).hexdigest())
    photos = {name: captions[name] for name in usable[:test]}
    others = {name: captions[name] for name in usable[test:]}
    return photos, others


def people_rows(photos):
    """generate.py's rows of photos: the noisy caption 1, and captions 2 and 3."""
    rows = []
    for name, captions in photos.items():
        rows.append({
            "image_id": name.removesuffix(".jpg"),
            "caption": alt_text(captions[0], random.Random(name)),
            "paraphrase_1": captions[1],
            "paraphrase_2": captions[2],
        })
    return rows


def llm_rows(rows, paths):
    """Those of `rows` that the files `paths` have too, with the paraphrases in these files."""
    paraphrased = {}
    for path in paths:
        for row in read_jsonl(path, json.loads):
            paraphrased[row["image_id"], row["caption"]] = row
    found = []
    for row in rows:
        key = row["image_id"], row["caption"]
        if key in paraphrased:
            found.append(paraphrased[key])
    if not found:
        raise InputError(f"--paraphrases {' '.join(paths)}: no row is of a training photo; its "
                         "captions must be those of OUTPUT/captions.jsonl")
    print(f"{len(found):,} of {len(rows):,} training photos have paraphrases, "
          f"{len(rows) - len(found):,} are left out", flush=True)
    return found


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    paraclip.write_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.symlink_to(target.resolve())


def write_benchmarks(folder, images, photos, data):
    """COCO's layout on `photos`, captions 2 and 3 as query and paraphrase; and `data`'s tasks."""
    annotations = []
    pairs = []
    for name, captions in photos.items():
        link(folder / "coco/val2017" / name, images / name)
        for caption in captions:
            annotations.append({"image_id": name, "caption": caption})
        image_id = name.removesuffix(".jpg")
        pairs.append({"query": captions[1], "paraphrase": captions[2], "image_id": image_id})
    entries = [{"id": name, "file_name": name} for name in photos]
    content = {"images": entries, "annotations": annotations}
    (folder / "coco/annotations").mkdir(exist_ok=True)
    write_json(folder / "coco/annotations/captions_val2017.json", content)
    write_jsonl(folder / "paraphrased_retrieval.jsonl", pairs)
    for name in ("sts", "imagenet"):
        if data and (data / name).is_dir():
            link(folder / name, data / name)


def command(script, log, *arguments):
    """Run a script; what it prints goes to the file `log`. Raises InputError if it fails."""
    words = [sys.executable, ROOT / script, *map(str, arguments)]
    with open(log, "ab") as file:
        code = subprocess.run(words, check=False, stdout=file, stderr=file).returncode
    if code:
        last = log.read_text().rstrip().splitlines()[-1]
        raise InputError(f"{script} ended with exit code {code}; {log}: {last}")


def figures_of(results):
    """{model's name: {column: figure}} from evaluate.py's results."""
    figures = {}
    for model in results["models"]:
        figures[model["name"]] = {}
        for task in model["tasks"].values():
            figures[model["name"]].update(task["figures"])
    return figures


def summarise(figures, runs):
    """{"": the base's figures, loss: {column: {"mean", "deviation", "difference"}}}."""
    base = next(iter(figures.values()))
    table = {"": {column: {"mean": value} for column, value in base.items()}}
    for loss, outputs in runs.items():
        table[loss] = {}
        for column, before in base.items():
            values = [figures[str(output)][column] for output in outputs]
            mean = statistics.fmean(values)
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            cell = {"mean": mean, "deviation": deviation, "difference": mean - before}
            table[loss][column] = cell
    return table


def markdown(table):
    columns = list(table[""])
    lines = [f"| losses | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for loss, cells in table.items():
        name = f"`{loss}`" if loss else "none"
        form = "{mean:.1f} ± {deviation:.1f} ({difference:+.1f})" if loss else "{mean:.1f}"
        shown = [form.format(**cells[column]) for column in columns]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FLICKR8K", help="with Images/ and captions.txt")
    add("--model", default="openai", help="as paraclip.py's (default: %(default)s)")
    add("--output", type=Path, default=Path("flickr8k-runs"),
        help="folder for everything (default: %(default)s)")
    add("--paraphrases", nargs="+", metavar="ROWS.jsonl",
        help="generate.py's rows of OUTPUT/captions.jsonl, whose T' and T'' are taken; photos "
        "without a row are left out (default: people's captions)")
    add("--losses", nargs="+", default=TABLE_2, metavar="LOSS",
        help='each as "I:T2 T:T1" (default: all of Table 2)')
    add("--seeds", type=at_least(1), default=3, help="runs a loss (default: %(default)s)")
    add("--test", type=at_least(10), default=1000,
        help="photos of the benchmark (default: %(default)s)")
    add("--batch-size", type=at_least(1), default=500,
        help="rows of a step (default: %(default)s)")
    add("--lr", type=at_least(0, float), default=5e-5,
        help="for a few dozen small steps; the paper's is 5e-7 (default: %(default)s)")
    add("--epochs", type=at_least(1), default=3,
        help="passes over the photos (default: %(default)s)")
    add("--data", type=Path, help="folder whose sts/ and imagenet/ are evaluated too, if there")
    return parser.parse_args()


def main():
    args = parse_args()
    photos, others = read_flickr8k(args.folder, args.test)
    rows = people_rows(others)
    captions = [{key: row[key] for key in ("image_id", "caption")} for row in rows]
    write_jsonl(args.output / "captions.jsonl", captions)
    if args.paraphrases:
        rows = llm_rows(rows, args.paraphrases)
    write_jsonl(args.output / "rows.jsonl", rows)
    write_benchmarks(args.output / "benchmarks", args.folder / "Images", photos, args.data)

    runs = {}
    for loss in args.losses:
        name = loss.replace(":", "").replace(" ", "_")
        runs[loss] = [args.output / f"{name}-{seed}" for seed in range(args.seeds)]
    jobs = []
    for seed in range(args.seeds):
        for loss, outputs in runs.items():
            jobs.append((loss, seed, outputs[seed]))
    for loss, seed, output in tqdm(jobs, "runs of paraclip.py", unit="run"):
        command(
            "paraclip.py", output.with_suffix(".txt"),
            "--rows", args.output / "rows.jsonl",
            "--images", args.folder / "Images",
            "--cache", args.output / "cache",
            "--model", args.model,
            "--output", output,
            "--loss", *loss.split(),
            "--seed", seed,
            "--batch-size", args.batch_size,
            "--lr", args.lr,
            "--epochs", args.epochs,
        )  # fmt: skip

    print(f"evaluating {len(jobs) + 1} models, see {args.output}/evaluate.txt", flush=True)
    jobs.sort(key=lambda job: job[0].split() != paraclip.PARACLIP)  # Figure 3 shows the first
    command(
        "evaluate.py", args.output / "evaluate.txt",
        args.model, *[output for _, _, output in jobs],
        "--data", args.output / "benchmarks",
        "--json", args.output / "results.json",
        "--gallery", args.output / "figure3.html",
    )  # fmt: skip
    results = json.loads((args.output / "results.json").read_text())
    table = summarise(figures_of(results), runs)
    write_json(args.output / "table.json", table)
    print(markdown(table))


if __name__ == "__main__":
    run(main)
