"""Which special tokens the families add to their sentencepiece models.

The ids were read in the authors' tokenizer code, of which none publishes them with the model file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from jaxllm.errors import InputError
from jaxllm.tokenizers.files import read_bytes
from jaxllm.tokenizers.sentencepiece_model import SentencePieceTokenizer, parse_model
from jaxllm.tokenizers.sentencepiece_proto import BYTE, CONTROL, USER_DEFINED, ModelProto, Piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class Specials:
    """What a family makes of a sentencepiece model.

    Attributes:
      in_model: pieces of the model that are special tokens, although to sentencepiece they are text.
      after_model: special token -> id, counted from the number of pieces; negative: in place of one of the last.
      bos, eos, pad: special tokens or the unknown piece, or None.
      prefix, suffix: special tokens around a prompt.
      icetk: whether the pieces for special tokens, blanks and bytes that icetk adds when it starts must be added.
      first_id: id of the model's first piece.
    """

    in_model: tuple[str, ...] = ()
    after_model: Mapping[str, int] = dataclasses.field(default_factory=dict)
    bos: str | None = "<s>"
    eos: str | None = "</s>"
    pad: str | None = None
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    icetk: bool = False
    first_id: int = 0


ICETK_SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
ICETK_MAX_BLANKS = 80
ICETK_NUM_IMAGES = 20_000
ICETK_TEXTS = {"<n>": "\n", "<|tab|>": "\t"} | {f"<|blank_{n}|>": " " * n for n in range(2, ICETK_MAX_BLANKS + 1)}

_CHATGLM2 = {"[MASK]": 0, "[gMASK]": 1, "[sMASK]": 2, "sop": 3, "eop": 4}
_CHATGLM3 = _CHATGLM2 | {"<|system|>": 5, "<|user|>": 6, "<|assistant|>": 7, "<|observation|>": 8}
_INTERNLM2 = {
    "<|plugin|>": -6,
    "<|interpreter|>": -5,
    "<|action_end|>": -4,
    "<|action_start|>": -3,
    "<|im_end|>": -2,
    "<|im_start|>": -1,
}
_GLM = {"<|endoftext|>": 0, "[SEP]": 1, "[CLS]": 2, "[MASK]": 3, "[UNK]": 4, "<|startofpiece|>": 6, "<|endofpiece|>": 7}
_GLM_PROMPT = {
    "bos": None,
    "eos": "<|endoftext|>",
    "pad": "<|endoftext|>",
    "prefix": ("[CLS]",),
    "suffix": ("[gMASK]", "<|startofpiece|>"),
}
_ICETK = {"icetk": True, "bos": "<sop>", "eos": "<eop>", "suffix": ("[gMASK]", "<sop>")}

SPECIALS = {
    "llama": Specials(prefix=("<s>",)),
    "baichuan": Specials(in_model=("<reserved_102>", "<reserved_103>"), pad="<unk>"),
    "baichuan2": Specials(in_model=("<reserved_106>", "<reserved_107>"), pad="<unk>"),
    "internlm": Specials(in_model=("<eoh>", "<eoa>"), prefix=("<s>",)),
    "internlm2": Specials(after_model=_INTERNLM2, pad="</s>", prefix=("<s>",)),
    "chatglm": Specials(in_model=("<pad>", *ICETK_SPECIALS), pad="<pad>", **_ICETK),
    "glm130b": Specials(in_model=ICETK_SPECIALS, first_id=ICETK_NUM_IMAGES, **_ICETK),
    "chatglm2": Specials(after_model=_CHATGLM2, pad="<unk>", prefix=("[gMASK]", "sop")),
    "chatglm3": Specials(after_model=_CHATGLM3, pad="<unk>", prefix=("[gMASK]", "sop")),
    # [gMASK] has the id of the end of a piece: the 10B model was trained so.
    "glm_10b_chinese": Specials(after_model=_GLM | {"[gMASK]": 7, "[sMASK]": 8, "[dBLOCK]": 9}, **_GLM_PROMPT),
    "glm_large_chinese": Specials(after_model=_GLM | {"[sMASK]": 8, "[gMASK]": 9, "[dBLOCK]": 10}, **_GLM_PROMPT),
}


def sentencepiece_tokenizer(path: str | PathLike[str], family: str) -> SentencePieceTokenizer:
    """Read a sentencepiece model with the special tokens of `family`, a key of SPECIALS.

    Raises:
      InputError: no such file, no sentencepiece model, or one that lacks what the family's special tokens need.
    """
    path = Path(path)
    specials = SPECIALS[family]
    content = read_bytes(path)
    proto = parse_model(content, str(path))
    if specials.icetk:
        content = _with_icetk_pieces(proto)
    places = {piece.text: k for k, piece in enumerate(proto.pieces)}
    for text in specials.in_model:
        if text not in places:
            raise InputError(f"{path}: found no piece {text!r}, expected one in the model of {family}")
    first_id, num_pieces = specials.first_id, len(proto.pieces)
    ids = {text: first_id + places[text] for text in specials.in_model}
    ids |= {text: first_id + num_pieces + k for text, k in specials.after_model.items()}
    try:
        return SentencePieceTokenizer(
            content,
            special_tokens=ids,
            bos_token=specials.bos,
            eos_token=specials.eos,
            pad_token=specials.pad,
            prefix_tokens=specials.prefix,
            suffix_tokens=specials.suffix,
            text_of_pieces=ICETK_TEXTS if specials.icetk else None,
            first_id=first_id,
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _with_icetk_pieces(proto: ModelProto) -> bytes:
    """Append the pieces that icetk adds to its model, and return the bytes of the result."""
    if any(piece.text == ICETK_SPECIALS[0] for piece in proto.pieces):
        return proto.serialize()
    proto.pieces += [Piece(text, kind=CONTROL) for text in ICETK_SPECIALS]
    proto.pieces += [Piece(text, kind=USER_DEFINED) for text in ICETK_TEXTS if text != "<n>"]
    proto.pieces += [Piece(f"<0x{byte:02X}>", kind=BYTE) for byte in range(256)]
    return proto.serialize(byte_fallback=True)
