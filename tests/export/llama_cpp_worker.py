"""llama.cpp's token ids, logits and greedy continuation: ``python llama_cpp_worker.py TASK.json ANSWER.npz``,
in an environment with llama-cpp-python.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama

FLOAT32 = 0  # ggml's number of the type; by default, keys and values are stored in float16


def main(task_file: str, answer_file: str) -> None:
    task = json.loads(Path(task_file).read_text(encoding="utf-8"))
    found: dict[str, np.ndarray] = {}
    for k in task["topks"]:
        model = Llama(
            task["file"],
            n_ctx=task["context"],
            n_batch=task["context"],
            logits_all=True,
            verbose=False,
            n_threads=1,
            type_k=FLOAT32,
            type_v=FLOAT32,
            flash_attn=False,
            kv_overrides={"qwen3moe.expert_used_count": k},
        )
        for number, text in enumerate(task["texts"]):
            ids = model.tokenize(text.encode(), add_bos=False, special=True)
            model.reset()
            model.eval(ids[: task["context"]])
            found[f"ids {number}"] = np.array(ids)
            found[f"logits {k} {number}"] = np.array(model.scores[: min(len(ids), task["context"])])
        model.reset()
        prompt = model.tokenize(task["prompt"].encode(), add_bos=False, special=True)
        greedy = model.generate(prompt, temp=0.0, repeat_penalty=1.0)
        found[f"greedy {k}"] = np.array([token for token, _ in zip(greedy, range(8), strict=False)])
    np.savez(answer_file, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
