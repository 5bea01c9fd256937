"""ParaCLIP, section 2.1: an LLM rewrites each web caption T in two steps, T -> T' -> T''.

    export OPENAI_API_KEY=...
    python generate.py captions.tsv --output rows.jsonl              # OpenAI's API, as in the paper
    python generate.py 'laion/*.tar' --output rows.jsonl --endpoint http://localhost:8000/v1
    python generate.py rows.jsonl --sheet sheet.tsv                  # a sample of the rows to read
    python generate.py rows.jsonl --export-chat chat.jsonl           # section 3: to tune a LLaMA

Whatever stops a job (Ctrl-C, kill -9, a full disk), the same command goes on where it was.
Exit code: 0, every caption has its row; 1, some captions failed; 2, an error that you must mend;
130, stopped by Ctrl-C.
"""

import contextlib
import csv
import email.utils
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
from tqdm import tqdm

PROMPTS = (  # section 2.1, verbatim
    'Paraphrase the given caption "{}" concisely while preserving the meaning.',
    (
        'Paraphrase the given text "{}" concisely while preserving the meaning'
        " and avoiding use of existing words."
    ),
)


def two_step(caption, ask):
    """Section 2.1: of the caption T, T' without the web's noise, then T'' in other words.

    A step that fails raises, so a failed step 1 never feeds step 2.
    """
    paraphrase_1 = ask(PROMPTS[0], caption)
    paraphrase_2 = ask(PROMPTS[1], paraphrase_1, may_echo=False)
    return paraphrase_1, paraphrase_2


# ---------------------------------------------------------------- what a good answer is

# The finish reasons of a whole answer; "none" is null in the JSON.
FINISHED = ("none", "", "stop", "stop_sequence", "eos", "eos_token", "end_turn", "complete")
MARKUP = re.compile(r"[<>\[\]{}|\\*_`◁▷▁\ufffd]|#(?! ?\d)")  # "player #33" has no markup
# Now and then a good answer has one of these ("World War I"): of 4,000 pairs by people, four.
TASK_WORDS = re.compile(
    r"\bI\b(?!-)|(?i:\b(?:paraphras|rephras|reword|rewrit|concise|caption|sorry|apolog))"
)
REFUSING = {"i", "sorry", "apolog"}
LABEL = re.compile(  # the beginning of an answer, up to a colon
    r"(?i)\W*(?:here|sure|certainly|of course|paraphras|rephras|reword|rewrit|concise|caption)"
    r"[^:\n]*:"
)
QUOTES = (('"', '"'), ("“", "”"), ("«", "»"), ("‘", "’"), ("'", "'"), ("`", "`"), ("**", "**"))


def problem_with(answer, source, finish_reason, may_echo):
    """What is wrong with `answer` as a paraphrase of `source`, or "" if nothing is."""
    words = words_of(answer)
    source_words = words_of(source)
    if str(finish_reason).casefold() not in FINISHED:
        return f"finish_reason {finish_reason}"
    if not words:
        return "an empty answer"
    if len(answer.splitlines()) > 1:
        return "more than one line"
    if set(MARKUP.findall(answer)) - set(source):
        return "markup that its input lacks"
    if task_words(answer) - task_words(source):
        return "words about the task, as in a refusal"
    if len(words) > 3 * len(source_words) + 12:
        return "far longer than its input"
    if words == source_words and not may_echo:
        return "an echo of its input"
    return ""


def words_of(text):
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.casefold())


def task_words(text):
    """The words of a text that speak of the task or of who does it."""
    return {word.casefold() for word in TASK_WORDS.findall(text)}


def tidy(answer, source):
    """The answer without a reasoning model's thoughts, a label, quotes and space around it."""
    answer = answer.rpartition("</think>")[2]
    answer = without_quotes(answer)
    answer = without_label(answer, source)
    return without_quotes(answer)


def without_label(answer, source):
    """The answer without a label such as "Sure! Here is a paraphrase:", if its source lacks it."""
    label = LABEL.match(answer)
    if not label or label[0].casefold() in source.casefold():
        return answer
    spoken = task_words(label[0])
    if spoken and not spoken & REFUSING:
        return answer[label.end() :].removeprefix("**")  # where a **label:** is in bold
    return answer


def without_quotes(answer):
    """The answer without a pair of quotes around the whole of it."""
    answer = answer.strip()
    for opening, closing in QUOTES:
        inner = answer.removeprefix(opening).removesuffix(closing)
        marks_inside = re.sub(r"(?<=\w)['’](?=\w)", "", inner)  # apostrophes are no quotes
        if opening in marks_inside or closing in marks_inside:
            continue
        if answer == opening + inner + closing:
            return inner.strip()
    return answer


# ---------------------------------------------------------------- one request, and its gate

OPENAI = "https://api.openai.com/v1"
LARGEST = 2**20  # bytes of an answer that are read
TRIES_TO_REACH = 3  # of one request, as long as no server has taken any
TRY_AGAIN = (408, 409, 425, 429, 498, 499)  # beside 5xx and what is no answer at all


class InputError(Exception):
    """What the user must mend: `run` prints it as one line and exits with code 2."""


class CaptionFailed(Exception):
    """Why a caption gets no paraphrases; the others go on."""


class Endpoint:
    """An OpenAI-compatible server and the gate before it, shared by all workers."""

    def __init__(self, flags):
        self.flags = flags
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        base = flags.endpoint or os.environ.get("OPENAI_BASE_URL") or OPENAI
        self.url = base.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        check_address(self.url, self.key)

        self.session = requests.Session()
        self.session.mount(
            self.url, requests.adapters.HTTPAdapter(pool_maxsize=flags.concurrency)
        )
        if self.key:
            self.session.headers["Authorization"] = f"Bearer {self.key}"
        # Proxies and certificates of the environment are looked up once: to do it at every call
        # costs a tenth of the speed. And without trust_env no ~/.netrc replaces the key.
        self.settings = self.session.merge_environment_settings(
            self.url, proxies={}, stream=True, verify=None, cert=None
        )
        self.session.trust_env = False

        self.gate = threading.Lock()
        self.opens_at = 0.0  # time.monotonic(); until then all workers wait
        self.lock = threading.Lock()  # of opens_at and what follows
        self.reached = False  # has a server ever taken a request?
        self.good_answers = 0
        self.tokens = Counter()
        self.trouble = ""  # the last failure, for the progress bar

    def ask(self, prompt, source, may_echo=True):
        """A good answer to `prompt` about `source`, after --max-retries more tries at most.

        As long as no server has taken a request, TRIES_TO_REACH tries are enough to give up.
        A Retry-After makes all workers wait; a 429 with one is not counted against a caption
        while others get answers. Raises CaptionFailed, or InputError where no other caption can
        get an answer either.
        """
        tries = 0
        while True:
            answers_before = self.good_answers  # others may get some while this one waits
            status, text, retry_after = self.post(prompt.format(source))
            status, completion = read_reply(status, text)
            if completion:
                return self.accept(completion, source, may_echo)

            kind = {0: "no answer", 200: "no chat completion"}.get(status, f"HTTP {status}")
            reason = f"{kind}: {self.quote(text)}"
            if status == 401:  # its text may hold half of the key
                raise InputError(f"{self.url}: HTTP 401: OPENAI_API_KEY is missing or wrong")
            self.trouble = reason
            if status == 402 or (status >= 400 and "insufficient_quota" in text):
                raise InputError(f"{self.url}: the account has no credit left ({reason})")
            if 300 <= status < 500 and status not in TRY_AGAIN:
                raise CaptionFailed(reason)

            tries += 1
            if not self.reached and tries == TRIES_TO_REACH:
                raise InputError(f"--endpoint {self.url}: {reason}; does the server run there?")
            if status == 429 and retry_after and self.good_answers > answers_before:
                tries = 0  # this caption is not to blame for a rate limit that others pass
            if tries > self.flags.max_retries:
                raise CaptionFailed(f"{reason} (tries: {tries})")
            if retry_after:
                self.hold_back(retry_after)
            else:  # only this caption waits, for a time that is drawn: "full jitter"
                time.sleep(random.uniform(0, min(60, 2**tries)))

    def accept(self, completion, source, may_echo):
        """The paraphrase in a chat completion. Raises CaptionFailed if it is a bad one."""
        answer, finish_reason, usage = completion
        answer = tidy(answer, source)
        problem = problem_with(answer, source, finish_reason, may_echo)
        with self.lock:
            with contextlib.suppress(Exception):  # a server may count in any way, or not at all
                self.tokens["sent"] += int(usage["prompt_tokens"])
                self.tokens["answered"] += int(usage["completion_tokens"])
            if not problem:
                self.good_answers += 1
                self.trouble = ""
        if problem:  # asked again at the paper's top_p of 0.1, it would come back as it is
            raise CaptionFailed(f"{problem}: {self.quote(answer)}")
        return answer

    def quote(self, text):
        """The beginning of a server's text, for a message; nothing in it begins like the key."""
        words = " ".join(text.split())[:200]
        if len(self.key) >= 16:
            words = re.sub(re.escape(self.key[:8]) + r"[^\s\"']*", "(key)", words)
        return words

    def post(self, prompt):
        """Send one user message. Returns the HTTP status, the answer's text and its Retry-After.

        The status is 0 where no whole answer came; then the text says why.
        """
        self.pass_gate()
        deadline = time.monotonic() + self.flags.timeout
        message = {"role": "user", "content": prompt}
        body = {**self.flags.sampling, "model": self.flags.model, "messages": [message]}
        options = {"timeout": self.flags.timeout, "allow_redirects": False, **self.settings}
        try:
            with self.session.post(self.url, json=body, **options) as reply:
                self.reached = True
                status = reply.status_code
                if status < 200:
                    # http.client takes an interim status (103) for the answer. The true one is
                    # still to come, and would be the next call's: so the connection is dropped,
                    # as `with` does where a body has not been read.
                    raise requests.ConnectionError(f"interim status {status}")
                text = read_body(reply.raw, deadline) or reply.headers.get("Location", "")
                retry_after = seconds_of(reply.headers.get("Retry-After"))
        except Exception as error:  # noqa: BLE001 - whatever breaks on the way
            self.reached = self.reached or isinstance(error, requests.ReadTimeout)
            status = 0
            text = str(error).rpartition(": ")[2].strip("'\")")
            retry_after = 0
        if len(self.key) >= 16:  # a shorter one, such as EMPTY, is no secret
            text = text.replace(self.key, "(key)")
        return status, text, retry_after

    def pass_gate(self):
        """Wait until the gate is open; with --requests-per-minute close it behind oneself."""
        with self.gate:  # the first in the queue waits inside, the others behind it
            while time.monotonic() < self.opens_at:
                time.sleep(max(0, self.opens_at - time.monotonic()))
            if self.flags.requests_per_minute:
                self.hold_back(60 / self.flags.requests_per_minute)

    def hold_back(self, seconds):
        """Close the gate to all workers for so long: for a Retry-After, or between two turns."""
        with self.lock:
            self.opens_at = max(self.opens_at, time.monotonic() + seconds)


def check_address(url, key):
    """Raise InputError for an endpoint or a key that no request can be sent with."""
    try:
        requests.Request("POST", url).prepare()
    except ValueError:
        url = ""
    if not re.fullmatch(r"https?://[^@?#\s]+", url):
        raise InputError("--endpoint: must be like http://localhost:8000/v1 (no user, no ?)")
    if not re.fullmatch(r"[!-~]*", key):
        raise InputError("OPENAI_API_KEY: holds a character that no key has; set it again")
    if not key and url.startswith(OPENAI):
        raise InputError("OPENAI_API_KEY: set it, or name a server of your own with --endpoint")


def read_body(raw, deadline):
    """The text of an answer, as far as it is read. Raises Timeout if it trickles too slowly."""
    body = b""
    while len(body) < LARGEST:
        chunk = raw.read1(2**16, decode_content=True)  # what is there by now
        if not chunk:
            break
        body += chunk
        if time.monotonic() > deadline:
            raise requests.Timeout("the answer was not whole within --timeout")
    return body.decode("utf-8", "replace")


def read_reply(status, text):
    """The status of a call, and of a chat completion (answer, finish reason, usage), or None.

    Some gateways answer 200 and say the status in the body: {"error": {"code": 429, ...}}.
    """
    if not 200 <= status < 300:
        return status, None
    try:
        reply = json.loads(text)
        code = (reply.get("error") or {}).get("code")
        if code in range(400, 600):
            return code, None
        choice = reply["choices"][0]
        content = choice["message"].get("content") or ""
        if isinstance(content, list):  # of parts; thoughts are parts without a "text"
            content = "".join(part.get("text") or "" for part in content)
        return 200, (content.strip(), choice.get("finish_reason"), reply.get("usage"))
    except Exception:  # noqa: BLE001 - whatever else a server sends
        return 200, None


def seconds_of(retry_after):
    """The seconds that a Retry-After header asks for, as a number or a date; 0 for neither."""
    seconds = 0
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        date = email.utils.parsedate_to_datetime(retry_after)
        seconds = date.timestamp() - time.time()
    with contextlib.suppress(TypeError, ValueError):
        seconds = float(retry_after)
    return seconds if 0 < seconds <= 24 * 60 * 60 else 0


# ---------------------------------------------------------------- the job, and how it resumes

ROW_KEYS = ("image_id", "caption", "paraphrase_1", "paraphrase_2")  # the paper's x_I, T, T', T''
BAR_SECONDS = 0.3 if sys.stderr.isatty() else 30  # between two states of a bar; few in a log file


def generate(flags):
    """The whole job. Returns the exit code."""
    endpoint = Endpoint(flags)
    rows = RowFile(flags.output, ROW_KEYS)
    journal = RowFile(f"{flags.output}.failed", ROW_KEYS[:2])
    old_journal = ".failed".join(os.path.splitext(flags.output))
    if os.path.exists(old_journal):
        print(f"{old_journal}: what failed for an older version is not read; to leave those "
              f"captions out, cat {old_journal} >> {journal.path} and remove it")

    if any(path.endswith(".txt") for path in expand(flags.captions)):
        print("the captions of a .txt name no images: their rows train only a --loss without I")

    # The captions are read twice: to count them before the first call is paid, and to work.
    count = Counter()
    captions = tqdm(read_captions(flags.captions), "reading captions", leave=False, disable=None)
    for _ in captions_to_do(captions, flags, rows.keys, journal.keys, count):
        pass
    print(f"{count['kept']:,} captions kept, {count['left_out']:,} left out (not of "
          f"{flags.min_words} to {flags.max_words} words: --min-words, --max-words), "
          f"{count['doubles']:,} doubles; {count['written']:,} have a row, {count['to_do']:,} are "
          "to do")
    if not count["kept"]:
        raise InputError(f"{' '.join(flags.captions)}: no caption is kept")

    captions = read_captions(flags.captions)
    captions = captions_to_do(captions, flags, rows.keys, journal.keys, Counter())
    new = write_rows(captions, count["to_do"], endpoint, rows, journal)
    print(f"{flags.output}: {new:,} rows more; {endpoint.tokens['sent']:,} tokens sent, "
          f"{endpoint.tokens['answered']:,} answered")
    without_row = count["kept"] - count["written"] - new
    if without_row:
        print(f"{without_row:,} captions are without a row; --retry-failed asks again for those "
              f"in {journal.path}, which says why they failed")
        return 1
    return 0


def captions_to_do(captions, flags, written, failed, count):
    """Yield the captions to ask for now. `count` tells what became of all of them.

    written, failed: the keys of the rows and of the journal, as this job has found them.
    """
    shard, shards = flags.shard
    seen = set()
    for row in captions:
        if not max(flags.min_words, 1) <= len(row["caption"].split()) <= flags.max_words:
            count["left_out"] += 1
            continue
        key = key_of(row)
        if key in seen:
            count["doubles"] += 1
            continue
        position = len(seen)
        seen.add(key)
        if position % shards != shard:
            continue
        count["kept"] += 1
        wanted = key not in failed
        if flags.retry_failed:
            wanted = key in failed
        if key in written:
            count["written"] += 1
        elif wanted:
            count["to_do"] += 1
            yield row
        if count["kept"] == flags.limit:
            return


def key_of(row):
    """A hash that tells a row from all others: ten million of them fit into memory."""
    return hash((row["image_id"], row["caption"]))


FAILURES_AT_START = 20  # captions, before any good answer: then the set-up is to blame
FAILURES_IN_A_ROW = 100  # captions, later on


def write_rows(captions, total, endpoint, rows, journal):
    """Ask for `captions`; each is in `rows` or in `journal` at once. Returns how many rows.

    Until one answer is good, failures are the set-up's fault and not the captions': those wait
    in memory, and the first good answer has them journalled. The job stops after 20 failures
    without a good answer, 100 in a row later on, and at once for a wrong key or no credit.
    """
    flags = endpoint.flags
    waiting = []
    written = 0
    failed = 0
    failed_in_a_row = 0
    next_sync = 0.0
    with tqdm(total=total, unit=" rows", mininterval=BAR_SECONDS, miniters=0) as bar:
        for result in in_threads(captions, endpoint.ask, flags.concurrency):
            if time.monotonic() > next_sync:
                show(bar, failed, endpoint)
                rows.sync()
                journal.sync()
                next_sync = time.monotonic() + 0.5
            if result is None:
                continue

            row, error = result
            if error is None:
                rows.append(row)
                written += 1
                failed_in_a_row = 0
            elif isinstance(error, CaptionFailed):
                waiting.append({**row, "reason": str(error)})
                failed += 1
                failed_in_a_row += 1
            else:
                raise error

            most = FAILURES_AT_START
            if endpoint.good_answers or flags.retry_failed:
                most = FAILURES_IN_A_ROW
                journal.append_all(waiting)
                waiting.clear()
            if failed_in_a_row >= most and not flags.retry_failed:
                raise set_up_error(failed_in_a_row, error, endpoint)
            bar.update()
        show(bar, failed, endpoint)
    if waiting and not rows.keys:  # nothing has ever worked with this output
        raise set_up_error(failed_in_a_row, waiting[-1]["reason"], endpoint)
    journal.append_all(waiting)
    rows.sync()
    journal.sync()
    return written


def set_up_error(count, reason, endpoint):
    """The InputError for failures that are not the captions' fault."""
    return InputError(
        f"{count} captions failed one after another, the last: {reason}; are --model "
        f"{endpoint.flags.model}, --endpoint {endpoint.url} and --sampling right?"
    )


def in_threads(captions, ask, workers):
    """Run two_step on each caption. Yields (row, error or None) as they end.

    Yields None after each half a second in which none has ended.
    """
    todo = queue.SimpleQueue()
    ended = queue.SimpleQueue()

    def work():
        while True:
            row = todo.get()
            try:
                row["paraphrase_1"], row["paraphrase_2"] = two_step(row["caption"], ask)
                ended.put((row, None))
            except Exception as error:  # noqa: BLE001 - raised by write_rows
                ended.put((row, error))

    busy = 0
    for row in itertools.islice(captions, workers):
        try:
            threading.Thread(target=work, daemon=True).start()
        except RuntimeError:
            raise InputError(f"--concurrency: only {busy} threads could be started") from None
        todo.put(row)
        busy += 1
    while busy:
        try:
            yield ended.get(timeout=0.5)
        except queue.Empty:
            yield None
            continue
        row = next(captions, None)  # only now, when the last one is written
        if row is None:
            busy -= 1
        else:
            todo.put(row)


def show(bar, failed, endpoint):
    """Bring the progress bar up to date."""
    shown = [f"{endpoint.tokens.total():,} tokens"]
    spent = endpoint.tokens["sent"] * endpoint.flags.price_in / 1e6
    spent += endpoint.tokens["answered"] * endpoint.flags.price_out / 1e6
    if spent and bar.n:
        shown.append(f"${spent:.2f} of about ${spent / bar.n * bar.total:.2f}")
    shown.append(f"{failed:,} failed")
    pause = endpoint.opens_at - time.monotonic()
    if pause > 1:
        shown.append(f"all wait {pause:.0f} s")
    if endpoint.trouble:
        shown.append(f"last: {endpoint.trouble[:60]}")
    bar.set_postfix_str(", ".join(shown), refresh=False)
    bar.update(0)


class RowFile:
    """A file to which rows are appended: made with the first one, locked while this process runs.

    keys: those of the rows that were in it at the start. That captions_to_do passes them over is
    all that a resume takes.
    """

    def __init__(self, path, needed):
        self.path = path
        self.file = None
        self.keys = set()
        if not os.path.exists(path):
            return
        self.open("ab+")
        end = 0
        for end, row in tqdm(read_rows(path, needed), "reading rows", leave=False, disable=None):
            self.keys.add(key_of(row))
        self.file.truncate(end)  # cut off a torn row, now that all before it are known to be rows
        if end and os.pread(self.file.fileno(), 1, end - 1) != b"\n":
            self.file.write(b"\n")  # which an editor has taken away

    def open(self, mode):
        try:
            self.file = open(self.path, mode, buffering=0)  # noqa: SIM115 - for as long as we run
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, FileExistsError):
            raise InputError(
                f"{self.path}: another generate.py writes to it; give this one another --output"
            ) from None

    def append(self, row):
        """Write a row as one line, whole or not at all. Not buffered: kill -9 loses nothing."""
        if self.file is None:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            self.open("xb")  # an error if another process has made it meanwhile
        row = {"image_id": row["image_id"], **row}  # as ROW_START says
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        end = self.file.seek(0, os.SEEK_END)
        written = 0
        with contextlib.suppress(OSError):
            written = self.file.write(line)
        if written < len(line):
            self.file.truncate(end)
            raise InputError(f"{self.path}: can't be written; is the disk full? The same command "
                             "goes on when there is room")

    def append_all(self, rows):
        """Write each of the rows, see append."""
        for row in rows:
            self.append(row)

    def sync(self):
        """Wait until the disk has it all."""
        if self.file:
            os.fsync(self.file.fileno())


# ---------------------------------------------------------------- readers of captions and rows

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")  # in either case
ROW_START = b'{"image_id": '  # of each line that RowFile writes


class Lines:
    """The lines of a file that are not blank. `place` and `end` tell how far it is read."""

    def __init__(self, path):
        self.path = path
        self.place = path
        self.end = 0  # in bytes

    def __iter__(self):
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                self.place = f"{self.path}:{number}"
                self.end += len(line)
                if not line.isspace():
                    yield line


def read_txt(lines):
    """A caption on each line; its image_id is NAME/LINE."""
    for line in lines:
        number = lines.place.rpartition(":")[2]
        yield {"image_id": f"{name_of(lines.path)}/{number}", "caption": text_of(line)}


def read_tsv(lines):
    """open_clip's format: a header with filepath and title. A quote is a character like others."""
    header = None
    for line in lines:
        cells = text_of(line).split("\t")
        header = header or cells
        if len(cells) != len(header) or "filepath" not in header or "title" not in header:
            raise ValueError("each line needs the header's columns, separated by tabs, and the "
                             "header filepath and title")
        columns = dict(zip(header, cells))
        if cells is not header:
            yield {"image_id": columns["filepath"], "caption": columns["title"]}


def read_jsonl(lines):
    """JSON objects with image_id and caption; their other keys are carried along.

    The start of a row that a kill has torn, at the end of the file, is passed over.
    """
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            if line.endswith(b"\n") or not ROW_START.startswith(line[: len(ROW_START)]):
                raise
            print(f"{lines.place}: is torn, and left out", file=sys.stderr)
            return
        if isinstance(row.get("image_id"), int):
            row["image_id"] = str(row["image_id"])
        if row.get("caption", "") is None:
            row["caption"] = ""
        yield row


def read_tar(shard):
    """img2dataset's: the caption of the image KEY.jpg is KEY.txt, whatever dots KEY has."""
    images = set()  # their keys
    captions = {}
    with tarfile.open(shard.path, "r:") as tar:
        for member in tar_files(tar):
            name = member.name.removeprefix("./")
            shard.place = f"{shard.path}:{name}"
            key, ending = os.path.splitext(name)
            if ending.lower() in IMAGE_ENDINGS:
                images.add(key)
            elif ending == ".txt":
                captions[key] = text_of(tar.extractfile(member).read())
    for key, caption in captions.items():
        if key in images:
            yield {"image_id": f"{name_of(shard.path)}/{key}", "caption": caption}


def tar_files(tar):
    """Yield the files of an open tar. Raises ValueError where tarfile takes damage for the end."""
    for member in iter(tar.next, None):
        if member.isfile():
            yield member
        tar.members.clear()  # or tarfile would remember them all
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(512) != bytes(512):
        raise ValueError(f"damaged or cut off at byte {tar.offset:,}")


READERS = {".txt": read_txt, ".tsv": read_tsv, ".jsonl": read_jsonl, ".tar": read_tar}


def read_captions(patterns):
    """Yield the captions in files of any kind, as rows that have no paraphrases yet."""
    paths = {}
    for path in expand(patterns):
        ending = os.path.splitext(path)[1]
        if ending not in READERS:
            raise InputError(f"{path}: its name must end in one of {', '.join(READERS)}")
        if ending in (".txt", ".tar"):  # whose image_ids begin with the name
            first = paths.setdefault(name_of(path), path)
            if first != path:
                raise InputError(f"{first} and {path}: one name would give equal image_ids")
        for _, row in read_rows(path, ROW_KEYS[:2], READERS[ending]):
            yield row


def read_rows(path, needed=ROW_KEYS, reader=read_jsonl):
    """Yield (the byte after it, the row) of each row in a file.

    The one guard of all that is read: what a reader raises becomes a line that names the place.
    """
    lines = Lines(path)
    try:
        for row in reader(lines):
            check_row(row, needed)
            yield lines.end, row
    except OSError:  # it names the file
        raise
    except Exception as error:  # noqa: BLE001
        raise InputError(f"{lines.place}: can't be read: {error}") from None


def check_row(row, needed):
    """Raise TypeError unless a row has its texts, and an image_id that stays below a root.

    Half an emoji, which no file can hold, becomes "?" here.
    """
    for key in needed:
        if not isinstance(row.get(key), str):
            raise TypeError(f'has no text "{key}"')
        row[key] = row[key].encode("utf-8", "replace").decode()
    folders = row["image_id"].split("/")
    if folders[0] == "" or ".." in folders or "\\" in row["image_id"] or "\0" in row["image_id"]:
        raise TypeError(f"image_id {row['image_id']!r} must be a path below the folder of images, "
                        "with / between folders")


def name_of(path):
    """The name of a file, without its folder and ending."""
    return os.path.splitext(os.path.basename(path))[0]


def text_of(line):
    """The text in a line of bytes, without its end. Raises ValueError."""
    try:
        return line.decode().strip("\ufeff\r\n")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8; save it as UTF-8") from None


def expand(patterns):
    """The files that the paths or globs name, each once, those of one glob sorted."""
    paths = {}
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise InputError(f"{pattern}: no such file")
        for path in found:
            paths.setdefault(os.path.realpath(path), path)
    return paths.values()


# ---------------------------------------------------------------- what comes after the job


def all_rows(patterns):
    """Yield the rows of all files, with a progress bar."""
    with tqdm(unit=" rows", mininterval=BAR_SECONDS) as bar:
        for path in expand(patterns):
            for _, row in read_rows(path):
                bar.update()
                yield row


def export_chat(flags):
    """Section 3: each row as two chats, one a step, to tune a LLaMA that does the rest."""
    with atomic_write(flags.export_chat) as file:
        for row in all_rows(flags.captions):
            for prompt, source, answer in zip(PROMPTS, ROW_KEYS[1:], ROW_KEYS[2:]):
                question = {"role": "user", "content": prompt.format(row[source])}
                reply = {"role": "assistant", "content": row[answer]}
                chat = json.dumps({"messages": [question, reply]}, ensure_ascii=False)
                file.write(chat + "\n")


FIGURES = (
    "Words: T {t:.1f}, T' {t1:.1f}, T'' {t2:.1f}; of T kept in T' {kept_1:.0%}, of T' in T'' "
    "{kept_2:.0%} (more than 80% in {most:.1%} of the rows); T' is T in {same:.1%}"
)


def write_sheet(flags):
    """Does this LLM do what section 2.1 asks? A random sample of rows to read, and figures of all.

    The most frequent T' and T'' show what no rule knows: a placeholder, a refusal in another
    language, one sentence for many captions.
    """
    size = flags.limit or 100
    chance = random.Random(0)
    sample = []
    sums = Counter()
    seen = set()  # hashes of all texts: five million of the texts themselves would not fit
    repeats = {"T'": Counter(), "T''": Counter()}
    for row in all_rows(flags.captions):
        cells = [" ".join(row[key].split()) for key in ROW_KEYS]  # without tabs and line ends
        _, t, t1, t2 = cells
        kept_2 = share_kept(t1, t2)
        sums.update(
            rows=1,
            t=len(words_of(t)),
            t1=len(words_of(t1)),
            t2=len(words_of(t2)),
            kept_1=share_kept(t, t1),
            kept_2=kept_2,
            most=int(kept_2 > 0.8),
            same=int(t == t1),
        )
        for name, text in (("T'", t1), ("T''", t2)):
            if hash((name, text)) in seen:
                repeats[name][text] += 1
            seen.add(hash((name, text)))
        line = [*cells, round(100 * kept_2)]
        place = chance.randrange(sums["rows"])  # so each row is as likely in the sample
        if len(sample) < size:
            sample.append(line)
        elif place < size:
            sample[place] = line

    with atomic_write(flags.sheet) as file:
        header = ["image_id", "T", "T'", "T''", "% of T' kept in T''"]
        csv.writer(file, "excel-tab").writerows([header, *sample])
    means = {name: total / sums["rows"] for name, total in sums.items()}
    print(f"{sums['rows']:,} rows. " + FIGURES.format_map(Counter(means)))
    for name, counted in repeats.items():
        if counted:
            print(f"The most frequent {name}, of those that are there twice or more:")
        for text, n in counted.most_common(3):
            print(f"{n + 1:9,} x {text[:80]}")


def share_kept(text, paraphrase):
    """The share of a text's words that stand in its paraphrase too."""
    words = set(words_of(text))
    kept = words & set(words_of(paraphrase))
    return len(kept) / max(len(words), 1)


@contextlib.contextmanager
def atomic_write(path):
    """Open a file that replaces `path` when the block ends well; if not, the old one stays."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


# ---------------------------------------------------------------- flags, and main


def run(main):
    """Call main() and exit with its code; with 2 and one line for what the user must mend."""
    try:
        sys.exit(main())
    except (InputError, OSError) as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: what is written stays, and the same command goes on", file=sys.stderr)
        sys.exit(130)


def at_least(least, kind=int):
    """An argparse type: a number of `kind`, `least` or more."""

    def number(text):
        value = kind(text)
        if least <= value < float("inf"):  # false for nan
            return value
        raise ArgumentTypeError(f"{text}: must be {least} or more")

    return number


def key_value(text):
    """An argparse type: KEY=VALUE, the value as JSON where it is JSON, else as text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ArgumentTypeError(f"{text} is no KEY=VALUE; CAPTIONS stand before the flags")
    with contextlib.suppress(ValueError):
        value = json.loads(value)
    return key, value


def shard_of(text):
    """An argparse type: i/n."""
    shard, shards = map(int, text.split("/"))
    if not 0 <= shard < shards:
        raise ArgumentTypeError(f"{text}: must be i/n with i from 0 to n-1")
    return shard, shards


def parse_args(argv=None):
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("captions", nargs="+", metavar="CAPTIONS",
        help="files or globs: .txt with a caption on each line, which names no image; .tsv with "
        "the columns filepath and title; .jsonl with image_id and caption; img2dataset's .tar. "
        "For --sheet and --export-chat: files of rows")
    goal = parser.add_mutually_exclusive_group(required=True).add_argument
    goal("--output", metavar="ROWS.jsonl",
         help="write the rows to this file; captions that fail go to ROWS.jsonl.failed beside it")
    goal("--sheet", metavar="FILE.tsv",
         help="write a random sample of rows (--limit, or else 100) to it, and print figures")
    goal("--export-chat", metavar="FILE.jsonl",
         help="write the rows as chats to this file, to tune an LLM with (section 3)")
    add("--endpoint", metavar="URL",
        help="an OpenAI-compatible server (default: $OPENAI_BASE_URL, or else OpenAI's)")
    add("--model", default="gpt-4o-mini", metavar="NAME",
        help="the LLM (default: %(default)s, as the paper's is no longer served)")
    add("--sampling", nargs="+", type=key_value, metavar="KEY=VALUE",
        default={"temperature": 1.0, "top_p": 0.1, "max_tokens": 512},
        help="what each request holds beside its model and messages (default: temperature=1.0 "
        "top_p=0.1 max_tokens=512; Appendix A, and the authors' script for the last)")
    add("--min-words", type=at_least(0), default=2, metavar="N",
        help="leave out captions of fewer words (default: 2, the authors' script)")
    add("--max-words", type=at_least(0), default=15, metavar="N",
        help="leave out captions of more words (default: 15, the authors' script)")
    add("--limit", type=at_least(0), default=0, metavar="N",
        help="stop after the first N captions that are kept (section 3: 300000; default: 0, all)")
    add("--shard", type=shard_of, default="0/1", metavar="i/n",
        help="take every n-th caption from the i-th on, so that n jobs with an --output each share "
        "the work (default: %(default)s)")
    add("--retry-failed", action="store_true",
        help="ask again for the captions that failed before, and for no others")
    add("--concurrency", type=at_least(1), default=64, metavar="N",
        help="send up to N requests at the same time (default: %(default)s)")
    add("--requests-per-minute", type=at_least(0, float), default=0, metavar="N",
        help="send at most N requests a minute (default: 0, no limit)")
    add("--max-retries", type=at_least(0), default=10, metavar="N",
        help="send a request that fails up to N times more (default: %(default)s)")
    add("--timeout", type=at_least(0.001, float), default=60, metavar="SECONDS",
        help="wait so long for an answer (default: %(default)s)")
    add("--price-in", type=at_least(0, float), default=0, metavar="USD",
        help="the price of a million tokens sent, to show the cost (default: 0)")
    add("--price-out", type=at_least(0, float), default=0, metavar="USD",
        help="the price of a million tokens answered, to show the cost (default: 0)")
    flags = parser.parse_args(argv)
    flags.sampling = dict(flags.sampling)
    return flags


def main():
    flags = parse_args()
    target = flags.output or flags.sheet or flags.export_chat
    if os.path.exists(target) and not os.path.isfile(target):
        raise InputError(f"{target}: is no file that can be written to")
    if os.path.realpath(target) in map(os.path.realpath, expand(flags.captions)):
        raise InputError(f"{target}: is one of the inputs; name another file to write to")
    if flags.sheet:
        return write_sheet(flags)
    if flags.export_chat:
        return export_chat(flags)
    return generate(flags)


if __name__ == "__main__":
    run(main)
