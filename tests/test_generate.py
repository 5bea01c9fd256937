"""generate.py as its users run it: a process of its own against a real HTTP server on loopback."""

import email.utils
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from openai_server import Reply, Server, reword

from generate import (
    PROMPTS,
    ROW_KEYS,
    Config,
    Endpoint,
    fault,
    retry_after,
    tidy,
    two_step,
)

SCRIPT = Path(__file__).parent.parent / "generate.py"
KEY = "sk-loopback-0123456789abcdef"
# the same script with the longest jitter that full jitter can draw, or a hundredth of it
JITTER = "import random, runpy, sys; random.uniform = lambda a, b: b * {}; sys.argv = sys.argv[1:]; " \
         "runpy.run_path(sys.argv[0], run_name='__main__')"


def start(*args, server=None, jitter=None, key=KEY, **options):
    """generate.py as a process, in the folder `cwd`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")} | {"no_proxy": "*"}
    env |= {"OPENAI_API_KEY": key} if key else {}
    env |= {"OPENAI_BASE_URL": server.url} if server else {}
    python = [sys.executable, "-c", JITTER.format(jitter)] if jitter else [sys.executable]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*python, SCRIPT, *map(str, args)], env=env, **pipes, **options)


def run(*args, code=0, stdin="", timeout=60, **options):
    """The finished process; its exit code must be `code`, and neither a traceback nor the key may show."""
    process = start(*args, stdin=subprocess.PIPE, **options)
    out, err = process.communicate(stdin, timeout)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    assert KEY not in out + err
    process.out, process.err = out, err
    process.error = re.split(r"[\r\n]", err.rstrip())[-1]  # the last line of stderr
    return process


def lines(path):
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_captions(folder, number, words="a small dog number {}"):
    (folder / "captions.txt").write_text("".join(words.format(n) + "\n" for n in range(1, number + 1)))
    return "captions.txt", "--output", "rows.jsonl"


def tar(members):
    """The bytes of a tar file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


# ---------------------------------------------------------------- the method


def test_the_outputs_folder_is_made(tmp_path):
    captions, flag, _ = write_captions(tmp_path, 3)
    with Server() as server:
        run(captions, flag, "new/rows.jsonl", server=server, cwd=tmp_path)
    assert len(lines(tmp_path / "new" / "rows.jsonl")) == 3


def test_two_steps_with_the_papers_prompts_and_parameters(tmp_path):
    """Section 2.1 and Appendix A, as they go over the wire."""
    assert PROMPTS == (
        'Paraphrase the given caption "{}" concisely while preserving the meaning.',
        'Paraphrase the given text "{}" concisely while preserving the meaning and avoiding use of existing words.',
    )
    answers = ["Reversible jacket for boys", "Boys' coat that can be flipped over"]
    with Server(lambda request: answers[request.number]) as server:
        (tmp_path / "captions.txt").write_text("Boys REVERSIBLE jacket, SKU#1234.jpg\n")
        run("captions.txt", "--output", "rows.jsonl", server=server, cwd=tmp_path)
    caption = "Boys REVERSIBLE jacket, SKU#1234.jpg"
    assert [request.body["messages"] for request in server.requests] == [
        [{"role": "user", "content": PROMPTS[0].replace("{}", caption)}],
        [{"role": "user", "content": PROMPTS[1].replace("{}", answers[0])}],
    ]
    for request in server.requests:
        options = {name: value for name, value in request.body.items() if name != "messages"}
        assert options == {"model": "gpt-3.5-turbo", "temperature": 1.0, "top_p": 0.1, "max_tokens": 512}
        assert request.key == KEY
    row = dict(zip(ROW_KEYS, ("1", caption, *answers), strict=True))
    assert lines(tmp_path / "rows.jsonl") == [row]
    assert not (tmp_path / "rows.failed.jsonl").exists()


def test_flags_reach_the_request(tmp_path):
    with Server() as server:
        args = write_captions(tmp_path, 1)
        run(*args, "--endpoint", server.url + "/", "--model", "llama", "--temperature", 0, "--top-p", 0.9,
            "--max-tokens", 64, key=None, cwd=tmp_path)
    options = {name: value for name, value in server.requests[0].body.items() if name != "messages"}
    assert options == {"model": "llama", "temperature": 0, "top_p": 0.9, "max_tokens": 64}
    assert server.requests[0].key == ""


def test_captions_of_every_kind_come_through_whole(tmp_path):
    captions = ['a "quoted" word', "{braces} and {} {0}", "back\\slash \\n here", "a\ttab in it", "two\nlines here",
                "smile 😀 emoji", "собака бежит по траве", "狗 在 跑", "كلب يجري هنا", "half an emoji \ud83d here",
                "%s %d percent", "long " + "x" * 10_000, "carriage\r\nreturn here", "\u2028 line separator", "nul \0 byte"]
    with Server(lambda request: "снова 犬 😀 " + " ".join(request.source.split())) as server:
        rows = [{"image_id": f"a/{n}", "caption": caption, "url": n} for n, caption in enumerate(captions)]
        (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for _ in range(2):  # the second run finds them all there
            run("captions.jsonl", "--output", "rows.jsonl", server=server, cwd=tmp_path)
    found = {row["image_id"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().split("\n")[:-1])}
    assert len(server.requests) == 2 * len(captions)
    for n, caption in enumerate(captions):
        caption = caption.replace("\ud83d", "?")
        assert (found[f"a/{n}"]["caption"], found[f"a/{n}"]["url"]) == (caption, n)
        assert any(request.prompt == PROMPTS[0].replace("{}", caption, 1) for request in server.requests)


# ---------------------------------------------------------------- inputs


def test_inputs(tmp_path):
    """Every format, and standard input in each; captions of 2 to 15 words are kept, and the others counted."""
    (tmp_path / "a.txt").write_bytes("\ufeffa red dog\r\n\nword\ntwo words\n".encode() + b"w " * 16 + b"\nno end")
    (tmp_path / "ids.txt").write_text("x/1\nx/2\nx/3\nx/4\nx/5\nx/6\n")
    (tmp_path / "a.tsv").write_text('url\tfilepath\ttitle\nu\tt/1\t"5"" lamp ""new"""\nu\tt/2\t"Big" dog\nu\tt/3\t5" lamp\n\n')
    (tmp_path / "a.jsonl").write_text('{"image_id": "j/1", "caption": "a red dog", "width": 3}\n\n{"image_id": 2, "caption": "a cat"}\n')
    sample = {"json": b'{"caption": "from the json", "key": "1"}', "jpg": b"\xff\xd8" * 9000, "txt": b"from the txt"}
    keys = ("000000000", "000000012")
    members = {f"{key}.{kind}": data for key in keys for kind, data in sample.items()}
    del members["000000000.txt"]
    for shard in ("00000", "00001"):
        (tmp_path / f"{shard}.tar").write_bytes(tar(members))
    txt = {"1": "a red dog", "4": "two words", "6": "no end"}
    ids = {f"x/{number}": caption for number, caption in txt.items()}
    tsv = {"t/1": '5" lamp "new"', "t/2": '"Big" dog', "t/3": '5" lamp'}
    jsonl = {"j/1": "a red dog", "2": "a cat"}
    tars = {f"{shard}/{key}": f"from the {kind}" for shard in ("00000", "00001") for key, kind in zip(keys, ("json", "txt"))}
    cases = [(["a.txt"], "", txt), (["a.txt", "--ids", "ids.txt"], "", ids), (["a.tsv"], "", tsv), (["a.jsonl"], "", jsonl),
             (["*.tar"], "", tars), (["a.tsv", "0*.tar", "a.jsonl"], "", tsv | tars | jsonl), (["-"], "a.txt", txt),
             (["-", "--ids", "ids.txt"], "a.txt", ids), (["-"], "a.tsv", tsv), (["-", "a.tsv"], "a.jsonl", tsv | jsonl)]
    with Server() as server:
        for n, (inputs, stdin, expected) in enumerate(cases):
            text = (tmp_path / stdin).read_text() if stdin else ""
            done = run(*inputs, "--output", f"{n}.jsonl", stdin=text, server=server, cwd=tmp_path)
            assert {row["image_id"]: row["caption"] for row in lines(tmp_path / f"{n}.jsonl")} == expected, inputs
            if inputs == ["a.txt"]:
                assert "3 captions kept, 2 too short, 1 too long" in done.out
    assert {row["image_id"]: row.get("width") for row in lines(tmp_path / "3.jsonl")} == {"j/1": 3, "2": None}  # rows in any order


BAD_INPUTS = {  # the files, the arguments beside --output, what the one line of error must name
    "no file": ({}, ["none.txt"], ["none.txt"]),
    "suffix": ({"a.csv": "x"}, ["a.csv"], ["a.csv", ".tsv"]),
    "not UTF-8": ({"a.txt": b"a dog\n\xff\xfe dog\n"}, ["a.txt"], ["a.txt:2", "UTF-8"]),
    "header": ({"a.tsv": "x\ty\n1\t2\n"}, ["a.tsv"], ["a.tsv:1", "filepath", "title"]),
    "columns": ({"a.tsv": "filepath\ttitle\n1\ta dog\n2\n"}, ["a.tsv"], ["a.tsv:3", "column"]),
    "not JSON": ({"a.jsonl": '{"image_id": "1", "caption": "a dog"}\n{\n'}, ["a.jsonl"], ["a.jsonl:2", "JSON"]),
    "not an object": ({"a.jsonl": "[1]\n"}, ["a.jsonl"], ["a.jsonl:1", "image_id"]),
    "no caption": ({"a.jsonl": '{"image_id": "1"}\n'}, ["a.jsonl"], ["a.jsonl:1", "caption"]),
    "id out of the root": ({"a.jsonl": '{"image_id": "../1", "caption": "a dog"}\n'}, ["a.jsonl"], ["a.jsonl:1", "../1"]),
    "blank id": ({"a.jsonl": '{"image_id": " ", "caption": "a dog"}\n'}, ["a.jsonl"], ["a.jsonl:1", "image_id"]),
    "short ids": ({"a.txt": "a dog\na cat\n", "i": "1\n"}, ["a.txt", "--ids", "i"], ["a.txt:2", "image_id"]),
    "long ids": ({"a.txt": "a dog\n", "i": "1\n2\n"}, ["a.txt", "--ids", "i"], ["--ids", "a.txt"]),
    "ids of a tsv": ({"a.tsv": "filepath\ttitle\n1\ta dog\n", "i": "1\n"}, ["a.tsv", "--ids", "i"], ["--ids"]),
    "not a tar": ({"a.tar": b"x" * 2000}, ["a.tar"], ["a.tar"]),
    "cut tar": ({"a.tar": tar({"1.txt": b"a dog", "2.jpg": b"x" * 20_000})[:9000]}, ["a.tar"], ["a.tar", "damaged"]),
    "nothing kept": ({"a.txt": "dog\n" + "w " * 20 + "\n"}, ["a.txt"], ["a.txt", "1 too short", "1 too long"]),
    "empty": ({"a.txt": ""}, ["a.txt"], ["a.txt"]),
    "twice in a file": ({"a.tsv": "filepath\ttitle\n1\ta dog\n2\tb dog\n1\tc dog\n"}, ["a.tsv"], ["a.tsv:2", "a.tsv:4"]),
    "twice in two": ({"a.txt": "a dog\n", "b.txt": "a cat\n"}, ["a.txt", "b.txt"], ["a.txt:1", "b.txt:1"]),
    "shard": ({"a.txt": "a dog\n"}, ["a.txt", "--shard", "2/2"], ["--shard"]),
    "shard's form": ({"a.txt": "a dog\n"}, ["a.txt", "--shard", "1"], ["--shard"]),
    "no workers": ({"a.txt": "a dog\n"}, ["a.txt", "--concurrency", "0"], ["--concurrency"]),
    "negative": ({"a.txt": "a dog\n"}, ["a.txt", "--max-retries", "-1"], ["--max-retries"]),
    "unknown flag": ({"a.txt": "a dog\n"}, ["a.txt", "--retries", "1"], ["--retries"]),
    "endpoint": ({"a.txt": "a dog\n"}, ["a.txt", "--endpoint", "localhost:8000"], ["--endpoint"]),
    "key in the URL": ({"a.txt": "a dog\n"}, ["a.txt", "--endpoint", f"http://u:{KEY}@localhost/v1"], ["--endpoint"]),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line_before_the_first_call(tmp_path, case):
    files, args, names = BAD_INPUTS[case]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with Server() as server:
        done = run(*args, "--output", "rows.jsonl", code=2, server=server, cwd=tmp_path)
    assert len(done.err.splitlines()) == 1
    assert all(name in done.err for name in names), done.err
    assert not server.requests
    assert not lines(tmp_path / "rows.jsonl")


# ---------------------------------------------------------------- answers


def test_tidy():
    for said, text in {
        " A dog runs.\n": "A dog runs.", '"A dog runs."': "A dog runs.", "“A dog”": "A dog", "'A man's dog'": "A man's dog",
        "Paraphrase: A dog": "A dog", "**Paraphrased caption:** A dog": "A dog", 'Paraphrase:\n"A dog"': "A dog",
        '"Paraphrase: A dog"': "A dog", "Here is a paraphrase: A dog": "A dog", '"Big" dog and "Rex"': '"Big" dog and "Rex"',
        "«Собака бежит»": "Собака бежит", "Paraphrase of a poem": "Paraphrase of a poem", "'Big' and 'small'": "'Big' and 'small'",
        'Sure! Here\'s a paraphrase: "A dog"': "A dog", "Certainly! Here is the paraphrased text:\n\nA dog": "A dog",
        "Here is a concise paraphrase of the given caption: A dog": "A dog", "Here is a dog: Rex": "Here is a dog: Rex",
        "Here's a paraphrased version of the caption: A dog": "A dog", "Sure-footed goat": "Sure-footed goat",
        "Caption: the film": "Caption: the film", '""': "", "": "", '"': '"', "a dog's": "a dog's",
    }.items():  # fmt: skip
        assert tidy(said) == text


def test_fault():
    source = "a red dog runs"
    for answer in ("I'm sorry, but I can't help with that.", "I’m sorry", "As an AI language model, I", "I cannot assist with",
                   "Sorry, I can't", "I apologize, but", "", "two\nlines", "a red\u2028dog", "A red dog runs!", "A RED dog - runs"):  # fmt: skip
        assert fault(answer, source, "stop", may_echo=False), answer
    for answer in ("A crimson hound sprints", "I can see a dog", "Sorry dog", "Красная собака", "红狗", "I'm a dog"):
        assert not fault(answer, source, "stop", may_echo=False), answer
    assert not fault("A red dog runs.", source, "stop", may_echo=True)
    assert not fault("I'm sorry, a song", "I'm sorry by Brenda Lee", "stop", may_echo=False)
    assert fault("A hound", source, "length", may_echo=False) and fault("A hound", source, "content_filter", may_echo=False)


def chat(**choice):
    return Reply(body=json.dumps({"choices": [choice]}).encode())


BAD_ANSWERS = {  # by the caption's last word: the answer, and what the reason must name
    "refusal": (Reply("I'm sorry, but as an AI I can't."), "refusal"),
    "blank": (Reply(" \n"), "empty"),
    "null": (Reply(None), "empty"),
    "length": (Reply("a cut", "length"), "length"),
    "filter": (Reply("a dog", "content_filter"), "content_filter"),
    "many": (Reply("one dog\nanother dog"), "more than one line"),
    "html": (Reply(body=b"<html>oops"), "completion"),
    "list": (Reply(body=b"[]"), "completion"),
    "error": (Reply(body=b'{"error": {"message": "overloaded"}}'), "overloaded"),
    "nochoice": (Reply(body=b'{"choices": []}'), "completion"),
    "textless": (chat(message=None), "completion"),
    "parts": (chat(message={"content": [{"text": "x"}]}), "completion"),
}


def test_bad_answers_are_asked_again_and_then_fail_alone(tmp_path):
    """Each kind three times and then right; and each kind always, which step 2 never sees. Echoes are a fault in step 2 only."""
    asked = {}

    def answer(request):
        _, often, kind = request.source.lower().strip(".").split()[-3:]
        asked[request.prompt] = asked.get(request.prompt, 0) + 1
        if kind == "echo":
            return request.source.upper() + "."
        bad = request.step == 1 and (often == "always" or asked[request.prompt] <= 3)
        return BAD_ANSWERS[kind][0] if bad else reword(request)

    captions = [f"dog {often} {kind}" for often in ("thrice", "always") for kind in [*BAD_ANSWERS, "echo"]]
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    with Server(answer) as server:
        done = run("captions.txt", "--output", "rows.jsonl", server=server, cwd=tmp_path, code=1)
    rows, failed = lines(tmp_path / "rows.jsonl"), lines(tmp_path / "rows.failed.jsonl")
    assert {row["caption"] for row in rows} == {f"dog thrice {kind}" for kind in BAD_ANSWERS}
    assert {row["caption"] for row in failed} == set(captions) - {row["caption"] for row in rows}
    for row in failed:
        kind = row["caption"].split()[-1]
        assert (BAD_ANSWERS[kind][1] if kind != "echo" else "echo") in row["reason"], row
        assert row["attempts"] == (5 if kind == "echo" else 4)
    assert not any("always" in r.source and r.step == 2 and "ECHO" not in r.source for r in server.requests)
    assert f"{len(failed)} captions have failed" in done.out and "--retry-failed" in done.out


def test_retry_failed_takes_just_those(tmp_path):
    args = write_captions(tmp_path, 6)
    with Server(lambda request: "I'm sorry" if request.source[-1] in "246" else reword(request)) as server:
        run(*args, "--limit", 4, server=server, cwd=tmp_path, code=1)
        calls = server.count
        run(*args, "--limit", 4, server=server, cwd=tmp_path, code=1)  # nothing is asked twice by itself
        assert server.count == calls
    with Server(lambda request: "I'm sorry" if request.source[-1] in "4" else reword(request)) as server:
        run(*args, "--retry-failed", server=server, cwd=tmp_path, code=1)
        assert {request.source.split()[-1] for request in server.requests} == {"2", "4"}
    assert [row["image_id"] for row in lines(tmp_path / "rows.failed.jsonl")] == ["4"]
    with Server() as server:
        run(*args, server=server, cwd=tmp_path, code=1)  # 5 and 6; 4 is still failed
        run(*args, "--retry-failed", server=server, cwd=tmp_path)
        assert server.count == 6
    assert not (tmp_path / "rows.failed.jsonl").exists()
    assert sorted(row["image_id"] for row in lines(tmp_path / "rows.jsonl")) == list("123456")
    assert all(set(row) == set(ROW_KEYS) for row in lines(tmp_path / "rows.jsonl"))


# ---------------------------------------------------------------- a server in trouble


def test_transient_failures_are_tried_again(tmp_path):
    troubles = [Reply(status=status, body=b"busy") for status in (500, 502, 503, 504, 408, 409, 429)]
    troubles += [Reply("x" * 999, reset=True), Reply("late", delay=3)]
    seen = set()

    def answer(request):
        if request.prompt in seen or request.step == 2:
            return reword(request)
        seen.add(request.prompt)
        return troubles[int(request.source.split()[-1]) - 1]

    with Server(answer) as server:
        args = write_captions(tmp_path, len(troubles))
        run(*args, "--timeout", 1, "--concurrency", 3, server=server, jitter=0.01, cwd=tmp_path)
    assert len(lines(tmp_path / "rows.jsonl")) == len(troubles)
    assert server.count == 3 * len(troubles)


def test_what_lasts_fails_alone(tmp_path):
    """After --max-retries for a server's fault, at once for the request's own (4xx)."""
    statuses = {"1": 500, "2": 400, "3": 422}

    def answer(request):
        status = statuses.get(request.source.split()[-1])
        return Reply(status=status, body=f"no {KEY} good".encode()) if status else reword(request)

    with Server(answer) as server:
        args = write_captions(tmp_path, 4)
        run(*args, "--max-retries", 2, server=server, jitter=0.01, cwd=tmp_path, code=1)
    failed = {row["image_id"]: row for row in lines(tmp_path / "rows.failed.jsonl")}
    assert {image_id: row["attempts"] for image_id, row in failed.items()} == {"1": 3, "2": 1, "3": 1}
    assert all(str(status) in failed[image_id]["reason"] for image_id, status in statuses.items())
    assert KEY not in (tmp_path / "rows.failed.jsonl").read_text()
    assert [row["image_id"] for row in lines(tmp_path / "rows.jsonl")] == ["4"]


@pytest.mark.parametrize("kind", ["seconds", "date", "503", "none", "paced"])
def test_nobody_sends_in_a_pause(tmp_path, kind):
    """One 429 (or a 503 with Retry-After) holds back all workers; without Retry-After for the back-off that it draws."""
    pause = {}

    def answer(request):
        if request.number != 10:
            return Reply(reword(request).content, delay=0.02)
        pause["from"] = time.monotonic()
        until = email.utils.formatdate(time.time() + 3, usegmt=True)  # whole seconds: 2 to 3 from now
        headers = {"none": {}, "date": {"Retry-After": until}}.get(kind, {"Retry-After": "2"})
        return Reply(status=503 if kind == "503" else 429, headers=headers, body=b"slow down")

    with Server(answer) as server:
        pace = ["--requests-per-minute", 600] if kind == "paced" else []  # whoever waits for his turn must stop too
        run(*write_captions(tmp_path, 20), "--concurrency", 8, *pace, server=server, jitter=1, cwd=tmp_path)
    length = 1 if kind == "none" else 2
    sent = [request.time - pause["from"] for request in server.requests if request.time > pause["from"]]
    assert not [t for t in sent if 0.3 < t < length - 0.05], sent  # 0.3: the 429 itself is on its way
    assert len([t for t in sent if t >= length - 0.05]) > 15
    assert len(lines(tmp_path / "rows.jsonl")) == 20


def test_retry_after():
    assert (retry_after("7"), retry_after("0.5"), retry_after("-3"), retry_after("nan")) == (7, 0.5, 0, 0)
    assert retry_after("inf") == 86400 and retry_after(None) is retry_after("soon") is None
    assert 25 < retry_after(email.utils.formatdate(time.time() + 30, usegmt=True)) <= 30
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_a_rate_limit_fails_no_row(tmp_path):
    """429s that others get through cost a caption no try, however few it has."""
    taken = []

    def answer(request):
        taken[:] = [t for t in taken if t > time.monotonic() - 0.2]
        if len(taken) >= 4:
            return Reply(status=429, body=b"rate limit")
        taken.append(time.monotonic())
        return reword(request)

    with Server(answer) as server:
        run(*write_captions(tmp_path, 30), "--max-retries", 2, "--concurrency", 16, server=server, jitter=0.1, cwd=tmp_path)
    assert server.count > 60
    assert len(lines(tmp_path / "rows.jsonl")) == 30


def test_the_endpoint_is_fully_used(tmp_path):
    """--concurrency calls are in flight at once, each worker on one connection that is kept."""
    with Server(lambda request: Reply(reword(request).content, delay=0.2)) as server:
        run(*write_captions(tmp_path, 120), "--concurrency", 40, server=server, cwd=tmp_path)
    times = [request.time for request in server.requests]
    assert max(sum(0 <= t - first < 0.19 for t in times) for first in times) == 40
    assert server.connections <= 40


def test_requests_per_minute(tmp_path):
    with Server() as server:
        run(*write_captions(tmp_path, 15), "--requests-per-minute", 600, server=server, cwd=tmp_path)
    times = [request.time for request in server.requests]
    assert 2.8 < times[-1] - times[0]  # 30 calls, a tenth of a second apart
    assert all(times[n + 10] - times[n] > 0.8 for n in range(20))


FATAL = {
    401: Reply(status=401, body=f"Incorrect API key provided: {KEY}".encode()),
    402: Reply(status=402, body=b"Insufficient Balance"),
    403: Reply(status=403, body=f'{{"error": "{KEY} may not"}}'.encode()),
    404: Reply(status=404, body=b"The model does not exist"),
    429: Reply(status=429, headers={"Retry-After": "60"}, body=b'{"error": {"code": "insufficient_quota"}}'),
    307: Reply(status=307, headers={"Location": "http://127.0.0.1:9/"}),
}


@pytest.mark.parametrize("status", FATAL)
def test_fatal_answers_stop_the_job_at_once(tmp_path, status):
    with Server(lambda request: reword(request) if request.number < 20 else FATAL[status]) as server:
        done = run(*write_captions(tmp_path, 500), "--concurrency", 4, server=server, cwd=tmp_path, code=2, timeout=20)
        assert server.count < 40
        assert "error: " in done.error and f"HTTP {status}" in done.error
        rows = lines(tmp_path / "rows.jsonl")
        assert 6 <= len(rows) <= 10 and not lines(tmp_path / "rows.failed.jsonl")
        assert not any(KEY in path.read_text() for path in tmp_path.iterdir())
        server.answer = reword
        run("captions.txt", "--output", "rows.jsonl", server=server, cwd=tmp_path)
    assert len(lines(tmp_path / "rows.jsonl")) == 500
    assert lines(tmp_path / "rows.jsonl")[: len(rows)] == rows


def test_the_key_shows_nowhere(tmp_path):
    """run() looks for it in all that it prints; here in --help, as a key that no header can hold, and in odd answers."""
    assert "Appendix A" in run("--help").out
    args = write_captions(tmp_path, 2)
    for key in (f"{KEY}\n{KEY}", f"{KEY} \u20ac", f"{KEY}\t{KEY}"):
        with Server() as server:
            assert "OPENAI_API_KEY" in run(*args, key=key, server=server, code=2, cwd=tmp_path).error
    with Server(lambda request: f"my key is {KEY} and {request.step}") as server:
        run(*args, key=f" {KEY}\n", server=server, cwd=tmp_path)
        assert server.requests[0].key == KEY
    assert len(lines(tmp_path / "rows.jsonl")) == 2
    assert KEY not in (tmp_path / "rows.jsonl").read_text()
    done = run(*args, key=None, code=2, cwd=tmp_path)  # OpenAI's own endpoint, and no key
    assert "OPENAI_API_KEY" in done.error and len(done.err.splitlines()) == 1


def test_a_broken_endpoint_does_not_use_up_the_captions(tmp_path):
    with Server(lambda request: Reply(status=400, body=b"max_tokens is not supported")) as server:
        done = run(*write_captions(tmp_path, 3000), server=server, cwd=tmp_path, code=2)
    assert "100 captions failed" in done.error and "max_tokens is not supported" in done.error
    assert 100 <= len(lines(tmp_path / "rows.failed.jsonl")) < 200


def test_a_server_that_is_not_there_uses_up_no_caption(tmp_path):
    with Server() as server:
        pass  # its port is free again
    done = run(*write_captions(tmp_path, 5), "--max-retries", 1, server=server, cwd=tmp_path, code=2, jitter=0.01)
    assert "Connection refused" in done.error and not lines(tmp_path / "rows.failed.jsonl")


def test_two_step_as_a_function(monkeypatch):
    with Server() as server:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        endpoint = Endpoint(Config(captions=["captions.txt"], output="rows.jsonl", endpoint=server.url))
        first, second = two_step("a small dog", endpoint.ask)
        assert [request.source for request in server.requests] == ["a small dog", first] and second not in ("", first)


# ---------------------------------------------------------------- being stopped, and going on


def test_twenty_kills(tmp_path):
    """kill -9 at 20 random moments: every caption once, and no calls but the needed and those of rows in flight."""
    number, workers, kills = 2000, 8, 20
    args = (*write_captions(tmp_path, number), "--concurrency", workers)
    with Server(lambda request: Reply(reword(request).content, delay=0.01)) as server:
        for seed in range(kills):
            process = start(*args, server=server, cwd=tmp_path)
            goal = server.count + random.Random(seed).choice([0, random.Random(seed).randrange(1, 250)])
            while server.count < goal and process.poll() is None:
                time.sleep(0.001)
            time.sleep(random.Random(-seed).random() * 0.05)
            assert process.poll() is None
            process.kill()
            process.communicate()
        killed = len(lines(tmp_path / "rows.jsonl")[:-1])
        run(*args, server=server, cwd=tmp_path)
    rows = lines(tmp_path / "rows.jsonl")
    assert 200 < killed < number
    assert sorted(int(row["image_id"]) for row in rows) == list(range(1, number + 1))
    for row in rows:
        assert row["caption"] == f"a small dog number {row['image_id']}"
        assert row["paraphrase_2"] == f"in other words plainly {row['caption']}"
    assert 2 * number <= server.count <= 2 * number + kills * workers * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c(tmp_path, number):
    """Calls in flight land, both steps of them; nobody starts a new row, or sits out a pause."""
    with Server(lambda request: Reply(reword(request).content, delay=0.5)) as server:
        args = (*write_captions(tmp_path, 100), "--concurrency", 5)
        process = start(*args, server=server, cwd=tmp_path)
        while server.count < 7:
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 130 and "Traceback" not in err
        assert re.split(r"[\r\n]", err.rstrip())[-1].startswith("stopped: ")
        rows = lines(tmp_path / "rows.jsonl")
        assert len(rows) == 5 and server.count == 10
        server.answer = lambda request: Reply(status=429, headers={"Retry-After": "60"})
        process = start(*args, server=server, cwd=tmp_path)
        while server.count < 11:
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=5)
        assert process.returncode == 130
        server.answer = reword
        run(*args, server=server, cwd=tmp_path)
    assert sorted(int(row["image_id"]) for row in lines(tmp_path / "rows.jsonl")) == list(range(1, 101))
    assert server.count <= 10 + 5 + 190  # of the paused five, at most


def test_a_torn_last_line_is_cut_off(tmp_path):
    with Server() as server:
        args = write_captions(tmp_path, 5)
        run(*args, server=server, cwd=tmp_path)
        whole = (tmp_path / "rows.jsonl").read_bytes()
        (tmp_path / "rows.jsonl").write_bytes(whole[:-7])
        run(*args, server=server, cwd=tmp_path)
    assert server.count == 12
    assert sorted((tmp_path / "rows.jsonl").read_bytes().splitlines()) == sorted(whole.splitlines())


def test_an_output_of_another_job_is_left_alone(tmp_path):
    with Server() as server:
        args = write_captions(tmp_path, 4)
        run(*args, server=server, cwd=tmp_path)
        rows, count = (tmp_path / "rows.jsonl").read_bytes(), server.count
        (tmp_path / "other.tsv").write_text("filepath\ttitle\nx/1\ta red cat\n")
        (tmp_path / "fewer.txt").write_text("a small dog number 1\n")
        (tmp_path / "edited.txt").write_text("another dog\n" + (tmp_path / "captions.txt").read_text())
        (tmp_path / "prose.txt").write_text("Dear all,\nkeep this")
        for captions, output, name in (("other.tsv", "rows.jsonl", "4 rows"), ("fewer.txt", "rows.jsonl", "3 rows"),
                                       ("edited.txt", "rows.jsonl", 'image_id "1"'), ("captions.txt", "prose.txt", "prose.txt"),
                                       ("captions.txt", "captions.txt", "captions.txt"), ("captions.txt", ".", "."),
                                       ("captions.txt", "/dev/full", "/dev/full")):
            done = run(captions, "--output", output, server=server, cwd=tmp_path, code=2)
            assert name in done.error and len(done.err.splitlines()) == 1
        assert "rows.jsonl" in run("captions.txt", "--output", "rows.jsonl", "--shard", "0/2", server=server, cwd=tmp_path, code=2).error
    assert (tmp_path / "rows.jsonl").read_bytes() == rows and server.count == count
    assert (tmp_path / "prose.txt").read_text() == "Dear all,\nkeep this"


def test_two_processes_on_one_output(tmp_path):
    with Server(lambda request: Reply(reword(request).content, delay=1)) as server:
        args = write_captions(tmp_path, 3)
        first = start(*args, server=server, cwd=tmp_path)
        while not server.count:
            time.sleep(0.01)
        second = run(*args, server=server, cwd=tmp_path, code=2)
        assert "rows.jsonl" in second.error and "another" in second.error and len(second.err.splitlines()) == 1
        first.communicate(timeout=30)
    assert first.returncode == 0 and len(lines(tmp_path / "rows.jsonl")) == 3


def test_a_full_disk(tmp_path):
    """A file-size limit stands in for the disk: one line, whole rows only, and the job goes on when there is room."""
    with Server() as server:
        args = write_captions(tmp_path, 200)
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
        done = run(*args, server=server, cwd=tmp_path, code=2, preexec_fn=limit)
        assert "rows.jsonl: " in done.error and "error" in done.error
        rows = lines(tmp_path / "rows.jsonl")
        assert 30 < len(rows) < 100
        run(*args, server=server, cwd=tmp_path)
    assert sorted(int(row["image_id"]) for row in lines(tmp_path / "rows.jsonl")) == list(range(1, 201))
    assert lines(tmp_path / "rows.jsonl")[: len(rows)] == rows


# ---------------------------------------------------------------- sharing a job, and what comes after it


def test_shards_and_limit(tmp_path):
    captions = "".join(f"dog {'is number' if n % 3 else ''} {n}\n" for n in range(30)) + "word\n" * 5
    (tmp_path / "captions.txt").write_text(captions)
    found = []
    with Server() as server:
        for n in range(3):
            for limit in (2, 0):
                run("captions.txt", "--output", f"{n}.jsonl", "--shard", f"{n}/3", "--limit", limit, server=server, cwd=tmp_path)
                if limit:
                    assert len(lines(tmp_path / f"{n}.jsonl")) == 2
            found.append([row["image_id"] for row in lines(tmp_path / f"{n}.jsonl")])
        assert server.count == 60
        assert [len(part) for part in found] == [10, 10, 10]
        assert sorted(map(int, [n for part in found for n in part])) == list(range(1, 31))
        run("captions.txt", "--output", "0.jsonl", "--shard", "0/3", "--limit", 1, server=server, cwd=tmp_path)
        assert server.count == 60


def test_export_chat(tmp_path):
    with Server() as server:
        run(*write_captions(tmp_path, 2), "--concurrency", 1, server=server, cwd=tmp_path)
    rows = (tmp_path / "rows.jsonl").read_bytes()
    run("rows.jsonl", "--export-chat", "train.jsonl", key=None, cwd=tmp_path)
    caption = "a small dog number 1"
    assert len(lines(tmp_path / "train.jsonl")) == 4
    assert lines(tmp_path / "train.jsonl")[:2] == [
        {"messages": [{"role": "user", "content": PROMPTS[0].format(caption)},
                      {"role": "assistant", "content": f"plainly {caption}"}]},
        {"messages": [{"role": "user", "content": PROMPTS[1].format(f"plainly {caption}")},
                      {"role": "assistant", "content": f"in other words plainly {caption}"}]},
    ]  # fmt: skip
    (tmp_path / "bad.jsonl").write_text('{"image_id": "1", "caption": "a dog"}\n')
    train = (tmp_path / "train.jsonl").read_bytes()
    for args, name in ((["bad.jsonl", "--export-chat", "train.jsonl"], "bad.jsonl:1"), (["rows.jsonl"], "--output"),
                       (["rows.jsonl", "--export-chat", "rows.jsonl"], "rows.jsonl"),
                       (["rows.jsonl", "--export-chat", "t.jsonl", "--output", "o.jsonl"], "--output")):
        assert name in run(*args, key=None, code=2, cwd=tmp_path).error
    assert (tmp_path / "train.jsonl").read_bytes() == train and (tmp_path / "rows.jsonl").read_bytes() == rows


def test_the_bar_shows_rate_tokens_failures_and_cost(tmp_path):
    with Server() as server:
        done = run(*write_captions(tmp_path, 10), "--price-in", 1000, "--price-out", 10_000, server=server, cwd=tmp_path)
    # 20 calls of 30 tokens sent and 10 answered
    assert re.search(r"10/10 .*rows/s, 800 tokens, \$2.60 of about \$2.60, 0 failed", done.err)
