"""Table 2 on real photographs: the paper's eight losses, with seeds, on Flickr8k. No LLM, no key, no bill.

    python tests/flickr8k.py FLICKR8K --model openai --output flickr8k-runs

FLICKR8K is the folder as people download it: Images/*.jpg and captions.txt (image,caption; five an image). Caption 1,
made as noisy as the web's, stands for T, other people's captions 2 and 3 for T' and T''. The --test photos whose names
have the smallest MD5 are the benchmark, the others train. What is finished is not done again. Prints Table 2.
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

from evaluate import PAPER, PARACLIP
from generate import ROW_KEYS, InputError, at_least, atomic_write, reading, run

TABLE_2 = [loss for model, loss in PAPER if model == "openai" and loss not in ("", PARACLIP)] + [PARACLIP]


def read_flickr8k(folder, test):
    """{photo's file name: its captions}, by the MD5 of the name, in two parts: the first `test` photos, the others."""
    captions, path = {}, folder / "captions.txt"
    with reading(path), open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"])
    there = [name for name in captions if len(captions[name]) > 2 and (folder / "Images" / name).is_file()]
    if len(there) <= test:
        raise InputError(f"{folder}/Images: {len(there)} of the {len(captions)} photos in captions.txt, --test takes {test}")
    order = sorted(there, key=lambda name: hashlib.md5(name.encode()).hexdigest())
    return [{name: captions[name] for name in names} for names in (order[:test], order[test:])]


def write_rows(path, photos):
    """generate.py's rows: the noisy caption 1, captions 2 and 3."""
    with atomic_write(path) as file:
        for name, (first, second, third, *_) in photos.items():
            row = (name.removesuffix(".jpg"), alt_text(first, random.Random(name)), second, third)
            file.write(json.dumps(dict(zip(ROW_KEYS, row))) + "\n")


def write_benchmarks(folder, images, photos, data):
    """COCO's layout on `photos`, captions 2 and 3 as query and paraphrase; links to `data`'s STS and ImageNet."""
    for path in ("coco/val2017", "coco/annotations"):
        (folder / path).mkdir(parents=True, exist_ok=True)
    links = {folder / "coco/val2017" / name: images / name for name in photos}
    links |= {folder / name: Path(data) / name for name in ("sts", "imagenet") if data and (Path(data) / name).is_dir()}
    for link, target in links.items():
        if not link.exists():
            link.symlink_to(target.resolve())
    annotations = [{"image_id": name, "caption": caption} for name, captions in photos.items() for caption in captions]
    with atomic_write(folder / "coco/annotations/captions_val2017.json") as file:
        json.dump({"images": [{"id": name, "file_name": name} for name in photos], "annotations": annotations}, file)
    with atomic_write(folder / "paraphrased_retrieval.jsonl") as file:
        for name, captions in photos.items():
            pair = {"query": captions[1], "paraphrase": captions[2], "image_id": name.removesuffix(".jpg")}
            file.write(json.dumps(pair) + "\n")


def command(script, log, *arguments):
    """Run a script, what it says in the file `log`. Raises InputError with its last line if it fails."""
    words = [sys.executable, ROOT / script, *map(str, arguments)]
    with open(log, "ab") as file:
        code = subprocess.run(words, check=False, stdout=file, stderr=file).returncode
    if code:
        raise InputError(f"{script} ended with exit code {code}; {log}: {log.read_text().rstrip().splitlines()[-1]}")


def summarise(results, runs):
    """{"": the base's figures, loss: {column: {"mean", "deviation", "difference"}}} from evaluate.py's results."""
    figures = {model["name"]: {} for model in results["models"]}
    for model in results["models"]:
        for task in model["tasks"].values():
            figures[model["name"]] |= task["figures"]
    base, *_ = figures.values()
    table = {"": {column: {"mean": value} for column, value in base.items()}}
    for loss, outputs in runs.items():
        table[loss] = {}
        for column, before in base.items():
            values = [figures[str(output)][column] for output in outputs]
            mean, deviation = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            table[loss][column] = {"mean": mean, "deviation": deviation, "difference": mean - before}
    return table


def markdown(table):
    columns = list(table[""])
    lines = [f"| losses | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for loss, cells in table.items():
        cell = "{mean:.1f} ± {deviation:.1f} ({difference:+.1f})" if loss else "{mean:.1f}"
        shown = [cell.format(**cells[column]) for column in columns]
        lines.append(f"| {f'`{loss}`' if loss else 'none'} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, " (default: %(default)s)"
    add("folder", type=Path, metavar="FLICKR8K", help="with Images/ and captions.txt")
    add("--model", default="openai", help="as paraclip.py's" + default)
    add("--output", type=Path, default=Path("flickr8k-runs"), help="folder for everything" + default)
    add("--losses", nargs="+", default=TABLE_2, metavar="LOSS", help='each as "I:T2 T:T1" (default: all of Table 2)')
    add("--seeds", type=at_least(1), default=3, help="runs a loss" + default)
    add("--test", type=at_least(10), default=1000, help="photos of the benchmark" + default)
    add("--batch-size", type=at_least(1), default=500, help="examples a step" + default)
    add("--lr", type=float, default=5e-5, help="of few, small steps; the paper's is 5e-7" + default)
    add("--epochs", type=at_least(1), default=3, help="passes over the photos" + default)
    add("--data", default="", help="folder whose sts/ and imagenet/ are evaluated too, if there")
    args = parser.parse_args()
    test, rest = read_flickr8k(args.folder, args.test)
    args.output.mkdir(parents=True, exist_ok=True)
    write_rows(args.output / "rows.jsonl", rest)
    write_benchmarks(args.output / "benchmarks", args.folder / "Images", test, args.data)

    runs = {loss: [args.output / f"{loss.replace(':', '').replace(' ', '_')}-{seed}" for seed in range(args.seeds)]
            for loss in args.losses}
    jobs = [(outputs[seed], loss, seed) for seed in range(args.seeds) for loss, outputs in runs.items()]
    for output, loss, seed in tqdm(jobs, "runs of paraclip.py", unit="run"):
        command("paraclip.py", output.with_suffix(".txt"), "--rows", args.output / "rows.jsonl", "--images", args.folder / "Images",
                "--features", args.output / "features", "--model", args.model, "--output", output, "--loss", *loss.split(),
                "--seed", seed, "--batch-size", args.batch_size, "--lr", args.lr, "--epochs", args.epochs)
    print(f"evaluating {len(jobs) + 1} models, see {args.output}/evaluate.txt", flush=True)
    models = [output for output, loss, _ in sorted(jobs, key=lambda job: job[1] != PARACLIP)]  # for Figure 3
    command("evaluate.py", args.output / "evaluate.txt", args.model, *models, "--data", args.output / "benchmarks",
            "--json", args.output / "results.json", "--gallery", args.output / "figure3.png")
    table = summarise(json.loads((args.output / "results.json").read_text()), runs)
    with atomic_write(args.output / "table.json") as file:
        json.dump(table, file, indent=1)
    print(markdown(table))


if __name__ == "__main__":
    run(main)
