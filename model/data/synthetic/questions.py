"""Conversations about the clips of the synthetic corpus, in the format of ms-swift: what moves, its colour, where, how.

In training a conversation asks all questions about a clip, in any order. In evaluation the last question of a
conversation counts, which `question_type` names. Every answer is visible in the clip; direction and order only across
frames.
"""

import json
import random
from collections.abc import Iterable, Iterator

from model.data.synthetic.rendering import Scene

QUESTIONS: dict[str, tuple[str, ...]] = {
    "what": ("什么在动？", "视频里有什么？", "画面里的是什么？"),
    "colour": ("它是什么颜色的？", "是什么颜色？", "它的颜色是什么？"),
    "where": ("它在哪里？", "这是在哪里？", "背景是哪里？"),
    "direction": ("它怎么动？", "它往哪里动？", "它在怎么移动？"),
    "order": ("它先怎么动？", "一开始它怎么动？", "它先做了什么？"),
}
"""Question type -> ways to ask."""
EARLIER = 2
"""Most questions before the one that an evaluation asks."""


def answers(scene: Scene) -> dict[str, str]:
    """The answer to each type of question that the scene has. A scene has a direction, or an order of two."""
    kind = "direction" if len(scene.motions) == 1 else "order"
    seen = {"what": scene.subject, "colour": f"{scene.colour}色", "where": scene.background, kind: scene.motions[0]}
    return {question: seen[question] for question in QUESTIONS if question in seen}


def conversations(rng: random.Random, index: int, video: str, scene: Scene, split: str) -> Iterator[str]:
    """JSON lines about the clip `index`: one in training, otherwise one about its looks and one about its motion."""
    known = answers(scene)
    *looks, motion = known
    if split == "train":
        orders = [rng.sample(list(known), len(known))]
    else:
        orders = [_before(rng, known, last) for last in (looks[index % len(looks)], motion)]
    for asked in orders:
        messages = []
        for turn, question in enumerate(asked):
            text = rng.choice(QUESTIONS[question])
            messages.append({"role": "user", "content": text if turn else f"<video>{text}"})
            messages.append({"role": "assistant", "content": known[question]})
        record = {"messages": messages, "videos": [video], "question_type": asked[-1]}
        yield json.dumps(record, ensure_ascii=False)


def _before(rng: random.Random, known: Iterable[str], last: str) -> list[str]:
    """Some question types, then the one that counts."""
    others = [question for question in known if question != last]
    return [*rng.sample(others, rng.randint(0, EARLIER)), last]
