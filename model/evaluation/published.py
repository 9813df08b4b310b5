"""Published scores of mPLUG-Video on Youku-mPLUG, to show beside one's own."""

from dataclasses import dataclass

VALIDATION = "README of X-PLUG/Youku-mPLUG"
ABSTRACT = "abstract of arXiv 2306.04362"


@dataclass(frozen=True, kw_only=True)
class Published:
    model: str
    split: str
    scores: dict[str, float]
    source: str


def _recalls(text_to_video: tuple[float, float, float], video_to_text: tuple[float, float, float]) -> dict[str, float]:
    ways = {"text_to_video": text_to_video, "video_to_text": video_to_text}
    return {f"{way}_r{k}": value for way, values in ways.items() for k, value in zip((1, 5, 10), values, strict=True)}


PUBLISHED: dict[str, list[Published]] = {
    "classification": [
        Published(model="1.3B", split="val", scores={"top1": 0.7947, "top5": 0.9817}, source=VALIDATION),
        Published(model="2.7B", split="val", scores={"top1": 0.8025, "top5": 0.9835}, source=VALIDATION),
        Published(model="2.7B", split="test", scores={"top1": 0.8057}, source=ABSTRACT),
    ],
    "retrieval": [
        Published(
            model="1.3B",
            split="val",
            scores=_recalls((0.1515, 0.4245, 0.5660), (0.1504, 0.4067, 0.5476)),
            source=VALIDATION,
        ),
        Published(
            model="2.7B",
            split="val",
            scores=_recalls((0.1749, 0.4379, 0.5643), (0.1788, 0.4267, 0.5571)),
            source=VALIDATION,
        ),
    ],
    "captioning": [Published(model="2.7B", split="test", scores={"cider": 0.689}, source=ABSTRACT)],
}
"""By task. Only what the authors' pages and the abstract state."""
