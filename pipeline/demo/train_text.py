"""Train the small text encoder of the demo from nothing, on captions of drawn shapes only.

It learns what its words mean by looking: the pooled state of a caption is drawn to the images that the
caption is true of and away from the others (as CLIP, arXiv 2103.00020, with the image side held fixed as in
LiT, arXiv 2111.07991). What it looks at are class token and mean patch token of the demo's teacher. The two
heads are thrown away afterwards.

The folder `text` beside this file was made, in 2 minutes on one core, by

    python -m repa.pipeline.demo.train_text --out pipeline/demo/text

which reported, of 480 held-out images (seed 1, never trained on) and all 60 prompts in six phrases each: the
best prompt has the right shape for 100.0 % and the right colour for 99.7 %. The last bits depend on processor
and library versions, so a repetition gives other weights of like quality.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from . import TEACHER_WEIGHTS, TEXT_LENGTH, TEXT_OPTIONS, TEXT_WIDTH
from .captions import FULL_PHRASES, captions, say, told, vocabulary
from .shapes import CLASS_NAMES, COLOUR_NAMES, scene
from .train_teacher import HELD_OUT_SEED, TRAINING_SEED, DrawnSet, build_teacher, learning_rate, normalise

PAD, BEGIN, UNKNOWN, END = "<pad>", "<begin>", "<unknown>", "<end>"
SPECIAL = (PAD, BEGIN, UNKNOWN, END)  # transformers takes an end of number 2 for an old mistake of its own
FORGOTTEN = 0.15
TEXT_MODEL: Any = CLIPTextModel
TEXT_CONFIG: Any = CLIPTextConfig
TOKENIZER: Any = PreTrainedTokenizerFast


def build_tokenizer() -> Any:
    """Build the tokenizer, a number for each word that captions have and one for all others."""
    numbers = {word: number for number, word in enumerate((*SPECIAL, *vocabulary()))}
    words = Tokenizer(models.WordLevel(numbers, unk_token=UNKNOWN))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(name, numbers[name]) for name in (BEGIN, END)]
    )
    names = {"pad_token": PAD, "bos_token": BEGIN, "unk_token": UNKNOWN, "eos_token": END}
    return TOKENIZER(tokenizer_object=words, model_max_length=TEXT_LENGTH, **names)


def build_text_model() -> Any:
    """Build it untrained, from token numbers `[B, S]` to states `[B, S, 64]` and a pooled state `[B, 64]`."""
    return TEXT_MODEL(TEXT_CONFIG(**TEXT_OPTIONS))


def tokenize(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Return token numbers int64 `[B, S]`."""
    numbers: torch.Tensor = tokenizer(
        texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    )["input_ids"]
    return numbers


@torch.no_grad()
def look(count: int, seed: int) -> torch.Tensor:
    """Return what the teacher sees in images of a seed, class token and mean patch token, `[count, 256]`."""
    teacher = build_teacher()
    teacher.load_state_dict({name: weight.float() for name, weight in load_file(TEACHER_WEIGHTS).items()})
    teacher.eval()
    found = []
    for images in torch.split(DrawnSet(count, seed).images, 64):
        tokens = teacher.forward_features(normalise(images))
        found.append(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1))
    return torch.cat(found)


class TextAndImage(nn.Module):
    """The text model, the two heads it is trained with, and the temperature."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.text = build_text_model()
        self.text_head = nn.Linear(TEXT_WIDTH, TEXT_WIDTH, bias=False)
        # channels of the teacher are of very unequal sizes
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("scale", 1.0 / features.std(0))
        self.image_head = nn.Linear(features.shape[1], TEXT_WIDTH, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor(0.1).log())

    def of_texts(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return unit vectors `[B, 64]` of token numbers `[B, S]`."""
        return F.normalize(self.text_head(self.text(input_ids=numbers).pooler_output), dim=-1)

    def of_images(self, features: torch.Tensor) -> torch.Tensor:
        """Return unit vectors `[B, 64]` of what the teacher sees `[B, 256]`."""
        return F.normalize(self.image_head((features - self.mean) * self.scale), dim=-1)


class CaptionedSet:
    """Images of one seed as the teacher sees them, with their captions.

    Attributes:
        features: float32 `[N, 256]`.
        shapes: int64 `[N]`, classes.
        colours: int64 `[N]`, positions of the hues.
        texts: every caption of every image, `[N][P]`.
        numbers: their tokens, int64 `[N, P, S]`.
        told: shape and colour that each caption tells, −1 where it tells none, int64 `[N, P, 2]`.
    """

    def __init__(self, count: int, seed: int, tokenizer: Any) -> None:
        self.features = look(count, seed)
        self.shapes = torch.arange(count) % len(CLASS_NAMES)
        self.colours = torch.tensor([scene(index, seed).hue for index in range(count)])
        self.texts = [captions(index, seed) for index in range(count)]
        flat = [text for texts in self.texts for text in texts]
        self.numbers = tokenize(tokenizer, flat).view(count, -1, TEXT_LENGTH)
        found = [told(text) for text in flat]
        pairs = [[-1 if each is None else each for each in (one.shape, one.colour)] for one in found]
        self.told = torch.tensor(pairs).view(count, -1, 2)


def contrastive_loss(similarity: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Return the mean of InfoNCE over texts and over images, with all true pairs as positives.

    Args:
        similarity: of texts (rows) and images, over temperature, `[B, B]`.
        true: whether the text is true of the image, bool `[B, B]`, somewhere in each row and column.
    """
    terms = []
    for scores, right in ((similarity, true), (similarity.T, true.T)):
        of_right = scores.log_softmax(1).masked_fill(~right, -torch.inf)
        terms.append(-of_right.logsumexp(1).mean())
    return 0.5 * (terms[0] + terms[1])


def train(steps: int, batch: int, peak: float, count: int, seed: int) -> tuple[TextAndImage, Any]:
    """Run the optimisation, and return text model with heads in evaluation mode, and the tokenizer."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    drawn = CaptionedSet(count, TRAINING_SEED, tokenizer)
    model = TextAndImage(drawn.features)
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    # words that tell neither shape nor colour may be forgotten, so that unknown ones disturb little
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    dull = torch.tensor([name not in SPECIAL and told(name) == told("") for name in names])
    unknown = SPECIAL.index(UNKNOWN)
    started = time.monotonic()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        rows = torch.randint(count, (batch,))
        which = torch.randint(drawn.numbers.shape[1], (batch,))
        numbers, tells = drawn.numbers[rows, which], drawn.told[rows, which]
        numbers = torch.where(dull[numbers] & (torch.rand(numbers.shape) < FORGOTTEN), unknown, numbers)
        shows = torch.stack([drawn.shapes[rows], drawn.colours[rows]], dim=1)
        true = ((tells[:, None] == shows[None]) | (tells[:, None] < 0)).all(-1)
        similarity = model.of_texts(numbers) @ model.of_images(drawn.features[rows]).T
        loss = contrastive_loss(similarity / model.log_temperature.exp(), true)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
    return model.eval(), tokenizer


@torch.no_grad()
def held_out_accuracy(model: TextAndImage, tokenizer: Any, count: int = 480) -> tuple[float, float]:
    """Return the shares of held-out images whose best prompt has the right shape and the right colour.

    Chosen from are the prompts of every shape in every colour, in each of the phrases.
    """
    pairs = [(shape, colour) for shape in range(len(CLASS_NAMES)) for colour in range(len(COLOUR_NAMES))]
    features = look(count, HELD_OUT_SEED)
    shapes = torch.arange(count) % len(CLASS_NAMES)
    colours = torch.tensor([scene(index, HELD_OUT_SEED).hue for index in range(count)])
    right = torch.zeros(2)
    for phrase in FULL_PHRASES:
        texts = [say(phrase, CLASS_NAMES[shape], COLOUR_NAMES[colour]) for shape, colour in pairs]
        best = (model.of_images(features) @ model.of_texts(tokenize(tokenizer, texts)).T).argmax(1)
        chosen = torch.tensor(pairs)[best]
        right += torch.stack([chosen[:, 0] == shapes, chosen[:, 1] == colours]).float().mean(1)
    shape, colour = (right / len(FULL_PHRASES)).tolist()
    return shape, colour


def save(text: Any, tokenizer: Any, folder: Path) -> None:
    """Write config.json, float16 weights and the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    text.half().save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # transformers keeps them to their owner, and an installed package is for all
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Parse the command line, train, save, and report the numbers of the saved files."""
    parser = argparse.ArgumentParser(description="Train the demo's text encoder on captions of drawn shapes.")
    parser.add_argument("--out", type=Path, required=True, help="folder for config.json, weights, tokenizer")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--images", type=int, default=4096, help="number of training images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = train(
        options.steps, options.batch, options.learning_rate, options.images, options.seed
    )
    save(model.text, tokenizer, options.out)
    model.text = TEXT_MODEL.from_pretrained(options.out, dtype=torch.float32).eval()
    shape, colour = held_out_accuracy(model, tokenizer)
    print(f"held-out images whose best prompt is right: shape {shape:.4f}, colour {colour:.4f}")


if __name__ == "__main__":
    main()
