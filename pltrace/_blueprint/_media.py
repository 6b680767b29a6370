"""Converts images, audio, video and files, wherever their providers put the bytes."""

from __future__ import annotations

import re
from base64 import b64encode
from functools import partial
from typing import NamedTuple

from pltrace._blueprint._base import (
    Block,
    Converter,
    JsonEncoder,
    add_known,
    dict_of,
    first_of,
    joined_text,
    maybe_str,
    str_of,
    text_block,
    text_blocks,
)

#: A data URL that is longer is left out as a whole: the encoder bounds all texts, and half of one is of no use.
LONGEST = 1_000_000
_HOLDERS = ("source", "file", "input_audio", "image_url", "audio", "video")


class _Source(NamedTuple):
    """Where the bytes of a medium are."""

    url: str
    mime: str | None
    form: str

    @property
    def too_long(self) -> bool:
        """Whether it is too much to be kept."""
        return self.form == "base64" and len(self.url) > LONGEST

    def instead(self, title: str) -> Block:
        """What stands in the place of a medium that is too much."""
        return text_block(f"[{title} left out: {self.mime}, {len(self.url)} characters of base64]")


def image(block: Block, _encoder: JsonEncoder) -> list[Block]:
    """An image of any provider's shape."""
    source = _source(block, "image/png")
    if source.form == "neither":
        return [_media_block(source, block, "image")]
    if source.too_long:
        return [source.instead("image")]
    made: Block = {"url": source.url}
    add_known(made, detail=_holder(block).get("detail"))
    return [{"type": "image_url", "image_url": made}]


def produced(block: Block) -> Block:
    """The same block as a model's product: media an assistant sends are its own work."""
    if block["type"] == "image_url":
        url, mime, _ = _source(block, "image/png")
    elif block["type"] == "media" and block["media"]["format"] != "neither" and block["media"]["type"]:
        url, mime = block["media"]["url"], block["media"]["type"]
    else:
        return block
    mime = mime or "image/png"
    family = mime.split("/", 1)[0]
    if family not in {"image", "audio", "video"}:
        return block
    return {"type": "output_media", "url": url, "mime_type": mime, "media_type": family}


def _holder(block: Block) -> Block:
    """The dict that says where the bytes are; each provider nests it under a name of its own."""
    for key in _HOLDERS:
        value = block.get(key)
        if isinstance(value, dict):
            return value
    return block


def _source(block: Block, default_mime: str) -> _Source:
    holder = _holder(block)
    mime = first_of(holder, "mime_type", "media_type") or first_of(block, "mime_type", "media_type")
    if mime is None and isinstance(holder.get("format"), str):
        mime = f"{default_mime.split('/')[0]}/{holder['format']}"
    mime = None if mime is None else str_of(mime)
    data = first_of(holder, "base64", "data", "file_data")
    if isinstance(data, (bytes, bytearray)):
        data = b64encode(data).decode()
    if data is not None:
        url = str_of(data)
        if not url.startswith("data:"):
            mime = mime or default_mime
            url = f"data:{mime};base64,{url}"
    else:
        url = first_of(holder, "url", "file_url", "file_uri", "image_url")
        if url is None:
            return _Source(str_of(first_of(holder, "file_id", "id")), mime, "neither")
        url = str_of(url)
    if url.startswith("data:"):
        return _Source(url, mime or re.split("[;,]", url[5:256], maxsplit=1)[0] or default_mime, "base64")
    return _Source(url, mime, "url")


def _media(title: str, default_mime: str, block: Block, _encoder: JsonEncoder) -> list[Block]:
    made = [_media_block(_source(block, default_mime), block, title)]
    transcript = _holder(block).get("transcript")
    if transcript is not None:
        made.append(text_block(str_of(transcript)))
    return made


def _media_block(source: _Source, block: Block, title: str) -> Block:
    for place in (_holder(block), block, dict_of(block.get("extras")), dict_of(block.get("metadata"))):
        title = maybe_str(first_of(place, "filename", "title")) or title
    if source.too_long:
        return source.instead(title)
    return {
        "type": "media",
        "media": {"title": title, "type": source.mime, "url": source.url, "format": source.form},
    }


def _spoken(block: Block, encoder: JsonEncoder) -> list[Block]:
    """Audio, which Google's classes give as bare bytes."""
    data = block.get("audio")
    return _media("audio", "audio/wav", {"data": data} if isinstance(data, bytes) else block, encoder)


def _document(block: Block, encoder: JsonEncoder) -> list[Block]:
    """A file or document: text where it is text, else media."""
    source = _holder(block)
    if "text" in (source.get("type"), block.get("source_type")):
        body = first_of(source, "data", "text")
    elif source.get("type") == "content":
        body = joined_text(source.get("content"))
    else:
        body = block.get("text")
    made = [] if body is not None else _media("file", "application/octet-stream", block, encoder)
    heading = (block.get("title") if body is not None else None, block.get("context"), body)
    return text_blocks(*[str_of(text) for text in heading if text is not None]) + made


CONVERTERS: dict[str, Converter] = {
    "image": image,
    "image_url": image,
    "input_image": image,
    "audio": _spoken,
    "input_audio": _spoken,
    "video": partial(_media, "video", "video/mp4"),
    "media": partial(_media, "media", "application/octet-stream"),
    "file_data": partial(_media, "file", "application/octet-stream"),
    "file": _document,
    "input_file": _document,
    "text-plain": _document,
    "document": _document,
}
