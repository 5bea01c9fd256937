"""What the README tells a newcomer to type: every command's flags exist, the example runs, and so does the demo."""

import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys

import flickr8k
import pytest
from conftest import ROOT

from paraclip import InputError

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for _, block in BLOCKS for line in block.splitlines() if re.search(r"\w+\.py ", line)]

def test_there_are_commands():
    assert len(COMMANDS) == 6 and {"generate", "paraclip", "evaluate"} <= {*re.findall(r"(\w+)\.py", " ".join(COMMANDS))}

@pytest.mark.parametrize("command", [c for c in COMMANDS if "tests/" not in c and not c.endswith("...")])
def test_every_flag_of_every_command_exists(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()  # evaluate.py looks for it at once
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    importlib.import_module(words[script].removesuffix(".py")).parse_args(words[script + 1 :])

def test_the_eight_losses_of_table_2():
    import evaluate
    import paraclip
    losses = re.findall(r"^\| `([^`]+:[^`]+)`", README, re.MULTILINE)
    assert len(losses) == 8 and {term for loss in losses for term in loss.split()} <= set(paraclip.PAPER_TERMS.values())
    assert {loss for model, loss in evaluate.PAPER if model == "openai" and loss} == set(losses)

@pytest.mark.parametrize("script", ["generate", "paraclip", "evaluate"])
def test_help(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(script).parse_args(["--help"])
    assert "default" in capsys.readouterr().out

def test_the_python_example_runs_on_a_run_directory(world):
    code = next(block for language, block in BLOCKS if language == "python").replace("demo/benchmarks/coco/val2017", f"{world}/images")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(re.sub(r"local-dir:[\w/]+", f"local-dir:{world}/clip", code), {})  # noqa: S102 - the README is ours
    assert re.fullmatch(r"\d+ of 10 images in common\n", out.getvalue())

def script(name, *arguments):
    """A script of tests/ as a process: what it prints, stdout and stderr."""
    done = subprocess.run([sys.executable, ROOT / "tests" / name, *map(str, arguments)], check=False, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr

def test_the_demo_runs_small(tmp_path):
    out = script("demo.py", "--output", tmp_path / "demo", "--scenes", 280, "--steps", 3)
    for name in ("clip", "runs/paraclip", "runs/L1"):
        assert re.search(rf"\| {name} +(\| +\d+\.\d +){{8}}\|", out), out
    assert (tmp_path / "demo" / "figure3.png").stat().st_size > 10_000

@pytest.mark.parametrize("command, says", [
    ("bench_train.py --batch-size 4 --micro-batch 2 --seconds 0", r"\(c\) paraclip.py +\d+\.\d examples/s +\d+\.\d\d x \(b\)"),
    ("bench_train.py --batch-size 4 --profile", r"matrix products"),
    ("bench_epoch.py --rows 32 --batch-size 4 --steps 4 --workers 1 --ranks 2", r"steps 1 to 3: \S+ examples/s in all"),
    ("bench_encode.py --count 4 --workers 1", r"evaluate.py, images +\d+\.\d images/s .* apart by \d\.\de-0[6-9]"),
])
def test_the_benches_run(world, command, says):
    name, *flags = command.split()
    assert re.search(says, out := script(name, "--model", f"local-dir:{world}/clip", *flags)), out

def test_table_2_on_photographs(world, tmp_path):
    """tests/flickr8k.py on a folder in Flickr8k's format: the table, what is finished not done again, one line of error."""
    (tmp_path / "Images").mkdir()
    captions = ["image,caption"]
    for i in range(80):
        (tmp_path / "Images" / f"{i:04}.jpg").write_bytes((world / "images" / f"{i:04}.jpg").read_bytes())
        captions += [f'{i:04}.jpg,"a ""big"" dog, number {i} {word}"' for word in ("red", "old", "wet", "new", "far")]
    (tmp_path / "captions.txt").write_text("\n".join(captions) + "\n")
    flags = (tmp_path, "--model", f"local-dir:{world}/clip", "--output", tmp_path / "out", "--losses", "I:T2 T:T1 T1:T2",
             "--seeds", 2, "--test", 20, "--batch-size", 20, "--epochs", 1)
    out = script("flickr8k.py", *flags)
    assert re.search(r"\| none \| \d+\.\d .*\n\| `I:T2 T:T1 T1:T2` \| \d+\.\d ± \d+\.\d \([+-]\d+\.\d\) \|", out), out
    names = sorted((hashlib.md5(f"{i:04}.jpg".encode()).hexdigest(), f"{i:04}.jpg") for i in range(80))
    assert sorted(os.listdir(tmp_path / "out/benchmarks/coco/val2017")) == sorted(name for _, name in names[:20])
    row = json.loads((tmp_path / "out/rows.jsonl").read_text().splitlines()[0])
    assert row["image_id"] + ".jpg" == names[20][1] and row["paraphrase_1"].endswith("old") and row["paraphrase_2"].endswith("wet")
    assert (tmp_path / "out/figure3.png").exists() and "I:T2 T:T1 T1:T2" in json.loads((tmp_path / "out/table.json").read_text())
    state = tmp_path / "out/IT2_TT1_T1T2-0/state.pt"
    before = state.stat().st_mtime_ns
    script("flickr8k.py", *flags)
    assert state.stat().st_mtime_ns == before
    with pytest.raises(InputError, match="80 of the 80 photos in captions.txt, --test takes 99"):
        flickr8k.read_flickr8k(tmp_path, 99)
