"""generate.py as its users run it: a process of its own against a real HTTP server on loopback."""

import csv
import email.utils
import functools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

import pytest
from conftest import ROOT, tar
from openai_server import Reply, Server, reword

from generate import PROMPTS, ROW_KEYS, parse_args, problem_with, tidy

KEY = "sk-loopback-0123456789abcdef"
QUICK = "generate.random.uniform = lambda a, b: b / 100"  # a hundredth of the longest wait that can be drawn
# The script, with something else in its place first.
PATCHED = "import sys; sys.path.insert(0, {!r}); import generate; {}; generate.main()"


def start(*args, server=None, patch="pass", key=KEY, **options):
    """generate.py as a process, in the folder `cwd`; `patch` is run before it."""
    url = server.url if server else ""
    env = {**os.environ, "no_proxy": "*", "OPENAI_API_KEY": key, "OPENAI_BASE_URL": url}
    command = [sys.executable, ROOT / "generate.py"]
    if patch != "pass":
        command = [sys.executable, "-c", PATCHED.format(str(ROOT), patch)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *map(str, args)], env=env, **pipes, **options)


def run(*args, code=0, timeout=60, **options):
    """The finished process. Its exit code must be `code`; no traceback and no key may show."""
    process = start(*args, **options)
    process.out, process.err = process.communicate(timeout=timeout)
    assert process.returncode == code, process.out + process.err
    assert "Traceback" not in process.err
    assert KEY not in process.out + process.err
    process.error = re.split(r"[\r\n]", process.err.rstrip())[-1]  # the last line of stderr
    return process


def serve(folder, answer, *args, **options):
    """run() against a Server of this answer, in `folder`."""
    with Server(answer) as server:
        done = run(*args, server=server, cwd=folder, **options)
    done.server = server
    return done


def lines(path):
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def numbers(path):
    """The sorted numbers at the end of the captions in a file of rows."""
    return sorted(int(row["caption"].split()[-1]) for row in lines(path))


def write_captions(folder, count, words="a small dog number {}"):
    """Write captions.tsv. Returns the arguments of its job."""
    rows = [f"x/{number}\t{words.format(number)}\n" for number in range(1, count + 1)]
    (folder / "captions.tsv").write_text("filepath\ttitle\n" + "".join(rows))
    return "captions.tsv", "--output", "rows.jsonl"


def number_in(request):
    return int(request.source.split()[-1])


def body(**keys):
    return Reply(body=json.dumps(keys).encode())


def error(status, text=b"busy", **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status=status, body=text, headers=headers)


def slowly(delay):
    return lambda request: Reply(reword(request).content, delay=delay)


def test_two_steps_with_the_papers_prompts_and_parameters(tmp_path):
    """Section 2.1 and Appendix A, as they go over the wire; flags change them."""
    assert PROMPTS == (
        'Paraphrase the given caption "{}" concisely while preserving the meaning.',
        'Paraphrase the given text "{}" concisely while preserving the meaning'
        + " and avoiding use of existing words.",
    )
    texts = ("Boys REVERSIBLE jacket, #1234.jpg", "A two-sided jacket", "Boys' coat to turn around")
    write_captions(tmp_path, 1, texts[0])
    args = ("captions.tsv", "--output", "new/rows.jsonl")
    with Server(lambda request: texts[1 + request.number % 2]) as server:
        done = run(*args, server=server, cwd=tmp_path)
        assert os.listdir(tmp_path / "new") == ["rows.jsonl"]
        assert lines(tmp_path / "new/rows.jsonl") == [dict(zip(ROW_KEYS, ("x/1", *texts)))]
        assert "1 rows more" in done.out
        words = ("max_completion_tokens=2048", "effort=minimal", 'stop=["\\n"]', "seed=7")
        args = ("captions.tsv", "--output", "b.jsonl", "--endpoint", server.url + "/")
        run(*args, "--model", "m", "--sampling", *words, key="", cwd=tmp_path)
    default = {"model": "gpt-4o-mini", "temperature": 1.0, "top_p": 0.1, "max_tokens": 512}
    sampling = {"max_completion_tokens": 2048, "effort": "minimal", "stop": ["\n"], "seed": 7}
    assert server.count == 4
    for request in server.requests:
        content = PROMPTS[request.step - 1].replace("{}", texts[request.step - 1])
        assert request.body.pop("messages") == [{"role": "user", "content": content}]
        assert request.body == (default if request.number < 2 else {"model": "m", **sampling})
        assert request.key == (KEY if request.number < 2 else "")


CAPTIONS = [
    'a "quoted" word', "{braces} and {} {0}", "back\\slash \\n here", "a\ttab in it",
    "two\nlines here", "smile 😀 emoji", "собака бежит по траве", "狗 在 跑", "كلب يجري هنا",
    "half an emoji \ud83d here", "%s %d percent", "long " + "x" * 10_000,
    "\u2028 line separator", "nul \0 byte", "1. first of a list", "(brackets) [HD] a/b; c: d",
    "I'm afraid of the dark poster", "Caption: America the movie", "As an AI artist, she paints",
    "How to paraphrase: ten tips", "I'm sorry, a song by Brenda Lee", "Sorry, we are closed",
]  # fmt: skip


def test_captions_of_every_kind_come_through_whole(tmp_path):
    """An answer that keeps its source's own words and signs is good, whatever they are."""

    def answer(request):
        words = request.source.split()
        return " ".join([*words, words[0]])

    rows = [{"n": n, "image_id": f"a/{n}", "caption": text} for n, text in enumerate(CAPTIONS)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with Server(answer) as server:
        for _ in range(2):  # the second time they are all there, half an emoji or not
            run("captions.jsonl", "--output", "rows.jsonl", server=server, cwd=tmp_path)
    assert server.count == 2 * len(CAPTIONS)
    prompts = {request.prompt for request in server.requests}
    for line in (tmp_path / "rows.jsonl").read_text().split("\n")[:-1]:
        row = json.loads(line)
        caption = CAPTIONS[row["n"]].replace("\ud83d", "?")
        assert (row["image_id"], row["caption"]) == (f"a/{row['n']}", caption)
        assert PROMPTS[0].replace("{}", caption, 1) in prompts


# ---------------------------------------------------------------- inputs


def test_jsonl(tmp_path):
    """Captions of 2 to 15 words are kept, the others counted, and exact doubles taken once."""
    captions = [
        ("1", "a red dog"), ("1", "a second caption"), ("1", "a red dog"),  # as in COCO
        ("2", "dog"), ("3", "w " * 16), ("4", ""), ("5", "two words"), ("6", "no end"),
    ]  # fmt: skip
    rows = [json.dumps({"image_id": name, "caption": text, "n": 7}) for name, text in captions]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(rows))
    done = serve(tmp_path, reword, "a.jsonl", "?.jsonl", "--output", "rows.jsonl")
    found = {(row["image_id"], row["caption"], row["n"]) for row in lines(tmp_path / "rows.jsonl")}
    assert found == {(*captions[n], 7) for n in (0, 1, 6, 7)}
    assert done.server.count == 8
    assert "to do; 6 left out by --min-words, --max-words" in done.out  # twice 3


def test_tsv(tmp_path):
    """A cell that is wholly in csv's quotes loses them; any other quote is text."""
    titles = {'"5"" lamp"': '5" lamp', '"a ""big"" dog"': 'a "big" dog'}
    others = ['"Big" dog', '"Big" and "Rex"', '5" lamp', '"never closed', 'closed "', "a\\tb c"]
    titles.update(zip(others, others))
    text = '\ufeffurl\tfilepath\t"title"\r\n'
    for n, title in enumerate(titles):
        text += f"u\tt/{n}\t{title}\r\n\n"
    (tmp_path / "a.tsv").write_text(text)
    serve(tmp_path, reword, "a.tsv", "--output", "rows.jsonl")
    found = {row["image_id"]: row["caption"] for row in lines(tmp_path / "rows.jsonl")}
    assert found == {f"t/{n}": title for n, title in enumerate(titles.values())}


def test_tar(tmp_path):
    """The caption of KEY.jpg is KEY.txt, dots and all; what lacks its partner is counted."""
    captions = {"22.05": "a dog in may", "22.06": "a dog in june", "b/c/7": "a dog in folders"}
    members = {"./0000.jpg": "x" * 9000, "./0000.json": "{}", "./0000.txt": "a first caption\n"}
    members |= {"8.jpg": "its caption is in the .json", "8.json": "{}", "9.gif": "", "10.tiff": ""}
    members |= {"9.txt": "an image of another kind", "10.txt": "and one more"}
    for key, caption in captions.items():
        members |= {f"{key}.WEBP": "x", f"{key}.txt": caption}
    shard = tar({name: text.encode() for name, text in members.items()})
    (tmp_path / "part2").mkdir()
    for path in ("00000.tar", "00001.tar", "part2/00001.tar"):
        (tmp_path / path).write_bytes(shard)
    done = serve(tmp_path, reword, "*.tar", "--output", "rows.jsonl")
    captions["0000"] = "a first caption"
    wanted = {f"{n}/{key}": captions[key] for n in ("00000", "00001") for key in captions}
    assert {row["image_id"]: row["caption"] for row in lines(tmp_path / "rows.jsonl")} == wanted
    assert "to do; 6 in a .tar without a partner" in done.out
    done = serve(tmp_path, reword, "**/*.tar", "--output", "b.jsonl", code=2)
    assert "00001.tar: their images would have the same ids" in done.err


SHARD = tar({f"{n}.{kind}": b"a dog no. %d" % n for n in range(50) for kind in ("jpg", "txt")})
FILES = {
    "captions.tsv": "filepath\ttitle\n1\ta red dog\n", "a.txt": "a dog\n",
    "bytes.tsv": b"filepath\ttitle\n1\t\xff\xfe\n", "columns.tsv": "x\ty\n1\t2\n",
    "cells.tsv": "filepath\ttitle\n1\ta dog\n2\n", "root.tsv": "filepath\ttitle\n/etc/1\ta dog\n",
    "blank.tsv": "filepath\ttitle\n \ta dog\n", "head.tsv": "filepath\ttitle\n",
    "short.tsv": "filepath\ttitle\n1\tdog\n", "broken.jsonl": '{"image_id": "1", "caption": ""}\n{\n',
    "list.jsonl": "[1, 2]\n", "deep.jsonl": '{"image_id": ' + "[" * 100_000 + "\n",
    "id.jsonl": '{"image_id": "1"}\n{"image_id": "2',
    "up.jsonl": '{"image_id": "b/../../1", "caption": "a dog"}\n',
    "header.tar": SHARD[: 21 * 1024 + 515], "cut.tar": SHARD[: 21 * 1024],
    "bad.tar": SHARD[: 21 * 1024] + b"\xff" * 512 + SHARD[21 * 1024 + 512 :],
    "gif.tar": tar({"1.gif": b"x", "1.txt": b"a dog"}),
    "package.json": '{"name": "my-package"}', "prose.txt": "Dear all,\nkeep this",
    "torn.jsonl": '{"name": "my', "rows.jsonl": json.dumps(dict.fromkeys(ROW_KEYS, "a dog")),
    "one.jsonl": '{"image_id": "1", "caption": "a dog", "n": 5}',
}  # fmt: skip
ERRORS = {  # by the arguments: what the error must name
    "none.tsv": "none.tsv", "a.txt": "a.txt .tsv", "bytes.tsv": "bytes.tsv:2 utf-8",
    "columns.tsv": "columns.tsv:2 filepath title", "cells.tsv": "cells.tsv:3 shorter",
    "root.tsv": "root.tsv:2 image_id", "short.tsv": "short.tsv no captions",
    "broken.jsonl": "broken.jsonl:2", "list.jsonl": "list.jsonl:1", "deep.jsonl": "deep.jsonl:1",
    "id.jsonl": "id.jsonl:1 caption", "up.jsonl": "up.jsonl:1 image_id", "header.tar": "header.tar",
    "cut.tar": "cut.tar cut off", "bad.tar": "bad.tar damaged", "gif.tar": "no captions partner",
    "captions.tsv --sampling seed": "--sampling",
    "captions.tsv --sampling seed=1 b.jsonl": "--sampling b.jsonl",
    "captions.tsv --endpoint localhost:8000": "--endpoint http://",
    f"captions.tsv --endpoint http://u:{KEY}@localhost/v1": "--endpoint",
    # what is no output is left alone
    "captions.tsv --output package.json": "package.json", "captions.tsv --output .": ".: file",
    "captions.tsv --output prose.txt": "prose.txt", "captions.tsv --output id.jsonl": "id.jsonl",
    "captions.tsv --output one.jsonl": "one.jsonl", "one.jsonl --output one.jsonl": "one.jsonl:1",
    "captions.tsv --output torn.jsonl": "torn.jsonl", "captions.tsv --output /dev/full": "dev/full",
    "captions.tsv --output captions.tsv": "captions.tsv:1", "blank.tsv": "blank.tsv:2 image_id",
    "captions.tsv --output head.tsv": "head.tsv:1",
    "one.jsonl --output link.jsonl": "link.jsonl",
    "rows.jsonl --export-chat rows.jsonl": "rows.jsonl",
    "rows.jsonl --export-chat ./rows.jsonl": "rows.jsonl",
    "rows.jsonl --export-chat /dev/null": "/dev/null",
}  # fmt: skip


@pytest.mark.parametrize("command", ERRORS)
def test_what_is_wrong_is_named_before_the_first_call(tmp_path, command):
    """And no file is changed."""
    files = {name: data.encode() if isinstance(data, str) else data for name, data in FILES.items()}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "link.jsonl").symlink_to("one.jsonl")
    args = command.split()
    if not {"--output", "--export-chat"} & set(args):
        args += ["--output", "new"]
    done = serve(tmp_path, reword, *args, code=2)
    assert done.error.startswith("generate.py: error: ")
    for word in ERRORS[command].split():
        assert word in done.error
    assert done.server.count == 0
    assert not lines(tmp_path / "new")
    for name, data in files.items():
        assert (tmp_path / name).read_bytes() == data
    assert not os.path.isfile("/dev/null")


# ---------------------------------------------------------------- answers

TIDY = {  # what the LLM says: the answer in it
    " A dog runs.\n": "A dog runs.", '"A dog runs."': "A dog runs.", "“A dog”": "A dog",
    "'A man's dog'": "A man's dog", "«Собака бежит»": "Собака бежит", '""': "", "": "", '"': '"',
    '"Big" dog and "Rex"': '"Big" dog and "Rex"', "'Big' and 'small'": "'Big' and 'small'",
    "a dog's": "a dog's", "<think>a\nb</think>\n\nA dog": "A dog", "<think>hm": "<think>hm",
    'hm, a hound?</think>"A dog"': "A dog", "Paraphrase: A dog": "Paraphrase: A dog",
}  # fmt: skip
SOURCE = "a red dog runs"
BAD_ANSWERS = [
    "...", "two\nlines", "a red\u2028dog", "A RED dog - runs!", "<think>hm", "**Bold** hound",
    "A hound <|im_end|>", "[INST] a hound", "A hound\ufffd", "A_hound_runs", "I’m sorry",
    "As an AI language model, I can't", "Sorry, can't do", "My apologies for that",
    "There is no caption given.", "Needs more context", "The text you want paraphrased is missing.",
    "Unable to rephrase, as it is explicit", "A hound that " + "runs and " * 20 + "runs",
    # as people marked them in real answers
    "Output: A hound sprints", "1. A hound sprints 2. A crimson pooch", "- A hound", "• A hound",
    "A hound sprints (Note: shortened)", "A hound sprints (3 words)", "A hound/pooch sprints",
    "the given text is: A hound", "A hound sprints. Собака бежит", "A hound 红狗", "A hound; a pooch",
    "# A hound", "A hound\x1b[31m",
]  # fmt: skip
GOOD_ANSWERS = {  # of their sources
    "A crimson hound sprints": SOURCE, "An iPad dog": SOURCE, "A dog & co., $5!": SOURCE,
    "A hound 🐕": SOURCE, "Player #33's hound": SOURCE, "Café hound": SOURCE, "3 hounds": SOURCE,
    "A well-known hound - running": SOURCE, "Sorrel hound, in AI style": SOURCE,
    "I'm sorry, a song": "I'm sorry by Brenda Lee", "Caption: #1 <3": "Caption: this, #1 <3",
    "1. A hound / kitten": "1. a dog / cat", "Собака и dog": "собака dog",
}  # fmt: skip


def test_tidy_and_problem_with():
    for said, answer in TIDY.items():
        assert tidy(said) == answer
    for answer in BAD_ANSWERS:
        assert problem_with(answer, SOURCE, "stop", may_echo=False), answer
    for answer, source in GOOD_ANSWERS.items():
        assert not problem_with(answer, source, "stop", may_echo=False), answer
    assert not problem_with("A red dog runs.", SOURCE, "stop", may_echo=True)
    for finish_reason in (None, "", "stop", "STOP", "eos", "eos_token", "end_turn"):
        assert not problem_with("A hound", SOURCE, finish_reason, may_echo=False)
    for finish_reason in ("length", "content_filter", "error", "abort", "SAFETY", 7):
        assert problem_with("A hound", SOURCE, finish_reason, may_echo=False)
    refusal = "I can't help with this caption"  # does not pass for one word of its source
    assert problem_with(refusal, "caption number 7 of a small dog", "stop", may_echo=False)


PASSING = {  # by the caption's last word: what comes at first, and may pass
    **{str(status): error(status) for status in (408, 409, 424, 425, 429, 498, 499, 500, 503)},
    "gateway": error(403, b""), "403": error(403, Retry_After="0.1"),
    "soon": error(500, Retry_After="soon"), "never": error(503, Retry_After="-1"),
    "broken": Reply("x" * 999, reset=True), "late": Reply("late", delay=3),
    "html": Reply(body=b"<html>oops"), "deep": Reply(body=b"[" * 2**20),
    "overloaded": body(error={"message": "overloaded"}), "limit": body(error={"code": 429}),
    "502": body(choices=[{"finish_reason": "error", "error": {"code": 502}, "message": {}}]),
    "code": body(choices=[{"finish_reason": "error", "code": 502, "message": {"content": "A"}}]),
    "nochoice": body(choices=[]), "textless": body(choices=[{"message": None}]),
    "number": body(choices=[{"message": {"content": 7}}]),
    "free": Reply(None, usage={"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9}),
}  # fmt: skip
FAILING = {  # what comes, and what its reason must name; it would come again
    "400": (error(400, b"Model Not Exist"), "HTTP 400: Model Not Exist"),
    "401": (error(401, f"wrong key {KEY[:14]}***".encode()), "OPENAI_API_KEY"),
    "402": (error(402), "402"), "404": (error(404), "404"), "413": (error(413), "413"),
    "422": (error(422), "422"), "forbidden": (error(403, b"flagged"), "flagged"),
    "quota": (error(429, b'{"code": "insufficient_quota"}', Retry_After="60"), "quota"),
    "moved": (error(307, b"", Location="http://127.0.0.1:9/"), "307"),
    "filter": (Reply("", "content_filter", usage={"total_tokens": 0}), "content_filter"),
    "credit": (body(error={"code": 402, "message": "no credit"}), "no credit"),
    "refusal": (Reply("I'm sorry, but as an AI I can't."), "which its source lacks"),
    "blank": (Reply(" \n"), "empty"), "length": (Reply("a cut", "length"), "length"),
    "thoughts": (Reply("<think>A dog, so a hound"), "which its source lacks"),
    "terminal": (error(400, "\x1b]0;owned\x07 \x9b31m ü".encode()), "]0;owned 31m ü"),
}  # fmt: skip


def test_what_may_pass_is_tried_again_and_nothing_else(tmp_path):
    """And a step 1 that failed never feeds a step 2; each failure is logged with its reason."""
    asked = Counter()

    def answer(request):
        kind = request.source.split()[-1]
        asked[request.step, kind] += 1
        if request.step == 2:
            return request.source.upper() + "." if kind == "echo" else reword(request)
        if kind in FAILING:
            return FAILING[kind][0]
        return PASSING[kind] if kind in PASSING and asked[1, kind] < 3 else reword(request)

    kinds = ["fine", "echo", *FAILING, *PASSING]
    text = "".join(f"x/{kind}\tdog of {kind}\n" for kind in kinds)
    (tmp_path / "captions.tsv").write_text("filepath\ttitle\n" + text)
    args = ("captions.tsv", "--output", "rows.jsonl", "--timeout", 1, "--concurrency", 4)
    done = serve(tmp_path, answer, *args, patch=QUICK, code=1)
    written = {row["caption"] for row in lines(tmp_path / "rows.jsonl")}
    assert written == {f"dog of {kind}" for kind in ("fine", *PASSING)}
    wanted = {(1, kind): 3 if kind in PASSING else 1 for kind in kinds}
    wanted.update({(2, kind): 1 for kind in ("fine", "echo", *PASSING)})
    assert asked == wanted
    failed = lines(tmp_path / "rows.jsonl.failed")
    assert len(failed) == len(FAILING) + 1
    for row in failed:
        kind = row["caption"].split()[-1]
        assert FAILING.get(kind, (None, "echo"))[1] in row["reason"], row
        assert KEY[:12] not in row["reason"]
        assert set(row) == {"image_id", "caption", "reason"}
    assert re.search(f"{len(failed)} captions failed.*rows.jsonl.failed", done.err)
    assert not re.search(r"[\x1b\x07\x9b]", done.err)


def test_odd_answers_that_are_good(tmp_path):
    """A BOM before the JSON, thoughts, no finish_reason, half an emoji, odd counts of tokens.

    A reasoning model's thoughts often stand in the total alone: here 510 tokens a call.
    """
    thoughtful = {"prompt_tokens": 30, "completion_tokens": 10, "total_tokens": 540}
    usages = [None, [], 7, {"prompt_tokens": "many"}, {"prompt_tokens": 1e999}, thoughtful]

    def answer(request):
        said = f"<think>\nhmm\n</think>\n\n{reword(request).content}"
        if request.step == 2:
            said = said.replace("in other", "in\ud83d other")
        message = {"content": said, "reasoning_content": "hmm"}
        reply = body(choices=[{"message": message}], usage=usages[number_in(request) - 1])
        headers = {"Content-Type": "application/json; charset=utf-8"}
        return Reply(body=b"\xef\xbb\xbf" + reply.body, headers=headers, status=201)

    done = serve(tmp_path, answer, *write_captions(tmp_path, 6))
    assert done.server.count == 12
    assert re.search(r"tokens\D*sent\D*60\D*answered\D*1020\b", done.out)
    for row in lines(tmp_path / "rows.jsonl"):
        assert row["paraphrase_2"] == f"in? other words plainly {row['caption']}"


def test_what_failed_is_asked_for_again(tmp_path):
    """By the same command, with another --sampling or --limit; and nothing else is."""
    args = write_captions(tmp_path, 6)
    bad = {2, 4}

    def answer(request):
        return "I'm sorry" if number_in(request) in bad else reword(request)

    assert serve(tmp_path, answer, *args, "--limit", 5, code=1).server.count == 3 * 2 + 2
    bad.remove(2)
    done = serve(tmp_path, answer, *args, "--sampling", "top_p=1.0", code=1)
    assert {number_in(request) for request in done.server.requests} == {2, 4, 6}
    assert {request.body["top_p"] for request in done.server.requests} == {1.0}
    assert numbers(tmp_path / "rows.jsonl.failed") == [2, 4, 4]
    for calls in (2, 0):
        assert serve(tmp_path, reword, *args).server.count == calls
    assert numbers(tmp_path / "rows.jsonl") == [1, 2, 3, 4, 5, 6]


def test_fifty_failures_in_a_row_stop_the_job(tmp_path):
    """After good answers too, whatever they are: an outage, a wrong key. None is lost by it."""
    args = write_captions(tmp_path, 300)
    job = (*args, "--max-retries", 1, "--concurrency", 4)
    for trouble, name in ((error(503, b"boom"), "boom"), (FAILING["401"][0], "OPENAI_API_KEY")):
        answers = 20 * [None] + 200 * [trouble]
        answer = functools.partial(lambda answers, r: answers[r.number] or reword(r), answers)
        done = serve(tmp_path, answer, *job, code=2, patch=QUICK)
        assert done.server.count <= 20 + 2 * 54
        flags = ("--model", done.server.url, "--sampling", "--concurrency", "--timeout")
        for word in ("50 captions", name, *flags):
            assert word in done.error
        assert KEY[:14] not in done.err
    assert 12 <= len(lines(tmp_path / "rows.jsonl")) <= 20
    strays = {90: FAILING["401"][0], 91: FAILING["quota"][0]}
    serve(tmp_path, lambda r: strays.get(r.number) or reword(r), *args, code=1)
    assert len(lines(tmp_path / "rows.jsonl")) == 298  # each failed its caption alone
    serve(tmp_path, reword, *args)
    assert numbers(tmp_path / "rows.jsonl") == list(range(1, 301))


@pytest.mark.parametrize("concurrency", [2, 200])
def test_captions_that_always_fail_do_not_stop_a_job(tmp_path, concurrency):
    """They are asked for among those that don't; where all begin at once they end first."""

    def answer(request):
        return Reply(reword(request).content, delay=0.02) if number_in(request) > 60 else "no\nno"

    args = (*write_captions(tmp_path, 200), "--concurrency", concurrency)
    serve(tmp_path, answer, *args, code=1)
    assert numbers(tmp_path / "rows.jsonl") == list(range(61, 201))


def test_no_server_and_a_slow_one(tmp_path):
    """Three tries; a time-out names the flags that help, and its default is long."""
    args = (*write_captions(tmp_path, 60), "--concurrency", 32)
    done = run(*args, "--endpoint", "http://127.0.0.1:9/v1", cwd=tmp_path, code=2, patch=QUICK)
    assert "no answer: [Errno 111] Connection refused; are" in done.error
    assert "http://127.0.0.1:9/v1" in done.error
    os.remove(tmp_path / "rows.jsonl.failed")
    assert parse_args(["a.tsv", "--output", "o"]).timeout == 300
    args = (*write_captions(tmp_path, 2), "--timeout", 0.3)
    serve(tmp_path, slowly(2), *args, code=1, patch=QUICK)
    for row in lines(tmp_path / "rows.jsonl.failed"):
        assert re.search("Read timed out.*--concurrency.*--timeout", row["reason"])


def test_no_rate_limit_fails_a_caption_while_others_get_answers(tmp_path):
    """Four calls in 0.2 s, however few tries a caption has; with and without Retry-After."""
    for headers in ({}, {"Retry-After": "0.2"}):
        taken = []

        def answer(request, taken=taken, headers=headers):
            taken[:] = [t for t in taken if t > time.monotonic() - 0.2]
            if len(taken) >= 4:
                return Reply(status=429, headers=headers, body=b"rate limit")
            taken.append(time.monotonic())
            return reword(request)

        args = (*write_captions(tmp_path, 20), "--concurrency", 16, "--max-retries", 1)
        assert serve(tmp_path, answer, *args, patch=QUICK).server.count > 50
        assert numbers(tmp_path / "rows.jsonl") == list(range(1, 21))
        os.remove(tmp_path / "rows.jsonl")


def test_a_429_for_one_caption_alone_ends(tmp_path):
    """It fails when nobody else has got an answer for so long; till then it slows down nobody."""

    def answer(request):
        is_limited = number_in(request) == 30
        return error(429) if is_limited else Reply(reword(request).content, delay=0.01)

    args = (*write_captions(tmp_path, 300), "--concurrency", 8, "--max-retries", 3)
    done = serve(tmp_path, answer, *args, code=1, patch=f"{QUICK}; generate.LONGEST_LIMIT = 0.5")
    others = [request.time for request in done.server.requests if number_in(request) != 30]
    assert max(later - sooner for sooner, later in pairwise(others)) < 0.3
    assert numbers(tmp_path / "rows.jsonl.failed") == [30]
    assert len(lines(tmp_path / "rows.jsonl")) == 299


PAUSES = [(error(429), "1.5"), (error(503), "1.5"), (body(error={"code": 429}), "1.5"),
          (error(429), "date")]


@pytest.mark.parametrize("reply, retry_after", PAUSES)
def test_nobody_sends_in_a_pause(tmp_path, reply, retry_after):
    """Retry-After holds back all workers, and the bar says why."""
    paused_at = []

    def answer(request):
        if request.number != 10:
            return Reply(reword(request).content, delay=0.05)
        paused_at.append(time.monotonic())
        date = email.utils.formatdate(time.time() + 2, usegmt=True)  # whole seconds: 1 to 2
        reply.headers = {"Retry-After": date if retry_after == "date" else retry_after}
        return reply

    args = (*write_captions(tmp_path, 60), "--concurrency", 8)  # 0.75 s without a pause
    done = serve(tmp_path, answer, *args, patch="generate.BAR_SECONDS = 0.3")  # as in a terminal
    assert re.search("rows.*trouble=HTTP (429|503): ", done.err)
    sent = [request.time - paused_at[0] for request in done.server.requests[11:]]
    pause = 1 if retry_after == "date" else 1.5
    assert not [t for t in sent if 0.3 < t < pause - 0.05]  # 0.3: the 429 is on its way
    assert len(sent) > 90
    assert len(lines(tmp_path / "rows.jsonl")) == 60


def test_an_interim_status_gives_no_caption_anothers_answer(tmp_path):
    """103 and then, later, the true answer: its connection must not be used again."""

    def answer(request):
        reply = Reply(reword(request).content, delay=0.02)
        if request.number % 40 == 20:
            reply.interim = b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n"
            reply.delay = 0.05
        return reply

    args = (*write_captions(tmp_path, 200), "--concurrency", 4)
    assert serve(tmp_path, answer, *args, patch=QUICK).server.count > 400
    rows = lines(tmp_path / "rows.jsonl")
    assert len(rows) == 200
    for row in rows:
        step_1 = f"plainly {row['caption']}"
        assert [row["paraphrase_1"], row["paraphrase_2"]] == [step_1, f"in other words {step_1}"]


def test_the_key_shows_nowhere(tmp_path):
    """run() looks for it in all that is printed; and a server may say it in an answer."""
    args = write_captions(tmp_path, 2)
    assert "OPENAI_API_KEY: set it" in run(*args, key="", code=2, cwd=tmp_path).err
    with Server(lambda r: f"my key is {KEY} and {r.step} for {number_in(r)}") as server:
        done = run(*args, key=f"{KEY}\u20ac", server=server, cwd=tmp_path, code=2)
        assert "OPENAI_API_KEY: no key has" in done.err
        assert server.count == 0
        run(*args, key=f" {KEY[:9]}\n{KEY[9:]}\n", server=server, cwd=tmp_path, code=1)
    assert {request.key for request in server.requests} == {KEY}
    for path in tmp_path.iterdir():
        assert KEY not in path.read_text()


# ---------------------------------------------------------------- being stopped, and going on


def test_twenty_kills(tmp_path):
    """kill -9 at 20 random moments: each caption once, and only calls in flight are paid twice."""
    args = (*write_captions(tmp_path, 2000), "--concurrency", 8)
    with Server(slowly(0.01)) as server:
        for seed in range(20):
            chance = random.Random(seed)
            process = start(*args, server=server, cwd=tmp_path)
            goal = server.count + chance.choice([0, chance.randrange(1, 250)])
            while server.count < goal and process.poll() is None:
                time.sleep(0.001)
            time.sleep(chance.random() * 0.05)
            assert process.poll() is None
            process.kill()
            process.communicate()
        assert 200 < (tmp_path / "rows.jsonl").read_bytes().count(b"\n") < 2000
        run(*args, server=server, cwd=tmp_path)
    assert numbers(tmp_path / "rows.jsonl") == list(range(1, 2001))
    for row in lines(tmp_path / "rows.jsonl"):
        assert row["image_id"] == f"x/{row['caption'].split()[-1]}"
        assert row["paraphrase_2"] == f"in other words plainly {row['caption']}"
    assert 4000 <= server.count <= 4000 + 20 * 8 * 2
    assert server.connections <= 21 * 8  # each worker keeps its own


def test_ctrl_c(tmp_path):
    """It ends at once, sits out neither 64 calls nor a pause, and the rows written stay."""

    def listen():  # also where pytest runs behind a shell's "&"
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    fast = set()

    def slow(request):
        if len(fast) < 5:
            fast.add(number_in(request))
        return Reply(reword(request).content, delay=0 if number_in(request) in fast else 300)

    args = write_captions(tmp_path, 100)
    for answer, calls in ((slow, 10 + 64), (lambda r: error(429, Retry_After=60), 1)):
        with Server(answer) as server:
            process = start(*args, server=server, cwd=tmp_path, preexec_fn=listen)
            while server.count < calls:
                time.sleep(0.01)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=3)
        assert process.returncode == 130
        assert "Traceback" not in err
        assert re.split(r"[\r\n]", err.rstrip())[-1].startswith("stopped: ")
        assert numbers(tmp_path / "rows.jsonl") == sorted(fast)


def test_a_torn_last_line_is_cut_off(tmp_path):
    """And one that only lacks its end, by an editor, is kept."""
    rows = tmp_path / "rows.jsonl"
    args = write_captions(tmp_path, 5, "a dög {{}} no. {}")
    serve(tmp_path, reword, *args)
    whole = rows.read_bytes()
    inside_a_letter = whole.rindex("ö".encode()) + 1
    for cut, lost in ((-7, 1), (inside_a_letter, 1), (-1, 0), (5, 5), (1, 5), (0, 5)):
        rows.write_bytes(whole[:cut])
        assert serve(tmp_path, reword, *args).server.count == 2 * lost
        assert sorted(rows.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_two_processes_on_one_output(tmp_path):
    """The second stops before its first call."""
    with Server(slowly(0.5)) as server:
        args = (*write_captions(tmp_path, 3), "--concurrency", 2)
        first = start(*args, server=server, cwd=tmp_path)
        while not server.count:
            time.sleep(0.01)
        second = run(*args, server=server, cwd=tmp_path, code=2)
        out, err = first.communicate(timeout=30)
    assert first.returncode == 0, out + err
    assert "rows.jsonl: another" in second.error and server.count == 6
    assert numbers(tmp_path / "rows.jsonl") == [1, 2, 3]


def test_a_full_disk_and_one_without_locks(tmp_path):
    """A limit of file sizes stands in for the first: whole rows only, and the job goes on later."""
    args = write_captions(tmp_path, 200)
    for size in (9000, 12000):
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        assert "disk is full" in serve(tmp_path, reword, *args, code=2, preexec_fn=limit).error
        rows = lines(tmp_path / "rows.jsonl")
        assert size / 300 < len(rows) < size / 100
    patch = "exec('def no(*_): raise OSError(37, \"No locks available\")'); generate.fcntl.flock = no"
    done = serve(tmp_path, reword, *args, patch=patch)
    assert "rows.jsonl: is on a disk without locks" in done.err
    assert numbers(tmp_path / "rows.jsonl") == list(range(1, 201))
    assert lines(tmp_path / "rows.jsonl")[: len(rows)] == rows


def test_export_chat(tmp_path):
    """Two chats a row, whose answers alone are to be learned; a bad row leaves the old file."""
    texts = ("a {red} dog", "a dög", "a 'hound'")
    row = json.dumps(dict(zip(ROW_KEYS, ("a/1", *texts))))
    (tmp_path / "rows.jsonl").write_text(row)
    (tmp_path / "bad.jsonl").write_text(row + "\n" + row + '\n{"image_id": "1"}\n')
    chats = []
    for prompt, source, answer in zip(PROMPTS, texts, texts[1:]):
        question = {"role": "user", "content": prompt.replace("{}", source)}
        completion = {"role": "assistant", "content": answer}
        chats.append({"prompt": [question], "completion": [completion]})
    run("rows.jsonl", "--export-chat", "chat/train.jsonl", key="", cwd=tmp_path)
    assert lines(tmp_path / "chat/train.jsonl") == chats
    done = run("bad.jsonl", "--export-chat", "chat/train.jsonl", key="", code=2, cwd=tmp_path)
    assert "bad.jsonl:3" in done.error
    assert lines(tmp_path / "chat/train.jsonl") == chats


def test_sheet(tmp_path):
    """Tabs, line ends, quotes and emoji stay in their cells; the figures by hand."""
    texts = [
        ('a "red\tdog"', "a red 😀 dog", "a red dog barks"),
        ("one two\nthree four", "one two three four", '"five" six'),
        ('"never closed', "a lamp", "shut"),
    ]

    def sheet(texts):
        rows = [dict(zip(ROW_KEYS, (f"a/{n}", *row))) for n, row in enumerate(texts)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        command = [sys.executable, ROOT / "tests/sheet.py", "rows.jsonl", "sheet.tsv"]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        cells = csv.reader((tmp_path / "sheet.tsv").read_text().splitlines(), "excel-tab")
        return done.stdout, list(cells)

    out, (header, *cells) = sheet(texts)
    assert header[:4] == ["image_id", "T", "T'", "T''"]
    for n, share in enumerate(("100", "0", "0")):
        assert cells[n] == [f"a/{n}", *(" ".join(text.split()) for text in texts[n]), share]
    # words: 3, 4, 2; 3, 4, 2; 4, 2, 1. Kept in T': all, all, none; in T'': 3/3, 0, 0
    assert "3 rows\nWords: T 3.0, T' 3.0, T'' 2.3" in out
    assert re.search(r"67%.* 33\.3%.*no word.* 33\.3%\n.* 33%.*80%.* 33\.3%", out), out
    assert " x " not in out  # nothing is frequent

    texts = [(f"dog no. {n}", f"hound no. {n}", f"pooch no. {n}") for n in range(140)]
    texts += 7 * [("a dog", "N/A", "no")] + 3 * [("a dog", "TODO", "to do")]
    out, cells = sheet(texts)
    frequent = [("7", "N/A"), ("3", "TODO"), ("7", "no"), ("3", "to do")]
    assert re.findall(r"(\d+) x (.*)", out) == frequent
    assert len(cells) == 101
    assert sheet(texts)[1] == cells
