"""generate.py as its users run it: a process of its own against a real HTTP server on loopback."""

import csv
import email.utils
import gzip
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, tar
from openai_server import Reply, Server, reword

from generate import PROMPTS, ROW_KEYS, fault, tidy

SCRIPT = ROOT / "generate.py"
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

def run(*args, code=0, timeout=60, **options):
    """The finished process; its exit code must be `code`, and neither a traceback nor the key may show."""
    process = start(*args, **options)
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    assert KEY not in out + err
    process.out, process.err = out, err
    process.error = re.split(r"[\r\n]", err.rstrip())[-1]  # the last line of stderr
    return process

def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

def write_captions(folder, number, words="a small dog number {}"):
    (folder / "captions.txt").write_text("".join(words.format(n) + "\n" for n in range(1, number + 1)))
    return "captions.txt", "--output", "rows.jsonl"

# ---------------------------------------------------------------- the method
def test_two_steps_with_the_papers_prompts_and_parameters(tmp_path):
    """Section 2.1 and Appendix A, as they go over the wire; the output's folder is made."""
    assert PROMPTS == (
        'Paraphrase the given caption "{}" concisely while preserving the meaning.',
        'Paraphrase the given text "{}" concisely while preserving the meaning and avoiding use of existing words.',
    )
    caption, *answers = "Boys REVERSIBLE jacket, SKU#1234.jpg", "Reversible jacket for boys", "Boys' coat that can be flipped"
    (tmp_path / "captions.txt").write_text(caption + "\n")
    with Server(lambda request: answers[request.number]) as server:
        prices = ("--price-in", 1000, "--price-out", 10_000)
        done = run("captions.txt", "--output", "new/rows.jsonl", *prices, server=server, cwd=tmp_path)
    for request, prompt, source in zip(server.requests, PROMPTS, (caption, answers[0]), strict=True):
        assert request.body == {"model": "gpt-4o-mini", "temperature": 1.0, "top_p": 0.1, "max_tokens": 512,
                                "messages": [{"role": "user", "content": prompt.replace("{}", source)}]}
        assert request.key == KEY
    assert lines(tmp_path / "new" / "rows.jsonl") == [dict(zip(ROW_KEYS, ("1", caption, *answers), strict=True))]
    # 2 calls of 30 tokens sent and 10 answered
    assert re.search(r"1/1 .*rows/s, 80 tokens, \$0.26 of about \$0.26, 0 failed", done.err)

def test_flags_reach_the_request(tmp_path):
    sampling = ("max_completion_tokens=2048", "reasoning_effort=minimal", "stop=[\"\\n\"]", "seed=7")
    with Server() as server:
        args = write_captions(tmp_path, 1)
        run(*args, "--endpoint", server.url + "/", "--model", "llama", "--sampling", *sampling, key=None, cwd=tmp_path)
    request = server.requests[0]
    assert request.key == "" and request.body == {
        "model": "llama", "max_completion_tokens": 2048, "reasoning_effort": "minimal", "stop": ["\n"], "seed": 7,
        "messages": request.body["messages"]}

def test_captions_of_every_kind_come_through_whole(tmp_path):
    captions = ['a "quoted" word', "{braces} and {} {0}", "back\\slash \\n here", "a\ttab in it", "two\nlines here",
                "smile 😀 emoji", "собака бежит по траве", "狗 在 跑", "كلب يجري هنا", "half an emoji \ud83d here",
                "%s %d percent", "long " + "x" * 10_000, "carriage\r\nreturn here", "\u2028 line separator", "nul \0 byte"]
    with Server(lambda request: "снова 犬 😀 " + " ".join(request.source.split())) as server:
        rows = [{"index": n, "image_id": f"a/{n}", "caption": caption} for n, caption in enumerate(captions)]
        (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for _ in range(2):  # the second run finds them all there
            run("captions.jsonl", "--output", "rows.jsonl", server=server, cwd=tmp_path)
    found = {row["image_id"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().split("\n")[:-1])}
    assert len(server.requests) == 2 * len(captions)
    for n, caption in enumerate(captions):
        caption = caption.replace("\ud83d", "?")
        assert found[f"a/{n}"].items() >= {"caption": caption, "index": n}.items()
        assert any(request.prompt == PROMPTS[0].replace("{}", caption, 1) for request in server.requests)

# ---------------------------------------------------------------- inputs
def test_inputs(tmp_path):
    """Every format; captions of 2 to 15 words are kept, and the others counted; a quote swallows neither line nor quote."""
    (tmp_path / "a.txt").write_bytes("\ufeffa red dog\r\n\nword\ntwo words\n".encode() + b"w " * 16 + b"\nno end")
    (tmp_path / "a.tsv").write_text('url\tfilepath\ttitle\nu\tt/1\t"5"" lamp ""new"""\nu\tt/2\t"Big" dog\nu\tt/3\t5" lamp\n\n'
                                    'u\tt/4\t"never closed\nu\tt/5\t"a\ttab"\nu\tt/6\tclosed here"\n')
    (tmp_path / "a.jsonl").write_text('{"image_id": "j/1", "caption": "a red dog"}\n\n{"image_id": 2, "caption": "a cat"}\n')
    sample = {"json": b'{"caption": "from the json", "key": "1"}', "jpg": b"\xff\xd8" * 9000, "txt": b"from the txt\n"}
    members = {f"{key}.{kind}": data for key in ("0000", "./b/c/0012") for kind, data in sample.items()}
    del members["0000.txt"]
    for shard in ("00000", "00001"):
        (tmp_path / f"{shard}.tar").write_bytes(tar(members))
    txt = {"1": "a red dog", "4": "two words", "6": "no end"}
    tsv = {"t/1": '5" lamp "new"', "t/2": '"Big" dog', "t/3": '5" lamp', "t/4": '"never closed', "t/5": "a\ttab", "t/6": 'closed here"'}
    jsonl = {"j/1": "a red dog", "2": "a cat"}
    tars = {f"{shard}/{key}": f"from the {kind}" for shard in ("00000", "00001") for key, kind in (("0000", "json"), ("b/c/0012", "txt"))}
    cases = [(["a.txt"], txt), (["a.tsv"], tsv), (["a.jsonl"], jsonl), (["*.tar"], tars),
             (["a.tsv", "0*.tar", "a.jsonl"], tsv | tars | jsonl)]
    with Server() as server:
        for n, (inputs, expected) in enumerate(cases):
            done = run(*inputs, "--output", f"{n}.jsonl", server=server, cwd=tmp_path)
            assert {row["image_id"]: row["caption"] for row in lines(tmp_path / f"{n}.jsonl")} == expected, inputs
            assert inputs != ["a.txt"] or "3 captions kept, 2 left out" in done.out
        (tmp_path / "blank.tsv").write_text("filepath\ttitle\n1\t \n2\tdog\n")
        run("blank.tsv", "--min-words", 0, "--output", "blank.jsonl", server=server, cwd=tmp_path)
    assert [row["image_id"] for row in lines(tmp_path / "blank.jsonl")] == ["2"]

SAMPLES = {f"{n}.txt": b"a dog no. %d" % n for n in range(50)}
HEADER = tar(SAMPLES)[:21 * 1024] + b"\xff" * 512 + tar(SAMPLES)[21 * 1024 + 512:]
BAD_INPUTS = {  # the files, the arguments beside --output, what the error's line must name
    "no file": ({}, ["none.txt"], ["none.txt"]),
    "suffix": ({"a.csv": "x"}, ["a.csv"], ["a.csv", ".tsv"]),
    "not UTF-8": ({"a.txt": b"a dog\n\xff\xfe dog\n"}, ["a.txt"], ["a.txt:2", "utf-8"]),
    "header": ({"a.tsv": "x\ty\n1\t2\n"}, ["a.tsv"], ["a.tsv:1", "filepath", "title"]),
    "columns": ({"a.tsv": "filepath\ttitle\n1\ta dog\n2\n"}, ["a.tsv"], ["a.tsv:3", "column"]),
    "not JSON": ({"a.jsonl": '{"image_id": "1", "caption": "a dog"}\n{\n'}, ["a.jsonl"], ["a.jsonl:2", "JSON"]),
    "id out of the root": ({"a.jsonl": '{"image_id": "../1", "caption": "a dog"}\n'}, ["a.jsonl"], ["a.jsonl:1", "image_id"]),
    "cut tar": ({"a.tar": tar({"1.txt": b"a dog", "2.jpg": b"x" * 20_000})[:9000]}, ["a.tar"], ["a.tar"]),
    "cut between two": ({"a.tar": tar(SAMPLES)[:21 * 1024]}, ["a.tar"], ["a.tar", "cut off"]),
    "damaged header": ({"a.tar": HEADER}, ["a.tar"], ["a.tar", "damaged"]),
    "nothing kept": ({"a.txt": "dog\n" + "w " * 20 + "\n"}, ["a.txt"], ["a.txt", "no caption"]),
    "twice in a file": ({"a.tsv": "filepath\ttitle\n1\ta dog\n2\tb dog\n1\tc dog\n"}, ["a.tsv"], ["a.tsv:2", "a.tsv:4"]),
    "shard": ({"a.txt": "a dog\n"}, ["a.txt", "--shard", "2/2"], ["--shard"]),
    "sampling": ({"a.txt": "a dog\n"}, ["a.txt", "--sampling", "seed"], ["--sampling"]),
    "unknown flag": ({"a.txt": "a dog\n"}, ["a.txt", "--retries", "1"], ["--retries"]),
    **{url: ({"a.txt": "a dog\n"}, ["a.txt", "--endpoint", url], ["--endpoint"]) for url in (
        "localhost:8000", f"http://u:{KEY}@localhost/v1", "http://[::1/v1", "http://a..b/v1", "http:///v1", "http://a b/v1")},
}

@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_said_before_the_first_call(tmp_path, case):
    files, args, names = BAD_INPUTS[case]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with Server() as server:
        done = run(*args, "--output", "rows.jsonl", code=2, server=server, cwd=tmp_path)
    assert all(name in done.error for name in names), done.err
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
        "Rephrased: A dog": "A dog", "Caption: A dog": "A dog", "Concise paraphrase: A dog": "A dog", '"A cat".': "A cat.",
        "**A cat**": "A cat", '""': "", "": "", '"': '"', "a dog's": "a dog's", "<think>a\nb</think>\n\nA dog": "A dog",
        "hm, a hound?</think>A dog": "A dog", "<think>hm": "<think>hm",
    }.items():  # fmt: skip
        assert tidy(said) == text

def test_fault():
    source = "a red dog runs"
    for answer in ("I'm sorry, but I can't help with that.", "I’m sorry", "As an AI language model, I", "I cannot assist with",
                   "Sorry, I can't", "I apologize, but", "", "two\nlines", "a red\u2028dog", "A red dog runs!", "A RED dog - runs",
                   "Sorry, but as an AI language model I cannot do that", "As a language model, I cannot", "N/A", "<think>hm",
                   "There is no caption provided to paraphrase.", "Could you please provide the caption?"):  # fmt: skip
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
    "thoughts": (Reply("<think>A dog, so a hound"), "thoughts"),
    "html": (Reply(body=b"<html>oops"), "completion"),
    "error": (Reply(body=b'{"error": {"message": "overloaded"}}'), "overloaded"),
    "nochoice": (Reply(body=b'{"choices": []}'), "completion"),
    "textless": (chat(message=None), "completion"),
    "parts": (chat(message={"content": [{"text": 7}]}), "completion"),
    "huge": (Reply(body=b" " * 2**21 + chat(message={"content": "a hound"}).body), "completion"),
    "bomb": (Reply(body=gzip.compress(bytes(2**28)), headers={"Content-Encoding": "gzip"}), "completion"),
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
        limit = lambda: resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))
        done = run("captions.txt", "--output", "rows.jsonl", "--concurrency", 4, server=server, cwd=tmp_path, code=1, preexec_fn=limit)
    rows, failed = lines(tmp_path / "rows.jsonl"), lines(tmp_path / "rows.failed.jsonl")
    assert {row["caption"] for row in rows} == {f"dog thrice {kind}" for kind in BAD_ANSWERS}
    assert {row["caption"] for row in failed} == set(captions) - {row["caption"] for row in rows}
    for row in failed:
        kind = row["caption"].split()[-1]
        assert (BAD_ANSWERS[kind][1] if kind != "echo" else "echo") in row["reason"], row
        assert asked[PROMPTS[0].format(row["caption"])] == (1 if kind == "echo" else 4)
    assert not any("always" in r.source and r.step == 2 and "ECHO" not in r.source for r in server.requests)
    assert f"{len(failed)} captions are without a row" in done.out and "--retry-failed" in done.out

def test_answers_of_reasoning_models(tmp_path):
    """Thoughts before the answer, beside it, and as a part of it, none of them in a row."""
    def answer(request):
        said = reword(request).content
        parts = [{"type": "thinking", "thinking": [{"text": "hmm"}]}, {"type": "text", "text": said}]
        contents = (f"<think>\nhmm\n</think>\n\n{said}", f"<think>hmm</think>{said}", parts, said)
        return chat(message={"content": contents[request.number % 4], "reasoning_content": "hmm"})
    with Server(answer) as server:
        run(*write_captions(tmp_path, 8), server=server, cwd=tmp_path)
    rows = lines(tmp_path / "rows.jsonl")
    assert [row["paraphrase_2"] for row in rows] == [f"in other words plainly {row['caption']}" for row in rows] != []

def test_retry_failed_takes_just_those(tmp_path):
    args, journal = write_captions(tmp_path, 6), tmp_path / "rows.failed.jsonl"
    with Server(lambda request: "I'm sorry" if request.source[-1] in "246" else reword(request)) as server:
        run(*args, "--limit", 4, server=server, cwd=tmp_path, code=1)
        calls = server.count
        run(*args, "--limit", 4, server=server, cwd=tmp_path, code=1)  # nothing is asked twice by itself
        assert server.count == calls
    journal.write_text(journal.read_text() + '{"image_id": "7')  # a line torn by a kill
    with Server(lambda request: "I'm sorry" if request.source[-1] in "4" else reword(request)) as server:
        run(*args, "--retry-failed", server=server, cwd=tmp_path, code=1)
        assert {request.source.split()[-1] for request in server.requests} == {"2", "4"}
    noted = [json.loads(line)["image_id"] for line in journal.read_text().split("\n")[:2]]
    assert sorted(noted) == ["2", "4"] and json.loads(journal.read_text().split("\n")[-2])["image_id"] == "4"
    with Server() as server:
        run(*args, server=server, cwd=tmp_path, code=1)  # 5 and 6; 4 is still failed
        run(*args, "--retry-failed", server=server, cwd=tmp_path)
        run(*args, "--retry-failed", server=server, cwd=tmp_path)
        assert server.count == 6
    assert sorted(row["image_id"] for row in lines(tmp_path / "rows.jsonl")) == list("123456")
    assert all(set(row) == set(ROW_KEYS) for row in lines(tmp_path / "rows.jsonl"))

# ---------------------------------------------------------------- a server in trouble
def test_transient_failures_are_tried_again(tmp_path):
    troubles = [Reply(status=status, body=b"busy") for status in (500, 502, 503, 504, 408, 409, 429)]
    for odd in ("soon", "1.5", "-1", "9" * 5000, "Wed, 21 Oct 99999999 07:28:00 GMT"):
        troubles.append(Reply(status=500, headers={"Retry-After": odd}))
    troubles += [Reply("x" * 999, reset=True), Reply("late", delay=3), Reply("trickled", trickle=0.3)]
    seen = set()
    def answer(request):
        if request.prompt in seen or request.step == 2:
            return reword(request)
        seen.add(request.prompt)
        return troubles[int(request.source.split()[-1]) - 1]
    with Server(answer) as server:
        args = write_captions(tmp_path, len(troubles))
        run(*args, "--timeout", 1, "--concurrency", 3, server=server, jitter=0.01, cwd=tmp_path, timeout=20)
    assert len(lines(tmp_path / "rows.jsonl")) == len(troubles) and server.count == 3 * len(troubles)

def test_what_lasts_fails_alone(tmp_path):
    """After --max-retries for a server's fault, at once for the request's own (4xx, or OpenRouter's flagged 403)."""
    flagged = "x requires moderation on y. Your input was flagged for z"
    bad = {"1": Reply(status=500, body=KEY.encode()), "2": error(400, message=KEY, code="content_filter", param="prompt"),
           "3": error(400, message="too long", param="messages", code="context_length_exceeded"), "4": Reply(status=422),
           "5": error(403, code=403, message=flagged)}
    with Server(lambda request: bad.get(request.source.split()[-1]) or reword(request)) as server:
        args = write_captions(tmp_path, 6)
        run(*args, "--max-retries", 2, "--concurrency", 1, server=server, jitter=0.01, cwd=tmp_path, code=1)
    failed = {row["image_id"]: row["reason"] for row in lines(tmp_path / "rows.failed.jsonl")}
    assert {image_id: int(reason.split()[1].strip(":")) for image_id, reason in failed.items()} == {
        image_id: reply.status for image_id, reply in bad.items()}
    assert server.count == 3 + 1 + 1 + 1 + 1 + 2
    assert KEY not in (tmp_path / "rows.failed.jsonl").read_text()
    assert [row["image_id"] for row in lines(tmp_path / "rows.jsonl")] == ["6"]

@pytest.mark.parametrize("kind", ["503", "date", "none", "paced"])
def test_nobody_sends_in_a_pause(tmp_path, kind):
    """One 429 (or a 503 with Retry-After) holds back all workers, and the bar says it; else for the back-off that it draws."""
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
        args = [*write_captions(tmp_path, 20), "--concurrency", 8, *pace]
        done = run(*args, server=server, jitter=1, cwd=tmp_path)
    length = 1 if kind == "none" else 2
    sent = [request.time - pause["from"] for request in server.requests if request.time > pause["from"]]
    assert not [t for t in sent if 0.3 < t < length - 0.05], sent  # 0.3: the 429 itself is on its way
    assert len([t for t in sent if t >= length - 0.05]) > 15
    assert len(lines(tmp_path / "rows.jsonl")) == 20 and "20/20" in done.err

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
    assert server.count > 60 and len(lines(tmp_path / "rows.jsonl")) == 30

def test_pace(tmp_path):
    """--concurrency calls are in flight at once, each worker on one connection that is kept; --requests-per-minute holds."""
    with Server(lambda request: Reply(reword(request).content, delay=0.2)) as server:
        run(*write_captions(tmp_path, 120), "--concurrency", 40, server=server, cwd=tmp_path)
    times = [request.time for request in server.requests]
    assert max(sum(0 <= t - first < 0.19 for t in times) for first in times) == 40
    assert server.connections <= 40
    with Server() as server:
        run("captions.txt", "--output", "b.jsonl", "--limit", 15, "--requests-per-minute", 600, server=server, cwd=tmp_path)
    times = [request.time for request in server.requests]
    assert 2.8 < times[-1] - times[0]  # 30 calls, a tenth of a second apart
    assert all(times[n + 10] - times[n] > 0.8 for n in range(20))

def error(status, **keys):
    return Reply(status=status, body=json.dumps({"error": keys}).encode())

STOPPING = {  # answers that no caption will be better with, and what the error's line must say
    "key": (Reply(status=401, body=f"Incorrect API key provided: {KEY[:14]}***".encode()), "HTTP 401"),
    "credit": (Reply(status=402, body=b"Insufficient Balance"), "HTTP 402"),
    "quota": (Reply(status=429, headers={"Retry-After": "60"}, body=b'{"error": {"code": "insufficient_quota"}}'), "credit"),
    "may not": (Reply(status=403, body=f'{{"error": "{KEY} may not"}}'.encode()), "HTTP 403"),
    "address": (Reply(status=404, body=b"The model does not exist"), "--model"),
    "moved": (Reply(status=307, headers={"Location": "http://127.0.0.1:9/"}), "moved"),
    "GPT-5": (error(400, message="no max_tokens", param="max_tokens", code="unsupported_parameter"), "--sampling"),
    "value": (error(400, message="only the default", param="temperature", code="unsupported_value"), "--sampling"),
    "param": (error(400, message="must be below 2", param="temperature", code=None), "--sampling"),
    "LiteLLM": (error(400, message="litellm.UnsupportedParamsError: x has no top_p", param=None, code="400"), "--sampling"),
    "model": (error(400, message="no such model", param=None, code="model_not_found"), "--model"),
    "FastAPI": (Reply(status=422, body=b'{"detail": [{"loc": ["body", "top_p"], "msg": "extra"}]}'), "--sampling"),
}

@pytest.mark.parametrize("kind", STOPPING)
def test_what_no_caption_will_be_better_with_stops_the_job_at_once(tmp_path, kind):
    with Server(lambda request: reword(request) if request.number < 20 else STOPPING[kind][0]) as server:
        args = (*write_captions(tmp_path, 200), "--concurrency", 4)
        done = run(*args, server=server, cwd=tmp_path, code=2, timeout=20)
        assert server.count <= 24 and STOPPING[kind][1] in done.error and KEY[:14] not in done.err
        rows = lines(tmp_path / "rows.jsonl")
        assert 6 <= len(rows) <= 10 and not lines(tmp_path / "rows.failed.jsonl")
        assert not any(KEY in path.read_text() for path in tmp_path.iterdir())

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
    write_captions(tmp_path, 3000)
    for words, reply in {"oh no": Reply(status=400, body=b"oh no"), "finish_reason length": Reply("", "length")}.items():
        with Server(lambda request, reply=reply: reply) as server:
            done = run("captions.txt", "--output", f"{words}.jsonl", server=server, cwd=tmp_path, code=2)
        assert "100 captions failed" in done.error and words in done.error
        assert len(lines(tmp_path / f"{words}.failed.jsonl")) == 100
    with Server() as server:
        pass  # its port is free again
    args = ("captions.txt", "--output", "new.jsonl")
    done = run(*args, "--max-retries", 1, server=server, cwd=tmp_path, code=2, jitter=0.01)
    assert "Connection refused" in done.error and not lines(tmp_path / "new.failed.jsonl")

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

def test_ctrl_c(tmp_path):
    """It ends at once, sits out neither calls in flight nor a pause, and the rows that are written stay."""
    with Server(lambda request: Reply(reword(request).content, delay=0 if request.number < 10 else 30)) as server:
        args = (*write_captions(tmp_path, 100), "--concurrency", 1)
        listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # also where pytest runs behind a shell's "&"
        process = start(*args, server=server, cwd=tmp_path, preexec_fn=listen)
        while server.count < 11:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=5)
        assert process.returncode == 130 and "Traceback" not in err
        assert re.split(r"[\r\n]", err.rstrip())[-1].startswith("stopped: ")
        assert len(lines(tmp_path / "rows.jsonl")) == 5
        server.answer = lambda request: Reply(status=429, headers={"Retry-After": "60"})
        process = start(*args, server=server, jitter="1; sys.stderr.isatty = lambda: True",  # a quick bar
                        cwd=tmp_path, preexec_fn=listen)
        while server.count < 12:
            time.sleep(0.01)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert re.search(r"all wait 5\d s", process.communicate(timeout=5)[1]) and process.returncode == 130
        server.answer = reword
        run(*args, server=server, cwd=tmp_path)
    assert sorted(int(row["image_id"]) for row in lines(tmp_path / "rows.jsonl")) == list(range(1, 101))
    assert server.count == 10 + 1 + 1 + 190

def test_a_torn_last_line_is_cut_off(tmp_path):
    """And one that only lacks its end, by an editor, is kept."""
    with Server() as server:
        args = write_captions(tmp_path, 5, "a dog {{}} no. {}")
        run(*args, server=server, cwd=tmp_path)
        whole = (tmp_path / "rows.jsonl").read_bytes()
        for cut, calls in ((-7, 12), (whole[:-3].rindex(b"}") + 1, 14), (-1, 14), (5, 24)):
            (tmp_path / "rows.jsonl").write_bytes(whole[:cut])
            run(*args, server=server, cwd=tmp_path)
            assert server.count == calls
            assert sorted((tmp_path / "rows.jsonl").read_bytes().splitlines()) == sorted(whole.splitlines())

def test_what_is_no_output_of_this_job_is_left_alone(tmp_path):
    with Server() as server:
        args = write_captions(tmp_path, 4)
        run(*args, server=server, cwd=tmp_path)
        texts = {"package.json": '{"name": "my-package"}', "prose.txt": "Dear all,\nkeep this", "torn.jsonl": '{"name": "my',
                 "one.jsonl": '{"image_id": "1", "caption": "a dog", "n": 5}', "cut.jsonl": '{"image_id": "1"}\n{"image_id": "2',
                 "other.tsv": "filepath\ttitle\nx/1\ta red cat\n", "edited.txt": "another dog\n" + "a small dog\n" * 3, "rows.jsonl": (tmp_path / "rows.jsonl").read_text()}
        for name, text in texts.items():
            (tmp_path / name).write_text(text)
        (tmp_path / "link.jsonl").symlink_to("one.jsonl")
        for command in ("captions.txt --output package.json", "captions.txt --output prose.txt", "captions.txt --output torn.jsonl",
                        "captions.txt --output one.jsonl", "one.jsonl --output one.jsonl", "one.jsonl --output link.jsonl",
                        "captions.txt --output captions.txt", "captions.txt --output .", "captions.txt --output cut.jsonl",
                        "other.tsv --output rows.jsonl",
                        "edited.txt --output rows.jsonl --limit 1", "captions.txt --output rows.jsonl --shard 0/2",
                        "rows.jsonl --export-chat rows.jsonl", "rows.jsonl --sheet rows.jsonl", "rows.jsonl --sheet /dev/null",
                        "captions.txt --output /dev/full"):
            done = run(*command.split(), server=server, cwd=tmp_path, code=2)
            assert command.split()[2] in done.error and len(done.err.splitlines()) == 1
        run("captions.txt", "--output", "rows.jsonl", "--limit", 1, server=server, cwd=tmp_path)
        assert server.count == 8
    assert all((tmp_path / name).read_text() == text for name, text in texts.items())

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
    with Server() as server:
        for n, limit, count in itertools.chain.from_iterable(((n, 2, 2), (n, 0, 10)) for n in range(3)):
            run("captions.txt", "--output", f"{n}.jsonl", "--shard", f"{n}/3", "--limit", limit, server=server, cwd=tmp_path)
            assert len(lines(tmp_path / f"{n}.jsonl")) == count
    assert server.count == 60
    assert sorted(int(row["image_id"]) for n in range(3) for row in lines(tmp_path / f"{n}.jsonl")) == list(range(1, 31))

def test_export_chat(tmp_path):
    row = dict(zip(ROW_KEYS, ("a/1", "a {red} dog", "a dog", "a 'hound'")))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    run("rows.jsonl", "--export-chat", "train.jsonl", key=None, cwd=tmp_path)
    sources, answers = ("a {red} dog", "a dog"), ("a dog", "a 'hound'")
    assert lines(tmp_path / "train.jsonl") == [
        {"messages": [{"role": "user", "content": prompt.replace("{}", source)}, {"role": "assistant", "content": answer}]}
        for prompt, source, answer in zip(PROMPTS, sources, answers)]
    (tmp_path / "bad.jsonl").write_text('{"image_id": "1", "caption": "a dog"}\n')
    for args, name in ((["bad.jsonl", "--export-chat", "train.jsonl"], "bad.jsonl:1"), (["rows.jsonl"], "--output"),
                       (["rows.jsonl", "--export-chat", "t.jsonl", "--output", "o.jsonl"], "--output")):
        assert name in run(*args, key=None, code=2, cwd=tmp_path).error
    assert len(lines(tmp_path / "train.jsonl")) == 2

def test_sheet(tmp_path):
    """Tabs, line ends, quotes and emoji stay in their cells; the figures by hand; the same sample each time."""
    texts = [('a "red\tdog"', "a red 😀 dog", "a red dog barks"), ("one two\nthree four", "one two three four", '"five" six'),
             ('"never closed', "closed never", "shut")]
    with open(tmp_path / "rows.jsonl", "w") as file:
        file.writelines(json.dumps(dict(zip(ROW_KEYS, (f"a/{n}", *text)))) + "\n" for n, text in enumerate(texts))
    out = run("rows.jsonl", "--sheet", "sheet.tsv", key=None, cwd=tmp_path).out
    head, *cells = csv.reader((tmp_path / "sheet.tsv").read_text().splitlines(), delimiter="\t")
    assert head[0] == "image_id" and len(head) == 5
    assert cells == [[f"a/{n}", *(" ".join(text.split()) for text in texts[n]), share] for n, share in enumerate(("100", "0", "0"))]
    assert len((tmp_path / "sheet.tsv").read_text().splitlines()) == 4
    # words 3, 3, 4; 4, 4, 2; 2, 2, 1. Kept in T': 3/3, 4/4, 2/2; in T'': 3/3, 0, 0. T' is T in the second row alone
    assert "3 rows" in out and "T 3.0, T' 3.0, T'' 2.3" in out
    assert re.search(r"100%.* 33%.*80%.* 33\.3%.* 33\.3%", out), out
    for name in ("b.tsv", "c.tsv"):
        run("rows.jsonl", "--sheet", name, "--limit", 2, key=None, cwd=tmp_path)
    assert (tmp_path / "b.tsv").read_text() == (tmp_path / "c.tsv").read_text() and len(lines(tmp_path / "rows.jsonl")) == 3
    assert len((tmp_path / "b.tsv").read_text().splitlines()) == 3
