"""Load a GGUF file in llama.cpp and report what it computes; run as a child process.

    python -m dora_mlx.exporting.llama_cpp_check FILE FOLDER < request.json

A file that llama.cpp does not like can abort the process, so this never runs in the parent's.
The request is ``{"token_ids": [[...], ...], "texts": [...]}``. FOLDER receives ``logits.npy``
(``[B, L, vocab]`` float32) and ``tokens.json`` (one list of token ids per text, without and with
the special tokens that encoding adds).
"""

import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def main() -> None:
    """Answer one request."""
    file, folder = sys.argv[1], Path(sys.argv[2])
    request = json.load(sys.stdin)
    rows = request["token_ids"]
    model = _load(file, len(rows[0]))
    np.save(folder / "logits.npy", np.stack([_logits(model, row) for row in rows]))
    tokens = {
        key: [
            model.tokenize(text.encode(), add_bos=added, special=True) for text in request["texts"]
        ]
        for key, added in (("plain", False), ("with_special", True))
    }
    (folder / "tokens.json").write_text(json.dumps(tokens))


def _load(file: str, length: int) -> Any:
    return llama_cpp.Llama(
        model_path=file,
        n_ctx=length,
        n_batch=length,
        n_threads=1,
        n_threads_batch=1,
        n_gpu_layers=0,
        logits_all=True,
        # The default cache is float16, which would be measured along with the file.
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )


def _logits(model: Any, token_ids: list[int]) -> Any:
    model.reset()
    model.eval(token_ids)
    return np.array(model.scores[: len(token_ids)], dtype=np.float32)


if __name__ == "__main__":
    main()
