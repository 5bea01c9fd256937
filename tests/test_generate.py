"""generate.py as its users run it: a process of its own against a real HTTP server on loopback."""

import csv
import email.utils
import gzip
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from conftest import ROOT, tar
from openai_server import Reply, Server, reword

from generate import PROMPTS, ROW_KEYS, problem_with, tidy

SCRIPT = ROOT / "generate.py"
KEY = "sk-loopback-0123456789abcdef"
HINTS = ("--model", "--endpoint", "--sampling")

# The same script with a hundredth of the longest wait that full jitter can draw, or the longest.
JITTER = (
    "import random, runpy, sys; random.uniform = lambda a, b: b * {}; sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def start(*args, server=None, jitter=None, key=KEY, **options):
    """generate.py as a process, in the folder `cwd`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    env["no_proxy"] = "*"
    if key:
        env["OPENAI_API_KEY"] = key
    if server:
        env["OPENAI_BASE_URL"] = server.url
    command = [sys.executable]
    if jitter:
        command += ["-c", JITTER.format(jitter)]
    command += [str(SCRIPT), *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, **pipes, **options)


def run(*args, code=0, timeout=60, **options):
    """The finished process. Its exit code must be `code`; no traceback and no key may show."""
    process = start(*args, **options)
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    assert KEY not in out + err
    process.out = out
    process.err = err
    process.error = re.split(r"[\r\n]", err.rstrip())[-1]  # the last line of stderr
    return process


def lines(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(path):
    return sorted(row["image_id"] for row in lines(path))


def numbers(path):
    """The sorted numbers at the end of the captions in a file of rows."""
    return sorted(int(row["caption"].split()[-1]) for row in lines(path))


def write_captions(folder, count, words="a small dog number {}"):
    """Write captions.txt. Returns the arguments of its job."""
    text = "".join(words.format(number) + "\n" for number in range(1, count + 1))
    (folder / "captions.txt").write_text(text)
    return "captions.txt", "--output", "rows.jsonl"


def number_in(request):
    return int(request.source.split()[-1])


def body(**keys):
    return json.dumps(keys).encode()


def error(status, headers=None, **keys):
    return Reply(status=status, headers=headers or {}, body=body(error=keys))


def chat(**choice):
    return Reply(body=body(choices=[choice]))


# ---------------------------------------------------------------- the method


def test_two_steps_with_the_papers_prompts_and_parameters(tmp_path):
    """Section 2.1 and Appendix A, as they go over the wire; the output's folder is made."""
    assert PROMPTS == (
        'Paraphrase the given caption "{}" concisely while preserving the meaning.',
        'Paraphrase the given text "{}" concisely while preserving the meaning'
        + " and avoiding use of existing words.",
    )
    caption = "Boys REVERSIBLE jacket, SKU#1234.jpg"
    answers = ("Reversible jacket for boys", "Boys' coat that can be flipped")
    (tmp_path / "captions.txt").write_text(caption + "\n")
    with Server(lambda request: answers[request.number]) as server:
        prices = ("--price-in", 1000, "--price-out", 10_000)
        output = ("--output", "new/rows.jsonl")
        done = run("captions.txt", *output, *prices, server=server, cwd=tmp_path)

    for request, prompt, source in zip(server.requests, PROMPTS, (caption, answers[0])):
        assert request.body == {
            "model": "gpt-4o-mini",
            "temperature": 1.0,
            "top_p": 0.1,
            "max_tokens": 512,
            "messages": [{"role": "user", "content": prompt.replace("{}", source)}],
        }
        assert request.key == KEY
    assert server.count == 2
    row = dict(zip(ROW_KEYS, ("captions/1", caption, *answers)))
    assert lines(tmp_path / "new/rows.jsonl") == [row]
    # 2 calls of 30 tokens sent and 10 answered
    assert re.search(r"1/1 .*rows/s, 80 tokens, \$0.26 of about \$0.26, 0 failed", done.err)
    assert os.listdir(tmp_path / "new") == ["rows.jsonl"]


def test_flags_reach_the_request(tmp_path):
    sampling = ["max_completion_tokens=2048", "reasoning_effort=minimal", 'stop=["\\n"]', "seed=7"]
    with Server() as server:
        args = (*write_captions(tmp_path, 1), "--endpoint", server.url + "/", "--model", "llama")
        run(*args, "--sampling", *sampling, key=None, cwd=tmp_path)
    request = server.requests[0]
    assert request.key == ""
    assert request.body == {
        "model": "llama",
        "max_completion_tokens": 2048,
        "reasoning_effort": "minimal",
        "stop": ["\n"],
        "seed": 7,
        "messages": request.body["messages"],
    }


CAPTIONS = [
    'a "quoted" word', "{braces} and {} {0}", "back\\slash \\n here", "a\ttab in it",
    "two\nlines here", "smile 😀 emoji", "собака бежит по траве", "狗 在 跑", "كلب يجري هنا",
    "half an emoji \ud83d here", "%s %d percent", "long " + "x" * 10_000,
    "carriage\r\nreturn here", "\u2028 line separator", "nul \0 byte",
    # what filters of phrases cut or refuse
    "I'm afraid of the dark poster", "Caption: America the movie", "As an AI artist, she paints",
    "How to paraphrase: ten tips", "I'm sorry, a song by Brenda Lee", "Sorry, we are closed",
]  # fmt: skip


def test_captions_of_every_kind_come_through_whole(tmp_path):
    """An answer that keeps the caption's own words is good, whatever they are."""
    with Server(lambda request: "снова 犬 😀 " + " ".join(request.source.split())) as server:
        with open(tmp_path / "captions.jsonl", "w") as file:
            for n, caption in enumerate(CAPTIONS):
                row = {"index": n, "image_id": f"a/{n}", "caption": caption}
                file.write(json.dumps(row) + "\n")
        for _ in range(2):  # the second time they are all there, half an emoji or not
            run("captions.jsonl", "--output", "rows.jsonl", server=server, cwd=tmp_path)
    assert server.count == 2 * len(CAPTIONS)
    prompts = {request.prompt for request in server.requests}
    for line in (tmp_path / "rows.jsonl").read_text().split("\n")[:-1]:
        row = json.loads(line)
        caption = CAPTIONS[row["index"]].replace("\ud83d", "?")
        assert row["image_id"] == f"a/{row['index']}"
        assert row["caption"] == caption
        assert PROMPTS[0].replace("{}", caption, 1) in prompts


# ---------------------------------------------------------------- inputs


def test_txt_and_jsonl(tmp_path):
    """Captions of 2 to 15 words are kept, the others counted. Several .txt files go."""
    text = "\ufeffa red dog\r\n\nword\ntwo words\n" + "w " * 16 + "\nno end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_text("a red dog\n")
    rows = [
        {"image_id": "j/1", "caption": "a red dog"},
        {"image_id": "j/1", "caption": "a second caption"},  # as in COCO
        {"image_id": "j/1", "caption": "a red dog"},
        {"image_id": 2, "caption": "a cat"},
        {"image_id": "3", "caption": None},
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    inputs = ("a.txt", "?.txt", "a.jsonl", "./a.jsonl")  # a file is read once
    with Server() as server:
        done = run(*inputs, "--output", "rows.jsonl", server=server, cwd=tmp_path)
    found = {(row["image_id"], row["caption"]) for row in lines(tmp_path / "rows.jsonl")}
    assert found == {
        ("a/1", "a red dog"),
        ("a/4", "two words"),
        ("a/6", "no end"),
        ("b/1", "a red dog"),
        ("j/1", "a red dog"),
        ("j/1", "a second caption"),
        ("2", "a cat"),
    }
    assert server.count == 2 * len(found)
    assert "7 captions kept, 3 left out" in done.out
    assert "1 doubles" in done.out


def test_tsv_is_split_at_tabs(tmp_path):
    """A quote is text, so that it swallows neither a line nor another quote."""
    titles = ['"5"" lamp"', '"Big" dog', '5" lamp', '"never closed', 'closed here"', "a\\tb c"]
    text = "url\tfilepath\ttitle\n"
    for n, title in enumerate(titles):
        text += f"u\tt/{n}\t{title}\n\n"
    (tmp_path / "a.tsv").write_text(text)
    with Server() as server:
        run("a.tsv", "--output", "rows.jsonl", server=server, cwd=tmp_path)
    found = {row["image_id"]: row["caption"] for row in lines(tmp_path / "rows.jsonl")}
    assert found == {f"t/{n}": title for n, title in enumerate(titles)}


def test_tar(tmp_path):
    """The caption of KEY.jpg is KEY.txt, dots and all; the image_id names the shard."""
    members = {
        "./0000.jpg": b"\xff\xd8" * 9000,
        "./0000.json": b'{"caption": "from the json"}',
        "./0000.txt": b"a first caption\n",
        "22.05.jpg": b"x",
        "22.05.txt": b"a dog in may",
        "22.06.jpg": b"x",
        "22.06.txt": b"a dog in june",
        "1.jpg": b"x",
        "1.txt": b"the caption of one",
        "1.url.txt": b"http://no.caption and more",
        "b/c/7.WEBP": b"x",
        "b/c/7.txt": b"a dog in folders",
        "8.jpg": b"no caption at all",
    }
    for shard in ("00000", "00001"):
        (tmp_path / f"{shard}.tar").write_bytes(tar(members))
    with Server() as server:
        run("*.tar", "--output", "rows.jsonl", server=server, cwd=tmp_path)
    expected = {}
    for shard in ("00000", "00001"):
        expected[f"{shard}/0000"] = "a first caption"
        expected[f"{shard}/22.05"] = "a dog in may"
        expected[f"{shard}/22.06"] = "a dog in june"
        expected[f"{shard}/1"] = "the caption of one"
        expected[f"{shard}/b/c/7"] = "a dog in folders"
    found = {row["image_id"]: row["caption"] for row in lines(tmp_path / "rows.jsonl")}
    assert found == expected
    assert len(lines(tmp_path / "rows.jsonl")) == len(expected)


SHARD = tar({f"{n}.{kind}": b"a dog no. %d" % n for n in range(50) for kind in ("jpg", "txt")})
DAMAGED = SHARD[: 21 * 1024] + b"\xff" * 512 + SHARD[21 * 1024 + 512 :]
OUTSIDE = tar({"../../1.jpg": b"x", "../../1.txt": b"a dog"})
A_DOG = {"a.txt": "a dog\n"}
BAD_INPUTS = {  # the files, the arguments beside --output, what the error's line must name
    "no file": ({}, ["none.txt"], ["none.txt"]),
    "ending": ({"a.csv": "x"}, ["a.csv"], ["a.csv", ".tsv"]),
    "not UTF-8": ({"a.txt": b"a dog\n\xff\xfe dog\n"}, ["a.txt"], ["a.txt:2", "save it as UTF-8"]),
    "header": ({"a.tsv": "x\ty\n1\t2\n"}, ["a.tsv"], ["a.tsv:1", "filepath", "title"]),
    "columns": (
        {"a.tsv": "filepath\ttitle\n1\ta dog\n2\n"},
        ["a.tsv"],
        ["a.tsv:3", "column"],
    ),
    "not JSON": (
        {"a.jsonl": '{"image_id": "1", "caption": "a dog"}\n{\n'},
        ["a.jsonl"],
        ["a.jsonl:2"],
    ),
    "a list": ({"a.jsonl": "[1, 2]\n"}, ["a.jsonl"], ["a.jsonl:1"]),
    "deep": ({"a.jsonl": '{"image_id": ' + "[" * 100_000 + "\n"}, ["a.jsonl"], ["a.jsonl:1"]),
    "no caption": ({"a.jsonl": '{"image_id": "1"}\n'}, ["a.jsonl"], ["a.jsonl:1", '"caption"']),
    "id out of the root": (
        {"a.jsonl": '{"image_id": "../1", "caption": "a dog"}\n'},
        ["a.jsonl"],
        ["a.jsonl:1", "image_id"],
    ),
    "absolute id": (
        {"a.tsv": "filepath\ttitle\n/etc/1\ta dog\n"},
        ["a.tsv"],
        ["a.tsv:2", "image_id"],
    ),
    "member out of the root": ({"a.tar": OUTSIDE}, ["a.tar"], ["a.tar", "image_id"]),
    "cut member": ({"a.tar": SHARD[: 21 * 1024 + 515]}, ["a.tar"], ["a.tar"]),
    "cut between two": ({"a.tar": SHARD[: 21 * 1024]}, ["a.tar"], ["a.tar", "cut off"]),
    "damaged header": ({"a.tar": DAMAGED}, ["a.tar"], ["a.tar", "damaged"]),
    "two of one name": (
        {"a/1.tar": SHARD, "b/1.tar": SHARD},
        ["*/1.tar"],
        ["a/1.tar", "b/1.tar"],
    ),
    "nothing kept": ({"a.txt": "dog\n" + "w " * 20 + "\n"}, ["a.txt"], ["a.txt", "no caption"]),
    "shard": (A_DOG, ["a.txt", "--shard", "2/2"], ["--shard"]),
    "negative": (A_DOG, ["a.txt", "--limit", "-1"], ["--limit"]),
    "sampling": (A_DOG, ["a.txt", "--sampling", "seed"], ["--sampling"]),
    "swallowed": (A_DOG, ["--sampling", "seed=1", "a.txt"], ["--sampling", "a.txt", "CAPTIONS"]),
    "unknown flag": (A_DOG, ["a.txt", "--retries", "1"], ["--retries"]),
}
for url in ("localhost:8000", f"http://u:{KEY}@localhost/v1", "http://[::1/v1", "http:///v1"):
    BAD_INPUTS[url] = (A_DOG, ["a.txt", "--endpoint", url], ["--endpoint", "http://"])


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_named_before_the_first_call(tmp_path, case):
    files, args, names = BAD_INPUTS[case]
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with Server() as server:
        done = run(*args, "--output", "new/rows.jsonl", code=2, server=server, cwd=tmp_path)
    for name in names:
        assert name in done.error
    assert done.error.startswith("generate.py: error: ")
    assert not server.requests
    assert not (tmp_path / "new").exists()


def test_no_key(tmp_path):
    args = write_captions(tmp_path, 2)
    done = run(*args, key=None, code=2, cwd=tmp_path)
    assert done.err == f"{done.error}\n"
    assert "OPENAI_API_KEY" in done.error
    done = run(*args, "--endpoint", "localhost:8000", key=None, code=2, cwd=tmp_path)
    assert "http://" in done.error
    assert "KEY" not in done.error


def test_threads_that_can_not_be_started(tmp_path):
    """No room for their stacks."""
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    with Server() as server:
        args = (*write_captions(tmp_path, 5000), "--concurrency", 5000)
        done = run(*args, server=server, cwd=tmp_path, code=2, preexec_fn=limit)
    assert "--concurrency" in done.error


# ---------------------------------------------------------------- answers

TIDY = {  # what the LLM says of "a red dog": the answer in it
    " A dog runs.\n": "A dog runs.",
    '"A dog runs."': "A dog runs.",
    "“A dog”": "A dog",
    "'A man's dog'": "A man's dog",
    "«Собака бежит»": "Собака бежит",
    "**A cat**": "A cat",
    '"Big" dog and "Rex"': '"Big" dog and "Rex"',
    "'Big' and 'small'": "'Big' and 'small'",
    '""': "",
    "": "",
    '"': '"',
    "a dog's": "a dog's",
    "Paraphrase: A dog": "A dog",
    'Paraphrase:\n"A dog"': "A dog",
    '"Paraphrase: A dog"': "A dog",
    "**Paraphrased caption:** A dog": "A dog",
    "Caption: A dog": "A dog",
    "Rephrased: A dog": "A dog",
    "Concise paraphrase: A dog": "A dog",
    "Here is a paraphrase: A dog": "A dog",
    "Here's a concise version: A dog": "A dog",
    'Sure! Here\'s a paraphrase: "A dog"': "A dog",
    "Certainly! Here is the paraphrased text:\n\nA dog": "A dog",
    "Here is a dog: Rex": "Here is a dog: Rex",
    "Here I am: a dog": "Here I am: a dog",
    "Paraphrase of a poem": "Paraphrase of a poem",
    "I can't caption that: it's explicit": "I can't caption that: it's explicit",
    "Unable to paraphrase: it's explicit": "Unable to paraphrase: it's explicit",
    "Sure-footed goat": "Sure-footed goat",
    "<think>a\nb</think>\n\nA dog": "A dog",
    "hm, a hound?</think>A dog": "A dog",
    "<think>hm": "<think>hm",
}


@pytest.mark.parametrize("said", TIDY)
def test_tidy(said):
    assert tidy(said, "a red dog") == TIDY[said]


def test_a_label_that_the_source_has_stays():
    source = "Caption: America the movie"
    assert tidy("Caption: America: the movie", source) == "Caption: America: the movie"


BAD_ANSWERS = [
    "", "...", "two\nlines", "a red\u2028dog", "A red dog runs!", "A RED dog - runs", "<think>hm",
    "**Bold** hound", "A hound <|im_end|>", "[INST] a hound", "A hound\ufffd", "A_hound_runs",
    "I'm sorry, but I can't help with that.", "I’m sorry", "As an AI language model, I can't",
    "I cannot assist with that", "Sorry, can't do", "My apologies for that",
    "Could you please provide the caption?", "There is no caption given.",
    "The text you want paraphrased is missing.", "Unable to rephrase: it is explicit",
    "A hound that " + "runs and " * 20 + "runs",
]  # fmt: skip
GOOD_ANSWERS = [
    "A crimson hound sprints", "An iPad dog", "Красная собака", "红狗", "A dog (red) & co., $5!",
    "Sorrel hound, in AI style", "World War II dog", "A hound 🐕",
]  # fmt: skip


def test_problem_with():
    source = "a red dog runs"
    for answer in BAD_ANSWERS:
        assert problem_with(answer, source, "stop", may_echo=False), answer
    for answer in GOOD_ANSWERS:
        assert not problem_with(answer, source, "stop", may_echo=False), answer
    assert not problem_with("A red dog runs.", source, "stop", may_echo=True)
    for finish_reason in (None, "", "stop", "STOP", "eos", "eos_token", "end_turn"):
        assert not problem_with("A hound", source, finish_reason, may_echo=False)
    for finish_reason in ("length", "content_filter", "error", "abort", "SAFETY", 7):
        assert problem_with("A hound", source, finish_reason, may_echo=False)


def test_what_the_source_has_is_no_problem():
    """Word by word: a refusal does not pass because its source holds the word caption."""
    for source, answer in {
        "I'm sorry by Brenda Lee": "I'm sorry, a song",
        "Caption this, #1 <3": "Caption: #1 <3",
        "How to paraphrase: ten tips": "Ten tips to paraphrase",
    }.items():
        assert not problem_with(answer, source, "stop", may_echo=False), answer
    refusal = "I can't help with this caption"
    assert problem_with(refusal, "caption number 7 of a small dog", "stop", may_echo=False)


JOB_ANSWERS = {  # by the caption's last word: the answer, what its reason must name
    "refusal": (Reply("I'm sorry, but as an AI I can't."), "task"),
    "blank": (Reply(" \n"), "empty"),
    "null": (Reply(None), "empty"),
    "length": (Reply("a cut", "length"), "length"),
    "abort": (Reply("A hound spr", "abort"), "abort"),
    "many": (Reply("one dog\nanother dog"), "line"),
    "thoughts": (Reply("<think>A dog, so a hound"), "markup"),
}
BROKEN_ANSWERS = {  # 200, but no chat completion
    "html": Reply(body=b"<html>oops"),
    "error": Reply(body=b'{"error": {"message": "overloaded"}}'),
    "nochoice": Reply(body=b'{"choices": []}'),
    "textless": chat(message=None),
    "parts": chat(message={"content": [{"text": 7}]}),
    "number": chat(message={"content": 7}),
    "deep": Reply(body=b"[" * 2**20),
    "huge": Reply(body=b" " * 2**21 + chat(message={"content": "a hound"}).body),
    "bomb": Reply(body=gzip.compress(bytes(2**28)), headers={"Content-Encoding": "gzip"}),
}


def test_a_bad_answer_is_asked_once_and_fails_alone(tmp_path):
    """Step 2 never sees it. What is no chat completion is a failed call, and tried again."""
    asked = {}

    def answer(request):
        asked[request.prompt] = asked.get(request.prompt, 0) + 1
        kind = request.source.lower().strip(".").split()[-1]
        if kind == "echo":
            return request.source.upper() + "."
        if request.step == 2 or kind == "fine":
            return reword(request)
        if kind in JOB_ANSWERS:
            return JOB_ANSWERS[kind][0]
        if asked[request.prompt] < 3:
            return BROKEN_ANSWERS[kind]
        return reword(request)

    def limit():
        resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))

    kinds = ["fine", "echo", *JOB_ANSWERS, *BROKEN_ANSWERS]
    (tmp_path / "captions.txt").write_text("".join(f"dog of {kind}\n" for kind in kinds))
    args = ("captions.txt", "--output", "rows.jsonl", "--concurrency", 4)
    options = {"server": None, "cwd": tmp_path, "jitter": 0.01, "code": 1, "preexec_fn": limit}
    with Server(answer) as options["server"]:
        done = run(*args, **options)

    written = {row["caption"] for row in lines(tmp_path / "rows.jsonl")}
    assert written == {f"dog of {kind}" for kind in ("fine", *BROKEN_ANSWERS)}
    failed = lines(tmp_path / "rows.jsonl.failed")
    assert len(failed) == len(kinds) - len(written)
    for row in failed:
        kind = row["caption"].split()[-1]
        assert JOB_ANSWERS.get(kind, (None, "echo"))[1] in row["reason"], row
        assert set(row) == {"image_id", "caption", "reason"}
    for prompt, times in asked.items():
        kind = prompt.partition("dog of ")[2].partition('"')[0]
        is_broken = kind in BROKEN_ANSWERS and prompt.startswith("Paraphrase the given caption")
        assert times == (3 if is_broken else 1), prompt
    assert f"{len(failed)} captions are without a row" in done.out
    assert "--retry-failed" in done.out


def test_answers_of_reasoning_models(tmp_path):
    """Thoughts before the answer, beside it, and as a part of it: none of them is in a row."""

    def answer(request):
        said = reword(request).content
        thought = {"type": "thinking", "thinking": [{"text": "hmm"}]}
        parts = [thought, {"type": "text", "text": said}]
        contents = (f"<think>\nhmm\n</think>\n\n{said}", f"hmm</think>{said}", parts, said)
        content = contents[request.number % 4]
        return chat(message={"content": content, "reasoning_content": "hmm"})

    with Server(answer) as server:
        run(*write_captions(tmp_path, 8), server=server, cwd=tmp_path)
    rows = lines(tmp_path / "rows.jsonl")
    assert len(rows) == 8
    for row in rows:
        assert row["paraphrase_2"] == f"in other words plainly {row['caption']}"


def test_odd_counts_of_tokens_spoil_no_answer(tmp_path):
    usages = [None, [], 7, {"prompt_tokens": "30"}, {"prompt_tokens": float("inf")}]

    def answer(request):
        choice = {"message": {"content": reword(request).content}}
        usage = usages[number_in(request) - 1]
        return Reply(status=201, body=body(choices=[choice], usage=usage))

    with Server(answer) as server:
        run(*write_captions(tmp_path, 5), server=server, cwd=tmp_path)
    assert len(lines(tmp_path / "rows.jsonl")) == 5


def test_what_llama_cpps_server_answers(tmp_path):
    """It loads its model at first; a prompt may be too long for a slot; keys that others lack."""

    def answer(request):
        if request.number < 3:
            return error(503, message="Loading model", type="unavailable_error", code=503)
        if number_in(request) == 2:
            message = "request (1531 tokens) exceeds the available context size (1024 tokens)"
            return error(400, message=message, type="exceed_context_size_error", code=400)
        message = {"role": "assistant", "content": reword(request).content}
        return Reply(body=body(
            choices=[{"finish_reason": "stop", "index": 0, "message": message}],
            created=1795705242,
            system_fingerprint="b0-unknown",
            usage={
                "completion_tokens": 9,
                "prompt_tokens": 48,
                "total_tokens": 57,
                "prompt_tokens_details": {"cached_tokens": 24},
            },
            timings={"cache_n": 24, "prompt_n": 24, "predicted_n": 9, "predicted_ms": 2884.45},
        ))  # fmt: skip

    with Server(answer) as server:
        done = run(*write_captions(tmp_path, 3), server=server, cwd=tmp_path, code=1, jitter=0.01)
    assert numbers(tmp_path / "rows.jsonl") == [1, 3]
    assert "2 rows more; 192 tokens sent, 36 answered" in done.out
    failed, = lines(tmp_path / "rows.jsonl.failed")
    assert "HTTP 400" in failed["reason"] and "exceeds the available context" in failed["reason"]


def test_retry_failed_takes_just_those(tmp_path):
    args = write_captions(tmp_path, 6)
    journal = tmp_path / "rows.jsonl.failed"

    def refusing(*refused):
        return lambda request: "I'm sorry" if number_in(request) in refused else reword(request)

    with Server(refusing(2, 4, 6)) as server:
        run(*args, "--limit", 4, server=server, cwd=tmp_path, code=1)
        calls = server.count
        run(*args, "--limit", 4, server=server, cwd=tmp_path, code=1)
        assert server.count == calls  # nothing is asked twice by itself
    journal.write_text(journal.read_text() + '{"image_id": "capt')  # torn by a kill
    with Server(refusing(4)) as server:
        args_now = (*args, "--retry-failed", "--sampling", "top_p=1.0")
        run(*args_now, server=server, cwd=tmp_path, code=1)
        assert {number_in(request) for request in server.requests} == {2, 4}
        assert {request.body["top_p"] for request in server.requests} == {1.0}
    assert numbers(journal) == [2, 4, 4]
    with Server() as server:
        run(*args, server=server, cwd=tmp_path, code=1)  # 5 and 6; 4 has still failed
        run(*args, "--retry-failed", server=server, cwd=tmp_path)
        run(*args, "--retry-failed", server=server, cwd=tmp_path)
        assert server.count == 6
    assert numbers(tmp_path / "rows.jsonl") == [1, 2, 3, 4, 5, 6]
    for row in lines(tmp_path / "rows.jsonl"):
        assert set(row) == set(ROW_KEYS)


def test_retry_failed_is_not_stopped_by_failures(tmp_path):
    """It takes up the bad ones, so that many in a row tell nothing about the set-up."""
    args = write_captions(tmp_path, 151)
    with Server(lambda request: reword(request) if number_in(request) < 2 else "no\nno") as server:
        run(*args, "--limit", 100, server=server, cwd=tmp_path, code=1)
        journal = tmp_path / "rows.jsonl.failed"
        for number in range(101, 152):
            row = {"image_id": f"captions/{number}", "caption": f"a small dog number {number}"}
            journal.write_text(journal.read_text() + json.dumps(row) + "\n")
        run(*args, "--retry-failed", server=server, cwd=tmp_path, code=1)
    assert server.count == 2 + 99 + 150


def test_an_older_versions_journal_is_named(tmp_path):
    (tmp_path / "rows.failed.jsonl").write_text("")
    with Server() as server:
        done = run(*write_captions(tmp_path, 1), server=server, cwd=tmp_path)
    assert done.out.count("rows.failed.jsonl: ") == 1
    assert "rows.jsonl.failed" in done.out


# ---------------------------------------------------------------- a set-up that is wrong

SET_UPS = {
    "model": error(400, message="Model Not Exist"),
    "address": Reply(status=404, body=b"Not Found"),
    "moved": Reply(status=307, headers={"Location": "http://127.0.0.1:9/"}, body=b""),
    "forbidden": error(403, message="you may not use this model"),
    "GPT-5": error(400, message="Unsupported parameter: 'max_tokens'", param="max_tokens"),
    "FastAPI": Reply(status=422, body=b'{"detail": [{"loc": ["body", "top_p"], "msg": "extra"}]}'),
    "too short": Reply("", "length"),
    "down": Reply(status=500, body=b"boom"),
}


@pytest.mark.parametrize("kind", SET_UPS)
def test_a_wrong_set_up_uses_up_no_caption(tmp_path, kind):
    """Few calls, the server's words, a hint, no journal; the mended command has all rows."""
    args = (*write_captions(tmp_path, 300), "--max-retries", 1)
    with Server(lambda request: SET_UPS[kind]) as server:
        done = run(*args, server=server, cwd=tmp_path, code=2, jitter=0.01)
        assert server.count < 250
    words = (SET_UPS[kind].body or b"").decode()
    words = {"moved": "127.0.0.1:9/", "too short": "finish_reason length"}.get(kind, words)
    for word in (*HINTS, server.url, words):
        assert word in done.error
    assert os.listdir(tmp_path) == ["captions.txt"]
    if kind == "model":
        with Server() as server:
            run(*args, server=server, cwd=tmp_path)
        assert numbers(tmp_path / "rows.jsonl") == list(range(1, 301))


def test_a_few_captions_that_run_out(tmp_path):
    args = write_captions(tmp_path, 3)
    with Server(lambda request: SET_UPS["model"]) as server:
        done = run(*args, server=server, cwd=tmp_path, code=2)
    assert "Model Not Exist" in done.error
    assert os.listdir(tmp_path) == ["captions.txt"]


def test_no_server(tmp_path):
    with Server() as server:
        pass  # its port is free again
    args = (*write_captions(tmp_path, 50), "--concurrency", 2)
    done = run(*args, server=server, cwd=tmp_path, code=2)
    assert f"--endpoint {server.url}" in done.error
    assert "Connection refused; does the server run there?" in done.error
    assert os.listdir(tmp_path) == ["captions.txt"]


def test_failures_before_the_first_good_answer_are_journalled_by_it(tmp_path):
    def answer(request):
        return reword(request) if number_in(request) > 15 else SET_UPS["forbidden"]

    args = (*write_captions(tmp_path, 30), "--concurrency", 1)
    with Server(answer) as server:
        run(*args, server=server, cwd=tmp_path, code=1)
    assert numbers(tmp_path / "rows.jsonl.failed") == list(range(1, 16))
    assert numbers(tmp_path / "rows.jsonl") == list(range(16, 31))


def test_one_refused_caption_fails_alone(tmp_path):
    """403 and the like, after a good answer: the job goes on, and so does a resumed one."""
    refused = {30: error(403, message="flagged"), 40: Reply(status=400), 50: Reply(status=302)}

    def answer(request):
        return refused.get(number_in(request)) or reword(request)

    args = write_captions(tmp_path, 300)
    with Server(answer) as server:
        run(*args, server=server, cwd=tmp_path, code=1)
        calls = server.count
        run(*args, server=server, cwd=tmp_path, code=1)
        assert server.count == calls == 2 * 297 + 3
    assert numbers(tmp_path / "rows.jsonl.failed") == [30, 40, 50]
    assert len(lines(tmp_path / "rows.jsonl")) == 297


def test_the_last_captions_of_a_resumed_job_may_all_be_bad(tmp_path):
    """They are journalled, as the rows show that the set-up works; once: exit code 2 for ever."""
    with Server(lambda request: "" if number_in(request) == 3 else reword(request)) as server:
        args = write_captions(tmp_path, 3)
        run(*args, "--limit", 2, server=server, cwd=tmp_path)
        run(*args, server=server, cwd=tmp_path, code=1)
        assert [row["image_id"] for row in lines(tmp_path / "rows.jsonl.failed")] == ["captions/3"]
        calls = server.count
        run(*args, server=server, cwd=tmp_path, code=1)
        assert server.count == calls


def test_the_exit_code_does_not_come_from_the_bar(tmp_path, monkeypatch):
    """TQDM_DISABLE switches tqdm off, and with it its counts."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with Server() as server:
        done = run(*write_captions(tmp_path, 3), server=server, cwd=tmp_path)
    assert "3 rows more" in done.out


def test_a_word_that_begins_like_the_key_stays_in_a_row(tmp_path):
    with Server(lambda request: f"local-delivery van {request.step}") as server:
        args = write_captions(tmp_path, 1)
        run(*args, server=server, cwd=tmp_path, key="local-development-key")
    assert lines(tmp_path / "rows.jsonl")[0]["paraphrase_2"] == "local-delivery van 2"


def test_a_hundred_failures_in_a_row_stop_the_job(tmp_path):
    def answer(request):
        return reword(request) if request.number < 20 else SET_UPS["model"]

    with Server(answer) as server:
        args = (*write_captions(tmp_path, 3000), "--concurrency", 4)
        done = run(*args, server=server, cwd=tmp_path, code=2)
    assert "100 captions failed" in done.error
    assert "Model Not Exist" in done.error
    failed = len(lines(tmp_path / "rows.jsonl.failed"))
    assert 100 <= failed <= 103  # a good answer may come between the first failures
    assert len(lines(tmp_path / "rows.jsonl")) in range(6, 11)


STOPPING = {
    "key": Reply(status=401, body=f"Incorrect API key provided: {KEY[:14]}***".encode()),
    "credit": Reply(status=402, body=b"Insufficient Balance"),
    "quota": error(429, {"Retry-After": "60"}, code="insufficient_quota"),
    "quota in a 200": Reply(body=body(error={"code": 402, "message": "no credit"})),
}


@pytest.mark.parametrize("kind", STOPPING)
def test_a_wrong_key_or_no_credit_stops_the_job_at_once(tmp_path, kind):
    def answer(request):
        return reword(request) if request.number < 20 else STOPPING[kind]

    with Server(answer) as server:
        args = (*write_captions(tmp_path, 200), "--concurrency", 4)
        done = run(*args, server=server, cwd=tmp_path, code=2, timeout=20)
    assert server.count <= 24
    assert ("OPENAI_API_KEY" if kind == "key" else "credit") in done.error
    assert KEY[:14] not in done.err
    assert 6 <= len(lines(tmp_path / "rows.jsonl")) <= 10
    assert not (tmp_path / "rows.jsonl.failed").exists()


def test_the_key_shows_nowhere(tmp_path):
    """run() looks for it in all that is printed; here also half of it, and in odd answers."""
    assert "Appendix A" in run("--help").out
    args = write_captions(tmp_path, 4)
    for key in (f"{KEY}\n{KEY}", f"{KEY} \u20ac", f"{KEY}\t{KEY}"):
        with Server() as server:
            done = run(*args, key=key, server=server, code=2, cwd=tmp_path)
        assert "OPENAI_API_KEY" in done.error

    def answer(request):
        if number_in(request) == 4:
            return error(400, message=f"wrong key {KEY[:12]}****cdef.")
        return f"my key is {KEY} and {request.step} for {number_in(request)}"

    with Server(answer) as server:
        run(*args, key=f" {KEY}\n", server=server, cwd=tmp_path, code=1)
        assert server.requests[0].key == KEY
    assert len(lines(tmp_path / "rows.jsonl")) == 3
    for path in tmp_path.iterdir():
        assert KEY[:12] not in path.read_text()
    assert "cdef" not in (tmp_path / "rows.jsonl.failed").read_text()


# ---------------------------------------------------------------- a server in trouble


def test_an_interim_status_gives_no_caption_anothers_answer(tmp_path):
    """103 and then, later, the true answer: its connection must not be used again."""

    def answer(request):
        reply = Reply(reword(request).content, delay=0.02)
        if request.number % 40 == 20:
            reply.interim = b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n"
            reply.delay = 0.05
        return reply

    with Server(answer) as server:
        args = (*write_captions(tmp_path, 200), "--concurrency", 4)
        run(*args, server=server, cwd=tmp_path, jitter=0.01)
    rows = lines(tmp_path / "rows.jsonl")
    assert len(rows) == 200
    for row in rows:
        assert row["paraphrase_1"] == f"plainly {row['caption']}"
        assert row["paraphrase_2"] == f"in other words plainly {row['caption']}"
    assert server.count > 400


def test_transient_failures_are_tried_again(tmp_path):
    troubles = []
    for status in (500, 502, 503, 504, 408, 409, 425, 429, 498, 499):
        troubles.append(Reply(status=status, body=b"busy"))
    for code in (429, 502):
        troubles.append(Reply(body=body(error={"code": code, "message": "in a 200"})))
    for odd in ("soon", "0.1", "-1", "nan", "9" * 5000, "Wed, 21 Oct 99999999 07:28:00 GMT"):
        troubles.append(Reply(status=500, headers={"Retry-After": odd}))
    troubles += [Reply("x" * 999, reset=True), Reply("late", delay=3), Reply("slow", trickle=0.3)]
    seen = set()

    def answer(request):
        if request.prompt in seen or request.step == 2:
            return reword(request)
        seen.add(request.prompt)
        return troubles[number_in(request) - 1]

    with Server(answer) as server:
        args = (*write_captions(tmp_path, len(troubles)), "--timeout", 1, "--concurrency", 3)
        run(*args, server=server, jitter=0.01, cwd=tmp_path, timeout=20)
    assert len(lines(tmp_path / "rows.jsonl")) == len(troubles)
    assert server.count == 3 * len(troubles)


@pytest.mark.parametrize("kind", ["429", "503", "fraction", "date", "paced", "in a 200"])
def test_nobody_sends_in_a_pause(tmp_path, kind):
    """Retry-After holds back all workers."""
    paused_at = []

    def answer(request):
        if request.number != 10:
            return Reply(reword(request).content, delay=0.02)
        paused_at.append(time.monotonic())
        reply = Reply(status=429, headers={"Retry-After": "1"}, body=b"slow down")
        if kind == "503":
            reply.status = 503
        if kind == "fraction":
            reply.headers = {"Retry-After": "1.5"}
        if kind == "date":  # in whole seconds: 1 to 2 from now
            date = email.utils.formatdate(time.time() + 2, usegmt=True)
            reply.headers = {"Retry-After": date}
        if kind == "in a 200":
            reply.status = 200
            reply.body = body(error={"code": 429, "message": "slow down"})
        return reply

    with Server(answer) as server:
        args = [*write_captions(tmp_path, 20), "--concurrency", 8]
        if kind == "paced":  # whoever waits for his turn must wait longer
            args += ["--requests-per-minute", 1200]
        run(*args, server=server, jitter=1, cwd=tmp_path)
    sent = [request.time - paused_at[0] for request in server.requests[11:]]
    pause = 1.5 if kind == "fraction" else 1
    in_the_pause = [t for t in sent if 0.3 < t < pause - 0.05]  # 0.3: the 429 is on its way
    assert not in_the_pause
    assert len(sent) > 15
    assert len(lines(tmp_path / "rows.jsonl")) == 20


def test_a_429_without_retry_after_holds_back_its_own_caption_alone(tmp_path):
    """One that is always refused fails in the end, and the others are as fast as without it."""

    def answer(request):
        if number_in(request) == 30:
            return Reply(status=429, body=b"not you")
        return Reply(reword(request).content, delay=0.01)

    with Server(answer) as server:
        args = (*write_captions(tmp_path, 300), "--concurrency", 8, "--max-retries", 3)
        done = run(*args, server=server, cwd=tmp_path, code=1, jitter=0.2)
    refused = [request.time for request in server.requests if number_in(request) == 30]
    others = [request.time for request in server.requests if number_in(request) != 30]
    assert len(refused) == 4
    assert max(later - sooner for sooner, later in pairwise(others)) < 0.3
    assert numbers(tmp_path / "rows.jsonl.failed") == [30]
    assert "299" in done.out


def test_a_rate_limit_fails_no_caption(tmp_path):
    """A 429 with Retry-After that others get through costs a caption no try, however few it has."""
    taken = []

    def answer(request):
        taken[:] = [t for t in taken if t > time.monotonic() - 0.2]
        if len(taken) >= 4:
            return Reply(status=429, headers={"Retry-After": "0.2"}, body=b"rate limit")
        taken.append(time.monotonic())
        return reword(request)

    with Server(answer) as server:
        args = (*write_captions(tmp_path, 30), "--max-retries", 2, "--concurrency", 16)
        run(*args, server=server, cwd=tmp_path)
    assert server.count > 60
    assert len(lines(tmp_path / "rows.jsonl")) == 30


def test_pace(tmp_path):
    """--concurrency calls are in flight at once, each worker on a connection that is kept."""
    with Server(lambda request: Reply(reword(request).content, delay=0.2)) as server:
        args = (*write_captions(tmp_path, 120), "--concurrency", 40)
        run(*args, server=server, cwd=tmp_path)
    times = [request.time for request in server.requests]
    in_flight = [sum(0 <= t - first < 0.19 for t in times) for first in times]
    assert max(in_flight) == 40
    assert server.connections <= 40
    with Server() as server:
        args = ("captions.txt", "--output", "b.jsonl", "--limit", 15)
        run(*args, "--requests-per-minute", 600, server=server, cwd=tmp_path)
    times = [request.time for request in server.requests]
    assert len(times) == 30
    assert times[-1] - times[0] > 2.8  # a tenth of a second apart
    for first, later in zip(times, times[10:]):
        assert later - first > 0.8


# ---------------------------------------------------------------- being stopped, and going on


def test_twenty_kills(tmp_path):
    """kill -9 at 20 random moments: each caption once, and only calls in flight are paid twice."""
    count = 2000
    workers = 8
    kills = 20
    args = (*write_captions(tmp_path, count), "--concurrency", workers)
    with Server(lambda request: Reply(reword(request).content, delay=0.01)) as server:
        for seed in range(kills):
            chance = random.Random(seed)
            process = start(*args, server=server, cwd=tmp_path)
            goal = server.count + chance.choice([0, chance.randrange(1, 250)])
            while server.count < goal and process.poll() is None:
                time.sleep(0.001)
            time.sleep(chance.random() * 0.05)
            assert process.poll() is None
            process.kill()
            process.communicate()
        killed = (tmp_path / "rows.jsonl").read_bytes().count(b"\n")
        run(*args, server=server, cwd=tmp_path)
    rows = lines(tmp_path / "rows.jsonl")
    assert 200 < killed < count
    assert numbers(tmp_path / "rows.jsonl") == list(range(1, count + 1))
    for row in rows:
        number = row["caption"].split()[-1]
        assert row["image_id"] == f"captions/{number}"
        assert row["paraphrase_2"] == f"in other words plainly {row['caption']}"
    assert 2 * count <= server.count <= 2 * count + kills * workers * 2


def test_ctrl_c(tmp_path):
    """It ends at once, sits out neither a call nor a pause, and the rows that are written stay."""

    def listen():  # also where pytest runs behind a shell's "&"
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def answer(request):
        return Reply(reword(request).content, delay=0 if request.number < 10 else 30)

    options = {"cwd": tmp_path, "preexec_fn": listen}
    with Server(answer) as server:
        args = (*write_captions(tmp_path, 100), "--concurrency", 1)
        process = start(*args, server=server, **options)
        while server.count < 11:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=5)
        assert process.returncode == 130
        assert "Traceback" not in err
        assert re.split(r"[\r\n]", err.rstrip())[-1].startswith("stopped: ")
        assert len(lines(tmp_path / "rows.jsonl")) == 5

        server.answer = lambda request: Reply(status=429, headers={"Retry-After": "60"})
        a_terminal = "1; sys.stderr.isatty = lambda: True"  # for a bar that is drawn often
        process = start(*args, server=server, jitter=a_terminal, **options)
        while server.count < 12:
            time.sleep(0.01)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=5)
        assert process.returncode == 130
        assert re.search(r"all wait 5\d s, last: HTTP 429", err)

        server.answer = reword
        run(*args, server=server, cwd=tmp_path)
    assert numbers(tmp_path / "rows.jsonl") == list(range(1, 101))
    assert server.count == 10 + 1 + 1 + 190


def test_a_torn_last_line_is_cut_off(tmp_path):
    """And one that only lacks its end, by an editor, is kept."""
    rows = tmp_path / "rows.jsonl"
    with Server() as server:
        args = write_captions(tmp_path, 5, "a dög {{}} no. {}")
        run(*args, server=server, cwd=tmp_path)
        whole = rows.read_bytes()
        inside_a_letter = whole.rindex("ö".encode()) + 1
        calls = server.count
        for cut, lost in ((-7, 1), (inside_a_letter, 1), (-1, 0), (5, 5), (0, 5)):
            rows.write_bytes(whole[:cut])
            run(*args, server=server, cwd=tmp_path)
            assert server.count == calls + 2 * lost
            calls = server.count
            assert sorted(rows.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_torn_last_line_is_left_out_of_a_sheet(tmp_path):
    row = dict(zip(ROW_KEYS, ("1", "a dog", "a hound", "a pooch")))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row)[:30])
    done = run("rows.jsonl", "--sheet", "sheet.tsv", cwd=tmp_path)
    assert "1 rows" in done.out
    assert "rows.jsonl:2" in done.err


NO_OUTPUT = {
    "package.json": '{"name": "my-package"}',
    "prose.txt": "Dear all,\nkeep this",
    "torn.jsonl": '{"name": "my',
    "one.jsonl": '{"image_id": "1", "caption": "a dog", "n": 5}',
    "cut.jsonl": '{"image_id": "1"}\n{"image_id": "2',
    "rows.jsonl": json.dumps(dict(zip(ROW_KEYS, ("1", "a dog", "a hound", "a pooch")))),
}
COMMANDS = [
    "captions.txt --output package.json",
    "captions.txt --output prose.txt",
    "captions.txt --output torn.jsonl",
    "captions.txt --output one.jsonl",
    "captions.txt --output cut.jsonl",
    "captions.txt --output captions.txt",
    "captions.txt --output .",
    "captions.txt --output /dev/full",
    "one.jsonl --output one.jsonl",
    "one.jsonl --output link.jsonl",
    "rows.jsonl --export-chat rows.jsonl",
    "rows.jsonl --sheet rows.jsonl",
    "rows.jsonl --sheet /dev/null",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_output_is_left_alone(tmp_path, command):
    args = command.split()
    write_captions(tmp_path, 4)
    for name, text in NO_OUTPUT.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "link.jsonl").symlink_to("one.jsonl")
    with Server() as server:
        done = run(*args, server=server, cwd=tmp_path, code=2)
    assert args[2] in done.error
    assert server.count == 0
    for name, text in NO_OUTPUT.items():
        assert (tmp_path / name).read_text() == text


def test_an_output_can_be_added_to(tmp_path):
    """By another job, and by fewer captions than before."""
    (tmp_path / "more.tsv").write_text("filepath\ttitle\nx/1\ta red cat 5\n")
    with Server() as server:
        args = write_captions(tmp_path, 4)
        run(*args, server=server, cwd=tmp_path)
        run("more.tsv", "--output", "rows.jsonl", server=server, cwd=tmp_path)
        done = run(*args, "--limit", 1, server=server, cwd=tmp_path)
    assert numbers(tmp_path / "rows.jsonl") == [1, 2, 3, 4, 5]
    assert server.count == 10
    assert "1 have a row, 0 are to do" in done.out


def test_two_processes_on_one_output(tmp_path):
    """The second stops: where the first has a row, and where neither has one yet."""
    with Server(lambda request: Reply(reword(request).content, delay=1)) as server:
        args = (*write_captions(tmp_path, 3), "--concurrency", 2)
        first = start(*args, server=server, cwd=tmp_path)
        while not server.count:
            time.sleep(0.01)
        second = run(*args, server=server, cwd=tmp_path, code=2)
        assert (tmp_path / "rows.jsonl").exists()
        third = run(*args, server=server, cwd=tmp_path, code=2)
        out, err = first.communicate(timeout=30)
    assert first.returncode == 0, out + err
    for process in (second, third):
        assert "rows.jsonl: another" in process.error
    assert numbers(tmp_path / "rows.jsonl") == [1, 2, 3]


def test_a_full_disk(tmp_path):
    """A limit of file sizes stands in for it: whole rows only, and the job goes on later."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    with Server() as server:
        args = write_captions(tmp_path, 200)
        done = run(*args, server=server, cwd=tmp_path, code=2, preexec_fn=limit)
        assert "rows.jsonl: " in done.error
        assert "disk" in done.error
        rows = lines(tmp_path / "rows.jsonl")
        assert 30 < len(rows) < 100
        run(*args, server=server, cwd=tmp_path)
    assert numbers(tmp_path / "rows.jsonl") == list(range(1, 201))
    assert lines(tmp_path / "rows.jsonl")[: len(rows)] == rows


# ---------------------------------------------------------------- sharing a job, and after it


def test_shards_and_limit(tmp_path):
    """Each caption is in one shard, doubles too; the limit is a shard's own."""
    rows = []
    for n in range(30):
        rows += 2 * [{"image_id": str(n), "caption": f"dog no. {n}"}]
        rows += [{"image_id": str(n), "caption": "short"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = []
    with Server() as server:
        for n in range(3):
            args = ("captions.jsonl", "--output", f"{n}.jsonl", "--shard", f"{n}/3")
            for limit, count in ((2, 2), (0, 10)):
                run(*args, "--limit", limit, server=server, cwd=tmp_path)
                assert len(lines(tmp_path / f"{n}.jsonl")) == count
            found += numbers(tmp_path / f"{n}.jsonl")
    assert server.count == 60
    assert sorted(found) == list(range(30))


def test_export_chat(tmp_path):
    row = dict(zip(ROW_KEYS, ("a/1", "a {red} dog", "a dög", "a 'hound'")))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    run("rows.jsonl", "--export-chat", "new/train.jsonl", key=None, cwd=tmp_path)
    question_1 = {"role": "user", "content": PROMPTS[0].replace("{}", "a {red} dog")}
    question_2 = {"role": "user", "content": PROMPTS[1].replace("{}", "a dög")}
    chats = [
        {"messages": [question_1, {"role": "assistant", "content": "a dög"}]},
        {"messages": [question_2, {"role": "assistant", "content": "a 'hound'"}]},
    ]
    assert lines(tmp_path / "new/train.jsonl") == chats

    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + '\n{"image_id": "1"}\n')
    done = run("bad.jsonl", "--export-chat", "new/train.jsonl", key=None, code=2, cwd=tmp_path)
    assert "bad.jsonl:2" in done.error
    assert lines(tmp_path / "new/train.jsonl") == chats
    assert os.listdir(tmp_path / "new") == ["train.jsonl"]


def test_one_goal(tmp_path):
    for args in (["rows.jsonl"], ["rows.jsonl", "--export-chat", "t.jsonl", "--output", "o.jsonl"]):
        assert "--output" in run(*args, key=None, code=2, cwd=tmp_path).error


def write_rows(folder, texts):
    with open(folder / "rows.jsonl", "w") as file:
        for n, (caption, paraphrase_1, paraphrase_2) in enumerate(texts):
            row = dict(zip(ROW_KEYS, (f"a/{n}", caption, paraphrase_1, paraphrase_2)))
            file.write(json.dumps(row) + "\n")


def test_sheet(tmp_path):
    """Tabs, line ends, quotes and emoji stay in their cells; the figures by hand."""
    texts = [
        ('a "red\tdog"', "a red 😀 dog", "a red dog barks"),
        ("one two\nthree four", "one two three four", '"five" six'),
        ('"never closed', "closed never", "shut"),
    ]
    write_rows(tmp_path, texts)
    out = run("rows.jsonl", "--sheet", "sheet.tsv", key=None, cwd=tmp_path).out
    text = (tmp_path / "sheet.tsv").read_text()
    assert len(text.splitlines()) == 4
    header, *cells = csv.reader(text.splitlines(), delimiter="\t")
    assert header[:4] == ["image_id", "T", "T'", "T''"]
    for n, share in enumerate(("100", "0", "0")):
        assert cells[n] == [f"a/{n}", *(" ".join(text.split()) for text in texts[n]), share]
    # words: 3, 4, 2; 3, 4, 2; 4, 2, 1. Kept in T': all; in T'': 3/3, 0, 0. T' is T in the second
    assert "3 rows" in out
    assert "T 3.0, T' 3.0, T'' 2.3" in out
    assert re.search(r"100%.* 33%.*80%.* 33\.3%.* 33\.3%", out), out
    assert " x " not in out  # nothing is frequent

    for name in ("b.tsv", "c.tsv"):
        run("rows.jsonl", "--sheet", name, "--limit", 2, key=None, cwd=tmp_path)
    assert len((tmp_path / "b.tsv").read_text().splitlines()) == 3
    assert (tmp_path / "b.tsv").read_text() == (tmp_path / "c.tsv").read_text()


def test_the_sheet_names_the_most_frequent_paraphrases(tmp_path):
    """A placeholder, a refusal in another language, one sentence for all captions."""
    texts = []
    for n in range(40):
        texts.append((f"dog no. {n}", f"hound no. {n}", f"pooch no. {n}"))
    for times, word in ((7, "N/A"), (5, "Je ne peux pas"), (3, "TODO"), (2, "rarer")):
        texts += times * [("a dog", word, f"{word} too")]
    write_rows(tmp_path, texts)
    out = run("rows.jsonl", "--sheet", "sheet.tsv", key=None, cwd=tmp_path).out
    found = re.findall(r"(\d+) x (.*)", out)
    expected = [("7", "N/A"), ("5", "Je ne peux pas"), ("3", "TODO")]
    assert found == expected + [(n, f"{text} too") for n, text in expected]
