"""Does this LLM do what section 2.1 asks? A random sample of rows to read, and figures of all.

    python tests/sheet.py ROWS.jsonl... SHEET.tsv

The sheet has 100 rows. The figures: how long T, T' and T'' are, and how much of one stands in the
next. Where T' shares no word with T it may be the answer to another caption. The most frequent T'
and T'' show what no rule knows: a placeholder, a refusal, one sentence for many captions.
"""

import argparse
import csv
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from generate import ROW_KEYS, InputError, expand, read_rows, words_of

FIGURES = """{rows:,} rows
Words: T {t:.1f}, T' {t1:.1f}, T'' {t2:.1f}
Of T's words in T': {kept_1:.0%}; T' is T in {same:.1%} of the rows, and shares no word with it in \
{strange:.1%}
Of T''s words in T'': {kept_2:.0%}; more than 80% in {most:.1%} of the rows"""


def share_kept(text, paraphrase):
    """The share of a text's words that stand in its paraphrase too."""
    words = set(words_of(text))
    return len(words & set(words_of(paraphrase))) / max(len(words), 1)


def read_all(patterns):
    """Yield the rows of all files."""
    for path in expand(patterns):
        for row, _ in read_rows(path):
            yield row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+", metavar="ROWS.jsonl")
    parser.add_argument("sheet", metavar="SHEET.tsv")
    flags = parser.parse_args()
    if not flags.sheet.endswith(".tsv"):
        parser.error(f"{flags.sheet}: the last name is that of the sheet, and ends in .tsv")

    chance = random.Random(0)
    sample = []
    sums = Counter()
    seen = set()  # hashes of all texts: five million of the texts themselves would not fit
    repeats = {"T'": Counter(), "T''": Counter()}
    for row in read_all(flags.rows):
        cells = [" ".join(row[key].split()) for key in ROW_KEYS]  # without tabs and line ends
        _, t, t1, t2 = cells
        kept_1 = share_kept(t, t1)
        kept_2 = share_kept(t1, t2)
        sums.update(
            rows=1,
            t=len(words_of(t)),
            t1=len(words_of(t1)),
            t2=len(words_of(t2)),
            kept_1=kept_1,
            kept_2=kept_2,
            same=int(t == t1),
            strange=int(kept_1 == 0),
            most=int(kept_2 > 0.8),
        )
        for name, text in (("T'", t1), ("T''", t2)):
            if hash((name, text)) in seen:
                repeats[name][text] += 1
            seen.add(hash((name, text)))
        line = [*cells, round(100 * kept_2)]
        place = chance.randrange(sums["rows"])  # so each row is as likely in the sample
        if len(sample) < 100:
            sample.append(line)
        elif place < 100:
            sample[place] = line

    with open(flags.sheet, "w", encoding="utf-8", newline="") as file:
        header = ["image_id", "T", "T'", "T''", "% of T' kept in T''"]
        csv.writer(file, "excel-tab").writerows([header, *sample])
    if not sample:
        sys.exit(f"{' '.join(flags.rows)}: no rows")
    means = {name: total / sums["rows"] for name, total in sums.items()}
    print(FIGURES.format_map({**means, "rows": sums["rows"]}))
    for name, counted in repeats.items():
        if counted:
            print(f"The most frequent {name}, of those that are there twice or more:")
        for text, n in counted.most_common(3):
            print(f"{n + 1:9,} x {text[:80]}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"sheet.py: error: {error}")
