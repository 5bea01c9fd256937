"""What generate.py can do, measured: calls/s, memory, start-up. Not a test; machines differ.

    python tests/bench_generate.py                              # 1M captions
    python tests/bench_generate.py --rows 5000000               # the paper's number
    git show d9a46bf:generate.py > ../old.py
    python tests/bench_generate.py --scripts generate.py ../old.py --repeats 3 --rows 100000

Several scripts are measured in turn. The server is tests/openai_server.py as a process of its own;
each call takes it 200 ms.
"""

import argparse
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
    """The calls that the server has had."""
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/count") as reply:
        return json.load(reply)["count"]


def wait_for_the_server():
    while True:
        try:
            return count()
        except OSError:
            time.sleep(0.1)


def peak_memory(pid):
    """The most memory of a process so far, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0


def cpu(pid):
    """The seconds of processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(script, folder, output, workers):
    """A job on the folder's captions, as a process."""
    args = ["--output", output, "--concurrency", workers]
    command = [sys.executable, Path(script).resolve(), "captions.tsv", *args]
    env = {**os.environ, "OPENAI_BASE_URL": f"http://127.0.0.1:{PORT}/v1", "no_proxy": "*"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(list(map(str, command)), cwd=folder, env=env, **quiet)


def measure(title, server, process, seconds):
    """Print the time to the first call, then the calls/s of `seconds`, then kill -9."""
    before = count()
    began = time.monotonic()
    while count() == before:
        assert process.poll() is None, f"{title}: it has ended; give more --rows"
        time.sleep(0.05)
    start_up = time.monotonic() - began
    time.sleep(3)  # until all workers are at it

    first = count()
    began = time.monotonic()
    used = cpu(process.pid)
    used_by_the_server = cpu(server.pid)
    time.sleep(seconds)
    calls = (count() - first) / (time.monotonic() - began)
    used = (cpu(process.pid) - used) / seconds
    used_by_the_server = (cpu(server.pid) - used_by_the_server) / seconds
    peak = peak_memory(process.pid)
    process.kill()
    process.wait()
    print(f"{title}: {calls:.0f} calls/s; first call after {start_up:.1f} s; "
          f"at most {peak:.0f} MB; cores used {used:.2f}, by the server {used_by_the_server:.2f}",
          flush=True)


def write_files(folder, rows):
    """captions.tsv, and rows.jsonl of all but its last 50,000 captions."""
    with open(folder / "captions.tsv", "w") as captions, open(folder / "rows.jsonl", "w") as done:
        captions.write("filepath\ttitle\n")
        for n in range(rows):
            image_id = f"{n // 10_000:05d}/{n:09d}"
            caption = f"A small dog no. {image_id} running over the green grass of a park"
            captions.write(f"{image_id}\t{caption}\n")
            if n < rows - 50_000:
                row = {"image_id": image_id, "caption": caption}
                row["paraphrase_1"] = "a dog in a park"
                row["paraphrase_2"] = "a hound on a lawn"
                done.write(json.dumps(row) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="captions of the job")
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=1, help="of all measurements")
    parser.add_argument("--scripts", nargs="+", default=[HERE.parent / "generate.py"])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[64, 128, 256, 512])
    flags = parser.parse_args()
    command = [sys.executable, HERE / "openai_server.py", "--port", str(PORT), "--delay", "0.2"]
    server = subprocess.Popen(command)
    try:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            write_files(folder, flags.rows)
            wait_for_the_server()
            print(f"{flags.rows:,} captions, {os.cpu_count()} cores, calls of 200 ms")
            outputs = iter(range(10_000))
            for script in flags.scripts * flags.repeats:
                for workers in flags.concurrency:
                    process = start(script, folder, f"{next(outputs)}.jsonl", workers)
                    measure(f"{script}, --concurrency {workers}", server, process, flags.seconds)
                process = start(script, folder, "rows.jsonl", 256)
                title = f"{script}, resumed on {flags.rows - 50_000:,} rows, --concurrency 256"
                measure(title, server, process, flags.seconds)
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
