"""GGUF: how a tokenizer cuts a text into words before they become tokens, by the name that a file has for it.

The names are llama.cpp's (`tokenizer.ggml.pre`). The expressions are those of the models' own `tokenizer.json`, which
llama.cpp writes otherwise where its engine lacks something: our engine is the one they were written for. The same holds
for what is done beside cutting.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

SHORT_FORMS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{SHORT_FORMS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
MINICPM5 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")
SEED_CODER = QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")
# Words of o200k: capitals, then small letters, either of which may be missing.
CAPITALS, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}*{SMALL}+END|[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}+{SMALL}*END"
O200K = rf"{CASED}|\p{{N}}DIGITS| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
GPT4O = O200K.replace("END", f"{SHORT_FORMS}?").replace("DIGITS", "{1,3}")
TEKKEN = O200K.replace("END", "").replace("DIGITS", "")
EACH_DIGIT, DIGITS, THREE_DIGITS = r"\p{N}", r"\p{N}+", "[0-9][0-9][0-9]"
THOUSANDS = r"(?=(\d{3})+(?!\d))"  # where digits are cut into threes, from the last one on
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
HAN = "[一-龥ࠀ-一가-퟿]+"  # as it stands in the models' files: wider than it looks
HAN_AND_KANA = "[一-龥぀-ゟ゠-ヿ]+"
# Letters of the alphabets that have capitals; those with escapes would become others where a text is composed.
LATIN = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥ"
    "ῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    + SPACES
)


@dataclass(frozen=True, slots=True)
class Words:
    """How a text becomes words, and what else a name stands for."""

    cuts: tuple[str, ...]  # expressions: what one matches stands alone, the next cuts what is left and what stands
    takes_whole: bool = False  # a word that is a token is that token, whatever merges say
    composes: bool = False  # characters are composed (NFC) first
    adds_bos: bool = False  # a text begins with the bos token unless the file says otherwise

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Return what cuts a text and writes the bytes of each word as GPT-2's visible characters."""
        cuts = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in self.cuts]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    def normalizer(self) -> normalizers.Normalizer | None:
        """Return what a text goes through first."""
        return normalizers.NFC() if self.composes else None


DEFAULT = "default"  # llama.cpp's own rule, not a model's
WORDS = {
    **dict.fromkeys(("gpt-2", "phi-2", "jina-v2-de", "jina-v2-es"), Words((GPT2,))),
    **dict.fromkeys(("gigachat", "a.x-4.0", "mellum", "trillion"), Words((GPT2,))),
    **dict.fromkeys(("olmo", "mpt"), Words((GPT2,), composes=True)),  # GPT-NeoX's
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "minerva-7b"), Words((EACH_DIGIT, GPT2))),
    "command-r": Words((EACH_DIGIT, GPT2), composes=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "midm-2.0"), Words((LLAMA3,), takes_whole=True, adds_bos=True)),
    # Llama 3's without a bos token (SmolLM3), and Falcon 3's, which has none either.
    **dict.fromkeys(("smaug-bpe", "falcon3"), Words((LLAMA3,), takes_whole=True)),
    "dbrx": Words((LLAMA3,)),  # cl100k: OLMo 2, Phi-4, Granite 4
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Words((QWEN2,), composes=True)),
    **dict.fromkeys(("stablelm2", "megrez"), Words((QWEN2,))),
    "qwen35": Words((QWEN35,), composes=True),
    "minicpm5": Words((r"\p{N}{1,3}", MINICPM5), takes_whole=True),
    "seed-coder": Words((SEED_CODER,)),
    **dict.fromkeys(("gpt-4o", "llama4"), Words((GPT4O,), takes_whole=True)),  # o200k: gpt-oss, Phi-4-mini
    "tekken": Words((TEKKEN,), takes_whole=True, adds_bos=True),  # Mistral since Nemo
    "deepseek-llm": Words((r"[\r\n]", rf"\s?[{LATIN}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", HAN, EACH_DIGIT)),
    "deepseek-coder": Words((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN, EACH_DIGIT)),
    "deepseek-v3": Words((r"\p{N}{1,3}", HAN_AND_KANA, DEEPSEEK3)),
    "superbpe": Words((DIGITS, THOUSANDS)),  # words are not cut at spaces: tokens may be several of them
    "viking": Words((r" ?[^(\s|.,!?…。，、।۔،)]+", EACH_DIGIT)),
    "falcon": Words((PUNCTUATION.replace("]", "`]"), GPT2, THREE_DIGITS)),
    DEFAULT: Words((PUNCTUATION, GPT2, DIGITS, THREE_DIGITS)),
}
