"""Toy: its tiny Stable Diffusion: the configurations, and the three stages of train.py that make it from nothing.

    python train.py vae; python train.py clip; python train.py unet

The VAE learns by reconstruction, CLIP by contrasting pictures and captions (its text tower becomes the prompt encoder),
the UNet by denoising. VAE and UNet are then trained further for the second pass, by vae --decoder-only and unet
--refine. All networks are SD 1.5's, made small. Nothing here is from the paper.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from clip import CLIP, TextEncoder, clip_bpe, load_tokenizer
from data import IDENTIFIER, AdDataset, Canvas, TrainingSamples, caption_texts
from generate import paint
from model import UNet
from programs.latents import PART, latent_keys, latent_samples, sheet_of
from programs.settings import Settings
from programs.trainer import Stage, Task
from sampler import SamplerSettings, Schedule, seeded
from support.datasets import read_items
from support.files import BadInput, write_json, write_text
from support.images import canvas_size, resize
from support.solvers import timestep_weights
from support.tensors import compute_parts, weights_fingerprint
from vae import VAE
from weights import TEXT_FILE, UNET_FILE, StableDiffusion, load_module, save_module

KL = 1e-3  # stage vae: weight of the KL term
EDGES = 4.0  # stage vae, --decoder-only: how much more errors within two pixels of an edge count
LATENT_NOISE = 0.05  # likewise: noise on the latents (standard deviation 1), because those by a UNet are not perfect
SECOND_PASS = 400  # stage unet, --refine: the second pass is learnt for t below this, out of T timesteps
NEAREST = 300  # likewise: from this timestep on, what is noised may be the first pass's picture itself
FIRST_PASS = (100, 600)  # likewise: the range of the timesteps at which the first pass's pictures are guessed

# The tiny Stable Diffusion: f = 4, so that 128-px pictures keep their edges; all else is SD 1.5's shape made small.
TOY_VAE = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
           "block_out_channels": [32, 64, 96], "layers_per_block": 1, "norm_num_groups": 8, "act_fn": "silu",
           "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
TOY_UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "act_fn": "silu",
            "block_out_channels": [48, 64, 96, 112], "layers_per_block": 1, "attention_head_dim": [1, 1, 2, 4],
            "cross_attention_dim": 128, "norm_num_groups": 8, "norm_eps": 1e-5,
            "flip_sin_to_cos": True, "freq_shift": 0,
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
            "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"]}
TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
         "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 128}
TOY_TEXT = TOWER | {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "max_position_embeddings": 32}
TOY_VISION = TOWER | {"model_type": "clip_vision_model", "image_size": 128, "patch_size": 16, "num_channels": 3}
TOY_VOCABULARY = 1024  # 512 for single bytes, the rest grown from the captions


def captions_of(items: list) -> list[tuple[str, str, str]]:
    """Each picture's caption and its two halves, in the form of the paper's prompt."""
    captions = [caption_texts(item) for item in items]
    if None in captions:
        raise BadInput("this stage trains on captions: metadata.jsonl with 'product' and 'scene' on each line")
    return captions


def initial(settings: Settings, kind: type, config: dict) -> nn.Module:
    """A module to train: random, or with the weights from the folder --init."""
    if settings.init:
        return load_module(kind, settings.init, UNET_FILE, settings.device, torch.float32).train().requires_grad_(True)
    return kind(config).to(settings.device)


# ---------------------------------------------------------------- stage vae


@dataclass
class VAELoss:
    """The error of random crops reconstructed through a 4-channel latent, plus a little KL.

    Errors are measured along the colours' principal axes, each scaled by its spread: in plain RGB the brightness
    outweighs the hues, which then wash out. With decoder_only there is no KL, and errors beside edges count more.
    """

    vae: VAE
    whiten: Tensor  # (3, 3): from RGB to the scaled axes
    size: int  # side of the pictures in pixels; crops have half of it
    decoder_only: bool = False

    def __call__(self, batch: dict, generator: torch.Generator) -> Tensor:
        x, crop = 2 * batch["image"] - 1, self.size // 2
        y0, x0 = torch.randint(self.size - crop + 1, (2,), generator=generator).tolist()
        x = x[:, :, y0 : y0 + crop, x0 : x0 + crop]
        mean, logvar = self.vae.encode(x)
        std = (logvar / 2).exp() + (LATENT_NOISE / self.vae.scaling_factor if self.decoder_only else 0)
        error = self.vae.decode(mean + std * torch.randn(mean.shape, generator=generator).to(mean)) - x
        white = torch.einsum("ij,bjhw->bihw", self.whiten, error)
        pooled = F.avg_pool2d(white, 4).square().mean()
        if self.decoder_only:
            return pooled + (white.abs() * (1 + EDGES * near_edges(x))).mean()
        kl = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        return pooled + 0.2 * white.abs().mean() + KL * kl


def near_edges(x: Tensor) -> Tensor:
    """x (B, 3, h, w) in [-1, 1] -> each pixel's nearness to edges, (B, 1, h, w): 1 within 2 pixels of a strong one."""
    dy, dx = x.diff(dim=2).abs().amax(1, True), x.diff(dim=3).abs().amax(1, True)
    steps = F.pad(dy, (0, 0, 0, 1)).maximum(F.pad(dx, (0, 1)))
    return F.max_pool2d(steps, 5, stride=1, padding=2).mul(4).clamp(max=1)


def vae_task(settings: Settings) -> Task:
    """Stage vae: reconstruction through a 4-channel latent. Raises BadInput for options that don't go together."""
    items = read_items(settings.data)[0]
    torch.manual_seed(settings.seed)
    vae = initial(settings, VAE, dict(TOY_VAE))
    if settings.decoder_only:
        if not settings.init:
            raise BadInput("--decoder-only goes with --init: name the VAE whose encoder is kept")
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
    canvas_size(1, 1, settings.size, 8)  # refuses a size that does not fit: crops have half the side
    ads = AdDataset(items, settings.size)
    some = torch.stack([ads[i]["image"] for i in range(0, len(items), max(1, len(items) // 256))])
    values, axes = torch.linalg.eigh(torch.cov(2 * some.transpose(0, 1).flatten(1)[:, ::16]))
    whiten = (axes / values.sqrt()).T.to(settings.device)

    def draw():
        x = some[:8].to(settings.device)
        decoded = vae.decode(vae.encode(2 * x - 1)[0]) / 2 + 0.5
        return sheet_of({"original": x, "decoded": decoded})

    def save(out: Path) -> None:
        if not settings.decoder_only:  # the UNet needs latents of unit variance
            z = torch.cat([vae.encode(2 * x.to(settings.device) - 1)[0] for x in some.split(32)])
            vae.scaling_factor = vae.config["scaling_factor"] = round(1 / z.std().item(), 5)
            vae.config["sample_size"] = settings.size
        save_module(vae, out / "vae", UNET_FILE, settings.save_dtype)

    loss = VAELoss(vae, whiten, settings.size, settings.decoder_only)
    following = ["unet", "--refine", "2", "--init", "UNET", "--weights"] if settings.decoder_only else ["clip", "--out"]
    return Task("the VAE", {"vae": vae}, TrainingSamples(items, settings.size), loss, draw, save,
                [["python", "train.py", *following, str(settings.out)]])


# ---------------------------------------------------------------- stage clip


@dataclass
class CLIPLoss:
    """The contrastive loss: each caption is to find its own picture among those of the batch, and vice versa."""

    clip: CLIP
    ids: tuple[Tensor, Tensor, Tensor]  # (n, L) each: tokens of the captions, their first halves, their second halves

    def __call__(self, batch: dict, generator: torch.Generator) -> Tensor:
        indices, (whole, product, scene) = batch["index"].cpu(), self.ids
        # Half of the texts are half a caption: mask-guided attention will read either half alone.
        kinds = torch.randint(4, (len(indices),), generator=generator)
        tokens = torch.stack([(whole, whole, product, scene)[k][i] for k, i in zip(kinds.tolist(), indices.tolist())])
        image = F.normalize(self.clip.encode_image(batch["image"]), dim=-1)
        text = F.normalize(self.clip.encode_text(tokens.to(image.device)), dim=-1)
        logits = self.clip.logit_scale.clamp(max=math.log(100)).exp() * image @ text.T
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def initial_clip(settings: Settings, tokenizer) -> CLIP:
    text = TOY_TEXT | {"vocab_size": tokenizer.bpe.get_vocab_size(), "eos_token_id": tokenizer.end}
    torch.manual_seed(settings.seed)
    clip = CLIP({"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": TOY_TEXT["projection_dim"],
                 "text_config": text, "vision_config": TOY_VISION | {"image_size": settings.size}}).to(settings.device)
    # Tokens that are in no caption keep these values. Among them are the identifiers' digits, which alone distinguish
    # the categories' background prompts. Longer vectors keep the transformer from washing them out.
    tokens = nn.init.normal_(clip.text_model.embeddings.token_embedding.weight, std=0.3)
    with torch.no_grad():
        tokens[tokenizer([str(d) for d in range(10)])[:, 1]] *= 3
    for embedding in (clip.text_model.embeddings.position_embedding, clip.vision_model.embeddings.position_embedding):
        nn.init.normal_(embedding.weight, std=0.02)
    return clip


def clip_task(settings: Settings) -> Task:
    """Stage clip: maps pictures and captions into one space. The text tower becomes SD's prompt encoder."""
    items, out = read_items(settings.data)[0], settings.out
    captions = captions_of(items)
    if settings.micro_batch < settings.batch:
        raise BadInput("stage clip compares the pictures in a batch and needs all at once: one process, and no "
                       "--micro-batch")
    texts = [whole for whole, *_ in captions]
    canvas_size(1, 1, settings.size, TOY_VISION["patch_size"])
    if not settings.resume:  # the vocabulary needs the identifiers' words, which are in no caption
        words = [IDENTIFIER.format(" ".join("0123456789"))] * len(texts)
        train_tokenizer(texts + words, TOY_VOCABULARY, TOY_TEXT["max_position_embeddings"], out / "tokenizer")
    tokenizer = load_tokenizer(out / "tokenizer")
    clip = initial_clip(settings, tokenizer)
    ids = tokenizer(texts), *(tokenizer([pair[k] for pair in captions]) for k in (0, 1))
    ads = AdDataset(items, settings.size)

    def draw():
        """Sixteen pictures, and below each the one among the sixteen that its caption finds."""
        images = torch.stack([ads[i]["image"] for i in range(min(16, len(items)))]).to(settings.device)
        text = clip.encode_text(ids[0][: len(images)].to(settings.device))
        image = F.normalize(clip.encode_image(images), dim=-1)
        return sheet_of({"captioned": images, "found": images[(text @ image.T).argmax(dim=1)]})

    def save(out: Path) -> None:
        save_module(clip, out / "clip", TEXT_FILE, settings.save_dtype)
        encoder = TextEncoder(clip.config["text_config"])
        encoder.text_model = clip.text_model
        save_module(encoder, out / "text_encoder", TEXT_FILE, settings.save_dtype)

    return Task("CLIP", {"clip": clip}, TrainingSamples(items, settings.size), CLIPLoss(clip, ids), draw, save,
                [["python", "train.py", "unet", "--out", str(settings.out), "--weights", str(settings.out)]])


# ---------------------------------------------------------------- stage unet


@dataclass
class UNetLoss:
    """The error of ε with prompts of five kinds, weighted by timestep, plus that of the second pass (see TwoSizes)."""

    sd: StableDiffusion
    captions: list[tuple[str, str, str]]
    weight: Tensor  # (T,)

    def __call__(self, batch: dict, generator: torch.Generator) -> Tensor:
        indices = batch["index"].tolist()
        # Whole captions; either half alone, for mask-guided attention; none, for guidance; and captions without
        # colours, because the paper's prompts name none.
        kinds = torch.multinomial(torch.tensor([0.46, 0.12, 0.17, 0.10, 0.15]), len(indices), True, generator=generator)
        texts = []
        for i, kind in zip(indices, kinds.tolist()):
            whole, product, scene = self.captions[i]
            texts.append((whole, product, scene, "", f"{product}, {scene.split(', ')[0]}")[kind])
        sd, z_0, eps, t = self.sd, batch["z_0"], batch["eps"], batch["t"]
        loss = (self.errors(sd.schedule.add_noise(z_0, eps, t), t, texts, eps) * self.weight[t]).mean()
        if "large_z_0" in batch:
            loss = loss + self.second_pass(*(batch[f"large_{n}"] for n in ("z_0", "z_first", "eps", "t", "drop")))
        return loss

    def second_pass(self, z_0: Tensor, z_first: Tensor, eps: Tensor, t: Tensor, drop: Tensor) -> Tensor:
        """The error of ε in the second pass, which has no prompt.

        The noised latent is not z_0, the picture's, but one between it and z_first, the first pass's: the larger t, the
        nearer it may be to z_first, as in sampling. The target ε is the one that leads from z_t to z_0.
        """
        schedule, far = self.sd.schedule, drop * (t / NEAREST).clamp(max=1)  # drop in [0, 1) is random
        z_t = schedule.add_noise(z_0 + far.view(-1, 1, 1, 1) * (z_first - z_0), eps, t)
        a = schedule.alpha_bar.to(z_0.device)[t].view(-1, 1, 1, 1)
        return self.errors(z_t, t, [""] * len(t), (z_t - a.sqrt() * z_0) / (1 - a).sqrt()).mean()

    def errors(self, z_t: Tensor, t: Tensor, texts: list[str], eps: Tensor) -> Tensor:
        """The squared error of ε, (B,)."""
        with torch.no_grad():
            P = self.sd.prompts(texts)
        return (self.sd.unet(z_t, t, P) - eps).square().mean(dim=(1, 2, 3))


@dataclass
class TwoSizes(Dataset):
    """Samples of the same pictures at two sizes.

    The small ones are for the first pass, with any timestep. The large ones are for the second pass: only the
    SECOND_PASS least noisy timesteps, and `z_first`, the latent that the pass starts from.
    """

    small: TrainingSamples
    large: TrainingSamples

    def __len__(self) -> int:
        return len(self.small)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        large = self.large[key]
        large["t"] = large["t"] * SECOND_PASS // self.large.T
        return self.small[key] | {f"large_{name}": large[name] for name in ("z_0", "z_first", "eps", "t", "drop")}


def first_passes(sd: StableDiffusion, small: TrainingSamples, size: int, settings: Settings) -> list[dict[str, Tensor]]:
    """A first pass's version of each picture, enlarged to `size` pixels and encoded again: "z_first" (n, 4, h, w).

    They are computed once, in float16, in the same parts as the latents of `small`. Pictures from a real first pass
    have no counterpart among the drawn ones. So each drawn picture is noised to a timestep in FIRST_PASS, and the
    UNet's guess ẑ_0 from there, with the caption, is decoded and enlarged.
    """
    items, device = small.ads.items, settings.device
    networks = [weights_fingerprint(module) for module in (sd.vae, sd.unet, sd.text_encoder)]
    texts = [[caption_texts(item)[0] for item in items[i : i + PART]] for i in range(0, len(items), PART)]

    @torch.no_grad()
    def encode(k: int) -> dict[str, Tensor]:
        means, latents = small.latents[k]["mean"], []
        for i in tqdm(range(0, len(means), 8), "first passes", disable=None):
            z_0, generator = means[i : i + 8].float() * small.scale, torch.Generator().manual_seed(k * PART + i)
            eps = torch.randn(z_0.shape, generator=generator)
            t = torch.randint(*FIRST_PASS, (len(z_0),), generator=generator)
            t, a = t.to(device), sd.schedule.alpha_bar[t].view(-1, 1, 1, 1).to(device)
            z_t = sd.schedule.add_noise(z_0.to(device), eps.to(device), t)
            with settings.autocast():
                guess = (z_t - (1 - a).sqrt() * sd.unet(z_t, t, sd.prompts(texts[k][i : i + 8]))) / a.sqrt()
                pictures = torch.stack([resize(picture, size, size) for picture in sd.decode(guess)])
                latents.append(sd.encode(pictures).to("cpu", torch.float16))
        return {"z_first": torch.cat(latents)}

    parts = zip(latent_keys(sd, items, small.ads.size, settings.amp), texts)
    keys = [["first pass", *networks, size, str(settings.amp), *part] for part in parts]
    return compute_parts(settings.cache, keys, encode)


def unet_task(settings: Settings) -> Task:
    """Stage unet: trains text to image on the base set, where product and scene are independent."""
    items, base, device = read_items(settings.data)[0], settings.weights, settings.device
    torch.manual_seed(settings.seed)
    unet = initial(settings, UNet, TOY_UNET | {"sample_size": settings.size // 4})
    if not settings.init:
        for name, parameter in unet.named_parameters():  # each residual branch starts at zero
            if name.endswith(("conv2.weight", "proj_out.weight", "conv_out.weight")):
                nn.init.zeros_(parameter)
    text_encoder = load_module(TextEncoder, base / "text_encoder", TEXT_FILE, device, torch.float32)
    vae = load_module(VAE, base / "vae", UNET_FILE, device, torch.float32)
    sd = StableDiffusion(load_tokenizer(base / "tokenizer"), text_encoder, unet, vae, Schedule())
    canvas_size(1, 1, settings.size, sd.multiple)
    loss = UNetLoss(sd, captions_of(items), timestep_weights(sd.schedule, settings.weighting).to(device))

    samples = latent_samples(sd, items, settings.size, settings, pictures=False)
    if settings.refine and settings.refine > 1:
        size = settings.refine * settings.size
        large = latent_samples(sd, items, size, replace(settings, noise_offset=0.0), pictures=False)
        first = first_passes(sd, samples, size, settings)
        large.latents = [latents | starts for latents, starts in zip(large.latents, first)]
        samples = TwoSizes(samples, large)
    return Task("the UNet", {"unet": unet}, samples, loss, lambda: draw_captions(sd, items, settings.size),
                lambda out: save_base(sd, settings.save_dtype, out),
                [["python", "train.py", "cg", "--weights", str(settings.out)]])


def draw_captions(sd: StableDiffusion, items: list, size: int):
    """Pictures painted by the captions of the first items, above the items' own pictures."""
    ads, texts = AdDataset(items[:8], size), [caption_texts(item)[:1] * 3 for item in items[:8]]
    images = torch.stack([ads[i]["image"] for i in range(len(ads))])
    blank = torch.zeros_like(images)
    painted = paint(sd, Canvas(blank, blank[:, :1], texts, seeded(0, len(images))), SamplerSettings(steps=25))
    return sheet_of({"painted": painted, "captioned": images})


def save_base(sd: StableDiffusion, dtype: torch.dtype, out: Path) -> None:
    """Writes the UNet, and the files by which other tools recognise the folder as a Stable Diffusion."""
    save_module(sd.unet, out / "unet", UNET_FILE, dtype)
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"],
             "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
             "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
             "safety_checker": [None, None], "feature_extractor": [None, None]}
    scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}
    write_json(index, out / "model_index.json")
    write_json(scheduler | sd.schedule.config, out / "scheduler" / "scheduler_config.json")


# ---------------------------------------------------------------- the tokenizer


def train_tokenizer(texts: list[str], size: int, length: int, folder: Path) -> None:
    """Learns a byte-pair vocabulary from texts and writes it in CLIP's files: vocab.json, merges.txt, config."""
    bpe = clip_bpe(models.BPE(end_of_word_suffix="</w>"))
    # single bytes, within words and at their ends, so that any text can be spelt
    single = [c + end for end in ("", "</w>") for c in sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size - len(single) - 2, end_of_word_suffix="</w>", show_progress=False, special_tokens=[]))
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))  # merges.txt, and a vocab.json in another order than CLIP's
    merges = (folder / "merges.txt").read_text("utf-8").splitlines()[1:]
    # CLIP's order: single bytes, the same as ends of words, merges; the two special tokens get the largest ids
    tokens = [*single, *dict.fromkeys(m.replace(" ", "") for m in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    write_text(json.dumps(vocabulary, ensure_ascii=False), folder / "vocab.json")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True,
                "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>"}
    write_json(settings, folder / "tokenizer_config.json")


# ---------------------------------------------------------------- the stages

# The settings were found by trial.
BASE_STAGES = {
    "vae": Stage(vae_task, dict(lr=2e-3, batch=12, steps=4800, size=128, ema=0.995, warmup=50, decay=0.5,
                                clip_gradient=1.0), data="base"),
    "clip": Stage(clip_task, dict(lr=1e-3, batch=64, steps=800, size=128, ema=0.0, warmup=100, decay=0.5,
                                  clip_gradient=1.0), data="base"),
    "unet": Stage(unet_task, dict(lr=1e-3, batch=32, steps=10400, size=128, ema=0.999, warmup=100, decay=0.3,
                                  clip_gradient=1.0, noise_offset=0.1, weighting="min-snr"), data="base"),
}
