"""ParaCLIP, section 2.1: an LLM rewrites each web caption T in two steps, T -> T' -> T''.

    export OPENAI_API_KEY=...
    python generate.py captions.tsv --output rows.jsonl              # OpenAI's API, as in the paper
    python generate.py 'laion/*.tar' --output rows.jsonl --endpoint http://localhost:8000/v1
    python generate.py rows.jsonl --export-chat chat.jsonl           # section 3: to tune a LLaMA

Whatever stops a job (Ctrl-C, kill -9, a full disk), the same command goes on where it was; it also
asks again for the captions that have failed.
Exit code: 0, every caption has its row; 1, some captions failed; 2, an error that you must mend;
130, stopped by Ctrl-C.
"""

import argparse
import contextlib
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
import unicodedata
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

# A pair of quotes around the whole, with no other inside but apostrophes.
QUOTED = re.compile(r"""["“«‘']((?:\w['’]\w|[^"“”«»‘’'])*)["”»’']""")
# The finish reasons of a whole answer; "none" where the server gives none.
NATURAL_ENDS = ("none", "", "stop", "stop_sequence", "eos", "eos_token", "end_turn", "complete")
EMPTY = "an empty answer"
# What a paraphrase has only if its source has it: markup, labels and remarks, the ends of lines and
# other control characters, the beginning of a list, words about the task or about who does it.
MARKS = re.compile(
    r"""
    [<>\[\]{}()|\\*_`:;/•\ufffd]
    | [\x00-\x1f\x7f-\x9f\u2028\u2029]
    | ^(?:\d+\.|[-–—+\#]+)(?=[ ])
    | \bi\b(?!-)
    | \b(?:paraphras|rephras|reword|rewrit|sorry|apolog|caption|context)
    """,
    re.VERBOSE,
)


def tidy(answer):
    """The answer without a reasoning model's thoughts, and without quotes around the whole."""
    answer = answer.rpartition("</think>")[2].strip()
    quoted = QUOTED.fullmatch(answer)
    return quoted[1].strip() if quoted else answer


def problem_with(answer, source, finish_reason, may_echo):
    """What is wrong with `answer` as a paraphrase of `source`, or "" if nothing is.

    An answer with a label or a remark is not repaired: what else is in it nobody knows.
    """
    words = words_of(answer)
    source_words = words_of(source)
    marks = marks_of(answer) - marks_of(source)
    if str(finish_reason).lower() not in NATURAL_ENDS:
        return f"finish_reason {finish_reason}"
    if not words:
        return EMPTY
    if marks:
        return f"{min(marks)!r}, which its source lacks"
    if len(words) > 3 * len(source_words) + 12:
        return "far longer than its source"
    if words == source_words and not may_echo:
        return "an echo of its source"
    return ""


def words_of(text):
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.casefold())


def marks_of(text):
    """The MARKS of a text, and its scripts: the first words of its letters' Unicode names."""
    letters = filter(str.isalpha, set(text))
    scripts = {unicodedata.name(letter, "?").split()[0] for letter in letters}
    return scripts | set(MARKS.findall(text.lower()))


# ---------------------------------------------------------------- one HTTP request

OPENAI = "https://api.openai.com/v1"
# The statuses of a request that may get an answer later; 0: no answer, 2xx: no chat completion.
TRY_AGAIN = {0, *range(200, 300), 408, 409, 424, 425, 429, 498, 499, *range(500, 600)}
RETRIES_TO_REACH = 2  # as long as no server has ever answered
LONGEST_LIMIT = 120  # seconds in which a rate limit may let nobody through


class InputError(Exception):
    """What the user must mend: main prints it as one line and exits with code 2."""


class CaptionFailed(Exception):
    """Why a caption gets no paraphrases in this run; the others go on."""


class Endpoint:
    """An OpenAI-compatible server, as all workers share it."""

    def __init__(self, flags):
        self.flags = flags
        self.key = "".join(os.environ.get("OPENAI_API_KEY", "").split())
        self.url = flags.endpoint.rstrip("/") + "/chat/completions"
        if not re.match("https?://[^@]+$", self.url):
            raise InputError("--endpoint: must be like http://localhost:8000/v1, without a user")
        if flags.endpoint == OPENAI and not self.key:
            raise InputError("OPENAI_API_KEY: set it, or name a server of your own with --endpoint")
        if not self.key.isascii():
            raise InputError("OPENAI_API_KEY: no key has such characters; copy it again")
        self.session = requests.Session()
        self.session.mount(self.url, requests.adapters.HTTPAdapter(pool_maxsize=flags.concurrency))
        if self.key:
            self.session.headers["Authorization"] = f"Bearer {self.key}"
        # Proxies and certificates of the environment are looked up once: to do it at every call
        # costs a tenth of the speed. And without trust_env no ~/.netrc replaces the key.
        self.options = self.session.merge_environment_settings(
            self.url, proxies={}, stream=True, verify=None, cert=None
        )
        self.session.trust_env = False
        self.options.update(timeout=(30, flags.timeout), allow_redirects=False)
        self.reached = False  # has a server ever answered?
        self.answered_at = 0  # time.monotonic() of the last answer to anybody
        self.opens_at = 0  # time.monotonic(); until then all workers wait
        self.trouble = ""  # the last failure of a request
        self.tokens = Counter(sent=0, answered=0)
        self.lock = threading.Lock()  # of the tokens

    def ask(self, prompt, source, may_echo=True):
        """A good answer to `prompt` about `source`. Raises CaptionFailed."""
        failures = 0
        for tries in itertools.count(1):
            status, text, retry_after = self.post(prompt.format(source))
            if 200 <= status < 300:
                answer = self.read(text, source, may_echo)
                if answer:
                    return answer
            reason = one_line(f"HTTP {status}: {text}" if status else text)
            self.trouble = reason

            # No caption is to blame for a rate limit (429) that lets others through.
            now = time.monotonic()
            if status != 429 or now > self.answered_at + LONGEST_LIMIT:
                failures += 1
            allowed = self.flags.max_retries if self.reached else RETRIES_TO_REACH
            if failures > allowed or not is_transient(status, text, retry_after):
                raise CaptionFailed(reason)
            if retry_after > 0:  # all workers wait
                self.opens_at = max(self.opens_at, now + retry_after)
            else:  # only this caption waits, for a time that is drawn: "full jitter"
                time.sleep(random.uniform(0, 2 ** min(tries, 6)))

    def post(self, prompt):
        """Send one user message. Returns the HTTP status, the text and the Retry-After in seconds.

        The status is 0 where no whole answer came; then the text says why.
        """
        while (pause := self.opens_at - time.monotonic()) > 0:
            time.sleep(pause)
        messages = [{"role": "user", "content": prompt}]
        body = {**self.flags.sampling, "model": self.flags.model, "messages": messages}
        try:
            with self.session.post(self.url, json=body, **self.options) as reply:
                status = reply.status_code
                if status < 200:
                    # http.client takes an interim status (103) for the answer. The true one is
                    # still to come, and would be the next call's: so the connection is dropped,
                    # as `with` does where a body has not been read.
                    return 0, f"interim status {status}", 0
                text = reply.content.decode("utf-8-sig", "replace")
        except Exception as error:  # noqa: BLE001 - whatever breaks on the way
            text = str(error).rpartition(": ")[2].strip("'\")")
            if "timed out" in text:
                text += ": is --concurrency too high, or --timeout too short, for this server?"
            return 0, f"no answer: {text}", 0
        self.reached = True
        if len(self.key) >= 16:  # a shorter one, such as EMPTY, is no secret
            text = text.replace(self.key, "(key)")
        code = re.search(r'"code": *"?([45]\d\d)\b', text)
        if code:  # some gateways say the status in the body, or in its choice
            status = int(code[1])
        if status == 401:  # its text may hold half of the key
            text = "OPENAI_API_KEY is missing or wrong"
        return status, text, seconds_of(reply.headers.get("Retry-After"))

    def read(self, text, source, may_echo):
        """The good answer in a chat completion. Raises CaptionFailed for a bad one.

        Returns "" where there is none, or an empty one that has cost no tokens.
        """
        try:
            reply = json.loads(text)
            choice = reply["choices"][0]
            answer = tidy(choice["message"]["content"] or "")
        except Exception:  # noqa: BLE001 - whatever else a server sends
            return ""
        sent, answered = tokens_of(reply.get("usage"))
        with self.lock:
            self.tokens.update(sent=sent, answered=answered)
        self.answered_at = time.monotonic()
        problem = problem_with(answer, source, choice.get("finish_reason"), may_echo)
        if problem and (problem != EMPTY or answered):
            # Asked again at once, at the paper's top_p of 0.1, it would most likely come back.
            raise CaptionFailed(one_line(f"{problem}: {answer}"))
        return answer


def tokens_of(usage):
    """The tokens (sent, answered) of a call. Thoughts often stand in total_tokens alone."""
    try:
        sent = int(usage["prompt_tokens"])
        return sent, max(int(usage["completion_tokens"]), int(usage["total_tokens"]) - sent)
    except Exception:  # noqa: BLE001 - a server may count in any way, or not at all
        return 0, 0


def is_transient(status, text, retry_after):
    """May the same request get an answer later? Not where the server blames the request itself."""
    if "insufficient_quota" in text:  # a 429 that no waiting ends
        return False
    # A 403 without a text is a gateway's.
    return status in TRY_AGAIN or retry_after > 0 or (status == 403 and not text)


def seconds_of(retry_after):
    """The seconds that a Retry-After header asks for, as a number or a date; 0 for neither."""
    with contextlib.suppress(Exception):
        return float(retry_after)
    with contextlib.suppress(Exception):
        return email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
    return 0


def one_line(text):
    """The beginning of a server's text, for a message: nothing in it steers a terminal."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text)[:240]


# ---------------------------------------------------------------- the job

FAILURES_IN_A_ROW = 50  # captions; then the set-up is to blame, not they
BAR_SECONDS = 0.3 if sys.stderr.isatty() else 30  # between two states of a bar; few in a log file


def generate(flags):
    """The whole job. Returns the exit code."""
    endpoint = Endpoint(flags)
    file, written = open_output(flags.output)

    todo = captions_to_ask(flags, written)
    waiting, ended = start_workers(endpoint, flags.concurrency)
    handed_out = 0
    failed = 0
    failed_in_a_row = 0
    with tqdm(total=len(todo), unit=" rows", mininterval=BAR_SECONDS, miniters=0) as bar:
        while bar.n < len(todo):
            # No more than the workers can take: what they have in hand is what a kill loses.
            for line in todo[handed_out : bar.n + flags.concurrency]:
                waiting.put(line)
                handed_out += 1
            bar.set_postfix(endpoint.tokens, failed=failed, trouble=endpoint.trouble, refresh=False)
            bar.update(0)
            try:
                row, reason = ended.get(timeout=0.5)
            except queue.Empty:
                continue
            bar.update()
            if reason is None:
                append(file, row)
                failed_in_a_row = 0
                continue
            with open(f"{flags.output}.failed", "ab") as log:
                log.write(line_of({**row, "reason": str(reason)}))
            last_reason = reason
            failed += 1
            failed_in_a_row += 1
            # Of captions that begin together those that fail end first, and may be a half.
            if failed_in_a_row == max(FAILURES_IN_A_ROW, flags.concurrency // 2):
                raise InputError(f"{failed_in_a_row} captions failed one after another, the last: "
                                 f"{reason}; are --model, --endpoint {endpoint.url} and --sampling "
                                 "right, and --concurrency and --timeout, if the server is slow?")
    print(f"{flags.output}: {len(todo) - failed} rows more; tokens: {dict(endpoint.tokens)}")
    if failed:
        print(f"{failed} captions failed at {endpoint.url}, the last: {last_reason}; "
              f"{flags.output}.failed has all reasons. The same command asks for them again",
              file=sys.stderr)
        return 1
    return 0


def start_workers(endpoint, count):
    """Start threads that run two_step. Returns the queues of lines to work on, and of results.

    A result is a row, with its paraphrases or not, and why it has failed, or None.
    """
    waiting = queue.SimpleQueue()
    ended = queue.SimpleQueue()

    def work():
        while True:
            row = json.loads(waiting.get())
            reason = None
            try:
                row["paraphrase_1"], row["paraphrase_2"] = two_step(row["caption"], endpoint.ask)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other captions go on
                reason = error
            ended.put((row, reason))

    for _ in range(count):
        threading.Thread(target=work, daemon=True).start()  # a daemon does not delay Ctrl-C
    return waiting, ended


def captions_to_ask(flags, written):
    """The captions without a row, as lines of JSON: five million of them fit into memory.

    written: the keys of the rows that are there. The order is shuffled: what failed in an earlier
    run would else stand together, and fifty old failures in a row would stop this run.
    """
    count = Counter()
    seen = set()
    todo = []
    for row in read_captions(flags.captions, count):
        key = key_of(row)
        if not flags.min_words <= len(row["caption"].split()) <= flags.max_words:
            count["left out by --min-words, --max-words"] += 1
        elif key not in seen:  # exact doubles count once
            seen.add(key)
            if key not in written:
                todo.append(line_of(row))
            if len(seen) == flags.limit:
                break
    if not seen:
        raise InputError(f"{flags.captions}: no captions; {dict(count)}")
    left_out = "".join(f"; {number} {what}" for what, number in count.items())
    print(f"captions: {len(todo)} of {len(seen)} to do{left_out}", flush=True)
    random.Random(0).shuffle(todo)
    return todo


def key_of(row):
    """A hash that tells a row from all others: ten million of them fit into memory."""
    return hash((row["image_id"], row["caption"]))


# ---------------------------------------------------------------- the output file

ROW_KEYS = ("image_id", "caption", "paraphrase_1", "paraphrase_2")  # the paper's x_I, T, T', T''
ROW_START = b'{"image_id": '


def open_output(path):
    """Open a file to append rows to, locked. Returns it, and the keys of the rows in it.

    What follows its last row, such as the start of one that a kill has torn, is cut off. A file
    that holds anything else is an InputError, and is not changed.
    """
    file = open(path, "ab+", buffering=0)  # noqa: SIM115 - for as long as we run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path}: another generate.py writes to it") from None
    except OSError:
        print(f"{path}: is on a disk without locks; start no second job on it", file=sys.stderr)
    written = set()
    end = 0
    for row, end in read_rows(path):
        written.add(key_of(row))
    file.truncate(end)
    if written:
        file.write(b"\n")  # the last row's, which an editor may have taken away
    return file, written


def append(file, row):
    """Write a row as one line, whole or not at all. Not buffered: kill -9 loses nothing."""
    line = line_of({"image_id": row["image_id"], **row})  # begins with ROW_START
    size = file.write(line)
    if size < len(line):
        file.truncate(file.tell() - size)
        raise InputError(f"{file.name}: the disk is full; make room, and run the same command")


def line_of(entry):
    """A line of JSON, in UTF-8 as people read it; half an emoji becomes "?"."""
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


# ---------------------------------------------------------------- readers of captions and rows

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")  # in either case


def read_captions(patterns, count):
    """Yield the captions in files of all three kinds, as rows without paraphrases."""
    shards = {}
    for path in expand(patterns):
        if path.endswith(".tar"):
            first = shards.setdefault(os.path.basename(path), path)
            if first != path:
                raise InputError(f"{first} and {path}: their images would have the same ids")
            yield from read_tar(path, count)
        else:
            for row, _ in read_rows(path, ROW_KEYS[:2]):
                yield row


def expand(patterns):
    """The files that the paths or globs name, those of one glob sorted."""
    paths = []
    for pattern in patterns:
        paths += sorted(glob.glob(pattern, recursive=True)) or [pattern]
    return paths


def reading(items, path):
    """The items of a file, with a bar in a terminal."""
    return tqdm(items, path, leave=False, disable=None)


def read_rows(path, needed=ROW_KEYS):
    """Yield (row, where it ends in the file) of each line of a .jsonl, or of a .tsv with a header.

    needed: the keys of its texts; whole rows are in no .tsv.
    The start of a row that a kill has torn, at the end of the file, is passed over.
    """
    start = 0
    header = None
    with open(path, "rb") as lines:
        for number, line in enumerate(reading(lines, path), 1):
            end = start + len(line.rstrip())
            start += len(line)
            if line.isspace():
                continue
            try:
                if needed == ROW_KEYS or not path.endswith(".tsv"):
                    row = json.loads(line)
                elif header is None:
                    header = cells_of(line)
                    continue
                else:
                    cells = dict(zip(header, cells_of(line), strict=True))
                    row = {"image_id": cells["filepath"], "caption": cells["title"]}
                check_row(row, needed)
            except Exception as error:  # noqa: BLE001 - whatever is in the file
                torn = ROW_START.startswith(line[: len(ROW_START)]) and not line.endswith(b"\n")
                if torn and isinstance(error, ValueError):
                    return
                raise InputError(f"{path}:{number}: {error!r}; needs image_id and caption (a .tsv: "
                                 "filepath and title), an output's row its paraphrases") from None
            yield row, end


def cells_of(line):
    """The cells of a .tsv's line. A cell wholly in csv's quotes loses them; any other is text."""
    cells = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
    for i, cell in enumerate(cells):
        if re.fullmatch(r'"([^"]|"")*"', cell):
            cells[i] = cell[1:-1].replace('""', '"')
    return cells


def check_row(row, needed):
    """Raise unless a row has its texts, and an image_id that stays below a root.

    Half an emoji, which no file can hold, becomes "?" here.
    """
    for key in needed:
        row[key] = row[key].encode("utf-8", "replace").decode()
    if re.match(r"\s*$|/|(.*/)?\.\.(/|$)", row["image_id"]):
        raise InputError("the image_id must be a path below the folder of images")


def read_tar(path, count):
    """Yield img2dataset's rows: the caption of the image KEY.jpg is KEY.txt."""
    images = set()
    captions = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in reading(tar, path):
                key, ending = os.path.splitext(member.name.removeprefix("./"))
                if ending == ".txt":
                    captions[key] = tar.extractfile(member).read().decode("utf-8-sig").strip()
                elif ending.lower() in IMAGE_ENDINGS:
                    images.add(key)
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # tarfile takes damage for the end
                raise InputError(f"damaged or cut off at byte {tar.offset:,}")
    except Exception as error:  # noqa: BLE001 - whatever is in the file
        raise InputError(f"{path}: can't be read: {error}") from None
    count["in a .tar without a partner"] += len(captions.keys() ^ images)
    shard = os.path.basename(path).removesuffix(".tar")
    for key, caption in captions.items():
        if key in images:
            yield {"image_id": f"{shard}/{key}", "caption": caption}


# ---------------------------------------------------------------- --export-chat


def export_chat(flags):
    """Section 3: each row as two chats, one a step, to tune a LLaMA that does the rest.

    As "prompt" and "completion", so that trl's loss is of the answer alone.
    """
    paths = expand(flags.captions)
    if os.path.realpath(flags.export_chat) in map(os.path.realpath, paths):
        raise InputError(f"{flags.export_chat}: is an input; name another file to write to")
    with open(f"{flags.export_chat}.part", "wb") as file:
        for path in paths:
            for row, _ in read_rows(path):
                for prompt, source, answer in zip(PROMPTS, ROW_KEYS[1:], ROW_KEYS[2:]):
                    question = {"role": "user", "content": prompt.format(row[source])}
                    reply = {"role": "assistant", "content": row[answer]}
                    file.write(line_of({"prompt": [question], "completion": [reply]}))
    os.replace(file.name, flags.export_chat)


# ---------------------------------------------------------------- flags, and main


def key_value(text):
    """An argparse type: KEY=VALUE, the value as JSON where it is JSON, else as text."""
    key, value = text.split("=", 1)
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("captions", nargs="+",
        help="files or globs: .tsv with the columns filepath and title; .jsonl with image_id and "
        "caption; img2dataset's .tar. For --export-chat: files of rows")
    goal = parser.add_mutually_exclusive_group(required=True).add_argument
    goal("--output",
         help="append the rows to this .jsonl; OUTPUT.failed beside it says why captions failed")
    goal("--export-chat",
         help="write the rows as chats to this .jsonl, to tune an LLM with (section 3)")
    add("--endpoint", default=os.environ.get("OPENAI_BASE_URL") or OPENAI,
        help="an OpenAI-compatible server (default: $OPENAI_BASE_URL, or else OpenAI's)")
    add("--model", default="gpt-4o-mini",
        help="the LLM (default: %(default)s, as the paper's is no longer served)")
    add("--sampling", nargs="+", type=key_value, metavar="KEY=VALUE",
        default={"temperature": 1.0, "top_p": 0.1, "max_tokens": 512},
        help="what each request holds beside its model and messages (default: temperature=1.0 "
        "top_p=0.1 max_tokens=512; Appendix A, and the authors' script for the last)")
    add("--min-words", type=int, default=2,
        help="leave out captions of fewer words (default: 2, the authors' script)")
    add("--max-words", type=int, default=15,
        help="leave out captions of more words (default: 15, the authors' script)")
    add("--limit", type=int, default=0,
        help="stop after the first LIMIT captions kept (section 3: 300000; default: 0, all)")
    add("--concurrency", type=int, default=64,
        help="send so many requests at the same time (default: %(default)s)")
    add("--max-retries", type=int, default=10,
        help="send a request that fails up to so many times more (default: %(default)s)")
    add("--timeout", type=float, default=300,
        help="wait so many seconds for an answer, or its next piece (default: %(default)s)")
    flags = parser.parse_args(argv)
    flags.sampling = dict(flags.sampling)
    flags.concurrency = max(1, flags.concurrency)
    return flags


def main():
    flags = parse_args()
    target = flags.output or flags.export_chat
    try:
        if os.path.exists(target) and not os.path.isfile(target):
            raise InputError(f"{target}: is no file that can be written to")
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        sys.exit(export_chat(flags) if flags.export_chat else generate(flags))
    except (InputError, OSError) as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: what is written stays, and the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
