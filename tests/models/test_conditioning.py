"""Conditions: their unconditional forms, and prompts encoded as diffusers' own pipelines encode them."""

import json
import shutil

import pytest
import torch
from conftest import save_autoencoder
from diffusers import (AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline,
                       StableDiffusionXLPipeline)
from test_diffusers_conditional import condition, tiny
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models import hub
from models.conditioning import PromptEncoder, concatenate, encode_prompts, take, unconditional
from models.hub import ModelError
from models.sampling import ddim

LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [*"0123456789,."]
MERGES = ["c a", "ca t</w>", "d o", "do g</w>"]
WORDS = [*LETTERS, *(letter + "</w>" for letter in LETTERS), *(merge.replace(" ", "") for merge in MERGES), "<|startoftext|>", "<|endoftext|>"]
PROMPTS = ["a cat", "", "a dog, a cat and 3 dogs", "dog " * 90, "cat " * 75, "cat " * 76]
CUT = 2  # of these, the fourth and the last: 75 tokens fit beside the two that begin and end a prompt
PIPELINES = ("sd", "sdxl", "sd3")


def tokenizer(folder, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of letters, from the files that the published ones have."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, "pad_token": pad, "tokenizer_class": "CLIPTokenizer"}))
    return CLIPTokenizer.from_pretrained(folder)


def text_encoder(kind: type, seed: int, width: int = 8, projected: int = 10):
    torch.manual_seed(seed)
    return kind(CLIPTextConfig(vocab_size=len(WORDS), hidden_size=width, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
                               max_position_embeddings=77, projection_dim=projected, bos_token_id=len(WORDS) - 2, eos_token_id=len(WORDS) - 1)).eval()


def make_pipeline(kind: str, folder):
    """A pipeline of diffusers with all its parts, tiny and untrained, saved in `folder`."""
    betas = DDIMScheduler(steps_offset=1, clip_sample=False)
    words = tokenizer(folder / "words" / "1"), tokenizer(folder / "words" / "2", pad=".")  # SDXL pads its second with another token
    parts = {"vae": AutoencoderKL.from_pretrained(save_autoencoder(folder / "words" / "vae")), "tokenizer": words[0]}
    if kind == "sd":
        pipe = StableDiffusionPipeline(**parts, text_encoder=text_encoder(CLIPTextModel, 1, 12), unet=tiny("sd"), scheduler=betas,
                                       safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    elif kind == "sdxl":
        pipe = StableDiffusionXLPipeline(**parts, tokenizer_2=words[1], text_encoder=text_encoder(CLIPTextModel, 1, 4), scheduler=betas,
                                         text_encoder_2=text_encoder(CLIPTextModelWithProjection, 2), unet=tiny("sdxl"))
    else:
        encoders = {name: text_encoder(CLIPTextModelWithProjection, seed, 4, 5) for seed, name in enumerate(("text_encoder", "text_encoder_2"))}
        pipe = StableDiffusion3Pipeline(**parts, **encoders, tokenizer_2=words[1], text_encoder_3=None, tokenizer_3=None, transformer=tiny("sd3"),
                                        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.save_pretrained(folder / "pipe")
    return pipe, str(folder / "pipe")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return {kind: make_pipeline(kind, tmp_path_factory.mktemp(kind)) for kind in PIPELINES}


def theirs(kind: str, pipe, prompts: list[str]) -> dict:
    """diffusers' own embeddings, and those of guidance's other half under "negative_"."""
    if kind == "sd":
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt(prompts, "cpu", 1, True)))
    more = {"prompt_2": None, "prompt_3": None} if kind == "sd3" else {}
    return dict(zip(("prompt_embeds", "negative_prompt_embeds", "pooled", "negative_pooled"), pipe.encode_prompt(prompts, **more, device="cpu")))


@pytest.mark.parametrize("kind", PIPELINES)
def test_encoding_is_theirs(pipelines, kind):
    """Prompts are encoded as the pipeline's own encode_prompt does, bit for bit, and those that were cut are counted."""
    pipe, path = pipelines[kind]
    cond, cut = encode_prompts(path, PROMPTS)
    wanted = theirs(kind, pipe, PROMPTS)
    assert cut == CUT and all(torch.equal(cond[key], wanted[key]) for key in cond if key != "time_ids")
    assert set(cond) == {"sd": {"prompt_embeds"}, "sdxl": {"prompt_embeds", "pooled", "time_ids"}, "sd3": {"prompt_embeds", "pooled"}}[kind]
    said = hub.description(path)["conditions"]
    assert {key: list(value.shape[1:]) for key, value in cond.items()} == said
    assert not any(value.requires_grad or value.dtype != torch.float32 for value in cond.values())
    if kind == "sdxl":
        assert cond["time_ids"].tolist() == [[1024, 1024, 0, 0, 1024, 1024]] * len(PROMPTS)
    assert not torch.allclose(cond["prompt_embeds"][0], cond["prompt_embeds"][2])


@pytest.mark.parametrize("kind", PIPELINES)
def test_unconditional_form_is_theirs(pipelines, kind):
    """The other half of guidance is diffusers' own: the encoding of "", or SDXL's zeros, whatever its sizes."""
    pipe, path = pipelines[kind]
    encoder = PromptEncoder(path)
    cond, wanted = encoder(PROMPTS)[0], theirs(kind, pipe, PROMPTS)
    found = unconditional(cond, None if kind == "sdxl" else encoder([""])[0])
    assert set(found) == set(cond) and all(torch.allclose(found[key], wanted[f"negative_{key}"], rtol=0, atol=1e-6) for key in cond if key != "time_ids")
    if kind == "sdxl":
        assert torch.equal(found["time_ids"], cond["time_ids"])


def test_in_batches(pipelines):
    """A prompt's encoding does not depend on the batch that it is in."""
    path = pipelines["sdxl"][1]
    (one, cut), (three, again) = encode_prompts(path, PROMPTS, batch=1), encode_prompts(path, PROMPTS, batch=3)
    assert cut == again == CUT and all(torch.allclose(one[key], three[key], rtol=0, atol=1e-6) for key in one)


@pytest.mark.parametrize("kind", PIPELINES)
def test_from_words_to_latents(pipelines, kind):
    """The encoded prompts fit the network of the same folder: latents differ by their prompt."""
    path = pipelines[kind][1]
    cond, denoiser = encode_prompts(path, ["a cat", "a dog"])[0], hub.load_denoiser(path)
    z = torch.randn(1, hub.description(path)["channels"], 8, 8).repeat(2, 1, 1, 1)
    x = ddim(denoiser, z, 2, cond)
    assert x.isfinite().all() and not torch.allclose(x[0], x[1])


def test_a_hub_id(pipelines, monkeypatch):
    """Of a model on the hub only tokenizers and CLIP encoders are fetched, and no pickle."""
    fetched, path = [], pipelines["sdxl"][1]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: fetched.append((name, *allow_patterns)) or path)
    cond, _ = encode_prompts("owner/name", ["a cat"])
    assert torch.equal(cond["pooled"], encode_prompts(path, ["a cat"])[0]["pooled"])
    assert len(fetched) == 1 and not any("unet" in p or "vae" in p or p.endswith((".bin", ".pt", ".ckpt")) for p in fetched[0])


def test_unconditional_forms():
    """Labels become -1; a row of `empty` is given to every row; what cannot be derived is refused."""
    assert unconditional({"labels": torch.tensor([4, 0])})["labels"].tolist() == [-1, -1]
    cond, empty = condition("sdxl", 3), {"prompt_embeds": torch.ones(1, 5, 12), "pooled": torch.ones(1, 10), "time_ids": torch.zeros(1, 6)}
    given, derived = unconditional(cond, empty), unconditional(cond)
    assert (given["prompt_embeds"] == 1).all() and len(given["pooled"]) == 3 and torch.equal(given["time_ids"], cond["time_ids"])
    assert not derived["prompt_embeds"].any() and torch.equal(derived["time_ids"], cond["time_ids"])
    assert all(value.shape == (6, *cond[key].shape[1:]) for key, value in concatenate(derived, cond).items())
    assert all(torch.equal(value, cond[key][1:]) for key, value in take(cond, slice(1, None)).items())
    for bad in (None, condition("sd", 2), condition("sd3", 2)):
        with pytest.raises(ValueError, match="give `uncond`"):
            unconditional(bad)
    with pytest.raises(ValueError, match="of one kind"):
        unconditional(condition("sd3", 2), condition("sd", 1))


DAMAGES = {
    "another pipeline": (lambda f: (f / "model_index.json").write_text('{"_class_name": "SanaPipeline"}'), "prompts of a SanaPipeline"),
    "no pipeline": (lambda f: (f / "model_index.json").unlink(), "not a configuration"),
    "no encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder: no CLIP text encoder"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer has no vocabulary"),
    "no words": (lambda f: [(f / "tokenizer" / name).unlink(missing_ok=True) for name in ("tokenizer.json", "vocab.json")], "tokenizer has no vocabulary"),
    "a pickle": (lambda f: (f / "text_encoder/model.safetensors").rename(f / "text_encoder/pytorch_model.bin"), "text_encoder: no CLIP text encoder"),
    "deeper": (lambda f: (f / "text_encoder/config.json").write_text((f / "text_encoder/config.json").read_text().replace(
        '"num_hidden_layers": 3', '"num_hidden_layers": 4')), "do not fit its config.json"),
}


@pytest.mark.parametrize("damage, said", DAMAGES.values(), ids=DAMAGES)
def test_refusals(pipelines, tmp_path, damage, said):
    """What is missing, damaged or of another kind is refused in one sentence."""
    shutil.copytree(pipelines["sd"][1], tmp_path / "pipe")
    damage(tmp_path / "pipe")
    with pytest.raises(ModelError) as refused:
        encode_prompts(str(tmp_path / "pipe"), ["a cat"])
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_no_prompts(pipelines):
    with pytest.raises(ModelError, match="no prompts"):
        encode_prompts(pipelines["sd"][1], [])
