"""What generate.py can do, measured: calls/s, memory, start-up. Not a test; the figures depend on the machine.

    python tests/bench_generate.py                    # 1M captions
    python tests/bench_generate.py --rows 5000000     # the paper's number

The server is tests/openai_server.py as a process of its own; each call takes it 200 ms.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
PORT = 8765


def count():
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/count") as reply:
        return json.load(reply)["count"]


def memory(pid, what):
    """MB of VmRSS (now) or VmHWM (the most so far)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def cpu(pid):
    """Seconds of processor time so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(folder, output, *args):
    command = [sys.executable, HERE.parent / "generate.py", "captions.tsv", "--output", output, *args]
    env = os.environ | {"OPENAI_BASE_URL": f"http://127.0.0.1:{PORT}/v1", "no_proxy": "*"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(list(map(str, command)), cwd=folder, env=env, **quiet)


def measure(title, server, folder, commands, seconds):
    """Start-up until the first call, then calls/s over `seconds`, then kill -9."""
    before, began = count(), time.monotonic()
    processes = [start(folder, *command) for command in commands]
    while count() == before:
        time.sleep(0.05)
    startup = time.monotonic() - began
    time.sleep(3)  # until all workers are at it
    pids = [process.pid for process in processes]
    first, began, used = count(), time.monotonic(), [cpu(pid) for pid in (*pids, server.pid)]
    time.sleep(seconds)
    calls = (count() - first) / (time.monotonic() - began)
    *busy, busy_server = [(cpu(pid) - u) / seconds for pid, u in zip((*pids, server.pid), used)]
    peaks = [memory(pid, "VmHWM") for pid in pids]
    for process in processes:
        process.kill()
        process.wait()
    print(f"{title}: {calls:.0f} calls/s; first call after {startup:.1f} s; memory at most {max(peaks):.0f} MB; "
          f"cores used {' + '.join(f'{b:.2f}' for b in busy)}, the server {busy_server:.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="captions of the job (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement (default: %(default)s)")
    flags = parser.parse_args()
    server = subprocess.Popen([sys.executable, HERE / "openai_server.py", "--port", str(PORT), "--delay", "0.2"])
    try:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            ids = [f"{n // 10_000:05d}/{n:09d}" for n in range(flags.rows)]
            with open(folder / "captions.tsv", "w") as file:
                file.write("filepath\ttitle\n")
                file.writelines(f"{i}\tA small dog no. {i} running over the green grass of a park\n" for i in ids)
            while True:
                try:
                    count()
                    break
                except OSError:
                    time.sleep(0.1)
            print(f"{flags.rows} captions, {os.cpu_count()} cores, calls of 200 ms")
            for workers in (64, 128, 256, 512):
                measure(f"one process, --concurrency {workers}", server, folder,
                        [[f"{workers}.jsonl", "--concurrency", workers]], flags.seconds)
            measure("two processes, --shard, --concurrency 256 each", server, folder,
                    [[f"part{n}.jsonl", "--concurrency", 256, "--shard", f"{n}/2"] for n in (0, 1)], flags.seconds)
            with open(folder / "rows.jsonl", "w") as file:
                for i in itertools.islice(ids, flags.rows - 50_000):
                    caption = f"A small dog no. {i} running over the green grass of a park"
                    row = {"image_id": i, "caption": caption, "paraphrase_1": "a dog in a park", "paraphrase_2": "a hound on a lawn"}
                    file.write(json.dumps(row) + "\n")
            measure(f"resumed on {flags.rows - 50_000} rows, --concurrency 256", server, folder,
                    [["rows.jsonl", "--concurrency", 256]], flags.seconds)
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
