"""ParaCLIP, section 2.1: rewrite web captions in two steps with an LLM.

    T  --caption-to-paraphrase-->  T'  --paraphrase-to-paraphrase-->  T''

    export OPENAI_API_KEY=...
    python generate.py captions.tsv --output rows.jsonl                       # OpenAI's API, as in the paper
    python generate.py 'laion/*.tar' --output rows.jsonl --model NAME --endpoint http://localhost:8000/v1
    python generate.py rows.jsonl --export-chat train.jsonl                   # to instruction-tune LLaMA, section 3

Captions come from .txt (one a line), .tsv (filepath, title), .jsonl (image_id, caption), .tar (img2dataset's
shards) or standard input (-). Whatever stops a job (Ctrl-C, kill -9, a full disk), the same command resumes it.
Exit code: 0, every row is written; 1, some rows failed; 2, an error that you must mend; 130, stopped by Ctrl-C.
"""

import argparse
import atexit
import contextlib
import csv
import dataclasses
import email.utils
import errno
import fcntl
import glob
import itertools
import json
import mmap
import os
import platform
import random
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence

import requests
from tqdm import tqdm

PROMPTS = (  # section 2.1, verbatim
    'Paraphrase the given caption "{}" concisely while preserving the meaning.',
    'Paraphrase the given text "{}" concisely while preserving the meaning and avoiding use of existing words.',
)


# ---------------------------------------------------------------- what the three scripts share


class InputError(Exception):
    """What the user must mend: `run` prints it as one line on stderr and exits with code 2."""


def flag(default, help, **options):
    """A dataclass field that `parse_flags` turns into a command-line flag; `options` go to argparse."""
    value = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**value, metadata={"help": help, **options})


def parse_flags(config, doc, argv=None):
    """An instance of the dataclass `config` from the command line: a flag for each field, typed by its default."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise InputError(f"{message} (see --help)")

    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(config):
        options = dict(field.metadata)
        default = [] if field.default is dataclasses.MISSING else field.default
        if field.default is dataclasses.MISSING:
            default = field.default_factory()
            options = {"nargs": "+", **options}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif not isinstance(default, (str, list)):
            options["type"] = type(default)
        if default not in ("", []) and default is not False:
            shown = " ".join(default) if isinstance(default, list) else default
            options["help"] += f" (default: {shown})".replace("%", "%%")
        if options.pop("positional", False):
            parser.add_argument(field.name, default=default, **options)
        else:
            parser.add_argument("--" + field.name.replace("_", "-"), default=default, **options)
    return config(**vars(parser.parse_args(argv)))


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(main):
    """Call main() and exit with its code; with 2 and one line on stderr for what the user must mend, 130 for Ctrl-C."""
    try:
        sys.exit(main())
    except (InputError, OSError) as error:
        if isinstance(error, OSError):
            advice = "; make room: what is written stays, and the same command resumes" if error.errno in DISK_FULL else ""
            error = f"{error.filename or 'writing'}: {error.strerror or error}{advice}"
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # under torchrun rank 0 says it first, and the others are ended
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: what is written is kept; run the same command again", file=sys.stderr)
        sys.exit(130)


BAR_SECONDS = 0.3 if sys.stderr.isatty() else 30  # between two states of a progress bar; few of them in a log file


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a file that replaces `path` when the block ends well; if it fails, the old one stays whole."""
    part = f"{path}.part{os.getpid()}"
    try:
        with open(part, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        error.filename = path
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


# ---------------------------------------------------------------- every flag


@dataclasses.dataclass
class Config:
    captions: Sequence[str] = flag([], ".txt, .tsv, .jsonl, .tar files or globs; - is standard input", positional=True)
    output: str = flag("", "the rows; captions that fail go to ROWS.failed.jsonl beside it", metavar="ROWS.jsonl")
    ids: str = flag("", "the image_ids of one .txt, a line each (default: its line numbers)", metavar="FILE")
    endpoint: str = flag("", "an OpenAI-compatible server (default: $OPENAI_BASE_URL, else OpenAI's)", metavar="URL")
    model: str = flag("gpt-3.5-turbo", "LLM to ask; the paper's gpt-35-turbo-0301 is no longer served", metavar="NAME")
    temperature: float = flag(1.0, "of the LLM's sampling: Appendix A")
    top_p: float = flag(0.1, "of the LLM's sampling: Appendix A")
    max_tokens: int = flag(512, "longest answer: the authors' script")
    min_words: int = flag(2, "captions with fewer words are left out: the authors' script")
    max_words: int = flag(15, "captions with more words are left out: the authors' script")
    limit: int = flag(0, "take the first N kept captions only, 0 is all (section 3: 300000 for ChatGPT)", metavar="N")
    shard: str = flag("0/1", "take every n-th caption, from the i-th on (i = 0 ... n-1), for n machines", metavar="i/n")
    retry_failed: bool = flag(False, "take up the captions that failed before, and no others")
    concurrency: int = flag(64, "calls in flight at once", metavar="N")
    requests_per_minute: float = flag(0.0, "send no more calls than this, 0 is no limit", metavar="N")
    max_retries: int = flag(10, "send a call again up to N times when the server or the network failed it", metavar="N")
    timeout: float = flag(60.0, "how long a server may be silent", metavar="SECONDS")
    price_in: float = flag(0.0, "of a million tokens sent; shows the cost", metavar="USD")
    price_out: float = flag(0.0, "of a million tokens answered; shows the cost", metavar="USD")
    export_chat: str = flag("", "write the rows in CAPTIONS as chat pairs to this file, and stop", metavar="FILE")

    def __post_init__(self):
        if bool(self.output) == bool(self.export_chat):
            raise InputError("give --output ROWS.jsonl (or else --export-chat FILE); see --help")
        for name, value in vars(self).items():
            least = 1 if name in ("concurrency", "timeout", "max_tokens") else 0
            if isinstance(value, (int, float)) and not value >= least:
                raise InputError(f"--{name.replace('_', '-')} {value}: too small")
        self.part, self.parts = map(int, self.shard.split("/")) if re.fullmatch(r"\d+/\d+", self.shard) else (0, 0)
        if not self.part < self.parts:
            raise InputError(f"--shard {self.shard}: must be i/n with i from 0 to n-1")


# ---------------------------------------------------------------- rows: the file between generate.py and paraclip.py

ROW_KEYS = ("image_id", "caption", "paraphrase_1", "paraphrase_2")  # and the paper's x_I, T, T', T''
UNSAFE = frozenset("\\\0\n\r")  # characters that no image_id may have


def expand(patterns):
    """The files that paths or globs name, each pattern's sorted; a glob leaves out the *.failed.jsonl beside the rows.

    Raises InputError for a pattern that matches nothing.
    """
    paths = []
    for pattern in [patterns] if isinstance(patterns, (str, os.PathLike)) else patterns:
        pattern = os.fspath(pattern)
        found = sorted(glob.glob(pattern, recursive=True))
        found = [path for path in found if path == pattern or ".failed." not in os.path.basename(path)] or [pattern]
        if not os.path.isfile(found[0]):
            raise InputError(f"{pattern}: {'a folder, not a file' if os.path.isdir(found[0]) else 'no such file'}")
        paths += found
    return paths


def is_safe(image_id):
    """True for a relative path that stays below its root, on any system."""
    return not image_id.startswith("/") and ".." not in image_id.split("/") and UNSAFE.isdisjoint(image_id)


def check_row(row, place):
    """Raise InputError, naming `place`, unless `row` has the four keys, each a text that is not blank."""
    for key in ROW_KEYS:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise InputError(f'{place}: "{key}" must be a text that is not empty')
    if not is_safe(row["image_id"]):
        raise InputError(f'{place}: image_id "{row["image_id"]}" points out of the image root')


def text_lines(path):
    """Yield (line number, line without its end) of a UTF-8 file. Raises InputError at file:line."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise InputError(f"{path}:{number}: not UTF-8 text") from None


def json_lines(path):
    """Yield (line number, object) of a JSONL file, blank lines left out. Raises InputError at file:line."""
    for number, line in text_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not a line of JSON, or cut off ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f'{path}:{number}: not a JSON object like {{"image_id": ...}}')
        if type(row.get("image_id")) is int:
            row["image_id"] = str(row["image_id"])
        yield number, row


def read_rows(patterns):
    """Yield the rows (dicts) of the JSONL files that paths or globs name. Raises InputError at file:line."""
    for path in expand(patterns):
        for number, row in json_lines(path):
            check_row(row, f"{path}:{number}")
            yield row


@contextlib.contextmanager
def open_rows(path):
    """Open the output to append to it, locked against a second process; a line torn by a kill is cut off."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another generate.py is writing to it; give this one its own --output") from None
        if not os.path.isfile(path):
            raise InputError(f"--output {path}: not a file")
        if file.seek(0, os.SEEK_END):
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                tail = content[content.rfind(b"\n") + 1 :]
            if tail.startswith(b"{"):
                file.truncate(file.tell() - len(tail))
            elif tail:
                raise InputError(f"--output {path}: not a file of rows")
        yield file


def append(file, row):
    """Append `row` as a line, whole or not at all. `file` is unbuffered, so that kill -9 loses nothing."""
    line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        file.truncate(end)
        raise OSError(error.errno, error.strerror, file.name) from None


def settle_failed(path, recovered):
    """Keep in `path` each failed caption's last line, but those in `recovered`. Returns {image_id: caption's hash}."""
    last = {}
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                last[row["image_id"]] = line, hash(row["caption"])
            except (ValueError, LookupError, TypeError):
                if line.endswith(b"\n"):  # else it is torn
                    raise InputError(f"{path}:{number}: not a failed row") from None
        last = {image_id: entry for image_id, entry in last.items() if image_id not in recovered}
        with atomic_write(path, "wb") as file:
            file.writelines(line for line, _ in last.values())
        if not last:
            os.remove(path)
    return {image_id: caption for image_id, (_, caption) in last.items()}


# ---------------------------------------------------------------- captions, streamed


def read_txt(path, ids=""):
    image_ids = text_lines(ids) if ids else ()
    for number, caption in text_lines(path):
        yield number, {"image_id": next(image_ids, (0, ""))[1] if ids else str(number), "caption": caption}
    if ids and next(image_ids, None):
        raise InputError(f"--ids {ids}: has more lines than {path}")


def read_tsv(path):
    lines = text_lines(path)
    header = next(lines, (1, ""))[1].split("\t")
    if not {"filepath", "title"} <= set(header):
        raise InputError(f"{path}:1: the header must name the columns filepath and title, with a tab between")
    for number, line in lines:
        if not line.strip():
            continue
        cells = line.split("\t")
        if '"' in line:
            with contextlib.suppress(csv.Error):  # which it raises for a quote that stands for itself
                cells = next(csv.reader([line], delimiter="\t", strict=True))
        if len(cells) != len(header):
            raise InputError(f"{path}:{number}: {len(cells)} columns, but the header has {len(header)}")
        row = dict(zip(header, cells))
        yield number, {"image_id": row["filepath"], "caption": row["title"]}


def read_tar(path):
    """A sample is the members that share a key; its caption is in .txt, or in .json under "caption"."""
    shard = os.path.basename(path).removesuffix(".tar")
    try:
        with tarfile.open(path, "r:") as tar:
            files = filter(tarfile.TarInfo.isfile, iter(tar.next, None))
            for key, members in itertools.groupby(files, lambda file: re.sub(r"^\./|\.[^/]*$", "", file.name)):
                texts = {}
                for member in members:
                    if (kind := member.name.rpartition(".")[2]) in ("txt", "json"):
                        texts[kind] = tar.extractfile(member).read().decode()
                tar.members.clear()  # or tarfile would remember them all
                caption = texts.get("txt", "").rstrip("\r\n") or json.loads(texts.get("json", "{}")).get("caption")
                yield key, {"image_id": f"{shard}/{key}", "caption": caption or ""}
    except (tarfile.TarError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: a damaged shard ({error})") from None


READERS = {".txt": read_txt, ".tsv": read_tsv, ".jsonl": json_lines, ".tar": read_tar}


def find_inputs(patterns, ids):
    """The files to read. Standard input is copied to a temporary file, since captions are read twice."""
    paths = []
    for pattern in patterns:
        if pattern == "-":
            start = sys.stdin.buffer.readline()
            kind = ".jsonl" if start.startswith(b"{") else ".tsv" if b"\t" in start and b"filepath" in start else ".txt"
            with tempfile.NamedTemporaryFile("wb", prefix="standard-input-", suffix=kind, delete=False) as copy:
                atexit.register(os.remove, copy.name)
                copy.write(start)
                shutil.copyfileobj(sys.stdin.buffer, copy)
            paths.append(copy.name)
        else:
            paths += expand(pattern)
    for path in paths:
        if os.path.splitext(path)[1] not in READERS:
            raise InputError(f"{path}: its name must end in one of {' '.join(READERS)}")
        if ids and (len(paths) > 1 or not path.endswith(".txt")):
            raise InputError("--ids: goes with one .txt of captions")
    return paths


def read_captions(paths, ids=""):
    """Yield (path, number of the line or key in the shard, {"image_id", "caption", ...}) of every caption, in order."""
    for path in paths:
        read = READERS[os.path.splitext(path)[1]]
        for number, row in read(path, ids) if ids else read(path):
            for key in ("image_id", "caption"):
                if not isinstance(row.get(key), str):
                    raise InputError(f'{path}:{number}: "{key}" must be a text')
                if not row[key].isascii():  # half an emoji, which JSON can hold, can't be written
                    row[key] = row[key].encode("utf-8", "replace").decode()
            if not row["image_id"].strip() or not is_safe(row["image_id"]):
                raise InputError(f'{path}:{number}: image_id "{row["image_id"]}" must be a path below the image root')
            yield path, number, row


def plan(config, paths, known, failed):
    """Read every caption once before the first paid call, so that what is wrong with them costs nothing.

    `known`: {image_id: caption's hash} of the rows in the output and the failed file (emptied here); `failed`: those in
    the latter. Returns a byte for each caption, 1 where it is to be paraphrased, and how many the whole job has.
    """
    todo, seen, sizes, kept = bytearray(), set(), {path: Counter() for path in paths}, 0
    captions = read_captions(paths, config.ids)
    for path, number, row in tqdm(captions, "reading captions", unit="", leave=False, disable=None):
        image_id, words = row["image_id"], len(row["caption"].split())
        if image_id in seen:
            again = read_captions(paths, config.ids)
            first = next(f"{path}:{number}" for path, number, row in again if row["image_id"] == image_id)
            raise InputError(f'image_id "{image_id}" is there twice: {first} and {path}:{number}; each caption needs '
                             "one of its own")
        seen.add(image_id)
        mine = len(todo) % config.parts == config.part
        before = known.pop(image_id, None) if mine else None
        if before not in (None, hash(row["caption"])):
            raise InputError(f'{config.output}: has another caption for image_id "{image_id}" than {path}:{number}; '
                             "it belongs to another job: give this one its own --output")
        size = "short" if words < config.min_words else "long" if words > config.max_words else "kept"
        sizes[path][size] += 1
        wanted = mine and size == "kept" and not (config.limit and kept >= config.limit)
        kept += wanted
        todo.append(wanted and (image_id in failed if config.retry_failed else before is None))
        if config.limit and kept >= config.limit and not known:
            break
    if known:
        raise InputError(f'{config.output}: {len(known)} rows (image_id "{next(iter(known))}", ...) are none of these '
                         "captions; it belongs to another job or --shard: give this one its own --output")
    sizes[" ".join(config.captions)] = total = sum(sizes.values(), Counter())
    for name, size in sizes.items():
        counts = f"{name}: {size['kept']:,} captions kept, {size['short']:,} too short, {size['long']:,} too long"
        if not total["kept"]:
            raise InputError(f"{counts} (--min-words, --max-words)")
        if size is total or size and not size["kept"]:
            print(counts)
    return todo, kept


# ---------------------------------------------------------------- the model's answers

LABEL = re.compile(  # as in "**Paraphrased caption:**" or "Sure! Here is a concise paraphrase of the text:"
    r"^[*_\s]*(?:(?:sure|certainly|of course|okay)[,!.]* )?(?:here(?: is|['’]s) (?:[\w-]+ ){0,3}|(?:the|a|one) )?paraphrased?"
    r"(?: (?:caption|text|version))?(?: of [^:\n]{1,40})?[*_\s]*:[*_\s]*",
    re.IGNORECASE)
QUOTED = re.compile(r""""([^"]*)"|“([^“”]*)”|«([^«»]*)»|`([^`]*)`|['‘]((?:[^'‘’]|(?<=\w)['’](?=\w))*)['’]""")
REFUSAL = re.compile(
    r"(i['’]?m|i am) (very |so )?(sorry|afraid|unable|not able)\b|sorry,? (but )?i\b|i apologi[sz]e\b|as an? (ai|\w+ "
    r"language model)\b|(unfortunately, )?i (can ?not|can['’]?t) (\w+ )?(assist|help|provide|fulfill?|paraphrase|"
    r"rephrase|generate|create|comply|process|answer)\b|please provide\b",
    re.IGNORECASE)


def tidy(text):
    """The answer without white space, a label or quotes around it."""
    before = None
    while text != before:
        before, text = text, LABEL.sub("", text.strip())
        if quoted := QUOTED.fullmatch(text):
            text = quoted[quoted.lastindex]
    return text


def fault(answer, source, finish_reason, may_echo):
    """What is wrong with `answer` as a paraphrase of `source`; "" if nothing is."""
    if finish_reason in ("length", "content_filter"):
        return f"finish_reason {finish_reason}"
    if not answer:
        return "an empty answer"
    if len(answer.splitlines()) > 1:
        return "more than one line"
    if REFUSAL.match(answer) and not REFUSAL.match(source):
        return "a refusal"
    words, given = (re.findall(r"\w+", text.casefold()) or text for text in (answer, source))
    return "an echo of its input" if words == given and not may_echo else ""


# ---------------------------------------------------------------- one HTTP request, and the gate that all of them pass

OPENAI = "https://api.openai.com/v1"
ASKS = 4  # a bad answer is asked again up to 3 times
FATAL = {
    401: "OPENAI_API_KEY is missing or wrong",
    402: "the account has no credit left",
    403: "this key may not use this model or server",
    404: "no such model, or no such address (must --endpoint end in /v1?)",
}


class RowFailed(Exception):
    """Why a caption gets no paraphrases; the others go on."""


class Stopped(Exception):
    """The job is being stopped: this caption is left for the next run."""


class Caption(threading.local):
    """What a worker is at."""

    attempts = 0  # calls made for it


class Endpoint:
    """An OpenAI-compatible server, shared by all workers: its connections, the gate before it, the counts."""

    def __init__(self, config):
        base = config.endpoint or os.environ.get("OPENAI_BASE_URL") or OPENAI
        self.config, self.url = config, base.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch(r"https?://[^@?#\s]+", self.url):
            raise InputError("--endpoint: must be like http://localhost:8000/v1, with no key in it")
        if not re.fullmatch(r"[!-~]*", self.key) or not self.key and base == OPENAI:
            raise InputError("OPENAI_API_KEY: set it to your key, or name another server with --endpoint")
        self.session = requests.Session()
        for scheme in ("http://", "https://"):  # each worker keeps its connection; the default pool has 10
            self.session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=config.concurrency))
        self.session.headers.update({"Content-Type": "application/json"})
        if self.key:
            self.session.headers["Authorization"] = f"Bearer {self.key}"
        # The environment's proxies and certificates, looked up once: at every call that costs a fifth of the speed.
        self.settings = self.session.merge_environment_settings(self.url, {}, None, None, None)
        self.settings["allow_redirects"] = False
        self.session.trust_env = False
        self.interval = 60 / config.requests_per_minute if config.requests_per_minute else 0
        self.opens_at = self.next_turn = 0.0  # seconds of time.monotonic()
        self.lock, self.stop, self.caption = threading.Lock(), threading.Event(), Caption()
        self.answered, self.tokens_in, self.tokens_out, self.trouble = 0, 0, 0, ""

    def sleep(self, seconds):
        if self.stop.wait(seconds):
            raise Stopped

    def wait_turn(self):
        """The gate: return when this worker may send."""
        while True:
            with self.lock:
                now = time.monotonic()
                turn = max(now, self.next_turn)
                self.next_turn = turn + self.interval
            if turn > now:
                self.sleep(turn - now)
            if time.monotonic() >= self.opens_at:  # else it was closed meanwhile
                return

    def hold(self, seconds):
        """Close the gate to all workers."""
        with self.lock:
            self.opens_at = max(self.opens_at, time.monotonic() + seconds)
            self.next_turn = max(self.next_turn, self.opens_at)

    def call(self, prompt):
        """Send one user message and return the body of the answer, trying again while that may help.

        Raises RowFailed if this message can't be answered, InputError if none can, and Stopped.
        """
        options = {name: getattr(self.config, name) for name in ("model", "temperature", "top_p", "max_tokens")}
        body = json.dumps({**options, "messages": [{"role": "user", "content": prompt}]})
        tries, answered = 0, self.answered
        while True:
            self.wait_turn()
            self.caption.attempts += 1
            status, pause, reached = 0, None, True
            try:
                reply = self.session.post(self.url, body, timeout=self.config.timeout, **self.settings)
                status, said = reply.status_code, reply.content.decode("utf-8", "replace")
                pause = retry_after(reply.headers.get("Retry-After"))
            except requests.RequestException as error:
                said = str(error).rpartition(": ")[2].strip("'\")")
                reached = "Failed to" not in str(error)  # urllib3's "... resolve" and "... establish a new connection"
            if len(self.key) >= 8:  # a shorter one is no secret, and may be a word
                said = said.replace(self.key, "[key]")
            if status == 200:
                with self.lock:
                    self.answered, self.trouble = self.answered + 1, ""
                return said
            reason = f"HTTP {status}: {' '.join(said.split())[:200]}" if status else f"no answer: {said}"
            if status in FATAL or "insufficient_quota" in said or 300 <= status < 400:
                why = FATAL.get(402 if "insufficient_quota" in said else status, "the server has moved")
                raise InputError(f"{self.url}: {why} ({'HTTP 401' if status == 401 else reason})")
            if 400 <= status < 500 and status not in (408, 409, 429):
                raise RowFailed(reason)
            # A 429 while others get through is no fault of this caption, and starts its count again.
            tries = 0 if status == 429 and self.answered > answered else tries + 1
            answered = self.answered
            if tries > self.config.max_retries:
                if not (reached or self.answered):
                    raise InputError(f"{self.url}: {reason}, {tries} times: is the server there, and --endpoint right?")
                raise RowFailed(f"{reason}, {tries} times")
            self.trouble = reason
            delay = pause or random.uniform(0, min(60, 2**tries))  # full jitter
            (self.hold if pause or status == 429 else self.sleep)(delay)

    def ask(self, prompt, source, may_echo=True):
        """The model's paraphrase of the text `source`. Raises RowFailed if it gives no good one in ASKS answers."""
        for _ in range(ASKS):
            said = self.call(prompt.format(source))
            try:
                reply = json.loads(said)
                choice, usage = reply["choices"][0], reply.get("usage") or {}
                answer = tidy(choice["message"].get("content") or "")
                why = fault(answer, source, choice.get("finish_reason"), may_echo)
                with self.lock:
                    self.tokens_in += usage.get("prompt_tokens") or 0
                    self.tokens_out += usage.get("completion_tokens") or 0
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                answer, why = " ".join(said.split()), "no chat completion"
            if not why:
                return answer
        raise RowFailed(f"{why}, {ASKS} times; the last: {answer[:200]}")


def retry_after(value):
    """Seconds of the pause that a Retry-After header (seconds or an HTTP date) asks for; None if it asks for none."""
    try:
        return min(max(0.0, float(value)), 86400)
    except (TypeError, ValueError):
        with contextlib.suppress(TypeError, ValueError):
            return min(max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time()), 86400)


# ---------------------------------------------------------------- the method, and the job around it

GRACE = 8  # seconds that calls in flight get to land when the job is stopped
STREAK = 1000  # captions failed one after another (100 if nothing was ever answered): the server's fault, not theirs


def two_step(caption, ask):
    """Section 2.1: of the caption T, T' without the web's noise, then T'' in other words. Raises RowFailed.

    A step 1 that fails never reaches step 2.
    """
    paraphrase_1 = ask(PROMPTS[0], caption)
    paraphrase_2 = ask(PROMPTS[1], paraphrase_1, may_echo=False)
    return paraphrase_1, paraphrase_2


def work(config, endpoint, captions, rows, failures, bar):
    """Paraphrase `captions` in --concurrency threads; each goes to the file `rows` or `failures` as soon as it is done.

    When all are done, or something stops the job and calls in flight have landed (or GRACE is over), returns how many
    went to either file, the image_ids that --retry-failed brought through, and the exception that stopped it or None.
    """
    reading, writing = threading.Lock(), threading.Lock()
    count, recovered, errors, streak = {rows: 0, failures: 0}, set(), [], 0

    def worker():
        nonlocal streak
        try:
            while not endpoint.stop.is_set():
                with reading:
                    row = next(captions, None)
                if row is None:
                    return
                endpoint.caption.attempts, file = 0, rows
                try:
                    row["paraphrase_1"], row["paraphrase_2"] = two_step(row["caption"], endpoint.ask)
                except RowFailed as failure:
                    endpoint.trouble, file = str(failure), failures
                    row.update(reason=str(failure), attempts=endpoint.caption.attempts)
                with writing:
                    append(file, row)
                    count[file] += 1
                    streak = 0 if file is rows else streak + 1
                    if config.retry_failed and file is rows:
                        recovered.add(row["image_id"])
                    if streak >= (STREAK if endpoint.answered else STREAK // 10):
                        raise InputError(f"{streak} captions failed one after another, the last: {row['reason']}")
        except BaseException as error:  # noqa: BLE001 (the main thread raises the first, which is never Stopped)
            errors.append(error)
            endpoint.stop.set()

    def show():
        for file in count:
            os.fsync(file.fileno())
        done, tokens = sum(count.values()), endpoint.tokens_in + endpoint.tokens_out
        spent = (endpoint.tokens_in * config.price_in + endpoint.tokens_out * config.price_out) / 1e6
        cost = f", ${spent:.2f} of about ${spent / done * (bar.total - bar.initial):.2f}" if spent and done else ""
        trouble = f", last: {endpoint.trouble[:60]}" if endpoint.trouble else ""
        bar.set_postfix_str(f"{tokens:,} tokens{cost}, {count[failures]} failed{trouble}", refresh=False)
        bar.update(bar.initial + done - bar.n)

    threads = [threading.Thread(target=worker, daemon=True) for _ in range(config.concurrency)]
    try:
        for thread in threads:
            thread.start()
        while not endpoint.stop.is_set() and any(thread.is_alive() for thread in threads):
            endpoint.stop.wait(0.3)
            show()
    except KeyboardInterrupt as error:
        errors.insert(0, error)
        bar.set_description("stopping")
    endpoint.stop.set()
    until = time.monotonic() + GRACE
    while any(thread.is_alive() for thread in threads) and time.monotonic() < until:
        time.sleep(0.1)
    writing.acquire()  # and never released: what lands from here on is left for the next run
    show()
    return count, recovered, errors[0] if errors else None


def generate(config):
    """The whole job. Returns the exit code."""
    failed_path = "{}.failed{}".format(*os.path.splitext(config.output))
    paths, endpoint = find_inputs(config.captions, config.ids), Endpoint(config)
    with open_rows(config.output) as rows:
        written = tqdm(read_rows(glob.escape(config.output)), "reading the output", unit="", leave=False, disable=None)
        known = {row["image_id"]: hash(row["caption"]) for row in written}
        failed = settle_failed(failed_path, known)
        stand = f"{len(known):,} rows stand in {config.output}, {len(failed):,} captions have failed before"
        known.update(failed)
        todo, total = plan(config, paths, known, failed)
        print(f"{stand}; {sum(todo):,} of {total:,} to do")
        captions = (row for _, _, row in itertools.compress(read_captions(paths, config.ids), todo))
        bar = tqdm(total=total, initial=total - sum(todo), unit=" rows", mininterval=BAR_SECONDS)
        with open(failed_path, "ab", buffering=0) as failures, bar:
            count, recovered, error = work(config, endpoint, captions, rows, failures, bar)
        failed = settle_failed(failed_path, recovered)
        if error:
            raise error
    print(f"{config.output}: {count[rows]:,} rows more; tokens: {endpoint.tokens_in:,} in, {endpoint.tokens_out:,} out")
    if failed:
        print(f"{failed_path}: {len(failed):,} captions have failed; the same command with --retry-failed asks again")
    return 1 if failed else 0


def export_chat(config):
    """Section 3: each row as two chats, one a step, to instruction-tune a LLaMA that paraphrases the other captions."""
    if os.path.realpath(config.export_chat) in map(os.path.realpath, expand(config.captions)):
        raise InputError(f"--export-chat {config.export_chat}: would replace the rows themselves")
    with atomic_write(config.export_chat) as file:
        for row in tqdm(read_rows(config.captions), unit=" rows"):
            texts = [row[key] for key in ROW_KEYS[1:]]
            for prompt, source, answer in zip(PROMPTS, texts, texts[1:]):
                chat = [{"role": "user", "content": prompt.format(source)}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": chat}, ensure_ascii=False) + "\n")


def main():
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell's "&" had turned SIGINT off
        signal.signal(number, signal.default_int_handler)
    config = parse_flags(Config, __doc__)
    return export_chat(config) if config.export_chat else generate(config)


# ---------------------------------------------------------------- what the three scripts share

ROW_KEYS = ("image_id", "caption", "paraphrase_1", "paraphrase_2")  # the paper's x_I, T, T', T''
BAR_SECONDS = 0.3 if sys.stderr.isatty() else 30  # between two states of a progress bar; few of them in a log file
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(Exception):
    """What the user must mend: `run` prints it as one line on stderr and exits with code 2."""


def run(main):
    """Call main() and exit with its code; with 2 and one line on stderr for what the user must mend, 130 for Ctrl-C."""
    try:
        sys.exit(main())
    except (InputError, OSError) as error:
        if isinstance(error, OSError):
            advice = "; make room: what is written stays, and the same command resumes" if error.errno in DISK_FULL else ""
            error = f"{error.filename or 'writing'}: {error.strerror or error}{advice}"
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
        if not kind(text) >= least:  # so is nan
            raise argparse.ArgumentTypeError(f"{text}: must be {least} or more")
        return kind(text)
    return number


def damaged(place, error):
    """The InputError for whatever the reader of a damaged file raised."""
    return InputError(f"{place}: can't be read: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}")


@contextlib.contextmanager
def reading(path):
    """The one guard around every reader of a file: what it raises becomes an InputError that names `path`."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - json, csv, tarfile, safetensors and pickle each have their own
        raise damaged(path, error) from None


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a file that replaces `path` when the block ends well; if it fails, the old one stays whole."""
    part = f"{path}.{platform.node()}-{os.getpid()}.part"  # no other process's, on any host that shares the disk
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        error.filename = path
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


def expand(patterns):
    """The files that paths or globs name, each pattern's sorted; a glob leaves out the *.failed.jsonl beside the rows.

    Raises InputError for a pattern that matches nothing.
    """
    paths = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True))
        found = [path for path in found if path == pattern or ".failed." not in os.path.basename(path)] or [pattern]
        if not os.path.isfile(found[0]):
            raise InputError(f"{pattern}: {'a folder, not a file' if os.path.isdir(found[0]) else 'no such file'}")
        paths += found
    return paths


def is_safe(image_id):
    """True for a relative path that stays below its root, on any system."""
    return not (image_id.startswith("/") or ".." in image_id.split("/") or {*"\\\0\n\r"} & {*image_id})


def json_object(line):
    """The dict in a line of JSON (bytes). Half an emoji, which JSON can hold and UTF-8 can't, becomes a "?"."""
    row = json.loads(line.decode().removeprefix("\ufeff"))
    if b"\\ud" in line.lower():
        row = json.loads(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
    if type(row.get("image_id")) is int:
        row["image_id"] = str(row["image_id"])
    return row


def json_lines(path, check=lambda row: None):
    """Yield (line number, byte offset, dict) of a JSONL file, without its blank lines.

    Raises InputError at file:line for a line that is no object, or that `check` raises anything for.
    """
    offset = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                try:
                    row = json_object(line)
                    check(row)
                except Exception as error:  # noqa: BLE001 - json's, and those of a value that is no text, dict, ...
                    raise damaged(f"{path}:{number}", error) from None
                yield number, offset, row
            offset += len(line)


def check_row(row):
    """Raise an exception unless the four keys have texts, none of them blank, and image_id stays below its root."""
    for key in ROW_KEYS:
        if not row[key].strip():
            raise ValueError(f'"{key}" is blank')
    if not is_safe(row["image_id"]):
        raise ValueError(f'image_id "{row["image_id"]}" points out of the image root')


def read_rows(patterns):
    """Yield (path, byte offset, row) of the JSONL files that paths or globs name. Raises InputError at file:line."""
    for path in expand(patterns):
        for _, offset, row in json_lines(path, check_row):
            yield path, offset, row


def tar_files(tar):
    """Yield the files of an open tarfile. Raises InputError for damage and cuts, which tarfile may take for the end."""
    with reading(tar.name):
        for member in iter(tar.next, None):
            if member.isfile():
                yield member
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) != bytes(512):
            raise InputError(f"{tar.name}: damaged or cut off at byte {tar.offset:,}")


if __name__ == "__main__":
    run(main)
