#!/bin/bash
# One would guess: `transformers serve`, an OpenAI-compatible server, samples with the temperature and top_p of a request: at temperature 2 a
# small model answers the same question differently each time.
# What happens (transformers 5.24.0, torch 2.14.1; seen 2026-11-28): temperature and top_p of the request are set, and then not used, unless
# the generation_config.json in the model's folder says "do_sample": true, which save_pretrained() writes only if the model's own settings
# had it. Each answer is then the greedy one, with HTTP 200; with "do_sample" 8 of 8 answers differ, and a request's temperature 0 is greedy.
# Why it matters: ParaCLIP's second step has to use other words than the first. A tuned LLaMA that echoes is asked again with a higher
# temperature or top_p; at this server each of these answers is the same, and one looks for the fault in the tuning.
# Source: transformers' cli/serving: the request's values go into a copy of the model's generation config, do_sample stays as it is there.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
if [ -z "${PYTHON:-}" ]; then
  python3 -m venv "$folder/v"; PYTHON="$folder/v/bin/python"
  "$PYTHON" -m pip install -q --no-cache-dir torch==2.14.1 "transformers[serving]==5.24.0" requests==2.34.2
fi
cd "$folder" && "$PYTHON" -W ignore - 2>/dev/null <<'P'
import json, socket, subprocess, sys, time
from pathlib import Path
import requests, torch, transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = Path("model").resolve()
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)).save_pretrained(folder)
words = ["<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(253)]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
tokenizer.save_pretrained(folder)


def different_answers(temperature):
    """How many of 8 answers to one question differ."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    server = subprocess.Popen([sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--device", "cpu", "--port", url.rsplit(":")[-1]],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            time.sleep(1)
            try:
                requests.get(f"{url}/health", timeout=5)
                break
            except requests.ConnectionError:
                continue
        body = {"model": str(folder), "messages": [{"role": "user", "content": "w1 w2 w3"}], "max_tokens": 8, "temperature": temperature, "top_p": 1.0}
        answers = set()
        for _ in range(8):
            reply = requests.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            reply.raise_for_status()
            answers.add(reply.json()["choices"][0]["message"]["content"])
        return len(answers)
    finally:
        server.terminate()
        server.wait()


print("transformers", transformers.__version__, "torch", torch.__version__)
config = folder / "generation_config.json"
settings = json.loads(config.read_text())
as_saved = different_answers(temperature=2.0)
print(f"do_sample {settings.get('do_sample')} in generation_config.json: {as_saved} different of 8 answers at temperature 2")
config.write_text(json.dumps({**settings, "do_sample": True}))
sampled = different_answers(temperature=2.0)
print(f"do_sample True: {sampled} different of 8")
assert as_saved == 1 and sampled > 1, "the behaviour has changed"
P
