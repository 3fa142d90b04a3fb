"""Which of llama.cpp's pre-tokenizers splits text exactly as a ``tokenizer.json`` does.

llama.cpp keeps its own code for every way of splitting text before the merges and picks it by the
name in ``tokenizer.ggml.pre``. A wrong name loads without a word and tokenizes up to half of all
lines wrong. So a name comes from the splitter itself, from a vocabulary that is known, or from the
person who exports; a splitter that is not known here is refused.
"""

import hashlib
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dora_mlx.errors import UserError
from dora_mlx.exporting.gguf.tokens import steps_of

# Every step of the splitter, then whether a whole word in the vocabulary skips the merges.
Signature = tuple[tuple[str, ...], bool]

_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORD + r"|\p{N}{1,3}" + _REST
_QWEN2 = _WORD + r"|\p{N}" + _REST
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}{_TEKKEN_REST}"
)
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}|\p{{N}}{{1,3}}{_TEKKEN_REST}"
)
_GPT2_STEP = "ByteLevel regex"
_DIGITS_STEP = "Digits individual"

_NAMES: dict[Signature, str] = {
    ((_GPT2_STEP,), False): "gpt-2",
    ((_DIGITS_STEP, _GPT2_STEP), False): "smollm",
    ((f"Split Isolated {_LLAMA3}", "ByteLevel"), True): "llama-bpe",
    ((f"Split Isolated {_LLAMA3}", "ByteLevel"), False): "dbrx",
    ((f"Split Isolated {_QWEN2}", "ByteLevel"), False): "qwen2",
    ((f"Split Isolated {_QWEN35}", "ByteLevel"), False): "qwen35",
    ((f"Split Isolated {_TEKKEN}", "ByteLevel"), True): "tekken",
    ((f"Split Isolated {_GPT4O}", "ByteLevel"), False): "gpt-4o",
}
# Same splitter; llama.cpp also removes spaces before punctuation when it prints these.
_CLEANED_UP = {"smollm": "starcoder", "qwen2": "stablelm2"}

# Names by the tokens that a vocabulary makes of ``_SAMPLE``, for vocabularies whose splitter is
# written in another way. The sample and the hashes are those of llama.cpp's converter (MIT).
_HASHES = {
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "b6dc8df998e1cfbdc4eac8243701a65afe638679230920b50d6f17d81c098166": "olmo",
    "32d85c31273f8019248f2559fed492d929ea28b17e51d81d3bb36fff23ca72b3": "stablelm2",
}
_SAMPLE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n"
    "\U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f (multiple emojis concatenated) \u2705 "
    "\U0001f999\U0001f999 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "\u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f\u17a2\u17b6\u1785"
    "\U0001f601 ?\u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e ------======= "
    "\u043d\u0435\u0449\u043e \u043d\u0430 \u0411\u044a\u043b\u0433\u0430\u0440\u0441\u043a\u0438 "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL"
)


def find_pretokenizer(path: Path, tokenizer: dict[str, Any], cleans_up_spaces: bool) -> str:
    """The name llama.cpp knows the splitter of a ``tokenizer.json`` by.

    Args:
        path: The file.
        tokenizer: The parsed file.
        cleans_up_spaces: ``clean_up_tokenization_spaces`` of ``tokenizer_config.json``.

    Raises:
        UserError: When no known name splits exactly the same.
    """
    signature = read_signature(tokenizer)
    name = _NAMES.get(signature)
    if name is not None:
        return _CLEANED_UP.get(name, name) if cleans_up_spaces else name
    tokens = Tokenizer.from_file(str(path)).encode(_SAMPLE).ids
    name = _HASHES.get(hashlib.sha256(str(tokens).encode()).hexdigest())
    if name is None:
        steps, ignores_merges = signature
        raise UserError(
            "llama.cpp has no pre-tokenizer that is known to split text as this tokenizer does "
            f"({' then '.join(steps) or 'none'}; ignore_merges {ignores_merges}). If you know its "
            "name in llama.cpp, name it with --pre NAME; the tokens are compared before the file "
            "is done. Or export safetensors instead."
        )
    return name


def read_signature(tokenizer: dict[str, Any]) -> Signature:
    """The steps of the splitter as text, and ``ignore_merges``."""
    steps = tuple(_step(part) for part in steps_of(tokenizer, "pre_tokenizer"))
    return steps, bool(tokenizer["model"].get("ignore_merges"))


def _step(part: dict[str, Any]) -> str:
    kind = part["type"]
    if kind == "ByteLevel":
        words = [kind]
        if part.get("use_regex", True):
            words.append("regex")
        if part.get("add_prefix_space", True):
            words.append("prefix-space")
        return " ".join(words)
    if kind == "Digits":
        return f"Digits {'individual' if part.get('individual_digits') else 'grouped'}"
    if kind == "Split" and "Regex" in part["pattern"]:
        how = part["behavior"], bool(part.get("invert"))
        # Keeping the matches, and removing all but them, are one where everything matches.
        if how in (("Isolated", False), ("Removed", True)):
            return f"Split Isolated {part['pattern']['Regex']}"
    return str(part)
