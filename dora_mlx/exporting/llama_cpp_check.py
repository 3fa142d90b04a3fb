"""Load GGUF files in llama.cpp and report what they compute; run as a child process.

    python -m dora_mlx.exporting.llama_cpp_check FOLDER FILE... < request.json

A file that llama.cpp does not like can abort the process, so this never runs in the parent's.
The request is ``{"token_ids": [[...], ...], "texts": [...]}``. FOLDER receives, for the first
file, ``logits0.npy`` (``[B, L, vocab]`` float32) and ``tokens0.json`` (one list of token ids per
text, without and with the special tokens that encoding adds); and so on.
"""

import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def main() -> None:
    """Answer one request."""
    folder, files = Path(sys.argv[1]), sys.argv[2:]
    request = json.load(sys.stdin)
    rows = request["token_ids"]
    for index, file in enumerate(files):
        model = _load(file, len(rows[0]))
        np.save(folder / f"logits{index}.npy", np.stack([_logits(model, row) for row in rows]))
        tokens = {
            key: [
                model.tokenize(text.encode(), add_bos=added, special=True)
                for text in request["texts"]
            ]
            for key, added in (("plain", False), ("with_special", True))
        }
        (folder / f"tokens{index}.json").write_text(json.dumps(tokens))


def _load(file: str, length: int) -> Any:
    return llama_cpp.Llama(
        model_path=file,
        n_ctx=length,
        n_batch=length,
        n_threads=1,
        n_threads_batch=1,
        n_gpu_layers=0,
        logits_all=True,
        # Sliding windows would otherwise keep less of the cache than is asked for again.
        swa_full=True,
        # The default cache is float16, which would be measured along with the file.
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        # Says on stderr why a file cannot be loaded.
        verbose=True,
    )


def _logits(model: Any, token_ids: list[int]) -> Any:
    model.reset()
    model.eval(token_ids)
    return np.array(model.scores[: len(token_ids)], dtype=np.float32)


if __name__ == "__main__":
    main()
