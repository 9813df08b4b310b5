import csv
import json
import subprocess
import time
from pathlib import Path

import av
import psutil
import pytest

from model.data.annotations import COLUMNS, read_annotations
from model.data.synthetic.corpus import CATEGORIES, HORIZONTAL, SPLIT_SIZES, plan_corpus, synthesize_corpus
from model.data.synthetic.questions import QUESTIONS
from model.data.synthetic.rendering import SUBJECTS
from model.errors import LOST, DataError
from tests.helpers.paths import FIXTURES, MPLUG

CLASS_NAMES = json.loads((FIXTURES / "classname.json").read_text(encoding="utf-8"))


def test_the_corpus_has_the_published_files_and_columns(corpus: Path) -> None:
    for dataset, columns in COLUMNS.items():
        for split in SPLIT_SIZES[dataset]:
            with (corpus / dataset / f"{split}.csv").open(encoding="utf-8", newline="") as file:
                rows = list(csv.reader(file))
            assert tuple(rows[0]) == columns
            assert all((corpus / row[0]).is_file() for row in rows[1:])


def test_categories_are_published_names() -> None:
    assert len(CLASS_NAMES) == 45
    assert set(CATEGORIES) <= set(CLASS_NAMES)


def test_the_seed_determines_the_bytes(tmp_path: Path) -> None:
    first, again, other = (
        synthesize_corpus(tmp_path / name, seed=seed, scale=0.001) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert (first / "scenes.jsonl").read_bytes() != (other / "scenes.jsonl").read_bytes()


def test_clips_are_h264_with_varied_properties(corpus: Path) -> None:
    seen = set()
    for path in sorted((corpus / "videos").iterdir()):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            if path.name.startswith("instruction"):
                assert (stream.width, stream.height, stream.frames) == (96, 72, 16)
                continue
            assert min(stream.width, stream.height) >= 180
            assert 2.9 <= stream.frames / stream.average_rate <= 10.1
            seen.add((stream.width, stream.height, int(stream.average_rate)))
    assert len({size[:2] for size in seen}) >= 4
    assert len({fps for *_, fps in seen}) >= 4


def test_titles_do_not_reveal_the_category() -> None:
    for clip in plan_corpus("classification", "train", 200, seed=0):
        ((_, title, label),) = clip.rows
        assert label not in title
        assert not any(subject[-1] in title for subject in SUBJECTS)


def test_balls_differ_only_in_motion() -> None:
    clips = [clip for clip in plan_corpus("classification", "train", 200, seed=0) if clip.scene.subject == "皮球"]
    assert {clip.rows[0][2] for clip in clips} == {"篮球", "足球"}
    assert all((clip.rows[0][2] == "足球") == (clip.scene.motions[0] in HORIZONTAL) for clip in clips)


def test_no_two_test_clips_show_the_same_scene() -> None:
    scenes = [clip.scene for clip in plan_corpus("retrieval", "test", 100, seed=0)]
    assert len(set(scenes)) == len(scenes)


def test_some_captions_describe_an_order() -> None:
    clips = list(plan_corpus("pretrain", "train", 200, seed=0))
    ordered = [clip for clip in clips if len(clip.scene.motions) == 2]
    assert 20 < len(ordered) < 80
    assert all("先" in clip.rows[0][1] and "再" in clip.rows[0][1] for clip in ordered)


def test_every_question_has_the_answer_of_its_clip(corpus: Path) -> None:
    scenes = {}
    for line in (corpus / "scenes.jsonl").read_text(encoding="utf-8").splitlines():
        content = json.loads(line)
        scenes[content["video"]] = content
    kinds = {text: kind for kind, texts in QUESTIONS.items() for text in texts}
    asked = set()
    for split in ("train", "test"):
        for row in read_annotations(str(corpus), "instruction", split):
            scene = scenes[row.video]
            right = {"what": scene["subject"], "colour": scene["colour"] + "色", "where": scene["background"]}
            right["order" if len(scene["motions"]) == 2 else "direction"] = scene["motions"][0]
            texts = [message["content"][-1]["text"] for message in row.conversation]
            found = {kinds[question]: answer for question, answer in zip(texts[::2], texts[1::2], strict=True)}
            assert found.items() <= right.items()
            assert kinds[texts[-2]] == row.label
            assert split == "test" or len(found) == 4
            asked.add(row.label)
    assert asked == set(QUESTIONS)


def test_captions_of_an_evaluation_split_have_three_references(corpus: Path) -> None:
    assert all(len(row.references) == 3 for row in read_annotations(str(corpus), "captioning", "test"))


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(DataError, match="must be empty or new"):
        synthesize_corpus(tmp_path)


def test_a_killed_rendering_process_is_restartable(tmp_path: Path) -> None:
    command = [MPLUG, "data", "synthesize", str(tmp_path / "corpus")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "corpus").glob("videos/*")):  # the processes are rendering
        time.sleep(0.05)
    psutil.Process(child.pid).children()[-1].kill()
    _, output = child.communicate(timeout=60)
    assert child.returncode == LOST
    assert "error: a rendering process was killed" in output
    assert "Traceback" not in output
