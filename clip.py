"""Beside the method: CLIP's text tower, which is SD's prompt encoder; its image tower, for evaluation; its tokenizer.

The networks are built from the fields of the public config.json files, and use the public names. Shapes: token ids
(B, L), L = 77 for SD; prompts P (B, L, D); pictures (B, 3, S, S). The byte-pair merging comes from a library.
"""

import sys
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer as BPETokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from attention import attend
from support.files import BadInput, read_json

START, END = "<|startoftext|>", "<|endoftext|>"
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


def layer_norm(config: dict) -> nn.LayerNorm:
    return nn.LayerNorm(config["hidden_size"], config.get("layer_norm_eps", 1e-5))


class CLIPAttention(nn.Module):
    """Multi-head self-attention whose projections have biases. (B, L, C) -> (B, L, C)."""

    def __init__(self, channels: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, self.causal))


class CLIPMLP(nn.Module):
    """Two layers with an activation between them. (B, L, C) -> (B, L, C)."""

    def __init__(self, channels: int, hidden: int, activation: str):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPLayer(nn.Module):
    """Self-attention and MLP, each on the normalised input and added to it. (B, L, C) -> (B, L, C)."""

    def __init__(self, config: dict, causal: bool):
        super().__init__()
        channels = config["hidden_size"]
        self.layer_norm1 = layer_norm(config)
        self.self_attn = CLIPAttention(channels, config["num_attention_heads"], causal)
        self.layer_norm2 = layer_norm(config)
        self.mlp = CLIPMLP(channels, config["intermediate_size"], config.get("hidden_act", "quick_gelu"))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def clip_layers(config: dict, causal: bool) -> nn.Sequential:
    """The `encoder` of either tower: (B, L, C) -> (B, L, C)."""
    layers = (CLIPLayer(config, causal) for _ in range(config["num_hidden_layers"]))
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*layers)))


class TextEmbeddings(nn.Module):
    """Token embedding plus position embedding. (B, L) -> (B, L, D)."""

    def __init__(self, config: dict):
        super().__init__()
        self.token_embedding = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.position_embedding = nn.Embedding(config["max_position_embeddings"], config["hidden_size"])

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


def text_transformer(config: dict) -> nn.Sequential:
    """(B, L) int64 -> (B, L, D), the last hidden state after the final norm."""
    return nn.Sequential(OrderedDict(embeddings=TextEmbeddings(config), encoder=clip_layers(config, causal=True),
                                     final_layer_norm=layer_norm(config)))


class TextEncoder(nn.Module):
    """SD's prompt encoder: CLIP's text tower. ids (B, L) int64 -> P (B, L, D)."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.text_model = text_transformer(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.text_model(ids)


class VisionEmbeddings(nn.Module):
    """A class token and the embedded patches, plus position embeddings. (B, 3, S, S) -> (B, 1 + (S / patch)², D)."""

    def __init__(self, config: dict):
        super().__init__()
        channels, patch = config["hidden_size"], config["patch_size"]
        self.class_embedding = nn.Parameter(torch.zeros(channels))
        self.patch_embedding = nn.Conv2d(3, channels, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config["image_size"] // patch) ** 2 + 1, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)
        return torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """(B, 3, S, S), normalised -> (B, D), the class token after the last norm."""

    def __init__(self, config: dict):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = layer_norm(config)  # (sic)
        self.encoder = clip_layers(config, causal=False)
        self.post_layernorm = layer_norm(config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.pre_layrnorm(self.embeddings(x)))
        return self.post_layernorm(x[:, 0])


class CLIP(nn.Module):
    """Both towers with their projections into one space, where a picture lies near its caption.

    The image tower measures (section 5.2); the text tower is also SD's prompt encoder.
    """

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's preprocessing

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        # Older files repeat a tower's fields, and transformers follows the second
        text, vision = (config[f"{tower}_config"] | (config.get(f"{tower}_config_dict") or {})
                        for tower in ("text", "vision"))
        n = config["projection_dim"]
        self.text_model, self.vision_model = text_transformer(text), VisionTransformer(vision)
        self.text_projection = nn.Linear(text["hidden_size"], n, bias=False)
        self.visual_projection = nn.Linear(vision["hidden_size"], n, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.get("logit_scale_init_value", 2.6592)))

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, n), not normalised: the state at the end token, which has the largest id."""
        x = self.text_model(ids)
        return self.text_projection(x[torch.arange(len(x), device=x.device), ids.argmax(dim=-1)])

    def preprocess(self, x: Tensor) -> Tensor:
        """Pictures of any size, (B, 3, H, W) in [0, 1] -> (B, 3, S, S), S the config's image_size: the middle square.

        Antialiased bicubic interpolation makes the short side S; half of an odd margin is rounded to even, as in
        OpenAI's code (up to Pillow's rounding to 8 bits). transformers rounds it down, which may shift by a pixel.
        """
        S, (h, w) = self.config["vision_config"]["image_size"], x.shape[2:]
        if min(h, w) != S:
            h, w = S * h // min(h, w), S * w // min(h, w)
            x = F.interpolate(x, size=(h, w), mode="bicubic", antialias=True).clamp(0, 1)
        top, left = round((h - S) / 2), round((w - S) / 2)
        return x[:, :, top : top + S, left : left + S]

    def encode_image(self, x: Tensor) -> Tensor:
        """x (B, 3, S, S) in [0, 1], S the config's image_size -> (B, n), not normalised."""
        mean, std = (x.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return self.visual_projection(self.vision_model((x - mean) / std))


class Tokenizer:
    """CLIP's byte-pair encoding: lower case, each digit apart, start and end tokens, padded to `length`."""

    def __init__(self, bpe: BPETokenizer, length: int = 77, pad: str = END):
        self.bpe, self.length = bpe, length
        self.start, self.end, self.pad = (bpe.token_to_id(t) for t in (START, END, pad))
        self.noted = set()  # texts that were too long: each is reported once

    def __call__(self, texts: list[str]) -> Tensor:
        """B texts -> (B, length) int64. A text that is too long is cut before the end token, with a line on stderr."""
        ids = torch.full((len(texts), self.length), self.pad)
        for text, row, encoding in zip(texts, ids, self.bpe.encode_batch(texts, add_special_tokens=False)):
            if (n := len(encoding.ids)) > self.room:
                self.note(text, f"has {n} tokens; the text encoder reads {self.room}, the last {n - self.room} are cut")
            tokens = [self.start, *encoding.ids[: self.room], self.end]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    @property
    def room(self) -> int:
        """How many tokens a text may have, beside start and end."""
        return self.length - 2

    def count(self, text: str) -> int:
        """How many tokens a text has, without start and end."""
        return len(self.bpe.encode(text, add_special_tokens=False).ids)

    def shorten(self, text: str, before: str = "", after: str = "") -> str:
        """The text, cut to as many words as the text encoder can read between `before` and `after`, which are never
        cut. A line on stderr reports a cut.
        """
        if self.count(before + text + after) <= self.room:
            return text
        end = bisect_right(range(len(text)), self.room, key=lambda i: self.count(before + text[: i + 1] + after))
        words = text[:end].rstrip()
        if len(words) == end and end < len(text) and not text[end].isspace() and len(words.split()) > 1:
            words = words.rsplit(maxsplit=1)[0]  # the last one is not whole
        self.note(text, f"is too long for the text encoder beside '{before}{after}'; it is cut to {words!r}")
        return words

    def note(self, text: str, what: str) -> None:
        """Reports on stderr, once for each text, what is done with it."""
        if text not in self.noted:
            self.noted.add(text)
            print(f"{text if len(text) <= 60 else text[:60] + '...'!r} {what}", file=sys.stderr)


def clip_bpe(model: models.BPE) -> BPETokenizer:
    """CLIP's normalisation and splitting around a byte-pair model."""
    bpe = BPETokenizer(model)
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, behavior="removed", invert=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.add_special_tokens([START, END])
    return bpe


def read_bpe(folder: Path) -> BPETokenizer:
    """Reads vocab.json and merges.txt, or tokenizer.json. Raises BadInput if they are missing or broken."""
    vocabulary, merges, whole = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    pair = vocabulary.is_file() and merges.is_file()
    if not pair and not whole.is_file():
        raise BadInput(f"{folder} holds no tokenizer; put CLIP's vocab.json and merges.txt there, or name the folder "
                       "that holds them by --tokenizer")
    try:
        if pair:
            files = str(vocabulary), str(merges)
            return clip_bpe(models.BPE.from_file(*files, unk_token=END, end_of_word_suffix="</w>"))
        bpe = BPETokenizer.from_file(str(whole))
    except Exception as error:  # the library raises bare Exceptions
        raise BadInput(f"{folder}: the tokenizer can't be read ({error}); download its files again") from None
    bpe.no_padding()  # transformers may have stored padding and truncation there; Tokenizer does both itself
    bpe.no_truncation()
    return bpe


def add_trained_tokens(bpe: BPETokenizer, folder: Path, settings: dict) -> None:
    """Adds tokens that were trained beside the vocabulary (textual inversion), under the folder's own ids for them.

    They are in added_tokens.json or in the settings' added_tokens_decoder. Raises BadInput if an id can't be kept.
    """
    file = folder / "added_tokens.json"
    older = read_json(file) if file.is_file() else {}
    try:
        listed = {id: {"content": text, "normalized": True} for text, id in older.items()}
        listed |= settings.get("added_tokens_decoder", {})
        tokens = {int(id): AddedToken(**token) for id, token in listed.items() if token["content"] not in (START, END)}
        bpe.add_tokens([tokens[id] for id in sorted(tokens)])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{folder}: its added tokens can't be read ({error}); download its files again") from None
    for id, token in tokens.items():
        if bpe.token_to_id(token.content) != id:
            raise BadInput(f"{folder}: the token {token.content!r} has the id {id}, and would get "
                           f"{bpe.token_to_id(token.content)} after those of its vocabulary; download its files again")


def load_tokenizer(folder: Path | str, pad: str | None = None) -> Tokenizer:
    """Loads a tokenizer; its length, padding and trained tokens are those of the folder's settings.

    pad: the padding token if the folder does not name one; by default the end token. Raises BadInput if a file is
    missing or broken, or if this is not CLIP's tokenizer.
    """
    folder = Path(folder)
    bpe = read_bpe(folder)
    settings = {"pad_token": pad or END}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # in SD 2.x they differ, and the second is right
        for field, value in read_json(folder / name).items() if (folder / name).is_file() else ():
            if value is not None:  # a dict may be a special token with flags
                settings[field] = value.get("content", value) if isinstance(value, dict) else value
    supported = {"bos_token": START, "eos_token": END, "padding_side": "right", "truncation_side": "right"}
    for field, value in supported.items():
        if settings.get(field, value) != value:
            raise BadInput(f"{folder}: {field} {settings[field]!r} is not supported (only CLIP's {value!r} is)")
    add_trained_tokens(bpe, folder, settings)
    pad, length = str(settings["pad_token"]), settings.get("model_max_length", 77)
    bpe.add_special_tokens([pad])  # as in transformers: a '!' that pads is never part of a word
    if not isinstance(length, (int, float)) or not length >= 3:  # this form refuses NaN, too
        raise BadInput(f"{folder}: model_max_length {length!r} is no number of tokens; 77 is CLIP's")
    tokenizer = Tokenizer(bpe, 77 if length > 10**6 else int(length), pad)  # transformers writes 10^30 for "not known"
    if None in (tokenizer.start, tokenizer.end, tokenizer.pad):
        raise BadInput(f"{folder} is not CLIP's tokenizer: its vocabulary lacks a start, end or padding token")
    return tokenizer
