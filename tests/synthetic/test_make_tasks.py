import json
from pathlib import Path

import pytest
import soundfile

from rwkv_speech.synthetic import world
from rwkv_speech.synthetic.make_tasks import KINDS, main
from rwkv_speech.synthetic.voices import TEST_VARIANTS, TRAIN_VARIANTS


def test_make_tasks_writes_every_task_with_its_own_voices_and_sentences(tmp_path: Path):
    count = len(KINDS)
    assert main(["--out", str(tmp_path), "--train", str(count), "--valid", "1", "--test", str(count)]) == 0
    for name, variants in (("train", TRAIN_VARIANTS), ("test", TEST_VARIANTS)):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [row["task"] for row in rows] == [task for task, _, _ in KINDS]
        assert [row["lang"] for row in rows] == [lang for _, _, lang in KINDS]
        assert all(row["speaker"].partition("+")[2] in variants for row in rows)
        for row in rows:
            for turn in row.get("turns", [row]):
                assert turn.get("answer") or turn["text"]
                seconds = soundfile.info(tmp_path / turn["audio_filepath"]).duration
                assert turn["duration"] == pytest.approx(seconds, abs=1e-4)
        spanish, asked, talk = rows[3], rows[4], rows[-1]
        assert spanish["source_lang"] == "es" and world.split(spanish["text"]) == name
        assert world.split(asked["source_text"]) == name and "text" not in asked
        assert world.split(rows[0]["text"]) == name and len(talk["turns"]) >= 2
