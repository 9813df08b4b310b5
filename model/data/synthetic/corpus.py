"""A small synthetic Youku-mPLUG in the published format: `mplug data synthesize OUT`.

The pre-training split and the three benchmarks are CSV files with the published columns, next to `videos/`; the
conversations of model/data/synthetic/questions.py are JSONL. Every word of a title is visible in its clip; motions and
their order only across several frames. Titles of the category benchmark
mention only background and colour, so that a model must see the category: it depends on the subject and, for two pairs
of categories, on the motion.
"""

import csv
import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from model.data.annotations import COLUMNS, INSTRUCTION, annotation_path
from model.data.synthetic.questions import conversations
from model.data.synthetic.rendering import BACKGROUNDS, COLOURS, MOTIONS, SUBJECTS, Encoding, Scene, render_clip
from model.errors import DataError, LostProcessError
from model.progress import progress

VIDEO = "videos/{dataset}_{split}_{index:05d}.mp4"
SIZES = ((320, 180), (320, 240), (352, 288), (426, 240), (240, 320))
FPS = (6, 8, 10, 12, 24)
GOPS = (8, 12, 24, 48)
DURATION_S = (3.0, 10.0)

SPLIT_SIZES: dict[str, dict[str, int]] = {
    "pretrain": {"train": 800},
    "classification": {"train": 480, "val": 48, "test": 96},
    "retrieval": {"train": 400, "val": 50, "test": 100},
    "captioning": {"train": 160, "val": 40, "test": 80},
    INSTRUCTION: {"train": 1800, "val": 40, "test": 100},
}
"""Clips per dataset and split at scale 1."""
SMALL = Encoding(width=96, height=72, fps=8, gop=16, duration_s=2.0)
"""Clips of the instruction dataset, which are many, and so are small and short."""

SUBJECT_PHRASES = {
    "皮球": ("{}色的皮球", "一只{}色皮球", "{}色大皮球"),
    "汽车": ("{}色的汽车", "一辆{}色汽车", "{}色小汽车"),
    "小猫": ("{}色的小猫", "一只{}色小猫", "{}色小猫咪"),
    "舞者": ("{}色衣服的舞者", "一位{}衣舞者", "{}衣舞者"),
    "火箭": ("{}色的火箭", "一枚{}色火箭", "{}色小火箭"),
    "帆船": ("{}色的帆船", "一艘{}色帆船", "{}色小帆船"),
}
MOTION_PHRASES = {
    "向右": ("从左向右移动", "往右边去了", "向右前进"),
    "向左": ("从右向左移动", "往左边去了", "向左前进"),
    "向上": ("从下向上升起", "往上升", "慢慢升高"),
    "向下": ("从上向下落", "往下落", "慢慢降下来"),
    "旋转": ("不停旋转", "原地转圈", "转了一圈又一圈"),
    "摇摆": ("左右摇摆", "来回晃动", "左右来回移动"),
    "靠近": ("由远及近", "越来越近", "慢慢变大"),
    "远离": ("由近及远", "越来越远", "慢慢变小"),
}
SENTENCES = (
    "{subject}在{background}上{motion}",
    "{background}上{subject}{motion}",
    "在{background}，{subject}{motion}",
)
TITLE_FRAMES = ("{}", "{}", "{}", "实拍：{}", "{}，太精彩了！", "【第{n}集】{}", "快看！{}", "{}（{n}）")
NEUTRAL_TITLES = (
    "在{background}上拍到的{colour}色瞬间",
    "{background}随手拍 第{n}集",
    "{background}上的一抹{colour}色",
    "{colour}色和{background}，值得收藏",
)

HORIZONTAL, VERTICAL = ("向左", "向右"), ("向上", "向下")
CATEGORIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "篮球": ("皮球", VERTICAL),
    "足球": ("皮球", HORIZONTAL),
    "街舞": ("舞者", ("旋转",)),
    "广场舞": ("舞者", ("摇摆",)),
    "宠物": ("小猫", tuple(MOTIONS)),
    "汽车": ("汽车", HORIZONTAL),
    "科技": ("火箭", VERTICAL),
    "旅游": ("帆船", tuple(MOTIONS)),
}
"""Category -> (subject, motions). The names are eight of the published 45. Balls and dancers differ only in their
motion."""


@dataclass(frozen=True, kw_only=True)
class SyntheticClip:
    """One clip of the corpus: path, content, and rows of the annotation file."""

    video: str
    scene: Scene
    encoding: Encoding
    rows: list[tuple[str, ...]]
    """Values of the columns of a CSV, or a line of JSON."""


def synthesize_corpus(out: Path, *, seed: int = 0, scale: float = 1.0, workers: int | None = None) -> Path:
    """Writes the corpus to `out`: annotation files, videos/, classname.json, and scenes.jsonl with the content of each
    clip.

    The same seed and scale give the same bytes. `scale` multiplies the number of clips of every split.
    """
    if scale <= 0:
        raise DataError(f"scale must be above 0, got {scale}. Use 1 for the demo's corpus, 0.1 for a quick try.")
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} must be empty or new, but it holds files. Name another folder or remove it first.")
    out.mkdir(parents=True, exist_ok=True)
    clips: list[SyntheticClip] = []
    for dataset, splits in SPLIT_SIZES.items():
        for split, size in splits.items():
            planned = list(plan_corpus(dataset, split, max(len(CATEGORIES), round(size * scale)), seed))
            rows = [row for clip in planned for row in clip.rows]
            _write_annotations(out / annotation_path(dataset, split), dataset, rows)
            clips += planned
    _write_manifests(out, clips)
    jobs = [(clip.scene, clip.encoding, f"{seed}/{clip.video}", out / clip.video) for clip in clips]
    # spawn: forking a process that holds threads (torch, tokenizers) can deadlock
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        done = pool.map(render_clip, *zip(*jobs, strict=True), chunksize=8)
        try:
            for _ in progress(done, total=len(jobs), desc="rendering clips", unit="clip"):
                pass
        except BrokenProcessPool as error:
            raise LostProcessError("a rendering process was killed, probably out of memory.") from error
    return out


def plan_corpus(dataset: str, split: str, count: int, seed: int) -> Iterator[SyntheticClip]:
    """Yields the clips of one split. Within an evaluation split no two clips show the same scene."""
    rng = random.Random(f"{seed}/{dataset}/{split}")
    seen: set[Scene] = set()
    for index in range(count):
        category = list(CATEGORIES)[index % len(CATEGORIES)] if dataset == "classification" else None
        scene = _scene(rng, category)
        while split != "train" and scene in seen:
            scene = _scene(rng, category)
        seen.add(scene)
        video = VIDEO.format(dataset=dataset, split=split, index=index)
        yield SyntheticClip(
            video=video,
            scene=scene,
            encoding=SMALL if dataset == INSTRUCTION else _encoding(rng),
            rows=_rows(rng, dataset, split, index, video, scene, category),
        )


def _scene(rng: random.Random, category: str | None) -> Scene:
    subject, motions = CATEGORIES[category] if category else (rng.choice(list(SUBJECTS)), tuple(MOTIONS))
    in_order = rng.sample(motions, 2) if len(motions) == len(MOTIONS) and rng.random() < 0.2 else [rng.choice(motions)]
    return Scene(
        subject=subject,
        colour=rng.choice(list(COLOURS)),
        background=rng.choice(list(BACKGROUNDS)),
        motions=tuple(in_order),
    )


def _encoding(rng: random.Random) -> Encoding:
    width, height = rng.choice(SIZES)
    duration_s = round(rng.triangular(*DURATION_S, DURATION_S[0] + 1.0), 2)
    return Encoding(width=width, height=height, fps=rng.choice(FPS), gop=rng.choice(GOPS), duration_s=duration_s)


def _rows(
    rng: random.Random, dataset: str, split: str, index: int, video: str, scene: Scene, category: str | None
) -> list[tuple[str, ...]]:
    match dataset:
        case "pretrain":
            return [(video, title(rng, scene))]
        case "classification":
            neutral = rng.choice(NEUTRAL_TITLES)
            words = neutral.format(background=scene.background, colour=scene.colour, n=rng.randint(1, 60))
            return [(video, words, category or "")]
        case "retrieval":
            return [(video, sentence(rng, scene))]
        case "captioning":  # as published: one text for training, a list of references for evaluation
            references = [sentence(rng, scene) for _ in range(3)]
            return [(video, references[0] if split == "train" else repr(references))]
        case _:
            return [(line,) for line in conversations(rng, index, video, scene, split)]


def sentence(rng: random.Random, scene: Scene) -> str:
    """A Chinese sentence that describes the clip."""
    motions = [rng.choice(MOTION_PHRASES[motion]) for motion in scene.motions]
    return rng.choice(SENTENCES).format(
        subject=rng.choice(SUBJECT_PHRASES[scene.subject]).format(scene.colour),
        background=scene.background,
        motion=motions[0] if len(motions) == 1 else f"先{motions[0]}，再{motions[1]}",
    )


def title(rng: random.Random, scene: Scene) -> str:
    """A sentence in the style of a video title."""
    return rng.choice(TITLE_FRAMES).format(sentence(rng, scene), n=rng.randint(1, 60))


def _write_annotations(path: Path, dataset: str, rows: list[tuple[str, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        if dataset == INSTRUCTION:
            file.writelines(f"{line}\n" for (line,) in rows)
            return
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS[dataset])
        writer.writerows(rows)


def _write_manifests(out: Path, clips: list[SyntheticClip]) -> None:
    names = {name: index for index, name in enumerate(CATEGORIES)}
    (out / "classname.json").write_text(json.dumps(names, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = (
        json.dumps({"video": clip.video, **asdict(clip.scene), **asdict(clip.encoding)}, ensure_ascii=False)
        for clip in clips
    )
    (out / "scenes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
