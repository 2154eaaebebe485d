"""The toy's tiny Stable Diffusion: its configurations, and the three stages of train.py that make it from nothing.

    python train.py vae; python train.py clip; python train.py unet

VAE by reconstruction, CLIP by contrast of pictures and captions (its text tower becomes the prompt encoder), UNet by
denoising. All else is SD 1.5's shape made small. Nothing here is the paper's.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor, nn

from clip import CLIP, TextEncoder, clip_bpe, load_tokenizer
from data import Ads, Samples
from generate import IDENTIFIER, paint
from model import UNet
from sampler import Schedule, seeded, timestep_weights
from support.datasets import read_items
from support.files import BadInput, write_atomic, write_json
from support.images import canvas_size, sheet
from support.trainer import Latents, Task
from vae import VAE
from weights import TEXT_FILE, UNET_FILE, StableDiffusion, load_module, save_module

KL = 1e-3  # stage vae: weight of the KL term

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
TOY_TEXT = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "hidden_size": 128,
            "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32,
            "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 128}
TOY_VISION = {"model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3,
              "num_attention_heads": 4, "image_size": 128, "patch_size": 16, "num_channels": 3,
              "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 128}
TOY_VOCABULARY = 1024  # 512 for single bytes, the rest grown from the captions


def captions_of(items: list) -> list[tuple[str, str]]:
    """The two halves of each picture's caption, in the form of the paper's prompt."""
    captions = [item.caption for item in items]
    if None in captions:
        raise BadInput("this stage trains on captions: metadata.jsonl with 'product' and 'scene' on each line")
    return captions


def initial(args, kind: type, config: dict) -> nn.Module:
    """A module to train: random, or with the weights of the folder --init."""
    if args.init:
        return load_module(kind, args.init, UNET_FILE, args.device, torch.float32).train().requires_grad_(True)
    return kind(config).to(args.device)


def vae_task(args) -> Task:
    """Stage vae: reconstruction through a 4-channel latent."""
    items = read_items(args.data)[0]
    torch.manual_seed(args.seed)
    vae = initial(args, VAE, dict(TOY_VAE))
    if args.size % 8:
        raise BadInput(f"--size {args.size}: must be a multiple of 8: the VAE is trained on crops of half the side")
    ads = Ads(items, args.size)
    some = torch.stack([ads[i]["image"] for i in range(0, len(items), max(1, len(items) // 256))])
    # Errors are measured along the colours' principal axes, each scaled by its spread: in plain RGB the brightness
    # outweighs the hues, which then wash out.
    values, axes = torch.linalg.eigh(torch.cov(2 * some.transpose(0, 1).flatten(1)[:, ::16]))
    whiten = (axes / values.sqrt()).T.to(args.device)  # (3, 3)
    crop = args.size // 2

    def loss(batch: dict, generator) -> Tensor:
        x = 2 * batch["image"] - 1
        y0, x0 = torch.randint(args.size - crop + 1, (2,), generator=generator).tolist()
        x = x[:, :, y0 : y0 + crop, x0 : x0 + crop]
        mean, logvar = vae.encode(x)
        z = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator).to(mean)
        error = vae.decode(z) - x
        white = torch.einsum("ij,bjhw->bihw", whiten, error)
        colour = F.avg_pool2d(white, 4).square().mean() + 0.2 * white.abs().mean()
        kl = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        return colour + KL * kl

    def draw():
        x = some[:8].to(args.device)
        decoded = vae.decode(vae.encode(2 * x - 1)[0]) / 2 + 0.5
        return sheet([list(x), list(decoded)], row_labels=["original", "decoded"])

    def save(out: Path) -> None:
        # the UNet wants latents of unit variance
        z = torch.cat([vae.encode(2 * x.to(args.device) - 1)[0] for x in some.split(32)])
        vae.scaling_factor = vae.config["scaling_factor"] = round(1 / z.std().item(), 5)
        vae.config["sample_size"] = args.size
        save_module(vae, out / "vae", UNET_FILE, args.save_dtype)

    return Task({"vae": vae}, Samples(items, args), loss, draw, save)


def clip_task(args) -> Task:
    """Stage clip: pictures and their captions into one space (contrastive). The text tower becomes SD's encoder."""
    items = read_items(args.data)[0]
    captions = [", ".join(pair) for pair in captions_of(items)]
    if args.size % TOY_VISION["patch_size"]:
        raise BadInput(f"--size {args.size}: must be a multiple of {TOY_VISION['patch_size']}")
    if args.resume:
        tokenizer = load_tokenizer(args.out / "tokenizer")
    else:  # the identifiers' words belong to the vocabulary, though no caption holds them
        words = [IDENTIFIER.format(" ".join("0123456789"))] * len(captions)
        train_tokenizer(captions + words, TOY_VOCABULARY, TOY_TEXT["max_position_embeddings"], args.out / "tokenizer")
        tokenizer = load_tokenizer(args.out / "tokenizer")
    text = TOY_TEXT | {"vocab_size": tokenizer.bpe.get_vocab_size(), "eos_token_id": tokenizer.end}
    torch.manual_seed(args.seed)
    clip = CLIP({"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": TOY_TEXT["projection_dim"],
                 "text_config": text, "vision_config": TOY_VISION | {"image_size": args.size}}).to(args.device)
    # Tokens that no caption holds keep these values. The identifiers' digits are such, and the only words that tell one
    # category's background prompt from another's: longer vectors, that the transformer does not wash them out.
    tokens = nn.init.normal_(clip.text_model.embeddings.token_embedding.weight, std=0.3)
    with torch.no_grad():
        tokens[tokenizer([str(d) for d in range(10)])[:, 1]] *= 3
    for embedding in (clip.text_model.embeddings.position_embedding, clip.vision_model.embeddings.position_embedding):
        nn.init.normal_(embedding.weight, std=0.02)
    ids = tokenizer(captions)
    parts = [tokenizer([pair[k] for pair in captions_of(items)]) for k in (0, 1)]

    def loss(batch: dict, generator) -> Tensor:
        indices = batch["index"].cpu()
        # Half of the texts are one half of a caption: mask-guided attention will read either half alone.
        which = torch.randint(4, (len(indices),), generator=generator)
        tokens = torch.stack([(ids, ids, parts[0], parts[1])[w][i] for w, i in zip(which.tolist(), indices.tolist())])
        image = F.normalize(clip.encode_image(batch["image"]), dim=-1)
        text = F.normalize(clip.encode_text(tokens.to(args.device)), dim=-1)
        logits = clip.logit_scale.clamp(max=math.log(100)).exp() * image @ text.T
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    ads = Ads(items, args.size)

    def draw():
        """The pictures of sixteen captions; below each the one, of those sixteen, that its caption finds."""
        images = torch.stack([ads[i]["image"] for i in range(min(16, len(items)))]).to(args.device)
        text = clip.encode_text(ids[: len(images)].to(args.device))
        image = F.normalize(clip.encode_image(images), dim=-1)
        return sheet([list(images), list(images[(text @ image.T).argmax(dim=1)])], row_labels=["captioned", "found"])

    def save(out: Path) -> None:
        save_module(clip, out / "clip", TEXT_FILE, args.save_dtype)
        encoder = TextEncoder(text)
        encoder.text_model = clip.text_model
        save_module(encoder, out / "text_encoder", TEXT_FILE, args.save_dtype)

    return Task({"clip": clip}, Samples(items, args), loss, draw, save)


def unet_task(args) -> Task:
    """Stage unet: text to image on the base set, where product and scene are independent."""
    items = read_items(args.data)[0]
    base = args.weights
    torch.manual_seed(args.seed)
    config = TOY_UNET | {"sample_size": args.size // 4}
    unet = initial(args, UNet, config)
    if not args.init:
        for name, parameter in unet.named_parameters():  # each residual branch starts at nothing
            if name.endswith(("conv2.weight", "proj_out.weight", "conv_out.weight")):
                nn.init.zeros_(parameter)
    text_encoder = load_module(TextEncoder, base / "text_encoder", TEXT_FILE, args.device, torch.float32)
    vae = load_module(VAE, base / "vae", UNET_FILE, args.device, torch.float32)
    sd = StableDiffusion(load_tokenizer(base / "tokenizer"), text_encoder, unet, vae, Schedule())
    canvas_size(1, 1, args.size, sd.multiple)
    captions = captions_of(items)
    latents = Latents(sd, items, args)
    weight = timestep_weights(sd.schedule, args.weighting).to(args.device)

    def loss(batch: dict, generator) -> Tensor:
        indices, z_0, eps, t = batch["index"].tolist(), batch["z_0"], batch["eps"], batch["t"]
        # Whole captions, either half alone as mask-guided attention will ask for, none for the guidance, and such as
        # tell no colours, as the paper's prompts don't.
        kinds = torch.multinomial(torch.tensor([0.46, 0.12, 0.17, 0.10, 0.15]), len(indices), True, generator=generator)
        texts = [(", ".join(captions[i]), *captions[i], "", f"{captions[i][0]}, {captions[i][1].split(', ')[0]}")[k]
                 for i, k in zip(indices, kinds.tolist())]
        with torch.no_grad():
            P = sd.prompts(texts)
        output = unet(sd.schedule.add_noise(z_0, eps, t), t, P)
        return ((output - eps).square().mean(dim=(1, 2, 3)) * weight[t]).mean()

    def draw():
        count, ads = min(16, len(items)), Ads(items, args.size)
        blank = torch.zeros(count, 3, args.size, args.size, device=args.device)
        painted = paint(sd, blank, blank[:, :1], [(", ".join(pair),) * 3 for pair in captions[:count]],
                        seeded(0, count), steps=25)
        rows = []
        for start in range(0, count, 8):
            rows += [list(painted[start : start + 8]), [ads[i]["image"] for i in range(start, min(start + 8, count))]]
        return sheet(rows, row_labels=["painted", "captioned"] * (len(rows) // 2))

    def save(out: Path) -> None:
        save_module(unet, out / "unet", UNET_FILE, args.save_dtype)
        # what makes the folder a Stable Diffusion for other tools
        index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"],
                 "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
                 "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
                 "safety_checker": [None, None], "feature_extractor": [None, None]}
        scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}
        write_json(index, out / "model_index.json")
        write_json(scheduler | sd.schedule.config, out / "scheduler" / "scheduler_config.json")

    return Task({"unet": unet}, Samples(items, args, latents, pictures=False), loss, draw, save)


STAGES = {"vae": vae_task, "clip": clip_task, "unet": unet_task}


def train_tokenizer(texts: list[str], size: int, length: int, folder: Path) -> None:
    """Grows a byte-pair vocabulary on texts and writes it as CLIP's files are: vocab.json, merges.txt, config."""
    bpe = clip_bpe(models.BPE(end_of_word_suffix="</w>"))
    # single bytes, within words and at their ends: any text can be spelt
    single = [c + end for end in ("", "</w>") for c in sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size - len(single) - 2, end_of_word_suffix="</w>", show_progress=False, special_tokens=[]))
    grown = json.loads(bpe.to_str())["model"]
    merges = [m if isinstance(m, list) else m.split(" ") for m in grown["merges"]]
    # CLIP's order: single bytes, the same as ends of words, merges, and the two special tokens with the largest ids
    tokens = [*single, *dict.fromkeys("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]

    def write(scratch: Path) -> None:
        scratch.mkdir()
        vocabulary = {token: i for i, token in enumerate(tokens)}
        (scratch / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
        (scratch / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True,
                    "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
                    "unk_token": "<|endoftext|>"}
        (scratch / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")

    write_atomic(folder, write)
