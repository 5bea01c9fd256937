"""ParaCLIP, section 2.1: rewrite each web caption T in two steps with an LLM, T -> T' -> T''.

    export OPENAI_API_KEY=...
    python generate.py captions.tsv --output rows.jsonl                       # OpenAI's API, as in the paper
    python generate.py 'laion/*.tar' --output rows.jsonl --model NAME --endpoint http://localhost:8000/v1
    python generate.py rows.jsonl --sheet sheet.tsv                           # a sample to read before you pay for more
    python generate.py rows.jsonl --export-chat train.jsonl                   # to instruction-tune LLaMA, section 3

Whatever stops a job (Ctrl-C, kill -9, a full disk), the same command resumes it.
Exit code: 0, every row is written; 1, some captions failed; 2, an error that you must mend; 130, stopped by Ctrl-C.
"""

import contextlib
import csv
import fcntl
import glob
import itertools
import json
import os
import queue
import random
import re
import sys
import tarfile
import threading
import time
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections import Counter

import requests
from tqdm import std, tqdm
from urllib3 import Retry
from urllib3.exceptions import HTTPError

PROMPTS = (  # section 2.1, verbatim
    'Paraphrase the given caption "{}" concisely while preserving the meaning.',
    'Paraphrase the given text "{}" concisely while preserving the meaning and avoiding use of existing words.',
)


def two_step(caption, ask):
    """Section 2.1: of the caption T, T' without the web's noise, then T'' in other words. A failed step 1 raises."""
    paraphrase_1 = ask(PROMPTS[0], caption)
    paraphrase_2 = ask(PROMPTS[1], paraphrase_1, may_echo=False)
    return paraphrase_1, paraphrase_2


# ---------------------------------------------------------------- what makes an answer good

LABEL = re.compile(  # as in "**Paraphrased caption:**" or "Sure! Here is a concise paraphrase of the text:"
    r"^[*_\s]*((sure|certainly|of course|okay)[,!.]* )?(here( is|['’]s) )?(([\w-]+ ){0,3}?(paraphrased?|rephrased?|"
    r"reworded|rewritten)( (caption|text|version))?( of [^:\n]{1,40})?|caption)[*_\s]*:[*_\s]*", re.IGNORECASE)
QUOTED = re.compile(
    r"""^(?:"([^"]*)"|“([^“”]*)”|«([^«»]*)»|`([^`]*)`|\*\*([^*]*)\*\*|['‘]((?:[^'‘’]|(?<=\w)['’](?=\w))*)['’])(\.?)$""")
REFUSAL = re.compile(
    r"(i['’]?m|i am) (very |so )?(sorry|afraid|unable|not able)\b|sorry,? (but )?(i|as an?)\b|i apologi[sz]e\b|as an? "
    r"(ai|(\w+ )?language model)\b|(unfortunately, )?i (can ?not|can['’]?t) (\w+ )?(assist|help|provide|fulfill?|"
    r"process|paraphrase|rephrase|generate|create|comply|answer)\b|((can|could) you )?please provide\b|there (is|was) "
    r"no (caption|text)\b|no (caption|text) (is |was )?(provided|given)\b|n/a\W*$", re.IGNORECASE)


def tidy(text):
    """The answer alone: no thoughts (of a reasoning model) before it, no label, quotes or white space around it."""
    before, text = None, text.rpartition("</think>")[2]
    while text != before:
        before, text = text, QUOTED.sub(r"\1\2\3\4\5\6\7", LABEL.sub("", text.strip()))
    return text


def fault(answer, source, finish_reason, may_echo):
    """What is wrong with `answer` as a paraphrase of `source`; "" if nothing is."""
    words, given = (re.findall(r"\w+", text.casefold()) or text for text in (answer, source))
    reasons = {
        f"finish_reason {finish_reason}": finish_reason in ("length", "content_filter"),
        "an empty answer": not answer,
        "more than one line, or endless thoughts": len(answer.splitlines()) > 1 or answer.startswith("<think>"),
        "a refusal": REFUSAL.match(answer) and not REFUSAL.match(source),
        "an echo of its input": words == given and not may_echo,
    }
    return next((reason for reason, found in reasons.items() if found), "")


# ---------------------------------------------------------------- the server, and the gate that all calls pass

OPENAI = "https://api.openai.com/v1"
LARGEST = 2**20  # bytes of a chat completion
PARAMETERS = (  # a 400 or 422 that holds for all captions: by LiteLLM's words, OpenAI's code or param, FastAPI's loc
    r'4(00|22)(.{,100}(unsupported.?(param|value)|invalid model)|.*("code": ?"(unsupported_|unknown_param|'
    r'invalid_param|model_not_found)|"param": ?"(?!messages|prompt)\w|"loc": ?\["body", ?"(?!messages)))')
VERDICTS = (  # the first pattern that fits "STATUS BODY": what stops the job, or "" where this caption alone fails
    (r"402|429.*insufficient_quota", "the account has no credit left"),
    (r"401", "OPENAI_API_KEY is missing or wrong"),
    (r"403(?!.*(flagged|moderation))", "this key may not use this model or server"),  # OpenRouter flags a caption
    (r"3|404", "no such --model, or no such --endpoint (has it moved, must it end in /v1?)"),
    (PARAMETERS, "set --sampling or --model (GPT-5: --sampling max_completion_tokens=2048 reasoning_effort=minimal)"),
    (r"4(?!08|09|29)", ""),
)


class RowFailed(Exception):
    """Why a caption gets no paraphrases; the others go on."""


class Endpoint:
    """An OpenAI-compatible server, shared by all workers: its connections, the gate before it, the counts."""
    def __init__(self, flags):
        base = flags.endpoint or os.environ.get("OPENAI_BASE_URL") or OPENAI
        self.flags, self.key = flags, os.environ.get("OPENAI_API_KEY", "").strip()
        self.url = base.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        if not re.fullmatch(r"https?://([\w-]+(\.[\w-]+)*|\[[\da-fA-F:.]+\])(:\d+)?/[^@?#\s]*", self.url):
            raise InputError("--endpoint: must be like http://localhost:8000/v1, with no key in it")
        if not re.fullmatch(r"[!-~]*", self.key) or not self.key and base == OPENAI:
            raise InputError("OPENAI_API_KEY: set it to your key, or name another server with --endpoint")
        self.session = requests.Session()
        self.session.mount(self.url, requests.adapters.HTTPAdapter(pool_maxsize=flags.concurrency))
        self.session.headers["Authorization"] = f"Bearer {self.key}" if self.key else None
        # The environment's proxies and certificates, looked up once: at every call that costs a fifth of the speed.
        self.settings = self.session.merge_environment_settings(self.url, {}, stream=True, verify=None, cert=None)
        self.session.trust_env = False
        self.gate, self.lock, self.opens_at, self.next_turn = threading.Lock(), threading.Lock(), 0.0, 0.0
        self.reached, self.answered, self.tokens, self.trouble = False, 0, Counter(), ""

    def post(self, prompt):
        """Send one user message. Returns the HTTP status (0 for no answer), the body, its Retry-After in s or None."""
        with self.gate:  # the first in the queue waits inside, the others behind it
            while (wait := max(self.opens_at, self.next_turn) - time.monotonic()) > 0:
                time.sleep(wait)
            self.next_turn = time.monotonic() + 60 / (self.flags.requests_per_minute or float("inf"))
        body = {**self.flags.sampling, "model": self.flags.model, "messages": [{"role": "user", "content": prompt}]}
        limit, said, pause, until = self.flags.timeout, b"", None, time.monotonic() + self.flags.timeout
        try:
            with self.session.post(self.url, json=body, timeout=limit, allow_redirects=False, **self.settings) as reply:
                with contextlib.suppress(HTTPError, ValueError, OverflowError):  # neither seconds nor a date
                    pause = Retry.DEFAULT.get_retry_after(reply.raw)
                while len(said) <= LARGEST and (chunk := reply.raw.read1(2**16, decode_content=True)):  # what is there
                    said += chunk
                    if time.monotonic() > until:
                        raise requests.Timeout(f"not whole after {limit:g} s")
            self.reached, status, text = True, reply.status_code, said[:LARGEST].decode("utf-8", "replace")
        except (OSError, ValueError, OverflowError, HTTPError) as error:
            status, text = 0, str(error).rpartition(": ")[2].strip("'\")")
        return status, text.replace(self.key, "[key]") if len(self.key) >= 16 else text, pause  # shorter is no secret

    def judge(self, status, said, source, may_echo):
        """The paraphrase of `source` in a chat completion, and what is wrong with it ("" if nothing is)."""
        if status != 200:
            return said, f"HTTP {status}" if status else "no answer"
        try:
            reply = json.loads(said)
            choice, usage = reply["choices"][0], reply.get("usage") or {}
            with self.lock:
                self.tokens.update({kind: int(usage.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion")})
            answer = choice["message"].get("content") or ""
            if isinstance(answer, list):  # of parts; those of thoughts have no "text"
                answer = "".join(part.get("text") or "" for part in answer)
            return tidy(answer), fault(tidy(answer), source, choice.get("finish_reason"), may_echo)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return said, "no chat completion"

    def ask(self, prompt, source, may_echo=True):
        """A good answer to `prompt` about `source`. Raises RowFailed, or InputError if no caption will get one."""
        tries = Counter()
        while True:
            answered = self.answered
            status, said, pause = self.post(prompt.format(source))
            kind, most = ("bad answers", 3) if status == 200 else ("failed calls", self.flags.max_retries)
            answer, why = self.judge(status, said, source, may_echo)
            if not why:
                self.answered, self.trouble = self.answered + 1, ""
                return answer
            reason = f"{why}: {' '.join(answer.split())[:200]}"
            for pattern, advice in VERDICTS:
                if re.match("(?is)" + pattern, f"{status} {said}"):
                    shown = "HTTP 401" if status == 401 else reason  # which may hold half of the key
                    raise InputError(f"{self.url}: {advice} ({shown})") if advice else RowFailed(reason)
            # A 429 while others get through is no fault of this caption, and starts its count again.
            self.trouble, tries[kind] = reason, 0 if status == 429 and self.answered > answered else tries[kind] + 1
            if tries[kind] > most:
                error = RowFailed if self.reached else InputError
                raise error(f"{reason} ({tries[kind]} {kind}; --endpoint: {self.url})")
            delay = min(pause or random.uniform(0, min(60, 2 ** tries[kind])), 86400)  # full jitter
            if pause or status == 429:  # close the gate to all workers
                with self.lock:
                    self.opens_at = max(self.opens_at, time.monotonic() + delay)
            elif status != 200:  # a bad answer is asked again at once
                time.sleep(delay)


# ---------------------------------------------------------------- what the three scripts share

ROW_KEYS = ("image_id", "caption", "paraphrase_1", "paraphrase_2")  # the paper's x_I, T, T', T''
SAFE = re.compile(r"(?!\s*$|/|(.*/)?\.\.(/|$))[^\\\0\n\r]+")  # an image_id that stays below its root, on any system
BAR_SECONDS = 0.3 if sys.stderr.isatty() else 30  # between two states of a progress bar; few of them in a log file
std.time = time.monotonic  # of every bar: its rate and time left don't follow a clock that is set


class InputError(Exception):
    """What the user must mend: `run` prints it as one line on stderr and exits with code 2."""


def run(main):
    """Call main() and exit with its code; with 2 and one line on stderr for what the user must mend, 130 for Ctrl-C."""
    try:
        sys.exit(main())
    except (InputError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # under torchrun rank 0 says it first, and the others are ended
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: what is written is kept; run the same command again", file=sys.stderr)
        sys.exit(130)


def at_least(least, kind=int):
    """An argparse type: a number of `kind`, `least` or more."""
    def number(text):
        if kind(text) >= least:  # false for nan
            return kind(text)
        raise ArgumentTypeError(f"{text}: must be {least} or more")
    return number


@contextlib.contextmanager
def reading(place):
    """The guard around all that reads a file: what it raises becomes an InputError that names `place` (or place())."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (InputError, FileNotFoundError)):  # they say enough
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{place() if callable(place) else place}: can't be read: {said}") from None


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a file that replaces `path` when the block ends well; if it fails, the old one stays whole."""
    part = f"{path}.{os.uname().nodename}-{os.getpid()}.part"  # no other process's, on any host that shares the disk
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        error.filename = error.filename or path
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


def expand(patterns):
    """Yield the files that paths or globs name, each glob's sorted; no glob finds *.failed.*, which has no rows."""
    for pattern in patterns:
        found = sorted(path for path in glob.glob(pattern, recursive=True) if ".failed." not in os.path.basename(path))
        yield from [pattern] if os.path.exists(pattern) or not found else found


def json_object(line):
    """The dict in a line of JSON (bytes). Half an emoji, which UTF-8 can't hold, becomes "?"; image_id 7, "7"."""
    row = json.loads(line.decode().removeprefix("\ufeff"))
    if b"\\ud" in line.lower():
        row = json.loads(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
    if type(row.get("image_id")) is int:
        row["image_id"] = str(row["image_id"])
    return row


def parsed_lines(path, parse=json_object):
    """Yield ("file:line", byte offset, parse(line)) of the lines that aren't blank. Raises InputError at file:line."""
    offset = number = 0
    with reading(lambda: f"{path}:{number}"), open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                yield f"{path}:{number}", offset, parse(line)
            offset += len(line)


def read_rows(patterns, needed=ROW_KEYS, readers=None):
    """Yield (path, "path:line", byte offset, row) of JSON lines, or as `readers` say by a name's ending."""
    for path in expand(patterns):
        place = path
        with reading(lambda: place):  # noqa: B023 - the latest is meant
            for place, offset, row in (readers or {}).get(os.path.splitext(path)[1], parsed_lines)(path):
                texts = [row[key].strip() for key in needed]
                if not SAFE.fullmatch(row["image_id"]) or needed is ROW_KEYS and not all(texts):
                    raise ValueError(f"a blank text, or image_id {row['image_id']!r} points out of the image root")
                yield path, place, offset, row
                place = path  # until the reader has told the next one


def key_of(row):
    """A hash that tells a row from all others: ten million of them fit into memory."""
    return hash((row["image_id"], row["caption"]))


def tar_files(tar):
    """Yield the files of an open tarfile. Raises ValueError for damage and cuts, which tarfile may take for the end."""
    yield from filter(tarfile.TarInfo.isfile, iter(tar.next, None))
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(512) != bytes(512):
        raise ValueError(f"{tar.name} is damaged or cut off at byte {tar.offset:,}")


def read_captions(patterns):
    """What read_rows yields, of captions: files of any kind that READERS has, each row without paraphrases."""
    return read_rows(patterns, ROW_KEYS[:2], READERS)


def text_of(line):
    """The text of a line of bytes, without its end."""
    return line.decode().strip("\ufeff\r\n")


def read_txt(path):
    for place, offset, caption in parsed_lines(path, text_of):
        yield place, offset, {"image_id": place.rpartition(":")[2], "caption": caption}


def read_tsv(path):
    """A quote is CSV's where it opens and closes a whole cell; else, as in 5" lamp, it stands for itself."""
    header = None
    for place, offset, line in parsed_lines(path, text_of):
        cells = line.split("\t")
        if '"' in line:
            with contextlib.suppress(csv.Error):  # a line at a time: no quote swallows the next one
                cells = next(csv.reader([line], "excel-tab", strict=True))
        header = header or cells
        if len(cells) != len(header) or "filepath" not in header or "title" not in header:
            raise InputError(f"{place}: must have the header's columns, filepath and title among them")
        if cells is not header:
            yield place, offset, {"image_id": cells[header.index("filepath")], "caption": cells[header.index("title")]}


def read_tar(path):
    """A sample is the members that share a key; its caption is in .txt, or in .json under "caption"."""
    shard = os.path.basename(path).removesuffix(".tar")
    with tarfile.open(path, "r:") as tar:
        for key, files in itertools.groupby(tar_files(tar), lambda file: re.sub(r"^\./|\.[^/]*$", "", file.name)):
            texts = {ending: tar.extractfile(file).read() for file in files
                     if (ending := file.name.rpartition(".")[2]) in ("txt", "json")}
            tar.members.clear()  # or tarfile would remember them all
            caption = text_of(texts.get("txt", b"")) or json_object(texts.get("json", b"{}")).get("caption") or ""
            yield f"{path}:{key}", tar.offset, {"image_id": f"{shard}/{key}", "caption": caption}


READERS = {".txt": read_txt, ".tsv": read_tsv, ".jsonl": parsed_lines, ".tar": read_tar}


# ---------------------------------------------------------------- the job, and what comes after it


def keys_of(file, needed):
    """The keys of the rows in `file`. A last line that a kill has torn is cut off; one that lacks its end gets it."""
    end = file.seek(0, os.SEEK_END)
    last = os.pread(file.fileno(), LARGEST, max(0, end - LARGEST)).rpartition(b"\n")[2]
    torn = b'{"image_id":'.startswith(last[:12])
    with contextlib.suppress(ValueError):
        json.loads(last)
        torn = False
    if torn and len(last) < end:
        next(read_rows([file.name], needed), None)  # raises InputError before the cut, if this is no file of rows
    file.truncate(end - len(last) * torn)
    keys = {key_of(row) for *_, row in read_rows([file.name], needed)}
    file.write(b"\n" if last and not torn else b"")
    return keys


def append(file, row):
    """Append `row` as a line, whole or not at all. `file` is unbuffered: kill -9 loses nothing."""
    end, row = file.seek(0, os.SEEK_END), {"image_id": row["image_id"], **row}  # first: see keys_of
    line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    with contextlib.suppress(OSError):
        if file.write(line) == len(line):
            return
    file.truncate(end)
    raise InputError(f"{file.name}: can't be written, is the disk full? Make room, and the same command resumes")


def plan(flags, done):
    """The keys of the captions that are kept, by one pass before the first paid call."""
    kept, ids, strange, left_out, limit = set(), set(), len(done), 0, flags.limit or sys.maxsize
    captions = tqdm(read_captions(flags.captions), "reading captions", unit="", leave=False, disable=None)
    for n, (_, place, _, row) in enumerate(captions):
        image = row["image_id"]
        if hash(image) in ids:
            first = next(first for _, first, _, other in read_captions(flags.captions) if other["image_id"] == image)
            raise InputError(f'image_id "{image}" is there twice: {first} and {place}')
        ids.add(hash(image))
        if n % flags.shard[1] == flags.shard[0]:
            strange -= key_of(row) in done
            if not max(flags.min_words, 1) <= len(row["caption"].split()) <= flags.max_words:
                left_out += 1
            elif len(kept) < limit:
                kept.add(key_of(row))
        if len(kept) == limit and not strange:
            break
    print(f"{len(kept):,} captions kept, {left_out:,} left out (--min-words, --max-words)")
    if strange:
        raise InputError(f"{flags.output}: {strange:,} of its rows are of another job or --shard; give it its own")
    if not kept:
        raise InputError(f"{' '.join(flags.captions)}: no caption is kept")
    return kept


def work(flags, endpoint, captions, rows, journal, bar):
    """Paraphrase `captions` in threads; this one writes each to `rows` or `journal` at once. Returns the counts."""
    todo, finished, count, due = queue.SimpleQueue(), queue.SimpleQueue(), Counter(), 0

    def worker():
        while True:
            row = todo.get()
            try:
                row["paraphrase_1"], row["paraphrase_2"] = two_step(row["caption"], endpoint.ask)
                finished.put((row, None))
            except Exception as error:  # noqa: BLE001 - raised below
                finished.put((row, error))

    for row in itertools.islice(captions, flags.concurrency):  # a worker's next comes when its last is written
        todo.put(row)
        threading.Thread(target=worker, daemon=True).start()
        count["running"] += 1
    while count["running"]:
        with contextlib.suppress(queue.Empty):
            row, error = finished.get(timeout=0.3)
            if error and not isinstance(error, RowFailed):
                raise error
            append(journal if error else rows, {**row, "reason": str(error)} if error else row)
            count.update(done=1, failed=1 if error else 0)
            count["in a row"] = count["in a row"] + 1 if error else 0
            if count["in a row"] >= (1000 if endpoint.answered or flags.retry_failed else 100):  # the server's fault
                raise InputError(f"{count['in a row']} captions failed one after another, the last: {error}")
            if row := next(captions, None):
                todo.put(row)
            else:
                count["running"] -= 1
        if time.monotonic() < due and count["running"]:
            continue
        due = time.monotonic() + 0.3
        os.fsync(rows.fileno())
        tokens, pause = endpoint.tokens, endpoint.opens_at - time.monotonic()
        spent = (tokens["prompt"] * flags.price_in + tokens["completion"] * flags.price_out) / 1e6
        shown = (f"{tokens.total():,} tokens",
                 spent and f"${spent:.2f} of about ${spent / max(count['done'], 1) * bar.total:.2f}",
                 f"{count['failed']} failed", pause > 1 and f"all wait {pause:.0f} s",
                 endpoint.trouble and f"last: {endpoint.trouble[:60]}")
        bar.set_postfix_str(", ".join(filter(None, shown)), refresh=False)
        bar.update(count["done"] - bar.n)
    return count


def generate(flags):
    """The whole job. Returns the exit code."""
    endpoint, failed_path = Endpoint(flags), "{}.failed{}".format(*os.path.splitext(flags.output))
    os.makedirs(os.path.dirname(flags.output) or ".", exist_ok=True)
    with open(flags.output, "ab+", buffering=0) as rows, open(failed_path, "ab+", buffering=0) as journal:
        try:
            fcntl.flock(rows, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{flags.output}: another generate.py is writing to it; give this one its own") from None
        done, failed = keys_of(rows, ROW_KEYS), keys_of(journal, ROW_KEYS[:2])
        left = plan(flags, done) - done
        todo = left & failed if flags.retry_failed else left - failed
        print(f"{len(done):,} rows stand in {flags.output}; {len(todo):,} captions to do")
        captions = (row for *_, row in read_captions(flags.captions) if key_of(row) in todo)
        with tqdm(total=len(todo), unit=" rows", mininterval=BAR_SECONDS, miniters=0) as bar:
            count = work(flags, endpoint, itertools.islice(captions, len(todo)), rows, journal, bar)
    tokens, new = endpoint.tokens, count["done"] - count["failed"]
    print(f"{flags.output}: {new:,} rows more; tokens: {tokens['prompt']:,} in, {tokens['completion']:,} out")
    if new < len(left):
        print(f"{len(left) - new:,} captions are without a row; --retry-failed asks again for those in {failed_path}")
    return 1 if new < len(left) else 0


def export_chat(flags):
    """Section 3: each row as two chats, one a step, to instruction-tune a LLaMA that paraphrases the other captions."""
    with atomic_write(flags.export_chat) as file:
        for *_, row in tqdm(read_rows(flags.captions), unit=" rows", mininterval=BAR_SECONDS):
            texts = [row[key] for key in ROW_KEYS[1:]]
            for prompt, source, answer in zip(PROMPTS, texts, texts[1:]):
                chat = [{"role": "user", "content": prompt.format(source)}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": chat}, ensure_ascii=False) + "\n")


def write_sheet(flags):
    """Does this LLM do what section 2.1 asks? A random sample of the rows as a table to read, and means over all."""
    size, sample, chance, sums = flags.limit or 100, [], random.Random(0), Counter(rows=0)
    for n, (*_, row) in enumerate(tqdm(read_rows(flags.captions), unit=" rows", mininterval=BAR_SECONDS)):
        cells = [" ".join(row[key].split()) for key in ROW_KEYS]  # no tab or line end
        t, t1, t2 = words = [re.findall(r"\w+", text.casefold()) for text in cells[1:]]
        kept_1, kept_2 = (len({*old} & {*new}) / max(len({*old}), 1) for old, new in itertools.pairwise(words))
        sums.update(rows=1, t=len(t), t1=len(t1), t2=len(t2), kept_1=kept_1, kept_2=kept_2, most=kept_2 > 0.8,
                    same=cells[1] == cells[2])
        if (place := n if n < size else chance.randrange(n + 1)) < size:
            sample[place:place + 1] = [[*cells, round(100 * kept_2)]]
    with atomic_write(flags.sheet) as file:
        csv.writer(file, "excel-tab").writerows([["image_id", "T", "T'", "T''", "% of T' kept in T''"], *sample])
    means = {name: total / max(sums["rows"], 1) for name, total in sums.items()}
    print(f"{sums['rows']:,} rows. " + "Words: T {t:.1f}, T' {t1:.1f}, T'' {t2:.1f}; of T kept in T' {kept_1:.0%}, of "
          "T' in T'' {kept_2:.0%} (more than 80% in {most:.1%} of the rows); T' is T in {same:.1%}".format_map(means))


def key_value(text):
    """An argparse type: KEY=VALUE, the value as JSON where it is JSON, else as text."""
    key, value = text.split("=", 1)
    with contextlib.suppress(ValueError):
        value = json.loads(value)
    return key, value


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    flag, goal = parser.add_argument, parser.add_mutually_exclusive_group(required=True).add_argument
    whole, real = at_least(0), at_least(0, float)
    flag("captions", nargs="+", metavar="CAPTIONS", help=".txt, a caption a line; .tsv with filepath and title; .jsonl "
         "with image_id and caption; img2dataset's .tar; or globs. For an export, rows")
    goal("--output", metavar="ROWS.jsonl", help="the rows; captions that fail go to ROWS.failed.jsonl beside it")
    goal("--export-chat", metavar="FILE", help="write the rows in CAPTIONS as chat pairs to it, and stop")
    goal("--sheet", metavar="FILE", help="write a random sample (--limit, else 100) of those rows to it, and stop")
    flag("--endpoint", metavar="URL", help="an OpenAI-compatible server (default: $OPENAI_BASE_URL, else OpenAI's)")
    flag("--model", default="gpt-4o-mini", metavar="NAME", help="the LLM (default: %(default)s; the paper's is gone)")
    flag("--sampling", nargs="+", type=key_value, metavar="KEY=VALUE", help="what a request holds beside model and "
         "messages (default: temperature=1.0 top_p=0.1 max_tokens=512; Appendix A, the last the authors' script)",
         default={"temperature": 1.0, "top_p": 0.1, "max_tokens": 512})
    flag("--min-words", type=whole, default=2, help="no shorter captions (default: 2, the authors' script)")
    flag("--max-words", type=whole, default=15, help="no longer captions (default: 15, the authors' script)")
    flag("--limit", type=whole, default=0, metavar="N", help="first N kept (section 3: 300000; default: 0, all)")
    flag("--shard", default="0/1", metavar="i/n", help="every n-th caption, from the i-th on (default: %(default)s)")
    flag("--retry-failed", action="store_true", help="take up the captions that failed before, and no others")
    flag("--concurrency", type=at_least(1), default=64, metavar="N", help="calls at once (default: %(default)s)")
    flag("--requests-per-minute", type=real, default=0, metavar="N", help="send no more calls (default: 0, no limit)")
    flag("--max-retries", type=whole, default=10, metavar="N", help="of a failed call (default: %(default)s)")
    flag("--timeout", type=at_least(0.001, float), default=60, metavar="SECONDS", help="of a call (default: 60)")
    flag("--price-in", type=real, default=0, metavar="USD", help="of a million tokens sent, for the bar (default: 0)")
    flag("--price-out", type=real, default=0, metavar="USD", help="of a million tokens answered (default: 0)")
    flags = parser.parse_args(argv)
    flags.sampling = dict(flags.sampling)
    shard = re.fullmatch(r"(\d+)/(\d+)", flags.shard)
    if not shard or int(shard[1]) >= int(shard[2]):
        parser.error("argument --shard: must be i/n with i from 0 to n-1")
    flags.shard = int(shard[1]), int(shard[2])
    return flags


def main():
    flags = parse_args()
    target = flags.output or flags.export_chat or flags.sheet
    for path in expand(flags.captions):
        if flags.output and os.path.splitext(path)[1] not in READERS:
            raise InputError(f"{path}: its name must end in one of {', '.join(READERS)}")
        if os.path.exists(target) and (not os.path.isfile(target) or os.path.samefile(target, path)):
            raise InputError(f"{target}: not a file, or one of the inputs")
    return generate(flags) if flags.output else export_chat(flags) if flags.export_chat else write_sheet(flags)


if __name__ == "__main__":
    run(main)
