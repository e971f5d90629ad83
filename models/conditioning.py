"""What a network is conditioned on, and the form of it that means "nothing"."""

from pathlib import Path

import torch
from torch import Tensor

ENCODERS = {"StableDiffusionPipeline": (False,), "StableDiffusionXLPipeline": (False, True), "StableDiffusion3Pipeline": (True, True)}  # projecting?
PROMPT_FILES = ["*.json", "tokenizer/*.txt", "tokenizer_2/*.txt", "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"]
SIZES = (1024, 1024, 0, 0, 1024, 1024)  # SDXL's time_ids: original height and width, crop's top and left, target's height and width
T5_TOKENS = 256  # of Stable Diffusion 3's third encoder


def class_labels(labels: Tensor | None) -> dict | None:
    """Labels [B] -> cond; None -> None."""
    return None if labels is None else {"labels": labels.long()}


def unconditional(cond: dict | None, empty: dict | None = None) -> dict:
    """The unconditional twin of a condition: label -1; of SDXL's prompts zeros, under the same time_ids.

    Of other prompts it is `empty`, the encoding of "" as one row, given to every row of cond. Raises ValueError where there is none to derive.
    """
    if cond is not None and empty is not None:
        twin = {key: value.expand(len(cond[key]), *value.shape[1:]).to(cond[key]) for key, value in empty.items() if key in cond and key != "time_ids"}
        twin |= {"time_ids": cond["time_ids"]} if "time_ids" in cond else {}
        if set(twin) != set(cond):
            raise ValueError(f"the condition has {', '.join(sorted(cond))}, and `empty` has {', '.join(sorted(empty))}: they must be of one kind")
        return twin
    if cond is not None and set(cond) == {"labels"}:
        return {"labels": torch.full_like(cond["labels"], -1)}
    if cond is not None and set(cond) == {"prompt_embeds", "pooled", "time_ids"}:
        return {key: value if key == "time_ids" else torch.zeros_like(value) for key, value in cond.items()}
    raise ValueError("guidance needs an unconditional form: give `uncond`, since only class labels and SDXL's prompts have one by themselves")


def concatenate(*conds: dict) -> dict:
    """Conditions of several batches -> the condition of the batches joined. Raises ValueError where they are of different kinds."""
    if any(set(cond) != set(conds[0]) for cond in conds):
        raise ValueError(f"conditions of different kinds cannot be joined: {', '.join(str(sorted(cond)) for cond in conds)}")
    return {key: torch.cat([cond[key] for cond in conds]) for key in conds[0]}


def take(cond: dict | None, index) -> dict | None:
    """The rows `index` (a slice or a tensor) of a condition."""
    return None if cond is None else {key: value[index] for key, value in cond.items()}


# --- prompts ---------------------------------------------------------------------------------------------------------------


class PromptEncoder:
    """Prompts -> conditions, by the CLIP text encoders of a diffusers pipeline, a folder or hub id. In float32, without gradient.

    Stable Diffusion 1 and 2: the last hidden states. SDXL: those before the last of two encoders side by side, the second's pooled embedding,
    and time_ids. Stable Diffusion 3: as its pipeline does without its third encoder, T5, whose tokens are zeros.
    Nothing else of the pipeline is read. Raises hub.ModelError where that cannot be.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu"):
        self.folder, self.device = _prompt_folder(path), torch.device(device)
        self.kind = _folders().read_json(self.folder / "model_index.json").get("_class_name")
        if self.kind not in ENCODERS:
            raise _folders().ModelError(f"{path}: the prompts of a {self.kind} cannot be encoded here, only those of {', '.join(ENCODERS)}")
        if self.kind == "StableDiffusion3Pipeline":
            self.width = _folders().read_json(self.folder / "transformer/config.json").get("joint_attention_dim", 4096)
        self.pairs = [self._pair(suffix, projecting) for suffix, projecting in zip(("", "_2"), ENCODERS[self.kind])]

    def _pair(self, suffix: str, projecting: bool) -> tuple:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # not at the top: it takes seconds

        where, words = self.folder / f"text_encoder{suffix}", self.folder / f"tokenizer{suffix}"
        kind = CLIPTextModelWithProjection if projecting else CLIPTextModel
        try:
            if not any((words / name).is_file() for name in ("tokenizer.json", "vocab.json")):  # without them transformers knows three tokens
                raise OSError(f"{words} has no vocabulary")
            tokenizer = CLIPTokenizer.from_pretrained(words, local_files_only=True)
            encoder, found = kind.from_pretrained(where, use_safetensors=True, local_files_only=True, output_loading_info=True)
        except Exception as error:  # transformers raises a dozen kinds for what is missing or damaged
            reason = " ".join(str(error).split())[:300]
            raise _folders().ModelError(f"{where}: no CLIP text encoder and tokenizer can be read for it ({reason})") from None
        if found["missing_keys"]:
            raise _folders().ModelError(f"{where}: its weights do not fit its config.json (missing: {', '.join(sorted(found['missing_keys']))[:200]})")
        return tokenizer, encoder.float().to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, prompts: list[str], time_ids: tuple[int, ...] = SIZES) -> tuple[dict, int]:
        """-> (cond, how many of the prompts had more tokens than an encoder takes, and were cut)."""
        found, cut = zip(*[self._encode(tokenizer, encoder, prompts) for tokenizer, encoder in self.pairs])
        truncated = int(torch.stack(cut).any(0).sum())
        if self.kind == "StableDiffusionPipeline":
            return {"prompt_embeds": found[0].last_hidden_state}, truncated
        embeds = torch.cat([output.hidden_states[-2] for output in found], dim=-1)
        if self.kind == "StableDiffusionXLPipeline":
            sizes = torch.tensor(time_ids, dtype=torch.float32, device=self.device).repeat(len(prompts), 1)
            return {"prompt_embeds": embeds, "pooled": found[1].text_embeds, "time_ids": sizes}, truncated
        embeds = torch.nn.functional.pad(embeds, (0, self.width - embeds.shape[-1], 0, T5_TOKENS))
        return {"prompt_embeds": embeds, "pooled": torch.cat([output.text_embeds for output in found], dim=-1)}, truncated

    def _encode(self, tokenizer, encoder, prompts: list[str]):
        length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        cut = torch.tensor([len(ids) > length for ids in tokenizer(prompts, verbose=False).input_ids])
        ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        return encoder(ids.to(self.device), output_hidden_states=True), cut


def encode_prompts(path: str, prompts: list[str], device: torch.device | str = "cpu", batch: int = 64) -> tuple[dict, int]:
    """Prompts -> (cond, how many were cut), by a pipeline's own text encoders (`PromptEncoder`), `batch` at a time."""
    if not prompts:
        raise _folders().ModelError("there are no prompts to encode: give one or more")
    encoder = PromptEncoder(path, device)
    conds, cut = zip(*[encoder(prompts[i:i + batch]) for i in range(0, len(prompts), batch)])
    return concatenate(*conds), sum(cut)


def _folders():
    from models import diffusers_folder  # not at the top: by way of models.sampling it imports this module

    return diffusers_folder


def _prompt_folder(path: str) -> Path:
    hub = _folders().hub
    return Path(path) if Path(path).is_dir() or not hub.HUB_ID.fullmatch(str(path)) else Path(hub.fetch(path, PROMPT_FILES))
