"""ParaCLIP, section 2.1: rewrite web captions in two steps with an LLM.

T  --caption-to-paraphrase-->  T'  --paraphrase-to-paraphrase-->  T''
"""

import argparse
import contextlib
import dataclasses
import glob
import json
import os
import sys
from pathlib import PurePosixPath

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
        if default not in ("", [], False):
            shown = " ".join(default) if isinstance(default, list) else default
            options["help"] += f" (default: {shown})".replace("%", "%%")
        if options.pop("positional", False):
            parser.add_argument(field.name, default=default, **options)
        else:
            parser.add_argument("--" + field.name.replace("_", "-"), default=default, **options)
    return config(**vars(parser.parse_args(argv)))


def run(main):
    """Call main(); an InputError becomes one line on stderr and exit code 2."""
    try:
        sys.exit(main())
    except InputError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a file that replaces `path` when the block ends well; until then, and if it fails, the old one stays whole."""
    part = f"{path}.part{os.getpid()}"
    try:
        with open(part, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


# ---------------------------------------------------------------- rows: the file between generate.py and paraclip.py

ROW_KEYS = ("image_id", "caption", "paraphrase_1", "paraphrase_2")  # and the paper's x_I, T, T', T''


def expand(patterns):
    """The files that paths or globs name, each pattern's sorted. Raises InputError for one that matches nothing."""
    paths = []
    for pattern in [patterns] if isinstance(patterns, (str, os.PathLike)) else patterns:
        found = sorted(glob.glob(os.fspath(pattern), recursive=True)) or [os.fspath(pattern)]
        if not os.path.isfile(found[0]):
            raise InputError(f"{pattern}: no such file")
        paths += found
    return paths


def is_safe(image_id):
    """True for a relative path that stays below its root, on any system."""
    return not (image_id.startswith("/") or ".." in PurePosixPath(image_id).parts or any(c in image_id for c in "\\\0\n\r"))


def check_row(row, place):
    """Raise InputError, naming `place`, unless `row` has the four keys, each a text that is not blank."""
    if not isinstance(row, dict):
        raise InputError(f"{place}: not a JSON object with the keys {', '.join(ROW_KEYS)}")
    for key in ROW_KEYS:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise InputError(f'{place}: "{key}" must be a text that is not empty')
    if not is_safe(row["image_id"]):
        raise InputError(f'{place}: image_id "{row["image_id"]}" points out of the image root')


def read_rows(patterns):
    """Yield the rows (dicts) of the JSONL files that paths or globs name. Raises InputError at file:line."""
    for path in expand(patterns):
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{path}:{number}: not a line of JSON ({error})") from None
                check_row(row, f"{path}:{number}")
                yield row
