"""A conversation with a model about videos and images. Every medium is encoded once, and every turn is read once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase, TextStreamer

from model.causal_lm import room_for
from model.mplug_owl_video.configuration import MEDIA_IDS
from model.mplug_owl_video.modeling import MplugOwlForConditionalGeneration
from model.mplug_owl_video.processing import (
    ImageSource,
    MplugOwlProcessor,
    VideoSource,
    chat_text,
    read_image,
    sampled_frames,
)


class Chat:
    """What was shown and said so far, as embeddings, and the decoder's keys and values of them."""

    def __init__(self, model: MplugOwlForConditionalGeneration, processor: MplugOwlProcessor) -> None:
        self.model, self.processor = model.eval(), processor
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.shown: list[tuple[str, Tensor]] = []
        """Kind and vectors of the media that the next question will show."""
        self.embeddings: Tensor | None = None
        self.cache = self._empty_cache()

    @torch.no_grad()
    def show_video(self, video: VideoSource, num_frames: int | None = None, decoder: str = "pyav") -> None:
        """Shows a clip with the next question. Raises ValueError if it cannot be read or has too few frames."""
        frames = sampled_frames(video, num_frames or self.processor.num_frames, decoder)
        self._show("video", self.processor.preprocess(frames).transpose(0, 1)[None])  # (1, C, T, H, W)

    @torch.no_grad()
    def show_image(self, image: ImageSource) -> None:
        """Shows an image with the next question. Raises ValueError if it cannot be read."""
        self._show("image", self.processor.preprocess([read_image(image)]))

    def _show(self, kind: str, pixels: Tensor) -> None:
        self.shown.append((kind, self.model.encode_media(pixels.to(self.model.device))))

    @torch.no_grad()
    def ask(self, question: str, show: Callable[[str], object], max_new_tokens: int = 512, **options: Any) -> str:
        """The answer; `show` receives it in pieces as it is generated.

        `options` are those of `generate` of transformers. If it is interrupted, the next question follows the part that
        was generated. Raises ValueError if the conversation is too long for the decoder.
        """
        prompt = self._prompt(question)
        longest = room_for(self.model.config.text_config, prompt.shape[1], max_new_tokens)
        written = _Written(self.processor.tokenizer, show)
        end = self.processor.tokenizer.eos_token_id
        try:
            self.model.language_model.generate(
                inputs_embeds=prompt,
                attention_mask=prompt.new_ones(prompt.shape[:2], dtype=torch.long),
                past_key_values=self.cache,
                streamer=written,
                max_new_tokens=longest,
                eos_token_id=end,
                pad_token_id=end,
                **options,
            )
        except BaseException:
            self.cache = self._empty_cache()  # some layers may have one token more
            raise
        finally:
            # as in training, an end token follows each answer
            ids = torch.tensor([[*[number for number in written.ids if number != end], end]], device=prompt.device)
            self.embeddings = torch.cat((prompt, self.model.embed(ids)), dim=1)
            self.shown = []
        return self.processor.decode(written.ids, skip_special_tokens=True).strip()

    def _prompt(self, question: str) -> Tensor:
        """Embeddings (1, L, H) of the conversation so far, the media that are shown, and the question."""
        parts = [*({"type": kind, kind: kind} for kind, _ in self.shown), {"type": "text", "text": question}]
        message, system = {"role": "user", "content": parts}, self.processor.system
        if self.embeddings is None:
            ids = self.processor.encode(chat_text([message], system, add_generation_prompt=True))
        else:  # continues the text after the last answer
            ids = self.processor.encode(chat_text([message], "", add_generation_prompt=True))[1:]
        media = {
            number: torch.cat(vectors)
            for kind, number in MEDIA_IDS.items()
            if (vectors := [found for shown, found in self.shown if shown == kind])
        }
        asked = self.model.embed(torch.tensor([ids], device=self.model.device), media=media)
        return asked if self.embeddings is None else torch.cat((self.embeddings, asked), dim=1)

    def _empty_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config.text_config)


class _Written(TextStreamer):
    """Collects the generated tokens, and shows their text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.show, self.ids = show, list[int]()

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.show(text)
