"""What the README tells a newcomer to type: the commands, the example, your own data, the demo."""

import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import demo
import flickr8k
import numpy as np
import pytest
from conftest import ROOT
from openai_server import Server
from PIL import Image

import evaluate
import paraclip

README = (ROOT / "README.md").read_text()
NOTEBOOK = (ROOT / "tests" / "README.md").read_text()
BLOCKS = re.findall(r"```\w*\n(.*?)```", README + NOTEBOOK, re.DOTALL)
COMMANDS = []
for block in BLOCKS:
    for line in block.replace("\\\n", "").splitlines():
        if re.match(r"(python|torchrun) .*(generate|paraclip|evaluate)\.py ", line):
            COMMANDS.append(line.split(" #")[0])
assert len(COMMANDS) == 10, COMMANDS


def block_with(text):
    """The one block of the README and of the notebook that holds `text`."""
    found = [block for block in BLOCKS if text in block]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_every_command_exists(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    module = importlib.import_module(words[script].removesuffix(".py"))
    module.parse_args(words[script + 1 :])


@pytest.mark.parametrize("script", ["generate", "paraclip", "evaluate"])
def test_help(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(script).parse_args(["--help"])
    assert "default" in capsys.readouterr().out


TERMS = {"L1": "I:T", "L1'": "I:T1", "L1''": "I:T2", "L2": "T:T1", "L3": "T1:T2"}


def test_the_losses_of_table_2():
    """The notebook's, flickr8k.py's and those of which evaluate.py prints the paper's figures."""
    paper = {loss: row for (model, loss), row in evaluate.PAPER.items() if model == "openai"}
    losses = set(re.findall(r"^\| `([^`]+:[^`]+)`", NOTEBOOK, re.MULTILINE))
    assert len(losses) == 8 and losses == set(flickr8k.TABLE_2) == paper.keys() - {""}
    for names, cells in re.findall(r"^\| (L\d[^|]*?) \|(.*)\|$", NOTEBOOK, re.MULTILINE):
        loss = " ".join(TERMS[name] for name in re.findall(r"L\d'*", names))
        if loss != evaluate.PARACLIP:  # of which Table 1, in evaluate.py, has other figures
            assert paper[loss] == tuple(map(float, cells.split("|")))
    cells = re.search(r"^\| ParaCLIP \(Table 1\) \|(.*)\|$", NOTEBOOK, re.MULTILINE)[1]
    assert paper[evaluate.PARACLIP] == tuple(map(float, cells.split("|")))


def test_the_python_example_runs_on_a_run_directory(world, capsys):
    code = block_with("images in common")
    code = code.replace("demo/benchmarks/coco/val2017", f"{world}/images")
    code = re.sub(r"local-dir:[\w/]+", f"local-dir:{world}/clip", code)
    exec(code, {})  # noqa: S102, the README is ours
    said = capsys.readouterr().out
    assert re.match(r"I see one .*: \S+\.jpg, .*\npicture .*\n\d+ of 10 images in common\n", said)


def test_half_way_back(world, tmp_path, monkeypatch):
    """The average of a base and a run is a model; here of a model and itself."""
    code = block_with("runs/half")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    code = code.replace('"openai"', f'"{world}/clip"')
    shutil.copytree(world / "clip", "runs/openai")
    exec(code, {})  # noqa: S102
    half = paraclip.load_model("runs/half")
    assert half.fingerprint == paraclip.load_model(f"{world}/clip").fingerprint


def test_your_own_data_in_four_commands(world, tmp_path):
    """As they stand, with a small model and no GPU; on twenty drawn photos."""
    (tmp_path / "mydata" / "images" / "in").mkdir(parents=True)
    header, *_ = block_with("filepath\ttitle").splitlines()
    random = np.random.default_rng(0)
    for name, count in (("train", 15), ("test", 5)):
        lines = [header]
        for i in range(count):
            pixels = random.integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "mydata" / "images" / "in" / f"{name}_{i}.JPG")
            lines.append(f"in/{name}_{i}.JPG\tIMG_{i} two dogs are running, Stock Photo")
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    commands = block_with("train.tsv --output train.jsonl")
    commands = commands.replace("openai", f"{world}/clip").replace("100", "5")
    commands = re.sub(r"python (\w+\.py)", rf"{sys.executable} {ROOT}/\1", commands)
    with Server() as server:
        environment = {**os.environ, "OPENAI_API_KEY": "x", "OPENAI_BASE_URL": server.url}
        done = subprocess.run(["bash", "-ec", commands], check=False, cwd=tmp_path,
                              env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 rows more" in done.stdout and "15 of 15 rows, steps 0 to 9" in done.stdout
    assert re.search(r"runs/mine +\| +\d+\.\d", done.stdout) and "R@10" in done.stdout
    assert (tmp_path / "mine.html").stat().st_size > 1000


def script(name, *arguments):
    """What a script of tests/ prints, as a process."""
    words = [sys.executable, ROOT / "tests" / name, *map(str, arguments)]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return without_noise(done.stdout, done.stderr)


def without_noise(out, error):
    """Both, after a look for warnings and tracebacks in them."""
    output = out + error
    assert "Warning" not in output and "Traceback" not in output, output
    return output


def test_the_demo_runs_small(tmp_path, monkeypatch, capfd):
    """Every command of it, on fewer pictures and with towers of one layer."""
    flags = ["--output", f"{tmp_path}/demo", "--scenes", "280", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", ["demo.py", *flags])
    monkeypatch.setitem(demo.CLIP["vision_cfg"], "layers", 1)
    monkeypatch.setitem(demo.CLIP["text_cfg"], "layers", 1)
    demo.main()
    out = without_noise(*capfd.readouterr())
    for name in ("clip", "runs/paraclip", "runs/L1"):
        assert re.search(rf"\| {name} +(\| +\d+\.\d\*? +){{8}}\|", out), out
    assert (tmp_path / "demo" / "figure3.html").stat().st_size > 10_000


BENCHES = {  # and what each says
    "bench_train.py --batch-size 4 --micro-batch 2 --seconds 0":
        r"\(c\) paraclip.py +\d+\.\d examples/s +\d+\.\d\d x \(b\)",
    "bench_train.py --batch-size 4 --profile": r"matrix products",
    "bench_epoch.py --rows 100 --batch-size 4 --steps 20 --workers 1 --ranks 2":
        r"ready for .*ready for .*the last \d+ steps: \S+ examples/s in all",
    "bench_encode.py --count 4 --workers 1":
        r"evaluate.py, images +\d+\.\d images/s .* apart by \d\.\de-0[6-9]",
}


@pytest.mark.parametrize("command", BENCHES)
def test_the_benches_run(world, command):
    name, *flags = command.split()
    out = script(name, "--model", f"local-dir:{world}/clip", *flags)
    assert re.search(BENCHES[command], out, re.DOTALL), out


@pytest.fixture
def photos(world, tmp_path):
    """A folder as Flickr8k's: 80 images, and five captions each."""
    (tmp_path / "Images").mkdir()
    lines = ["image,caption"]
    for i in range(80):
        name = f"{i:04}.jpg"
        (tmp_path / "Images" / name).symlink_to(world / "images" / name)
        for word in ("red", "old", "wet", "new", "far"):
            lines.append(f'{name},"a ""big"" dog, number {i} {word}"')
    (tmp_path / "captions.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_table_2_on_photographs(world, photos):
    """The table, and then of two seeds; what is finished is not done again."""
    flags = [photos, "--model", f"local-dir:{world}/clip", "--output", photos / "out",
             "--losses", "I:T2 T:T1 T1:T2", "--test", 20, "--batch-size", 20, "--epochs", 1]
    out = script("flickr8k.py", *flags, "--seeds", 1)
    cell = r"\d+\.\d ± 0\.0 \([+-]\d+\.\d\)"
    assert re.search(rf"\| none \| \d+\.\d .*\n\| `I:T2 T:T1 T1:T2` \| {cell} \|", out), out
    names = [f"{i:04}.jpg" for i in range(80)]
    names.sort(key=lambda name: hashlib.md5(name.encode()).hexdigest())
    assert set(os.listdir(photos / "out/benchmarks/coco/val2017")) == set(names[:20])
    row = json.loads((photos / "out/rows.jsonl").read_text().splitlines()[0])
    assert row["image_id"] + ".jpg" == names[20]
    assert row["paraphrase_1"].endswith("old") and row["paraphrase_2"].endswith("wet")
    assert (photos / "out/figure3.html").exists()
    assert "I:T2 T:T1 T1:T2" in json.loads((photos / "out/table.json").read_text())

    first = photos / "out/IT2_TT1_T1T2-0/state.pt"
    second = photos / "out/IT2_TT1_T1T2-1/state.pt"
    before = first.stat().st_mtime_ns
    assert "| `I:T2 T:T1 T1:T2` |" in script("flickr8k.py", *flags, "--seeds", 2)
    assert first.stat().st_mtime_ns == before and second.exists()
    results = json.loads((photos / "out/results.json").read_text())
    assert len(results["models"]) == 3


def test_an_llms_paraphrases_take_the_place_of_peoples(photos, capsys):
    """Photos without a row are left out, and counted; the rows' captions must be the same."""
    people = flickr8k.people_rows(flickr8k.read_flickr8k(photos, 20)[1])
    rows = [{**row, "paraphrase_1": "one", "paraphrase_2": "two"} for row in people[:50]]
    rows[0]["caption"] = "another caption"
    flickr8k.write_jsonl(photos / "llm.jsonl", rows)
    assert flickr8k.llm_rows(people, [str(photos / "llm.jsonl")]) == rows[1:]
    assert "49 of 60 training photos have paraphrases, 11 are left out" in capsys.readouterr().out
