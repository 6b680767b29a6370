"""Writes a tiny LLaMA model with random weights as a GGUF file: word salad at no download."""

from __future__ import annotations

import random
import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_WIDTH, _LAYERS, _HEADS, _INNER, _CONTEXT = 64, 2, 4, 128, 4096
_ALIGNMENT = 32
_LIKELY = """
    the a river stone lamp quiet green apple seven over under walks sings opens finds small red blue city
    rain wind clock paper garden north slowly bright door window table bread winter letter music and but
    then where near
"""
_WORDS = _LIKELY.split()
_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_END_OF_TURN = _SPECIALS.index("<|im_end|>")
_PUNCTUATION = '.,"})'
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True)
class _Vocabulary:
    tokens: list[str]
    merges: list[str]
    words: frozenset[str]
    punctuation: frozenset[str]


@dataclass
class _Gguf:
    """A GGUF file in the making."""

    metadata: list[bytes] = field(default_factory=list)
    tensors: list[tuple[str, tuple[int, ...], array[float]]] = field(default_factory=list)

    def text(self, key: str, value: str) -> None:
        self._put(key, _STRING, _string(value))

    def number(self, key: str, value: int) -> None:
        self._put(key, _UINT32, struct.pack("<I", value))

    def fraction(self, key: str, value: float) -> None:
        self._put(key, _FLOAT32, struct.pack("<f", value))

    def flag(self, key: str, value: bool) -> None:
        self._put(key, _BOOL, struct.pack("<?", value))

    def texts(self, key: str, values: list[str]) -> None:
        self._put(key, _ARRAY, struct.pack("<IQ", _STRING, len(values)) + b"".join(map(_string, values)))

    def numbers(self, key: str, values: Iterable[int]) -> None:
        packed = array("i", values)
        self._put(key, _ARRAY, struct.pack("<IQ", _INT32, len(packed)) + packed.tobytes())

    def encoded(self) -> bytes:
        infos, blobs, offset = [], [], 0
        for name, shape, values in self.tensors:
            blob = _padded(values.tobytes())
            dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            infos.append(_string(name) + dimensions + struct.pack("<IQ", 0, offset))
            blobs.append(blob)
            offset += len(blob)
        counts = struct.pack("<IQQ", 3, len(self.tensors), len(self.metadata))
        return _padded(b"GGUF" + counts + b"".join(self.metadata + infos)) + b"".join(blobs)

    def _put(self, key: str, kind: int, value: bytes) -> None:
        self.metadata.append(_string(key) + struct.pack("<I", kind) + value)


def write_tiny_gguf(path: Path, seed: int = 0) -> Path:
    """Writes the model, 0.6 MB, and gives its path."""
    vocabulary = _vocabulary()
    gguf = _Gguf()
    _describe_model(gguf, len(vocabulary.tokens))
    _describe_tokenizer(gguf, vocabulary)
    _add_weights(gguf, vocabulary, random.Random(seed))
    path.write_bytes(gguf.encoded())
    return path


def _vocabulary() -> _Vocabulary:
    """Has GPT-2's 256 byte tokens, so that any text can be encoded, and some words to be likely."""
    characters = _byte_characters()
    words = [characters[ord(" ")] + word for word in _WORDS]
    splits = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    merges = dict.fromkeys(f"{start} {character}" for start, character in splits)
    pieces = dict.fromkeys(start + character for start, character in splits)
    punctuation = frozenset(characters[ord(mark)] for mark in _PUNCTUATION)
    return _Vocabulary([*_SPECIALS, *characters, *pieces], list(merges), frozenset(words), punctuation)


def _byte_characters() -> list[str]:
    """Gives GPT-2's printable character for each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _describe_model(gguf: _Gguf, vocabulary_size: int) -> None:
    gguf.text("general.architecture", "llama")
    gguf.text("general.name", "tiny-random-llama")
    gguf.number("general.file_type", 0)
    gguf.number("general.alignment", _ALIGNMENT)
    gguf.number("llama.vocab_size", vocabulary_size)
    gguf.number("llama.context_length", _CONTEXT)
    gguf.number("llama.embedding_length", _WIDTH)
    gguf.number("llama.block_count", _LAYERS)
    gguf.number("llama.feed_forward_length", _INNER)
    gguf.number("llama.attention.head_count", _HEADS)
    gguf.number("llama.attention.head_count_kv", _HEADS)
    gguf.number("llama.rope.dimension_count", _WIDTH // _HEADS)
    gguf.fraction("llama.attention.layer_norm_rms_epsilon", 1e-5)


def _describe_tokenizer(gguf: _Gguf, vocabulary: _Vocabulary) -> None:
    control, normal = 3, 1
    ordinary = len(vocabulary.tokens) - len(_SPECIALS)
    gguf.text("tokenizer.ggml.model", "gpt2")
    gguf.text("tokenizer.ggml.pre", "refact")
    gguf.texts("tokenizer.ggml.tokens", vocabulary.tokens)
    gguf.numbers("tokenizer.ggml.token_type", [control] * len(_SPECIALS) + [normal] * ordinary)
    gguf.texts("tokenizer.ggml.merges", vocabulary.merges)
    gguf.number("tokenizer.ggml.bos_token_id", 0)
    gguf.number("tokenizer.ggml.eos_token_id", _END_OF_TURN)
    gguf.number("tokenizer.ggml.unknown_token_id", 0)
    gguf.number("tokenizer.ggml.padding_token_id", 0)
    gguf.flag("tokenizer.ggml.add_bos_token", False)


def _add_weights(gguf: _Gguf, vocabulary: _Vocabulary, source: random.Random) -> None:
    """Dimension 0 of every embedding is constant, so column 0 of the output is a bias for each token."""
    size = len(vocabulary.tokens)
    embedding, output = _matrix(source, size, _WIDTH, 0.3), _matrix(source, size, _WIDTH, 0.6)
    for index, token in enumerate(vocabulary.tokens):
        embedding[index * _WIDTH] = 4.0
        output[index * _WIDTH] = _bias(index, token, vocabulary)
    gguf.tensors.append(("token_embd.weight", (_WIDTH, size), embedding))
    gguf.tensors.append(("output_norm.weight", (_WIDTH,), _ones(_WIDTH)))
    gguf.tensors.append(("output.weight", (_WIDTH, size), output))
    for layer in range(_LAYERS):
        _add_layer(gguf, f"blk.{layer}.", source)


def _add_layer(gguf: _Gguf, prefix: str, source: random.Random) -> None:
    for name in ("attn_norm", "ffn_norm"):
        gguf.tensors.append((f"{prefix}{name}.weight", (_WIDTH,), _ones(_WIDTH)))
    shapes = {f"attn_{part}": (_WIDTH, _WIDTH) for part in ("q", "k", "v", "output")}
    shapes |= {"ffn_gate": (_WIDTH, _INNER), "ffn_up": (_WIDTH, _INNER), "ffn_down": (_INNER, _WIDTH)}
    for name, shape in shapes.items():
        gguf.tensors.append((f"{prefix}{name}.weight", shape, _matrix(source, *shape, 0.05)))


def _bias(index: int, token: str, vocabulary: _Vocabulary) -> float:
    """Makes words likely, raw bytes and other marks not, and ends a turn now and then."""
    if index < len(_SPECIALS):
        return -1.0 if index == _END_OF_TURN else -3.0
    if token in vocabulary.words:
        return 0.0
    return -0.55 if token in vocabulary.punctuation else -1.6


def _matrix(source: random.Random, rows: int, columns: int, spread: float) -> array[float]:
    return array("f", (source.gauss(0, spread) for _ in range(rows * columns)))


def _ones(size: int) -> array[float]:
    return array("f", [1.0] * size)


def _string(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)
