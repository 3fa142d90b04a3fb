"""Which of llama.cpp's pre-tokenizers splits text exactly as a ``tokenizer.json`` does.

llama.cpp keeps its own code for every way of splitting text before the merges and picks it by the
name in ``tokenizer.ggml.pre``. A wrong name loads without a word and tokenizes up to half of all
lines wrong, so a splitter that is not known here is refused.
"""

from typing import Any

from dora_mlx.errors import UserError

# Every step of the splitter, then whether a whole word in the vocabulary skips the merges.
Signature = tuple[tuple[str, ...], bool]

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_STEP = "ByteLevel regex"
_DIGITS_STEP = "Digits individual"

_NAMES: dict[Signature, str] = {
    ((_GPT2_STEP,), False): "gpt-2",
    ((_DIGITS_STEP, _GPT2_STEP), False): "smollm",
    ((f"Split Isolated {_LLAMA3}", "ByteLevel"), True): "llama-bpe",
}
# Same splitter; llama.cpp also removes spaces before punctuation when it prints these.
_CLEANED_UP = {"smollm": "starcoder"}


def find_pretokenizer(tokenizer: dict[str, Any], cleans_up_spaces: bool) -> str:
    """The name llama.cpp knows the splitter of a ``tokenizer.json`` by.

    Args:
        tokenizer: The parsed file.
        cleans_up_spaces: ``clean_up_tokenization_spaces`` of ``tokenizer_config.json``.

    Raises:
        UserError: When no known name splits exactly the same.
    """
    signature = read_signature(tokenizer)
    name = _NAMES.get(signature)
    if name is None:
        steps, ignores_merges = signature
        raise UserError(
            "llama.cpp has no pre-tokenizer that is known to split text as this tokenizer does "
            f"({' then '.join(steps) or 'none'}; ignore_merges {ignores_merges}), so it cannot be "
            "exported to GGUF yet. Export safetensors instead."
        )
    return _CLEANED_UP.get(name, name) if cleans_up_spaces else name


def read_signature(tokenizer: dict[str, Any]) -> Signature:
    """The steps of the splitter as text, and ``ignore_merges``."""
    steps = tuple(_step(part) for part in _flatten(tokenizer.get("pre_tokenizer")))
    return steps, bool(tokenizer["model"].get("ignore_merges"))


def _flatten(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for child in part["pretokenizers"] for step in _flatten(child)]


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
    if kind == "Split" and "Regex" in part["pattern"] and not part.get("invert"):
        return f"Split {part['behavior']} {part['pattern']['Regex']}"
    return str(part)
